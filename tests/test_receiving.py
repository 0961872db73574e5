"""How bodies are received; over real sockets, see test_network.py."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

import aiohttp
import pytest

from promptlayer_exec import _receiving
from promptlayer_exec._tasks import Timers


async def test_large_bodies_are_read_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as one flows, the next is left in the connection; small ones are read at once."""
    monkeypatch.setattr(_receiving, "_TURN", 60.0)
    loop = asyncio.get_running_loop()
    bodies = [aiohttp.StreamReader(Mock(), 2**16, loop=loop) for _ in range(3)]
    pieces: list[list[bytes]] = [[], [], []]
    piece = bytes(_receiving.PIECE)

    async def feed(number: int, data: bytes) -> None:
        bodies[number].feed_data(data)
        for _ in range(5):
            await asyncio.sleep(0)

    receiver = _receiving.Receiver(Timers())
    async with asyncio.TaskGroup() as tasks:
        for body, taken in zip(bodies, pieces, strict=True):
            answer = Mock(content=body, closed=True)
            tasks.create_task(receiver.receive(answer, taken, 2**30))
        await feed(0, piece)
        await feed(1, piece)
        await feed(1, piece)
        await feed(2, b"small")
        await feed(2, b"small")
        assert [len(taken) for taken in pieces] == [1, 1, 2]
        await feed(0, piece)
        assert [len(taken) for taken in pieces] == [2, 1, 2]
        for body in bodies:
            body.feed_eof()
    assert [b"".join(taken) for taken in pieces] == [piece * 2, piece * 2, b"small" * 2]
