"""What is said of an execution, as JSON that every parser reads."""

import json
import re
from typing import Any

from promptlayer_exec import Node, NodeTimes, Snapshot

_STRING_OR_NO_JSON = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity')
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def dump_json(value: Any) -> str:
    """Write a value as one line of JSON, in what RFC 8259 and UTF-8 allow.

    `NaN` and the infinities become null, as in `JSON.stringify`, and a lone surrogate becomes
    U+FFFD, the replacement character.

    Raises:
        RecursionError: the value is nested too deeply.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        text = _STRING_OR_NO_JSON.sub(lambda m: m[0] if m[0][0] == '"' else "null", text)
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)


def snapshot_view(snapshot: Snapshot) -> dict[str, Any]:
    """Return what a client is told of a snapshot; the id is a string, as it may exceed 2**53."""
    return {
        "execution_id": str(snapshot.execution_id),
        "poll": snapshot.poll,
        "elapsed": round(snapshot.elapsed, 3),
        "complete": snapshot.complete,
        "succeeded": snapshot.succeeded if snapshot.complete else None,
        "progress": snapshot.progress,
        "nodes": {node.name: node_view(node, snapshot) for node in snapshot.nodes.values()},
    }


def node_view(node: Node, snapshot: Snapshot) -> dict[str, Any]:
    """Return what a client is told of one node of a snapshot."""
    times = snapshot.times.get(node.name, NodeTimes())
    return {
        "name": node.name,
        "status": node.status,
        "value": node.value,
        "error_message": node.error_message,
        "raw_error_message": node.raw_error_message,
        "is_output_node": node.is_output_node,
        "running": _rounded(times.running),
        "final": _rounded(times.final),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
