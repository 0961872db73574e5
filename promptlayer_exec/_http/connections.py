"""Connection pools, our own or borrowed: nothing is sent twice, and no answers are mixed up."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self, cast
from weakref import WeakSet

import aiohttp
import anyio
import attrs
from aiohttp.abc import AbstractStreamWriter

from promptlayer_exec._api.executions import TOKEN_PATH
from promptlayer_exec._engine.tasks import clock
from promptlayer_exec._http.failures import PermanentFailure, is_tls_failure, reason_of
from promptlayer_exec._http.protocols import Idle, Interposed, is_plain, protocol_of, readable
from promptlayer_exec._version import __version__

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.tracing import Trace

    from promptlayer_exec._settings import Settings

BorrowedHttp = aiohttp.ClientSession

USER_AGENT = (
    f"promptlayer-exec/{__version__} aiohttp/{aiohttp.__version__}"
    f" Python/{sys.version_info.major}.{sys.version_info.minor}"
)
# In addition to `max_connections`; WebSockets are not counted there either.
_CONNECTIONS_OF_PUSH = 16
_HEADERS = {"Accept": "application/json", "User-Agent": USER_AGENT}


class _UncleanConnection(aiohttp.ClientConnectionError):
    """The connection was not used: it was closed, or had bytes that no request asked for."""


class _CleanConnector(aiohttp.TCPConnector):
    """Gives no connection on which the server spoke first, as with the end of the handshake."""

    def __init__(self, *, force_close: bool) -> None:
        super().__init__(limit=0, force_close=force_close, socket_factory=self._open_socket)
        self._sockets: WeakSet[socket.socket] = WeakSet()

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> aiohttp.connector.Connection:
        connection = await super().connect(req, traces, timeout)
        idle = self._idle(connection)
        if idle is not None and not idle.is_plain and (idle.is_new or idle.is_readable()):
            with ExitStack() as stack:
                stack.callback(connection.close)  # if this is cancelled
                await _until_quiet(idle)
                stack.pop_all()
        if idle is None or not idle.take():
            connection.close()
            raise _UncleanConnection("the connection was closed, or had unrequested bytes")
        connection.add_callback(idle.begin)
        return connection

    def _idle(self, connection: aiohttp.connector.Connection) -> Idle | None:
        """Return what watches a connection; None if that is a new one, and closed already."""
        if (transport := connection.transport) is None:
            return None
        idle = protocol_of(transport)
        if idle is not None and not isinstance(idle, Idle) and not transport.is_closing():
            idle = Idle(transport)
            idle.begin()
        return idle if isinstance(idle, Idle) else None  # `take` finds out whether it is closed

    def _open_socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, *_ = address
        opened = socket.socket(family, kind, protocol)
        self._sockets.add(opened)
        return opened

    async def close(self, *, abort_ssl: bool = False) -> None:
        """Close all connections, beginning with their sockets.

        Over TLS, one that was being made when its task was cancelled waits for the peer's
        `close_notify`, and aiohttp does not know it. One that was closed twice is known, but makes
        aiohttp fail and forget the others.
        """
        for opened in self._sockets:
            with suppress(OSError):  # it is closed already
                opened.shutdown(socket.SHUT_RDWR)
        for _ in range(_STEPS_TO_END if self._sockets else 0):
            with suppress(asyncio.CancelledError):  # the rest must be closed all the same
                await asyncio.sleep(0)
        await super().close(abort_ssl=abort_ssl)


# How many steps of the loop it takes to notice what is in a socket, and to hand it on: uvloop does
# so a step later with what came with the end of a handshake.
_STEPS = 2
# How many it takes, generously, until aiohttp knows that a connection has ended whose socket was
# shut down.
_STEPS_TO_END = 10


async def _until_quiet(watching: Interposed) -> None:
    """Let the loop read what is in a socket, until it is empty, data has come, or it is closed.

    For TLS, which has messages of its own: only what is handed on as data is HTTP.
    """
    transport, quiet = watching.transport, 0
    while quiet < _STEPS and not (watching.has_received or transport.is_closing()):
        await asyncio.sleep(0)
        quiet = 0 if not transport.is_closing() and readable(transport)() else quiet + 1


class _GuardedRequest(aiohttp.ClientRequest):
    """A request that knows its connection, and lets a start guard it before anything is sent."""

    used: asyncio.Transport | None = None

    def send(
        self, conn: aiohttp.connector.Connection
    ) -> Coroutine[Any, Any, aiohttp.ClientResponse]:
        self.used = conn.transport
        if self.used is not None and isinstance(self.body, GuardedBody):
            self.body.guard(self.used)
        return super().send(conn)


# How many connections are tried without a delay. After that, the attempt has failed.
_CONNECTIONS_TRIED = 10


async def _send_once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Keep aiohttp from repeating requests by itself, unthrottled, uncounted and unobserved."""
    is_start = request.method == "POST" and not request.url.path.endswith(TOKEN_PATH)
    if is_start and not isinstance(request.body, GuardedBody):
        raise PermanentFailure("a middleware of http= must not replace the body of a start")
    tried = 0
    while True:
        try:
            return await handler(request)
        except aiohttp.ClientConnectorError:
            raise
        except _UncleanConnection:  # so nothing was sent
            tried += 1
            if tried == _CONNECTIONS_TRIED:
                raise
            # Let the loop notice which others the server has closed while the loop was busy.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
            cause = error.__cause__
            if is_tls_failure(cause):
                raise PermanentFailure(reason_of(cause)) from cause
            raise aiohttp.ClientConnectionError(reason_of(error)) from error
        except BaseException:
            if isinstance(request, _GuardedRequest):
                abort(request.used)
            raise


def abort(transport: asyncio.Transport | None) -> None:
    """Close a connection at once: a peer that does not read or answer could keep it open."""
    if transport is not None:
        transport.abort()


class Slots(AbstractAsyncContextManager[None]):
    """The right to use one of so many connections; `async with` waits behind all others.

    Attributes:
        first: entered instead by an urgent request, which waits for at most one ordinary request
            and for earlier urgent ones.
    """

    def __init__(self, connections: int) -> None:
        self.first = anyio.Semaphore(connections, fast_acquire=True)
        self._queue = asyncio.Lock()
        self._waiting = 0

    async def __aenter__(self) -> None:
        if not self._waiting and self.first.value:
            self.first.acquire_nowait()
            return
        self._waiting += 1
        try:
            async with self._queue:
                await self.first.acquire()
        finally:
            self._waiting -= 1

    async def __aexit__(self, *_: object) -> None:
        self.first.release()


@attrs.frozen(eq=False)
class Pool:
    """Connections for one kind of request, and slots for as many requests.

    Attributes:
        http: holds the connections.
        slots: where a request waits, without a timeout, until a connection is free.
        headers: sent with each request, overriding those of `http`; None: `http` has them all.
        middlewares: those to run with each request; None: those of `http`.
        is_borrowed: whether the connections belong to the caller, who may also use them.
    """

    http: aiohttp.ClientSession
    slots: Slots
    headers: Mapping[str, str] | None = None
    middlewares: Sequence[aiohttp.ClientMiddlewareType] | None = None
    is_borrowed: bool = False


@attrs.define(eq=False)
class Pools:
    """The connections of a session: one pool for reads, one for starts, one for push.

    Starts have a share of their own, so that neither kind keeps the other waiting. In our own
    pools, each start gets a new connection: a used one might be closing just then, and the start
    would be lost needlessly. Push has a few more, so that a push server that does not answer holds
    up no poll or start.
    """

    reads: Pool
    starts: Pool
    push: Pool

    @classmethod
    def open(cls, settings: Settings, api_key: str, resources: AsyncExitStack) -> Self:
        """Open our own pools, closed by `resources`, or divide a borrowed client session."""
        headers = _HEADERS | {"X-API-KEY": api_key}
        if settings.http is not None:
            return cls._borrow(settings.http, settings, headers)
        pools = []
        for slots, force_close in zip(_slots(settings.max_connections), (False, True), strict=True):
            http = aiohttp.ClientSession(
                connector=_CleanConnector(force_close=force_close),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=headers,
                middlewares=[_send_once],
                request_class=_GuardedRequest,
                trust_env=settings.trust_env,
            )
            resources.push_async_callback(http.close)
            pools.append(Pool(http, slots))
        reads, starts = pools
        return cls(reads, starts, Pool(reads.http, Slots(_CONNECTIONS_OF_PUSH)))

    @classmethod
    def _borrow(
        cls, http: aiohttp.ClientSession, settings: Settings, headers: dict[str, str]
    ) -> Self:
        """Divide the connections of the caller's client session between reads and starts.

        If their number is limited, push takes a share of them, and shares that of reads if there
        are less than three.
        """
        connector = http.connector
        limits = (connector.limit, connector.limit_per_host) if connector is not None else ()
        most = min((limit for limit in limits if limit), default=0)
        of_push = _CONNECTIONS_OF_PUSH
        if settings.push and most:
            of_push = min(most // 4 or 1, of_push) if most > 2 else 0
            most -= of_push
        if "User-Agent" in http.headers:
            del headers["User-Agent"]
        # A request's middlewares replace the session's, which have no public name.
        middlewares = (*http._middlewares, _send_once)
        pool = partial(Pool, http, middlewares=middlewares, is_borrowed=True)
        reads, starts = _slots(min(settings.max_connections, most or settings.max_connections))
        return cls(
            pool(slots=reads, headers=headers),
            pool(slots=starts, headers=headers | {"Connection": "close"}),
            pool(slots=Slots(of_push) if of_push else reads, headers=headers),
        )


def _slots(connections: int) -> tuple[Slots, Slots]:
    """Divide connections between reads and starts; a single one serves both."""
    starts = max(connections // 4, 1)
    reads = Slots(max(connections - starts, 1))
    return reads, reads if connections == 1 else Slots(starts)


class SendOnce(Protocol):
    """A request that must not reach the server twice, and whether it may have reached it."""

    @property
    def sent(self) -> bool:
        """Whether it may have reached the server."""

    @property
    def cancelled(self) -> bool:
        """Whether it must no longer be sent."""

    async def before_send(self) -> None:
        """Wait for permission to send; a connection stands, and the rate allows the request."""

    async def not_sent(self) -> None:
        """Handle an attempt that started nothing, before the next one."""

    def mark_connecting(self) -> None:
        """Record that the rate allows it, and that a connection is being made for it."""

    def mark_sent(self) -> None:
        """Record that it is about to be sent; raises `OSError` if it must no longer be sent."""

    def mark_rejected(self) -> None:
        """Record that the server refused it, and started nothing."""


_SENT_TWICE = "a start must not be sent twice"
_ANSWERED_BEFORE = "the server answered, or closed the connection, before the start was sent"


class GuardedBody(aiohttp.Payload):
    """A body that reports when it and its headers are about to be sent.

    Its connection is not pooled: on a used one, the next start might read a stale answer, such as
    a 429 or even the id of another run.
    """

    def __init__(self, body: bytes, once: SendOnce, until: float) -> None:
        super().__init__(body, content_type="application/json")
        self._body = body
        self._once = once
        self._until = until
        self.is_held = False  # whether it waits for the permission to be sent
        self.is_over = False  # whether its attempt has ended, though a middleware may go on
        self.used: asyncio.Transport | None = None
        self._received: Interposed | None = None
        self._writing: asyncio.Task[Any] | None = None

    @property
    def size(self) -> int:
        return len(self._body)

    @property
    def autoclose(self) -> bool:
        return True  # there is nothing to close

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._body.decode(encoding, errors)

    def guard(self, transport: asyncio.Transport) -> Interposed:
        """Note from now on whether the server answers before this is sent."""
        if self._received is None or self._received.transport is not transport:
            self._received = Interposed(transport)
            self._received.begin()
        return self._received

    def _check_is_first(self) -> None:
        # A borrowed session's middleware may send again, several at once, or too late.
        if self.used is not None:
            raise ConnectionAbortedError(_SENT_TWICE)
        if self.is_over:
            raise ConnectionAbortedError("the attempt to send this start has ended")

    async def ended(self) -> None:
        """End the attempt, and wait for the hook: aiohttp calls it in a task of its own."""
        self.is_over = True
        abort(self.used)
        writing = self._writing
        if writing is not None and writing is not asyncio.current_task() and not writing.done():
            writing.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([writing])

    async def write(self, writer: AbstractStreamWriter) -> None:
        self._check_is_first()
        self._writing = asyncio.current_task()
        stream = cast(aiohttp.http.StreamWriter, writer)
        protocol, transport = cast("ResponseHandler", stream.protocol), stream.transport
        if transport is None or transport.is_closing():
            raise ConnectionAbortedError(_ANSWERED_BEFORE)
        received = self.guard(transport)
        try:
            self.is_held = True
            await self._once.before_send()
            self.is_held = False
            await _let_answer_arrive(received)
        finally:
            received.end()
        if received.has_received or len(protocol):
            raise ConnectionAbortedError(_ANSWERED_BEFORE)
        self._check_is_first()
        if clock() >= self._until:  # the loop was stopped, and no time is left
            raise ConnectionAbortedError("the request timeout passed before the start was sent")
        self._once.mark_sent()
        self.used = transport
        protocol.force_close()
        await writer.write(self._body)


async def _let_answer_arrive(received: Interposed) -> None:
    """Let the loop read what has arrived before a start is sent."""
    transport = received.transport
    if not is_plain(transport):
        await _until_quiet(received)
    if transport.is_closing() or readable(transport)():
        raise ConnectionAbortedError(_ANSWERED_BEFORE)
