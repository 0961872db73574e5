"""Starts with a key, by sessions and real sockets: the server's log says how many there were."""

from __future__ import annotations

import asyncio
import gc
import logging
import pickle
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, closing, contextmanager, suppress
from typing import Any, Self

import attrs
import pytest

from promptlayer_exec import (
    BadRequest,
    ConfigurationError,
    ConnectionFailed,
    Execution,
    ExecutionStarted,
    ExecutionTimeout,
    InvalidInputs,
    KeyConflict,
    RetryPolicy,
    Session,
    SessionClosed,
    StartFailed,
    StartRequest,
    StartUnknown,
    StatusError,
    StoreUnavailable,
)
from promptlayer_exec import starts as starts_module
from promptlayer_exec._engine import recorded_sends
from promptlayer_exec._integration import receive_callback
from promptlayer_exec.dbos import Batch
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.starts import SQLStartStore, StartClaim
from promptlayer_exec.webhooks import Callbacks

INPUTS = {"topic": "otters"}
CALLBACKS = Callbacks("http://127.0.0.1:9/callbacks", secret="of the sessions")
LONG = 20.0


class Watched:
    """A store that records which of its methods were called, and that can be held up or away.

    Attributes:
        calls: the names of the methods, in the order of the calls.
        before: called before each call of a method, by its name.
        after: called after each call of a method, by its name.
    """

    def __init__(self, store: SQLStartStore) -> None:
        self.store = store
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], Awaitable[object]]] = {}
        self.after: dict[str, Callable[[], Awaitable[object]]] = {}

    async def nothing(self) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        """Return a method of the store."""

        async def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            await self.before.get(name, self.nothing)()
            result = await getattr(self.store, name)(*arguments, **options)
            await self.after.get(name, self.nothing)()
            return result

        return call

    async def aclose(self) -> None:
        """Close the store."""
        await self.store.aclose()


class Gate:
    """Lets a test wait until something has been reached, which then waits for the test."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the test, but not forever: it may have failed."""
        self.reached.set()
        async with asyncio.timeout(LONG):
            await self.opened.wait()

    async def arrive(self) -> None:
        """Wait, in the test, until somebody waits."""
        async with asyncio.timeout(LONG):
            await self.reached.wait()


@pytest.fixture
def flow(sim: Simulator) -> str:
    """Return the name of a workflow whose output is its topic."""

    def scenario(inputs: Any) -> Scenario:
        return Scenario([SimNode("Answer", inputs.get("topic"), is_output_node=True)])

    sim.add_workflow("write", scenario, inputs={"topic": "string"})
    return "write"


@pytest.fixture
async def store_of(url: str) -> AsyncIterator[Callable[..., Watched]]:
    """Return a function that makes a store, which is closed after the test."""
    async with AsyncExitStack() as stores:

        def make(**settings: Any) -> Watched:
            store = Watched(SQLStartStore(url, **settings))
            stores.push_async_callback(store.aclose)
            return store

        yield make


@pytest.fixture
def store(store_of: Callable[..., Watched]) -> Watched:
    """Return a store that restarts nothing."""
    return store_of()


@pytest.fixture
def session(open_session: Callable[..., Session], store: Watched) -> Session:
    """Return a session whose starts can be called back."""
    return open_session(starts=store, callbacks=CALLBACKS)


@contextmanager
def connected(url: str) -> Iterator[sqlite3.Connection]:
    """Yield a connection to the database, as another program has."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        yield connection


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Keep all others from using the database."""
    with connected(url) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


class Lock:
    """Locks a database when it is told to, until its end."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock: Any = None

    async def lock(self) -> None:
        """Lock the database, unless it is locked."""
        if self._lock is None:
            self._lock = locked(self._url)
            self._lock.__enter__()

    def unlock(self) -> None:
        """Unlock it."""
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()


def age(url: str, seconds: float) -> None:
    """Let everything that is recorded be older by some seconds."""
    moved = ", ".join(f"{name} = {name} - {seconds}" for name in ("created", "updated", "until"))
    with connected(url) as connection:
        connection.execute(f"UPDATE promptlayer_exec_starts SET {moved}")


def rows(url: str) -> list[tuple[Any, ...]]:
    """Return the key, the state, the id and the number of attempts of each row."""
    with connected(url) as connection:
        columns = "key, state, execution_id, attempts"
        return list(connection.execute(f"SELECT {columns} FROM promptlayer_exec_starts"))


def posts(sim: Simulator) -> int:
    """Return how many requests to start a run the server has received."""
    return [request.method for request in sim.requests].count("POST")


def polled(sim: Simulator) -> set[str]:
    """Return the ids of the executions that a session has polled."""
    ids = [request.query.get("workflow_version_execution_id") for request in sim.requests]
    return {it for it in ids if it is not None}


def hold(sim: Simulator, gate: Gate, *, before: bool = False) -> None:
    """Hold up the response to the next start, or the start itself."""

    async def effect(_: Any, answer: Any) -> Any:
        response = None if before else answer()
        await gate.wait()
        return response

    sim.inject(Fault(effect), path="/run")


def start(session: Session, flow: str, key: str = "order") -> asyncio.Task[Execution]:
    """Begin a start."""
    return asyncio.create_task(session.start(flow, INPUTS, key=key))


WAYS_OUT = (
    "Look in PromptLayer for the metadata promptlayer_exec.key 'order'. If the run is there,"
    " `promptlayer-exec starts adopt order ID` records its id, as does await store.adopt(key, id)."
    " If not, `promptlayer-exec starts forget order` or await store.forget(key), and start it"
    " again. A store with a URL needs --db URL."
)


async def lose(session: Session, sim: Simulator, flow: str, key: str = "order") -> StartUnknown:
    """Start a run whose response is lost."""
    sim.inject(Fault.disconnect(), path="/run")
    with pytest.raises(StartUnknown) as error:
        await session.start(flow, INPUTS, key=key)
    return error.value


def token_of(sim: Simulator, number: int = -1) -> str:
    """Return the token in the callback URL of a run."""
    return str(sim.runs[number].body["callback_url"]).rpartition("/")[2]


# Repetitions


async def test_a_repetition_returns_the_handle_of_the_one_run(
    session: Session, sim: Simulator, flow: str, recorder: Any
) -> None:
    """It sends nothing, and nobody is told of a start."""
    first = await session.start(flow, INPUTS, key="order")
    count = sim.request_count
    again = await session.start(flow, INPUTS, key="order")
    assert (again.id, again.workflow) == (first.id, flow)
    assert sim.request_count == count
    assert [event.execution_id for event in recorder.of(ExecutionStarted)] == [first.id]
    assert await first.output() == await again.output() == "otters"
    assert posts(sim) == 1


async def test_a_repetition_does_not_look_at_the_definition(
    open_session: Callable[..., Session], store_of: Callable[..., Watched], flow: str, sim: Any
) -> None:
    """In another session, too, it needs nothing but the record."""
    sessions = [open_session(starts=store_of(), check_inputs=True) for _ in range(2)]
    first = await sessions[0].start(flow, INPUTS, key="order")
    count = sim.request_count
    assert (await sessions[1].start(flow, INPUTS, key="order")).id == first.id
    assert sim.request_count == count


async def test_other_keys_are_other_runs(session: Session, sim: Simulator, flow: str) -> None:
    """As are starts without a key, of which nothing is recorded."""
    keys = ["one", "two", None, None]
    runs = await asyncio.gather(*(session.start(flow, INPUTS, key=key) for key in keys))
    assert len({run.id for run in runs}) == posts(sim) == 4


async def test_calls_at_the_same_time_share_one_start(
    session: Session, store: Watched, sim: Simulator, flow: str
) -> None:
    """They ask the record together: once before the start, and once after it."""
    runs = await asyncio.gather(*(session.start(flow, INPUTS, key="order") for _ in range(50)))
    assert len({run.id for run in runs}) == posts(sim) == 1
    assert store.calls == ["find", "claim", "record", "find"]


async def test_sessions_share_one_start(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    recorder: Any,
) -> None:
    """Each has a store of its own, as in two processes; one of the claims wins."""
    sessions = [open_session(starts=store_of()) for _ in range(4)]
    starts = [start(sessions[number % 4], flow) for number in range(20)]
    assert len({run.id for run in await asyncio.gather(*starts)}) == posts(sim) == 1
    assert len(recorder.of(ExecutionStarted)) == 1
    assert recorder.of(StartFailed) == []


async def test_who_loses_the_race_sends_nothing(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    recorder: Any,
) -> None:
    """It has seen no record, and finds one when it claims the key."""
    slow, gate = store_of(), Gate()
    slow.before["claim"] = gate.wait
    losing = start(open_session(starts=slow), flow)
    await gate.arrive()
    winner = await start(open_session(starts=store_of()), flow)
    gate.opened.set()
    assert (await losing).id == winner.id
    assert posts(sim) == len(recorder.of(ExecutionStarted)) == 1
    assert recorder.of(StartFailed) == []


# A start in flight


async def test_a_start_in_flight_elsewhere_is_waited_for(
    open_session: Callable[..., Session], store_of: Callable[..., Watched], sim: Any, flow: str
) -> None:
    """Until its response has come."""
    gate = Gate()
    hold(sim, gate)
    first = start(open_session(starts=store_of()), flow)
    await gate.arrive()
    other = store_of()
    looked_twice = asyncio.Event()

    async def look() -> None:
        if other.calls.count("find") > 1:
            looked_twice.set()

    other.after["find"] = look
    second = start(open_session(starts=other), flow)
    async with asyncio.timeout(LONG):
        await looked_twice.wait()
    assert not second.done()
    gate.opened.set()
    assert (await first).id == (await second).id
    assert posts(sim) == 1


@pytest.mark.parametrize("where", ["the same session", "another session"])
async def test_waiting_for_a_start_ends_with_the_call_s_own_deadline(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    recorder: Any,
    *,
    where: str,
) -> None:
    """The error says that this call sent nothing; the start itself goes on."""
    gate = Gate()
    hold(sim, gate)
    session = other = open_session(starts=store_of())
    if where == "another session":
        other = open_session(starts=store_of())
    first = start(session, flow)
    await gate.arrive()
    with pytest.raises(ExecutionTimeout, match=r"key 'order'.* this call sent nothing") as error:
        await other.run(flow, INPUTS, key="order", timeout=0.1)
    assert error.value.execution_id is None
    assert [event.error for event in recorder.of(StartFailed)] == [error.value]
    gate.opened.set()
    assert (await first).id == sim.runs[0].execution_id
    assert posts(sim) == 1


async def test_a_start_with_a_key_need_not_wait_for_the_response(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    recorder: Any,
) -> None:
    """The request goes on, the store records its run, and the same call finds it."""
    gate = Gate()
    hold(sim, gate)
    store = store_of()
    await store.find("order")  # creates the tables
    session = open_session(starts=store)
    advice = r"the request continues\. Repeat the call with the same key"
    with pytest.raises(ExecutionTimeout, match=advice):
        await session.start(flow, INPUTS, key="order", timeout=1.0)
    assert posts(sim) == 1
    second = start(session, flow)
    reported = asyncio.create_task(recorder.next(ExecutionStarted))
    await asyncio.sleep(0)  # it waits from here on
    gate.opened.set()
    assert (await second).id == sim.runs[0].execution_id
    assert posts(sim) == 1
    assert (await reported).abandoned


async def test_a_call_that_waits_can_be_cancelled_or_closed(
    open_session: Callable[..., Session], store_of: Callable[..., Watched], sim: Any, flow: str
) -> None:
    """The start in flight is none of its business."""
    gate = Gate()
    hold(sim, gate)
    first = start(open_session(starts=store_of()), flow)
    await gate.arrive()
    store = store_of()
    other = open_session(starts=store)
    waiting = Gate()
    store.after["find"] = waiting.wait
    cancelled, closed = start(other, flow), start(other, flow)
    await waiting.arrive()
    cancelled.cancel()
    waiting.opened.set()
    await asyncio.sleep(0)
    await other.aclose()
    errors = await asyncio.gather(cancelled, closed, return_exceptions=True)
    assert [type(error) for error in errors] == [asyncio.CancelledError, SessionClosed]
    gate.opened.set()
    await first
    assert posts(sim) == 1


# Another request


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"workflow": "other"}, "workflow"),
        ({"inputs": {"topic": "seals"}}, r"inputs\.topic"),
        ({"inputs": {**INPUTS, "style": "dry"}}, r"inputs\.style"),
        ({"label": "prod"}, "label"),
        ({"version": 3, "metadata": {"user": "u"}}, r"version, metadata\.user"),
    ],
)
async def test_another_request_with_the_key_is_a_conflict(
    session: Session, sim: Simulator, flow: str, changes: dict[str, Any], names: str
) -> None:
    """It says what differs, and shows no value."""
    await session.start(flow, INPUTS, key="order")
    arguments = {"workflow": flow, "inputs": INPUTS, **changes}
    with pytest.raises(
        KeyConflict, match=rf"'order' .*changed: {names}\), so nothing was sent"
    ) as e:
        await session.start(**arguments, key="order")
    assert e.value.key == "order"
    assert isinstance(e.value, ValueError)
    assert "seals" not in str(e.value)
    assert "otters" not in str(e.value)
    assert posts(sim) == 1


async def test_another_server_is_a_conflict(
    open_session: Callable[..., Session], store_of: Callable[..., Watched], sim: Any, flow: str
) -> None:
    """Its runs are others; the API key may differ, since keys are rotated."""
    await open_session(starts=store_of()).start(flow, INPUTS, key="order")
    other = open_session(starts=store_of(), base_url=f"{sim.base_url}/staging")
    with pytest.raises(KeyConflict, match=r"on another server, http://127\.0\.0\.1"):
        await other.start(flow, INPUTS, key="order")
    rotated = open_session(starts=store_of(), api_key="of-another-day")
    await rotated.start(flow, INPUTS, key="order")
    assert posts(sim) == 1


async def test_a_conflict_is_seen_while_the_start_is_in_flight(
    open_session: Callable[..., Session], store_of: Callable[..., Watched], sim: Any, flow: str
) -> None:
    """Another process need not wait for the response."""
    gate = Gate()
    hold(sim, gate)
    first = start(open_session(starts=store_of()), flow)
    await gate.arrive()
    with pytest.raises(KeyConflict):
        await open_session(starts=store_of()).start(flow, {"topic": "seals"}, key="order")
    gate.opened.set()
    await first


# What started nothing


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_a_refused_start_leaves_no_row(
    session: Session, sim: Simulator, flow: str, url: str, status: int
) -> None:
    """The next call with the key starts."""
    sim.inject(Fault.status(status), path="/run")
    with pytest.raises(StatusError, match="no run"):
        await session.start(flow, INPUTS, key="order")
    assert rows(url) == []
    assert (await session.start(flow, INPUTS, key="order")).id == sim.runs[0].execution_id
    assert posts(sim) == 2


async def test_missing_inputs_leave_no_row(
    open_session: Callable[..., Session], store: Watched, sim: Simulator, flow: str
) -> None:
    """They are found before the key is claimed."""
    session = open_session(starts=store, check_inputs=True)
    with pytest.raises(InvalidInputs):
        await session.start(flow, {}, key="order")
    assert store.calls == ["find"]
    await session.start(flow, INPUTS, key="order")
    assert posts(sim) == 1


async def test_a_429_is_waited_out(
    session: Session, store: Watched, sim: Simulator, flow: str, url: str
) -> None:
    """Meanwhile there is no row: another process may start."""
    seen: list[Any] = []

    async def look() -> None:
        seen.append(rows(url))

    store.after["release"] = look
    sim.inject(Fault.status(429, times=2), path="/run")
    run = await session.start(flow, INPUTS, key="order")
    assert store.calls == ["find", *["claim", "release"] * 2, "claim", "record"]
    assert seen == [[], []]
    assert rows(url) == [("order", "started", run.id, 1)]
    assert len(sim.runs) == 1


async def test_a_server_that_is_not_reached_leaves_no_row(
    open_session: Callable[..., Session], store: Watched, url: str, flow: str
) -> None:
    """The key is claimed only when the connection stands."""
    away = open_session(starts=store, base_url="http://127.0.0.1:9", retry=RetryPolicy(outage=0.0))
    with pytest.raises(ConnectionFailed):
        await away.start(flow, INPUTS, key="order")
    assert store.calls == ["find"]
    assert rows(url) == []


async def test_a_slow_store_holds_back_only_its_own_start(
    session: Session, store: Watched, sim: Simulator, flow: str
) -> None:
    """Polls and other starts go on meanwhile."""
    gate = Gate()
    store.before["claim"] = gate.wait
    held = start(session, flow)
    await gate.arrive()
    other = await session.start(flow, INPUTS)
    assert await other.output() == "otters"
    assert posts(sim) == 1
    gate.opened.set()
    assert (await held).id != other.id
    assert posts(sim) == 2


@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_a_claim_may_clean_up_before_the_session_is_closed(
    session: Session, store: Watched, sim: Simulator, flow: str, how: str
) -> None:
    """Nothing is sent, and the store is not left in the middle of a call."""
    gate = Gate()
    has_cleaned_up = False

    async def clean_up() -> None:
        nonlocal has_cleaned_up
        try:
            await gate.wait()
        finally:
            for _ in range(50):
                await asyncio.sleep(0)
            has_cleaned_up = True

    store.before["claim"] = clean_up
    starting = start(session, flow)
    await gate.arrive()
    if how == "cancelled":
        starting.cancel()
    await session.aclose()
    assert has_cleaned_up
    error = asyncio.CancelledError if how == "cancelled" else SessionClosed
    with pytest.raises(error):
        await starting
    assert posts(sim) == 0


@pytest.mark.parametrize("key", ["", "x" * 501, "a\0b", "\ud800"])
async def test_a_key_that_cannot_be_stored_is_an_error(
    session: Session, sim: Simulator, store: Watched, flow: str, key: str
) -> None:
    """Before anything is asked or sent."""
    with pytest.raises(ValueError, match="key must be 1 to 500 characters"):
        await session.start(flow, INPUTS, key=key)
    with pytest.raises(TypeError, match="key must be a str"):
        await session.start(flow, INPUTS, key=7)  # type: ignore[arg-type]
    assert store.calls == []
    assert sim.request_count == 0


async def test_a_key_needs_a_record(
    open_session: Callable[..., Session], sim: Simulator, flow: str
) -> None:
    """The error names the argument and the extra."""
    session = open_session()
    for call in (session.start, session.run):
        with pytest.raises(ConfigurationError, match=r"Pass starts=.*the extra \"starts\""):
            await call(flow, INPUTS, key="order")
    assert sim.request_count == 0


# A lost response


@pytest.mark.parametrize("fault", [Fault.disconnect(), Fault.status(503), Fault.truncate()])
async def test_a_lost_response_stays_unknown(
    session: Session, sim: Simulator, flow: str, url: str, fault: Fault
) -> None:
    """Each later call says so again, and sends nothing."""
    sim.inject(fault, path="/run")
    errors = []
    for _ in range(3):
        with pytest.raises(StartUnknown, match="with the key 'order'") as error:
            await session.start(flow, INPUTS, key="order")
        errors.append(error.value)
        assert error.value.key == "order"
    assert {error.callback_token for error in errors} == {errors[0].callback_token}
    assert errors[0].callback_token is not None
    assert "so this call sent nothing" in str(errors[1])
    for error in errors:
        assert str(error).endswith(WAYS_OUT)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert posts(sim) == 1
    assert rows(url) == [("order", "unknown", None, 1)]


async def test_a_key_that_no_store_keeps_cannot_be_forgotten(
    open_session: Callable[..., Session], sim: Simulator, flow: str
) -> None:
    """Without `starts=`, the key of a request is only a label."""
    sim.inject(Fault.disconnect(), path="/run")
    (outcome,) = await open_session().collect([StartRequest(flow, INPUTS, key="order")])
    assert isinstance(outcome.error, StartUnknown)
    assert str(outcome.error).endswith("before you start it again, or you may pay twice.")


async def test_a_callback_says_which_run_it_was(
    open_session: Callable[..., Session], store_of: Callable[..., Watched], sim: Any, flow: str
) -> None:
    """It may come to a process that has never known of the start."""
    error = await lose(open_session(starts=store_of(), callbacks=CALLBACKS), sim, flow)
    assert error.callback_token == token_of(sim)
    assert await store_of().resolve(token_of(sim), sim.runs[0].execution_id)
    run = await open_session(starts=store_of()).start(flow, INPUTS, key="order")
    assert run.id == sim.runs[0].execution_id
    assert await run.output() == "otters"
    assert posts(sim) == 1


async def test_recover_waits_on_the_row(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    recorder: Any,
) -> None:
    """The callback comes to another process, with which only the database is shared."""
    store = store_of()
    session = open_session(starts=store, callbacks=CALLBACKS)
    error = await lose(session, sim, flow)
    gate = Gate()
    store.after["find"] = gate.wait
    recovering = asyncio.create_task(session.recover(error))
    await gate.arrive()
    assert await store_of().resolve(token_of(sim), sim.runs[0].execution_id)
    gate.opened.set()
    run = await recovering
    assert run.id == sim.runs[0].execution_id
    assert [event.recovered for event in recorder.of(ExecutionStarted)] == [True]
    assert "order" in repr(run.__reduce__())  # for the log


async def test_recover_finds_the_run_of_an_earlier_attempt(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    url: str,
) -> None:
    """Its callback still counts after another session has sent the start again."""
    store = store_of(restart_unknown_after=20.0)
    first = open_session(starts=store, callbacks=CALLBACKS)
    error = await lose(first, sim, flow)
    age(url, 21.0)
    second = open_session(starts=store_of(restart_unknown_after=20.0), callbacks=CALLBACKS)
    await lose(second, sim, flow)
    token = token_of(sim, 0)
    assert token == error.callback_token
    assert await store_of().resolve(token, sim.runs[0].execution_id)
    async with asyncio.timeout(LONG):
        assert (await first.recover(error)).id == sim.runs[0].execution_id


async def test_recover_survives_a_store_that_is_away(
    session: Session, store: Watched, sim: Simulator, flow: str
) -> None:
    """The callback may also come to this very session."""
    error = await lose(session, sim, flow)
    gate = Gate()

    async def fail() -> None:
        gate.reached.set()
        raise StoreUnavailable("the database is away")

    store.before["find"] = fail
    recovering = asyncio.create_task(session.recover(error))
    await gate.arrive()
    receive_callback(session, token_of(sim), sim.runs[0].execution_id)
    assert (await recovering).id == sim.runs[0].execution_id


async def test_a_start_with_a_callback_url_of_its_own_cannot_be_recovered(
    session: Session, sim: Simulator
) -> None:
    """No callback comes to the session, so no later error has a token either."""
    sim.add_workflow("own", Scenario([SimNode("Answer", None, None)]))
    sim.inject(Fault.disconnect(), path="/run")
    for _ in range(2):
        with pytest.raises(StartUnknown) as error:
            await session.start("own", key="order", callback_url="http://127.0.0.1:9/mine")
        assert error.value.callback_token is None
    assert posts(sim) == 1


async def test_a_process_that_was_killed_leaves_an_unknown_start(
    session: Session, store: Watched, sim: Simulator, flow: str, url: str
) -> None:
    """Others wait for it for its time-out and a few seconds, and then say that nobody knows."""
    gate = Gate()
    hold(sim, gate)
    first = start(session, flow)
    await gate.arrive()
    age(url, 34.0)  # as if its process had vanished
    other = Session(sim.api_key, base_url=sim.base_url, starts=SQLStartStore(url))
    async with other:
        with pytest.raises(StartUnknown, match="its process died before it could record"):
            await other.start(flow, INPUTS, key="order")
    gate.opened.set()  # but it was only asleep
    run = await first
    assert rows(url) == [("order", "started", run.id, 1)]
    assert posts(sim) == 1


async def test_an_unknown_start_is_repeated_after_a_while(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    url: str,
) -> None:
    """Only if the store says so; several that repeat it send one request."""
    sessions = [open_session(starts=store_of(restart_unknown_after=20.0)) for _ in range(2)]
    await lose(sessions[0], sim, flow)
    with pytest.raises(StartUnknown):
        await sessions[1].start(flow, INPUTS, key="order")
    age(url, 21.0)
    with pytest.raises(StartUnknown):
        await open_session(starts=store_of()).start(flow, INPUTS, key="order")
    starts = [start(sessions[number % 2], flow) for number in range(10)]
    ids = {run.id for run in await asyncio.gather(*starts)}
    assert ids == {sim.runs[1].execution_id}
    assert posts(sim) == 2
    assert rows(url) == [("order", "started", sim.runs[1].execution_id, 2)]


async def test_a_repeated_start_that_is_refused_is_unknown_again(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    url: str,
) -> None:
    """The callback of the first one still counts."""
    session = open_session(starts=store_of(restart_unknown_after=20.0), callbacks=CALLBACKS)
    first = await lose(session, sim, flow)
    age(url, 21.0)
    sim.inject(Fault.status(400), path="/run")
    with pytest.raises(BadRequest):
        await session.start(flow, INPUTS, key="order")
    assert rows(url) == [("order", "unknown", None, 1)]
    assert first.callback_token is not None
    assert await store_of().resolve(first.callback_token, sim.runs[0].execution_id)
    run = await session.start(flow, INPUTS, key="order")
    assert run.id == sim.runs[0].execution_id
    assert posts(sim) == 2


async def test_a_forgotten_key_starts_again(
    session: Session, store: Watched, sim: Simulator, flow: str
) -> None:
    """Deliberately."""
    first = await session.start(flow, INPUTS, key="order")
    assert await store.forget("order")
    second = await session.start(flow, INPUTS, key="order")
    assert first.id != second.id
    assert posts(sim) == 2


async def test_a_key_that_is_forgotten_while_its_start_is_in_flight(
    session: Session, store: Watched, sim: Simulator, flow: str, caplog: Any
) -> None:
    """Its caller gets the handle all the same, and the log says that the key has no run."""
    gate = Gate()
    hold(sim, gate)
    starting = start(session, flow)
    await gate.arrive()
    await store.forget("order")
    gate.opened.set()
    run = await starting
    assert f"execution {run.id} started for the key 'order'" in caplog.text


# Run and fan-outs


async def test_run_takes_a_key(session: Session, sim: Simulator, flow: str) -> None:
    """Every repetition has the output of the one run."""
    outputs = [await session.run(flow, INPUTS, key="order", into=str) for _ in range(3)]
    assert outputs == ["otters"] * 3
    assert posts(sim) == 1


@pytest.mark.parametrize("how", ["as_completed", "collect"])
async def test_a_fan_out_that_is_interrupted_and_run_again_pays_for_no_row_twice(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    url: str,
    *,
    how: str,
) -> None:
    """The second time it yields the outcomes of all, whatever was in flight the first time."""
    requests = [StartRequest(flow, {"topic": f"{n}"}, key=f"row {n}") for n in range(40)]
    session = open_session(starts=store_of())
    if how == "as_completed":
        async with aclosing(session.as_completed(requests, max_in_flight=10)) as outcomes:
            async for _ in outcomes:
                if posts(sim) >= 15:
                    break
    else:
        collecting = asyncio.create_task(session.collect(requests, max_in_flight=10))
        await sim.wait_for_requests(15)
        collecting.cancel()
        with suppress(asyncio.CancelledError):
            await collecting
    await session.aclose()
    assert 0 < posts(sim) < 40

    again = await open_session(starts=store_of()).collect(requests, max_in_flight=10)
    assert [outcome.result() for outcome in again] == [f"{n}" for n in range(40)]
    assert posts(sim) == len(sim.runs) == 40
    assert len(rows(url)) == 40


async def test_the_key_of_an_item_must_be_a_str(
    session: Session, open_session: Callable[..., Session], sim: Simulator, flow: str
) -> None:
    """It is the item's error; in a session without `starts` it may be anything."""
    requests = [StartRequest(flow, INPUTS, key=key) for key in (("a", 1), "b", None)]
    outcomes = await session.collect(requests)
    assert [type(outcome.error) for outcome in outcomes] == [TypeError, type(None), type(None)]
    assert "key must be a str, got ('a', 1)" in str(outcomes[0].error)
    assert posts(sim) == 2
    assert all(outcome.ok for outcome in await open_session().collect(requests))


async def test_a_batch_keeps_its_own_keys(
    session: Session,
    open_session: Any,
    store_of: Any,
    sim: Simulator,
    flow: str,
    *,
    batches_file: Any,
) -> None:
    """What its session records of other starts does not matter to it."""
    await session.start(flow, {"topic": "of another"}, key="row-1")
    store = store_of()
    batch = Batch(
        "b",
        database_url=f"sqlite:///{batches_file}",
        session=lambda: open_session(starts=store),
    )
    await batch.add([StartRequest(flow, INPUTS, key="row-1")])
    await batch.work()
    assert [outcome.output async for outcome in batch.outcomes()] == ["otters"]
    assert posts(sim) == 2
    assert store.calls == []


# Ways out of an unknown start


async def test_a_run_that_somebody_found_becomes_the_key_s(
    session: Session, store: Watched, sim: Simulator, flow: str
) -> None:
    """From then on each call returns its handle. Adopting it again changes nothing."""
    await lose(session, sim, flow)
    (run,) = sim.runs
    assert await store.adopt("order", run.execution_id)
    assert await store.adopt("order", run.execution_id)
    found = await session.start(flow, INPUTS, key="order")
    assert (found.id, found.is_new) == (run.execution_id, False)
    assert await found.output() == "otters"
    assert posts(sim) == 1


async def test_only_an_unknown_key_adopts_a_run(
    session: Session, store: Watched, sim: Simulator, flow: str
) -> None:
    """It changes neither the run of a key, nor a start in flight, nor makes up a record."""
    run = await session.start(flow, INPUTS, key="order")
    assert not await store.adopt("order", 77)
    assert not await store.adopt("another", 77)
    gate = Gate()
    hold(sim, gate)
    starting = start(session, flow, "in flight")
    await gate.arrive()
    assert not await store.adopt("in flight", 77)
    gate.opened.set()
    assert (await starting).is_new
    assert (await session.start(flow, INPUTS, key="order")).id == run.id


async def test_a_run_of_one_key_cannot_be_another_s(
    session: Session, store: Watched, sim: Simulator, flow: str
) -> None:
    """A mistyped id would give two orders the same report."""
    run = await session.start(flow, INPUTS, key="order")
    await lose(session, sim, flow, "second")
    with pytest.raises(ValueError, match=rf"execution {run.id} belongs to the key 'order'"):
        await store.adopt("second", run.id)
    assert await store.adopt("second", sim.runs[1].execution_id)


async def test_what_is_unknown_can_be_listed(
    session: Session, store: Watched, sim: Simulator, flow: str, url: str
) -> None:
    """By key, with the reason, also if the process was killed before it could record one."""
    await session.start(flow, INPUTS, key="started")
    for key in ("b", "a"):
        await lose(session, sim, flow, key)
    with connected(url) as connection:
        connection.execute(
            "UPDATE promptlayer_exec_starts SET state = 'sending', until = 1 WHERE key = 'a'"
        )
    found = [record async for record in store.store.unknown()]
    assert [(record.key, record.state, record.reason) for record in found] == [
        ("a", "unknown", "the process that sent its start request recorded no response"),
        ("b", "unknown", "there was no usable response to its start request"),
    ]
    assert [record async for record in store.store.unknown(older_than=60.0)] == []
    age(url, 61.0)
    assert len([record async for record in store.store.unknown(older_than=60.0)]) == 2
    everything = [record.key async for record in store.store.records()]
    assert everything == ["a", "b", "started"]


async def test_lists_have_more_than_one_page(
    store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record comes once, whether the last page is full or not."""
    monkeypatch.setattr(starts_module, "_PAGE_SIZE", 2)
    for count in range(1, 6):
        claim = StartClaim(f"{count}", f"{count}", "https://here", '{"workflow": "w"}', 0.0)
        await store.claim(claim)
        await store.record(claim.key, claim.token, None)
        keys = [record.key async for record in store.store.unknown()]
        assert keys == [f"{number}" for number in range(1, count + 1)]


async def test_the_handle_tells_whether_the_run_is_new(session: Session, flow: str) -> None:
    """Only the call that paid for it has a new one."""
    first = await session.start(flow, INPUTS, key="order")
    assert first.is_new
    assert not (await session.start(flow, INPUTS, key="order")).is_new
    assert (await session.start(flow, INPUTS)).is_new
    assert not session.execution(first.id).is_new
    assert pickle.loads(pickle.dumps(first)).is_new


async def test_find_returns_the_run_of_a_key(
    session: Session, sim: Simulator, flow: str, recorder: Any
) -> None:
    """It sends nothing, and reports no start."""
    assert await session.find("order") is None
    run = await session.start(flow, INPUTS, key="order")
    found = await session.find("order")
    assert found is not None
    assert (found, found.workflow, found.is_new) == (run, flow, False)
    assert await found.output() == "otters"
    assert posts(sim) == 1
    assert len(recorder.of(ExecutionStarted)) == 1


async def test_find_waits_for_a_start_in_flight(
    open_session: Callable[..., Session], store_of: Callable[..., Watched], sim: Any, flow: str
) -> None:
    """Also for one of another process."""
    gate = Gate()
    hold(sim, gate)
    starting = start(open_session(starts=store_of()), flow)
    await gate.arrive()
    finding = asyncio.create_task(open_session(starts=store_of()).find("order"))
    await asyncio.sleep(0)
    assert not finding.done()
    gate.opened.set()
    found = await finding
    assert found is not None
    assert found.id == (await starting).id


async def test_find_tells_why_there_is_no_run_to_return(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    url: str,
) -> None:
    """An unknown start stays one, even if the next start may replace it."""
    store = store_of(restart_unknown_after=1.0)
    session = open_session(starts=store)
    await lose(session, sim, flow)
    age(url, 100.0)
    with pytest.raises(StartUnknown):
        await session.find("order")
    elsewhere = open_session(starts=store, base_url=f"{sim.base_url}/staging")
    with pytest.raises(KeyConflict):
        await elsewhere.find("order")
    with pytest.raises(ConfigurationError, match="needs a store"):
        await open_session().find("order")
    with pytest.raises(ValueError, match="1 to 500 characters"):
        await session.find("")


async def test_a_run_carries_its_key(
    session: Session, sim: Simulator, flow: str, open_session: Callable[..., Session]
) -> None:
    """Beside the metadata of the call. A start without a store carries none."""
    await session.start(flow, INPUTS, key="order", metadata={"tier": "gold"})
    await session.start(flow, INPUTS, key="order", metadata={"tier": "gold"})
    await session.start(flow, INPUTS)
    assert [run.body.get("metadata") for run in sim.runs] == [
        {"tier": "gold", "promptlayer_exec.key": "order"},
        None,
    ]


async def test_recover_tells_the_store(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    url: str,
) -> None:
    """So that no later call pays for a second run, however soon unknown starts are repeated."""
    store = store_of(restart_unknown_after=1.0)
    session = open_session(starts=store, callbacks=CALLBACKS)
    error = await lose(session, sim, flow)
    receive_callback(session, token_of(sim), sim.runs[0].execution_id)
    run = await session.recover(error)
    assert rows(url) == [("order", "started", run.id, 1)]
    age(url, 100.0)
    assert (await session.start(flow, INPUTS, key="order")).id == run.id
    assert posts(sim) == 1


@pytest.mark.usefixtures("quick")
async def test_what_recover_learned_is_kept_while_the_database_is_away(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    url: str,
) -> None:
    """It returns after the store's patience, and the session goes on trying."""
    error = await lose(open_session(starts=store_of(), callbacks=CALLBACKS), sim, flow)
    session = open_session(starts=store_of(patience=0.1), callbacks=CALLBACKS)
    with Lock(url) as locks:
        await locks.lock()
        receive_callback(session, token_of(sim), sim.runs[0].execution_id)
        run = await session.recover(error)
    await session.aclose()  # which waits for it
    assert rows(url) == [("order", "started", run.id, 1)]


@pytest.mark.parametrize("state", ["unknown", "sending"])
async def test_a_start_asks_the_callbacks_received(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    *,
    url: str,
    state: str,
) -> None:
    """Before it raises StartUnknown, and before it waits for a sender that may be dead."""
    await lose(open_session(starts=store_of(), callbacks=CALLBACKS), sim, flow)
    with connected(url) as connection:
        statement = "UPDATE promptlayer_exec_starts SET state = ?, until = until + 1000"
        connection.execute(statement, (state,))
    session = open_session(starts=store_of(), callbacks=CALLBACKS)
    receive_callback(session, token_of(sim), sim.runs[0].execution_id)
    async with asyncio.timeout(LONG):
        run = await session.start(flow, INPUTS, key="order")
    assert run.id == sim.runs[0].execution_id
    await session.aclose()  # which waits for it
    assert rows(url) == [("order", "started", run.id, 1)]


async def test_a_start_asks_the_callbacks_of_a_request_in_flight(
    session: Session, sim: Simulator, flow: str
) -> None:
    """The callback may be quicker than the response, which the other call still waits for."""
    gate = Gate()
    hold(sim, gate)
    starting = start(session, flow)
    await gate.arrive()
    receive_callback(session, token_of(sim), sim.runs[0].execution_id)
    async with asyncio.timeout(LONG):
        run = await session.start(flow, INPUTS, key="order")
    gate.opened.set()
    assert run.id == (await starting).id
    assert posts(sim) == 1


async def test_whatever_a_store_raises_is_a_store_that_is_unavailable(
    session: Session, store: Watched, sim: Simulator, flow: str
) -> None:
    """An app's own store raises its own errors, which are the cause."""

    async def fail() -> None:
        raise ZeroDivisionError("by a bug")

    for what in ("find", "claim"):
        store.before = {what: fail}
        with pytest.raises(StoreUnavailable, match="nothing: the store of keys failed: Zero") as e:
            await session.start(flow, INPUTS, key="order")
        assert isinstance(root(e.value), ZeroDivisionError)
    assert posts(sim) == 0


def root(error: BaseException) -> BaseException:
    """Return the first cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


# The database is away


async def test_without_its_database_nothing_is_sent(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    url: str,
) -> None:
    """The error comes within twice the store's patience, and says that nothing started."""
    store = store_of(patience=0.2)
    session = open_session(starts=store)
    await store.find("order")
    with locked(url):
        began = time.monotonic()
        nothing = "this call started nothing: cannot use the database"
        with pytest.raises(StoreUnavailable, match=nothing) as error:
            await session.start(flow, INPUTS, key="order")
        assert time.monotonic() - began < 0.4 + 0.5
        assert error.value.execution_id is None
    assert posts(sim) == 0
    await session.start(flow, INPUTS, key="order")
    assert posts(sim) == 1


async def test_a_database_that_is_away_when_the_key_is_claimed(
    open_session: Callable[..., Session],
    store_of: Callable[..., Watched],
    sim: Simulator,
    flow: str,
    *,
    url: str,
    recorder: Any,
) -> None:
    """Nothing is sent either, and the claim that its thread may still write is taken back."""
    store = store_of(patience=0.2)
    session = open_session(starts=store)
    with Lock(url) as locks:
        store.before["claim"] = locks.lock
        with pytest.raises(StoreUnavailable, match="started nothing: cannot use the database"):
            await session.start(flow, INPUTS, key="order")
    assert [type(event.error) for event in recorder.of(StartFailed)] == [StoreUnavailable]
    await session.aclose()
    assert rows(url) == []
    assert sim.runs == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a start wait for the record of its end for a moment only."""
    policy = attrs.evolve(
        recorded_sends._RECORD, until_reported=0.1, until_delivered=0.3, between_tries=0.05
    )
    monkeypatch.setattr(recorded_sends, "_RECORD", policy)


def test_the_times_of_a_record_are_those_that_are_promised() -> None:
    """The id is reported within a second, and the handle comes after five at most."""
    policy = recorded_sends._RECORD
    assert (policy.until_reported, policy.until_delivered) == (1.0, 5.0)


@pytest.mark.usefixtures("quick")
async def test_a_database_that_is_away_after_the_start(
    session: Session,
    store: Watched,
    sim: Simulator,
    flow: str,
    url: str,
    *,
    capfd: Any,
    caplog: Any,
) -> None:
    """The id is in the log and on stderr, the caller gets the handle; later it is recorded."""
    with Lock(url) as locks:
        store.before["record"] = locks.lock
        run = await session.start(flow, INPUTS, key="order")
        line = f"execution {run.id} started for the key 'order', but the database could not"
        assert line in capfd.readouterr().err
        assert line in caplog.text
        del store.before["record"]
        recorded = asyncio.Event()

        async def record() -> None:
            recorded.set()

        store.after["record"] = record
        locks.unlock()
        async with asyncio.timeout(LONG):
            await recorded.wait()
    assert rows(url) == [("order", "started", run.id, 1)]
    assert caplog.text.count("started for the key") == 1
    assert (await session.start(flow, INPUTS, key="order")).id == run.id
    assert posts(sim) == 1


@pytest.mark.usefixtures("quick")
async def test_a_deadline_holds_although_the_key_cannot_be_released(
    session: Session, store: Watched, sim: Simulator, flow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release continues without the caller."""
    policy = attrs.evolve(recorded_sends._RECORD, until_delivered=LONG)
    monkeypatch.setattr(recorded_sends, "_RECORD", policy)
    claiming, releasing = Gate(), Gate()
    store.before["claim"] = claiming.wait
    store.before["release"] = releasing.wait
    running = asyncio.create_task(session.run(flow, INPUTS, key="order", timeout=0.5))
    await claiming.arrive()
    with pytest.raises(ExecutionTimeout):
        async with asyncio.timeout(3.0):
            await running
    claiming.opened.set()
    releasing.opened.set()
    assert posts(sim) == 0


async def test_closing_tries_to_record_once_more(
    session: Session, store: Watched, sim: Simulator, flow: str, url: str
) -> None:
    """Although the try before was still waiting."""
    with Lock(url) as locks:
        store.before["record"] = locks.lock
        run = await session.start(flow, INPUTS, key="order")

        async def unlock() -> None:
            locks.unlock()

        store.before["record"] = unlock
        await session.aclose()
    assert rows(url) == [("order", "started", run.id, 1)]


async def test_closing_gives_up_after_one_more_try(
    session: Session,
    store: Watched,
    sim: Simulator,
    flow: str,
    *,
    caplog: Any,
    capfd: Any,
) -> None:
    """A store that fails at once lets the id go to the log and to stderr, too."""

    async def fail() -> None:
        raise StoreUnavailable("the database is away")

    gate = Gate()
    hold(sim, gate)
    store.before["record"] = fail
    starting = start(session, flow)
    await gate.arrive()
    closing_it = asyncio.create_task(session.aclose())
    await asyncio.sleep(0)
    gate.opened.set()
    await closing_it
    with pytest.raises(SessionClosed) as error:
        await starting
    assert error.value.execution_id == sim.runs[0].execution_id
    line = f"execution {sim.runs[0].execution_id} started for the key 'order', but"
    assert line in capfd.readouterr().err
    assert line in caplog.text
    assert "of the key 'order', so you must adopt or forget it: the database is away" in caplog.text


@pytest.mark.usefixtures("quick")
async def test_a_store_with_a_bug_loses_no_id(
    session: Session, store: Watched, sim: Simulator, flow: str, capfd: Any
) -> None:
    """The store may be an app's own; the caller gets the handle all the same."""

    async def fail() -> None:
        raise ZeroDivisionError

    store.before["record"] = fail
    run = await session.start(flow, INPUTS, key="order")
    assert run.id == sim.runs[0].execution_id
    assert f"execution {run.id} started" in capfd.readouterr().err
    await session.aclose()
    gc.collect()  # an error that nobody has retrieved would warn


@pytest.mark.usefixtures("quick")
async def test_a_release_that_hangs_does_not_undo_the_next_claim(
    open_session: Callable[..., Session], store: Watched, sim: Simulator, flow: str, url: str
) -> None:
    """After a 429 the key is released and claimed again; the first must be over."""
    session = open_session(starts=store, request_timeout=1.2)
    gate = Gate()
    store.before["release"] = gate.wait
    sim.inject(Fault.status(429), path="/run")
    with pytest.raises(StoreUnavailable, match="started nothing: the store of keys is unavail"):
        await session.start(flow, INPUTS, key="order")
    gate.opened.set()
    assert len(sim.runs) == 0
    await session.aclose()
    assert rows(url) == []


async def test_a_look_up_that_fails_when_all_callers_are_gone_is_nobody_s_error(
    session: Session, store: Watched, flow: str, caplog: Any
) -> None:
    """No "exception was never retrieved" is logged."""
    gate = Gate()

    async def fail() -> None:
        await gate.wait()
        raise StoreUnavailable("the database is away")

    store.before["find"] = fail
    starting = start(session, flow)
    await gate.arrive()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    gate.opened.set()
    for _ in range(5):
        await asyncio.sleep(0)
    gc.collect()
    assert caplog.text == ""


# The caller is gone


@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_a_start_on_the_wire_is_recorded_without_its_caller(
    session: Session,
    store_of: Any,
    open_session: Any,
    sim: Simulator,
    flow: str,
    *,
    url: str,
    how: str,
    caplog: Any,
) -> None:
    """The next call attaches to its run; the log names the run and its key."""
    gate = Gate()
    hold(sim, gate)
    starting = start(session, flow)
    await gate.arrive()
    if how == "cancelled":
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        gate.opened.set()
    else:
        closing_it = asyncio.create_task(session.aclose())
        await asyncio.sleep(0)
        gate.opened.set()
        await closing_it
        with pytest.raises(SessionClosed) as error:
            await starting
        assert error.value.execution_id == sim.runs[0].execution_id
    await session.aclose()
    execution_id = sim.runs[0].execution_id
    assert rows(url) == [("order", "started", execution_id, 1)]
    assert f"execution {execution_id} of workflow 'write' (key 'order') started" in caplog.text
    again = open_session(starts=store_of())
    assert (await again.start(flow, INPUTS, key="order")).id == execution_id
    assert posts(sim) == 1


def test_a_start_whose_loop_ends_while_it_is_recorded(
    threaded_sim: Simulator, url: str, caplog: Any
) -> None:
    """`asyncio.run` cancels every task; the id is recorded, or in the log."""
    threaded_sim.add_workflow("write", Scenario([SimNode("Answer", "42", is_output_node=True)]))
    store = Watched(SQLStartStore(url))

    async def main() -> None:
        gate = Gate()
        store.before["record"] = gate.wait
        session = Session(
            threaded_sim.api_key,
            base_url=threaded_sim.base_url,
            check_inputs=False,
            push=False,
            starts=store,
        )
        starting = asyncio.create_task(session.start("write", key="order"))
        await gate.arrive()
        assert not starting.done()
        gate.opened.set()

    asyncio.run(main())
    execution_id = threaded_sim.runs[0].execution_id
    assert rows(url) == [("order", "started", execution_id, 1)]
    assert f"execution {execution_id} of workflow 'write' (key 'order')" in caplog.text


async def test_the_log_names_the_key_of_a_run_whose_outcome_nobody_gets(
    session: Session, sim: Simulator, caplog: Any
) -> None:
    """So that twenty of them can be matched with rows. A fan-out logs one line for all."""
    sim.add_workflow("slow", Scenario([SimNode("Answer", None, None, is_output_node=True)]))
    caplog.set_level(logging.WARNING)
    running = asyncio.create_task(session.run("slow", key="row 0"))
    while not polled(sim):
        await sim.wait_for_requests(sim.request_count + 1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert "(key 'row 0')" in caplog.text


# The rest


async def test_nothing_is_left(
    open_session: Callable[..., Session], sim: Simulator, flow: str, url: str, our_tasks: Any
) -> None:
    """The session closes what the store has opened; the store can be used by another one."""
    store = SQLStartStore(url)
    for _ in range(2):
        async with open_session(starts=store) as session:
            runs = [session.start(flow, INPUTS, key=f"{n % 5}") for n in range(20)]
            await asyncio.gather(*runs)
        assert our_tasks() == []
    assert posts(sim) == 5
    gc.collect()  # a connection that is open would warn


FORKED = """
import asyncio, os, sys
from promptlayer_exec import Session
from promptlayer_exec.starts import SQLStartStore

url, base_url, api_key = sys.argv[1:]
store = SQLStartStore(url)

async def start(*keys):
    async with Session(api_key, base_url=base_url, starts=store) as session:
        return [(await session.start("write", {"topic": "x"}, key=key)).id for key in keys]

(first,) = asyncio.run(start("parent"))
child = os.fork()
if not child:
    again, _ = asyncio.run(start("parent", "child"))
    os._exit(again != first)
assert os.waitpid(child, 0)[1] == 0
assert asyncio.run(start("parent"))[0] == first
asyncio.run(start("child"))
"""


def test_a_store_of_a_module_can_be_used_after_a_fork(threaded_sim: Simulator, url: str) -> None:
    """As in the workers of gunicorn that have loaded the app before."""
    threaded_sim.add_workflow("write", Scenario([SimNode("Answer", "42", is_output_node=True)]))
    arguments = [url, threaded_sim.base_url, threaded_sim.api_key]
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(threaded_sim.runs) == 2
