"""The transport: attempts, retries, and conversion of errors."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import pickle
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from aioresponses import aioresponses

from promptlayer_exec import (
    ConnectionFailed,
    Forbidden,
    InvalidResponse,
    NotFound,
    PromptLayerExecError,
    RequestRetried,
    ResponseTooLarge,
    RetryPolicy,
    Session,
    StartUnknown,
    StatusError,
    Throttled,
    Unauthorized,
)
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

NO_RETRY = RetryPolicy(outage=0.0)
AT_ONCE = RetryPolicy(base=0.001)


class Mocked(aiohttp.ClientResponse):
    """A response of aioresponses, with the `stream_writer` that aiohttp requires since 3.14."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"stream_writer": Mock(), **kwargs})


class Mocks:
    """What is answered without a network; `requests` lists the requests that were sent."""

    def __init__(self, mock: aioresponses) -> None:
        self._mock = mock

    def add(self, method: str, **settings: Any) -> None:
        """Add the answer to the next request with a method."""
        self._mock.add(re.compile(".*"), method, response_class=Mocked, **settings)

    @property
    def requests(self) -> list[tuple[str, str, dict[str, Any]]]:
        """The method, the URL and the settings of each request."""
        sent = self._mock.requests.items()
        return [(method, str(url), call.kwargs) for (method, url), calls in sent for call in calls]


@pytest.fixture
def mocks() -> Iterator[Mocks]:
    """Return the answers of aioresponses."""
    with aioresponses() as mock:
        yield Mocks(mock)


async def test_the_policy_may_name_further_statuses_to_retry(mocks: Mocks) -> None:
    """A status in the policy's list is retried, and the next answer is the result."""
    mocks.add("GET", status=418)
    mocks.add("GET", status=200, payload="done")
    retry = RetryPolicy(statuses=frozenset({418}), base=0.001)
    async with Session("key", retry=retry) as session:
        assert (await session.get_results(787)).value == "done"


@pytest.mark.parametrize("borrowed", [False, True])
async def test_mocked_requests_are_answered_as_mocked(mocks: Mocks, *, borrowed: bool) -> None:
    """An answer counts as one to a start that was sent, and an exception as one that was not."""
    node = {"status": "SUCCESS", "value": "done", "is_output_node": True}
    async with (
        aiohttp.ClientSession() as http,
        Session(
            "key", retry=AT_ONCE, http=http if borrowed else None, check_inputs=False
        ) as session,
    ):
        mocks.add("POST", exception=aiohttp.ClientConnectionError("no network"))
        mocks.add("POST", status=429)
        mocks.add("POST", status=201, payload={"workflow_version_execution_id": 787})
        execution = await session.start("flow", {"topic": "otters"})
        assert (execution.id, len(mocks.requests)) == (787, 3)
        mocks.add("GET", exception=aiohttp.ClientConnectionError("no network"))
        mocks.add("GET", status=503)
        mocks.add("GET", status=200, payload={"Report": node})
        assert await execution.output() == "done"
        assert len(mocks.requests) == 6
        for status, error in ((404, NotFound), (500, StartUnknown), (201, StartUnknown)):
            mocks.add("POST", status=status)
            with pytest.raises(error):
                await session.start("flow")
        assert len(mocks.requests) == 9


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
    settings = {"retry": NO_RETRY, "check_inputs": False, **settings}
    async with Session("secret-key", base_url=base_url, **settings) as session:
        with pytest.raises(PromptLayerExecError) as caught:
            await call(session)
    return caught.value


async def failure_of(
    raw_server: Any, answer: bytes, call: Call = read_results, **settings: Any
) -> Any:
    """Return the error of one call to a server that gives this answer and hangs up."""

    async def respond(request: Any) -> None:
        await request.send(answer)
        request.close()

    raw_server.respond = respond
    return await failure_at(raw_server.url, call, **settings)


async def test_a_refusal_whose_body_is_cut_short_is_still_the_refusal(raw_server: Any) -> None:
    """A connection that breaks within the body does not hide the status."""
    whole = http(b'{"message": "wrong key"}', status="401 Unauthorized")
    assert type(await failure_of(raw_server, whole[:-5])) is Unauthorized


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b"<html>hello</html>", None),
        (b"[]", "$"),
        (b'{"Node 1": {"value": 1}}', '$["Node 1"].status'),
    ],
)
async def test_a_success_that_is_not_a_node_map_is_invalid(
    raw_server: Any, recorder: Any, body: bytes, path: str | None
) -> None:
    """Invalid JSON has no path and is retried; an invalid shape is not retried."""
    error = await failure_of(raw_server, http(body))
    assert (type(error), error.path) == (InvalidResponse, path)
    raw_server.answers.extend([http(body), http(b"{}")])
    async with Session(
        "key", base_url=raw_server.url, retry=AT_ONCE, observers=[recorder]
    ) as session:
        if path is None:
            await read_results(session)
        else:
            with pytest.raises(InvalidResponse):
                await read_results(session)
    assert [type(event) for event in recorder.events] == [RequestRetried] * (path is None)


async def test_a_refusal_s_body_is_read_to_64_kib(raw_server: Any) -> None:
    """A large page from a proxy does not fill the memory."""
    error = await failure_of(raw_server, http(b"x" * 1_000_000, status="403 No"))
    assert type(error) is Forbidden
    assert error.body == "x" * 65536


@pytest.mark.parametrize("status", ["400 Bad Request", "500 Oops"])
@pytest.mark.parametrize("limit", [65536, 4_000_000])
async def test_an_error_keeps_64_kib_of_a_body_that_may_have_nodes(
    raw_server: Any, status: str, limit: int
) -> None:
    """The session reads the whole body, up to its limit, and the error is small all the same."""
    body = http(b"x" * 1_000_000, status=status)
    error = await failure_of(raw_server, body, max_response_bytes=limit)
    assert error.body == "x" * 65536


async def test_a_complete_run_behind_a_400_is_read_whole(raw_server: Any) -> None:
    """It may be larger than other errors, and is requested again if the connection breaks."""
    node = {"status": "SUCCESS", "value": "x" * 200_000, "is_output_node": True}
    whole = http(json.dumps({"output": {"A": node}}).encode(), status="400 Bad Request")
    answers = [whole[:-50], whole]

    async def respond(request: Any) -> None:
        await request.send(answers.pop(0))
        request.close()

    raw_server.respond = respond
    async with Session("key", base_url=raw_server.url, retry=AT_ONCE) as session:
        assert await session.execution(1).output() == node["value"]
    assert answers == []


@pytest.mark.parametrize("compressed", [False, True])
async def test_a_body_beyond_the_limit_is_refused(
    raw_server: Any, recorder: Any, *, compressed: bool
) -> None:
    """The size counts after decompression; the body is refused at once and not retried."""
    body, headers = b"1" * 5000, ""
    if compressed:
        body, headers = gzip.compress(body), "Content-Encoding: gzip\r\n"
        assert len(body) < 1000
    error = await failure_of(
        raw_server,
        http(body, headers=headers),
        retry=AT_ONCE,
        max_response_bytes=1000,
        observers=[recorder],
    )
    assert type(error) is ResponseTooLarge
    assert (error.limit, error.status) == (1000, 200)
    assert "1000 bytes" in str(error)
    assert recorder.events == []


async def test_a_body_of_exactly_the_limit_is_read(raw_server: Any) -> None:
    """A body as large as the limit is allowed."""
    raw_server.answers.append(http(b'"' + b"x" * 998 + b'"'))
    async with Session("key", base_url=raw_server.url, max_response_bytes=1000) as session:
        assert (await session.get_results(1)).value == "x" * 998


@pytest.mark.parametrize(
    ("body", "is_read"),
    [(b"[%b1]" % (b"1," * 80_000), True), (b"[%b1]" % (b"1, " * 80_000), False)],
    ids=["up to a sixth of the limit", "more than a sixth"],
)
async def test_a_body_with_too_many_values_is_refused(
    raw_server: Any, body: bytes, *, is_read: bool
) -> None:
    """A larger body may have one value for each 64 bytes of the limit."""
    raw_server.answers.append(http(body))
    async with Session("key", base_url=raw_server.url, max_response_bytes=1_200_000) as session:
        if is_read:
            assert (await session.get_results(1)).value == [1] * 80_001
        else:
            with pytest.raises(ResponseTooLarge, match="contains more than 18,750 values"):
                await session.get_results(1)


MEMORY = """
import asyncio, gzip
from contextlib import suppress
from promptlayer_exec import ResponseTooLarge, Session

LIMIT = 4 * 2**20
body = BODY
packed = gzip.compress(body, 6)
answer = b"HTTP/1.1 200 OK\\r\\nContent-Encoding: gzip\\r\\nContent-Length: %d\\r\\n\\r\\n"
answer = answer % len(packed) + packed
del body, packed

# Unlike `ru_maxrss`, this does not count the process that started this one, which would hide all.
def memory(key):
    with open("/proc/self/status") as status:
        return int(status.read().partition(key)[2].split()[0]) * 1024

async def serve(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(answer)
    with suppress(ConnectionError):
        await reader.read()
    writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    base_url = "http://127.0.0.1:%d" % server.sockets[0].getsockname()[1]
    async with server, Session("key", base_url=base_url, max_response_bytes=LIMIT) as session:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # from here, the peak is counted anew
        before = memory("VmRSS:")
        with suppress(ResponseTooLarge):
            await session.get_results(1, return_all_outputs=True)
            print("read", end=" ")
        print((memory("VmHWM:") - before) / LIMIT)

asyncio.run(main())
"""
NODES = (
    """b"{" + b",".join(b'"%x":{"status":"RUNNING"}' % i for i in range(LIMIT // 150)) + b"}" """
)
LISTS = """b'{"a":{"status":"RUNNING","value":[' + b"[]," * (LIMIT // 19) + b"0]}}" """


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("body", "is_read", "times"),
    [("b' ' * 2**28", False, 8), (LISTS, True, 20), (NODES, True, 20)],
    ids=["a gzip bomb", "lists", "nodes"],
)
def test_the_memory_for_a_body_is_bounded(body: str, *, is_read: bool, times: int) -> None:
    """A bomb of 256 MiB takes few times `max_response_bytes`, and decoded values less than 20."""
    finished = subprocess.run(
        [sys.executable, "-c", MEMORY.replace("BODY", body.strip(), 1)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.stderr == ""
    *read, used = finished.stdout.split()
    assert (read == ["read"]) == is_read
    assert float(used) < times


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
        Session(sim.api_key, base_url=sim.base_url, http=theirs, check_inputs=False) as session,
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


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("call", [read_results, start])
async def test_redirects_are_not_followed(
    raw_server: Any, sim: Simulator, call: Call, status: int
) -> None:
    """The target gets no request, and the error names it."""
    location = f"Location: {sim.base_url}/elsewhere\r\n"
    error = await failure_of(raw_server, http(b"", status=f"{status} Go", headers=location), call)
    assert type(error) is StatusError
    assert error.status == status
    assert f"{sim.base_url}/elsewhere" in str(error)
    assert sim.request_count == 0


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its causes and its contexts."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("key", ["k", "secret-key"])
async def test_no_header_of_ours_is_in_a_cause(raw_server: Any, key: str) -> None:
    """For an answer that is not HTTP, aiohttp's error would show all headers, even a short key."""
    raw_server.answers.append(b"SSH-2.0-OpenSSH\r\n\r\n")
    async with Session(key, base_url=raw_server.url, retry=NO_RETRY) as session:
        with pytest.raises(ConnectionFailed) as caught:
            await session.get_results(787)
    assert isinstance(caught.value.__cause__, aiohttp.ClientError)
    for link in chain(caught.value):
        assert "X-API-KEY" not in f"{link!r} {vars(link)}"


@pytest.mark.parametrize(
    "answer",
    [
        http(b'{"message": "no key secret-key"}', status="401 No"),
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
    raw_server: Any, recorder: Any, answer: bytes, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not in str, repr, pickle, traceback, events or logs, nor in causes, echoed or not."""
    caplog.set_level(logging.DEBUG)
    retry = RetryPolicy(outage=0.02, base=0.01)
    error = await failure_of(raw_server, answer, call, retry=retry, observers=[recorder])
    said = [repr(event) for event in recorder.events]
    said += [record.getMessage() for record in caplog.records]
    for link in chain(error):
        said += [str(link), repr(link), repr(vars(link)), *traceback.format_exception(link)]
    said.append(pickle.dumps(error).decode("latin-1"))
    assert [text for text in said if "secret-key" in text] == []


async def test_aiohttp_does_not_send_again_by_itself(raw_server: Any, recorder: Any) -> None:
    """A connection that closed between two requests costs a retry that is counted and reported."""

    async def close_the_second(request: Any) -> None:
        if len(raw_server.requests) == 2:
            request.close()
        else:
            await request.answer("200 OK", "done")

    raw_server.respond = close_the_second
    async with Session(
        "key", base_url=raw_server.url, observers=[recorder], retry=AT_ONCE
    ) as session:
        await session.get_results(1)
        assert (await session.get_results(1)).value == "done"
    assert len(raw_server.requests) == 3
    assert [type(event) for event in recorder.events] == [RequestRetried]
    assert type(recorder.events[0].error) is ConnectionFailed


async def test_no_cookie_is_kept(raw_server: Any) -> None:
    """A cookie from the server, or from a proxy, is not sent back."""
    raw_server.respond = lambda request: request.answer("200 OK", 1, "Set-Cookie: a=b")
    # A cookie jar ignores addresses by default.
    named = raw_server.url.replace("127.0.0.1", "localhost")
    async with Session("key", base_url=named) as session:
        await session.get_results(1)
        await session.get_results(1)
    assert "cookie" not in raw_server.requests[1].head.lower()


async def test_a_borrowed_session_that_does_not_decompress_is_still_decompressed(
    raw_server: Any,
) -> None:
    """The client reads JSON, whatever setting the owner chose."""
    raw_server.answers.append(http(gzip.compress(b'"done"'), headers="Content-Encoding: gzip\r\n"))
    async with (
        aiohttp.ClientSession(auto_decompress=False) as theirs,
        Session("key", base_url=raw_server.url, http=theirs) as session,
    ):
        assert (await session.get_results(1)).value == "done"


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
    in_a_while = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 1000))
    session = open_session(retry=RetryPolicy(base=0.001, retry_after_ceiling=0.03))
    for retry_after in (0.02, "0.02", in_a_while):
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


@pytest.mark.parametrize("borrowed", [False, True])
async def test_waiting_for_a_connection_does_not_count_as_request_time(
    sim: Simulator, open_session: Callable[..., Session], held: int, *, borrowed: bool
) -> None:
    """With one connection, ten calls of 60 ms each all succeed with a timeout of 500 ms."""
    sim.inject(Fault.delay(0.06, times=None))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit_per_host=1)) as theirs:
        own = {"http": theirs} if borrowed else {"max_connections": 1}
        async with open_session(request_timeout=0.5, retry=NO_RETRY, **own) as session:
            answers = await asyncio.gather(*(session.get_results(held) for _ in range(10)))
    assert len(answers) == 10
