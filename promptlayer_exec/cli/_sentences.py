"""An execution in one sentence: its state, the node, the reason and the time.

The words are those of the viewer's page (`sentence.js`).
"""

from __future__ import annotations

from collections.abc import Sequence

from promptlayer_exec import Node, NodeStatus, Snapshot
from promptlayer_exec._integration import duration, error_details, error_text, printable
from promptlayer_exec.cli._printing import preview, shorten

MOST_SKIPPED = 3  # skipped nodes to show one by one: they hide what failed


def skipped_count(snapshot: Snapshot) -> int:
    """Return how many nodes were skipped."""
    return sum(node.status == NodeStatus.SKIPPED for node in snapshot.nodes.values())


def failure_reason(node: Node) -> str:
    return error_text(node) or "PromptLayer gave no reason"


def node_detail(node: Node) -> str:
    """Return a node's value, its error if it failed, or an empty string if it has neither yet."""
    if node.status == NodeStatus.FAILED:
        return printable(failure_reason(node))
    if node.value is None and not node.succeeded:
        return ""
    return preview(node.value)


def result_line(snapshot: Snapshot, *, timed: bool = True) -> str:
    """Return how a complete execution finished and when, and which node failed and why.

    There is no time if no poll saw a node running: it may have finished long before.
    """
    subject = f"execution {snapshot.execution_id}"
    when = ""
    if timed and was_seen_running(snapshot):
        when = f" after {duration(snapshot.elapsed)}"

    failed = snapshot.failed_nodes
    if snapshot.succeeded and failed:
        reason = _sentence(failure_reason(failed[0]))
        return f"{subject} succeeded{when}, though {_named(failed)} failed: {reason}"
    if snapshot.succeeded:
        counts = [f"{count} {printable(status)}" for status, count in snapshot.counts.items()]
        return f"{subject} succeeded{when}: {', '.join(counts)}"
    if failed:
        return f"{subject} failed{when} in {_named(failed)}: {_sentence(failure_reason(failed[0]))}"
    return f"{subject} failed{when}: no output node succeeded."


def was_seen_running(snapshot: Snapshot) -> bool:
    """Return False if no poll saw a node running, so that nobody knows how long it took."""
    return any(times.running is not None for times in snapshot.times.values())


def running_line(snapshot: Snapshot) -> str:
    """Return the nodes that were running when the execution was last seen, and its progress."""
    done = f"{final_count(snapshot)} nodes done"
    running = [node for node in snapshot.nodes.values() if node.status == NodeStatus.RUNNING]
    if not running:
        return f"last seen with {done}"
    return f"last seen running in {_named(running)} ({done})"


def final_count(snapshot: Snapshot) -> str:
    """Return how many of the nodes are done, such as `2 of 3`."""
    return f"{sum(node.final for node in snapshot.nodes.values())} of {len(snapshot.nodes)}"


def traceback_end(node: Node) -> list[str]:
    """Return the last three lines of the details of a node's error that its message lacks."""
    details = printable(error_details(node) or "", keep="\n\t")
    lines = [line.expandtabs() for line in details.splitlines() if line.strip()]
    if not lines or details.strip() == printable(failure_reason(node), keep="\n\t").strip():
        return []
    return [f"  {shorten(line)}" for line in lines[-3:]]


def whole_error(node: Node) -> str:
    """Return the message of a node's error, and its details if they are not the same."""
    reason = printable(failure_reason(node), keep="\n\t").strip()
    details = printable(error_details(node) or "", keep="\n\t").strip()
    if not details or details == reason:
        return reason
    if reason in details:
        return details
    return f"{reason}\n{details}"


def _named(nodes: Sequence[Node]) -> str:
    """Return the name of the first node, and how many others there are."""
    name = printable(nodes[0].name)
    others = len(nodes) - 1
    if not others:
        return name
    return f"{name} and {others} other node{'s' if others > 1 else ''}"


def _sentence(text: str) -> str:
    """Return the first characters of a text on one line, with a full stop."""
    line = shorten(printable(" ".join(text.split())), 220)
    return line if line.endswith((".", "!", "?", "…")) else f"{line}."
