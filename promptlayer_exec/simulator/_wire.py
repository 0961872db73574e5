"""The wire format: JSON as the server writes it, responses, and the parameters of requests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any

from aiohttp import web

JSON_TYPE = {"Content-Type": "application/json"}

_ENCODER = json.JSONEncoder(separators=(",", ":"))
# For each field of a run request, its name in errors and its exact types. True is also an int.
_RUN_FIELDS: dict[str, tuple[str, set[type]]] = {
    "input_variables": ("dictionary", {dict}),
    "metadata": ("dictionary", {dict, NoneType}),
    "workflow_label_name": ("string", {str, NoneType}),
    "workflow_version_number": ("integer", {int, NoneType}),
    "return_all_outputs": ("boolean", {bool}),
    "callback_url": ("string", {str, NoneType}),
    "channel_name_suffix": ("string", {str, NoneType}),
}


def encode(value: object) -> str:
    """Return a value as the server writes it: compact ASCII JSON, which may contain `NaN`."""
    return _ENCODER.encode(value)


def json_response(status: int, text: str, **headers: str) -> web.Response:
    """Return a response of JSON text, followed by a newline as from the server."""
    body = f"{text}\n".encode()
    return web.Response(status=status, body=body, headers={**JSON_TYPE, **headers})


def error_response(status: int, message: str, **headers: str) -> web.Response:
    return json_response(status, encode({"success": False, "message": message}), **headers)


class RequestValidationError(Exception):
    """A request with unusable parameters. `detail` goes into the body of a 422, as in FastAPI."""

    def __init__(self, message: str, kind: str, *location: str) -> None:
        super().__init__(message)
        self.detail = [{"loc": location, "msg": message, "type": kind}]


def parse_results_query(query: Mapping[str, str]) -> tuple[int, bool]:
    """Return the execution id and `return_all_outputs` of a results request."""
    name = "workflow_version_execution_id"
    required_values(query, name)
    number = parse_integer(query, name, range(-(2**63), 2**63))

    name = "return_all_outputs"
    word = query.get(name, "false").lower()
    is_true = word in {"1", "on", "t", "true", "y", "yes"}
    if not is_true and word not in {"0", "off", "f", "false", "n", "no"}:
        message = "Input should be a valid boolean, unable to interpret input"
        raise RequestValidationError(message, "bool_parsing", "query", name)
    return number, is_true


def parse_integer(
    query: Mapping[str, str], name: str, allowed: range, default: int | None = None
) -> Any:
    """Return an integer parameter, or `default` if it is missing."""
    text = query.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or int(text) not in allowed:
        message = f"Input should be an integer from {allowed[0]} to {allowed[-1]}"
        raise RequestValidationError(message, "int_parsing", "query", name)
    return int(text)


def parse_run(body: bytes) -> dict[str, Any]:
    """Return the checked body of a run request."""
    if not body:
        raise RequestValidationError("Field required", "missing", "body")
    try:
        fields = json.loads(body)
    except ValueError:
        raise RequestValidationError("JSON decode error", "json_invalid", "body") from None

    if not isinstance(fields, dict):
        raise _wrong_type("dictionary", "body")
    for name, (kind, types) in _RUN_FIELDS.items():
        if name in fields and type(fields[name]) not in types:
            raise _wrong_type(kind, "body", name)

    if not all(isinstance(text, str) for text in (fields.get("metadata") or {}).values()):
        raise _wrong_type("dictionary", "body", "metadata")

    callback_url = fields.get("callback_url")
    if callback_url is not None and not re.match("[A-Za-z][A-Za-z0-9+.-]*:.", callback_url):
        raise _wrong_type("URL", "body", "callback_url")
    return fields


def required_values(query: Mapping[str, str], name: str) -> list[str]:
    """Return all values of a required parameter."""
    values = [value for key, value in query.items() if key == name]
    if not values:
        raise RequestValidationError("Field required", "missing", "query", name)
    return values


def _wrong_type(kind: str, *location: str) -> RequestValidationError:
    return RequestValidationError(f"Input should be a valid {kind}", f"{kind}_type", *location)
