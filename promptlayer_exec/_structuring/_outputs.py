"""Structuring a decoded JSON value into a type without coercion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import cattrs
from cattrs.errors import StructureHandlerNotFoundError

from promptlayer_exec._structuring._converter import strict_converter
from promptlayer_exec._structuring._errors import StructureError, locate
from promptlayer_exec._structuring._rules import Hook, is_union
from promptlayer_exec._structuring._unions import remembering_failures

if TYPE_CHECKING:
    from typing_extensions import TypeForm

T = TypeVar("T")


def structure(value: Any, into: TypeForm[T], converter: cattrs.Converter | None = None) -> T:
    """Structure a decoded JSON value into a type.

    An int fits a float; nothing else is coerced. Types that JSON does not have are parsed from
    their usual text: datetime, date and time (ISO 8601), UUID, Path, and Decimal (from a number,
    too). Bytes have no usual text and need a hook. The keys of an object are strings and do not fit
    `int`.

    The members of a union are tried in this order: enums and literals, the value's own type, the
    other types as written, then mappings and `Any`. If cattrs can tell the attrs classes and
    dataclasses of the union apart, only the one that it picks is tried.

    A string that does not fit is parsed as JSON and tried again. If that fails, too, the error is
    about the object or array in the text if there is one, and about the string otherwise.

    Classes with `model_validate` (pydantic) validate the value themselves, in strict mode if they
    have one. The converter's structure hooks take precedence over these rules; hooks that are
    registered after its first use here are not seen.

    Raises:
        StructureError: the value does not fit the type.
        TypeError: `into` is not a type, or has a part that there is no hook for.
    """
    strict = strict_converter(converter)
    hook = _usable_hook(into, strict)
    failures: list[tuple[Exception, Any]] = []
    for candidate in _with_json_in(value):
        try:
            with remembering_failures():
                return hook(candidate, into)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 - a hook or class of the user may raise anything
            if not failures or isinstance(candidate, (dict, list)):
                failures.append((error, candidate))
    raise _explain(*failures[-1], strict)


def check_type(into: Any, converter: cattrs.Converter | None = None) -> None:
    """Check that values can be structured into a type, before there is a value."""
    _usable_hook(into, strict_converter(converter))


def _with_json_in(value: Any) -> Iterator[Any]:
    """Yield the value, and then, if it is a string of JSON, the value in it."""
    yield value
    if type(value) is str:
        with suppress(ValueError, RecursionError):
            yield json.loads(value)


def _usable_hook(into: Any, converter: cattrs.Converter) -> Hook:
    try:
        if is_union(into):  # its hook looks up those of its members only when it gets a value
            for member in get_args(into):
                converter.get_structure_hook(member)
        return converter.get_structure_hook(into)
    except Exception as error:
        raise TypeError(f"cannot structure into {into!r}: {error}") from error


def _explain(failure: Exception, value: Any, converter: cattrs.Converter) -> Exception:
    path, reason, leaf = locate(failure, value, converter)
    if isinstance(leaf, StructureHandlerNotFoundError):
        error: Exception = TypeError(f"{path}: {reason}")
    elif isinstance(leaf, RecursionError):
        error, failure = StructureError("$", "is nested too deeply"), leaf
    else:
        error = StructureError(path, reason)
    error.__cause__ = failure
    return error
