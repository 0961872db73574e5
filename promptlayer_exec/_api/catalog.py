"""Building the requests for workflows and reading their responses, without I/O.

There are three shapes of a workflow: the reference documents one, its example another
(`version_number`), and a development server sends a third (an object in `workflow`).

https://docs.promptlayer.com/reference/get-workflow
https://docs.promptlayer.com/reference/list-workflows
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

import attrs
from cattrs import override

from promptlayer_exec._api.messages import Request, Response, decode, invalid_shape
from promptlayer_exec._api.runs import path_segment, version_selection
from promptlayer_exec._api.status import check_status
from promptlayer_exec._api.structuring import documented, structured
from promptlayer_exec._structuring.mismatch import exact
from promptlayer_exec._values.arguments import optional_str
from promptlayer_exec._values.workflow_definition import (
    WorkflowDefinition,
    WorkflowEdge,
    WorkflowNode,
    WorkflowSummary,
)


def workflow_request(workflow: Any, label: Any, version: Any) -> Request:
    """Return the request for one version of a workflow. Raises `TypeError` or `ValueError`."""
    label, version = version_selection(label, version)
    query = _query(label=label, version=version)
    return Request("GET", f"/workflows/{path_segment(workflow)}{query}")


def workflows_filter(
    sort_by: Any, sort_order: Any, external_source: Any, external_id: Any
) -> dict[str, str | None]:
    """Return the checked parameters of a list of workflows."""
    _check_choice("sort_by", sort_by, ("created_at", "updated_at", "name", "id"))
    _check_choice("sort_order", sort_order, ("asc", "desc"))
    if (external_source is None) != (external_id is None):
        raise ValueError("pass external_source and external_id together")

    return {
        "sort_by": sort_by,
        "sort_order": sort_order,
        "external_source": optional_str("external_source", external_source),
        "external_id": optional_str("external_id", external_id),
    }


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.100}")


def workflows_request(page: int, parameters: Mapping[str, str | None]) -> Request:
    # The server allows at most 100 workflows a page.
    query = _query(page=page, per_page=100, **parameters)
    return Request("GET", f"/workflows{query}")


def _query(**parameters: Any) -> str:
    given = {name: value for name, value in parameters.items() if value is not None}
    if not given:
        return ""
    return "?" + urlencode(given, quote_via=quote)


@attrs.frozen
class _Names:
    """The object in `workflow`, as a development server sends it."""

    id: int
    name: str


@attrs.frozen
class _Definition:
    """The body of one version of a workflow. A server sends only some of these fields."""

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


def read_workflow(response: Response) -> WorkflowDefinition:
    """Read one version of a workflow. Documented fields take precedence over `workflow`."""
    check_status(response)
    raw = decode(response)
    body = structured(response, raw, _Definition)

    names = _names(response, body)
    version = body.version
    if version is None:
        version = body.version_number

    return WorkflowDefinition(
        id=names.id,
        name=names.name,
        version=version,
        labels=body.release_labels,
        required_inputs=body.required_input_variables,
        nodes=_nodes(body),
        edges=body.edges,
        raw=raw,
    )


def _names(response: Response, body: _Definition) -> _Names:
    workflow_id, name = body.workflow_id, body.workflow_name
    if workflow_id is not None and name is not None:
        return _Names(workflow_id, name)

    if body.workflow is None:
        lacking = "workflow_name"
        if workflow_id is None:
            lacking = "workflow_id"
        invalid_shape(response, f"$.{lacking}", "is missing")

    inner = structured(response, body.workflow, _Names, "workflow")
    if workflow_id is None:
        workflow_id = inner.id
    if name is None:
        name = inner.name
    return _Names(workflow_id, name)


def _nodes(body: _Definition) -> dict[str, WorkflowNode]:
    """Return the nodes by name. Their dependencies include the sources of their edges."""
    nodes = {node.name: node for node in body.nodes}

    # Dicts, because they are ordered sets.
    dependencies = {name: dict.fromkeys(node.dependencies) for name, node in nodes.items()}
    for edge in body.edges:
        if edge.target in dependencies:
            dependencies[edge.target][edge.source] = None

    return {
        name: attrs.evolve(node, dependencies=tuple(filter(nodes.__contains__, dependencies[name])))
        for name, node in nodes.items()
    }


class WorkflowsPage:
    """One page of the list of workflows. `following` is the number of the next one."""

    def __init__(self, response: Response, page: int) -> None:
        check_status(response)
        body = structured(response, decode(response), _Page)
        self.summaries = body.items

        has_next = body.has_next
        if has_next is None:
            has_next = page < body.pages

        self.following: int | None = None
        if has_next:
            self.following = page + 1
