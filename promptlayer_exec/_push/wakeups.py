"""Wake-ups that arrive before anybody follows the execution."""

from __future__ import annotations

import math
import time

import attrs

from promptlayer_exec._events import WakeSource

_MOST = 10_000
_SECONDS = 600.0


@attrs.define(eq=False)
class EarlyWakeUps:
    """Remembers the latest wake-ups, by execution id, for ten minutes."""

    # Oldest first: the source of each, and the time at which it arrived.
    _sources: dict[int, tuple[WakeSource, float]] = attrs.field(factory=dict)

    def add(self, execution_id: int, source: WakeSource) -> None:
        self._sources.pop(execution_id, None)
        self._sources[execution_id] = source, time.monotonic()
        if len(self._sources) > _MOST:
            del self._sources[next(iter(self._sources))]

    def source(self, execution_id: int) -> WakeSource | None:
        """Return the source of an execution's wake-up; None if there is none."""
        source, at = self._sources.get(execution_id, (None, -math.inf))
        return source if time.monotonic() - at < _SECONDS else None

    def take(self, execution_id: int) -> WakeSource | None:
        """Forget an execution's wake-up, and return its source."""
        source = self.source(execution_id)
        self._sources.pop(execution_id, None)
        return source
