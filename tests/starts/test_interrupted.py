"""A start with a key, interrupted at every `await`: it is sent once, and no id is lost."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import attrs
import pytest

from promptlayer_exec import (
    Execution,
    PollPolicy,
    RequestRetried,
    RequestTimeout,
    RetryPolicy,
    Session,
    SessionClosed,
)
from promptlayer_exec._values.start_records import workflow_of
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.starts import SQLStartStore, StartClaim, StoredStart

DONE = Scenario([SimNode("Answer", "42", is_output_node=True)])
LONG = 20.0


class MemoryStore:
    """A store in memory, of which each method takes a few turns of the loop.

    Attributes:
        rows: what is recorded, by key.
    """

    def __init__(self) -> None:
        self.rows: dict[str, StoredStart] = {}

    async def find(self, key: str, *, patience: float = 0.0) -> StoredStart | None:
        """Return a row."""
        await turn(2)
        row = self.rows.get(key)
        await turn(2)
        return row

    async def claim(self, claim: StartClaim, *, patience: float = 0.0) -> StoredStart | None:
        """Add a row."""
        await turn(2)
        now = datetime.now(UTC)
        row = self.rows.setdefault(
            claim.key,
            StoredStart(
                key=claim.key,
                state="sending",
                execution_id=None,
                workflow=workflow_of(claim.request),
                attempts=1,
                created=now,
                updated=now,
                server=claim.server,
                request=claim.request,
                token=claim.token,
                age=0.0,
                replaceable=False,
            ),
        )
        await turn(2)
        return None if row.token == claim.token else row

    async def record(
        self, key: str, token: str, execution_id: int | None, *, patience: float = 0.0
    ) -> bool:
        """Change a row."""
        await turn(2)
        row = self.rows.get(key)
        if row is not None and row.token == token and row.state != "started":
            state: Any = "unknown" if execution_id is None else "started"
            row = self.rows[key] = attrs.evolve(row, state=state, execution_id=execution_id)
        await turn(2)
        return row is not None and row.execution_id == execution_id

    async def release(self, key: str, token: str, *, patience: float = 0.0) -> None:
        """Remove a row."""
        await turn(2)
        row = self.rows.get(key)
        if row is not None and row.token == token and row.state != "started":
            del self.rows[key]
        await turn(2)

    async def resolve(self, token: str, execution_id: int, *, patience: float = 0.0) -> bool:
        """Do nothing: no callback comes."""
        return False


async def turn(turns: int) -> None:
    """Let the loop turn a few times."""
    for _ in range(turns):
        await asyncio.sleep(0)


class Interrupted:
    """A start that runs in a task, to be interrupted."""

    def __init__(self, session: Session, key: str) -> None:
        self.session = session
        self.key = key
        self.scope = asyncio.timeout(None)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> Execution:
        async with self.scope:
            return await self.session.start("write", {"key": self.key}, key=self.key)

    async def outcome(self) -> Any:
        """Return the handle, or the error."""
        async with asyncio.timeout(LONG):
            (outcome,) = await asyncio.gather(self.task, return_exceptions=True)
        return outcome


async def cancel(start: Interrupted) -> None:
    """Cancel the task."""
    start.task.cancel()


async def time_out(start: Interrupted) -> None:
    """Let the `asyncio.timeout` around the start expire."""
    await turn(1)  # to be entered
    if not start.task.done():
        start.scope.reschedule(0.0)


async def close(start: Interrupted) -> None:
    """Close the session."""
    await start.session.aclose()


INTERRUPTIONS: dict[Callable[[Interrupted], Awaitable[None]], type[BaseException]] = {
    cancel: asyncio.CancelledError,
    time_out: TimeoutError,
    close: SessionClosed,
}
by_each_interruption = pytest.mark.parametrize(
    "interrupt", INTERRUPTIONS, ids=[interrupt.__name__ for interrupt in INTERRUPTIONS]
)


@pytest.fixture(
    params=[
        "plain tasks",
        pytest.param(
            "eager tasks",
            marks=pytest.mark.skipif(
                not hasattr(asyncio, "eager_task_factory"), reason="new in Python 3.12"
            ),
        ),
    ]
)
async def tasks(request: pytest.FixtureRequest) -> None:
    """Let the loop create plain or eager tasks."""
    if request.param == "eager tasks":
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)


def check(sim: Simulator, key: str, row: StoredStart | None, outcome: Any, log: str) -> None:
    """Check that a start was sent once at most, and that its id is known to somebody."""
    runs = [run.execution_id for run in sim.runs if run.inputs["key"] == key]
    assert len(runs) <= 1, "it was started twice"
    if row is not None:
        assert (row.state == "started") == (row.execution_id is not None)
        assert row.execution_id in {None, *runs}
        assert row.state != "sending", "nobody has recorded how it ended"
    for execution_id in runs:
        # None of the starts is lost here, so each id is recorded.
        assert row is not None
        assert row.execution_id == execution_id
        if not isinstance(outcome, Execution):
            assert f"execution {execution_id} of workflow 'write' (key {key!r})" in log
    if not runs:
        assert row is None, "what was not sent leaves no row"


async def repeat(session: Session, sim: Simulator, key: str) -> None:
    """Check that the next call with a key returns its one run."""
    run = await session.start("write", {"key": key}, key=key)
    assert [run.execution_id for run in sim.runs if run.inputs["key"] == key] == [run.id]


async def test_a_claim_that_takes_too_long_is_tried_again(
    open_session: Callable[..., Session], sim: Simulator, recorder: Any
) -> None:
    """`request_timeout` ends the attempt, which has sent nothing."""

    class Hanging(MemoryStore):
        claims = 0

        async def claim(self, claim: StartClaim, *, patience: float = 0.0) -> StoredStart | None:
            self.claims += 1
            if self.claims == 1:
                await asyncio.sleep(LONG)
            return await super().claim(claim, patience=patience)

    sim.add_workflow("write", DONE)
    store = Hanging()
    session = open_session(starts=store, request_timeout=0.5)
    run = await session.start("write", {}, key="order")
    assert store.claims == 2
    assert [type(event.error) for event in recorder.of(RequestRetried)] == [RequestTimeout]
    assert [run.execution_id for run in sim.runs] == [run.id]
    assert store.rows["order"].execution_id == run.id


@by_each_interruption
@pytest.mark.parametrize("weather", ["smooth", "refused"])
async def test_a_start_can_be_interrupted_at_every_await(
    open_session: Callable[..., Session],
    sim: Simulator,
    tasks: None,
    our_tasks: Any,
    *,
    caplog: pytest.LogCaptureFixture,
    weather: str,
    interrupt: Callable[[Interrupted], Awaitable[None]],
) -> None:
    """Every run is recorded; what was not sent leaves no row; the next call returns the one run."""
    sim.add_workflow("write", DONE)
    store = MemoryStore()
    later = open_session(starts=store)
    outcomes: list[Any] = []
    for count in range(4000):
        if weather == "refused":
            sim.inject(Fault.status(429, retry_after="0.000000001"), path="/run")
        retry = RetryPolicy(base=0.0)
        start = Interrupted(open_session(starts=store, retry=retry), f"row {count}")
        await turn(count)
        is_over = start.task.done()
        if not is_over:
            await interrupt(start)
            await turn(3)
            assert start.task.done(), "it was not released at once"
        outcomes.append(await start.outcome())
        await start.session.aclose()

        check(sim, start.key, store.rows.get(start.key), outcomes[-1], caplog.text)
        sim.clear_faults()
        await repeat(later, sim, start.key)
        caplog.clear()
        if is_over:
            break
    await later.aclose()
    assert our_tasks() == []
    errors = outcomes[:-1]
    assert isinstance(outcomes[-1], Execution)
    # The response may come at the same time as the interruption.
    assert {type(error) for error in errors} - {Execution} == {INTERRUPTIONS[interrupt]}
    assert len(errors) > 10
    gc.collect()  # anything left open would warn


def interrupted_by_the_end_of_its_loop(
    store: MemoryStore, sim: Simulator, key: str, count: int
) -> bool:
    """Start a run in a loop that ends after some turns; return True if it was done by then."""

    async def main() -> bool:
        if hasattr(asyncio, "eager_task_factory") and count % 2:
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        session = Session(
            sim.api_key,
            base_url=sim.base_url,
            starts=store,
            push=False,
            check_inputs=False,
            poll=PollPolicy.fixed(0.01),
        )
        starting = asyncio.create_task(session.start("write", {"key": key}, key=key))
        await turn(count)
        is_done = starting.done()
        if is_done:
            await session.aclose()
        return is_done

    return asyncio.run(main())


async def found(store: MemoryStore, key: str) -> StoredStart | None:
    """Return what is recorded for a key."""
    return await store.find(key)


def test_the_loop_may_end_at_every_await(threaded_sim: Simulator, caplog: Any, capfd: Any) -> None:
    """`asyncio.run` cancels every task, also those that record: the log has the id then."""
    threaded_sim.add_workflow("write", DONE)
    store = MemoryStore()
    states = set()
    for count in range(1, 4000):
        key = f"row {count}"
        is_done = interrupted_by_the_end_of_its_loop(store, threaded_sim, key, count)
        row = store.rows.get(key)
        runs = [run.execution_id for run in threaded_sim.runs if run.inputs["key"] == key]
        assert len(runs) <= 1
        for execution_id in runs:
            text = caplog.text + capfd.readouterr().err
            is_unknown = "may have started" in text and repr(key) in text
            is_recorded = row is not None and row.execution_id == execution_id
            assert is_recorded or is_unknown or f"execution {execution_id} " in text
            assert row is not None, "a run without a row"
        if row is not None:
            assert (row.state == "started") == (row.execution_id is not None)
            states.add(row.state)
        caplog.clear()
        if is_done:
            break
    else:
        raise AssertionError("it never ended by itself")
    assert "started" in states


POINTS = ["before find", "after find", "before claim", "after claim", "before record"]


@by_each_interruption
@pytest.mark.parametrize("point", [*POINTS, "after record", "response"])
async def test_a_start_can_be_interrupted_around_each_call_of_a_database(
    open_session: Callable[..., Session],
    sim: Simulator,
    url: str,
    tasks: None,
    *,
    caplog: pytest.LogCaptureFixture,
    point: str,
    interrupt: Callable[[Interrupted], Awaitable[None]],
) -> None:
    """Its thread may have written what the caller no longer waits for."""
    sim.add_workflow("write", DONE)
    reached, opened = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        reached.set()
        await opened.wait()

    async def answer_late(_: Any, answer: Any) -> Any:
        response = answer()
        await wait()
        return response

    if point == "response":
        sim.inject(Fault(answer_late), path="/run")
    store = Gated(SQLStartStore(url), point, wait)
    start = Interrupted(open_session(starts=store), "row")
    async with asyncio.timeout(LONG):
        await reached.wait()
    interrupting = asyncio.ensure_future(interrupt(start))
    await turn(20)
    opened.set()
    await interrupting
    outcome = await start.outcome()
    await start.session.aclose()
    assert isinstance(outcome, INTERRUPTIONS[interrupt])

    later = SQLStartStore(url)
    check(sim, "row", await later.find("row"), outcome, caplog.text)
    assert len(sim.runs) == (point in {"before record", "after record", "response"})
    await repeat(open_session(starts=later), sim, "row")


class Gated:
    """A store that waits at one point."""

    def __init__(
        self, store: SQLStartStore, point: str, wait: Callable[[], Awaitable[None]]
    ) -> None:
        self._store, self._point, self._wait = store, point, wait
        self.aclose = store.aclose

    def __getattr__(self, name: str) -> Any:
        """Return a method of the store."""

        async def call(*arguments: Any, **options: Any) -> Any:
            if self._point == f"before {name}":
                await self._wait()
            result = await getattr(self._store, name)(*arguments, **options)
            if self._point == f"after {name}":
                await self._wait()
            return result

        return call
