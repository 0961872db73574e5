"""The strict rules: how JSON is structured into each kind of type, without coercion."""

from __future__ import annotations

import json
import reprlib
import typing
from collections import abc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import is_dataclass
from datetime import date, datetime, time
from decimal import Decimal, InvalidOperation
from enum import Enum
from functools import cache, cached_property, partial, wraps
from itertools import cycle
from operator import eq
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Required, get_args, get_origin
from uuid import UUID

import attrs
import cattrs
from cattrs.cols import is_namedtuple, mapping_structure_factory
from cattrs.disambiguators import create_default_dis_func

from promptlayer_exec._structuring.mismatch import WrongKind, exact, locate
from promptlayer_exec._values.text import json_kind

Hook = Callable[[Any, Any], Any]


def _scalar(base: type, value: Any, kind: Any) -> Any:
    """Structure into `base`, or into `kind`, a subclass of it."""
    if issubclass(kind, Enum):
        return _option(value, kind)
    if base is not float or type(value) is not int:
        exact(value, base)
    if type(value) is kind:
        return value
    return kind(value)


def _refuse(kind: Any) -> Any:
    what = f"there is no rule for {_name(kind)}. Give Session a converter= with a hook for it"
    raise cattrs.StructureHandlerNotFoundError(what, kind)


def _option(value: Any, kind: Any) -> Any:
    options = get_args(kind)
    if _is_enum(kind):
        options = tuple(kind)
    # A Literal may list enum members.
    plain = [getattr(option, "value", option) for option in options]

    for option, expected in zip(options, plain, strict=True):
        if _same(value, expected):
            return option

    if _is_enum(kind):
        with suppress(TypeError, ValueError):
            found = kind(value)
            # Reject the member 1 for True, but accept anything from an enum's own `_missing_`.
            if found.value != value or _same(value, found.value):
                return found

    raise ValueError(f"expected one of {reprlib.repr(plain)}, got {reprlib.repr(value)}")


def _same(value: Any, expected: Any) -> bool:
    """Return True if both are equal and of the same type. An int may also stand for a float."""
    alike = type(value) is type(expected) or (type(value) is int and type(expected) is float)
    return alike and bool(value == expected)


_PARSERS: dict[Any, Callable[[str], Any]] = {
    # A date alone is no datetime.
    datetime: lambda text: datetime.fromisoformat(text if len(text) > len("2026-01-31") else ""),
    date: date.fromisoformat,
    time: time.fromisoformat,
    UUID: UUID,
    Decimal: Decimal,
}


def _parsed(value: Any, kind: Any) -> Any:
    if kind is Decimal and type(value) in (int, float):
        text = str(value)
    else:
        text = exact(value, str)

    try:
        return _PARSERS[kind](text)
    except (ValueError, InvalidOperation) as error:
        raise ValueError(f"expected a {kind.__name__}, got {reprlib.repr(value)}") from error


_ARRAYS: dict[Any, Callable[[list[Any]], Any]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    abc.Sequence: tuple,
    abc.Set: frozenset,
}


def _array(kind: Any, converter: cattrs.Converter) -> Hook:
    kinds = getattr(kind, "__args__", (Any, ...))
    fixed = _origin(kind) is tuple and kinds[-1:] != (...,)
    hooks = [(converter.get_structure_hook(item), item) for item in kinds if item is not ...]
    make = _ARRAYS[_origin(kind)]

    def structure(value: Any, _: Any) -> Any:
        if len(exact(value, list)) != len(kinds) and fixed:
            raise ValueError(f"expected an array of {len(kinds)}, got one of {len(value)}")

        items: list[Any] = []
        try:
            for item, (hook, expected) in zip(value, cycle(hooks), strict=False):
                items.append(hook(item, expected))
        except Exception as error:  # noqa: BLE001 - the user's hook may raise anything
            where = f"Structuring {kind} @ index {len(items)}"
            error.add_note(cattrs.IterableValidationNote(where, len(items), None))
            raise cattrs.IterableValidationError(where, [error], kind) from None

        return make(items)

    return structure


def _from_object(kind: Any, converter: cattrs.Converter) -> Hook:
    if _is_mapping(kind):
        hook: Callable[..., Any] = mapping_structure_factory(kind, converter, dict)
    elif typing.is_typeddict(_origin(kind)):
        hook = converter.gen_structure_typeddict(evaluated_typed_dict(kind))
    else:
        hook = converter.gen_structure_attrs_fromdict(kind)

    @wraps(hook)  # keeps the overrides, which cattrs stores as an attribute of the hook
    def structure(value: Any, _: Any) -> Any:
        return hook(exact(value, dict), kind)

    return structure


@cache  # cattrs recognises a TypedDict that contains itself by identity
def evaluated_typed_dict(kind: Any) -> Any:
    """Return an equal TypedDict with evaluated annotations.

    If annotations are strings, Python takes keys marked `NotRequired` for required.
    """
    if get_origin(kind):
        return kind

    hints = typing.get_type_hints(kind, include_extras=True)
    for name, hint in hints.items():
        if get_origin(hint) in (Required, NotRequired):
            continue
        if name in kind.__required_keys__:
            hints[name] = Required[hint]
        else:
            hints[name] = NotRequired[hint]

    return typing.TypedDict(kind.__name__, hints)  # type: ignore[operator]


def _model(kind: Any) -> Hook:
    if not hasattr(kind, "model_validate_json"):
        return lambda value, _: kind.model_validate(value)
    # Strict pydantic structures a datetime, an enum or a UUID from JSON text alone.
    return lambda value, _: kind.model_validate_json(json.dumps(value), strict=True)


class UnionHook:
    """The hook for a union: it tries the members in the order of `_rank`."""

    def __init__(self, kind: Any, converter: cattrs.Converter) -> None:
        self.members = get_args(kind)
        self._classes = [member for member in self.members if _is_class(member)]
        self._converter = converter

    @cached_property  # late, because the members may contain the union
    def _pick_class(self) -> Callable[[Any], Any]:
        return create_default_dis_func(self._converter, *self._classes)

    def __call__(self, value: Any, _: Any) -> Any:
        errors: list[tuple[Any, Exception]] = []
        for member in self._candidates(value):
            try:
                return self._converter.structure(value, member)
            except Exception as error:  # noqa: BLE001 - the user's hook may raise anything
                errors.append((member, error))

        # A member of the right kind has the most helpful error.
        close = [(member, error) for member, error in errors if not isinstance(error, WrongKind)]
        if len(close) == 1:
            raise close[0][1]

        expected = " | ".join(map(_name, self.members))
        if not close:
            raise WrongKind(f"expected {expected}, got {json_kind(value)}")
        found = [(_name(member), *locate(error, value, self._converter)) for member, error in close]
        reasons = "; ".join(f"{name}{path[1:]}: {reason:.100}" for name, path, reason, _ in found)
        raise ValueError(f"fits none of {expected} ({reasons})")

    def _candidates(self, value: Any) -> list[Any]:
        fit = self.members
        if len(self._classes) > 1 and type(value) is dict:
            with suppress(Exception):  # cattrs cannot distinguish them, or none matches
                fit = _members(self._pick_class(value))
        kept = [member for member in self.members if member in fit or member not in self._classes]
        return sorted(kept, key=partial(_rank, type(value)))


def _members(kind: Any) -> tuple[Any, ...]:
    if is_union(kind):
        return get_args(kind)
    return (kind,)


def _rank(given: type, member: Any) -> int:
    """Rank a member by its type alone: Python may cache `int | str` in place of `str | int`."""
    if _is_option(member):
        return 0
    if member is given:
        return 1
    if _is_mapping(member) or member is Any:
        return 3
    return 2


def _name(kind: Any) -> str:
    if kind is NoneType:
        return "None"
    if isinstance(kind, type):
        return kind.__name__
    return str(kind)


def _origin(kind: Any) -> Any:
    return get_origin(kind) or kind


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _is_option(kind: Any) -> bool:
    return _is_enum(kind) or get_origin(kind) is Literal


def _is_mapping(kind: Any) -> bool:
    return _origin(kind) in (dict, abc.Mapping, abc.MutableMapping)


def _is_class(kind: Any) -> bool:
    plain = _origin(kind)
    return isinstance(plain, type) and (attrs.has(plain) or is_dataclass(plain))


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (typing.Union, UnionType)


# cattrs tries the last one first.
_RULES: list[tuple[Callable[[Any], bool], Callable[..., Hook]]] = [
    # cattrs would accept a string as an iterable of characters.
    (lambda kind: issubclass(_origin(kind), abc.Iterable), _refuse),
    (_is_option, lambda _: _option),
    (lambda kind: kind in _PARSERS, lambda _: _parsed),
    (lambda kind: _origin(kind) in _ARRAYS, _array),
    (_is_mapping, _from_object),
    (lambda kind: typing.is_typeddict(_origin(kind)), _from_object),
    (_is_class, _from_object),
    (is_union, UnionHook),
    (lambda kind: isinstance(kind, type) and hasattr(kind, "model_validate"), _model),
]


class _StrictConverter(cattrs.Converter):
    """A converter on which a hook for a union takes precedence over the rule for unions."""

    def register_structure_hook(self, cl: Any, func: Any = None) -> Any:
        """Register a hook for a type, as in cattrs."""
        if func is None or not is_union(cl):
            return super().register_structure_hook(cl, func)
        # cattrs looks up hooks for unions only after all rules.
        return self.register_structure_hook_func(partial(eq, cl), func)


def strict_converter() -> cattrs.Converter:
    converter = _StrictConverter()
    for predicate, factory in _RULES:
        converter.register_structure_hook_factory(predicate, factory)

    # cattrs finds the hooks for these types, and for their subclasses, before it tries any rule.
    for kind in (str, bool, int, float, NoneType):
        converter.register_structure_hook(kind, partial(_scalar, kind))
    converter.register_structure_hook(bytes, lambda _, kind: _refuse(kind))

    # cattrs reads the annotations of a named tuple. From Python 3.14 on, it cannot evaluate them in
    # a module with `from __future__ import annotations`.
    converter.register_unstructure_hook_factory(is_namedtuple, _as_tuple)
    return converter


def _as_tuple(_: Any, converter: cattrs.Converter) -> Callable[[Any], Any]:
    return lambda value: tuple(map(converter.unstructure, value))


STRICT = strict_converter()
