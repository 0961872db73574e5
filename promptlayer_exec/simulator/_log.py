"""Logs of requests and posts, and waiting for a number of entries."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Generic, TypeVar

import attrs

T = TypeVar("T")


@attrs.frozen
class SimRequest:
    """One request as the simulator saw it.

    Attributes:
        method: the HTTP method.
        path: the path as the client sent it: percent-encoded, without the query.
        query: the decoded query parameters, as a `multidict`. `getall` returns repeated ones.
        headers: the headers. Their names are case-insensitive.
        body: the body.
        at: seconds since the simulator was created.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    at: float


@attrs.define(eq=False)
class Log(Generic[T]):
    """Counts entries, keeps them if `keep`, and wakes the callers that wait for a number of them.

    `what` names the entries in errors. One thread records them. Any thread may read and wait.
    """

    _what: str
    _keep: bool = True
    _on_record: Callable[[T], None] | None = None
    count: int = attrs.field(default=0, init=False)
    entries: list[T] = attrs.field(factory=list, init=False)
    _waiters: list[tuple[int, Callable[[], object]]] = attrs.field(factory=list, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def record(self, entry: T) -> None:
        with self._lock:
            self.count += 1
            if self._keep:
                self.entries.append(entry)
            for count, wake in self._waiters:
                if count <= self.count:
                    wake()
        if self._on_record is not None:
            self._on_record(entry)

    async def wait(self, count: int, timeout: float) -> None:
        reached = asyncio.Event()
        loop = asyncio.get_running_loop()
        waiter = (count, partial(loop.call_soon_threadsafe, reached.set))

        with self._lock:
            if count <= self.count:
                return
            self._waiters.append(waiter)

        try:
            async with asyncio.timeout(timeout):
                await reached.wait()
        except TimeoutError:
            seen = f"saw {self.count} of {count} {self._what} in {timeout} s"
            raise TimeoutError(seen) from None
        finally:
            with self._lock:
                self._waiters.remove(waiter)
