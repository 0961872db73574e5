"""Code as users write it: type-checked, never run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import assert_type

from promptlayer_exec import (
    Event,
    Execution,
    Limiter,
    MainOutput,
    Node,
    NodeChange,
    NodeStatus,
    Observer,
    Polled,
    PollPolicy,
    RetryPolicy,
    Session,
    Snapshot,
)


class Tokens:
    """A limiter of the user's own."""

    async def acquire(self) -> None:
        """Take a token."""


def observe(event: Event) -> None:
    """Look at one kind of event."""
    if isinstance(event, Polled):
        assert_type(event.snapshot, Snapshot)


limiter: Limiter = Tokens()
observer: Observer = observe
session = Session(
    poll=PollPolicy.fixed(1.0),
    retry=RetryPolicy(outage=5.0, statuses={503, 429}),
    wait_timeout=None,
    rate=None,
    limiter=limiter,
    observers=[observe],
)


async def follow(execution_id: int, everything: bool) -> None:
    """Use every call of the face."""
    async with session as opened:
        assert_type(opened, Session)
    assert_type(await session.get_results(execution_id), MainOutput)
    assert_type(await session.get_results(execution_id, return_all_outputs=False), MainOutput)
    assert_type(await session.get_results(execution_id, return_all_outputs=True), Snapshot)
    assert_type(
        await session.get_results(execution_id, return_all_outputs=everything),
        MainOutput | Snapshot,
    )
    execution = session.execution(execution_id)
    assert_type(execution, Execution)
    assert_type(await execution.snapshot(), Snapshot)
    assert_type(await execution.wait(timeout=None), Snapshot)
    previous: Snapshot | None = None
    async with aclosing(execution.stream(timeout=5)) as snapshots:
        async for snapshot in snapshots:
            assert_type(snapshot.nodes, Mapping[str, Node])
            assert_type(snapshot.diff(previous), tuple[NodeChange, ...])
            previous = snapshot
    async with aclosing(execution.finished_nodes()) as nodes:
        async for node in nodes:
            assert_type(node.status, NodeStatus | str)
    await session.aclose()
