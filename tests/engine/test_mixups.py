"""An answer never reaches another request, and one that has arrived is not thrown away."""

from __future__ import annotations

import asyncio
import gc
import select
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
import trustme

from promptlayer_exec import (
    ConfigurationError,
    ExecutionStarted,
    PollPolicy,
    RetryPolicy,
    Session,
    SessionClosed,
    StartUnknown,
)

KEY = "key-of-a-test"
RETRY = RetryPolicy(outage=5.0, watch_outage=5.0, base=0.001)
NOBODYS = b'HTTP/1.1 %d OK\r\nContent-Length: 36\r\n\r\n{"workflow_version_execution_id": 1}'


@pytest.fixture
def connect(raw_server: Any) -> Callable[..., Session]:
    """Return a function that makes sessions for the server of raw answers."""

    def make(**settings: Any) -> Session:
        defaults: dict[str, Any] = {"retry": RETRY, "poll": PollPolicy.fixed(0.01), "rate": None}
        defaults |= {"push": False, "check_inputs": False}
        return Session(KEY, base_url=raw_server.url, **{**defaults, **settings})

    return make


@asynccontextmanager
async def borrowing(connect: Callable[..., Session], **settings: Any) -> AsyncIterator[Session]:
    """Return an open session with a borrowed client session; the settings are the latter's."""
    async with aiohttp.ClientSession(**settings) as http, connect(http=http) as session:
        yield session


async def value_of(session: Session, number: int) -> Any:
    """Return the server's value for one execution: its own id, as a string."""
    return (await session.get_results(number, return_all_outputs=True)).nodes["Answer"].value


async def check_values(session: Session, numbers: range) -> None:
    """Request all results at once; each must be its own."""
    got = await asyncio.gather(*(value_of(session, number) for number in numbers))
    assert got == [str(number) for number in numbers]


async def loop_steps(count: int) -> None:
    """Let the event loop run for some steps."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Return the context of a server for localhost, which aiohttp trusts from now on."""
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.configure_trust(ours)
    authority.issue_cert("localhost").configure_cert(theirs)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", ours)
    return theirs


# Bytes that no request asked for


@pytest.mark.parametrize("how", ["read", "in the socket", "in the socket on Windows", "TLS"])
async def test_a_surplus_answer_on_an_idle_connection_is_never_used(
    raw_server: Any,
    connect: Callable[..., Session],
    context: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """Every later call gets its own results, even if the loop has not read the surplus yet."""
    if how == "in the socket on Windows":
        monkeypatch.delattr(select, "poll")
    elif how == "TLS":
        await raw_server.listen(context)
    async with connect() as session:
        await check_values(session, range(1, 2))
        raw_server.writers[0].write(NOBODYS % 200)
        await loop_steps(0 if how.startswith("in the socket") else 20)
        for number in range(2, 12):
            assert await value_of(session, number) == str(number)
    assert {request.connection for request in raw_server.requests} == {0, 1}


@pytest.mark.parametrize("end", ["a surplus answer", "the end of the connection"])
async def test_many_connections_of_no_use_are_no_failure(
    raw_server: Any, connect: Callable[..., Session], recorder: Any, end: str
) -> None:
    """However many became useless while the loop was busy, each request soon has a good one."""
    all_there = asyncio.Barrier(30)

    async def together(request: Any) -> None:
        await all_there.wait()
        await raw_server.echo(request)

    async with connect(observers=[recorder]) as session:
        raw_server.respond = together
        await check_values(session, range(1, 31))
        raw_server.respond = raw_server.echo
        for writer in raw_server.writers:
            if end == "a surplus answer":
                writer.write(NOBODYS % 200)
            else:
                writer.write_eof()
        await check_values(session, range(1, 31))
    assert recorder.events == []


# Reads that are cancelled


async def test_results_are_not_mixed_up_when_reads_are_cancelled(
    raw_server: Any, connect: Callable[..., Session]
) -> None:
    """In whichever step they are cancelled, all others get their own results."""

    async def slowly(request: Any) -> None:
        await loop_steps(int(request.execution_id) % 7)
        await raw_server.echo(request)

    raw_server.respond = slowly
    cancelled = 0
    async with connect(max_connections=20) as session:
        for steps in range(40):
            reads = {n: asyncio.create_task(value_of(session, n)) for n in range(1, 41)}
            await loop_steps(steps)
            for number, read in reads.items():
                if number % 3 == steps % 3:
                    read.cancel()
            await asyncio.wait(reads.values())
            for number, read in reads.items():
                cancelled += read.cancelled()
                assert read.cancelled() or read.result() == str(number)
        assert cancelled > 100
        await check_values(session, range(1, 41))


async def test_a_cancelled_read_over_tls_leaves_no_connection(
    raw_server: Any, connect: Callable[..., Session], context: ssl.SSLContext
) -> None:
    """In whichever step of connecting and reading: aiohttp would warn of one that is not closed."""
    await raw_server.listen(context)
    async with connect() as session:
        for steps in range(100):
            reading = asyncio.create_task(value_of(session, 1))
            await loop_steps(steps)
            was_done = reading.done()
            reading.cancel()
            await asyncio.wait([reading])
            assert was_done or reading.cancelled()
        await check_values(session, range(2, 3))
    gc.collect()


# Starts


@pytest.mark.parametrize("is_borrowed", [False, True], ids=["own", "borrowed"])
async def test_each_start_has_a_new_connection(
    raw_server: Any, connect: Callable[..., Session], recorder: Any, *, is_borrowed: bool
) -> None:
    """Although the server ignores `Connection: close`, and reads leave idle connections."""
    async with AsyncExitStack() as stack:
        settings: dict[str, Any] = {"observers": [recorder]}
        if is_borrowed:
            settings["http"] = await stack.enter_async_context(aiohttp.ClientSession())
        session = await stack.enter_async_context(connect(**settings))
        await check_values(session, range(1, 4))
        await asyncio.gather(*(session.start("name") for _ in range(10)))
        for _ in range(10):
            await session.start("name")
    assert raw_server.count("POST") == 20
    used = [request.connection for request in raw_server.requests]
    assert len({*used[3:]} - {*used[:3]}) == 20
    assert {type(event) for event in recorder.events} == {ExecutionStarted}


@pytest.mark.parametrize("status", [429, 404, 201])
async def test_no_stale_answer_is_taken_for_a_start_s_in_a_borrowed_session(
    raw_server: Any, connect: Callable[..., Session], status: int
) -> None:
    """Neither a stale refusal nor the id of another run is taken for the answer."""
    for number in range(1, 11):
        async with borrowing(connect) as session:
            await check_values(session, range(number, number + 1))
            # Sent at the same time as the next request, so nothing shows it beforehand.
            idle = raw_server.writers[-1]
            asyncio.get_running_loop().call_soon(idle.write, NOBODYS % status)
            assert (await session.start("name")).id == 787
            assert raw_server.count("POST") == number


async def test_a_middleware_that_sends_again_does_not_send_a_start_twice(
    raw_server: Any, connect: Callable[..., Session]
) -> None:
    """A borrowed session's own retries do not apply to starts."""

    async def retry(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        response = await handler(request)
        return response if response.status < 500 else await handler(request)

    raw_server.respond = lambda request: request.answer("503 Busy", {})
    async with borrowing(connect, middlewares=[retry]) as session:
        with pytest.raises(StartUnknown):
            await session.start("name")
    assert raw_server.count("POST") == 1


@pytest.mark.parametrize("is_borrowed", [False, True], ids=["own", "borrowed"])
async def test_an_id_in_the_socket_is_read_after_a_blocked_loop(
    raw_server: Any, connect: Callable[..., Session], recorder: Any, *, is_borrowed: bool
) -> None:
    """The loop was blocked longer than `request_timeout`, but the answer arrived in time."""

    async def block(request: Any) -> None:
        await raw_server.echo(request)
        time.sleep(0.15)  # noqa: ASYNC251 - the loop is blocked, and the answer is in the socket

    raw_server.answers.append(block)
    async with AsyncExitStack() as stack:
        settings: dict[str, Any] = {"request_timeout": 0.1, "observers": [recorder]}
        if is_borrowed:
            settings["http"] = await stack.enter_async_context(aiohttp.ClientSession())
        session = await stack.enter_async_context(connect(**settings))
        assert (await session.start("name")).id == 787
    assert raw_server.count("POST") == 1
    assert [event.execution_id for event in recorder.of(ExecutionStarted)] == [787]


@pytest.mark.parametrize("how", ["without its last chunk", "with large headers"])
async def test_a_whole_answer_to_a_start_counts_whatever_surrounds_it(
    raw_server: Any, connect: Callable[..., Session], how: str
) -> None:
    """The connection may break behind it, and a proxy may add headers of tens of kilobytes."""

    async def respond(request: Any) -> None:
        value = {"workflow_version_execution_id": 787}
        if how == "with large headers":
            await request.answer("201 Created", value, "X-Long: " + "x" * 30_000)
        else:
            chunk = b'26\r\n{"workflow_version_execution_id": 787}\r\n'
            head = b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n"
            await request.send(head + chunk)
        request.close()

    raw_server.respond = respond
    async with connect() as session:
        assert (await session.start("name")).id == 787
    assert raw_server.count("POST") == 1


# Borrowed client sessions


@pytest.mark.parametrize("reader", ["middleware", "trace"])
async def test_a_body_that_a_borrowed_session_has_read_already_is_not_lost(
    raw_server: Any, connect: Callable[..., Session], reader: str
) -> None:
    """As for a log; aiohttp keeps it in the response."""

    async def read(request: Any, handler: Any) -> Any:
        response = await handler(request)
        assert await response.text()
        return response

    async def look(http: Any, context: Any, request: Any) -> None:
        assert await request.response.text()

    tracing = aiohttp.TraceConfig()
    tracing.on_request_end.append(look)
    settings: Any = {"trace_configs": [tracing]}
    if reader == "middleware":
        settings = {"middlewares": [read]}
    async with borrowing(connect, **settings) as session:
        execution = await session.start("name")
        assert (await execution.wait()).nodes["Answer"].value == "787"
    assert raw_server.count("POST") == 1


async def test_a_borrowed_session_that_cannot_send_says_so(
    raw_server: Any, connect: Callable[..., Session]
) -> None:
    """With two ways to authorize, aiohttp sends nothing, and the library's error is raised."""
    headers = {"Authorization": "Bearer x"}
    with pytest.warns(DeprecationWarning, match="deprecated and will be removed"):
        both = aiohttp.ClientSession(auth=aiohttp.BasicAuth("me", "x"), headers=headers)
    async with both as http, connect(http=http) as session:
        for call in (session.get_results(1), session.start("name")):
            with pytest.raises(ConfigurationError, match="passed as http= could not"):
                await call
    assert raw_server.requests == []


async def test_a_borrowed_session_that_is_closed_during_a_call_is_named(
    raw_server: Any, connect: Callable[..., Session]
) -> None:
    """The call ends with `SessionClosed`."""
    raw_server.respond = lambda request: http.close()
    async with aiohttp.ClientSession() as http, connect(http=http) as session:
        with pytest.raises(SessionClosed, match=r"the borrowed aiohttp\.ClientSession is closed"):
            await session.get_results(1)


async def test_an_error_of_a_middleware_is_raised_as_it_is(connect: Callable[..., Session]) -> None:
    """It is a fault of the caller's, whose traceback shows where."""

    async def fail(*_: Any) -> Any:
        raise AttributeError("mine")

    async with borrowing(connect, middlewares=[fail]) as session:
        with pytest.raises(AttributeError, match="mine"):
            await session.get_results(1)
