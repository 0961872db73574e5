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
from promptlayer_exec._values.errors import InvalidResponse

T = TypeVar("T")

# How much of an error's body is kept, because only people read it.
ERROR_BODY_BYTES = 64 * 1024


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
    """A response of the server, with its body decompressed and `retry_after` in seconds."""

    status: int
    body: bytes
    location: str | None = None
    retry_after: float | None = None


@attrs.define
class Reply(Generic[T]):
    """The value of a successful response, with the measurements of `Polled`.

    `sent_at` is when the rate allowed the request, on the event loop's clock. If `shared`, another
    process sent the request.
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
        raise invalid(response, what, reason=str(error)) from error
    except (ValueError, RecursionError) as error:  # too many digits, or nested too deeply
        invalid_shape(response, "$", f"cannot read the JSON ({error})", error)


def is_object(body: bytes) -> bool:
    """Return whether a body is a JSON object."""
    try:
        return isinstance(loads(body), dict)
    except (ValueError, RecursionError):
        return False


def oversize_reason(body: bytes, limit: int) -> str:
    """Return for a message how a JSON body exceeds a limit in bytes, or an empty string."""
    # A decoded body takes up to fifty times its size. One under a sixth of the limit takes less
    # than nine times the limit, so its values are not counted.
    if len(body) <= limit // 6:
        return ""
    if len(body) > limit:
        return f"is larger than {limit} bytes"

    # With one value per 64 bytes of the limit, a decoded body takes about 20 times the limit.
    values = max(limit // 64, 1000)
    if sum(map(body.count, (b",", b"[", b"{"))) > values:
        return f"contains more than {values:,} values, the most for {limit} bytes"
    return ""


def invalid_shape(
    response: Response, path: str, reason: str, cause: BaseException | None = None
) -> NoReturn:
    """Raise the `InvalidResponse` for JSON that is not of the documented shape."""
    what = f"the {response.status} response has an unexpected shape at {path}: {reason}"
    raise invalid(response, what, path=path, reason=reason) from cause


def invalid(response: Response, what: str, **fields: Any) -> InvalidResponse:
    """Return an `InvalidResponse` with the first bytes of the body."""
    return InvalidResponse(what, status=response.status, excerpt=excerpt(response.body), **fields)


def excerpt(body: bytes) -> str:
    """Return the first 200 bytes of a body as text, for an error."""
    return body[:200].decode("utf-8", "replace")


def read_retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return the seconds that a server asks to wait, or None without a valid header.

    `headers` is case-insensitive, and `now` is in seconds since the epoch.

    https://www.rfc-editor.org/rfc/rfc9110#field.retry-after
    """
    milliseconds = headers.get("retry-after-ms")
    if milliseconds and (number := _number(milliseconds)) is not None:
        return number / 1000

    value = headers.get("Retry-After")
    if not value:
        return None
    if (seconds := _number(value)) is not None:
        return seconds

    try:
        date = parsedate_to_datetime(value)
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        at = date.timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(at - now, 0.0)


def _number(value: str) -> float | None:
    """Return a decimal number, or None for other text that `float` reads (`nan`, `1e9`)."""
    value = value.strip()
    if re.fullmatch(r"\d+(\.\d*)?|\.\d+", value, re.ASCII):
        return float(value)
    return None
