"""Encodes the inputs of a workflow as plain JSON values."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import Any

import attrs
import cattrs
from cattrs.cols import is_namedtuple

from promptlayer_exec._structuring.fields import fields_of, kinds_of
from promptlayer_exec._structuring.mismatch import locate, step
from promptlayer_exec._structuring.outputs import find_hook
from promptlayer_exec._structuring.rules import STRICT
from promptlayer_exec._values.errors import InvalidInputs
from promptlayer_exec._values.text import json_kind
from promptlayer_exec._values.workflow import InputsT, Workflow
from promptlayer_exec._values.workflow_definition import WorkflowDefinition


def encode_inputs(inputs: Any, converter: cattrs.Converter | None = None) -> dict[str, Any]:
    """Return inputs as a new tree of dicts, lists, strings, numbers, booleans and None.

    Mappings become dicts, tuples become lists. The converter unstructures attrs classes,
    dataclasses, enums, paths, and every type for which it has an unstructure hook. Pydantic models
    go through `model_dump(mode="json")`. An error has the path to the value that JSON lacks.
    """
    try:
        encoded = _Encoder(converter or STRICT).encode(inputs)
    except RecursionError as error:
        raise ValueError("inputs: contains itself, or is nested too deeply") from error

    if type(encoded) is not dict:
        raise TypeError(
            "inputs: expected a mapping, or an attrs, dataclass or pydantic instance,"
            f" got {json_kind(inputs)}"
        )
    return encoded


def structure_inputs(
    inputs: dict[str, Any], workflow: Workflow[Any, InputsT], converter: cattrs.Converter | None
) -> InputsT:
    """Structure inputs that a client sent as JSON into the type that a workflow takes.

    Raises:
        InvalidInputs: they do not match it.
    """
    form = workflow.inputs
    if form is Any:
        return inputs  # type: ignore[return-value]
    converter = converter or STRICT
    hook = find_hook(form, converter)

    # The error of a definition names all missing inputs, and likely misspellings.
    kinds = kinds_of(form)
    keys = {field.name: field.keys for field in fields_of(form, hook) or ()}
    required = {name: kind for name, kind in kinds.items() if keys[name] == {name}}
    WorkflowDefinition(0, str(workflow.name), required_inputs=required).check_inputs(inputs)

    try:
        return hook(inputs, form)  # type: ignore[no-any-return]
    except Exception as error:
        path, reason, _ = locate(error, inputs, converter)
        name = f"workflow {workflow.name!r:.100}"
        raise InvalidInputs(
            f"the inputs do not match {name} at {path}: {reason}",
            advice="The workflow's inputs= shows what it takes.",
        ) from error


@attrs.define(eq=False)
class _Encoder:
    _converter: cattrs.Converter
    _keys: list[Any] = attrs.field(factory=list)  # the path to the current value

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in (str, bool, NoneType):
            return value

        # A converter may turn any other type into a JSON type.
        if kind not in (int, float, dict, list, tuple):
            unstructured = self._unstructured(value)
            if type(unstructured) is not kind:
                return self.encode(unstructured)

        # A value that it left unchanged may still be of a subclass.
        if isinstance(value, (int, float)):
            return self._number(value)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, Mapping):
            return self._object(value)
        if isinstance(value, (list, tuple)):
            return self._array(value)
        advice = "Convert it, or give Session a converter= with an unstructure hook for it"
        raise self._error(TypeError, f"{json_kind(value)} is not a JSON value. {advice}")

    def _unstructured(self, value: Any) -> Any:
        if _contains_itself(value, frozenset({id(value)})):
            raise self._error(ValueError, "contains itself")

        try:
            unstructured = self._find_hook(value.__class__)(value)
            if unstructured is value and callable(getattr(type(value), "model_dump", None)):
                return value.model_dump(mode="json")
        except Exception as error:
            reason = f"{type(error).__name__}: {error!s:.150}"
            what = f"could not convert {json_kind(value)} ({reason})"
            raise self._error(TypeError, what) from error
        return unstructured

    def _find_hook(self, kind: type) -> Callable[[Any], Any]:
        try:
            return self._converter.get_unstructure_hook(kind)
        except NameError:
            # The user's converter lacks our rule for named tuples: see `rules`.
            if is_namedtuple(kind):
                return tuple
            raise

    # Both add only `encode` to the stack for each level: Python limits how deeply calls may nest.
    def _object(self, value: Mapping[Any, Any]) -> dict[str, Any]:
        encoded = {}
        for key, item in value.items():
            if not isinstance(key, str):
                what = f"the key {reprlib.repr(key)} is not a string"
                raise self._error(TypeError, what)

            name = str.__str__(key)
            self._keys.append(name)
            encoded[name] = self.encode(item)
            self._keys.pop()
        return encoded

    def _array(self, value: Iterable[Any]) -> list[Any]:
        encoded = []
        for index, item in enumerate(value):
            self._keys.append(index)
            encoded.append(self.encode(item))
            self._keys.pop()
        return encoded

    def _number(self, value: float) -> float:
        if isinstance(value, int):
            return self._integer(value)
        plain = float(value)
        if not math.isfinite(plain):
            raise self._error(ValueError, f"{plain!r} is not a JSON value")
        return plain

    def _integer(self, value: int) -> int:
        plain = int(value)
        try:
            str(plain)
        except ValueError as error:  # Python limits the digits
            raise self._error(ValueError, "the integer has too many digits") from error
        return plain

    def _error(self, kind: type[Exception], reason: str) -> Exception:
        return kind(f"inputs{''.join(map(step, self._keys))}: {reason}")


def _contains_itself(value: Any, outer: frozenset[int]) -> bool:
    """Return True if a value contains itself: from Python 3.12 on, cattrs would exhaust memory."""
    kind = type(value)
    parts: Iterable[Any] = ()
    if isinstance(value, (list, tuple)):
        parts = value
    elif isinstance(value, Mapping):
        parts = value.values()
    elif attrs.has(kind):
        parts = [getattr(value, field.name, None) for field in attrs.fields(kind)]
    elif dataclasses.is_dataclass(kind):
        parts = [getattr(value, field.name, None) for field in dataclasses.fields(kind)]

    return any(id(part) in outer or _contains_itself(part, outer | {id(part)}) for part in parts)
