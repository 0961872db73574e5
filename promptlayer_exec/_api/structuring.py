"""Structuring responses into attrs classes with cattrs, by the strict rules of `into=`.

Each class is the documented shape: a body must have all fields without a default, null counts as
missing, and unknown fields are ignored.
"""

from __future__ import annotations

from functools import cache, wraps
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn

from promptlayer_exec._api.messages import Response, invalid_shape
from promptlayer_exec._structuring.mismatch import exact, locate, step

if TYPE_CHECKING:
    from promptlayer_exec._structuring.rules import Hook

T = TypeVar("T")

_OVERRIDES: dict[type, dict[str, Any]] = {}


def documented(kind: type, **overrides: Any) -> None:
    """Register the fields of a class whose name in bodies differs, or that need their own hook."""
    _OVERRIDES[kind] = overrides


def structured(response: Response, value: Any, kind: type[T], *keys: str) -> T:
    """Structure the part of a body to which `keys` lead, or raise an `InvalidResponse`."""
    converter = _wire_converter()
    try:
        return converter.structure(value, kind)
    except (cattrs.BaseValidationError, TypeError, ValueError) as error:
        place, reason, _ = locate(error, value, converter)
        before = "".join(step(key) for key in keys)
        invalid_shape(response, f"${before}{place[1:]}", reason)


@cache
def _wire_converter() -> cattrs.Converter:
    # Imported with the first response, to keep importing the package cheap.
    from promptlayer_exec._structuring.rules import is_union, strict_converter  # noqa: PLC0415

    converter = strict_converter()
    # The strict rules for these support subclasses, and are slower.
    for kind in (str, bool, int):
        converter.register_structure_hook(kind, exact)
    converter.register_structure_hook_factory(attrs.has, _object)
    converter.register_structure_hook_factory(
        lambda kind: is_union(kind) and NoneType in get_args(kind), _optional
    )
    return converter


def _object(kind: Any, converter: cattrs.Converter) -> Hook:
    hook = make_dict_structure_fn(kind, converter, **_OVERRIDES.get(kind, {}))

    @wraps(hook)  # keeps the overrides, in which `locate` finds the names in the body
    def structure(value: Any, _: Any) -> Any:
        given = {name: field for name, field in exact(value, dict).items() if field is not None}
        return hook(given, kind)

    return structure


def _optional(kind: Any, converter: cattrs.Converter) -> Hook:
    (member,) = (member for member in get_args(kind) if member is not NoneType)
    hook = converter.get_structure_hook(member)
    return lambda value, _: hook(value, member)  # null never comes here: `_object` drops it
