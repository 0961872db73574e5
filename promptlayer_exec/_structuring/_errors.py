"""Finding the first mismatch in a tree of cattrs' errors: its path and its reason."""

from __future__ import annotations

import json
import traceback
from contextlib import suppress
from typing import Any

import attrs
import cattrs
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
    StructureHandlerNotFoundError,
)


def locate(error: Exception, value: Any, converter: cattrs.Converter) -> tuple[str, str, Exception]:
    """Return the path to the first mismatch in a tree of cattrs' errors, its reason and error."""
    path, container, key = "$", None, None
    while isinstance(error, BaseValidationError):
        group, error = error, error.exceptions[0]
        key = _key(group, error, converter)
        if key is not None:
            path += step(key)
            container, value = value, value[key] if _holds(value, key) else None
    if isinstance(error, KeyError) and isinstance(container, dict) and key not in container:
        return path, "is missing", error
    if isinstance(error, ForbiddenExtraKeysError):
        return path + step(min(error.extra_fields)), "is not expected", error
    with suppress(Exception):  # not an error of pydantic
        first = error.errors()[0]  # type: ignore[attr-defined]
        steps, reason = _within_model(first, value)
        return path + steps, reason, error
    return path, _reason(error), error


def _key(group: BaseValidationError, error: Exception, converter: cattrs.Converter) -> Any:
    """Return the JSON key of a group's first error, None if the error is about the whole value."""
    for note in reversed(getattr(error, "__notes__", ())):
        if isinstance(note, IterableValidationNote):
            return note.index
        if isinstance(note, AttributeValidationNote):
            return _renamed(note.name, group.cl, converter)
    # attrs does not name the field whose validator failed, but the validator gets it passed.
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for local in frame.f_locals.values():
            if isinstance(local, attrs.Attribute):
                return _renamed(local.name, group.cl, converter)
    return None


def _renamed(name: str, kind: Any, converter: cattrs.Converter) -> str:
    with suppress(Exception):  # a hook of the user has no overrides
        return converter.get_structure_hook(kind).overrides[name].rename or name  # type: ignore[attr-defined]
    return name


def _within_model(detail: dict[str, Any], value: Any) -> tuple[str, str]:
    """Return the path and the reason of a pydantic error detail.

    Its `loc` has the names of union members between the keys.
    """
    missing = detail["type"] == "missing"
    path = ""
    for index, key in enumerate(detail["loc"], start=1):
        if _holds(value, key):
            path, value = path + step(key), value[key]
        elif missing and index == len(detail["loc"]):
            path += step(key)
    return path, "is missing" if missing else detail["msg"]


def _holds(value: Any, key: Any) -> bool:
    if isinstance(value, dict):
        return key in value
    return isinstance(value, list) and isinstance(key, int) and key < len(value)


def step(key: Any) -> str:
    """Return one step of a JSON path, such as `.price`, `["a b"]` or `[3]`."""
    if isinstance(key, str):
        return f".{key}" if key.isidentifier() else f"[{json.dumps(key)}]"
    return f"[{key}]"


def _reason(error: Exception) -> str:
    said = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    if isinstance(error, (TypeError, ValueError, StructureHandlerNotFoundError)):
        return said
    return f"{type(error).__name__}: {said}"
