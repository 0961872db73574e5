"""The results of the tools: the state of an execution, limited to a number of characters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from mcp.types import CallToolResult, TextContent

from promptlayer_exec import (
    ExecutionFailed,
    Node,
    NodeStatus,
    Snapshot,
    WorkflowDefinition,
)
from promptlayer_exec._integration import error_details
from promptlayer_exec.mcp._tool_values import clean, clip, fitting, show


def tool_result(fields: dict[str, Any]) -> CallToolResult:
    """Return fields as structured content, and as JSON for clients that read only text."""
    text = json.dumps(fields, ensure_ascii=False)
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=fields)


def names_of(nodes: Iterable[Node]) -> str:
    names = [f"{clean(node.name)!r:.80}" for node in nodes]
    text = ", ".join(names[:5])
    if len(names) > 5:
        text += f" and {len(names) - 5:,} more"
    return text


def final_count(snapshot: Snapshot) -> int:
    return sum(node.final for node in snapshot.nodes.values())


def state_text(snapshot: Snapshot) -> str:
    """Return in a few words how far an execution is."""
    state = f"{final_count(snapshot)} of {len(snapshot.nodes)} nodes are final"
    running = [node for node in snapshot.nodes.values() if node.status == NodeStatus.RUNNING]
    if running and not snapshot.complete:
        state += f", running: {names_of(running)}"
    return state


def failure_text(error: ExecutionFailed) -> str:
    """Return why an execution has no output, and how to read more."""
    text = clip(error.problem, 1_500)
    if error.failed:
        text += f" Call get_execution with execution_id '{error.execution_id}' and node"
        text += f" {names_of(error.failed[:1])} for the whole error."
    return text


def execution_fields(snapshot: Snapshot, message: str, timed_out: bool = False) -> dict[str, Any]:
    """Return the state of an execution, without its output."""
    nodes = _nodes(snapshot)
    fields: dict[str, Any] = {
        "message": message,
        "execution_id": str(snapshot.execution_id),
        "complete": snapshot.complete,
        "succeeded": snapshot.succeeded if snapshot.complete else None,
        "progress": round(snapshot.progress, 4),
        "timed_out": timed_out,
        "nodes": nodes,
    }

    if left_out := len(snapshot.nodes) - len(nodes):
        fields["nodes_left_out"] = left_out
    return fields


def node_fields(snapshot: Snapshot, node: Node, start: int, length: int | None) -> dict[str, Any]:
    """Return one node of an execution, with a range of its value, or of its error."""
    name, value = "value", node.value
    if value is None and (details := error_details(node)) is not None:
        name, value = "raw_error_message", details

    shown = show(name, value, start, length)
    message = f"Node {clean(node.name)!r:.80} of execution {snapshot.execution_id}:"
    message += f" {clip(str(node.status), 80)}."
    message += rest_text(shown.get(f"{name}_range"), snapshot.execution_id, node.name)
    entry = _entry(node, 5_000) | shown
    return execution_fields(snapshot, message) | {"nodes": {clip(node.name, 1_000): entry}}


def rest_text(shown: dict[str, int] | None, execution_id: int, node: str | None = None) -> str:
    """Return which characters of a text are shown, if not all, and how to get the next ones."""
    if shown is None or shown["end"] - shown["start"] == shown["size"]:
        return ""
    end, size = shown["end"], shown["size"]
    text = f" These are the characters {shown['start']:,} to {end:,} of {size:,}."
    if end < size:
        which = ""
        if node is not None:
            which = f", node {clean(node)!r:.200}"
        text += f" Call get_execution with execution_id '{execution_id}'{which} and start {end}"
        text += " for the next ones."
    return text


def _entry(node: Node, length: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"status": clip(str(node.status), 100)}
    if node.is_output_node:
        entry["is_output_node"] = True
    if node.error_message is not None:
        entry["error_message"] = clip(node.error_message, length)
    if (details := error_details(node)) is not None:
        entry["raw_error_message"] = clip(details, length)
    return entry


def _nodes(snapshot: Snapshot) -> dict[str, Any]:
    """Return as many nodes as there is space for. Failed ones take precedence."""
    nodes = sorted(snapshot.nodes.values(), key=lambda node: node.status != NodeStatus.FAILED)
    entries = [(clean(node.name), _entry(node, 1_000)) for node in nodes]
    fits = dict(fitting(entries))
    return {name: fits[name] for name in map(clean, snapshot.nodes) if name in fits}


def workflow_fields(
    workflow: WorkflowDefinition, *, description: str | None = None
) -> dict[str, Any]:
    inputs = workflow.required_inputs
    if inputs is None:
        needs = "PromptLayer does not list its inputs."
    elif inputs:
        needs = f"It needs the inputs {', '.join(map(repr, inputs)):.2000}."
    else:
        needs = "It needs no inputs."

    nodes = fitting(
        {
            "name": clean(node.name),
            "node_type": clean(node.node_type),
            "is_output_node": node.is_output_node,
            "dependencies": [clean(name) for name in node.dependencies],
        }
        for node in workflow.nodes.values()
    )
    title = f"Workflow {clean(workflow.name)!r:.200}"
    if workflow.version is not None:
        title += f", version {workflow.version}"

    purpose = "" if description is None else f"{description}\n\n"
    fields = {
        "message": f"{purpose}{title}. {needs}",
        "id": workflow.id,
        "name": clip(workflow.name, 1_000),
        "version": workflow.version,
        "labels": fitting(map(clean, workflow.labels)),
        **show("required_inputs", None if inputs is None else dict(inputs)),
        "nodes": nodes,
    }

    if left_out := len(workflow.nodes) - len(nodes):
        fields["nodes_left_out"] = left_out
    return fields
