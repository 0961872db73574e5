"""HTTP: the only module that knows aiohttp's client. Attempts, retries, and errors made ours."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from random import random
from typing import Protocol, Self, TypeVar

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
from promptlayer_exec._outages import Outages
from promptlayer_exec._policies import Newborns, Outage, RetryPolicy
from promptlayer_exec._receiving import PIECE, Receiver
from promptlayer_exec._redaction import Redactor
from promptlayer_exec._tasks import Limit, Timers, is_cancelled
from promptlayer_exec._throttle import Throttle
from promptlayer_exec._version import __version__
from promptlayer_exec._wire import Reply, Request, Response, excerpt, read_retry_after

T = TypeVar("T")

USER_AGENT = (
    f"promptlayer-exec/{__version__} aiohttp/{aiohttp.__version__}"
    f" Python/{sys.version_info.major}.{sys.version_info.minor}"
)
_HEADERS = {"Accept": "application/json", "User-Agent": USER_AGENT}
# A timeout of our own ends an attempt, at a third of the cost of aiohttp's.
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)
# The body of an error is for people to read.
_ERROR_BODY_BYTES = 64 * 1024
_LONGEST_KEY = 1024


async def _send_once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Keep aiohttp from sending again by itself: unpaced, uncounted and unobserved."""
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(_reason(error)) from error


class _Pool:
    """Connections for one kind of request, and places for as many requests.

    Attributes:
        http: holds the connections.
        places: where whoever finds no connection free waits, without a timeout.
        headers: what to send along; None: `http` does so by itself.
        middlewares: what to run along; None: those of `http`.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        places: anyio.Semaphore,
        headers: Mapping[str, str] | None = None,
        middlewares: Sequence[aiohttp.ClientMiddlewareType] | None = None,
    ) -> None:
        self.http = http
        self.places = places
        self.headers = headers
        self.middlewares = middlewares

    def take_place(self) -> bool:
        """Take a place, if one is free: at a tenth of what `places.acquire` costs."""
        try:
            self.places.acquire_nowait()
        except anyio.WouldBlock:
            return False
        return True


class Pools:
    """The connections of a session: those for looking at executions, and those for starts.

    Starts have a share of their own, so that neither kind keeps the other waiting. In pools of our
    own, each has a new connection to itself: on a used one, which the server may be closing at the
    moment, it would be lost without need.
    """

    def __init__(self, looks: _Pool, starts: _Pool) -> None:
        self.looks = looks
        self.starts = starts

    @classmethod
    def open(cls, max_connections: int, api_key: str, resources: AsyncExitStack) -> Self:
        """Open pools of our own in the running loop; `resources` closes them."""
        headers = _HEADERS | {"X-API-KEY": api_key}
        pools = []
        for places, force_close in zip(_places(max_connections), (False, True), strict=True):
            connector = aiohttp.TCPConnector(limit=0, force_close=force_close)
            http = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=headers,
                read_bufsize=PIECE // 2,  # it pauses beyond twice as much
            )
            # What `_send_once` does for a borrowed one, at no cost; it has no public name.
            http._retry_connection = False
            resources.push_async_callback(http.close)
            pools.append(_Pool(http, places))
        return cls(*pools)

    @classmethod
    def borrow(cls, http: aiohttp.ClientSession, max_connections: int, api_key: str) -> Self:
        """Share out the connections of somebody else's client session."""
        connector = http.connector
        limits = (connector.limit, connector.limit_per_host) if connector is not None else ()
        headers = _HEADERS | {"X-API-KEY": api_key}
        if "User-Agent" in http.headers:
            del headers["User-Agent"]
        # Those given with a request replace the session's, which has no public name for them.
        middlewares = (*http._middlewares, _send_once)
        looks, starts = _places(min([max_connections, *(limit for limit in limits if limit)]))
        return cls(
            _Pool(http, looks, headers, middlewares), _Pool(http, starts, headers, middlewares)
        )


def _places(connections: int) -> tuple[anyio.Semaphore, anyio.Semaphore]:
    """Share connections out between looks and starts; of one alone, both have the same place."""
    starts = max(connections // 4, 1)
    looks = anyio.Semaphore(max(connections - starts, 1))
    return looks, looks if connections == 1 else anyio.Semaphore(starts)


class Departure(Protocol):
    """Whether a request that must not be sent twice may have reached the server."""

    @property
    def left(self) -> bool:
        """Whether it may have."""

    @property
    def called_off(self) -> bool:
        """Whether it must not leave any more."""

    async def clear(self) -> None:
        """Its turn has come: wait until it may leave."""

    def leave(self) -> None:
        """It is about to leave; raises `OSError` where it must not any more."""

    def come_back(self) -> None:
        """The server has refused it, unseen."""


class _GuardedBody(aiohttp.Payload):
    """A body that tells when it, and the headers that go with it, are about to leave."""

    _value: bytes

    def __init__(self, body: bytes, departure: Departure) -> None:
        super().__init__(body, content_type="application/json")
        self._size = len(body)
        self._departure = departure

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._value.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        self._departure.leave()
        await writer.write(self._value)


class Transport:
    """Sends requests to one server with one key.

    Args:
        pools: the connections to use.
        base_url: without a trailing slash.
        api_key: sent to `base_url` alone, and kept out of every error.
        throttle: admits each attempt.
        retry: what to survive.
        newborns: the executions for which a 404 is worth another attempt.
        request_timeout: seconds for one attempt.
        max_response_bytes: how large a body may be, after decompression.
        emit: told of retries and throttling.
        timers: end its attempts.
    """

    def __init__(
        self,
        pools: Pools,
        *,
        base_url: str,
        api_key: str,
        throttle: Throttle,
        retry: RetryPolicy,
        newborns: Newborns,
        request_timeout: float,
        max_response_bytes: int,
        emit: Emit,
        timers: Timers,
    ) -> None:
        self._pools = pools
        self.base_url = base_url
        self._throttle = throttle
        self._retry = retry
        self._newborns = newborns
        self._request_timeout = request_timeout
        self._max_response_bytes = max_response_bytes
        self._emit = emit
        self._key = Redactor(api_key)
        self._outages = Outages()
        self._timers = timers
        self._clock = timers.loop.time
        self._receiver = Receiver(timers)

    def addressed(self, request: Request) -> Request:
        """Return a request with its URL, so that it is not built anew whenever it is sent."""
        return attrs.evolve(request, url=self._url(request))

    async def call(
        self,
        request: Request,
        read: Callable[[Response], T],
        outage: Outage,
        *,
        due: float,
        departure: Departure | None = None,
    ) -> Reply[T]:
        """Send a request until it is answered well, or `outage` is over.

        Args:
            request: what to send.
            read: reads the answer; what it raises is judged like any other failure.
            outage: keeps account of the failures.
            due: when the request should leave, on the event loop's clock.
            departure: told of what becomes of a request that must not be sent twice.

        Raises:
            RequestError: the last failure, when it is not worth another attempt.
        """
        pool = self._pools.looks if departure is None else self._pools.starts
        answered = False
        try:
            while True:
                try:
                    if not pool.take_place():
                        await pool.places.acquire()
                    try:
                        await self._throttle.acquire()
                        if departure is not None:
                            await departure.clear()
                        sent_at = self._clock()
                        lateness = max(sent_at - due, 0.0)
                        outage.excuse(lateness)
                        response = await self._attempt(pool, request, sent_at, departure)
                    finally:
                        pool.places.release()
                    duration = self._clock() - sent_at
                    value = self._read(read, response)
                    answered = True
                    return Reply(
                        value, len(response.body), duration, lateness, response.retry_after
                    )
                except RequestError as error:
                    if (delay := self._delay(error, request, outage, departure)) is None:
                        raise
                due = self._clock() + delay
                await anyio.sleep(delay)
        finally:
            if outage.failures:
                self._outages.end(outage, answered=answered)

    def _delay(
        self, error: RequestError, request: Request, outage: Outage, departure: Departure | None
    ) -> float | None:
        """Take note of a failed attempt; return the seconds before the next, or None."""
        error.execution_id = request.execution_id
        error.attempts = outage.failures + 1
        if not self._is_transient(error, departure):
            return None
        delay = outage.delay(
            error,
            now=self._clock(),
            chance=random(),
            retry_after=error.retry_after if isinstance(error, StatusError) else None,
        )
        if delay is not None:
            if departure is not None and departure.left:
                departure.come_back()
            self._outages.begin(error, outage)
            self._emit(RequestRetried(request.execution_id, error, delay))
        return delay

    def _is_transient(self, error: RequestError, departure: Departure | None) -> bool:
        """Tell whether a failure is worth another attempt."""
        if departure is not None and not isinstance(error, RateLimited):  # which starts nothing
            may_have_arrived = departure.left or isinstance(error, StatusError)
            if may_have_arrived or departure.called_off:
                return False
        if isinstance(error, StatusError):
            return error.status in self._retry.statuses or (
                isinstance(error, NotFound)
                and self._newborns.covers(error.execution_id, now=self._clock())
            )
        if isinstance(error, InvalidResponse):
            return error.path is None and not isinstance(error, ResponseTooLarge)
        return True

    async def _attempt(
        self, pool: _Pool, request: Request, sent_at: float, departure: Departure | None
    ) -> Response:
        """Send a request once, at `sent_at`, and return the answer."""
        if pool.http.closed:
            raise SessionClosed("the borrowed aiohttp.ClientSession is closed")
        data = None
        if request.body is not None and departure is not None:
            data = _GuardedBody(request.body, departure)
        answer: aiohttp.ClientResponse | None = None
        pieces: list[bytes] = []
        trouble: BaseException | None = None
        try:
            with Limit(self._timers, sent_at + self._request_timeout):
                answer = await pool.http.request(
                    request.method,
                    request.url or self._url(request),
                    headers=pool.headers,
                    data=data,
                    timeout=_NO_TIMEOUT,
                    allow_redirects=False,
                    raise_for_status=False,
                    auto_decompress=True,
                    middlewares=pool.middlewares,
                )
                limit = self._max_response_bytes if answer.status < 300 else _ERROR_BODY_BYTES
                # Of a refusal a little more: a key at its end is redacted before it is cut.
                more = _LONGEST_KEY if answer.status >= 300 else 0
                await self._receiver.receive(answer, pieces, limit + more)
        except (aiohttp.ClientError, OSError) as error:  # OSError: also every TimeoutError
            trouble = error
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            trouble = error  # not this task was cancelled, but something that it awaited
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if answer is None or (trouble is not None and answer.status < 300):
            # Outside the `except`, so that the cleaned cause is all that hangs on the error.
            raise self._failure(trouble, answer, body)
        # A refusal needs no whole body: its status says what is wrong.
        if answer.status < 300 and len(body) > limit:
            raise ResponseTooLarge(
                f"the {answer.status} answer is larger than {limit} bytes",
                limit=limit,
                status=answer.status,
                excerpt=self._excerpt(body),
            )
        location = None
        if answer.status >= 300:
            location = answer.headers.get("Location")
            body = self._key.redact_bytes(body)[:limit]
        retry_after = read_retry_after(answer.headers, now=time.time())
        response = Response(answer.status, body, location, retry_after)
        if response.status == 429:
            announced = self._retry.announced(response.retry_after)
            self._emit(Throttled(request.execution_id, self._throttle.refused(sent_at, announced)))
        else:
            self._throttle.answered()
        return response

    def _url(self, request: Request) -> URL:
        return URL(self.base_url + request.target, encoded=True)

    def _failure(
        self, trouble: BaseException | None, answer: aiohttp.ClientResponse | None, body: bytes
    ) -> RequestError:
        reason = self._key.redact(_reason(trouble))
        error: RequestError
        if isinstance(trouble, TimeoutError):
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
        error.__cause__ = trouble
        # The repr of a ClientResponseError shows all headers of the request, the key's too.
        if isinstance(trouble, aiohttp.ClientResponseError) or self._key.is_shown_by(trouble):
            error.__cause__ = aiohttp.ClientError(f"{type(trouble).__name__}: {reason}")
        return error

    def _read(self, read: Callable[[Response], T], response: Response) -> T:
        try:
            return read(response)
        except RequestError:
            redacted = attrs.evolve(
                response,
                body=self._key.redact_json(response.body),
                location=response.location and self._key.redact(response.location),
            )
            if redacted == response:
                raise
        return read(redacted)

    def _excerpt(self, body: bytes) -> str:
        # Blotted out before it is cut: half a key tells much, too.
        return excerpt(self._key.redact_bytes(body[:_ERROR_BODY_BYTES]))


def _reason(error: BaseException | None) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and error.errno is not None:
        # aiohttp words it for those who know its connection keys.
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error) or type(error).__name__
