"""A batch belongs to the server and the API key that it was begun with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from promptlayer_exec import ConfigurationError, PollPolicy, Session, StartRequest, Unauthorized
from promptlayer_exec.dbos import Batch
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

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


@pytest.fixture
def batch_at(batches_file: Path) -> Callable[..., Batch]:
    """Return a function that makes the batch `night`, with a session for a server."""

    def make(server: Simulator, key: str | None = None, **settings: Any) -> Batch:
        def session() -> Session:
            often = PollPolicy.fixed(0.01)
            return Session(
                key or server.api_key,
                base_url=server.base_url,
                poll=often,
                push=False,
                check_inputs=False,
            )

        url = f"sqlite:///{batches_file}"
        return Batch("night", database_url=url, session=session, **settings)

    return make


async def begin(sim: Simulator, batch: Batch) -> None:
    """Start every item of a batch, and stop working on it before any has ended."""
    sim.add_workflow("w", Scenario([SimNode("Answer", "ours", None, is_output_node=True)]))
    await batch.add(ITEMS)
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(2 * len(ITEMS))  # the starts and the first polls
    working.cancel()
    await asyncio.wait([working])
    for run in sim.runs:
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
    sim: Simulator, other: Simulator, batch_at: Callable[..., Batch]
) -> None:
    """Nothing is added, followed or written; the error names both servers and what to do."""
    await begin(sim, batch_at(sim))
    for call in CALLS:
        with pytest.raises(ConfigurationError) as caught:
            await call(batch_at(other))
        for word in (sim.base_url, other.base_url, "another name", "same_server=True"):
            assert word in str(caught.value)
    assert other.request_count == 0
    assert (await batch_at(other).status()).total == len(ITEMS)
    assert (await batch_at(sim).work()).succeeded == len(ITEMS)
    assert await outcomes_of(batch_at(sim)) == ["ours"] * len(ITEMS)


async def test_another_key_is_refused(sim: Simulator, batch_at: Callable[..., Batch]) -> None:
    """Its workspace may be another one; no key is in the error."""
    await begin(sim, batch_at(sim))
    for call in CALLS:
        with pytest.raises(ConfigurationError, match="begun with another API key") as caught:
            await call(batch_at(sim, "another-key"))
        assert "another-key" not in str(caught.value)
        assert sim.api_key not in str(caught.value)
    assert (await batch_at(sim).work()).succeeded == len(ITEMS)


async def test_a_server_with_a_new_address_is_gone_on_with(
    sim: Simulator, other: Simulator, batch_at: Callable[..., Batch]
) -> None:
    """Knowingly, and once: from then on the batch belongs to that server and key."""
    await begin(sim, batch_at(sim))
    assert (await batch_at(other, same_server=True).work()).succeeded == len(ITEMS)
    assert await outcomes_of(batch_at(other)) == ["theirs"] * len(ITEMS)
    with pytest.raises(ConfigurationError, match=f"was begun at {other.base_url}"):
        await batch_at(sim).work()


async def test_a_batch_of_which_nothing_was_started_belongs_to_nobody(
    sim: Simulator, batch_at: Callable[..., Batch]
) -> None:
    """The first key was mistyped, say: it was refused, and the right one goes on."""
    sim.add_workflow("w", answering("ours"))
    mistyped = batch_at(sim, "mistyped")
    await mistyped.add(ITEMS)
    with pytest.raises(Unauthorized):
        await mistyped.work()
    assert (await batch_at(sim).work()).succeeded == len(ITEMS)


async def test_reading_does_not_move_a_batch(
    sim: Simulator, other: Simulator, batch_at: Callable[..., Batch]
) -> None:
    """`outcomes` with `same_server` yields what is stored, and changes nothing."""
    sim.add_workflow("w", answering("ours"))
    await batch_at(sim).add(ITEMS)
    await batch_at(sim).work()
    assert await outcomes_of(batch_at(other, same_server=True)) == ["ours"] * len(ITEMS)
    await batch_at(sim).check_server()


async def test_the_key_is_not_stored(
    sim: Simulator, batch_at: Callable[..., Batch], batches_file: Path
) -> None:
    """Only a salted digest of it is."""
    key = "a-very-recognizable-key"
    await batch_at(sim, key).add(ITEMS)
    stored = b"".join(path.read_bytes() for path in batches_file.parent.glob("*.sqlite*"))
    assert key.encode() not in stored
    assert sim.base_url.encode() in stored
