"""Values as a model can read them: bounded, and with nothing that a client cannot decode."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic_core import from_json

T = TypeVar("T")

# A result has its output twice, as data and as text; both together stay under 100,000 characters.
LONGEST = 20_000


def show(name: str, value: Any, start: int = 0, length: int | None = None) -> dict[str, Any]:
    """Return a field with a value as it is, or, with its range, a part of the value's text.

    It is shown as it is if it is small, and every client can decode it. A string is its own text;
    any other value is written as JSON. Fewer characters than `length` are shown where they would
    take too much space.
    """
    text = clean(value) if isinstance(value, str) else encode(value)
    is_whole = start == 0 and (length is None or length >= len(text))
    if is_whole and len(encode(value)) <= LONGEST and _is_plain(value):
        return {name: value}

    part = text[start:][: LONGEST if length is None else min(length, LONGEST)]
    while (size := len(encode(part)) - 2) > LONGEST:  # escapes take space, too
        part = part[: len(part) * LONGEST // size]

    shown = {"start": start, "end": start + len(part), "size": len(text)}
    return {name: part, f"{name}_range": shown}


def fitting(entries: Iterable[T]) -> list[T]:
    """Return the first entries, as many as there is space for."""
    fits, left = [], 10_000  # characters of JSON
    for entry in entries:
        left -= len(encode(entry))
        if left < 0:
            break
        fits.append(entry)
    return fits


def encode(value: Any) -> str:
    return clean(json.dumps(value, ensure_ascii=False))


def clean(text: str) -> str:
    """Escape lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode()


def clip(text: str, length: int) -> str:
    """Shorten a text, and say how long it is."""
    text = clean(text)
    if len(text) <= length:
        return text
    return f"{text[:length]}... ({len(text):,} characters in all)"


def _is_plain(value: Any) -> bool:
    """Return whether a value is standard JSON, and no deeper than the SDK's client reads."""
    try:
        from_json(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except ValueError:
        return False
    return True
