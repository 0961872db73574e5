"""Values for models: limited in length, and without anything that a client cannot decode."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic_core import from_json

T = TypeVar("T")

# A result contains its output twice, as data and as text, in less than 100,000 characters.
LONGEST = 20_000


def show(name: str, value: Any, start: int = 0, length: int | None = None) -> dict[str, Any]:
    """Return a field with a value as it is, or with a part of the value's text and its range.

    A small value that every client can decode stays as it is. The text of a string is the string,
    and the text of any other value is its JSON. The part is shorter than `length` if it takes too
    much space.
    """
    text = clean(value) if isinstance(value, str) else encode(value)
    is_whole = start == 0 and (length is None or length >= len(text))
    if is_whole and len(encode(value)) <= LONGEST and _is_plain(value):
        return {name: value}

    part = text[start:][: LONGEST if length is None else min(length, LONGEST)]
    while (size := len(encode(part)) - 2) > LONGEST:  # escapes also take space
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
    """Return a text, or its start with the length of the whole."""
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
