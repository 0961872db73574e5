"""Text that is safe to print, and the standard streams that it is written to, line by line."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any

from promptlayer_exec import Node, NodeStatus, NodeTimes, Snapshot
from promptlayer_exec._integration import error_text, printable

_PREVIEW = 200
_encoder = json.JSONEncoder(ensure_ascii=False)


def shorten(text: str, limit: int = _PREVIEW) -> str:
    """Return the start of a text, with an ellipsis if characters were cut off."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def preview(value: Any) -> str:
    """Return the start of a value as one line of JSON, at the same cost for values of any size."""
    if isinstance(value, str):
        value = value[: _PREVIEW + 1]
    text = ""
    for part in _encoder.iterencode(value):
        text += part
        if len(text) > _PREVIEW:
            break
    return shorten(printable(text))


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, such as `1 min 05 s`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def running_time(times: NodeTimes, now: float) -> str:
    """Return how long a node ran, or has run until `now`; empty if it was never seen running."""
    if times.running is None:
        return ""
    return duration((now if times.final is None else times.final) - times.running)


def node_detail(node: Node) -> str:
    """Return a node's value, or its error if it failed; empty if it has neither yet."""
    if node.status == NodeStatus.FAILED:
        return printable(failure_reason(node))
    if node.value is None and not node.succeeded:
        return ""
    return preview(node.value)


def failure_reason(node: Node) -> str:
    """Return why a node failed, according to the server."""
    return error_text(node) or "the server gave no reason"


def result_line(snapshot: Snapshot, *, timed: bool = True) -> str:
    """Return how a complete execution ended, after which time, and how its nodes did."""
    verdict = "succeeded" if snapshot.succeeded else "failed"
    if not (snapshot.succeeded or snapshot.failed_nodes):
        verdict = "failed (no output node succeeded)"
    time = f" after {duration(snapshot.elapsed)}" if timed else ""
    counts = [f"{count} {printable(status)}" for status, count in snapshot.counts.items()]
    nodes = ", ".join(counts) or "no nodes"
    return f"execution {snapshot.execution_id} {verdict}{time}: {nodes}"


def final_count(snapshot: Snapshot) -> str:
    """Return how many of the nodes are final, such as `2/3`."""
    return f"{sum(node.final for node in snapshot.nodes.values())}/{len(snapshot.nodes)}"


def prepare_streams() -> None:
    """Make the standard streams accept any text: characters that an encoding lacks are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by what started the program
            null = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(null, "w", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def out(text: str) -> None:
    """Write a line to standard output and flush it."""
    print(text, flush=True)  # noqa: T201


def err(text: str) -> None:
    """Write lines to standard error and flush it."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201
