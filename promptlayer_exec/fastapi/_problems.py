"""Errors as problem+json, with a status and a text of our own for each type of error.

https://www.rfc-editor.org/rfc/rfc9457
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Coroutine, Mapping
from http.client import responses
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response

from promptlayer_exec import (
    BadRequest,
    ConfigurationError,
    ConnectionFailed,
    ExecutionFailed,
    ExecutionTimeout,
    Forbidden,
    InvalidOutput,
    InvalidResponse,
    NotFound,
    PromptLayerExecError,
    RateLimited,
    RequestTimeout,
    ResponseTooLarge,
    ServerError,
    SessionClosed,
    StartUnknown,
    StatusError,
    Unauthorized,
    UnprocessableEntity,
)
from promptlayer_exec.fastapi._json import dump_json

logger = logging.getLogger("promptlayer_exec.fastapi")

_URN = "urn:promptlayer-exec:"
_DEFAULT_RETRY_AFTER = 5.0
_MAX_RETRY_AFTER = 3600.0


class _Answer(NamedTuple):
    status: int
    title: str


_REFUSED = "PromptLayer refused this server's credentials."
_INVALID = "PromptLayer refused the request as invalid."
_UNREADABLE = "PromptLayer's answer could not be read."

# An error's own str() is never sent: it may contain PromptLayer's text and address.
_ANSWERS: Mapping[type[Exception], _Answer] = {
    BadRequest: _Answer(422, _INVALID),
    Unauthorized: _Answer(502, _REFUSED),
    Forbidden: _Answer(502, _REFUSED),
    NotFound: _Answer(404, "There is no such execution or workflow."),
    UnprocessableEntity: _Answer(422, _INVALID),
    RateLimited: _Answer(503, "PromptLayer's rate limit was exceeded. Try again later."),
    ServerError: _Answer(502, "PromptLayer failed. Try again later."),
    StatusError: _Answer(502, "PromptLayer refused the request."),
    ConnectionFailed: _Answer(502, "PromptLayer could not be reached. Try again later."),
    RequestTimeout: _Answer(504, "PromptLayer did not answer in time. Try again later."),
    InvalidResponse: _Answer(502, _UNREADABLE),
    ResponseTooLarge: _Answer(502, "PromptLayer's answer is larger than this server accepts."),
    StartUnknown: _Answer(
        502,
        "The run may have started and be billed: look in PromptLayer before starting it again.",
    ),
    ExecutionTimeout: _Answer(
        504,
        "The execution did not complete in time. It is still running: request it again to go on.",
    ),
    ExecutionFailed: _Answer(409, "The execution completed without an output."),
    InvalidOutput: _Answer(502, "The execution's output does not have the expected structure."),
    SessionClosed: _Answer(503, "This server is shutting down. Try again."),
    ConfigurationError: _Answer(500, "This server is not configured for PromptLayer."),
    Exception: _Answer(500, "This server failed."),
}


def describe(error: Exception) -> tuple[str, str]:
    """Return the type of an error and the text that a client may see; the rest is logged."""
    known = _known_type(error)
    if known is Exception:
        logger.error("an error whose details were not sent to the client", exc_info=error)
        return "InternalServerError", _ANSWERS[known].title
    if _ANSWERS[known].status >= 500:
        logger.warning("%s: %s", type(error).__name__, error)
    return known.__name__, _ANSWERS[known].title


def _known_type(error: Exception) -> type[Exception]:
    return next(cls for cls in type(error).__mro__ if cls in _ANSWERS)


def add_error_handlers(app: Starlette) -> None:
    """Make an app answer this package's errors as problem+json.

    The routes of `create_router` do so already; this is for routes of your own.
    """
    app.add_exception_handler(PromptLayerExecError, _handle)


async def _handle(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's
    return _from_error(error)


def _from_error(error: Exception) -> Response:
    kind, title = describe(error)
    members: dict[str, Any] = {}
    headers = {}
    execution_id = getattr(error, "execution_id", None)
    if execution_id is not None:
        members["execution_id"] = str(execution_id)
    if isinstance(error, ExecutionFailed):
        members["failed"] = [
            {"name": node.name, "error_message": node.error_message} for node in error.failed
        ]
    if isinstance(error, RateLimited):
        wait = _DEFAULT_RETRY_AFTER if error.retry_after is None else error.retry_after
        headers["Retry-After"] = str(max(1, math.ceil(min(wait, _MAX_RETRY_AFTER))))
    return problem(_ANSWERS[_known_type(error)].status, title, _URN + kind, headers, **members)


def problem(
    status: int,
    title: str,
    kind: str = "about:blank",
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> Response:
    """Return a problem details response."""
    return Response(
        dump_json({"type": kind, "title": title, "status": status, **members}),
        status,
        {"Cache-Control": "no-store", **(headers or {})},
        "application/problem+json",
    )


class ProblemRoute(APIRoute):
    """A route that answers errors of its dependencies and its own as problem+json."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that turns errors into responses."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except PromptLayerExecError as error:
                return _from_error(error)
            except HTTPException as error:
                return problem(
                    error.status_code,
                    responses.get(error.status_code, "Error"),
                    headers=error.headers,
                    detail=error.detail,
                )
            except RequestValidationError as error:
                errors = [{key: e[key] for key in ("loc", "msg", "type")} for e in error.errors()]
                title = "The request is invalid."
                return problem(422, title, f"{_URN}InvalidRequest", errors=errors)

        return answer
