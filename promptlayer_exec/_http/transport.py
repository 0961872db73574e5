"""Makes one attempt to send a request over HTTP, and translates aiohttp's errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

import aiohttp
import attrs
from multidict import CIMultiDict
from yarl import URL

from promptlayer_exec._api.attempt import AtMostOnce, Attempt, Priority
from promptlayer_exec._api.messages import (
    ERROR_BODY_BYTES,
    Reply,
    Request,
    Response,
    excerpt,
    is_object,
    oversize_reason,
    read_retry_after,
)
from promptlayer_exec._api.redaction import Redactor
from promptlayer_exec._api.runs import may_have_nodes
from promptlayer_exec._api.status import check_status
from promptlayer_exec._engine.settings import Settings
from promptlayer_exec._http.connections import Pool, Pools, ResponseTimeout, SendOnceBody
from promptlayer_exec._http.failures import (
    is_permanent,
    is_tls_failure,
    is_unreachable,
    reason_of,
    tls_peer,
    tls_problem,
)
from promptlayer_exec._http.throttle import Throttle
from promptlayer_exec._values.errors import (
    ConfigurationError,
    ConnectionFailed,
    InvalidResponse,
    RequestError,
    RequestTimeout,
    ResponseTooLarge,
)
from promptlayer_exec._values.events import Emit, Throttled

T = TypeVar("T")

# aiohttp raises these if it cannot send a request or read its response. HttpProcessingError comes
# from its Python parser, and every TimeoutError is an OSError. A ValueError concerns settings of
# http=, such as an unencodable header.
_FAILURES = (aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError, ValueError)
# aiohttp's timeout is off: ours limits the whole attempt, including the body.
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)


@attrs.define(eq=False)
class _Received:
    """The result of one attempt, and why it stopped early, if it did.

    Of most errors, a part of the body is enough. Otherwise, `needs_whole_body`.
    """

    response: aiohttp.ClientResponse | None = None
    needs_whole_body: bool = False
    pieces: list[bytes] = attrs.field(factory=list)
    failure: Exception | None = None


@attrs.define(eq=False, kw_only=True)
class Transport:
    """Sends requests to one server with one key."""

    _settings: Settings
    pools: Pools
    base_url: str
    redactor: Redactor
    _throttle: Throttle
    _emit: Emit
    # Looking up the running loop takes a system call on Python 3.11.
    _clock: Callable[[], float] = attrs.field(
        init=False, factory=lambda: asyncio.get_running_loop().time
    )

    async def send(
        self, request: Request, read: Callable[[Response], T], attempt: Attempt
    ) -> Reply[T]:
        """Send a request once, as soon as a connection is free and the rate allows it.

        `request_timeout` limits the attempt, but not the wait before it.

        Raises:
            RequestError: the attempt failed.
            SessionClosed: the borrowed client session was closed.
        """
        pool, redactor = self._pool(attempt), self.redactor
        if attempt.start is not None:
            redactor = redactor.also(attempt.start.secret)

        on_sending = attempt.on_sending
        if on_sending is not None:
            on_sending(False)

        priority = Priority.URGENT if attempt.is_control else attempt.priority
        await pool.slots.acquire(priority)
        try:
            sent_at = await self._throttle.acquire(priority)
            if on_sending is not None:
                on_sending(True)
            until = sent_at + self._settings.request_timeout
            received = await self._exchange(pool, request, attempt.start, until)
        finally:
            pool.slots.release()
        duration = self._clock() - sent_at
        lateness = max(sent_at - attempt.due, 0.0)

        try:
            response = self._response(received, attempt.start, redactor)
            self._adapt_rate(response, sent_at, request.execution_id)
            value = _read(read, response, redactor)
        except RequestError as error:
            error.waited = lateness
            raise
        return Reply(value, len(response.body), sent_at, duration, lateness, response.retry_after)

    def _pool(self, attempt: Attempt) -> Pool:
        if attempt.is_control:
            return self.pools.control
        if attempt.start is not None:
            return self.pools.starts
        return self.pools.reads

    def _adapt_rate(
        self, response: Response, sent_at: float, execution_id: int | None = None
    ) -> None:
        if response.status == 429:
            announced = self._settings.retry.announced(response.retry_after)
            self._emit(Throttled(execution_id, self._throttle.refused(sent_at, announced)))
        else:
            self._throttle.rate.accepted()

    async def _exchange(
        self, pool: Pool, request: Request, start: AtMostOnce | None, until: float
    ) -> _Received:
        """Send a request, and return what arrived of its response, and the failure, if any."""
        pool.check_open()
        url = URL(self.base_url + request.target, encoded=True)

        body: SendOnceBody | None = None
        server_hostname: str | None = None
        timeout: asyncio.Timeout | ResponseTimeout
        if start is None:
            timeout = asyncio.timeout_at(until)
        else:
            timeout = ResponseTimeout(until)
            body = SendOnceBody(request.body or b"", start)
            if pool.is_borrowed:
                # aiohttp also pools by this name, so no other request shares the connection.
                server_hostname = url.raw_host

        received = _Received()
        try:
            async with timeout:
                received.response = await pool.http.request(
                    request.method,
                    url,
                    headers=pool.headers,
                    data=body,
                    timeout=_NO_TIMEOUT,
                    allow_redirects=False,
                    raise_for_status=False,
                    auto_decompress=True,
                    # The default is 8 KiB, but large headers must not cost us a run's id.
                    max_line_size=32 * 1024,
                    max_field_size=32 * 1024,
                    # As much as asyncio reads in one go. With less, aiohttp pauses the connection
                    # at each read of a large body.
                    read_bufsize=256 * 1024,
                    server_hostname=server_hostname,
                )
                if start is not None and not start.sent:
                    # A mock has responded, or a middleware of http= has replaced the body.
                    start.mark_sent()

                status, limit = received.response.status, ERROR_BODY_BYTES
                if status < 300 or may_have_nodes(request, status):
                    received.needs_whole_body = True
                    limit = self._settings.max_response_bytes
                await _read_body(received.response, received.pieces, limit)
        except _FAILURES as error:
            received.failure = error
        finally:
            if body is not None:
                await body.ended()
        return received

    async def open_websocket(self, path: str) -> aiohttp.ClientWebSocketResponse:
        """Open a WebSocket without the key, ahead of ordinary requests, or raise as `send` does."""
        pool = self.pools.reads
        pool.check_open()
        sent_at = await self._throttle.acquire(Priority.URGENT)

        # With https instead of wss, aiohttp finds the same proxy as for requests.
        url = URL(self.base_url + path, encoded=True)
        failure: Exception
        try:
            return await pool.http.ws_connect(
                url,
                # A closing session waits for the closing handshake.
                timeout=aiohttp.ClientWSTimeout(ws_close=0.1),
                max_msg_size=self._settings.max_response_bytes,
                # A borrowed session follows redirects. Over TLS, this keeps them on our host.
                server_hostname=url.raw_host,
            )
        except _FAILURES as error:
            failure = error

        if isinstance(failure, aiohttp.WSServerHandshakeError) and failure.status != 101:
            headers = failure.headers or CIMultiDict[str]()
            location = self.redactor.redact(headers.get("Location", ""))
            retry_after = read_retry_after(headers, now=time.time())
            response = Response(failure.status, b"", location, retry_after)
            self._adapt_rate(response, sent_at)
            check_status(response)
        raise self._failure(failure, None, b"", self.redactor)

    def _response(
        self, received: _Received, start: AtMostOnce | None, redactor: Redactor
    ) -> Response:
        """Return the response of one attempt, or raise its failure."""
        body = b"".join(received.pieces)
        response, failure = received.response, received.failure

        is_cut = failure is not None and received.needs_whole_body
        if is_cut and start is not None and is_object(body):
            is_cut = False  # keep the id of a paid run, even if the connection broke later
        if response is None or is_cut:
            if start is not None and start.sent and is_tls_failure(failure):
                start.mark_rejected()  # no handshake, so the server read nothing
            raise self._failure(failure or TimeoutError(), response, body, redactor)

        location = None
        too_large = oversize_reason(body, self._settings.max_response_bytes)
        if response.status >= 300:
            if too_large:
                body = body[:ERROR_BODY_BYTES]
            location = redactor.redact(response.headers.get("Location", ""))
        elif too_large:
            raise ResponseTooLarge(
                f"the {response.status} response {too_large}",
                limit=self._settings.max_response_bytes,
                status=response.status,
                excerpt=redactor.redact(excerpt(body)),
            )

        retry_after = read_retry_after(response.headers, now=time.time())
        return Response(response.status, body, location, retry_after)

    def _failure(
        self,
        failure: Exception,
        response: aiohttp.ClientResponse | None,
        body: bytes,
        redactor: Redactor,
    ) -> RequestError:
        """Return the error for an aiohttp failure."""
        reason = redactor.redact(reason_of(failure))
        if isinstance(failure, ValueError) and not isinstance(failure, aiohttp.ClientError):
            raise ConfigurationError(
                f"the aiohttp.ClientSession passed as http= could not send the request: {reason}"
            )

        error: RequestError
        if is_tls_failure(failure):
            peer = tls_peer(failure, self.base_url)
            text = f"no TLS connection to {peer}: {reason}"
            error = ConnectionFailed(text, reason=reason, tls=tls_problem(failure))
        elif isinstance(failure, TimeoutError):
            seconds = self._settings.request_timeout
            error = RequestTimeout(
                f"no complete response from {self.base_url} within {seconds:g} s", reason=reason
            )
        elif response is None:
            what = "could not reach" if is_unreachable(failure) else "no usable response from"
            error = ConnectionFailed(f"{what} {self.base_url}: {reason}", reason=reason)
        else:
            error = InvalidResponse(
                f"could not read the {response.status} response beyond {len(body)} bytes"
                f" ({reason})",
                status=response.status,
                excerpt=redactor.redact(excerpt(body)),
                reason=reason,
            )

        error.is_permanent = is_permanent(failure)
        # aiohttp's own errors show the request headers with the key, and a proxy's URL.
        error.__cause__ = aiohttp.ClientError(f"{type(failure).__name__}: {reason}")
        return error


async def _read_body(response: aiohttp.ClientResponse, pieces: list[bytes], limit: int) -> None:
    """Read a body into `pieces`, and stop when it exceeds `limit` bytes."""
    size, content = 0, response.content
    try:
        while size <= limit and (piece := await content.readany()):
            pieces.append(piece)
            size += len(piece)

        # A middleware or trace of http= may have read it already. `read` would then fail.
        if not pieces and content.total_bytes:
            pieces.append((await response.text("latin-1")).encode("latin-1"))
    finally:
        if response.connection is not None:  # parts of the body are unread
            response.close()


def _read(read: Callable[[Response], T], response: Response, redactor: Redactor) -> T:
    try:
        return read(response)
    except RequestError as error:
        failure = error

    # The error may quote the body: read it again, without secrets.
    body = redactor.redact_bytes(response.body)
    if body == response.body:
        raise failure
    return read(attrs.evolve(response, body=body))
