"""A start whose intent is recorded when its turn has come, and before its request leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from uuid import uuid4

from promptlayer_exec import Execution


class Departure:
    """A start that waits for its turn, and then for its intent to be recorded.

    So nothing but the request itself lies between the intent and the answer: a process that is
    killed leaves few items of which it is unknown if they were started.

    Args:
        start: starts the run; it awaits what it is given before its request leaves.

    Attributes:
        token: tells this try from every other.
        execution: what was started, once that is known.
    """

    def __init__(
        self, start: Callable[[Callable[[], Awaitable[None]]], Coroutine[Any, Any, Execution]]
    ) -> None:
        self.token = uuid4().hex
        self.execution: Execution | None = None
        self._start = start
        self._turn = asyncio.Event()
        self._recorded = asyncio.Event()
        self._starting: asyncio.Task[Execution] | None = None
        self._is_called_off = False

    async def due(self) -> None:
        """Let the start begin, and return when its request may leave, or will not."""
        if self._is_called_off:
            return
        self._starting = asyncio.ensure_future(self._start(self._wait_until_recorded))
        self._starting.add_done_callback(self._end_turn)
        await self._turn.wait()

    async def leave(self) -> Execution | None:
        """Let the request leave, and return what it started; None: it was called off before."""
        self._recorded.set()
        if self._starting is None:
            return None
        await asyncio.wait([self._starting])
        if not self._starting.cancelled():
            self.execution = self._starting.result()
        return self.execution

    def call_off(self) -> None:
        """End the start, unless its request may have left."""
        self._is_called_off = True
        if self._starting is not None and not self._recorded.is_set():
            self._starting.cancel()

    def _end_turn(self, starting: asyncio.Task[Execution]) -> None:
        if not starting.cancelled():
            starting.exception()  # asyncio would complain where `leave` is never called
        self._turn.set()

    async def _wait_until_recorded(self) -> None:
        self._turn.set()
        await self._recorded.wait()
