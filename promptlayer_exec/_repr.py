"""Bounded text: reprs that stay short, whatever a server or a user puts into a value."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from itertools import islice
from typing import Any

LONGEST = 80
_MOST_STATUSES = 8


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = LONGEST

    def repr_dict(self, x: Mapping[Any, Any], level: int) -> str:
        # That of the standard library sorts all keys first.
        if level <= 0 and x:
            return "{...}"
        shown = [
            f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}"
            for key, value in islice(x.items(), self.maxdict)
        ]
        return "{" + ", ".join([*shown, "..."] if len(x) > self.maxdict else shown) + "}"


_SHORT = _Short()


def short_repr(value: Any) -> str:
    """Return the repr of a value in at most 80 characters, reading only a small part of it."""
    text = _SHORT.repr(value)
    half = (LONGEST - 3) // 2
    return text if len(text) <= LONGEST else f"{text[:half]}...{text[-half:]}"


def counts_repr(counts: Mapping[str, int]) -> str:
    """Return the number of nodes with each status, such as `<3 SUCCESS, 1 RUNNING>`."""
    shown = [f"{count} {status!s:.40}" for status, count in islice(counts.items(), _MOST_STATUSES)]
    if len(counts) > _MOST_STATUSES:
        shown.append("...")
    return f"<{', '.join(shown) or 'no nodes'}>"
