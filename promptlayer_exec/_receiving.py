"""How bodies are received: the large ones in turn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import anyio

from promptlayer_exec._tasks import Limit, Timers

if TYPE_CHECKING:
    import aiohttp

# What asyncio reads at once; a body is large if it takes more than that.
PIECE = 256 * 1024
# The longest turn, in seconds: enough for some megabytes, if they flow.
_TURN = 0.02
# The seconds without turns after one that was not enough: twice as many each time.
_PAUSE = 0.05
_LONGEST_PAUSE = 5.0


class Receiver:
    """Receives bodies: large ones in turn, for as long as they flow.

    What came of a body is then still in the processor's caches when it is decoded, and few bodies
    lie around in part: where many come at once, this takes less time and memory. Where they come
    slowly, or where the event loop is busy, it would make all of them late: so after a turn in
    which a body did not come to its end there are none for a while.

    Args:
        timers: end the turns.
    """

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._clock = timers.loop.time
        self._turn = anyio.Lock(fast_acquire=True)
        self._queue: set[Limit] = set()
        self._resume_at = -math.inf
        self._pause = _PAUSE

    async def receive(
        self, answer: aiohttp.ClientResponse, pieces: list[bytes], limit: int
    ) -> None:
        """Receive a body into `pieces`, and stop where it exceeds `limit` bytes."""
        body = _Body(answer.content, pieces, limit)
        try:
            while not body.is_over():
                await body.take()
                in_turn = body.size >= PIECE and self._clock() >= self._resume_at
                if in_turn and not body.is_over() and await self._wait():
                    await self._take_turn(body)
        finally:
            if not answer.closed:  # it closes itself where the body was read to its end
                answer.close()

    async def _take_turn(self, body: _Body) -> None:
        try:
            with Limit(self._timers, self._clock() + _TURN):
                while not body.is_over():
                    await body.take()
            self._pause = _PAUSE
        except TimeoutError:  # of the limit; one of the connection's comes again
            self._resume_at = self._clock() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            for waiting in self._queue:
                waiting.end()
        finally:
            self._turn.release()

    async def _wait(self) -> bool:
        """Wait for a turn; return whether it came before all turns were ended."""
        waiting = Limit(self._timers, None)
        self._queue.add(waiting)
        try:
            with waiting:
                await self._turn.acquire()
        except TimeoutError:
            return False
        finally:
            self._queue.discard(waiting)
        return True


class _Body:
    """The pieces of a body, as they come."""

    def __init__(self, content: aiohttp.StreamReader, pieces: list[bytes], limit: int) -> None:
        self._content = content
        self._pieces = pieces
        self._limit = limit
        self.size = 0

    def is_over(self) -> bool:
        """Tell whether there are no more, or more than the limit allows."""
        return self.size > self._limit or self._content.at_eof()

    async def take(self) -> None:
        """Wait for the next piece, if it is not there yet."""
        piece = self._content.read_nowait() or await self._content.readany()
        self._pieces.append(piece)
        self.size += len(piece)
