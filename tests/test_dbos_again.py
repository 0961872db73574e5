"""Items that are run again: followed, started again, taken over, or ended by others."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dbos import DBOSClient

from promptlayer_exec import ConfigurationError, PollPolicy, Session, StartRequest
from promptlayer_exec.dbos import Batch, BatchStatus, StoredError, StoredOutcome
from promptlayer_exec.dbos import _again as again
from promptlayer_exec.dbos import _callbacks as callbacks
from promptlayer_exec.dbos import _database as databases
from promptlayer_exec.dbos import _liveness as liveness
from promptlayer_exec.dbos import _reports as reports
from promptlayer_exec.dbos import _store as stores
from promptlayer_exec.dbos import _worker as workers
from promptlayer_exec.dbos._location import check_url
from promptlayer_exec.dbos._names import workflow_id
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import Ending
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (stores, "_QUEUE_INTERVAL"),
        (workers, "_CHECK_INTERVAL"),
        (liveness, "HEARTBEAT_INTERVAL"),
    ):
        monkeypatch.setattr(module, name, 0.02)
    monkeypatch.setattr(liveness, "_LOOK_INTERVAL", 0.0)


@pytest.fixture
def url(batches_file: Path) -> str:
    """Return the URL of a SQLite database without batches."""
    return f"sqlite:///{batches_file}"


@pytest.fixture
def batch(sim: Simulator, url: str) -> Batch:
    """Return a batch whose workflow `echo` returns its input `n`, and `held` waits."""
    sim.add_workflow(
        "echo",
        lambda inputs: Scenario(
            [
                SimNode(
                    "Answer",
                    inputs["n"],
                    status="FAILED" if inputs["n"] == "bad" else "SUCCESS",
                    is_output_node=True,
                )
            ]
        ),
    )
    sim.add_workflow("held", Scenario([SimNode("Answer", 1, None, is_output_node=True)]))

    return Batch("b", database_url=url, session=partial(open_session, sim))


def open_session(sim: Simulator, **settings: Any) -> Session:
    """Return a session on a simulator."""
    bare = {"poll": PollPolicy.fixed(0.01), "rate": None, "push": False, "check_inputs": False}
    return Session(sim.api_key, base_url=sim.base_url, **{**bare, **settings})


async def outcomes(batch: Batch) -> dict[str, StoredOutcome]:
    """Return the latest outcome of each item that has one."""
    return {outcome.key: outcome async for outcome in batch.outcomes(until_done=False)}


def end(url: str, key: str, execution_id: int | None, error: str) -> None:
    """Store an outcome as an older version did."""
    now = datetime.now(UTC)
    outcome = StoredOutcome(key, execution_id, False, None, StoredError(error, "old"), now, now)
    with closing(Store(check_url(url))) as store:
        store.finish("b", [Ending.of(1, outcome)])


async def test_what_an_older_version_gave_up_is_followed_again(
    sim: Simulator, batch: Batch, url: str
) -> None:
    """`recheck` starts nothing, and leaves alone what has no execution id."""
    await batch.add(StartRequest("echo", {"n": n}, key=f"{n}") for n in range(4))
    found = sim.add_execution(Scenario([SimNode("Answer", 7, is_output_node=True)]))
    end(url, "0", found, "ServerError")
    end(url, "1", found, "ExecutionTimeout")
    end(url, "2", None, "NotFound")
    end(url, "3", None, "StartUnknown")
    assert await batch.recheck() == 2
    assert await batch.status() == BatchStatus(2, 0, 0, 1, 1, 4)
    assert await batch.work() == BatchStatus(0, 0, 2, 1, 1, 4)
    assert sim.runs == []
    ended = await outcomes(batch)
    assert [ended[key].output for key in "01"] == [7, 7]
    assert ended["0"].execution_id == found
    assert await batch.recheck() == 0


async def test_ended_items_are_started_again_on_request(
    sim: Simulator, batch: Batch, url: str
) -> None:
    """`retry` starts only the kinds that are named; one that was given up it follows."""
    await batch.add(StartRequest("echo", {"n": n}, key=f"{n}") for n in ("bad", 1, 2, 3))
    found = sim.add_execution(Scenario([SimNode("Answer", 7, is_output_node=True)]))
    end(url, "1", None, "NotFound")
    end(url, "2", found, "ServerError")
    end(url, "3", None, "StartUnknown")
    assert (await batch.work()).finished == 4
    assert len(sim.runs) == 1
    assert await batch.retry() == 0
    assert await batch.retry(unknown=True) == 1
    assert await batch.retry(failed=True) == 3
    assert await batch.work() == BatchStatus(0, 0, 3, 1, 0, 4)
    assert sorted(str(run.inputs["n"]) for run in sim.runs) == ["1", "3", "bad", "bad"]
    assert (await outcomes(batch))["2"].output == 7


async def test_an_attempt_keeps_its_number(batch: Batch, url: str) -> None:
    """Also when DBOS no longer has an earlier one."""
    await batch.add([StartRequest("echo", {"n": 1}, key="a/b")])
    end(url, "a/b", None, "NotFound")
    assert await batch.retry(failed=True) == 1
    client = DBOSClient(system_database_url=url)
    client.delete_workflow(workflow_id("b", "a/b", 1))
    client.destroy()
    item = await batch.item("a/b")
    assert item is not None
    assert [attempt.number for attempt in item.attempts] == [2]
    assert item.request["inputs"] == {"n": 1}


async def test_many_items_are_taken_a_few_hundred_at_a_time(
    batch: Batch, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, and those whose request DBOS no longer has not at all."""
    monkeypatch.setattr(again, "_AT_ONCE", 3)
    await batch.add(StartRequest("echo", {"n": n}, key=f"{n}") for n in range(8))
    for n in range(8):
        end(url, f"{n}", None, "NotFound")
    client = DBOSClient(system_database_url=url)
    client.delete_workflow(workflow_id("b", "5", 1))
    client.destroy()
    assert await batch.retry(failed=True) == 7
    assert await batch.status() == BatchStatus(7, 0, 0, 1, 0, 8)


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_a_start_whose_item_was_taken_over_is_followed(
    sim: Simulator, batch: Batch, url: str, caplog: pytest.LogCaptureFixture, *, is_deleted: bool
) -> None:
    """A worker may be taken for dead while it sends a start: the run is paid for, and not lost.

    Nor is it if somebody deletes the item's workflow in DBOS.
    """
    await batch.add([StartRequest("echo", {"n": 5}, key="a")])
    sim.inject(Fault.delay(1.0))
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(1)
    end(url, "a", None, "StartUnknown")
    if is_deleted:
        await delete(url, "a")
    await working
    assert (await batch.work()).succeeded == 1
    (run,) = sim.runs
    text = f"execution {run.execution_id} was started for item 'a' while another worker took"
    assert text in caplog.text
    assert (await outcomes(batch))["a"].output == 5


async def test_a_run_whose_intent_is_lost_is_followed(
    sim: Simulator, batch: Batch, url: str
) -> None:
    """Otherwise DBOS would end the item, nobody would finish it, and all work would wait for it."""
    await batch.add([StartRequest("echo", {"n": 5}, key="a")])
    sim.inject(Fault.delay(1.0))
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(1)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        assert database.execute("UPDATE promptlayer_item SET intent = NULL").rowcount == 1
        database.commit()
    async with asyncio.timeout(10):
        assert (await working).succeeded == 1
    (run,) = sim.runs
    assert (await outcomes(batch))["a"].execution_id == run.execution_id


async def test_an_item_with_the_intent_of_another_worker_ends(
    sim: Simulator, batch: Batch, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is given to the worker whose start another one replaced, and nobody else goes on."""
    await batch.add([StartRequest("echo", {"n": 5}, key="a")])
    sim.inject(Fault.delay(1.0))
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(1)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        database.execute("UPDATE promptlayer_item SET intent = 'of another'")
        database.commit()
    async with asyncio.timeout(10):
        assert (await working).unknown == 1
    assert f"execution {sim.runs[0].execution_id} was started for item 'a'" in caplog.text


async def test_the_id_of_a_start_that_cannot_be_followed_is_logged(
    sim: Simulator, batch: Batch, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """For example because the item got another outcome meanwhile."""
    await batch.add([StartRequest("echo", {"n": 5}, key="a")])
    sim.inject(Fault.delay(1.5))
    working = asyncio.create_task(batch.work(until_done=False))
    await sim.wait_for_requests(1)
    end(url, "a", None, "Cancelled")  # first: the answer to the start may come at any time
    with closing(Store(check_url(url))) as store:
        assert store.is_finished("b")
    await cancel(url, "a")
    async with asyncio.timeout(20):
        while "keep this line" not in caplog.text:  # noqa: ASYNC110 - the log has no event
            await asyncio.sleep(0.01)
    assert "was started for item 'a' of batch 'b'" in caplog.text
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working


async def cancel(url: str, key: str) -> None:
    """Cancel an item as `dbos workflow cancel` does."""
    client = DBOSClient(system_database_url=url)
    await client.cancel_workflow_async(workflow_id("b", key, 1))
    client.destroy()


async def delete(url: str, *keys: str) -> None:
    """Delete the workflows of items, as the client of DBOS does."""
    client = DBOSClient(system_database_url=url)
    await asyncio.to_thread(client.delete_workflows, [workflow_id("b", key, 1) for key in keys])
    client.destroy()


async def test_a_stored_callback_is_applied_though_the_worker_is_being_stopped(
    batch: Batch, url: str
) -> None:
    """The item has just become unknown, and perhaps no other worker looks for it again."""
    await batch.add([StartRequest("echo", {"n": 1}, key="a")])
    outcome = StoredOutcome(
        "a", None, False, None, StoredError("StartUnknown", "lost"), None, datetime.now(UTC)
    )
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
        database.execute("UPDATE promptlayer_item SET intent = 'token'")
    with closing(Store(check_url(url))) as store:
        callbacks.record(store, "b", "token", 77)
        store.stop_retrying.set()
        callbacks.finish(store, "b", [Ending.of(1, outcome, "token")])
    assert await batch.status() == BatchStatus(1, 0, 0, 0, 0, 1)


@pytest.mark.parametrize("call", ["retry", "resolve", "delete"])
async def test_a_call_that_is_cancelled_soon_ends_however_many_items_there_are(
    batch: Batch, url: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """It takes a transaction for some hundred, and with a million of them half an hour."""
    monkeypatch.setattr(again, "_AT_ONCE", 1)
    monkeypatch.setattr(stores, "_DELETED_AT_ONCE", 1)
    await batch.add(StartRequest("echo", {"n": 1}, key=key) for key in "abc")
    for key in "abc":
        end(url, key, None, "StartUnknown" if call == "resolve" else "Forbidden")
    if call == "resolve":
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
            database.execute("UPDATE promptlayer_item SET intent = key")
        with closing(Store(check_url(url))) as store:
            for key in "abc":
                callbacks.record(store, "b", key, 1)
    loop, transact = asyncio.get_running_loop(), Store.transact

    def transact_and_cancel(store: Store, work: Any, **options: Any) -> Any:
        done = transact(store, work, **options)
        loop.call_soon_threadsafe(calling.cancel)
        assert databases._stop_retrying.get().wait(10.0)
        return done

    monkeypatch.setattr(Store, "transact", transact_and_cancel)
    calling = asyncio.create_task(
        batch.delete() if call == "delete" else batch.retry(failed=True, unknown=True)
    )
    await asyncio.wait([calling])
    assert calling.cancelled()
    monkeypatch.undo()
    assert len(await outcomes(batch)) >= 2


@pytest.mark.parametrize("call", ["kinds", "failures"])
async def test_a_report_that_is_cancelled_soon_ends_however_many_items_there_are(
    batch: Batch, url: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """It takes a query for some hundred."""
    monkeypatch.setattr(reports, "_KEYS_AT_ONCE", 1)
    await batch.add(StartRequest("echo", {"n": 1}, key=key) for key in "abc")
    for key in "abc":
        end(url, key, None, "Forbidden")
    loop, rows, queries = asyncio.get_running_loop(), Store.rows, []

    def read_and_cancel(store: Store, query: Any, **options: Any) -> Any:
        queries.append(query)
        loop.call_soon_threadsafe(calling.cancel)
        assert databases._stop_retrying.get().wait(10.0)
        return rows(store, query, **options)

    monkeypatch.setattr(Store, "rows", read_and_cancel)
    calling = asyncio.create_task(batch.kinds("abc") if call == "kinds" else batch.failures())
    await asyncio.wait([calling])
    assert calling.cancelled()
    assert len(queries) == 1


async def test_a_workflow_of_another_batch_of_that_name_gives_no_result(
    sim: Simulator, batch: Batch, url: str
) -> None:
    """Older versions could leave one behind when a batch was deleted as an item was rechecked."""
    found = sim.add_execution(Scenario([SimNode("Answer", "old", is_output_node=True)]))
    await batch.add([StartRequest("echo", {"n": 2}, key="a")])
    with closing(Store(check_url(url))) as store:
        request = store.stored_requests("b", {"a": 1})["a"].replace("2", "1")
        started = {"execution_id": found, "at": "2026-01-01T00:00:00+00:00", "error": None}
    await delete(url, "a")
    with closing(Store(check_url(url))) as store:
        enqueue = partial(store.enqueue, batch="b", key="a", attempt=1)
        store.transact(partial(enqueue, request=request, started=started))
    with pytest.raises(ConfigurationError, match="item 'a' of batch 'b' has another request"):
        await batch.work()
    assert await outcomes(batch) == {}
