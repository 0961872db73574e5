"""Items whose runs complete without an output are started again, up to the batch's `attempts`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from promptlayer_exec import ConfigurationError, StartRequest
from promptlayer_exec._database.database import Database
from promptlayer_exec.dbos import Batch, BatchStatus, StoredOutcome
from promptlayer_exec.dbos import _requeue as requeue
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

End = Callable[[str, int | None, str], None]


@pytest.fixture
def flaky(sim: Simulator) -> Counter[str]:
    """Return how many runs of the workflow `flaky` fail, by their input `n`; then they succeed."""
    failing = Counter[str]()

    def scenario(inputs: Any) -> Scenario:
        failing[inputs["n"]] -= 1
        status = "FAILED" if failing[inputs["n"]] >= 0 else "SUCCESS"
        return Scenario([SimNode("Answer", inputs["n"], status=status, is_output_node=True)])

    sim.add_workflow("flaky", scenario)
    return failing


def request(key: str) -> StartRequest:
    """Return an item of the workflow `flaky`."""
    return StartRequest("flaky", {"n": key}, key=key)


async def all_outcomes(batch: Batch) -> list[StoredOutcome]:
    """Return every outcome that was stored."""
    return [outcome async for outcome in batch.outcomes()]


def runs(sim: Simulator) -> Counter[str]:
    """Return how often each item was started."""
    return Counter(run.inputs["n"] for run in sim.runs)


async def test_a_run_without_an_output_is_started_again(
    sim: Simulator, batch_of: Callable[..., Batch], flaky: Counter[str]
) -> None:
    """Up to `attempts` runs; each item has one outcome, that of its last run."""
    flaky.update(a=2, b=5)
    batch = batch_of(attempts=3)
    await batch.add(map(request, "abc"))
    assert await batch.work() == BatchStatus(0, 0, 2, 1, 0, 3)
    assert runs(sim) == Counter(a=3, b=3, c=1)
    outcomes = await all_outcomes(batch)
    assert sorted((o.key, o.kind) for o in outcomes) == [
        *(("a", "succeeded"), ("b", "failed"), ("c", "succeeded"))
    ]


async def test_without_attempts_a_run_is_paid_for_once(
    sim: Simulator, batch: Batch, flaky: Counter[str]
) -> None:
    """Each attempt costs money, so the default is one."""
    flaky.update(a=1)
    await batch.add([request("a")])
    assert (await batch.work()).failed == 1
    assert runs(sim) == Counter(a=1)


async def test_an_unknown_start_is_never_repeated(
    sim: Simulator, batch_of: Callable[..., Batch], flaky: Counter[str]
) -> None:
    """And neither is one that the server refused: it would refuse it again."""
    batch = batch_of(attempts=5)
    await batch.add([request("a")])
    sim.inject(Fault.disconnect())
    assert (await batch.work()).unknown == 1
    await batch.add([StartRequest("none", {"n": "b"}, key="b")])
    assert (await batch.work()).failed == 1
    assert runs(sim) == Counter(a=1)


async def test_each_attempt_is_listed(
    sim: Simulator, batch_of: Callable[..., Batch], flaky: Counter[str]
) -> None:
    """With its run and its error; what was retried before the batch had `attempts`, too."""
    flaky.update(a=2)
    await batch_of().add([request("a")])
    await batch_of().work()
    assert await batch_of().retry(failed=True) == 1
    await batch_of(attempts=3).work()
    item = await batch_of().item("a")
    assert item is not None
    ids = [run.execution_id for run in sim.runs]
    assert [attempt.execution_id for attempt in item.attempts] == ids
    errors = [attempt.error.type if attempt.error else None for attempt in item.attempts]
    assert errors == ["ExecutionFailed", "ExecutionFailed", None]
    assert [attempt.number for attempt in item.attempts] == [1, 2, 3]
    assert all(attempt.finished for attempt in item.attempts)
    assert len(ids) == 3


async def test_a_recheck_starts_nothing(
    sim: Simulator, batch_of: Callable[..., Batch], flaky: Counter[str]
) -> None:
    """Even if the batch has attempts left by now: only `retry` pays for another run."""
    flaky.update(a=9)
    await batch_of().add([request("a")])
    await batch_of().work()
    assert await batch_of().recheck() == 1
    assert (await batch_of(attempts=3).work()).failed == 1
    assert runs(sim) == Counter(a=1)
    assert await batch_of().retry(failed=True) == 1
    assert (await batch_of().work()).failed == 1
    assert runs(sim) == Counter(a=3)


async def test_attempts_belong_to_the_batch(batch_of: Callable[..., Batch]) -> None:
    """A worker that names none takes those that are stored."""
    await batch_of(attempts=3).add([request("a")])
    assert (await batch_of().settings()).attempts == 3
    with pytest.raises(ConfigurationError, match="attempts"):
        batch_of(attempts=0)


def test_pauses_grow() -> None:
    """Up to five minutes."""
    pauses = requeue.RestartPauses()
    assert [pauses.after(runs) for runs in range(1, 6)] == [5.0, 20.0, 80.0, 300.0, 300.0]


async def test_only_the_items_that_are_named_are_retried(
    sim: Simulator, batch: Batch, flaky: Counter[str]
) -> None:
    """Those of other kinds, or that the batch does not have, are left alone."""
    flaky.update(a=1, b=1)
    await batch.add(map(request, "abc"))
    await batch.work()
    assert await batch.retry(failed=True, keys=["b", "c", "nobody's"]) == 1
    assert await batch.retry(failed=True, keys=[]) == 0
    assert await batch.retry(unknown=True, keys=iter("a")) == 0
    assert (await batch.work()).failed == 1
    assert runs(sim) == Counter(a=1, b=2, c=1)


async def test_only_what_has_been_unknown_for_long_is_retried(batch: Batch, end: End) -> None:
    """A callback may still come for the others."""
    await batch.add(map(request, "ab"))
    end("a", None, "StartUnknown")
    end("b", None, "BadRequest")
    assert await batch.retry(unknown=True, unknown_for=60.0) == 0
    assert await batch.retry(unknown=True, failed=True, unknown_for=60.0) == 1
    assert await batch.retry(unknown=True, unknown_for=0.0) == 1


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
async def test_moments_are_those_of_the_database(
    batch: Batch, flaky: Counter[str], monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """The clock of each machine may differ from it, and from that of other machines."""
    now = Database.now.fget
    monkeypatch.setattr(Database, "now", property(lambda database: now(database) + ahead))
    flaky.update(b=1)
    await batch.add(map(request, "ab"))
    await batch.work()
    moments = [(await batch.settings()).created]
    for outcome in await all_outcomes(batch):
        moments += [outcome.started, outcome.finished]
    here = time.time()
    assert [moment.timestamp() - here for moment in moments] == [pytest.approx(ahead, abs=60.0)] * 5


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
async def test_how_long_an_item_has_been_unknown_is_measured_by_the_database(
    batch: Batch, end: End, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """This machine's clock has no part in it."""
    await batch.add([request("a")])
    end("a", None, "StartUnknown")
    now = Database.now.fget
    monkeypatch.setattr(Database, "now", property(lambda database: now(database) + ahead))
    assert await batch.retry(unknown=True, unknown_for=60.0) == (ahead > 0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"keys": "abc"}, TypeError), ({"keys": [1]}, TypeError), ({"unknown_for": -1}, ValueError)],
)
async def test_what_to_retry_is_checked(
    batch: Batch, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """Before the database is opened: a str would be taken for its characters."""
    with pytest.raises(error):
        await batch.retry(unknown=True, **arguments)
