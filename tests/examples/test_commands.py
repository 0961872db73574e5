"""The commands of the pages on batches, operating them, the doctor, the viewer, MCP and installing.

Those of the other pages are run beside what else their page shows. A block is `shell` in place of
`sh` if it prepares a machine, or runs the checks, this one too: no test runs it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import promptlayer_exec
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

ROOT = Path(__file__).parents[2]
RUN_ELSEWHERE = {
    "README.md": "test_readme",
    "docs/fastapi.md": "test_web_apps",
    "docs/frontends.md": "test_frontends",
    "docs/once.md": "test_web_apps",
    "docs/production.md": "test_proxies",
    "docs/reference/command-line.md": "test_docs",
    "docs/tutorial.md": "test_readme",
    "docs/webhooks.md": "test_webhooks",
}
RUN_HERE = (
    "docs/batches.md",
    "docs/costs.md",
    "docs/doctor.md",
    "docs/installing.md",
    "docs/mcp.md",
    "docs/operating.md",
    "docs/viewer.md",
)


def blocks(page: str) -> list[str]:
    """Return a page's blocks of commands."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def environment(sim: Simulator, directory: Path) -> dict[str, str]:
    """Return an environment in which the commands find the simulator, and no other database."""
    kept = {name: it for name, it in os.environ.items() if not name.startswith("PROMPTLAYER")}
    return kept | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PROMPTLAYER_API_KEY": sim.api_key,
        "PROMPTLAYER_BASE_URL": sim.base_url,
        "PROMPTLAYER_EXEC_DB": f"sqlite:///{directory / 'batches.sqlite'}",
        "XDG_STATE_HOME": str(directory / "state"),
    }


@pytest.fixture
def settings(threaded_sim: Simulator, tmp_path: Path) -> dict[str, str]:
    """Return the environment of the commands; the server has the workflows of the pages."""
    answer = Scenario([SimNode("Answer", "done", is_output_node=True)])
    for workflow in ("grade", "support-agent", "write-report"):
        threaded_sim.add_workflow(
            workflow, lambda _: answer, inputs={"topic": "string"}, definition=answer
        )
    threaded_sim.add_execution(answer, execution_id=787)
    threaded_sim.add_execution(answer, execution_id=788)
    return environment(threaded_sim, tmp_path)


def run(script: str, directory: Path, settings: dict[str, str]) -> str:
    """Run a block, of which each command must succeed, and return what it prints."""
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=directory,
        env=settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (script, done.stdout, done.stderr)
    return done.stdout


def typed(script: str) -> str:
    """Return a block without the reader's database and key, and without a question."""
    script = script.replace("batch delete", "batch delete --yes")
    lines = script.splitlines(keepends=True)
    return "".join(
        line for line in lines if not re.match("export PROMPTLAYER_(EXEC_DB|API_KEY)", line)
    )


def test_each_block_is_run_or_is_not_called_sh() -> None:
    """A new page with commands names the test that runs them."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    names = (str(page.relative_to(ROOT)) for page in pages)
    assert {name for name in names if blocks(name)} == {*RUN_ELSEWHERE, *RUN_HERE}
    tests = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    for page, test in RUN_ELSEWHERE.items():
        text = tests[test].read_text(encoding="utf-8")
        assert f'"{Path(page).name}"' in text or page in text


def test_the_commands_on_batches_work(settings: dict[str, str], tmp_path: Path) -> None:
    """Each of them, in order; a batch is deleted last."""
    items = [f'{{"key": "{key}", "inputs": {{"topic": "otters"}}}}\n' for key in ("a", "b")]
    for name in ("night.jsonl", "items.jsonl"):
        (tmp_path / name).write_text("".join(items))
    for block in sorted(blocks("docs/batches.md"), key=lambda block: "batch delete" in block):
        run(typed(block), tmp_path, settings)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3
    assert run("promptlayer-exec batch list", tmp_path, settings) == ""


@pytest.fixture
def night(threaded_sim: Simulator, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """Return the date of this night's items, of which one fails once, and the environment."""
    runs = iter(("SUCCESS", "FAILED"))

    def grade(inputs: Any) -> Scenario:
        return Scenario(
            [SimNode("Grade", "B", 0.1, [], next(runs, "SUCCESS"), is_output_node=True)]
        )

    threaded_sim.add_workflow("grade", grade)
    date = run("date -d -21hours +%F", tmp_path, dict(os.environ)).strip()
    items = [f'{{"key": "{key}", "inputs": {{"topic": "otters"}}}}\n' for key in ("a", "b")]
    (tmp_path / f"night-{date}.jsonl").write_text("".join(items))
    (tmp_path / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    return date, environment(threaded_sim, tmp_path)


def code_blocks(page: str, language: str) -> list[str]:
    """Return the blocks of a page in a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_a_night_under_systemd_fails_and_is_mended(
    night: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """The command of the unit runs the items, and those of the page run the failed one again."""
    date, settings = night
    service, timer, mail = code_blocks("docs/operating.md", "ini")
    (tmp_path / "grading.service").write_text(service)
    (tmp_path / "grading.timer").write_text(timer)
    (tmp_path / "grading-failed.service").write_text(mail)
    if shutil.which("systemd-analyze"):
        run("systemd-analyze verify ./grading*.service ./grading.timer", tmp_path, settings)

    # As systemd reads it: a line ends without a backslash, and two percent signs mean one.
    (command,) = re.findall(r"^ExecStart=(.*?)(?<!\\)\n", service, re.MULTILINE | re.DOTALL)
    command = command.replace("\\\n", " ").replace("%%", "%").replace("$$", "$")

    def successes() -> list[bool]:
        lines = (tmp_path / f"results-{date}.jsonl").read_text().splitlines()
        return [json.loads(line)["succeeded"] for line in lines]

    run(f"{command} || test $? = 1", tmp_path, settings)
    assert sorted(successes()) == [False, True]

    shown, again, work = (
        block.replace("2026-05-01", date) for block in blocks("docs/operating.md")
    )
    run(again, tmp_path, settings)
    assert successes()[2:] == [True]
    expected = code_blocks("docs/operating.md", "text")[1]
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ"
    printed = re.sub(moment, "", run(shown, tmp_path, settings))
    assert printed == re.sub(moment, "", expected).replace("2026-05-01", date)
    run(work, tmp_path, settings)


def test_a_night_under_cron_has_its_own_files(
    night: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """If items fail, cron mails the log of that night alone."""
    date, settings = night
    (tmp_path / "cron.env").write_text("")
    (tmp_path / "mail").write_text(
        f"#!/bin/sh\necho $2 > {tmp_path}/sent && cat >> {tmp_path}/sent\n"
    )
    (tmp_path / "mail").chmod(0o755)
    (line,) = code_blocks("docs/operating.md", "text")[:1]
    command = line.partition("* * *  ")[2].replace("\\%", "%")  # a bare one would end the command
    command = command.replace("/srv/grading", str(tmp_path)).replace("+%F", "-d -21hours +%F")
    path = os.pathsep.join([str(tmp_path), settings["PATH"]])
    run(command, tmp_path, settings | {"PATH": path})

    assert len((tmp_path / f"results-{date}.jsonl").read_text().splitlines()) == 2
    (subject, *log) = (tmp_path / "sent").read_text().splitlines()
    assert subject == "grading: exit code 1"
    assert log == (tmp_path / f"night-{date}.log").read_text().splitlines()
    assert any("ExecutionFailed" in line for line in log)


def test_the_commands_of_the_doctor_work(settings: dict[str, str], tmp_path: Path) -> None:
    """With a workflow and without one."""
    for block in blocks("docs/doctor.md"):
        assert "base URL" in run(block, tmp_path, settings)


@pytest.mark.parametrize("page", ["docs/viewer.md", "docs/mcp.md", "docs/webhooks.md"])
def test_the_commands_that_serve_work(page: str, settings: dict[str, str], tmp_path: Path) -> None:
    """Each shows its URL, and stops at Ctrl-C; of the webhooks, that is the simulator."""
    scripts = [typed(block) for block in blocks(page)]
    if page == "docs/webhooks.md":
        scripts = [f"{scripts[-1].strip()} --port 0"]
    for script in scripts:
        with subprocess.Popen(
            ["bash", "-ec", script.replace("\npromptlayer", "\nexec promptlayer")],
            cwd=tmp_path,
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as server:
            assert server.stdout is not None
            for line in server.stdout:
                if "http://127.0.0.1:" in line:
                    break
            else:
                pytest.fail(f"no URL: {script}")
            server.send_signal(signal.SIGINT)
            server.communicate()
        assert server.returncode == 0, script


@pytest.mark.timeout(600)  # pip installs everything twice, and a busy machine is slow
def test_the_commands_on_installing_work(tmp_path: Path, settings: dict[str, str]) -> None:
    """In a new environment, from a checkout of the name that the page gives it."""
    checkout, project = tmp_path / "promptlayer-exec", tmp_path / "project"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    project.mkdir()

    new, beside, from_wheel, key = blocks("docs/installing.md")
    (others,) = blocks("docs/costs.md")
    activate = f". {checkout}/.venv/bin/activate\n"
    run(new, checkout, settings)
    run(activate + beside, project, settings)
    run(activate + from_wheel, checkout, settings)
    run(activate + others, project, settings)
    installed = run(activate + key + "promptlayer-exec --version", project, settings)
    assert installed == f"promptlayer-exec {promptlayer_exec.__version__}\n"
