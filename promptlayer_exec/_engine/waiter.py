"""Who waits for an execution, and the error for a wait that was too short."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from promptlayer_exec._errors import ExecutionTimeout
from promptlayer_exec._models import NodeStatus, Snapshot
from promptlayer_exec._policies import Deadline


@attrs.define(eq=False)
class Waiter:
    """One `stream`, `finished_nodes`, `wait` or `output` call, or one execution of `stream_all`.

    Deadlines belong to waiters, never to their watch.
    """

    deadline: Deadline
    streams: bool  # it wants every snapshot, not only the complete one
    wake: Callable[[], None] | None = None  # called when there is something to look at


def timed_out(
    execution_id: int | None, deadline: Deadline, seen: Snapshot | None, cause: Exception | None
) -> ExecutionTimeout:
    """Return the error for a deadline that passed, with the progress and the last failure."""
    timeout = deadline.timeout or 0.0

    if seen is None:
        state = "no answer came"
    elif seen.complete:
        state = "every node was final, but the main output was not available"
    else:
        final = sum(node.final for node in seen.nodes.values())
        state = f"{final} of {len(seen.nodes)} nodes were final"
        for node in seen.nodes.values():
            if not isinstance(node.status, NodeStatus):
                state += f", and {node.name!r:.100} had the unknown status {node.status!r:.100}"
                break

    what = f"not complete within {timeout:g} s: {state}"
    if execution_id is None:
        what = f"no answer within {timeout:g} s"
    failure = f"; last failure: {cause.args[0]}" if cause is not None and cause.args else ""
    return ExecutionTimeout(
        what + failure, timeout=timeout, execution_id=execution_id, last_snapshot=seen
    )
