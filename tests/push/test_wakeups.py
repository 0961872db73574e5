"""Wake-ups: whoever knows that an execution has changed can have it polled now."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from promptlayer_exec import Polled, PollPolicy, Session, SessionClosed, WatchWoken, _integration
from promptlayer_exec._engine.expiring import ExpiringDict
from promptlayer_exec.simulator import Fault, Simulator

NEVER = PollPolicy.fixed(3600.0)


async def test_a_wake_up_polls_at_once(
    sim: Simulator, open_session: Callable[..., Session], held: int, recorder: Any
) -> None:
    """A sleeping watch polls when it is woken, not an hour later, and says what woke it."""
    session = open_session(poll=NEVER)
    async with aclosing(session.execution(held).stream()) as snapshots:
        await anext(snapshots)
        sim.finish(held, "Answer")
        assert session.wake(held) is True
        assert (await anext(snapshots)).complete
    assert sim.request_count == 2
    assert recorder.of(WatchWoken) == [WatchWoken(held, "caller")]
    assert recorder.of(Polled)[-1].lateness < 1.0
    assert isinstance(recorder.events[-3], WatchWoken)  # before the poll that it caused


async def test_ten_thousand_wake_ups_cost_one_poll_in_flight(
    sim: Simulator, open_session: Callable[..., Session], held: int, recorder: Any
) -> None:
    """During a poll they lead to one more; while the watch sleeps, to one."""
    session = open_session(poll=NEVER)
    async with aclosing(session.execution(held).stream()) as snapshots:
        await anext(snapshots)
        for _ in range(10_000):
            session.wake(held)
        await anext(snapshots)
        assert sim.request_count == 2
        sim.finish(held, "Answer")
        sim.inject(Fault.delay(0.05))
        for _ in range(10_000):
            session.wake(held)
        assert (await anext(snapshots)).complete
    assert sim.request_count == 3
    assert len(recorder.of(WatchWoken)) == 2


async def test_wake_ups_that_find_nothing_new_poll_no_faster_than_the_floor(
    sim: Simulator, open_session: Callable[..., Session], held: int, recorder: Any
) -> None:
    """The first polls at once; after that, a flood of them keeps to the policy's floor."""
    session = open_session(poll=PollPolicy(floor=0.05, ceiling=3600.0, jitter=0.0))
    async with aclosing(session.execution(held).stream()) as snapshots:
        await anext(snapshots)
        started = asyncio.get_running_loop().time()
        for _ in range(4):
            session.wake(held)
            await anext(snapshots)
        assert asyncio.get_running_loop().time() - started >= 3 * 0.05
    assert len(recorder.of(WatchWoken)) == 4


async def test_a_wake_up_does_not_come_before_the_time_that_the_server_asked_to_wait(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """Retry-After on a good answer is a floor for woken polls, too."""
    session = open_session(poll=NEVER)
    sim.inject(Fault.status(202, retry_after=0.2, body=b"{}"))
    async with aclosing(session.execution(held).stream()) as snapshots:
        await anext(snapshots)
        sim.finish(held, "Answer")
        session.wake(held)
        assert (await anext(snapshots)).complete
    first, second = sim.requests
    assert second.at - first.at >= 0.2


async def test_a_wake_up_that_nobody_waits_for_is_remembered(
    session: Session, sim: Simulator, held: int, recorder: Any
) -> None:
    """It says False, and wakes the watch that begins later; only once."""
    assert session.wake(held) is False
    sim.finish(held, "Answer")
    await session.execution(held).wait()
    await session.execution(held).wait()
    assert recorder.of(WatchWoken) == [WatchWoken(held, "caller")]
    assert session.wake(held) is False


async def test_a_wake_up_before_the_session_is_open_is_remembered(
    open_session: Callable[..., Session], sim: Simulator, held: int, recorder: Any
) -> None:
    """It needs no event loop either, as nothing is polled yet."""
    session = open_session()
    sim.finish(held, "Answer")
    thread = threading.Thread(target=session.wake, args=[held])
    thread.start()
    thread.join()
    await session.execution(held).wait()
    assert recorder.of(WatchWoken) == [WatchWoken(held, "caller")]


async def test_an_open_session_is_woken_in_its_own_loop_only(session: Session, held: int) -> None:
    """A call from another thread is an error there, not a poll that is lost."""
    await session.execution(held).snapshot()
    with pytest.raises(RuntimeError, match="no running event loop"):
        await asyncio.to_thread(session.wake, held)


async def test_a_closed_session_cannot_be_woken(session: Session, held: int) -> None:
    """The error has the id, so that a webhook's handler can say which execution it was for."""
    await session.execution(held).snapshot()
    await session.aclose()
    with pytest.raises(SessionClosed) as caught:
        session.wake(held)
    assert caught.value.execution_id == held


async def test_integrations_say_what_woke_a_watch(
    session: Session, sim: Simulator, held: int, recorder: Any
) -> None:
    """The seam takes the source; before anybody follows, the last one counts."""
    _integration.wake(session, held, "webhook")
    _integration.wake(session, held, "callback")
    sim.finish(held, "Answer")
    await session.execution(held).wait()
    assert recorder.of(WatchWoken) == [WatchWoken(held, "callback")]


def test_the_latest_ten_thousand_entries_are_remembered() -> None:
    """The oldest is forgotten first; one that is added again counts as new."""
    recent: ExpiringDict[int, str] = ExpiringDict()
    for key in range(1, 10_001):
        recent.add(key, "push")
    recent.add(1, "webhook")
    recent.add(10_001, "push")
    assert [recent.pop(key) for key in (2, 1, 1, 10_001)] == [None, "webhook", None, "push"]


def test_an_entry_is_remembered_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wake-up for ten minutes; after that, the execution is polled by the schedule alone."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    recent: ExpiringDict[int, str] = ExpiringDict(600.0)
    recent.add(1, "push")
    now += 599.0
    assert recent.get(1) == "push"
    now += 1.0
    assert recent.get(1) is None
