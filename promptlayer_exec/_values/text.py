"""Short texts for people: reprs, kinds of values, indented JSON, and nothing unprintable."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from types import NoneType
from typing import Any
from unicodedata import category

_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxstring = _short.maxother = _short.maxlong = 80


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, such as `1 min 05 s`."""
    if 0.0 <= seconds < 0.05:
        return "<0.1 s"  # `0.0 s` reads as if it had not run
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def short_repr(value: Any) -> str:
    """Return the repr of a value in at most 80 characters, with sorted dict keys."""
    text = _short.repr(value)
    if len(text) > 80:
        text = f"{text[:38]}...{text[-38:]}"
    return text


def counts_repr(counts: Mapping[str, int]) -> str:
    """Return the number of nodes with each status, such as `<3 SUCCESS, 1 RUNNING>`."""
    # There are five known statuses, but a server may send any number of others.
    most = 8
    shown = [f"{count} {status!s:.40}" for status, count in islice(counts.items(), most)]
    if len(counts) > most:
        shown.append("...")
    return f"<{', '.join(shown) or 'no nodes'}>"


def message_text(value: Any) -> str | None:
    """Return an error message as text. PromptLayer sends a string, `{"raw": text}` or other JSON.

    Empty objects, arrays and the like are no message.
    """
    if isinstance(value, dict):
        value = value.get("raw", value)
    if isinstance(value, str):
        return value
    if not value:
        return None

    with suppress(RecursionError):
        return json.dumps(value, ensure_ascii=False)
    return short_repr(value)


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
    """Return the kind of a value for an error message, such as "null" or "a datetime"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if type(value) in JSON_KINDS:
        return JSON_KINDS[type(value)]

    name = type(value).__name__
    if name[0] in "AEIOUaeiou":
        return f"an {name}"
    return f"a {name}"


def indented(value: Any) -> str:
    """Return a value as JSON for people, on one line if it is very long or deep."""
    compact = json.dumps(value, ensure_ascii=False)

    # Indenting runs in recursive Python: with a megabyte, people would notice.
    with suppress(RecursionError):
        if len(compact) <= 1_000_000:
            return json.dumps(value, ensure_ascii=False, indent=2)
    return compact


def printable(text: str, *, keep: str = "") -> str:
    """Escape unprintable characters, such as control characters that could steer a terminal."""
    if text.isprintable():
        return text

    characters = []
    for character in text:
        if character.isprintable() or character in keep or category(character) == "Zs":  # a space
            characters.append(character)
        else:
            characters.append(character.encode("unicode_escape").decode())
    return "".join(characters)


def shown_key(key: Any) -> str:
    """Return the key of a request for a log line, in brackets, or an empty string without one."""
    return "" if key is None else f" (key {short_repr(key)})"
