"""JSON that every parser can read, and responses of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_JSON = "application/json"
_STRING_OR_NOT_JSON = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity')
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def dump_json(value: Any) -> str:
    """Return a value as one line of JSON that conforms to RFC 8259 and can be encoded as UTF-8.

    `NaN` and the infinities become null, as in `JSON.stringify`. A lone surrogate becomes U+FFFD,
    the replacement character. A value that is nested too deeply is a `RecursionError`.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if "NaN" in text or "Infinity" in text:
        text = _STRING_OR_NOT_JSON.sub(lambda m: m[0] if m[0][0] == '"' else "null", text)
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None, media_type: str = _JSON
) -> Response:
    """Return a response that no cache stores."""
    all_headers = {"Cache-Control": "no-store", **(headers or {})}
    return Response(dump_json(value), status, all_headers, media_type)
