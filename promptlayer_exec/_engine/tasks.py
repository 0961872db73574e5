"""asyncio tasks and their cancellation, and timers that allow for a stopped event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

import anyio
import attrs

Run = Callable[[], Coroutine[Any, Any, None]]

# A cancellation that was suppressed is repeated after so many seconds, if somebody waits, ...
AGAIN = 1.0
# ... and after so many if it may be the clean-up of a user's code that takes so long.
CLEAN_UP = 10.0


def clock() -> float:
    """Return the time on the running loop's clock, in seconds."""
    return asyncio.get_running_loop().time()


class Tasks:
    """Tasks that never raise, not even `CancelledError`; a task group takes four times the memory.

    asyncio runs nothing of a task that is cancelled before its first step, not even its `finally`.
    Here, such a task begins all the same, and is cancelled at its first `await`, so that whatever
    waits for it learns that it has ended. So does a task that is cancelled in its last step: it
    must then find that its work is done.
    """

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], Run] = {}

    def start(self, run: Run, *, name: str) -> None:
        """Run a task until it ends by itself or is cancelled with the others."""
        task = asyncio.create_task(run(), name=name)
        self._tasks[task] = run
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        run = self._tasks.pop(task)
        if task.cancelled():
            self.start(partial(begin_cancelled, run), name=task.get_name())

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def ended(self) -> None:
        """Wait until all tasks have ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def ended_by_cancellation(self, again: float = AGAIN) -> None:
        """Wait, after `cancel`, until all tasks have ended; repeat it if they suppress it.

        It is repeated after `again` seconds. A cancellation of the waiting task changes nothing, so
        no scope around it may be cancelled that does not shield it.
        """
        repeat_at = clock() + again
        while self._tasks:
            with suppress(asyncio.CancelledError):
                await asyncio.wait(self._tasks, timeout=repeat_at - clock())
            if clock() >= repeat_at:
                self.cancel()
                repeat_at = clock() + again


async def begin_cancelled(run: Run) -> None:
    """Run what ends at its first `await`, because its task is cancelled."""
    cast("asyncio.Task[None]", asyncio.current_task()).cancel()
    try:
        await run()
    finally:
        await receive_cancellation()


async def receive_cancellation() -> None:
    """Receive a cancellation that waits for an `await`: a task that ends with it is cancelled."""
    if is_cancelled():
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)


# A timer this many seconds late may mean that the loop was stopped, as by a debugger or Ctrl-Z.
LATE = 0.002
# The seconds to spend on reading what arrived meanwhile, before the callback is called.
_SHORTEST_READ = 0.01
_LONGEST_READ = 1.0
# Rounding may let a timer fire a little early.
_EARLY = 0.001


class PatientTimer:
    """A timer that first lets the loop read what has arrived, if the loop was stopped.

    The callback is called at its time. If the loop is late, it is called after the same delay
    again, at least 10 ms and at most a second.

    Args:
        at: the time, on the running loop's clock; infinity: never.
        callback: called with `args`.
        loop: the running loop; to ask for it takes a system call on Python 3.11.
    """

    __slots__ = ("_at", "_fires_at", "_handle", "_loop")

    def __init__(
        self,
        at: float,
        callback: Callable[..., object],
        *args: Any,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._at = self._fires_at = at
        self._loop = loop or asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        if at < math.inf:
            # Kept by the handle alone: cancelling it frees them, before any garbage collection.
            self._handle = self._loop.call_at(at, self._fire, callback, *args)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _fire(self, callback: Callable[..., object], *args: Any) -> None:
        self._handle = None
        late = self._loop.time() - self._at
        if late >= LATE:
            delay = min(max(late, _SHORTEST_READ), _LONGEST_READ)
            self._handle = self._loop.call_later(delay, callback, *args)
        elif late > -_EARLY:
            callback(*args)
        else:
            self._fires_at = self._at
            self._handle = self._loop.call_at(self._at, self._fire, callback, *args)


class PatientTimeout(PatientTimer):
    """`asyncio.timeout_at` with a `PatientTimer`; enter it at once.

    If what runs within it suppresses the cancellation, it is cancelled again.

    Args:
        at: the time, on the running loop's clock; infinity: no limit.
        soonest: when the timer first looks at the time; until then, `end_by` costs nothing.
        loop: the running loop.
    """

    __slots__ = ("_cancellations", "_cancelling", "_is_expired", "_task")

    def __init__(
        self,
        at: float = math.inf,
        *,
        soonest: float = math.inf,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        # Without a limit there is no timer before `end_by`: ten thousand may wait for their turn.
        super().__init__(soonest if soonest < at < math.inf else at, self.expire, loop=loop)
        self._at = at
        self._task: asyncio.Task[Any]
        self._cancelling = 0  # what others had asked for before
        self._cancellations = 0
        self._is_expired = False

    async def __aenter__(self) -> Self:
        self._task = cast("asyncio.Task[Any]", asyncio.current_task(self._loop))
        self._cancelling = self._task.cancelling()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        self.cancel()
        if not self._cancellations:
            return
        for _ in range(self._cancellations):
            self._task.uncancel()
        is_ours = self._task.cancelling() <= self._cancelling
        if is_ours and isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error

    def end_by(self, at: float) -> None:
        """Expire at `at`, if that is sooner."""
        if at < self._at and not self._is_expired:
            self._at = at
            if self._handle is None or self._fires_at > at:
                self.cancel()
                self._fires_at = at
                self._handle = self._loop.call_at(at, self._fire, self.expire)

    def expire(self) -> None:
        """Expire now, unless it has expired already."""
        if not self._is_expired:
            self._is_expired = True
            self.cancel()
            # Not in this step: an answer may have woken the task already, and would be lost.
            self._handle = self._loop.call_later(0.0, self._cancel_task)

    def _cancel_task(self) -> None:
        self._cancellations += 1
        self._task.cancel()
        self._handle = self._loop.call_later(AGAIN, self._cancel_task)

    def expired(self) -> bool:
        return self._is_expired

    def check(self) -> None:
        """Raise `TimeoutError` if it has expired, even if the cancellation was suppressed."""
        if self._is_expired:
            raise TimeoutError

    def has_passed(self, at: float) -> bool:
        """Return True if a time has passed, for a timer."""
        return self._loop.time() - at > -_EARLY


class TaskTimeout(PatientTimeout):
    """The timeout of a part of a task of our own; a task that was cancelled does not enter it.

    What ran before may have suppressed the cancellation, as `asyncio.wait_for` does at times on
    Python 3.11.
    """

    __slots__ = ()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        if self._cancelling:
            self.cancel()
            # Raised here if it is still pending: a task that ends with it counts as cancelled.
            await asyncio.sleep(0)
            raise asyncio.CancelledError
        return self


@attrs.define(eq=False)
class TimeLimit:
    """Calls a function once some seconds have passed, with their number; pauses do not count."""

    _time_out: Callable[[float], None]
    _seconds: float = attrs.field(init=False, default=0.0)
    _remaining: float | None = attrs.field(init=False, default=None)
    _timer: asyncio.TimerHandle | None = attrs.field(init=False, default=None)
    _pauses: int = attrs.field(init=False, default=0)

    def set(self, seconds: float | None) -> None:
        """Begin to count, in place of what was set before; None: there is no limit."""
        self._hold()
        self._remaining, self._seconds = seconds, seconds or 0.0
        self._go_on()

    @contextmanager
    def paused(self) -> Iterator[Callable[[], None]]:
        """Stop counting until the yielded function is called, or the block ends."""
        is_paused = True

        def go_on() -> None:
            nonlocal is_paused
            if is_paused:
                is_paused = False
                self._pauses -= 1
                self._go_on()

        self._pauses += 1
        self._hold()
        try:
            yield go_on
        finally:
            go_on()

    def _hold(self) -> None:
        if self._timer is not None:
            self._remaining = max(self._timer.when() - clock(), 0.0)
            self._timer.cancel()
            self._timer = None

    def _go_on(self) -> None:
        if self._remaining is not None and not self._pauses:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._remaining, self._end)

    def _end(self) -> None:
        self._timer = self._remaining = None
        self._time_out(self._seconds)


async def wait_even_if_cancelled(future: asyncio.Future[Any], timeout: float | None = None) -> None:
    """Wait for a future for `timeout` seconds at most, and raise a cancellation afterwards."""
    waiting = asyncio.ensure_future(asyncio.wait([future], timeout=timeout))
    with anyio.CancelScope(shield=True):
        try:
            await asyncio.shield(waiting)
        finally:
            while not waiting.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.shield(waiting)


def resolve(future: asyncio.Future[None]) -> None:
    """Wake the task that awaits a future, unless it is done already."""
    if not future.done():
        future.set_result(None)


def is_cancelled() -> bool:
    """Return True if the current task was cancelled, not only something that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def foreign_cancellation(what: str, cause: BaseException) -> RuntimeError:
    """Return the error for a cancellation of something that a task awaited, not of the task."""
    error = RuntimeError(f"{what} awaited something that was cancelled")
    error.__cause__ = cause
    return error
