"""Reading what a request asks for; what is wrong with it is told as FastAPI tells it."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

from attrs import frozen
from multidict import MultiMapping

Location: TypeAlias = tuple[str, ...]

_TRUE = frozenset({"1", "on", "t", "true", "y", "yes"})
_FALSE = frozenset({"0", "off", "f", "false", "n", "no"})
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_INT64 = range(-(2**63), 2**63)


class RequestValidationError(Exception):
    """A request with unusable parameters; `detail` is the body of a 422."""

    def __init__(self, location: Location, message: str, kind: str) -> None:
        super().__init__(message)
        self.detail = [{"loc": list(location), "msg": message, "type": kind}]


@frozen
class ResultsQuery:
    """The parameters of the results operation."""

    execution_id: int
    all_outputs: bool

    @classmethod
    def parse(cls, query: MultiMapping[str]) -> "ResultsQuery":
        return cls(
            _integer(query, "workflow_version_execution_id"),
            _boolean(query, "return_all_outputs"),
        )


def parse_capability(query: MultiMapping[str]) -> list[str]:
    """Read the channels that a token is asked for."""
    if "capability" not in query:
        raise RequestValidationError(("query", "capability"), "Field required", "missing")
    return query.getall("capability")


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


def parse_run(body: bytes) -> dict[str, Any]:
    """Read and check the body of a run request."""
    if not body:
        raise RequestValidationError(("body",), "Field required", "missing")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestValidationError(("body",), "JSON decode error", "json_invalid") from None
    if not isinstance(fields, dict):
        _wrong(("body",), "dictionary")
    for name, (is_valid, kind) in _RUN_FIELDS.items():
        if name in fields and not is_valid(fields[name]):
            _wrong(("body", name), kind)
    return fields


def _wrong(location: Location, kind: str) -> NoReturn:
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
