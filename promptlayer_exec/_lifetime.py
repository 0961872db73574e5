"""From opening to closing: what runs in a session's event loop, and how it all ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, cast

import anyio

from promptlayer_exec._errors import SessionClosed
from promptlayer_exec._policies import Deadline
from promptlayer_exec._tasks import Limit, Tasks, Timers, is_cancelled, stray

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

# The loop itself keeps no strong reference: without one, a session that is dropped unclosed would
# be torn apart by the garbage collector instead of being closed when the loop shuts down.
_supervisors: set[asyncio.Task[None]] = set()


class DeadlinePassed(Exception):
    """A call took longer than it was allowed."""


class Call(Limit):
    """What limits a call: its deadline, and the life of the session.

    `DeadlinePassed` or `SessionClosed` comes of it.
    """

    __slots__ = ("_lifetime",)

    def __init__(self, lifetime: Lifetime, timers: Timers, at: float | None) -> None:
        super().__init__(timers, at)
        self._lifetime = lifetime
        lifetime.begin(self)

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        is_over = self._leave(cls)
        self._lifetime.end(self)
        # A request may time out in the very turn in which the deadline passes.
        if is_over or (self.passed and cls is not None and issubclass(cls, TimeoutError)):
            raise (SessionClosed if self._lifetime.closing else DeadlinePassed) from None
        if cls is asyncio.CancelledError and not is_cancelled():
            raise stray("the call", cast(BaseException, error)) from error


class Lifetime:
    """One opening of a session, in the event loop that is running.

    All tasks live in a task group inside one supervisor task, or are awaited by it, so that whoever
    opens a session, uses it and closes it may be three different tasks.

    Args:
        resources: closed at the end, when nothing runs any more.
        timers: end its calls at their deadlines.
    """

    def __init__(self, resources: AsyncExitStack, timers: Timers) -> None:
        self._loop = timers.loop
        self._timers = timers
        self._resources = resources
        self._ready = anyio.Event()
        self._closing = anyio.Event()
        self._ended = anyio.Event()
        self._calls: set[Call] = set()
        self._calls_left = anyio.Event()
        self._tasks: TaskGroup
        self._watches = Tasks()
        supervisor = self._loop.create_task(self._supervise(), name="promptlayer_exec.Session")
        _supervisors.add(supervisor)
        supervisor.add_done_callback(_supervisors.discard)

    @property
    def closing(self) -> bool:
        """Whether the end has begun."""
        return self._closing.is_set() or self._loop.is_closed()

    async def ready(self) -> None:
        """Wait until tasks can be spawned.

        Raises:
            RuntimeError: another event loop is running.
            SessionClosed: the end has begun.
        """
        self._check_loop()
        if not self._ready.is_set():
            await self._ready.wait()
        if self.closing:
            raise SessionClosed

    def is_ready(self) -> bool:
        """Tell whether `ready` would return at once."""
        self._check_loop()
        return self._ready.is_set() and not self.closing

    def spawn(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a task until it ends by itself or the session is closed."""
        self._tasks.start_soon(run)

    def spawn_watch(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a watch likewise; it never fails, and may be one of ten thousand."""
        self._watches.start(run(), name="promptlayer_exec._watch.Watch.run")

    def call(self, deadline: Deadline) -> Call:
        """Return the limit of a call: the deadline, and the closing of the session."""
        return Call(self, self._timers, None if deadline.timeout is None else deadline.at)

    def begin(self, call: Call) -> None:
        """Take note of a call that has to end with the session."""
        self._calls.add(call)

    def end(self, call: Call) -> None:
        """Take note that a call has ended."""
        self._calls.discard(call)
        if not self._calls and self.closing:
            self._calls_left.set()

    def close(self) -> None:
        """Begin to end all that runs.

        Raises:
            RuntimeError: it runs in another event loop.
        """
        if not self._over():
            self._check_loop()
            self._closing.set()

    async def wait_closed(self) -> None:
        """Wait until nothing runs any more; any number of tasks may do so at once."""
        if not self._over():
            self._check_loop()
            await self._ended.wait()

    def _over(self) -> bool:
        return self._ended.is_set() or self._loop.is_closed()

    def _check_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "this session was opened in another event loop: close it there, enter it again if"
                " that loop has ended, or use one Session per loop"
            )

    async def _supervise(self) -> None:
        try:
            async with anyio.create_task_group() as self._tasks:
                self._ready.set()
                await self._closing.wait()
                self._release()  # at once: a task may have something to see to its end
                self._tasks.cancel_scope.cancel()
        finally:
            # Also where the loop shuts down without a close: asyncio.run cancels every task.
            self._closing.set()
            self._ready.set()
            try:
                self._release()
                if self._calls:
                    await self._calls_left.wait()
                await self._watches.ended()
                await self._resources.aclose()
            finally:
                self._ended.set()

    def _release(self) -> None:
        for call in self._calls:
            call.end()
        self._watches.cancel()
