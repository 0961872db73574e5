"""Fixtures that several test modules share."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import shutil
import signal
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import attrs
import pytest
from hypothesis import settings

from promptlayer_exec import Event, PollPolicy, RetryPolicy, Session
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

# While tests are collected, nothing is garbage. Looking for it would take a quarter of the time.
gc.disable()

settings.register_profile("suite", derandomize=True, deadline=None, database=None, max_examples=40)
settings.load_profile("suite")


if find_spec("sqlalchemy") is not None:  # some nox sessions do without it
    from sqlalchemy.dialects import registry
    from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

    class SQLite(SQLiteDialect_pysqlite):
        """SQLite as it is, but all engines of this process share the statements they compiled.

        Each test has its own database, and so its own engines. Without this, each would compile
        anew what DBOS and this package execute, which took a third of the time of such tests.
        SQLAlchemy looks up a statement by the dialect, so all of these are equal.
        """

        supports_statement_cache = True
        _compiled: ClassVar[dict[Any, Any]] = {}

        def __eq__(self, other: object) -> bool:
            """Return True for any other one."""
            return type(other) is type(self)

        def __hash__(self) -> int:
            """Return the same number for all."""
            return hash(type(self))

        @classmethod
        def engine_created(cls, engine: Any) -> None:
            """Let a new engine use the statements of the others."""
            engine.update_execution_options(compiled_cache=cls._compiled)

    registry.register("sqlite", __name__, SQLite.__name__)


def _our_tasks() -> list[str]:
    names = [task.get_name() for task in asyncio.all_tasks()]
    return sorted(name for name in names if name.startswith("promptlayer_exec"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that no process has one left when the others are done."""
    longest = {"test_readme.py", "test_redis.py"}
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """Let the commands receive SIGINT even if the tests run in the background of a script."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="session", autouse=True)
def _quick_garbage_collection() -> None:
    """Let the garbage collector pass over all that was imported and collected: thousands of tests.

    Tests that count what is left of a session would take ten times as long.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def _prepared_batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from promptlayer_exec._database.location import check_url
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
def quick_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let batches look for work every 100 ms and for outcomes every 50 ms, not four times a second.

    They also repeat a request that fails after 50 ms. A test has its database for itself.
    """
    from promptlayer_exec.dbos import _batch, _breaker, _following, _store, _worker

    monkeypatch.setattr(_store, "QUEUE_INTERVAL", 0.1)
    times = attrs.evolve(_worker.TIMES, check_interval=0.1)
    monkeypatch.setattr(_worker, "TIMES", times)
    patience = _following.ReadPatience(first_delay=0.05, last_look=1.0)
    monkeypatch.setattr(_following, "READ_PATIENCE", patience)
    monkeypatch.setattr(_breaker, "CAUTION", _breaker.Caution(first_pause=0.1))
    monkeypatch.setattr(_batch, "POLL_INTERVAL", 0.05)


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
                # Only what a test asks for is sent.
                "push": False,
                "check_inputs": False,
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
    # The command line adds one, for its own process, and sets the level.
    logger = logging.getLogger("promptlayer_exec")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


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


class RawRequest:
    """One request to a `RawServer`, which a test answers as it likes.

    Attributes:
        head: the request line and the headers.
        body: what followed them.
        connection: the number of its connection, from 0.
        is_reused: whether it is not the first there.
        reader: what the client sends next.
        writer: what the client receives.
    """

    def __init__(self, head: str, body: bytes, connection: int, server: RawServer) -> None:
        self.head = head
        self.body = body
        self.connection = connection
        self.reader, self.writer = server.streams[connection]
        self.is_reused = any(earlier.connection == connection for earlier in server.requests)
        self._upstream = server.upstream

    @property
    def method(self) -> str:
        """The method."""
        return self.head.partition(" ")[0]

    @property
    def execution_id(self) -> str:
        """The id of the execution that it asks for."""
        return self.head.partition("workflow_version_execution_id=")[2].partition("&")[0]

    async def send(self, *parts: bytes) -> None:
        """Send parts of an answer; the client reads each by itself."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            for _ in range(20 * (len(parts) > 1)):
                await asyncio.sleep(0)

    async def answer(self, status: str, value: Any, *headers: str) -> None:
        """Send a complete answer: bytes as they are, all else as JSON."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
        await self.send("\r\n".join(lines).encode() + body)

    async def fetch(self) -> tuple[bytes, bytes]:
        """Send it to the server's `upstream`, and return the head and the body of the answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            writer.write(self.head.encode("latin-1") + self.body)
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
            return head, await reader.readexactly(int(length))
        finally:
            writer.close()

    async def hold(self, seconds: float | None = None) -> None:
        """Send nothing for some seconds; end when the client disconnects."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.reader.read()
                raise ConnectionResetError

    def close(self) -> None:
        """Close the connection."""
        self.writer.close()

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        RawServer.reset(self.writer)


class RawServer:
    """A hand-written HTTP server, for all that the simulator does not do.

    Attributes:
        requests: what it received.
        streams: its connections, in the order in which they were opened.
        idle: those on which it waits for a request.
        answers: what the next requests get: bytes, or a function of the request.
        respond: answers the other requests: by default with the execution's own id as the output of
            its node "Answer", and with the id 787 for a start.
        accept: called with each new connection.
        url: where it listens.
        upstream: the port to which `RawRequest.fetch` sends requests.
    """

    def __init__(self) -> None:
        self.requests: list[RawRequest] = []
        self.streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.idle: set[asyncio.StreamWriter] = set()
        self.answers: deque[bytes | Callable[[RawRequest], Awaitable[None]]] = deque()
        self.respond: Callable[[RawRequest], Awaitable[None]] = self.echo
        self.accept: Callable[[asyncio.StreamWriter], object] = lambda _: None
        self.url = ""
        self.upstream = 0
        self._bind()
        self._server: asyncio.Server | None = None
        self._tasks: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    @property
    def writers(self) -> list[asyncio.StreamWriter]:
        """What it sends over its connections."""
        return [writer for _, writer in self.streams]

    def count(self, method: str) -> int:
        """Return how many requests with a method it received."""
        return [request.method for request in self.requests].count(method)

    @staticmethod
    async def echo(request: RawRequest) -> None:
        """Answer as `respond` does by default."""
        if request.method == "POST":
            await request.answer("201 Created", {"workflow_version_execution_id": 787})
        else:
            node = {"status": "SUCCESS", "value": request.execution_id, "is_output_node": True}
            await request.answer("200 OK", {"Answer": node})

    @staticmethod
    def reset(writer: asyncio.StreamWriter) -> None:
        """End a connection with a TCP reset."""
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.transport.abort()

    async def listen(self, context: ssl.SSLContext | None = None) -> None:
        """Accept connections; with a context, by TLS."""
        await self.refuse()
        self._server = await asyncio.start_server(self._serve, sock=self._socket, ssl=context)
        scheme, host = ("http", "127.0.0.1") if context is None else ("https", "localhost")
        self.url = f"{scheme}://{host}:{self._port}"

    async def refuse(self) -> None:
        """Refuse connections, and end the open ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._bind(self._port)  # at once, so that no other process takes the port
        for task, writer in self._tasks.items():
            writer.transport.abort()
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def wait_until_closed(self) -> None:
        """Wait until the client has closed each connection."""
        async with asyncio.timeout(10):
            await asyncio.gather(*self._tasks)

    def _bind(self, port: int = 0) -> None:
        self._socket = socket.socket()  # without `listen` it refuses
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._port = self._socket.getsockname()[1]

    async def aclose(self) -> None:
        """Refuse connections, and free the port."""
        await self.refuse()
        self._socket.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = writer
        number = len(self.streams)
        self.streams.append((reader, writer))
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            self.accept(writer)
            while not writer.is_closing():
                self.idle.add(writer)
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                self.idle.discard(writer)
                length = head.lower().partition("content-length: ")[2].partition("\r\n")[0]
                body = await reader.readexactly(int(length or 0))
                request = RawRequest(head, body, number, self)
                self.requests.append(request)
                answer = self.answers.popleft() if self.answers else self.respond
                await (request.send(answer) if isinstance(answer, bytes) else answer(request))
        self.idle.discard(writer)
        writer.close()


@pytest.fixture
async def make_raw_server() -> AsyncIterator[Callable[..., Awaitable[RawServer]]]:
    """Return a function that starts a server of raw answers; the end ends its connections."""
    async with AsyncExitStack() as stack:

        async def make(context: ssl.SSLContext | None = None) -> RawServer:
            server = RawServer()
            stack.push_async_callback(server.aclose)
            await server.listen(context)
            return server

        yield make


@pytest.fixture
async def raw_server(make_raw_server: Callable[..., Awaitable[RawServer]]) -> RawServer:
    """Return a running server of raw answers."""
    return await make_raw_server()


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
async def viewer(open_session: Callable[..., Session], tmp_path: Path) -> AsyncIterator[Viewer]:
    """Return a viewer on a free port; it is stopped, as by Ctrl-C, at the end of the test."""
    from promptlayer_exec.viewer import Address, Board, History, listen, serve

    observers = [lambda event: board.observe(event)]  # noqa: PLW0108 - it is made below
    session = open_session(check_inputs=True, observers=observers)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    history = History(tmp_path / "history.sqlite", server="of a test", limit=5)
    board = Board(session, note="of a test", history=history)
    async with session, board:
        address = Address("127.0.0.1", port)
        serving = asyncio.create_task(serve(board, listener, address, "secret"))
        yield Viewer(board, port)
        serving.cancel()
        async with asyncio.timeout(20):
            await asyncio.wait([serving])
