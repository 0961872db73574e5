"""Structuring a decoded JSON value into a type without coercion.

The strict converter tries the user's structure hooks first, then our rules, then those of cattrs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from operator import eq
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, is_typeddict

import cattrs
from cattrs.cols import is_namedtuple
from cattrs.errors import StructureHandlerNotFoundError

from promptlayer_exec._errors import InvalidOutput
from promptlayer_exec._structuring import _rules as rules
from promptlayer_exec._structuring._errors import locate

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    from promptlayer_exec._models import Snapshot

T = TypeVar("T")


def structure(value: Any, into: TypeForm[T], converter: cattrs.Converter | None = None) -> T:
    """Structure a decoded JSON value into a type, by the rules in `docs/outputs.md`.

    Raises:
        InvalidOutput: the value does not fit the type.
        TypeError: `into` is not a type, or has a part that there is no hook for.
    """
    strict = strict_converter(converter)
    hook = _usable_hook(into, strict)
    failures: list[tuple[Exception, Any]] = []
    for candidate in _with_json_in(value):
        token = rules.FAILED.set({})
        try:
            return hook(candidate, into)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 - a hook or class of the user may raise anything
            if not failures or isinstance(candidate, (dict, list)):
                failures.append((error, candidate))
        finally:
            rules.FAILED.reset(token)
    failure, candidate = failures[-1]
    path, reason, leaf = locate(failure, candidate, strict)
    if isinstance(leaf, StructureHandlerNotFoundError):
        raise TypeError(f"{path}: {reason}") from failure
    if isinstance(leaf, RecursionError):
        path, reason, failure = "$", "is nested too deeply", leaf
    what = f"the output does not fit the type given as into=: {path}: {reason}"
    raise InvalidOutput(what, path=path, value=value, reason=reason) from failure


def structure_output(
    value: Any, into: TypeForm[T], converter: cattrs.Converter | None, snapshot: Snapshot
) -> T:
    """Structure the main output of an execution; the error has the execution's snapshot."""
    try:
        return structure(value, into, converter)
    except TypeError as error:  # check_type does not see parts that only this value leads to
        error.add_note(f"for the output of execution {snapshot.execution_id}")
        raise
    except InvalidOutput as error:
        error.execution_id = snapshot.execution_id
        error.last_snapshot = snapshot
        raise


def check_type(into: Any, converter: cattrs.Converter | None = None) -> None:
    """Check that values can be structured into a type, before there is a value."""
    _usable_hook(into, strict_converter(converter))


def _with_json_in(value: Any) -> Iterator[Any]:
    """Yield the value, and then, if it is a string of JSON, the value in it."""
    yield value
    if type(value) is str:
        with suppress(ValueError, RecursionError):
            yield json.loads(value)


def _usable_hook(into: Any, converter: cattrs.Converter) -> rules.Hook:
    try:
        if rules.is_union(into):  # its hook looks up those of its members only when it gets a value
            for member in get_args(into):
                converter.get_structure_hook(member)
        return converter.get_structure_hook(into)
    except Exception as error:
        raise TypeError(f"cannot structure into {into!r:.200}: {error!s:.500}") from error


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
    (rules.is_union, rules.union),
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
    strict.register_structure_hook_factory(partial(_is_passthrough, user), rules.union)
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
