"""Workflows for the page: the list of them, and one as a graph and as the fields of a form."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from promptlayer_exec import (
    ConfigurationError,
    PromptLayerExecError,
    Session,
    StoreUnavailable,
    WorkflowDefinition,
    WorkflowSummary,
)
from promptlayer_exec._integration import ExpiringDict, definition
from promptlayer_exec.viewer._history import History
from promptlayer_exec.viewer._problems import explain

_LIST_TIMEOUT = 20.0


class NoDefinition(Exception):
    """A definition, or the list of workflows, is unavailable. The text contains the reason.

    Args:
        reason: the text.
        kind: a word for the page, from `explain`.
    """

    def __init__(self, reason: str, kind: str = "other") -> None:
        super().__init__(reason)
        self.kind = kind


async def find_definition(
    session: Session, workflow: str, label: str | None = None, version: int | None = None
) -> WorkflowDefinition:
    """Return a definition, that of a label or version or the latest. Raises `NoDefinition`."""
    try:
        return await definition(session, workflow, label=label, version=version)
    except (PromptLayerExecError, ValueError) as error:
        raise NoDefinition(explain(error)[1]) from error


class WorkflowList:
    """The workflows that you can start, the latest changed first, requested once a minute."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._kept: ExpiringDict[None, list[WorkflowSummary]] = ExpiringDict(60.0)

    async def get(self) -> list[WorkflowSummary]:
        """Return them. Raises `NoDefinition`."""
        kept = self._kept.get(None)
        if kept is not None:
            return kept

        listed = self._session.workflows(sort_by="updated_at", sort_order="desc")
        try:
            async with asyncio.timeout(_LIST_TIMEOUT):
                found = [summary async for summary in listed if not summary.is_deleted]
        except PromptLayerExecError as error:
            kind, reason = explain(error)
            raise NoDefinition(reason, kind) from error
        except TimeoutError:
            raise NoDefinition(f"it did not arrive within {_LIST_TIMEOUT:.0f} s.") from None

        self._kept.add(None, found)
        return found


async def suggest_workflow(
    session: Session, listed: WorkflowList, history: History | None, nodes: set[str]
) -> dict[str, Any]:
    """Return the workflow whose nodes have the most names in common with those of a run.

    Runs that the history remembers come first. If none has the same names, it reads the definitions
    of the 20 workflows that changed last, as many as a session keeps.
    """
    known: dict[str, set[str]] = {}
    if history is not None:
        with suppress(ConfigurationError, StoreUnavailable):
            known = await history.node_names()

    if nodes not in known.values():
        names = list[str]()
        with suppress(NoDefinition):
            names = [summary.name for summary in (await listed.get())[:20]]
        found = await asyncio.gather(*(_node_names(session, name) for name in names))
        known |= dict(zip(names, found, strict=True))

    def likeness(workflow: str) -> float:
        return len(nodes & known[workflow]) / len(nodes | known[workflow])

    best = max(known, key=likeness, default=None) if nodes else None
    if best is None or likeness(best) < 0.5:
        return {"workflow": None, "shared": 0}
    return {"workflow": best, "shared": len(nodes & known[best])}


async def _node_names(session: Session, workflow: str) -> set[str]:
    try:
        return set((await find_definition(session, workflow)).nodes)
    except NoDefinition:
        return set()


def graph_view(workflow: WorkflowDefinition) -> dict[str, Any]:
    """Return a workflow as the page draws it, with an edge for each dependency."""
    conditional = {
        (source, node.name): False
        for node in workflow.nodes.values()
        for source in node.dependencies
    }
    for edge in workflow.edges:
        if edge.source in workflow.nodes and edge.target in workflow.nodes:
            pair = edge.source, edge.target
            conditional[pair] = conditional.get(pair, False) or edge.conditional

    inputs = workflow.required_inputs
    return {
        "id": str(workflow.id),
        "name": workflow.name,
        "version": workflow.version,
        "labels": workflow.labels,
        "required_inputs": None if inputs is None else dict(inputs),
        "layers": workflow.layers(),
        "nodes": {
            node.name: {"type": node.node_type, "is_output": node.is_output_node}
            for node in workflow.nodes.values()
        },
        "edges": [
            {"source": source, "target": target, "conditional": is_conditional}
            for (source, target), is_conditional in conditional.items()
        ],
    }
