"""The fields of an execution that clients see, and their schemas for OpenAPI."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import NoneType
from typing import Any, get_args, get_type_hints

import attrs

from promptlayer_exec import Node, NodeStatus, NodeTimes, Snapshot
from promptlayer_exec._integration import node_dict

DEFAULT_FIELDS = ("value", "error_message")
# Clients see any other field of a node only if the app lists it.
_ALWAYS_VISIBLE = ("name", "status", "is_output_node")
_OPTIONAL = [field.name for field in attrs.fields(Node) if field.name not in _ALWAYS_VISIBLE]

_JSON_TYPES = {
    str: "string",
    NodeStatus: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    NoneType: "null",
}


def hidden_fields(fields: Collection[str]) -> frozenset[str]:
    """Return the fields of a node that clients must not see."""
    if isinstance(fields, str):
        raise TypeError(f"fields takes several names: write [{fields!r:.100}]")
    if unknown := [field for field in fields if field not in _OPTIONAL]:
        known = ", ".join(map(repr, _OPTIONAL))
        raise ValueError(f"fields may be {known}, got {unknown[0]!r:.100}")
    return frozenset(_OPTIONAL) - frozenset(fields)


def shown_snapshot(snapshot: Snapshot, hidden: Iterable[str]) -> dict[str, Any]:
    shown = snapshot.to_dict()
    for node in shown["nodes"].values():
        for field in hidden:
            del node[field]
    return shown


def shown_node(snapshot: Snapshot, name: str, hidden: Iterable[str]) -> dict[str, Any]:
    """Return the data of an event about one node, without hidden fields."""
    node = node_dict(snapshot, name)
    for field in hidden:
        del node[field]
    return {"execution_id": str(snapshot.execution_id), "progress": snapshot.progress, **node}


def _object(title: str, /, *, optional: Collection[str] = (), **properties: Any) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"title": title, "type": "object", "required": required, "properties": properties}


_TEXT, _NUMBER = {"type": "string"}, {"type": "number"}
_YES_NO_UNKNOWN = {"type": ["boolean", "null"]}
_INTEGER = {"type": "integer"}


def _problem_schema() -> dict[str, Any]:
    objects = {"type": "array", "items": {"type": "object"}}
    some = {"detail": _TEXT, "execution_id": _TEXT, "failed": objects, "errors": objects}
    return _object("Problem", optional=some, type=_TEXT, title=_TEXT, status=_INTEGER, **some)


def described(
    description: str, schema: Mapping[str, Any], media_type: str = "application/json"
) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": schema}}}


PROBLEMS: dict[int | str, dict[str, Any]] = dict.fromkeys(
    ("4XX", "5XX"),
    described("A problem (RFC 9457)", _problem_schema(), "application/problem+json"),
)


def snapshot_schema(hidden: Collection[str]) -> dict[str, Any]:
    return _object(
        "Snapshot",
        execution_id=_TEXT,
        poll=_INTEGER,
        elapsed=_NUMBER,
        complete={"type": "boolean"},
        succeeded=_YES_NO_UNKNOWN,
        progress=_NUMBER,
        nodes={"type": "object", "additionalProperties": _object("Node", **_node(hidden))},
    )


def _node(hidden: Collection[str]) -> dict[str, Any]:
    """Return the schemas of a node's fields, from the types of `Node` and `NodeTimes`."""
    fields = {
        name: _schema(kind) for name, kind in get_type_hints(Node).items() if name not in hidden
    }
    times = {
        name: _schema(kind) | {"description": "Seconds from the first poll."}
        for name, kind in get_type_hints(NodeTimes).items()
    }
    return fields | times


def _schema(kind: Any) -> dict[str, Any]:
    """Return the schema of the JSON values of a type."""
    if kind is Any:
        return {}
    types = list(dict.fromkeys(_JSON_TYPES[member] for member in get_args(kind) or (kind,)))
    return {"type": types[0] if len(types) == 1 else types}


def event_schema(hidden: Collection[str]) -> dict[str, Any]:
    """Return the schema of the data of an event without hidden fields."""
    snapshot = snapshot_schema(hidden)
    last = {"anyOf": [snapshot, {"type": "null"}]}
    changed = _object("Changed node", execution_id=_TEXT, progress=_NUMBER, **_node(hidden))
    reason = {"execution_id": _TEXT, "type": _TEXT, "message": _TEXT}
    waiting = _object("Waiting", **reason)
    resumed = _object("Resumed", execution_id=_TEXT)
    failure = _object("Failure", **reason, status=_INTEGER, last=last)
    return {"anyOf": [snapshot, changed, waiting, resumed, failure]}


def started_schema(*, has_ticket: bool) -> dict[str, Any]:
    properties = {"execution_id": _TEXT}
    if has_ticket:
        properties["ticket"] = _TEXT
    return _object("Started", optional=["warning"], **properties, warning=_TEXT)
