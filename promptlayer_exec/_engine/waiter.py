"""The waiters of an execution, and the error when a wait times out."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from promptlayer_exec._values.errors import ConnectionFailed, ExecutionTimeout
from promptlayer_exec._values.models import NodeStatus, Snapshot
from promptlayer_exec._values.policies import Deadline


@attrs.define(eq=False)
class Waiter:
    """One `stream`, `finished_nodes`, `wait` or `output` call, or one execution of `stream_all`.

    Deadlines belong to waiters, never to their watch.
    """

    deadline: Deadline
    streams: bool  # whether it wants every snapshot, not only the complete one
    # Called when there is a new snapshot or an error, and, if it `streams`, when a poll has failed
    # and will be repeated.
    wake: Callable[[], None] | None = None


def timed_out(
    execution_id: int | None, deadline: Deadline, seen: Snapshot | None, cause: Exception | None
) -> ExecutionTimeout:
    """Return the error for a deadline that passed, with the progress and the last failure."""
    timeout = deadline.timeout or 0.0

    if execution_id is None or seen is None:
        what = f"no response within {timeout:g} s"
    elif seen.complete:
        what = f"complete, but its main output did not arrive within {timeout:g} s"
    else:
        what = f"still running after {timeout:g} s ({_progress(seen)})"

    if cause is not None and cause.args:
        what += f". Last failure: {cause.args[0]}"

    advice = None
    if execution_id is None and isinstance(cause, ConnectionFailed):
        advice = cause.advice  # a longer timeout would not help
    return ExecutionTimeout(
        what, advice=advice, timeout=timeout, execution_id=execution_id, last_snapshot=seen
    )


def _progress(seen: Snapshot) -> str:
    final = sum(node.final for node in seen.nodes.values())
    progress = f"{final} of {len(seen.nodes)} nodes done"
    for node in seen.nodes.values():
        if not isinstance(node.status, NodeStatus):
            progress += f", {node.name!r:.100} has the unknown status {node.status!r:.100}"
            break
    return progress
