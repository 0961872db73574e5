"""Outages of the server and of the database: what a batch may cost then, and how work ends."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import pytest
import sqlalchemy as sa
from aiohttp import web
from dbos import DBOS

from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    Forbidden,
    InvalidResponse,
    NotFound,
    RateLimited,
    RequestRetried,
    RequestTimeout,
    ServerError,
    StartFailed,
    StartRequest,
    StatusError,
    StoreUnavailable,
)
from promptlayer_exec._database import database
from promptlayer_exec._database.location import check_url
from promptlayer_exec.dbos import Batch
from promptlayer_exec.dbos import _breaker as breakers
from promptlayer_exec.dbos import _intents as intents_
from promptlayer_exec.dbos import _items as items
from promptlayer_exec.dbos import _liveness as liveness
from promptlayer_exec.dbos import _rate as rates
from promptlayer_exec.dbos import _requeue as requeue
from promptlayer_exec.dbos import _shared_database as shared
from promptlayer_exec.dbos import _store as stores
from promptlayer_exec.dbos import _worker as workers
from promptlayer_exec.dbos._records import Ending, StoredOutcome
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

COUNT = 60
PAGE = b"<html>404 page not found</html>"  # of a gateway, while it is deployed


def requests(count: int = COUNT) -> list[StartRequest]:
    """Return items whose output is their key."""
    return [StartRequest("echo", {"n": f"{n}"}, key=f"{n}") for n in range(count)]


def answers(
    sim: Simulator,
    method: str,
    status: int,
    body: bytes = b"{}",
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answer all requests of a method with a status, until `clear_faults`."""

    async def effect(request: web.BaseRequest, _: Any) -> web.StreamResponse | None:
        if request.method != method:
            return None
        return web.Response(
            status=status, body=body, content_type="application/json", headers=headers
        )

    sim.inject(Fault(effect, times=None))


async def endings(batch: Batch) -> Counter[str]:
    """Return how many items ended how, with the type of their error."""
    found = Counter[str]()
    async for outcome in batch.outcomes():
        found[outcome.error.type if outcome.error else "succeeded"] += 1
        if outcome.succeeded:
            assert outcome.output == outcome.key
    return found


def most_starts(sim: Simulator) -> int:
    """Return how often the item that was started most often was started."""
    return max(Counter(run.inputs["n"] for run in sim.runs).values())


async def until(reached: Callable[[], bool]) -> None:
    """Wait for at most 20 seconds until a condition holds."""
    async with asyncio.timeout(20):
        while not reached():  # noqa: ASYNC110 - most of what is waited for has no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("status", "body", "lost"),
    [
        (503, b"{}", range(3, 21)),
        (200, PAGE, range(3, 21)),
        (402, b"{}", range(1)),
        (404, PAGE, range(1)),
        (404, b"", range(1)),
    ],
)
async def test_starts_pause_while_the_server_fails(
    sim: Simulator, batch: Batch, status: int, body: bytes, lost: range
) -> None:
    """A few may be unknown: those on the wire, and one probe for each pause. The rest succeeds.

    Of starts that PromptLayer refuses because of the account, or a gateway in its place, none is.
    """
    await batch.add(requests())
    working = asyncio.create_task(batch.work())
    await until(lambda: len(sim.runs) >= 10)
    answers(sim, "POST", status, body)
    await asyncio.sleep(1.0)
    sim.clear_faults()
    unknown = (await working).unknown
    assert unknown in lost
    assert await endings(batch) == Counter(succeeded=COUNT - unknown, StartUnknown=unknown)
    assert most_starts(sim) == 1


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (503, b"{}", ServerError),
        (402, b"{}", StatusError),
        (403, b"{}", Forbidden),
        (404, PAGE, NotFound),
        (404, b"", NotFound),
        (200, PAGE, InvalidResponse),
    ],
)
async def test_an_outage_that_lasts_ends_the_work(
    sim: Simulator,
    batch_of: Callable[..., Batch],
    status: int,
    body: bytes,
    error: type[Exception],
) -> None:
    """With the server's error, after the patience of the session; most items wait."""
    await batch_of().add(requests(20))
    answers(sim, "POST", status, body)
    with pytest.raises(error):
        await batch_of(outage=0.2).work()
    before = await batch_of().status()
    assert before.unknown <= 8
    assert before.failed == 0
    sim.clear_faults()
    assert (await batch_of().work()).succeeded == 20 - before.unknown
    assert most_starts(sim) == 1


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, b'{"message": "no such workflow"}', "NotFound"),
        (400, PAGE, "BadRequest"),
        (413, PAGE, "StatusError"),
    ],
)
async def test_a_refusal_of_one_item_is_its_outcome(
    sim: Simulator, batch: Batch, status: int, body: bytes, error: str
) -> None:
    """PromptLayer refused it, or a gateway did for its content or its size."""
    sim.inject(Fault.status(status, body=body))
    await batch.add(requests(3))
    assert (await batch.work()).failed == 1
    assert await endings(batch) == Counter({"succeeded": 2, error: 1})


def intents(url: str) -> int:
    """Return how many items have a recorded intent and no outcome."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        query = "SELECT count(*) FROM promptlayer_item WHERE intent IS NOT NULL AND kind IS NULL"
        return int(database.execute(query).fetchone()[0])


async def test_a_start_that_cannot_be_sent_has_no_intent(
    batch_of: Callable[..., Batch], url: str
) -> None:
    """Whoever is killed while the server refuses connections leaves nothing unknown."""
    await batch_of().add(requests(20))
    retried = []
    working = asyncio.create_task(
        batch_of(
            base_url="http://127.0.0.1:9", observers=[retried.append], max_connections=100
        ).work()
    )
    await until(lambda: len([e for e in retried if isinstance(e, RequestRetried)]) >= 12)
    assert intents(url) == 0
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert (await batch_of().work()).succeeded == 20


async def test_the_intent_of_a_refused_start_is_taken_back(
    sim: Simulator, batch: Batch, url: str
) -> None:
    """A 429 starts nothing, however long the server then wants to be left alone."""
    await batch.add(requests(1))
    sim.inject(Fault.status(429, retry_after=60.0, times=1))
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(1)
    await until(lambda: intents(url) == 0)
    assert sim.runs == []
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert (await batch.work()).succeeded == 1


async def test_what_a_broken_connection_took_from_the_queue_is_run(
    sim: Simulator, batch_of: Callable[..., Batch], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DBOS does not know of an item that it took in a transaction whose end it did not see."""
    monkeypatch.setattr(liveness, "PULSE", liveness.Pulse(interval=0.1, look_every=1))
    batch = batch_of(max_in_flight=1)
    await batch.add([StartRequest("held", {"n": "0"}, key="0"), *requests(2)[1:]])
    working = asyncio.create_task(batch.work())
    await until(lambda: len(sim.runs) == 1)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        (executor,) = database.execute("SELECT executor FROM promptlayer_worker").fetchone()
        database.execute(
            "UPDATE workflow_status SET status = 'PENDING', executor_id = ?"
            " WHERE status = 'ENQUEUED'",
            [executor],
        )
        database.commit()
    sim.finish(sim.runs[0].execution_id, "Answer")
    assert (await working).succeeded == 2
    assert most_starts(sim) == 1


async def test_an_intent_that_is_recorded_too_late_to_send_is_taken_back(
    sim: Simulator, batch_of: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the session's `wait_timeout`, nothing is sent; the start is tried again."""
    taken_back: list[bool] = []
    write = intents_.write

    def write_slowly(
        store: Store, batch: str, rows: list[intents_.Intent], **options: Any
    ) -> list[bool]:
        if not taken_back:
            time.sleep(0.4)
        taken_back.extend(row.is_taken_back for row in rows)
        return write(store, batch, rows, **options)

    monkeypatch.setattr(intents_, "write", write_slowly)
    await batch_of().add(requests(1))
    assert (await batch_of(wait_timeout=0.3).work()).succeeded == 1
    assert taken_back == [False, True, False]
    assert len(sim.runs) == 1


async def test_announced_pauses_are_no_outage(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """Even if they are longer than the session's `wait_timeout` and `outage`."""
    answers(sim, "POST", 429, headers={"Retry-After": "0.3"})
    await batch_of().add(requests(4))
    working = asyncio.create_task(batch_of(wait_timeout=0.1, outage=0.2).work())
    await until(lambda: working.done() or sim.request_count >= 8)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    sim.clear_faults()
    assert (await batch_of().work()).succeeded == 4


async def test_the_work_does_not_end_before_the_outage_has_lasted_so_long() -> None:
    """The last pause is only as long as the patience, and one more start is a probe."""
    given_up: list[float] = []
    now = 0.0
    breaker = breakers.Breaker(10.0, lambda _: given_up.append(now), lambda: now)
    for now in (0.0, 1.0, 2.0, 4.0, 8.0, 9.9):
        breaker.failed(ConnectionFailed("away"), since=now)
    assert given_up == []
    now = 10.0
    breaker.failed(ConnectionFailed("away"), since=now)
    assert given_up == [10.0]


async def test_failures_that_are_hours_apart_are_no_outage() -> None:
    """A worker that waits for items may meet one now and then, and nothing in between."""
    given_up: list[float] = []
    now = 0.0
    breaker = breakers.Breaker(600.0, lambda _: given_up.append(now), lambda: now)
    for hours in range(1, 7):
        now = 3600.0 * hours
        breaker.failed(ServerError("away", status=503, server_message=""), since=now - 30.0)
    assert given_up == []


@pytest.mark.parametrize("server", ["away", "busy"])
async def test_an_outage_ends_the_work_although_the_wait_timeout_is_shorter(
    sim: Simulator, batch_of: Callable[..., Batch], server: str
) -> None:
    """The error is the server's, and the items wait for the next call of `work`."""
    settings: dict[str, Any] = {"wait_timeout": 0.1, "outage": 0.5}
    answers(sim, "POST", 429)
    await batch_of().add(requests(4))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    if server == "away":
        settings["base_url"] = f"http://127.0.0.1:{port}"
    with pytest.raises(ConnectionFailed if server == "away" else (RateLimited, RequestTimeout)):
        await asyncio.wait_for(batch_of(**settings).work(), 20)
    sim.clear_faults()
    assert (await batch_of().work()).succeeded == 4


async def test_an_item_whose_ending_is_refused_is_followed_as_it_is_stored(
    sim: Simulator, batch_of: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker had recorded its start, just before this one's was refused, and died."""
    other = sim.add_execution(Scenario([SimNode("Answer", "0", is_output_node=True)]))
    started = json.dumps({"execution_id": other, "at": "2026-01-01T00:00:00+00:00", "error": None})
    finish = Store.finish

    def record_first(store: Store, batch: str, endings: Any) -> Any:
        monkeypatch.setattr(Store, "finish", finish)
        intents_.write_started(store, batch, [intents_.SendResult("0", 1, "of another", started)])
        return finish(store, batch, endings)

    await batch_of().add(requests(1))
    answers(sim, "POST", 400)
    monkeypatch.setattr(Store, "finish", record_first)
    assert (await batch_of().work()).succeeded == 1
    assert [outcome.execution_id async for outcome in batch_of().outcomes()] == [other]


async def test_a_start_that_another_worker_sends_has_not_failed(
    sim: Simulator,
    batch_of: Callable[..., Batch],
    recorder: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not sent here, and no observer hears of a failure; the other's run is followed."""
    other = sim.add_execution(Scenario([SimNode("Answer", "0", is_output_node=True)]))
    started = json.dumps({"execution_id": other, "at": "2026-01-01T00:00:00+00:00", "error": None})
    write = intents_.write
    refused: list[bool] = []

    def record_first(store: Store, batch: str, rows: Any) -> list[bool]:
        intents_.write_started(store, batch, [intents_.SendResult("0", 1, "of another", started)])
        recorded = write(store, batch, rows)
        refused.extend(recorded)
        return recorded

    await batch_of().add(requests(1))
    monkeypatch.setattr(intents_, "write", record_first)
    working = asyncio.create_task(batch_of(observers=[recorder]).work())
    await until(lambda: refused)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert (refused, sim.runs, recorder.of(StartFailed)) == ([False], [], [])

    monkeypatch.setattr(intents_, "write", write)
    assert (await batch_of().work()).succeeded == 1
    assert [outcome.execution_id async for outcome in batch_of().outcomes()] == [other]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the keys of the items that a worker has ended, or left."""
    keys: list[str] = []
    run = items.Items.run

    async def note(self: items.Items, key: str, attempt: int) -> bool:
        is_done = await run(self, key, attempt)
        keys.append(key)
        return is_done

    monkeypatch.setattr(items.Items, "run", note)
    return keys


def take_over(url: str) -> None:
    """Let another worker, which is alive, take over the item "0" and be about to start it."""
    with closing(Store(check_url(url))) as store:
        store.record_heartbeat("nightly", "another", stores._NOWHERE)

        def update(connection: sa.Connection) -> None:
            connection.execute(sa.text("UPDATE workflow_status SET executor_id = 'another'"))
            connection.execute(sa.text("UPDATE promptlayer_item SET intent = 'of another'"))

        store.transact(update)


def end_of_another(url: str) -> None:
    """Store the outcome of the item "0" as the other worker does."""
    now = datetime.now(UTC)
    outcome = StoredOutcome("0", 7, True, "0", None, now, now)
    with closing(Store(check_url(url))) as store:
        store.finish("nightly", [Ending.of(1, outcome)])


class Held:
    """A limiter that lets no request pass before `release` is set."""

    def __init__(self) -> None:
        self.asked = 0
        self.release = asyncio.Event()

    async def acquire(self) -> None:
        """Wait for the event."""
        self.asked += 1
        await self.release.wait()


async def test_a_worker_that_stood_still_leaves_an_item_that_it_has_lost(
    sim: Simulator,
    batch_of: Callable[..., Batch],
    url: str,
    ended: list[str],
) -> None:
    """It neither sends the start that waited for its turn, nor calls that of the other unknown."""
    held = Held()
    batch = batch_of(limiter=held)
    await batch.add(requests(1))
    working = asyncio.create_task(batch.work())
    await until(lambda: held.asked == 1)
    take_over(url)
    held.release.set()
    await until(lambda: bool(ended))
    assert (await batch.status()).finished == 0
    end_of_another(url)
    assert (await working).succeeded == 1
    assert sim.request_count == 0


async def test_a_start_of_a_worker_that_is_gone_is_followed_if_its_callback_has_come(
    sim: Simulator, batch_of: Callable[..., Batch], url: str
) -> None:
    """It has started a run, and the id is known."""
    found = sim.add_execution(Scenario([SimNode("Answer", "0", is_output_node=True)]))
    batch = batch_of()
    await batch.add(requests(1))
    with closing(Store(check_url(url))) as store:
        intents_.write(store, "nightly", [intents_.Intent("0", 1, "of another")])
        requeue.record_callback(store, "nightly", "of another", found)
    assert (await batch.work()).succeeded == 1
    assert [outcome.execution_id async for outcome in batch.outcomes()] == [found]
    assert sim.runs == []


async def test_an_item_that_a_worker_is_given_again_while_it_runs_is_started_once(
    sim: Simulator, batch_of: Callable[..., Batch], url: str
) -> None:
    """Another worker put it back into the queue while this one stood still."""
    held = Held()
    batch = batch_of(limiter=held)
    await batch.add(requests(1))
    working = asyncio.create_task(batch.work())
    await until(lambda: held.asked == 1)
    with closing(Store(check_url(url))) as store:
        taken = store.taken("nightly")
        store.put_back("nightly", taken)
        await until(lambda: store.taken("nightly") == taken)
    sim.inject(Fault.delay(0.5))
    held.release.set()
    assert (await working).succeeded == 1
    assert len(sim.runs) == 1


@pytest.mark.parametrize("kind", [TypeError, ValueError, KeyError])
async def test_a_limiter_that_fails_ends_the_work_and_no_item(
    batch_of: Callable[..., Batch], kind: type[Exception]
) -> None:
    """It may ask a service whose answer cannot be decoded, or have a defect."""

    class Broken:
        async def acquire(self) -> None:
            raise kind("of the user")

    batch = batch_of(limiter=Broken())
    await batch.add(requests(5))
    with pytest.raises(kind, match="of the user"):
        await batch.work()
    assert (await batch.status()).finished == 0


@pytest.mark.parametrize("good", [0, 2], ids=["start", "poll"])
async def test_a_shared_rate_without_its_database_ends_the_work_with_the_database_s_error(
    batch_of: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    """A session takes any error of its limiter for a defect of the limiter."""
    reserved = []

    def reserve(store: Store, batch: str, slots: int, rate: float) -> float:
        reserved.append(slots)
        if len(reserved) > good:
            raise ConfigurationError("cannot use the database: away")
        return 0.0

    monkeypatch.setattr(Store, "reserve", reserve)
    monkeypatch.setattr(rates, "RESERVATION", rates.Reservation(reserved=0.0))
    batch = batch_of(rate=50.0)
    await batch.add(requests(2))
    with pytest.raises(ConfigurationError, match="cannot use the database: away"):
        await batch.work()


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Lock a SQLite file, as a database browser with unsaved changes does."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        database.execute("BEGIN IMMEDIATE")
        yield


@pytest.fixture
def _short_patience(monkeypatch: pytest.MonkeyPatch, adjust: Callable[..., None]) -> None:
    monkeypatch.setattr(database, "LIMITS", attrs.evolve(database.LIMITS, locked_file=0.05))
    adjust(items, "PATIENCE", look_after=0.01, recorded_within=0.05)
    adjust(workers, "TIMES", patience_at_end=0.3)


@pytest.mark.usefixtures("_short_patience")
@pytest.mark.parametrize("is_interrupted", [False, True])
async def test_an_id_that_is_not_stored_soon_is_logged_and_printed(
    sim: Simulator,
    batch: Batch,
    url: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    *,
    is_interrupted: bool,
) -> None:
    """While the worker waits for the database, it might be killed, or be interrupted."""
    await batch.add(requests(1))
    sim.inject(Fault.delay(0.3))
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(1)
    with locked(url):
        await until(lambda: "keep this line" in caplog.text)
        if is_interrupted:
            working.cancel()
            await asyncio.wait([working])
    (run,) = sim.runs
    text = f"execution {run.execution_id} started for item '0' of batch 'nightly', but"
    assert [message.startswith(text) for message in caplog.messages].count(True) == 1
    assert text in capsys.readouterr().err
    assert is_interrupted or (await working).succeeded == 1


@pytest.mark.usefixtures("_short_patience")
async def test_work_on_a_locked_file_can_be_interrupted(
    sim: Simulator, batch: Batch, url: str
) -> None:
    """Long before it would give up, and so can adding."""
    await batch.add(requests(20))
    working = asyncio.create_task(batch.work())
    await until(lambda: len(sim.runs) >= 5)
    with locked(url):
        for call in (
            lambda: working,
            lambda: asyncio.create_task(batch.add(requests(30))),
        ):
            calling = call()
            await asyncio.sleep(0.1)
            calling.cancel()
            began = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await calling
            assert time.monotonic() - began < 5


@pytest.mark.usefixtures("_short_patience")
async def test_work_goes_on_when_the_file_is_unlocked(
    sim: Simulator,
    batch_of: Callable[..., Batch],
    url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever was tried meanwhile is done once."""
    batch = batch_of(rate=20.0)  # so that not all is done before the file is locked
    await batch.add(requests(20))
    working = asyncio.create_task(batch.work())
    await until(lambda: len(sim.runs) >= 5)
    with locked(url):
        await until(lambda: ", trying again: database is locked" in caplog.text)
    assert (await working).succeeded == 20
    assert "works again" in caplog.text
    assert most_starts(sim) == 1


async def test_the_event_loop_s_own_threads_are_left_alone(
    batch_of: Callable[..., Batch],
) -> None:
    """The program needs them, also for name resolution, while a database is away."""

    class Untouched(ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("it belongs to the program")

    asyncio.get_running_loop().set_default_executor(Untouched())
    batch = batch_of(rate=1000.0)
    await batch.add(requests(5))
    assert (await batch.work()).succeeded == 5
    assert (await endings(batch))["succeeded"] == 5


def test_a_server_that_became_a_standby_is_waited_for(url: str) -> None:
    """`mark_lost_connections` calls its error a lost connection."""
    error = sa.exc.InternalError("update", None, Exception("read-only"))
    failures = [error]
    error.connection_invalidated = True

    def work() -> str:
        if failures:
            raise failures.pop()
        return "written"

    with closing(Store(check_url(url))) as store:
        assert store.retry(work) == "written"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (sa.exc.InternalError("select", None, Exception("no")), ConfigurationError),
        (sa.exc.ProgrammingError("select", None, Exception("no")), ConfigurationError),
        (sa.exc.TimeoutError("no"), StoreUnavailable),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_raw_error_of_sqlalchemy_comes_out(url: str, failure: Any, expected: Any) -> None:
    """Whatever the database answers, and also if it is not retried."""

    def work() -> None:
        raise failure

    with closing(Store(check_url(url))) as store:
        with pytest.raises(expected, match=r"cannot use the database .*: no"):
            store.retry(work)
        explained = store.explain(failure)
        assert isinstance(explained, expected)
        assert explained.__cause__ is failure
        other = LookupError()
        assert store.explain(other) is other


# DBOS, when it is ended just after its launch, may drop the coroutines of what it has dequeued.
@pytest.mark.filterwarnings("ignore:.*start_workflow_task:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine 'execute_dequeued_workflow:RuntimeWarning")
async def test_dbos_is_launched_again_when_its_connection_breaks(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when PostgreSQL restarts; the worker waits as it does later."""
    lost = sa.exc.OperationalError("SELECT 1", None, sqlite3.OperationalError("restarting"))
    launch, failures = DBOS.launch, [lost, lost]

    def launch_at_last() -> None:
        launch()
        if failures:
            raise failures.pop()

    monkeypatch.setattr(DBOS, "launch", staticmethod(launch_at_last))
    await batch.add(requests(5))
    status = await batch.work()
    gc.collect()  # those coroutines, while their warnings are ignored
    assert (status.succeeded, failures) == (5, [])


def test_the_tables_are_created_on_connections_with_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """DBOS makes these connections; what the user's URL says counts."""
    urls: list[str] = []
    monkeypatch.setattr(shared, "migrate", lambda url: [urls.append(url), 1 / 0])
    store = Store(check_url("postgresql://127.0.0.1:9/none?connect_timeout=3"))
    with closing(store), pytest.raises(ConfigurationError, match="division"):
        store.prepare()
    query = sa.make_url(urls[0]).query
    assert (query["connect_timeout"], query["tcp_user_timeout"]) == ("3", "15000")


def test_a_connection_in_use_is_closed_when_it_is_returned(tmp_path: Path) -> None:
    """A thread of DBOS may outlive the worker; nobody else closes what it uses."""
    opened = database.Database(sa.make_url(f"sqlite:///{tmp_path}/a.sqlite"))
    with opened.engine.connect() as connection:
        used = connection.connection.dbapi_connection
        opened.close()
    assert used is not None
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        used.cursor()
