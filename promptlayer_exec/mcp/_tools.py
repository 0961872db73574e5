"""The tools as clients see them: names, descriptions, schemas and annotations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mcp.types import Tool, ToolAnnotations

from promptlayer_exec import Workflow, WorkflowDefinition

WAIT = 50.0  # seconds: clients often give up after 60

INSTRUCTIONS = f"""\
These tools run PromptLayer workflows. A run costs money, and you cannot cancel it.

1. start_workflow immediately returns an execution_id. Keep it: nothing else finds the run again.
2. wait_execution waits until the run is complete, for at most {WAIT:.0f} seconds. If it returns
   timed_out: true, the run continues: call wait_execution again with the same execution_id.
3. If a complete run has succeeded: false, `nodes` shows which node failed, and why.
   get_execution with a node shows its whole value or error.

Never start a run again because a wait timed out, or because a response was lost.
"""
KEY_INSTRUCTIONS = """
Give each new run a new idempotency_key. If you repeat a call with the same key, for example after a
timeout, you get the same run, and it costs nothing.
"""

_READS = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=True)
# There is no annotation for calls that cost money, so the titles contain it. Clients ask first.
_STARTS = ToolAnnotations(
    read_only_hint=False, destructive_hint=True, idempotent_hint=False, open_world_hint=True
)

_EXECUTION_ID = {"type": "string", "description": "Id of the execution, such as '787'."}
_INPUTS = {"type": "object", "description": "The input variables by name."}
_LABEL = {"type": "string", "description": "Label of the version to run, such as 'prod'."}
_VERSION = {"type": "integer", "minimum": 1, "description": "Number of the version, not a label."}
_TIMEOUT = {
    "type": "number",
    "minimum": 0,
    "maximum": 86_400,
    "description": "Maximum seconds to wait. Many clients give up after 60 seconds.",
    "default": WAIT,
}
IDEMPOTENCY_KEY = {
    "type": "string",
    "minLength": 1,
    "maxLength": 255,
    "description": "A new text for each run that you want, such as a UUID. If the call fails or"
    " times out, repeat it with the same text: you get the same run, and pay once.",
}
_MESSAGE = {"type": "string", "description": "What happened, and what to do next."}


def _schema(required: Iterable[str] = (), /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _arguments(required: Iterable[str] = (), /, **properties: Any) -> dict[str, Any]:
    return {**_schema(required, **properties), "additionalProperties": False}


def run_arguments(workflow: Workflow[Any, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool `run_...` whose inputs are unknown, or are an object."""
    choices = {"label": _LABEL, "version": _VERSION}
    if workflow.label is not None or workflow.version is not None:
        choices = {}
    return _arguments(inputs=_INPUTS, **choices, timeout=_TIMEOUT, **keys)


_EXECUTION = _schema(
    ("message", "execution_id", "complete", "succeeded", "progress", "timed_out", "nodes"),
    message=_MESSAGE,
    execution_id={"type": "string"},
    complete={"type": "boolean", "description": "Whether the execution has finished."},
    succeeded={"type": ["boolean", "null"], "description": "null until it is complete."},
    progress={"type": "number", "description": "Share of the nodes that are final."},
    timed_out={"type": "boolean", "description": "Whether the wait timed out first."},
    nodes={"type": "object", "description": "Status and error of each node by name."},
    nodes_left_out={"type": "integer", "description": "How many nodes had no space here."},
    output={"description": "The output, or with output_range, characters of its text."},
    output_range={"type": "object", "description": "`start` and `end`, and `size` of the whole."},
    warning={"type": "string", "description": "PromptLayer's warning about the run."},
)
_STARTED = _schema(
    ("message", "execution_id"),
    message=_MESSAGE,
    execution_id={"type": "string"},
    warning={"type": "string", "description": "PromptLayer's warning about the run."},
)


def common_tools(allowed: tuple[str, ...], keys: Mapping[str, Any]) -> list[Tool]:
    """Return the five tools.

    Args:
        allowed: the workflows that they may use. Empty means all.
        keys: the argument for the key of a request, by its name, if the server has a store.
    """
    workflow: dict[str, Any] = {"type": "string", "description": "Name or id of the workflow."}
    if allowed:
        workflow["enum"] = list(allowed)
    else:
        workflow["minLength"] = 1
    version = {"workflow": workflow, "label": _LABEL, "version": _VERSION}

    return [
        Tool(
            name="list_workflows",
            title="List workflows",
            description="List the workflows that can be run, with their labels.",
            input_schema=_arguments(
                search={"type": "string", "description": "Only names that contain this text."}
            ),
            annotations=_READS,
        ),
        Tool(
            name="describe_workflow",
            title="Describe a workflow",
            description="Show which inputs a workflow needs, and its nodes.",
            input_schema=_arguments(["workflow"], **version),
            annotations=_READS,
        ),
        Tool(
            name="start_workflow",
            title="Start a run of a workflow (paid)",
            description="Start a run of a workflow, which costs money, and immediately return its"
            " execution_id. Then call wait_execution. If inputs are missing, it starts nothing.",
            input_schema=_arguments(["workflow"], **version, inputs=_INPUTS, **keys),
            output_schema=_STARTED,
            annotations=_STARTS,
        ),
        Tool(
            name="wait_execution",
            title="Wait for an execution",
            description="Wait until an execution is complete, and return its output, or which node"
            f" failed and why. After {WAIT:.0f} seconds, or `timeout`, it returns timed_out: true:"
            " call it again. Waiting costs nothing.",
            input_schema=_arguments(["execution_id"], execution_id=_EXECUTION_ID, timeout=_TIMEOUT),
            output_schema=_EXECUTION,
            annotations=_READS,
        ),
        Tool(
            name="get_execution",
            title="Read an execution",
            description="Return an execution as it is now. With `node`, return the value or the"
            " whole error of that node. With `start` and `length`, return that range of characters"
            " of a long value: of the node, or of the output.",
            input_schema=_arguments(
                ["execution_id"],
                execution_id=_EXECUTION_ID,
                node={"type": "string", "description": "Name of a node."},
                start={"type": "integer", "minimum": 0, "default": 0},
                length={"type": "integer", "minimum": 1},
            ),
            output_schema=_EXECUTION,
            annotations=_READS,
        ),
    ]


def run_tool(
    name: str,
    workflow: Workflow[Any, Any],
    definition: WorkflowDefinition | None,
    keys: Mapping[str, Any],
) -> Tool:
    """Return the tool that runs one workflow, with its required inputs as arguments."""
    if definition is None or definition.required_inputs is None:
        schema = run_arguments(workflow, keys)
    else:
        inputs = {name: _input(kind) for name, kind in definition.required_inputs.items()}
        schema = _schema(list(inputs), **{"timeout": _TIMEOUT, **keys, **inputs})

    shown = f"{str(workflow.name)!r:.100}"
    purpose = "" if workflow.description is None else f"{workflow.description}\n\n"
    return Tool(
        name=name,
        title=f"Run {shown} (paid)",
        description=f"{purpose}Run the PromptLayer workflow {shown}, which costs money, and return"
        f" its output, or which node failed and why. After {WAIT:.0f} seconds, or `timeout`, it"
        " returns timed_out: true and an execution_id: call wait_execution with it.",
        input_schema=schema,
        output_schema=_EXECUTION,
        annotations=_STARTS,
    )


def _input(kind: str) -> dict[str, Any]:
    if kind.lower() in {"string", "number", "integer", "boolean", "array", "object"}:
        return {"type": kind.lower()}
    return {"description": f"A value of the type {kind!r:.100}."}


def run_tool_names(workflows: Iterable[str]) -> Mapping[str, str]:
    """Return the workflow of each tool `run_...`, by the name of the tool."""
    longest = 64  # models and clients limit it
    names: dict[str, str] = {}
    for workflow in workflows:
        base = f"run_{re.sub(r'[^A-Za-z0-9_.-]', '_', workflow)}"[:longest]
        name, number = base, 2
        while name in names:
            suffix = f"_{number}"
            name, number = base[: longest - len(suffix)] + suffix, number + 1
        names[name] = workflow
    return names
