"""A dict that forgets: a session remembers recent things in bounded memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

import attrs

K = TypeVar("K")
V = TypeVar("V")


@attrs.define(eq=False)
class ExpiringDict(Generic[K, V]):
    """The latest entries by key: at most `most` of them, and each expires after `seconds`."""

    _seconds: float = math.inf
    _most: int = 10_000
    # Oldest first, with the times at which they were added.
    _entries: dict[K, tuple[V, float]] = attrs.field(init=False, factory=dict)

    def add(self, key: K, value: V) -> None:
        self._entries.pop(key, None)
        self._entries[key] = value, time.monotonic()
        if len(self._entries) > self._most:
            del self._entries[next(iter(self._entries))]

    def get(self, key: K) -> V | None:
        """Return an entry, or None if it is missing or has expired."""
        value, at = self._entries.get(key, (None, -math.inf))
        return value if time.monotonic() - at < self._seconds else None

    def pop(self, key: K) -> V | None:
        value = self.get(key)
        self._entries.pop(key, None)
        return value

    def items(self) -> list[tuple[K, V]]:
        """Return all entries, the oldest first, including those that have expired."""
        return [(key, value) for key, (value, _) in self._entries.items()]

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)
