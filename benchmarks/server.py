"""A server that takes little CPU: it answers every request with bytes that it made before.

Usage: server.py [STATUS NODES BYTES [VARIANTS]]

With arguments every answer is the same: an execution with so many nodes, whose values have so many
bytes. With several variants, they follow each other, and differ in one node. Without arguments it
is a running execution that changes with every poll.
With arguments the server never sleeps. Waking it takes a client a system call, and a slow client
would have to wake it more often than a fast one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from http import HTTPStatus

# It stops after this many seconds or answers, even if the process that started it does not stop it.
LONGEST = 120.0
MOST_ANSWERS = 1_000_000
# A prime number, so that successive polls of one execution get different answers.
ANSWERS = 97


def node_map(variant: int) -> bytes:
    """Return the body of a running execution: six nodes, three of which have a value."""
    nodes = {
        name: {
            "status": status,
            "value": value,
            "error_message": None,
            "raw_error_message": None,
            "is_output_node": name == "Answer",
        }
        for name, status, value in (
            ("Question", "SUCCESS", "Which of the three offers is the best for us, and why?"),
            ("Plan", "SUCCESS", {"steps": ["read", "compare", "advise"], "model": "large"}),
            ("Read", "SUCCESS", f"Offer {variant}. " * 24),
            ("Compare", "RUNNING", None),
            ("Advise", "QUEUED", None),
            ("Answer", "QUEUED", None),
        )
    }
    return json.dumps(nodes).encode()


def outputs(nodes: int, size: int, variant: int = 0) -> bytes:
    """Return the body of an execution with that many nodes, whose values have `size` bytes each.

    The value of the first node begins with the number of the variant.
    """
    changing = f"{variant} "
    text = "The quick brown fox jumps over the lazy dog; 3.5 % of them twice.\n"
    return json.dumps(
        {
            f"node {number}": {
                "status": "SUCCESS",
                "value": (changing * (number == 1) + text * (size // len(text) + 1))[:size],
                "error_message": None,
                "raw_error_message": None,
                "is_output_node": number == nodes,
            }
            for number in range(1, nodes + 1)
        }
    ).encode()


def answer(body: bytes, status: int = 202) -> bytes:
    """Return the HTTP response with that body."""
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        "Date: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
        "Server: benchmark\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "\r\n"
    )
    return head.encode() + body


class Connection(asyncio.Protocol):
    """Sends one answer for each request; requests have no body."""

    answers: Iterator[bytes]
    remaining = MOST_ANSWERS

    def __init__(self) -> None:
        self._rest = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each complete request."""
        *requests, self._rest = (self._rest + data).split(b"\r\n\r\n")
        Connection.remaining -= len(requests)
        if Connection.remaining < 0:
            self._transport.abort()
        else:
            self._transport.write(b"".join(itertools.islice(self.answers, len(requests))))


def stay_awake(loop: asyncio.AbstractEventLoop) -> None:
    """Keep the event loop from sleeping."""
    loop.call_soon(stay_awake, loop)


async def serve(answers: list[bytes], *, awake: bool) -> None:
    """Print the port, and serve until standard input ends, as it does with the parent process."""
    Connection.answers = itertools.cycle(answers)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    if awake:
        stay_awake(loop)
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LONGEST):
            await stdin.read()


def main(status: str = "", nodes: str = "", size: str = "", variants: str = "1") -> None:
    """Make the answers, and serve them."""
    if status:
        answers = [
            answer(outputs(int(nodes), int(size), variant), int(status))
            for variant in range(int(variants))
        ]
    else:
        answers = [answer(node_map(variant)) for variant in range(ANSWERS)]
    asyncio.run(serve(answers, awake=bool(status)))


if __name__ == "__main__":
    main(*sys.argv[1:])
