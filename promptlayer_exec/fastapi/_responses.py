"""JSON responses, and errors as problem+json with our own status and text.

https://www.rfc-editor.org/rfc/rfc9457
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Collection, Coroutine, Mapping
from http.client import responses
from typing import Any

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
    InvalidInputs,
    InvalidOutput,
    InvalidResponse,
    KeyConflict,
    NotFound,
    PromptLayerExecError,
    RateLimited,
    RequestTimeout,
    ResponseTooLarge,
    ServerError,
    SessionClosed,
    StartUnknown,
    StatusError,
    StoreUnavailable,
    Unauthorized,
    UnprocessableEntity,
)
from promptlayer_exec._integration import log_text
from promptlayer_exec.webhooks import InvalidSignature

logger = logging.getLogger("promptlayer_exec.fastapi")

_JSON = "application/json"
# Possessive quantifiers: otherwise the engine stores a state for each character of a text.
_STRING_OR_NOT_JSON = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|NaN|-?Infinity')
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_URN = "urn:promptlayer-exec:"
_REFUSED = "PromptLayer refused this server's credentials."
_INVALID = "PromptLayer refused the request as invalid."

# Each error's status, what happened, and what a client can do. Clients never get an error's str(),
# which may contain PromptLayer's text and address.
_PROBLEMS: Mapping[type[Exception], tuple[int, str, str]] = {
    BadRequest: (422, _INVALID, ""),
    InvalidInputs: (422, "Inputs that the workflow requires are missing.", ""),
    KeyConflict: (422, "The key belongs to another request.", "Use another key."),
    InvalidSignature: (401, "The webhook's signature is not valid.", ""),
    Unauthorized: (502, _REFUSED, ""),
    Forbidden: (502, _REFUSED, ""),
    NotFound: (404, "The execution or workflow does not exist.", ""),
    UnprocessableEntity: (422, _INVALID, ""),
    RateLimited: (503, "This server exceeded PromptLayer's rate limit.", "Try again later."),
    ServerError: (502, "PromptLayer failed.", "Try again later."),
    StatusError: (502, "PromptLayer refused the request.", ""),
    ConnectionFailed: (502, "This server could not reach PromptLayer.", "Try again later."),
    RequestTimeout: (504, "PromptLayer did not respond in time.", "Try again later."),
    InvalidResponse: (502, "This server could not read PromptLayer's response.", ""),
    ResponseTooLarge: (502, "PromptLayer's response is larger than this server accepts.", ""),
    StartUnknown: (
        502,
        "The run may have started, and you may be billed:",
        "look in PromptLayer before starting it again.",
    ),
    ExecutionTimeout: (
        504,
        "The execution did not complete in time.",
        "It is still running: request it again.",
    ),
    ExecutionFailed: (409, "The execution completed without an output.", ""),
    InvalidOutput: (502, "The execution's output does not have the expected structure.", ""),
    StoreUnavailable: (503, "This server's database is unavailable.", "Try again later."),
    SessionClosed: (503, "This server is shutting down.", "Try again."),
    ConfigurationError: (500, "This server is not configured for PromptLayer.", ""),
    Exception: (500, "This server failed.", ""),
}


def dump_json(value: Any) -> str:
    """Return a value as one line of JSON that conforms to RFC 8259 and can be encoded as UTF-8.

    `NaN` and the infinities become null, as in `JSON.stringify`. A lone surrogate becomes U+FFFD,
    the replacement character. A value with too many levels raises `RecursionError`.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if "NaN" in text or "Infinity" in text:
        text = _STRING_OR_NOT_JSON.sub(lambda m: m[0] if m[0][0] == '"' else "null", text)
    if text.isascii():
        return text
    return _LONE_SURROGATE.sub("\ufffd", text)


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None, media_type: str = _JSON
) -> Response:
    """Return a response that no cache stores."""
    all_headers = {"Cache-Control": "no-store", **(headers or {})}
    return Response(dump_json(value), status, all_headers, media_type)


def tagged_response(
    body: bytes, tag: str | None, if_none_match: str, media_type: str = _JSON
) -> Response:
    """Return a response that a browser may keep but must validate. Without a tag, it may not."""
    if tag is None:
        return Response(body, headers={"Cache-Control": "no-store"}, media_type=media_type)
    headers = {"Cache-Control": "private, no-cache", "ETag": f"W/{tag}"}
    if tag in if_none_match:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=media_type)


def describe(error: Exception) -> tuple[int, str, str]:
    """Return an error's status, and the type and text that a client may see."""
    known = _known_class(error)
    status, what, advice = _PROBLEMS[known]
    title = f"{what} {advice}".rstrip()
    if known is Exception:
        return status, "InternalServerError", title
    if isinstance(error, ExecutionTimeout) and error.execution_id is None:
        title = "The run did not start in time. Try again."
    return status, known.__name__, title


def describe_retry(error: Exception) -> tuple[str, str]:
    """Return the type and text for an error that this server retries by itself."""
    known = _known_class(error)
    return known.__name__, f"{_PROBLEMS[known][1]} Trying again."


def _known_class(error: Exception) -> type[Exception]:
    return next(cls for cls in type(error).__mro__ if cls in _PROBLEMS)


def describe_and_log(error: Exception) -> tuple[int, str, str]:
    """Do what `describe` does, and log what the client may not see."""
    status, kind, title = describe(error)
    if kind == "InternalServerError":
        logger.error("error in a route (the client got no details)", exc_info=error)
    elif status >= 500:
        logger.warning("%s", log_text(error))
    return status, kind, title


def add_error_handlers(app: Starlette) -> None:
    """Make an app respond to this package's errors with problem+json.

    The routes of `create_router` already do so. This is for your own routes.
    """
    app.add_exception_handler(PromptLayerExecError, _handle)


async def _handle(_request: Request, error: Exception, *, hidden: Collection[str] = ()) -> Response:
    status, kind, title = describe_and_log(error)
    members: dict[str, Any] = {}
    headers = {}
    if (execution_id := getattr(error, "execution_id", None)) is not None:
        members["execution_id"] = str(execution_id)

    if isinstance(error, ExecutionFailed):
        failed = [{"name": node.name, "error_message": node.error_message} for node in error.failed]
        if "error_message" in hidden:
            failed = [{"name": node.name} for node in error.failed]
        members["failed"] = failed

    if isinstance(error, InvalidInputs):
        members["missing"] = error.missing

    if isinstance(error, RateLimited | StoreUnavailable):
        seconds = 5.0
        if isinstance(error, RateLimited) and error.retry_after is not None:
            seconds = min(error.retry_after, 3600.0)
        headers["Retry-After"] = str(max(1, math.ceil(seconds)))

    return problem(status, title, _URN + kind, headers, **members)


def problem(
    status: int, title: str, kind: str, headers: Mapping[str, str] | None, **members: Any
) -> Response:
    content = {"type": kind, "title": title, "status": status, **members}
    return json_response(content, status, headers, "application/problem+json")


class ProblemRoute(APIRoute):
    """A route that responds to its errors, and those of its dependencies, with problem+json."""

    hidden: Collection[str] = ()  # the fields of a node to leave out of problems

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except PromptLayerExecError as error:
                return await _handle(request, error, hidden=self.hidden)
            except HTTPException as error:
                status, headers = error.status_code, error.headers
                title = responses.get(status, "Error")
                return problem(status, title, "about:blank", headers, detail=error.detail)
            except RequestValidationError as error:
                errors = [
                    {key: mistake[key] for key in ("loc", "msg", "type")}
                    for mistake in error.errors()
                ]
                title = "The request is invalid."
                return problem(422, title, f"{_URN}InvalidRequest", None, errors=errors)

        return answer
