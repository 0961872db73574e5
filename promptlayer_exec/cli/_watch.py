"""Watching an execution until it is complete."""

from contextlib import aclosing

from promptlayer_exec import Execution, RetryPolicy, Snapshot

from ._ending import ExitCode
from ._session import open_session
from ._views import View


async def follow(execution: Execution, view: View, timeout: float | None) -> Snapshot:
    """Show an execution until it is complete, and return its last snapshot."""
    # The view is left first: closing the session may take longer.
    with view.awaiting(f"execution {execution.id}: waiting for the first answer"):
        async with aclosing(execution.stream(timeout=timeout)) as snapshots:
            async for snapshot in snapshots:
                view.show(snapshot)
    return snapshot


async def watch(
    execution_id: int, view: View, *, base_url: str | None, timeout: float | None, outage: float
) -> ExitCode:
    """Show an execution of the user's workspace until it is complete."""
    session = open_session(base_url, RetryPolicy(watch_outage=outage), view.warn)
    async with session:
        snapshot = await follow(session.execution(execution_id), view, timeout)
    return ExitCode.SUCCEEDED if snapshot.succeeded else ExitCode.FAILED
