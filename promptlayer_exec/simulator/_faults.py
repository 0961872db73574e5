"""Deliberate faults between the server and its client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from http.client import responses
from itertools import chain, repeat
from typing import Any, Literal, TypeAlias, get_args

import attrs
from aiohttp import web

from promptlayer_exec.simulator._wire import JSON_TYPE, error_response

PostKind: TypeAlias = Literal["webhook", "callback"]
Answer: TypeAlias = Callable[[], web.Response]
# None means a normal response.
Effect: TypeAlias = Callable[[web.BaseRequest, Answer], Awaitable[web.StreamResponse | None]]

_HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>\n"


def _check_times(_: Fault, __: attrs.Attribute[Any], times: int | None) -> None:
    if times is not None and times < 1:
        raise ValueError(f"times must be at least 1, or None for every request, got {times!r}")


@attrs.frozen
class Fault:
    """A fault of the next requests. The static methods below create one.

    All of them take `times`, the number of requests that it affects (None: all until
    `Simulator.clear_faults`), and `execution_id`, which limits it to requests for the results of
    that execution. `Simulator.inject` can limit it to a path. `repeat_post`, `delay_post` and
    `drop_post` affect the webhooks and callbacks that the simulator posts.
    """

    effect: Effect
    times: int | None = attrs.field(default=1, validator=_check_times)
    execution_id: int | None = None
    post: PostKind | None = None
    delays: tuple[float, ...] = ()
    path: str = ""

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
        """Respond with a status from 200 to 599.

        Without a `body`, it is the server's error object for 400 and above, else nothing.
        `retry_after` is in seconds, or the text of the header. The content type is JSON unless it
        is in `headers`.

        Raises:
            ValueError: `code` or `times` is out of range.
        """
        if not 200 <= code <= 599:
            raise ValueError(f"the HTTP status must be between 200 and 599, got {code}")

        content: Any = body
        if body is None and code >= 400:
            content = error_response(code, responses.get(code, f"Status {code}")).body

        all_headers = {**JSON_TYPE, **(headers or {})}
        if isinstance(retry_after, str):
            all_headers["Retry-After"] = retry_after
        elif retry_after is not None:
            all_headers["Retry-After"] = f"{retry_after:.12g}"

        async def respond(_request: web.BaseRequest, _answer: Answer) -> web.StreamResponse:
            return web.Response(status=code, body=content, headers=all_headers)

        return Fault(respond, times, execution_id)

    @staticmethod
    def disconnect(times: int | None = 1, *, execution_id: int | None = None) -> Fault:
        """Perform the operation, but close the connection before any byte of the response."""

        async def disconnect(request: web.BaseRequest, answer: Answer) -> web.StreamResponse:
            request.protocol.force_close()
            return answer()

        return Fault(disconnect, times, execution_id)

    @staticmethod
    def truncate(times: int | None = 1, *, execution_id: int | None = None) -> Fault:
        """Close the connection in the middle of the body of the normal response."""

        async def truncate(request: web.BaseRequest, answer: Answer) -> web.StreamResponse:
            whole = answer()
            body = (whole.text or "").encode()
            response = web.StreamResponse(status=whole.status, headers=whole.headers)
            response.content_length = len(body)
            await _send(request, response, [body[: len(body) // 2]])
            request.protocol.force_close()
            return response

        return Fault(truncate, times, execution_id)

    @staticmethod
    def malformed(
        times: int | None = 1, *, body: bytes = _HTML, execution_id: int | None = None
    ) -> Fault:
        """Respond 200 with a body that is not JSON, by default a proxy's HTML page."""
        headers = {"Content-Type": "text/html"}
        return Fault.status(200, times=times, body=body, headers=headers, execution_id=execution_id)

    @staticmethod
    def stall(times: int | None = 1, *, execution_id: int | None = None) -> Fault:
        """Accept the request and never respond. The client or the simulator must close it."""
        return Fault.delay(1e9, times, execution_id=execution_id)

    @staticmethod
    def trickle(
        interval: float, times: int | None = 1, *, execution_id: int | None = None
    ) -> Fault:
        """Respond 200 with a body that never stops: a byte every `interval` seconds."""

        async def trickle(request: web.BaseRequest, _answer: Answer) -> web.StreamResponse:
            chunks = chain([b'"'], repeat(b"a"))
            return await _send(request, web.StreamResponse(headers=JSON_TYPE), chunks, interval)

        return Fault(trickle, times, execution_id)

    @staticmethod
    def delay(seconds: float, times: int | None = 1, *, execution_id: int | None = None) -> Fault:
        """Wait for `seconds`, then perform the operation and respond normally.

        A start request starts its run only then, and not at all if its client is gone by that time.
        """

        async def delay(_request: web.BaseRequest, _answer: Answer) -> None:
            await asyncio.sleep(seconds)

        return Fault(delay, times, execution_id)

    @staticmethod
    def delay_response(
        seconds: float, times: int | None = 1, *, execution_id: int | None = None
    ) -> Fault:
        """Perform the operation, then wait for `seconds` before the response."""

        async def delay_response(_request: web.BaseRequest, answer: Answer) -> web.StreamResponse:
            response = answer()
            await asyncio.sleep(seconds)
            return response

        return Fault(delay_response, times, execution_id)

    @staticmethod
    def early_completion(times: int | None = 1, *, execution_id: int | None = None) -> Fault:
        """Report an execution as complete (200) although some of its nodes are not final.

        It affects only requests for results.
        """

        async def complete(_request: web.BaseRequest, answer: Answer) -> web.StreamResponse:
            response = answer()
            if response.status == 202:
                response.set_status(200)
            return response

        return Fault(complete, times, execution_id, path="/workflow-version-execution-results")

    @staticmethod
    def oversize(size: int, times: int | None = 1, *, execution_id: int | None = None) -> Fault:
        """Respond 200 with a valid node map of `size` bytes and no Content-Length.

        Raises:
            ValueError: `size` is too small for a node map, or `times` is out of range.
        """
        head = b'{"Node 1":{"status":"SUCCESS","value":"'
        tail = b'","error_message":null,"raw_error_message":null,"is_output_node":true}}\n'
        smallest = len(head) + len(tail)
        if size < smallest:
            raise ValueError(f"size must be at least {smallest} bytes, got {size}")

        chunk = b"a" * 64 * 1024
        full, rest = divmod(size - smallest, len(chunk))
        chunks = [head, *repeat(chunk, full), chunk[:rest] + tail]

        async def oversize(request: web.BaseRequest, _answer: Answer) -> web.StreamResponse:
            return await _send(request, web.StreamResponse(headers=JSON_TYPE), chunks)

        return Fault(oversize, times, execution_id)

    @staticmethod
    def repeat_post(
        kind: PostKind, copies: int = 2, times: int | None = 1, *, execution_id: int | None = None
    ) -> Fault:
        """Post the same webhook or callback several times.

        Args:
            kind: `"webhook"` or `"callback"`.
            copies: how many times to post it.
            times: the number of posts that it affects. None: all until `Simulator.clear_faults`.
            execution_id: only posts about this execution.
        """
        return _post_fault(kind, (0.0,) * copies, times, execution_id)

    @staticmethod
    def delay_post(
        kind: PostKind, seconds: float, times: int | None = 1, *, execution_id: int | None = None
    ) -> Fault:
        """Post a webhook or callback late.

        Args:
            kind: `"webhook"` or `"callback"`.
            seconds: how long after the execution is complete.
            times: the number of posts that it affects. None: all until `Simulator.clear_faults`.
            execution_id: only posts about this execution.
        """
        return _post_fault(kind, (seconds,), times, execution_id)

    @staticmethod
    def drop_post(
        kind: PostKind, times: int | None = 1, *, execution_id: int | None = None
    ) -> Fault:
        """Do not post a webhook or callback.

        Args:
            kind: `"webhook"` or `"callback"`.
            times: the number of posts that it affects. None: all until `Simulator.clear_faults`.
            execution_id: only posts about this execution.
        """
        return _post_fault(kind, (), times, execution_id)

    def concerns(self, request: web.BaseRequest) -> bool:
        """Return True if it may affect this request."""
        if self.post is not None or not request.path.endswith(self.path):
            return False
        named = request.query.get("workflow_version_execution_id")
        return self.execution_id is None or named == str(self.execution_id)

    def concerns_post(self, kind: PostKind, execution_id: int) -> bool:
        """Return True if it may affect this webhook or callback."""
        return self.post == kind and self.execution_id in (None, execution_id)


def _post_fault(
    kind: PostKind, delays: tuple[float, ...], times: int | None, execution_id: int | None
) -> Fault:
    if kind not in get_args(PostKind):
        raise ValueError(f'kind must be "webhook" or "callback", got {kind!r}')
    fault = Fault.delay(0.0, times, execution_id=execution_id)
    return attrs.evolve(fault, post=kind, delays=delays)


@attrs.define
class FaultQueue:
    """Faults in the order of injection. Each request or post takes the first that matches it.

    Any thread may add faults, and the server's thread takes them.
    """

    _pending: list[Fault] = attrs.field(factory=list, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._pending.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._pending.clear()

    def take(self, concerns: Callable[[Fault], bool]) -> Fault | None:
        with self._lock:
            for index, fault in enumerate(self._pending):
                if concerns(fault):
                    if fault.times == 1:
                        del self._pending[index]
                    elif fault.times is not None:
                        self._pending[index] = attrs.evolve(fault, times=fault.times - 1)
                    return fault
        return None


async def _send(
    request: web.BaseRequest,
    response: web.StreamResponse,
    chunks: Iterable[bytes],
    interval: float = 0.0,
) -> web.StreamResponse:
    with suppress(ConnectionError):
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(interval)
    return response
