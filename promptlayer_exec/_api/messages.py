"""Requests and responses as plain data, and the checks of every response."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Generic, NoReturn, TypeVar

import attrs

from promptlayer_exec._api.json import loads
from promptlayer_exec._errors import InvalidResponse

T = TypeVar("T")

_EXCERPT = 200
# Bounds the memory of a decoded body: at most one value per this many bytes of the limit.
_BYTES_PER_VALUE = 64
_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+", re.ASCII)


@attrs.frozen
class Request:
    """A request to the server.

    `target` is the path and query below the base URL, percent-encoded.
    """

    method: str
    target: str
    execution_id: int | None = None
    body: bytes | None = None


@attrs.define
class Response:
    """A response of the server; the body is decompressed, and `retry_after` in seconds."""

    status: int
    body: bytes
    location: str | None = None
    retry_after: float | None = None


@attrs.define
class Reply(Generic[T]):
    """The value of a successful response, with the measurements of `Polled`.

    `sent_at` is when the rate allowed the request, on the event loop's clock. A `shared` one is an
    answer to another process.
    """

    value: T
    body_bytes: int
    sent_at: float
    duration: float
    lateness: float
    retry_after: float | None
    shared: bool = False


def decode(response: Response) -> Any:
    """Return the JSON value in a body, or raise an `InvalidResponse`."""
    try:
        return loads(response.body)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        what = f"the {response.status} response is not JSON ({error})"
        if isinstance(error, json.JSONDecodeError):
            error.doc = ""  # it is the whole body, at up to four bytes per character
        raise invalid(response, what, reason=str(error)) from error
    except (ValueError, RecursionError) as error:  # too many digits, or nested too deeply
        invalid_shape(response, "$", f"the JSON cannot be read ({error})", error)


def is_object(body: bytes) -> bool:
    try:
        return isinstance(loads(body), dict)
    except (ValueError, RecursionError):
        return False


def oversize_reason(body: bytes, limit: int) -> str:
    """Return how a JSON body exceeds a limit in bytes, in words; empty if it does not."""
    # A decoded body takes up to fifty times its size, so one under a sixth of the limit takes less
    # than nine times the limit, and is not counted.
    if len(body) <= limit // 6:
        return ""
    if len(body) > limit:
        return f"is larger than {limit} bytes"
    values = max(limit // _BYTES_PER_VALUE, 1000)
    if sum(map(body.count, (b",", b"[", b"{"))) > values:
        return f"holds more than {values:,} values, the most for {limit} bytes"
    return ""


def invalid_shape(
    response: Response, path: str, reason: str, cause: BaseException | None = None
) -> NoReturn:
    """Raise the `InvalidResponse` for JSON that is not of the documented shape."""
    what = f"the {response.status} response has an unexpected shape: {path}: {reason}"
    raise invalid(response, what, path=path, reason=reason) from cause


def invalid(response: Response, what: str, **fields: Any) -> InvalidResponse:
    return InvalidResponse(what, status=response.status, excerpt=excerpt(response.body), **fields)


def excerpt(body: bytes) -> str:
    return body[:_EXCERPT].decode("utf-8", "replace")


def read_retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return the seconds that a server asks to wait; None without a valid header.

    `headers` is case-insensitive, and `now` is in seconds since the epoch.

    https://www.rfc-editor.org/rfc/rfc9110#field.retry-after
    """
    milliseconds = headers.get("retry-after-ms")
    if milliseconds and (number := _number(milliseconds)) is not None:
        return number / 1000
    if not (value := headers.get("Retry-After")):
        return None
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        date = parsedate_to_datetime(value)
        at = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(at - now, 0.0)


def _number(value: str) -> float | None:
    value = value.strip()  # `float` does not strip all the white space that this does
    return float(value) if _NUMBER.fullmatch(value) else None
