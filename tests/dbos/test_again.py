"""Items that are run again: followed, started again, taken over, or ended by others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from dbos import DBOSClient

from promptlayer_exec import StartRequest
from promptlayer_exec.dbos import Batch, BatchStatus, StoredOutcome
from promptlayer_exec.dbos._tables import workflow_id
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

End = Callable[[str, int | None, str], None]


async def outcomes(batch: Batch) -> dict[str, StoredOutcome]:
    """Return the latest outcome of each item that has one."""
    return {outcome.key: outcome async for outcome in batch.outcomes(until_done=False)}


async def test_ended_items_are_started_again_on_request(
    sim: Simulator, batch: Batch, end: End
) -> None:
    """`retry` starts only the kinds that are named; one that was given up it follows."""
    await batch.add(StartRequest("echo", {"n": n}, key=f"{n}") for n in ("bad", 1, 2, 3))
    found = sim.add_execution(Scenario([SimNode("Answer", 7, is_output_node=True)]))
    end("1", None, "NotFound")
    end("2", found, "ServerError")
    end("3", None, "StartUnknown")
    assert (await batch.work()).finished == 4
    assert len(sim.runs) == 1
    assert await batch.retry() == 0
    assert await batch.retry(unknown=True) == 1
    assert await batch.retry(failed=True) == 3
    assert await batch.work() == BatchStatus(0, 0, 3, 1, 0, 4)
    assert sorted(str(run.inputs["n"]) for run in sim.runs) == ["1", "3", "bad", "bad"]
    assert (await outcomes(batch))["2"].output == 7


async def test_an_attempt_keeps_its_number(batch: Batch, url: str, end: End) -> None:
    """Also when DBOS no longer has an earlier one."""
    await batch.add([StartRequest("echo", {"n": 1}, key="a/b")])
    end("a/b", None, "NotFound")
    assert await batch.retry(failed=True) == 1
    client = DBOSClient(system_database_url=url)
    client.delete_workflow(workflow_id("nightly", "a/b", 1))
    client.destroy()
    item = await batch.item("a/b")
    assert item is not None
    assert [attempt.number for attempt in item.attempts] == [2]
    assert item.request["inputs"] == {"n": 1}


async def test_a_start_whose_item_was_taken_over_is_followed(
    sim: Simulator, batch: Batch, end: End, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker may be taken for dead while it sends a start: the run is paid for, and not lost."""
    await batch.add([StartRequest("echo", {"n": 5}, key="a")])
    sim.inject(Fault.delay(1.0))
    working = asyncio.create_task(batch.work())
    await sim.wait_for_requests(1)
    end("a", None, "StartUnknown")
    await working
    assert (await batch.work()).succeeded == 1
    (run,) = sim.runs
    text = f"execution {run.execution_id} started for item 'a' while another worker took"
    assert text in caplog.text
    assert (await outcomes(batch))["a"].output == 5


async def test_the_id_of_a_start_that_cannot_be_followed_is_logged(
    sim: Simulator, batch: Batch, end: End, caplog: pytest.LogCaptureFixture
) -> None:
    """For example because the item got another outcome meanwhile."""
    await batch.add([StartRequest("echo", {"n": 5}, key="a")])
    sim.inject(Fault.delay(1.0))
    working = asyncio.create_task(batch.work(until_done=False))
    await sim.wait_for_requests(1)
    end("a", None, "Cancelled")  # first: the answer to the start may come at any time
    async with asyncio.timeout(20):
        while "keep this line" not in caplog.text:  # noqa: ASYNC110 - the log has no event
            await asyncio.sleep(0.01)
    assert "started for item 'a' of batch 'nightly'" in caplog.text
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
