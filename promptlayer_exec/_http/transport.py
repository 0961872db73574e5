"""Sending requests: attempts, retries, and the translation of aiohttp's errors."""

from __future__ import annotations

import asyncio
import math
import time
import traceback
from collections.abc import Callable
from functools import partial
from random import random
from typing import Protocol, TypeVar

import aiohttp
import anyio
import attrs
from yarl import URL

from promptlayer_exec._api.executions import (
    Reply,
    Request,
    Response,
    excerpt,
    is_object,
    read_retry_after,
    up_to_id,
)
from promptlayer_exec._api.redaction import Redactor
from promptlayer_exec._engine.retry import OutageLog, RecentStarts, RetryState
from promptlayer_exec._engine.tasks import PatientTimeout, TaskTimeout, is_cancelled
from promptlayer_exec._errors import (
    ConfigurationError,
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
from promptlayer_exec._http.connections import GuardedBody, Pool, Pools, SendOnce
from promptlayer_exec._http.exchange import (
    Exchange,
    excess,
    has_id,
    is_doubtful,
    may_be_cut,
    read_body,
)
from promptlayer_exec._http.failures import (
    PermanentFailure,
    has_invalid_proxy,
    is_permanent,
    is_tls_failure,
    reason_of,
    shows_secrets,
    text_of,
    tls_peer,
)
from promptlayer_exec._http.throttle import Throttle
from promptlayer_exec._settings import Settings, unused_proxy

T = TypeVar("T")

# aiohttp's timeout is off: `PatientTimeout` limits the whole attempt, body included.
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)
# The body of a refusal is only read by people.
_ERROR_BODY_BYTES = 64 * 1024
_LONGEST_KEY = 6 * 1024  # a character that is escaped has six bytes
# For the answer to a start: so large that in one of up to 64 KiB no values are counted.
_LEAST_START_LIMIT = 6 * 64 * 1024
# More than aiohttp's defaults: large headers must not cost us the id of a started run.
_LONGEST_HEADER = 32 * 1024
_MOST_HEADERS = 512
# As much as asyncio reads at once: with less, a large body pauses its connection at each read.
_READ_BUFFER = 256 * 1024
_CLOSED = "the borrowed aiohttp.ClientSession is closed"


class NewTimeout(Protocol):
    """Returns the timeout of a part of a call; until `soonest`, it can be reduced for free."""

    def __call__(self, *, soonest: float = math.inf) -> PatientTimeout: ...


@attrs.define(eq=False, kw_only=True)
class Transport:
    """Sends requests to one server with one key."""

    _settings: Settings
    _pools: Pools
    base_url: str
    redactor: Redactor = attrs.field(alias="api_key", converter=Redactor)
    _throttle: Throttle
    _recent_starts: RecentStarts
    _emit: Emit
    _outages: OutageLog = attrs.field(init=False, factory=OutageLog)
    # Asking for the running loop takes a system call on Python 3.11.
    _loop: asyncio.AbstractEventLoop = attrs.field(init=False, factory=asyncio.get_running_loop)
    clock: Callable[[], float] = attrs.field(init=False)  # the time of the loop
    _task_timeout: NewTimeout = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.clock = self._loop.time
        self._task_timeout = partial(TaskTimeout, loop=self._loop)

    def with_url(self, request: Request) -> Request:
        """Return a request with its URL, so that attempts do not build it again."""
        return attrs.evolve(request, url=self._url(request))

    async def call(
        self,
        request: Request,
        read: Callable[[Response], T],
        state: RetryState,
        *,
        due: float,
        once: SendOnce | None = None,
        timeout: NewTimeout | None = None,
        first: bool = False,
        of_push: bool = False,
    ) -> Reply[T]:
        """Send a request until there is a good answer, or the retries are used up.

        An error from `read` is handled like any other failure. `due` is when the request should be
        sent, on the event loop's clock; `once` is a request that must not be sent twice. Whatever
        waits does so within a `timeout`, by default one for a task of our own. A request that goes
        `first` waits for at most one ordinary request; those of push have connections of their own.
        """
        timeout = timeout or self._task_timeout
        pools = self._pools
        pool = pools.push if of_push else pools.reads if once is None else pools.starts
        answered = False
        try:
            while True:
                try:
                    reply = await self._send(
                        pool, request, read, state, due=due, once=once, timeout=timeout, first=first
                    )
                except RequestError as error:
                    if (delay := self._delay(error, request, state, once)) is None:
                        raise
                    if once is not None:
                        await once.not_sent()
                else:
                    answered = True
                    return reply
                due = self.clock() + delay
                async with timeout():
                    await anyio.sleep(delay)
        finally:
            if state.failures:
                self._outages.end(state, answered=answered)

    async def _send(
        self,
        pool: Pool,
        request: Request,
        read: Callable[[Response], T],
        state: RetryState,
        *,
        due: float,
        once: SendOnce | None,
        timeout: NewTimeout,
        first: bool,
    ) -> Reply[T]:
        """Send a request once, when a connection is free and the rate allows it."""
        redactor = self.redactor.also(request.secret)
        exchange = Exchange(self._limit(once), redactor, request.expected)
        try:
            async with (
                timeout(soonest=due + self._settings.request_timeout) as limit,
                pool.slots.first if first else pool.slots,
            ):
                is_last = pool is self._pools.push
                sent_at = await self._throttle.acquire(first=first, last=is_last)
                limit.check()
                lateness = max(sent_at - due, 0.0)
                state.excuse(lateness)
                until = sent_at + self._settings.request_timeout
                limit.end_by(until)
                if request.before_sent is not None:
                    request.before_sent()
                if once is not None and not pool.is_borrowed:  # there it may wait for others
                    once.mark_connecting()
                await self._exchange(pool, request, exchange, until, once)
        except TimeoutError as error:
            if not limit.expired():
                raise
            if exchange.is_held:  # it is not the server's fault
                seconds = self._settings.request_timeout
                what = f"it was not sent within {seconds:g} s, because its before_send hook waited"
                raise RequestTimeout(what) from error
            exchange.failure = error
        now = self.clock()
        response = self._response(exchange, once)
        if response.status == 429:
            announced = self._settings.retry.announced(response.retry_after)
            self._emit(Throttled(request.execution_id, self._throttle.refused(sent_at, announced)))
        else:
            self._throttle.answered()
        value = self._read(read, response, redactor)
        size = len(response.body)
        return Reply(value, size, sent_at, now - sent_at, lateness, response.retry_after)

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
            now=self.clock(),
            chance=random(),
            retry_after=error.retry_after if isinstance(error, StatusError) else None,
        )
        if delay is not None:
            if once is not None and once.sent:
                once.mark_rejected()
            self._outages.begin(error, state, is_start=once is not None)
            self._emit(RequestRetried(request.execution_id, error, delay))
        return delay

    def _is_transient(self, error: RequestError, once: SendOnce | None) -> bool:
        """Return True if a failure is worth another attempt."""
        if once is not None and not isinstance(error, RateLimited):  # a 429 starts nothing
            may_have_arrived = once.sent or isinstance(error, StatusError)
            if may_have_arrived or once.cancelled:
                return False
        if isinstance(error, StatusError):
            return error.status in self._settings.retry.statuses or (
                isinstance(error, NotFound)
                and self._recent_starts.covers(error.execution_id, now=self.clock())
            )
        if isinstance(error, InvalidResponse):
            return error.path is None and not isinstance(error, ResponseTooLarge)
        return not is_permanent(error.__cause__)

    def _response(self, exchange: Exchange, once: SendOnce | None) -> Response:
        """Return the response of one attempt, or raise its failure."""
        answer, body, failure = exchange.answer, exchange.body(), exchange.failure
        redactor = exchange.redactor
        exchange.clear()
        if answer is None:
            if once is not None and once.sent and is_tls_failure(failure):
                once.mark_rejected()  # the handshake was refused, so the server read nothing
            raise self._failure(failure, answer, body, redactor)
        if answer.status < 300:
            if failure is not None and once is None:
                raise self._failure(failure, answer, body, redactor)
            too_large = excess(body, exchange.limit)  # nothing was read beyond the limit
            # The id of a run that was paid for may be whole in spite of that, and of a failure.
            id_part = up_to_id(body) if once is not None and (too_large or failure) else None
            if too_large and id_part is not None:
                body, too_large = id_part, ""
            if failure is not None and id_part is None and (too_large or not is_object(body)):
                raise self._failure(failure, answer, body, redactor)
            if too_large:
                raise ResponseTooLarge(
                    f"the {answer.status} answer {too_large}",
                    limit=exchange.limit,
                    status=answer.status,
                    excerpt=_excerpt(body, redactor),
                )
            if once is None and may_be_cut(answer, body):  # a start's is an object
                cut = aiohttp.ClientPayloadError("the response does not mark where the number ends")
                raise self._failure(cut, answer, body, redactor)
            location = None
        else:  # a part of the body is enough: the status says what is wrong
            location = answer.headers.get("Location")
            body = body[: _ERROR_BODY_BYTES + _LONGEST_KEY]
            body = redactor.redact_start(body, _ERROR_BODY_BYTES)
        retry_after = read_retry_after(answer.headers, now=time.time())
        return Response(answer.status, body, location, retry_after)

    def _limit(self, once: SendOnce | None) -> int:
        """Return the most bytes of a good answer; that to a start may have a long warning."""
        limit = self._settings.max_response_bytes
        return limit if once is None else max(limit, _LEAST_START_LIMIT)

    async def _exchange(
        self,
        pool: Pool,
        request: Request,
        exchange: Exchange,
        until: float,
        once: SendOnce | None,
    ) -> None:
        """Send a request, and record in `exchange` what arrived of the answer, or the failure."""
        if pool.is_borrowed and pool.http.closed:
            raise SessionClosed(_CLOSED)
        data = None
        if request.body is not None and once is not None:
            data = GuardedBody(request.body, once, until)
        url = self._url(request) if request.url is None else request.url
        try:
            answer = await pool.http.request(
                request.method,
                url,
                headers={**pool.headers, **request.headers} if pool.headers else request.headers,
                data=data,
                timeout=_NO_TIMEOUT,
                allow_redirects=False,
                raise_for_status=False,
                auto_decompress=True,
                middlewares=pool.middlewares,
                max_line_size=_LONGEST_HEADER,
                max_field_size=_LONGEST_HEADER,
                max_headers=_MOST_HEADERS,
                read_bufsize=_READ_BUFFER,
                # Connections are pooled by this name: starts share none with other requests.
                server_hostname=url.raw_host if data is not None and pool.is_borrowed else None,
            )
            if once is not None and (not once.sent or is_doubtful(answer)):
                answer.close()
                what = "a part of the answer came before the start was sent"
                raise aiohttp.ClientConnectionError(what)
            exchange.answer = answer
            # Read a little more of a refusal, so that a key at the cut is redacted as a whole.
            limit = exchange.limit if answer.status < 300 else _ERROR_BODY_BYTES + _LONGEST_KEY
            await read_body(answer, exchange, limit)
        # OSError is also every TimeoutError. aiohttp's parser in Python raises its own error.
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError) as error:
            exchange.failure = error
        except (AssertionError, AttributeError, ValueError) as error:
            exchange.failure = _explain(error, pool)
        except asyncio.CancelledError as error:
            # If this task was cancelled, and not only something that it awaited, it ends now; but
            # an id that has arrived is not thrown away.
            body = exchange.body()
            if is_cancelled() and (once is None or not has_id(body, exchange.limit)):
                raise
            exchange.failure = error
        finally:
            if data is not None:  # its connection is not used again
                exchange.is_held = data.is_held
                await data.ended()

    def _url(self, request: Request) -> URL:
        return URL(self.base_url + request.target, encoded=True)

    def _failure(
        self,
        failure: BaseException | None,
        answer: aiohttp.ClientResponse | None,
        body: bytes,
        redactor: Redactor,
    ) -> RequestError:
        reason = redactor.redact(reason_of(failure))
        error: RequestError
        if is_tls_failure(failure):
            peer = tls_peer(failure, self.base_url)
            error = ConnectionFailed(f"no TLS connection to {peer}: {reason}", reason=reason)
        elif isinstance(failure, TimeoutError):
            seconds = self._settings.request_timeout
            hint = unused_proxy(self._settings, self.base_url)
            error = RequestTimeout(
                f"no complete answer from {self.base_url} within {seconds:g} s{hint}", reason=reason
            )
        elif answer is None:
            hint = unused_proxy(self._settings, self.base_url)
            error = ConnectionFailed(
                f"no usable answer from {self.base_url}: {reason}{hint}", reason=reason
            )
        else:
            error = InvalidResponse(
                f"the {answer.status} answer is cut short or cannot be decoded, after"
                f" {len(body)} bytes ({reason})",
                status=answer.status,
                excerpt=_excerpt(body, redactor),
                reason=reason,
            )
        error.__cause__ = failure
        if shows_secrets(failure) or redactor.is_shown_by(failure):
            cause = PermanentFailure if is_permanent(failure) else aiohttp.ClientError
            error.__cause__ = cause(f"{type(failure).__name__}: {reason}")
        return error

    def _read(self, read: Callable[[Response], T], response: Response, redactor: Redactor) -> T:
        try:
            return read(response)
        except RequestError as error:
            failure = error
        # Otherwise the traceback keeps the decoded body in memory while it is decoded again.
        for raised in (failure, failure.__cause__):
            if raised is not None:
                traceback.clear_frames(raised.__traceback__)
        redacted = attrs.evolve(
            response,
            body=redactor.redact_body(response.body),
            location=response.location and redactor.redact(response.location),
        )
        try:
            if redacted == response:
                raise failure
            return read(redacted)
        finally:
            del failure, raised  # its traceback has this frame, as above


def _excerpt(body: bytes, redactor: Redactor) -> str:
    # Redacted before it is cut: half a key would also reveal much.
    return excerpt(redactor.redact_bytes(body[:_ERROR_BODY_BYTES]))


def _explain(error: Exception, pool: Pool) -> aiohttp.InvalidURL:
    """Return or raise what an error that is not about a connection means.

    aiohttp asserts that a connector is open, and that a host has an address of the family that the
    connector is made for; a session that is detached has no connector.
    """
    if pool.is_borrowed and pool.http.closed:
        raise SessionClosed(_CLOSED) from error
    if isinstance(error, AttributeError):
        raise error
    if pool.is_borrowed and not (pool.http.trust_env and has_invalid_proxy()):
        raise ConfigurationError(f"the request failed in http=: {text_of(error)}") from error
    return aiohttp.InvalidURL("the proxy's, which may have a password")
