"""Proxies and certificates: the code and the messages of docs/proxies.md, with a real proxy."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import pickle
import queue
import re
import socket
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import trustme

from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    RequestError,
    RequestRetried,
    RetryPolicy,
    Session,
    StatusError,
)
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

PAGE = (Path(__file__).parents[1] / "docs" / "proxies.md").read_text(encoding="utf-8")
REPORT = Scenario([SimNode("Report", "done", is_output_node=True)])
USER, PASSWORD = "jane", "p@ss/word"


def blocks(language: str) -> list[str]:
    """Return the page's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


PROGRAM, WITH_PROXY, PRIVATE = blocks("python")
TLS_FAILURES, PROXY_FAILURES, REFUSED = (block.splitlines() for block in blocks("text"))


def function(block: str, name: str) -> Any:
    """Run one of the page's blocks, and return a function that it defines."""
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    return namespace[name]


class Proxy:
    """A proxy.py in a process of its own.

    Args:
        folder: where it may keep files.
        options: further options of its command line.

    Attributes:
        address: its host and port.
        log: what it wrote.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        shape = ["--hostname=127.0.0.1", "--port=0", "--num-acceptors=1", "--num-workers=1"]
        log = ["--log-level=d", "--log-format=%(message)s", f"--data-dir={folder}"]
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "proxy", *shape, *log, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log: list[str] = []
        self._requests: queue.Queue[str] = queue.Queue()
        self._addresses: queue.Queue[str] = queue.Queue()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()
        try:
            self.address = self._addresses.get(timeout=20)
        except BaseException:
            self.stop()
            raise

    def _read(self) -> None:
        for line in self._process.stdout:  # type: ignore[union-attr]
            self.log.append(line)
            if line.startswith("Listening on "):
                self._addresses.put(line.split()[-1])
            elif found := re.match(r"[\d.:]+ - ([A-Z]+ \S+) - ", line):
                self._requests.put(found[1])

    def request(self) -> str:
        """Return the method and target of the first request of the next connection that closes."""
        return self._requests.get(timeout=20)

    def forget(self) -> None:
        """Forget the requests that no test has asked for, because it failed."""
        while not self._requests.empty():
            self._requests.get()

    @property
    def connections(self) -> int:
        """How many connections it has accepted, up to the last request that was returned."""
        return sum("accepted from" in line for line in self.log)

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait(20)
        self._reading.join(20)
        self._process.stdout.close()  # type: ignore[union-attr]


@contextmanager
def running_proxy(folder: Path, *options: str) -> Iterator[Proxy]:
    """Yield a running proxy."""
    proxy = Proxy(folder, *options)
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture(scope="module")
def open_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Return a proxy that lets everyone in."""
    with running_proxy(tmp_path_factory.mktemp("proxy")) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def closed_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Return a proxy that demands a user and a password."""
    folder = tmp_path_factory.mktemp("proxy")
    with running_proxy(folder, f"--basic-auth={USER}:{PASSWORD}") as proxy:
        yield proxy


@pytest.fixture
def proxy(open_proxy: Proxy) -> Proxy:
    """Return the open proxy, with no requests of earlier tests."""
    open_proxy.forget()
    return open_proxy


@pytest.fixture
def unused_port() -> Iterator[int]:
    """Return a port on which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return a private authority."""
    return trustme.CA()


@pytest.fixture(scope="module")
def authority_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the authority's certificate."""
    file = tmp_path_factory.mktemp("authority") / "authority.pem"
    authority.cert_pem.write_to_path(file)
    return file


@pytest.fixture(scope="module")
def client_certificate(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a certificate of the authority's for a client, and its key."""
    file = tmp_path_factory.mktemp("client") / "client.pem"
    authority.issue_cert("jane@example.org").private_key_and_cert_chain_pem.write_to_path(file)
    return file


def server_context(
    authority: trustme.CA, *, name: str = "localhost", expired: bool = False
) -> ssl.SSLContext:
    """Return the context of a server with a certificate of the authority's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    until = dt.datetime(2020, 1, 1, tzinfo=dt.UTC) if expired else None
    authority.issue_cert(name, not_after=until).configure_cert(context)
    return context


Listen = Callable[..., Awaitable[int]]


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Write what is read until the end, and close."""
    with suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
def tls_before_sim(listen: Listen, sim: Simulator) -> Callable[..., Awaitable[str]]:
    """Return a function that starts a TLS server before `sim`, and returns its https URL.

    Without a context it has no TLS.
    """
    port = int(sim.base_url.rpartition(":")[2])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, down = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.gather(copy(reader, down), copy(up, writer))
        finally:
            down.close()

    async def start(context: ssl.SSLContext | None) -> str:
        return f"https://localhost:{await listen(serve, context)}"

    return start


@pytest.fixture
async def https(tls_before_sim: Callable[..., Awaitable[str]], authority: trustme.CA) -> str:
    """Return the URL of a server with a certificate of the authority's, in front of `sim`."""
    return await tls_before_sim(server_context(authority))


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets environment variables."""

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def via(sim: Simulator) -> list[bool]:
    """Return, for each request that the simulator got, whether it came through the proxy.

    The proxy says so in the first request of each connection.
    """
    return ["via" in {name.lower() for name in request.headers} for request in sim.requests]


@pytest.fixture
def page_session(sim: Simulator, settings: Callable[..., None]) -> Callable[..., Any]:
    """Return a function that makes the session of one of the page's functions.

    It reads the key and the URL from the environment, as in a program.
    """

    def make(block: str, name: str, base_url: str, *arguments: Any) -> Any:
        settings(PROMPTLAYER_API_KEY=sim.api_key, PROMPTLAYER_BASE_URL=base_url)
        return function(block, name)(*arguments)

    return make


async def use(session: Session, sim: Simulator) -> None:
    """Start a run, and watch it until it has its output."""
    sim.add_workflow("write-report", REPORT)
    execution = await session.start("write-report", {"topic": "otters"})
    assert await execution.output() == "done"
    assert [request.method for request in sim.requests] == ["POST", "GET"]


# Plain http


async def test_an_error_names_a_proxy_that_is_not_used(
    settings: Callable[..., None], unused_port: int
) -> None:
    """Unless it does not apply to the server, or the session uses it or is a borrowed one."""

    async def error(**options: Any) -> str:
        retry = RetryPolicy(outage=0)
        base_url = f"http://127.0.0.1:{unused_port}"
        async with Session("key", base_url=base_url, retry=retry, **options) as session:
            with pytest.raises(ConnectionFailed) as caught:
                await session.get_results(787)
        return str(caught.value)

    assert "PROXY" not in await error()
    settings(HTTP_PROXY=f"http://127.0.0.1:{unused_port}")
    hint = (
        "HTTP_PROXY is set but not used: pass trust_env=True, or set PROMPTLAYER_EXEC_TRUST_ENV=1"
    )
    assert f"Connection refused; {hint}. Check the network" in await error()
    assert "HTTP_PROXY" not in await error(trust_env=True)
    async with aiohttp.ClientSession() as http:
        assert "HTTP_PROXY" not in await error(http=http)
    settings(NO_PROXY="127.0.0.1")
    assert "HTTP_PROXY" not in await error()


async def test_starts_and_watches_go_through_the_proxy_of_the_environment(
    sim: Simulator,
    open_session: Callable[..., Session],
    proxy: Proxy,
    settings: Callable[..., None],
) -> None:
    """The proxy is used for loopback addresses, too."""
    settings(HTTP_PROXY=f"http://{proxy.address}")
    async with open_session(trust_env=True) as session:
        await use(session, sim)
    assert via(sim) == [True, True]
    assert {proxy.request().split()[0], proxy.request().split()[0]} == {"POST", "GET"}


async def test_the_variable_switches_it_on_for_every_session(
    sim: Simulator,
    open_session: Callable[..., Session],
    proxy: Proxy,
    settings: Callable[..., None],
) -> None:
    """The names of the proxy's variables may be in lower case."""
    settings(http_proxy=f"http://{proxy.address}", PROMPTLAYER_EXEC_TRUST_ENV="1")
    async with open_session() as session:
        await session.execution(sim.add_execution(REPORT)).wait()
    assert via(sim) == [True]
    assert proxy.request().startswith("GET ")


@pytest.mark.parametrize(
    "no_proxy", ["127.0.0.1", "a.example, 127.0.0.1", "*", "0.0.1", "127.0.0.0/8", "127.0.0.1:80"]
)
async def test_hosts_in_no_proxy_are_connected_to_directly(
    sim: Simulator,
    open_session: Callable[..., Session],
    proxy: Proxy,
    settings: Callable[..., None],
    no_proxy: str,
) -> None:
    """Names, endings of names and `*` count; address ranges and ports do not."""
    settings(HTTP_PROXY=f"http://{proxy.address}", NO_PROXY=no_proxy)
    async with open_session(trust_env=True) as session:
        await session.execution(sim.add_execution(REPORT)).wait()
    is_proxied = "/" in no_proxy or ":" in no_proxy
    assert via(sim) == [is_proxied]
    if is_proxied:
        proxy.request()


async def test_without_trust_env_no_proxy_is_used(
    sim: Simulator,
    open_session: Callable[..., Session],
    unused_port: int,
    settings: Callable[..., None],
) -> None:
    """The request would fail there."""
    settings(HTTP_PROXY=f"http://127.0.0.1:{unused_port}")
    async with open_session() as session:
        await use(session, sim)
    assert via(sim) == [False, False]


async def test_all_proxy_is_not_read(
    sim: Simulator,
    open_session: Callable[..., Session],
    unused_port: int,
    settings: Callable[..., None],
) -> None:
    """It is ignored in upper and in lower case."""
    url = f"http://127.0.0.1:{unused_port}"
    settings(ALL_PROXY=url, all_proxy=url)
    async with open_session(trust_env=True) as session:
        await session.execution(sim.add_execution(REPORT)).wait()
    assert via(sim) == [False]


async def test_an_https_proxy_is_not_used(
    sim: Simulator,
    open_session: Callable[..., Session],
    unused_port: int,
    settings: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """There is a warning, and the connection is direct."""
    settings(HTTP_PROXY=f"https://127.0.0.1:{unused_port}")
    async with open_session(trust_env=True) as session:
        await session.execution(sim.add_execution(REPORT)).wait()
    assert via(sim) == [False]
    assert "are not supported, ignoring" in caplog.text


async def test_a_borrowed_session_has_its_own_trust_env(
    sim: Simulator,
    open_session: Callable[..., Session],
    proxy: Proxy,
    settings: Callable[..., None],
) -> None:
    """The session's own setting does not change it, in either direction."""
    settings(HTTP_PROXY=f"http://{proxy.address}")
    execution_id = sim.add_execution(REPORT)
    for trust_env in (False, True):
        async with (
            aiohttp.ClientSession(trust_env=trust_env) as http,
            open_session(http=http, trust_env=not trust_env) as session,
        ):
            await session.execution(execution_id).wait()
    assert via(sim) == [False, True]
    proxy.request()


# A proxy for one session


async def test_the_proxy_of_a_borrowed_session_is_used(
    sim: Simulator, proxy: Proxy, page_session: Callable[..., Any]
) -> None:
    """The page's function makes such a session."""
    url = f"http://{proxy.address}"
    async with page_session(WITH_PROXY, "session_with_proxy", sim.base_url, url) as session:
        await use(session, sim)
    assert via(sim) == [True, True]
    assert {proxy.request().split()[0], proxy.request().split()[0]} == {"POST", "GET"}


# https


async def test_https_is_tunnelled(
    sim: Simulator,
    https: str,
    authority_file: Path,
    client_certificate: Path,
    *,
    proxy: Proxy,
    page_session: Callable[..., Any],
    settings: Callable[..., None],
) -> None:
    """All reads share one tunnel, and a start has one of its own."""
    settings(HTTPS_PROXY=f"http://{proxy.address}")
    before = proxy.connections
    arguments = (https, authority_file, client_certificate)
    async with page_session(PRIVATE, "private_session", *arguments) as session:
        await use(session, sim)
        await session.get_results(sim.runs[0].execution_id)
    assert len(sim.requests) == 3
    tunnel = f"CONNECT {https.removeprefix('https://')}"
    assert [proxy.request(), proxy.request()] == [tunnel, tunnel]
    assert proxy.connections == before + 2


async def test_a_client_certificate_is_shown_to_a_server_that_demands_one(
    tls_before_sim: Callable[..., Awaitable[str]],
    sim: Simulator,
    authority: trustme.CA,
    authority_file: Path,
    client_certificate: Path,
    *,
    page_session: Callable[..., Any],
) -> None:
    """The page's function loads it."""
    context = server_context(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    url = await tls_before_sim(context)
    arguments = (url, authority_file, client_certificate)
    async with page_session(PRIVATE, "private_session", *arguments) as session:
        await use(session, sim)


async def run(*command: str, **variables: str) -> tuple[str, str]:
    """Run Python with environment variables; return what it wrote."""
    finished = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", *command],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return finished.stdout, finished.stderr


async def test_the_program_of_the_page_needs_only_variables(
    sim: Simulator, https: str, authority_file: Path, closed_proxy: Proxy
) -> None:
    """The variable has a password, and `SSL_CERT_FILE` is set."""
    _, with_password, with_authority = blocks("sh")
    assert quoted(PASSWORD) in with_password
    assert "SSL_CERT_FILE=" in with_authority
    printed = await run(
        "-c",
        PROGRAM,
        str(sim.add_execution(REPORT)),
        HTTPS_PROXY=f"http://{USER}:{quoted(PASSWORD)}@{closed_proxy.address}",
        SSL_CERT_FILE=str(authority_file),
        PROMPTLAYER_API_KEY=sim.api_key,
        PROMPTLAYER_BASE_URL=https,
    )
    assert printed == ("done\n", "")
    assert closed_proxy.request() == f"CONNECT {https.removeprefix('https://')}"


async def test_the_command_line_uses_the_proxy(sim: Simulator, proxy: Proxy) -> None:
    """The variables are those of the page's first block of commands."""
    (block, *_) = blocks("sh")
    for setting in ("HTTPS_PROXY=http://", "NO_PROXY=", "PROMPTLAYER_EXEC_TRUST_ENV=1"):
        assert setting in block
    printed, errors = await run(
        "-m",
        "promptlayer_exec",
        "results",
        str(sim.add_execution(REPORT)),
        "--all",
        HTTP_PROXY=f"http://{proxy.address}",
        PROMPTLAYER_EXEC_TRUST_ENV="1",
        PROMPTLAYER_API_KEY=sim.api_key,
        PROMPTLAYER_BASE_URL=sim.base_url,
    )
    assert (json.loads(printed)["nodes"]["Report"]["value"], errors) == ("done", "")
    assert via(sim) == [True]
    proxy.request()


# A proxy that wants a password


def quoted(password: str) -> str:
    """Return a password as a URL has it."""
    return quote(password, safe="")


@pytest.mark.parametrize("in_netrc", [False, True], ids=["in the URL", "in .netrc"])
async def test_the_proxy_gets_the_password(
    sim: Simulator,
    open_session: Callable[..., Session],
    closed_proxy: Proxy,
    settings: Callable[..., None],
    tmp_path: Path,
    *,
    in_netrc: bool,
) -> None:
    """The password is in its URL, or in the .netrc entry for its host."""
    user = "" if in_netrc else f"{USER}:{quoted(PASSWORD)}@"
    settings(HTTP_PROXY=f"http://{user}{closed_proxy.address}")
    if in_netrc:
        entry = f"machine 127.0.0.1 login {USER} password {PASSWORD}\n"
        (tmp_path / "netrc").write_text(entry)
        settings(NETRC=str(tmp_path / "netrc"))
    async with open_session(trust_env=True) as session:
        await use(session, sim)
    assert via(sim) == [True, True]
    # The proxy's host is also the server's here, whose entry is sent to the server.
    assert {"Authorization" in request.headers for request in sim.requests} == {in_netrc}
    closed_proxy.request()
    closed_proxy.request()


# When it fails


def as_on_the_page(error: RequestError, base_url: str, proxy: str = "") -> str:
    """Return an error's text with the names of the page."""
    text = (
        str(error).replace(base_url, "https://api.example").replace("'localhost'", "'api.example'")
    )
    return text.replace(proxy, "proxy.example:3128") if proxy else text


async def failure(session: Session, kind: type[RequestError] = ConnectionFailed) -> RequestError:
    """Request results, and return the error."""
    with pytest.raises(kind) as caught:
        await session.get_results(787)
    return caught.value


def retries(recorder: Any) -> int:
    """Return how many requests were sent again."""
    return len(recorder.of(RequestRetried))


@pytest.mark.parametrize(
    ("index", "server", "trusted"),
    [
        (0, {}, False),
        (1, {"name": "other.example"}, True),
        (2, {"expired": True}, True),
        (3, None, True),
    ],
    ids=["unknown authority", "another host", "expired", "no TLS"],
)
async def test_tls_failures_are_raised_at_once_with_the_text_on_the_page(
    tls_before_sim: Callable[..., Awaitable[str]],
    open_session: Callable[..., Session],
    recorder: Any,
    authority: trustme.CA,
    proxy: Proxy,
    *,
    sim: Simulator,
    index: int,
    server: dict[str, Any] | None,
    trusted: bool,
) -> None:
    """The errors through a tunnel are the same."""
    context = None if server is None else server_context(authority, **server)
    mine = ssl.create_default_context()
    if trusted:
        authority.configure_trust(mine)
    url = await tls_before_sim(context)
    for through in (None, f"http://{proxy.address}"):
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=mine), proxy=through) as http,
            open_session(base_url=url, http=http) as session,
        ):
            assert as_on_the_page(await failure(session), url) == TLS_FAILURES[index]
            with pytest.raises(ConnectionFailed, match="no TLS connection"):
                await session.start("write-report")
    assert retries(recorder) == 0
    assert sim.requests == []
    proxy.request()
    proxy.request()


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_certificate_of_an_https_proxy_is_not_said_to_be_the_server_s(
    listen: Listen, open_session: Callable[..., Session], authority: trustme.CA, scheme: str
) -> None:
    """The server is never asked."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    proxy = f"127.0.0.1:{await listen(hang_up, server_context(authority))}"
    async with (
        aiohttp.ClientSession(proxy=f"https://{proxy}") as http,
        open_session(base_url=f"{scheme}://localhost:1", http=http) as session,
    ):
        error = await failure(session)
        with pytest.raises(ConnectionFailed) as caught:
            await session.start("write-report")
    for shown in (error, caught.value):
        assert f"no TLS connection to the proxy {proxy}: the server's certificate" in str(shown)


async def test_what_a_proxy_says_is_cut(
    listen: Listen, open_session: Callable[..., Session]
) -> None:
    """The reason phrase of its refusal may have kilobytes."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 403 %b\r\nContent-Length: 0\r\n\r\n" % (b"No" * 4000))
        await writer.drain()

    proxy = f"http://127.0.0.1:{await listen(refuse)}"
    async with (
        aiohttp.ClientSession(proxy=proxy) as http,
        open_session(base_url="https://localhost:1", http=http) as session,
    ):
        error = await failure(session)
    assert "the proxy refused the connection: 403 NoNo" in str(error)
    assert len(str(error)) < 500


async def test_a_proxy_that_is_down_is_a_connection_that_failed(
    open_session: Callable[..., Session],
    recorder: Any,
    unused_port: int,
    settings: Callable[..., None],
) -> None:
    """It is retried, and no start was sent."""
    proxy, url = f"127.0.0.1:{unused_port}", "https://localhost:1"
    settings(HTTPS_PROXY=f"http://{USER}:{PASSWORD[:1]}secret@{proxy}")
    at_once = RetryPolicy(outage=0.0)
    async with open_session(base_url=url, trust_env=True, retry=at_once) as session:
        assert as_on_the_page(await failure(session), url, proxy) == PROXY_FAILURES[0]
        with pytest.raises(ConnectionFailed, match="Connection refused") as caught:
            await session.start("write-report")
    assert "secret" not in str(caught.value)
    twice = RetryPolicy(outage=0.01, base=0.01)
    async with open_session(base_url=url, trust_env=True, retry=twice) as session:
        assert (await failure(session)).attempts == 1 + retries(recorder) > 1


@pytest.fixture
async def refusing_proxy(listen: Listen) -> tuple[str, list[str]]:
    """Return the address of a proxy that answers 407, and the heads of the requests to it."""
    heads: list[str] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(
            b"HTTP/1.1 407 Proxy Authentication Required\r\n"
            b'Proxy-Authenticate: Basic realm="proxy"\r\nContent-Type: text/html\r\n'
            b"Content-Length: 17\r\nConnection: close\r\n\r\n<h1>Refused</h1>\n"
        )
        await writer.drain()

    return f"127.0.0.1:{await listen(refuse)}", heads


@pytest.mark.parametrize("borrowed", [False, True])
async def test_a_refused_tunnel_sends_neither_the_key_nor_a_start(
    refusing_proxy: tuple[str, list[str]],
    open_session: Callable[..., Session],
    settings: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    *,
    borrowed: bool,
) -> None:
    """The error has the proxy's status, and no password that was in its URL."""
    url = "https://localhost:1"
    proxy, heads = refusing_proxy
    async with AsyncExitStack() as stack:
        proxy_url = f"http://{USER}:secret@{proxy}"
        overrides: dict[str, Any] = {"trust_env": True}
        if borrowed:
            http = await stack.enter_async_context(aiohttp.ClientSession(proxy=proxy_url))
            overrides = {"http": http}
        else:
            settings(HTTPS_PROXY=proxy_url)
        at_once = RetryPolicy(outage=0.001)
        async with open_session(
            api_key="key-of-a-test", base_url=url, retry=at_once, **overrides
        ) as session:
            error = await failure(session)
            text = re.sub(r" \(\d attempts\)", "", as_on_the_page(error, url, proxy))
            assert text == PROXY_FAILURES[1]
            with pytest.raises(ConnectionFailed, match="407") as caught:
                await session.start("write-report")
    for shown in (error, caught.value):
        assert "secret" not in "".join(traceback.format_exception(shown)) + caplog.text
        assert shown.attempts == 1
    assert {head.split()[0] for head in heads} == {"CONNECT"}
    assert not any("key-of-a-test" in head for head in heads)
    assert all("Proxy-Authorization: Basic" in head for head in heads)


async def test_the_cause_of_a_broken_tunnel_shows_no_password(
    listen: Listen, open_session: Callable[..., Session], settings: Callable[..., None]
) -> None:
    """The repr of aiohttp's error has all that is known of the proxy."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    settings(HTTPS_PROXY=f"http://{USER}:secret@127.0.0.1:{await listen(hang_up)}")
    once = RetryPolicy(outage=0.001)
    async with open_session(base_url="https://localhost:1", trust_env=True, retry=once) as session:
        error = await failure(session)
    assert error.__cause__ is not None
    assert "secret" not in "".join(traceback.format_exception(error)) + repr(error.__cause__)


async def test_a_text_of_aiohttp_s_with_the_proxy_s_url_shows_no_password(
    open_session: Callable[..., Session], caplog: pytest.LogCaptureFixture
) -> None:
    """As that of TLS within TLS, if the inner handshake ends early on Python 3.11."""

    async def fail(_request: aiohttp.ClientRequest, _handler: Any) -> aiohttp.ClientResponse:
        proxy = f"https://{USER}:secret@proxy.example:3128 ssl:True"
        raise aiohttp.ClientConnectionError(f"no TLS through an underlying connection to {proxy}")

    once = RetryPolicy(outage=0.001)
    async with aiohttp.ClientSession(middlewares=[fail]) as http:
        session = open_session(base_url="https://localhost:1", http=http, retry=once)
        async with session:
            error = await failure(session)
    shown = "".join(traceback.format_exception(error)) + repr(error.__cause__) + caplog.text
    assert "https://proxy.example:3128" in shown
    assert "secret" not in shown
    assert b"secret" not in pickle.dumps(error)


@pytest.mark.parametrize(
    "url",
    [
        *(f"{USER}:secret@127.0.0.1:9", "127.0.0.1:9", f"http://{USER}:secret@proxy\uff1a3128"),
        *(f"http://{USER}:secret@:99999", f"http://{USER}:secret@127.0.0.1:port"),
        *(f"http://{USER}:secret/2@127.0.0.1:9", f"http://{USER}:secret\uff0f2@127.0.0.1:9"),
    ],
)
@pytest.mark.parametrize("is_borrowed", [False, True], ids=["own", "borrowed"])
async def test_a_proxy_s_url_that_is_not_valid_is_refused_at_once(
    open_session: Callable[..., Session],
    settings: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    url: str,
    is_borrowed: bool,
) -> None:
    """The error shows no password. Other programs accept one without a scheme."""
    settings(HTTP_PROXY=url)
    async with (
        aiohttp.ClientSession(trust_env=True) as http,
        open_session(
            base_url="http://localhost:1",
            http=http if is_borrowed else None,
            trust_env=not is_borrowed,
        ) as session,
    ):
        error = await failure(session)
        with pytest.raises(ConnectionFailed) as raised:
            await session.start("write-report")
    for shown in (error, raised.value):
        assert "the URL of the proxy is not valid: it must be like http://user" in str(shown)
        assert shown.attempts == 1
        assert "secret" not in "".join(traceback.format_exception(shown)) + repr(shown.__cause__)
    assert "secret" not in caplog.text


async def test_the_proxy_s_password_that_cannot_be_sent_is_not_shown(
    open_session: Callable[..., Session], settings: Callable[..., None]
) -> None:
    """It has a character beyond latin-1; the repr of Python's error has all of it."""
    settings(HTTP_PROXY=f"http://{USER}:secret\u2603@127.0.0.1:9", NO_PROXY="//[")
    async with (
        aiohttp.ClientSession(trust_env=True) as http,
        open_session(base_url="http://localhost:1", http=http) as session,
    ):
        with pytest.raises(ConfigurationError, match="failed in http=: 'latin-1' codec") as caught:
            await session.get_results(1)
    error = caught.value
    assert "secret" not in f"{error!r} {error.__cause__!r} {error.__context__!r}"


async def test_a_refused_request_over_http_is_an_error_status(
    refusing_proxy: tuple[str, list[str]],
    open_session: Callable[..., Session],
    recorder: Any,
    settings: Callable[..., None],
) -> None:
    """It is raised at once; a start was refused, too, and not lost."""
    proxy, heads = refusing_proxy
    settings(HTTP_PROXY=f"http://{proxy}")
    async with open_session(base_url="http://localhost:1", trust_env=True) as session:
        assert str(await failure(session, StatusError)) == REFUSED[0]
        with pytest.raises(StatusError, match="407"):
            await session.start("write-report")
    assert [head.split()[0] for head in heads] == ["GET", "POST"]
    assert retries(recorder) == 0
