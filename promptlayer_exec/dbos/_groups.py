"""Writing the rows of many items in one transaction each time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import attrs

R = TypeVar("R")
V = TypeVar("V")

# At most so many rows, and about so many bytes, are written at once.
_MOST_ROWS = 500
_MOST_BYTES = 4 * 1024 * 1024


@attrs.define(eq=False)
class Group(Generic[R, V]):
    """Gathers rows while others are being written, and then writes them together.

    A transaction takes several round trips to the database, for one row as for a hundred.
    """

    _write: Callable[[list[R]], Sequence[V]]  # returns a value for each row
    _size: Callable[[R], int] = attrs.field(default=lambda _: 200)  # bytes, roughly
    _waiting: deque[tuple[R, asyncio.Future[V]]] = attrs.field(init=False, factory=deque)
    _task: asyncio.Task[None] | None = attrs.field(init=False, default=None)

    async def add(self, row: R) -> V:
        """Return the row's value when it is written; also if cancelled, it will be."""
        written: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, written))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await written

    async def _run(self) -> None:
        try:
            while self._waiting:
                taken = self._take()
                try:
                    values = await asyncio.to_thread(self._write, [row for row, _ in taken])
                except Exception as error:  # noqa: BLE001 - it is each caller's
                    for _, written in taken:
                        if not written.done():
                            written.set_exception(error)
                else:
                    for (_, written), value in zip(taken, values, strict=True):
                        if not written.done():  # the caller may have been cancelled
                            written.set_result(value)
        finally:
            self._task = None

    def _take(self) -> list[tuple[R, asyncio.Future[V]]]:
        taken: list[tuple[R, asyncio.Future[V]]] = []
        size = 0
        while self._waiting and len(taken) < _MOST_ROWS and size < _MOST_BYTES:
            taken.append(self._waiting.popleft())
            size += self._size(taken[-1][0])
        return taken
