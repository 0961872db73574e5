"""The batches that the viewer shows, in a real database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from promptlayer_exec import Session, StartRequest
from promptlayer_exec.dbos import Batch
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator


@pytest.fixture
def _database(batches_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTLAYER_EXEC_DB", f"sqlite:///{batches_file}")


def _echo(inputs: Any) -> Scenario:
    status = "FAILED" if inputs["n"] == 2 else "SUCCESS"
    reason = "no text" if inputs["n"] == 2 else None
    node = SimNode("answer", inputs["n"], status=status, error_message=reason, is_output_node=True)
    return Scenario([node])


@pytest.mark.usefixtures("_database")
async def test_what_did_not_succeed_comes_first(
    sim: Simulator, viewer: Any, open_session: Callable[..., Session]
) -> None:
    """With its error and its execution; the counts say how many there are, and who works."""
    sim.add_workflow("echo", _echo)
    assert (await viewer.send("GET", "batches"))[1]["batches"] == []
    batch = Batch("night", session=lambda: open_session(push=False), max_in_flight=1)
    await batch.add([StartRequest("echo", {"n": n}, key=f"item {n}") for n in (1, 2, 3)])
    (waiting,) = (await viewer.send("GET", "batches"))[1]["batches"]
    assert (waiting["name"], waiting["waiting"], waiting["workers"]) == ("night", 3, 0)
    assert (waiting["latest"], time.time() - waiting["created"] < 60) == (None, True)
    sim.inject(Fault.disconnect(), path="/run")
    async with asyncio.timeout(30):
        await batch.work()
    _, found = await viewer.send("GET", "batch?name=night")
    counts = [found[name] for name in ("succeeded", "failed", "unknown", "total")]
    assert counts == [1, 1, 1, 3]
    *wrong, fine = found["items"]
    assert {item["kind"] for item in wrong} == {"failed", "unknown"}
    assert found["created"] < found["latest"] == max(item["finished"] for item in found["items"])
    (failed,) = (item for item in wrong if item["kind"] == "failed")
    assert (failed["key"], fine["kind"]) == ("item 2", "succeeded")
    assert failed["error"].startswith("ExecutionFailed: ")
    assert (failed["node"], failed["reason"]) == ("answer", "no text")
    assert {"text": "answer: no text", "count": 1} in found["groups"]
    (unknown,) = (item for item in wrong if item["kind"] == "unknown")
    assert (unknown["node"], "Server disconnected" in unknown["reason"]) == (None, True)
    assert "it is not known" not in unknown["reason"]
    _, some = await viewer.send("GET", "batch?name=night&reason=answer:%20no%20text")
    assert ([item["key"] for item in some["items"]], some["matching"]) == (["item 2"], 1)
    _, some = await viewer.send("GET", "batch?name=night&kind=succeeded&count=0")
    assert (some["items"], some["matching"]) == ([], 1)
    assert {failed["execution_id"], fine["execution_id"]} <= {
        str(run.execution_id) for run in sim.runs
    }
    assert (found["is_whole"], found["problem"]) == (True, None)


@pytest.mark.usefixtures("_database")
async def test_items_that_fail_for_one_cause_are_one_group(
    sim: Simulator, viewer: Any, open_session: Callable[..., Session]
) -> None:
    """What differs between them does not count, neither on the page nor for the batch itself."""

    def fail(inputs: Any) -> Scenario:
        reason = f"no text for customer {inputs['n']}" if inputs["n"] < 3 else "no price"
        return Scenario([SimNode("answer", status="FAILED", error_message=reason)])

    sim.add_workflow("echo", fail)
    batch = Batch("night", session=lambda: open_session(push=False))
    await batch.add([StartRequest("echo", {"n": n}, key=f"item {n}") for n in (1, 2, 3)])
    async with asyncio.timeout(30):
        await batch.work()
    _, found = await viewer.send("GET", "batch?name=night")
    cause = "answer: no text for customer …"
    assert found["groups"] == [
        {"text": cause, "count": 2},
        {"text": "answer: no price", "count": 1},
    ]
    _, some = await viewer.send("GET", f"batch?{urlencode({'name': 'night', 'reason': cause})}")
    assert sorted(item["key"] for item in some["items"]) == ["item 1", "item 2"]
    assert [failure.count for failure in await batch.failures()] == [2, 1]


@pytest.mark.usefixtures("_database")
async def test_the_items_of_another_server_are_not_shown(
    sim: Simulator, viewer: Any, open_session: Callable[..., Session]
) -> None:
    """Their ids mean nothing here; the counts are shown all the same."""
    sim.add_workflow("echo", _echo)
    address = sim.base_url.replace("127.0.0.1", "localhost")
    other = Batch("night", session=lambda: open_session(base_url=address))
    await other.add([StartRequest("echo", {"n": 1}, key="a")])
    async with asyncio.timeout(30):
        await other.work()
    _, found = await viewer.send("GET", "batch?name=night")
    assert (found["succeeded"], found["items"]) == (1, [])
    assert address in found["problem"]
    assert "--same-server" in found["problem"]


async def test_no_database_is_made(
    viewer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look at batches leaves nothing behind; what is no database is an answer."""
    path = tmp_path / "none.sqlite"
    monkeypatch.setenv("PROMPTLAYER_EXEC_DB", f"sqlite:///{path}")
    _, found = await viewer.send("GET", "batches")
    assert found == {"database": f"sqlite:///{path}", "batches": []}
    assert not path.exists()
    monkeypatch.setenv("PROMPTLAYER_EXEC_DB", "nonsense")
    status, answer = await viewer.send("GET", "batches")
    assert (status, "sqlite:///" in answer["message"]) == (503, True)
