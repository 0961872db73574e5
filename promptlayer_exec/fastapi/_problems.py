"""Errors as problem+json: whose fault it is, in words that are ours.

https://www.rfc-editor.org/rfc/rfc9457
"""

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

from ._json import dump_json

logger = logging.getLogger("promptlayer_exec.fastapi")

_URN = "urn:promptlayer-exec:"
_RETRY_AFTER = 5.0
_LONGEST_RETRY_AFTER = 3600.0


class _Meaning(NamedTuple):
    status: int
    title: str


_REFUSED = "PromptLayer refused this server's credentials."
_INVALID = "PromptLayer refused the request as invalid."
_UNREADABLE = "PromptLayer's answer could not be read."

# An error's own str() is never shown: it may hold the upstream's words, and its address.
_MEANINGS: Mapping[type[Exception], _Meaning] = {
    BadRequest: _Meaning(422, _INVALID),
    Unauthorized: _Meaning(502, _REFUSED),
    Forbidden: _Meaning(502, _REFUSED),
    NotFound: _Meaning(404, "PromptLayer knows no such execution or workflow."),
    UnprocessableEntity: _Meaning(422, _INVALID),
    RateLimited: _Meaning(503, "PromptLayer is asked too much for the moment. Try again later."),
    ServerError: _Meaning(502, "PromptLayer failed. Try again later."),
    StatusError: _Meaning(502, "PromptLayer refused the request."),
    ConnectionFailed: _Meaning(502, "PromptLayer could not be reached. Try again later."),
    RequestTimeout: _Meaning(504, "PromptLayer did not answer in time. Try again later."),
    InvalidResponse: _Meaning(502, _UNREADABLE),
    ResponseTooLarge: _Meaning(502, "PromptLayer's answer is larger than this server accepts."),
    StartUnknown: _Meaning(
        502, "The run may have started and be billed: look for it before starting it again."
    ),
    ExecutionTimeout: _Meaning(
        504, "It was not complete in time. It goes on: ask again to follow it further."
    ),
    ExecutionFailed: _Meaning(409, "The execution is complete, and has no output."),
    InvalidOutput: _Meaning(502, "The execution's output is not what was expected of it."),
    SessionClosed: _Meaning(503, "This server is shutting down. Try again."),
    ConfigurationError: _Meaning(500, "This server is not set up to ask PromptLayer."),
    Exception: _Meaning(500, "This server failed."),
}


def describe(error: Exception) -> tuple[str, str]:
    """Return the kind of an error and what a client may be told of it; the rest is logged."""
    known = _known(error)
    if known is Exception:
        logger.error("an error that a client was not told of", exc_info=error)
        return "InternalServerError", _MEANINGS[known].title
    if _MEANINGS[known].status >= 500:
        logger.warning("%s: %s", type(error).__name__, error)
    return known.__name__, _MEANINGS[known].title


def _known(error: Exception) -> type[Exception]:
    return next(cls for cls in type(error).__mro__ if cls in _MEANINGS)


def add_error_handlers(app: Starlette) -> None:
    """Let an app answer this library's errors as problem+json.

    The routes of `create_router` do so by themselves; this is for an app's own.
    """
    app.add_exception_handler(PromptLayerExecError, _answer)


async def _answer(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's
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
        wait = _RETRY_AFTER if error.retry_after is None else error.retry_after
        headers["Retry-After"] = str(max(1, math.ceil(min(wait, _LONGEST_RETRY_AFTER))))
    return problem(_MEANINGS[_known(error)].status, title, _URN + kind, headers, **members)


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
    """A route that answers whatever its dependencies and itself refuse as problem+json."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with its errors turned into responses."""
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
