"""The fields of a class that an object becomes: their keys, and the kinds of JSON they hold."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args, get_origin

import attrs

from promptlayer_exec._structuring.rules import Hook, evaluated_typed_dict, is_union

_KINDS: dict[Any, str] = {
    str: "string",
    bool: "boolean",
    int: "number",
    float: "number",
    list: "array",
    tuple: "array",
    dict: "object",
}


@attrs.frozen
class ObjectField:
    """One field of a class.

    Attributes:
        name: its name.
        keys: the keys of an object from which it takes its value.
        is_required: whether it has no default.
    """

    name: str
    keys: frozenset[str]
    is_required: bool


def fields_of(form: Any, hook: Hook | None = None) -> list[ObjectField] | None:
    """Return the fields of a TypedDict, attrs class, dataclass or pydantic model.

    None for any other type. The `hook` that structures it may rename fields.
    """
    kind = get_origin(form) or form
    if hasattr(kind, "model_fields"):
        return list(_model_fields(kind))

    required = _required(kind)
    if required is None:
        return None
    overrides = getattr(hook, "overrides", {})
    renamed = {name: override.rename for name, override in overrides.items() if override.rename}
    return [
        ObjectField(name, frozenset({renamed.get(name, name)}), is_required)
        for name, is_required in required.items()
    ]


def _required(kind: Any) -> dict[str, bool] | None:
    """Return whether each field of a class is required, by its name."""
    if typing.is_typeddict(kind):
        evaluated = evaluated_typed_dict(kind)
        return {name: name in evaluated.__required_keys__ for name in evaluated.__annotations__}
    if isinstance(kind, type) and attrs.has(kind):
        return {it.name: it.default is attrs.NOTHING for it in attrs.fields(kind) if it.init}
    if dataclasses.is_dataclass(kind):
        missing = dataclasses.MISSING
        return {
            it.name: it.default is missing and it.default_factory is missing
            for it in dataclasses.fields(kind)
            if it.init
        }
    return None


def _model_fields(model: Any) -> Iterator[ObjectField]:
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        aliases = [it for it in getattr(alias, "choices", [alias]) if isinstance(it, str)]
        yield ObjectField(name, frozenset({name, *aliases}), field.is_required())


def kinds_of(form: Any) -> dict[str, str]:
    """Return the kind of value of each required field of a class, as a definition describes it."""
    try:
        hints = typing.get_type_hints(form)
    except (NameError, TypeError):  # of a class inside a function, or no class at all
        hints = {}
    found = fields_of(form) or ()
    return {field.name: _kind(hints.get(field.name, Any)) for field in found if field.is_required}


def _kind(form: Any) -> str:
    members = get_args(form) if is_union(form) else (form,)
    (first, *_) = [member for member in members if member is not NoneType]
    plain = get_origin(first) or first
    return _KINDS.get(plain) or str(getattr(plain, "__name__", plain))
