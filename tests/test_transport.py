"""The transport: attempts, retries, and conversion of errors."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import logging
import pickle
import re
import socket
import subprocess
import sys
import time
import traceback
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from aioresponses import aioresponses

from promptlayer_exec import (
    BadRequest,
    ConnectionFailed,
    Event,
    FieldError,
    Forbidden,
    InvalidResponse,
    NotFound,
    Polled,
    PollPolicy,
    PromptLayerExecError,
    RateLimited,
    RequestError,
    RequestRetried,
    RequestTimeout,
    ResponseTooLarge,
    RetryPolicy,
    ServerError,
    Session,
    StatusError,
    Throttled,
    Unauthorized,
    UnprocessableEntity,
)
from promptlayer_exec._http.failures import reason_of
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

NO_RETRY = RetryPolicy(outage=0.0)
ANY_URL = re.compile(".*")


class Answer(aiohttp.ClientResponse):
    """The response class of aioresponses, without `stream_writer`, which aiohttp now requires."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"stream_writer": Mock(), **kwargs})


@pytest.fixture
def mocked() -> Iterator[Callable[..., None]]:
    """Return a function that sets the next answer to a GET, without a network."""
    with aioresponses() as mock:

        def answer(**settings: Any) -> None:
            mock.get(ANY_URL, response_class=Answer, **settings)

        answer.mock = mock  # type: ignore[attr-defined]
        yield answer


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (302, StatusError),
        (400, BadRequest),
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (418, StatusError),
        (422, UnprocessableEntity),
        (429, RateLimited),
        (500, ServerError),
        (501, ServerError),
        (502, ServerError),
    ],
)
@pytest.mark.parametrize("key", ["message", "error"])
async def test_each_status_has_its_error(
    mocked: Callable[..., None], status: int, expected: type[StatusError], key: str
) -> None:
    """The error has the status, the server's message, the body and the execution's id."""
    body = {"success": False, key: "no such thing", "extra": [1]}
    mocked(status=status, payload=body)
    async with Session("key", retry=NO_RETRY) as session:
        with pytest.raises(expected) as caught:
            await session.get_results(787)
    error = caught.value
    assert type(error) is expected
    assert error.status == status
    assert error.body == body
    assert error.execution_id == 787
    assert error.attempts == 1
    if status >= 400:
        assert error.message == "no such thing"
        assert "execution 787" in str(error)
        assert "no such thing" in str(error)


async def test_a_validation_error_is_itemised(mocked: Callable[..., None]) -> None:
    """FastAPI's 422 becomes one `FieldError` per complaint."""
    item = {"loc": ["query", "return_all_outputs"], "msg": "not a bool", "type": "bool_parsing"}
    mocked(status=422, payload={"detail": [item]})
    async with Session("key") as session:
        with pytest.raises(UnprocessableEntity, match="not a bool") as caught:
            await session.get_results(787)
    assert caught.value.details == (
        FieldError(("query", "return_all_outputs"), "not a bool", "bool_parsing"),
    )


async def test_the_policy_may_name_further_statuses_to_retry(
    mocked: Callable[..., None],
) -> None:
    """A status in the policy's list is retried, and the next answer is the result."""
    mocked(status=418)
    mocked(status=200, payload="done")
    retry = RetryPolicy(statuses=frozenset({418}), base=0.001)
    async with Session("key", retry=retry) as session:
        assert (await session.get_results(787)).value == "done"


async def test_the_request_is_as_documented(mocked: Callable[..., None]) -> None:
    """The request has the method, the URL and the key, and does not follow redirects."""
    mocked(status=200, payload={})
    async with Session("key", base_url="https://gateway.test/pl") as session:
        await session.get_results(787, return_all_outputs=True)
    ((method, url), (call,)) = next(iter(mocked.mock.requests.items()))  # type: ignore[attr-defined]
    assert method == "GET"
    assert str(url) == (
        "https://gateway.test/pl/workflow-version-execution-results"
        "?return_all_outputs=true&workflow_version_execution_id=787"
    )
    assert call.kwargs["headers"]["X-API-KEY"] == "key"
    assert call.kwargs["allow_redirects"] is False
    assert call.kwargs["timeout"] == aiohttp.ClientTimeout()  # the attempt has a limit of ours


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_server(serve: Serve) -> AsyncIterator[str]:
    """Serve connections with `serve`, yield the base URL, and close what is open at the end."""
    tasks = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server.close()


def answering(*answers: bytes) -> Serve:
    """Return a server that answers each request of a connection with the next of `answers`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()

    return serve


def http(body: bytes, *, status: str = "200 OK", headers: str = "") -> bytes:
    """Return a complete HTTP answer."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


async def read_results(session: Session) -> Any:
    """Request results."""
    return await session.get_results(787, return_all_outputs=True)


async def start(session: Session) -> Any:
    """Start a run."""
    return await session.start("workflow")


Call = Callable[[Session], Awaitable[Any]]


async def failure_at(base_url: str, call: Call = read_results, **settings: Any) -> Any:
    """Return the error of one call to a server."""
    settings = {"retry": NO_RETRY, **settings}
    async with Session("secret-key", base_url=base_url, **settings) as session:
        with pytest.raises(PromptLayerExecError) as caught:
            await call(session)
    return caught.value


@pytest.mark.parametrize("borrowed", [False, True])
async def test_a_refused_connection_is_connection_failed(borrowed: bool) -> None:
    """The error has the system's message and the execution's id."""
    with socket.socket() as bound:  # and no other test can listen there
        bound.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        async with aiohttp.ClientSession() as theirs:
            error = await failure_at(base_url, http=theirs if borrowed else None)
    assert type(error) is ConnectionFailed
    assert error.execution_id == 787
    assert base_url in str(error)
    assert "refused" in error.reason.lower() or "connect" in error.reason.lower()
    assert isinstance(error.__cause__, aiohttp.ClientError)


async def test_a_name_that_does_not_resolve_is_connection_failed() -> None:
    """The reserved domain `.invalid` never resolves."""
    assert type(await failure_at("https://nowhere.invalid")) is ConnectionFailed


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"SSH-2.0-OpenSSH\r\n\r\n"],
    ids=["nothing", "half a head", "no HTTP"],
)
async def test_a_broken_answer_is_connection_failed(answer: bytes) -> None:
    """The answer has no status, and the causes show none of our headers."""
    async with raw_server(answering(answer)) as base_url:
        error = await failure_at(base_url)
    assert type(error) is ConnectionFailed
    assert error.reason


@pytest.mark.parametrize("key", ["k", "secret-key"])
async def test_no_header_of_ours_is_in_a_cause(key: str) -> None:
    """For an answer that is not HTTP, aiohttp's error would show all headers, even a short key."""
    async with (
        raw_server(answering(b"SSH-2.0-OpenSSH\r\n\r\n")) as base_url,
        Session(key, base_url=base_url, retry=NO_RETRY) as session,
    ):
        with pytest.raises(ConnectionFailed) as caught:
            await session.get_results(787)
    assert isinstance(caught.value.__cause__, aiohttp.ClientError)
    for link in chain(caught.value):
        assert "X-API-KEY" not in f"{link!r} {vars(link)}"


async def test_a_body_that_is_cut_short_is_invalid() -> None:
    """The error has the status and an excerpt of the body."""
    whole = http(b'{"A": {"status": "SUCCESS"}}')
    async with raw_server(answering(whole[:-5])) as base_url:
        error = await failure_at(base_url)
    assert type(error) is InvalidResponse
    assert error.status == 200
    assert error.path is None
    assert error.excerpt.startswith('{"A"')
    assert "cut short" in str(error)


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b"", None),
        (b"<html>hello</html>", None),
        (b'{"A": ', None),
        (b"\xff\xfe\xfa", None),
        (b"[]", "$"),
        (b'{"A": 1}', "$.A"),
        (b'{"Node 1": {"value": 1}}', "$.Node 1.status"),
        (b'{"Node 1": {"status": 5}}', "$.Node 1.status"),
    ],
)
async def test_a_success_that_is_not_a_node_map_is_invalid(body: bytes, path: str | None) -> None:
    """Invalid JSON has no path and is retried; an invalid shape is not retried."""
    async with raw_server(answering(http(body), http(b"{}"))) as base_url:
        error = await failure_at(base_url)
        assert type(error) is InvalidResponse
        assert error.path == path
        events: list[Any] = []
        retry = RetryPolicy(base=0.001)
        async with Session(
            "key", base_url=base_url, retry=retry, observers=[events.append]
        ) as session:
            if path is None:
                await session.get_results(787, return_all_outputs=True)
                assert [type(event) for event in events] == [RequestRetried]
            else:
                with pytest.raises(InvalidResponse):
                    await session.get_results(787, return_all_outputs=True)
                assert events == []


async def test_silence_is_a_request_timeout() -> None:
    """It is raised after `request_timeout` seconds, and the error has that time."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with raw_server(serve) as base_url:
        error = await failure_at(base_url, request_timeout=0.05)
    assert type(error) is RequestTimeout
    assert "0.05 s" in str(error)


def node_map(*values: str) -> bytes:
    """Return a node map with a running node for each value."""
    nodes = {str(i): {"status": "RUNNING", "value": value} for i, value in enumerate(values)}
    return json.dumps(nodes).encode()


def running(body: bytes) -> bytes:
    """Return a complete 202 answer."""
    return http(body, status="202 Accepted")


async def test_each_poll_gets_its_own_body() -> None:
    """Even if it begins, ends or goes on like the one before, which may be longer or cut."""
    one, two = "1" * 200_000, "2" * 200_000
    bodies = [
        node_map(one, one),
        node_map(one, one),  # the same
        node_map(one, two),  # begins the same
        node_map(one, two) + b" " * 200_000,  # the same and more
        node_map(one, two),  # a part
        node_map(two, two),  # ends the same
        node_map(one),
        node_map(),
        node_map(one * 20),
        node_map(one * 5 + "2" + one * 14),  # the same but for one character
        node_map(one, one, two),
    ]
    cut = running(bodies[-1])[:-300_000]
    seen: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in [*map(running, bodies), cut]:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()

    def observe(event: Event) -> None:
        if isinstance(event, Polled):
            seen.append(event.snapshot)

    retry = RetryPolicy(watch_outage=0.0)
    settings: Any = {"retry": retry, "poll": PollPolicy.fixed(1e-9), "observers": [observe]}
    async with (
        raw_server(serve) as base_url,
        Session("key", base_url=base_url, **settings) as session,
    ):
        with pytest.raises(InvalidResponse, match=r"cut short .* after \d+ bytes") as caught:
            await session.execution(787).wait()
    assert [snapshot.raw for snapshot in seen] == [json.loads(body) for body in bodies]
    assert caught.value.last_snapshot is seen[-1]
    assert caught.value.excerpt == bodies[-1][:200].decode()


async def test_a_body_that_stays_the_same_takes_no_memory_again() -> None:
    """It is compared with the one before as it arrives."""
    answer = running(node_map("x" * 4_000_000))
    polls, peak = 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            for begin in range(0, len(answer), 2**16):
                writer.write(answer[begin : begin + 2**16])
                await writer.drain()

    enough = asyncio.Event()

    def observe(event: Event) -> None:
        nonlocal polls, peak
        if isinstance(event, Polled):
            polls += 1
            if polls == 2:
                tracemalloc.start()
            elif polls == 5:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                enough.set()

    settings: Any = {"poll": PollPolicy.fixed(1e-9), "observers": [observe]}
    async with (
        asyncio.timeout(30),
        raw_server(serve) as base_url,
        Session("key", base_url=base_url, **settings) as session,
    ):
        wait = asyncio.create_task(session.execution(787).wait())
        await enough.wait()
        wait.cancel()
        await asyncio.wait([wait])
    assert 0 < peak < len(answer) // 2


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Promise a body, and send single bytes without end."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = b"500 Oops" if b"return_all_outputs=false" in head else b"200 OK"
    writer.write(b"HTTP/1.1 %b\r\nContent-Length: 1000000\r\n\r\n" % status)
    while True:
        writer.write(b"1")
        await writer.drain()
        await asyncio.sleep(0.005)


async def test_a_body_that_trickles_is_stopped() -> None:
    """Bytes that keep arriving do not prolong the attempt."""
    async with raw_server(trickle) as base_url:
        error = await failure_at(base_url, request_timeout=0.1)
    assert type(error) is RequestTimeout


async def test_a_refusal_whose_body_trickles_is_still_the_refusal() -> None:
    """The error has the status and the part of the body that arrived."""
    async with (
        raw_server(trickle) as base_url,
        Session("key", base_url=base_url, retry=NO_RETRY, request_timeout=0.1) as session,
    ):
        with pytest.raises(ServerError) as caught:
            await session.get_results(787)
    assert caught.value.status == 500


@pytest.mark.parametrize("call", [read_results, start])
async def test_a_malformed_chunk_ends_the_attempt_at_once(call: Call) -> None:
    """All that aiohttp does is close the connection; the reader of the body is not told."""
    chunk = b'{"workflow_version_execution_id"'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        for _ in range(20):
            await asyncio.sleep(0)
        writer.write(b"no length\r\n")
        await reader.read()

    async with asyncio.timeout(5), raw_server(serve) as base_url:
        error = await failure_at(base_url, call)
    assert "the 200 answer is cut short or cannot be decoded" in str(error)


async def test_a_connection_keeps_nothing_of_the_bodies_that_came_over_it() -> None:
    """It may carry thousands, each after its head."""

    def count() -> int:
        gc.collect()
        return sum(isinstance(it, aiohttp.StreamReader) for it in gc.get_objects())

    before = count()
    body = json.dumps({"A": {"status": "SUCCESS", "value": 1}}).encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
            for _ in range(20):
                await asyncio.sleep(0)
            writer.write(body)

    async with raw_server(serve) as base_url, Session("key", base_url=base_url) as session:
        for _ in range(20):
            await read_results(session)
        assert count() < before + 10


async def test_a_refusal_whose_body_is_cut_short_is_still_the_refusal() -> None:
    """A reset within the body does not hide the status."""
    whole = http(b'{"message": "wrong key"}', status="401 Unauthorized")
    async with raw_server(answering(whole[:-5])) as base_url:
        error = await failure_at(base_url)
    assert type(error) is Unauthorized


@pytest.mark.parametrize("before", range(65526, 65537, 2))
async def test_a_key_at_the_end_of_a_long_refusal_is_not_cut_in_half(before: int) -> None:
    """The key is redacted before the body is cut."""
    body = b"x" * before + b"secret-key and more"
    async with raw_server(answering(http(body, status="403 No"))) as base_url:
        error = await failure_at(base_url)
    assert len(error.body) <= 65536
    assert re.fullmatch(r"x+(\*\*\*[ andmore]*|\**)", error.body)


def test_the_reason_for_which_a_body_was_not_written_is_told() -> None:
    """The text of aiohttp for it is only "[Errno None] Can not write request body for ..."."""
    error = aiohttp.ClientOSError(None, "Can not write request body for http://x")
    error.__cause__ = ConnectionAbortedError("the server closed the connection")
    assert reason_of(error) == "the server closed the connection"


async def test_an_escaped_key_at_the_end_of_a_long_refusal_is_not_cut_in_half() -> None:
    """One of 1,024 characters has six times as many when each is escaped."""
    key = "0123456789abcdef" * 64
    escaped = "".join(f"\\u{ord(char):04x}" for char in key).encode()
    body = b"x" * 65_000 + escaped + b"y" * 10_000
    async with (
        raw_server(answering(http(body, status="403 No"))) as base_url,
        Session(key, base_url=base_url) as session,
    ):
        with pytest.raises(Forbidden) as caught:
            await read_results(session)
    assert "u0030" not in caught.value.body


async def test_a_refusal_s_body_is_read_to_64_kib() -> None:
    """A large page from a proxy does not fill the memory."""
    async with raw_server(answering(http(b"x" * 1_000_000, status="403 No"))) as base_url:
        error = await failure_at(base_url)
    assert type(error) is Forbidden
    assert error.body == "x" * 65536


@pytest.mark.parametrize("body", [b'"%s"' % (b"x" * 5000), b"1" * 5000], ids=["text", "number"])
@pytest.mark.parametrize("compressed", [False, True])
async def test_a_body_beyond_the_limit_is_refused(compressed: bool, body: bytes) -> None:
    """The size counts after decompression; the body is refused at once and not retried."""
    headers = ""
    if compressed:
        body, headers = gzip.compress(body), "Content-Encoding: gzip\r\n"
        assert len(body) < 1000
    events: list[Any] = []
    async with raw_server(answering(http(body, headers=headers))) as base_url:
        error = await failure_at(
            base_url, retry=RetryPolicy(), max_response_bytes=1000, observers=[events.append]
        )
    assert type(error) is ResponseTooLarge
    assert error.limit == 1000
    assert error.status == 200
    assert "1000 bytes" in str(error)
    assert events == []


# Unlike `ru_maxrss`, this does not count the process that started this one, which would hide all.
PEAK = """
def peak(key="VmHWM:"):
    with open("/proc/self/status") as status:
        return int(status.read().partition(key)[2].split()[0])

def memory_now():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # from here, the peak is counted anew
    return peak("VmRSS:")
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


@on_linux
def test_a_gzip_bomb_costs_little_memory() -> None:
    """256 MiB of zeros, sent as 256 KiB, are refused with less than 32 MiB of memory."""
    program = """
import asyncio, zlib
from promptlayer_exec import ResponseTooLarge, Session

packer = zlib.compressobj(wbits=31)
bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush()
HEAD = b"HTTP/1.1 200 OK\\r\\nContent-Encoding: gzip\\r\\nContent-Length: %d\\r\\n\\r\\n"

async def serve(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(HEAD % len(bomb) + bomb)
    await reader.read()
    writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    base_url = "http://127.0.0.1:%d" % server.sockets[0].getsockname()[1]
    async with server, Session("key", base_url=base_url, max_response_bytes=2**20) as session:
        before = memory_now()
        try:
            await session.get_results(1)
        except ResponseTooLarge:
            print(len(bomb), peak() - before)

asyncio.run(main())
"""
    finished = subprocess.run(
        [sys.executable, "-c", PEAK + program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    sent, kibibytes = map(int, finished.stdout.split())
    assert sent < 2**19
    assert kibibytes < 32 * 1024


@pytest.mark.parametrize(
    "headers",
    ["X: " + "x" * 33_000 + "\r\n", "X: x\r\n" * 513],
    ids=["too long", "too many"],
)
async def test_headers_are_bounded_too(headers: str) -> None:
    """At most 512 headers of 32 KiB are read: they are no part of the body."""
    async with raw_server(answering(http(b"{}", headers=headers))) as base_url:
        assert isinstance(await failure_at(base_url), ConnectionFailed)


# Programs that return a body with `n` values, for the process below.
NODES = """b"{" + b",".join(b'"%x":{"status":"RUNNING"}' % i for i in range(n // 2)) + b"}" """
SHAPES = {
    "empty arrays": """b'{"a":{"status":"RUNNING","value":[' + b"[]," * (n // 2) + b"0]}}" """,
    "small objects": """b'{"a":{"status":"RUNNING","value":[' + b'{"a":1},' * (n//2) + b"0]}}" """,
    "nodes": NODES,
    "nodes that change": NODES.replace("% i", "% (i + n)"),
}


@pytest.mark.parametrize("is_cut", [False, True], ids=["invalid", "cut"])
async def test_a_body_that_cannot_be_read_is_freed_at_once(*, is_cut: bool) -> None:
    """Its error's traceback does not keep it until the next garbage collection."""
    body = json.dumps("x" * 1_000_000).encode()
    whole = http(body)
    answer = whole[:-100] if is_cut else http(body[:-1] + b"!")
    sizes: list[int] = []
    enough = asyncio.Event()

    def observe(event: Event) -> None:
        if isinstance(event, RequestRetried):
            sizes.append(tracemalloc.get_traced_memory()[0])
            if len(sizes) == 6:
                enough.set()

    settings: Any = {"retry": RetryPolicy(base=0.001, ceiling=0.001), "observers": [observe]}
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        async with (
            asyncio.timeout(30),
            raw_server(answering(answer)) as base_url,
            Session("key", base_url=base_url, **settings) as session,
        ):
            call = asyncio.create_task(read_results(session))
            await enough.wait()
            call.cancel()
            await asyncio.wait([call])
    finally:
        tracemalloc.stop()
        gc.enable()
    assert max(sizes[2:]) < sizes[1] + 1_000_000


@on_linux
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decoded_bodies_are_bounded_too(shape: str) -> None:
    """A watch needs less than 20 times `max_response_bytes`, and too many values are refused."""
    program = """
import asyncio, sys
from contextlib import aclosing
from promptlayer_exec import PollPolicy, ResponseTooLarge, Session

LIMIT = 4 * 2**20
MOST = LIMIT // 64

def body(n):
    return eval(sys.argv[1].strip(), {"n": n})

# In a body of at most a sixth of the limit, any number of values is accepted.
small = body(MOST * 5)
if len(small) > LIMIT // 6:
    small = body(MOST - 10)
large = next(large for k in (2, 4, 8) if len(large := body(MOST * k)) > LIMIT // 6)
bodies = [body(MOST - 8), body(MOST // 2), small, large]

async def serve(reader, writer):
    for body in bodies:
        await reader.readuntil(b"\\r\\n\\r\\n")
        writer.write(b"HTTP/1.1 202 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body))
        writer.write(body)
        await writer.drain()
    writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    base_url = "http://127.0.0.1:%d" % server.sockets[0].getsockname()[1]
    settings = {"base_url": base_url, "poll": PollPolicy.fixed(0.001)}
    async with server, Session("key", max_response_bytes=LIMIT, **settings) as session:
        before = memory_now()
        polls = 0
        try:
            async with aclosing(session.execution(1).stream()) as snapshots:
                async for snapshot in snapshots:
                    polls = snapshot.poll
        except ResponseTooLarge as error:
            used = peak() - before
            print(polls, used * 1024 / LIMIT, str(error).partition(";")[0])

asyncio.run(main())
"""
    finished = subprocess.run(
        [sys.executable, "-c", PEAK + program, shape],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.stderr == ""
    polls, times, message = finished.stdout.split(maxsplit=2)
    assert polls == "3"
    assert float(times) < 20.0
    assert "holds more than 65,536 values" in message


@pytest.mark.parametrize(
    ("text", "is_read"),
    [
        ("1,2,[3],{4}\n" * 20_000, True),
        ('"a","b\\",",c,\n' * 20_000, True),
        ("x" + "[" * 200_000 + '"\\', True),
        ("\ufeffÜ," * 50_000, True),
        (" \n[" + "1," * 100_000 + "1]", False),
        ("\\[x," + "y," * 100_000, True),
        ('"{",' * 50_000, True),
        ([","] * 50_000, False),
        (["\\"] * 50_000, False),
        (['\\"'] * 50_000, False),
        ([[]] * 50_000, False),
    ],
    ids=[
        *("CSV", "quotes", "brackets", "BOM", "JSON", "TeX", "cells"),
        *("strings", "backslashes", "escapes", "lists"),
    ],
)
async def test_what_is_in_a_text_is_no_value(text: Any, is_read: bool) -> None:
    """Unless the text is JSON itself, which `into=` decodes."""
    body = json.dumps({"A": {"status": "SUCCESS", "value": text, "is_output_node": True}}).encode()
    async with (
        raw_server(answering(http(body))) as base_url,
        Session("key", base_url=base_url, max_response_bytes=1_000_000) as session,
    ):
        getting = session.get_results(1)
        if is_read:
            assert (await getting).value["A"]["value"] == text
        else:
            with pytest.raises(ResponseTooLarge, match="holds more than 15,625 values"):
                await getting


@pytest.mark.parametrize("mark", [*",[{"])
@pytest.mark.parametrize("case", [str.lower, str.upper])
async def test_what_is_escaped_in_a_text_that_is_json_is_a_value(
    mark: str, case: Callable[[str], str]
) -> None:
    """Otherwise `into=` could take many times the limit."""
    value = "[" + {",": "1,", "[": "[],", "{": "{},"}[mark] * 40_000 + "1]"
    escaped = value.replace(mark, "\\u" + case(f"{ord(mark):04x}"))
    if mark != ",":
        escaped = escaped.replace(",", " ")  # is not JSON, but counts as much
    body = f'{{"A": {{"status": "SUCCESS", "value": "{escaped}", "is_output_node": true}}}}'
    async with (
        raw_server(answering(http(body.encode()))) as base_url,
        Session("key", base_url=base_url, max_response_bytes=1_000_000) as session,
    ):
        with pytest.raises(ResponseTooLarge, match="holds more than 15,625 values"):
            await session.get_results(1)


async def test_all_commas_count_in_an_encoding_that_json_seldom_has() -> None:
    """A text cannot be told from values there without decoding it."""
    body = json.dumps({"A": {"value": "a," * 50_000}}).encode("utf-16")
    async with (
        raw_server(answering(http(body))) as base_url,
        Session("key", base_url=base_url, max_response_bytes=1_000_000) as session,
    ):
        with pytest.raises(ResponseTooLarge, match="holds more than 15,625 values"):
            await session.get_results(1)


async def test_a_borrowed_session_s_middleware_sees_the_body_of_a_start(sim: Simulator) -> None:
    """A middleware that signs requests needs the body."""
    sim.add_workflow("workflow", Scenario([SimNode("A")]))
    seen = []

    async def sign(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        seen.append((await request.body.as_bytes(), request.body.decode()))
        response: aiohttp.ClientResponse = await handler(request)
        return response

    async with (
        aiohttp.ClientSession(middlewares=(sign,)) as theirs,
        Session(sim.api_key, base_url=sim.base_url, http=theirs) as session,
    ):
        await session.start("workflow", {"a": 1})
    (request,) = sim.requests
    assert seen == [(request.body, request.body.decode())]


async def test_a_large_body_is_sent_without_a_warning(sim: Simulator) -> None:
    """Inputs may be larger than a mebibyte."""
    sim.add_workflow("workflow", Scenario([SimNode("A")]))
    async with Session(sim.api_key, base_url=sim.base_url) as session:
        await session.start("workflow", {"text": "x" * 3_000_000})
    assert len(sim.runs[0].inputs["text"]) == 3_000_000


async def test_a_body_of_exactly_the_limit_is_read() -> None:
    """A body as large as the limit is allowed."""
    body = b'"' + b"x" * 998 + b'"'
    async with (
        raw_server(answering(http(body))) as base_url,
        Session("key", base_url=base_url, max_response_bytes=1000) as session,
    ):
        assert (await session.get_results(1)).value == "x" * 998


STARTED = {"workflow_version_execution_id": 787}


@pytest.mark.parametrize(
    "body",
    [
        {"warning": "x" * 20_000, **STARTED},
        {"warning": ["variable"] * 1_500, **STARTED},
        {**STARTED, "warning": "x" * 500_000},
        {**STARTED, "warning": [[]] * 20_000},
    ],
    ids=["long", "many values", "too long", "too many values"],
)
async def test_the_id_of_a_start_is_found_in_an_answer_beyond_the_limit(body: Any) -> None:
    """The limit is for outputs; the server's warning may name every input."""
    async with (
        raw_server(answering(http(json.dumps(body).encode(), status="201 Created"))) as base_url,
        Session("key", base_url=base_url, max_response_bytes=1000) as session,
    ):
        assert (await session.start("workflow")).id == 787


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("call", [read_results, start])
async def test_redirects_are_not_followed(sim: Simulator, call: Call, status: int) -> None:
    """The target gets no request, and the error names it."""
    location = f"Location: {sim.base_url}/elsewhere\r\n"
    answer = http(b"", status=f"{status} Go", headers=location)
    async with raw_server(answering(answer)) as base_url:
        error = await failure_at(base_url, call)
    assert type(error) is StatusError
    assert error.status == status
    assert f"{sim.base_url}/elsewhere" in str(error)
    assert sim.request_count == 0


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its causes and its contexts."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    "answer",
    [
        http(b'{"message": "no key secret-key"}', status="401 No"),
        http(
            ('{"message": "' + "".join(f"\\u{ord(c):04x}" for c in "secret-key") + '"}').encode(),
            status="404 No",
        ),
        http('{"error": "secret-key"}'.encode("utf-16"), status="404 No"),
        http(b'{"detail": [{"loc": ["secret-key"], "msg": "x", "type": "y"}]}', status="422 No"),
        http(b"key secret-key is unknown", status="403 No"),
        http(b"", status="302 Go", headers="Location: /?key=secret-key\r\n"),
        http(b"secret-key is no JSON"),
        http(b'{"secret-key": {"status": 5}}'),
        http(b'{"A": "secret-key"}')[:-3],
        b"SSH secret-key\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: secret-key\x01\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: secret-key; a\r\nY: ",
        http(b'{"workflow_version_execution_id": "secret-key"}', status="201 Created"),
        http(b"secret-key", status="503 No"),
        b"",
    ],
)
@pytest.mark.parametrize("call", [read_results, start])
async def test_the_key_is_nowhere_in_an_error(
    answer: bytes, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not in str, repr, pickle, traceback, events or logs, nor in causes, echoed or not."""
    caplog.set_level(logging.DEBUG)
    events: list[Any] = []
    retry = RetryPolicy(outage=0.02, base=0.01)
    async with raw_server(answering(answer)) as base_url:
        error = await failure_at(base_url, call, retry=retry, observers=[events.append])
    said = [repr(event) for event in events] + [record.getMessage() for record in caplog.records]
    for link in chain(error):
        said += [str(link), repr(link), repr(vars(link)), *traceback.format_exception(link)]
    said.append(pickle.dumps(error).decode("latin-1"))
    assert [text for text in said if "secret-key" in text] == []


async def test_the_headers_of_an_answer_cut_in_its_head_are_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The text of the error of aiohttp shows them."""
    answer = b"HTTP/1.1 200 OK\r\nSet-Cookie: id=787\r\nX: "
    retry = RetryPolicy(outage=0.02, base=0.01)
    async with raw_server(answering(answer)) as base_url:
        error = await failure_at(base_url, read_results, retry=retry)
    assert "Server disconnected" in str(error)
    assert "Server disconnected" in caplog.text
    assert "Cookie" not in str(error) + caplog.text


async def test_aiohttp_still_has_the_private_name_we_use() -> None:
    """Only a borrowed session's middlewares need a private name of aiohttp."""
    middleware = Mock()
    async with aiohttp.ClientSession(middlewares=[middleware]) as http:
        assert tuple(http._middlewares) == (middleware,)


@pytest.mark.parametrize("borrowed", [False, True])
async def test_aiohttp_does_not_send_again_by_itself(borrowed: bool) -> None:
    """A connection that closed between two requests costs a retry that is counted and reported."""
    events: list[Any] = []
    requests = 0
    seen = 0

    async def count(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        nonlocal seen
        seen += 1
        response: aiohttp.ClientResponse = await handler(request)
        return response

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        while True:
            await reader.readuntil(b"\r\n\r\n")
            requests += 1
            if requests == 2:
                return
            writer.write(http(b'"done"'))

    async with (
        raw_server(serve) as base_url,
        aiohttp.ClientSession(middlewares=(count,)) as theirs,
        Session(
            "key",
            base_url=base_url,
            http=theirs if borrowed else None,
            observers=[events.append],
            retry=RetryPolicy(base=0.001),
        ) as session,
    ):
        await session.get_results(1)
        assert (await session.get_results(1)).value == "done"
    assert requests == 3
    assert seen == (3 if borrowed else 0)
    assert [type(event) for event in events] == [RequestRetried]
    assert type(events[0].error) is ConnectionFailed


async def test_a_key_at_the_end_of_an_excerpt_is_not_cut_in_half() -> None:
    """The key is redacted before the excerpt is cut."""
    body = b"<" * 195 + b"secret-key and more"
    async with raw_server(answering(http(body)[:-1])) as base_url:
        error = await failure_at(base_url)
    assert error.excerpt == "<" * 195 + "*** a"


async def test_no_cookie_is_kept() -> None:
    """A cookie from the server, or from a proxy, is not sent back."""
    heads = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(http(b"1", headers="Set-Cookie: a=b\r\n"))

    async with raw_server(serve) as base_url:
        named = base_url.replace(
            "127.0.0.1", "localhost"
        )  # a cookie jar ignores addresses by default
        async with Session("key", base_url=named) as session:
            await session.get_results(1)
            await session.get_results(1)
    assert len(heads) == 2
    assert b"cookie" not in heads[1].lower()


async def test_a_borrowed_session_that_does_not_decompress_is_still_decompressed() -> None:
    """The client reads JSON, whatever setting the owner chose."""
    answer = http(gzip.compress(b'"done"'), headers="Content-Encoding: gzip\r\n")
    async with (
        raw_server(answering(answer)) as base_url,
        aiohttp.ClientSession(auto_decompress=False) as theirs,
        Session("key", base_url=base_url, http=theirs) as session,
    ):
        assert (await session.get_results(1)).value == "done"


async def test_a_body_that_cannot_be_decoded_is_reported_as_such() -> None:
    """The error has the decoder's message."""
    answer = http(b"this is no gzip", headers="Content-Encoding: gzip\r\n")
    async with raw_server(answering(answer)) as base_url:
        error = await failure_at(base_url)
    assert type(error) is InvalidResponse
    assert "cannot be decoded" in str(error)
    assert "gzip" in error.reason


async def test_a_switch_of_protocols_is_refused_and_closed() -> None:
    """A 101 has no body that ends, so nothing else would close the connection."""
    answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: other\r\nConnection: upgrade\r\n\r\n"
    async with raw_server(answering(answer)) as base_url:
        error = await failure_at(base_url)
    assert type(error) is InvalidResponse
    assert error.status == 101


async def test_a_foreign_cancellation_is_a_failure_of_the_attempt() -> None:
    """For example, the owner closes a borrowed session; none of our tasks was cancelled."""

    async def interrupt(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        raise asyncio.CancelledError

    async with (
        aiohttp.ClientSession(middlewares=(interrupt,)) as theirs,
        Session("key", base_url="http://127.0.0.1:1", http=theirs, retry=NO_RETRY) as session,
    ):
        with pytest.raises(ConnectionFailed, match="CancelledError"):
            await session.get_results(1)


async def test_waiting_for_the_rate_does_not_use_up_the_outage_limit(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """Five attempts at intervals of 200 ms fit into an `outage` of 500 ms."""
    session = open_session(rate=5.0, retry=RetryPolicy(outage=0.5, base=0.001))
    sim.inject(Fault.status(503, times=4))
    await session.get_results(held)
    assert sim.request_count == 5


async def test_retry_after_is_a_minimum_for_the_delay(
    sim: Simulator, open_session: Callable[..., Session], held: int, recorder: Any
) -> None:
    """Every form of the header counts, up to the policy's ceiling."""
    in_two_seconds = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 1000))
    session = open_session(retry=RetryPolicy(base=0.001, retry_after_ceiling=0.03))
    for retry_after in (0.02, "0.02", in_two_seconds):
        sim.inject(Fault.status(503, retry_after=retry_after))
    sim.inject(Fault.status(503, headers={"retry-after-ms": "20"}))
    sim.inject(Fault.status(503, retry_after="soon"))
    await session.get_results(held)
    delays = [event.delay for event in recorder.of(RequestRetried)]
    assert delays[:2] == [0.02, 0.02]
    assert delays[2] == 0.03
    assert delays[3] == 0.02
    assert delays[4] < 0.033
    times = [request.at for request in sim.requests]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert all(gap >= delay for gap, delay in zip(gaps, delays, strict=True))


async def test_a_429_slows_every_request_of_the_session(
    sim: Simulator, open_session: Callable[..., Session], held: int, recorder: Any
) -> None:
    """The request of another call is sent no earlier than the server asked."""
    session = open_session()
    sim.inject(Fault.status(429, retry_after=0.1))
    refused = asyncio.create_task(session.get_results(held))
    await recorder.next(Throttled)
    other = asyncio.create_task(session.execution(held).snapshot())
    await asyncio.gather(refused, other)
    first, second, third = (request.at for request in sim.requests)
    assert second - first >= 0.1
    assert third - first >= 0.1
    (throttled,) = recorder.of(Throttled)
    assert throttled.execution_id == held
    assert throttled.delay == pytest.approx(0.1, abs=0.01)


async def test_waiting_for_a_connection_does_not_count_as_request_time(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """With one connection, ten calls of 60 ms each all succeed with a timeout of 500 ms."""
    session = open_session(max_connections=1, request_timeout=0.5, retry=NO_RETRY)
    sim.inject(Fault.delay(0.06, times=None))
    answers = await asyncio.gather(*(session.get_results(held) for _ in range(10)))
    assert len(answers) == 10


async def test_a_borrowed_pool_smaller_than_ours_is_respected(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """No request waits inside aiohttp, where its timeout would already run."""
    connector = aiohttp.TCPConnector(limit_per_host=1)
    async with aiohttp.ClientSession(connector=connector) as http_session:
        session = open_session(http=http_session, request_timeout=0.5, retry=NO_RETRY)
        sim.inject(Fault.delay(0.06, times=None))
        answers = await asyncio.gather(*(session.get_results(held) for _ in range(10)))
    assert len(answers) == 10


async def test_big_integers_and_unusual_values_are_kept(sim: Simulator, session: Session) -> None:
    """Over a real socket, too, the value is what the standard library reads."""
    odd = '{"A":{"status":"SUCCESS","value":[123456789012345678901234567890,NaN,"\\ud800"]}}'
    sim.inject(Fault.status(200, body=odd.encode()))
    snapshot = await session.get_results(1, return_all_outputs=True)
    value = snapshot.nodes["A"].value
    assert value[0] == 123456789012345678901234567890
    assert value[1] != value[1]
    assert value[2] == "\ud800"
    assert json.dumps(snapshot.raw) == json.dumps(json.loads(odd))


async def test_every_request_error_names_the_execution_and_the_failure(
    sim: Simulator, session: Session
) -> None:
    """It has the execution, the status, the server's message and the advice in one line."""
    with pytest.raises(RequestError) as caught:
        await session.get_results(424242)
    assert str(caught.value).startswith("execution 424242: the server answered 404 Not Found: ")
    assert str(caught.value).endswith(NotFound.advice)
    assert "\n" not in str(caught.value)
