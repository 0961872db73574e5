"""Proxies and certificates: the code and the messages of docs/production.md.

The server has a name that only the proxy knows, because no loopback host is asked through a proxy.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import pickle
import re
import ssl
import subprocess
import sys
import traceback
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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
    WatchWoken,
)
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

pytestmark = pytest.mark.filterwarnings("ignore:.*is plain http")

PAGE = (Path(__file__).parents[2] / "docs" / "production.md").read_text(encoding="utf-8")
REPORT = Scenario([SimNode("Report", "done", is_output_node=True)])
USER, PASSWORD = "jane", "p@ss/word"
CREDENTIALS = "Basic " + b64encode(f"{USER}:{PASSWORD}".encode()).decode()
HOST = "promptlayer.test"
ONCE = RetryPolicy(outage=0.0)
BRIEF = RetryPolicy(outage=0.01, base=0.01)
KEY = "key-of-a-test"


def blocks(language: str) -> list[str]:
    """Return the page's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


WITH_PROXY, PRIVATE = blocks("python")
TLS_FAILURES, PROXY_FAILURES = (block.splitlines() for block in blocks("text"))


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Write what is read until the end, and close."""
    with suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    writer.close()


def port_of(url: str) -> int:
    """Return the port in a URL or an address."""
    return int(url.rpartition(":")[2])


@dataclass(frozen=True)
class Scene:
    """A simulator that is known by its name only to a proxy, for which every host is this one.

    Attributes:
        sim: the simulator.
        url: its URL by that name.
        proxy: the proxy.
        open: makes a session, by default for `url`.
        recorder: the observer of those sessions.
        set: sets environment variables.
    """

    sim: Simulator
    url: str
    proxy: Any
    open: Callable[..., Session]
    recorder: Any
    set: Callable[..., None]


async def relay(request: Any) -> None:
    """Answer as the server behind this one, or as the one that the client wants a tunnel to."""
    if request.method != "CONNECT":
        await request.send(b"".join(await request.fetch()))
        return
    port = port_of(request.head.split()[1])
    up, down = await asyncio.open_connection("127.0.0.1", port)
    await request.send(b"HTTP/1.1 200 OK\r\n\r\n")
    await asyncio.gather(copy(request.reader, down), copy(up, request.writer))


@pytest.fixture
def scene(
    sim: Simulator,
    raw_server: Any,
    open_session: Callable[..., Session],
    recorder: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    """Return the scene of a test."""
    raw_server.upstream, raw_server.respond = port_of(sim.base_url), relay
    url = f"http://{HOST}:{raw_server.upstream}"

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    make = partial(open_session, base_url=url)
    return Scene(sim, url, raw_server, make, recorder, set_all)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return a private authority."""
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return files with the authority's certificate, and with one of its clients and the key."""
    folder = tmp_path_factory.mktemp("certificates")
    authority.cert_pem.write_to_path(folder / "authority.pem")
    client = authority.issue_cert("jane@example.org").private_key_and_cert_chain_pem
    client.write_to_path(folder / "client.pem")
    return folder / "authority.pem", folder / "client.pem"


def server_context(
    authority: trustme.CA, name: str = HOST, *, expired: bool = False
) -> ssl.SSLContext:
    """Return the context of a server with a certificate of the authority's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    until = dt.datetime(2020, 1, 1, tzinfo=dt.UTC) if expired else None
    authority.issue_cert(name, not_after=until).configure_cert(context)
    return context


@pytest.fixture
def secure(
    make_raw_server: Callable[..., Awaitable[Any]], sim: Simulator
) -> Callable[..., Awaitable[int]]:
    """Return a function that starts a TLS server in front of `sim`, and returns its port.

    Without a context it has no TLS.
    """

    async def start(context: ssl.SSLContext | None) -> int:
        server = await make_raw_server(context)
        server.upstream, server.respond = port_of(sim.base_url), relay
        if context is None:
            server.accept = lambda writer: writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        return port_of(server.url)

    return start


def page_session(scene: Scene, url: str, block: str, name: str, *arguments: Any) -> Any:
    """Return the session that a function of the page makes, with settings of the environment."""
    scene.set(PROMPTLAYER_API_KEY=scene.sim.api_key, PROMPTLAYER_BASE_URL=url)
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    return namespace[name](*arguments)


async def use(session: Session, sim: Simulator, *sent: str) -> None:
    """Start a run, and watch it until it has its output; `sent` is what is to come before."""
    sim.add_workflow("write-report", REPORT)
    execution = await session.start("write-report", {"topic": "otters"})
    assert await execution.output() == "done"
    assert [request.method for request in sim.requests] == [*sent, "POST", "GET"]


def quoted(password: str) -> str:
    """Return a password as a URL has it."""
    return quote(password, safe="")


# Which proxy is used


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy"])
async def test_starts_and_watches_go_through_the_proxy_of_the_environment(
    scene: Scene, name: str
) -> None:
    """The variable, of which the proxy gets the password, is read when the session opens."""
    session = scene.open()
    scene.set(**{name: scene.proxy.url.replace("//", f"//{USER}:{quoted(PASSWORD)}@")})
    async with session:
        scene.set(**{name: "http://127.0.0.1:1"})
        await use(session, scene.sim)
    targets = [f"POST {scene.url}/workflows/write", f"GET {scene.url}/workflow-version-exec"]
    for request, target in zip(scene.proxy.requests, targets, strict=True):
        assert request.head.startswith(target)
        assert f"Proxy-Authorization: {CREDENTIALS}\r\n" in request.head


@pytest.mark.parametrize(
    ("variables", "is_used"),
    [
        ({"NO_PROXY": HOST}, False),
        ({"NO_PROXY": f"a.example, {HOST}:PORT"}, False),
        ({"NO_PROXY": "test"}, False),
        ({"NO_PROXY": "*"}, False),
        ({"NO_PROXY": "127.0.0.0/8,other.example"}, True),
        ({"trust_env": False}, False),
        ({"HTTP_PROXY": "", "HTTPS_PROXY": "URL", "ALL_PROXY": "URL"}, False),
    ],
    ids=str,
)
async def test_whether_the_proxy_is_used(
    scene: Scene, variables: dict[str, Any], *, is_used: bool
) -> None:
    """Without it, the name of the server is not known."""
    port, proxy = str(port_of(scene.url)), scene.proxy.url
    scene.set(HTTP_PROXY=proxy)
    for name, value in variables.items():
        if name != "trust_env":
            scene.set(**{name: value.replace("PORT", port).replace("URL", proxy)})
    execution_id = scene.sim.add_execution(REPORT)
    trust_env = variables.get("trust_env", True)
    async with scene.open(retry=ONCE, trust_env=trust_env) as session:
        if is_used:
            assert (await session.execution(execution_id).wait()).complete
        else:
            with pytest.raises(ConnectionFailed):
                await session.get_results(execution_id)
    assert len(scene.proxy.requests) == is_used


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_loopback_host_is_not_asked_through_a_proxy(scene: Scene, host: str) -> None:
    """A proxy of the environment that is down does not matter."""
    scene.set(HTTP_PROXY=scene.proxy.url)
    await scene.proxy.refuse()
    async with scene.open(base_url=scene.sim.base_url.replace("127.0.0.1", host)) as session:
        await use(session, scene.sim)
    assert scene.recorder.of(RequestRetried) == []


async def test_netrc_is_not_read(scene: Scene, tmp_path: Path) -> None:
    """It may have passwords for the proxy's host and for the server."""
    entries = [f"machine {host} login {USER} password {PASSWORD}\n" for host in ("127.0.0.1", HOST)]
    (tmp_path / "netrc").write_text("".join(entries))
    scene.set(HTTP_PROXY=scene.proxy.url, NETRC=str(tmp_path / "netrc"))
    async with scene.open() as session:
        await use(session, scene.sim)
    assert not [it for it in scene.proxy.requests if "authorization" in it.head.lower()]


async def test_the_proxy_of_a_borrowed_session_is_used(scene: Scene) -> None:
    """The page's function makes such a session; the environment's proxy is another."""
    scene.set(HTTP_PROXY="http://127.0.0.1:1")
    proxy = scene.proxy.url
    async with page_session(scene, scene.url, WITH_PROXY, "session_with_proxy", proxy) as session:
        await use(session, scene.sim, "GET")
    assert [request.method for request in scene.proxy.requests] == ["GET", "POST", "GET"]


# https


async def test_https_is_tunnelled(
    scene: Scene,
    secure: Callable[..., Awaitable[int]],
    authority: trustme.CA,
    files: tuple[Path, Path],
) -> None:
    """All reads share one tunnel, and a start has its own; the server sees our certificate."""
    context = server_context(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    address = f"{HOST}:{await secure(context)}"
    scene.set(HTTPS_PROXY=scene.proxy.url)
    async with page_session(
        scene, f"https://{address}", PRIVATE, "private_session", *files
    ) as session:
        await use(session, scene.sim, "GET")
        await session.get_results(scene.sim.runs[0].execution_id)
    assert len(scene.sim.requests) == 4
    heads = [request.head for request in scene.proxy.requests]
    assert [head.partition(" HTTP/")[0] for head in heads] == [f"CONNECT {address}"] * 2
    assert not [head for head in heads if scene.sim.api_key in head]


async def test_push_is_tunnelled(
    scene: Scene, make_raw_server: Callable[..., Awaitable[Any]], authority: trustme.CA
) -> None:
    """The WebSocket has a tunnel of its own, and trusts the borrowed session's authority."""

    async def serve(request: Any) -> None:
        up, down = await asyncio.open_connection("127.0.0.1", port_of(scene.sim.base_url))
        down.write(request.head.encode("latin-1") + request.body)
        await asyncio.gather(copy(request.reader, down), copy(up, request.writer))

    server = await make_raw_server(server_context(authority))
    server.respond = serve
    address = f"{HOST}:{port_of(server.url)}"
    scene.set(HTTPS_PROXY=scene.proxy.url)
    scene.sim.add_workflow("w", Scenario([SimNode("a", "done", 0.2, is_output_node=True)]))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    connector = aiohttp.TCPConnector(ssl=context)
    async with (
        aiohttp.ClientSession(connector=connector, trust_env=True) as http,
        scene.open(http=http, base_url=f"https://{address}", push=True) as session,
        asyncio.timeout(10),
    ):
        while not scene.recorder.of(WatchWoken):
            assert await session.run("w") == "done"
    heads = [request.head.partition(" HTTP/")[0] for request in scene.proxy.requests]
    assert set(heads) == {f"CONNECT {address}"}
    assert "/connection/websocket" in [request.path for request in scene.sim.requests]


PLUGIN = """
from proxy.http.proxy import HttpProxyBasePlugin

class Loopback(HttpProxyBasePlugin):
    def resolve_dns(self, host, port):
        return "127.0.0.1", None
"""


@pytest.fixture
def real_proxy(tmp_path: Path) -> Iterator[str]:
    """Return the URL of a proxy.py, which demands a password."""
    (tmp_path / "loopback.py").write_text(PLUGIN)
    options = ["--hostname=127.0.0.1", "--port=0", "--num-acceptors=1", "--num-workers=1"]
    options += [f"--data-dir={tmp_path}", "--log-level=d", "--log-format=%(message)s"]
    options += [f"--basic-auth={USER}:{PASSWORD}", "--plugins=loopback.Loopback"]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "proxy", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        address = next(line for line in process.stdout if line.startswith("Listening on ")).split()
        yield f"http://{USER}:{quoted(PASSWORD)}@{address[-1]}"
        process.terminate()
        process.communicate(timeout=20)


async def test_commands_need_only_variables(
    sim: Simulator,
    secure: Callable[..., Awaitable[int]],
    authority: trustme.CA,
    files: tuple[Path, Path],
    real_proxy: str,
) -> None:
    """Those of the page: a proxy with a password, and `SSL_CERT_FILE`."""
    with_proxy, with_authority = blocks("sh")
    assert f"HTTPS_PROXY=http://{USER}:{quoted(PASSWORD)}@" in with_proxy
    assert "SSL_CERT_FILE=" in with_authority
    variables = {
        "HTTPS_PROXY": real_proxy,
        "SSL_CERT_FILE": str(files[0]),
        "PROMPTLAYER_API_KEY": sim.api_key,
        "PROMPTLAYER_BASE_URL": f"https://{HOST}:{await secure(server_context(authority))}",
    }
    execution_id = str(sim.add_execution(REPORT))
    command = ["-m", "promptlayer_exec", "results", execution_id, "--all"]
    finished = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", *command],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert finished.stderr == ""
    assert json.loads(finished.stdout)["nodes"]["Report"]["value"] == "done"


# When it fails


def as_on_the_page(error: RequestError, base_url: str, proxy: str = "") -> str:
    """Return an error's text with the names of the page."""
    text = str(error).replace(base_url, "https://api.example")
    text = re.sub(r" \(\d+ attempts\)", "", text).replace("'localhost'", "'api.example'")
    return text.replace(proxy, "proxy.example:3128") if proxy else text


async def failures(session: Session, kind: type[RequestError] = ConnectionFailed) -> list[Any]:
    """Return the error of a read and that of a start."""
    errors = []
    for call in (session.get_results(787), session.start("write-report")):
        with pytest.raises(kind) as caught:
            await call
        errors.append(caught.value)
    return errors


def shown_by(errors: list[Any], caplog: pytest.LogCaptureFixture) -> str:
    """Return all that errors and the log show, and what the errors keep."""
    texts = ["".join(traceback.format_exception(it)) + repr(it.__cause__) for it in errors]
    return "".join(texts) + caplog.text + repr([pickle.dumps(it) for it in errors])


@pytest.mark.parametrize(
    ("index", "name", "is_trusted"),
    [(0, "localhost", False), (1, "other.example", True), (2, "expired", True), (3, None, True)],
    ids=["unknown authority", "another host", "expired", "no TLS"],
)
async def test_tls_failures_are_raised_at_once_with_the_text_on_the_page(
    scene: Scene,
    secure: Callable[..., Awaitable[int]],
    authority: trustme.CA,
    *,
    index: int,
    name: str | None,
    is_trusted: bool,
) -> None:
    """The errors through a tunnel are the same."""
    context = None if name is None else server_context(authority, name)
    if name == "expired":
        context = server_context(authority, "localhost", expired=True)
    mine = ssl.create_default_context()
    if is_trusted:
        authority.configure_trust(mine)
    url = f"https://localhost:{await secure(context)}"
    for through in (None, scene.proxy.url):
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=mine), proxy=through) as http,
            scene.open(base_url=url, http=http) as session,
        ):
            error, start_error = await failures(session)
        assert TLS_FAILURES[index] in as_on_the_page(error, url)
        assert "no TLS connection" in str(start_error)
    assert scene.recorder.of(RequestRetried) == scene.sim.requests == []


async def test_the_certificate_of_an_https_proxy_is_not_said_to_be_the_server_s(
    scene: Scene, authority: trustme.CA
) -> None:
    """The server is never asked."""
    await scene.proxy.listen(server_context(authority, "localhost"))
    proxy = scene.proxy.url
    scene.set(HTTP_PROXY=proxy, HTTPS_PROXY=proxy)
    for scheme in ("http", "https"):
        async with scene.open(base_url=f"{scheme}://{HOST}") as session:
            for error in await failures(session):
                said = f"no TLS connection to the proxy {proxy[8:]}: the server's certificate"
                assert said in str(error)


async def test_a_proxy_that_is_down_is_a_connection_that_failed(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """It is retried, and no start was sent."""
    await scene.proxy.refuse()
    proxy, url = scene.proxy.url[7:], f"https://{HOST}"
    scene.set(HTTPS_PROXY=f"http://{USER}:secret@{proxy}")
    async with scene.open(base_url=url, retry=BRIEF) as session:
        errors = await failures(session)
    assert PROXY_FAILURES[0] in as_on_the_page(errors[0], url, proxy)
    assert sum(it.attempts for it in errors) == 2 + len(scene.recorder.of(RequestRetried)) > 2
    assert "secret" not in shown_by(errors, caplog)


@pytest.mark.parametrize("borrowed", [False, True])
@pytest.mark.parametrize(
    ("status", "is_permanent"),
    [
        ("407 Proxy Authentication Required", True),
        ("403 " + "No" * 4000, True),
        ("502 Bad Gateway", False),
        ("200 OK", False),
    ],
    ids=["407", "403 and thousands of letters", "502", "200 and the end of the tunnel"],
)
async def test_a_refused_tunnel_sends_neither_the_key_nor_a_start(
    scene: Scene,
    caplog: pytest.LogCaptureFixture,
    *,
    status: str,
    is_permanent: bool,
    borrowed: bool,
) -> None:
    """The error has the proxy's status, and no password that was in its URL."""

    async def refuse(request: Any) -> None:
        await request.answer(status, b"<h1>Refused</h1>")
        request.close()

    scene.proxy.respond = refuse
    url = f"https://{HOST}"
    proxy_url = scene.proxy.url.replace("//", f"//{USER}:secret@")
    scene.set(HTTPS_PROXY=proxy_url)
    async with aiohttp.ClientSession(proxy=proxy_url) as theirs:
        http = theirs if borrowed else None
        async with scene.open(base_url=url, api_key=KEY, http=http, retry=BRIEF) as session:
            errors = await failures(session)
    if status.startswith("407"):
        assert PROXY_FAILURES[1] in as_on_the_page(errors[0], url, scene.proxy.url[7:])
    for error in errors:
        assert (error.attempts == 1) == is_permanent
        assert status.startswith("200") or status[:8] in str(error)
        assert len(str(error)) < 500
    assert "secret" not in shown_by(errors, caplog)
    for request in scene.proxy.requests:
        assert request.method == "CONNECT"
        assert "Proxy-Authorization: Basic" in request.head
        assert KEY not in request.head


async def test_a_refused_request_over_http_is_an_error_status(scene: Scene) -> None:
    """It is raised at once; a start was refused, too, and not lost."""
    scene.proxy.respond = lambda request: request.answer("407 Proxy Authentication Required", b"")
    scene.set(HTTP_PROXY=scene.proxy.url)
    async with scene.open() as session:
        error, _ = await failures(session, StatusError)
    assert "407 Proxy Authentication Required" in str(error)
    assert [request.method for request in scene.proxy.requests] == ["GET", "POST"]
    assert scene.recorder.of(RequestRetried) == []


@pytest.mark.parametrize("proxy", ["@host:port", "@host\uff1a3128", "\u2603@host:1"], ids=ascii)
@pytest.mark.parametrize("borrowed", [False, True], ids=["own", "borrowed"])
async def test_a_proxy_s_url_that_is_not_valid_shows_no_password(
    scene: Scene, caplog: pytest.LogCaptureFixture, *, proxy: str, borrowed: bool
) -> None:
    """It is an error in the settings."""
    scene.set(HTTP_PROXY=f"http://{USER}:secret{proxy}")
    async with aiohttp.ClientSession(trust_env=True) as theirs:
        session = scene.open(http=theirs if borrowed else None)
        with pytest.raises(ConfigurationError) as caught:
            await session.get_results(787)
    assert ("http=" if borrowed else "HTTP_PROXY must be a URL like") in str(caught.value)
    assert "secret" not in shown_by([caught.value], caplog)
