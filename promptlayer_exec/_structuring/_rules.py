"""The strict rules: how JSON is structured into each kind of type, without coercion."""

from __future__ import annotations

import collections
import inspect
import itertools
import json
import reprlib
import typing
from collections import abc
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import is_dataclass
from datetime import date, datetime, time
from decimal import Decimal, InvalidOperation
from enum import Enum
from functools import cache, lru_cache, partial, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Required, TypedDict, Union, get_args, get_origin
from uuid import UUID

import attrs
import cattrs
from cattrs.cols import mapping_structure_factory, namedtuple_dict_structure_factory
from cattrs.disambiguators import create_default_dis_func
from cattrs.errors import (
    IterableValidationError,
    IterableValidationNote,
    StructureHandlerNotFoundError,
)

from promptlayer_exec._display import JSON_KINDS, json_kind
from promptlayer_exec._structuring._errors import locate

Hook = Callable[[Any, Any], Any]

_ADVICE = "give Session a converter= with a structure hook for it"


class WrongKind(TypeError):
    """The value is not of the JSON kind that the type is structured from."""


def _exact(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise WrongKind(f"expected {JSON_KINDS[kind]}, got {json_kind(value)}")
    return value


def null(value: Any, _: Any) -> Any:
    return _exact(value, NoneType)


def anything(value: Any, _: Any) -> Any:
    return value


def scalar(base: type, value: Any, kind: Any) -> Any:
    """Structure into `base`, a scalar, or into `kind`, a subclass of it."""
    if issubclass(kind, Enum):
        return member(value, kind)
    if base is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise ValueError("is too large for a float") from None
    _exact(value, base)
    return value if kind is base else kind(value)


def _refuse_bytes(_: Any, kind: Any) -> Any:
    raise StructureHandlerNotFoundError(f"JSON has no bytes; {_ADVICE}", kind)


def member(value: Any, kind: type[Enum]) -> Enum:
    try:
        found = kind(value)
    except (TypeError, ValueError):
        found = None
    # The value True finds the member 1. A member with another value was found by the enum's own
    # `_missing_`, which may do as it likes.
    if found is None or (found.value == value and not _same(value, found.value)):
        raise _unlisted(value, [it.value for it in kind])
    return found


def _same(value: Any, expected: Any) -> bool:
    """Return whether both are equal and of the same type; an int also stands for a float."""
    alike = type(value) is type(expected) or (type(value) is int and type(expected) is float)
    return alike and bool(value == expected)


def _unlisted(value: Any, options: list[Any]) -> ValueError:
    return ValueError(f"expected one of {reprlib.repr(options)}, got {reprlib.repr(value)}")


def literal(kind: Any) -> Hook:
    options = [(it.value if isinstance(it, Enum) else it, it) for it in get_args(kind)]

    def structure(value: Any, _: Any) -> Any:
        for plain, option in options:
            if _same(value, plain):
                return option
        raise _unlisted(value, [plain for plain, _ in options])

    return structure


def _decimal(value: Any) -> Decimal:
    return Decimal(str(value) if type(value) in (int, float) else _exact(value, str))


def _datetime(value: Any) -> datetime:
    if len(_exact(value, str)) <= len("2026-01-31"):
        raise ValueError("no time of day")
    return datetime.fromisoformat(value)


PARSERS: dict[Any, Callable[[Any], Any]] = {
    datetime: _datetime,
    date: lambda value: date.fromisoformat(_exact(value, str)),
    time: lambda value: time.fromisoformat(_exact(value, str)),
    UUID: lambda value: UUID(_exact(value, str)),
    Decimal: _decimal,
}


def parsed(value: Any, kind: Any) -> Any:
    try:
        return PARSERS[kind](value)
    except (ValueError, InvalidOperation) as error:
        raise ValueError(f"expected a {kind.__name__}, got {reprlib.repr(value)}") from error


ARRAYS: dict[Any, Callable[[list[Any]], Any]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    collections.deque: collections.deque,
    abc.Sequence: tuple,
    abc.MutableSequence: list,
    abc.Set: frozenset,
    abc.MutableSet: set,
}


def array(kind: Any, converter: cattrs.Converter) -> Hook:
    kinds = getattr(kind, "__args__", (Any, ...))
    fixed = origin(kind) is tuple and kinds[-1:] != (...,)
    hooks = [(converter.get_structure_hook(item), item) for item in kinds if item is not ...]
    make = ARRAYS[origin(kind)]

    def structure(value: Any, _: Any) -> Any:
        if len(_exact(value, list)) != len(kinds) and fixed:
            raise ValueError(f"expected an array of {len(kinds)}, got one of {len(value)}")
        items: list[Any] = []
        try:
            for item, (hook, expected) in zip(
                value, hooks if fixed else itertools.repeat(hooks[0]), strict=False
            ):
                items.append(hook(item, expected))
        except Exception as error:  # noqa: BLE001 - a hook of the user may raise anything
            note = f"Structuring {kind} @ index {len(items)}"
            error.add_note(IterableValidationNote(note, len(items), None))
            raise IterableValidationError(f"While structuring {kind}", [error], kind) from None
        return make(items)

    return structure


def mapping(kind: Any, converter: cattrs.Converter) -> Hook:
    return _from_object(mapping_structure_factory(kind, converter, dict), kind)


def typed_dict(kind: Any, converter: cattrs.Converter) -> Hook:
    return _from_object(converter.gen_structure_typeddict(_evaluated(kind)), kind)


@cache  # cattrs recognises a TypedDict that contains itself by identity
def _evaluated(kind: Any) -> Any:
    """Return an equal TypedDict whose annotations are evaluated.

    Where annotations are strings, Python takes keys that are marked `NotRequired` for required.
    """
    if get_origin(kind) or not any(
        isinstance(hint, typing.ForwardRef) for hint in kind.__annotations__.values()
    ):
        return kind
    hints = {
        name: hint
        if get_origin(hint) in (Required, NotRequired)
        else Required[hint]
        if name in kind.__required_keys__
        else NotRequired[hint]
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
    }
    return TypedDict(kind.__name__, hints)  # type: ignore[operator]


def class_(kind: Any, converter: cattrs.Converter) -> Hook:
    if get_origin(kind) and attrs.has(kind):
        attrs.resolve_types(origin(kind))  # cattrs before 25.2 tries this on the alias
    return _from_object(converter.gen_structure_attrs_fromdict(kind), kind)


def _from_object(hook: Callable[..., Any], kind: Any) -> Hook:
    @wraps(hook)  # keeps the overrides, which cattrs stores as an attribute of the hook
    def structure(value: Any, _: Any) -> Any:
        return hook(_exact(value, dict), kind)

    return structure


def named_tuple(kind: Any, converter: cattrs.Converter) -> Hook:
    from_object = namedtuple_dict_structure_factory(
        kind, converter, "from_converter", converter.forbid_extra_keys
    )
    hints = typing.get_type_hints(kind, include_extras=True)
    items: Any = tuple.__class_getitem__(tuple(hints[name] for name in kind._fields))

    def structure(value: Any, _: Any) -> Any:
        if type(value) is list:
            return kind(*converter.structure(value, items))
        return from_object(_exact(value, dict), kind)

    return structure


def refuse_generic_named_tuple(kind: Any) -> Hook:
    raise StructureHandlerNotFoundError(f"{kind} is a generic NamedTuple; {_ADVICE}", kind)


def model(kind: Any) -> Hook:
    from_json: Any = getattr(kind, "model_validate_json", None)
    reads_json = _takes_strict(from_json)
    options = {"strict": True} if reads_json or _takes_strict(kind.model_validate) else {}

    def structure(value: Any, _: Any) -> Any:
        if reads_json:
            # Strict pydantic structures a datetime, an enum or a UUID from JSON text alone.
            try:
                return from_json(json.dumps(value), strict=True)
            except ValueError as error:
                if not _is_unreadable(error):
                    raise
        return kind.model_validate(value, **options)

    return structure


def _is_unreadable(error: Any) -> bool:
    """Return whether pydantic could not read the JSON: a lone surrogate, or deep nesting."""
    return any(detail["type"] == "json_invalid" for detail in error.errors())


def _takes_strict(function: Any) -> bool:
    return callable(function) and "strict" in inspect.signature(function).parameters


def origin(kind: Any) -> Any:
    return get_origin(kind) or kind


def is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def is_mapping(kind: Any) -> bool:
    return origin(kind) in (dict, abc.Mapping, abc.MutableMapping)


def is_class(kind: Any) -> bool:
    plain = origin(kind)
    return isinstance(plain, type) and (attrs.has(plain) or is_dataclass(plain))


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


# cattrs finds the hooks for these types, and for their subclasses, before it tries any rule.
SCALARS: dict[type, Hook] = {
    **{kind: partial(scalar, kind) for kind in (str, int, float)},
    Path: partial(scalar, str),
    bytes: _refuse_bytes,
    Enum: member,  # in cattrs before 25.2
}


# The unions and values that did not fit, by id, while one output is structured. Without it, the
# time to refuse a value for a union of similar recursive classes would double with each level.
FAILED: ContextVar[dict[tuple[int, int], Any]] = ContextVar("FAILED")


def union(kind: Any, converter: cattrs.Converter) -> Hook:
    """Return the hook for a union, which tries the members in the order of `_rank`."""
    members = get_args(kind)
    classes = [member for member in members if is_class(member)]
    expected = " | ".join(map(_name, members))

    @lru_cache(maxsize=1)  # late, because the members may contain the union
    def class_picker() -> Callable[[Any], Any]:
        return create_default_dis_func(converter, *classes)

    def candidates(value: Any) -> list[Any]:
        picked = kind
        if len(classes) > 1 and type(value) is dict:
            with suppress(Exception):  # cattrs cannot tell them apart, or the value fits none
                picked = class_picker()(value)
        fit = get_args(picked) if is_union(picked) else (picked,)
        kept = [member for member in members if member in fit or member not in classes]
        return sorted(kept, key=partial(_rank, type(value)))

    def structure(value: Any, _: Any) -> Any:
        failed, key = FAILED.get(), (id(kind), id(value))
        if key in failed:
            raise ValueError(f"fits none of {expected}")
        errors: list[tuple[Any, Exception]] = []
        for member in candidates(value):
            try:
                return converter.structure(value, member)
            except Exception as error:  # noqa: BLE001 - a hook of the user may raise anything
                errors.append((member, error))
        failed[key] = value  # a reference, so that no other value gets the same id
        close = [(member, error) for member, error in errors if not isinstance(error, WrongKind)]
        if len(close) == 1:
            raise close[0][1]
        if not close:
            raise WrongKind(f"expected {expected}, got {json_kind(value)}")
        found = [(_name(member), *locate(error, value, converter)) for member, error in close]
        reasons = "; ".join(f"{name}{path[1:]}: {reason:.100}" for name, path, reason, _ in found)
        raise ValueError(f"fits none of {expected} ({reasons})")

    return structure


def _rank(given: type, member: Any) -> int:
    """Rank a member by its type alone: Python may cache `int | str` in place of `str | int`."""
    if is_enum(member) or is_literal(member):
        return 0
    if member is given:
        return 1
    return 3 if is_mapping(member) or member in (Any, object) else 2


def _name(kind: Any) -> str:
    if kind is NoneType:
        return "None"
    return kind.__name__ if isinstance(kind, type) else str(kind)
