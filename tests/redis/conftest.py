"""A real Redis server, and sessions that share it."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis

from promptlayer_exec import Event, Polled, PollPolicy, Session, Snapshot
from promptlayer_exec.redis import RedisBackplane


class RedisServer:
    """A Redis server, of its own process, on a socket in a directory."""

    def __init__(self, directory: Path, binary: str) -> None:
        self.path = directory / "redis.sock"
        self.url = f"unix://{self.path}"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.tcp_url = f"redis://127.0.0.1:{port}"
        self._command = [binary, "--port", str(port), "--unixsocket", str(self.path), "--save", ""]
        self._command += ["--dir", str(directory)]
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if b"eady to accept connections" in line:
                return
        raise AssertionError("the Redis server did not start")

    def stop(self) -> None:
        """Kill the server."""
        self.process.kill()
        self.process.communicate()

    def demote_for(self, primary: RedisServer) -> None:
        """Become a replica that keeps its connections; new ones lead to the new primary."""
        with self.client() as client:
            client.replicaof("127.0.0.1", 1)
        primary.path.replace(self.path)

    def hang(self) -> None:
        """Stop the process, so that nothing is answered and no connection ends."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let the process go on."""
        self.process.send_signal(signal.SIGCONT)

    def client(self) -> Redis:
        """Return a client of the server."""
        return Redis.from_url(self.url)


@pytest.fixture(scope="session")
def _shared_server() -> Iterator[RedisServer]:
    yield from _serve()


def _serve() -> Iterator[RedisServer]:
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        pytest.skip("there is no Redis server: apt-get install redis-server")
    # Not `tmp_path`: the path of a socket has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="redis") as directory:
        server = RedisServer(Path(directory), binary)
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """Return a Redis server that the test may stop, hang and fill."""
    yield from _serve()


@pytest.fixture
def second_server() -> Iterator[RedisServer]:
    """Return one more Redis server of the test's own."""
    yield from _serve()


@pytest.fixture
def server(_shared_server: RedisServer) -> RedisServer:
    """Return a Redis server that other tests use, too."""
    return _shared_server


class Worker:
    """What one of several processes is: a session, and the polls that its observer saw."""

    def __init__(self, open_session: Callable[..., Session], url: str, prefix: str) -> None:
        self.polls: list[Polled] = []
        self.events: list[Event] = []
        self._news = asyncio.Event()
        self._open = open_session
        self._backplane = RedisBackplane(url, prefix=prefix)
        self.session = self.new_session()

    def new_session(self, **settings: Any) -> Session:
        """Replace the session by one with other settings."""
        settings = {"poll": PollPolicy.fixed(0.1), "backplane": self._backplane, **settings}
        self.session = self._open(observers=[self._observe], **settings)
        return self.session

    def _observe(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Polled):
            self.polls.append(event)
            self._news.set()

    @property
    def own_polls(self) -> int:
        """How often the session itself polled."""
        return sum(not poll.shared for poll in self.polls)

    def of(self, kind: type[Event]) -> list[Any]:
        """Return the events of one type."""
        return [event for event in self.events if isinstance(event, kind)]

    async def stream(self, execution_id: int, seen: list[Snapshot] | None = None) -> Snapshot:
        """Stream an execution to its end, and return the last snapshot."""
        async with aclosing(self.session.execution(execution_id).stream(timeout=40)) as snapshots:
            async for snapshot in snapshots:
                if seen is not None:
                    seen.append(snapshot)
        return snapshot

    async def polled(
        self, count: int = 1, *, shared: bool | None = None, within: float = 20.0
    ) -> None:
        """Wait for so many more polls, shared or not, or of both kinds."""
        async with asyncio.timeout(within):
            while count:
                self._news.clear()
                await self._news.wait()
                count -= shared in (None, self.polls[-1].shared)


@pytest.fixture
def prefix() -> str:
    """Return a prefix that no other test uses."""
    return f"test-{uuid4().hex}"


@pytest.fixture
def place(server: RedisServer, prefix: str) -> tuple[str, str]:
    """Return the URL and the prefix that `workers` share."""
    return server.url, prefix


@pytest.fixture
async def workers(
    open_session: Callable[..., Session], server: RedisServer, prefix: str
) -> AsyncIterator[list[Worker]]:
    """Return three workers that share a Redis server."""
    yield [Worker(open_session, server.url, prefix) for _ in range(3)]
    with server.client() as client:
        for key in client.scan_iter(f"{prefix}:*"):
            assert client.ttl(key) > -1, f"{key!r} does not expire"


@pytest.fixture
async def own_workers(
    open_session: Callable[..., Session], own_server: RedisServer, prefix: str
) -> list[Worker]:
    """Return three workers that share a Redis server which the test may stop."""
    return [Worker(open_session, own_server.url, prefix) for _ in range(3)]
