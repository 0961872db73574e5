"""The `starts` commands: from a list of unknown keys to one run for each."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

DONE = Scenario([SimNode("Answer", "42", is_output_node=True)])


@pytest.fixture
def database(tmp_path: Path) -> str:
    """Return the URL of a database that does not exist yet."""
    return f"sqlite:///{tmp_path / 'keys.sqlite'}"


@pytest.fixture
def starts(call: Callable[..., Any], database: str) -> Callable[..., Any]:
    """Return a function that calls a `starts` command on the database."""
    return lambda *arguments: call("starts", *arguments, "--db", database)


@pytest.fixture(scope="module", autouse=True)
def _report(sim: Simulator) -> None:
    """Add the workflow of the tests."""
    sim.add_workflow("report", DONE)


@pytest.fixture
def run(call: Callable[..., Any], database: str) -> Callable[..., Any]:
    """Return a function that starts a run with a key."""
    options = ("--no-push", "--no-watch", "--db", database)
    return lambda key: call("run", "report", "--key", key, *options)


def test_each_unknown_key_is_brought_to_one_run(
    starts: Callable[..., Any], run: Callable[..., Any], sim: Simulator
) -> None:
    """One is adopted and one is forgotten, by the commands that the texts name."""
    before = len(sim.runs)
    sim.inject(Fault.disconnect(), path="/run")
    assert run("order 1")[0] == 1  # it ran
    sim.inject(Fault.status(503), path="/run")
    assert run("order-2")[0] == 1  # it did not
    assert run("order-3")[0] == 0

    code, out, err = starts("list", "--unknown")
    lines = out.splitlines()
    assert code == 0
    assert [line.split("  ")[0] for line in lines] == ["order 1", "order-2"]
    assert "workflow report: there was no usable response to its start request" in lines[0]
    assert "promptlayer-exec starts adopt 'order 1' ID --db sqlite" in lines[0].split("  ")[-1]
    assert "2 unknown: each may have started a run, and you may be billed." in err
    assert "promptlayer_exec.key = KEY" in err
    assert "promptlayer-exec starts forget KEY" in err
    assert len(starts("list")[1].splitlines()) == 3
    records = [json.loads(line) for line in starts("list", "--json")[1].splitlines()]
    assert [record["state"] for record in records] == ["unknown", "unknown", "started"]
    assert starts("list", "--unknown", "--older-than", "1h")[1] == ""

    key = next(run for run in sim.runs[before:]).body["metadata"]["promptlayer_exec.key"]
    assert key == "order 1"
    found = str(sim.runs[before].execution_id)
    code, _, err = starts("adopt", key, found)
    assert (code, f"promptlayer-exec watch {found}" in err) == (0, True)
    code, _, err = starts("forget", "order-2")
    assert (code, "forgetting keys needs a terminal to ask on, or --yes" in err) == (2, True)
    assert starts("forget", "order-2", "--yes")[0] == 0

    assert run("order 1")[1] == f"{found}\n"
    assert run("order-2")[0] == 0
    assert len(sim.runs) == before + 3
    assert starts("list", "--unknown")[1] == ""
    _, _, err = starts("forget", "order 1", "--yes")
    assert f"these runs had started, and remain on PromptLayer: {found}" in err


def test_a_key_may_begin_with_a_hyphen(
    call: Callable[..., Any], run: Callable[..., Any], database: str, sim: Simulator
) -> None:
    """The suggested commands work as they are."""
    sim.inject(Fault.disconnect(), path="/run")
    assert run("-k")[0] == 1
    listed = call("starts", "list", "--db", database)[1]
    suggested = shlex.split(listed.partition("promptlayer-exec ")[2])
    assert suggested == ["starts", "adopt", "--db", database, "--", "-k", "ID"]
    _, _, err = call("starts", "forget", "--db", database, "--", "-k")
    code, _, err = call(*shlex.split(err.splitlines()[-1])[1:])
    assert (code, err.startswith("forgot")) == (0, True)


def test_a_mistaken_run_is_not_adopted(
    starts: Callable[..., Any], run: Callable[..., Any], sim: Simulator
) -> None:
    """One that does not exist, one of another key, and one for a key that has a run."""
    run("order-1")
    other = str(sim.runs[-1].execution_id)
    sim.inject(Fault.disconnect(), path="/run")
    run("order-2")
    assert starts("adopt", "order-2", "99999999")[0] == 1
    code, _, err = starts("adopt", "order-2", other)
    assert (code, f"execution {other} belongs to the key 'order-1'" in err) == (2, True)
    code, _, err = starts("adopt", "order-1", other)
    assert code == 0  # it has it
    found = str(sim.runs[-1].execution_id)
    code, _, err = starts("adopt", "order-1", found)
    assert (code, f"the key 'order-1' has started execution {other}" in err) == (2, True)
    assert starts("adopt", "order-9", found)[0] == 2


def test_show_tells_what_leads_out(
    starts: Callable[..., Any], run: Callable[..., Any], sim: Simulator
) -> None:
    """What to search for, and a command for whether it is there or not."""
    sim.inject(Fault.disconnect(), path="/run")
    run("order-1")
    code, out, err = starts("show", "order-1")
    assert code == 0
    assert out.startswith("key order-1: unknown\n  workflow: report\n")
    assert "metadata promptlayer_exec.key = order-1" in err
    assert "promptlayer-exec starts adopt order-1 ID" in err
    assert "promptlayer-exec starts forget order-1" in err


def test_a_database_that_does_not_exist_is_not_created(
    starts: Callable[..., Any], tmp_path: Path
) -> None:
    """Its name may be mistyped."""
    code, _, err = starts("list", "--unknown")
    assert (code, f"there is no file {tmp_path / 'keys'}" in err) == (2, True)
    assert starts("show", "order-1")[0] == 2
    assert starts("forget", "order-1", "--yes")[0] == 2
    assert starts("forget", "order-1", "--unknown", "--yes")[0] == 2
    assert list(tmp_path.glob("keys*")) == []
