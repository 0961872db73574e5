"""Building requests and reading responses, without I/O.

https://docs.promptlayer.com/reference/get-workflow-version-execution-results
https://docs.promptlayer.com/reference/run-workflow
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar
from urllib.parse import quote

import attrs
import cattrs
from cattrs.errors import ClassValidationError
from cattrs.gen import make_dict_structure_fn, override

from promptlayer_exec._api.json import loads
from promptlayer_exec._api.status import status_error, status_name
from promptlayer_exec._display import json_kind
from promptlayer_exec._errors import InvalidResponse
from promptlayer_exec._events import logger
from promptlayer_exec._models import (
    FrozenMap,
    MainOutput,
    Node,
    StartRequest,
    read_nodes,
    same_json,
)

if TYPE_CHECKING:
    from yarl import URL

T = TypeVar("T")

MAX_ID = 2**63 - 1
# The one POST that starts nothing.
TOKEN_PATH = "/ws-token-request-library"  # noqa: S105 - a path
_ID_FIELD = "workflow_version_execution_id"
_EXCERPT = 200
_REPORTED_AT_MOST = 100
_LONGEST_STATUS = 100


@attrs.define
class Request:
    """A request to the server.

    `target` is the path and query below the base URL, percent-encoded; `url` is the whole URL, if
    it was built in advance; `headers` are those that this request needs; `expected` is a body that
    the answer may well have again, which is then not read into memory once more. `secret` is a part
    of the body that no error may show; `before_sent` is called just before the request is sent,
    after it has waited for a connection and for the rate.
    """

    method: str
    target: str
    execution_id: int | None = None
    body: bytes | None = None
    url: URL | None = None
    headers: Mapping[str, str] = {}
    expected: bytes = b""
    secret: str | None = None
    before_sent: Callable[[], object] | None = None


@attrs.define
class Response:
    """A response of the server; the body is decompressed, and `retry_after` in seconds."""

    status: int
    body: bytes
    location: str | None = None
    retry_after: float | None = None


@attrs.define
class Reply(Generic[T]):
    """The value of a successful response, with the measurements of `Polled`.

    `sent_at` is when its request was sent, on the event loop's clock.
    """

    value: T
    body_bytes: int
    sent_at: float
    duration: float
    lateness: float
    retry_after: float | None


def check_execution_id(value: Any) -> int:
    """Return an execution id, which may be any value with `__index__` but a bool, as an int."""
    return _positive_int64("execution id", value, "an int")


def results_request(execution_id: int, *, return_all_outputs: bool) -> Request:
    """Return the request for all nodes of an execution, or for its main output alone."""
    flag = "true" if return_all_outputs else "false"
    return Request(
        "GET",
        f"/workflow-version-execution-results?{_ID_FIELD}={execution_id}&return_all_outputs={flag}",
        execution_id,
        # A main output may be a bare number, and of one that is compressed the end is not seen.
        headers={} if return_all_outputs else {"Accept-Encoding": "identity"},
    )


def run_request(
    start: StartRequest, inputs: Mapping[str, Any], channel_suffix: str | None = None
) -> Request:
    """Return the request that starts a run with `inputs`, plain JSON values, not `start.inputs`.

    The completion of a run with a `channel_suffix` is pushed to the channel of that suffix.

    All other fields of `start` are checked; raises `TypeError` or `ValueError`.
    """
    label, version = version_selection(start.label, start.version)
    body = {
        "input_variables": inputs,
        "metadata": _metadata(start.metadata),
        "workflow_label_name": label,
        "workflow_version_number": version,
        "callback_url": optional_str("callback_url", start.callback_url),
        "channel_name_suffix": channel_suffix,
    }
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
    version = None if version is None else _positive_int64("version", version, "an int")
    return optional_str("label", label), version


def percent_encoded(name: str, text: str) -> str:
    """Return a text percent-encoded as a whole; `name` is for the error."""
    try:
        return quote(text, safe="")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode text, got {text!r:.100}") from error


def path_segment(workflow: Any) -> str:
    """Return a workflow's name or id as one percent-encoded segment of a path."""
    if not isinstance(workflow, str):
        return str(_positive_int64("workflow", workflow, "a name or an int id"))
    if not workflow:
        raise ValueError("workflow name must not be empty")
    segment = percent_encoded("workflow", workflow)
    # Many servers resolve a segment of dots as a relative path, some even if it is encoded.
    return segment.replace(".", "%2E") if set(segment) == {"."} else segment


def _positive_int64(name: str, value: Any, expected: str) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be {expected}, got {value!r:.100}")
    if not 1 <= number <= MAX_ID:
        raise ValueError(f"{name} must be between 1 and 2**63-1, got {number}")
    return number


def optional_str(name: str, value: Any) -> str | None:
    """Return an argument that must be a string or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a str or None, got {value!r:.100}")
    return value


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
class Started:
    """The response to the request that starts a run."""

    execution_id: int
    warning: str | None


# A whole id, certainly that of the outermost object, in a body that may be cut after it; ASCII,
# because corrupt bytes before it leave it in doubt.
_WHOLE_ID = re.compile(
    rb'\s*\{[^][{}\x80-\xff]*(?<!\\)"%b"\s*:\s*(\d{1,19})\s*[,}]' % _ID_FIELD.encode()
)


def up_to_id(body: bytes) -> bytes | None:
    """Return the part of a body that ends with the id of a run; None if no whole id is seen.

    The body may be broken, or too large to be decoded.
    """
    whole = _WHOLE_ID.match(body)
    return None if whole is None else whole[0]


def is_object(body: bytes) -> bool:
    """Return True if a body is a whole JSON object."""
    try:
        return isinstance(loads(body), dict)
    except (ValueError, RecursionError):
        return False


def read_started(response: Response) -> Started:
    """Read the response to the request that starts a run; a 2xx must have a usable id."""
    if response.status >= 300:
        check_status(response)
    try:
        body = decode(response)
    except InvalidResponse:
        if (whole := _WHOLE_ID.match(response.body)) is None:
            raise
        body = {_ID_FIELD: int(whole[1])}
    execution_id = body.get(_ID_FIELD) if isinstance(body, dict) else None
    if type(execution_id) is not int or not 1 <= execution_id <= MAX_ID:
        invalid_shape(response, f"$.{_ID_FIELD}", "there is no usable id")
    warning = body.get("warning")
    if warning is not None and not isinstance(warning, str):
        warning = json.dumps(warning)
    return Started(execution_id, warning or None)


@attrs.define
class NodeMap:
    """The nodes in a body, which is decoded in `raw`; `source` is the status and the body."""

    complete: bool
    nodes: FrozenMap[Node]
    raw: Any
    source: tuple[int, bytes] | None = None


@attrs.define(eq=False)
class NodeMapReader:
    """Reads node maps, and logs each unknown status once."""

    _reported: set[str] = attrs.field(factory=set)

    def read(self, response: Response, execution_id: int, before: NodeMap | None = None) -> NodeMap:
        """Read the node map in a response, with the unchanged nodes of the map `before`.

        For an unchanged response, it is `before` itself.
        """
        if before is not None and before.source == (response.status, response.body):
            return before
        check_status(response)
        return self.read_nodes(response, decode(response), execution_id, before)

    def read_nodes(
        self, response: Response, raw: Any, execution_id: int, before: NodeMap | None = None
    ) -> NodeMap:
        """Read a node map that is decoded; errors quote the body of the response."""
        if not isinstance(raw, dict):
            invalid_shape(response, "$", f"expected an object of nodes, got {json_kind(raw)}")
        nodes: dict[str, Any]
        if before is None:
            nodes = read_nodes(raw)
        else:
            changed = {}
            for name, body in raw.items():
                # Whoever got the last snapshot may have changed its `raw`.
                earlier = before.raw.get(name)
                if earlier is not None and name in before.nodes and same_json(earlier, body):
                    raw[name] = earlier
                else:
                    changed[name] = body
            news = read_nodes(changed)
            nodes = {name: news[name] if name in news else before.nodes[name] for name in raw}
        if not all(nodes.values()):
            for name, node in nodes.items():
                if node is None:
                    nodes[name] = self._read_unusual_node(response, name, raw[name], execution_id)
        return NodeMap(
            response.status == 200, FrozenMap(nodes), raw, (response.status, response.body)
        )

    def _read_unusual_node(
        self, response: Response, name: str, body: Any, execution_id: int
    ) -> Node:
        node = _checked_node(response, name, body)
        if type(node.status) is str and node.status[:_LONGEST_STATUS] not in self._reported:
            self._report(node, execution_id)
        return node

    def _report(self, node: Node, execution_id: int) -> None:
        if len(self._reported) < _REPORTED_AT_MOST:
            self._reported.add(node.status[:_LONGEST_STATUS])
            logger.warning(
                "execution %d: node %.100r has the unknown status %.100r; it counts as not final",
                execution_id,
                node.name,
                node.status,
            )


def _checked_node(response: Response, name: str, body: Any) -> Node:
    if not isinstance(body, dict):
        invalid_shape(response, f"$.{name:.1000}", f"expected a node, got {json_kind(body)}")
    try:
        return _node_hook()({**body, "name": name}, Node)
    except ClassValidationError as group:
        error, note = group.group_exceptions()[0][0]
        reason = "is missing" if isinstance(error, KeyError) else str(error)
        invalid_shape(response, f"$.{name:.1000}.{note.name}", reason, group)


@cache
def _node_hook() -> Callable[[Any, Any], Node]:
    # A converter of our own, which nobody's hooks can change. Each field has its hook here: those
    # that cattrs finds by the types would coerce.
    return make_dict_structure_fn(
        Node,
        cattrs.Converter(),
        name=_exactly("a string", str),
        status=_exactly("a string", str),
        error_message=_exactly("a string or null", str, NoneType),
        is_output_node=_exactly("true, false or null", bool, NoneType),
    )


def _exactly(expected: str, *types: type) -> Any:
    def structure(value: Any, _: Any) -> Any:
        if type(value) not in types:
            raise TypeError(f"expected {expected}, got {json_kind(value)}")
        return value

    return override(struct_hook=structure)


def read_main_output(response: Response, execution_id: int) -> MainOutput:
    """Read the main output in a response; any body of a 202 is accepted."""
    check_status(response)
    try:
        value = decode(response)
    except InvalidResponse:
        if response.status == 200:
            raise
        value = None
    return MainOutput(execution_id, response.status == 200, value)


def decode(response: Response) -> Any:
    """Return the JSON value in a body, or raise an `InvalidResponse`."""
    try:
        return loads(response.body)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        what = f"the {response.status} response is not JSON ({error})"
        if isinstance(error, json.JSONDecodeError):
            error.doc = ""  # it is the whole body, at up to four bytes per character
        raise _invalid(response, what, reason=str(error)) from error
    except (ValueError, RecursionError) as error:  # too many digits, or nested too deeply
        invalid_shape(response, "$", f"the JSON cannot be read ({error})", error)


def invalid_shape(
    response: Response, path: str, reason: str, cause: BaseException | None = None
) -> NoReturn:
    """Raise the `InvalidResponse` for JSON that is not of the documented shape."""
    what = f"the {response.status} response has an unexpected shape: {path}: {reason}"
    raise _invalid(response, what, path=path, reason=reason) from cause


def _invalid(response: Response, what: str, **fields: Any) -> InvalidResponse:
    return InvalidResponse(what, status=response.status, excerpt=excerpt(response.body), **fields)


def excerpt(body: bytes) -> str:
    """Return the start of a body as text, for an error message."""
    return body[:_EXCERPT].decode("utf-8", "replace")


def check_status(response: Response) -> None:
    """Raise a `StatusError`, or, for a 2xx other than 200 and 202, an `InvalidResponse`."""
    if response.status >= 300:
        raise status_error(response)
    if response.status not in (200, 202):
        name = status_name(response.status)
        what = f"the server answered {name}, but only 200 and 202 are defined"
        raise _invalid(response, what, path="$")


_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+", re.ASCII)


def read_retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return the seconds that a server asks to wait; None if it does not, or is not understood.

    `headers` is case-insensitive, and `now` is in seconds since the epoch.

    https://www.rfc-editor.org/rfc/rfc9110#field.retry-after
    """
    milliseconds = headers.get("retry-after-ms")
    if milliseconds and (number := _number(milliseconds)) is not None:
        return number / 1000
    if not (value := headers.get("Retry-After")):
        return None
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        date = parsedate_to_datetime(value)
        at = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(at - now, 0.0)


def _number(value: str) -> float | None:
    value = value.strip()  # `float` does not take all that this does for white space
    return float(value) if _NUMBER.fullmatch(value) else None
