"""Building requests and reading responses, without I/O.

https://docs.promptlayer.com/reference/get-workflow-version-execution-results
https://docs.promptlayer.com/reference/run-workflow
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import attrs
from cattrs import override

from promptlayer_exec._api.json import loads
from promptlayer_exec._api.messages import Request, Response, decode, invalid_shape
from promptlayer_exec._api.status import check_status
from promptlayer_exec._api.structuring import documented, structured
from promptlayer_exec._structuring.mismatch import exact
from promptlayer_exec._values.arguments import MAX_ID, optional_str, positive_int64
from promptlayer_exec._values.errors import InvalidResponse
from promptlayer_exec._values.events import logger
from promptlayer_exec._values.models import (
    FrozenMap,
    MainOutput,
    Node,
    StartRequest,
    contradicts_completion,
    same_json,
)
from promptlayer_exec._values.statuses import FINAL, STATUSES
from promptlayer_exec._values.text import json_kind, message_text, short_repr

_ID_FIELD = "workflow_version_execution_id"
_STATUSES_WITH_NODES = (400, 500)


def results_request(execution_id: int, *, return_all_outputs: bool) -> Request:
    """Return the request for all nodes of an execution, or for its main output alone."""
    flag = str(return_all_outputs).lower()
    return Request(
        "GET",
        f"/workflow-version-execution-results?{_ID_FIELD}={execution_id}&return_all_outputs={flag}",
        execution_id,
    )


def run_request(
    start: StartRequest, inputs: Mapping[str, Any], channel_suffix: str | None = None
) -> Request:
    """Return the request that starts a run with `inputs` in JSON form, instead of `start.inputs`.

    When the run completes, PromptLayer pushes a message to the channel with `channel_suffix`.

    Raises:
        TypeError, ValueError: another field of `start` is malformed.
    """
    label, version = version_selection(start.label, start.version)
    callback_url = optional_str("callback_url", start.callback_url)

    body: dict[str, Any] = {
        "input_variables": inputs,
        "metadata": _metadata(start.metadata),
        "workflow_label_name": label,
        "workflow_version_number": version,
        "callback_url": callback_url,
        "channel_name_suffix": channel_suffix,
    }
    if callback_url is not None:
        # Only then does the callback have the documented shape, with the node map.
        body["return_all_outputs"] = True

    given = {name: value for name, value in body.items() if value is not None}
    return Request(
        "POST",
        f"/workflows/{path_segment(start.workflow)}/run",
        body=json.dumps(given, allow_nan=False).encode(),
    )


def version_selection(label: Any, version: Any) -> tuple[str | None, int | None]:
    """Return the checked label or version that selects one version of a workflow."""
    if label is not None and version is not None:
        raise ValueError("pass either label or version, not both")
    if version is not None:
        version = positive_int64("version", version, "an int")
    return optional_str("label", label), version


def path_segment(workflow: Any) -> str:
    """Return a workflow's name or id as one percent-encoded segment of a path."""
    if not isinstance(workflow, str):
        return str(positive_int64("workflow", workflow, "a name or an int id"))
    if not workflow:
        raise ValueError("workflow name must not be empty")
    segment = quote(workflow, safe="")
    # Many servers take a segment of dots for a relative path.
    if set(segment) == {"."}:
        return segment.replace(".", "%2E")
    return segment


def _metadata(metadata: Any) -> dict[str, str] | None:
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must map str to str, got {metadata!r:.100}")

    for name, value in metadata.items():
        if not isinstance(name, str):
            raise TypeError(f"metadata must map str to str, got the key {name!r:.100}")
        if not isinstance(value, str):
            raise TypeError(f"metadata[{name!r:.100}] must be a str, got {value!r:.100}")
    return dict(metadata)


@attrs.define
class NewRun:
    """The response to a start request."""

    execution_id: int
    warning: str | None = None


def _read_id(value: Any, _: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_ID:
        raise ValueError("expected an execution id")
    return value


def _read_warning(value: Any, _: Any) -> str | None:
    if not isinstance(value, str):
        value = json.dumps(value)
    return value or None


def _read_status(value: Any, _: Any) -> str:
    return exact(value, str)  # `Node` itself makes it a `NodeStatus`, if it is a known one


# Only the status decides about a run. Nothing else may make one that you paid for unreadable.


def _read_message(value: Any, _: Any) -> str | None:
    return message_text(value)


def _read_mark(value: Any, _: Any) -> bool | None:
    return value if isinstance(value, bool) else None


documented(
    NewRun,
    execution_id=override(rename=_ID_FIELD, struct_hook=_read_id),
    warning=override(struct_hook=_read_warning),
)
documented(
    Node,
    status=override(struct_hook=_read_status),
    error_message=override(struct_hook=_read_message),
    is_output_node=override(struct_hook=_read_mark),
)


def read_new_run(response: Response) -> NewRun:
    """Read the response to a start request. Every 2xx must contain an execution id."""
    if response.status >= 300:
        check_status(response)
    return structured(response, decode(response), NewRun)


def may_have_nodes(request: Request, status: int) -> bool:
    """Return True if the nodes of a complete run may stand behind an error status."""
    return request.execution_id is not None and status in _STATUSES_WITH_NODES


def as_documented(response: Response) -> Response:
    """Return the documented 200 instead of a 400 or 500 with all nodes of a complete run.

    For a workflow without an output node, PromptLayer has described such responses, first with 500
    and then with 400: `{"success": false, "message": "No output node found for this workflow",
    "output": nodes}`. Every other response is returned unchanged.
    """
    if response.status not in _STATUSES_WITH_NODES:
        return response

    with suppress(ValueError, RecursionError):
        body = loads(response.body)
        nodes = body.get("output") if isinstance(body, dict) else None
        if isinstance(nodes, dict) and nodes and all(map(_is_final, nodes.values())):
            return Response(200, json.dumps(nodes).encode())
    return response


def _is_final(node: Any) -> bool:
    status = node.get("status") if isinstance(node, dict) else None
    return isinstance(status, str) and STATUSES.get(status) in FINAL


@attrs.define
class NodeMap:
    """The nodes in a body. `raw` is the decoded body, and `source` the status and the bytes."""

    complete: bool
    nodes: FrozenMap[Node]
    raw: Any
    source: tuple[int, bytes] | None = None

    @property
    def is_early(self) -> bool:
        """Whether the server reports the run as complete, but its nodes contradict that."""
        return self.complete and contradicts_completion(self.nodes.values())


@attrs.define(eq=False)
class NodeMapReader:
    """Reads node maps, and logs each unknown status and each unknown output mark once."""

    _reported: set[tuple[str, str]] = attrs.field(factory=set)

    def read(self, response: Response, execution_id: int, before: NodeMap | None = None) -> NodeMap:
        """Read the node map in a response, and reuse the unchanged nodes of the map `before`.

        If the whole response is unchanged, return `before` itself.
        """
        if before is not None and before.source == (response.status, response.body):
            return before

        response = as_documented(response)
        check_status(response)
        raw = decode(response)
        if not isinstance(raw, dict):
            invalid_shape(response, "$", f"expected an object of nodes, got {json_kind(raw)}")

        changed = raw
        if before is not None:
            changed = {
                name: body
                for name, body in raw.items()
                if name not in before.raw or not same_json(before.raw[name], body)
            }

        nodes = {}
        for name, body in changed.items():
            named = body
            if isinstance(body, dict):
                named = {**body, "name": name}
            nodes[name] = node = structured(response, named, Node, name)
            if node.status not in STATUSES:
                self._report(execution_id, node, "status", node.status, "is not final")
            mark = named.get("is_output_node")
            if mark is not None and not isinstance(mark, bool):
                self._report(execution_id, node, "is_output_node", mark, "counts as null")

        # Snapshots share unchanged nodes, so that a watch does not keep every body in memory.
        if before is not None:
            raw.update({name: before.raw[name] for name in raw if name not in changed})
            nodes = {name: nodes.get(name) or before.nodes[name] for name in raw}

        source = (response.status, response.body)
        return NodeMap(response.status == 200, FrozenMap(nodes), raw, source)

    def _report(
        self, execution_id: int, node: Node, field: str, value: Any, consequence: str
    ) -> None:
        shown = short_repr(value)
        if (field, shown) not in self._reported:
            self._reported.add((field, shown))
            logger.warning(
                "execution %d: node %.100r has the unknown %s %s, which %s",
                execution_id,
                node.name,
                field,
                shown,
                consequence,
            )


def read_main_output(response: Response, execution_id: int) -> MainOutput:
    """Read the main output in a response. A 202 may have any body."""
    response = as_documented(response)
    check_status(response)
    try:
        value = decode(response)
    except InvalidResponse:
        if response.status == 200:
            raise
        value = None
    return MainOutput(execution_id, response.status == 200, value)
