"""Fixtures that several test modules share."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import shutil
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import settings

from promptlayer_exec import Event, PollPolicy, RetryPolicy, Session
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")


def _our_tasks() -> list[str]:
    names = [task.get_name() for task in asyncio.all_tasks()]
    return sorted(name for name in names if name.startswith("promptlayer_exec"))


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """Let the commands receive SIGINT even if the tests run in the background of a script."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="session", autouse=True)
def _quick_garbage_collection() -> Iterator[None]:
    """Let the garbage collector pass over all that was imported and collected: thousands of tests.

    Tests that count what is left of a session would take ten times as long.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def _prepared_batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from promptlayer_exec.dbos._location import check_url
    from promptlayer_exec.dbos._store import Store

    path = tmp_path_factory.mktemp("prepared") / "batches.sqlite"
    store = Store(check_url(f"sqlite:///{path}"))
    store.prepare()
    store.close()
    return path


@pytest.fixture
def batches_file(_prepared_batches: Path, tmp_path: Path) -> Path:
    """Return a SQLite database without batches: a copy, because to create one takes a while."""
    return Path(shutil.copy(_prepared_batches, tmp_path))


@pytest.fixture
def our_tasks() -> Callable[[], list[str]]:
    """Return a function that returns the names of the library's tasks in this loop."""
    return _our_tasks


class Recorder:
    """An observer that records every event, and lets a test wait for the next of a type."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._waiters: list[tuple[type[Event], asyncio.Future[Any]]] = []

    def __call__(self, event: Event) -> None:
        """Record the event, and wake the tests that wait for its type."""
        self.events.append(event)
        for kind, waiter in self._waiters:
            if isinstance(event, kind) and not waiter.done():
                waiter.set_result(event)

    def of(self, kind: type[Event]) -> list[Any]:
        """Return the events of one type."""
        return [event for event in self.events if isinstance(event, kind)]

    async def next(self, kind: type[Event]) -> Any:
        """Wait for the next event of one type, for at most 10 s."""
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiters.append((kind, waiter))
        async with asyncio.timeout(10):
            return await waiter


_SETTINGS = (
    "PROMPTLAYER_API_KEY",
    "PROMPTLAYER_BASE_URL",
    "PROMPTLAYER_EXEC_TRUST_ENV",
    "PROMPTLAYER_EXEC_PUSH",
    "NETRC",
)
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name in (*_SETTINGS, *_PROXIES, *map(str.lower, _PROXIES)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    """Return a simulator that runs in the test's event loop."""
    async with Simulator() as simulator:
        yield simulator


@pytest.fixture
def threaded_sim() -> Iterator[Simulator]:
    """Return a simulator that runs in its own thread."""
    with Simulator() as simulator:
        yield simulator


@pytest.fixture
def recorder() -> Recorder:
    """Return the observer of the sessions that `open_session` makes."""
    return Recorder()


@pytest.fixture
async def open_session(sim: Simulator, recorder: Recorder) -> AsyncIterator[Callable[..., Session]]:
    """Return a function that makes sessions for `sim`; after closing, no task may remain."""
    async with AsyncExitStack() as stack:

        def make(**overrides: Any) -> Session:
            settings: dict[str, Any] = {
                "api_key": sim.api_key,
                "base_url": sim.base_url,
                "poll": PollPolicy.fixed(0.01),
                "retry": RetryPolicy(outage=5.0, watch_outage=5.0, base=0.001),
                "rate": None,
                "observers": [recorder],
            }
            session = Session(**{**settings, **overrides})
            stack.push_async_callback(session.aclose)
            return session

        yield make
    assert _our_tasks() == []


@pytest.fixture
def session(open_session: Callable[..., Session]) -> Session:
    """Return a session that polls `sim` every 10 ms."""
    return open_session()


@pytest.fixture(autouse=True)
def _log_handlers() -> Iterator[None]:
    yield
    # The command line adds one, for its own process.
    logging.getLogger("promptlayer_exec").handlers.clear()


@pytest.fixture
def held(sim: Simulator) -> int:
    """Return the id of an execution whose output node runs until `sim.finish` ends it."""
    return sim.add_execution(
        Scenario([SimNode("Plan", "done"), SimNode("Answer", "42", None, is_output_node=True)])
    )


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Any], Awaitable[str]]]:
    """Return a function that serves an ASGI app with uvicorn in this loop, and returns its URL."""
    import uvicorn

    class Server(uvicorn.Server):
        def __init__(self, app: Any) -> None:
            config = uvicorn.Config(app, port=0, log_config=None, ws="none", lifespan="off")
            super().__init__(config)
            self.is_up = asyncio.Event()
            self.ending = asyncio.Event()

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # without handlers: pytest has its own

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            self.is_up.set()

        async def main_loop(self) -> None:
            await self.ending.wait()  # at once, and not at the next tenth of a second

    async with AsyncExitStack() as stack:

        async def start(app: Any) -> str:
            server = Server(app)
            task = asyncio.create_task(server.serve())

            async def stop() -> None:
                server.ending.set()
                await task

            stack.push_async_callback(stop)
            await server.is_up.wait()
            port = server.servers[0].sockets[0].getsockname()[1]
            return f"http://127.0.0.1:{port}"

        yield start


BEARER = "Bearer secret"


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
async def listen() -> AsyncIterator[Callable[..., Awaitable[int]]]:
    """Return a function that serves connections and returns the port; the end closes them all."""
    servers: list[asyncio.Server] = []
    connections: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    async def start(serve: Serve, context: ssl.SSLContext | None = None) -> int:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections[task] = writer
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await serve(reader, writer)
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
        servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    yield start
    for server in servers:
        server.close()
    for task, writer in connections.items():
        task.cancel()
        writer.transport.abort()
    await asyncio.gather(*connections, return_exceptions=True)
    for server in servers:
        await server.wait_closed()


class Viewer:
    """A board that is served, and requests to it."""

    def __init__(self, board: Any, port: int) -> None:
        self.board = board
        self.port = port

    async def request(self, head: str, **headers: str | None) -> tuple[int, str]:
        """Send a raw request; return the status and the response, without the body of a stream.

        Args:
            head: the method and the path.
            headers: they replace those of the page; None removes one.
        """
        given = {"Host": f"127.0.0.1:{self.port}", "Connection": "close", "Authorization": BEARER}
        given.update({name.replace("_", "-"): value for name, value in headers.items()})
        lines = [f"{name}: {value}" for name, value in given.items() if value is not None]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write("\r\n".join([f"{head} HTTP/1.1", *lines, "", ""]).encode())
        text = (await reader.readuntil(b"\r\n\r\n")).decode()
        if "event-stream" not in text:
            text += (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        return int(text.split()[1]), text

    async def send(self, method: str, path: str, content: Any = None) -> tuple[int, Any]:
        """Send a request as the page does, and return the status and the body."""
        async with (
            aiohttp.ClientSession(headers={"Authorization": BEARER}) as http,
            http.request(
                method, f"http://127.0.0.1:{self.port}/api/{path}", json=content
            ) as response,
        ):
            text = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(text) if is_json else text

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """Yield the events of a page."""
        url = f"http://127.0.0.1:{self.port}/api/events"
        headers = {"Authorization": BEARER}
        async with (
            aiohttp.ClientSession(headers=headers, read_bufsize=2**20) as http,
            http.get(url) as response,
        ):
            kind = ""
            async for line in response.content:
                name, _, text = line.decode().rstrip("\n").partition(": ")
                if name == "event":
                    kind = text
                elif name == "data":
                    yield kind, json.loads(text)


@pytest.fixture
async def viewer(session: Session, tmp_path: Path) -> AsyncIterator[Viewer]:
    """Return a viewer on a free port; it is stopped, as by Ctrl-C, at the end of the test."""
    from promptlayer_exec.viewer import Address, Board, History, listen, serve

    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    history = History(tmp_path / "history.sqlite", server="of a test", limit=5)
    async with session, Board(session, note="of a test", history=history) as board:
        address = Address("127.0.0.1", port)
        serving = asyncio.create_task(serve(board, listener, address, "secret"))
        yield Viewer(board, port)
        serving.cancel()
        async with asyncio.timeout(5):
            await asyncio.wait([serving])
