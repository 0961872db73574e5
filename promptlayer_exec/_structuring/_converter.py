"""The strict converter: the user's structure hooks first, then our rules, then those of cattrs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from operator import eq
from types import NoneType
from typing import Any, get_origin, is_typeddict

import cattrs
from cattrs.cols import is_namedtuple

from promptlayer_exec._structuring import _rules as rules
from promptlayer_exec._structuring._unions import union

# cattrs tries the last rule first.
_RULES: list[tuple[Callable[[Any], bool], Callable[..., rules.Hook]]] = [
    (lambda kind: kind in (None, NoneType), lambda _: rules.null),
    (lambda kind: is_namedtuple(get_origin(kind)), rules.refuse_generic_named_tuple),
    (lambda kind: kind is object, lambda _: rules.anything),
    (rules.is_enum, lambda _: rules.member),
    (rules.is_literal, rules.literal),
    (lambda kind: kind in rules.PARSERS, lambda _: rules.parsed),
    (lambda kind: rules.origin(kind) in rules.ARRAYS, rules.array),
    (rules.is_mapping, rules.mapping),
    (is_namedtuple, rules.named_tuple),
    (lambda kind: is_typeddict(rules.origin(kind)), rules.typed_dict),
    (rules.is_class, rules.class_),
    (rules.is_union, union),
    (lambda kind: isinstance(kind, type) and hasattr(kind, "model_validate"), rules.model),
]


@lru_cache(maxsize=16)  # making one takes a millisecond; converters cannot be weakly referenced
def strict_converter(user: cattrs.Converter | None) -> cattrs.Converter:
    """Return a converter that coerces nothing, except by the hooks that the user's has now."""
    user = cattrs.Converter() if user is None else user
    strict = user.copy(detailed_validation=True)
    for predicate, factory in _RULES:
        strict.register_structure_hook_factory(predicate, factory)
    _move_hooks_of_the_user_to_the_top(user, strict)
    strict.register_structure_hook_factory(partial(_is_passthrough, user), union)
    plain = cattrs.Converter()
    default = plain.get_structure_hook(int)
    for kind, hook in rules.SCALARS.items():
        is_plain = plain.get_structure_hook(kind) is default
        if is_plain and user.get_structure_hook(kind, cache_result=False) is default:
            strict.register_structure_hook(kind, hook)
    if _takes_bool_for_int(user):
        strict.register_structure_hook(bool, partial(rules.scalar, bool))
    return strict


def _move_hooks_of_the_user_to_the_top(user: cattrs.Converter, strict: cattrs.Converter) -> None:
    """Register the user's hooks again, above those that were registered on `strict` since.

    cattrs has no public way to read the hooks of a converter, and `Converter.copy` leaves out those
    that are registered for a union. So this function, and no other, uses private names of cattrs;
    they are the reason for the upper bound of cattrs in pyproject.toml.
    """
    user._structure_func.copy_to(strict._structure_func, user._struct_copy_skip)
    for kind, hook in user._union_struct_registry.items():
        strict.register_structure_hook_func(partial(eq, kind), hook)


def _is_passthrough(user: cattrs.Converter, kind: Any) -> bool:
    """Return whether the user's hook for a union is the one of `configure_union_passthrough`.

    The preconfigured converters of cattrs have it. It structures the other members of the union
    with the user's converter, so with the coercing defaults. Only its name tells where it is from.
    """
    if not rules.is_union(kind):
        return False
    hook = user.get_structure_hook(kind, cache_result=False)
    return getattr(hook, "__qualname__", "").startswith("configure_union_passthrough.")


def _takes_bool_for_int(user: cattrs.Converter) -> bool:
    """Return whether cattrs would use the user's hook for int, the base class of bool, for bool."""
    probe = user.copy()
    hook = partial(rules.scalar, int)
    probe.register_structure_hook(int, hook)
    return probe.get_structure_hook(bool) is hook
