"""TLS, client certificates and private authorities: real handshakes on loopback."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
import trustme

from promptlayer_exec import ConnectionFailed, RequestRetried, RetryPolicy, Session, Snapshot


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return a private authority that is not trusted by default."""
    return trustme.CA()


@pytest.fixture
def serve(raw_server: Any) -> Callable[..., Awaitable[str]]:
    """Return a function that starts a server with an SSL context, and returns its base URL."""

    async def start(context: ssl.SSLContext) -> str:
        await raw_server.listen(context)
        return f"https://127.0.0.1:{raw_server.url.rpartition(':')[2]}"

    return start


def server_context(authority: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    """Return a server's context, with a certificate of the authority's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    """Return a client's context that trusts the authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def refused(base_url: str, context: ssl.SSLContext) -> ConnectionFailed:
    """Request results, and return the error, which must come without a retry."""
    events: list[object] = []
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as http,
        Session(
            "key", base_url=base_url, http=http, check_inputs=False, observers=[events.append]
        ) as session,
    ):
        with pytest.raises(ConnectionFailed) as caught:
            await session.get_results(787)
        with pytest.raises(ConnectionFailed):
            await session.start("name")
    assert not any(isinstance(event, RequestRetried) for event in events)
    assert caught.value.attempts == 1
    assert "Operation not permitted" not in str(caught.value)
    return caught.value


async def test_no_common_version_is_named(authority: trustme.CA) -> None:
    """The protocol's own word for it is in the error."""
    context = server_context(authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    mine = client_context(authority)
    mine.maximum_version = ssl.TLSVersion.TLSv1_2

    def serve() -> None:
        # Unlike asyncio's, a blocking server sends the alert before it closes the connection.
        for _ in range(2):
            connection, _ = listener.accept()
            with connection, suppress(ssl.SSLError):
                context.wrap_socket(connection, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        serving = asyncio.create_task(asyncio.to_thread(serve))
        error = await refused(f"https://127.0.0.1:{listener.getsockname()[1]}", mine)
        await serving
    assert "handshake failed: TLSV1_ALERT_PROTOCOL_VERSION" in str(error)


async def test_a_demanded_client_certificate_is_named_under_tls_1_3(authority: trustme.CA) -> None:
    """The server refuses after our side of the handshake; the start was not read, so not lost."""
    context = server_context(authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED

    def refuse(connection: socket.socket) -> None:
        with context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        ) as secured:
            secured.settimeout(10)
            with pytest.raises(ssl.SSLError):
                secured.do_handshake()
            was_named.wait(10)  # it would end with a reset, because the request was not read

    def serve() -> None:
        with ThreadPoolExecutor() as threads:
            # Of a borrowed session, aiohttp itself repeats a read once.
            refusals = [threads.submit(refuse, listener.accept()[0]) for _ in range(3)]
        for refusal in refusals:
            refusal.result()

    was_named = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        serving = asyncio.create_task(asyncio.to_thread(serve))
        base_url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        async with asyncio.timeout(20):
            error = await refused(base_url, client_context(authority))
        was_named.set()
        await serving
    assert "CERTIFICATE_REQUIRED" in str(error)
    assert "client certificate" in str(error)


async def test_a_borrowed_session_brings_its_own_authority_and_certificate(
    serve: Callable[..., Awaitable[str]], authority: trustme.CA
) -> None:
    """A server that demands a client certificate is asked through `http=`, for starts, too."""
    theirs = server_context(authority)
    theirs.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(theirs)
    mine = client_context(authority)
    authority.issue_cert("client@example.org").configure_cert(mine)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=mine)) as http,
        Session("key", base_url=await serve(theirs), http=http) as session,
    ):
        snapshot = await session.get_results(787, return_all_outputs=True)
        assert (await session.start("name")).id == 787
    assert isinstance(snapshot, Snapshot)
    assert snapshot.nodes["Answer"].value == "787"


async def test_a_connection_closed_in_the_handshake_is_retried(raw_server: Any) -> None:
    """It can pass by waiting, so it is not a TLS failure."""
    raw_server.accept = lambda writer: writer.close()
    base_url = raw_server.url.replace("http://", "https://")
    retry = RetryPolicy(outage=0.05, base=0.01)
    async with Session("key", base_url=base_url, retry=retry) as session:
        with pytest.raises(ConnectionFailed):
            await session.get_results(787)
    assert len(raw_server.writers) > 1
