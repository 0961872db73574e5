"""Values as a model can read them: bounded, and with nothing that a client cannot decode."""

from __future__ import annotations

import json
import math
from typing import Any

import attrs

# A result has its output twice, as data and as text; both together stay under 100,000 characters.
LONGEST = 20_000
_DEEPEST = 50  # clients and their libraries have limits of their own
_LARGEST = 2**63


@attrs.frozen
class Range:
    """Which characters of a value's text are shown."""

    start: int
    end: int
    size: int

    @property
    def is_cut(self) -> bool:
        """Whether anything is missing."""
        return self.end - self.start < self.size


@attrs.frozen
class Shown:
    """A value as it is, or, with a `range`, characters of its text."""

    value: Any
    range: Range | None = None

    def fields(self, name: str) -> dict[str, Any]:
        """Return the fields of a result under a name."""
        if self.range is None:
            return {name: self.value}
        return {name: self.value, f"{name}_range": attrs.asdict(self.range)}


@attrs.define
class Space:
    """Characters of JSON that are left for a list."""

    left: int = 10_000

    def take(self, entry: object) -> bool:
        """Return True if there is space for one more entry, which is then taken."""
        size = len(encode(entry))
        if size > self.left:
            return False
        self.left -= size
        return True


def show(value: Any, start: int = 0, length: int | None = None) -> Shown:
    """Show a value as it is if it is small and plain, and otherwise a range of its text.

    A string is its own text; any other value is written as JSON.

    Args:
        value: any decoded JSON.
        start: the first character of its text.
        length: how many characters; fewer are shown where they would take too much space.
    """
    text = clean(value) if isinstance(value, str) else encode(value)
    is_whole = start == 0 and (length is None or length >= len(text))
    if is_whole and len(encode(value)) <= LONGEST and _is_plain(value):
        return Shown(value)
    end = len(text) if length is None else min(len(text), start + length)
    end = max(start, min(end, start + LONGEST))
    while (size := len(encode(text[start:end])) - 2) > LONGEST:  # escapes take space, too
        end = start + (end - start) * LONGEST // size
    return Shown(text[start:end], Range(start, end, len(text)))


def encode(value: Any) -> str:
    """Return a value as JSON."""
    try:
        return clean(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return '"(nested too deeply to be shown)"'


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
    """Return whether every client can decode a value as it is."""
    left = [(value, 1)]
    while left:
        it, depth = left.pop()
        if isinstance(it, str):
            if clean(it) != it:
                return False
        elif isinstance(it, float):
            if not math.isfinite(it):
                return False
        elif isinstance(it, int):
            if not -_LARGEST <= it < _LARGEST:
                return False
        elif isinstance(it, dict | list):
            if depth > _DEEPEST:
                return False
            parts = it if isinstance(it, list) else [*it.keys(), *it.values()]
            left.extend((part, depth + 1) for part in parts)
    return True
