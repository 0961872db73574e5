"""Functions that asyncio lacks."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any


def clock() -> float:
    """Return the time on the running loop's clock, in seconds."""
    return asyncio.get_running_loop().time()


def resolve(future: asyncio.Future[None]) -> None:
    """Wake the task that awaits a future, unless it is done already."""
    if not future.done():
        future.set_result(None)


async def wait_even_if_cancelled(future: asyncio.Future[Any], timeout: float | None = None) -> None:
    """Wait for a future, at most `timeout` seconds, and raise a cancellation only afterwards."""
    waiting = asyncio.ensure_future(asyncio.wait([future], timeout=timeout))
    try:
        await asyncio.shield(waiting)
    except asyncio.CancelledError:
        with suppress(asyncio.CancelledError):
            await waiting
        raise
