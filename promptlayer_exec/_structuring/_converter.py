"""A cattrs converter that coerces nothing: what is structured is what JSON said."""

from __future__ import annotations

import collections
import inspect
import itertools
import json
import reprlib
import typing
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import is_dataclass
from datetime import date, datetime, time
from decimal import Decimal, InvalidOperation
from enum import Enum
from functools import cache, lru_cache, partial, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NotRequired,
    Required,
    TypedDict,
    Union,
    get_args,
    get_origin,
)
from uuid import UUID

import attrs
import cattrs
from cattrs.cols import (
    is_namedtuple,
    mapping_structure_factory,
    namedtuple_dict_structure_factory,
)
from cattrs.disambiguators import create_default_dis_func
from cattrs.errors import (
    IterableValidationError,
    IterableValidationNote,
    StructureHandlerNotFoundError,
)

from promptlayer_exec._structuring._errors import locate

Hook = Callable[[Any, Any], Any]


class _Mismatch(TypeError):
    """The value is of another JSON kind than the type is made from."""


# What fits no member of a union need not be tried again: where recursive classes are much alike,
# that would double the work with every level.
_UNFIT: ContextVar[dict[tuple[int, int], Any]] = ContextVar("_UNFIT")


@contextmanager
def attempt() -> Iterator[None]:
    """Structure one value within this."""
    token = _UNFIT.set({})
    try:
        yield
    finally:
        _UNFIT.reset(token)


@lru_cache(maxsize=16)  # a converter takes no weak reference, and a millisecond to set up
def strict_converter(theirs: cattrs.Converter | None) -> cattrs.Converter:
    theirs = cattrs.Converter() if theirs is None else theirs
    strict = theirs.copy(detailed_validation=True)
    for predicate, factory in _RULES:
        strict.register_structure_hook_factory(predicate, factory)
    # Cattrs has no public way to put their hooks above ours again; and copy() forgets those that
    # were registered for a union.
    theirs._structure_func.copy_to(strict._structure_func, theirs._struct_copy_skip)
    for union, hook in theirs._union_struct_registry.items():
        strict.register_structure_hook_func(partial(_equals, union), hook)
    strict.register_structure_hook_factory(partial(_passes_through, theirs), _union)
    theirs_by_class = theirs._structure_func._single_dispatch.registry
    default = cattrs.Converter().get_structure_hook(int)
    for kind, hook in _SCALARS.items():
        if theirs_by_class.get(kind) is default:
            strict.register_structure_hook(kind, hook)
    if bool not in theirs_by_class:  # it would go to the hook for int, of which it is a subclass
        strict.register_structure_hook(bool, partial(_scalar, bool))
    return strict


def _equals(union: Any, kind: Any) -> bool:
    return bool(kind == union)


def _passes_through(theirs: cattrs.Converter, kind: Any) -> bool:
    # The hook that cattrs' preconfigured converters have for unions of primitives would structure
    # the other members with their converter, by its coercing defaults.
    if not is_union(kind):
        return False
    hook = theirs.get_structure_hook(kind, cache_result=False)
    return hook.__qualname__.startswith("configure_union_passthrough.")


def _kind_of(value: Any) -> str:
    if value is None or type(value) is bool:
        return json.dumps(value)
    return _NAMES.get(type(value), f"a {type(value).__name__}")


def _exact(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _Mismatch(f"expected {_NAMES[kind]}, got {_kind_of(value)}")
    return value


def _same(value: Any, expected: Any) -> bool:
    """Whether two are equal, and of one type: True is not 1; 1 is 1.0, but not the reverse."""
    alike = type(value) is type(expected) or (type(value) is int and type(expected) is float)
    return alike and bool(value == expected)


def _scalar(base: type, value: Any, kind: Any) -> Any:
    if issubclass(kind, Enum):
        return _member(value, kind)
    if base is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise ValueError("is too large for a float") from None
    _exact(value, base)
    return value if kind is base else kind(value)


def _no_bytes(_: Any, kind: Any) -> Any:
    raise StructureHandlerNotFoundError("JSON has no bytes. Register a structure hook.", kind)


def _no_generic(kind: Any, _: Any) -> Hook:
    raise StructureHandlerNotFoundError(
        f"{kind} is a generic NamedTuple. Register a structure hook.", kind
    )


def _member(value: Any, kind: type[Enum]) -> Enum:
    try:
        member = kind(value)
    except (TypeError, ValueError):
        member = None
    # An equal value of another type finds the member as well; one that is not equal was found by
    # the enum's own `_missing_`.
    if member is None or (member.value == value and not _same(value, member.value)):
        raise _unlisted(value, [member.value for member in kind])
    return member


def _unlisted(value: Any, options: list[Any]) -> ValueError:
    return ValueError(f"expected one of {reprlib.repr(options)}, got {reprlib.repr(value)}")


def _null(_: Any, __: Any) -> Hook:
    return lambda value, _: _exact(value, NoneType)


def _anything(_: Any, __: Any) -> Hook:
    return lambda value, _: value


def _enum(kind: Any, _: Any) -> Hook:
    return lambda value, _: _member(value, kind)


def _literal(kind: Any, _: Any) -> Hook:
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


_READERS: dict[Any, Callable[[Any], Any]] = {
    datetime: _datetime,
    date: lambda value: date.fromisoformat(_exact(value, str)),
    time: lambda value: time.fromisoformat(_exact(value, str)),
    UUID: lambda value: UUID(_exact(value, str)),
    Decimal: _decimal,
}


def _read(kind: Any, _: Any) -> Hook:
    def structure(value: Any, _: Any) -> Any:
        try:
            return _READERS[kind](value)
        except (ValueError, InvalidOperation) as error:
            raise ValueError(f"expected a {kind.__name__}, got {reprlib.repr(value)}") from error

    return structure


_ARRAYS: dict[Any, Callable[[list[Any]], Any]] = {
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


def _array(kind: Any, converter: cattrs.Converter) -> Hook:
    kinds = getattr(kind, "__args__", (Any, ...))
    fixed = _origin(kind) is tuple and kinds[-1:] != (...,)
    hooks = [(converter.get_structure_hook(item), item) for item in kinds if item is not ...]
    make = _ARRAYS[_origin(kind)]

    def structure(value: Any, _: Any) -> Any:
        if len(_exact(value, list)) != len(kinds) and fixed:
            raise ValueError(f"expected an array of {len(kinds)}, got one of {len(value)}")
        items: list[Any] = []
        try:
            for item, (hook, expected) in zip(
                value, hooks if fixed else itertools.repeat(hooks[0]), strict=False
            ):
                items.append(hook(item, expected))
        except Exception as error:  # noqa: BLE001 - whatever the items' hook raises
            note = f"Structuring {kind} @ index {len(items)}"
            error.add_note(IterableValidationNote(note, len(items), None))
            raise IterableValidationError(f"While structuring {kind}", [error], kind) from None
        return make(items)

    return structure


def _mapping(kind: Any, converter: cattrs.Converter) -> Hook:
    return _of_object(mapping_structure_factory(kind, converter, dict), kind)


def _typed_dict(kind: Any, converter: cattrs.Converter) -> Hook:
    return _of_object(converter.gen_structure_typeddict(_evaluated(kind)), kind)


@cache  # so that cattrs recognises one that contains itself
def _evaluated(kind: Any) -> Any:
    """Return a TypedDict that knows its required keys.

    One whose annotations are strings does not: it takes those with `NotRequired` for required.
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


def _class(kind: Any, converter: cattrs.Converter) -> Hook:
    if get_origin(kind) and attrs.has(kind):
        attrs.resolve_types(_origin(kind))  # which cattrs before 25.2 tries on the alias
    return _of_object(converter.gen_structure_attrs_fromdict(kind), kind)


def _of_object(hook: Callable[..., Any], kind: Any) -> Hook:
    @wraps(hook)  # the overrides are an attribute of the hook
    def structure(value: Any, _: Any) -> Any:
        return hook(_exact(value, dict), kind)

    return structure


def _named_tuple(kind: Any, converter: cattrs.Converter) -> Hook:
    from_object = namedtuple_dict_structure_factory(
        kind, converter, "from_converter", converter.forbid_extra_keys
    )
    hints = typing.get_type_hints(kind, include_extras=True)
    array: Any = tuple.__class_getitem__(tuple(hints[name] for name in kind._fields))

    def structure(value: Any, _: Any) -> Any:
        if type(value) is list:
            return kind(*converter.structure(value, array))
        return from_object(_exact(value, dict), kind)

    return structure


def _model(kind: Any, _: Any) -> Hook:
    from_json: Any = getattr(kind, "model_validate_json", None)
    if _takes_strict(from_json):  # only JSON's strict mode reads a datetime, an enum or a UUID

        def structure(value: Any, _: Any) -> Any:
            try:
                return from_json(json.dumps(value), strict=True)
            except ValueError as error:
                if not _is_json_beyond(error):
                    raise
            return kind.model_validate(value, strict=True)

        return structure
    if _takes_strict(kind.model_validate):
        return lambda value, _: kind.model_validate(value, strict=True)
    return lambda value, _: kind.model_validate(value)


def _is_json_beyond(error: Any) -> bool:
    """Tell whether pydantic's reader could not read what ours did: a surrogate, deep nesting."""
    return any(detail["type"] == "json_invalid" for detail in error.errors())


def _takes_strict(function: Any) -> bool:
    return callable(function) and "strict" in inspect.signature(function).parameters


def _union(union: Any, converter: cattrs.Converter) -> Hook:
    members = get_args(union)
    classes = [member for member in members if _is_class(member)]
    expected = " | ".join(map(_name, members))

    @lru_cache(maxsize=1)  # not at once: the members may contain the union
    def picker() -> Callable[[Any], Any]:
        return create_default_dis_func(converter, *classes)

    def candidates(value: Any) -> list[Any]:
        picked = union
        if len(classes) > 1 and type(value) is dict:
            with suppress(Exception):  # they are too much alike, or the value fits none
                picked = picker()(value)
        fit = get_args(picked) if is_union(picked) else (picked,)
        kept = [member for member in members if member in fit or member not in classes]
        return sorted(kept, key=partial(_rank, type(value)))

    def structure(value: Any, _: Any) -> Any:
        unfit, place = _UNFIT.get(), (id(union), id(value))
        if place in unfit:
            raise ValueError(f"fits none of {expected}")
        failures: list[tuple[Any, Exception]] = []
        for member in candidates(value):
            try:
                return converter.structure(value, member)
            except Exception as error:  # noqa: BLE001 - whatever the member's hook raises
                failures.append((member, error))
        unfit[place] = value  # kept, so that nothing else gets its id
        near = [(member, error) for member, error in failures if not isinstance(error, _Mismatch)]
        if len(near) == 1:
            raise near[0][1]
        if not near:
            raise _Mismatch(f"expected {expected}, got {_kind_of(value)}")
        found = [(_name(member), *locate(error, value, converter)) for member, error in near]
        reasons = "; ".join(f"{name}{path[1:]}: {reason:.100}" for name, path, reason, _ in found)
        raise ValueError(f"fits none of {expected} ({reasons})")

    return structure


def _rank(given: type, member: Any) -> int:
    """Order a union's members, so that `int | str` and `str | int`, which are equal, act alike."""
    if _is_enum(member) or get_origin(member) is Literal:
        return 0
    if member is given:
        return 1
    return 3 if _is_mapping(member) or member in (Any, object) else 2


def _name(kind: Any) -> str:
    if kind is NoneType:
        return "None"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _origin(kind: Any) -> Any:
    return get_origin(kind) or kind


def _is_null(kind: Any) -> bool:
    return kind is None or kind is NoneType


def _is_object(kind: Any) -> bool:
    return kind is object


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _is_read(kind: Any) -> bool:
    return kind in _READERS


def _is_array(kind: Any) -> bool:
    return _origin(kind) in _ARRAYS


def _is_mapping(kind: Any) -> bool:
    return _origin(kind) in (dict, abc.Mapping, abc.MutableMapping)


def _is_typed_dict(kind: Any) -> bool:
    return typing.is_typeddict(_origin(kind))


def _is_class(kind: Any) -> bool:
    origin = _origin(kind)
    return isinstance(origin, type) and (attrs.has(origin) or is_dataclass(origin))


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _is_generic_named_tuple(kind: Any) -> bool:
    return get_origin(kind) is not None and is_namedtuple(get_origin(kind))


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and hasattr(kind, "model_validate")


_RULES: list[tuple[Callable[[Any], bool], Callable[[Any, cattrs.Converter], Hook]]] = [
    (_is_null, _null),
    (_is_generic_named_tuple, _no_generic),
    (_is_object, _anything),
    (_is_enum, _enum),
    (_is_literal, _literal),
    (_is_read, _read),
    (_is_array, _array),
    (_is_mapping, _mapping),
    (is_namedtuple, _named_tuple),
    (_is_typed_dict, _typed_dict),
    (_is_class, _class),
    (is_union, _union),
    (_is_model, _model),
]

_SCALARS: dict[type, Hook] = {
    **{kind: partial(_scalar, kind) for kind in (str, int, float)},
    Path: partial(_scalar, str),
    bytes: _no_bytes,
    Enum: _member,  # before cattrs 25.2
}

_NAMES: dict[type, str] = {
    NoneType: "null",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}
