"""A start whose request is sent only once its intent is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any
from uuid import uuid4

from promptlayer_exec import Execution


class PendingStart:
    """One try to start a run, in three steps: `wait_ready`, record the intent, `send`.

    The intent is recorded as late as possible, immediately before the request is sent. So when a
    worker is killed, few items are unknown: only those whose request it was sending.

    The methods are called in the session's event loop.

    Args:
        start: starts the run, and awaits `before_send()`, its only argument, before it sends the
            request.

    Attributes:
        token: identifies this try among all tries to start the item.
        execution: the run that was started; None until its id is known.
    """

    def __init__(self, start: Callable[..., Coroutine[Any, Any, Execution]]) -> None:
        self.token = uuid4().hex
        self.execution: Execution | None = None
        self._start = start
        self._ready = asyncio.Event()
        self._recorded = asyncio.Event()
        self._task: asyncio.Task[Execution] | None = None
        self._is_cancelled = False

    async def wait_ready(self) -> None:
        """Prepare the start, and return once its request can be sent or the start has ended."""
        if self._is_cancelled:
            return
        self._task = asyncio.create_task(self._start(before_send=self._wait_until_recorded))
        self._task.add_done_callback(self._end)
        await self._ready.wait()

    async def send(self) -> Execution | None:
        """Send the request, and return the run that it started.

        Returns:
            None if the start was cancelled before its request was sent.

        Raises:
            PromptLayerExecError: the start failed.
        """
        self._recorded.set()
        if self._task is None:
            return None
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self.execution = self._task.result()
        return self.execution

    def cancel(self) -> None:
        """Cancel the start, unless its request may have been sent."""
        self._is_cancelled = True
        if self._task is not None and not self._recorded.is_set():
            self._task.cancel()

    async def _wait_until_recorded(self) -> None:
        self._ready.set()
        await self._recorded.wait()

    def _end(self, task: asyncio.Task[Execution]) -> None:
        if not task.cancelled():
            task.exception()  # otherwise asyncio logs it if `send` is never called
        self._ready.set()
