"""Text that is safe to print: names, values and messages of a workflow can contain anything."""

from __future__ import annotations

import json
from typing import Any
from unicodedata import category

from promptlayer_exec import Node, NodeStatus, NodeTimes, Snapshot

_PREVIEW = 200
# What messages of the library tell a program to do, and what to say at a command line instead.
_WORDS = {
    "Check PROMPTLAYER_API_KEY or api_key=.": "Check PROMPTLAYER_API_KEY.",
    "Check the network and base_url;": "Check the network and --base-url;",
    "Check base_url and the arguments.": "Check --base-url and the arguments.",
    "Check that base_url is": "Check that --base-url is",
    "Check the id or name, base_url, and": "Check the id or name, --base-url, and",
    "base_url must": "--base-url must",
    "database_url is": "--db is",
    "database_url must": "--db must",
    "push=True needs": "--push needs",
    " last_snapshot has every node.": "",
    "add it to another batch; it was not added": "add it to another batch with --name NEW; nothing"
    " was added",
}
_encoder = json.JSONEncoder(ensure_ascii=False)


def printable(text: str, *, keep: str = "") -> str:
    """Return any text with its unprintable characters escaped, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in keep or category(char) == "Zs"
        else json.dumps(char)[1:-1]
        for char in text
    )


def in_options(text: str) -> str:
    """Return a message of the library with the options of the command line in it."""
    for words, options in _WORDS.items():
        text = text.replace(words, options)
    return text


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
    if node.error_message:
        return node.error_message
    raw = node.raw_error_message
    if isinstance(raw, dict):
        raw = raw.get("raw", raw)
    if isinstance(raw, str) and raw:
        return raw
    return "the server gave no reason" if raw in (None, "") else preview(raw)


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
