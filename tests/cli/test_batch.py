"""The `batch` commands, in this process, or in one of their own if it is killed."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import promptlayer_exec
from promptlayer_exec import ServerError, Session, StartRequest
from promptlayer_exec._install import install_hint
from promptlayer_exec.cli import _batch_lookup as lookup
from promptlayer_exec.cli import _live
from promptlayer_exec.dbos import Batch, BatchStatus
from promptlayer_exec.dbos._breaker import Breaker
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

pytestmark = pytest.mark.usefixtures("quick_batches")
TIMEOUT = 45.0
DATABASE = "state/promptlayer-exec/batches.sqlite"
FIELDS = ["key", "execution_id", "succeeded", "output", "error", "started", "finished"]
Start = Callable[..., Any]
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


@pytest.fixture(autouse=True)
def _prepared(batches_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an empty database where the commands expect it, and let runs be polled from the start."""
    (tmp_path / DATABASE).parent.mkdir(parents=True)
    batches_file.rename(tmp_path / DATABASE)
    monkeypatch.setenv("PROMPTLAYER_EXEC_PUSH", "0")


@pytest.fixture
def run(call: Run) -> Run:
    """Run a `batch` command in this process."""
    return partial(call, "batch")


def write(path: Path, *lines: object) -> Path:
    """Write a file of lines: strings as they are, other values as JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def on(method: str, path: str, fault: Fault) -> Fault:
    """Return a fault of all requests with this method and this start of their path."""

    async def effect(request: Any, answer: Any) -> Any:
        is_meant = request.method == method and request.path.startswith(path)
        return await fault.effect(request, answer) if is_meant else None

    return Fault(effect, times=None)


def test_a_batch_is_run_and_its_results_are_written(
    sim: Simulator, run: Run, tmp_path: Path
) -> None:
    """The summary has the failures by type, and a second run adds nothing."""
    (tmp_path / DATABASE).unlink()
    file = write(
        tmp_path / "night.jsonl",
        {"inputs": {"n": 1}},
        {"key": "b", "inputs": {"n": "bad"}, "metadata": {"job": "7"}},
        "",
        {"key": "c", "inputs": {"n": 3}, "workflow": "none"},
    )
    command = ("run", file, "--workflow", "echo", "--out", "out.jsonl")
    sim.inject(on("GET", "/workflows/none", Fault.status(403)))
    code, out, err = run(*command)
    assert (code, out) == (1, "")
    unchecked, first, second, third, *others = err.splitlines()[:-2]
    assert unchecked.startswith(
        "could not check the inputs: workflow 'none': the server returned 403"
    )
    sim.clear_faults()
    assert first == "batch night: 3 items"
    assert second.startswith("batch night: 3 items: 1 succeeded, 2 failed, 0 unknown, in ")
    assert re.fullmatch(
        r"  a run took \S+ s \(median\), 95 % at most \S+ s, the longest \S+ s", third
    )
    assert sorted(line.split(",")[0] for line in others) == [
        "1 ExecutionFailed",
        "1 NotFound",
    ]
    assert err.splitlines()[-2:] == [
        "start failed items again, which you pay for, with:",
        "  promptlayer-exec batch retry --failed --name night",
    ]
    lines = {line["key"]: line for line in results(tmp_path / "out.jsonl")}
    assert [list(line) for line in lines.values()] == [FIELDS] * 3
    (digest,) = lines.keys() - {"b", "c"}
    assert (lines[digest]["succeeded"], lines[digest]["output"]) == (True, 1)
    assert lines[digest]["execution_id"] in sim.executions
    assert lines["c"]["error"]["type"] == "NotFound"
    assert sorted(run.body["metadata"].get("job", "") for run in sim.runs) == ["", "7"]
    text = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").write_text(text.removesuffix("\n"))  # as after a kill
    code, _, err = run(*command)
    assert code == 1
    assert err.startswith("batch night: 3 items, 3 added before\n")
    assert sorted((tmp_path / "out.jsonl").read_text()) == sorted(text)
    code, out, _ = run("run", file, "--workflow", "echo")
    assert (tmp_path / DATABASE).exists()
    assert sorted(out.splitlines()) == sorted((tmp_path / "out.jsonl").read_text().splitlines())
    assert len(sim.runs) == 2
    code, out, err = run("work")
    assert (code, out) == (1, "")
    assert "\nbatch night: 3 items: 1 succeeded, 2 failed, 0 unknown, in " in err


def test_a_killed_run_is_continued(sim: Simulator, start: Start, run: Run, tmp_path: Path) -> None:
    """Each item ends with one result, and an incomplete line is written again."""
    out = tmp_path / "out.jsonl"
    lines = [{"key": f"k{n}", "inputs": {"n": n}} for n in range(30)]
    file = write(tmp_path / "night.jsonl", *lines)
    arguments = ("run", file, "--workflow", "echo", "--out", out, "--max-in-flight", 10)
    command = start("batch", *arguments)
    while len(sim.runs) < 10:
        time.sleep(0.01)
        assert command.process.poll() is None
    command.close()
    with out.open("a") as torn:
        torn.write('{"key": "k')
    _code, _, err = run(*arguments)
    assert "k" not in Counter(line["key"] for line in results(out))
    assert Counter(line["key"] for line in results(out)) == Counter(line["key"] for line in lines)
    assert max(Counter(run.inputs["n"] for run in sim.runs).values()) == 1
    unknown = sum(not line["succeeded"] for line in results(out))
    assert f"{30 - unknown} succeeded, 0 failed, {unknown} unknown" in err
    assert ("unknown items may have started" in err) is (unknown > 0)


def test_an_interrupted_run_says_how_to_continue(
    sim: Simulator, start: Start, run: Run, tmp_path: Path
) -> None:
    """A started run is not started again; other processes see the status."""
    file = write(tmp_path / "night.jsonl", {"key": "a", "inputs": {}})
    arguments = ("run", file, "--workflow", "held")
    command = start("batch", *arguments)
    while not sim.runs:
        time.sleep(0.01)
        assert command.process.poll() is None
    assert run("status") == (
        0,
        "batch night: 1 item: 0 waiting, 1 running, 0 succeeded, 0 failed, 0 unknown\n",
        "",
    )
    command.process.send_signal(signal.SIGINT)
    code, _, err = command.end()
    assert code == 130
    assert err.endswith(
        "interrupted. No item is lost: run the same command again to continue.\n"
        "see how far it is with:\n  promptlayer-exec batch status --name night\n"
    )
    assert run("status")[2] == (
        "1 item not finished, and nobody is working on it. Repeat its `batch run`,"
        " or continue without a results file with:\n"
        "  promptlayer-exec batch work --name night\n"
    )
    sim.finish(sim.runs[0].execution_id, "Answer")
    code, out, _ = run(*arguments)
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
        "workers": 0,
    }


def test_an_interrupt_says_what_is_awaited(
    start: Start, run: Run, gate: Any, tmp_path: Path
) -> None:
    """One line says so, and what to do; the run whose start was awaited is not started again."""
    file = write(tmp_path / "night.jsonl", {"key": "a", "inputs": {}})
    with Simulator(on_request=gate) as sim:
        sim.add_workflow("done", Scenario([SimNode("Answer", 1, is_output_node=True)]))
        arguments = ("run", file, "--workflow", "done")
        command = start("batch", *arguments, PROMPTLAYER_BASE_URL=sim.base_url)
        assert gate.reached.wait(TIMEOUT)
        command.process.send_signal(signal.SIGINT)
        assert command.error_line() == "batch night: 1 item\n"
        said = "stopping: waiting for the ids of runs that may have started (Ctrl-C again stops"
        assert command.error_line().startswith(said)
        gate.opened.set()
        code, _, err = command.end()
        assert (code, err.count("\n")) == (130, 3)
        assert err.startswith("interrupted. No item is lost")
        assert run(*arguments, PROMPTLAYER_BASE_URL=sim.base_url)[0] == 0
        assert len(sim.runs) == 1


def test_invalid_lines_are_reported_with_their_numbers(run: Run, tmp_path: Path) -> None:
    """All of them are reported before anything is stored or started."""
    (tmp_path / DATABASE).unlink()
    bad = {
        '{"key": 1}': '"key" must be a string',
        "not": "not valid JSON: Expecting value, column 1",
        '{"inputs": {}': "not valid JSON: Expecting ',' delimiter, column 14",
        "[]": 'not a JSON object like {"key": "a", "inputs": {}}',
        '{"inputs": []}': '"inputs" must be an object',
        '{"inputs": {"a": NaN}}': "NaN is not a JSON number",
        '{"input": {}}': "'input' is not one of key, inputs, workflow, label, version, metadata",
        '{"version": true}': '"version" must be a number',
        '{"version": 0}': '"version" must be between 1 and 2**63-1',
        '{"workflow": -1}': '"workflow" must be between 1 and 2**63-1',
        '{"metadata": {"a": 1}}': '"metadata" must be an object of strings',
        '{"label": "a", "version": 1}': 'use "label" or "version", not both',
        '{"key": ""}': '"key" must not be empty',
        '{"workflow": ""}': 'no workflow: give --workflow NAME, or add a "workflow" to the line',
    }
    file = write(tmp_path / "bad.jsonl", *bad, '{"key": "x"}', '{"key": "x"}')
    code, out, err = run("run", file, "--workflow", "w")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines[:14] == [f"line {number}: {why}" for number, why in enumerate(bad.values(), 1)]
    assert lines[14] == "line 16: the key 'x' is already used in line 15"
    assert lines[15].endswith("bad.jsonl has 15 invalid lines. Nothing was added")
    assert not list(tmp_path.rglob("*.sqlite"))
    (tmp_path / "latin").write_bytes(b"".join(b" " * n + b"\xff\n" for n in range(30)))
    _, _, err = run("run", "latin", "--workflow", "w")
    assert "line 1: not UTF-8 text: byte 1 is invalid" in err
    assert "has 30 invalid lines (10 more mistakes are not shown). Nothing was added" in err


def test_a_mistake_in_the_options_is_one_line(run: Run, tmp_path: Path) -> None:
    """Whether --workflow is missing, or names none that exists; no file for results is made."""
    file = write(tmp_path / "night.jsonl", *({"inputs": {"n": n}} for n in range(30)))
    hint = 'give --workflow NAME, or add a "workflow" to the line. Nothing was added'
    lines = "night.jsonl, lines 1, 2, 3 and 27 more: "
    command = ("run", "night.jsonl", "--out", "out.jsonl")
    assert run(*command) == (2, "", f"{lines}no workflow: {hint}\n")
    code, _, err = run(*command, "--workflow", "pear")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"{lines}there is no workflow 'pear'. `promptlayer-exec workflows` lists")
    assert not (tmp_path / "out.jsonl").exists()
    assert run("run", file, "--workflow", "echo", "--out", "out.jsonl")[0] == 0
    assert len(results(tmp_path / "out.jsonl")) == 30


def test_lines_that_cannot_run_are_reported_before_anything_is_added(
    sim: Simulator, run: Run, tmp_path: Path
) -> None:
    """One request for each workflow, label and version finds them; known items go on."""
    scenario = Scenario([SimNode("Answer", 1, is_output_node=True)])
    inputs = {"first": "string", "last": "string"}
    sim.add_workflow("pair", scenario, inputs=inputs, labels=["prod"])
    file = write(
        tmp_path / "night.jsonl",
        {"key": "a", "inputs": {"first": "x", "last": "y"}},
        *({"key": f"b{n}", "inputs": {"first": "x", "lats": n}} for n in range(3)),
        {"key": "c", "inputs": {"first": "x", "last": "y"}, "label": "live"},
        {"key": "d", "workflow": "pear"},
        {"key": "e", "workflow": "pear", "version": 3},
    )
    code, out, err = run("run", file, "--workflow", "pair")
    assert (code, out) == (2, "")
    misspelt = (
        "missing input for workflow 'pair': 'last' (string). It has no required input"
        " 'lats' (did you mean 'last'?). See its inputs with `promptlayer-exec workflow pair`"
    )
    hint = ". `promptlayer-exec workflows` lists names and labels"
    assert err.splitlines() == [
        f"lines 2, 3, 4: {misspelt}",
        f"line 5: there is no workflow 'pair' with the label 'live'{hint}",
        f"line 6: there is no workflow 'pear'. Did you mean 'pair'?{hint[1:]}",
        f"line 7: there is no workflow 'pear' with a version 3. Did you mean 'pair'?{hint[1:]}",
        f"{file} has 6 invalid lines. Nothing was added",
    ]
    assert sim.request_count == 7  # after each 404, it lists the workflows
    assert (run("status")[1], sim.runs) == ("", [])
    write(file, {"key": "a", "inputs": {"first": "x", "last": "y", "more": "z"}})
    code, _, err = run("run", file, "--workflow", "pair", "--out", "out.jsonl")
    note = "note: workflow 'pair' does not require 'more' (sent anyway)"
    assert (code, err.splitlines()[0]) == (0, note)
    sim.add_version("pair", scenario, inputs={"name": "string"})
    code, _, err = run("run", file, "--workflow", "pair", "--out", "out.jsonl")
    assert (code, err.splitlines()[0]) == (0, "batch night: 1 item, 1 added before")


def test_a_file_that_is_refused_leaves_the_results_alone(run: Run, tmp_path: Path) -> None:
    """It makes no file for them, and changes none, not even a last line that a crash cut off."""
    item = {"key": "a", "workflow": "echo", "inputs": {"n": 1}}
    file = write(tmp_path / "night", item)
    assert run("run", file, "--out", "out.jsonl")[0] == 0
    with (tmp_path / "out.jsonl").open("a") as torn:
        torn.write('{"key": "b')
    before = (tmp_path / "out.jsonl").read_bytes()
    other_server = ("--base-url", "http://127.0.0.1:9")
    for inputs, options, why in (
        ({"n": 1}, other_server, "started on"),
        ({"n": 2}, (), "belongs to another request"),
    ):
        write(file, item | {"inputs": inputs})
        for name in ("out.jsonl", "new.jsonl", "new.csv"):
            code, _, err = run("run", file, "--out", name, *options)
            assert code == 2
            assert why in err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "none.jsonl"), "cannot read none.jsonl: No such file or directory"),
        (("run", "empty"), "empty has no items"),
        (("run", "good", "--out", "none/out"), "cannot write to none/out: No such file"),
        (
            ("run", "good", "--out", "other"),
            "line 1 of other is not a result. The file is unchanged",
        ),
        (
            ("run", "good", "--out", "note"),
            "line 1 of note is not a result. The file is unchanged",
        ),
        (
            ("run", "good", "--out", "good"),
            "line 1 of good is not a result. The file is unchanged",
        ),
        (("run", "/dev/null"), "/dev/null is not a regular file: save the items to one first"),
        (("run", "good", "--db", "nothing"), "database_url is not a URL"),
        (
            ("run", "good", "--db", "sqlite://a/b"),
            "needs three slashes, such as sqlite:///batches.sqlite, got sqlite://a/b",
        ),
        (("run", "long"), "item key must be 1 to 1000 bytes of text"),
        (("run", "good", "--max-in-flight", "0"), "'--max-in-flight': must be at least 1"),
        (("run", "good", "--attempts", "x"), "'--attempts': must be a whole number, got 'x'"),
        (("run", "good", "--rate", "fast"), "'--rate': must be a number, got 'fast'"),
        (("run", "good", "--rate", "inf"), "rate must be a finite number greater than 0"),
        (("run", "good", "--rate", "0"), "rate must be a finite number greater than 0"),
        (("status", "--name", "none", "--db", "sqlite:///empty"), "there is no batch in sqlite"),
    ],
)
def test_usage_errors_are_exit_code_2(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """No file is changed."""
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


def test_unknown_items_are_retried_on_request(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """Each gets a second result from the next `batch run`."""
    file = write(tmp_path / "night", {"key": "a", "workflow": "echo", "inputs": {"n": 1}})
    command = ("run", file, "--out", "out")
    sim.inject(on("POST", "/", Fault.disconnect()))
    code, _, err = run(*command)
    assert code == 1
    assert (
        "unknown items may have started, and you may be billed: look for them in PromptLayer" in err
    )
    sim.clear_faults()
    assert run("retry", "--unknown")[0] == 0
    assert run(*command)[0] == 0
    lines = results(tmp_path / "out")
    assert [(line["key"], line["succeeded"]) for line in lines] == [("a", False), ("a", True)]


def test_a_run_with_nothing_to_do_says_so(run: Run, tmp_path: Path) -> None:
    """So does `work`. A new file under the same name is refused."""
    file = write(tmp_path / "night", {"key": "1", "workflow": "echo", "inputs": {"n": 1}})
    assert "another --name" not in run("run", file)[2]
    code, out, err = run("run", file)
    assert code == 0
    assert json.loads(out)["output"] == 1
    ended = "all items of batch night have already finished, so nothing runs again."
    hint = f"{ended} To run them as a new batch, give `batch run` another --name\n"
    assert hint in err
    assert run("work")[2].startswith(hint)
    write(tmp_path / "night", {"key": "1", "workflow": "echo", "inputs": {"n": 2}})
    code, out, err = run("run", file)
    assert (code, out) == (2, "")
    what = "the key '1' of batch 'night' belongs to another request, which differs in inputs.n,"
    way = " so nothing was added. Use another key for the item, or another --name"
    assert what + way in err


def test_an_outage_is_reported_once(run: Run, tmp_path: Path) -> None:
    """The number of requests that fail in it does not matter."""
    file = write(tmp_path / "night", *({"workflow": "echo", "inputs": {"n": n}} for n in range(10)))
    code, _, err = run("run", file, "--base-url", "http://127.0.0.1:9", "--outage", "0.5")
    assert code == 4
    assert err.count("Trying again for up to 0.5 s") == 1
    assert err.count("could not check the inputs: workflow 'echo': ") == 1
    assert len(err.splitlines()) == 6


def test_work_without_a_name_takes_the_only_batch(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If there are several batches, `work` needs --name."""
    monkeypatch.setenv("PROMPTLAYER_EXEC_DB", "sqlite:///other.sqlite")
    file = write(tmp_path / "one", {"workflow": "echo", "inputs": {"n": 1}})
    assert run("run", file)[0] == 0
    assert run("run", file, "--name", "two")[0] == 0
    assert (tmp_path / "other.sqlite").exists()
    code, _, err = run("work")
    problem = "there are several batches: choose one with --name"
    assert (code, err) == (2, f"{problem}. The batches in the database are: one, two\n")
    assert run("work", "--name", "two")[0] == 0
    assert len(run("status")[1].splitlines()) == 2


def test_a_refused_key_is_exit_code_1(
    run: Run, tmp_path: Path, sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No item is added. An unreachable server is 4, and the items wait. A missing key is 2."""
    (tmp_path / DATABASE).unlink()
    file = write(tmp_path / "night.jsonl", {"workflow": "echo", "inputs": {"n": 1}})
    monkeypatch.setenv("PROMPTLAYER_API_KEY", "")
    assert run("run", file)[0] == 2
    assert not list(tmp_path.rglob("*.sqlite"))
    monkeypatch.setenv("PROMPTLAYER_API_KEY", "wrong")
    code, _, err = run("run", file)
    assert code == 1
    assert err.endswith("Check PROMPTLAYER_API_KEY. Nothing was added\n")
    assert run("status")[1] == ""
    monkeypatch.setenv("PROMPTLAYER_API_KEY", sim.api_key)
    assert run("run", file, "--base-url", "http://127.0.0.1:9", "--outage", "0.01")[0] == 4
    assert run("run", file)[0] == 0


@pytest.mark.parametrize(("status", "body"), [(402, None), (404, b"<html>not found</html>")])
def test_refusals_that_pass_are_exit_code_4(
    run: Run, tmp_path: Path, sim: Simulator, status: int, body: bytes | None
) -> None:
    """The account's bill is not paid, or a gateway is deployed: the items wait for that."""
    file = write(tmp_path / "night.jsonl", {"workflow": "echo", "inputs": {"n": 1}})
    sim.inject(Fault.status(status, body=body, times=None))
    code, _, err = run("run", file, "--outage", "0.01")
    assert code == 4
    assert "No item is lost: run the same command again to continue." in err
    sim.clear_faults()
    assert run("run", file)[0] == 0


def test_a_batch_of_another_server_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sim: Simulator
) -> None:
    """A trial's results are not taken for those of the server in earnest, and its file stays."""
    file = write(tmp_path / "night.jsonl", {"key": "a", "inputs": {"n": "trial"}})
    running: list[Any] = ["run", file, "--workflow", "echo", "--out", "out.jsonl"]
    assert run(*running)[0] == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    with Simulator() as other:
        monkeypatch.setenv("PROMPTLAYER_BASE_URL", other.base_url)
        exporting = ["export", "--out", "other.jsonl"]
        for asked in (running, ["work"], ["recheck"], ["retry", "--failed"], exporting):
            code, out, err = run(*asked)
            assert (code, out) == (2, "")
            assert f"started on {sim.base_url}. On {other.base_url}, its ids would" in err
            assert "or give another --name for a new batch" in err
            assert err.endswith("under a new address or with a new key, give --same-server.\n")
        assert other.requests == []
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert not (tmp_path / "other.jsonl").exists()


def test_another_key_is_refused_until_you_confirm_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a rotation, `--same-server` continues the batch; the error names this option."""
    file = write(tmp_path / "night.jsonl", {"key": "a", "inputs": {"n": 1}})
    assert run("run", file, "--workflow", "echo")[0] == 0
    monkeypatch.setenv("PROMPTLAYER_API_KEY", "pl_rotated")
    code, _, err = run("work")
    assert code == 2
    assert "or give another --name for a new batch" in err
    assert err.endswith("under a new address or with a new key, give --same-server.\n")
    assert run("work", "--same-server")[0] == 0


@pytest.mark.parametrize(("options", "suffixes"), [((), 1), (("--no-push",), 0)])
def test_a_batch_is_pushed_unless_that_is_refused(
    sim: Simulator,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    options: tuple[str, ...],
    suffixes: int,
) -> None:
    """Without `--no-push`, each start asks for a message at its end."""
    monkeypatch.delenv("PROMPTLAYER_EXEC_PUSH")
    file = write(tmp_path / "night.jsonl", *({"key": key, "inputs": {"n": 1}} for key in "ab"))
    assert run("run", file, "--workflow", "echo", *options, "--out", "out.jsonl")[0] == 0
    assert len(sim.runs) == 2
    assert len({run.body.get("channel_name_suffix") for run in sim.runs} - {None}) == suffixes


def test_a_closed_standard_output_is_exit_code_141(start: Start, tmp_path: Path) -> None:
    """It stops the work on items that are still running, without a message."""
    items = [{"workflow": "echo", "inputs": {"n": n}} for n in range(2)]
    file = write(tmp_path / "night", *items, {"workflow": "held"})
    process = start("batch", "run", file).process
    process.stdout.close()
    assert process.wait(TIMEOUT) == 141
    assert process.stderr.read() == "batch night: 3 items\n"


def test_without_the_extra_the_error_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code is 2."""
    monkeypatch.setitem(sys.modules, "promptlayer_exec.dbos", None)
    monkeypatch.delattr(promptlayer_exec, "dbos")
    file = write(tmp_path / "night.jsonl", {"workflow": "echo"})
    code, _, err = run("run", file)
    assert code == 2
    assert install_hint("cli", "dbos") in err


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock of the progress."""
    clock = Clock()
    monkeypatch.setattr(_live.time, "monotonic", lambda: clock.now)
    return clock


def test_progress_has_the_rate_and_the_remaining_time(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal it is a line every ten seconds, also if nothing changes."""
    progress = _live.BatchProgress()
    with progress.shown():
        for seconds, done in ((0.0, 3), (5.0, 50), (10.0, 103), (19.0, 103), (19.7, 103)):
            clock.now = seconds
            progress.show(BatchStatus(393 - done, 7, done - 3, 2, 1, 400))
        logging.getLogger("promptlayer_exec").warning("problem")
    assert capsys.readouterr().err.splitlines() == [
        "103/400 done, 7 running, 2 failed, 1 unknown, 10.0/s, 29.7 s left",
        "103/400 done, 7 running, 2 failed, 1 unknown, 10.0/s, 29.7 s left",
        "problem",
    ]


def test_progress_has_no_rate_while_start_requests_fail(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line has the reason of the pause, and another one its end."""
    progress = _live.BatchProgress()
    breaker = Breaker(600.0, lambda _: None, lambda: clock.now)
    with progress.shown():
        for seconds, done, unknown in ((0.0, 3, 0), (5.0, 43, 0), (10.0, 43, 4), (20.0, 83, 4)):
            clock.now = seconds
            for _ in range(unknown if seconds < 20.0 else 0):
                error = ServerError("the server returned 503", status=503, server_message="")
                breaker.failed(error, since=clock.now)
            if seconds == 20.0:
                breaker.succeeded()
            progress.show(BatchStatus(97 - done, 7, done, 0, unknown, 104 + unknown))
    assert capsys.readouterr().err.splitlines() == [
        (
            "start requests fail (the server returned 503): pausing, and trying a single one every"
            " 0.1 to 30 s"
        ),
        "47/108 done, 7 running, 4 unknown",
        "start requests work again",
        "87/108 done, 7 running, 4 unknown, 4.0/s, 5.2 s left",
    ]


def test_progress_without_a_finished_item_has_no_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be that of the items that finished long ago."""
    progress = _live.BatchProgress()
    with progress.shown():
        for seconds, done in ((0.0, 3), (10.0, 103), (20.0, 103), (80.0, 103)):
            clock.now = seconds
            progress.show(BatchStatus(103 - done, 1, done, 0, 0, 104))
    assert capsys.readouterr().err.splitlines() == [
        "103/104 done, 1 running, 10.0/s, 0.1 s left",
        "103/104 done, 1 running",
        "103/104 done, 1 running, none finished for 1 min 10 s",
    ]


def test_an_item_that_takes_long_is_named_with_the_command_that_ends_it(
    sim: Simulator, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, when no item has finished for a while."""
    monkeypatch.setattr(_live, "STALLED_AFTER", 0.0)
    file = write(tmp_path / "night.jsonl", {"key": "a", "workflow": "held", "inputs": {}})
    code, _, err = run("run", file, "--give-up-after", "0.8s")
    assert code == 1
    (said,) = re.findall(r"no item has finished for a minute.*\n.*", err)
    assert f"Item 'a' (execution {sim.runs[0].execution_id}) has been running the longest" in said
    assert said.endswith("end it with:\n  promptlayer-exec batch give-up a --name night")


def test_the_end_of_an_outage_is_reported(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """Otherwise a log would not show how long it took."""
    sim.inject(Fault.status(503, times=1), path="/workflow-version-execution-results")
    file = write(tmp_path / "night.jsonl", {"key": "a", "workflow": "echo", "inputs": {"n": 1}})
    code, _, err = run("run", file)
    assert code == 0
    _, began, over, *_ = err.splitlines()
    assert "503" in began
    assert over == "PromptLayer is reachable again"


def test_results_that_the_database_does_not_know_are_not_run_again(
    sim: Simulator, run: Run, tmp_path: Path
) -> None:
    """Whether it lacks the item, or has not finished one that succeeded."""
    items = [{"key": key, "workflow": "echo", "inputs": {"n": key}} for key in ("a", "bad")]
    file = write(tmp_path / "night.jsonl", *items)
    for name in ("out.jsonl", "out.csv"):
        command = ("run", file, "--out", name)
        assert run(*command)[0] == 1
        assert run(*command)[0] == 1  # which continues the file, or replaces the table
        before = (tmp_path / name).read_text()
        code, _, err = run(*command, "--db", "sqlite:///other.sqlite")
        assert code == 2
        assert f"{name} has 2 results that batch 'night' in sqlite:///other.sqlite does not" in err
        assert "you would pay for that item again. Use the database that produced" in err
        assert (tmp_path / name).read_text() == before
    assert len(sim.runs) == 2
    write(tmp_path / "bad.jsonl", items[1])
    assert run("run", "bad.jsonl", "--name", "night", "--db", "sqlite:///other.sqlite")[0] == 1
    (tmp_path / "out.jsonl").write_text(json.dumps(results(tmp_path / "out.jsonl")[-1]) + "\n")
    with (tmp_path / "out.jsonl").open() as out:
        is_bad = json.loads(out.readline())["key"] == "bad"
    code, _, err = run("run", file, "--out", "out.jsonl", "--db", "sqlite:///other.sqlite")
    assert (code == 2) is not is_bad


def test_items_of_a_csv_file_are_run(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """Its results can be a table, too, which later is exported once more."""
    file = write(tmp_path / "night.csv", "key,n", "a,1", "b,2")
    assert run("run", file, "--workflow", "echo", "--out", "table.csv")[0] == 0
    assert run("export", "--out", "out.csv") == (0, "", "")
    assert (tmp_path / "out.csv").read_text().splitlines()[0].startswith("key,execution_id,")
    code, out, _ = run("export")
    assert code == 0
    assert {line["key"]: line["output"] for line in map(json.loads, out.splitlines())} == {
        "a": "1",
        "b": "2",
    }
    assert {run.inputs["n"] for run in sim.runs} == {"1", "2"}


def test_the_work_stops_after_failures_in_a_row(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """The items that are left wait; failures of an earlier command do not count."""
    items = [{"key": f"k{n}", "workflow": "echo", "inputs": {"n": "bad"}} for n in range(3)]
    # The first item is started first: the others fail soon.
    file = write(tmp_path / "night.jsonl", {"key": "held", "workflow": "held"}, *items)
    command = ("run", file, "--stop-after-failures", 3)
    code, _, err = run(*command)
    assert code == 1
    assert "stopped, because 3 items in a row did not succeed. No item is lost" in err
    assert "batch night: 4 items: " in err
    assert "3 ExecutionFailed" in err
    sim.finish(next(run.execution_id for run in sim.runs if "n" not in run.inputs), "Answer")
    code, _, err = run(*command)
    assert code == 1
    assert "1 succeeded, 3 failed" in err
    assert "stopped" not in err


def test_settings_belong_to_the_batch(run: Run, tmp_path: Path) -> None:
    """A worker that names none takes those that are stored; others change them, and say so."""
    file = write(tmp_path / "night.jsonl", {"workflow": "echo", "inputs": {"n": 1}})
    assert run("run", file, "--stop-after-failures", 1)[0] == 0
    (row,) = map(json.loads, run("list", "--json")[1].splitlines())
    assert (row["max_in_flight"], row["rate"], row["total"]) == (None, 100.0, 1)
    write(file, {"workflow": "echo", "inputs": {"n": 2}})
    code, _, err = run("run", file, "--max-in-flight", 7, "--rate", 50)
    assert code == 0
    assert "batch 'night': rate changed from 100 to 50 for all its workers\n" in err
    write(file, {"workflow": "echo", "inputs": {"n": 3}})
    assert "is now" not in run("run", file)[2]
    (row,) = map(json.loads, run("list", "--json")[1].splitlines())
    assert (row["max_in_flight"], row["rate"], row["total"]) == (7, 50.0, 3)
    code, out, err = run("list")
    assert err.startswith("in sqlite:////")
    assert re.fullmatch(
        r"batch night: 3 items: 3 succeeded, 0 failed, 0 unknown;"
        r" [-\d]+ [:\d]+Z, max-in-flight 7, rate 50\n",
        out,
    )


def test_an_item_can_be_looked_at(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """Its request, and what happened to it in the order of time, for people and for programs."""
    items = [{"key": key, "workflow": "echo", "inputs": {"n": key}} for key in ("a", "bad")]
    assert run("run", write(tmp_path / "night.jsonl", *items))[0] == 1
    code, out, _ = run("show", "a")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("item a of batch night: succeeded since 20")
    assert "  workflow: echo" in lines
    assert '  inputs: {"n": "a"}' in lines
    assert '  output: "a"' in lines
    (execution_id,) = (run.execution_id for run in sim.runs if run.inputs["n"] == "a")
    events = [line.split("Z  ") for line in lines if line.startswith("  20")]
    assert [what.partition(" by ")[0] for _, what in events] == [
        "attempt 1 added",
        "attempt 1 taken",
        f"execution {execution_id} started",
        "succeeded",
    ]
    shown = json.loads(run("show", "bad", "--json")[1])
    assert shown["outcome"]["error"]["type"] == "ExecutionFailed"
    assert [attempt["state"] for attempt in shown["attempts"]] == ["failed"]
    assert run("show", "c") == (2, "", "batch 'night' has no item 'c'\n")


def test_failed_and_unknown_items_are_started_again_on_request(
    sim: Simulator, run: Run, tmp_path: Path
) -> None:
    """By the next worker; the same command continues the results."""
    file = write(tmp_path / "night.jsonl", {"key": "a", "workflow": "echo", "inputs": {"n": 1}})
    command = ("run", file, "--out", "out.jsonl")
    sim.inject(on("POST", "/", Fault.disconnect()))
    assert run(*command)[0] == 1
    sim.clear_faults()
    assert run("retry") == (
        *(2, ""),
        "give --failed, --unknown, both, or the keys of failed items\n",
    )
    assert run("retry", "--failed")[2] == "batch night: there is no item to run again\n"
    code, _, err = run("retry", "--unknown")
    assert code == 0
    assert err == (
        "batch night: 1 item starts again. Repeat its `batch run`, or"
        " continue without a results file with:\n"
        "  promptlayer-exec batch work --name night\n"
    )
    assert run(*command)[0] == 0
    assert [line["succeeded"] for line in results(tmp_path / "out.jsonl")] == [False, True]
    assert run("recheck")[2] == "batch night: there is no item to run again\n"
    assert run("show", "a")[1].count(" added\n") == 2


def test_what_did_not_succeed_has_a_command_that_goes_on(
    sim: Simulator, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works as it is: it has the name of the batch, and the options that were given.

    Nothing advises to check the run of an item again that is known to have failed.
    """
    file = write(tmp_path / "my night", {"workflow": "echo", "inputs": {"n": "bad"}})
    hint = (
        "start failed items again, which you pay for, with:\n"
        "  promptlayer-exec batch retry --failed --name 'my night'{0}\n"
    )
    assert run("run", file)[2].endswith(hint.format(""))
    _, out, err = run("status")
    assert out == "batch my night: 1 item: 0 succeeded, 1 failed, 0 unknown\n"
    cause, _, hints = err.partition("\n")
    assert cause.startswith("1 ExecutionFailed, for example ")
    assert hints == hint.format("")
    assert run("status", "--json")[2] == ""
    assert run("work", "--name", "my night")[2].endswith(hint.format(""))
    server = f" --base-url {sim.base_url}"
    assert hint.format(server) in run("run", file, "--base-url", sim.base_url)[2]

    copied = [shlex.split(line) for line in err.splitlines() if line.startswith("  ")]
    assert [run(*arguments[2:])[0] for arguments in copied] == [0]
    assert "  promptlayer-exec batch work --name 'my night'" in run("status")[2].splitlines()
    assert run("work", "--name", "my night")[0] == 1

    sim.inject(on("POST", "/", Fault.disconnect()))
    err = run("run", file, "--name", "two")[2]
    assert err.splitlines()[-1] == "  promptlayer-exec batch retry --unknown --name two"
    assert hint.format("") in run("status")[2]
    sim.clear_faults()
    other = "sqlite:///other.sqlite"
    assert run("run", file, "--db", other)[2].endswith(hint.format(f" --db {other}"))
    monkeypatch.setenv("PROMPTLAYER_EXEC_DB", other)
    assert run("run", file)[2].endswith(hint.format(""))


def test_a_batch_can_be_deleted(sim: Simulator, start: Start, run: Run, tmp_path: Path) -> None:
    """After a confirmation, and not while a worker works on it."""
    item = {"workflow": "held", "inputs": {}}
    process = start("batch", "run", write(tmp_path / "night.jsonl", item)).process
    while not sim.runs:
        time.sleep(0.01)
        assert process.poll() is None
    code, _, err = run("delete", "--yes")
    assert code == 2
    assert err == "a worker works on batch 'night', so nothing was deleted. Stop it first\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 130
    code, _, err = run("delete")
    assert code == 2
    assert err.startswith("batch night: 1 item: ")
    assert err.endswith("\ndo it with:\n  promptlayer-exec batch delete --yes --name night\n")
    assert run("delete", "--yes") == (0, "", "deleted batch night with 1 item\n")
    for command in ("status", "list"):
        code, out, err = run(command, "--json")
        assert (code, out) == (0, "")
        assert err.startswith("there is no batch in sqlite:////")
        assert err.endswith(". Check --db or PROMPTLAYER_EXEC_DB\n")


@pytest.mark.parametrize(
    ("typed", "ends_with"),
    [
        (b"n\n", (1, "nothing was deleted")),
        (b"\x04", (130, "interrupted: nothing was deleted")),
        (b"y\n", (0, "deleted batch night with 3 items")),
    ],
    ids=["no", "end", "yes"],
)
def test_deleting_is_asked_about_on_a_terminal(
    run: Run,
    tmp_path: Path,
    typed: bytes,
    ends_with: tuple[int, str],
) -> None:
    """What is typed there decides; the end of the input is no answer."""
    items = [{"key": key, "workflow": "echo", "inputs": {"n": key}} for key in ("a", "b", "bad")]
    assert run("run", write(tmp_path / "night.jsonl", *items))[0] == 1
    leader, follower = pty.openpty()
    with os.fdopen(leader, "wb", 0) as keyboard, os.fdopen(follower) as terminal:
        keyboard.write(typed)
        code, _, err = run("delete", stdin=terminal)
    question, _, rest = err.partition(" [y/N]:")
    what = "batch night: 3 items: 2 succeeded, 1 failed, 0 unknown"
    assert question == f"{what}\nDelete this batch with all its results?"
    assert (code, rest.strip()) == ends_with


def test_a_worker_waits_for_its_batch(
    sim: Simulator, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what it waits for, and works once the batch is added."""
    said = []

    def add(text: str) -> None:
        said.append(text)
        adding = Batch("night", session=Session).add([StartRequest("echo", {"n": 1}, key="a")])
        with ThreadPoolExecutor() as elsewhere:
            elsewhere.submit(asyncio.run, adding).result(TIMEOUT)

    monkeypatch.setattr(lookup, "err", add)
    assert run("work", "--name", "night")[0] == 0
    assert said[0].startswith("waiting for batch 'night' in sqlite:////")
    assert len(sim.runs) == len(said) == 1


def test_a_terminal_gets_a_bar(terminal: Callable[..., Any], tmp_path: Path) -> None:
    """The bar shows how many items are done and how many failed."""
    lines = [{"inputs": {"n": "bad" if n == 3 else n}} for n in range(9)]
    file = write(tmp_path / "night.jsonl", *lines)
    code, text = terminal("batch", "run", file, "--workflow", "echo", "--out", "out").end()
    assert code == 1
    assert "9/9 done, 0 running, 1 failed" in text


def test_only_the_items_with_these_keys_are_started_again(
    sim: Simulator, run: Run, tmp_path: Path
) -> None:
    """Those that failed; an unknown one needs an option, and can be given time for a callback."""
    items = [{"key": key, "workflow": "echo", "inputs": {"n": "bad"}} for key in ("a", "b")]
    lost = {"key": "lost", "workflow": "echo", "inputs": {"n": 1}}
    assert run("run", write(tmp_path / "night.jsonl", *items))[0] == 1
    sim.inject(on("POST", "/", Fault.disconnect()))
    assert run("run", write(tmp_path / "night.jsonl", *items, lost), "--attempts", 2)[0] == 1
    sim.clear_faults()

    assert run("retry", "c") == (2, "", "batch 'night' has no item 'c'\n")
    assert run("retry", "a", "lost") == (
        *(2, ""),
        (
            "item 'lost' is unknown: its run may have started, and you may be billed\n"
            "if you find its run, follow it with:\n"
            "  promptlayer-exec batch adopt lost ID --name night\n"
            "else start it again, which you pay for, with:\n"
            "  promptlayer-exec batch retry lost --unknown --name night\n"
        ),
    )
    code, _, err = run("retry", "b", "--unknown")
    assert code == 2
    assert "\n  promptlayer-exec batch retry b --name night\n" in err
    assert "night: 1 item starts again. " in run("retry", "b")[2]
    assert "night: 1 item starts again. " in run("retry", "lost", "--unknown")[2]


def test_an_item_that_is_followed_shows_its_run(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """You have paid for it. It does not start again, and a command ends it."""
    file = write(tmp_path / "night.jsonl", {"key": "a", "workflow": "held", "inputs": {}})
    sim.inject(Fault.status(401, times=None), path="/workflow-version-execution-results")
    assert run("run", file)[0] == 1
    (started,) = sim.runs
    shown = run("show", "a")[1].splitlines()
    assert shown[-1] == f"  execution {started.execution_id} is followed"
    assert shown[-2].endswith(f"  execution {started.execution_id} started")
    assert run("retry", "a") == (
        *(2, ""),
        (
            f"item 'a' has not finished: the batch follows execution {started.execution_id}\n"
            "end it with:\n"
            "  promptlayer-exec batch give-up a --name night\n"
        ),
    )
    assert run("give-up") == (
        *(2, ""),
        "give the keys of items, or --running-for 1h for all that take longer\n",
    )
    assert run("give-up", "--running-for", "1h") == (
        *(0, ""),
        "batch night: there is no item to give up\n",
    )
    assert run("give-up", "b") == (2, "", "batch 'night' has no item 'b'\n")
    again = (
        "its run may still bring an output: follow it again, for free, with:\n"
        "  promptlayer-exec batch retry a --name night\n"
        "or pay for a second run with:\n"
        "  promptlayer-exec batch retry a --again --name night\n"
    )
    assert run("give-up", "a") == (0, "", "batch night: gave up 1 item\n" + again)
    text = "item 'a' has failed, so there is no run to give up\n"
    assert run("give-up", "a") == (2, "", text + again)
    _, shown, err = run("show", "a")
    assert "given up by hand" in shown
    assert err == again
    assert run("status")[2].endswith(
        "follow runs that may still bring an output again, for free, with:\n"
        "  promptlayer-exec batch recheck --name night\n"
        "or pay for a second run of an item with:\n"
        "  promptlayer-exec batch retry KEY --again --name night\n"
    )
    assert "batch night: 1 item is followed again. " in run("retry", "--failed")[2]

    sim.clear_faults()
    assert run("work", "--give-up-after", "1.5s")[0] == 1
    assert "ExecutionTimeout: execution" in run("show", "a")[1]
    assert " after its start" in run("show", "a")[1]
    sim.finish(started.execution_id, "Answer")
    assert run("recheck")[0] == 0
    assert run("work")[0] == 0
    assert len(sim.runs) == 1


def test_runs_that_may_go_on_are_followed_again_and_others_start(
    sim: Simulator, run: Run, tmp_path: Path
) -> None:
    """Each kind of failed items has its commands, and `retry` counts both."""
    given_up = {"key": "a", "workflow": "held", "inputs": {}}
    bad = {"key": "b", "workflow": "echo", "inputs": {"n": "bad"}}
    file = write(tmp_path / "night", given_up, bad)
    assert run("run", file, "--give-up-after", "0.5s")[0] == 1
    commands = [line for line in run("status")[2].splitlines() if line.startswith("  ")]
    assert commands == [
        "  promptlayer-exec batch retry --failed --name night",
        "  promptlayer-exec batch recheck --name night",
        "  promptlayer-exec batch retry KEY --again --name night",
    ]
    assert "night: 2 items: 1 starts again, 1 is followed again. " in run("retry", "b", "a")[2]


def test_an_item_without_a_run_cannot_be_given_up(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """One that waits is started by `work`, and an unknown one has two ways out."""
    item = {"key": "a", "workflow": "echo", "inputs": {"n": 1}}
    file = write(tmp_path / "night.jsonl", item)
    sim.inject(on("POST", "/", Fault.status(401)))
    assert run("run", file)[0] == 1
    assert run("give-up", "a") == (
        *(2, ""),
        (
            "item 'a' has no known run yet\n"
            "start or continue it with:\n"
            "  promptlayer-exec batch work --name night\n"
        ),
    )
    sim.clear_faults()
    sim.inject(on("POST", "/", Fault.disconnect()))
    assert run("work")[0] == 1
    ways_out = (
        "if you find its run, follow it with:\n"
        "  promptlayer-exec batch adopt a ID --name night\n"
        "else start it again, which you pay for, with:\n"
        "  promptlayer-exec batch retry a --unknown --name night\n"
    )
    text = "item 'a' is unknown, so there is no run to give up\n"
    assert run("give-up", "a") == (2, "", text + ways_out)
    search = "to find its run, search PromptLayer for promptlayer_exec.key = a\n"
    assert run("show", "a")[2] == search + ways_out


def test_a_suggested_command_names_the_server_of_the_batch(
    sim: Simulator, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works as it is, although the command that printed it was not given the server."""
    monkeypatch.delenv("PROMPTLAYER_BASE_URL")
    file = write(tmp_path / "night", {"key": "a", "workflow": "echo", "inputs": {"n": "bad"}})
    assert run("run", file, "--base-url", sim.base_url)[0] == 1
    assert run("items")[1].endswith(f" --name night --base-url {sim.base_url}\n")
    shown = run("show", "a")[2]
    lines = (run("status")[2] + shown).splitlines()
    suggested = [line for line in lines if line.startswith("  ")]
    assert len(suggested) == 2
    for line in suggested:
        assert line.endswith(f" --name night --base-url {sim.base_url}")
        code, _, err = run(*shlex.split(line)[2:])
        assert (code, "started on" in err) in [(0, False), (2, False)]
    assert run("work", "--base-url", sim.base_url)[0] == 1


def test_a_suggested_command_continues_with_the_new_key(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has `--same-server`, as the command that printed it."""
    lines = [{"key": key, "workflow": "echo", "inputs": {"n": "bad"}} for key in "ab"]
    assert run("run", write(tmp_path / "night", *lines))[0] == 1
    monkeypatch.setenv("PROMPTLAYER_API_KEY", "pl_rotated")
    for command in (("give-up", "a"), ("retry", "a"), ("recheck",), ("retry", "b")):
        err = run(*command, "--same-server")[2]
        suggested = [line for line in err.splitlines() if line.startswith("  ")]
        assert suggested
        assert all(line.endswith(" --same-server") for line in suggested)


def test_a_suggested_command_has_no_hidden_password(run: Run) -> None:
    """It names the environment variable, because `***` is no password."""
    url = "postgresql://me:secret@db.internal/batches"
    flags = lookup.command_flags("night", url)
    assert flags == ' --name night --db "${PROMPTLAYER_EXEC_DB:?}"'


def test_a_key_may_begin_with_a_hyphen(run: Run, tmp_path: Path) -> None:
    """The suggested commands work as they are."""
    file = write(tmp_path / "night", {"key": "-x", "workflow": "echo", "inputs": {"n": 1}})
    assert run("run", file)[0] == 0
    (line,) = run("items")[1].splitlines()
    suggested = shlex.split(line.partition("promptlayer-exec batch ")[2])
    assert suggested == ["show", "--name", "night", "--", "-x"]
    assert run(*suggested)[0] == 0
    err = run("retry", "--", "-x")[2]
    suggested = shlex.split(err.splitlines()[-1])[2:]
    assert suggested == ["retry", "--again", "--name", "night", "--", "-x"]
    suggested = shlex.split(run(*suggested)[2].splitlines()[-1])[2:]
    assert "1 item starts again" in run(*suggested)[2]


@pytest.mark.parametrize("fault", [Fault.status(403), Fault.status(200, body=b'{"Answer": 1}')])
def test_a_run_that_nobody_can_read_is_adopted(
    sim: Simulator, run: Run, tmp_path: Path, fault: Fault
) -> None:
    """Only a run that PromptLayer does not have is refused, and a run if the item has another."""
    file = write(tmp_path / "night", {"key": "a", "workflow": "echo", "inputs": {"n": 1}})
    sim.inject(on("POST", "/", Fault.disconnect()))
    assert run("run", file)[0] == 1
    sim.clear_faults()
    found = sim.add_execution(Scenario([SimNode("Answer", 1, is_output_node=True)]))
    sim.inject(on("GET", "/workflow-version-execution-results", fault))
    code, _, err = run("adopt", "a", found)
    assert code == 0
    assert err.startswith(f"cannot read execution {found} yet: ")


def test_an_item_that_got_a_run_meanwhile_adopts_no_other(
    sim: Simulator, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text names the run that it has."""
    file = write(tmp_path / "night", {"key": "a", "workflow": "echo", "inputs": {"n": 1}})
    sim.inject(on("POST", "/", Fault.disconnect()))
    assert run("run", file)[0] == 1
    sim.clear_faults()
    first, second = (sim.add_execution(Scenario([])) for _ in range(2))
    adopt = Batch.adopt

    async def adopt_late(batch: Batch, key: str, execution_id: int) -> bool:
        assert await adopt(batch, key, first)
        return await adopt(batch, key, execution_id)

    monkeypatch.setattr(Batch, "adopt", adopt_late)
    assert run("adopt", "a", second) == (2, "", f"item 'a' has execution {first} by now\n")


def test_work_that_nobody_can_read_leads_to_recheck(
    sim: Simulator, run: Run, tmp_path: Path
) -> None:
    """The items that failed are not repeated by the same command alone."""
    lines = [{"key": f"{n}", "workflow": "echo", "inputs": {"n": n}} for n in range(6)]
    unreadable = Fault.status(200, body=b'{"Answer": {"status": null}}')
    sim.inject(on("GET", "/workflow-version-execution-results", unreadable))
    code, _, err = run("run", write(tmp_path / "night", *lines), "--max-in-flight", 1)
    assert code == 1
    assert err.endswith(
        ". No item is lost.\n"
        "once their runs can be read, follow them with:\n"
        "  promptlayer-exec batch recheck --name night\n"
        "and then run the same command again to continue\n"
    )


def test_a_run_that_somebody_found_is_adopted(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """Its item is unknown no longer. A run that PromptLayer does not have is refused."""
    file = write(tmp_path / "night.jsonl", {"key": "a", "workflow": "echo", "inputs": {"n": 1}})
    sim.inject(on("POST", "/", Fault.disconnect()))
    assert "  promptlayer-exec batch adopt KEY ID --name night\n" in run("run", file)[2]
    sim.clear_faults()
    found = sim.add_execution(Scenario([SimNode("Answer", 1, is_output_node=True)]))
    code, _, err = run("adopt", "a", found + 1)
    assert (code, err.startswith(f"execution {found + 1}: ")) == (2, True)
    assert run("adopt", "b", found) == (2, "", "batch 'night' has no item 'b'\n")
    assert run("adopt", "a", found) == (
        *(0, ""),
        (
            f"batch night: a worker will follow execution {found} for item 'a'. Repeat its"
            " `batch run`, or continue without a results file with:\n"
            "  promptlayer-exec batch work --name night\n"
            "nothing has checked that this is the run of that item: look at its metadata in"
            " PromptLayer, or at its nodes with:\n"
            f"  promptlayer-exec watch {found}\n"
        ),
    )
    assert run("work")[0] == 0
    assert run("adopt", "a", found) == (
        *(2, ""),
        (
            "item 'a' has succeeded, and is not unknown\n"
            "print its request and its history with:\n"
            "  promptlayer-exec batch show a --name night\n"
            "pay for a second run with:\n"
            "  promptlayer-exec batch retry a --again --name night\n"
        ),
    )
    assert len(sim.runs) == 1


def test_a_run_that_another_item_has_adopted_has_a_way_out(
    sim: Simulator, run: Run, tmp_path: Path
) -> None:
    """The commands are those of the item that is still unknown, and of the other one."""
    items = [{"key": key, "workflow": "echo", "inputs": {"n": 1}} for key in ("a", "b")]
    sim.inject(on("POST", "/", Fault.disconnect()))
    assert run("run", write(tmp_path / "night", *items))[0] == 1
    sim.clear_faults()
    found = sim.add_execution(Scenario([SimNode("Answer", 1, is_output_node=True)]))
    assert run("adopt", "a", found)[0] == 0
    assert run("adopt", "b", found) == (
        *(2, ""),
        (
            f"execution {found} is the run of item 'a'\n"
            "if you find its run, follow it with:\n"
            "  promptlayer-exec batch adopt b ID --name night\n"
            "else start it again, which you pay for, with:\n"
            "  promptlayer-exec batch retry b --unknown --name night\n"
            "if the other item has adopted it by mistake, pay for a run of that one with:\n"
            "  promptlayer-exec batch retry KEY --again --name night\n"
        ),
    )


def test_items_are_listed_with_the_command_that_leads_on(
    sim: Simulator, run: Run, tmp_path: Path
) -> None:
    """Why an item has no output, since when, and what to type next."""
    lines = [{"key": key, "workflow": "echo", "inputs": {"n": key}} for key in ("lost", "ok")]
    sim.inject(on("POST", "/", Fault.disconnect()))
    assert run("run", write(tmp_path / "night.jsonl", lines[0]))[0] == 1
    sim.clear_faults()
    assert run("run", write(tmp_path / "night.jsonl", *lines))[0] == 1

    code, listed, err = run("items")
    assert code == 0
    lost, succeeded = listed.splitlines()
    assert lost.startswith("lost  unknown since 20")
    assert lost.endswith("  promptlayer-exec batch adopt lost ID --name night")
    assert succeeded.startswith("ok  succeeded since 20")
    assert succeeded.endswith(
        f", execution {sim.runs[-1].execution_id}  promptlayer-exec batch show ok --name night"
    )
    on_screen = run("items", on_screen=True)[1]
    assert "\n  promptlayer-exec batch adopt lost ID --name night\n" in on_screen
    assert "1 item unknown: each may have started a run, and you may be billed." in err
    assert err.endswith("  promptlayer-exec batch retry KEY --unknown --name night\n")

    (line,) = run("items", "--state", "unknown", "--json")[1].splitlines()
    unknown = json.loads(line)
    assert (unknown["state"], unknown["execution_id"]) == ("unknown", None)
    assert unknown["why"]
    nothing = (0, "", "batch night: there is no such item\n")
    assert run("items", "--older-than", "1h") == nothing
    assert run("items", "--state", "failed") == nothing
    code, _, err = run("items", "--state", "running")
    assert code == 2
    assert err.startswith("state must be one of waiting, sending, following, unknown, ")


def test_a_second_run_is_paid_for_deliberately(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """With `--again`, which asks; the results have both."""
    file = write(tmp_path / "night.jsonl", {"key": "a", "workflow": "echo", "inputs": {"n": 1}})
    command = ("run", file, "--out", "out.jsonl")
    assert run(*command)[0] == 0
    assert run("retry", "a") == (
        *(2, ""),
        (
            "item 'a' has succeeded, so there is nothing to repeat\n"
            "print its request and its history with:\n"
            "  promptlayer-exec batch show a --name night\n"
            "pay for a second run with:\n"
            "  promptlayer-exec batch retry a --again --name night\n"
        ),
    )
    assert run("retry", "a", "--again") == (
        *(2, ""),
        (
            "batch night: a second run of 1 item, billed like the first\n"
            "paying for a second run needs a terminal to ask on, or --yes\n"
            "do it with:\n"
            "  promptlayer-exec batch retry a --again --yes --name night\n"
        ),
    )
    assert run("retry", "--again", "--yes")[0] == 2
    assert len(sim.runs) == 1
    assert "1 item starts again" in run("retry", "a", "--again", "--yes")[2]
    assert run(*command)[0] == 0
    assert len(sim.runs) == 2
    assert [line["succeeded"] for line in results(tmp_path / "out.jsonl")] == [True, True]


def test_an_item_shows_its_attempts(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """Each with its execution and how it ended, for people and for programs; the batch has them."""
    item = {"key": "bad", "workflow": "echo", "inputs": {"n": "bad"}}
    file = write(tmp_path / "night.jsonl", item)
    assert run("run", file)[0] == 1
    assert run("retry", "bad")[0] == 0
    assert run("run", file)[0] == 1
    first, second = (run.execution_id for run in sim.runs if run.inputs["n"] == "bad")

    _, out, _ = run("show", "bad")
    ended = f"attempt 1 finished, execution {first}: ExecutionFailed: execution {first} failed: "
    assert ended in out
    assert f"  execution {second} started" in out
    attempts = json.loads(run("show", "bad", "--json")[1])["attempts"]
    assert [attempt["execution_id"] for attempt in attempts] == [first, second]
    for attempt in attempts:
        assert attempt["error"].keys() == {"type", "message", "data"}
        assert attempt["error"]["type"] == "ExecutionFailed"


def test_the_number_of_attempts_is_stored_with_the_batch(run: Run, tmp_path: Path) -> None:
    """`list` shows it if it is more than one."""
    file = write(tmp_path / "night.jsonl", {"key": "a", "workflow": "echo", "inputs": {"n": 1}})
    assert run("run", file, "--attempts", 3)[0] == 0
    assert run("list")[1].endswith(", rate 100, attempts 3\n")
    assert json.loads(run("list", "--json")[1])["attempts"] == 3


def test_each_definition_is_read_once(sim: Simulator, run: Run, tmp_path: Path) -> None:
    """By the command that adds the items; its worker reads what it starts itself."""
    sim.add_workflow("report", Scenario([SimNode("Report", 1)]), inputs={"n": "string"})
    file = write(tmp_path / "night.jsonl", {"key": "a", "workflow": "report", "inputs": {"n": "1"}})
    before = len(sim.requests)
    assert run("run", file, "--no-push")[0] == 0
    asked = [(request.method, request.path) for request in sim.requests[before:]]
    started = asked.index(("POST", "/workflows/report/run"))
    assert len([path for method, path in asked[:started] if path == "/workflows/report"]) == 2
