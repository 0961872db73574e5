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
from types import ModuleType
from typing import Any

import pytest

from promptlayer_exec import Session
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "webhooks.md").read_text(encoding="utf-8")
FASTAPI = (DOCS / "fastapi.md").read_text(encoding="utf-8")
DONE = Scenario([SimNode("Report", "done", is_output_node=True)])
SETTINGS = {
    "APP_PASSWORD": "secret",
    "APP_SECRET": "of the app",
    "WEBHOOK_SECRET": "webhook's",
}


def blocks(language: str, page: str = PAGE) -> list[str]:
    """Return the code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


APP, OTHER_FRAMEWORK, SHARING, _, TESTS = blocks("python")
_, SERVE, RIGHT, FORGED, OVERSIZED, _ = blocks("sh")
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
        (folder / "page.html").write_text(blocks("html", FASTAPI)[0])
        self.url = f"http://127.0.0.1:{free_port()}"
        self.environment = {
            **os.environ,
            **SETTINGS,
            "APP_URL": called_back_at or self.url,
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

    def start_report(self) -> str:
        """Start a report, and return the answer."""
        start = f"curl -i -u me:secret -X POST {self.url}/reports?topic=otters"
        return self.run(start).partition("\n\n")[2]

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


def without_headers(response: str) -> str:
    """Return the status line and the body of a response."""
    head, _, body = response.partition("\n\n")
    return f"{head.splitlines()[0]}\n\n{body}\n".replace("\n\n\n", "\n")


def test_the_app_is_short() -> None:
    """It has fewer than 60 lines."""
    assert len(APP.splitlines()) < 60


@CURL
def test_the_app_receives_webhooks_and_finds_a_lost_start(
    threaded_sim: Simulator, serve: Callable[..., Process]
) -> None:
    """Posted with curl: a right one, a repeated, a forged and an oversized one; end to end, all."""
    sim = threaded_sim
    app = serve(APP)
    right, forged = blocks("text")
    assert without_headers(app.run(RIGHT)) == right
    assert without_headers(app.run(RIGHT)) == right
    assert without_headers(app.run(RIGHT, FORGED).partition("\n\n")[2]) == forged
    assert app.run(OVERSIZED).startswith("HTTP/1.1 413")
    assert sim.request_count == 0

    sim.inject(Fault.disconnect(), path="/run")
    assert app.start_report() == '{"execution_id":"1001"}'
    assert len(sim.runs) == 1
    events = app.run(f"curl -i -u me:secret {app.url}/executions/1001/events")
    assert '"value":"done"' in events
    log = app.end()
    assert "ERROR" not in log
    assert "/callbacks/... " in log
    for secret in (*SETTINGS.values(), sim.runs[0].body["callback_url"].rpartition("/")[2]):
        assert secret not in log or secret == "secret"


def with_sharing() -> str:
    """Return the app for several worker processes, as the page says to change it."""
    app = APP
    for diff in blocks("diff"):
        (removed,) = re.findall(r"^-(.*\n)", diff, re.MULTILINE)
        (added,) = re.findall(r"^\+(.*\n)", diff, re.MULTILINE)
        assert removed in app
        app = app.replace(removed, added)
    return app.replace("callbacks = Callbacks(", f"{SHARING}\n\ncallbacks = Callbacks(", 1)


@CURL
def test_a_callback_to_one_process_is_found_by_another(
    threaded_sim: Simulator, serve: Callable[..., Process]
) -> None:
    """One worker process loses a start, and the other is called back; there is one start in all."""
    called = serve(with_sharing())
    app = serve(with_sharing(), called.url)
    threaded_sim.inject(Fault.disconnect(), path="/run")
    assert app.start_report() == '{"execution_id":"1001"}'
    assert [request.method for request in threaded_sim.requests] == ["GET", "POST"]
    assert '"POST /callbacks/... HTTP/1.1" 204' in called.end()
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


async def test_the_tests_on_the_page_pass(promptlayer_simulator: Simulator) -> None:
    """Each with a simulator of its own."""
    page = ModuleType("test_page")
    exec(compile(TESTS, "test_page.py", "exec"), vars(page))
    names = [name for name in vars(page) if name.startswith("test_")]
    assert len(names) == 2
    for name in names:
        with Simulator() as sim:
            await getattr(page, name)(sim)
