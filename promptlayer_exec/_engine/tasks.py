"""Functions that asyncio lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def clock() -> float:
    """Return the time on the running loop's clock, in seconds."""
    return asyncio.get_running_loop().time()


def resolve(future: asyncio.Future[None]) -> None:
    """Wake the task that awaits a future, unless the future is already done."""
    if not future.done():
        future.set_result(None)


class Alarm:
    """Lets one task sleep until a time that may change while it sleeps."""

    def __init__(self) -> None:
        self._sleeping: asyncio.Future[None] | None = None

    def recheck(self) -> None:
        """Make the sleeping task compute its wake-up time again."""
        if self._sleeping is not None:
            resolve(self._sleeping)

    async def sleep_until(self, due: Callable[[], float]) -> float:
        """Sleep until the time that `due` returns, and return that time."""
        loop = asyncio.get_running_loop()
        # If it turns out to be overdue, it is not late.
        earliest = loop.time()

        while (at := max(due(), earliest)) > loop.time():
            self._sleeping = loop.create_future()
            timer = loop.call_at(at, resolve, self._sleeping)
            try:
                await self._sleeping
            finally:
                timer.cancel()
                self._sleeping = None

            earliest = min(at, loop.time())
        return at


async def wait_even_if_cancelled(future: asyncio.Future[Any]) -> None:
    """Wait for a future. Raise a cancellation only afterwards."""
    waiting = asyncio.ensure_future(asyncio.wait([future]))
    try:
        await asyncio.shield(waiting)
    except asyncio.CancelledError:
        with suppress(asyncio.CancelledError):
            await waiting
        raise
