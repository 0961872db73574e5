"""The errors of refused requests: the class for a status, and the server's message in a body."""

from __future__ import annotations

import json
from http.client import responses
from typing import Any

from promptlayer_exec import _errors
from promptlayer_exec._api.messages import Response, invalid
from promptlayer_exec._errors import FieldError, StatusError

_LONGEST_QUOTE = 200
_LONGEST_MESSAGE = 500

_CLASSES: dict[int, type[StatusError]] = {
    400: _errors.BadRequest,
    401: _errors.Unauthorized,
    403: _errors.Forbidden,
    404: _errors.NotFound,
    422: _errors.UnprocessableEntity,
    429: _errors.RateLimited,
}


def check_status(response: Response) -> None:
    """Raise a `StatusError`, or, for a 2xx other than 200 and 202, an `InvalidResponse`."""
    if response.status >= 300:
        raise status_error(response)
    if response.status not in (200, 202):
        name = status_name(response.status)
        what = f"the server answered {name}, but only 200 and 202 are defined"
        raise invalid(response, what, path="$")


def status_error(response: Response) -> StatusError:
    """Return the error for a redirect or an error status, of a subclass if it is documented."""
    status = response.status
    name = status_name(status)
    body = _decoded(response.body)
    message = shown = _server_message(body)
    if status < 400 and response.location:
        target = response.location[:_LONGEST_QUOTE]
        shown = f"a redirect to {target}, not followed because the key is for base_url alone"
    if shown == responses.get(status):
        shown = ""  # it only repeats the name
    cls = _CLASSES.get(status, _errors.ServerError if status >= 500 else StatusError)
    extra: dict[str, Any] = (
        {"details": _details(body)} if cls is _errors.UnprocessableEntity else {}
    )
    return cls(
        f"the server answered {name}" + (f": {_one_line(shown)}" if shown else ""),
        status=status,
        server_message=message or name,
        body=body,
        retry_after=response.retry_after,
        reason=name,
        **extra,
    )


def status_name(status: int) -> str:
    """Return a status with its standard name, such as `404 Not Found`."""
    return f"{status} {responses.get(status, '')}".rstrip()


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def _server_message(body: Any) -> str:
    """Return the server's error message, or an empty string if the body has none."""
    if isinstance(body, str):
        text = body[:_LONGEST_QUOTE].strip()
        return "" if "<" in text else text  # HTML of a proxy says less than the status
    if not isinstance(body, dict):
        return ""
    for key in ("message", "error", "detail"):
        if isinstance(message := body.get(key), str) and message.strip():
            return message.strip()
    return "; ".join(f"{'.'.join(map(str, detail.loc))}: {detail.msg}" for detail in _details(body))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[:_LONGEST_MESSAGE]}..."


def _details(body: Any) -> tuple[FieldError, ...]:
    """Return FastAPI's list of invalid parameters; items of another shape are left out."""
    items = body.get("detail") if isinstance(body, dict) else None
    if not isinstance(items, list):
        return ()
    return tuple(
        FieldError(
            loc=tuple(part if type(part) is int else str(part) for part in item["loc"]),
            msg=str(item.get("msg") or ""),
            type=str(item.get("type") or ""),
        )
        for item in items
        if isinstance(item, dict) and isinstance(item.get("loc"), list)
    )
