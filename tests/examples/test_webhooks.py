"""The docs' page on webhooks: its app is served by its command, by one process and by two."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from promptlayer_exec import Session
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "webhooks.md").read_text(encoding="utf-8")
DONE = Scenario([SimNode("Report", "done", is_output_node=True)])
SETTINGS = {
    "APP_SECRET": "of the app",
    "WEBHOOK_SECRET": "webhook's",
}


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


APP, OTHER_FRAMEWORK, _, TEST = blocks("python")
SERVE, RIGHT, _ = blocks("sh")
CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="the docs' commands use curl")


def free_port() -> int:
    """Return a port that nobody uses now: the app must know its own URL before it listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


class Process:
    """The docs' app, served by the docs' command."""

    def __init__(self, folder: Path, sim: Simulator, app: str, called_back_at: str = "") -> None:
        (folder / "app.py").write_text(app)
        self.url = f"http://127.0.0.1:{free_port()}"
        self.environment = {
            **os.environ,
            **SETTINGS,
            "APP_URL": called_back_at or self.url,
            "DATABASE_URL": f"sqlite:///{folder / 'app.sqlite'}",
            "PROMPTLAYER_API_KEY": sim.api_key,
            "PROMPTLAYER_BASE_URL": sim.base_url,
        }
        command = shlex.split(SERVE.splitlines()[-1])
        port = self.url.rpartition(":")[2]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", *command, "--port", port],
            cwd=folder,
            env=self.environment,
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
        sim.webhook_url = f"{self.url}/webhook"
        self.log = ""
        while "Uvicorn running on" not in self.log:
            line = self.process.stdout.readline()  # type: ignore[union-attr]
            assert line, self.log
            self.log += line

    def run(self, *commands: str) -> str:
        """Run shell commands of the docs against this process, and return their output."""
        script = "\n".join(commands).replace("http://127.0.0.1:8000", self.url)
        script = script.replace("curl -i", "curl --silent --show-error --max-time 10 -i")
        return subprocess.run(
            ["sh", "-euc", script],
            capture_output=True,
            text=True,
            check=True,
            env=self.environment,
            timeout=30,
        ).stdout

    def write_report(self) -> str:
        """Have a report written, and return the answer."""
        write = f"curl -i -X POST {self.url}/reports?topic=otters"
        return self.run(write).partition("\n\n")[2]

    def end(self) -> str:
        """Stop the process, and return its log."""
        self.process.terminate()
        self.log += self.process.communicate(timeout=10)[0]
        return self.log


@pytest.fixture
def serve(tmp_path: Path, threaded_sim: Simulator) -> Iterator[Callable[..., Process]]:
    """Return a function that serves an app."""
    threaded_sim.webhook_secret = SETTINGS["WEBHOOK_SECRET"]
    threaded_sim.add_workflow("write-report", DONE)
    with ExitStack() as stack:

        def start(app: str, called_back_at: str = "") -> Process:
            served = Process(tmp_path, threaded_sim, app, called_back_at)
            stack.enter_context(served.process)
            stack.callback(served.process.kill)
            return served

        yield start


@CURL
def test_the_app_receives_webhooks_and_finds_a_lost_start(
    threaded_sim: Simulator, serve: Callable[..., Process]
) -> None:
    """Posted with curl: a right webhook, a repeated and a forged one; then a start is lost."""
    sim = threaded_sim
    app = serve(APP)
    (right,) = blocks("text")
    assert app.run(RIGHT).startswith(right.rstrip())
    assert app.run(RIGHT).startswith(right.rstrip())
    assert app.run(RIGHT.replace("$signature", "0")).startswith("HTTP/1.1 401")
    assert sim.request_count == 0

    sim.inject(Fault.disconnect(), path="/run")
    assert app.write_report() == '"done"'
    assert len(sim.runs) == 1
    log = app.end()
    assert "ERROR" not in log
    assert not any(secret in log for secret in SETTINGS.values())


def with_sharing() -> str:
    """Return the app for several worker processes, as the page says to change it."""
    app = APP
    for diff in blocks("diff"):
        (removed,) = re.findall(r"^-(.*\n)", diff, re.MULTILINE)
        added = "".join(re.findall(r"^\+(.*\n)", diff, re.MULTILINE))
        assert removed in app
        app = app.replace(removed, added)
    return app


@CURL
def test_a_callback_to_one_process_is_found_by_another(
    threaded_sim: Simulator, serve: Callable[..., Process]
) -> None:
    """One worker process loses a start, and the other is called back; there is one start in all."""
    called = serve(with_sharing())
    app = serve(with_sharing(), called.url)
    threaded_sim.inject(Fault.disconnect(), path="/run")
    assert app.write_report() == '"done"'
    assert len(threaded_sim.runs) == 1
    assert re.search(r'"POST /callbacks/\S+ HTTP/1.1" 204', called.end())
    log = app.end()
    assert "callbacks" not in log
    assert "ERROR" not in log


async def test_the_code_for_other_frameworks_works(sim: Simulator, session: Session) -> None:
    """It answers as the routes do."""
    namespace: dict[str, Any] = {}
    exec(compile(OTHER_FRAMEWORK, "page", "exec"), namespace)
    status_for = namespace["status_for"]
    assert status_for(session, b"{}", {}, "secret") == 401
    for text, status in (('{"event_type": "x"}', 204), ("[]", 422), (FINISHED, 204)):
        signature = {"X-PromptLayer-Signature": sign(text, "secret")}
        assert status_for(session, text.encode(), signature, "secret") == status


FINISHED = '{"details": {"agent_execution_id": 1001}, "event_type": "agent_run_finished"}'


def sign(text: str, secret: str) -> str:
    """Sign a text that is spelled as the signature wants it."""
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


async def test_the_test_on_the_page_passes(promptlayer_simulator: Simulator) -> None:
    """It finds a lost start again."""
    page: dict[str, Any] = {}
    exec(compile(TEST, "test_page.py", "exec"), page)
    await page["test_a_lost_start_is_found_again"](promptlayer_simulator)
