"""Structures decoded JSON values into types, with the strict converter or the user's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import cattrs

from promptlayer_exec._structuring.fields import fields_of
from promptlayer_exec._structuring.mismatch import failed_keys, locate
from promptlayer_exec._structuring.rules import STRICT, Hook, UnionHook
from promptlayer_exec._values.errors import InvalidOutput

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    from promptlayer_exec._values.models import Snapshot

T = TypeVar("T")

_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
# A whole text that is one fenced block of Markdown. The last group is its content.
_FENCED = re.compile(
    r"((`|~)\2{2,})[ \t]*(?:json)?[ \t]*\r?\n(.*)\n[ \t]*\1\2*", re.IGNORECASE | re.DOTALL
)


def structure_output(
    value: Any, into: TypeForm[T], converter: cattrs.Converter | None, snapshot: Snapshot
) -> T:
    """Structure the main output of an execution into a type, by the rules in `docs/outputs.md`."""
    converter = converter or STRICT
    hook = find_hook(into, converter)
    for candidate in (value, *_json_in(value)):
        try:
            return hook(candidate, into)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 - a hook or class of the user may raise anything
            if candidate is value or isinstance(candidate, (dict, list)):
                cause, failed = error, candidate

    raise _misfit(value, failed, locate(cause, failed, converter), cause, snapshot)


def structure_outputs(
    snapshot: Snapshot, into: TypeForm[T], converter: cattrs.Converter | None
) -> T:
    """Structure the outputs of an execution by node, each by the rules of a main output."""
    converter = converter or STRICT
    if not converter.detailed_validation:  # only detailed errors name the node
        converter = converter.copy(detailed_validation=True)
    hook = find_hook(into, converter)

    outputs = {node.name: node.value for node in snapshot.output_nodes if node.succeeded}
    fields = fields_of(into, hook)
    if fields is not None:
        wanted = {key for field in fields for key in field.keys}
        succeeded = (node for node in snapshot.nodes.values() if node.succeeded)
        outputs = {node.name: node.value for node in succeeded if node.name in wanted}

    given, parsed = dict(outputs), set[str]()
    while True:
        try:
            return hook(given, into)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 - as above
            cause = error

        misfits = [name for name in failed_keys(cause, converter) if name in given]
        changed: dict[str, Any] = {}
        for name in misfits:
            if name not in parsed:
                changed.update((name, content) for content in _json_in(given[name]))
            elif not isinstance(given[name], (dict, list)) and given[name] is not outputs[name]:
                changed[name] = outputs[name]  # the error is about the text as it came
        if not changed:
            break
        given |= changed
        parsed.update(misfits)

    failed = given[misfits[0]] if misfits else given
    raise _misfit(outputs, failed, locate(cause, given, converter), cause, snapshot)


def check_type(into: Any, converter: cattrs.Converter | None = None) -> None:
    """Check that values can be structured into a type, before there is a value."""
    find_hook(into, converter or STRICT)


def _json_in(value: Any) -> Iterator[Any]:
    """Yield the content of a string of JSON, which may stand in one fenced block of Markdown."""
    if type(value) is not str:
        return
    fenced = _FENCED.fullmatch(value.strip())
    with suppress(ValueError, RecursionError):
        yield json.loads(fenced[3] if fenced else value)


def _misfit(
    value: Any,
    failed: Any,
    location: tuple[str, str, Exception],
    cause: Exception,
    snapshot: Snapshot,
) -> Exception:
    """Return the error for an output or outputs of which one, `failed`, does not fit."""
    path, reason, leaf = location
    error: Exception

    if isinstance(leaf, cattrs.StructureHandlerNotFoundError):
        # check_type cannot see types that only this value leads to.
        place = f"execution {snapshot.execution_id} at {path}"
        error = TypeError(f"cannot structure the output of {place}: {reason}")
    else:
        if isinstance(leaf, RecursionError):
            path, reason, cause = "$", "is nested too deeply", leaf
        elif isinstance(failed, str) and _FENCE.search(failed):
            reason += ". The text has a fenced block among other text, or one that is not JSON"
        error = InvalidOutput(
            f"the output does not match into= at {path}: {reason}",
            path=path,
            value=value,
            reason=reason,
            execution_id=snapshot.execution_id,
            last_snapshot=snapshot,
        )

    error.__cause__ = cause
    return error


def find_hook(into: Any, converter: cattrs.Converter) -> Hook:
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
