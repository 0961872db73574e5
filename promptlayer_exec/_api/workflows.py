"""Building the requests for workflows and reading their responses, without I/O.

Every documented shape is read: the one of the reference, that of its example, which has
`version_number`, and that of a development server, which has `workflow` with an object in it.

https://docs.promptlayer.com/reference/get-workflow
https://docs.promptlayer.com/reference/list-workflows
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from promptlayer_exec._api.executions import path_segment, percent_encoded, version_selection
from promptlayer_exec._api.messages import Request, Response, decode, invalid_shape
from promptlayer_exec._api.status import check_status
from promptlayer_exec._arguments import optional_str
from promptlayer_exec._text import JSON_KINDS, json_kind
from promptlayer_exec._workflows import Workflow, WorkflowEdge, WorkflowNode, WorkflowSummary

T = TypeVar("T")

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


class _Object:
    """An object in a body, whose fields are checked as they are read."""

    def __init__(self, response: Response, fields: Any, path: str = "$") -> None:
        self._response = response
        self._path = path
        if not isinstance(fields, dict):
            self._refuse("", f"expected an object, got {json_kind(fields)}")
        self.fields: dict[str, Any] = fields

    def get(self, name: str, kind: type[T]) -> T | None:
        """Return a field of exactly one type; None if it is null or missing."""
        value = self.fields.get(name)
        if value is None:
            return None
        if type(value) is not kind:
            self._refuse(f".{name}", f"expected {JSON_KINDS[kind]}, got {json_kind(value)}")
        return value

    def require(self, name: str, kind: type[T]) -> T:
        value = self.get(name, kind)
        if value is None:
            self._refuse(f".{name}", "is missing")
        return value

    def objects(self, name: str) -> list[_Object]:
        return [
            _Object(self._response, item, f"{self._path}.{name}[{index}]")
            for index, item in enumerate(self.get(name, list) or ())
        ]

    def strings(self, name: str) -> tuple[str, ...]:
        items: list[Any] = self.get(name, list) or []
        self._check_strings(name, enumerate(items))
        return tuple(items)

    def string_map(self, name: str) -> dict[str, str] | None:
        items: dict[str, Any] | None = self.get(name, dict)
        if items is not None:
            self._check_strings(name, ((repr(key), value) for key, value in items.items()))
        return items

    def _check_strings(self, name: str, items: Iterable[tuple[Any, Any]]) -> None:
        for key, value in items:
            if type(value) is not str:
                self._refuse(f".{name}[{key}]", f"expected a string, got {json_kind(value)}")

    def _refuse(self, place: str, reason: str) -> NoReturn:
        invalid_shape(self._response, f"{self._path}{place}", reason)


def read_workflow(response: Response) -> Workflow:
    """Read one version of a workflow; the documented fields win over those in `workflow`."""
    check_status(response)
    body = _Object(response, decode(response))
    workflow_id, name = body.get("workflow_id", int), body.get("workflow_name", str)
    if (workflow_id is None or name is None) and "workflow" in body.fields:
        inner = _Object(response, body.fields["workflow"], "$.workflow")
        workflow_id = inner.require("id", int) if workflow_id is None else workflow_id
        name = inner.require("name", str) if name is None else name
    version = body.get("version", int)
    edges = tuple(
        WorkflowEdge(
            edge.require("source_node_name", str),
            edge.require("target_node_name", str),
            bool(edge.get("conditionals", list)),
        )
        for edge in body.objects("edges")
    )
    return Workflow(
        id=body.require("workflow_id", int) if workflow_id is None else workflow_id,
        name=body.require("workflow_name", str) if name is None else name,
        version=body.get("version_number", int) if version is None else version,
        labels=body.strings("release_labels"),
        required_inputs=body.string_map("required_input_variables"),
        nodes=_nodes(body, edges),
        edges=edges,
        raw=body.fields,
    )


def _nodes(body: _Object, edges: Iterable[WorkflowEdge]) -> dict[str, WorkflowNode]:
    objects = {node.require("name", str): node for node in body.objects("nodes")}
    # Dicts, because they are ordered sets.
    dependencies = {
        name: dict.fromkeys(node.strings("dependencies")) for name, node in objects.items()
    }
    for edge in edges:
        if edge.target in dependencies:
            dependencies[edge.target][edge.source] = None
    return {
        name: WorkflowNode(
            name,
            node.get("node_type", str) or "",
            bool(node.get("is_output_node", bool)),
            tuple(it for it in dependencies[name] if it in objects),
        )
        for name, node in objects.items()
    }


class WorkflowsPage:
    """One page of the list of workflows; `following` is the number of the next one."""

    def __init__(self, response: Response, page: int) -> None:
        check_status(response)
        body = _Object(response, decode(response))
        if body.fields.get("items") is None:
            body.require("items", list)
        self.summaries = [
            WorkflowSummary(
                id=item.require("id", int),
                name=item.require("name", str),
                labels=item.strings("release_labels"),
                latest_version=item.get("latest_version_number", int),
                is_deleted=bool(item.get("is_deleted", bool)),
            )
            for item in body.objects("items")
        ]
        has_next = body.get("has_next", bool)
        if has_next is None:
            has_next = page < (body.get("pages", int) or 0)
        self.following = page + 1 if has_next else None
