"""Values in words, as short reprs and as JSON for people: short, whatever a server puts in them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from types import NoneType
from typing import Any
from unicodedata import category

LONGEST = 80
_MOST_STATUSES = 8


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST


def short_repr(value: Any) -> str:
    """Return the repr of a value in at most 80 characters, with the keys of dicts sorted."""
    text = _SHORT.repr(value)
    half = (LONGEST - 3) // 2
    return text if len(text) <= LONGEST else f"{text[:half]}...{text[-half:]}"


def counts_repr(counts: Mapping[str, int]) -> str:
    """Return the number of nodes with each status, such as `<3 SUCCESS, 1 RUNNING>`."""
    shown = [f"{count} {status!s:.40}" for status, count in islice(counts.items(), _MOST_STATUSES)]
    if len(counts) > _MOST_STATUSES:
        shown.append("...")
    return f"<{', '.join(shown) or 'no nodes'}>"


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


_LONGEST_TO_INDENT = 1_000_000


def indented(value: Any) -> str:
    """Return a value as JSON to be read by people; on one line if it is very long or deep."""
    compact = json.dumps(value, ensure_ascii=False)
    with suppress(RecursionError):
        if len(compact) <= _LONGEST_TO_INDENT:
            return json.dumps(value, ensure_ascii=False, indent=2)
    return compact


def printable(text: str, *, keep: str = "") -> str:
    """Escape what does not print, such as control characters that could steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in keep or category(char) == "Zs"  # spaces of all kinds
        else char.encode("unicode_escape").decode()
        for char in text
    )
