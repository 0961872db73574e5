"""Structures a decoded JSON value into a type, with the strict converter or the user's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import cattrs

from promptlayer_exec._structuring.mismatch import locate
from promptlayer_exec._structuring.rules import STRICT, Hook, UnionHook
from promptlayer_exec._values.errors import InvalidOutput

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    from promptlayer_exec._values.models import Snapshot

T = TypeVar("T")


def structure_output(
    value: Any, into: TypeForm[T], converter: cattrs.Converter | None, snapshot: Snapshot
) -> T:
    """Structure the main output of an execution into a type, by the rules in `docs/outputs.md`."""
    converter = converter or STRICT
    hook = _find_hook(into, converter)
    for candidate in _with_json_in(value):
        try:
            return hook(candidate, into)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 - a hook or class of the user may raise anything
            if candidate is value or isinstance(candidate, (dict, list)):
                cause, failed = error, candidate

    path, reason, leaf = locate(cause, failed, converter)
    if isinstance(leaf, cattrs.StructureHandlerNotFoundError):
        # check_type cannot see types that only this value leads to.
        place = f"execution {snapshot.execution_id} at {path}"
        raise TypeError(f"cannot structure the output of {place}: {reason}") from cause
    if isinstance(leaf, RecursionError):
        path, reason, cause = "$", "is nested too deeply", leaf

    raise InvalidOutput(
        f"the output does not match into= at {path}: {reason}",
        path=path,
        value=value,
        reason=reason,
        execution_id=snapshot.execution_id,
        last_snapshot=snapshot,
    ) from cause


def check_type(into: Any, converter: cattrs.Converter | None = None) -> None:
    """Check that values can be structured into a type, before there is a value."""
    _find_hook(into, converter or STRICT)


def _with_json_in(value: Any) -> Iterator[Any]:
    """Yield the value and then, if it is a string of JSON, its content."""
    yield value
    if type(value) is str:
        with suppress(ValueError, RecursionError):
            yield json.loads(value)


def _find_hook(into: Any, converter: cattrs.Converter) -> Hook:
    if isinstance(into, str):
        raise TypeError(f"into must be a type, such as the class {into:.100}, not its name")

    try:
        hook = converter.get_structure_hook(into)
        if isinstance(
            hook, UnionHook
        ):  # it looks up the hooks of its members only when it gets a value
            for member in hook.members:
                converter.get_structure_hook(member)
    except Exception as error:
        raise TypeError(f"cannot structure into {into!r:.200}: {error!s:.500}") from error
    return hook
