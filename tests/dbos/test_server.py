"""A batch belongs to the server and the API key that it was started with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from promptlayer_exec import (
    ConfigurationError,
    Polled,
    PollPolicy,
    RetryPolicy,
    StartRequest,
    Unauthorized,
    WatchWoken,
)
from promptlayer_exec.dbos import Batch
from promptlayer_exec.dbos import _following as following
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

ITEMS = [StartRequest("w", {}, key=str(number)) for number in range(3)]


def answering(output: str) -> Scenario:
    """Return a run that is complete at once."""
    return Scenario([SimNode("Answer", output, is_output_node=True)])


@pytest.fixture
async def other() -> AsyncIterator[Simulator]:
    """Return a second server, whose execution ids are those of the first, too."""
    async with Simulator() as simulator:
        simulator.add_workflow("w", answering("theirs"))
        for _ in ITEMS:
            simulator.add_execution(answering("theirs"))
        yield simulator


async def begin(sim: Simulator, batch: Batch, *, finishes: bool = True) -> None:
    """Start every item of a batch, and stop working on it before any has ended."""
    sim.add_workflow("w", Scenario([SimNode("Answer", "ours", None, is_output_node=True)]))
    await batch.add(ITEMS)
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(2 * len(ITEMS))  # the starts and the first polls, at least
    working.cancel()
    await asyncio.wait([working])
    for run in sim.runs if finishes else ():
        sim.finish(run.execution_id, "Answer")


async def outcomes_of(batch: Batch) -> list[Any]:
    """Return the stored outputs."""
    return [outcome.output async for outcome in batch.outcomes(until_done=False)]


CALLS: list[Callable[[Batch], Awaitable[Any]]] = [
    lambda batch: batch.add([StartRequest("w", {}, key="new")]),
    lambda batch: batch.work(),
    lambda batch: batch.recheck(),
    lambda batch: batch.retry(failed=True, unknown=True),
    outcomes_of,
    lambda batch: batch.check_server(),
]


async def test_another_server_is_refused(
    sim: Simulator, other: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """Nothing is added, followed or written; the error names both servers and what to do."""
    await begin(sim, batch_of())
    for call in CALLS:
        with pytest.raises(ConfigurationError) as caught:
            await call(batch_of(base_url=other.base_url))
        for word in (sim.base_url, other.base_url, "another name", "same_server=True"):
            assert word in str(caught.value)
    assert other.request_count == 0
    assert (await batch_of(base_url=other.base_url).status()).total == len(ITEMS)
    assert (await batch_of().work()).succeeded == len(ITEMS)
    assert await outcomes_of(batch_of()) == ["ours"] * len(ITEMS)


async def test_another_key_is_refused(sim: Simulator, batch_of: Callable[..., Batch]) -> None:
    """Its workspace may be another one; no key is in the error."""
    await begin(sim, batch_of())
    for call in CALLS:
        with pytest.raises(ConfigurationError, match="with another API key") as caught:
            await call(batch_of(api_key="another-key"))
        assert "another-key" not in str(caught.value)
        assert sim.api_key not in str(caught.value)
    assert (await batch_of().work()).succeeded == len(ITEMS)


async def test_a_server_with_a_new_address_is_gone_on_with(
    sim: Simulator, other: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """Knowingly, and once: from then on the batch belongs to that server and key."""
    await begin(sim, batch_of())
    moved = batch_of(base_url=other.base_url, same_server=True)
    assert (await moved.work()).succeeded == len(ITEMS)
    assert await outcomes_of(batch_of(base_url=other.base_url)) == ["theirs"] * len(ITEMS)
    with pytest.raises(ConfigurationError, match=f"started on {other.base_url}"):
        await batch_of().work()


async def test_a_batch_of_which_nothing_was_started_belongs_to_nobody(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """The first key was mistyped, say: it was refused, and the right one goes on."""
    sim.add_workflow("w", answering("ours"))
    mistyped = batch_of(api_key="mistyped")
    await mistyped.add(ITEMS)
    with pytest.raises(Unauthorized):
        await mistyped.work()
    assert (await batch_of().work()).succeeded == len(ITEMS)


async def test_a_worker_that_takes_over_is_woken_by_push(
    sim: Simulator, batch_of: Callable[..., Batch], recorder: Any
) -> None:
    """All workers share one channel, whoever has started the run."""
    await begin(sim, batch_of(push=None), finishes=False)
    seldom = PollPolicy(floor=0.2, ceiling=3600.0)
    second = batch_of(push=None, observers=[recorder], poll=seldom)
    working = asyncio.create_task(second.work())
    for _ in range(2 * len(ITEMS)):  # the second poll of each comes when the subscription stands
        await recorder.next(Polled)
    for run in sim.runs:
        sim.finish(run.execution_id, "Answer")
    assert (await working).succeeded == len(ITEMS)
    assert {one.source for one in recorder.of(WatchWoken)} == {"push"}
    assert len({run.body["channel_name_suffix"] for run in sim.runs}) == 1


@pytest.mark.parametrize("is_missing", [False, True])
async def test_a_retry_starts_only_what_is_known_to_have_failed(
    sim: Simulator,
    batch_of: Callable[..., Batch],
    adjust: Callable[..., None],
    *,
    is_missing: bool,
) -> None:
    """A run for which the server said 404 may exist: it is followed once more."""
    adjust(following, "READ_PATIENCE", refused_alone=0.0, refused=0.0)
    at_once = RetryPolicy(not_found_grace=0.0)
    failed = SimNode("Answer", status="FAILED", error_message="no", is_output_node=True)
    sim.add_workflow("w", Scenario([failed]))
    await batch_of().add(ITEMS[:1])
    if is_missing:
        sim.inject(Fault.status(404, times=None), path="/workflow-version-execution-results")
    assert (await batch_of(retry=at_once).work()).failed == 1
    sim.clear_faults()
    assert await batch_of().retry(failed=True) == 1
    await batch_of().work()
    assert len(sim.runs) == (1 if is_missing else 2)


async def test_reading_does_not_move_a_batch(
    sim: Simulator, other: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """`outcomes` with `same_server` yields what is stored, and changes nothing."""
    sim.add_workflow("w", answering("ours"))
    await batch_of().add(ITEMS)
    await batch_of().work()
    moved = batch_of(base_url=other.base_url, same_server=True)
    assert await outcomes_of(moved) == ["ours"] * len(ITEMS)
    await batch_of().check_server()


async def test_the_key_is_not_stored(
    sim: Simulator, batch_of: Callable[..., Batch], batches_file: Path
) -> None:
    """Only a salted digest of it is."""
    key = "a-very-recognizable-key"
    await batch_of(api_key=key).add(ITEMS)
    stored = b"".join(path.read_bytes() for path in batches_file.parent.glob("*.sqlite*"))
    assert key.encode() not in stored
    assert sim.base_url.encode() in stored
