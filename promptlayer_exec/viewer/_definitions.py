"""The definitions of workflows, as the page draws them and as its form needs them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from promptlayer_exec import PromptLayerExecError, Session, Workflow, WorkflowSummary
from promptlayer_exec.viewer._problems import explain

_PATIENCE = 5.0  # seconds for one definition
_LIST_PATIENCE = 20.0  # seconds for the list
_MAX_AGE = 60.0

_Key = tuple[str, str | None, int | None]


class NoDefinition(Exception):
    """A definition is not available; the text says why."""


class Definitions:
    """Reads definitions of workflows, and keeps each for a minute.

    Args:
        session: the session that asks for them.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[_Key, tuple[float, Workflow]] = {}
        self._summaries: tuple[float, list[WorkflowSummary]] = (-_MAX_AGE, [])

    async def get(
        self, workflow: str, label: str | None = None, version: int | None = None
    ) -> Workflow:
        """Return a definition: that of a label or version, or the latest one.

        Raises:
            NoDefinition: the server did not send it within 5 s.
        """
        key = (workflow, label, version)
        read, known = self._known.get(key, (0.0, None))
        if known is not None and time.monotonic() - read < _MAX_AGE:
            return known
        try:
            async with asyncio.timeout(_PATIENCE):
                found = await self._session.workflow(workflow, label=label, version=version)
        except TimeoutError:
            raise NoDefinition(f"it was not sent within {_PATIENCE:.0f} s.") from None
        except (PromptLayerExecError, ValueError) as error:
            raise NoDefinition(explain(error)[1]) from error
        self._known[key] = (time.monotonic(), found)
        return found

    async def summaries(self) -> list[WorkflowSummary]:
        """Return the workflows that can be started, the latest changed first.

        Raises:
            NoDefinition: the server did not send them.
        """
        read, known = self._summaries
        if time.monotonic() - read < _MAX_AGE:
            return known
        try:
            async with asyncio.timeout(_LIST_PATIENCE):
                found = [
                    summary
                    async for summary in self._session.workflows(
                        sort_by="updated_at", sort_order="desc"
                    )
                    if not summary.is_deleted
                ]
        except TimeoutError:
            raise NoDefinition("the list of workflows was not sent in time.") from None
        except PromptLayerExecError as error:
            raise NoDefinition(explain(error)[1]) from error
        self._summaries = (time.monotonic(), found)
        return found


def definition_view(workflow: Workflow) -> dict[str, Any]:
    """Return a definition as the page draws it, with an edge for each dependency."""
    edges = {
        (source, node.name): False
        for node in workflow.nodes.values()
        for source in node.dependencies
    }
    for edge in workflow.edges:
        pair = (edge.source, edge.target)
        if set(pair) <= workflow.nodes.keys():
            edges[pair] = edges.get(pair, False) or edge.conditional
    return {
        "id": str(workflow.id),
        "name": workflow.name,
        "version": workflow.version,
        "labels": workflow.labels,
        "required_inputs": None
        if workflow.required_inputs is None
        else dict(workflow.required_inputs),
        "layers": workflow.layers(),
        "nodes": {
            node.name: {"type": node.node_type, "is_output": node.is_output_node}
            for node in workflow.nodes.values()
        },
        "edges": [
            {"source": source, "target": target, "conditional": conditional}
            for (source, target), conditional in edges.items()
        ],
    }
