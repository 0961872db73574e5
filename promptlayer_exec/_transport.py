"""HTTP: the only room that knows aiohttp's client. Attempts, retries, and errors made ours."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from random import random
from typing import TypeVar

import aiohttp
import anyio
import attrs
from yarl import URL

from promptlayer_exec._errors import (
    ConnectionFailed,
    InvalidResponse,
    RequestError,
    RequestTimeout,
    ResponseTooLarge,
    SessionClosed,
    StatusError,
)
from promptlayer_exec._events import Emit, RequestRetried, Throttled
from promptlayer_exec._pace import Pace
from promptlayer_exec._policies import Outage, RetryPolicy
from promptlayer_exec._secret import Secret
from promptlayer_exec._version import __version__
from promptlayer_exec._wire import Reply, Request, Response, excerpt, read_retry_after

T = TypeVar("T")

USER_AGENT = (
    f"promptlayer-exec/{__version__} aiohttp/{aiohttp.__version__}"
    f" Python/{sys.version_info.major}.{sys.version_info.minor}"
)
# The body of an error is for people to read.
_ERROR_BODY_BYTES = 64 * 1024


def open_http(max_connections: int) -> aiohttp.ClientSession:
    """Open a client session of our own in the running loop."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=max_connections),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


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


class Transport:
    """Sends requests to one server with one key.

    Args:
        http: the client session to use.
        base_url: without a trailing slash.
        api_key: sent to `base_url` alone, and kept out of every error.
        pace: admits each attempt.
        retry: what to survive.
        request_timeout: seconds for one attempt.
        max_connections: how many attempts may be under way at once.
        max_response_bytes: how large a body may be, after decompression.
        emit: told of retries and throttling.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        *,
        base_url: str,
        api_key: str,
        pace: Pace,
        retry: RetryPolicy,
        request_timeout: float,
        max_connections: int,
        max_response_bytes: int,
        emit: Emit,
    ) -> None:
        self._http = http
        self.base_url = base_url
        self._pace = pace
        self._retry = retry
        self._request_timeout = request_timeout
        self._timeout = aiohttp.ClientTimeout(total=request_timeout, ceil_threshold=float("inf"))
        self._max_response_bytes = max_response_bytes
        self._emit = emit
        self._key = Secret(api_key)
        self._headers = {"X-API-KEY": api_key, "Accept": "application/json"}
        if "User-Agent" not in http.headers:
            self._headers["User-Agent"] = USER_AGENT
        # Those given with a request replace the session's, which has no public name for them.
        self._middlewares = (*http._middlewares, _send_once)
        # Whoever finds no connection free waits here, where no timeout runs.
        self._places = anyio.Semaphore(_places(http, max_connections), fast_acquire=True)

    async def call(
        self, request: Request, read: Callable[[Response, int], T], outage: Outage, *, due: float
    ) -> Reply[T]:
        """Send a request until it is answered well, or `outage` is over.

        Args:
            request: what to send.
            read: reads the answer; what it raises is judged like any other failure.
            outage: keeps account of the failures.
            due: when the request should leave, on the event loop's clock.

        Raises:
            RequestError: the last failure, when it is not worth another attempt.
        """
        while True:
            try:
                async with self._places:
                    await self._pace.acquire()
                    lateness = max(anyio.current_time() - due, 0.0)
                    outage.excuse(lateness)
                    response, duration = await self._attempt(request)
                return Reply(
                    self._read(read, response, request.execution_id),
                    body_bytes=len(response.body),
                    duration=duration,
                    lateness=lateness,
                    retry_after=response.retry_after,
                )
            except RequestError as error:
                error.execution_id = request.execution_id
                error.attempts = outage.failures + 1
                delay = self._judge(error, outage)
                if delay is None:
                    raise
                self._emit(RequestRetried(request.execution_id, error, delay))
            due = anyio.current_time() + delay
            await anyio.sleep(delay)

    def _judge(self, error: RequestError, outage: Outage) -> float | None:
        """Return the seconds before the next attempt; None: there shall be none."""
        retry_after = None
        if isinstance(error, StatusError):
            retry_after = error.retry_after
            transient = error.status in self._retry.statuses
        elif isinstance(error, InvalidResponse):
            transient = error.path is None and not isinstance(error, ResponseTooLarge)
        else:
            transient = True
        if not transient:
            return None
        return outage.delay(
            error, now=anyio.current_time(), chance=random(), retry_after=retry_after
        )

    async def _attempt(self, request: Request) -> tuple[Response, float]:
        """Send a request once; return the answer, and the seconds that it took."""
        if self._http.closed:
            raise SessionClosed("the borrowed aiohttp.ClientSession is closed")
        sent_at = anyio.current_time()
        answer: aiohttp.ClientResponse | None = None
        chunks: list[bytes] = []
        trouble: BaseException | None = None
        try:
            answer = await self._http.request(
                request.method,
                URL(self.base_url + request.target, encoded=True),
                headers=self._headers,
                timeout=self._timeout,
                allow_redirects=False,
                raise_for_status=False,
                auto_decompress=True,
                middlewares=self._middlewares,
            )
            limit = self._max_response_bytes if answer.status < 300 else _ERROR_BODY_BYTES
            await _receive(answer, chunks, limit)
        except (aiohttp.ClientError, OSError) as error:  # OSError: also every TimeoutError
            trouble = error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            trouble = error  # not this task was cancelled, but something that it awaited
        duration = anyio.current_time() - sent_at
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
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
        response = Response(
            answer.status,
            body[:limit],
            location=answer.headers.get("Location"),
            retry_after=read_retry_after(answer.headers, now=time.time()),
        )
        if response.status == HTTPStatus.TOO_MANY_REQUESTS:
            announced = self._retry.announced(response.retry_after)
            self._emit(Throttled(request.execution_id, self._pace.refused(sent_at, announced)))
        else:
            self._pace.answered()
        return response, duration

    def _failure(
        self, trouble: BaseException | None, answer: aiohttp.ClientResponse | None, body: bytes
    ) -> RequestError:
        reason = self._key.blot(_reason(trouble))
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
        if isinstance(trouble, aiohttp.ClientResponseError) or self._key.is_told_by(trouble):
            error.__cause__ = aiohttp.ClientError(f"{type(trouble).__name__}: {reason}")
        return error

    def _read(self, read: Callable[[Response, int], T], response: Response, execution_id: int) -> T:
        try:
            return read(response, execution_id)
        except RequestError:
            blotted = attrs.evolve(
                response,
                body=self._key.blot_json(response.body),
                location=response.location and self._key.blot(response.location),
            )
            if blotted == response:
                raise
        return read(blotted, execution_id)

    def _excerpt(self, body: bytes) -> str:
        # Blotted out before it is cut: half a key tells much, too.
        return excerpt(self._key.blot_bytes(body[:_ERROR_BODY_BYTES]))


async def _receive(answer: aiohttp.ClientResponse, chunks: list[bytes], limit: int) -> None:
    """Read a body into `chunks`, and stop where it exceeds `limit` bytes."""
    size = 0
    try:
        async for chunk in answer.content.iter_any():
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                break
    finally:
        if not answer.closed:  # it closes itself where the body was read to its end
            answer.close()


def _reason(error: BaseException | None) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and error.errno is not None:
        # aiohttp words it for those who know its connection keys.
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error) or type(error).__name__


def _places(http: aiohttp.ClientSession, max_connections: int) -> int:
    """Return how many requests a client session can have under way without queueing any."""
    connector = http.connector
    limits = (connector.limit, connector.limit_per_host) if connector is not None else ()
    return min([max_connections, *(limit for limit in limits if limit)])
