"""How bodies are received: the large ones in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from promptlayer_exec._tasks import Limit, Timers

if TYPE_CHECKING:
    import aiohttp

# What asyncio reads at once; a body is large if it takes more than that.
PIECE = 256 * 1024
_TURN = 0.01  # seconds


class Receiver:
    """Receives bodies, of which one large one at a time for as long as it flows.

    What came is then still in the processor's caches when it is decoded, and few bodies lie around
    in part: where many come at once, this takes less time, and far less memory. Flowing or not, a
    turn is so short that nobody has to wait for a body that is slow.

    Args:
        timers: end the turns.
    """

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._turn = anyio.Lock(fast_acquire=True)

    async def receive(
        self, answer: aiohttp.ClientResponse, pieces: list[bytes], limit: int
    ) -> None:
        """Receive a body into `pieces`, and stop where it exceeds `limit` bytes."""
        body = _Body(answer.content, pieces, limit)
        try:
            while not body.is_over():
                await body.take()
                if body.size >= PIECE and not body.is_over():
                    await self._take_turn(body)
        finally:
            if not answer.closed:  # it closes itself where the body was read to its end
                answer.close()

    async def _take_turn(self, body: _Body) -> None:
        async with self._turn:
            try:
                with Limit(self._timers, self._timers.loop.time() + _TURN):
                    while not body.is_over():
                        await body.take()
            except TimeoutError:
                pass  # of the limit; one of the connection's comes again


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
