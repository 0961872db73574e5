"""What the tools return: the state of an execution, in a bounded number of characters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from mcp.types import CallToolResult, TextContent

from promptlayer_exec import ExecutionFailed, Node, NodeStatus, Snapshot, Workflow
from promptlayer_exec.mcp._values import Shown, Space, clean, clip, encode, show

_ERROR_LENGTH = 500
_RAW_LENGTH = 2_000
_WHOLE_ERROR_LENGTH = 5_000
_MOST_NAMES = 5


def tool_result(fields: dict[str, Any]) -> CallToolResult:
    """Return fields as structured content, and as JSON for clients that read text alone."""
    text = json.dumps(fields, ensure_ascii=False)
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=fields)


def error_result(text: str) -> CallToolResult:
    """Return a text that says what is wrong and what to do."""
    return CallToolResult(content=[TextContent(type="text", text=clip(text, 5_000))], is_error=True)


def names_of(nodes: Iterable[Node]) -> str:
    """Return the names of a few nodes."""
    names = [f"{clean(node.name)!r:.80}" for node in nodes]
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def final_count(snapshot: Snapshot) -> int:
    """Return how many nodes are final."""
    return sum(node.final for node in snapshot.nodes.values())


def state_text(snapshot: Snapshot) -> str:
    """Say in a few words how far an execution is."""
    state = f"{final_count(snapshot)} of {len(snapshot.nodes)} nodes are final"
    running = [node for node in snapshot.nodes.values() if node.status == NodeStatus.RUNNING]
    return f"{state}, running: {names_of(running)}" if running and not snapshot.complete else state


def failure_text(snapshot: Snapshot) -> str:
    """Say why an execution has no output, and how to read more."""
    execution_id = snapshot.execution_id
    try:
        snapshot.raise_for_failure()
    except ExecutionFailed as error:
        reason = clip(str(error.args[0]).removeprefix("it failed: "), 1_500)
    else:
        reason = "it is complete, but has no main output"
    text = f"Execution {execution_id} failed: {reason}."
    if failed := snapshot.failed_nodes:
        text += f" Call get_execution with execution_id '{execution_id}' and node"
        text += f" {names_of(failed[:1])} for the whole error."
    return text


def execution_fields(
    snapshot: Snapshot, message: str, *, output: Shown | None = None, timed_out: bool = False
) -> dict[str, Any]:
    """Return the state of an execution, with the output if there is one."""
    nodes, left_out = _nodes(snapshot)
    fields: dict[str, Any] = {
        "message": message,
        "execution_id": str(snapshot.execution_id),
        "complete": snapshot.complete,
        "succeeded": snapshot.succeeded if snapshot.complete else None,
        "progress": round(snapshot.progress, 4),
        "timed_out": timed_out,
        "nodes": nodes,
    }
    if left_out:
        fields["nodes_left_out"] = left_out
    if output is not None:
        fields |= output.fields("output")
    return fields


def node_fields(snapshot: Snapshot, node: Node, start: int, length: int | None) -> dict[str, Any]:
    """Return one node of an execution, with a range of its value, or of its error."""
    entry = _entry(node, _WHOLE_ERROR_LENGTH)
    name, value = "value", node.value
    if value is None and node.raw_error_message is not None:
        name, value = "raw_error_message", _raw_text(node)
    shown = show(value, start, length)
    entry |= shown.fields(name)
    execution_id = snapshot.execution_id
    message = (
        f"Node {clean(node.name)!r:.80} of execution {execution_id}: {clip(str(node.status), 80)}."
    )
    if shown.range is not None and shown.range.is_cut:
        message += rest_text(shown, f"{execution_id}", node.name)
    fields = execution_fields(snapshot, message)
    return {**fields, "nodes": {clip(node.name, 1_000): entry}}


def rest_text(shown: Shown, execution_id: str, node: str | None = None) -> str:
    """Say which characters are shown, and how to get the next ones."""
    if shown.range is None or not shown.range.is_cut:
        return ""
    start, end, size = shown.range.start, shown.range.end, shown.range.size
    text = f" Shown are the characters {start:,} to {end:,} of {size:,}."
    if end < size:
        which = "" if node is None else f", node {clean(node)!r:.200}"
        text += f" Call get_execution with execution_id '{execution_id}'{which} and start {end}"
        text += " for the next ones."
    return text


def _raw_text(node: Node) -> str:
    raw = node.raw_error_message
    if isinstance(raw, dict) and isinstance(raw.get("raw"), str):
        return str(raw["raw"])
    return raw if isinstance(raw, str) else encode(raw)


def _entry(node: Node, raw_length: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"status": clip(str(node.status), 100)}
    if node.is_output_node:
        entry["is_output_node"] = True
    if node.error_message is not None:
        entry["error_message"] = clip(node.error_message, min(raw_length, _WHOLE_ERROR_LENGTH))
    if node.raw_error_message is not None:
        entry["raw_error_message"] = clip(_raw_text(node), raw_length)
    return entry


def _nodes(snapshot: Snapshot) -> tuple[dict[str, Any], int]:
    """Return as many nodes as have space, first those that matter, in the server's order."""

    def rank(node: Node) -> int:
        if node.status == NodeStatus.FAILED:
            return 0
        return 2 if node.final and not node.is_output_node else 1

    entries: dict[str, dict[str, Any]] = {}
    space = Space()
    for node in sorted(snapshot.nodes.values(), key=rank):
        entry = _entry(node, _RAW_LENGTH)
        if "error_message" in entry:
            entry["error_message"] = clip(node.error_message or "", _ERROR_LENGTH)
        if space.take({node.name: entry}):
            entries[node.name] = entry
    shown = {clean(name): entries[name] for name in snapshot.nodes if name in entries}
    return shown, len(snapshot.nodes) - len(entries)


def workflow_fields(workflow: Workflow) -> dict[str, Any]:
    """Return what a workflow needs and does."""
    inputs = workflow.required_inputs
    if inputs is None:
        needs = "The server does not say which inputs it needs."
    elif inputs:
        needs = f"It needs the inputs {', '.join(map(repr, inputs)):.2000}."
    else:
        needs = "It needs no inputs."
    nodes: list[dict[str, Any]] = []
    space = Space()
    for node in workflow.nodes.values():
        entry = {
            "name": clean(node.name),
            "node_type": clean(node.node_type),
            "is_output_node": node.is_output_node,
            "dependencies": [clean(name) for name in node.dependencies],
        }
        if space.take(entry):
            nodes.append(entry)
    version = "" if workflow.version is None else f", version {workflow.version}"
    fields = {
        "message": f"Workflow {clean(workflow.name)!r:.200}{version}. {needs}",
        "id": workflow.id,
        "name": clip(workflow.name, 1_000),
        "version": workflow.version,
        "labels": [label for label in map(clean, workflow.labels) if space.take(label)],
        "required_inputs": show(None if inputs is None else dict(inputs)).value,
        "nodes": nodes,
    }
    if len(nodes) < len(workflow.nodes):
        fields["nodes_left_out"] = len(workflow.nodes) - len(nodes)
    return fields
