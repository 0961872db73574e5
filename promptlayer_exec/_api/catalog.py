"""Building the requests for workflows and reading their responses, without I/O.

Every documented shape is read: the one of the reference, that of its example, which has
`version_number`, and that of a development server, which has `workflow` with an object in it.

https://docs.promptlayer.com/reference/get-workflow
https://docs.promptlayer.com/reference/list-workflows
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from cattrs import override

from promptlayer_exec._api.messages import Request, Response, decode, invalid_shape
from promptlayer_exec._api.runs import path_segment, percent_encoded, version_selection
from promptlayer_exec._api.status import check_status
from promptlayer_exec._api.structuring import documented, structured
from promptlayer_exec._arguments import optional_str
from promptlayer_exec._structuring._mismatch import exact
from promptlayer_exec._workflows import Workflow, WorkflowEdge, WorkflowNode, WorkflowSummary

_SORT_KEYS = ("created_at", "updated_at", "name", "id")
_SORT_ORDERS = ("asc", "desc")
_PAGE_SIZE = 100  # the most that the server allows


def workflow_request(workflow: Any, label: Any, version: Any) -> Request:
    """Return the request for one version of a workflow; raises `TypeError` or `ValueError`."""
    label, version = version_selection(label, version)
    query = _query(label=label, version=version)
    return Request("GET", f"/workflows/{path_segment(workflow)}{query}")


def workflows_filter(
    sort_by: Any, sort_order: Any, external_source: Any, external_id: Any
) -> dict[str, str | None]:
    """Return the checked parameters of a list of workflows."""
    for name, value, known in (
        ("sort_by", sort_by, _SORT_KEYS),
        ("sort_order", sort_order, _SORT_ORDERS),
    ):
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r:.100}")
    if (external_source is None) != (external_id is None):
        raise ValueError("pass external_source and external_id together")
    return {
        "sort_by": sort_by,
        "sort_order": sort_order,
        "external_source": optional_str("external_source", external_source),
        "external_id": optional_str("external_id", external_id),
    }


def workflows_request(page: int, parameters: Mapping[str, str | None]) -> Request:
    query = _query(page=page, per_page=_PAGE_SIZE, **parameters)
    return Request("GET", f"/workflows{query}")


def _query(**parameters: Any) -> str:
    given = {name: value for name, value in parameters.items() if value is not None}
    query = "&".join(f"{name}={percent_encoded(name, str(value))}" for name, value in given.items())
    return f"?{query}" if query else ""


@attrs.frozen
class _Names:
    """The object in `workflow`, as a development server sends it."""

    id: int
    name: str


@attrs.frozen
class _Definition:
    """The body of one version of a workflow; a server sends some of the fields."""

    workflow_id: int | None = None
    workflow_name: str | None = None
    version: int | None = None
    version_number: int | None = None
    release_labels: tuple[str, ...] = ()
    required_input_variables: dict[str, str] | None = None
    nodes: tuple[WorkflowNode, ...] = ()
    edges: tuple[WorkflowEdge, ...] = ()
    workflow: Any = None


@attrs.frozen
class _Page:
    """The body of one page of the list."""

    items: list[WorkflowSummary]
    has_next: bool | None = None
    pages: int = 0


def _has_conditions(value: Any, _: Any) -> bool:
    return bool(exact(value, list))


documented(
    WorkflowEdge,
    source=override(rename="source_node_name"),
    target=override(rename="target_node_name"),
    conditional=override(rename="conditionals", struct_hook=_has_conditions),
)
documented(
    WorkflowSummary,
    labels=override(rename="release_labels"),
    latest_version=override(rename="latest_version_number"),
)


def read_workflow(response: Response) -> Workflow:
    """Read one version of a workflow; the documented fields win over those in `workflow`."""
    check_status(response)
    raw = decode(response)
    body = structured(response, raw, _Definition)
    workflow_id, name = body.workflow_id, body.workflow_name
    if workflow_id is None or name is None:
        if body.workflow is None:
            lacking = "workflow_id" if workflow_id is None else "workflow_name"
            invalid_shape(response, f"$.{lacking}", "is missing")
        inner = structured(response, body.workflow, _Names, "workflow")
        workflow_id = inner.id if workflow_id is None else workflow_id
        name = inner.name if name is None else name
    return Workflow(
        id=workflow_id,
        name=name,
        version=body.version_number if body.version is None else body.version,
        labels=body.release_labels,
        required_inputs=body.required_input_variables,
        nodes=_nodes(body),
        edges=body.edges,
        raw=raw,
    )


def _nodes(body: _Definition) -> dict[str, WorkflowNode]:
    nodes = {node.name: node for node in body.nodes}
    # Dicts, because they are ordered sets.
    dependencies = {name: dict.fromkeys(node.dependencies) for name, node in nodes.items()}
    for edge in body.edges:
        if edge.target in dependencies:
            dependencies[edge.target][edge.source] = None
    return {
        name: attrs.evolve(node, dependencies=tuple(it for it in dependencies[name] if it in nodes))
        for name, node in nodes.items()
    }


class WorkflowsPage:
    """One page of the list of workflows; `following` is the number of the next one."""

    def __init__(self, response: Response, page: int) -> None:
        check_status(response)
        body = structured(response, decode(response), _Page)
        self.summaries = body.items
        has_next = page < body.pages if body.has_next is None else body.has_next
        self.following = page + 1 if has_next else None
