"""Tasks of asyncio, and what a cancellation means to one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self


def clock() -> float:
    """Return the time on the running loop's clock, in seconds."""
    return asyncio.get_running_loop().time()


class Tasks:
    """Tasks that never fail. In a task group, each would take four times the memory."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run a task until it ends by itself or is cancelled with the others."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Cancel all tasks that run."""
        for task in self._tasks:
            task.cancel()

    async def ended(self) -> None:
        """Wait until no task runs."""
        while self._tasks:
            await asyncio.wait(self._tasks)


# A timer this many seconds late shows that the loop stood still, as in a debugger or after Ctrl-Z.
_LATE = 0.05
# The most seconds in which to read what arrived meanwhile, before the timer's callback is called.
_LONGEST_READ = 1.0


class PatientTimer:
    """A timer that, where the loop stood still, lets the loop first read what has arrived.

    The callback is called at its time. If the loop is late by then, the callback waits for as long
    again, at most a second.

    Args:
        at: the time, on the running loop's clock.
        callback: called with `args`.
    """

    def __init__(self, at: float, callback: Callable[..., object], *args: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._at = at
        self._callback = callback
        self._args = args
        self._handle = self._loop.call_at(at, self._fire)

    def cancel(self) -> None:
        """Do not call the callback any more."""
        self._handle.cancel()

    def _fire(self) -> None:
        late = self._loop.time() - self._at
        if late < _LATE:
            self._callback(*self._args)
        else:
            pause = min(late, _LONGEST_READ)
            self._handle = self._loop.call_later(pause, self._callback, *self._args)


class PatientTimeout:
    """What `asyncio.timeout_at` is, on a `PatientTimer`; it can also be made to expire.

    Args:
        at: the time, on the running loop's clock; None: no limit.
    """

    def __init__(self, at: float | None) -> None:
        self._at = at
        self._timer: PatientTimer | None = None
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        if self._at is not None:
            self._timer = PatientTimer(self._at, self.expire)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(exc_type, exc, traceback)

    def expire(self) -> None:
        """Expire now, unless it has expired already."""
        if not self.expired():
            self._timeout.reschedule(0.0)

    def expired(self) -> bool:
        """Return True if it has expired."""
        return self._timeout.expired()


def resolve(future: asyncio.Future[None]) -> None:
    """Wake the task that awaits a future, unless it is done already."""
    if not future.done():
        future.set_result(None)


def is_cancelled() -> bool:
    """Return True if the present task was cancelled, and not only something that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def foreign_cancellation(what: str, cause: BaseException) -> RuntimeError:
    """Return the error for a cancellation of something that was awaited, not of the task itself."""
    error = RuntimeError(f"{what} awaited something that was cancelled")
    error.__cause__ = cause
    return error
