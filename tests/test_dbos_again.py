"""Items that are run again: followed, started again, taken over, or ended by others."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dbos import DBOSClient, SetWorkflowID
from dbos._utils import INTERNAL_QUEUE_NAME

from promptlayer_exec import ConfigurationError, ExecutionTimeout, PollPolicy, Session, StartRequest
from promptlayer_exec.dbos import Batch, BatchStatus, StoredError, StoredOutcome
from promptlayer_exec.dbos import _again as again
from promptlayer_exec.dbos import _callbacks as callbacks
from promptlayer_exec.dbos import _cancelled as cancelled
from promptlayer_exec.dbos import _database as databases
from promptlayer_exec.dbos import _intents as intents
from promptlayer_exec.dbos import _items as items_
from promptlayer_exec.dbos import _liveness as liveness
from promptlayer_exec.dbos import _reports as reports
from promptlayer_exec.dbos import _store as stores
from promptlayer_exec.dbos import _worker as workers
from promptlayer_exec.dbos._intents import Intent
from promptlayer_exec.dbos._location import check_url
from promptlayer_exec.dbos._names import FIRST_WORKFLOW, queue_name, workflow_id
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


@pytest.mark.parametrize("queue", [None, queue_name("b")])
async def test_an_item_that_is_resumed_in_dbos_is_run_by_a_worker_of_its_batch(
    sim: Simulator, batch: Batch, url: str, queue: str | None
) -> None:
    """DBOS gives it to any worker, and another batch may have an item with the same key."""
    other = Batch("other", database_url=url, session=partial(open_session, sim))
    await other.add([StartRequest("echo", {"n": "of other"}, key="a")])
    await batch.add([StartRequest("echo", {"n": "own"}, key="a")])
    client = DBOSClient(system_database_url=url)
    await client.cancel_workflow_async(workflow_id("other", "a", 1))
    await client.resume_workflow_async(workflow_id("other", "a", 1), queue_name=queue)
    client.destroy()
    assert (await batch.work()).succeeded == 1
    assert (await outcomes(batch))["a"].output == "own"
    async with asyncio.timeout(20):
        assert (await other.work()).succeeded == 1
    assert (await outcomes(other))["a"].output == "of other"
    assert len(sim.runs) == 2


async def test_an_item_of_another_batch_that_cannot_be_given_back_goes_on(
    batch: Batch, url: str, sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that has taken it ends, and the item does not."""

    def fail(*_: Any, **__: Any) -> None:
        raise ConfigurationError("the database is gone")

    other = Batch("other", database_url=url, session=partial(open_session, sim))
    await other.add([StartRequest("echo", {"n": 1}, key="a")])
    await batch.add([StartRequest("held", key="held")])
    client = DBOSClient(system_database_url=url)
    await client.cancel_workflow_async(workflow_id("other", "a", 1))
    await client.resume_workflow_async(workflow_id("other", "a", 1))
    client.destroy()
    requeue = Store.requeue
    monkeypatch.setattr(Store, "requeue", fail)
    with pytest.raises(ConfigurationError, match="is gone"):
        await batch.work()
    monkeypatch.setattr(Store, "requeue", requeue)
    async with asyncio.timeout(20):
        assert (await other.work()).succeeded == 1


async def test_an_item_that_is_resumed_in_dbos_goes_on_if_its_worker_dies(
    batch: Batch, url: str
) -> None:
    """It is in another queue of DBOS then."""
    await batch.add([StartRequest("echo", {"n": 5}, key="a")])
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        database.execute(
            "UPDATE workflow_status SET status = 'PENDING', executor_id = 'dead', queue_name = ?",
            [INTERNAL_QUEUE_NAME],
        )
        database.commit()
    async with asyncio.timeout(20):
        assert (await batch.work()).succeeded == 1


@pytest.mark.parametrize("fork_id", [None, workflow_id("b", "another", 1)])
async def test_an_item_that_is_forked_in_dbos_is_not_run_twice(
    sim: Simulator, batch: Batch, url: str, caplog: pytest.LogCaptureFixture, fork_id: str | None
) -> None:
    """The fork does not say to which batch it belongs; it ends with an error that says so."""
    held = StartRequest("held", {}, key="a")
    await batch.add([held])
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(1)
    client = DBOSClient(system_database_url=url)
    with nullcontext() if fork_id is None else SetWorkflowID(fork_id):
        fork = await client.fork_workflow_async(workflow_id("b", "a", 1), 1)
    with pytest.raises(Exception, match="an item cannot be forked: `batch retry` starts it again"):
        await fork.get_result()
    client.destroy()
    (run,) = sim.runs
    sim.finish(run.execution_id, "Answer")
    assert (await working).succeeded == 1
    assert "cannot be forked" in caplog.text


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


async def test_an_item_that_is_cancelled_in_dbos_ends(
    sim: Simulator, batch: Batch, url: str
) -> None:
    """Before its start, and while its run is followed; `recheck` then finds that run again."""
    await batch.add([StartRequest("held", {"n": 1}, key="run"), StartRequest("echo", key="wait")])
    await cancel(url, "wait")
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(2)
    await cancel(url, "run")
    assert await working == BatchStatus(0, 0, 0, 2, 0, 2)
    ended = await outcomes(batch)
    assert {outcome.error.type for outcome in ended.values() if outcome.error} == {"Cancelled"}
    (run,) = sim.runs
    assert (ended["run"].execution_id, ended["wait"].execution_id) == (run.execution_id, None)
    sim.finish(run.execution_id, "Answer")
    assert await batch.recheck() == 1
    assert (await batch.work()).succeeded == 1
    assert len(sim.runs) == 1


async def test_an_item_whose_workflow_is_deleted_in_dbos_ends(batch: Batch, url: str) -> None:
    """Its request is gone with it; the batch would wait for it for ever."""
    await batch.add(StartRequest("echo", {"n": 1}, key=key) for key in ("a/1", "b"))
    await delete(url, "a/1")
    assert await batch.work() == BatchStatus(0, 0, 1, 1, 0, 2)
    error = (await outcomes(batch))["a/1"].error
    assert error is not None
    assert error.type == "Cancelled"
    assert "add it under a new key" in error.message


async def test_the_callback_of_an_unknown_item_whose_workflow_is_deleted_tells_the_id(
    batch: Batch, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can be followed without the request, but the run may be looked for."""
    await batch.add([StartRequest("echo", {"n": 1}, key="a")])
    end(url, "a", None, "StartUnknown")
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
        database.execute("UPDATE promptlayer_item SET intent = 'token'")
    await delete(url, "a")
    for token, execution_id in (("token", 77), ("another", 78), ("token", 77), ("token", 79)):
        assert not await batch.resolve(token, execution_id)
    assert caplog.text.count("but cannot be followed") == 1
    assert "execution 77 was started for item 'a', but cannot be followed" in caplog.text
    outcome = (await outcomes(batch))["a"]
    assert (outcome.kind, outcome.execution_id) == ("unknown", 77)
    assert (outcome.started or outcome.finished) <= outcome.finished


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


async def test_many_items_are_looked_at_some_at_a_time(
    batch: Batch, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next look goes on with the next key; heartbeats wait meanwhile."""
    monkeypatch.setattr(cancelled, "_PAGE", 2)
    await batch.add(StartRequest("echo", {"n": 1}, key=key) for key in "abcde")
    await delete(url, "b", "e")
    after, seen = "", []
    with closing(Store(check_url(url))) as store:
        for _ in range(4):
            after = cancelled.end_deleted(store, "b", after, until=0.0)
            seen.append((after, store.status("b").failed))
        # Those that have ended count, too: there may be millions of them.
        assert cancelled.end_deleted(store, "b", until=0.0) == "b"
    assert seen == [("b", 1), ("d", 1), ("e", 2), ("", 2)]


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


async def test_an_item_of_version_0_1_whose_workflow_is_deleted_is_unknown(
    sim: Simulator, batch: Batch, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its start was sent stood in the workflow."""
    await begin_as_version_0_1(sim, batch, url, ["intend"], monkeypatch)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
        database.execute("UPDATE promptlayer_item SET digest = NULL")
        database.execute("DELETE FROM workflow_status")
    assert (await batch.work()).unknown == 1


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


async def test_an_item_that_is_followed_again_and_cancelled_in_dbos_keeps_its_id(
    sim: Simulator, batch: Batch, url: str
) -> None:
    """It was paid for: `recheck` follows it once more, and nothing starts it again."""
    await batch.add([StartRequest("echo", {"n": 5}, key="a")])
    found = sim.add_execution(Scenario([SimNode("Answer", 7, is_output_node=True)]))
    end(url, "a", found, "ServerError")
    assert await batch.recheck() == 1
    client = DBOSClient(system_database_url=url)
    await client.cancel_workflow_async(workflow_id("b", "a", 2))
    client.destroy()
    assert (await batch.work()).failed == 1
    ended = (await outcomes(batch))["a"]
    assert (ended.execution_id, ended.error and ended.error.type) == (found, "Cancelled")
    assert await batch.recheck() == 1
    assert (await batch.work()).succeeded == 1
    assert sim.runs == []


async def test_an_item_of_which_two_attempts_are_followed_waits_for_both(
    sim: Simulator, batch: Batch, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker may still follow the one that was cancelled in DBOS, and ends with an error."""
    monkeypatch.setattr(workers, "_IDLE", 0.3)
    monkeypatch.setattr(items_, "_FIRST_DELAY", 0.05)
    slow = Batch("b", database_url=url, session=partial(open_session, sim, wait_timeout=0.2))
    await slow.add(StartRequest("held", {"n": key}, key=key) for key in ("a", "other"))
    working = asyncio.create_task(slow.work())
    while len(sim.runs) < 2:  # noqa: ASYNC110 - polls may have ended, and no request may follow
        await asyncio.sleep(0.01)
    await cancel(url, "a")
    while not (await batch.status()).failed:  # noqa: ASYNC110 - there is no event
        await asyncio.sleep(0.01)
    assert await batch.recheck() == 1
    with pytest.raises(ExecutionTimeout):
        await asyncio.wait_for(working, 20)


async def test_an_item_that_is_cancelled_while_it_is_sent_is_unknown(
    batch: Batch, url: str
) -> None:
    """Its intent is recorded, and no id."""
    await batch.add([StartRequest("echo", key="a")])
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
        database.execute("UPDATE promptlayer_item SET intent = 'token'")
    await cancel(url, "a")
    with closing(Store(check_url(url))) as store:
        for _ in range(2):
            cancelled.end_cancelled(store, "b")
    assert (await batch.status()).unknown == 1


async def test_many_cancelled_items_end_some_at_a_time(
    batch: Batch, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats wait meanwhile."""
    monkeypatch.setattr(cancelled, "_AT_ONCE", 2)
    await batch.add(StartRequest("echo", key=key) for key in "abcde")
    for key in "abcde":
        await cancel(url, key)
    with closing(Store(check_url(url))) as store:
        rounds = [cancelled.end_cancelled(store, "b", until=0.0) for _ in range(3)]
    assert rounds == [False, False, True]
    assert (await batch.status()).failed == 5


async def test_a_cancelled_item_of_a_batch_whose_name_is_almost_the_same_is_another_one(
    batch: Batch, url: str
) -> None:
    """SQLite compares prefixes without regard to case."""
    await batch.add([StartRequest("echo", key="a")])
    await Batch("B", database_url=url, session=Session).add([StartRequest("echo", key="a")])
    await cancel(url, "a")
    with closing(Store(check_url(url))) as store:
        cancelled.end_cancelled(store, "B")
        cancelled.end_cancelled(store, "b")
        assert [store.status(name).finished for name in ("B", "b")] == [0, 1]


async def test_a_worker_of_the_next_version_finishes_what_the_last_one_began(
    sim: Simulator, batch: Batch, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It follows its runs, and starts the items that it left in the queue."""
    await batch.add(StartRequest("held", {"n": n}, key=f"{n}") for n in range(3))
    working = asyncio.create_task(batch.work())
    while len(sim.runs) < 3:
        await sim.wait_for_requests(sim.request_count + 1)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    await batch.add([StartRequest("echo", {"n": 9}, key="queued")])
    monkeypatch.setattr(stores, "EARLIER_VERSIONS", (stores.VERSION, *stores.EARLIER_VERSIONS))
    monkeypatch.setattr(stores, "VERSION", "3")
    monkeypatch.setattr(workers, "VERSION", "3")
    for run in sim.runs:
        sim.finish(run.execution_id, "Answer")
    assert (await batch.work()).succeeded == 4
    assert len(sim.runs) == 4


async def test_items_that_version_0_1_adds_after_this_one_has_worked_are_run(
    batch: Batch, url: str
) -> None:
    """It named no version, and DBOS then waits for a worker of the latest one."""
    await batch.add([StartRequest("echo", {"n": 1}, key="a")])
    assert (await batch.work()).succeeded == 1
    await batch.add([StartRequest("echo", {"n": 2}, key="b")])
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        database.execute(
            "UPDATE workflow_status SET application_version = NULL WHERE status = 'ENQUEUED'"
        )
        database.execute(
            "INSERT INTO application_versions (version_id, version_name, version_timestamp,"
            " created_at) VALUES ('v', '1', ?, ?)",
            [2**42, 2**42],
        )
        database.commit()
    async with asyncio.timeout(20):
        assert (await batch.work()).succeeded == 2


@pytest.mark.parametrize("restart_unknown", [False, True])
async def test_an_item_of_version_0_1_is_followed_if_its_callback_has_come(
    sim: Simulator, url: str, monkeypatch: pytest.MonkeyPatch, *, restart_unknown: bool
) -> None:
    """A worker of this version sent its start, and is gone."""
    found = sim.add_execution(Scenario([SimNode("Answer", 4, is_output_node=True)]))
    batch = Batch(
        "b",
        database_url=url,
        session=partial(open_session, sim),
        restart_unknown=restart_unknown,
    )
    monkeypatch.setattr(stores, "WORKFLOW", FIRST_WORKFLOW)
    await batch.add([StartRequest("echo", {"n": 4}, key="a")])
    monkeypatch.undo()
    monkeypatch.setattr(stores, "_QUEUE_INTERVAL", 0.02)
    with closing(Store(check_url(url))) as store:
        intents.write(store, "b", [Intent("a", 1, "of another", None, False)])
        callbacks.record(store, "b", "of another", found)
    assert (await batch.work()).succeeded == 1
    assert (await outcomes(batch))["a"].execution_id == found


async def begin_as_version_0_1(
    sim: Simulator, batch: Batch, url: str, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> int:
    """Add an item, and begin it as a worker of that version did; return the id of its run."""
    with monkeypatch.context() as patch:
        patch.setattr(stores, "WORKFLOW", FIRST_WORKFLOW)
        await batch.add([StartRequest("echo", {"n": 4}, key="a")])
    found = sim.add_execution(Scenario([SimNode("Answer", 4, is_output_node=True)]))
    results = {
        "intend": '"0123456789abcdef"',
        "start": f'{{"execution_id": {found}, "at": "2026-01-01T00:00:00+00:00", "error": null}}',
    }
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
        database.execute(
            "UPDATE workflow_status SET status = 'PENDING', application_version = '1',"
            " executor_id = 'dead'"
        )
        for number, name in enumerate(recorded, 1):
            database.execute(
                "INSERT INTO operation_outputs (workflow_uuid, function_id, function_name, output,"
                " serialization) VALUES (?, ?, ?, ?, 'portable_json')",
                (workflow_id("b", "a", 1), number, name, results[name]),
            )
    return found


@pytest.mark.parametrize("recorded", [[], ["intend"], ["intend", "start"]])
async def test_an_item_that_version_0_1_began_is_finished(
    sim: Simulator, batch: Batch, url: str, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its intent, between intent and answer (which is unknown), and after the answer."""
    found = await begin_as_version_0_1(sim, batch, url, recorded, monkeypatch)
    status = await batch.work()
    assert status.finished == 1
    (ended,) = (await outcomes(batch)).values()
    assert ended.kind == ("unknown" if recorded == ["intend"] else "succeeded")
    assert len(sim.runs) == (not recorded)
    assert (ended.execution_id == found) is (len(recorded) == 2)


@pytest.mark.parametrize(
    ("recorded", "error"),
    [([], "Cancelled"), (["intend"], "StartUnknown"), (["intend", "start"], "Cancelled")],
)
async def test_an_item_that_version_0_1_began_and_somebody_cancelled_ends(
    sim: Simulator,
    batch: Batch,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    recorded: list[str],
    error: str,
) -> None:
    """Where its start may have been sent, nothing may start it again unasked."""
    found = await begin_as_version_0_1(sim, batch, url, recorded, monkeypatch)
    await cancel(url, "a")
    assert (await batch.work()).finished == 1
    (ended,) = (await outcomes(batch)).values()
    assert ended.error is not None
    assert ended.error.type == error
    assert ended.execution_id == (found if "start" in recorded else None)
    assert sim.runs == []
