"""Encodes a workflow's inputs as plain JSON values, and names what JSON cannot carry."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Iterable, Mapping
from functools import cache
from types import NoneType
from typing import Any

import attrs
import cattrs

from promptlayer_exec._structuring._errors import step

_ADVICE = "convert it, or give Session a converter= with an unstructure hook for it"
_AS_IT_IS = frozenset({str, bool, NoneType})
_PRINTS_SURELY = 2**63
_LONGEST = 200


class _Refused(Exception):
    """A value is none that JSON carries.

    Attributes:
        kind: the error to raise for it.
        reason: why.
        keys: the way to the value, innermost first.
    """

    def __init__(self, kind: type[TypeError | ValueError], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.keys: list[Any] = []


def encode_inputs(inputs: Any, converter: cattrs.Converter | None = None) -> dict[str, Any]:
    """Return the inputs as a new tree of exact dicts, lists, strings, numbers, booleans and None.

    Mappings become objects, tuples and lists arrays. Attrs classes, dataclasses, enums, paths and
    whatever the converter has an unstructure hook for go through the converter, pydantic models
    through `model_dump(mode="json")`.

    Args:
        inputs: a mapping with string keys, or an attrs, dataclass or pydantic instance.
        converter: unstructures what is no plain JSON value; a default one without it.

    Raises:
        TypeError: something in it, which the message names, is of a type that JSON cannot carry.
        ValueError: something in it is a number that JSON cannot carry, contains itself, or is
            nested too deeply.
    """
    try:
        encoded = _Encoder(converter or _default_converter()).encode(inputs)
    except _Refused as refused:
        path = "inputs" + "".join(map(step, reversed(refused.keys)))
        raise refused.kind(f"{path}: {refused.reason}") from refused.__cause__
    except RecursionError as error:
        raise ValueError("inputs: contains itself, or is nested too deeply") from error
    if type(encoded) is not dict:
        raise TypeError(
            "inputs: expected a mapping, or an attrs, dataclass or pydantic instance,"
            f" got {_described(inputs)}"
        )
    return encoded


@cache
def _default_converter() -> cattrs.Converter:
    return cattrs.Converter()


class _Encoder:
    def __init__(self, converter: cattrs.Converter) -> None:
        self._converter = converter
        self._entered: set[int] = set()

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in _AS_IT_IS:
            return value
        if kind in (int, float):
            return _number(value)
        if kind in (dict, list, tuple):
            return self._container(value)
        unstructured = self._unstructured(value)
        return self._flat(value) if type(unstructured) is kind else self.encode(unstructured)

    def _flat(self, value: Any) -> Any:
        """Encode an instance of a subclass of what JSON carries."""
        if isinstance(value, (Mapping, list, tuple)):
            return self._container(value)
        if isinstance(value, str):
            return str.__str__(value)  # its own __str__ may say anything
        if isinstance(value, int):
            return _number(int.__int__(value))
        if isinstance(value, float):
            return _number(float.__float__(value))
        raise _Refused(TypeError, f"{_described(value)} is no JSON value; {_ADVICE}")

    def _unstructured(self, value: Any) -> Any:
        if _contains_itself(value):
            raise _Refused(ValueError, "contains itself")
        try:
            unstructured = self._converter.unstructure(value)
            if unstructured is value and _is_model(value):
                return value.model_dump(mode="json")
        except RecursionError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:_LONGEST]
            raise _Refused(
                TypeError, f"{_described(value)} cannot be converted ({reason})"
            ) from error
        return unstructured

    def _container(self, value: Any) -> dict[str, Any] | list[Any]:
        if id(value) in self._entered:
            raise _Refused(ValueError, "contains itself")
        self._entered.add(id(value))
        try:
            return self._object(value) if isinstance(value, Mapping) else self._array(value)
        finally:
            self._entered.remove(id(value))

    def _object(self, mapping: Mapping[Any, Any]) -> dict[str, Any]:
        encoded = {}
        for key, item in mapping.items():
            name = key if type(key) is str else _name(key)
            try:
                encoded[name] = item if type(item) in _AS_IT_IS else self.encode(item)
            except _Refused as refused:
                refused.keys.append(name)
                raise
        return encoded

    def _array(self, items: Iterable[Any]) -> list[Any]:
        encoded: list[Any] = []
        try:
            for item in items:
                encoded.append(  # noqa: PERF401 - its length names the item that fails
                    item if type(item) in _AS_IT_IS else self.encode(item)
                )
        except _Refused as refused:
            refused.keys.append(len(encoded))
            raise
        return encoded


def _contains_itself(value: Any) -> bool:
    """Tell whether an instance does: cattrs would go round until the memory is full."""
    entered: set[int] = set()

    def enter(item: Any) -> bool:
        parts = _parts(item)
        if not parts:
            return False
        if id(item) in entered:
            return True
        entered.add(id(item))
        if any(map(enter, parts)):
            return True
        entered.remove(id(item))
        return False

    return enter(value)


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
            raise _Refused(ValueError, f"{value!r} is no JSON value")
    elif not -_PRINTS_SURELY < value < _PRINTS_SURELY:
        try:
            str(value)
        except ValueError as error:
            raise _Refused(ValueError, "the integer is too long to be printed") from error
    return value


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise _Refused(TypeError, f"the key {reprlib.repr(key)} is no string")
    return str.__str__(key)


def _is_model(value: Any) -> bool:
    return not isinstance(value, type) and callable(getattr(value, "model_dump", None))


def _described(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
