"""Encoding the inputs of a workflow as plain JSON values."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any

import attrs
import cattrs

from promptlayer_exec._structuring._mismatch import step
from promptlayer_exec._text import json_kind

_ADVICE = "convert it, or give Session a converter= with an unstructure hook for it"
_PLAIN = cattrs.Converter()
_UNCHANGED = frozenset({str, bool, NoneType})
_ENCODED = frozenset({int, float, dict, list, tuple})


def encode_inputs(inputs: Any, converter: cattrs.Converter | None = None) -> dict[str, Any]:
    """Return inputs as a new tree of dicts, lists, strings, numbers, booleans and None.

    Mappings become dicts, tuples become lists. The converter unstructures attrs classes,
    dataclasses, enums, paths, and every type that it has an unstructure hook for; pydantic models
    are dumped by `model_dump(mode="json")`. An error has the path to what JSON does not have.
    """
    try:
        encoded = _Encoder(_PLAIN if converter is None else converter).encode(inputs)
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
    _keys: list[Any] = attrs.field(factory=list)  # to the value that is being encoded

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in _UNCHANGED:
            return value
        if kind not in _ENCODED:
            unstructured = self._unstructured(value)
            if type(unstructured) is not kind:
                return self.encode(unstructured)
        if isinstance(value, (int, float)):
            return self._number(value)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, (list, tuple, Mapping)):
            return self._container(value)
        raise self._error(TypeError, f"{json_kind(value)} is not a JSON value; {_ADVICE}")

    def _unstructured(self, value: Any) -> Any:
        if _contains_itself(value, frozenset({id(value)})):
            raise self._error(ValueError, "contains itself")
        try:
            unstructured = self._converter.unstructure(value)
            if unstructured is value and callable(getattr(type(value), "model_dump", None)):
                return value.model_dump(mode="json")
        except Exception as error:
            reason = f"{type(error).__name__}: {error!s:.150}"
            what = f"{json_kind(value)} could not be converted ({reason})"
            raise self._error(TypeError, what) from error
        return unstructured

    def _container(self, value: Any) -> dict[str, Any] | list[Any]:
        is_object = isinstance(value, Mapping)
        encoded: dict[Any, Any] = {}  # of an array: by index
        for key, item in value.items() if is_object else enumerate(value):
            if is_object and not isinstance(key, str):
                what = f"the key {reprlib.repr(key)} is not a string"
                raise self._error(TypeError, what)
            name = str.__str__(key) if is_object else key
            self._keys.append(name)
            encoded[name] = self.encode(item)
            self._keys.pop()
        return encoded if is_object else list(encoded.values())

    def _number(self, value: float) -> float:
        plain = int(value) if isinstance(value, int) else float(value)
        if isinstance(plain, float) and not math.isfinite(plain):
            raise self._error(ValueError, f"{plain!r} is not a JSON value")
        try:
            str(plain)
        except ValueError as error:  # Python has a limit for digits
            raise self._error(ValueError, "the integer has too many digits") from error
        return plain

    def _error(self, kind: type[Exception], reason: str) -> Exception:
        return kind(f"inputs{''.join(map(step, self._keys))}: {reason}")


def _contains_itself(value: Any, outer: frozenset[int]) -> bool:
    """Return whether a value contains itself; from Python 3.12 on, cattrs would fill the memory."""
    kind = type(value)
    parts: Iterable[Any] = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif attrs.has(kind):
        parts = [getattr(value, field.name, None) for field in attrs.fields(kind)]
    elif dataclasses.is_dataclass(kind):
        parts = [getattr(value, field.name, None) for field in dataclasses.fields(kind)]
    return any(id(part) in outer or _contains_itself(part, outer | {id(part)}) for part in parts)
