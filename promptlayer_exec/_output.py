"""The main output of an execution: which value it is, judged by the nodes, and its type."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from promptlayer_exec._errors import ExecutionFailed, InvalidOutput
from promptlayer_exec._models import Snapshot, same_json

if TYPE_CHECKING:
    import cattrs
    from typing_extensions import TypeForm

T = TypeVar("T")


async def main_output(snapshot: Snapshot, ask: Callable[[], Awaitable[Any]]) -> Any:
    """Return the main output of an execution.

    Args:
        snapshot: the complete one.
        ask: returns what the server names as the main output: only it knows which of several it is.

    Raises:
        ExecutionFailed: there is none.
    """
    snapshot.raise_for_failure()
    succeeded = [node for node in snapshot.output_nodes if node.succeeded]
    if len(succeeded) == 1:
        return succeeded[0].value
    value = await ask()
    # Where it has no main output to name, the server answers with the node map.
    if not succeeded and same_json(value, snapshot.raw):
        raise ExecutionFailed(
            "it completed without a main output: no node is marked as output",
            failed=(),
            execution_id=snapshot.execution_id,
            last_snapshot=snapshot,
        )
    return value


def check_type(into: Any, converter: cattrs.Converter | None) -> None:
    """Find out whether outputs can be of a type, before there is one.

    Raises:
        TypeError: they cannot.
    """
    # Not imported before it is needed: a quarter of what importing the package would take.
    from promptlayer_exec import _structuring  # noqa: PLC0415

    _structuring.check_type(into, converter)


def typed_output(
    value: Any, into: TypeForm[T], converter: cattrs.Converter | None, snapshot: Snapshot
) -> T:
    """Return a main output as the type that was asked for.

    Raises:
        InvalidOutput: it does not have that type.
    """
    from promptlayer_exec._structuring import StructureError, structure  # noqa: PLC0415 - as above

    try:
        return structure(value, into, converter)
    except TypeError as error:  # of a part of the type that only this value led to
        error.add_note(f"for the output of execution {snapshot.execution_id}")
        raise
    except StructureError as error:
        raise InvalidOutput(
            f"the output is not what into= asks for: {error.path}: {error.reason}",
            path=error.path,
            value=value,
            reason=error.reason,
            execution_id=snapshot.execution_id,
            last_snapshot=snapshot,
        ) from error.__cause__
