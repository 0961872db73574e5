"""When an execution and its nodes ran, as far as viewers saw it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from promptlayer_exec import NodeTimes, Snapshot


@attrs.frozen
class Timeline:
    """The times of an execution, in seconds. What was over before a viewer looked has none."""

    origin: float | None = None  # when a viewer polled it first, since 1970
    elapsed: float | None = None  # from then to the latest poll
    nodes: Mapping[str, NodeTimes] = attrs.Factory(dict)  # since the origin

    @classmethod
    def read(cls, row: Mapping[str, Any] | None) -> Timeline:
        """Return the times in a row of the history."""
        if row is None or row["origin"] is None:
            return cls()

        nodes = {name: NodeTimes(*times) for name, times in json.loads(row["times"]).items()}
        elapsed = None
        if row["duration"] is not None:
            elapsed = row["began"] + row["duration"] - row["origin"]
        return cls(row["origin"], elapsed, nodes)

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
            self._over = frozenset(node.name for node in snapshot.nodes.values() if node.final)

        origin = self.remembered.origin or self._polled
        offset = self._polled - origin

        nodes = {}
        for name, seen in snapshot.times.items():
            remembered = self.remembered.nodes.get(name, NodeTimes())
            running, final = remembered.running, remembered.final
            if running is None and seen.running is not None:
                running = seen.running + offset
            if final is None and seen.final is not None and name not in self._over:
                final = seen.final + offset
            nodes[name] = NodeTimes(running, final)

        return Timeline(origin, offset + snapshot.elapsed, nodes)
