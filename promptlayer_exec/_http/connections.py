"""Connection pools, our own or borrowed: they send nothing twice and mix up no responses."""

from __future__ import annotations

import asyncio
import math
import select
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import aiohttp
import anyio
import attrs
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict

from promptlayer_exec._http.failures import reason_of
from promptlayer_exec._http.throttle import Queues
from promptlayer_exec._values.errors import SessionClosed
from promptlayer_exec._version import __version__

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.tracing import Trace

    from promptlayer_exec._api.attempt import AtMostOnce, Priority
    from promptlayer_exec._engine.settings import Settings

_HEADERS = {
    "Accept": "application/json",
    "User-Agent": f"promptlayer-exec/{__version__} aiohttp/{aiohttp.__version__}",
}
# WebSockets of one session. If a borrowed session has a limit, they get a quarter of it at most.
_MOST_SOCKETS = 20


class _CleanConnector(aiohttp.TCPConnector):
    """Never reuses a connection on which the server has sent bytes unasked.

    aiohttp's pool would take those bytes for the response to the next request, and stay one
    response behind from then on.
    """

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> aiohttp.connector.Connection:
        for _ in range(10):  # even a new connection may have some, from another protocol
            connection = await super().connect(req, traces, timeout)
            if not _has_spoken(connection):
                return connection
            connection.close()
            await asyncio.sleep(0)  # lets the loop notice other closed connections
        raise aiohttp.ClientConnectionError("the server sent bytes that no request asked for")


def _has_spoken(connection: aiohttp.connector.Connection) -> bool:
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None or transport.is_closing() or protocol.should_close:
        return True
    # TLS has its own messages, so bytes in its socket need not be HTTP.
    return transport.get_extra_info("ssl_object") is None and _is_readable(transport)


def _is_readable(transport: asyncio.Transport) -> bool:
    """Return True if the socket has bytes that the event loop has not read yet."""
    descriptor = transport.get_extra_info("socket").fileno()
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([descriptor], [], [], 0)[0])
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


async def _no_hidden_retry(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Keep aiohttp from resending a request by itself, as a retry or after a redirect.

    It would bypass the rate and the observers. Only `ws_connect` follows redirects.
    """
    try:
        response = await handler(request)
    except aiohttp.ClientConnectorError:  # aiohttp does not repeat these
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(reason_of(error)) from error

    if "Upgrade" in request.headers and 300 <= response.status < 400:
        response.close()
        raise aiohttp.WSServerHandshakeError(
            response.request_info, (), status=response.status, headers=response.headers
        )
    return response


class Slots:
    """The right to use one of several connections, in the order of `Queues`."""

    def __init__(self, connections: int) -> None:
        self._free = anyio.Semaphore(connections, fast_acquire=True)
        self._queues = Queues()
        self._waiting = 0

    async def acquire(self, priority: Priority) -> None:
        """Wait for a connection. The caller must then `release` it."""
        if not self._waiting and self._free.value:
            self._free.acquire_nowait()
            return

        self._waiting += 1
        try:
            async with self._queues.line(priority):
                await self._free.acquire()
        finally:
            self._waiting -= 1

    def release(self) -> None:
        """Let the next request have the connection."""
        self._free.release()


@attrs.frozen(eq=False)
class Pool:
    """Connections for one kind of request, and one slot for each of them.

    `headers` has the API key. It is never set on `http`, because aiohttp also sends a session's
    headers to a proxy. Borrowed connections belong to the caller, who may use them as well.
    """

    http: aiohttp.ClientSession
    slots: Slots
    headers: CIMultiDict[str] = attrs.field(repr=False)
    is_borrowed: bool = False

    def check_open(self) -> None:
        """Raise `SessionClosed` if the caller has closed a borrowed client session."""
        if self.is_borrowed and self.http.closed:
            raise SessionClosed("the borrowed aiohttp.ClientSession is closed")


@attrs.frozen(eq=False)
class Pools:
    """The connections of a session, divided between reads, starts and control requests.

    This way, no kind of request waits for another. Each start gets a new connection: the server
    might be closing a reused one, and the response would be lost for nothing.
    """

    reads: Pool
    starts: Pool
    control: Pool  # for push and definitions
    sockets: int  # the number of WebSockets, in addition to all requests

    @classmethod
    def open(
        cls, settings: Settings, api_key: str, proxy: str | None, resources: AsyncExitStack
    ) -> Self:
        """Open our own pools, closed by `resources`, or divide a borrowed client session."""
        key = {"X-API-KEY": api_key}
        if settings.http is not None:
            return cls._borrow(settings.http, settings, _HEADERS | key)

        reads, starts, control = _slots(settings.max_connections)
        pools: list[Pool] = []
        for slots, force_close in ((reads, False), (starts, True)):
            http = aiohttp.ClientSession(
                connector=_CleanConnector(limit=0, force_close=force_close),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=_HEADERS,
                middlewares=[_no_hidden_retry],
                proxy=proxy,
            )
            resources.push_async_callback(http.close)
            pools.append(Pool(http, slots, CIMultiDict(key)))

        own, closing = pools
        return cls(own, closing, attrs.evolve(own, slots=control), _MOST_SOCKETS)

    @classmethod
    def _borrow(
        cls, http: aiohttp.ClientSession, settings: Settings, headers: dict[str, str]
    ) -> Self:
        """Divide the connections of the caller's client session."""
        limits: tuple[int, ...] = ()
        if http.connector is not None:
            limits = http.connector.limit, http.connector.limit_per_host
        most = min((limit for limit in limits if limit), default=math.inf)  # 0 means no limit

        sockets = 0
        if settings.push is not False:
            sockets = int(min(_MOST_SOCKETS, most // 4))

        if "User-Agent" in http.headers:
            del headers["User-Agent"]

        reads, starts, control = _slots(int(min(settings.max_connections, most - sockets)))
        pool = Pool(http, reads, CIMultiDict(headers), is_borrowed=True)
        closing = CIMultiDict(headers, Connection="close")
        return cls(
            pool,
            attrs.evolve(pool, slots=starts, headers=closing),
            attrs.evolve(pool, slots=control),
            sockets,
        )


def _slots(connections: int) -> tuple[Slots, Slots, Slots]:
    """Divide connections between reads, starts and control requests.

    If there are only one or two, control requests get an additional one. A single connection
    serves both reads and starts.
    """
    control = min(max(connections // 8, 1), 4)  # control requests are few
    if connections > 2:
        connections -= control

    starts = max(connections // 4, 1)
    reads = Slots(max(connections - starts, 1))
    if connections == 1:
        return reads, reads, Slots(control)
    return reads, Slots(starts), Slots(control)


class SendOnceBody(aiohttp.Payload):
    """The body of a start request, which reports when aiohttp is about to send it.

    aiohttp holds the headers back until it writes the body. Only here is "sent" exact, even with a
    borrowed session.
    """

    def __init__(self, body: bytes, start: AtMostOnce) -> None:
        super().__init__(body, content_type="application/json")
        self._body = body
        self._start = start
        self._writing: asyncio.Task[Any] | None = None

    @property
    def size(self) -> int:
        return len(self._body)

    @property
    def autoclose(self) -> bool:
        return True  # there is nothing to close

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._body.decode(encoding, errors)

    def __deepcopy__(self, _: object) -> SendOnceBody:
        return self  # aioresponses copies the requests of a test

    async def write(self, writer: AbstractStreamWriter) -> None:
        self._writing = asyncio.current_task()
        await self._start.before_send()
        self._start.mark_sent()

        # No other request may use the connection. A mock has none.
        if isinstance(writer, aiohttp.http.StreamWriter):
            cast("ResponseHandler", writer.protocol).force_close()
        await writer.write(self._body)

    async def ended(self) -> None:
        """Stop `write`: aiohttp runs it in its own task, which may still wait for permission."""
        writing = self._writing
        if writing is not None and writing is not asyncio.current_task() and not writing.done():
            writing.cancel()
            await asyncio.wait([writing])


class ResponseTimeout:
    """An `asyncio.timeout_at` for a start request, which first reads a response that has arrived.

    If something blocked the loop past that time, `asyncio.timeout_at` would cancel the request
    before it reads the response, and the id of a paid run would be lost.
    """

    def __init__(self, at: float) -> None:
        self._at = at
        self._timeout = asyncio.timeout(None)
        self._handle: asyncio.TimerHandle

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._handle = asyncio.get_running_loop().call_at(self._at, self._expire)

    def _expire(self) -> None:
        # Within 20 ms, every event loop reads its sockets.
        self._timeout.reschedule(asyncio.get_running_loop().time() + 0.02)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handle.cancel()
        await self._timeout.__aexit__(kind, error, traceback)
