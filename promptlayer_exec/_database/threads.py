"""Threads that use a database: each writes many rows in one transaction."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary, ref

import attrs

R = TypeVar("R")
V = TypeVar("V")

# The most rows, and about the most bytes, in one transaction.
_MOST_ROWS = 500
_MOST_BYTES = 4 * 1024 * 1024
# Seconds for which a thread waits for more to do: to start one takes as long as a transaction.
_LINGER = 0.1


class _Waker:
    """Wakes waiting tasks of one event loop from threads.

    One callback of the loop wakes all that are due. Rows that were written together would otherwise
    need one each, and the thread and the loop would take turns with the GIL for each.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._lock = threading.Lock()
        self._due: list[asyncio.Event] = []

    def wake(self, done: asyncio.Event) -> None:
        """Set an event of the loop soon."""
        with self._lock:
            self._due.append(done)
            is_first = len(self._due) == 1

        loop = self._loop()
        if is_first and loop is not None:
            with suppress(RuntimeError):  # the loop is closed, so nobody is waiting
                loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        for done in due:
            done.set()


_wakers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker] = WeakKeyDictionary()


async def finished(future: Future[V]) -> V:
    """Wait for a thread's result, and return it. Cancelling stops only the waiting."""
    loop = asyncio.get_running_loop()
    waker = _wakers.get(loop)
    if waker is None:
        waker = _wakers[loop] = _Waker(loop)
    done = asyncio.Event()
    future.add_done_callback(lambda _: waker.wake(done))
    await done.wait()
    return future.result()


class OneThread:
    """Calls functions one after the other, in a thread that exits soon if it has nothing to do."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._is_running = False

    def submit(self, work: Callable[[], None]) -> None:
        """Call a function, which must not raise, after the waiting ones."""
        with self._changed:
            is_exiting = not threading.main_thread().is_alive()
            if not self._is_running and not is_exiting:
                # No daemon: the program must not exit before everything is written.
                threading.Thread(target=self._run, name="promptlayer-exec-rows").start()
                self._is_running = True
            if self._is_running:
                self._waiting.append(work)
                self._changed.notify()
                return
        work()  # the interpreter exits: since Python 3.12, no thread can start

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._changed.wait(_LINGER)
                if not self._waiting:
                    self._is_running = False
                    return
                work = self._waiting.popleft()
            work()


@attrs.define(eq=False)
class Group(Generic[R, V]):
    """Gathers rows while a thread writes others, and then writes them together.

    A transaction takes several round trips to the database, whether it has one row or a hundred.
    Rows may come from several event loops. Groups with the same thread take turns.

    Args:
        gather: how many seconds a row waits for others before their transaction. None: a fraction
            of the time that a transaction takes.
    """

    _write: Callable[[list[R]], Sequence[V]]  # returns a value for each row
    _size: Callable[[R], int] = attrs.field(default=lambda _: 200)  # bytes, roughly
    _thread: OneThread = attrs.field(factory=OneThread, kw_only=True)
    _gather: float | None = attrs.field(default=None, kw_only=True)
    _waiting: deque[tuple[R, Future[V]]] = attrs.field(init=False, factory=deque)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock)
    _is_writing: bool = attrs.field(init=False, default=False)
    _transaction_time: float = attrs.field(init=False, default=0.0)  # the latest one's, in seconds

    async def add(self, row: R) -> V:
        """Write the row, even if cancelled, and return its value."""
        return await finished(self.submit(row))

    def submit(self, row: R) -> Future[V]:
        """Return the future of the row's value. If cancelled in time, nothing writes the row."""
        written: Future[V] = Future()
        with self._lock:
            self._waiting.append((row, written))
            is_first, self._is_writing = not self._is_writing, True
        if is_first:
            try:
                self._thread.submit(self._run)
            except RuntimeError as error:  # no thread can start, as when the program exits
                for _, waiting in self._take():
                    waiting.set_exception(error)
                self._is_writing = False
        return written

    def _run(self) -> None:
        gather = self._gather
        if gather is None:
            # Rows of tasks that were woken together come within a moment of each other. Behind a
            # network, a transaction for the first of them alone would keep the others waiting.
            gather = min(self._transaction_time / 20, 0.005)
        time.sleep(gather)

        taken = self._take()
        if taken:
            began = time.perf_counter()
            self._write_together(taken)
            self._transaction_time = time.perf_counter() - began

        with self._lock:
            self._is_writing = bool(self._waiting)
            is_more = self._is_writing
        if is_more:  # after the other groups of the thread
            self._thread.submit(self._run)

    def _take(self) -> list[tuple[R, Future[V]]]:
        taken: list[tuple[R, Future[V]]] = []
        size = 0
        with self._lock:
            while self._waiting and len(taken) < _MOST_ROWS and size < _MOST_BYTES:
                row, written = self._waiting.popleft()
                if written.set_running_or_notify_cancel():
                    taken.append((row, written))
                    size += self._size(row)
        return taken

    def _write_together(self, taken: list[tuple[R, Future[V]]]) -> None:
        try:
            values = self._write([row for row, _ in taken])
        except BaseException as error:  # noqa: BLE001 - each caller gets it
            for _, written in taken:
                written.set_exception(error)
        else:
            for (_, written), value in zip(taken, values, strict=True):
                written.set_result(value)
