"""Durable batches, with workers in this process; tests/kill has workers in other processes."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import socket
import sqlite3
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import attrs
import dbos
import pytest
from aiohttp import web
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer
from sqlalchemy import ExceptionContext, create_engine, event
from sqlalchemy.exc import OperationalError

from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    PollPolicy,
    RequestTimeout,
    RetryPolicy,
    Session,
    SessionClosed,
    StartFailed,
    StartRequest,
    StoreUnavailable,
    Unauthorized,
)
from promptlayer_exec._database.location import check_url
from promptlayer_exec.dbos import (
    Batch,
    BatchStatus,
    StoredError,
    StoredOutcome,
    batch_names,
    shown_database_url,
)
from promptlayer_exec.dbos import _batch as batches
from promptlayer_exec.dbos import _dbos_calls as internals
from promptlayer_exec.dbos import _items as items
from promptlayer_exec.dbos import _rate as rates
from promptlayer_exec.dbos import _store as stores
from promptlayer_exec.dbos._rate import SharedRate
from promptlayer_exec.dbos._records import Ending
from promptlayer_exec.dbos._requests import Row
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

# Sessions that send only what a test asks for: starts and polls.
BARE: dict[str, Any] = {"push": False, "check_inputs": False}


def request(key: Any, n: Any = None, workflow: str = "echo") -> StartRequest:
    """Return an item whose output is `n`."""
    return StartRequest(workflow, {"n": n}, key=key)


async def outcomes_of(batch: Batch) -> dict[str, StoredOutcome]:
    """Return all outcomes by key, and check that each key has one."""
    outcomes = [outcome async for outcome in batch.outcomes()]
    by_key = {outcome.key: outcome for outcome in outcomes}
    assert len(by_key) == len(outcomes)
    return by_key


async def test_every_item_gets_one_stored_outcome(sim: Simulator, batch: Batch) -> None:
    """Output, execution and times are stored, and each item is started once."""
    values = [0, False, None, "", {}, [1.5, float("inf")], "\ud800", 10**400]
    sim.add_workflow(
        "values",
        lambda inputs: Scenario([SimNode("Answer", values[inputs["n"]], is_output_node=True)]),
    )
    began = datetime.now(UTC)
    assert await batch.add(request(str(n), n, "values") for n in range(len(values))) == len(values)
    assert await batch.status() == BatchStatus(len(values), 0, 0, 0, 0, len(values))
    status = await batch.work()
    assert status == BatchStatus(0, 0, len(values), 0, 0, len(values))
    assert status.finished == len(values)
    outcomes = await outcomes_of(batch)
    assert [outcomes[str(n)].output for n in range(len(values))] == values
    assert {outcome.execution_id for outcome in outcomes.values()} == set(sim.executions)
    for outcome in outcomes.values():
        assert (outcome.succeeded, outcome.error, outcome.kind) == (True, None, "succeeded")
        assert outcome.started is not None
        assert began <= outcome.started <= outcome.finished <= datetime.now(UTC)
    assert len(sim.runs) == len(values)


async def test_status_counts_the_workers_that_are_alive(sim: Simulator, batch: Batch) -> None:
    """At its end, a worker puts what it runs back into the queue; the next `work` goes on."""
    await batch.add([request("a", workflow="held")])
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(2)
    assert await batch.status() == BatchStatus(0, 1, 0, 0, 0, 1, workers=1)
    working.cancel()
    await asyncio.wait([working])
    assert await batch.status() == BatchStatus(1, 0, 0, 0, 0, 1, workers=0)


async def test_adding_a_key_twice_is_adding_it_once(sim: Simulator, batch: Batch) -> None:
    """In one call, in a later call, and after the item has ended."""

    async def again() -> AsyncIterator[StartRequest]:
        yield request("a", 1)
        yield request("b", 3)

    assert await batch.add([request("a", 1), request("a", 1)]) == 1
    assert await batch.add(again()) == 1
    await batch.work()
    assert await batch.add([request("a", 1)]) == 0
    assert (await batch.work()).total == 2
    assert {key: o.output for key, o in (await outcomes_of(batch)).items()} == {"a": 1, "b": 3}
    assert len(sim.runs) == 2


async def test_large_items_are_added_a_few_at_a_time(batch: Batch) -> None:
    """A thousand of a megabyte would be more than PostgreSQL takes in one statement."""

    async def large() -> AsyncIterator[StartRequest]:
        for number in range(40):
            yield StartRequest("echo", {"text": "x" * 1_000_000}, key=str(number))

    tracemalloc.start()
    assert await batch.add(large()) == 40
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30_000_000


async def test_the_settings_of_a_new_batch_are_stored_with_its_first_items(
    batch_of: Callable[..., Batch], caplog: pytest.LogCaptureFixture
) -> None:
    """So that a worker which names none takes them; only one that names others changes them."""
    await batch_of(rate=300.0).add([request("a")])
    await batch_of(rate=7.0).add([request("b")])
    assert (await batch_of().settings()).rate == 300.0
    await batch_of(rate=500.0, max_in_flight=3).work()
    settings = await batch_of().settings()
    assert (settings.rate, settings.max_in_flight) == (500.0, 3)
    assert "batch 'nightly': rate changed from 300 to 500 for all its workers" in caplog.messages


async def test_a_request_is_stored_unchanged(batch: Batch) -> None:
    """All its fields are stored, except the key, which belongs to the item."""
    inputs = {"n": 1}
    requests = [
        StartRequest("w", inputs, label="prod", metadata={"job": "7"}, callback_url="http://x/y"),
        StartRequest(7, inputs, version=3),
    ]
    await batch.add(attrs.evolve(request, key=str(n)) for n, request in enumerate(requests))
    for n, request in enumerate(requests):
        item = await batch.item(str(n))
        assert item is not None
        assert StartRequest(**item.request) == request


async def test_an_item_with_an_outcome_is_not_running(batch: Batch, url: str) -> None:
    """DBOS may record the end of its workflow later than the outcome is stored."""
    await batch.add([request("a"), request("b"), request("c")])
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
        database.execute("UPDATE workflow_status SET status = 'PENDING'")
    assert await batch.status() == BatchStatus(0, 3, 0, 0, 0, 3)
    store = Store(check_url(url))
    store.finish("nightly", [Ending("a", 1, "failed", "{}"), Ending("b", 1, "unknown", "{}")])
    store.close()
    assert await batch.status() == BatchStatus(0, 1, 0, 1, 1, 3)


async def test_batches_in_one_database_are_separate(
    batch_of: Callable[..., Batch], url: str
) -> None:
    """The same key in two batches is two items, even if the names are alike when quoted."""
    one, other = batch_of("a/b"), batch_of("a%2Fb")
    await one.add([request("x", 1)])
    await other.add([request("x", 2)])
    assert (await one.work()).total == 1
    assert (await other.status()).waiting == 1
    await other.work()
    assert [o.output for o in (await outcomes_of(other)).values()] == [2]
    assert await batch_names(url) == ["a%2Fb", "a/b"]


def test_to_list_batches_makes_no_file(tmp_path: Path) -> None:
    """A file that does not exist has none, and does not exist afterwards either."""
    assert asyncio.run(batch_names(f"sqlite:///{tmp_path / 'none.sqlite'}")) == []
    assert [*tmp_path.iterdir()] == []


async def test_a_failed_item_does_not_stop_the_others(sim: Simulator, batch: Batch) -> None:
    """The outcome of a failed execution has its id; that of a refused start has none."""
    await batch.add([request("a", "bad"), request("b", workflow="none"), request("c", 1)])
    assert await batch.work() == BatchStatus(0, 0, 1, 2, 0, 3)
    outcomes = await outcomes_of(batch)
    failed, refused = outcomes["a"], outcomes["b"]
    assert failed.execution_id in sim.executions
    assert failed.error is not None
    assert failed.error.type == "ExecutionFailed"
    assert "Answer" in failed.error.message
    assert (refused.execution_id, refused.started, refused.kind) == (None, None, "failed")
    assert refused.error is not None
    assert refused.error.type == "NotFound"


async def test_a_start_whose_answer_is_lost_is_unknown(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """It is started again only by `retry`."""
    await batch_of().add([request("a", 1)])
    sim.inject(Fault.disconnect())
    assert (await batch_of().work()).unknown == 1
    (unknown,) = (await outcomes_of(batch_of())).values()
    assert (unknown.kind, unknown.execution_id) == ("unknown", None)
    assert (await batch_of().work()).unknown == 1
    assert len(sim.runs) == 1
    assert await batch_of().retry(unknown=True) == 1
    assert await batch_of().work() == BatchStatus(0, 0, 1, 0, 0, 1)
    (known,) = (await outcomes_of(batch_of())).values()
    assert (known.output, known.execution_id) == (1, sim.runs[1].execution_id)
    assert len(sim.runs) == 2


async def test_outcomes_are_yielded_as_items_finish(sim: Simulator, batch: Batch) -> None:
    """Before the whole batch is done, and in the order in which the items finish."""
    await batch.add([request("a", workflow="held"), request("b", 2)])
    working = asyncio.create_task(batch.work())
    async with aclosing(batch.outcomes()) as outcomes:
        assert (await anext(outcomes)).key == "b"
        assert (await batch.status()).running == 1
        (held,) = (run.execution_id for run in sim.runs if run.inputs["n"] is None)
        sim.finish(held, "Answer")
        assert (await anext(outcomes)).key == "a"
        with pytest.raises(StopAsyncIteration):
            await anext(outcomes)
    assert (await working).succeeded == 2


@pytest.mark.parametrize("borrowed", [False, True])
async def test_the_next_worker_follows_the_items_of_a_cancelled_one(
    sim: Simulator, batch_of: Callable[..., Batch], borrowed: bool
) -> None:
    """The cancelled worker waits for its starts and records them, so nothing is started twice."""
    often = PollPolicy.fixed(0.01)
    session = Session(sim.api_key, base_url=sim.base_url, poll=often, **BARE)
    batch = batch_of(max_in_flight=2, session=session if borrowed else lambda: session)
    await batch.add(request(f"{n}", workflow="held") for n in range(3))
    sim.inject(Fault.delay(0.2, times=2))
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(2)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert len(sim.runs) == 2
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(sim.request_count + 20)  # polls of two executions
    assert len(sim.runs) == 2
    for number in range(3):
        while len(sim.runs) <= number:
            await sim.wait_for_requests(sim.request_count + 1)
        sim.finish(sim.runs[number].execution_id, "Answer")
    assert (await working).succeeded == 3
    assert len(sim.runs) == 3
    await session.aclose()


async def test_the_time_until_a_batch_goes_on_is_not_that_of_its_runs(
    sim: Simulator, batch: Batch, url: str
) -> None:
    """Nobody saw when a run ended that was over before a worker followed it again."""
    await batch.add([StartRequest("held", {"n": 1}, key="a")])
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(3)  # it is followed
    working.cancel()
    await asyncio.wait([working])

    sim.finish(sim.runs[0].execution_id, "Answer")
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
        (started,) = database.execute("SELECT started FROM promptlayer_item").fetchone()
        earlier = datetime.now(UTC) - timedelta(hours=1)
        moved = json.dumps(json.loads(started) | {"at": earlier.isoformat()})
        database.execute("UPDATE promptlayer_item SET started = ?", [moved])
    async with asyncio.timeout(30):
        await batch.work()
    assert (await batch.status()).succeeded == 1
    assert await batch.durations() is None


async def test_a_worker_in_a_cancelled_scope_waits_for_its_start(
    sim: Simulator, batch: Batch
) -> None:
    """A cancel scope of anyio cancels every await, and not just one."""
    await batch.add([request("a")])
    sim.inject(Fault.delay(0.1))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(batch.work)
        await sim.wait_for_requests(1)
        tasks.cancel_scope.cancel()
    assert (await batch.work()).succeeded == 1


@pytest.mark.parametrize("is_ending", [False, True], ids=["working", "ending by itself"])
async def test_a_cancelled_worker_with_its_own_session_waits_for_its_starts(
    sim: Simulator,
    batch_of: Callable[..., Batch],
    our_tasks: Callable[[], list[str]],
    caplog: pytest.LogCaptureFixture,
    *,
    is_ending: bool,
) -> None:
    """Nothing of what was paid for is lost, and no task is left."""
    batch = batch_of(max_in_flight=3)
    await batch.add([request(key) for key in "abc"])

    async def refuse(request: web.BaseRequest, _: Any) -> web.StreamResponse:
        await sim.wait_for_requests(3)  # the others are sent before the work ends
        return web.json_response({"success": False}, status=401)

    if is_ending:
        sim.inject(Fault(refuse))
    sim.inject(Fault.delay(0.5, times=3))
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(3)
    working.cancel()
    await asyncio.wait([working])
    assert our_tasks() == []
    assert len(sim.runs) == (2 if is_ending else 3)
    assert "nobody received" not in caplog.text
    status = await batch_of().work()
    assert (status.succeeded, status.unknown) == (3, 0)
    assert len(sim.runs) == 3


async def test_a_start_that_is_not_sent_in_time_is_tried_again_after_a_pause(
    sim: Simulator,
    batch_of: Callable[..., Batch],
    adjust: Callable[..., None],
    recorder: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without one, a `wait_timeout` of 0 would keep a core busy; the work ends all the same."""
    adjust(items, "PATIENCE", restart_delay=3600.0)
    batch = batch_of()
    await batch.add([request("a")])
    settings = {"base_url": sim.base_url, "wait_timeout": 0.0, "observers": [recorder], **BARE}
    async with Session(sim.api_key, **settings) as session:
        working = asyncio.create_task(batch_of(session=session).work())
        await recorder.next(StartFailed)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(recorder.of(StartFailed)) == 1
        assert "could not start item 'a' in time, trying again" in caplog.text
        working.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait([working])
    assert (await batch.work()).succeeded == 1


async def test_a_start_that_is_not_answered_while_the_work_ends_is_unknown(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """A worker waits for the request timeout, and the next one does not start it again."""
    batch = batch_of(
        session=partial(Session, sim.api_key, base_url=sim.base_url, request_timeout=0.5, **BARE)
    )
    await batch.add([request("a")])
    sim.inject(Fault.delay(1.0))
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(1)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert (await batch_of().work()).unknown == 1
    assert sim.request_count <= 1


async def test_an_item_without_an_input_that_is_required_has_failed(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """Nothing was started for it, and the others go on."""
    scenario = Scenario([SimNode("Answer", "done", is_output_node=True)])
    sim.add_workflow("typed", scenario, inputs={"n": "string"})
    await batch_of().add([request("a", "x", "typed"), StartRequest("typed", {"m": 1}, key="b")])
    batch = batch_of(session=partial(Session, sim.api_key, base_url=sim.base_url, push=False))
    status = await batch.work()
    assert (status.succeeded, status.failed, status.unknown) == (1, 1, 0)
    error = (await outcomes_of(batch))["b"].error
    assert error is not None
    assert error.type == "InvalidInputs"
    assert "missing input for workflow 'typed': 'n' (string)" in error.message
    assert [run.inputs for run in sim.runs] == [{"n": "x"}]


@pytest.mark.parametrize("borrowed", [False, True])
async def test_a_refused_key_ends_the_work_but_no_item(
    sim: Simulator, batch_of: Callable[..., Batch], borrowed: bool
) -> None:
    """Nothing was started, so all items wait for a worker with the right key."""
    wrong: Any = Session("wrong", base_url=sim.base_url)
    batch = batch_of(session=wrong if borrowed else lambda: wrong)
    await batch.add(request(f"{n}", n) for n in range(8))
    with pytest.raises(Unauthorized):
        await batch.work()
    await wrong.aclose()
    assert (await batch.status()).finished == 0
    assert await batch_of().work() == BatchStatus(0, 0, 8, 0, 0, 8)
    assert max(Counter(run.inputs["n"] for run in sim.runs).values()) == 1


async def test_an_unreachable_server_ends_the_work_but_no_item(
    batch_of: Callable[..., Batch],
) -> None:
    """If the outage is longer than the session's `RetryPolicy` allows, `work` raises."""
    await batch_of().add([request("a", 1)])
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        address = deaf.getsockname()
        with socket.create_connection(address):  # fills the backlog
            for port, error in ((9, ConnectionFailed), (address[1], RequestTimeout)):
                session = Session(
                    "key",
                    base_url=f"http://127.0.0.1:{port}",
                    retry=RetryPolicy(outage=0.01),
                    request_timeout=0.05,
                    **BARE,
                )
                with pytest.raises(error):
                    await batch_of(session=lambda session=session: session).work()
    assert (await batch_of().work()).succeeded == 1


async def test_closing_the_session_ends_the_work(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """The next worker follows the execution to its end."""
    async with Session(sim.api_key, base_url=sim.base_url, **BARE) as session:
        batch = batch_of(session=session)
        await batch.add([request("a", workflow="held")])
        working = asyncio.create_task(batch.work())
        await sim.wait_for_requests(2)
        await session.aclose()
        with pytest.raises(SessionClosed):
            await working
    sim.finish(sim.runs[0].execution_id, "Answer")
    assert (await batch_of().work()).succeeded == 1
    assert len(sim.runs) == 1


async def test_a_start_on_its_way_is_recorded_while_the_session_closes(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """Its caller gets `SessionClosed`, but the next worker has the id."""
    async with Session(sim.api_key, base_url=sim.base_url, **BARE) as session:
        batch = batch_of(session=session)
        await batch.add([request("a")])
        sim.inject(Fault.delay(0.3))
        working = asyncio.create_task(batch.work())
        await sim.wait_for_requests(1)
        await session.aclose()
        with pytest.raises(SessionClosed):
            await working
    assert (await batch_of().work()).succeeded == 1
    assert len(sim.runs) == 1


async def test_a_worker_that_ends_logs_no_line_for_each_item(
    sim: Simulator, batch: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    """DBOS warns of each one that it drops; the next worker goes on with them."""
    await batch.add([request(str(number), workflow="held") for number in range(5)])
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(20)  # all have started
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert [record.getMessage() for record in caplog.records if record.name == "dbos"] == []


async def test_a_worker_can_wait_for_more_items(
    batch: Batch, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `until_done=False` it works until it is cancelled.

    Its heartbeat is recorded before it takes an item, and deleted when it has stopped.
    """
    store, launch, seen = Store(check_url(url)), DBOS.launch, []

    def check_and_launch() -> None:
        seen.extend(store.heartbeats("nightly"))
        launch()

    monkeypatch.setattr(DBOS, "launch", staticmethod(check_and_launch))
    working = asyncio.create_task(batch.work(until_done=False))
    for key in ("a", "b"):
        await batch.add([request(key)])
        assert key in await outcomes_of(batch)
    assert seen == list(store.heartbeats("nightly"))
    assert len(seen) == 1
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert store.heartbeats("nightly") == {}
    store.close()


async def test_a_process_works_on_one_batch_at_a_time(batch_of: Callable[..., Batch]) -> None:
    """A second worker is refused, for the same batch too, and the first one works on."""
    one, two = batch_of("one"), batch_of("two")
    await one.add([request("a")])
    await two.add([request("a")])
    working = asyncio.create_task(one.work(until_done=False))
    await outcomes_of(one)
    for second in (one, two):
        with pytest.raises(RuntimeError, match="one batch at a time"):
            await second.work(until_done=False)
    await one.add([request("b")])
    assert (await outcomes_of(one))["b"].succeeded
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert (await batch_of("two").work()).succeeded == 1


async def test_a_process_that_uses_dbos_is_refused(batch: Batch, tmp_path: Path) -> None:
    """Its own DBOS is not touched, and can be launched."""
    await batch.add([request("a")])
    DBOS(
        config={
            "name": "theirs",
            "system_database_url": f"sqlite:///{tmp_path / 'theirs.sqlite'}",
            "notification_listener_polling_interval_sec": 0.02,
        }
    )
    try:
        with pytest.raises(ConfigurationError, match=r"uses DBOS, .* batch work`"):
            await batch.work()
        DBOS.launch()
    finally:
        DBOS.destroy()
    assert (await batch.work()).succeeded == 1


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ("a", TypeError, "must be a StartRequest, got 'a'"),
        (StartRequest("w", key=1), TypeError, "key must be a str, got 1"),
        (StartRequest("w", key=""), ValueError, "1 to 1000 bytes of text without NUL, got ''"),
        (StartRequest("w", key="a\0"), ValueError, "1 to 1000 bytes"),
        (StartRequest("w", key="\ud800"), ValueError, "1 to 1000 bytes"),
        (StartRequest("w", {"a": object()}, key="a"), TypeError, "inputs.a"),
        (StartRequest("", key="a"), ValueError, "name must not be empty"),
    ],
)
async def test_a_request_that_cannot_be_sent_is_not_stored(
    batch: Batch, item: Any, error: type[Exception], message: str
) -> None:
    """The error is raised when it is added, not when it would be started."""
    with pytest.raises(error, match=message):
        await batch.add([request("good"), item])
    assert (await batch.status()).total == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": ""}, "1 to 200 bytes"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"rate": 0}, "rate"),
        ({"database_url": "no url"}, "not a URL"),
        ({"database_url": "mysql://host/db"}, "sqlite or postgresql, got mysql"),
        ({"database_url": "sqlite://"}, "must name a file"),
        ({"database_url": "sqlite:///a?timeout=b"}, "could not convert string to float"),
        ({"database_url": "sqlite:///\udcff"}, "surrogates not allowed"),
    ],
)
def test_a_malformed_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    """The error is raised when the batch is made, before any I/O."""
    with pytest.raises(ConfigurationError, match=message):
        Batch(settings.pop("name", "b"), session=Session, **settings)


async def test_the_error_about_a_database_hides_its_password(
    batch_of: Callable[..., Batch],
) -> None:
    """The password is part of the URL, which both the error and the repr show."""
    url = "postgres://me:secret@127.0.0.1:9/db"
    shown = "postgresql://me:***@127.0.0.1:9/db"
    assert shown_database_url(url) == shown
    batch = batch_of(database_url=url)
    with pytest.raises(StoreUnavailable) as caught:
        await batch.status()
    assert str(caught.value).startswith(f"cannot use the database {shown}: ")
    assert "refused" in str(caught.value)
    assert repr(batch) == f"<Batch 'nightly' in {shown}>"


async def test_a_database_that_is_away_is_reported_once(
    batch_of: Callable[..., Batch], caplog: pytest.LogCaptureFixture
) -> None:
    """DBOS would add that it could not look whether the database exists."""
    with pytest.raises(StoreUnavailable, match="refused"):
        await batch_of(database_url="postgresql://127.0.0.1:9/db").check_server()
    assert caplog.messages == []


@pytest.mark.parametrize("path", ["none/batches.sqlite", ""])
async def test_a_file_that_cannot_be_opened_is_not_waited_for(
    batch_of: Callable[..., Batch], tmp_path: Path, path: str
) -> None:
    """Its name may be mistyped: its directory does not exist, or it is one itself."""
    batch = batch_of(database_url=f"sqlite:///{tmp_path / path}")
    with pytest.raises(
        ConfigurationError, match=r"unable to open database file\. It must be a file"
    ):
        await asyncio.wait_for(batch.status(), 10)


async def test_a_default_database_that_cannot_be_made_is_an_error(
    batch_of: Callable[..., Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says where to name another one."""
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    monkeypatch.delenv("PROMPTLAYER_EXEC_DB", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"could not make the directory .* to another database"
    ):
        await batch_of(database_url=None).status()


def test_an_outcome_is_the_same_after_json() -> None:
    """Infinity, lone surrogates and non-ASCII text are kept."""
    now = datetime.now(UTC)
    for outcome in (
        StoredOutcome("a", 1, True, [float("inf"), "\ud800"], None, now, now),
        StoredOutcome("é", None, False, None, StoredError("StartUnknown", "x"), None, now),
    ):
        text = outcome.to_json()
        assert text.isascii()
        assert StoredOutcome.from_json(text) == outcome
    error = {"type": "StartUnknown", "message": "x", "data": {}}
    assert json.loads(text)["error"] == error


async def test_a_shared_rate_limits_all_workers_together(batch: Batch, url: str) -> None:
    """Two limiters on one database admit almost the rate together, and not more."""
    await batch.add([request("a")])
    store = Store(check_url(url))
    limiters = [SharedRate(store, "nightly", 200.0) for _ in range(2)]
    clock = asyncio.get_running_loop().time
    began = clock()

    async def use(limiter: SharedRate) -> None:
        for _ in range(30):
            await limiter.acquire()

    await asyncio.gather(*map(use, limiters))
    store.close()
    assert 0.27 < clock() - began < 2.0


async def test_missed_slots_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was busy reserves new slots, beginning with one."""
    reserved: list[int] = []

    class Free:
        def reserve(self, batch: str, slots: int, rate: float) -> float:
            reserved.append(slots)
            return 0.0

        async def in_thread(self, reserve: Callable[..., float], *arguments: Any) -> float:
            return reserve(*arguments)

    limiter = SharedRate(Free(), "nightly", 1000.0)  # type: ignore[arg-type]
    for _ in range(10):
        await limiter.acquire()
    assert reserved == [2, 4, 8]
    clock = asyncio.get_running_loop().time
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: clock() + 1.0)
    await limiter.acquire()
    assert reserved == [2, 4, 8, 1]


async def test_a_rate_that_is_raised_counts_at_once(
    sim: Simulator, batch_of: Callable[..., Batch], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a request that already waits for its slot."""
    monkeypatch.setattr(rates, "RESERVATION", rates.Reservation(step=0.01))
    monkeypatch.setattr(batches, "SETTINGS_INTERVAL", 0.01)
    await batch_of(rate=0.01).add(request(f"{n}", n) for n in range(5))
    working = asyncio.create_task(batch_of().work())
    await sim.wait_for_requests(1)
    with closing(Store(check_url(url))) as store:  # as another worker
        store.store_settings("nightly", {"rate": 1000.0})
    assert (await asyncio.wait_for(working, 20)).succeeded == 5


@pytest.mark.parametrize("opened", [False, True])
async def test_starts_and_polls_keep_to_the_rate_of_the_batch(
    sim: Simulator, batch_of: Callable[..., Batch], opened: bool
) -> None:
    """Also in a session that is already open. Afterwards only its own limiter is left."""
    acquired = []

    class Own:
        async def acquire(self) -> None:
            acquired.append(sim.request_count)

    session = Session(sim.api_key, base_url=sim.base_url, limiter=Own(), rate=None, **BARE)
    if opened:
        await session.__aenter__()
    batch = batch_of(session=session, rate=50.0)
    await batch.add(request(f"{n}", n) for n in range(10))
    clock = asyncio.get_running_loop().time
    began = clock()
    await batch.work()
    seconds = clock() - began
    assert len(acquired) == sim.request_count >= 20
    assert seconds > (sim.request_count - 2) / 50.0
    assert [type(limiter) for limiter in session._limiters] == [Own]
    await session.aclose()


def test_a_new_database_can_be_opened_by_several_workers_at_once(tmp_path: Path) -> None:
    """One of them creates the tables; the others wait for it. SQLite is switched to WAL mode."""
    path = tmp_path / "new.sqlite"

    def open_and_close(_: int) -> None:
        store = Store(check_url(f"sqlite:///{path}"))
        store.prepare()
        store.close()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(open_and_close, range(6)))
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_an_unexpected_error_ends_the_work_but_no_item(
    sim: Simulator, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DBOS would end the item with the error; instead the next worker can run it."""
    await batch.add([request("a", 1)])
    with monkeypatch.context() as patched:
        patched.setattr(Store, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await batch.work()
    assert (await batch.work()).succeeded == 1
    assert len(sim.runs) == 1


@contextmanager
def queue_of_one(url: str) -> Iterator[Store]:
    """Yield the store of a batch "b" with one item in its queue."""
    store = Store(check_url(url))
    store.prepare()
    store.register_queue("b", 1)
    store.add("b", [Row("key", "{}", "digest")])
    yield store
    store.close()


@contextmanager
def launched(store: Store, executor: str) -> Iterator[DBOS]:
    """Launch DBOS without a worker: the item that it dequeues keeps running."""
    instance = DBOS(
        config={
            "name": stores.APPLICATION,
            "system_database_url": store.url,
            "system_database_engine": store.engine,
            "application_version": stores.VERSION,
            "executor_id": executor,
            "serializer": DBOSPortableJSONSerializer(),
            "notification_listener_polling_interval_sec": 0.02,
        }
    )
    try:
        DBOS.launch()
        yield instance
    finally:
        DBOS.destroy(workflow_completion_timeout_sec=1)
        for thread in threading.enumerate():
            if thread.name.startswith("dbos-executor"):  # `destroy` does not wait for it
                thread.join()


def wait_until(reached: Callable[[], bool]) -> None:
    """Wait for at most 20 seconds until a condition holds."""
    give_up = time.monotonic() + 20.0
    while not reached():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def migrates(url: str) -> None:
    """The tables exist afterwards, and an error is raised with its reason."""
    internals.migrate(url)
    client = DBOSClient(system_database_url=url)
    assert client.list_workflows() == []
    client.destroy()
    with pytest.raises(OperationalError, match="refused"):
        internals.migrate("postgresql+psycopg://127.0.0.1:9/db")


def adds_no_handler(url: str) -> None:
    """A logger that has a handler gets no other one, and still passes its records on."""
    with queue_of_one(url) as store, pytest.MonkeyPatch.context() as patched:
        patched.setattr(DBOS.logger, "handlers", [])
        patched.setattr(DBOS.logger, "propagate", True)
        internals.log_quietly()
        with launched(store, "me"):
            assert DBOS.logger.handlers == [internals._HANDLER]
            assert DBOS.logger.propagate


def retries_after_a_disconnect(url: str) -> None:
    """What failed with an error that SQLAlchemy calls a disconnect is tried again."""
    engine = create_engine(url.replace("batches", "new"))
    errors = []

    def call_it_a_disconnect(context: ExceptionContext) -> None:
        errors.append(str(context.original_exception))
        context.is_disconnect = True
        internals.migrate(str(engine.url))

    event.listen(engine, "handle_error", call_it_a_disconnect)
    client = DBOSClient(system_database_engine=engine, lazy=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("time.sleep", lambda _: None)
        assert client.list_workflows() == []
    assert errors == ["no such table: main.workflow_status"]
    client.destroy()
    engine.dispose()


def puts_items_of_dead_workers_back(url: str) -> None:
    """One worker puts the items of a dead one back; another one takes them from the queue."""
    with queue_of_one(url) as store:
        with launched(store, "dead"):
            wait_until(lambda: [*store.taken("b").values()] == ["dead"])
        with launched(store, "live"):
            assert store.claim_rescue("b", "dead", "live", 60.0)
            assert not store.claim_rescue("b", "dead", "other", 60.0)
            assert store.claim_rescue("b", "dead", "other", 0.0)
            store.put_back("b", store.taken("b"))
            wait_until(lambda: [*store.taken("b").values()] == ["live"])


@pytest.mark.parametrize(
    "what_it_does",
    [
        pytest.param(migrates, id="DBOS.migrate"),
        pytest.param(adds_no_handler, id="console handler only where there is none"),
        pytest.param(retries_after_a_disconnect, id="retries after connection_invalidated"),
        pytest.param(puts_items_of_dead_workers_back, id="resume_workflows"),
    ],
)
def test_dbos_still_has(what_it_does: Callable[[str], None], url: str) -> None:
    """DBOS's reference documents none of these; see `_dbos_calls` for why they are used."""
    what_it_does(url)


def test_other_modules_use_only_what_dbos_documents() -> None:
    """Undocumented names are in `_dbos_calls`, where each has its reason and the test above."""
    documented = {
        *("destroy", "executor_id", "launch", "listen_queues", "run_step_async"),
        *("workflow", "workflow_id"),
    }
    for path in Path(internals.__file__).parent.glob("*.py"):
        if path.stem == "_dbos_calls":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dbos"):
                assert node.module == "dbos", path.name
                assert {alias.name for alias in node.names} <= {*dbos.__all__}, path.name
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "DBOS":
                assert node.attr in documented, path.name


async def test_the_example_in_docs_batches_works(
    sim: Simulator, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its functions run against the simulator."""
    monkeypatch.setenv("PROMPTLAYER_API_KEY", sim.api_key)
    monkeypatch.setenv("PROMPTLAYER_BASE_URL", sim.base_url)
    page = Path(__file__).parents[2] / "docs" / "batches.md"
    (block,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, str(page), "exec"), names)

    def scenario(inputs: Any) -> Scenario:
        status = "FAILED" if inputs["prompt"] == "newts" else "SUCCESS"
        return Scenario([SimNode("Grade", 1, status=status, is_output_node=True)])

    sim.add_workflow("grade", scenario)
    endings = await names["grade"](names["batch_of"]("monday", url), {"a": "otters", "b": "newts"})
    assert endings == {"a": "ok", "b": "ExecutionFailed"}
