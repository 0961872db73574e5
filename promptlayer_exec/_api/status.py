"""The errors for refused requests: each status has its class, each body its message."""

from __future__ import annotations

import json
from http.client import responses
from typing import Any

from promptlayer_exec._api.messages import ERROR_BODY_BYTES, Response, invalid
from promptlayer_exec._values import errors
from promptlayer_exec._values.errors import FieldError, StatusError

_CLASSES: dict[int, type[StatusError]] = {
    400: errors.BadRequest,
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    422: errors.UnprocessableEntity,
    429: errors.RateLimited,
}


def check_status(response: Response) -> None:
    """Raise a `StatusError`, or, for a 2xx other than 200 and 202, an `InvalidResponse`."""
    if response.status >= 300:
        raise status_error(response)
    if response.status not in (200, 202):
        name = status_name(response.status)
        what = f"the server returned {name}, but PromptLayer documents only 200 and 202"
        raise invalid(response, what, path="$")


def status_error(response: Response) -> StatusError:
    """Return the error for a redirect or an error status, of a subclass if it is documented."""
    status = response.status
    name = status_name(status)
    body = _decoded(response.body[:ERROR_BODY_BYTES])
    message = _server_message(body)

    shown = message
    if status < 400 and response.location:
        target = response.location[:200]
        shown = f"a redirect to {target}, not followed because it would get the API key"

    what = f"the server returned {name}"
    if shown and shown != responses.get(status):  # which would only repeat the name
        what += f": {_one_line(shown)}"

    cls = _CLASSES.get(status, StatusError)
    if status >= 500:
        cls = errors.ServerError
    extra: dict[str, Any] = {}
    if cls is errors.UnprocessableEntity:
        extra["details"] = _details(body)

    return cls(
        what,
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
        text = body[:200].strip()
        if "<" in text:  # a proxy's HTML page is less helpful than the status
            return ""
        return text
    if not isinstance(body, dict):
        return ""

    for key in ("message", "error", "detail"):
        if isinstance(message := body.get(key), str) and message.strip():
            return message.strip()
    return "; ".join(f"{'.'.join(map(str, detail.loc))}: {detail.msg}" for detail in _details(body))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    if len(line) > 500:
        line = f"{line[:500]}..."
    return line


def _details(body: Any) -> tuple[FieldError, ...]:
    """Return FastAPI's list of invalid parameters, without items of another shape."""
    if not isinstance(body, dict) or not isinstance(body.get("detail"), list):
        return ()
    return tuple(
        FieldError(
            loc=tuple(map(_step, item["loc"])),
            msg=str(item.get("msg") or ""),
            type=str(item.get("type") or ""),
        )
        for item in body["detail"]
        if isinstance(item, dict) and isinstance(item.get("loc"), list)
    )


def _step(part: Any) -> int | str:
    """Return one step of a path: an index or a name."""
    if type(part) is int:
        return part
    return str(part)
