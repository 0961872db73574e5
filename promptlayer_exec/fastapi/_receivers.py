"""Routes for what PromptLayer posts: a workspace's webhooks, and the callbacks of runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from inspect import isawaitable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, HTTPException, Request
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from promptlayer_exec import Session, SessionClosed, StoreUnavailable
from promptlayer_exec import _integration as integration
from promptlayer_exec.fastapi._responses import ProblemRoute
from promptlayer_exec.fastapi._router import session_dependency
from promptlayer_exec.fastapi._visible_fields import PROBLEMS
from promptlayer_exec.webhooks import (
    MAX_WEBHOOK_BYTES,
    Callbacks,
    InvalidSignature,
    check_secret,
    read_callback,
    read_webhook,
)

_Source = Literal["webhook", "callback"]

_BODY_TIMEOUT = 30.0


def create_webhook_router(session: Session | Callable[..., Any], *, secret: str) -> APIRouter:
    """Return the route `POST /webhook`, which wakes the execution that a webhook is about.

    It responds 204, and then polls if somebody follows the execution in this process. Repeated
    webhooks, and webhooks about something else, do no harm. The response is 401 without a valid
    signature, and 413 for a body over 1 MiB.

    Args:
        session: the open `Session`, or a dependency that returns it.
        secret: the webhook's secret, from PromptLayer's settings.

    Raises:
        ConfigurationError: the secret is empty.
        TypeError: an argument has the wrong type.
    """
    check_secret(secret)
    opened = session_dependency(session)
    router = APIRouter(route_class=ProblemRoute, responses=PROBLEMS, tags=["promptlayer"])

    @router.post("/webhook", status_code=204)
    async def receive_webhook(
        request: Request,
        x_promptlayer_signature: Annotated[str | None, Header()] = None,
        session: Session = opened,
    ) -> Response:
        """Receive a webhook that PromptLayer signed."""
        body = await _read_body(request, MAX_WEBHOOK_BYTES)
        try:
            webhook = read_webhook(body, x_promptlayer_signature, secret)
        except InvalidSignature:
            raise
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

        if webhook.execution_id is None:
            return Response(status_code=204)
        return _accepted(session, webhook.execution_id, "webhook")

    return router


def create_callback_router(
    session: Session | Callable[..., Any],
    *,
    callbacks: Callbacks,
    on_callback: Callable[[str, int], Awaitable[object] | object] | None = None,
) -> APIRouter:
    """Return the route `POST /callbacks/{token}`, for the callbacks of `Session(callbacks=...)`.

    If the response to a start request was lost, the callback lets `Session.recover` return. With
    `Session(starts=...)`, the route stores the id before it responds, even if another process sent
    the request. If the store is unavailable, the response is 503. Nothing documents that
    PromptLayer repeats a callback, so the session also keeps the id, and stores it as soon as it
    can. Each callback also wakes the execution, as a webhook does. Only the execution id in it
    counts, not the output.

    The response is 404 if another secret than that of `callbacks` made the token, 413 for a body
    over the session's `max_response_bytes`, and 422 for one without an id.

    Args:
        session: the open `Session`, or a dependency that returns it.
        callbacks: those of the session.
        on_callback: a function, which may be async. The route calls it with the token and the
            execution id, for example to store them for other processes, and may do so several times
            for one callback. It responds after the function returns, or with 500 if it raises.

    Raises:
        TypeError: an argument has the wrong type.
    """
    if not isinstance(callbacks, Callbacks):
        raise TypeError(
            f"callbacks must be a promptlayer_exec.webhooks.Callbacks, got {callbacks!r:.100}"
        )
    opened = session_dependency(session)
    router = APIRouter(route_class=ProblemRoute, responses=PROBLEMS, tags=["promptlayer"])

    @router.post("/callbacks/{token}", status_code=204)
    async def receive_callback(request: Request, token: str, session: Session = opened) -> Response:
        """Receive the callback of a run, at the run's own URL."""
        if not callbacks.is_genuine(token):
            raise HTTPException(404)

        most = integration.settings(session).max_response_bytes
        body = await _read_body(request, most)
        if too_large := integration.oversize_reason(body, most):
            raise HTTPException(413, f"The body {too_large}.")
        try:
            execution_id = read_callback(body).execution_id
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

        integration.receive_callback(session, token, execution_id)
        unavailable = None
        try:
            await integration.resolve_start(session, token, execution_id)
        except StoreUnavailable as error:
            unavailable = error  # PromptLayer may not repeat the callback, so use it all the same

        if on_callback is not None:
            result = on_callback(token, execution_id)
            if isawaitable(result):
                await result

        if unavailable is not None:
            await _wake(session, execution_id, "callback")
            raise unavailable
        return _accepted(session, execution_id, "callback")

    return router


def _accepted(session: Session, execution_id: int, source: _Source) -> Response:
    """Return a 204, and wake the execution after it is sent."""
    waking = BackgroundTask(_wake, session, execution_id, source)
    return Response(status_code=204, background=waking)


async def _wake(session: Session, execution_id: int, source: _Source) -> None:
    with suppress(SessionClosed):  # then nobody follows it here
        integration.wake(session, execution_id, source)


async def _read_body(request: Request, limit: int) -> bytes:
    """Return the body of a request, unless it is too large or too slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise HTTPException(413, f"The body is larger than {limit} bytes.")
    except TimeoutError:
        raise HTTPException(408, f"The body did not arrive in {_BODY_TIMEOUT:g} s.") from None
    except ClientDisconnect:
        raise HTTPException(499, "The client disconnected.") from None
    return bytes(body)
