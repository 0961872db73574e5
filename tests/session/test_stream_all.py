"""Many executions followed in one loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from promptlayer_exec import (
    Execution,
    ExecutionTimeout,
    Forbidden,
    NotFound,
    Session,
    SessionClosed,
    Snapshot,
    StartRequest,
    Unauthorized,
    WatchEnded,
)
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

Events = AsyncGenerator[tuple[Execution, Snapshot], None]


def add(sim: Simulator, count: int) -> list[int]:
    """Add executions, the output node of each of which runs until `sim.finish` ends it."""
    scenario = Scenario([SimNode("Plan", "done"), SimNode("Answer", "42", None)])
    return [sim.add_execution(scenario) for _ in range(count)]


async def first_of_each(stream: Events, count: int) -> dict[int, Snapshot]:
    """Return the first snapshots of `count` executions."""
    seen: dict[int, Snapshot] = {}
    while len(seen) < count:
        execution, snapshot = await anext(stream)
        seen.setdefault(execution.id, snapshot)
    return seen


async def read(
    stream: Events, on_snapshot: Callable[[Snapshot], None] = lambda _: None
) -> tuple[list[Snapshot], Any]:
    """Return the snapshots of a stream, and the error in which it ended."""
    snapshots = []
    try:
        async with aclosing(stream):
            async for _, snapshot in stream:
                snapshots.append(snapshot)
                on_snapshot(snapshot)
    except Exception as error:  # noqa: BLE001 - it is what the test is about
        return snapshots, error
    return snapshots, None


async def test_each_execution_is_followed_to_its_end(sim: Simulator, session: Session) -> None:
    """Ids, their digits and handles count once each; every poll is yielded, the complete last."""
    one, two = add(sim, 2)
    handle = session.execution(one)
    polls: dict[int, list[tuple[int, bool]]] = {one: [], two: []}
    async with aclosing(session.stream_all([handle, one, str(two), two])) as stream:
        async for execution, snapshot in stream:
            assert execution.id == snapshot.execution_id
            polls[execution.id].append((snapshot.poll, snapshot.complete))
            if snapshot.poll == 3:
                sim.finish(execution.id, "Answer")
    assert list(polls.values()) == [[(1, False), (2, False), (3, False), (4, True)]] * 2
    assert sim.request_count == 8


async def test_it_shares_the_watches_of_others(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """No execution is polled twice, and leaving one reader leaves the watch to the other."""
    ids = add(sim, 3)
    async with aclosing(session.stream_all(ids)) as stream:
        await first_of_each(stream, 3)
        async with aclosing(session.stream_all(ids)) as late:
            await first_of_each(late, 3)
        for execution_id in ids:
            sim.finish(execution_id, "Answer")
        last = {execution.id: snapshot async for execution, snapshot in stream}
    assert all(snapshot.complete for snapshot in last.values())
    assert sim.request_count == sum(snapshot.poll for snapshot in last.values())
    assert len(recorder.of(WatchEnded)) == 3


async def test_leaving_early_ends_all_watches(
    sim: Simulator, session: Session, our_tasks: Callable[[], list[str]]
) -> None:
    """There is one task for each watch and none for each reader."""
    ids = add(sim, 3)
    async with aclosing(session.stream_all(ids)) as stream:
        await first_of_each(stream, 3)
        names = ["promptlayer_exec.Session", *(f"promptlayer_exec.Watch {one}" for one in ids)]
        assert our_tasks() == names
    await asyncio.sleep(0)
    assert our_tasks() == ["promptlayer_exec.Session"]


async def test_a_slow_reader_gets_the_latest(sim: Simulator, session: Session) -> None:
    """It skips what it missed, of each execution."""
    ids = add(sim, 2)
    async with aclosing(session.stream_all(ids)) as stream:
        await first_of_each(stream, 2)
        await sim.wait_for_requests(sim.request_count + 12)
        for execution_id in ids:
            sim.finish(execution_id, "Answer")
            await session.execution(execution_id).wait()
        rest = [snapshot async for _, snapshot in stream]
    assert [snapshot.complete for snapshot in rest] == [True, True]


async def test_an_execution_that_fails_does_not_end_the_others(
    sim: Simulator, session: Session, held: int
) -> None:
    """The errors are raised after the others; the second is a note of the first."""
    sim.inject(Fault.status(403, times=None, execution_id=78))

    def finish(snapshot: Snapshot) -> None:
        if snapshot.poll == 3:
            sim.finish(held, "Answer")

    snapshots, error = await read(session.stream_all([77, held, 78]), finish)
    assert snapshots[-1].complete
    assert isinstance(error, NotFound | Forbidden)
    (other,) = {77, 78} - {error.execution_id}
    (note,) = error.__notes__
    assert f"execution {other}" in note


async def test_an_error_follows_the_snapshot_that_a_slow_reader_missed(
    sim: Simulator, session: Session, held: int, recorder: Any
) -> None:
    """The reader is told of both, although the watch ended before it looked."""
    async with aclosing(session.stream_all([held])) as stream:
        await anext(stream)
        await sim.wait_for_requests(sim.request_count + 3)
        sim.inject(Fault.status(403))
        await recorder.next(WatchEnded)
        snapshots, error = await read(stream)
    assert isinstance(error, Forbidden)
    (missed,) = snapshots
    assert not missed.complete
    assert error.last_snapshot is not None


async def test_a_closed_session_ends_it(sim: Simulator, session: Session) -> None:
    """Closing ends all at once; afterwards nothing opens."""
    ids = add(sim, 3)
    async with aclosing(session.stream_all(ids)) as stream:
        await first_of_each(stream, 3)
        closing = asyncio.create_task(session.aclose())
        with pytest.raises(SessionClosed):
            async for _ in stream:
                pass
        await closing
    with pytest.raises(SessionClosed):
        await anext(session.stream_all(ids))


async def test_a_refused_key_ends_it(sim: Simulator, session: Session) -> None:
    """No other execution could be followed either."""
    ids = add(sim, 3)
    async with aclosing(session.stream_all(ids)) as stream:
        await first_of_each(stream, 3)
        sim.inject(Fault.status(401))
        with pytest.raises(Unauthorized):
            async for _ in stream:
                pass


async def test_one_deadline_holds_for_all(sim: Simulator, session: Session) -> None:
    """It passes for those that are not complete, also while no poll is answered."""
    done, held, stalled = add(sim, 3)
    sim.finish(done, "Answer")
    sim.inject(Fault.stall(times=None, execution_id=stalled))
    stream = session.stream_all([done, held, stalled], timeout=0.5)
    snapshots, error = await read(stream)
    assert [snapshot.execution_id for snapshot in snapshots if snapshot.complete] == [done]
    assert isinstance(error, ExecutionTimeout)
    assert len(error.__notes__) == 1


async def test_what_is_complete_needs_no_request(sim: Simulator, session: Session) -> None:
    """A handle that has the complete snapshot yields it, also among others that run."""
    done, held = add(sim, 2)
    sim.finish(done, "Answer")
    handle = session.execution(done)
    snapshot = await handle.wait()
    sent = sim.request_count
    assert [event async for event in session.stream_all([handle])] == [(handle, snapshot)]
    assert sim.request_count == sent
    async with aclosing(session.stream_all([held, handle])) as stream:
        assert await anext(stream) == (handle, snapshot)
        assert (await anext(stream))[0].id == held


async def test_nothing_is_followed_at_once(session: Session) -> None:
    """An empty list ends at once."""
    assert [event async for event in session.stream_all([])] == []


@pytest.mark.parametrize("items", [7, "1001", [True], [StartRequest("report")], [None]])
def test_unusable_items_are_refused(session: Session, items: Any) -> None:
    """The error comes from the call, before any I/O."""
    with pytest.raises(TypeError):
        session.stream_all(items)
