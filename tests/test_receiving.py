"""How bodies are received; over real sockets, see test_network.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from unittest.mock import Mock

import aiohttp
import pytest

from promptlayer_exec import _receiving
from promptlayer_exec._receiving import PIECE, Receiver
from promptlayer_exec._tasks import Timers


async def settle() -> None:
    """Let what is due happen."""
    for _ in range(10):
        await asyncio.sleep(0)


class Bodies:
    """Bodies that are being received, and that grow as they are told."""

    def __init__(self, receiver: Receiver, count: int, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        self.pieces: list[list[bytes]] = [[] for _ in range(count)]
        self._contents = [aiohttp.StreamReader(Mock(), 2**16, loop=loop) for _ in range(count)]
        for content, pieces in zip(self._contents, self.pieces, strict=True):
            answer = Mock(content=content, closed=True)
            tasks.create_task(receiver.receive(answer, pieces, 2**30))

    async def grow(self, number: int, data: bytes = bytes(PIECE)) -> None:
        """Let a piece of a body come, and what it brings about happen."""
        self.feed(number, data)
        await settle()

    def feed(self, number: int, data: bytes = bytes(PIECE)) -> None:
        """Let a piece of a body come."""
        self._contents[number].feed_data(data)

    async def end(self, number: int) -> None:
        """Let a body end likewise."""
        self._contents[number].feed_eof()
        await settle()

    def taken(self) -> list[int]:
        """Return how many pieces of each body were taken."""
        return [sum(map(bool, pieces)) for pieces in self.pieces]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Return a receiver."""
    timers = Timers()
    yield Receiver(timers)
    assert not timers._heap or all(timer[2] is None for timer in timers._heap)
    timers.close()


async def test_large_bodies_are_read_one_after_the_other(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as one flows, the next is left in the connection; small ones are read at once."""
    monkeypatch.setattr(_receiving, "_TURN", 60.0)
    async with asyncio.TaskGroup() as tasks:
        bodies = Bodies(receiver, 3, tasks)
        for number in (0, 1, 1):
            await bodies.grow(number)
        for _ in range(2):
            await bodies.grow(2, b"small")
        assert bodies.taken() == [1, 1, 2]
        await bodies.grow(0)
        assert bodies.taken() == [2, 1, 2]
        await bodies.end(0)
        assert bodies.taken() == [2, 2, 2]
        for number in (1, 2):
            await bodies.end(number)
    assert [b"".join(pieces) for pieces in bodies.pieces] == [
        bytes(2 * PIECE),
        bytes(2 * PIECE),
        b"small" * 2,
    ]


async def test_a_body_that_does_not_flow_ends_the_turns_of_all(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who wait for a turn go on without one, and for a while nobody takes any."""
    monkeypatch.setattr(_receiving, "_TURN", 0.0)
    monkeypatch.setattr(receiver, "_pause", 60.0)
    async with asyncio.TaskGroup() as tasks:
        bodies = Bodies(receiver, 3, tasks)
        await settle()
        bodies.feed(0)
        bodies.feed(1)
        await asyncio.sleep(0)
        assert receiver._turn.statistics().tasks_waiting == 1
        monkeypatch.setattr(_receiving, "_TURN", 60.0)  # for whoever takes one from now on
        await settle()
        for number in (1, 2, 2, 1):
            await bodies.grow(number)
            assert not receiver._turn.locked()
        assert bodies.taken() == [1, 3, 2]
        for number in range(3):
            await bodies.end(number)


async def test_turns_come_back_later_each_time(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at once after one that was enough."""
    pauses = []
    async with asyncio.TaskGroup() as tasks:
        bodies = Bodies(receiver, 10, tasks)
        monkeypatch.setattr(_receiving, "_TURN", 0.0)
        for number in range(9):
            pauses.append(receiver._pause)
            await bodies.grow(number)
            receiver._resume_at = 0.0
        assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
        monkeypatch.setattr(_receiving, "_TURN", 60.0)
        await bodies.grow(9)
        assert receiver._turn.locked()
        await bodies.end(9)
        assert receiver._pause == 0.05
        for number in range(9):
            await bodies.end(number)


async def test_a_connection_that_breaks_in_its_turn_gives_it_back(receiver: Receiver) -> None:
    """And its error comes out, also where it looks like the end of the turn."""
    content = aiohttp.StreamReader(Mock(), 2**16, loop=asyncio.get_running_loop())
    answer = Mock(content=content, closed=False)
    receiving = asyncio.create_task(receiver.receive(answer, [], 2**30))
    content.feed_data(bytes(PIECE))
    await settle()
    assert receiver._turn.locked()
    content.set_exception(TimeoutError("of the connection"))
    with pytest.raises(TimeoutError, match="of the connection"):
        await receiving
    assert not receiver._turn.locked()
    answer.close.assert_called_once()
