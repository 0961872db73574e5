"""The lifetime of an open session: its supervisor task and all tasks in its event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from promptlayer_exec._engine.tasks import (
    LATE,
    PatientTimeout,
    Run,
    Tasks,
    begin_cancelled,
    foreign_cancellation,
    is_cancelled,
    receive_cancellation,
)
from promptlayer_exec._errors import SessionClosed
from promptlayer_exec._policies import Deadline

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

# Event loops hold their tasks weakly: without these references, the garbage collector would destroy
# an unclosed session, and the shutdown of the loop could not close it.
_supervisors = Tasks()


class DeadlinePassed(Exception):
    """The deadline of a call passed."""


class Lifetime:
    """The supervisor of an open session, in the running event loop.

    All tasks run in a task group inside one supervisor task, or are awaited by it, so that a
    session may be opened, used and closed by three different tasks.
    """

    def __init__(self, resources: AsyncExitStack) -> None:
        self._loop = asyncio.get_running_loop()
        self._resources = resources
        self._ready = asyncio.Event()
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()
        # In order: of those that wait for a slot, the first to end is then the first in its queue.
        self.calls: dict[PatientTimeout, None] = {}
        self._calls_ended = asyncio.Event()
        self._tasks: TaskGroup
        self._not_begun: dict[Run, Coroutine[Any, Any, None]] = {}
        self._others = Tasks()  # outside of the group
        _supervisors.start(self._supervise, name="promptlayer_exec.Session")

    def is_closing(self) -> bool:
        """Return True if closing has begun, or the event loop is closed."""
        return self._closing.is_set() or self._loop.is_closed()

    async def ready(self) -> None:
        """Wait until tasks can be started.

        Raises:
            RuntimeError: another event loop is running.
            SessionClosed: closing has begun.
        """
        self.check_loop()
        if not self._ready.is_set():
            await self._ready.wait()
        if self.is_closing():
            raise SessionClosed

    def is_ready(self) -> bool:
        """Return True if `ready` would return at once."""
        self.check_loop()
        return self._ready.is_set() and not self.is_closing()

    def spawn(self, run: Run) -> None:
        """Run a task until it ends by itself or the session is closed."""
        work = self._not_begun[run] = self._run(run)
        self._tasks.start_soon(lambda: work, name="promptlayer_exec.Session.spawn")

    async def _run(self, run: Run) -> None:
        self._not_begun.pop(run, None)
        # What is raised in the task group ends all other tasks, and the session.
        try:
            await run()
        except asyncio.CancelledError:
            pass
        except Exception as error:  # noqa: BLE001 - handed on
            message = "a task of promptlayer_exec failed"
            self._loop.call_exception_handler({"message": message, "exception": error})
        except (KeyboardInterrupt, SystemExit) as interrupt:
            self._loop.call_soon(_raise, interrupt)
        finally:
            await receive_cancellation()

    def spawn_watch(self, run: Run) -> None:
        """Run a watch in the same way, but cheaper: there may be ten thousand."""
        self._others.start(run, name="promptlayer_exec._engine.watch.Watch.run")

    def timeout(self, deadline: Deadline, *, soonest: float = math.inf) -> PatientTimeout:
        """Return a timeout for a part of a call, which the closing of the session ends, too.

        Leaving it raises `DeadlinePassed` or `SessionClosed` if that is why it expired, and
        `TimeoutError` if its `end_by` is.

        Raises:
            SessionClosed: closing has begun.
            DeadlinePassed: the deadline has passed a while ago.
        """
        return _CallTimeout(self, deadline, soonest)

    def left(self, timeout: PatientTimeout) -> None:
        """Forget the timeout of a part of a call that has ended."""
        self.calls.pop(timeout, None)
        if not self.calls and self._closing.is_set():
            self._calls_ended.set()

    def close(self) -> None:
        """Begin closing: end everything that runs.

        Raises:
            RuntimeError: the session is open in another event loop.
        """
        if not self._has_ended():
            self.check_loop()
            self._closing.set()

    async def wait_closed(self) -> None:
        """Wait until everything has ended; any number of tasks may wait at once."""
        if not self._has_ended():
            self.check_loop()
            await self._ended.wait()

    def _has_ended(self) -> bool:
        return self._ended.is_set() or self._loop.is_closed()

    def check_loop(self) -> None:
        """Raise a `RuntimeError` if another event loop is running."""
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "this session is open in another event loop: close it there, enter it again once"
                " that loop has ended, or use one Session per loop"
            )

    async def _supervise(self) -> None:
        try:
            async with anyio.create_task_group() as self._tasks:
                self._ready.set()
                try:
                    await self._closing.wait()
                finally:  # also when asyncio.run cancels every task, as the loop shuts down
                    self._closing.set()
                    self._stop()  # before the group's own tasks, which may depend on it
                    self._tasks.cancel_scope.cancel()
        except asyncio.CancelledError:
            pass
        finally:
            try:
                for run, never_awaited in list(self._not_begun.items()):
                    never_awaited.close()
                    begin = partial(begin_cancelled, partial(self._run, run))
                    self._others.start(begin, name="promptlayer_exec.Session.spawn")
                while self.calls:
                    with suppress(asyncio.CancelledError):
                        await self._calls_ended.wait()
                await self._others.ended_by_cancellation()
                with suppress(asyncio.CancelledError):
                    await self._resources.aclose()
            finally:
                self._ended.set()

    def _stop(self) -> None:
        for limit in self.calls:
            limit.expire()
        self._others.cancel()


def _raise(error: BaseException) -> None:
    raise error


class _CallTimeout(PatientTimeout):
    """The timeout of a part of a call, as `Lifetime.timeout` describes it."""

    __slots__ = ("_deadline", "_lifetime")

    def __init__(self, lifetime: Lifetime, deadline: Deadline, soonest: float) -> None:
        if lifetime.is_closing():
            raise SessionClosed
        # A timer set so far in the past counts as late, and would give each part more time.
        if lifetime._loop.time() - deadline.at >= LATE:
            raise DeadlinePassed
        super().__init__(deadline.at, soonest=soonest, loop=lifetime._loop)
        self._deadline = deadline
        self._lifetime = lifetime
        lifetime.calls[self] = None

    def _leave(self, error: BaseException | None) -> None:
        self._lifetime.left(self)
        if error is None:
            super()._leave(None)
            return
        is_cancellation = isinstance(error, asyncio.CancelledError)
        foreign = error if is_cancellation and not is_cancelled() else None
        try:
            super()._leave(error)
        except TimeoutError:
            self._raise_if_over()
            raise
        if foreign is not None:
            raise foreign_cancellation("the call", foreign) from foreign
        # A request may time out in the same loop step in which the deadline passes.
        if isinstance(error, TimeoutError) and self.expired():
            self._raise_if_over()

    def _raise_if_over(self) -> None:
        if self._lifetime.is_closing():
            raise SessionClosed from None
        if self.has_passed(self._deadline.at):
            raise DeadlinePassed from None
