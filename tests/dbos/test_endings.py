"""What becomes of an item whose run nobody can read, or never ends: an outcome, with the id."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from aiohttp import web

from promptlayer_exec import (
    InvalidResponse,
    RequestError,
    ServerError,
    StartRequest,
    Unauthorized,
)
from promptlayer_exec._http.throttle import Rate
from promptlayer_exec.dbos import Batch, StoredOutcome
from promptlayer_exec.dbos import _following as following
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

UNREADABLE = b'{"Answer": {"status": null}}'
REFUSALS: dict[str, Callable[..., Fault]] = {
    "Forbidden": partial(Fault.status, 403),
    "NotFound": partial(Fault.status, 404),
    "BadRequest": partial(Fault.status, 400),
    "UnprocessableEntity": partial(Fault.status, 422),
    "ResponseTooLarge": partial(Fault.oversize, 2_000_000),
    "InvalidResponse": partial(Fault.status, 200, body=UNREADABLE),
}


def requests(names: Sequence[Any], workflow: str = "echo") -> list[StartRequest]:
    """Return items whose output is their key."""
    return [StartRequest(workflow, {"n": f"{name}"}, key=f"{name}") for name in names]


def most_starts(sim: Simulator) -> int:
    """Return how often the item that was started most often was started."""
    return max(Counter(run.inputs["n"] for run in sim.runs).values())


async def run_of(sim: Simulator, key: str) -> int:
    """Wait until the item has started, and return its run."""
    async with asyncio.timeout(20):
        while True:
            for run in sim.runs:
                if run.inputs["n"] == key:
                    return run.execution_id
            await asyncio.sleep(0.01)


async def outcomes(batch: Batch) -> dict[str, StoredOutcome]:
    """Return the latest outcome of each item."""
    return {outcome.key: outcome async for outcome in batch.outcomes(until_done=False)}


@pytest.fixture
def odd(sim: Simulator) -> set[str]:
    """Return the items, by their input, whose final responses have another shape."""
    names: set[str] = set()

    async def effect(
        request: web.BaseRequest, respond: Callable[[], Any]
    ) -> web.StreamResponse | None:
        named = request.query.get("workflow_version_execution_id")
        for run in sim.runs:
            if f"{run.execution_id}" == named and run.inputs["n"] in names:
                return web.Response(body=UNREADABLE, content_type="application/json")
        return None

    sim.inject(Fault(effect, times=None), path="/workflow-version-execution-results")
    return names


async def test_items_are_listed_with_their_states(sim: Simulator, batch: Batch) -> None:
    """In the order of their keys: why each has no output, since when, and its run."""
    await batch.add([*requests(["bad", "good"]), *requests(["held"], "held")])
    before = [item async for item in batch.items()]
    assert [(item.key, item.state, item.execution_id) for item in before] == [
        *(("bad", "waiting", None), ("good", "waiting", None), ("held", "waiting", None))
    ]
    working = asyncio.create_task(batch.work())
    run = await run_of(sim, "held")
    async with asyncio.timeout(20):
        for key, state in (("bad", "failed"), ("good", "succeeded"), ("held", "following")):
            while key not in [item.key async for item in batch.items(state=state)]:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)
    found = [item async for item in batch.items()]
    assert [item.state for item in found] == ["failed", "succeeded", "following"]
    assert found[0].why.startswith(f"execution {await run_of(sim, 'bad')}")
    assert (found[1].why, found[1].execution_id) == (None, await run_of(sim, "good"))
    assert (found[2].why, found[2].execution_id) == (None, run)
    assert all(now.since > then.since for then, now in zip(before, found, strict=True))
    clock = timedelta(milliseconds=2)  # the resolution of SQLite's
    assert found[0].since >= (await batch.item("bad")).outcome.finished - clock
    assert found[2].since >= (await batch.item("held")).attempts[-1].started - clock
    assert [item.key async for item in batch.items(state="following")] == ["held"]
    assert [item.key async for item in batch.items(older_than=3600.0)] == []
    for text, keys in (("HEL", ["held"]), ('"workflow"', ["bad", "good", "held"]), ("%", [])):
        assert [item.key async for item in batch.items(containing=text)] == keys
    with pytest.raises(ValueError, match="state must be one of waiting, sending"):
        await anext(batch.items(state="running"))  # type: ignore[arg-type]
    sim.finish(run, "Answer")
    await working

    sim.inject(Fault.status(503))
    await batch.add(requests(["lost"]))
    await batch.work()
    (lost,) = [item async for item in batch.items(state="unknown")]
    assert (lost.key, lost.execution_id) == ("lost", None)
    assert lost.why is not None
    stored = await batch.item("lost")
    assert [attempt.state for attempt in stored.attempts] == ["unknown"]
    assert await batch.retry(unknown=True) == 1
    stored = await batch.item("lost")
    assert [attempt.state for attempt in stored.attempts] == ["unknown", "waiting"]


@pytest.mark.parametrize(
    ("error", "others"), [*((error, 9) for error in REFUSALS), ("NotFound", 0), ("Forbidden", 0)]
)
async def test_a_run_that_nobody_can_read_ends_its_item_alone(
    sim: Simulator,
    batch_of: Callable[..., Batch],
    adjust: Callable[..., None],
    error: str,
    others: int,
) -> None:
    """With its id. `recheck` and `retry` follow it again for free."""
    adjust(following, "READ_PATIENCE", refused_alone=0.2, refused=0.4)
    batch = batch_of(max_response_bytes=1_000_000)
    await batch.add([*requests(["odd"], "held"), *requests(range(others))])
    working = asyncio.create_task(batch.work())
    run = await run_of(sim, "odd")
    sim.inject(REFUSALS[error](times=None, execution_id=run))
    status = await working
    assert (status.succeeded, status.failed) == (others, 1)
    ended = (await outcomes(batch))["odd"]
    assert (ended.error.type, ended.execution_id) == (error, run)

    assert await batch.retry(failed=True) == 1
    assert (await batch.work()).failed == 1
    sim.clear_faults()
    sim.finish(run, "Answer")
    assert await batch.recheck() == 1
    assert (await batch.work()).succeeded == others + 1
    assert most_starts(sim) == 1


async def test_an_unreadable_response_is_read_three_times(
    sim: Simulator, batch: Batch, odd: set[str]
) -> None:
    """Then it does not hold the place of its item any longer."""
    odd.add("a")
    await batch.add(requests("a"))
    assert (await batch.work()).failed == 1
    assert [request.method for request in sim.requests] == ["POST", "GET", "GET", "GET"]


async def test_a_main_output_that_nobody_can_read_ends_its_item(
    sim: Simulator, batch_of: Callable[..., Batch]
) -> None:
    """Although all nodes of the run can be read each time."""
    batch = batch_of(max_response_bytes=1_000_000)
    nodes = [SimNode(name, 1, is_output_node=True) for name in "ab"]
    sim.add_workflow("two", Scenario(nodes))

    async def effect(request: web.BaseRequest, _: Any) -> web.StreamResponse | None:
        if request.query.get("return_all_outputs") == "false":
            return web.Response(body=b" " * 3_000_000)
        return None

    sim.inject(Fault(effect, times=None), path="/workflow-version-execution-results")
    await batch.add(requests("a", "two"))
    assert (await asyncio.wait_for(batch.work(), 20)).failed == 1


@pytest.mark.parametrize(
    ("status", "body"), [(503, b"[1]"), (502, b""), (429, b""), (402, b""), (200, b"<html>")]
)
async def test_an_outage_stops_the_work_and_ends_no_item(
    sim: Simulator,
    batch_of: Callable[..., Batch],
    adjust: Callable[..., None],
    status: int,
    body: bytes,
) -> None:
    """The next worker follows the same runs."""
    adjust(Rate, "_policy", least_growth=100.0)  # a session is slow for a while after a 429
    await batch_of().add(requests(range(6)))
    sim.inject(
        Fault.status(status, body=body, times=None), path="/workflow-version-execution-results"
    )
    with pytest.raises(RequestError) as caught:
        await batch_of(watch_outage=0.2).work()
    assert caught.value.status == status
    assert (await batch_of().status()).finished == 0
    sim.clear_faults()
    assert (await batch_of().work()).succeeded == 6
    assert most_starts(sim) == 1


@pytest.mark.parametrize("status", [503, 404])
async def test_an_outage_that_reaches_one_run_after_another_ends_no_item(
    sim: Simulator, batch_of: Callable[..., Batch], adjust: Callable[..., None], status: int
) -> None:
    """A run may still end readably soon after the first request for another one has failed."""
    adjust(following, "READ_PATIENCE", refused_alone=1.5, refused=3600.0)
    batch = batch_of(watch_outage=2.5, max_in_flight=5)
    await batch.add(requests(range(5), "held"))
    working = asyncio.create_task(batch.work())
    *early, last = [await run_of(sim, f"{number}") for number in range(5)]

    for run in early:
        sim.inject(Fault.status(status, times=None, execution_id=run))
    await asyncio.sleep(0.5)
    sim.finish(last, "Answer")
    while not (await batch.status()).succeeded:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.01)
    sim.inject(Fault.status(status, times=None), path="/workflow-version-execution-results")

    if status == 503:
        with pytest.raises(ServerError):
            await asyncio.wait_for(working, 20)
        sim.clear_faults()
        working = asyncio.create_task(batch.work())
    else:
        await asyncio.wait({working}, timeout=2.0)
        sim.clear_faults()
    for run in early:
        sim.finish(run, "Answer")
    assert (await asyncio.wait_for(working, 20)).succeeded == 5
    assert most_starts(sim) == 1


async def test_a_refused_key_ends_no_item(sim: Simulator, batch_of: Callable[..., Batch]) -> None:
    """It stops the work at once, however often somebody tries again."""
    await batch_of().add(requests(range(3)))
    sim.inject(Fault.status(401, times=None), path="/workflow-version-execution-results")
    for _ in range(2):
        with pytest.raises(Unauthorized):
            await batch_of().work()
    assert (await batch_of().status()).finished == 0


@pytest.mark.parametrize(("status", "error"), [(503, "ServerError"), (403, "Forbidden")])
async def test_a_run_that_alone_gets_errors_ends_its_item_soon(
    sim: Simulator,
    batch_of: Callable[..., Batch],
    adjust: Callable[..., None],
    status: int,
    error: str,
) -> None:
    """The server reports how others end, so that it is neither an outage nor a gateway."""
    adjust(following, "READ_PATIENCE", refused_alone=0.3, refused=3600.0)
    batch = batch_of(watch_outage=1.5)  # in the second half of it, another run ends
    await batch.add(requests(["odd"], "held"))
    working = asyncio.create_task(batch.work())
    sim.inject(Fault.status(status, times=None, execution_id=await run_of(sim, "odd")))
    others = 0
    while not (await batch.status()).failed:
        assert others < 200
        await batch.add(requests([others]))
        others += 1
        await asyncio.sleep(0.1)
    ended = await asyncio.wait_for(working, 20)
    assert (ended.succeeded, ended.failed) == (others, 1)
    assert (await outcomes(batch))["odd"].error.type == error


async def test_refusals_between_the_errors_of_an_outage_do_not_keep_an_item_for_ever(
    sim: Simulator, batch: Batch, adjust: Callable[..., None]
) -> None:
    """Two gateways may take turns. The refusals count, because the session waits out the others."""
    statuses = [403, 503]

    async def effect(request: web.BaseRequest, _: Any) -> web.StreamResponse:
        statuses.reverse()
        return web.Response(status=statuses[0], body=b"{}")

    adjust(following, "READ_PATIENCE", refused=0.4)
    await batch.add(requests("a"))
    sim.inject(Fault(effect, times=None), path="/workflow-version-execution-results")
    assert (await asyncio.wait_for(batch.work(), 20)).failed == 1


async def test_refusals_that_are_far_apart_end_no_item(
    sim: Simulator, batch: Batch, adjust: Callable[..., None]
) -> None:
    """In between, the run could be read."""
    adjust(following, "READ_PATIENCE", refused_alone=0.3, refused=0.3)
    await batch.add(requests("a", "held"))
    working = asyncio.create_task(batch.work())
    run = await run_of(sim, "a")
    for _ in range(2):
        sim.inject(Fault.status(403, execution_id=run))
        await asyncio.sleep(0.5)
    sim.finish(run, "Answer")
    assert (await working).succeeded == 1


async def test_a_gateway_that_is_deployed_ends_no_item(
    sim: Simulator, batch: Batch, adjust: Callable[..., None]
) -> None:
    """It may respond 404 for a while, and before that with the errors of an outage."""
    adjust(following, "READ_PATIENCE", refused_alone=0.6, refused=0.6)
    await batch.add(requests("a", "held"))
    working = asyncio.create_task(batch.work())
    run = await run_of(sim, "a")
    for status in (503, 404):
        sim.inject(Fault.status(status, times=None, execution_id=run))
        await asyncio.sleep(0.4)
        sim.clear_faults()
    sim.finish(run, "Answer")
    assert (await working).succeeded == 1


class TestGiveUpAfter:
    """`give_up_after`, of runs that never end."""

    async def test_a_run_that_never_ends_ends_its_item(
        self, sim: Simulator, batch_of: Callable[..., Batch]
    ) -> None:
        """Whatever the session's `wait_timeout` is. The text has the age of the run."""
        batch = batch_of(give_up_after=1.2, wait_timeout=0.1)
        await batch.add([*requests(["odd"], "held"), *requests(range(3))])
        status = await batch.work()
        assert (status.succeeded, status.failed) == (3, 1)
        ended = (await outcomes(batch))["odd"]
        assert ended.error.type == "ExecutionTimeout"
        assert f"execution {ended.execution_id}: still running 1." in ended.error.message
        assert "s after its start" in ended.error.message

        assert await batch.retry(failed=True) == 1
        sim.finish(ended.execution_id, "Answer")
        assert (await batch.work()).succeeded == 4
        assert most_starts(sim) == 1

    async def test_it_counts_again_from_the_command_that_follows_a_run_again(
        self, sim: Simulator, batch_of: Callable[..., Batch]
    ) -> None:
        """The age in the text is that of the run."""
        batch = batch_of(give_up_after=1.0)
        await batch.add(requests("a", "held"))
        assert (await batch.work()).failed == 1
        await batch.recheck()
        began = time.monotonic()
        assert (await batch.work()).failed == 1
        assert time.monotonic() - began > 0.8
        message = (await outcomes(batch))["a"].error.message
        assert float(message.partition("still running ")[2].split()[0]) >= 2.0

    async def test_it_counts_while_nobody_works(
        self, sim: Simulator, batch_of: Callable[..., Batch], adjust: Callable[..., None]
    ) -> None:
        """A run that is older is looked at once more, and may have ended."""
        adjust(following, "READ_PATIENCE", last_look=0.5)
        batch = batch_of(give_up_after=1.0)
        await batch.add(requests("ab", "held"))
        working = asyncio.create_task(batch.work())
        runs = [await run_of(sim, key) for key in "ab"]
        working.cancel()
        await asyncio.wait([working])
        await asyncio.sleep(1.0)
        sim.finish(runs[1], "Answer")
        status = await batch.work()
        assert (status.succeeded, status.failed) == (1, 1)

    async def test_an_outage_ends_no_item_however_old_its_run_is(
        self, sim: Simulator, batch_of: Callable[..., Batch], adjust: Callable[..., None]
    ) -> None:
        """It stops the work after the patience of the session."""
        adjust(following, "READ_PATIENCE", last_look=0.2)
        await batch_of().add(requests("a", "held"))
        assert (await batch_of(give_up_after=0.2).work()).failed == 1
        sim.inject(Fault.status(503, times=None), path="/workflow-version-execution-results")
        assert await batch_of().retry(failed=True) == 1
        began = time.monotonic()
        with pytest.raises(ServerError):
            await batch_of(watch_outage=1.0).work()
        assert time.monotonic() - began >= 1.0
        sim.clear_faults()
        sim.finish(sim.runs[0].execution_id, "Answer")
        assert (await batch_of().work()).succeeded == 1

    async def test_it_belongs_to_the_batch(
        self, batch_of: Callable[..., Batch], caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker that names none uses the stored one, and one that does changes it for all."""
        await batch_of(give_up_after=3600.0).add(requests("a"))
        assert (await batch_of().settings()).give_up_after == 3600.0
        await batch_of(give_up_after=math.inf).work()
        assert (await batch_of().settings()).give_up_after == math.inf
        assert "give_up_after changed from 3600 to inf for all its workers" in caplog.text

    async def test_a_limit_that_another_worker_stores_counts_for_runs_that_are_followed(
        self, sim: Simulator, batch_of: Callable[..., Batch], adjust: Callable[..., None]
    ) -> None:
        """It need not be restarted."""
        batch = batch_of()
        await batch.add(requests("a", "held"))
        working = asyncio.create_task(batch.work())
        await run_of(sim, "a")
        await asyncio.sleep(0.2)
        other = batch_of(give_up_after=1.0)
        async with other._open() as store:
            store.store_settings("nightly", other._settings)
        assert (await asyncio.wait_for(working, 20)).failed == 1

    async def test_infinity_means_never(
        self, sim: Simulator, batch_of: Callable[..., Batch]
    ) -> None:
        """Also in the database."""
        batch = batch_of(give_up_after=math.inf)
        await batch.add(requests("a", "held"))
        working = asyncio.create_task(batch.work())
        sim.finish(await run_of(sim, "a"), "Answer")
        assert (await working).succeeded == 1


class TestGiveUp:
    """`give_up`, by hand."""

    async def test_the_queue_goes_on_at_once(
        self, sim: Simulator, batch_of: Callable[..., Batch]
    ) -> None:
        """The worker lets go of the item, and `recheck` follows its run again."""
        batch = batch_of(max_in_flight=1)
        await batch.add(requests("a", "held"))
        working = asyncio.create_task(batch.work())
        run = await run_of(sim, "a")
        await batch.add(requests("b"))
        while await batch.give_up(["a"]) == 0:  # noqa: ASYNC110 - a record has no event
            await asyncio.sleep(0.01)
        status = await asyncio.wait_for(working, 20)
        assert (status.succeeded, status.failed) == (1, 1)
        ended = (await outcomes(batch))["a"]
        assert (ended.error.type, ended.execution_id) == ("ExecutionTimeout", run)
        assert "given up by hand" in ended.error.message

        assert await batch.give_up() == 0
        sim.finish(run, "Answer")
        assert await batch.recheck() == 1
        assert (await batch.work()).succeeded == 2
        assert most_starts(sim) == 1

    async def test_only_what_has_been_followed_for_long_is_given_up(
        self, sim: Simulator, batch: Batch
    ) -> None:
        """So that one command ends what hangs, and nothing else."""
        await batch.add(requests("a", "held"))
        working = asyncio.create_task(batch.work())
        await run_of(sim, "a")
        assert await batch.give_up(running_for=3600.0) == 0
        while await batch.give_up(running_for=0.5) == 0:  # noqa: ASYNC110 - nor has time
            await asyncio.sleep(0.05)
        assert (await working).failed == 1


class TestAdopt:
    """`adopt`, of the run that somebody found for an unknown item."""

    @pytest.fixture
    async def lost(self, sim: Simulator, batch: Batch) -> int:
        """Return the run of the unknown item "a"; the item "b" has succeeded."""
        await batch.add(requests("b"))
        await batch.work()
        sim.inject(Fault.disconnect(), path="/run")
        await batch.add(requests("a"))
        assert (await batch.work()).unknown == 1
        return sim.add_execution(Scenario([SimNode("Answer", "a", is_output_node=True)]))

    async def test_the_run_is_followed_and_nothing_starts(
        self, sim: Simulator, batch: Batch, lost: int
    ) -> None:
        """The item is no longer unknown."""
        started = len(sim.runs)
        assert await batch.adopt("a", lost)
        status = await batch.status()
        assert (status.unknown, status.waiting) == (0, 1)
        assert (await batch.work()).succeeded == 2
        assert (await outcomes(batch))["a"].execution_id == lost
        assert len(sim.runs) == started
        assert not await batch.adopt("a", lost)
        assert not await batch.adopt("none", lost + 1)

    async def test_the_run_of_another_item_is_refused(
        self, sim: Simulator, batch: Batch, lost: int
    ) -> None:
        """Each run belongs to one item, however it ended."""
        run = await run_of(sim, "b")
        assert run != lost
        with pytest.raises(ValueError, match=f"execution {run} is the run of item 'b'"):
            await batch.adopt("a", run)
        with pytest.raises(TypeError):
            await batch.adopt(1, run)  # type: ignore[arg-type]


class TestProbes:
    """While no run ends readably, a worker starts one item at a time, and stops after three."""

    @pytest.mark.parametrize("good", [0, 4])
    async def test_a_server_that_changes_its_shapes_costs_little(
        self,
        sim: Simulator,
        batch_of: Callable[..., Batch],
        odd: set[str],
        caplog: pytest.LogCaptureFixture,
        good: int,
    ) -> None:
        """What was in flight and three more. What has started has an outcome, or is followed."""
        odd.update(f"{number}" for number in range(good, 30))
        await batch_of().add(requests(range(30)))
        for attempt in range(2):
            before = len(sim.runs)
            with pytest.raises(InvalidResponse, match="Answer"):
                await batch_of(max_in_flight=5).work()
            readable = good if attempt == 0 else 0
            assert 3 < len(sim.runs) - before <= readable + 5 + 3

        assert "starting no more runs, because nobody can read how the last 3" in caplog.text
        status = await batch_of().status()
        assert (status.succeeded, status.failed) == (good, len(sim.runs) - good)
        odd.clear()
        assert await batch_of().recheck() == status.failed
        assert (await batch_of().work()).succeeded == 30
        assert most_starts(sim) == 1

    async def test_items_that_wait_for_their_turn_to_send_do_not_start_either(
        self, sim: Simulator, batch_of: Callable[..., Batch], odd: set[str]
    ) -> None:
        """They are in progress for the queue, but nobody has paid for them yet."""
        odd.update(f"{number}" for number in range(80))
        sim.inject(Fault.delay(0.4, times=None), path="/run")
        await batch_of().add(requests(range(80)))
        with pytest.raises(InvalidResponse):
            await batch_of(max_in_flight=80).work()
        assert len(sim.runs) < 80

    @pytest.mark.parametrize("names", ["258", "012456"])
    async def test_odd_runs_among_others_do_not_stop_the_work(
        self, sim: Simulator, batch_of: Callable[..., Batch], odd: set[str], names: str
    ) -> None:
        """Even if there is only one item at a time, and some follow each other."""
        odd.update(names)
        batch = batch_of(max_in_flight=1)
        for number in range(10):
            await batch.add(requests([number]))
        status = await batch.work()
        assert (status.succeeded, status.failed) == (10 - len(names), len(names))
        assert most_starts(sim) == 1

    async def test_a_probe_that_ends_readably_lets_all_others_start(
        self, sim: Simulator, batch_of: Callable[..., Batch], odd: set[str]
    ) -> None:
        """They need not wait for each other any more."""
        odd.add("0")
        batch = batch_of(max_in_flight=3)
        await batch.add([*requests([0]), *requests([1])])
        assert (await batch.work()).failed == 1
        await batch.add(requests(range(2, 5), "held"))
        working = asyncio.create_task(batch.work())
        for run in [await run_of(sim, f"{number}") for number in range(2, 5)]:
            sim.finish(run, "Answer")
        assert (await working).succeeded == 4


class TestAgain:
    """`retry`, which never pays for a run that may still bring an output, unless with `again`."""

    async def test_a_run_that_is_followed_again_never_leads_to_another_one(
        self, sim: Simulator, batch_of: Callable[..., Batch], odd: set[str]
    ) -> None:
        """Even if it turns out to have failed, and the batch has attempts left."""
        odd.add("bad")
        batch = batch_of(attempts=3)
        await batch.add(requests(["bad"]))
        assert (await batch.work()).failed == 1
        odd.clear()
        assert await batch.retry(failed=True) == 1
        assert (await batch.work()).failed == 1
        assert (await outcomes(batch))["bad"].error.type == "ExecutionFailed"
        assert len(sim.runs) == 1
        assert await batch.retry(failed=True) == 1  # now its run is known to have failed
        await batch.work()
        assert len(sim.runs) == 3

    async def test_again_starts_a_second_run_deliberately(
        self, sim: Simulator, batch_of: Callable[..., Batch], odd: set[str]
    ) -> None:
        """Of the given items alone, whatever has become of the first one."""
        odd.add("odd")
        batch = batch_of()
        await batch.add(requests(["odd", "good", "other"]))
        await batch.work()
        odd.clear()
        assert await batch.retry(keys=["odd", "good"], again=True) == 2
        status = await batch.status()
        assert (status.succeeded, status.failed, status.waiting) == (1, 0, 2)
        assert (await batch.work()).succeeded == 3
        assert Counter(run.inputs["n"] for run in sim.runs) == Counter(odd=2, good=2, other=1)

    @pytest.mark.parametrize("arguments", [{}, {"keys": ["a"], "failed": True}])
    async def test_again_needs_keys_alone(self, batch: Batch, arguments: Any) -> None:
        """Whoever pays twice says for what."""
        with pytest.raises(ValueError, match="again"):
            await batch.retry(again=True, **arguments)

    async def test_an_item_that_has_not_finished_does_not_start_again(
        self, sim: Simulator, batch: Batch
    ) -> None:
        """Its run may be the one that is wanted."""
        await batch.add(requests("a", "held"))
        working = asyncio.create_task(batch.work())
        run = await run_of(sim, "a")
        assert await batch.retry(keys=["a"], again=True) == 0
        sim.finish(run, "Answer")
        assert (await working).succeeded == 1
