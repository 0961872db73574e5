"""Timers by the thousand, and the limits that are made of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptlayer_exec._tasks import Limit, Tasks, Timers


class Handle:
    """A timer of the loop's."""

    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.at = at
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        """Call it off."""
        self.cancelled = True


class Loop:
    """An event loop of which there is only the clock, and that is set by the test."""

    def __init__(self) -> None:
        self.now = 100.0
        self.handles: list[Handle] = []

    def time(self) -> float:
        """Return the time."""
        return self.now

    def call_at(self, at: float, callback: Callable[[], None], *, context: Context) -> Handle:
        """Take note of a timer."""
        self.handles.append(Handle(at, callback))
        return self.handles[-1]

    def waiting(self) -> list[Handle]:
        """Return the timers that may still ring."""
        self.handles = [handle for handle in self.handles if not handle.cancelled]
        return self.handles

    def advance(self, seconds: float) -> None:
        """Let time pass, and what is due happen, once."""
        self.now += seconds
        for handle in [handle for handle in self.waiting() if handle.at <= self.now]:
            self.handles.remove(handle)
            handle.callback()


@pytest.fixture
async def loop() -> Loop:
    """Return a loop in virtual time."""
    return Loop()


def timers_on(loop: Loop) -> Timers:
    """Return timers on another loop than the running one."""
    timers = Timers()
    timers.loop = loop  # type: ignore[assignment]
    return timers


STEPS = st.lists(
    st.tuples(st.just("set"), st.integers(-2, 20))
    | st.tuples(st.just("cancel"), st.integers(0, 30))
    | st.tuples(st.just("advance"), st.integers(0, 8)),
    max_size=60,
)


@given(STEPS)
def test_each_timer_rings_at_its_time_unless_it_was_cancelled(steps: list[tuple[str, int]]) -> None:
    """In the order of their times, and of being set where these are equal; never twice."""

    def ring(which: int) -> None:
        rang.append(which)

    rang: list[int] = []

    async def follow() -> None:
        loop = Loop()
        timers = timers_on(loop)
        made: list[Any] = []
        pending: dict[int, float] = {}
        for step, number in steps:
            if step == "set":
                at = loop.now + number
                pending[len(made)] = at
                made.append(timers.call_at(at, partial(ring, len(made))))
            elif step == "cancel" and made:
                timers.cancel(made[number % len(made)])
                pending.pop(number % len(made), None)
            elif step == "advance":
                loop.advance(number)
                due = [which for which, at in pending.items() if at <= loop.now]
                assert rang == sorted(due, key=pending.__getitem__)
                rang.clear()
                for which in due:
                    del pending[which]
            assert len(loop.waiting()) <= 1
            assert not pending or loop.waiting()[0].at <= min(pending.values())

    asyncio.run(follow())


async def test_cancelled_timers_do_not_pile_up(loop: Loop) -> None:
    """As those of calls do, of which hardly one passes."""
    timers = timers_on(loop)
    stays = timers.call_at(1000.0, lambda: None)
    for number in range(10_000):
        timers.cancel(timers.call_at(500.0 + number, lambda: None))
    assert len(timers._heap) < 250
    assert stays in timers._heap


async def test_nothing_of_closed_timers_stays_in_the_loop(loop: Loop) -> None:
    """The loop may go on for long."""
    timers = timers_on(loop)
    timers.call_at(500.0, lambda: None)
    timers.close()
    assert loop.waiting() == []
    Timers().close()  # also where there was none


async def test_sleeping_until_a_time_that_has_passed_lets_others_run() -> None:
    """A loop around it is to starve nobody."""
    timers = Timers()
    ran: list[int] = []
    asyncio.get_running_loop().call_soon(ran.append, 1)
    await timers.sleep_until(timers.loop.time() - 1.0)
    assert ran == [1]
    assert timers._heap == []


async def test_sleeping_ends_at_its_time() -> None:
    """And a sleep that is cancelled leaves no timer."""
    timers = Timers()
    at = timers.loop.time() + 0.001
    await timers.sleep_until(at)
    assert timers.loop.time() >= at
    sleep = asyncio.create_task(timers.sleep_until(at + 1000.0))
    await asyncio.sleep(0)
    sleep.cancel()
    await asyncio.wait([sleep])
    assert timers._cancelled == len(timers._heap) == 1
    timers.close()


async def test_a_limit_that_passes_is_a_timeout_error() -> None:
    """And no cancellation is left of it."""
    timers = Timers()
    with pytest.raises(TimeoutError), Limit(timers, timers.loop.time()):
        await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    timers.close()


async def within(limits: list[Limit]) -> str:
    """Wait for ever within two limits, and tell which of them passed."""
    outer, inner = limits
    try:
        with outer:
            try:
                with inner:
                    await asyncio.Event().wait()
            except TimeoutError:
                return "inner"
    except TimeoutError:
        return "outer"
    raise AssertionError


@pytest.mark.parametrize(
    ("passing", "told"), [([0], "outer"), ([1], "inner"), ([0, 1], "outer"), ([1, 0], "outer")]
)
async def test_of_nested_limits_the_one_that_passes_is_told(passing: list[int], told: str) -> None:
    """The outer one, where both pass in one turn; to pass twice is to pass once."""
    timers = Timers()
    limits: list[Limit] = []

    async def wait() -> str:
        limits.extend(Limit(timers, None) for _ in range(2))
        return await within(limits)

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    for number in passing * 2:
        limits[number].end()
    assert await waiting == told
    assert waiting.cancelling() == 0


async def test_who_is_cancelled_as_a_limit_passes_is_cancelled() -> None:
    """In the same turn, both are true, and to be cancelled is the more."""
    timers = Timers()
    limits: list[Limit] = []

    async def wait() -> None:
        limits.append(Limit(timers, None))
        with limits[0]:
            await asyncio.Event().wait()

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    limits[0].end()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()


async def test_a_loop_that_rings_too_early_is_not_kept_busy(loop: Loop) -> None:
    """One that counts whole milliseconds would ring on and on until the present one is over."""
    timers = timers_on(loop)
    rang: list[float] = []
    timers.call_at(100.0004, lambda: rang.append(loop.now))
    (alarm,) = loop.waiting()
    loop.handles.clear()
    alarm.callback()
    (alarm,) = loop.waiting()
    assert alarm.at == pytest.approx(100.001)
    loop.advance(0.001)
    assert len(rang) == 1


async def test_closed_timers_can_still_be_set(loop: Loop) -> None:
    """Whatever comes late must not wait for ever."""
    timers = timers_on(loop)
    timers.call_at(500.0, lambda: None)
    timers.close()
    rang: list[float] = []
    timers.call_at(600.0, lambda: rang.append(loop.now))
    loop.advance(500.0)
    assert rang == [600.0]


def test_timers_of_two_threads_do_not_meet() -> None:
    """Each has its context: to enter one that another thread is in fails, and rings never again."""

    async def make() -> tuple[Context, Context]:
        return Timers()._context, Tasks()._context

    contexts = {id(context): context for _ in range(2) for context in asyncio.run(make())}
    assert len(contexts) == 2 * 2
