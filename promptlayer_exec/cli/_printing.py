"""What commands print: safe text, warnings of the library, and lines about an execution."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Collection
from typing import Any

from promptlayer_exec import Node, NodeStatus, NodeTimes, Snapshot
from promptlayer_exec._integration import error_text, printable

_PREVIEW = 200  # characters of a value


def shorten(text: str, limit: int = _PREVIEW) -> str:
    """Return the start of a text, with an ellipsis if characters were cut off."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def quoted(text: str, limit: int = 100) -> str:
    """Return the start of a text, printable and in quotes."""
    return f"'{shorten(printable(text), limit)}'"


def preview(value: Any) -> str:
    """Return the start of a value as one line of JSON, at the same cost for values of any size."""
    if isinstance(value, str):
        value = value[: _PREVIEW + 1]

    text = ""
    for part in json.JSONEncoder(ensure_ascii=False).iterencode(value):
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
    end = now if times.final is None else times.final
    return duration(end - times.running)


def node_detail(node: Node) -> str:
    """Return a node's value, or its error if it failed; empty if it has neither yet."""
    if node.status == NodeStatus.FAILED:
        return printable(failure_reason(node))
    if node.value is None and not node.succeeded:
        return ""
    return preview(node.value)


def failure_reason(node: Node) -> str:
    return error_text(node) or "the server gave no reason"


def result_line(snapshot: Snapshot, *, timed: bool = True) -> str:
    """Return how a complete execution ended, after which time, and how its nodes did.

    There is no time if no node was seen running: the execution may have ended long before.
    """
    if snapshot.succeeded:
        verdict = "succeeded"
    elif snapshot.failed_nodes:
        verdict = "failed"
    else:
        verdict = "failed (no output node succeeded)"

    time = ""
    if timed and any(times.running is not None for times in snapshot.times.values()):
        time = f" after {duration(snapshot.elapsed)}"

    counts = [f"{count} {printable(status)}" for status, count in snapshot.counts.items()]
    nodes = ", ".join(counts) or "no nodes"
    return f"execution {snapshot.execution_id} {verdict}{time}: {nodes}"


def final_count(snapshot: Snapshot) -> str:
    """Return how many of the nodes are final, such as `2/3`."""
    return f"{sum(node.final for node in snapshot.nodes.values())}/{len(snapshot.nodes)}"


def prepare_streams() -> None:
    """Make the standard streams accept any text: characters that an encoding lacks are escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def out(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def err(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def show_warnings(write: Callable[[str], None], *, of: Collection[str] = ()) -> None:
    """Write the library's warnings, or those `of` some modules, to the very end of the process.

    Some come when a session is closed, such as the id of a run that nobody got.
    """
    logger = logging.getLogger("promptlayer_exec")
    for earlier in logger.handlers[:]:
        logger.removeHandler(earlier)
    logger.addHandler(_Warnings(write, of))


class _Warnings(logging.Handler):
    def __init__(self, write: Callable[[str], None], of: Collection[str]) -> None:
        super().__init__(logging.WARNING)
        self._write, self._of = write, of

    def emit(self, record: logging.LogRecord) -> None:
        if not self._of or record.module in self._of:
            self._write(printable(record.getMessage()))
