"""Makes a snapshot of a response."""

from __future__ import annotations

from collections.abc import Mapping

from promptlayer_exec._api.messages import Reply
from promptlayer_exec._api.runs import NodeMap
from promptlayer_exec._values.models import FINAL, FrozenMap, Node, NodeStatus, NodeTimes, Snapshot


def take_snapshot(
    execution_id: int, reply: Reply[NodeMap], *, elapsed: float, previous: Snapshot | None = None
) -> Snapshot:
    """Return the snapshot of a reply. It keeps the node times of the previous snapshot."""
    nodes = reply.value.nodes
    times: Mapping[str, NodeTimes] = {} if previous is None else previous.times
    if previous is None or nodes is not previous.nodes:
        times = _first_seen(nodes, times, elapsed)

    return Snapshot(
        execution_id,
        reply.value.complete,
        nodes,
        raw=reply.value.raw,
        poll=1 if previous is None else previous.poll + 1,
        elapsed=elapsed,
        times=times,
    )


def _first_seen(
    nodes: Mapping[str, Node], before: Mapping[str, NodeTimes], elapsed: float
) -> Mapping[str, NodeTimes]:
    # Nodes first seen in the same poll share one object, because in most executions, the times of
    # most nodes are equal.
    unseen, running, final = NodeTimes(), NodeTimes(elapsed), NodeTimes(None, elapsed)
    times = {**dict.fromkeys(nodes, unseen), **before}

    for name, node in nodes.items():
        seen, status = times[name], node.status
        is_first = seen.running is None and seen.final is None
        if status in FINAL:
            if seen.final is None:
                times[name] = final if is_first else NodeTimes(seen.running, elapsed)
        elif status is NodeStatus.RUNNING and seen.running is None:
            times[name] = running if is_first else NodeTimes(elapsed, seen.final)
    return FrozenMap(times)
