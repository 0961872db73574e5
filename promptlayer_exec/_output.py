"""The main output of an execution: finding it in a snapshot, and structuring it into a type."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from promptlayer_exec._errors import ExecutionFailed
from promptlayer_exec._models import Snapshot, same_json

if TYPE_CHECKING:
    import cattrs
    from typing_extensions import TypeForm

T = TypeVar("T")


async def main_output(snapshot: Snapshot, ask: Callable[[], Awaitable[Any]]) -> Any:
    """Return the main output of a complete execution, or raise `ExecutionFailed`.

    The server is asked where the snapshot does not decide, because several output nodes succeeded
    or none is marked.
    """
    snapshot.raise_for_failure()
    succeeded = [node for node in snapshot.output_nodes if node.succeeded]
    if len(succeeded) == 1:
        return succeeded[0].value
    value = await ask()
    # The server sends the node map if there is no main output.
    if not succeeded and same_json(value, snapshot.raw):
        raise ExecutionFailed(
            "it completed without a main output: no node is marked as output",
            failed=(),
            execution_id=snapshot.execution_id,
            last_snapshot=snapshot,
        )
    return value


def check_type(into: Any, converter: cattrs.Converter | None) -> None:
    """Check, before there is an output, that a type can be structured into; else a `TypeError`."""
    # Imported late, because it would add a quarter to the import time of the package.
    from promptlayer_exec import _structuring  # noqa: PLC0415

    _structuring.check_type(into, converter)


def typed_output(
    value: Any, into: TypeForm[T], converter: cattrs.Converter | None, snapshot: Snapshot
) -> T:
    """Return the main output of an execution structured into a type, or raise `InvalidOutput`."""
    from promptlayer_exec._structuring import structure_output  # noqa: PLC0415 - as above

    return structure_output(value, into, converter, snapshot)
