"""The `batch` commands: in this process, and in one of their own where it is killed."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest

import promptlayer_exec
from promptlayer_exec.cli import _batch as commands
from promptlayer_exec.cli import _batch_progress as shown
from promptlayer_exec.cli._app import app
from promptlayer_exec.dbos import BatchStatus
from promptlayer_exec.dbos import _batch as batches
from promptlayer_exec.dbos import _store as stores
from promptlayer_exec.dbos import _worker as workers
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

PROGRAM = [sys.executable, "-W", "error", "-m", "promptlayer_exec", "batch"]
PATIENCE = 45.0
FIELDS = ["key", "execution_id", "succeeded", "output", "error", "started", "finished"]
Start = Callable[..., "subprocess.Popen[str]"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sim() -> Iterator[Simulator]:
    """Serve `echo`, which returns its input `n` and fails for "bad", and `held`, which waits."""
    with Simulator() as simulator:

        def scenario(inputs: Any) -> Scenario:
            status = "FAILED" if inputs["n"] == "bad" else "SUCCESS"
            return Scenario([SimNode("Answer", inputs["n"], status=status, is_output_node=True)])

        simulator.add_workflow("echo", scenario)
        simulator.add_workflow("held", Scenario([SimNode("Answer", 1, None, is_output_node=True)]))
        yield simulator


@pytest.fixture
def start(sim: Simulator, tmp_path: Path) -> Iterator[Start]:
    """Start commands in a directory of their own; end those that are left."""
    processes = []

    def start(*arguments: object, program: list[str] = PROGRAM, **options: Any) -> Any:
        settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [*program, *map(str, arguments)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PROMPTLAYER_API_KEY": sim.api_key,
                "PROMPTLAYER_BASE_URL": sim.base_url,
            },
            stdin=subprocess.DEVNULL,
            text=True,
            **(settings | options),
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def run(sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """Run a command in this process; return its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROMPTLAYER_BASE_URL", sim.base_url)
    monkeypatch.setenv("PROMPTLAYER_API_KEY", sim.api_key)
    for module, interval in (
        (stores, "_QUEUE_INTERVAL"),
        (workers, "_CHECK_INTERVAL"),
        (batches, "_POLL_INTERVAL"),
        (commands, "_REFRESH"),
    ):
        monkeypatch.setattr(module, interval, 0.02)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            app(["batch", *map(str, arguments)], prog_name="promptlayer-exec")
        out, err = capsys.readouterr()
        assert "Traceback" not in err, err
        return int(end.value.code or 0), out, err

    return run


def write(path: Path, *lines: object) -> Path:
    """Write a file of lines: texts as they are, others as JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_is_run_and_its_results_are_written(
    sim: Simulator, run: Run, tmp_path: Path
) -> None:
    """One line each; the summary has the failures by kind, and a second run adds nothing."""
    file = write(
        tmp_path / "night.jsonl",
        {"inputs": {"n": 1}},
        {"key": "b", "inputs": {"n": "bad"}, "metadata": {"job": "7"}},
        "",
        {"key": "c", "inputs": {"n": 3}, "workflow": "none"},
    )
    command = ("run", file, "--workflow", "echo", "--out", "out.jsonl")
    code, out, err = run(*command)
    assert (code, out) == (1, "")
    assert err.splitlines()[:2] == [
        "batch night: 3 items",
        "batch night: 3 items: 1 succeeded, 2 failed, 0 unknown",
    ]
    assert sorted(line.split(",")[0] for line in err.splitlines()[2:]) == [
        "  1 ExecutionFailed",
        "  1 NotFound",
    ]
    lines = {line["key"]: line for line in results(tmp_path / "out.jsonl")}
    assert [list(line) for line in lines.values()] == [FIELDS] * 3
    assert (lines["1"]["succeeded"], lines["1"]["output"]) == (True, 1)
    assert lines["1"]["execution_id"] in sim.executions
    assert lines["c"]["error"]["type"] == "NotFound"
    assert sorted(str(run.body.get("metadata")) for run in sim.runs) == ["None", "{'job': '7'}"]
    text = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").write_text(text.removesuffix("\n"))  # as if it was killed just then
    code, _, err = run(*command)
    assert code == 1
    assert err.startswith("batch night: 3 items, 3 of them known already\n")
    assert sorted((tmp_path / "out.jsonl").read_text()) == sorted(text)
    code, out, _ = run("run", file, "--workflow", "echo")
    assert (tmp_path / "promptlayer-batches.sqlite").exists()
    assert sorted(out.splitlines()) == sorted((tmp_path / "out.jsonl").read_text().splitlines())
    assert len(sim.runs) == 2
    code, out, err = run("work")
    assert (code, out) == (1, "")
    assert err.startswith("batch night: 3 items: 1 succeeded, 2 failed, 0 unknown\n")


def test_a_run_that_was_killed_goes_on(
    sim: Simulator, start: Start, run: Run, tmp_path: Path
) -> None:
    """Each item has one result in the end, a line that was cut off is written anew."""
    out = tmp_path / "out.jsonl"
    lines = [{"key": f"k{n}", "inputs": {"n": n}} for n in range(30)]
    file = write(tmp_path / "night.jsonl", *lines)
    command = ("run", file, "--workflow", "echo", "--out", out, "--max-in-flight", 10)
    process = start(*command)
    while len(sim.runs) < 10:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.communicate()
    with out.open("a") as torn:
        torn.write('{"key": "k')
    _code, _, err = run(*command)
    assert "k" not in Counter(line["key"] for line in results(out))
    assert Counter(line["key"] for line in results(out)) == Counter(line["key"] for line in lines)
    assert max(Counter(run.inputs["n"] for run in sim.runs).values()) == 1
    unknown = sum(not line["succeeded"] for line in results(out))
    assert f"{30 - unknown} succeeded, 0 failed, {unknown} unknown" in err
    assert ("unknown: nobody knows" in err) is (unknown > 0)


def test_interrupted_it_tells_how_to_go_on(
    sim: Simulator, start: Start, run: Run, tmp_path: Path
) -> None:
    """What was started is not started again; others see how far it is."""
    file = write(tmp_path / "night.jsonl", {"key": "a", "inputs": {}})
    command = ("run", file, "--workflow", "held")
    process = start(*command)
    while sim.request_count < 2:
        time.sleep(0.01)
        assert process.poll() is None
    assert run("status") == (
        0,
        "batch night: 1 item: 0 waiting, 1 running, 0 succeeded, 0 failed, 0 unknown\n",
        "",
    )
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err.endswith("interrupted; no item is lost: give the same command again to go on\n")
    sim.finish(sim.runs[0].execution_id, "Answer")
    code, out, _ = run(*command)
    assert (code, json.loads(out)["output"], len(sim.runs)) == (0, 1, 1)
    code, out, _ = run("status", "--json")
    assert json.loads(out) == {
        "batch": "night",
        "waiting": 0,
        "running": 0,
        "succeeded": 1,
        "failed": 0,
        "unknown": 0,
        "total": 1,
    }


def test_bad_lines_are_told_with_their_numbers(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """All of them, before anything is stored or started."""
    bad = {
        '{"key": 1}': '"key" is a string',
        "not": "it is no JSON: Expecting value, column 1",
        "[]": 'it is no JSON object such as {"key": "a", "inputs": {}}',
        '{"inputs": []}': '"inputs" is an object',
        '{"inputs": {"a": NaN}}': "NaN is no number of JSON's",
        '{"input": {}}': "'input' is none of key, inputs, workflow, label, version, metadata",
        '{"version": true}': '"version" is a number',
        '{"metadata": {"a": 1}}': '"metadata" is an object of strings',
        '{"label": "a", "version": 1}': '"label" and "version" exclude each other',
        '{"key": ""}': '"key" is empty',
        '{"workflow": ""}': 'it has no "workflow", and --workflow is not given',
    }
    file = write(tmp_path / "bad.jsonl", *bad, '{"key": "13"}', "{}", "[" * 100_000)
    code, out, err = run("run", file, "--workflow", "w")
    assert (code, out) == (2, "")
    told = err.splitlines()
    assert told[:11] == [f"line {number}: {why}" for number, why in enumerate(bad.values(), 1)]
    assert told[11] == "line 13: the key '13' is that of line 12, too"
    assert told[12].startswith("line 14: it cannot be read: ")
    assert told[13].endswith("bad.jsonl has 13 lines that cannot be used; nothing was added")
    assert not list(tmp_path.glob("*.sqlite"))
    (tmp_path / "latin").write_bytes(b'\xff{"key": "a"}\n' * 30)
    _, _, err = run("run", "latin", "--workflow", "w")
    assert "line 1: it is not UTF-8 text: byte 1 is none of it" in err
    assert "has 30 lines that cannot be used, of which 20 are shown" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "none.jsonl"), "cannot read none.jsonl: No such file or directory"),
        (("run", "empty"), "empty has no items"),
        (("run", "good", "--out", "none/out"), "cannot write to none/out: No such file"),
        (("run", "good", "--out", "other"), "other, line 1, is no result: it is left as it is"),
        (("run", "good", "--out", "note"), "note, line 1, is no result: it is left as it is"),
        (("run", "good", "--out", "good"), "good, line 1, is no result: it is left as it is"),
        (("run", "/dev/null"), "/dev/null is no file: it is read twice, so write the items to a"),
        (("run", "good", "--db", "nothing"), "database_url is not a URL"),
        (("run", "long"), "item key must be 1 to 1000 bytes of text"),
        (("run", "good", "--rate", "inf"), "it is a number, more than 0"),
        (("run", "good", "--rate", "0"), "it is a number, more than 0"),
        (("work",), "there is no database sqlite:///promptlayer-batches.sqlite"),
        (("status", "--name", "none", "--db", "sqlite:///empty"), "there is no batch 'none'"),
    ],
)
def test_what_cannot_be_done_is_told(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """With exit code 2, and without harm to any file."""
    (tmp_path / "empty").touch()
    (tmp_path / "good").write_text('{"key": "a", "workflow": "echo", "inputs": {"n": 1}}')
    (tmp_path / "note").write_text("mine, without a line break")
    write(tmp_path / "long", {"workflow": "echo", "key": "k" * 1001})
    write(tmp_path / "other", "something else")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert (tmp_path / "other").read_text() == "something else\n"
    assert (tmp_path / "note").read_text() == "mine, without a line break"
    assert (tmp_path / "good").stat().st_size > 0


def test_unknown_items_are_restarted_when_told_to(
    sim: Simulator, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results have one more line of it, though their writer looks before it is restarted."""
    file = write(tmp_path / "night", {"workflow": "echo", "inputs": {"n": 1}})
    command = ("run", file, "--out", "out")
    sim.inject(Fault.disconnect())
    code, _, err = run(*command)
    assert code == 1
    assert "unknown: nobody knows whether these runs were started, and billed: look" in err

    looked = threading.Event()
    look, restart = stores.Store.outcomes, stores.Store.restart_unknown

    def looking(*arguments: Any, **options: Any) -> Any:
        found = look(*arguments, **options)
        looked.set()
        return found

    def restarting_late(*arguments: Any) -> None:
        assert looked.wait(10)
        restart(*arguments)

    monkeypatch.setattr(stores.Store, "outcomes", looking)
    monkeypatch.setattr(stores.Store, "restart_unknown", restarting_late)
    assert run(*command, "--restart-unknown")[0] == 0
    lines = results(tmp_path / "out")
    assert [(line["key"], line["succeeded"]) for line in lines] == [("1", False), ("1", True)]


def test_a_run_with_nothing_to_do_says_so(run: Run, tmp_path: Path) -> None:
    """The next night's file under the same name would otherwise pass for done."""
    file = write(tmp_path / "night", {"workflow": "echo", "inputs": {"n": 1}})
    assert "another --name" not in run("run", file)[2]
    write(tmp_path / "night", {"workflow": "echo", "inputs": {"n": 2}})
    code, out, err = run("run", file)
    assert code == 0
    assert json.loads(out)["output"] == 1
    assert "all of them ended before: to run them again, give the batch another --name\n" in err


def test_an_outage_is_told_once(run: Run, tmp_path: Path) -> None:
    """However many requests fail in it."""
    file = write(tmp_path / "night", *({"workflow": "echo", "inputs": {}} for _ in range(10)))
    code, _, err = run("run", file, "--base-url", "http://127.0.0.1:9", "--outage", "0.7")
    assert code == 4
    assert err.count("trying again for up to 0.7 s") == 1
    assert len(err.splitlines()) == 3


def test_without_a_name_one_must_be_clear(
    sim: Simulator, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`work` takes the only batch there is; of several it wants to be told which."""
    monkeypatch.setenv("PROMPTLAYER_EXEC_DB", "sqlite:///other.sqlite")
    file = write(tmp_path / "one", {"workflow": "echo", "inputs": {"n": 1}})
    assert run("run", file)[0] == 0
    assert run("run", file, "--name", "two")[0] == 0
    assert (tmp_path / "other.sqlite").exists()
    code, _, err = run("work")
    assert (code, err) == (2, "give --name: the database has one, two\n")
    assert run("work", "--name", "two")[0] == 0
    assert len(run("status")[1].splitlines()) == 2


def test_a_refused_key_ends_it(
    run: Run, tmp_path: Path, sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 4, as does a server that is away, and the items wait; none is exit code 2."""
    file = write(tmp_path / "night.jsonl", {"workflow": "echo", "inputs": {"n": 1}})
    monkeypatch.setenv("PROMPTLAYER_API_KEY", "")
    assert run("run", file)[0] == 2
    assert not list(tmp_path.glob("*.sqlite"))
    monkeypatch.setenv("PROMPTLAYER_API_KEY", "wrong")
    code, _, err = run("run", file)
    assert code == 4
    assert err.endswith("; no item is lost: give the same command again to go on\n")
    monkeypatch.setenv("PROMPTLAYER_API_KEY", sim.api_key)
    assert run("run", file, "--base-url", "http://127.0.0.1:9", "--outage", "0.01")[0] == 4
    assert run("run", file)[0] == 0


def test_the_options_are_those_of_the_batch(run: Run) -> None:
    """Its bounds, and what it does with unknown items."""
    settings = commands.Settings("sqlite:///none", None, 3, 7.0, 1.0, True)
    batch = commands._batch("b", settings)
    assert (batch._max_in_flight, batch._rate, batch._restart_unknown) == (3, 7.0, True)


def test_without_the_extra_it_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does nothing."""
    monkeypatch.setitem(sys.modules, "promptlayer_exec.dbos", None)
    monkeypatch.delattr(promptlayer_exec, "dbos")
    file = write(tmp_path / "night.jsonl", {"workflow": "echo"})
    code, _, err = run("run", file)
    assert code == 2
    assert "pip install 'promptlayer-exec[cli,dbos]'" in err


def test_progress_tells_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no terminal, in a line every ten seconds, from the last half minute."""
    now = 100.0
    monkeypatch.setattr(shown.time, "monotonic", lambda: now)
    progress = shown.BatchProgress()
    for seconds, done in ((0.0, 3), (5.0, 50), (10.0, 103)):
        now = 100.0 + seconds
        progress.show(BatchStatus(400 - done, 0, done - 3, 2, 1, 400))
    progress.warn("trouble")
    assert capsys.readouterr().err.splitlines() == [
        "103/400 done, 2 failed, 1 unknown, 10.0/s, 29.7 s left",
        "trouble",
    ]


def test_a_terminal_gets_a_bar(
    sim: Simulator, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells how many are done and how many failed."""
    lines = [{"inputs": {"n": "bad" if n == 3 else n}} for n in range(9)]
    file = write(tmp_path / "night.jsonl", *lines)
    leader, follower = pty.openpty()
    with ThreadPoolExecutor(1) as reader, os.fdopen(leader, "rb", 0) as shown_there:
        text = reader.submit(_read_to_the_end, shown_there)
        with os.fdopen(follower, "w") as terminal, monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", terminal)
            patched.setenv("TERM", "xterm")
            code, _, _ = run("run", file, "--workflow", "echo", "--out", "out")
        assert code == 1
        assert "9/9 done, 1 failed" in text.result(PATIENCE)


def _read_to_the_end(terminal: IO[bytes]) -> str:
    text = b""
    with suppress(OSError):  # EIO: nobody writes any more
        while part := terminal.read(65536):
            text += part
    return text.decode()
