"""asyncio tasks and their cancellation, and timers that allow for a stopped event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Self


def clock() -> float:
    """Return the time on the running loop's clock, in seconds."""
    return asyncio.get_running_loop().time()


class Tasks:
    """Tasks that never raise. In a task group, each would take four times the memory."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run a task until it ends by itself or is cancelled with the others."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def ended(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)


# A timer this many seconds late means that the loop was stopped, as by a debugger or Ctrl-Z.
_LATE = 0.05
# The most seconds to spend on reading what arrived meanwhile, before the callback is called.
_LONGEST_READ = 1.0


class PatientTimer:
    """A timer that first lets the loop read what has arrived, if the loop was stopped.

    The callback is called at its time. If the loop is late, it is called after the same delay
    again, at most a second.

    Args:
        at: the time, on the running loop's clock; None: never.
        callback: called with `args`.
    """

    __slots__ = ("_handle", "_loop")

    def __init__(self, at: float | None, callback: Callable[..., object], *args: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        if at is not None:
            # Kept by the handle alone: cancelling it frees them, before any garbage collection.
            self._handle = self._loop.call_at(at, self._fire, at, callback, *args)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _fire(self, at: float, callback: Callable[..., object], *args: Any) -> None:
        late = self._loop.time() - at
        if late < _LATE:
            self._handle = None
            callback(*args)
        else:
            self._handle = self._loop.call_later(min(late, _LONGEST_READ), callback, *args)


class PatientTimeout:
    """`asyncio.timeout_at` with a `PatientTimer`; `expire` ends it early.

    Args:
        at: the time, on the running loop's clock; None: no limit.
    """

    __slots__ = ("_at", "_timeout", "_timer")

    def __init__(self, at: float | None) -> None:
        self._at = at
        self._timer: PatientTimer
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._timer = PatientTimer(self._at, self.expire)
        return self

    async def __aexit__(self, *exc_info: Any) -> None:  # noqa: PYI036 - handed on
        self._timer.cancel()
        await self._timeout.__aexit__(*exc_info)

    def expire(self) -> None:
        """Expire now, unless it has expired already."""
        if not self.expired():
            self._timeout.reschedule(0.0)

    def expired(self) -> bool:
        return self._timeout.expired()


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
