"""TLS, client certificates and private authorities: real handshakes on loopback."""

from __future__ import annotations

import asyncio
import datetime as dt
import gzip
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest
import trustme
from aiohttp.abc import AbstractResolver, ResolveResult

from promptlayer_exec import ConnectionFailed, RequestRetried, RetryPolicy, Session, Snapshot

BODY = b'{"Node 1": {"status": "SUCCESS", "value": 42, "is_output_node": true}}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return a private authority that is not trusted by default."""
    return trustme.CA()


@pytest.fixture
def serve(listen: Callable[..., Awaitable[int]]) -> Callable[..., Awaitable[str]]:
    """Return a function that starts a server with an SSL context, and returns its base URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A server without TLS does not understand the first bytes, and says so.
        first = await reader.readexactly(3)
        if first == b"GET":
            await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        await writer.drain()
        await reader.read()

    async def start(context: ssl.SSLContext | None) -> str:
        return f"https://127.0.0.1:{await listen(answer, context)}"

    return start


def server_context(authority: trustme.CA, *names: str, expired: bool = False) -> ssl.SSLContext:
    """Return a server's context, with a certificate of the authority's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    until = dt.datetime(2020, 1, 1, tzinfo=dt.UTC) if expired else None
    authority.issue_cert(*(names or ("127.0.0.1",)), not_after=until).configure_cert(context)
    return context


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    """Return a client's context that trusts the authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def refused(base_url: str, context: ssl.SSLContext | None = None) -> ConnectionFailed:
    """Request results, and return the error, which must come without a retry."""
    events: list[object] = []
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=True if context is None else context)
    ) as http:
        session = Session("key", base_url=base_url, http=http, observers=[events.append])
        async with session:
            with pytest.raises(ConnectionFailed) as caught:
                await session.get_results(787)
            start_events = len(events)
            with pytest.raises(ConnectionFailed):
                await session.start("name")
    assert start_events == 0
    assert not any(isinstance(event, RequestRetried) for event in events)
    assert caught.value.attempts == 1
    assert "Operation not permitted" not in str(caught.value)
    return caught.value


async def test_an_unknown_authority_is_named_and_not_retried(
    serve: Callable[..., str], authority: trustme.CA
) -> None:
    """The error says what is wrong with the certificate, and what to set."""
    error = await refused(await serve(server_context(authority)))
    assert "execution 787: no TLS connection to https://127.0.0.1" in str(error)
    assert "certificate is not valid: unable to get local issuer certificate" in str(error)
    assert "SSL_CERT_FILE" in str(error)


async def test_a_certificate_for_another_host_is_named(
    serve: Callable[..., str], authority: trustme.CA
) -> None:
    """The error names the host that was asked."""
    base_url = await serve(server_context(authority, "example.org"))
    error = await refused(base_url, client_context(authority))
    assert "certificate is not valid for '127.0.0.1'" in str(error)


async def test_an_expired_certificate_is_named(
    serve: Callable[..., str], authority: trustme.CA
) -> None:
    """It does not become valid by waiting."""
    base_url = await serve(server_context(authority, expired=True))
    error = await refused(base_url, client_context(authority))
    assert "certificate has expired" in str(error)


async def test_a_server_without_tls_is_named(serve: Callable[..., str]) -> None:
    """The URL has https:// in place of http://, or the wrong port."""
    error = await refused(await serve(None))
    assert "does not speak TLS on this port" in str(error)
    assert "check base_url" in str(error)


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
    assert "handshake failed (TLSV1_ALERT_PROTOCOL_VERSION)" in str(error)


async def test_a_demanded_client_certificate_is_named_under_tls_1_3(authority: trustme.CA) -> None:
    """The server refuses after our side of the handshake; the start was not read, so not lost."""
    context = server_context(authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED

    def refuse(connection: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        secured = context.wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(connection.recv(65536))
        with suppress(ssl.SSLWantReadError):
            secured.do_handshake()
        connection.sendall(outgoing.read())
        # Wait for the request, too: it is sent without waiting for our last message.
        while incoming.pending < 300:
            incoming.write(connection.recv(65536))
        with pytest.raises(ssl.SSLError):
            secured.do_handshake()
        connection.sendall(outgoing.read())
        connection.recv(65536)

    def serve() -> None:
        for _ in range(2):
            with listener.accept()[0] as connection:
                connection.settimeout(10)
                refuse(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        serving = asyncio.create_task(asyncio.to_thread(serve))
        base_url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        error = await refused(base_url, client_context(authority))
        await serving
    assert "CERTIFICATE_REQUIRED" in str(error)
    assert "client certificate" in str(error)


async def test_a_borrowed_session_brings_its_own_authority_and_certificate(
    serve: Callable[..., str], authority: trustme.CA
) -> None:
    """A server that demands a client certificate is followed through `http=`."""
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
    assert isinstance(snapshot, Snapshot)
    assert snapshot.nodes["Node 1"].value == 42


GOODBYE = """
import asyncio, gc, os, socket, ssl, sys, threading, time
from promptlayer_exec import InvalidResponse, RequestTimeout, RetryPolicy, Session, StartUnknown

theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
theirs.load_cert_chain("server.pem")
answer = sys.argv[1].encode().decode("unicode_escape").encode("latin-1")
kept = []

def serve():
    connection = theirs.wrap_socket(listener.accept()[0], server_side=True)
    kept.append(connection)  # and no longer read: nothing answers its `close_notify`
    connection.recv(65536)
    for part in answer.split(b"|"):
        connection.sendall(part)
        time.sleep(0.1)  # so that the next part comes apart

async def main():
    # Long enough for a busy machine, and short where it passes.
    settings = {"request_timeout": float(sys.argv[4]), "retry": RetryPolicy(outage=0.0)}
    async with Session("key", base_url=base_url, **settings) as session:
        try:
            if sys.argv[2] == "start":
                await session.start("name", {"text": "x" * int(sys.argv[3])})
            else:
                before = len(os.listdir("/dev/fd"))
                await session.get_results(1)
                for _ in range(10):
                    await asyncio.sleep(0)
                print(len(os.listdir("/dev/fd")) - before, "more")  # the server's
        except (InvalidResponse, RequestTimeout, StartUnknown) as error:
            print(type(error).__name__)

listener = socket.create_server(("127.0.0.1", 0))
base_url = "https://127.0.0.1:%d" % listener.getsockname()[1]
threading.Thread(target=serve, daemon=True).start()
asyncio.run(main())
gc.collect()
for opened in (*kept, listener):
    opened.close()
"""


CHUNKS = r"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n7\r\n"


def compressed_chunks() -> str:
    """Return an escaped answer that aiohttp does not parse to its end before the body is read."""
    body = gzip.compress(b" " * 3_000_000)
    head = b"200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
    halves = (body[: len(body) // 2], body[len(body) // 2 :])
    answer = head + b"".join(b"%x\r\n%b\r\n" % (len(half), half) for half in halves)
    return "".join(f"\\x{byte:02x}" for byte in answer)


class Loopback(AbstractResolver):
    """Resolves every name to the loopback address."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the loopback address."""
        address = ResolveResult(
            hostname=host, host="127.0.0.1", port=port, family=family, proto=0, flags=0
        )
        return [address]

    async def close(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("host", ["faß.example", "xn--fa-hia.example"])
async def test_a_start_in_a_borrowed_session_checks_the_same_name_as_a_read(
    authority: trustme.CA, listen: Callable[..., Awaitable[int]], host: str
) -> None:
    """Also of a host whose name differs between IDNA 2003 and 2008."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            is_start = line.startswith(b"POST")
            body = b'{"workflow_version_execution_id": 7}' if is_start else BODY
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()

    port = await listen(serve, server_context(authority, "xn--fa-hia.example"))
    connector = aiohttp.TCPConnector(ssl=client_context(authority), resolver=Loopback())
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        Session("key", base_url=f"https://{host}:{port}", http=http) as session,
    ):
        assert (await session.get_results(7, return_all_outputs=True)).complete
        assert (await session.start("name")).id == 7


@pytest.mark.parametrize(
    ("answer", "call", "size", "printed"),
    [
        (
            r'201 OK\r\nContent-Length: 38\r\n\r\n{"workflow_version_execution_id": 787}',
            "start",
            1,
            "",
        ),
        (r"200 OK\r\nContent-Length: 100\r\n\r\n{", "read", 0, "RequestTimeout\n"),
        (r"200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\n7", "read", 0, "1 more\n"),
        (CHUNKS + r"|zz\r\n", "read", 0, "InvalidResponse\n"),
        (compressed_chunks() + r"zz\r\n", "read", 0, "InvalidResponse\n"),
        ("", "start", 20_000_000, "StartUnknown\n"),
    ],
    ids=[
        *("an answered start", "a read that stalls", "a last answer", "a malformed chunk"),
        *("a malformed chunk that is parsed late", "a start that is not read"),
    ],
)
def test_a_peer_that_does_not_close_its_side_keeps_no_socket(  # noqa: PLR0917
    answer: str, call: str, size: int, printed: str, authority: trustme.CA, tmp_path: Path
) -> None:
    """TLS would wait 30 s for its `close_notify`, and a large body for the peer to read it."""
    answer = f"HTTP/1.1 {answer}" if answer else ""
    # Shorter than the 30 s, after which TLS gives up.
    timeout = "1" if printed in {"RequestTimeout\n", "StartUnknown\n"} else "20"
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    certificate = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
    certificate.write_to_path(tmp_path / "server.pem")
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", GOODBYE, answer, call, str(size), timeout],
        cwd=tmp_path,
        env=os.environ | {"SSL_CERT_FILE": "authority.pem"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (finished.stdout, finished.stderr) == (printed, "")


async def test_ssl_cert_file_is_used(
    serve: Callable[..., str], authority: trustme.CA, tmp_path: Path
) -> None:
    """As the error says, a private authority needs only the variable."""
    certificate = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(certificate)
    program = (
        "import asyncio, sys\n"
        "from promptlayer_exec import Session\n"
        "async def main():\n"
        "    async with Session('key', base_url=sys.argv[1]) as session:\n"
        "        print(await session.execution(787).output())\n"
        "asyncio.run(main())\n"
    )
    base_url = await serve(server_context(authority))
    finished = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program, base_url],
        env=os.environ | {"SSL_CERT_FILE": str(certificate)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (finished.stdout, finished.stderr) == ("42\n", "")


async def test_a_connection_closed_in_the_handshake_is_retried(
    listen: Callable[..., Awaitable[int]],
) -> None:
    """It can pass by waiting, so it is not a TLS failure."""
    tries = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        await reader.read(1)

    base_url = f"https://127.0.0.1:{await listen(hang_up)}"
    retry = RetryPolicy(outage=0.05, base=0.01)
    async with Session("key", base_url=base_url, retry=retry) as session:
        with pytest.raises(ConnectionFailed):
            await session.get_results(787)
    assert tries > 1
