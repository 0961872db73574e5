"""Durable batches, in this process: what is stored, what goes on, and what ends them."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from dbos import DBOS
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    ExecutionTimeout,
    PollPolicy,
    RequestTimeout,
    RetryPolicy,
    Session,
    SessionClosed,
    StartRequest,
    Unauthorized,
)
from promptlayer_exec.dbos import Batch, BatchStatus, StoredError, StoredOutcome, batch_names
from promptlayer_exec.dbos import _batch as batches
from promptlayer_exec.dbos import _liveness as liveness
from promptlayer_exec.dbos import _store as stores
from promptlayer_exec.dbos import _worker as workers
from promptlayer_exec.dbos._departure import Departure
from promptlayer_exec.dbos._liveness import Liveness, describe, is_gone
from promptlayer_exec.dbos._rate import SharedRate
from promptlayer_exec.dbos._store import Beat, Store, check_url
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Return the URL of a SQLite database of its own."""
    return f"sqlite:///{tmp_path / 'batches.sqlite'}"


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, interval in (
        (stores, "_QUEUE_INTERVAL"),
        (workers, "_CHECK"),
        (batches, "_LOOK_AGAIN"),
    ):
        monkeypatch.setattr(module, interval, 0.02)


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = {thread for thread in set(threading.enumerate()) - before if thread.is_alive()}
    # A loop's own threads end with it.
    assert [thread.name for thread in left if not thread.name.startswith("asyncio")] == []


@pytest.fixture
def batch_of(sim: Simulator, url: str) -> Callable[..., Batch]:
    """Return a maker of batches; the workflow `echo` returns its input `n`, `fail` fails."""

    def scenario(inputs: Any) -> Scenario:
        status = "FAILED" if inputs.get("n") == "bad" else "SUCCESS"
        return Scenario([SimNode("Answer", inputs.get("n"), status=status, is_output_node=True)])

    def session() -> Session:
        return Session(
            sim.api_key,
            base_url=sim.base_url,
            poll=PollPolicy.fixed(0.01),
            retry=RetryPolicy(outage=0.2, watch_outage=0.2, base=0.001),
            rate=None,
        )

    def make(name: str = "nightly", **settings: Any) -> Batch:
        return Batch(name, **{"database_url": url, "session": session, **settings})

    sim.add_workflow("echo", scenario)
    return make


def request(key: Any, n: Any = None, workflow: str = "echo") -> StartRequest:
    """Return an item whose output is `n`."""
    return StartRequest(workflow, {"n": n}, key=key)


async def outcomes_of(batch: Batch) -> dict[str, StoredOutcome]:
    """Return all outcomes, each key once."""
    outcomes = [outcome async for outcome in batch.outcomes()]
    by_key = {outcome.key: outcome for outcome in outcomes}
    assert len(by_key) == len(outcomes)
    return by_key


async def test_every_item_ends_in_one_stored_outcome(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """Its output, its execution and its times are stored; what was started is started once."""
    batch = batch_of()
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
    assert await batch_of(session=lambda: 1 / 0).work() == status  # it needs no session


async def test_adding_a_key_twice_is_adding_it_once(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """In one call, in another, and after it ended; the first request counts."""
    batch = batch_of()

    async def again() -> AsyncIterator[StartRequest]:
        yield request("a", 2)
        yield request("b", 3)

    assert await batch.add([request("a", 1), request("a", 2)]) == 1
    assert await batch.add(again()) == 1
    await batch.work()
    assert await batch.add([request("a", 4)]) == 0
    assert (await batch.work()).total == 2
    assert {key: o.output for key, o in (await outcomes_of(batch)).items()} == {"a": 1, "b": 3}
    assert len(sim.runs) == 2


async def test_items_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them once, and those that are left at the end, too."""
    monkeypatch.setattr(batches, "_CHUNK", 2)
    assert [chunk async for chunk in batches._chunks(range(5))] == [[0, 1], [2, 3], [4]]


def test_a_request_is_stored_as_it_is(batch_of: Callable[..., Batch]) -> None:
    """With whatever it may have beside its inputs; the key is the item's."""
    inputs = {"n": 1}
    for request in (
        StartRequest("w", inputs, label="prod", metadata={"job": "7"}, callback_url="http://x/y"),
        StartRequest(7, inputs, version=3),
    ):
        key, text = batch_of()._row(attrs.evolve(request, key="a"))
        assert (key, StartRequest(**json.loads(text))) == ("a", request)


async def test_what_has_an_outcome_is_not_running(
    batch_of: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though DBOS may have yet to take note that it ended."""
    await batch_of().add([request("a")])
    monkeypatch.setattr(Store, "running", lambda *_: ["me", "me"])
    assert await batch_of().status() == BatchStatus(0, 1, 0, 0, 0, 1)


async def test_batches_of_one_database_are_apart(batch_of: Callable[..., Batch], url: str) -> None:
    """The same key in another batch is another item, whatever the names look like."""
    one, other = batch_of("a/b"), batch_of("a%2Fb")
    await one.add([request("x", 1)])
    await other.add([request("x", 2)])
    assert (await one.work()).total == 1
    assert (await other.status()).waiting == 1
    await other.work()
    assert [o.output for o in (await outcomes_of(other)).values()] == [2]
    assert await batch_names(url) == ["a%2Fb", "a/b"]


async def test_an_item_s_failure_is_its_own(sim: Simulator, batch_of: Callable[..., Batch]) -> None:
    """A failed execution has its id, a refused start has none; the others go on."""
    batch = batch_of()
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
    """It is not started again, unless a later worker is told to."""
    await batch_of().add([request("a", 1)])
    sim.inject(Fault.disconnect())
    assert (await batch_of().work()).unknown == 1
    (unknown,) = (await outcomes_of(batch_of())).values()
    assert (unknown.kind, unknown.execution_id) == ("unknown", None)
    assert (await batch_of().work()).unknown == 1
    assert len(sim.runs) == 1
    assert await batch_of(restart_unknown=True).work() == BatchStatus(0, 0, 1, 0, 0, 1)
    (known,) = (await outcomes_of(batch_of())).values()
    assert (known.output, known.execution_id) == (1, sim.runs[1].execution_id)
    assert len(sim.runs) == 2


async def test_outcomes_last_until_unknown_items_are_restarted(
    sim: Simulator, batch_of: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late a worker that is to do so comes to it."""
    await batch_of().add([request("a", 1)])
    sim.inject(Fault.disconnect())
    await batch_of().work()
    looked = threading.Event()
    look, restart = Store.outcomes, Store.restart_unknown

    def looking(store: Store, *arguments: Any, **options: Any) -> Any:
        rows = look(store, *arguments, **options)
        looked.set()
        return rows

    def restarting(store: Store, name: str) -> None:
        assert looked.wait(20)
        restart(store, name)

    monkeypatch.setattr(Store, "outcomes", looking)
    monkeypatch.setattr(Store, "restart_unknown", restarting)
    batch = batch_of(restart_unknown=True)
    working = asyncio.create_task(batch.work())
    async with aclosing(batch.outcomes()) as outcomes:
        assert [outcome.kind async for outcome in outcomes] == ["unknown", "succeeded"]
    await working


async def test_of_workers_that_restart_an_item_at_once_one_does(
    batch_of: Callable[..., Batch], url: str
) -> None:
    """The other one leaves it alone, though it may have ended again already."""
    await batch_of().add([request("a")])
    first, second = Store(check_url(url)), Store(check_url(url))
    first.finish("nightly", "a", 1, "unknown", "")
    meanwhile: list[Any] = []

    def come_first(*arguments: Any) -> None:
        if arguments[2].startswith("UPDATE promptlayer_item"):
            first.restart_unknown("nightly")
            meanwhile.extend(first.outcomes("nightly", after=0, limit=9))
            first.finish("nightly", "a", 2, "failed", "")

    event.listen(second.engine, "before_cursor_execute", come_first)
    second.restart_unknown("nightly")
    assert first.counts("nightly") == {"failed": 1}
    assert meanwhile == []
    first.close()
    second.close()


async def test_outcomes_come_as_items_finish(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """Before the batch is done, in the order in which they finish."""
    sim.add_workflow("held", Scenario([SimNode("Answer", 1, None, is_output_node=True)]))
    batch = batch_of()
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
async def test_a_cancelled_worker_leaves_its_items_to_the_next(
    sim: Simulator, batch_of: Callable[..., Batch], borrowed: bool
) -> None:
    """The starts on the wire are awaited and recorded, so that the next one only watches."""
    session = Session(sim.api_key, base_url=sim.base_url, poll=PollPolicy.fixed(0.01))
    batch = batch_of(max_in_flight=2, session=session if borrowed else lambda: session)
    sim.add_workflow("held", Scenario([SimNode("Answer", 1, None, is_output_node=True)]))
    await batch.add(request(f"{n}", workflow="held") for n in range(3))
    sim.inject(Fault.delay(0.2, times=2))
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(2)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert len(sim.runs) == 2
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(sim.request_count + 20)  # of two, again and again
    assert len(sim.runs) == 2
    for number in range(3):
        while len(sim.runs) <= number:
            await sim.wait_for_requests(sim.request_count + 1)
        sim.finish(sim.runs[number].execution_id, "Answer")
    assert (await working).succeeded == 3
    assert len(sim.runs) == 3
    await session.aclose()


async def test_a_worker_that_is_cancelled_again_and_again_ends_in_good_order(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """As by a scope of anyio's: it waits for its start all the same."""
    batch = batch_of()
    await batch.add([request("a")])
    sim.inject(Fault.delay(0.1))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(batch.work)
        await sim.wait_for_requests(1)
        tasks.cancel_scope.cancel()
    assert (await batch.work()).succeeded == 1


@pytest.mark.parametrize("restart_unknown", [False, True])
async def test_a_start_that_was_cut_off_is_unknown_and_not_made_twice(
    sim: Simulator, batch_of: Callable[..., Batch], restart_unknown: bool
) -> None:
    """As by a second cancellation, which is not kept waiting; unless it may be restarted."""
    batch = batch_of()
    await batch.add([request("a")])
    sim.inject(Fault.delay(1.0))
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(1)
    while not working.done():
        working.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await working
    status = await batch_of(restart_unknown=restart_unknown).work()
    kind = (await outcomes_of(batch))["a"].kind
    assert (status.finished, kind) == (1, "succeeded" if restart_unknown else "unknown")
    assert sim.request_count <= 1 + 2 * restart_unknown


@pytest.mark.parametrize("borrowed", [False, True])
async def test_a_refused_key_ends_the_work_and_no_item(
    sim: Simulator, batch_of: Callable[..., Batch], borrowed: bool
) -> None:
    """Nothing was started, so everything waits for a worker with the right key."""
    wrong: Any = Session("wrong", base_url=sim.base_url)
    batch = batch_of(session=wrong if borrowed else lambda: wrong)
    await batch.add(request(f"{n}", n) for n in range(8))
    with pytest.raises(Unauthorized):
        await batch.work()
    await wrong.aclose()
    assert (await batch.status()).finished == 0
    assert await batch_of().work() == BatchStatus(0, 0, 8, 0, 0, 8)
    assert max(Counter(run.inputs["n"] for run in sim.runs).values()) == 1


async def test_a_server_that_is_away_ends_the_work_and_no_item(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """Longer than the session survives: neither a start nor a watch fails of it."""
    await batch_of().add([request("a", 1)])
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        address = deaf.getsockname()
        with socket.create_connection(address):  # there is no space for another one
            for port, error in ((9, ConnectionFailed), (address[1], RequestTimeout)):
                nobody = Session(
                    "key",
                    base_url=f"http://127.0.0.1:{port}",
                    retry=RetryPolicy(outage=0.01),
                    request_timeout=0.05,
                )
                with pytest.raises(error):
                    await batch_of(session=lambda nobody=nobody: nobody).work()
    assert (await batch_of().work()).succeeded == 1


async def test_a_session_closed_meanwhile_ends_the_work(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """A watch that it cuts off is taken up by the next worker."""
    sim.add_workflow("held", Scenario([SimNode("Answer", 1, None, is_output_node=True)]))
    async with Session(sim.api_key, base_url=sim.base_url) as session:
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


async def test_a_worker_may_stay(
    batch_of: Callable[..., Batch], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `until_done=False` it waits for more items, until it is cancelled.

    That it lives can be seen before it takes any, and when it has gone there is no trace of it.
    """
    store, launch, seen = Store(check_url(url)), DBOS.launch, []

    def launching() -> None:
        seen.extend(store.beats())
        launch()

    monkeypatch.setattr(DBOS, "launch", staticmethod(launching))
    batch = batch_of()
    working = asyncio.create_task(batch.work(until_done=False))
    for key in ("a", "b"):
        await batch.add([request(key)])
        assert key in await outcomes_of(batch)
    assert seen == list(store.beats())
    assert len(seen) == 1
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert store.beats() == {}
    store.close()


async def test_one_process_works_on_one_batch(batch_of: Callable[..., Batch]) -> None:
    """A second is refused, of the same batch too, and the first goes on."""
    one, two = batch_of("one"), batch_of("two")
    await one.add([request("a")])
    await two.add([request("a")])
    working = asyncio.create_task(one.work(until_done=False))
    await outcomes_of(one)
    for second in (one, two):
        with pytest.raises(RuntimeError, match="one at a time"):
            await second.work(until_done=False)
    await one.add([request("b")])
    assert (await outcomes_of(one))["b"].succeeded
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert (await batch_of("two").work()).succeeded == 1


async def test_a_process_that_uses_dbos_is_refused(
    batch_of: Callable[..., Batch], tmp_path: Path
) -> None:
    """It is told, and its own DBOS is left alone."""
    await batch_of().add([request("a")])
    DBOS(
        config={
            "name": "theirs",
            "system_database_url": f"sqlite:///{tmp_path / 'theirs.sqlite'}",
            "notification_listener_polling_interval_sec": 0.02,
        }
    )
    try:
        with pytest.raises(RuntimeError, match="uses DBOS already: work on a batch in another"):
            await batch_of().work()
        DBOS.launch()
    finally:
        DBOS.destroy()
    assert (await batch_of().work()).succeeded == 1


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ("a", TypeError, "takes StartRequests, not 'a'"),
        (StartRequest("w", key=1), TypeError, "key is a str, not 1"),
        (StartRequest("w", key=""), ValueError, "1 to 1000 bytes, not ''"),
        (StartRequest("w", key="a\0"), ValueError, "1 to 1000 bytes"),
        (StartRequest("w", key="\ud800"), ValueError, "1 to 1000 bytes"),
        (StartRequest("w", {"a": object()}, key="a"), TypeError, "inputs.a"),
        (StartRequest("", key="a"), ValueError, "name must not be empty"),
    ],
)
async def test_what_cannot_be_sent_is_not_stored(
    batch_of: Callable[..., Batch], item: Any, error: type[Exception], message: str
) -> None:
    """It is named when it is added, not when it is started."""
    batch = batch_of()
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
        ({"database_url": "mysql://host/db"}, "neither sqlite nor postgresql"),
        ({"database_url": "sqlite://"}, "needs a file"),
    ],
)
def test_a_malformed_setting_is_told_at_once(settings: dict[str, Any], message: str) -> None:
    """Before any I/O."""
    with pytest.raises(ConfigurationError, match=message):
        Batch(settings.pop("name", "b"), session=Session, **settings)


async def test_a_database_that_cannot_be_used_is_told(batch_of: Callable[..., Batch]) -> None:
    """Without the password of its URL."""
    batch = batch_of(database_url="postgres://me:secret@127.0.0.1:9/db")
    with pytest.raises(ConfigurationError) as caught:
        await batch.status()
    assert "refused" in str(caught.value)
    assert "secret" not in str(caught.value) + repr(batch)


def test_an_outcome_survives_as_json() -> None:
    """Every field of it, whatever is in it."""
    now = datetime.now(UTC)
    for outcome in (
        StoredOutcome("a", 1, True, [float("inf"), "\ud800"], None, now, now),
        StoredOutcome("é", None, False, None, StoredError("StartUnknown", "x"), None, now),
    ):
        text = outcome.to_json()
        assert text.isascii()
        assert StoredOutcome.from_json(text) == outcome
    assert json.loads(text)["error"] == {"type": "StartUnknown", "message": "x"}


async def test_the_outcome_that_is_stored_first_stays(
    batch_of: Callable[..., Batch], url: str
) -> None:
    """Of two workers, one of which was taken for dead; an earlier attempt's counts for nothing."""
    await batch_of().add([request("a"), request("b")])
    store = Store(check_url(url))
    store.finish("nightly", "a", 1, "failed", "first")
    store.finish("nightly", "a", 1, "succeeded", "second")
    store.finish("nightly", "b", 2, "failed", "of another attempt")
    assert store.counts("nightly") == {"failed": 1, None: 1}
    assert [text for _, text in store.outcomes("nightly", after=0, limit=9)] == ["first"]
    store.close()


async def test_the_shared_rate_holds_over_all_who_share_it(
    sim: Simulator, batch_of: Callable[..., Batch], url: str
) -> None:
    """Two limiters over one database admit no more than the rate, and almost all of it."""
    await batch_of().add([request("a")])
    store = Store(check_url(url), pooled=True)
    limiters = [SharedRate(store, "nightly", 200.0) for _ in range(2)]
    clock = asyncio.get_running_loop().time
    began = clock()

    async def use(limiter: SharedRate) -> None:
        for _ in range(30):
            await limiter.acquire()

    await asyncio.gather(*map(use, limiters))
    store.close()
    assert 0.27 < clock() - began < 2.0


async def test_departures_that_were_missed_are_made_up_for_by_nobody(
    batch_of: Callable[..., Batch], url: str
) -> None:
    """One that was busy elsewhere reserves anew, and then one at a time at first."""
    await batch_of().add([request("a")])
    store = Store(check_url(url))
    limiter = SharedRate(store, "nightly", 1000.0)
    for _ in range(10):
        await limiter.acquire()
    assert limiter._departures
    await asyncio.sleep(0.4)
    await limiter.acquire()
    assert not limiter._departures
    store.close()


@pytest.mark.parametrize("opened", [False, True])
async def test_starts_and_polls_keep_to_the_batch_s_rate(
    sim: Simulator, batch_of: Callable[..., Batch], opened: bool
) -> None:
    """Of a session that is open already, too; afterwards it has its own limit back."""
    acquired = []

    class Own:
        async def acquire(self) -> None:
            acquired.append(sim.request_count)

    session = Session(sim.api_key, base_url=sim.base_url, limiter=Own(), rate=None)
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


class Others:
    """A store that knows of other workers."""

    def __init__(self) -> None:
        self.beating: dict[str, Beat] = {}
        self.broken = False

    def beat(self, executor: str, process: str) -> None:
        """Fail where it is broken."""
        if self.broken:
            raise ConfigurationError("the database cannot be used: away")

    def running(self, batch: str, *, patience: float) -> list[str]:
        """Return who has items."""
        return ["me", "other"]

    def beats(self) -> dict[str, Beat]:
        """Return who lives."""
        return self.beating


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the clock of the liveness rule."""
    now = [0.0]
    monkeypatch.setattr(liveness.time, "monotonic", lambda: now[0])
    return now


def test_a_silent_worker_is_dead_after_a_while(now: list[float]) -> None:
    """As long as its beat changes it lives; its items are given back once it does not."""
    others, recovered = Others(), []
    watch = Liveness(others, "b", "me", recovered.append)  # type: ignore[arg-type]
    for count, seconds in ((1, 0.0), (2, 20.0), (2, 33.0)):
        others.beating["other"] = Beat(count, describe(os.getpid()))
        now[0] = seconds
        watch._look_around()
    assert recovered == []
    now[0] = 35.0
    watch._look_around()
    assert recovered == [["other"]]


def test_a_worker_without_a_beat_is_dead_at_once() -> None:
    """It stopped in good order, and left items behind."""
    recovered: list[list[str]] = []
    watch = Liveness(Others(), "b", "me", recovered.append)  # type: ignore[arg-type]
    watch._look_around()
    assert recovered == [["other"]]


def test_who_could_not_look_begins_anew(
    now: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that was away makes nobody dead; it is told of in the log."""
    others, recovered = Others(), []
    watch = Liveness(others, "b", "me", recovered.append)  # type: ignore[arg-type]
    others.beating["other"] = Beat(1, describe(os.getpid()))
    watch._look_around()
    others.broken = True
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        watch._stop.set()

    monkeypatch.setattr(watch._stop, "wait", wait)
    with caplog.at_level(logging.WARNING):
        watch._run()
    assert "cannot be used: away" in caplog.text
    assert waited == [2.0]
    now[0] = 60.0
    watch._look_around()
    assert recovered == []


def test_a_process_that_is_gone_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its id and its beginning, and only on this machine."""
    mine = describe(os.getpid())
    assert not is_gone(mine)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = describe(child.pid)
    assert not is_gone(theirs)
    child.communicate()
    assert is_gone(theirs)
    boot, namespace, pid, began = json.loads(mine)
    assert is_gone(json.dumps([boot, namespace, pid, "another time"]))
    assert not is_gone(json.dumps(["another machine", namespace, child.pid, began]))
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError))
    assert not is_gone(mine)
    monkeypatch.setattr(liveness, "Path", lambda _: Path("/nowhere"))
    assert json.loads(describe(1)) == [None, None, 1, None]
    assert not is_gone(describe(1))


async def test_a_database_that_is_away_is_waited_for(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a while, and no longer by who is cancelled; then it is told."""
    monkeypatch.setattr(stores, "_PAUSE", 0.001)
    error = OperationalError("select", None, Exception("away"))
    answers: list[Any] = [error, error, 1]

    def work() -> Any:
        answer = answers.pop(0) if answers else error
        if isinstance(answer, Exception):
            asked.set()
            raise answer
        return answer

    store = Store(check_url(url))
    asked = threading.Event()
    assert store._patiently(work, 60.0) == 1
    with pytest.raises(ConfigurationError, match="cannot be used: away"):
        store._patiently(work, 0.0)
    asked.clear()
    waiting = asyncio.create_task(store.do(store._patiently, work, 60.0))
    await asyncio.to_thread(asked.wait)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(ConfigurationError):
        store._patiently(work, 60.0)
    store.close()


async def test_a_database_is_prepared_once(
    batch_of: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is not patient: later one that is away is waited for."""
    batch = batch_of()
    assert (await batch.status()).total == 0
    monkeypatch.setattr(Store, "prepare", lambda _: 1 / 0)
    assert (await batch.status()).total == 0


def test_several_who_open_a_new_database_do_not_collide(url: str) -> None:
    """One of them makes the tables, the others wait for it; readers do not wait for a writer."""

    def open_and_close(_: int) -> None:
        store = Store(check_url(url))
        store.prepare()
        store.close()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(open_and_close, range(6)))
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_connection_that_cannot_be_made_counts_as_lost() -> None:
    """In whatever words psycopg says so: DBOS then tries again, and no item ends of it."""
    store = Store(check_url("postgresql://me@/db?host=/nowhere"))
    with pytest.raises(OperationalError) as caught:
        store.engine.connect()
    assert caught.value.connection_invalidated
    store.close()


async def test_an_execution_that_is_not_known_yet_is_waited_for(
    sim: Simulator, batch_of: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a worker that did not start it; an old one that is not found has failed."""
    session = Session(sim.api_key, base_url=sim.base_url)
    worker = workers.Worker(
        None,
        "b",
        session,
        owns_session=False,
        max_in_flight=1,
        restart_unknown=False,  # type: ignore[arg-type]
    )
    execution_id = sim.add_execution(Scenario([SimNode("Answer", 1, is_output_node=True)]))
    sim.inject(Fault.status(404))
    answer = workers._answer(execution_id=execution_id)
    assert (await worker._outcome("a", answer)).output == 1
    sim.inject(Fault.status(404))
    monkeypatch.setattr(workers, "_NEWBORN", -1.0)
    outcome = await worker._outcome("a", answer)
    assert outcome.error is not None
    assert outcome.error.type == "NotFound"
    await session.aclose()


async def test_a_start_whose_item_was_given_away_meanwhile_tells_its_id(
    sim: Simulator,
    batch_of: Callable[..., Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by a worker that was taken for dead: the other stores it as unknown, the log knows it."""
    batch = batch_of()
    await batch.add([request("a", 1)])
    sim.inject(Fault.delay(0.3))
    loop = asyncio.get_running_loop()
    told: asyncio.Future[str] = loop.create_future()

    def warning(text: str, *arguments: object) -> None:
        loop.call_soon_threadsafe(told.set_result, text % arguments)

    monkeypatch.setattr(workers.logger, "warning", warning)
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(1)
    with closing(sqlite3.connect(tmp_path / "batches.sqlite")) as database, database:
        database.execute("UPDATE workflow_status SET owner_xid = 'another'")
    async with asyncio.timeout(20):
        message = await told
    assert message.startswith(f"execution {sim.runs[0].execution_id} was started, but another")
    assert message.endswith("promptlayer-exec/nightly/1/a")
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert len(sim.runs) == 1


async def test_a_worker_leaves_when_dbos_knows_of_the_end() -> None:
    """Else the next worker would take its last items for those of a dead one."""
    begun = [[], []]

    class Slow:
        async def do(self, work: Any, *arguments: Any) -> Any:
            return work(*arguments)

        def running(self, batch: str) -> list[str]:
            return begun.pop()

    worker = workers.Worker(
        Slow(),  # type: ignore[arg-type]
        "b",
        Session("key"),
        owns_session=False,
        max_in_flight=1,
        restart_unknown=False,
    )
    begun[1:] = [["another"], [worker._executor], [worker._executor]]
    await worker._settle()
    assert begun == [[]]


async def test_a_start_may_be_called_off_until_it_is_recorded() -> None:
    """Before it begins, and while it waits at its turn; not once its request may leave."""
    left = []

    async def start(clearance: Callable[[], Any]) -> Any:
        await clearance()
        left.append(None)
        return "an execution"

    early, waiting, late = (Departure(start) for _ in range(3))
    early.call_off()
    await early.due()
    assert await early.leave() is None
    await waiting.due()
    waiting.call_off()
    assert await waiting.leave() is None
    assert left == []
    await late.due()
    leaving = asyncio.create_task(late.leave())
    await asyncio.sleep(0)
    late.call_off()
    assert await leaving == "an execution"


async def test_neither_a_turn_that_did_not_come_nor_an_output_too_deep_ends_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A turn that did not come in time is waited for anew; an output too deep to store is told."""
    session = Session("key")
    worker = workers.Worker(
        None,  # type: ignore[arg-type]
        "b",
        session,
        owns_session=False,
        max_in_flight=1,
        restart_unknown=False,
    )

    async def start(_: Callable[[], Any]) -> Any:
        raise ExecutionTimeout("its turn did not come", timeout=1.0)

    late = Departure(start)
    await late.due()
    answer = await worker._leave(late)
    assert (answer["execution_id"], answer["error"]) == (None, None)

    async def output(_: int) -> Any:
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        return deep

    monkeypatch.setattr(worker, "_output", output)
    outcome = await worker._outcome("a", workers._answer(execution_id=7))
    assert (outcome.kind, outcome.execution_id) == ("failed", 7)
    assert outcome.error is not None
    assert outcome.error.type == "RecursionError"


async def test_a_start_that_failed_and_is_given_away_makes_no_noise() -> None:
    """The error is told where it is asked for, and nowhere else."""

    async def start(_: Callable[[], Any]) -> Any:
        raise LookupError

    noise: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: noise.append(context))
    failed, given_away = Departure(start), Departure(start)
    await failed.due()
    with pytest.raises(LookupError):
        await failed.leave()
    await given_away.due()
    del failed, given_away
    gc.collect()
    assert noise == []


async def test_a_fault_of_ours_ends_the_work_and_no_item(
    sim: Simulator, batch_of: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DBOS would take an exception for the item's end; the item is there for the next worker."""
    await batch_of().add([request("a", 1)])
    with monkeypatch.context() as patched:
        patched.setattr(Store, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await batch_of().work()
    assert (await batch_of().work()).succeeded == 1
    assert len(sim.runs) == 1


async def test_the_page_on_batches_does_what_it_says(
    sim: Simulator, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its functions are run against the simulator."""
    monkeypatch.setenv("PROMPTLAYER_API_KEY", sim.api_key)
    monkeypatch.setenv("PROMPTLAYER_BASE_URL", sim.base_url)
    page = Path(__file__).parents[1] / "docs" / "batches.md"
    (block,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, str(page), "exec"), names)

    def scenario(inputs: Any) -> Scenario:
        status = "FAILED" if inputs["topic"] == "newts" else "SUCCESS"
        return Scenario([SimNode("Grade", 1, status=status, is_output_node=True)])

    sim.add_workflow("grade", scenario)
    endings = await names["grade"](names["nightly"](url), {"a": "otters", "b": "newts"})
    assert endings == {"a": "ok", "b": "ExecutionFailed"}
