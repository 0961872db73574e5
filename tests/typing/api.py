"""The public API in code as users write it; it is type-checked, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, assert_type

import attrs

from promptlayer_exec import (
    Backplane,
    Event,
    Execution,
    Limiter,
    MainOutput,
    Node,
    NodeChange,
    NodeStatus,
    Observer,
    Outcome,
    Polled,
    PollPolicy,
    RetryPolicy,
    Session,
    Snapshot,
    StartRequest,
)
from promptlayer_exec.redis import RedisBackplane


class Tokens:
    """A limiter of the user."""

    async def acquire(self) -> None:
        """Wait for a token."""


def observe(event: Event) -> None:
    """Handle one kind of event."""
    if isinstance(event, Polled):
        assert_type(event.snapshot, Snapshot)


def record(it: Event) -> None:
    """Give the parameter another name."""


limiter: Limiter = Tokens()
observer: Observer = observe
backplane: Backplane = RedisBackplane("redis://localhost")
session = Session(
    poll=PollPolicy.fixed(1.0),
    retry=RetryPolicy(outage=5.0, statuses={503, 429}),
    wait_timeout=None,
    rate=None,
    limiter=limiter,
    backplane=backplane,
    observers=[observe, record],
)


async def follow(execution_id: int, everything: bool) -> None:
    """Call every method of a session and an execution."""
    async with session as opened:
        assert_type(opened, Session)
    assert_type(await session.get_results(execution_id), MainOutput)
    assert_type(await session.get_results(str(execution_id)), MainOutput)
    assert_type(await session.get_results(execution_id, return_all_outputs=False), MainOutput)
    assert_type(await session.get_results(execution_id, return_all_outputs=True), Snapshot)
    assert_type(
        await session.get_results(execution_id, return_all_outputs=everything),
        MainOutput | Snapshot,
    )
    execution = session.execution(execution_id)
    assert_type(execution, Execution)
    assert_type(session.execution(str(execution_id)), Execution)
    assert_type(session.wake(str(execution_id)), bool)
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


@attrs.frozen
class Report:
    """The output of a workflow."""

    title: str


async def fan_out(items: list[StartRequest], ids: AsyncIterator[int]) -> None:
    """Take outcomes one by one, and all at once."""
    execution = await session.start("name", {"a": 1}, version=3, metadata={"a": "b"})
    assert_type(execution, Execution)
    async with aclosing(session.as_completed(items, into=Report)) as outcomes:
        async for outcome in outcomes:
            assert_type(outcome, Outcome[StartRequest, Report])
            assert_type(outcome.item, StartRequest)
            assert_type(outcome.output, Report)
            assert_type(outcome.result(), Report)
    assert_type(await session.collect(ids, timeout=None), list[Outcome[int, Any]])
    assert_type(
        await session.collect(items, into=list[Report]), list[Outcome[StartRequest, list[Report]]]
    )
    either = await session.collect([1, execution, items[0]], into=Report | None)
    assert_type(either[0].result(), Report | None)
