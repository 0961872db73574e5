"""HTTP: the only module that knows aiohttp's client. Attempts, retries, and errors made ours."""

from __future__ import annotations

import asyncio
import os
import select
import ssl
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from random import random
from typing import Any, Protocol, Self, TypeVar

import aiohttp
import anyio
import attrs
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from promptlayer_exec._errors import (
    ConnectionFailed,
    InvalidResponse,
    NotFound,
    RateLimited,
    RequestError,
    RequestTimeout,
    ResponseTooLarge,
    SessionClosed,
    StatusError,
)
from promptlayer_exec._events import Emit, RequestRetried, Throttled
from promptlayer_exec._policies import RetryPolicy
from promptlayer_exec._redaction import Redactor
from promptlayer_exec._retry import OutageLog, RecentStarts, RetryState
from promptlayer_exec._tasks import PatientTimeout, clock, is_cancelled
from promptlayer_exec._throttle import Throttle
from promptlayer_exec._version import __version__
from promptlayer_exec._wire import Reply, Request, Response, excerpt, read_retry_after

T = TypeVar("T")

BorrowedHttp = aiohttp.ClientSession

USER_AGENT = (
    f"promptlayer-exec/{__version__} aiohttp/{aiohttp.__version__}"
    f" Python/{sys.version_info.major}.{sys.version_info.minor}"
)
_HEADERS = {"Accept": "application/json", "User-Agent": USER_AGENT}
# `asyncio.timeout_at` ends an attempt, body included: aiohttp's own need not.
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)
# The body of an error is for people to read.
_ERROR_BODY_BYTES = 64 * 1024
_LONGEST_KEY = 1024
# What bounds the memory of a decoded body: at most one value for so many bytes of the limit.
_BYTES_PER_VALUE = 32
_FEW_VALUES = 1000
_OPENING_A_VALUE = (b",", b"[", b"{")


class _UncleanConnection(aiohttp.ClientConnectionError):
    """The connection was not used: there was something on it that no request asked for."""


class _CleanRequest(aiohttp.ClientRequest):
    """A request that is sent only where the next bytes to come can be its response.

    aiohttp's pool checks only that a connection is open. Bytes that came while it was idle would
    be the response to the next request, and that one's the response to the one after it.
    """

    async def send(self, conn: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        if conn.transport is not None and _is_readable(conn.transport):
            # Let the loop read what lies in the socket: one step to notice it, one to read it.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if conn.protocol is None or not conn.protocol.is_connected() or conn.protocol.should_close:
            raise _UncleanConnection("the connection was closed, or had bytes nobody asked for")
        return await super().send(conn)


def _is_readable(transport: asyncio.Transport) -> bool:
    socket = transport.get_extra_info("socket")
    if socket is None or socket.fileno() < 0:
        return True
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([socket.fileno()], [], [], 0)[0])
    poll = select.poll()
    poll.register(socket.fileno(), select.POLLIN)
    return bool(poll.poll(0))


# So often another connection is tried at once. After that it is a failure like any other.
_CONNECTIONS_TRIED = 10


async def _send_once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Keep aiohttp from sending again by itself: unthrottled, uncounted and unobserved."""
    for _ in range(_CONNECTIONS_TRIED - 1):
        with suppress(_UncleanConnection):  # and so nothing was sent
            return await _send_over_one(request, handler)
    return await _send_over_one(request, handler)


async def _send_over_one(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(_reason(error)) from error


@attrs.frozen(eq=False)
class _Pool:
    """Connections for one kind of request, and slots for as many requests.

    Attributes:
        http: holds the connections.
        slots: where a request waits, without a timeout, until a connection is free.
        headers: what to send along; None: `http` does so by itself.
        middlewares: what to run along; None: those of `http`.
        is_borrowed: whether others use the connections, too.
    """

    http: aiohttp.ClientSession
    slots: anyio.Semaphore
    headers: Mapping[str, str] | None = None
    middlewares: Sequence[aiohttp.ClientMiddlewareType] | None = None
    is_borrowed: bool = False


@attrs.define(eq=False)
class Pools:
    """The connections of a session: those that read, and those that start runs.

    Starts have a share of their own, so that neither kind keeps the other waiting. In our own
    pools, each start gets a new connection: a used one might be closing at that moment, and the
    start would be lost without need.
    """

    reads: _Pool
    starts: _Pool

    @classmethod
    def open(
        cls, max_connections: int, api_key: str, resources: AsyncExitStack, *, trust_env: bool
    ) -> Self:
        """Open pools of our own in the running loop; `resources` closes them."""
        headers = _HEADERS | {"X-API-KEY": api_key}
        pools = []
        for slots, force_close in zip(_slots(max_connections), (False, True), strict=True):
            http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=force_close),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=headers,
                middlewares=[_send_once],
                request_class=_CleanRequest,
                trust_env=trust_env,
            )
            resources.push_async_callback(http.close)
            pools.append(_Pool(http, slots))
        return cls(*pools)

    @classmethod
    def borrow(
        cls,
        http: aiohttp.ClientSession,
        max_connections: int,
        api_key: str,
        resources: AsyncExitStack,
    ) -> Self:
        """Share out the connections of a client session that belongs to the caller."""
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(_mark_new_connection)
        trace.freeze()
        http.trace_configs.append(trace)
        resources.callback(http.trace_configs.remove, trace)
        connector = http.connector
        limits = (connector.limit, connector.limit_per_host) if connector is not None else ()
        headers = _HEADERS | {"X-API-KEY": api_key}
        if "User-Agent" in http.headers:
            del headers["User-Agent"]
        # Those given with a request replace the session's, which has no public name for them.
        middlewares = (*http._middlewares, _send_once)
        reads, starts = _slots(min([max_connections, *(limit for limit in limits if limit)]))
        # A server that heeds "close" leaves no used connection behind for the next start.
        return cls(
            _Pool(http, reads, headers, middlewares),
            _Pool(http, starts, headers | {"Connection": "close"}, middlewares, is_borrowed=True),
        )


def _slots(connections: int) -> tuple[anyio.Semaphore, anyio.Semaphore]:
    """Share connections out between reads and starts; both share one where there is only one."""
    starts = max(connections // 4, 1)
    reads = anyio.Semaphore(max(connections - starts, 1), fast_acquire=True)
    return reads, reads if connections == 1 else anyio.Semaphore(starts, fast_acquire=True)


class SendOnce(Protocol):
    """A request that must not reach the server twice, and whether it may have reached it."""

    @property
    def sent(self) -> bool:
        """Whether it may have reached the server."""

    @property
    def cancelled(self) -> bool:
        """Whether it must not be sent any more."""

    async def before_send(self) -> None:
        """Wait until it may be sent; a connection is free, and the rate allows it."""

    def mark_sent(self) -> None:
        """Record that it is about to be sent; raises `OSError` where it must not be any more."""

    def mark_rejected(self) -> None:
        """Record that the server refused it, and started nothing."""


class _GuardedBody(aiohttp.Payload):
    """A body that reports when it, and the headers that go with it, are about to be sent.

    It is sent over a new connection only: on a used one, the answer might be a stale one to another
    request, a 429 or even the id of another run.
    """

    def __init__(self, body: bytes, once: SendOnce, *, is_new_connection: bool) -> None:
        super().__init__(body, content_type="application/json")
        self._body = body
        self._once = once
        self.is_new_connection = is_new_connection

    @property
    def size(self) -> int:
        return len(self._body)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._body.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        if not self.is_new_connection:
            raise ConnectionAbortedError("a start is not sent over a used connection")
        self._once.mark_sent()
        await writer.write(self._body)


async def _mark_new_connection(
    _: aiohttp.ClientSession, context: Any, __: aiohttp.TraceConnectionCreateEndParams
) -> None:
    if isinstance(context.trace_request_ctx, _GuardedBody):
        context.trace_request_ctx.is_new_connection = True


@attrs.define(eq=False, kw_only=True)
class Transport:
    """Sends requests to one server with one key.

    Args:
        pools: the connections to use.
        base_url: without a trailing slash.
        api_key: sent to `base_url` alone, and kept out of every error.
        throttle: admits each attempt.
        retry: which failures to survive.
        recent_starts: the executions for which a 404 is worth another attempt.
        request_timeout: seconds for one attempt.
        max_response_bytes: how large a body may be, after decompression.
        emit: called with retries and throttling.
    """

    _pools: Pools
    base_url: str
    _redactor: Redactor = attrs.field(alias="api_key", converter=Redactor)
    _throttle: Throttle
    _retry: RetryPolicy
    _recent_starts: RecentStarts
    _request_timeout: float
    _max_response_bytes: int
    _emit: Emit
    _outages: OutageLog = attrs.field(init=False, factory=OutageLog)

    def with_url(self, request: Request) -> Request:
        """Return a request with its URL, so that it is not built anew for each attempt."""
        return attrs.evolve(request, url=self._url(request))

    async def call(
        self,
        request: Request,
        read: Callable[[Response], T],
        state: RetryState,
        *,
        due: float,
        once: SendOnce | None = None,
    ) -> Reply[T]:
        """Send a request until there is a good answer, or the retries are used up.

        Args:
            request: what to send.
            read: reads the answer; an error that it raises is judged like any other failure.
            state: counts the failures.
            due: when the request should be sent, on the event loop's clock.
            once: a request that must not be sent twice.

        Raises:
            RequestError: the last failure, when it is not worth another attempt.
        """
        answered = False
        try:
            while True:
                try:
                    reply = await self._send(request, read, state, due, once)
                except RequestError as error:
                    if (delay := self._delay(error, request, state, once)) is None:
                        raise
                else:
                    answered = True
                    return reply
                due = clock() + delay
                await anyio.sleep(delay)
        finally:
            if state.failures:
                self._outages.end(state, answered=answered)

    async def _send(
        self,
        request: Request,
        read: Callable[[Response], T],
        state: RetryState,
        due: float,
        once: SendOnce | None,
    ) -> Reply[T]:
        """Send a request once, when a connection is free and the rate allows it."""
        pool = self._pools.reads if once is None else self._pools.starts
        async with pool.slots:
            await self._throttle.acquire()
            if once is not None:
                await once.before_send()
            sent_at = clock()
            lateness = max(sent_at - due, 0.0)
            state.excuse(lateness)
            response = await self._attempt(pool, request, sent_at, once)
        duration = clock() - sent_at
        value = self._read(read, response)
        return Reply(value, len(response.body), duration, lateness, response.retry_after)

    def _delay(
        self, error: RequestError, request: Request, state: RetryState, once: SendOnce | None
    ) -> float | None:
        """Record a failed attempt; return the seconds before the next, or None."""
        error.execution_id = request.execution_id
        error.attempts = state.failures + 1
        if not self._is_transient(error, once):
            return None
        delay = state.delay(
            error,
            now=clock(),
            chance=random(),
            retry_after=error.retry_after if isinstance(error, StatusError) else None,
        )
        if delay is not None:
            if once is not None and once.sent:
                once.mark_rejected()
            self._outages.begin(error, state)
            self._emit(RequestRetried(request.execution_id, error, delay))
        return delay

    def _is_transient(self, error: RequestError, once: SendOnce | None) -> bool:
        """Return True if a failure is worth another attempt."""
        if once is not None and not isinstance(error, RateLimited):  # which starts nothing
            may_have_arrived = once.sent or isinstance(error, StatusError)
            if may_have_arrived or once.cancelled:
                return False
        if isinstance(error, StatusError):
            return error.status in self._retry.statuses or (
                isinstance(error, NotFound)
                and self._recent_starts.covers(error.execution_id, now=clock())
            )
        if isinstance(error, InvalidResponse):
            return error.path is None and not isinstance(error, ResponseTooLarge)
        return not _is_tls_failure(error.__cause__)

    async def _attempt(
        self, pool: _Pool, request: Request, sent_at: float, once: SendOnce | None
    ) -> Response:
        """Send a request, and return the answer."""
        if pool.http.closed:
            raise SessionClosed("the borrowed aiohttp.ClientSession is closed")
        answer, body, failure = await self._exchange(pool, request, sent_at, once)
        if answer is None or (failure is not None and answer.status < 300):
            raise self._failure(failure, answer, body)
        # A refusal needs no whole body: its status says what is wrong.
        if answer.status < 300:
            self._check_size(answer.status, body)
        location = None
        if answer.status >= 300:
            location = answer.headers.get("Location")
            body = self._redactor.redact_bytes(body)[:_ERROR_BODY_BYTES]
        retry_after = read_retry_after(answer.headers, now=time.time())
        response = Response(answer.status, body, location, retry_after)
        if response.status == 429:
            announced = self._retry.announced(response.retry_after)
            self._emit(Throttled(request.execution_id, self._throttle.refused(sent_at, announced)))
        else:
            self._throttle.answered()
        return response

    def _check_size(self, status: int, body: bytes) -> None:
        limit = self._max_response_bytes
        too_large = f"is larger than {limit} bytes" if len(body) > limit else ""
        # What is decoded takes up to 400 bytes for each of these: what a few bytes say may take
        # fifty times the memory. Where there cannot be too many, they need not be counted.
        values = max(limit // _BYTES_PER_VALUE, _FEW_VALUES)
        if values < len(body) <= limit and sum(map(body.count, _OPENING_A_VALUE)) > values:
            too_large = f"holds more than {values:,} values, the most for {limit} bytes"
        if too_large:
            raise ResponseTooLarge(
                f"the {status} answer {too_large}",
                limit=limit,
                status=status,
                excerpt=self._excerpt(body),
            )

    async def _exchange(
        self, pool: _Pool, request: Request, sent_at: float, once: SendOnce | None
    ) -> tuple[aiohttp.ClientResponse | None, bytes, BaseException | None]:
        """Send a request; return the answer and its body, as far as they came, and what failed."""
        data = None
        if request.body is not None and once is not None:
            data = _GuardedBody(request.body, once, is_new_connection=not pool.is_borrowed)
        url = request.url or self._url(request)
        answer: aiohttp.ClientResponse | None = None
        pieces: list[bytes] = []
        failure: BaseException | None = None
        try:
            async with PatientTimeout(sent_at + self._request_timeout):
                answer = await pool.http.request(
                    request.method,
                    url,
                    headers=pool.headers,
                    data=data,
                    timeout=_NO_TIMEOUT,
                    allow_redirects=False,
                    raise_for_status=False,
                    auto_decompress=True,
                    middlewares=pool.middlewares,
                    # A pool keeps connections apart by this name: starts share none with others.
                    server_hostname=url.host if data is not None and pool.is_borrowed else None,
                    trace_request_ctx=data,
                )
                # Read a little more of a refusal: a key at its end is redacted before it is cut.
                limit = _ERROR_BODY_BYTES + _LONGEST_KEY
                if answer.status < 300:
                    limit = self._max_response_bytes
                await _read_body(answer, pieces, limit)
        except (aiohttp.ClientError, OSError) as error:  # OSError: also every TimeoutError
            failure = error
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            failure = error  # this task was not cancelled, only something that it awaited
        return answer, pieces[0] if len(pieces) == 1 else b"".join(pieces), failure

    def _url(self, request: Request) -> URL:
        return URL(self.base_url + request.target, encoded=True)

    def _failure(
        self, failure: BaseException | None, answer: aiohttp.ClientResponse | None, body: bytes
    ) -> RequestError:
        reason = self._redactor.redact(_reason(failure))
        error: RequestError
        if _is_tls_failure(failure):
            error = ConnectionFailed(
                f"no TLS connection to {self.base_url}: {reason}", reason=reason
            )
        elif isinstance(failure, TimeoutError):
            error = RequestTimeout(
                f"no complete answer from {self.base_url} within {self._request_timeout:g} s",
                reason=reason,
            )
        elif answer is None:
            error = ConnectionFailed(
                f"no usable answer from {self.base_url}: {reason}", reason=reason
            )
        else:
            error = InvalidResponse(
                f"the {answer.status} answer is cut short, or undecodable, after {len(body)} bytes"
                f" ({reason})",
                status=answer.status,
                excerpt=self._excerpt(body),
                reason=reason,
            )
        error.__cause__ = failure
        # The repr of a ClientResponseError shows all headers of the request, the key's too.
        if isinstance(failure, aiohttp.ClientResponseError) or self._redactor.is_shown_by(failure):
            cause = ssl.SSLError if _is_tls_failure(failure) else aiohttp.ClientError
            error.__cause__ = cause(f"{type(failure).__name__}: {reason}")
        return error

    def _read(self, read: Callable[[Response], T], response: Response) -> T:
        try:
            return read(response)
        except RequestError:
            redacted = attrs.evolve(
                response,
                body=self._redactor.redact_json(response.body),
                location=response.location and self._redactor.redact(response.location),
            )
            if redacted == response:
                raise
        return read(redacted)

    def _excerpt(self, body: bytes) -> str:
        # Redacted before it is cut: half a key gives much away, too.
        return excerpt(self._redactor.redact_bytes(body[:_ERROR_BODY_BYTES]))


async def _read_body(answer: aiohttp.ClientResponse, pieces: list[bytes], limit: int) -> None:
    """Read a body into `pieces`, and stop where it exceeds `limit` bytes."""
    size = 0
    try:
        async for piece in answer.content.iter_any():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                break
    finally:
        if not answer.closed:  # it closes itself where the body was read to its end
            answer.close()


def _is_tls_failure(error: BaseException | None) -> bool:
    """Return True if no TLS connection can be made, which waiting does not change."""
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return not isinstance(error.os_error, ssl.SSLEOFError)  # the server went away meanwhile
    return isinstance(
        error, (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch, ssl.SSLError)
    )


def _tls_reason(error: BaseException) -> str:
    """Return what is wrong with a TLS connection, and what to do about it."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        error = error.certificate_error
    elif isinstance(error, aiohttp.ClientConnectorSSLError):
        error = error.os_error
    if isinstance(error, ssl.SSLCertVerificationError):
        said = str(error.verify_message).rstrip(".")
        return (
            f"the server's certificate is not valid: {said}; if a private authority issued it, set"
            " SSL_CERT_FILE to that authority's certificate, or pass http= with an SSL context"
        )
    name = getattr(error, "reason", None) or str(error)
    if name == "WRONG_VERSION_NUMBER":
        return f"the server does not speak TLS on this port ({name}): check base_url"
    return (
        f"the handshake failed ({name}): if the server demands a client certificate or another TLS"
        " version, pass http= with an SSL context"
    )


def _reason(error: BaseException | None) -> str:
    if error is not None and _is_tls_failure(error):
        return _tls_reason(error)
    if isinstance(error, aiohttp.ClientConnectorError):
        # aiohttp words it for those who know its connection keys.
        if error.errno is None:
            return str(error.os_error) or "the connection was closed while it was made"
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error) or type(error).__name__
