"""Structures a decoded JSON value into the type that the user asks for, and never coerces."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import cattrs
from cattrs.errors import StructureHandlerNotFoundError

from promptlayer_exec._structuring._converter import Hook, attempt, is_union, strict_converter
from promptlayer_exec._structuring._errors import StructureError, locate

if TYPE_CHECKING:
    from typing_extensions import TypeForm

T = TypeVar("T")


def structure(value: Any, into: TypeForm[T], converter: cattrs.Converter | None = None) -> T:
    """Structure a decoded JSON value into a type.

    Nothing is coerced but int to float. A type that JSON has no kind for is read from its usual
    text: datetime, date and time (ISO 8601), UUID, Path, and Decimal (from a number as well); bytes
    have no usual text, and need a hook. The keys of an object are strings: they fit no `int`.

    In a union, enums and literals are tried first, then the value's own type, then the others in
    the order written, but mappings and `Any` last. Where cattrs can tell the union's attrs classes
    and dataclasses apart, only the one that it picks is tried.

    A string is tried as it is, and only if that fails, it is read as JSON text and tried again. If
    that fails as well, the error is the one of the object or array in the text, else of the string.

    Args:
        value: what `json` has read.
        into: the type; classes with `model_validate` (pydantic) validate themselves, strictly.
        converter: its structure hooks are used before our rules. What is registered on it after
            its first use here goes unnoticed.

    Raises:
        StructureError: the value does not fit.
        TypeError: `into` is no type, or has a part that nobody has a hook for.
    """
    strict = strict_converter(converter)
    hook = _usable_hook(into, strict)
    try:
        with attempt():
            return hook(value, into)  # type: ignore[no-any-return]
    except Exception as error:  # noqa: BLE001 - whatever a hook or class of the user's raises
        failure, failed = error, value
    for parsed in _within_text(value):
        try:
            with attempt():
                return hook(parsed, into)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 - likewise
            if isinstance(parsed, (dict, list)):
                failure, failed = error, parsed
    raise _explained(failure, failed, strict)


def check_type(into: Any, converter: cattrs.Converter | None = None) -> None:
    """Find out whether a type can be structured into, before there is a value.

    Raises:
        TypeError: `into` is no type, or has a part that nobody has a hook for.
    """
    _usable_hook(into, strict_converter(converter))


def _within_text(value: Any) -> list[Any]:
    """Return the JSON value that a string holds, alone in a list; an empty list without one."""
    if type(value) is str:
        with suppress(ValueError, RecursionError):
            return [json.loads(value)]
    return []


def _usable_hook(into: Any, converter: cattrs.Converter) -> Hook:
    try:
        if is_union(into):  # its own hook looks at the members only when it meets a value
            for member in get_args(into):
                converter.get_structure_hook(member)
        return converter.get_structure_hook(into)
    except Exception as error:
        raise TypeError(f"cannot structure into {into!r}: {error}") from error


def _explained(failure: Exception, value: Any, converter: cattrs.Converter) -> Exception:
    path, reason, leaf = locate(failure, value, converter)
    if isinstance(leaf, StructureHandlerNotFoundError):
        error: Exception = TypeError(f"{path}: {reason}")
    elif isinstance(leaf, RecursionError):
        error, failure = StructureError("$", "is nested too deeply"), leaf
    else:
        error = StructureError(path, reason)
    error.__cause__ = failure
    return error
