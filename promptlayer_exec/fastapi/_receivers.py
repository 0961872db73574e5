"""Routes for what PromptLayer posts: a workspace's webhooks, and the callbacks of starts."""

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

from promptlayer_exec import ConfigurationError, Session, SessionClosed
from promptlayer_exec import _integration as integration
from promptlayer_exec.fastapi._responses import ProblemRoute, store_is_away
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

_BODY_TIMEOUT = 30.0


def create_webhook_router(session: Session | Callable[..., Any], *, secret: str) -> APIRouter:
    """Return the route `POST /webhook`, which wakes the execution that a webhook is about.

    It answers 204 and only then polls, in this process and if somebody follows the execution here.
    A webhook that is repeated, or is about something else than an execution, does no harm. Without
    a valid signature, the answer is 401; for a body over 1 MiB, 413.

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

    A callback to a start whose answer was lost ends `Session.recover`. With `Session(starts=...)`,
    the id is recorded before the answer, whichever process has sent the start; while the record is
    away, the response is a 503, so that the callback comes again. Every callback wakes the
    execution, as a webhook does; only the execution's id in it counts, whatever its output is. For
    a token that was not made with the secret of `callbacks`, the answer is 404; for a body over the
    session's `max_response_bytes`, 413; for one without an id, 422.

    Args:
        session: the open `Session`, or a dependency that returns it.
        callbacks: those of the session.
        on_callback: called with the token and the execution's id, for example to store them for
            other processes; may be async. It may be called several times for one callback. The
            answer is sent when it has returned; if it raises, that is a 500.

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
        """Receive the callback of a start, at the start's own URL."""
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
        try:
            await integration.resolve_start(session, token, execution_id)
        except ConfigurationError as error:
            raise store_is_away(error, "Send this callback again.") from error

        if on_callback is not None:
            result = on_callback(token, execution_id)
            if isawaitable(result):
                await result

        return _accepted(session, execution_id, "callback")

    return router


def _accepted(
    session: Session, execution_id: int, source: Literal["webhook", "callback"]
) -> Response:
    """Return a 204 after which the execution is polled."""

    async def wake() -> None:
        with suppress(SessionClosed):  # then nobody follows it here
            integration.wake(session, execution_id, source)

    return Response(status_code=204, background=BackgroundTask(wake))


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
