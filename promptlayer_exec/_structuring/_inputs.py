"""Encoding the inputs of a workflow as plain JSON values."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Iterable, Mapping
from functools import partial
from types import NoneType
from typing import Any

import attrs
import cattrs

from promptlayer_exec._display import json_kind
from promptlayer_exec._structuring._errors import step

_ADVICE = "convert it, or give Session a converter= with an unstructure hook for it"
_PLAIN = cattrs.Converter()
_UNCHANGED = frozenset({str, bool, NoneType})
_ENCODED = frozenset({int, float, dict, list, tuple})
_LONGEST_REASON = 200
_SMALL = 2**63  # smaller integers have far fewer digits than Python's limit for printing them


@attrs.define(eq=False)
class _NotJSON(Exception):
    """A value cannot be encoded as JSON; `keys` lead to it, the innermost first."""

    kind: type[TypeError | ValueError]
    reason: str
    keys: list[Any] = attrs.field(factory=list)


def encode_inputs(inputs: Any, converter: cattrs.Converter | None = None) -> dict[str, Any]:
    """Return inputs as a new tree of dicts, lists, strings, numbers, booleans and None.

    Mappings become dicts, tuples become lists. The converter unstructures attrs classes,
    dataclasses, enums, paths, and every type that it has an unstructure hook for; pydantic models
    are dumped by `model_dump(mode="json")`.

    Raises:
        TypeError: a value is of a type that JSON does not have. The message has the path to it.
        ValueError: a number is NaN, infinite or too long, or the inputs contain themselves or are
            nested too deeply.
    """
    try:
        encoded = _Encoder(converter or _PLAIN).encode(inputs)
    except _NotJSON as error:
        path = "inputs" + "".join(map(step, reversed(error.keys)))
        raise error.kind(f"{path}: {error.reason}") from error.__cause__
    except RecursionError as error:
        raise ValueError("inputs: contains itself, or is nested too deeply") from error
    if type(encoded) is not dict:
        raise TypeError(
            "inputs: expected a mapping, or an attrs, dataclass or pydantic instance,"
            f" got {json_kind(inputs)}"
        )
    return encoded


@attrs.define(eq=False)
class _Encoder:
    _converter: cattrs.Converter
    _entered: set[int] = attrs.field(factory=set)

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in _UNCHANGED:
            return value
        if kind not in _ENCODED:
            unstructured = self._unstructured(value)
            if type(unstructured) is not kind:
                return self.encode(unstructured)
        if isinstance(value, int):
            return _number(int.__int__(value))  # a subclass may override these
        if isinstance(value, float):
            return _number(float.__float__(value))
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, (dict, list, tuple, Mapping)):
            return self._container(value)
        raise _NotJSON(TypeError, f"{json_kind(value)} is not a JSON value; {_ADVICE}")

    def _unstructured(self, value: Any) -> Any:
        if _contains_itself(value):
            raise _NotJSON(ValueError, "contains itself")
        try:
            unstructured = self._converter.unstructure(value)
            if unstructured is value and callable(getattr(type(value), "model_dump", None)):
                return value.model_dump(mode="json")
        except RecursionError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
            what = f"{json_kind(value)} could not be converted ({reason})"
            raise _NotJSON(TypeError, what) from error
        return unstructured

    def _container(self, value: Any) -> dict[str, Any] | list[Any]:
        if id(value) in self._entered:
            raise _NotJSON(ValueError, "contains itself")
        self._entered.add(id(value))
        is_object = isinstance(value, Mapping)
        encoded: dict[Any, Any] = {}  # of an array: by index
        for key, item in value.items() if is_object else enumerate(value):
            name = _name(key) if is_object else key
            try:
                encoded[name] = item if type(item) in _UNCHANGED else self.encode(item)
            except _NotJSON as error:
                error.keys.append(name)
                raise
        self._entered.remove(id(value))
        return encoded if is_object else list(encoded.values())


def _contains_itself(value: Any, outer: frozenset[int] = frozenset()) -> bool:
    """Return True if an instance contains itself; cattrs would recurse until memory is full."""
    parts = _parts(value)
    if not parts or id(value) in outer:
        return bool(parts)
    return any(map(partial(_contains_itself, outer=outer | {id(value)}), parts))


def _parts(value: Any) -> Iterable[Any]:
    kind = type(value)
    if attrs.has(kind):
        return [getattr(value, field.name, None) for field in attrs.fields(kind)]
    if dataclasses.is_dataclass(kind):
        return [getattr(value, field.name, None) for field in dataclasses.fields(kind)]
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _number(value: float) -> float:
    if type(value) is float:
        if not math.isfinite(value):
            raise _NotJSON(ValueError, f"{value!r} is not a JSON value")
    elif not -_SMALL < value < _SMALL:
        try:
            str(value)
        except ValueError as error:
            raise _NotJSON(ValueError, "the integer has too many digits") from error
    return value


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise _NotJSON(TypeError, f"the key {reprlib.repr(key)} is not a string")
    return str.__str__(key)
