"""What is said of an execution, as JSON that every parser reads."""

import json
import re
from typing import Any

_STRING_OR_NO_JSON = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity')
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def dump_json(value: Any) -> str:
    """Write a value as one line of JSON, in what RFC 8259 and UTF-8 allow.

    `NaN` and the infinities become null, as in `JSON.stringify`, and a lone surrogate becomes
    U+FFFD, the replacement character.

    Raises:
        RecursionError: the value is nested too deeply.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        text = _STRING_OR_NO_JSON.sub(lambda m: m[0] if m[0][0] == '"' else "null", text)
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)
