"""When an execution and its nodes ran, as far as viewers saw it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from promptlayer_exec import NodeTimes, Snapshot


@attrs.frozen
class Timeline:
    """The times of an execution, in seconds; what was over before a viewer looked has none."""

    origin: float | None = None  # when a viewer polled it first, since 1970
    elapsed: float | None = None  # from then to the latest poll
    nodes: Mapping[str, NodeTimes] = attrs.Factory(dict)  # since the origin

    @classmethod
    def read(cls, line: Mapping[str, Any] | None) -> Timeline:
        """Return what a line of the history says."""
        if line is None or line["origin"] is None:
            return cls()
        nodes = {name: NodeTimes(*times) for name, times in json.loads(line["times"]).items()}
        elapsed = None
        if line["duration"] is not None:
            elapsed = line["began"] + line["duration"] - line["origin"]
        return cls(line["origin"], elapsed, nodes)

    def dump(self) -> str:
        """Return the times of the nodes as the history stores them."""
        nodes = {
            name: [None if at is None else round(at, 3) for at in (times.running, times.final)]
            for name, times in self.nodes.items()
        }
        return json.dumps(nodes)


@attrs.define
class Observation:
    """What one watch sees of an execution, after what earlier viewers remember."""

    remembered: Timeline
    is_new: bool  # this viewer started the run, and therefore saw all of it
    _polled: float | None = None  # when the first poll was, in seconds since 1970
    _over: frozenset[str] = frozenset()  # nodes that were final by then: nobody saw when

    def update(self, snapshot: Snapshot, now: float) -> Timeline:
        """Return the times with those of the next snapshot, received at `now`."""
        if self._polled is None:
            if snapshot.complete and not self.is_new:
                return self.remembered
            self._polled = now - snapshot.elapsed
            self._over = frozenset(n.name for n in snapshot.nodes.values() if n.final)
        origin = self.remembered.origin or self._polled
        offset = self._polled - origin
        nodes = {}
        for name, seen in snapshot.times.items():
            before = self.remembered.nodes.get(name, NodeTimes())
            final = None if name in self._over else seen.final
            nodes[name] = NodeTimes(
                _later(seen.running, offset) if before.running is None else before.running,
                _later(final, offset) if before.final is None else before.final,
            )
        return Timeline(origin, offset + snapshot.elapsed, nodes)


def _later(at: float | None, offset: float) -> float | None:
    return None if at is None else at + offset
