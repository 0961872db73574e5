"""Decoding JSON as the standard library does, naming the kinds of JSON values, and showing them.

With or without msgspec, `loads(body)` returns what `json.loads` returns and raises the same errors:
`ValueError` for a body that is not JSON or has a number with too many digits, `RecursionError` for
one that is nested too deeply.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from types import NoneType
from typing import Any

JSON_KINDS: dict[type, str] = {
    NoneType: "null",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


def json_kind(value: Any) -> str:
    """Return the kind of a value in words for an error message, such as "null" or "a datetime"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    article = "an" if name[0] in "AEIOUaeiou" else "a"
    return JSON_KINDS.get(type(value), f"{article} {name}")


_INDENTING = json.JSONEncoder(ensure_ascii=False, indent=2)
_LONGEST_TO_INDENT = 1_000_000
_TIMES_AS_LONG = 10


def indented(value: Any) -> str:
    """Return a value as JSON to be read by people; on one line if it is very long or deep.

    Indented, a deeply nested one would be hundreds of times as long.
    """
    compact = json.dumps(value, ensure_ascii=False)
    if len(compact) > _LONGEST_TO_INDENT:
        return compact
    most = _TIMES_AS_LONG * len(compact) + 1000
    pieces = []
    with suppress(RecursionError):
        for piece in _INDENTING.iterencode(value):
            pieces.append(piece)
            most -= len(piece)
            if most < 0:
                break
        else:
            return "".join(pieces)
    return compact


try:
    import msgspec
except ImportError:
    loads: Callable[[bytes], Any] = json.loads
else:
    _decode = msgspec.json.Decoder().decode

    def _loads(body: bytes) -> Any:
        try:
            return _decode(body)
        except Exception:  # noqa: BLE001 - NaN, for one, is JSON to the standard library alone
            return json.loads(body)

    loads = _loads
