"""The batches that the viewer shows, in a real database."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from promptlayer_exec import Session, StartRequest, StartUnknown
from promptlayer_exec._integration import time_left
from promptlayer_exec.dbos import Batch
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.starts import SQLStartStore


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
    assert (waiting["name"], waiting["counts"]["waiting"], waiting["workers"]) == ("night", 3, 0)
    assert (waiting["latest"], time.time() - waiting["created"] < 60) == (None, True)
    sim.inject(Fault.disconnect(), path="/run")
    async with asyncio.timeout(30):
        await batch.work()
    _, found = await viewer.send("GET", "batch?name=night")
    assert found["counts"] == {
        **dict.fromkeys(("waiting", "sending", "following"), 0),
        **dict.fromkeys(("succeeded", "failed", "unknown"), 1),
    }
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
    for text, keys in (("ITEM 2", ["item 2"]), ('n": 3', ["item 3"]), ("No Text", ["item 2"])):
        _, some = await viewer.send("GET", f"batch?{urlencode({'name': 'night', 'text': text})}")
        assert [item["key"] for item in some["items"]] == keys
        assert (some["found"], some["groups"]) == ({some["items"][0]["kind"]: 1}, found["groups"])
    assert {failed["execution_id"], fine["execution_id"]} <= {
        str(run.execution_id) for run in sim.runs
    }
    assert (found["is_whole"], found["problem"]) == (True, None)


@pytest.mark.usefixtures("_database")
async def test_items_that_fail_for_one_cause_are_one_group(
    sim: Simulator, viewer: Any, open_session: Callable[..., Session]
) -> None:
    """What differs between them counts neither on the pages nor for the batch itself."""

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

    named = {"failed_node": "answer", "cause": "no text for customer …"}
    _, hit = await viewer.send("GET", f"batches/failures?{urlencode(named)}")
    assert hit == [{"name": "night", "count": 2, "reason": cause}]
    _, hit = await viewer.send("GET", f"batches/failures?{urlencode(named | {'cause': 'other'})}")
    assert hit == []


@pytest.mark.usefixtures("_database")
async def test_a_failure_without_a_reason_is_one_cause_for_runs_and_items(
    sim: Simulator, viewer: Any, open_session: Callable[..., Session]
) -> None:
    """So the page of the cause leads from the run to the item."""
    sim.add_workflow("echo", lambda _: Scenario([SimNode("answer", status="FAILED")]))
    batch = Batch("night", session=lambda: open_session(push=False))
    await batch.add([StartRequest("echo", {}, key="item")])
    async with asyncio.timeout(30):
        await batch.work()
        execution = await viewer.board.start("echo", {})
        card = viewer.board.cards[execution.id]
        while card.state != "failed":
            await viewer.board.changed.wait()
    named = {"failed_node": "answer", "cause": card.cause}
    _, (hit,) = await viewer.send("GET", f"batches/failures?{urlencode(named)}")
    assert (hit["name"], hit["count"]) == ("night", 1)


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
    assert (found["counts"]["succeeded"], found["items"]) == (1, [])
    assert address in found["problem"]
    assert "--same-server" in found["problem"]


async def test_no_database_is_made(
    viewer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look at batches leaves nothing behind; what is no database is an answer."""
    path = tmp_path / "none.sqlite"
    monkeypatch.setenv("PROMPTLAYER_EXEC_DB", f"sqlite:///{path}")
    _, found = await viewer.send("GET", "batches")
    assert (found["database"], found["batches"]) == (f"sqlite:///{path}", [])
    assert found["unknown_keys"] == 0
    assert not path.exists()
    monkeypatch.setenv("PROMPTLAYER_EXEC_DB", "nonsense")
    status, answer = await viewer.send("GET", "batches")
    assert (status, "sqlite:///" in answer["message"]) == (503, True)


@pytest.mark.parametrize(
    ("speed", "idle", "left"),
    [(2.0, 1.0, 5.0), (2.0, 40.0, None), (0.01, 40.0, 1000.0), (0.01, 60.0, None), (None, 1, None)],
)
def test_the_time_left_is_disproved_by_time(
    speed: float | None, idle: float, left: float | None
) -> None:
    """It is unknown after a longer rest, or a minute, without a finished item."""
    assert time_left(10, speed, idle=idle) == left


@pytest.mark.usefixtures("_database")
async def test_each_state_has_the_command_that_leads_out_of_it(
    sim: Simulator, viewer: Any, open_session: Callable[..., Session]
) -> None:
    """The commands find batch, server and database, also from another terminal."""
    batch = Batch("night", session=lambda: open_session(push=False))
    await batch.add([StartRequest("echo", {"n": 1}, key="a")])
    _, found = await viewer.send("GET", "batch?name=night&kind=waiting")
    assert [item["key"] for item in found["items"]] == ["a"]
    shown = {one["state"]: [way["command"] for way in one["ways"]] for one in found["states"]}
    assert set(shown) == set(found["counts"])
    flags = f" --name night --db {found_database()} --base-url {sim.base_url}"
    assert shown["failed"][0] == f"promptlayer-exec batch retry --failed{flags}"
    assert shown["unknown"][0] == f"promptlayer-exec batch adopt KEY ID{flags}"
    assert all(command.endswith(flags) for commands in shown.values() for command in commands)


def found_database() -> str:
    """Return the database that the environment names."""
    return os.environ["PROMPTLAYER_EXEC_DB"]


@pytest.mark.usefixtures("_database")
async def test_unknown_keys_of_the_same_database_are_counted(
    sim: Simulator, viewer: Any, open_session: Callable[..., Session]
) -> None:
    """Beside the batches, with the command that lists them."""
    async with SQLStartStore() as store, open_session(starts=store) as session:
        sim.inject(Fault.disconnect(), path="/run")
        with pytest.raises(StartUnknown):
            await session.start("echo", {"n": 1}, key="order-1")
    _, found = await viewer.send("GET", "batches")
    command = f"promptlayer-exec starts list --unknown --db {found_database()}"
    assert (found["unknown_keys"], found["unknown_keys_command"]) == (1, command)


@pytest.mark.usefixtures("_database")
async def test_an_item_shows_everything_that_is_known(
    sim: Simulator, viewer: Any, open_session: Callable[..., Session]
) -> None:
    """Its request, state, attempts, error, latest run, and the ways out."""
    sim.add_workflow("echo", _echo)
    batch = Batch("night", session=lambda: open_session(push=False))
    requests = [StartRequest("echo", {"n": n}, key=f"item {n}", label="prod") for n in (1, 2)]
    await batch.add(requests)
    async with asyncio.timeout(30):
        await batch.work()

    _, failed = await viewer.send("GET", "item?batch=night&item=item%202")
    (run,) = (str(run.execution_id) for run in sim.runs if run.inputs["n"] == 2)
    assert (failed["state"], failed["execution_id"], failed["has_output"]) == ("failed", run, False)
    settings = {"workflow": "echo", "label": "prod", "version": None, "metadata": None}
    assert failed["settings"] == settings
    assert failed["error"]["type"] == "ExecutionFailed"
    assert "no text" in failed["error"]["text"]
    (attempt,) = failed["attempts"]
    assert attempt["added"] <= attempt["taken"] <= attempt["started"] <= attempt["finished"]
    assert failed["ways"][0]["command"].startswith("promptlayer-exec batch retry 'item 2' ")
    _, inputs = await viewer.send("GET", "item/inputs?batch=night&item=item%202")
    assert inputs == '{\n  "n": 2\n}'
    assert await viewer.send("GET", "item/output?batch=night&item=item%201") == (200, "1")
    status, missing = await viewer.send("GET", "item?batch=night&item=x")
    assert (status, missing["message"]) == (404, "Batch night has no item x.")


@pytest.mark.usefixtures("_database")
async def test_the_run_of_an_item_has_what_the_batch_knows(
    sim: Simulator, viewer: Any, open_session: Callable[..., Session]
) -> None:
    """Its workflow, inputs and times; and to run it again is the retry of the batch."""
    sim.add_workflow("echo", _echo)
    batch = Batch("night", session=lambda: open_session(push=False))
    await batch.add([StartRequest("echo", {"n": 2}, key="a")])
    async with asyncio.timeout(30):
        await batch.work()
    (run,) = sim.runs
    item = {"batch": "night", "item": "a"}
    status, _ = await viewer.send(
        "POST", "item/run", item | {"execution_id": str(run.execution_id)}
    )
    assert status == 201
    card = viewer.board.cards[run.execution_id]
    assert (card.batch, card.item, card.workflow, card.inputs) == (
        *("night", "a", "echo"),
        '{\n  "n": 2\n}',
    )
    assert card.ended - card.started == card.duration
    status, refused = await viewer.send("POST", "item/run", item | {"execution_id": "77"})
    assert (status, refused["message"]) == (404, "Item a of batch night has no run 77.")

    assert (await viewer.send("POST", "item/retry", item))[0] == 202
    assert (await batch.status()).waiting == 1
    status, refused = await viewer.send("POST", "item/retry", item)
    assert (status, refused["message"]) == (409, "Item a is waiting, so it does not run again.")
    async with asyncio.timeout(30):
        await batch.work()
    stored = await batch.item("a")
    assert stored is not None
    assert [attempt.state for attempt in stored.attempts] == ["failed", "failed"]
