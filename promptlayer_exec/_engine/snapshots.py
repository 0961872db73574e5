"""Making a snapshot of an answer."""

from __future__ import annotations

from collections.abc import Mapping

from promptlayer_exec._api.messages import Reply
from promptlayer_exec._api.runs import NodeMap
from promptlayer_exec._models import FINAL, FrozenMap, Node, NodeStatus, NodeTimes, Snapshot


def take_snapshot(
    execution_id: int, reply: Reply[NodeMap], *, elapsed: float, previous: Snapshot | None = None
) -> Snapshot:
    """Return the snapshot of a reply; it keeps the node times of the previous snapshot."""
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


_UNSEEN = NodeTimes()
_RUNNING = NodeStatus.RUNNING


def _first_seen(
    nodes: Mapping[str, Node], before: Mapping[str, NodeTimes], elapsed: float
) -> Mapping[str, NodeTimes]:
    times = {**dict.fromkeys(nodes, _UNSEEN), **before}
    running, final = NodeTimes(elapsed), NodeTimes(None, elapsed)  # shared
    for name, node in nodes.items():
        seen, status = times[name], node.status
        if status in FINAL:
            if seen.final is None:
                times[name] = final if seen is _UNSEEN else NodeTimes(seen.running, elapsed)
        elif status is _RUNNING and seen.running is None:
            times[name] = running if seen is _UNSEEN else NodeTimes(elapsed, seen.final)
    return FrozenMap(times)
