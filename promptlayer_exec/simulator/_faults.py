"""Deliberate faults between the server and its client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any, TypeAlias

import attrs
from aiohttp import web

from promptlayer_exec.simulator._wire import JSON_TYPE, Reply

Answer: TypeAlias = Callable[[], Reply]
# None means that the request is answered normally.
Effect: TypeAlias = Callable[[web.BaseRequest, Answer], Awaitable[web.StreamResponse | None]]

_HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>\n"
_CHUNK = 64 * 1024
_FOREVER = 1e9
_OVERSIZE_HEAD = b'{"Node 1":{"status":"SUCCESS","value":"'
_OVERSIZE_TAIL = b'","error_message":null,"raw_error_message":null,"is_output_node":true}}\n'


def _check_times(_: Fault, __: attrs.Attribute[Any], times: int | None) -> None:
    if times is not None and times < 1:
        raise ValueError(f"times must be at least 1, or None for every request, got {times!r}")


@attrs.frozen
class Fault:
    """A fault of the next requests; the static methods below create one.

    All of them take `times`, the number of requests that it affects (None: every one until
    `Simulator.clear_faults`), and `execution_id`, which limits it to requests for the results of
    that execution.
    """

    effect: Effect
    times: int | None = attrs.field(default=1, validator=_check_times)
    execution_id: int | None = None

    @staticmethod
    def status(
        code: int,
        *,
        times: int | None = 1,
        retry_after: float | str | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        execution_id: int | None = None,
    ) -> Fault:
        """Answer with a status, and optionally an exact body.

        Args:
            code: the HTTP status, 200 to 599.
            times: how many requests it affects; None for all.
            retry_after: seconds for a Retry-After header, or its text.
            body: the exact body; by default the server's error object, or nothing below 400.
            headers: further headers; the content type is JSON unless they change it.
            execution_id: affects only requests for the results of this execution.

        Raises:
            ValueError: `code` or `times` is out of range.
        """
        if not 200 <= code <= 599:
            raise ValueError(f"the HTTP status must be between 200 and 599, got {code}")
        if body is None:
            body = Reply.error(code, _phrase(code)).body if code >= 400 else b""
        all_headers = {**JSON_TYPE, **(headers or {})}
        if isinstance(retry_after, str):
            all_headers["Retry-After"] = retry_after
        elif retry_after is not None:
            all_headers["Retry-After"] = f"{retry_after:.12g}"
        return _always(Reply(code, body, all_headers), times, execution_id)

    @staticmethod
    def disconnect(times: int | None = 1, *, execution_id: int | None = None) -> Fault:
        """Perform the operation, but close the connection before any byte of the answer."""
        return Fault(_disconnect, times, execution_id)

    @staticmethod
    def truncate(
        times: int | None = 1, *, at: int | None = None, execution_id: int | None = None
    ) -> Fault:
        """Close the connection within the body of the normal answer.

        Args:
            times: how many requests it affects; None for all.
            at: the number of bytes of the body to send; by default half of it, at most all but
                one.
            execution_id: affects only requests for the results of this execution.

        Raises:
            ValueError: `at` or `times` is out of range.
        """
        if at is not None and at < 0:
            raise ValueError(f"at must be at least 0 bytes, got {at}")
        return Fault(partial(_truncate, at=at), times, execution_id)

    @staticmethod
    def malformed(
        times: int | None = 1, *, body: bytes = _HTML, execution_id: int | None = None
    ) -> Fault:
        """Answer 200 with a body that is not JSON: by default a proxy's HTML page."""
        reply = Reply(200, body, {"Content-Type": "text/html"})
        return _always(reply, times, execution_id)

    @staticmethod
    def stall(times: int | None = 1, *, execution_id: int | None = None) -> Fault:
        """Accept the request and never answer; the client or the simulator must end it."""
        return Fault.delay(_FOREVER, times, execution_id=execution_id)

    @staticmethod
    def trickle(
        interval: float, times: int | None = 1, *, execution_id: int | None = None
    ) -> Fault:
        """Answer 200 with a body that is sent byte by byte, `interval` seconds apart, forever."""
        return Fault(partial(_trickle, interval=interval), times, execution_id)

    @staticmethod
    def delay(seconds: float, times: int | None = 1, *, execution_id: int | None = None) -> Fault:
        """Answer normally, but only after `seconds`."""
        return Fault(partial(_delay, seconds=seconds), times, execution_id)

    @staticmethod
    def oversize(size: int, times: int | None = 1, *, execution_id: int | None = None) -> Fault:
        """Answer 200 with a valid node map of `size` bytes and no Content-Length.

        Raises:
            ValueError: `size` is too small for a node map, or `times` is out of range.
        """
        smallest = len(_OVERSIZE_HEAD) + len(_OVERSIZE_TAIL)
        if size < smallest:
            raise ValueError(f"size must be at least {smallest} bytes, got {size}")
        return Fault(partial(_oversize, padding=size - smallest), times, execution_id)

    def concerns(self, request: web.BaseRequest) -> bool:
        """Return True if it may affect this request."""
        if self.execution_id is None:
            return True
        return request.query.get("workflow_version_execution_id") == str(self.execution_id)


@attrs.define
class FaultQueue:
    """Faults in the order of injection; each request takes the first that concerns it.

    Any thread may add faults; the server's thread takes them.
    """

    _pending: list[Fault] = attrs.field(factory=list, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._pending.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._pending.clear()

    def take(self, request: web.BaseRequest) -> Fault | None:
        with self._lock:
            for index, fault in enumerate(self._pending):
                if fault.concerns(request):
                    if fault.times == 1:
                        del self._pending[index]
                    elif fault.times is not None:
                        self._pending[index] = attrs.evolve(fault, times=fault.times - 1)
                    return fault
        return None


def _phrase(code: int) -> str:
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return f"Status {code}"


def _always(reply: Reply, times: int | None, execution_id: int | None) -> Fault:
    return Fault(partial(_replace, reply=reply), times, execution_id)


async def _replace(
    _request: web.BaseRequest, _answer: Answer, *, reply: Reply
) -> web.StreamResponse:
    return reply.response()


async def _disconnect(request: web.BaseRequest, answer: Answer) -> web.StreamResponse:
    request.protocol.force_close()
    return answer().response()


async def _truncate(
    request: web.BaseRequest, answer: Answer, *, at: int | None
) -> web.StreamResponse:
    whole = answer()
    length = len(whole.body)
    sent = length // 2 if at is None else min(at, length - 1)
    response = web.StreamResponse(status=whole.status, headers=whole.headers)
    response.content_length = length
    with suppress(ConnectionError):
        await response.prepare(request)
        await response.write(whole.body[:sent])
    request.protocol.force_close()
    return response


async def _trickle(
    request: web.BaseRequest, _answer: Answer, *, interval: float
) -> web.StreamResponse:
    response = web.StreamResponse(headers=JSON_TYPE)
    with suppress(ConnectionError):
        await response.prepare(request)
        await response.write(b'"')
        while True:
            await asyncio.sleep(interval)
            await response.write(b"a")
    return response


async def _delay(_request: web.BaseRequest, _answer: Answer, *, seconds: float) -> None:
    await asyncio.sleep(seconds)


async def _oversize(
    request: web.BaseRequest, _answer: Answer, *, padding: int
) -> web.StreamResponse:
    response = web.StreamResponse(headers=JSON_TYPE)
    chunk = b"a" * _CHUNK
    with suppress(ConnectionError):
        await response.prepare(request)
        await response.write(_OVERSIZE_HEAD)
        for start in range(0, padding, _CHUNK):
            await response.write(chunk[: padding - start])
        await response.write(_OVERSIZE_TAIL)
    return response
