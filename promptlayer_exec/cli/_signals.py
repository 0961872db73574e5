"""SIGINT and SIGTERM while a command works."""

import asyncio
import os
import signal
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

_T = TypeVar("_T")


class Signals:
    """Cancels the work at the first signal, and ends the process at once at the next.

    The handlers run between any two instructions, even while standard output blocks. The loop's
    own would not, and closing the loop would put KeyboardInterrupt back, which may strike inside
    the closing of the loop or of a session, and hang it.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    async def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do the work; if it is cancelled, `received` is the signal's number."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)

        def handle(number: int, _frame: FrameType | None) -> None:
            if self.received is not None:
                os._exit(128 + number)
            self.received = number
            loop.call_soon_threadsafe(task.cancel)

        previous = {
            number: signal.signal(number, handle)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) is not signal.SIG_IGN  # as in a script's background
        }
        try:
            return await task
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
