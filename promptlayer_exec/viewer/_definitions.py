"""The definitions of workflows, as the page draws them and as its form needs them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Any, TypeVar

from promptlayer_exec import PromptLayerExecError, Session, Workflow, WorkflowSummary
from promptlayer_exec._integration import ExpiringDict
from promptlayer_exec.viewer._problems import explain

T = TypeVar("T")

_PATIENCE = 5.0  # seconds for one definition
_LIST_PATIENCE = 20.0  # seconds for the list
_MAX_AGE = 60.0


class NoDefinition(Exception):
    """A definition is not available; the text says why."""


class Definitions:
    """Reads definitions of workflows, and keeps each for a minute; else raises `NoDefinition`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: ExpiringDict[Hashable, Any] = ExpiringDict(_MAX_AGE)

    async def get(
        self, workflow: str, label: str | None = None, version: int | None = None
    ) -> Workflow:
        """Return a definition: that of a label or version, or the latest one."""
        read = partial(self._session.workflow, workflow, label=label, version=version)
        return await self._read((workflow, label, version), read, _PATIENCE)

    async def summaries(self) -> list[WorkflowSummary]:
        """Return the workflows that can be started, the latest changed first."""

        async def read() -> list[WorkflowSummary]:
            summaries = self._session.workflows(sort_by="updated_at", sort_order="desc")
            return [summary async for summary in summaries if not summary.is_deleted]

        return await self._read("summaries", read, _LIST_PATIENCE)

    async def _read(self, key: Hashable, read: Callable[[], Awaitable[T]], patience: float) -> T:
        found: T | None = self._known.get(key)
        if found is None:
            try:
                async with asyncio.timeout(patience):
                    found = await read()
            except TimeoutError:
                raise NoDefinition(f"it was not sent within {patience:.0f} s.") from None
            except (PromptLayerExecError, ValueError) as error:
                raise NoDefinition(explain(error)[1]) from error
            self._known.add(key, found)
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
