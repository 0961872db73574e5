"""The lifetime of an open session: everything that the session runs belongs to one task."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, TypeVar

from promptlayer_exec._values.errors import SessionClosed
from promptlayer_exec._values.policies import Deadline

T = TypeVar("T")

# Event loops hold their tasks weakly. Without these references, the garbage collector would destroy
# a session that nobody closed, before its loop could close it.
_supervisors: set[asyncio.Task[None]] = set()


class DeadlinePassed(Exception):
    """The deadline of a call passed."""


class Lifetime:
    """The supervisor task of an open session, and everything that runs in it.

    The supervisor waits for the session to close, so three different tasks may open, use and close
    it.
    """

    def __init__(self, resources: AsyncExitStack) -> None:
        self._loop = asyncio.get_running_loop()
        self._resources = resources
        self._closing = asyncio.Event()
        self._tasks: dict[asyncio.Task[Any], Callable[[], object]] = {}
        self._calls: dict[asyncio.Timeout, None] = {}
        self._calls_ended = asyncio.Event()
        self._supervisor = asyncio.create_task(self._supervise(), name="promptlayer_exec.Session")
        _supervisors.add(self._supervisor)
        self._supervisor.add_done_callback(self._ended)

    def _ended(self, supervisor: asyncio.Task[None]) -> None:
        _supervisors.discard(supervisor)
        self._closing.set()  # asyncio.run may have cancelled the task before its first step
        self._stop()

    def is_closing(self) -> bool:
        """Return True if closing has begun, or the event loop was closed."""
        return self._closing.is_set() or self._loop.is_closed()

    def has_lost_loop(self) -> bool:
        """Return True if the event loop was closed, and with it everything in this session."""
        return self._loop.is_closed()

    def check_open(self) -> None:
        """Raise `SessionClosed` if closing has begun, `RuntimeError` in another event loop."""
        self.check_loop()
        if self.is_closing():
            raise SessionClosed

    def check_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "this session is open in another event loop. Close it there first, or use one"
                " Session per event loop"
            )

    def spawn(
        self, work: Coroutine[Any, Any, T], *, name: str, cancel: Callable[[], object] | None = None
    ) -> asyncio.Task[T]:
        """Run a task until it finishes or the session closes.

        Closing calls `cancel`, by default the task's own, and then waits for the task.
        """
        task = asyncio.create_task(work, name=name)
        self._tasks[task] = cancel or task.cancel
        task.add_done_callback(self._tasks.pop)
        return task

    def call(self, deadline: Deadline) -> Call:
        """Return an async context manager that limits a call in the caller's own task.

        Its exit raises `DeadlinePassed` or `SessionClosed` if one of these stopped the call.
        """
        if self.is_closing():
            raise SessionClosed
        return Call(self, deadline)

    def close(self) -> None:
        """Begin to close: stop everything that runs."""
        if not self._has_ended():
            self.check_loop()
            self._closing.set()

    async def wait_closed(self) -> None:
        """Wait until everything has stopped. Any number of tasks may wait."""
        if not self._has_ended():
            self.check_loop()
            await asyncio.wait([self._supervisor])

    def _has_ended(self) -> bool:
        return self._supervisor.done() or self._loop.is_closed()

    async def _supervise(self) -> None:
        try:
            await self._closing.wait()
        finally:  # even if asyncio.run cancels every task when it exits
            self._closing.set()
            try:
                while self._tasks or self._calls:
                    self._stop()
                    if self._calls:
                        await self._calls_ended.wait()
                    if self._tasks:
                        await asyncio.wait(self._tasks)
            finally:
                await self._resources.aclose()

    def _stop(self) -> None:
        for timeout in self._calls:
            if not timeout.expired():
                timeout.reschedule(self._loop.time())
        for cancel in list(self._tasks.values()):
            cancel()

    def entered(self, timeout: asyncio.Timeout) -> None:
        self._calls[timeout] = None

    def left(self, timeout: asyncio.Timeout) -> None:
        self._calls.pop(timeout, None)
        if not self._calls and self._closing.is_set():
            self._calls_ended.set()


class Call:
    """A call in progress, which its deadline or closing the session stops."""

    def __init__(self, lifetime: Lifetime, deadline: Deadline) -> None:
        self._lifetime = lifetime
        self._timeout = asyncio.timeout_at(deadline.at if deadline.at < math.inf else None)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._lifetime.entered(self._timeout)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lifetime.left(self._timeout)
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise (SessionClosed if self._lifetime.is_closing() else DeadlinePassed) from None
