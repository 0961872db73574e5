"""The fields of an execution that clients see, and their schemas for OpenAPI."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from promptlayer_exec import Snapshot
from promptlayer_exec._integration import node_dict

DEFAULT_FIELDS = ("value", "error_message")
# The fields of a node that clients see only if the app lists them, and their schemas.
_OPTIONAL = {"value": {}, "error_message": {"type": ["string", "null"]}, "raw_error_message": {}}


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
_TIME = {"type": ["number", "null"], "description": "Seconds from the first poll."}
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
    optional = {name: schema for name, schema in _OPTIONAL.items() if name not in hidden}
    times = {"running": _TIME, "final": _TIME}
    always = {"name": _TEXT, "status": _TEXT, "is_output_node": _YES_NO_UNKNOWN}
    return always | optional | times


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
