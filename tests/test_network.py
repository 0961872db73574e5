"""A hostile network: a proxy that fails on demand, and cancellation at every await."""

from __future__ import annotations

import asyncio
import gc
import gzip
import logging
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import aiohttp
import pytest
from yarl import URL

from promptlayer_exec import (
    BadRequest,
    ConnectionFailed,
    Execution,
    ExecutionStarted,
    ExecutionTimeout,
    Forbidden,
    InvalidResponse,
    MainOutput,
    NotFound,
    PollPolicy,
    RateLimited,
    RequestError,
    RequestRetried,
    RequestTimeout,
    RetryPolicy,
    Session,
    SessionClosed,
    Snapshot,
    StartUnknown,
    StatusError,
    Unauthorized,
    UnprocessableEntity,
    WatchEnded,
)
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

NO_RETRY = RetryPolicy(outage=0.0, watch_outage=0.0)
SHORT = 0.15  # a request timeout that should expire
LONG = 10.0  # a request timeout that should not expire
# Sleeps that end in the next step of the loop, so that steps can be counted.
AT_ONCE = RetryPolicy(base=0.0)
NO_TIME = "0.000000001"


@dataclass(frozen=True)
class Answer:
    """A server's answer, to be framed again as a head and a body."""

    lines: tuple[bytes, ...]
    body: bytes

    def head(self, *framing: bytes) -> bytes:
        """Return the status line and the headers."""
        return b"\r\n".join([*self.lines, *framing, b"", b""])

    def sized(self) -> tuple[bytes, bytes]:
        """State the body's length in the head."""
        return self.head(b"Content-Length: %d" % len(self.body)), self.body

    def chunked(self) -> tuple[bytes, bytes]:
        """Send the body in two chunks."""
        parts = self.body[:2], self.body[2:]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        return self.head(b"Transfer-Encoding: chunked"), chunks + b"0\r\n\r\n"

    def unsized(self) -> tuple[bytes, bytes]:
        """End the body by closing the connection."""
        return self.head(b"Connection: close"), self.body


class Exchange:
    """One request at the proxy, whose first byte has arrived."""

    def __init__(
        self,
        proxy: Proxy,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        first: bytes,
        number: int,
    ) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._first = first
        self._number = number

    async def fetch(self) -> Answer:
        """Read the whole request, forward it to the server, and return the answer."""
        head = self._first + await self._reader.readuntil(b"\r\n\r\n")
        headers = (line.partition(b":") for line in head.lower().split(b"\r\n"))
        length = next((value for name, _, value in headers if name == b"content-length"), b"0")
        body = await self._reader.readexactly(int(length))
        self._proxy.requests.append((head.split()[0].decode(), self._number))
        return await self._proxy.forward(head + body)

    async def send(self, data: bytes) -> None:
        """Write to the client."""
        self._writer.write(data)
        await self._writer.drain()

    async def silence(self, seconds: float | None = None) -> None:
        """Send nothing for some seconds; raise an error if the client disconnects."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._reader.read()
                raise ConnectionResetError

    async def cut(self) -> None:
        """Close the connection cleanly."""
        self._writer.close()

    async def reset(self) -> None:
        """End the connection with a TCP reset."""
        reset(self._writer)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection by a TCP reset."""
    at_once = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    writer.transport.abort()


Action: TypeAlias = Callable[[Exchange], Awaitable[None]]


async def behave(exchange: Exchange) -> None:
    """Forward the request and its answer."""
    await exchange.send(b"".join((await exchange.fetch()).sized()))


async def reset_at_accept(exchange: Exchange) -> None:
    """Reset the connection before anything is read; the proxy does it without calling this."""
    raise AssertionError("this is for new connections")


async def reset_on_arrival(exchange: Exchange) -> None:
    """Reset the connection before the whole request is read."""
    await exchange.reset()


async def close_when_answered(exchange: Exchange) -> None:
    """Promise to keep the connection open, and close it."""
    head, body = (await exchange.fetch()).sized()
    await exchange.send(head[:-2] + b"Keep-Alive: timeout=60\r\n\r\n" + body)
    await exchange.cut()


Framing: TypeAlias = Callable[[Answer], tuple[bytes, bytes]]
Cut: TypeAlias = Callable[[bytes, bytes], bytes]


def stop(
    at: Cut, ending: Callable[[Exchange], Awaitable[None]], framing: Framing = Answer.sized
) -> Action:
    """Return an action that sends a part of the answer and then stops."""

    async def action(exchange: Exchange) -> None:
        head, body = framing(await exchange.fetch())
        await exchange.send(at(head, body))
        await ending(exchange)

    return action


def nothing(head: bytes, body: bytes) -> bytes:
    """Stop before the headers."""
    return b""


def half_the_head(head: bytes, body: bytes) -> bytes:
    """Stop within the headers."""
    return head[: len(head) // 2]


def the_head(head: bytes, body: bytes) -> bytes:
    """Stop after the headers."""
    return head


def half_the_body(head: bytes, body: bytes) -> bytes:
    """Stop within the body."""
    return head + body[: len(body) // 2]


def trickle(pause: float, size: int = 1) -> Action:
    """Return an action that sends the answer in small pieces."""

    async def action(exchange: Exchange) -> None:
        data = b"".join((await exchange.fetch()).sized())
        for start in range(0, len(data), size):
            await exchange.send(data[start : start + size])
            await exchange.silence(pause)

    return action


def endless(start: bytes, more: bytes) -> Action:
    """Return an action that sends a head without end."""

    async def action(exchange: Exchange) -> None:
        await exchange.fetch()
        await exchange.send(b"HTTP/1.1 " + start)
        while True:
            await exchange.send(more)
            await exchange.silence(0)

    return action


async def corrupt_text(exchange: Exchange) -> None:
    """Answer with a body that is not valid UTF-8."""
    answer = await exchange.fetch()
    middle = len(answer.body) // 2
    body = answer.body[:middle] + b"\xff" + answer.body[middle + 1 :]
    await exchange.send(b"".join(Answer(answer.lines, body).sized()))


async def corrupt_gzip(exchange: Exchange) -> None:
    """Answer with a compressed body that has one wrong byte."""
    answer = await exchange.fetch()
    packed = bytearray(gzip.compress(answer.body))
    packed[-8] ^= 0xFF  # in the checksum
    head = answer.head(b"Content-Encoding: gzip", b"Content-Length: %d" % len(packed))
    await exchange.send(head + packed)


async def corrupt_chunk(exchange: Exchange) -> None:
    """Answer with a second chunk whose size is not a number."""
    answer = await exchange.fetch()
    head, body = answer.chunked()
    await exchange.send(head + body[:7] + b"?" + body[8:])


class Proxy:
    """Forwards HTTP exchanges, and applies each given action to one request.

    Attributes:
        requests: the method of each request that was read, and its number on its connection.
        connections: how many connections there were.
        resets_reused: whether every request after the first on a connection is reset.
    """

    def __init__(self, upstream: str) -> None:
        url = URL(upstream)
        self._upstream = url.host, url.port
        self.requests: list[tuple[str, int]] = []
        self.connections = 0
        self.resets_reused = False
        self._actions: deque[Action] = deque()
        self._idle: set[asyncio.StreamWriter] = set()
        self._tasks: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self._socket = bound()
        self._port = self._socket.getsockname()[1]
        self._server: asyncio.Server | None = None

    @property
    def base_url(self) -> str:
        """The URL of the proxy."""
        return f"http://127.0.0.1:{self._port}"

    def count(self, method: str) -> int:
        """Return how many requests with a method were read completely."""
        return [seen for seen, _ in self.requests].count(method)

    def misbehave(self, *actions: Action) -> None:
        """Apply each of `actions` to one of the next requests."""
        self._actions.extend(actions)
        if self._wants_a_new_connection():
            for writer in self._idle:
                writer.close()

    def behave(self) -> None:
        """Drop the actions that are still to come."""
        self._actions.clear()

    async def accept_connections(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._serve, sock=self._socket)

    async def refuse_connections(self) -> None:
        """Refuse connections, and abort the open ones."""
        assert self._server is not None
        self._server.close()
        # Bound at once, so that no other process takes the port; without `listen` it refuses.
        self._socket = bound(self._port)
        for writer in self._tasks.values():
            writer.transport.abort()
        await self._settle()

    async def __aenter__(self) -> Self:
        await self.accept_connections()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._settle()
        if self._server is not None:
            self._server.close()
        self._socket.close()

    async def _settle(self) -> None:
        """Wait until every connection is closed; a connection that stays open fails the test."""
        async with asyncio.timeout(LONG):
            await asyncio.gather(*self._tasks)
        self._tasks.clear()

    async def forward(self, request: bytes) -> Answer:
        """Send a request to the server over a new connection."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
            (length,) = (line for line in lines if line.startswith(b"Content-Length:"))
            lines.remove(length)
            return Answer(tuple(lines), await reader.readexactly(int(length[15:])))
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = writer
        self.connections += 1
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client disconnected
        finally:
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._wants_a_new_connection():
            self._actions.popleft()
            reset(writer)
        number = 0
        while not writer.is_closing() and not self._wants_a_new_connection():
            self._idle.add(writer)
            first = await reader.read(1)
            self._idle.discard(writer)
            if not first:
                break
            number += 1
            action = self._actions.popleft() if self._actions else behave
            if self.resets_reused and number > 1:
                action = reset_on_arrival
            await action(Exchange(self, reader, writer, first, number))

    def _wants_a_new_connection(self) -> bool:
        return bool(self._actions) and self._actions[0] is reset_at_accept


def bound(port: int = 0) -> socket.socket:
    """Return a socket that has a port but does not listen yet."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


@pytest.fixture
async def proxy(sim: Simulator) -> AsyncIterator[Proxy]:
    """Return a proxy in front of `sim`."""
    async with Proxy(sim.base_url) as proxy:
        yield proxy


@pytest.fixture
def connect(proxy: Proxy, open_session: Callable[..., Session]) -> Callable[..., Session]:
    """Return a function that makes sessions that reach `sim` through `proxy`."""

    def make(**overrides: Any) -> Session:
        return open_session(base_url=proxy.base_url, **overrides)

    return make


NODES = {"Plan": "done", "Answer": "42"}


@pytest.fixture
def done(sim: Simulator) -> int:
    """Return the id of an execution that is complete."""
    return sim.add_execution(
        Scenario([SimNode("Plan", "done"), SimNode("Answer", "42", is_output_node=True)])
    )


def values(snapshot: Snapshot) -> dict[str, Any]:
    """Return the nodes' values."""
    return {name: node.value for name, node in snapshot.nodes.items()}


@dataclass(frozen=True)
class Failure:
    """A failure of one request.

    Attributes:
        action: what the proxy does.
        error: the error of a GET.
        request_timeout: the session's setting, in seconds.
        reaches_server: whether the server gets the request.
    """

    action: Action
    error: type[RequestError]
    request_timeout: float = LONG
    reaches_server: bool = True


FAILURES = {
    "reset at accept": Failure(reset_at_accept, ConnectionFailed, reaches_server=False),
    "reset on arrival": Failure(reset_on_arrival, ConnectionFailed, reaches_server=False),
    "reset before the head": Failure(stop(nothing, Exchange.reset), ConnectionFailed),
    "reset within the head": Failure(stop(half_the_head, Exchange.reset), ConnectionFailed),
    "reset after the head": Failure(stop(the_head, Exchange.reset), InvalidResponse),
    "reset within the body": Failure(stop(half_the_body, Exchange.reset), InvalidResponse),
    "cut before the head": Failure(stop(nothing, Exchange.cut), ConnectionFailed),
    "cut within the head": Failure(stop(half_the_head, Exchange.cut), ConnectionFailed),
    "cut after the head": Failure(stop(the_head, Exchange.cut), InvalidResponse),
    "cut within the body": Failure(stop(half_the_body, Exchange.cut), InvalidResponse),
    "cut within a chunk": Failure(
        stop(half_the_body, Exchange.cut, Answer.chunked), InvalidResponse
    ),
    "cut without a length": Failure(
        stop(half_the_body, Exchange.cut, Answer.unsized), InvalidResponse
    ),
    "silence": Failure(stop(nothing, Exchange.silence), RequestTimeout, SHORT),
    "silence within the body": Failure(
        stop(half_the_body, Exchange.silence), RequestTimeout, SHORT
    ),
    "a byte every 50 ms": Failure(trickle(0.05), RequestTimeout, SHORT),
    "a header without end": Failure(
        endless(b"200 OK\r\nX-Filler: ", b"x" * 1000), ConnectionFailed
    ),
    "headers without end": Failure(
        endless(b"200 OK\r\n", b"X-Filler: x\r\n" * 9), ConnectionFailed
    ),
    "provisional answers without end": Failure(
        endless(b"", b"100 Continue\r\n\r\nHTTP/1.1 "), RequestTimeout, SHORT
    ),
    "corrupt UTF-8": Failure(corrupt_text, InvalidResponse),
    "corrupt gzip": Failure(corrupt_gzip, InvalidResponse),
    "corrupt chunk": Failure(corrupt_chunk, ConnectionFailed),
}
in_each_failure = pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
# A start may notice the reset before it is sent, and is then sent on another connection.
AFTER_ACCEPT = {name: it for name, it in FAILURES.items() if name != "reset at accept"}
in_each_failure_after_accept = pytest.mark.parametrize(
    "failure", AFTER_ACCEPT.values(), ids=AFTER_ACCEPT
)
with_both_flags = pytest.mark.parametrize("everything", [False, True], ids=["main output", "all"])
# Without an answer in time, the kind of request makes no difference.
in_each_trouble_of_a_call = pytest.mark.parametrize(
    ("failure", "everything"),
    [
        pytest.param(failure, everything, id=f"{name}-{'all' if everything else 'main output'}")
        for name, failure in FAILURES.items()
        for everything in ([False] if failure.request_timeout == SHORT else [False, True])
    ],
)


@in_each_trouble_of_a_call
async def test_a_single_call_survives_it(
    connect: Callable[..., Session],
    proxy: Proxy,
    done: int,
    recorder: Any,
    *,
    failure: Failure,
    everything: bool,
) -> None:
    """A second attempt gets the right result, and the retry is reported with the error."""
    session = connect(request_timeout=failure.request_timeout)
    proxy.misbehave(failure.action)
    result = await session.get_results(done, return_all_outputs=everything)
    assert result.complete
    if isinstance(result, MainOutput):
        assert result.value == "42"
    else:
        assert values(result) == NODES
    (retried,) = recorder.of(RequestRetried)
    assert type(retried.error) is failure.error
    assert (retried.execution_id, retried.error.execution_id) == (done, done)
    assert retried.error.attempts == 1
    assert proxy.count("GET") == 1 + failure.reaches_server


@in_each_trouble_of_a_call
async def test_a_single_call_without_retries_fails_with_it(
    connect: Callable[..., Session],
    proxy: Proxy,
    done: int,
    recorder: Any,
    *,
    failure: Failure,
    everything: bool,
) -> None:
    """After one attempt, it raises the right error with the execution's id and the cause."""
    session = connect(request_timeout=failure.request_timeout, retry=NO_RETRY)
    proxy.misbehave(failure.action)
    with pytest.raises(RequestError) as caught:
        await session.get_results(done, return_all_outputs=everything)
    error = caught.value
    assert type(error) is failure.error
    assert (error.execution_id, error.attempts, error.last_snapshot) == (done, 1, None)
    assert error.__cause__ is not None
    assert recorder.of(RequestRetried) == []
    assert proxy.connections == 1
    assert proxy.count("GET") == failure.reaches_server


@in_each_failure
async def test_a_watch_survives_it(
    connect: Callable[..., Session],
    proxy: Proxy,
    sim: Simulator,
    held: int,
    recorder: Any,
    *,
    failure: Failure,
) -> None:
    """Every follower gets the complete snapshot at the end, and no poll twice."""
    execution = connect(request_timeout=failure.request_timeout).execution(held)
    waiting = asyncio.create_task(execution.wait())
    polls = []
    async with aclosing(execution.stream()) as snapshots:
        async for snapshot in snapshots:
            polls.append(snapshot.poll)
            if snapshot.poll == 1:
                proxy.misbehave(failure.action)
            elif snapshot.poll == 2:
                sim.finish(held, "Answer")
    assert polls == [1, 2, 3]
    assert (values(snapshot), await waiting) == (NODES, snapshot)
    (retried,) = recorder.of(RequestRetried)
    assert type(retried.error) is failure.error
    assert proxy.count("GET") == 3 + failure.reaches_server


@in_each_failure
async def test_a_watch_without_retries_ends_with_it(
    connect: Callable[..., Session],
    proxy: Proxy,
    held: int,
    recorder: Any,
    *,
    failure: Failure,
) -> None:
    """Every follower gets the right error with the id, the cause and the last snapshot."""
    session = connect(request_timeout=failure.request_timeout, retry=NO_RETRY)
    seen: list[Snapshot] = []

    async def stream() -> None:
        async with aclosing(session.execution(held).stream()) as snapshots:
            async for snapshot in snapshots:
                seen.append(snapshot)
                proxy.misbehave(failure.action)

    followers = stream(), session.execution(held).wait()
    errors: list[Any] = await asyncio.gather(*followers, return_exceptions=True)
    for error in errors:
        assert type(error) is failure.error
        assert (error.execution_id, error.attempts) == (held, 1)
        assert error.__cause__ is not None
        assert [error.last_snapshot] == seen
    assert errors[0] is not errors[1]
    (ended,) = recorder.of(WatchEnded)
    assert (ended.polls, type(ended.error)) == (1, failure.error)
    assert recorder.of(RequestRetried) == []


async def test_a_watch_that_never_had_an_answer_has_no_snapshot(
    connect: Callable[..., Session], proxy: Proxy, held: int, recorder: Any
) -> None:
    """Its error still has the id."""
    proxy.misbehave(reset_at_accept)
    with pytest.raises(ConnectionFailed) as caught:
        await connect(retry=NO_RETRY).execution(held).wait()
    assert (caught.value.execution_id, caught.value.last_snapshot) == (held, None)
    (ended,) = recorder.of(WatchEnded)
    assert (ended.polls, ended.error.execution_id) == (0, held)


async def test_a_watch_survives_one_failure_after_another(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, held: int, recorder: Any
) -> None:
    """Every failure but the timeouts hits the same poll, and the final snapshot is complete."""
    failures = [failure for failure in FAILURES.values() if failure.request_timeout == LONG]
    retry = RetryPolicy(watch_outage=LONG, base=0.001, ceiling=0.002)
    proxy.misbehave(behave, *(failure.action for failure in failures))
    waiting = asyncio.create_task(connect(retry=retry).execution(held).wait())
    while len(recorder.of(RequestRetried)) < len(failures):
        await recorder.next(RequestRetried)
    sim.finish(held, "Answer")
    assert values(await waiting) == NODES
    errors = [event.error for event in recorder.of(RequestRetried)]
    assert [type(error) for error in errors] == [failure.error for failure in failures]
    assert [error.attempts for error in errors] == [*range(1, len(failures) + 1)]


@with_both_flags
async def test_an_answer_that_trickles_in_is_read(
    connect: Callable[..., Session], proxy: Proxy, done: int, recorder: Any, *, everything: bool
) -> None:
    """A slow answer is a good answer."""
    proxy.misbehave(trickle(0.0))
    assert (await connect().get_results(done, return_all_outputs=everything)).complete
    assert recorder.of(RequestRetried) == []


LARGE = "x" * 2_000_000


def half_and_then(on: Callable[[Exchange, bytes], Awaitable[None]]) -> tuple[Action, asyncio.Event]:
    """Return an action that sends half a large body, and an event set once it was sent."""
    sent = asyncio.Event()

    async def action(exchange: Exchange) -> None:
        head, body = (await exchange.fetch()).sized()
        middle = len(body) // 2
        await exchange.send(head + body[:middle])
        sent.set()
        await on(exchange, body[middle:])

    return action, sent


async def stall(exchange: Exchange, rest: bytes) -> None:
    """Send nothing more."""
    await exchange.silence()


async def drip(exchange: Exchange, rest: bytes) -> None:
    """Send the rest byte by byte, without a pause."""
    for byte in rest:
        await exchange.send(bytes([byte]))
        await asyncio.sleep(0)


@pytest.mark.parametrize("on", [stall, drip])
async def test_a_large_slow_body_does_not_delay_others(
    sim: Simulator,
    proxy: Proxy,
    connect: Callable[..., Session],
    on: Callable[[Exchange, bytes], Awaitable[None]],
) -> None:
    """A body that stalls or drips does not delay the others."""
    large = sim.add_execution(Scenario([SimNode("Answer", LARGE, is_output_node=True)]))
    actions, halves = zip(*(half_and_then(on) for _ in range(20)), strict=True)
    proxy.misbehave(*actions)
    async with connect(request_timeout=LONG) as session, asyncio.timeout(LONG / 2):
        slow = [asyncio.create_task(session.get_results(large)) for _ in actions]
        for half in halves:
            await half.wait()
        others = [session.get_results(large) for _ in range(3)]
        for result in await asyncio.gather(*others):
            assert result.value == LARGE
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await asyncio.wait(slow)


@pytest.mark.parametrize("retry", [NO_RETRY, RetryPolicy()], ids=["no retries", "retries"])
async def test_a_connection_that_is_closed_between_polls_costs_no_retry(
    connect: Callable[..., Session],
    proxy: Proxy,
    sim: Simulator,
    held: int,
    recorder: Any,
    *,
    retry: RetryPolicy,
) -> None:
    """The next poll opens another connection, although the server promised to keep the first."""
    proxy.misbehave(*[close_when_answered] * 4)
    async with aclosing(connect(retry=retry).execution(held).stream()) as snapshots:
        async for snapshot in snapshots:
            if snapshot.poll == 4:
                sim.finish(held, "Answer")
    assert values(snapshot) == NODES
    assert proxy.connections == 5
    assert recorder.of(RequestRetried) == []


async def test_a_connection_that_is_reset_by_the_next_poll_costs_one_attempt(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, held: int, recorder: Any
) -> None:
    """The attempt on the dead connection fails; the next one uses a new connection."""
    proxy.resets_reused = True
    async with aclosing(connect().execution(held).stream()) as snapshots:
        async for snapshot in snapshots:
            if snapshot.poll == 3:
                sim.finish(held, "Answer")
    assert values(snapshot) == NODES
    assert [type(e.error) for e in recorder.of(RequestRetried)] == [ConnectionFailed] * 3
    assert proxy.requests == [("GET", 1)] * 4


async def test_a_watch_continues_when_the_server_is_back(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, held: int, recorder: Any
) -> None:
    """The final node map has exactly what happened while the server was down."""
    session = connect()
    waiting = asyncio.create_task(session.execution(held).wait())
    async with aclosing(session.execution(held).stream()) as snapshots:
        first = await anext(snapshots)
        await proxy.refuse_connections()
        for _ in range(3):
            refused = await recorder.next(RequestRetried)
            assert type(refused.error) is ConnectionFailed
        sim.finish(held, "Answer", value={"deep": [1.5, None]})
        await proxy.accept_connections()
        second = await anext(snapshots)
        assert [snapshot async for snapshot in snapshots] == []
    assert await waiting is second
    assert not first.complete
    assert (second.complete, second.poll) == (True, 2)
    assert values(second) == {"Plan": "done", "Answer": {"deep": [1.5, None]}}
    assert second.raw == (await session.get_results(held, return_all_outputs=True)).raw
    assert second.times["Plan"] == first.times["Plan"]


async def test_each_outage_is_counted_by_itself(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, held: int, recorder: Any
) -> None:
    """A watch survives a server that goes down repeatedly and answers in between."""
    async with aclosing(connect().execution(held).stream()) as snapshots:
        async for snapshot in snapshots:
            if snapshot.poll == 4:
                sim.finish(held, "Answer")
            elif not snapshot.complete:
                await proxy.refuse_connections()
                await recorder.next(RequestRetried)
                await recorder.next(RequestRetried)
                await proxy.accept_connections()
    assert values(snapshot) == NODES
    attempts = [event.error.attempts for event in recorder.of(RequestRetried)]
    assert attempts.count(1) == 3


async def test_a_server_that_stays_down_ends_a_watch(
    connect: Callable[..., Session], proxy: Proxy, held: int
) -> None:
    """After the policy's `watch_outage`, every follower gets the error with the last snapshot."""
    session = connect(retry=RetryPolicy(outage=0.0, watch_outage=0.05, base=0.001))
    waiting = asyncio.create_task(session.execution(held).wait())
    async with aclosing(session.execution(held).stream()) as snapshots:
        first = await anext(snapshots)
        await proxy.refuse_connections()
        with pytest.raises(ConnectionFailed) as caught:
            await anext(snapshots)
    with pytest.raises(ConnectionFailed) as waited:
        await waiting
    for error in (caught.value, waited.value):
        assert (error.execution_id, error.last_snapshot) == (held, first)
        assert error.attempts > 1
        assert "refused" in error.reason.lower()


async def test_a_server_that_stays_down_does_not_move_a_deadline(
    connect: Callable[..., Session], proxy: Proxy, held: int
) -> None:
    """`ExecutionTimeout` has the last snapshot, and the refused connection as its cause."""
    session = connect(retry=RetryPolicy(watch_outage=None, base=0.001, ceiling=0.01))
    async with aclosing(session.execution(held).stream(timeout=0.2)) as snapshots:
        first = await anext(snapshots)
        await proxy.refuse_connections()
        with pytest.raises(ExecutionTimeout) as caught:
            await anext(snapshots)
    assert (caught.value.execution_id, caught.value.last_snapshot) == (held, first)
    assert type(caught.value.__cause__) is ConnectionFailed


async def test_a_single_call_waits_for_a_server_that_is_not_up_yet(
    connect: Callable[..., Session], proxy: Proxy, done: int, recorder: Any
) -> None:
    """A single call retries within its `outage` until the server answers."""
    await proxy.refuse_connections()
    call = asyncio.create_task(connect().get_results(done))
    await recorder.next(RequestRetried)
    await recorder.next(RequestRetried)
    await proxy.accept_connections()
    assert (await call).value == "42"
    assert proxy.requests == [("GET", 1)]


@pytest.fixture
def flow(sim: Simulator) -> str:
    """Return the name of a workflow."""
    sim.add_workflow("flow", Scenario([SimNode("Answer", "42", is_output_node=True)]))
    return "flow"


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings in the library's log."""
    records = [record for record in caplog.records if record.name == "promptlayer_exec"]
    assert {record.levelname for record in records} <= {"WARNING"}
    return [
        record.getMessage()
        for record in records
        if record.levelno == logging.WARNING and "; trying again" not in record.getMessage()
    ]


def started(sim: Simulator) -> list[int]:
    """Return the ids of the runs that the server started."""
    return [run.execution_id for run in sim.runs]


@in_each_failure_after_accept
async def test_a_start_whose_answer_is_lost_is_unknown(
    connect: Callable[..., Session],
    proxy: Proxy,
    sim: Simulator,
    flow: str,
    recorder: Any,
    *,
    failure: Failure,
) -> None:
    """One request is sent, whatever the policy allows; the error has the workflow and the cause."""
    session = connect(request_timeout=failure.request_timeout)
    proxy.misbehave(failure.action)
    with pytest.raises(StartUnknown) as caught:
        await session.start(flow, {"question": "?"})
    error = caught.value
    assert (error.workflow, error.execution_id, error.last_snapshot) == (flow, None, None)
    assert error.reason
    assert type(error.__cause__) is failure.error
    assert error.__cause__.__cause__ is not None
    assert recorder.of(RequestRetried) == recorder.of(ExecutionStarted) == []
    assert proxy.connections == 1
    assert proxy.count("POST") == len(started(sim)) == failure.reaches_server


def status(line: bytes, body: bytes = b"{}") -> Action:
    """Return an action that replaces the status of the server's answer."""

    async def action(exchange: Exchange) -> None:
        await exchange.fetch()
        await exchange.send(b"".join(Answer((b"HTTP/1.1 " + line,), body).sized()))

    return action


@pytest.mark.parametrize(
    "line", [b"408 Request Timeout", b"500 Oops", b"502 Bad Gateway", b"503 Busy", b"504 Late"]
)
async def test_a_start_that_a_gateway_gave_up_on_is_unknown(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, flow: str, line: bytes
) -> None:
    """The server has started the run, and it is not started again."""
    proxy.misbehave(status(line, b"<html>"))
    with pytest.raises(StartUnknown, match=line.decode()[:3]) as caught:
        await connect().start(flow)
    assert isinstance(caught.value.__cause__, StatusError)
    assert proxy.count("POST") == len(started(sim)) == 1


async def test_a_start_answered_with_a_web_page_is_unknown(
    connect: Callable[..., Session], proxy: Proxy, flow: str
) -> None:
    """A captive portal, for example, answers with a 200 that has no id."""
    proxy.misbehave(status(b"200 OK", b"<html>Please log in</html>"))
    with pytest.raises(StartUnknown) as caught:
        await connect().start(flow)
    assert isinstance(caught.value.__cause__, InvalidResponse)
    assert proxy.count("POST") == 1


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"307 Temporary Redirect", StatusError),
        (b"400 Bad Request", BadRequest),
        (b"401 Unauthorized", Unauthorized),
        (b"403 Forbidden", Forbidden),
        (b"404 Not Found", NotFound),
        (b"409 Conflict", StatusError),
        (b"425 Too Early", StatusError),
        (b"422 Unprocessable Content", UnprocessableEntity),
    ],
)
async def test_a_start_that_was_refused_is_not_sent_again(
    connect: Callable[..., Session], proxy: Proxy, flow: str, line: bytes, error: type[StatusError]
) -> None:
    """It raises the status's own error, not `StartUnknown`."""
    proxy.misbehave(status(line))
    with pytest.raises(error) as caught:
        await connect().start(flow)
    assert type(caught.value) is error
    assert caught.value.attempts == proxy.count("POST") == 1


async def test_a_start_is_sent_again_after_a_429(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, flow: str, recorder: Any
) -> None:
    """Each attempt uses a new connection, and one run is started."""
    sim.inject(Fault.status(429, times=2, retry_after=0.01))
    execution = await connect().start(flow)
    assert started(sim) == [execution.id]
    assert proxy.requests == [("POST", 1)] * 3
    assert [type(event.error) for event in recorder.of(RequestRetried)] == [RateLimited] * 2


async def test_a_start_that_is_lost_after_a_429_is_unknown(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, flow: str
) -> None:
    """The refusal of the first request says nothing about the second."""
    sim.inject(Fault.status(429, retry_after=0.01))
    proxy.misbehave(behave, stop(nothing, Exchange.reset))
    with pytest.raises(StartUnknown):
        await connect().start(flow)
    assert proxy.count("POST") == 2
    assert len(started(sim)) == 1


async def test_a_start_waits_for_a_server_that_is_not_up_yet(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, flow: str, recorder: Any
) -> None:
    """A refused connection is retried, and the request is sent once."""
    await proxy.refuse_connections()
    starting = asyncio.create_task(connect().start(flow))
    for _ in range(3):
        refused = await recorder.next(RequestRetried)
        assert type(refused.error) is ConnectionFailed
        assert refused.execution_id is None
    await proxy.accept_connections()
    execution = await starting
    assert started(sim) == [execution.id]
    assert proxy.requests == [("POST", 1)]


@pytest.mark.parametrize(
    "base_url", [None, "https://nowhere.invalid"], ids=["refused port", "unknown name"]
)
async def test_a_start_that_never_reaches_a_server_is_connection_failed(
    proxy: Proxy, flow: str, base_url: str | None
) -> None:
    """Once `outage` has passed, it is certain that nothing was started."""
    await proxy.refuse_connections()
    retry = RetryPolicy(outage=0.02, base=0.001)
    async with Session("key", base_url=base_url or proxy.base_url, retry=retry) as session:
        with pytest.raises(ConnectionFailed) as caught:
            await session.start(flow)
    assert caught.value.attempts > 1
    assert proxy.connections == 0


@pytest.mark.parametrize("refused_by", ["the server", "the network"])
@pytest.mark.parametrize("interrupt", [asyncio.Task.cancel, None], ids=["cancelled", "closed"])
async def test_a_start_that_is_abandoned_between_attempts_is_not_sent(
    connect: Callable[..., Session],
    proxy: Proxy,
    sim: Simulator,
    flow: str,
    recorder: Any,
    *,
    caplog: pytest.LogCaptureFixture,
    refused_by: str,
    interrupt: Callable[[Any], bool] | None,
) -> None:
    """It cannot have started anything, so nothing more is sent and nothing is logged."""
    session = connect(retry=RetryPolicy(base=3600.0, ceiling=7200.0, outage=1e6))
    if refused_by == "the server":
        sim.inject(Fault.status(429, retry_after=3600))
    else:
        await proxy.refuse_connections()
    starting = asyncio.create_task(session.start(flow))
    await recorder.next(RequestRetried)
    if interrupt is not None:
        interrupt(starting)
    await session.aclose()
    (outcome,) = await asyncio.gather(starting, return_exceptions=True)
    assert type(outcome) is (SessionClosed if interrupt is None else asyncio.CancelledError)
    assert getattr(outcome, "execution_id", None) is None
    assert started(sim) == []
    assert warnings_in(caplog) == []


async def test_a_start_is_retried_when_the_server_goes_down_after_a_429(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, flow: str, recorder: Any
) -> None:
    """Neither a 429 nor a refused connection makes it unknown: it is retried until it starts."""
    sim.inject(Fault.status(429, retry_after=0.01))
    starting = asyncio.create_task(connect().start(flow))
    await recorder.next(RequestRetried)
    await proxy.refuse_connections()
    await recorder.next(RequestRetried)
    await proxy.accept_connections()
    execution = await starting
    assert started(sim) == [execution.id]
    assert [type(e.error) for e in recorder.of(RequestRetried)][:2] == [
        RateLimited,
        ConnectionFailed,
    ]


async def test_a_start_that_cannot_be_sent_in_time_is_a_timeout(
    connect: Callable[..., Session], proxy: Proxy, flow: str
) -> None:
    """It ends at the session's `wait_timeout`, and the refused connection is the cause."""
    await proxy.refuse_connections()
    session = connect(wait_timeout=0.05, retry=RetryPolicy(base=0.001, ceiling=0.01))
    with pytest.raises(ExecutionTimeout) as caught:
        await session.start(flow)
    assert type(caught.value.__cause__) is ConnectionFailed
    assert proxy.connections == 0


async def test_a_deadline_does_not_lose_a_start_that_was_sent(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, flow: str
) -> None:
    """The client waits `request_timeout` for the answer, whatever `wait_timeout` is."""

    async def answer_late(exchange: Exchange) -> None:
        answer = await exchange.fetch()
        await exchange.silence(2 * SHORT)
        await exchange.send(b"".join(answer.sized()))

    proxy.misbehave(answer_late)
    execution = await connect(wait_timeout=SHORT).start(flow)
    assert started(sim) == [execution.id]


async def test_a_start_whose_answer_trickles_in_is_started(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, flow: str
) -> None:
    """A slow answer is not a lost answer."""
    proxy.misbehave(trickle(0.0))
    execution = await connect().start(flow)
    assert started(sim) == [execution.id]
    assert proxy.count("POST") == 1


async def test_a_start_does_not_use_a_connection_that_may_be_dying(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, flow: str, recorder: Any
) -> None:
    """Each start opens a connection, although earlier ones were promised to be kept open."""
    session = connect()
    executions = []
    for _ in range(3):
        executions.append(await session.start(flow))
        await executions[-1].wait()
        proxy.resets_reused = True
        executions.append(await session.start(flow))
        proxy.resets_reused = False
    assert started(sim) == [execution.id for execution in executions]
    assert {number for method, number in proxy.requests if method == "POST"} == {1}
    assert recorder.of(RequestRetried) == []


@pytest.mark.parametrize(
    ("action", "reached"),
    [(reset_on_arrival, 0), (stop(nothing, Exchange.reset), 1)],
    ids=["on arrival", "before the head"],
)
async def test_a_start_over_a_borrowed_connection_that_dies_is_not_sent_again(
    connect: Callable[..., Session],
    proxy: Proxy,
    sim: Simulator,
    flow: str,
    done: int,
    *,
    action: Action,
    reached: int,
) -> None:
    """A borrowed pool may reuse a connection, so it is unknown whether the request arrived."""
    async with aiohttp.ClientSession() as http:
        session = connect(http=http)
        await session.get_results(done)
        proxy.misbehave(action)
        with pytest.raises(StartUnknown):
            await session.start(flow)
        await session.aclose()
    assert proxy.count("POST") == len(started(sim)) == reached


async def test_a_cancelled_start_whose_answer_never_comes_is_logged(
    connect: Callable[..., Session],
    proxy: Proxy,
    sim: Simulator,
    flow: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The caller is released at once; closing waits up to `request_timeout` for the answer."""
    session = connect(request_timeout=SHORT)
    proxy.misbehave(stop(nothing, Exchange.silence))
    starting = asyncio.create_task(session.start(flow))
    await sim.wait_for_requests(1)
    starting.cancel()
    await loop_steps(3)
    assert starting.cancelled()
    assert warnings_in(caplog) == []
    await session.aclose()
    (warning,) = warnings_in(caplog)
    assert "'flow'" in warning
    assert StartUnknown.advice in warning


async def test_closing_reads_the_answer_of_a_start_on_the_wire(
    connect: Callable[..., Session], proxy: Proxy, sim: Simulator, flow: str, recorder: Any
) -> None:
    """However slow its answer is, the caller's `SessionClosed` has the id."""
    session = connect()
    proxy.misbehave(trickle(0.0))
    starting = asyncio.create_task(session.start(flow))
    await sim.wait_for_requests(1)
    await session.aclose()
    with pytest.raises(SessionClosed) as caught:
        await starting
    assert started(sim) == [caught.value.execution_id]
    assert [event.abandoned for event in recorder.of(ExecutionStarted)] == [True]


def test_a_start_is_logged_when_its_loop_ends(
    threaded_sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """`asyncio.run` cancels every task, and the log still says that a run may have started."""
    threaded_sim.add_workflow("flow", Scenario([]))
    threaded_sim.inject(Fault.stall())

    async def main() -> None:
        session = Session(threaded_sim.api_key, base_url=threaded_sim.base_url)
        starting = asyncio.create_task(session.start("flow"))
        await threaded_sim.wait_for_requests(1)
        assert not starting.done()

    asyncio.run(main())
    (warning,) = warnings_in(caplog)
    assert "'flow'" in warning


async def loop_steps(count: int) -> None:
    """Let the event loop run for some steps."""
    for _ in range(count):
        await asyncio.sleep(0)


Operation: TypeAlias = Callable[[Session, Any], Awaitable[Any]]

OPERATIONS: dict[str, Operation] = {
    "get_results": lambda session, ids: session.get_results(ids.done),
    "wait": lambda session, ids: session.execution(ids.done).wait(),
    "output": lambda session, ids: session.execution(ids.rivals).output(),
    "start": lambda session, ids: session.start(ids.flow),
}


@dataclass(frozen=True)
class Ids:
    """What the operations use: `rivals` has two output nodes, so `output` must send a request."""

    done: int
    rivals: int
    flow: str


@pytest.fixture
def ids(sim: Simulator, done: int, flow: str) -> Ids:
    """Return executions that are complete, and a workflow."""
    nodes = [SimNode(name, name, is_output_node=True) for name in "AB"]
    return Ids(done, sim.add_execution(Scenario(nodes)), flow)


class Run:
    """An operation that runs in a task, to be interrupted."""

    def __init__(self, session: Session, operate: Callable[[], Awaitable[Any]]) -> None:
        self.session = session
        self.scope = asyncio.timeout(None)
        self._operate = operate
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> Any:
        async with self.scope:
            return await self._operate()

    async def outcome(self) -> Any:
        """Return the operation's result or error."""
        async with asyncio.timeout(LONG):
            (outcome,) = await asyncio.gather(self.task, return_exceptions=True)
        return outcome


async def cancel(run: Run) -> None:
    """Cancel the task."""
    run.task.cancel()


async def cancel_twice_at_once(run: Run) -> None:
    """Cancel the task twice before it can react."""
    run.task.cancel()
    run.task.cancel()


async def cancel_twice(run: Run) -> None:
    """Cancel the task again while it handles the first cancellation."""
    run.task.cancel()
    await loop_steps(1)
    run.task.cancel()


async def time_out(run: Run) -> None:
    """Let the `asyncio.timeout` around the operation expire."""
    await loop_steps(1)  # to be entered
    if not run.task.done():
        run.scope.reschedule(0.0)


async def close(run: Run) -> None:
    """Close the session."""
    await run.session.aclose()


INTERRUPTIONS: dict[Callable[[Run], Awaitable[None]], type[BaseException]] = {
    cancel: asyncio.CancelledError,
    cancel_twice_at_once: asyncio.CancelledError,
    cancel_twice: asyncio.CancelledError,
    time_out: TimeoutError,
    close: SessionClosed,
}
by_each_interruption = pytest.mark.parametrize(
    "interrupt", INTERRUPTIONS, ids=[interrupt.__name__ for interrupt in INTERRUPTIONS]
)


async def until_it_ends_by_itself(
    run: Callable[[], Run], interrupt: Callable[[Run], Awaitable[None]]
) -> AsyncIterator[tuple[Run, Any]]:
    """Interrupt a run after 0, 1, 2 ... steps of the loop, and yield each run with its outcome."""
    for count in range(2000):
        this = run()
        await loop_steps(count)
        if this.task.done():
            yield this, await this.outcome()
            return
        await interrupt(this)
        await loop_steps(3)
        assert this.task.done(), "it was not released at once"
        yield this, await this.outcome()
    raise AssertionError("it never ended by itself")


@pytest.fixture(
    params=[
        "plain tasks",
        pytest.param(
            "eager tasks",
            marks=pytest.mark.skipif(
                not hasattr(asyncio, "eager_task_factory"), reason="new in Python 3.12"
            ),
        ),
    ]
)
async def tasks(request: pytest.FixtureRequest) -> None:
    """Let the loop create plain or eager tasks."""
    if request.param == "eager tasks":
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)


@by_each_interruption
@pytest.mark.parametrize("operate", OPERATIONS.values(), ids=OPERATIONS)
async def test_an_operation_can_be_interrupted_at_every_await(
    open_session: Callable[..., Session],
    ids: Ids,
    tasks: None,
    our_tasks: Any,
    *,
    operate: Operation,
    interrupt: Callable[[Run], Awaitable[None]],
) -> None:
    """The caller gets the interruption at once, and no task remains when the session closes."""

    def run() -> Run:
        session = open_session()
        return Run(session, lambda: operate(session, ids))

    outcomes = []
    async for this, outcome in until_it_ends_by_itself(run, interrupt):
        outcomes.append(outcome)
        await this.session.aclose()
        assert our_tasks() == []
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(error) for error in errors} == {INTERRUPTIONS[interrupt]}
    assert len(errors) > 5
    assert not isinstance(outcomes[-1], BaseException)
    if interrupt is close and operate is not OPERATIONS["start"]:
        assert {error.execution_id for error in errors} <= {ids.done, ids.rivals}
    gc.collect()  # anything left open would warn


def refused_first(sim: Simulator, proxy: Proxy) -> None:
    """Refuse the first request with a 429."""
    sim.inject(Fault.status(429, retry_after=NO_TIME))


def answered_in_pieces(sim: Simulator, proxy: Proxy) -> None:
    """Send the answer in many pieces."""
    proxy.misbehave(trickle(0.0, size=24))


@by_each_interruption
@pytest.mark.parametrize(
    "prepare", [None, refused_first, answered_in_pieces], ids=["smooth", "refused", "in pieces"]
)
async def test_no_run_is_lost_wherever_its_start_is_interrupted(
    connect: Callable[..., Session],
    proxy: Proxy,
    sim: Simulator,
    flow: str,
    recorder: Any,
    *,
    tasks: None,
    caplog: pytest.LogCaptureFixture,
    interrupt: Callable[[Run], Awaitable[None]],
    prepare: Callable[[Simulator, Proxy], None] | None,
) -> None:
    """Every run on the server is returned, or reported and logged as abandoned."""

    def run() -> Run:
        sim.clear_faults()
        proxy.behave()
        if prepare is not None:
            prepare(sim, proxy)
        session = connect(retry=AT_ONCE)
        return Run(session, lambda: session.start(flow))

    returned, abandoned, in_errors = [], [], []
    async for this, outcome in until_it_ends_by_itself(run, interrupt):
        known = len(returned) + len(abandoned)
        await this.session.aclose()
        if isinstance(outcome, Execution):
            returned.append(outcome.id)
        else:
            assert type(outcome) is INTERRUPTIONS[interrupt]
            abandoned += started(sim)[known:]
        if isinstance(outcome, SessionClosed) and outcome.execution_id is not None:
            in_errors.append(outcome.execution_id)
    await loop_steps(20)  # wait for late runs
    assert abandoned
    assert len(started(sim)) == len(returned) + len(abandoned)
    events = {event.execution_id: event.abandoned for event in recorder.of(ExecutionStarted)}
    assert events == {**dict.fromkeys(returned, False), **dict.fromkeys(abandoned, True)}
    assert len(recorder.of(ExecutionStarted)) == len(events)
    warnings = warnings_in(caplog)
    assert all(f"execution {i} " in w for i, w in zip(abandoned, warnings, strict=True))
    assert in_errors == (abandoned if interrupt is close else [])


@pytest.mark.parametrize("operate", OPERATIONS.values(), ids=OPERATIONS)
async def test_a_session_works_after_each_cancellation(
    open_session: Callable[..., Session],
    sim: Simulator,
    ids: Ids,
    our_tasks: Any,
    *,
    operate: Operation,
) -> None:
    """The next call is answered, also after a cancellation between polls or attempts."""
    session = open_session(poll=PollPolicy.fixed(1e-9), retry=AT_ONCE)
    await session.get_results(ids.done)
    resting = our_tasks()

    def run() -> Run:
        sim.clear_faults()
        if operate is not OPERATIONS["start"]:
            sim.inject(Fault.status(503))
            sim.inject(Fault.status(202, body=b'{"Answer": {"status": "RUNNING"}}'))
        return Run(session, lambda: operate(session, ids))

    outcomes = []
    async for _, outcome in until_it_ends_by_itself(run, cancel):
        outcomes.append(outcome)
        if operate is not OPERATIONS["start"]:  # a start on the wire goes on without its caller
            assert our_tasks() == resting
        if len(outcomes) % 5 == 0:
            sim.clear_faults()
            assert (await session.get_results(ids.done)).value == "42"
    assert {type(outcome) for outcome in outcomes[:-1]} == {asyncio.CancelledError}
    assert not isinstance(outcomes[-1], BaseException)
