"""Text that is safe to show: names, values and messages of a workflow may hold anything."""

import json
from collections.abc import Iterable
from typing import Any
from unicodedata import category

from promptlayer_exec import Node, NodeStatus, NodeTimes, Snapshot

_PREVIEW = 200
_encoder = json.JSONEncoder(ensure_ascii=False)


def printable(text: str, *, keep: str = "") -> str:
    """Return a text in which control characters, and all else that does not print, are escaped.

    Args:
        text: any text, lone surrogates included.
        keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep or category(char) == "Zs" else _escape(char)
        for char in text
    )


def _escape(char: str) -> str:
    return json.dumps(char)[1:-1]


def shorten(text: str, limit: int = _PREVIEW) -> str:
    """Return the start of a text, with an ellipsis where something is missing."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def start_of(value: Any) -> str:
    """Return the start of a value as one line of JSON, however large the value is."""
    if isinstance(value, str):
        value = value[: _PREVIEW + 1]
    text = ""
    for part in _encoder.iterencode(value):
        text += part
        if len(text) > _PREVIEW:
            break
    return shorten(printable(text))


def about(node: Node) -> str:
    """Return what there is to say of a node beside its status: its value or error, or nothing."""
    if node.status == NodeStatus.FAILED:
        return printable(error_of(node))
    if node.value is None and not node.succeeded:
        return ""
    return start_of(node.value)


def error_of(node: Node) -> str:
    """Return why a node failed, as the server tells it."""
    if node.error_message:
        return node.error_message
    raw = node.raw_error_message
    if isinstance(raw, dict):
        raw = raw.get("raw", raw)
    if isinstance(raw, str) and raw:
        return raw
    return "the server gave no reason" if raw in (None, "") else start_of(raw)


def verdict(snapshot: Snapshot) -> str:
    """Return how a complete execution ended."""
    if snapshot.succeeded:
        return "succeeded"
    return "failed" if snapshot.failed_nodes else "failed, as no output node succeeded"


def counted(snapshot: Snapshot) -> str:
    """Return how many nodes have each status, as one line."""
    counts = [f"{count} {printable(status)}" for status, count in snapshot.counts.items()]
    return ", ".join(counts) or "it has no nodes"


def final_of(snapshot: Snapshot) -> str:
    """Return how many nodes are final, and of how many."""
    return f"{sum(node.final for node in snapshot.nodes.values())}/{len(snapshot.nodes)}"


def running_time(times: NodeTimes, now: float) -> str:
    """Return how long a node has run, or ran, as far as the watch saw it begin.

    Args:
        times: when it was first seen running and final.
        now: the present, in seconds into the watch.
    """
    if times.running is None:
        return ""
    return duration((now if times.final is None else times.final) - times.running)


def duration(seconds: float) -> str:
    """Return a duration as people write it."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def width_of(names: Iterable[str], limit: int) -> int:
    """Return the width of the longest name, but `limit` at most."""
    return min(max(map(len, names), default=0), limit)
