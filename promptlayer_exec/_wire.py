"""Requests and responses as plain data: no I/O, so every rule about the protocol is tested here.

The operation: https://docs.promptlayer.com/reference/get-workflow-version-execution-results
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar
from urllib.parse import quote

import attrs
import cattrs
from cattrs.errors import ClassValidationError
from cattrs.gen import make_dict_structure_fn, override

from promptlayer_exec._errors import (
    BadRequest,
    FieldError,
    Forbidden,
    InvalidResponse,
    NotFound,
    RateLimited,
    ServerError,
    StatusError,
    Unauthorized,
    UnprocessableEntity,
)
from promptlayer_exec._events import logger
from promptlayer_exec._json import loads
from promptlayer_exec._models import (
    STATUSES,
    FrozenMap,
    MainOutput,
    Node,
    StartRequest,
    make_node,
    same_json,
)

if TYPE_CHECKING:
    from yarl import URL

T = TypeVar("T")

MAX_ID = 2**63 - 1
_ID_FIELD = "workflow_version_execution_id"
_EXCERPT = 200
_LINE = 500


@attrs.define
class Request:
    """What to ask of the server.

    Attributes:
        method: the HTTP method.
        target: path and query below the base URL, percent-encoded.
        execution_id: the execution concerned, if there is one yet.
        body: JSON to send along.
        url: the whole URL, where it was built ahead.
    """

    method: str
    target: str
    execution_id: int | None = None
    body: bytes | None = None
    url: URL | None = None


@attrs.define
class Response:
    """What the server answered.

    Attributes:
        status: the HTTP status.
        body: the body, decompressed.
        location: where a redirect leads.
        retry_after: the seconds that the server asked to wait.
    """

    status: int
    body: bytes
    location: str | None = None
    retry_after: float | None = None


@attrs.define
class Reply(Generic[T]):
    """A good answer, and how it came.

    Attributes:
        value: what was read from the body.
        body_bytes: the size of the body, after decompression.
        duration: seconds from sending the request to the last byte.
        lateness: seconds by which it was sent after its time.
        retry_after: the seconds that the server asked to wait before asking again.
    """

    value: T
    body_bytes: int
    duration: float
    lateness: float
    retry_after: float | None


def check_execution_id(value: Any) -> int:
    """Return an execution id as an int.

    Raises:
        TypeError: it is no integer.
        ValueError: it is not in 1 ... 2**63-1.
    """
    return _integer("an execution id", value, "an int")


def results_request(execution_id: int, *, return_all_outputs: bool) -> Request:
    """Build the request for an execution's results."""
    flag = "true" if return_all_outputs else "false"
    return Request(
        "GET",
        f"/workflow-version-execution-results?{_ID_FIELD}={execution_id}&return_all_outputs={flag}",
        execution_id,
    )


def run_request(start: StartRequest, inputs: Mapping[str, Any]) -> Request:
    """Build the request that starts a run.

    https://docs.promptlayer.com/reference/run-workflow

    Args:
        start: what to start; its own inputs are not looked at.
        inputs: its input variables, as JSON carries them.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the workflow is no possible name or id, or label and version are both given.
    """
    if start.label is not None and start.version is not None:
        raise ValueError("label and version exclude each other: give one of them, or neither")
    version = None if start.version is None else _integer("version", start.version, "an int")
    body = {
        "input_variables": inputs,
        "metadata": _metadata(start.metadata),
        "workflow_label_name": _text("label", start.label),
        "workflow_version_number": version,
        "callback_url": _text("callback_url", start.callback_url),
    }
    given = {name: value for name, value in body.items() if value is not None}
    return Request(
        "POST",
        f"/workflows/{_path_segment(start.workflow)}/run",
        body=json.dumps(given, allow_nan=False).encode(),
    )


def _path_segment(workflow: Any) -> str:
    if not isinstance(workflow, str):
        return str(_integer("a workflow", workflow, "a name or an int id"))
    if not workflow:
        raise ValueError("a workflow's name is not empty")
    try:
        segment = quote(workflow, safe="")
    except UnicodeEncodeError as error:
        raise ValueError(f"a workflow's name is text, not {workflow!r:.100}") from error
    # Servers and proxies resolve a segment of dots, and some even where it is encoded.
    return segment.replace(".", "%2E") if set(segment) == {"."} else segment


def _integer(what: str, value: Any, expected: str) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{what} is {expected}, not {value!r:.100}")
    if not 1 <= number <= MAX_ID:
        raise ValueError(f"{what} lies in 1 ... 2**63-1, and {number} does not")
    return number


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} is a str or None, not {value!r:.100}")
    return value


def _metadata(metadata: Any) -> dict[str, str] | None:
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata maps str to str, and is {metadata!r:.100}")
    for name, value in metadata.items():
        if not isinstance(name, str):
            raise TypeError(f"metadata maps str to str, and has the key {name!r:.100}")
        if not isinstance(value, str):
            raise TypeError(f"metadata maps str to str: metadata[{name!r:.100}] is {value!r:.100}")
    return dict(metadata)


@attrs.define
class Started:
    """The answer to a run request: the execution's id, and what the server warned of."""

    execution_id: int
    warning: str | None


def read_started(response: Response) -> Started:
    """Return what a run request's answer says.

    Raises:
        StatusError: the server refused, or failed.
        InvalidResponse: the answer is a 2xx without a usable id.
    """
    if response.status >= 300:
        check_status(response)
    answer = _decode(response)
    execution_id = answer.get(_ID_FIELD) if isinstance(answer, dict) else None
    if type(execution_id) is not int or not 1 <= execution_id <= MAX_ID:
        _invalid_shape(response, f"$.{_ID_FIELD}", "there is no usable id")
    warning = answer.get("warning")
    if warning is not None and not isinstance(warning, str):
        warning = json.dumps(warning)
    return Started(execution_id, warning or None)


@attrs.define
class NodeMap:
    """The answer to a request for all outputs: `complete`, the nodes, and the decoded body."""

    complete: bool
    nodes: FrozenMap[Node]
    raw: Any


class NodeMapReader:
    """Structures node maps, and reports each status that it does not know once."""

    _reported_at_most = 100

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def read(self, response: Response, execution_id: int, before: NodeMap | None = None) -> NodeMap:
        """Return the node map in a response.

        Args:
            response: what the server answered.
            execution_id: the execution.
            before: the node map before it, whose unchanged nodes are used again.

        Raises:
            StatusError: the server refused.
            InvalidResponse: the body is no JSON, or no node map.
        """
        check_status(response)
        raw = _decode(response)
        if not isinstance(raw, dict):
            _invalid_shape(response, "$", f"expected a map of node name to node, got {_kind(raw)}")
        nodes = {}
        for name, body in raw.items():
            if before is not None and name in before.nodes and same_json(before.raw[name], body):
                raw[name] = before.raw[name]
                nodes[name] = before.nodes[name]
                continue
            node = _node(name, body)
            if node is None:
                node = _checked_node(response, name, body)
                if type(node.status) is str and node.status not in self._reported:
                    self._report(node, execution_id)
            nodes[name] = node
        return NodeMap(response.status == 200, FrozenMap.adopt(nodes), raw)

    def _report(self, node: Node, execution_id: int) -> None:
        if len(self._reported) < self._reported_at_most:
            self._reported.add(node.status)
            logger.warning(
                "execution %d: node %.100r has the unknown status %.100r, taken as not final",
                execution_id,
                node.name,
                node.status,
            )


class RepeatReader:
    """Reads the node maps of one execution; what did not change is the very same object."""

    __slots__ = ("_execution_id", "_node_map", "_reader", "_seen")

    def __init__(self, reader: NodeMapReader, execution_id: int) -> None:
        self._reader = reader
        self._execution_id = execution_id
        self._seen: tuple[int, bytes] | None = None
        self._node_map: NodeMap | None = None

    def read(self, response: Response) -> NodeMap:
        """Do what `NodeMapReader.read` does."""
        seen = response.status, response.body
        if self._node_map is None or seen != self._seen:
            self._node_map = self._reader.read(response, self._execution_id, self._node_map)
            self._seen = seen
        return self._node_map


def _node(name: str, body: Any) -> Node | None:
    """Return what `_checked_node` would, in a fraction of the time; None where that must judge."""
    if type(body) is not dict:
        return None
    get = body.get
    word, message, is_output = get("status"), get("error_message"), get("is_output_node")
    if (
        type(word) is not str
        or (status := STATUSES.get(word)) is None
        or (message is not None and type(message) is not str)
        or (is_output is not None and type(is_output) is not bool)
    ):
        return None
    return make_node(name, status, get("value"), message, get("raw_error_message"), is_output)


def _checked_node(response: Response, name: str, body: Any) -> Node:
    if not isinstance(body, dict):
        _invalid_shape(response, f"$.{name}", f"expected a node, got {_kind(body)}")
    try:
        return _node_hook()({**body, "name": name}, Node)
    except ClassValidationError as group:
        noted, _ = group.group_exceptions()
        error, note = noted[0]
        reason = "is missing" if isinstance(error, KeyError) else str(error)
        _invalid_shape(response, f"$.{name}.{note.name}", reason, group)


@cache
def _node_hook() -> Callable[[Any, Any], Node]:
    # A converter of our own, so that nobody's hooks can change what the server said. Each field's
    # hook is given here, as what cattrs finds by the types would coerce.
    return make_dict_structure_fn(
        Node,
        cattrs.Converter(),
        name=_checked(str, "a string"),
        status=_checked(str, "a string"),
        error_message=_checked(str, "a string or null", null=True),
        is_output_node=_checked(bool, "true, false or null", null=True),
    )


def _checked(expected: type, described: str, *, null: bool = False) -> Any:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is not expected and not (null and value is None):
            raise TypeError(f"expected {described}, got {_kind(value)}")
        return value

    return override(struct_hook=structure)


def read_main_output(response: Response, execution_id: int) -> MainOutput:
    """Return the main output in a response; the body of a 202 is not interpreted.

    Raises:
        StatusError: the server refused.
        InvalidResponse: the body of a 200 is no JSON.
    """
    check_status(response)
    if response.status == 200:
        return MainOutput(execution_id, complete=True, value=_decode(response))
    try:
        value = _decode(response)
    except InvalidResponse:
        value = None
    return MainOutput(execution_id, complete=False, value=value)


def _decode(response: Response) -> Any:
    try:
        return loads(response.body)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidResponse(
            f"the {response.status} answer is no JSON ({error})",
            status=response.status,
            excerpt=excerpt(response.body),
            reason=str(error),
        ) from error
    except (ValueError, RecursionError) as error:  # over 4,300 digits; nested too deep
        _invalid_shape(response, "$", f"the JSON cannot be read ({error})", error)


def _invalid_shape(
    response: Response, path: str, reason: str, cause: BaseException | None = None
) -> NoReturn:
    raise InvalidResponse(
        f"the {response.status} answer has an unexpected shape: {path}: {reason}",
        status=response.status,
        excerpt=excerpt(response.body),
        path=path,
        reason=reason,
    ) from cause


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: str(value).lower()}
    return "null" if value is None else names.get(type(value), "a number")


def excerpt(body: bytes) -> str:
    """Return the start of a body, as text to show."""
    return body[:_EXCERPT].decode("utf-8", "replace")


_STATUS_ERRORS: dict[int, type[StatusError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    422: UnprocessableEntity,
    429: RateLimited,
}


def check_status(response: Response) -> None:
    """Raise the error that belongs to a status other than 200 and 202.

    Raises:
        StatusError: the server refused; by status one of its subclasses.
        InvalidResponse: another 2xx.
    """
    status = response.status
    if status in (200, 202):
        return
    if status < 300:
        raise InvalidResponse(
            f"the server answered {_named(status)} where only 200 and 202 are defined",
            status=status,
            excerpt=excerpt(response.body),
            path="$",
        )
    body = _error_body(response.body)
    said = server_message = _server_message(body)
    if status < 400:
        target = (response.location or "nowhere")[:_EXCERPT]
        said = f"a redirect to {target}, not followed as the key is for base_url alone"
    cls = _STATUS_ERRORS.get(status, ServerError if status >= 500 else StatusError)
    extra: dict[str, Any] = {"details": _details(body)} if cls is UnprocessableEntity else {}
    raise cls(
        f"the server answered {_named(status)}" + (f": {_line(said)}" if said else ""),
        status=status,
        server_message=server_message or _named(status),
        body=body,
        retry_after=response.retry_after,
        reason=_named(status),
        **extra,
    )


def _named(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _error_body(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def _server_message(body: Any) -> str:
    """Find the server's own words in the body of an error, in any of its shapes."""
    if isinstance(body, str):
        text = body[:_EXCERPT].strip()
        return "" if "<" in text else text  # a proxy's HTML tells less than the status
    if not isinstance(body, dict):
        return ""
    for key in ("message", "error", "detail"):
        if isinstance(said := body.get(key), str) and said.strip():
            return said.strip()
    return "; ".join(f"{'.'.join(map(str, detail.loc))}: {detail.msg}" for detail in _details(body))


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LINE else f"{line[:_LINE]}..."


def _details(body: Any) -> tuple[FieldError, ...]:
    """Read FastAPI's list of complaints; what does not look like one is left to `body`."""
    items = body.get("detail") if isinstance(body, dict) else None
    if not isinstance(items, list):
        return ()
    return tuple(
        FieldError(
            loc=tuple(part if type(part) is int else str(part) for part in item["loc"]),
            msg=str(item.get("msg") or ""),
            type=str(item.get("type") or ""),
        )
        for item in items
        if isinstance(item, dict) and isinstance(item.get("loc"), list)
    )


_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+", re.ASCII)


def read_retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return the seconds that a server asks to wait; None where it says nothing that makes sense.

    Args:
        headers: looked up without regard to case; `retry-after-ms` is the more precise of the two.
        now: seconds since the epoch, to measure an HTTP date against.
    """
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    value = headers.get("Retry-After")
    if value is None:
        return None
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        date = parsedate_to_datetime(value)
        at = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(at - now, 0.0)


def _number(value: str | None) -> float | None:
    if value is None or not _NUMBER.fullmatch(value := value.strip()):
        return None
    return float(value)
