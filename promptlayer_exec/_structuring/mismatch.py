"""Finds the value that does not match a type, and its path in a body or output."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, TypeVar

import cattrs

from promptlayer_exec._values.text import JSON_KINDS, json_kind

T = TypeVar("T")


class WrongKind(TypeError):
    """The value is not of the JSON kind that the type needs."""


def exact(value: Any, kind: type[T]) -> T:
    """Return the value if it is of exactly this kind, or else raise `WrongKind`."""
    if type(value) is not kind:
        raise WrongKind(f"expected {JSON_KINDS[kind]}, got {json_kind(value)}")
    return value


def locate(error: Exception, value: Any, converter: cattrs.Converter) -> tuple[str, str, Exception]:
    """Return the path, reason and error of the first mismatch in a tree of cattrs errors."""
    path, container, key = "$", None, None
    while isinstance(error, cattrs.BaseValidationError):
        group, error = error, error.exceptions[0]
        key = _key(group, error, converter)
        if key is not None:
            path += step(key)
            container, value = value, _item(value, key)

    if isinstance(error, KeyError) and isinstance(container, dict) and container.get(key) is None:
        return path, "is missing", error
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return path + step(min(error.extra_fields)), "unexpected field", error

    with suppress(Exception):  # not a pydantic error
        first = error.errors()[0]  # type: ignore[attr-defined]
        steps, reason = _within_model(first, value)
        return path + steps, reason, error
    return path, _reason(error), error


def failed_keys(error: Exception, converter: cattrs.Converter) -> list[Any]:
    """Return the keys of the items of an object that do not match, without those inside them."""
    if isinstance(error, cattrs.BaseValidationError):
        return [_key(error, it, converter) for it in error.exceptions]
    with suppress(Exception):  # not a pydantic error
        return [detail["loc"][0] for detail in error.errors()]  # type: ignore[attr-defined]
    return []


def _key(group: cattrs.BaseValidationError, error: Exception, converter: cattrs.Converter) -> Any:
    """Return the JSON key of a group's first error, or None if it concerns the whole value."""
    for note in reversed(getattr(error, "__notes__", ())):
        if isinstance(note, cattrs.IterableValidationNote):
            return note.index
        if isinstance(note, cattrs.AttributeValidationNote):
            with suppress(Exception):  # the user's own hook has no overrides
                hook: Any = converter.get_structure_hook(group.cl)
                return hook.overrides[note.name].rename or note.name
            return note.name
    return None


def _within_model(detail: dict[str, Any], value: Any) -> tuple[str, str]:
    """Return the path and the reason of a pydantic error detail.

    Its `loc` has the names of union members between the keys.
    """
    path = ""
    for key in detail["loc"]:
        if _holds(value, key):
            path, value = path + step(key), value[key]

    if detail["type"] == "missing":
        return path + step(detail["loc"][-1]), "is missing"
    return path, detail["msg"]


def _item(value: Any, key: Any) -> Any:
    if _holds(value, key):
        return value[key]
    return None


def _holds(value: Any, key: Any) -> bool:
    if isinstance(value, dict):
        return key in value
    return isinstance(value, list) and isinstance(key, int) and key < len(value)


def step(key: Any) -> str:
    """Return one step of a JSON path, such as `.price`, `["a b"]` or `[3]`."""
    if not isinstance(key, str):
        return f"[{key}]"
    if key.isidentifier():
        return f".{key}"
    return f"[{json.dumps(key)}]"


def _reason(error: Exception) -> str:
    reason = str(error)
    if error.args and isinstance(error.args[0], str):
        reason = error.args[0]  # the str() of a KeyError or of a group adds to it
    if isinstance(error, (TypeError, ValueError, cattrs.StructureHandlerNotFoundError)):
        return reason
    return f"{type(error).__name__}: {reason}"
