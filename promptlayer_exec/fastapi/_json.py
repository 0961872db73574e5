"""JSON that every parser can read."""

from __future__ import annotations

import json
import re
from typing import Any

_STRING_OR_NOT_JSON = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity')
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def dump_json(value: Any) -> str:
    """Return a value as one line of JSON that conforms to RFC 8259 and can be encoded as UTF-8.

    `NaN` and the infinities become null, as in `JSON.stringify`. A lone surrogate becomes U+FFFD,
    the replacement character.

    Raises:
        RecursionError: the value is nested too deeply.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        text = _STRING_OR_NOT_JSON.sub(lambda m: m[0] if m[0][0] == '"' else "null", text)
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)
