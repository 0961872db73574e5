"""A response is never given to another request, and an arrived one is never discarded.

The peer is a plain asyncio server that writes what a faulty proxy might write.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import math
import select
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from unittest.mock import AsyncMock, Mock

import aiohttp
import pytest
import trustme

from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    ExecutionStarted,
    InvalidResponse,
    PollPolicy,
    RequestTimeout,
    RetryPolicy,
    Session,
    SessionClosed,
    StartRequest,
    StartUnknown,
)
from promptlayer_exec import _integration as integration
from promptlayer_exec._http.connections import GuardedBody
from promptlayer_exec._http.protocols import Interposed, has_partial_head

T = TypeVar("T")
KEY = "key-of-a-test"
RETRY = RetryPolicy(outage=5.0, watch_outage=5.0, base=0.001)


def answer(status: int, value: Any, *headers: str) -> bytes:
    """Return a complete HTTP response."""
    body = json.dumps(value).encode()
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def nodes(value: Any) -> dict[str, Any]:
    """Return a node map of one output node."""
    return {"Node 1": {"status": "SUCCESS", "value": value, "is_output_node": True}}


Listen = Callable[..., Awaitable[int]]


class Peer:
    """A server of raw answers.

    Attributes:
        requests: the head of each request, with the number of its connection.
        writers: one for each connection, in the order in which they were opened.
        respond: writes the answer to one request.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[int, str]] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.url = ""
        self.respond: Callable[[str, asyncio.StreamWriter], Awaitable[None]] = self.echo

    async def echo(self, head: str, writer: asyncio.StreamWriter) -> None:
        """Answer with the execution's own id, or start number 787."""
        if head.startswith("POST"):
            writer.write(answer(201, {"workflow_version_execution_id": 787}))
        else:
            writer.write(answer(200, nodes(execution_id(head))))

    def posts(self) -> int:
        """Return how many starts arrived."""
        return sum(head.startswith("POST") for _, head in self.requests)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read requests and answer each."""
        number = len(self.writers)
        self.writers.append(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = head.lower().partition("content-length: ")[2].partition("\r\n")[0]
                await reader.readexactly(int(length or 0))
                self.requests.append((number, head))
                await self.respond(head, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def execution_id(head: str) -> str:
    """Return the id that a request asks for."""
    return head.partition("workflow_version_execution_id=")[2].partition("&")[0]


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """Return a running server."""
    peer = Peer()
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    peer.url = f"http://{host}:{port}"
    yield peer
    server.close()
    for writer in peer.writers:
        writer.close()
    await server.wait_closed()
    for _ in range(3):
        await asyncio.sleep(0)


@asynccontextmanager
async def session_at(peer: Peer, **settings: Any) -> AsyncIterator[Session]:
    """Return a session for the peer."""
    settings = {"retry": RETRY, "poll": PollPolicy.fixed(0.01), "rate": None, **settings}
    async with Session(KEY, base_url=peer.url, **settings) as session:
        yield session


async def value_of(session: Session, number: int) -> Any:
    """Return the server's value for one execution."""
    snapshot = await session.get_results(number, return_all_outputs=True)
    return snapshot.nodes["Node 1"].value


@pytest.mark.parametrize("has_poll", [True, False], ids=["poll", "no poll, as on Windows"])
@pytest.mark.parametrize("settled", [True, False], ids=["read by the loop", "still in the socket"])
async def test_a_surplus_response_on_an_idle_connection_is_never_used(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, *, settled: bool, has_poll: bool
) -> None:
    """Every later call gets its own results, even if the surplus was not read yet."""
    if not has_poll:
        monkeypatch.delattr(select, "poll")
    async with session_at(peer) as session:
        assert await value_of(session, 1) == "1"
        (writer,) = peer.writers
        writer.write(answer(200, nodes("1")))
        if settled:
            await writer.drain()
            for _ in range(5):
                await asyncio.sleep(0)
        for number in range(2, 12):
            assert await value_of(session, number) == str(number)
    assert {connection for connection, _ in peer.requests} == {0, 1}


@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "TLS"])
async def test_the_first_bytes_of_a_surplus_head_are_never_used(
    listen: Listen, peer: Peer, monkeypatch: pytest.MonkeyPatch, *, is_secure: bool
) -> None:
    """They would become the head of the next answer, with another status."""
    if is_secure:
        peer.url = f"https://localhost:{await listen(peer.serve, trust(monkeypatch))}"
    async with session_at(peer) as session:
        assert await value_of(session, 1) == "1"
        peer.writers[0].write(b"HTTP/1.1 404 Not Found\r\nX-Stale: ")
        for number in range(2, 12):
            assert await value_of(session, number) == str(number)
    assert {connection for connection, _ in peer.requests} == {0, 1}


@pytest.fixture(params=["C", "Python"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use aiohttp's parser in C, or the one in Python, which some platforms have to use."""
    if request.param == "Python":
        python = aiohttp.http_parser.HttpResponseParserPy
        monkeypatch.setattr(aiohttp.client_proto, "HttpResponseParser", python)
    return str(request.param)


@pytest.mark.usefixtures("parser")
async def test_a_malformed_chunk_behind_a_whole_body_costs_no_id_and_no_error_of_aiohttp(
    peer: Peer,
) -> None:
    """It comes in a segment of its own; a poll is tried again."""

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        is_start = head.startswith("POST")
        value = {"workflow_version_execution_id": 787} if is_start else nodes("5")
        body = json.dumps(value).encode()
        status = b"201" if is_start else b"200"
        writer.write(b"HTTP/1.1 %b OK\r\nTransfer-Encoding: chunked\r\n\r\n" % status)
        writer.write(b"%x\r\n%b\r\n" % (len(body), body))
        for _ in range(20):  # until it is read
            await asyncio.sleep(0)
        writer.write(b"zz\r\n" if is_start or len(peer.requests) == 2 else b"0\r\n\r\n")

    peer.respond = respond
    async with session_at(peer) as session:
        assert (await session.start("name")).id == 787
        assert await value_of(session, 787) == "5"
    assert len(peer.requests) == 3


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("part", [b"H", b"HTTP/1.1 404 Not Found\r\nX-Stale: "])
async def test_a_connection_with_a_part_of_a_head_behind_a_response_is_not_used_again(
    listen: Listen, peer: Peer, monkeypatch: pytest.MonkeyPatch, part: bytes, *, is_secure: bool
) -> None:
    """Although it came in one segment with the response, and the rest may never come."""
    if is_secure:
        peer.url = f"https://localhost:{await listen(peer.serve, trust(monkeypatch))}"

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        number = execution_id(head)
        writer.write(answer(200, nodes(number)) + (part if number == "1" else b""))

    peer.respond = respond
    async with session_at(peer) as session:
        for number in range(1, 4):
            assert await value_of(session, number) == str(number)
    assert [connection for connection, _ in peer.requests] == [0, 1, 1]


def test_a_part_that_the_parser_refuses_is_a_part_of_a_head() -> None:
    """Whatever aiohttp's parser raises; without a parser there was no response yet."""
    refusing = Mock(feed_eof=Mock(side_effect=ValueError))
    assert has_partial_head(Mock(_parser=refusing))
    assert not has_partial_head(Mock(_parser=None))


# HTTP/1.0, or no length: the end of the connection is that of the response. It closes a transport
# for TLS once, and aiohttp does so again.
CLOSING = {
    "HTTP/1.0": b"HTTP/1.0 %d Whatever\r\n\r\n%b",
    "no length": b"HTTP/1.1 %d Whatever\r\nConnection: close\r\n\r\n%b",
    "large and compressed": b"HTTP/1.1 %d Whatever\r\nConnection: close\r\n"
    b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b",
}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("framing", CLOSING)
def test_a_response_that_ends_with_its_connection_is_read_over_tls(
    monkeypatch: pytest.MonkeyPatch, framing: str, loop: str
) -> None:
    """As proxies send it; also a refusal, which is tried again."""
    theirs = trust(monkeypatch)
    peer = Peer()
    statuses = iter([429, 201, 503, 200])
    text = "x" * 3_000_000

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        value = {"workflow_version_execution_id": 787} if head[0] == "P" else nodes(text)
        body = json.dumps(value).encode()
        if "compressed" in framing:
            packed = gzip.compress(body, 1)
            writer.write(CLOSING[framing] % (next(statuses), len(packed), packed))
        else:
            writer.write(CLOSING[framing] % (next(statuses), body))
        await writer.drain()
        writer.close()

    async def main() -> tuple[int, str]:
        server = await asyncio.start_server(peer.serve, "127.0.0.1", 0, ssl=theirs)
        peer.url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        async with server, session_at(peer) as session:
            execution = await session.start("w")
            return execution.id, await value_of(session, execution.id)

    peer.respond = respond
    new_loop = pytest.importorskip(loop).new_event_loop  # there is no uvloop on Windows
    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(main()) == (787, text)
    assert peer.posts() == 2
    assert len(peer.requests) == 4


async def test_a_connection_that_its_peer_does_not_close_ends_with_the_session(
    listen: Listen, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response said that it would be closed; TLS would wait 30 s for the peer's part of that."""
    peer.url = f"https://localhost:{await listen(peer.serve, trust(monkeypatch))}"

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(200, nodes(execution_id(head)), "Connection: close"))
        writer.transport.pause_reading()

    peer.respond = respond
    async with session_at(peer) as session:
        assert await value_of(session, 1) == "1"
        (writer,) = peer.writers
        connection = writer.get_extra_info("socket").dup()
    with connection:
        connection.setblocking(True)
        connection.settimeout(5)
        with suppress(ConnectionError):
            while await asyncio.to_thread(connection.recv, 65536):
                pass


async def test_closing_leaves_no_socket_of_a_tls_connection_that_was_being_made(
    listen: Listen, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task is cancelled as the handshake ends; asyncio then waits for a `close_notify`."""

    class Silent(ssl.SSLObject):
        def unwrap(self) -> Any:
            raise ssl.SSLWantReadError  # so that no `close_notify` is sent

    class CancelledHandshake(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            asyncio.get_running_loop().call_soon(call.cancel)

    class Recorded(socket.socket):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            opened.append(self)

    theirs = trust(monkeypatch)
    theirs.sslobject_class = Silent
    port = await listen(peer.serve, theirs)
    peer.url = f"https://localhost:{port}"
    ours = aiohttp.connector._SSL_CONTEXT_VERIFIED  # type: ignore[attr-defined]
    ours.sslobject_class = CancelledHandshake
    opened: list[socket.socket] = []
    monkeypatch.setattr(socket, "socket", Recorded)
    async with session_at(peer) as session:
        call = asyncio.create_task(session.get_results(1))
        await asyncio.wait([call])
    assert call.cancelled()
    assert opened
    assert not [one for one in opened if one.fileno() >= 0 and one.getsockname()[1] != port]


@pytest.mark.parametrize("steps", [None, *range(16)])
async def test_a_broken_connection_does_not_keep_others_open(
    listen: Listen,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    steps: int | None,
) -> None:
    """A byte too many closes it twice: aiohttp could not close it then, and forgot all others.

    Also if all tasks are cancelled some steps later, as by the end of `asyncio.run`.
    """
    peer.url = f"https://localhost:{await listen(peer.serve, trust(monkeypatch))}"
    broken: list[asyncio.StreamWriter] = []

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        response = answer(200, nodes(execution_id(head)))
        size = response.index(b"\r\n\r\n") + 4
        writer.write(response[:size])
        for _ in range(20):  # until the head is read
            await asyncio.sleep(0)
        writer.write(response[size:])
        if execution_id(head) == "1":
            writer.write(b"X")
            writer.transport.pause_reading()  # so that nothing answers TLS's `close_notify`
            broken.append(writer)

    peer.respond = respond
    async with session_at(peer) as session:
        values = await asyncio.gather(*(value_of(session, number) for number in range(1, 5)))
        if steps is not None:
            closing = [asyncio.create_task(session.aclose())]
            for _ in range(steps):
                await asyncio.sleep(0)
            closing += [task for task in asyncio.all_tasks() if "promptlayer" in task.get_name()]
            for task in closing:
                task.cancel()
            ended = await asyncio.gather(*closing, return_exceptions=True)
            assert not [error for error in ended if isinstance(error, Exception)]
    assert values == ["1", "2", "3", "4"]
    async with asyncio.timeout(5):
        for writer in peer.writers:
            if writer not in broken:
                with suppress(ConnectionError):
                    await writer.wait_closed()
    assert caplog.text == ""


@pytest.mark.parametrize("part", [b"Too Many", b"Too Many Requests\r\nVia: "])
@pytest.mark.parametrize("status", [b"429", b"400"])
async def test_a_refusal_with_another_head_in_its_own_does_not_prove_that_nothing_started(
    peer: Peer, status: bytes, part: bytes
) -> None:
    """A part of a head may have arrived with the handshake, where a borrowed session hides it."""

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %b %b" % (status, part))
        await peer.echo(head, writer)

    peer.respond = respond
    async with session_at(peer) as session:
        with pytest.raises(
            StartUnknown, match="a part of the answer came before the start was sent"
        ):
            await session.start("name")
    assert peer.posts() == 1


async def test_a_proxy_may_name_its_protocol_and_the_status_that_it_got(peer: Peer) -> None:
    """`Via` may have the protocol's name, and a host that is a number."""
    headers = ["Via: HTTP/1.1 192.168.1.20", "X-Upstream-Status: HTTP/1.1 201 Created"]

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        if head.startswith("POST"):
            writer.write(answer(201, {"workflow_version_execution_id": 787}, *headers))
        else:
            writer.write(answer(200, nodes(execution_id(head)), *headers))

    peer.respond = respond
    async with session_at(peer) as session:
        assert (await session.start("name")).id == 787
        assert await value_of(session, 5) == "5"


class FirstTime:
    """Hooks of a start that do something before its first attempt is sent."""

    def __init__(self, act: Callable[[], Awaitable[None]]) -> None:
        self._act = act
        self._attempts = 0

    async def before_send(self) -> None:
        """Act, the first time."""
        self._attempts += 1
        if self._attempts == 1:
            await self._act()

    async def not_sent(self) -> None:
        """Do nothing."""


STALE = b"HTTP/1.1 429 Too Many Requests\r\nX-Stale: "


async def write_early(writer: asyncio.StreamWriter) -> None:
    """Write a part of a head, and let the loop read it."""
    writer.write(STALE)
    for _ in range(20):
        await asyncio.sleep(0)


async def write_late(writer: asyncio.StreamWriter) -> None:
    """Write a part of a head that the loop has not read yet."""
    writer.write(STALE)


async def end(writer: asyncio.StreamWriter) -> None:
    """Close the connection."""
    if writer.can_write_eof():
        writer.write_eof()
    else:
        writer.close()


async def do_nothing(writer: asyncio.StreamWriter) -> None:
    """Leave the connection as it is."""


async def test_a_call_over_tls_that_is_cancelled_leaves_no_connection(
    listen: Listen, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever step of connecting and reading: aiohttp would warn of one that is not closed."""
    peer.url = f"https://localhost:{await listen(peer.serve, trust(monkeypatch))}"
    async with session_at(peer) as session:
        for steps in range(100):
            reading = asyncio.create_task(value_of(session, 1))
            for _ in range(steps):
                await asyncio.sleep(0)
            was_done = reading.done()
            reading.cancel()
            await asyncio.wait([reading])
            assert was_done or reading.cancelled()
        assert await value_of(session, 2) == "2"
    gc.collect()


@pytest.mark.parametrize("is_borrowed", [False, True], ids=["own", "borrowed"])
@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("act", [do_nothing, write_early, write_late, end])
async def test_a_part_of_a_head_before_a_start_is_sent_is_not_its_answer(
    listen: Listen,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    *,
    act: Callable[[asyncio.StreamWriter], Awaitable[None]],
    is_secure: bool,
    is_borrowed: bool,
) -> None:
    """The start is sent on another connection, once; here, the first has it at once or later."""
    accepted = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not peer.writers and act is do_nothing:
            writer.write(STALE)
        accepted.set()
        await peer.serve(reader, writer)

    async def before_send() -> None:
        await accepted.wait()
        await asyncio.sleep(0)
        await act(peer.writers[0])

    port = await listen(serve, trust(monkeypatch) if is_secure else None)
    peer.url = f"http{'s' if is_secure else ''}://localhost:{port}"
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession()) if is_borrowed else None
        session = await stack.enter_async_context(session_at(peer, http=http))
        request = StartRequest("name")
        try:
            execution = await integration.start(session, request, hooks=FirstTime(before_send))
        except StartUnknown:  # honest: it may have arrived just after the start was sent
            assert act is do_nothing
        else:
            assert execution.id == 787
    assert peer.posts() == 1


def trust(monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Return the context of a server for localhost, which aiohttp trusts from now on."""
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.configure_trust(ours)
    authority.issue_cert("localhost").configure_cert(theirs)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", ours)
    return theirs


async def test_many_connections_that_the_server_closed_meanwhile_are_no_failure(
    peer: Peer, recorder: Any
) -> None:
    """However many were closed while the loop was busy, each request soon has a good one."""
    both = asyncio.Barrier(30)

    async def together(head: str, writer: asyncio.StreamWriter) -> None:
        await both.wait()
        await peer.echo(head, writer)

    async with session_at(peer, observers=[recorder]) as session:
        peer.respond = together
        await asyncio.gather(*(value_of(session, number) for number in range(1, 31)))
        peer.respond = peer.echo
        for writer in peer.writers:
            writer.write_eof()  # which the loop reads only after the next step
        got = await asyncio.gather(*(value_of(session, number) for number in range(1, 31)))
    assert got == [str(number) for number in range(1, 31)]
    assert recorder.events == []


async def test_many_connections_with_surplus_responses_are_all_closed(peer: Peer) -> None:
    """However many connections are idle, none returns a response that no request asked for."""
    both = asyncio.Barrier(20)

    async def together(head: str, writer: asyncio.StreamWriter) -> None:
        await both.wait()
        await peer.echo(head, writer)

    async with session_at(peer) as session:
        peer.respond = together
        await asyncio.gather(*(value_of(session, number) for number in range(1, 21)))
        peer.respond = peer.echo
        for writer in peer.writers:
            writer.write(answer(200, nodes("nobody's")))
        got = await asyncio.gather(*(value_of(session, number) for number in range(1, 41)))
    assert got == [str(number) for number in range(1, 41)]


async def test_an_idle_connection_on_which_the_server_speaks_is_closed(peer: Peer) -> None:
    """Otherwise a server that goes on would fill the memory with responses to nothing."""
    async with session_at(peer) as session:
        assert await value_of(session, 1) == "1"
        (writer,) = peer.writers
        writer.write(answer(200, nodes("nobody's")))
        async with asyncio.timeout(5):
            with suppress(ConnectionError):
                await writer.wait_closed()
        assert await value_of(session, 2) == "2"
    assert [connection for connection, _ in peer.requests] == [0, 1]


async def with_the_handshake(
    peer: Peer,
    response: bytes,
    context: ssl.SSLContext,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Serve TLS; the first connection gets `response` in one segment with the handshake's end."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)

    async def call(method: Callable[..., T]) -> T:
        while True:
            try:
                return method()
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                if not (data := await reader.read(2**16)):
                    raise ConnectionResetError from None
                incoming.write(data)

    class Writer:
        def write(self, data: bytes) -> None:
            tls.write(data)

    peer.writers.append(writer)
    try:
        await call(tls.do_handshake)
        if len(peer.writers) == 1:
            tls.write(response)
        while part := (await call(lambda: tls.read(2**16))).decode():
            if part.startswith(("GET", "POST")):  # not the body of a start
                peer.requests.append((len(peer.writers), part))
                await peer.respond(part, Writer())  # type: ignore[arg-type]
    except OSError:
        pass
    finally:
        writer.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("is_start", "is_borrowed"),
    [(False, False), (True, False), (True, True)],
    ids=["read", "start", "borrowed start"],
)
def test_a_response_with_the_end_of_the_handshake_is_never_used(
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_start: bool,
    is_borrowed: bool,
    loop: str,
) -> None:
    """With TLS 1.2, both may be in one segment, and in no socket any more; on uvloop, too."""
    theirs = trust(monkeypatch)
    theirs.maximum_version = ssl.TLSVersion.TLSv1_2
    stale: Any = {"workflow_version_execution_id": 1} if is_start else nodes("nobody's")
    peer = Peer()

    async def main() -> Any:
        status = 201 if is_start else 200
        serve = partial(with_the_handshake, peer, answer(status, stale), theirs)
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        peer.url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        async with server, AsyncExitStack() as stack:
            http = await stack.enter_async_context(aiohttp.ClientSession()) if is_borrowed else None
            session = await stack.enter_async_context(session_at(peer, http=http))
            return (await session.start("w")).id if is_start else await value_of(session, 5)

    new_loop = pytest.importorskip(loop).new_event_loop  # there is no uvloop on Windows
    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(main()) == (787 if is_start else "5")
    assert [connection for connection, _ in peer.requests] == [2]


# On uvloop, there are only two.
@pytest.mark.parametrize(("loop", "steps"), [("asyncio", 2), ("asyncio", 3), ("uvloop", 2)])
def test_a_response_while_a_new_connection_is_looked_at_is_not_used(
    monkeypatch: pytest.MonkeyPatch, loop: str, steps: int
) -> None:
    """Over TLS, that takes steps of the loop; in each, it may be in the socket before the next."""
    theirs = trust(monkeypatch)
    peer = Peer()
    sleep, slept = asyncio.sleep, 0

    async def sleep_while_the_server_speaks(seconds: float) -> None:
        nonlocal slept
        await sleep(seconds)
        slept += 1
        if slept == steps:
            peer.writers[0].write(answer(200, nodes("nobody's")))

    async def main() -> Any:
        server = await asyncio.start_server(peer.serve, "127.0.0.1", 0, ssl=theirs)
        peer.url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        async with server, session_at(peer) as session:
            monkeypatch.setattr(asyncio, "sleep", sleep_while_the_server_speaks)
            got = await value_of(session, 5)
            monkeypatch.setattr(asyncio, "sleep", sleep)
            return got

    new_loop = pytest.importorskip(loop).new_event_loop  # there is no uvloop on Windows
    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(main()) == "5"
    assert slept >= steps


async def test_a_call_that_is_cancelled_while_its_connection_is_looked_at_closes_it(
    listen: Listen, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the garbage collector does, with a warning."""
    peer.url = f"https://localhost:{await listen(peer.serve, trust(monkeypatch))}"
    sleep = asyncio.sleep

    async def be_cancelled(_: float) -> None:
        call.cancel()
        await sleep(0)

    async with session_at(peer) as session:
        call = asyncio.create_task(value_of(session, 5))
        monkeypatch.setattr(asyncio, "sleep", be_cancelled)
        await asyncio.wait([call])
        monkeypatch.setattr(asyncio, "sleep", sleep)
        assert call.cancelled()
        assert await value_of(session, 6) == "6"


async def test_a_response_before_any_request_is_a_failed_connection(
    listen: Listen, peer: Peer
) -> None:
    """Its bytes cannot be the answer; after a few connections it is an error."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(200, nodes("a greeting")))
        peer.writers.append(writer)
        await reader.read()

    peer.url = f"http://127.0.0.1:{await listen(greet)}"
    async with session_at(peer, retry=RetryPolicy(outage=0.0)) as session:

        async def ask() -> None:
            # A request that is sent just before the greeting arrives takes it for its response.
            for number in range(1, 100):
                await value_of(session, number)

        with pytest.raises(ConnectionFailed, match="unrequested bytes"):
            await ask()
    assert len(peer.writers) < 50


async def test_a_connection_that_is_lost_when_it_is_made_is_a_failed_one(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is handed out by aiohttp all the same."""
    connect = aiohttp.TCPConnector.connect

    async def connect_and_lose(*args: Any, **kwargs: Any) -> aiohttp.connector.Connection:
        connection = await connect(*args, **kwargs)
        assert connection.transport is not None
        connection.transport.abort()
        await asyncio.sleep(0)
        assert connection.transport is None
        return connection

    monkeypatch.setattr(aiohttp.TCPConnector, "connect", connect_and_lose)
    async with session_at(peer, retry=RetryPolicy(outage=0.0)) as session:
        with pytest.raises(ConnectionFailed, match="the connection was closed"):
            await value_of(session, 1)
        with pytest.raises(ConnectionFailed, match="no run of workflow 'w' started"):
            await session.start("w")
    async with (
        aiohttp.ClientSession() as http,
        session_at(peer, http=http, retry=RetryPolicy(outage=0.0)) as session,
    ):
        with pytest.raises(ConnectionFailed, match="no run of workflow 'w' started"):
            await session.start("w")
    assert peer.posts() == 0


async def test_a_start_is_not_written_to_a_connection_that_is_gone() -> None:
    """It may be lost between the moment when it is made and that when the body is asked for."""
    once = AsyncMock()
    body = GuardedBody(b"{}", once, math.inf)
    with pytest.raises(ConnectionAbortedError, match="before the start was sent"):
        await body.write(Mock(transport=None))
    assert once.mock_calls == []


def test_nothing_stands_before_the_protocol_of_a_connection_that_was_closed_twice() -> None:
    """Over TLS, asyncio's transport has none by then, and raises AttributeError."""
    raising = ("get_protocol.side_effect", "set_protocol.side_effect")
    gone = Mock(**dict.fromkeys(raising, AttributeError))
    received = Interposed(gone)
    received.begin()
    received.end()
    gone.set_protocol.assert_called_once()


async def test_a_borrowed_session_that_cannot_send_says_so(peer: Peer) -> None:
    """With two ways to authorize, aiohttp sends nothing, and the library's error is raised."""
    headers = {"Authorization": "Bearer x"}
    with pytest.warns(DeprecationWarning, match="deprecated and will be removed"):
        both = aiohttp.ClientSession(auth=aiohttp.BasicAuth("me", "x"), headers=headers)
    async with (
        both as http,
        session_at(peer, http=http) as session,
    ):
        for call in (session.get_results(1), session.start("name")):
            with pytest.raises(ConfigurationError, match="the request failed in http="):
                await call
    assert peer.requests == []


async def test_a_connector_for_another_family_of_addresses_is_a_mistake_in_the_settings(
    peer: Peer,
) -> None:
    """Aiohttp has only an AssertionError without a text for it."""
    connector = aiohttp.TCPConnector(family=socket.AF_INET6)
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        session_at(peer, http=http) as session,
    ):
        with pytest.raises(ConfigurationError, match=r"failed in http=: AssertionError\(\)"):
            await value_of(session, 1)
        with pytest.raises(ConfigurationError, match=r"failed in http=: AssertionError\(\)"):
            await session.start("w")


@pytest.mark.parametrize("end", [aiohttp.ClientSession.close, aiohttp.ClientSession.detach])
async def test_a_borrowed_session_that_is_closed_during_a_call_is_named(
    peer: Peer, end: Callable[[aiohttp.ClientSession], Any]
) -> None:
    """Otherwise the error is one of aiohttp's assertions, or an AttributeError."""

    async def end_session(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        if asyncio.iscoroutine(ended := end(http)):
            await ended
        return await handler(request)

    for call in (lambda session: session.get_results(1), lambda session: session.start("w")):
        connector = aiohttp.TCPConnector()
        async with (
            connector,
            aiohttp.ClientSession(connector=connector, middlewares=[end_session]) as http,
            session_at(peer, http=http) as session,
        ):
            with pytest.raises(
                SessionClosed, match=r"the borrowed aiohttp\.ClientSession is closed"
            ):
                await call(session)
    assert peer.posts() == 0


async def test_an_attribute_error_of_a_middleware_is_raised_as_it_is(peer: Peer) -> None:
    """It is a fault of the caller's, whose traceback shows where."""

    async def fail(*_: Any) -> Any:
        raise AttributeError("mine")

    async with (
        aiohttp.ClientSession(middlewares=[fail]) as http,
        session_at(peer, http=http) as session,
    ):
        with pytest.raises(AttributeError, match="mine"):
            await session.get_results(1)


async def test_a_connection_that_the_server_has_closed_is_not_used(
    peer: Peer, recorder: Any
) -> None:
    """The request is sent over another one at once, and it does not count as a failure."""
    async with session_at(peer, observers=[recorder]) as session:
        assert await value_of(session, 1) == "1"
        peer.writers[0].write_eof()
        assert await value_of(session, 2) == "2"
    assert recorder.events == []


@pytest.mark.parametrize("status", [429, 404, 201])
async def test_no_stale_answer_is_taken_for_a_start_s_in_a_borrowed_session(
    peer: Peer, status: int
) -> None:
    """Neither a stale refusal nor the id of another run is taken for the answer."""
    stale = answer(status, {"workflow_version_execution_id": 1, "message": "stale"})
    for number in range(1, 11):
        async with (
            aiohttp.ClientSession() as http,
            session_at(peer, http=http) as session,
        ):
            assert await value_of(session, number) == str(number)
            # Sent at the same time as the next request, so nothing shows it beforehand.
            asyncio.get_running_loop().call_soon(peer.writers[-1].write, stale)
            execution = await session.start("name")
            assert execution.id == 787
            assert peer.posts() == number


async def test_a_borrowed_session_is_returned_unchanged(peer: Peer) -> None:
    """Its owner can still use it."""
    async with aiohttp.ClientSession() as http:
        async with session_at(peer, http=http) as session:
            await session.start("name")
        async with http.get(f"{peer.url}/x?workflow_version_execution_id=5&y") as response:
            assert (await response.json(content_type=None)) == nodes("5")


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 "], ids=["no HTTP", "a long status line"])
async def test_what_is_not_http_is_quoted_nowhere(
    peer: Peer, caplog: pytest.LogCaptureFixture, start: bytes
) -> None:
    """The parser of aiohttp quotes all that it received, including outputs and the key."""

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(start + b"confidential: " + KEY.encode() + b" " + b"x" * 40_000 + b"\r\n\r\n")

    peer.respond = respond
    async with session_at(peer, retry=RetryPolicy(outage=0.01, base=0.001)) as session:
        with pytest.raises(ConnectionFailed, match="not a valid HTTP response: ") as caught:
            await session.get_results(1)
        with pytest.raises(StartUnknown) as lost:
            await session.start("name")
    said = caplog.text + str(caught.value) + repr(caught.value.__cause__) + str(lost.value)
    assert "confidential" not in said
    assert "bytearray" not in said
    assert KEY not in said
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("ending", ["framing", "headers"])
async def test_a_complete_id_is_read_from_an_otherwise_broken_response(
    peer: Peer, ending: str
) -> None:
    """The last chunk may be missing, or there may be more headers than aiohttp's default allows."""

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        body = b'{"workflow_version_execution_id": 787}'
        if ending == "framing":
            writer.write(b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(b"%x\r\n%b\r\n" % (len(body), body))
        else:
            headers = [f"X-{number}: {'x' * 80}" for number in range(500)]
            writer.write(answer(201, json.loads(body), "X-Long: " + "x" * 30_000, *headers))
        await writer.drain()
        writer.close()

    peer.respond = respond
    async with session_at(peer) as session:
        assert (await session.start("name")).id == 787
    assert peer.posts() == 1


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"message": "a \\"quote\\"", "workflow_version_execution_id": 787, "mess', 787),
        (b'{"workflow_version_execution_id": 787}<!-- added by a proxy -->', 787),
        (b'{"workflow_version_execution_id": 787', None),
        (b'{"parent": {"workflow_version_execution_id": 5}, "warning": "n', None),
        (b'{"warning": "\\"workflow_version_execution_id\\": 5, or so", "m', None),
        (b'{"\\"workflow_version_execution_id": 5, "m', None),
    ],
    ids=[
        "cut after it",
        "followed by something",
        "cut in it",
        "another object's",
        "in a string",
        "another name",
    ],
)
async def test_a_whole_id_is_read_from_a_body_that_is_not_whole(
    peer: Peer, body: bytes, found: int | None
) -> None:
    """The run was paid for; but only what is certainly its own id is taken for it."""

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        is_cut = not body.endswith(b">")
        writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n" % (len(body) + is_cut))
        writer.write(b"\r\n" + body)
        await writer.drain()
        writer.close()

    peer.respond = respond
    async with session_at(peer) as session:
        if found is None:
            with pytest.raises(StartUnknown):
                await session.start("name")
        else:
            assert (await session.start("name")).id == found
    assert peer.posts() == 1


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_a_malformed_body_is_an_invalid_response_though_a_middleware_looks_at_it_first(
    peer: Peer, *, is_chunked: bool
) -> None:
    """When the body is read, the connection is closed already."""

    async def look(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        response = await handler(request)
        connection = response.connection
        assert connection is not None
        async with asyncio.timeout(5):
            while connection.transport is not None:  # noqa: ASYNC110 - aiohttp has no event
                await asyncio.sleep(0)
        return response

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: 100"
        writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % framing)
        for _ in range(10):
            await asyncio.sleep(0)
        part = b'{"workflow_version_execution_id": 787, '
        if is_chunked:
            writer.write(b"%x\r\n%b\r\nno length\r\n" % (len(part), part))
        else:
            writer.write(part)
            writer.close()

    peer.respond = respond
    retry = RetryPolicy(outage=0.0)
    async with (
        aiohttp.ClientSession(middlewares=[look]) as http,
        session_at(peer, http=http, retry=retry) as session,
    ):
        with pytest.raises(InvalidResponse, match="cut short or cannot be decoded"):
            await value_of(session, 1)
        if is_chunked:  # else aiohttp keeps what it has received
            assert (await session.start("name")).id == 787


async def test_an_id_that_has_arrived_survives_a_cancellation_of_the_start(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of the event loop cancels every task while the rest of the body is on its way."""
    has_id = asyncio.Event()

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: 99\r\n\r\n")
        writer.write(b'{"workflow_version_execution_id": 787, "message": "')
        await writer.drain()
        has_id.set()

    peer.respond = respond
    async with session_at(peer) as session:
        starting = asyncio.create_task(session.start("name"))
        await has_id.wait()
        await asyncio.sleep(0.01)
        for task in asyncio.all_tasks():
            if task is starting or task.get_name().startswith("promptlayer_exec"):
                task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert "execution 787 of workflow 'name' started" in caplog.text
    assert peer.posts() == 1


@pytest.mark.parametrize(
    "how",
    [
        "reset after a part",
        "gzip that ends in the middle",
        "coding: identity",
        "coding: x-chunked",
        "utf-16",
        "utf-16-be",
        "utf-32-le",
        "coding: chunked\r\nTransfer-Encoding: identity",
    ],
)
async def test_a_cut_number_is_not_taken_for_a_complete_one(peer: Peer, how: str) -> None:
    """A number is the only JSON value that does not show that its end is missing."""
    complete = answer(200, 1234567890)

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        if len(peer.requests) > 1:
            writer.write(complete)
        elif how == "reset after a part":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n123")
            await writer.drain()
            writer.transport.abort()
        elif how.startswith("utf-"):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + "123".encode(how))
            writer.close()
        elif how.startswith("coding: "):
            coding = how.removeprefix("coding: ").encode()
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: %b\r\n\r\n123" % coding)
            writer.close()
        else:
            packer = zlib.compressobj(wbits=31)
            part = packer.compress(b"123") + packer.flush(zlib.Z_SYNC_FLUSH)
            framing = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(part)
            writer.write(b"HTTP/1.1 200 OK\r\n" + framing + part)

    peer.respond = respond
    async with session_at(peer) as session:
        assert (await session.get_results(1)).value == 1234567890
    assert len(peer.requests) == 2
    assert "Accept-Encoding: identity" in peer.requests[0][1]


@pytest.mark.parametrize("how", ["gzip", "until the connection ends"])
async def test_an_id_before_a_cut_behind_a_digit_is_used(peer: Peer, how: str) -> None:
    """The answer to a start is an object, so the digit is not a part of a number that is all."""
    part = b'{"workflow_version_execution_id": 787, "warning": "took 12'

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 201 Created\r\n")
        if how == "gzip":
            packer = zlib.compressobj(wbits=31)
            packed = packer.compress(part) + packer.flush(zlib.Z_SYNC_FLUSH)
            writer.write(b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed))
            writer.write(packed)
        else:
            writer.write(b"\r\n" + part)
        writer.close()

    peer.respond = respond
    async with session_at(peer) as session:
        assert (await session.start("name")).id == 787


class OwnResponse(aiohttp.ClientResponse):
    """A response whose text is not what was received."""

    async def text(self, *_: Any, **__: Any) -> str:
        """Return it with a character that it has not."""
        return (await self.read()).decode() + "\u20ac"


@pytest.mark.parametrize("reader", ["middleware", "releasing middleware", "trace", "own text"])
async def test_a_body_that_a_borrowed_session_has_read_already_is_not_lost(
    peer: Peer, reader: str
) -> None:
    """As for a log; aiohttp keeps it in the response."""

    async def read(request: Any, handler: Any) -> Any:
        response = await handler(request)
        assert await response.text()
        if reader.startswith("releasing"):
            response.release()
        return response

    async def look(http: Any, context: Any, request: Any) -> None:
        assert await request.response.text()

    tracing = aiohttp.TraceConfig()
    tracing.on_request_end.append(look)
    settings: Any = {"middlewares": [read]}
    if reader == "trace":
        settings = {"trace_configs": [tracing]}
    elif reader == "own text":
        settings["response_class"] = OwnResponse
    async with aiohttp.ClientSession(**settings) as http, session_at(peer, http=http) as session:
        execution = await session.start("name")
        assert execution.id == 787
        assert (await execution.wait()).nodes["Node 1"].value == "787"
    assert peer.posts() == 1


async def test_a_middleware_that_sends_twice_at_once_does_not_send_a_start_twice(
    peer: Peer,
) -> None:
    """As a hedging one does, while `before_send` waits."""

    async def hedge(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        tasks = [asyncio.ensure_future(handler(request)) for _ in range(2)]
        await asyncio.wait(tasks)
        return next(task.result() for task in tasks if task.exception() is None)

    class Hooks:
        async def before_send(self) -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        async def not_sent(self) -> None:
            pass

    async with (
        aiohttp.ClientSession(middlewares=[hedge]) as http,
        session_at(peer, http=http) as session,
    ):
        with suppress(StartUnknown):
            await integration.start(session, StartRequest("name"), hooks=Hooks())
    assert peer.posts() == 1


@pytest.mark.parametrize("is_held", [True, False], ids=["held by a hook", "not begun"])
async def test_an_attempt_that_a_middleware_gave_up_does_not_send_a_start_later(
    peer: Peer, *, is_held: bool
) -> None:
    """As one does that shields what it sends, and waits for it for a while only."""
    given_up: list[asyncio.Task[Any]] = []
    hooks = Hooks()

    async def give_up(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        if given_up:
            return await handler(request)

        async def send() -> aiohttp.ClientResponse:
            if not is_held:
                await hooks.repeated.wait()
            return await handler(request)

        given_up.append(asyncio.create_task(send()))
        if is_held:
            await hooks.held.wait()
        raise aiohttp.ClientConnectionError("it takes too long")

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.wait(given_up)
        await peer.echo(head, writer)

    peer.respond = respond
    if not is_held:
        hooks.held.set()
    async with (
        aiohttp.ClientSession(middlewares=[give_up]) as http,
        session_at(peer, http=http) as session,
    ):
        execution = await integration.start(session, StartRequest("name"), hooks=hooks)
    assert execution.id == 787
    assert given_up[0].cancelled() or given_up[0].exception() is not None
    assert peer.posts() == 1


class Hooks:
    """Hooks of a start that hold its first attempt until the second."""

    def __init__(self) -> None:
        self.held, self.repeated = asyncio.Event(), asyncio.Event()

    async def before_send(self) -> None:
        """Wait, the first time."""
        if self.held.is_set():
            self.repeated.set()
        else:
            self.held.set()
            await self.repeated.wait()

    async def not_sent(self) -> None:
        """Do nothing."""


async def test_a_middleware_that_sends_again_does_not_send_a_start_twice(peer: Peer) -> None:
    """A borrowed session's own retries do not apply to starts."""

    async def retry(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        response = await handler(request)
        return response if response.status < 500 else await handler(request)

    async def fail(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(503, {}))

    peer.respond = fail
    async with (
        aiohttp.ClientSession(middlewares=[retry]) as http,
        session_at(peer, http=http) as session,
    ):
        with pytest.raises(StartUnknown):
            await session.start("name")
    assert peer.posts() == 1


async def test_a_middleware_must_not_replace_the_body_of_a_start(peer: Peer) -> None:
    """The client would not see when it is sent, so it could be sent twice."""

    async def sign(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        if request.method == "POST":
            await request.update_body(b"{}")
        return await handler(request)

    async with (
        aiohttp.ClientSession(middlewares=[sign]) as http,
        session_at(peer, http=http) as session,
    ):
        assert await value_of(session, 1) == "1"
        with pytest.raises(
            ConnectionFailed, match="must not replace the body of a start"
        ) as caught:
            await session.start("name")
    assert (peer.posts(), caught.value.attempts) == (0, 1)


@pytest.mark.parametrize("is_read", [True, False], ids=["read by the loop", "still in the socket"])
@pytest.mark.parametrize("status", [201, 408, 429, 503, None])
async def test_what_arrives_before_a_start_is_sent_is_not_its_answer(
    peer: Peer, *, status: int | None, is_read: bool
) -> None:
    """The start is sent on another connection, once; a proxy may tire of a slow hook."""

    class Hooks:
        def __init__(self) -> None:
            self.calls: list[str] = []

        async def before_send(self) -> None:
            """Let something arrive on the first connection, and wait until it was read."""
            self.calls.append("before_send")
            if len(self.calls) == 1:
                (writer,) = peer.writers
                if status is None:  # the connection ends
                    writer.transport.abort()
                    await asyncio.sleep(0)  # asyncio closes the socket in the next step
                else:
                    writer.write(answer(status, {"workflow_version_execution_id": 666}))
                if is_read:
                    await asyncio.Event().wait()

        async def not_sent(self) -> None:
            """Keep the call."""
            self.calls.append("not_sent")

    hooks = Hooks()
    async with session_at(peer) as session:
        execution = await integration.start(session, StartRequest("name"), hooks=hooks)
    assert execution.id == 787
    assert peer.posts() == 1
    assert hooks.calls == ["before_send", "not_sent", "before_send"]


async def test_a_start_is_not_sent_when_its_time_is_up(peer: Peer) -> None:
    """The loop was blocked before it was sent, so no time is left for the answer."""
    stood_still = False

    async def block(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        nonlocal stood_still
        if not stood_still:
            stood_still = True
            time.sleep(0.6)  # noqa: ASYNC251 - as in a debugger
        return await handler(request)

    async def respond(head: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await peer.echo(head, writer)

    peer.respond = respond
    async with (
        aiohttp.ClientSession(middlewares=[block]) as http,
        session_at(peer, http=http, request_timeout=0.5) as session,
    ):
        assert (await session.start("name")).id == 787
    assert peer.posts() == 1


async def test_a_server_that_keeps_connections_does_not_delay_a_borrowed_start(
    peer: Peer, recorder: Any
) -> None:
    """The server ignores `Connection: close`, but each start still has a new connection."""
    async with (
        aiohttp.ClientSession() as http,
        session_at(peer, http=http, observers=[recorder]) as session,
    ):
        await asyncio.gather(*(session.start("name") for _ in range(10)))
        for _ in range(10):
            await session.start("name")
    assert peer.posts() == 20
    assert len({connection for connection, _ in peer.requests}) == 20
    assert {type(event) for event in recorder.events} == {ExecutionStarted}


@pytest.mark.parametrize("borrowed", [False, True])
async def test_an_id_in_the_socket_is_read_after_a_blocked_loop(
    peer: Peer, recorder: Any, *, borrowed: bool
) -> None:
    """The loop was blocked longer than `request_timeout`, but the answer arrived in time."""

    async def block(head: str, writer: asyncio.StreamWriter) -> None:
        await peer.echo(head, writer)
        time.sleep(0.15)  # noqa: ASYNC251 - the loop is blocked, and the answer is in the socket

    peer.respond = block
    async with aiohttp.ClientSession() as http:
        settings: dict[str, Any] = {"http": http} if borrowed else {}
        async with session_at(
            peer, request_timeout=0.1, observers=[recorder], **settings
        ) as session:
            execution = await session.start("name")
            assert execution.id == 787
            snapshot = await execution.wait()
            assert snapshot.nodes["Node 1"].value == "787"
    assert peer.posts() == 1
    assert [event.execution_id for event in recorder.of(ExecutionStarted)] == [787]


async def test_results_in_the_socket_come_before_a_late_deadline(peer: Peer) -> None:
    """The loop was blocked beyond the follower's deadline, and the execution is complete."""

    async def block(head: str, writer: asyncio.StreamWriter) -> None:
        await peer.echo(head, writer)
        time.sleep(0.15)  # noqa: ASYNC251 - as above

    peer.respond = block
    async with session_at(peer) as session:
        assert (await session.execution(5).wait(timeout=0.1)).complete
        assert (await session.execution(5).snapshot()).complete


async def test_silence_after_a_blocked_loop_is_still_a_timeout(peer: Peer) -> None:
    """The client reads once more, but does not wait another `request_timeout`."""

    async def silent(head: str, writer: asyncio.StreamWriter) -> None:
        time.sleep(0.15)  # noqa: ASYNC251 - as above

    peer.respond = silent
    async with session_at(peer, request_timeout=0.1, retry=RetryPolicy(outage=0.0)) as session:
        with pytest.raises(StartUnknown):
            await session.start("name")
        with pytest.raises(RequestTimeout):
            await session.get_results(1)
