"""Plain asyncio tasks by the thousand, and what a cancellation means to one of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any, cast


def clock() -> float:
    """Return the time on the running loop's clock, in seconds: a tenth of what anyio's takes."""
    return asyncio.get_running_loop().time()


# Seconds between rings: an event loop that counts whole milliseconds may ring a little too early,
# and would do so until the present one is over.
_TICK = 0.001

Timer = list[Any]  # when it is due, a number that breaks ties, and the callback until it is over


class Timers:
    """Any number of timers on one of the running loop's, which take several times as long each."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        # Nobody else's: one context cannot be entered by two threads at a time.
        self._context = Context()
        self._heap: list[Timer] = []
        self._numbers = count()
        self._cancelled = 0  # how many in the heap are
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = math.inf

    def call_at(self, at: float, callback: Callable[[], object]) -> Timer:
        """Call `callback`, which must not raise, at a time on the loop's clock."""
        timer = [at, next(self._numbers), callback]
        heappush(self._heap, timer)
        if at < self._alarm_at:
            self._set_alarm(at)
        return timer

    def cancel(self, timer: Timer) -> None:
        """Call a timer off, if it is not over."""
        if timer[2] is None:
            return
        timer[2] = None
        self._cancelled += 1
        if self._cancelled > 100 and self._cancelled > len(self._heap) / 2:
            self._heap = [timer for timer in self._heap if timer[2] is not None]
            heapify(self._heap)
            self._cancelled = 0

    async def sleep_until(self, at: float) -> None:
        """Sleep until a time on the loop's clock."""
        if at <= self.loop.time():
            await asyncio.sleep(0)
            return
        future = self.loop.create_future()
        timer = self.call_at(at, partial(resolve, future))
        try:
            await future
        finally:
            self.cancel(timer)

    def close(self) -> None:
        """Leave nothing in the loop."""
        self._heap.clear()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm_at = math.inf

    def _set_alarm(self, at: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self.loop.call_at(at, self._ring, context=self._context)
        self._alarm_at = at

    def _ring(self) -> None:
        self._alarm_at = math.inf
        now = self.loop.time()
        while self._heap and self._heap[0][0] <= now:
            timer = heappop(self._heap)
            callback, timer[2] = timer[2], None
            if callback is None:
                self._cancelled -= 1
            else:
                callback()
        if self._heap and self._heap[0][0] < self._alarm_at:
            self._set_alarm(max(self._heap[0][0], now + _TICK))


def resolve(future: asyncio.Future[None]) -> None:
    """Wake whoever awaits a future, if it was not done before."""
    if not future.done():
        future.set_result(None)


class Limit:
    """A timeout for the present task, which can also be made to pass: `TimeoutError` comes of it.

    It does what `asyncio.timeout_at` does, at a fraction of the cost. It begins when it is made:
    make it where it is entered.

    Args:
        timers: those of the running loop.
        at: when it passes, on the loop's clock; None: not by itself.
    """

    __slots__ = ("_before", "_task", "_timer", "_timers", "passed")

    def __init__(self, timers: Timers, at: float | None) -> None:
        self._task = cast("asyncio.Task[Any]", asyncio.current_task(timers.loop))
        self._before = self._task.cancelling()
        self._timers = timers
        self._timer = None if at is None else timers.call_at(at, self.end)
        self.passed = False

    def end(self) -> None:
        """Let it pass now."""
        if not self.passed:
            self.passed = True
            self._task.cancel()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        if self._leave(cls):
            raise TimeoutError from error

    def _leave(self, cls: type[BaseException] | None) -> bool:
        """Tell whether what comes out of it, an exception of that class, is its own doing."""
        if self._timer is not None:
            self._timers.cancel(self._timer)
        if not self.passed:
            return False
        return self._task.uncancel() <= self._before and cls is asyncio.CancelledError


class Tasks:
    """Tasks that never fail: not in a task group, where each takes four times the memory."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = Context()  # where each of ten thousand tasks would copy its own

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run a task until it ends by itself or is cancelled with the others."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard, context=self._context)

    def cancel(self) -> None:
        """Cancel all that run."""
        for task in self._tasks:
            task.cancel()

    async def ended(self) -> None:
        """Wait until none runs any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)


def is_cancelled() -> bool:
    """Tell whether the present task was cancelled, and not just something that it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def stray(what: str, cause: BaseException) -> RuntimeError:
    """Return the error for a cancellation of something that was awaited."""
    error = RuntimeError(f"something that {what} awaited was cancelled")
    error.__cause__ = cause
    return error
