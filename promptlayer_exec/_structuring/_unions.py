"""Structuring into a union: which members are tried, in which order, and the error if none fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache, partial
from types import NoneType
from typing import Any, get_args

import cattrs
from cattrs.disambiguators import create_default_dis_func

from promptlayer_exec._json import json_kind
from promptlayer_exec._structuring._errors import locate
from promptlayer_exec._structuring._rules import (
    Hook,
    WrongKind,
    is_class,
    is_enum,
    is_literal,
    is_mapping,
    is_union,
)

# The unions and values that did not fit, by id, while one output is structured. Without it, the
# time to refuse a value for a union of similar recursive classes would double with each level.
_FAILED: ContextVar[dict[tuple[int, int], Any]] = ContextVar("_FAILED")


@contextmanager
def remembering_failures() -> Iterator[None]:
    """Let unions remember, within the context, which values did not fit; they rely on it."""
    token = _FAILED.set({})
    try:
        yield
    finally:
        _FAILED.reset(token)


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
        failed, key = _FAILED.get(), (id(kind), id(value))
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
