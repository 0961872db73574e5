"""The wire format: JSON as the server writes it, replies, and the parameters of requests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

import attrs
from aiohttp import web
from multidict import MultiMapping

Location: TypeAlias = tuple[str, ...]

JSON_TYPE = {"Content-Type": "application/json"}

_ENCODER = json.JSONEncoder(separators=(",", ":"))
_TRUE = frozenset({"1", "on", "t", "true", "y", "yes"})
_FALSE = frozenset({"0", "off", "f", "false", "n", "no"})
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_INT64 = range(-(2**63), 2**63)


def encode(value: object) -> str:
    """Return a value as the server writes it: compact ASCII JSON, which may contain `NaN`."""
    return _ENCODER.encode(value)


@attrs.frozen
class Reply:
    """A status, an exact body and headers."""

    status: int
    body: bytes
    headers: Mapping[str, str] = attrs.field(factory=dict)

    @classmethod
    def json(cls, status: int, text: str, headers: Mapping[str, str] | None = None) -> Reply:
        """Return a reply of JSON text, followed by a newline as from the server."""
        return cls(status, f"{text}\n".encode(), {**JSON_TYPE, **(headers or {})})

    @classmethod
    def error(cls, status: int, message: str, headers: Mapping[str, str] | None = None) -> Reply:
        """Return a reply with the server's error object."""
        return cls.json(status, encode({"success": False, "message": message}), headers)

    def response(self) -> web.Response:
        """Return an aiohttp response, which can be sent once."""
        return web.Response(status=self.status, body=self.body, headers=self.headers)


class RequestValidationError(Exception):
    """A request with unusable parameters; `detail` goes into the body of a 422, as in FastAPI."""

    def __init__(self, location: Location, message: str, kind: str) -> None:
        super().__init__(message)
        self.detail = [{"loc": list(location), "msg": message, "type": kind}]


def parse_results_query(query: MultiMapping[str]) -> tuple[int, bool]:
    """Return the execution id and `return_all_outputs` of a results request."""
    return (
        _integer(query, "workflow_version_execution_id"),
        _boolean(query, "return_all_outputs"),
    )


def parse_capability(query: MultiMapping[str]) -> list[str]:
    """Return the channels that a token is requested for."""
    if "capability" not in query:
        raise RequestValidationError(("query", "capability"), "Field required", "missing")
    return query.getall("capability")


def parse_run(body: bytes) -> dict[str, Any]:
    """Return the checked body of a run request."""
    if not body:
        raise RequestValidationError(("body",), "Field required", "missing")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestValidationError(("body",), "JSON decode error", "json_invalid") from None
    if not isinstance(fields, dict):
        _raise_wrong_type(("body",), "dictionary")
    for name, (is_valid, kind) in _RUN_FIELDS.items():
        if name in fields and not is_valid(fields[name]):
            _raise_wrong_type(("body", name), kind)
    return fields


def _integer(query: MultiMapping[str], name: str) -> int:
    location = ("query", name)
    if name not in query:
        raise RequestValidationError(location, "Field required", "missing")
    text = query.getall(name)[-1]
    if not _INTEGER.fullmatch(text) or int(text) not in _INT64:
        raise RequestValidationError(
            location, "Input should be a valid 64-bit integer", "int_parsing"
        )
    return int(text)


def _boolean(query: MultiMapping[str], name: str) -> bool:
    text = query.getall(name, ["false"])[-1].lower()
    if text not in _TRUE | _FALSE:
        raise RequestValidationError(
            ("query", name),
            "Input should be a valid boolean, unable to interpret input",
            "bool_parsing",
        )
    return text in _TRUE


def _raise_wrong_type(location: Location, kind: str) -> NoReturn:
    raise RequestValidationError(location, f"Input should be a valid {kind}", f"{kind}_type")


def _is_string_or_null(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_integer_or_null(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _is_metadata(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and all(isinstance(text, str) for text in value.values())


_RUN_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "input_variables": (lambda value: isinstance(value, dict), "dictionary"),
    "metadata": (_is_metadata, "dictionary"),
    "workflow_label_name": (_is_string_or_null, "string"),
    "workflow_version_number": (_is_integer_or_null, "integer"),
    "return_all_outputs": (lambda value: isinstance(value, bool), "boolean"),
    "callback_url": (_is_string_or_null, "string"),
    "channel_name_suffix": (_is_string_or_null, "string"),
}
