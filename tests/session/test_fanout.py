"""The fan-out: one outcome for each item, whatever happens to the others."""

from __future__ import annotations

import asyncio
import itertools
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import attrs
import pytest

from promptlayer_exec import (
    Event,
    ExecutionFailed,
    ExecutionStarted,
    ExecutionTimeout,
    InvalidOutput,
    NotFound,
    Outcome,
    RequestRetried,
    Session,
    SessionClosed,
    StartRequest,
    StartUnknown,
    Unauthorized,
    WatchEnded,
)
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.starts import SQLStartStore


@attrs.frozen
class Report:
    """The output of the workflow."""

    n: int


def workflow(inputs: Any) -> Scenario:
    """Return a run's scenario: it fails for an odd `n`, and does not end for a negative `n`."""
    n = inputs.get("n", 0)
    status = "FAILED" if n % 2 else "SUCCESS"
    duration = None if n < 0 else 0.0
    return Scenario([SimNode("Out", {"n": n}, duration, status=status, is_output_node=True)])


@pytest.fixture(autouse=True)
def _workflow(sim: Simulator) -> None:
    sim.add_workflow("w", workflow)


def run(n: int) -> StartRequest:
    """Return a request for one run."""
    return StartRequest("w", {"n": n}, key=f"item {n}")


def done(sim: Simulator, value: Any = "done") -> int:
    """Return the id of an execution that is complete."""
    return sim.add_execution(Scenario([SimNode("Out", value, is_output_node=True)]))


SUPERVISOR = ["promptlayer_exec.Session"]


async def test_collect_returns_every_outcome_in_the_order_of_the_items(
    sim: Simulator, session: Session
) -> None:
    """Ids, handles and start requests each get an outcome with all that is known of them."""
    first, second = done(sim, "first"), done(sim, {"n": 2})
    items = [first, session.execution(second), run(0), run(1), 424242]
    outcomes = await session.collect(items)
    assert [outcome.index for outcome in outcomes] == [0, 1, 2, 3, 4]
    assert [outcome.item for outcome in outcomes] == items
    assert [outcome.ok for outcome in outcomes] == [True, True, True, False, False]
    assert [outcome.output for outcome in outcomes] == ["first", {"n": 2}, {"n": 0}, None, None]
    assert [type(outcome.error) for outcome in outcomes[3:]] == [ExecutionFailed, NotFound]
    assert [outcome.execution.id for outcome in outcomes if outcome.execution] == [
        first,
        second,
        *(run.execution_id for run in sim.runs),
        424242,
    ]
    assert [outcome.snapshot is not None for outcome in outcomes] == [True] * 4 + [False]
    assert all(outcome.snapshot.complete for outcome in outcomes[:4] if outcome.snapshot)
    with pytest.raises(ExecutionFailed):
        outcomes[3].result()
    assert outcomes[0].result() == "first"


async def test_outcomes_come_as_they_are_completed(sim: Simulator, session: Session) -> None:
    """A slow item does not delay the others."""
    slow = sim.add_execution(Scenario([SimNode("Out", 1, None, is_output_node=True)]))
    order = []
    async with aclosing(session.as_completed([slow, done(sim), done(sim)])) as outcomes:
        async for outcome in outcomes:
            order.append(outcome.index)
            if len(order) == 2:
                sim.finish(slow, "Out")
    assert order[-1] == 0


async def test_outputs_are_structured(sim: Simulator, session: Session) -> None:
    """A value of an invalid shape is the error of its item."""
    good, bad = await session.collect([run(2), done(sim, "no report")], into=Report)
    assert good.output == Report(2)
    assert type(bad.error) is InvalidOutput


async def test_items_may_come_asynchronously(sim: Simulator, session: Session) -> None:
    """They may come from a database cursor or a queue."""

    async def rows() -> AsyncIterator[StartRequest]:
        for n in range(0, 6, 2):
            await asyncio.sleep(0)
            yield run(n)

    outcomes = await session.collect(rows(), into=Report)
    assert [outcome.output for outcome in outcomes] == [Report(0), Report(2), Report(4)]


@pytest.mark.parametrize(
    ("item", "error"),
    [
        ("report", TypeError),
        (None, TypeError),
        (True, TypeError),
        (0, ValueError),
        (StartRequest(""), ValueError),
        (StartRequest("w", {"when": object}), TypeError),
        (StartRequest("w", label="a", version=1), ValueError),
    ],
    ids=repr,
)
async def test_an_unusable_item_is_an_outcome(
    sim: Simulator, session: Session, item: Any, error: type[Exception]
) -> None:
    """It does not affect the other items."""
    bad, good = await session.collect([item, done(sim)])
    assert type(bad.error) is error
    assert (bad.item, bad.execution, bad.snapshot) == (item, None, None)
    assert good.ok


async def test_a_handle_of_another_session_is_an_unusable_item(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """The other session may have another key; a pickled handle has no session and is accepted."""
    session, other = open_session(), open_session()
    foreign = other.execution(done(sim))
    bad, good = await session.collect([foreign, pickle.loads(pickle.dumps(foreign))])
    assert isinstance(bad.error, ValueError)
    assert "another session" in str(bad.error)
    assert good.execution == session.execution(foreign.id)
    assert good.ok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[({"items": it}, "items must be an iterable or async") for it in (5, None, run(1))],
        ({"into": 3}, "cannot structure into"),
        *[({"max_in_flight": it}, "an int of at least 1") for it in (1.5, True, None)],
        *[({"max_in_flight": it}, "must be between 1 and") for it in (0, -1)],
        ({"timeout": "5"}, "timeout must be a number of seconds"),
        ({"timeout": -1}, "timeout must not be negative"),
    ],
    ids=str,
)
async def test_unusable_arguments_are_refused_at_the_call(
    session: Session, arguments: dict[str, Any], message: str
) -> None:
    """Not as every outcome. They are arguments of a call, and no settings."""
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        session.as_completed(**{"items": [1], **arguments})
    assert caught.type in (TypeError, ValueError)
    assert (caught.type is ValueError) == ("must not be" in message or "between" in message)


async def test_items_are_taken_lazily(sim: Simulator, session: Session) -> None:
    """No more items are taken than there are slots, counting outcomes not yet consumed."""
    taken = 0
    greatest = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for _ in range(30):
            taken += 1
            yield done(sim)

    yielded = 0
    async with aclosing(session.as_completed(items(), max_in_flight=3)) as outcomes:
        async for _ in outcomes:
            greatest = max(greatest, taken - yielded)
            yielded += 1
            for _ in range(20):
                await asyncio.sleep(0)
    assert yielded == 30
    assert 1 < greatest <= 4


async def test_each_item_has_its_own_timeout_from_the_moment_it_has_a_slot(
    sim: Simulator, session: Session
) -> None:
    """Waiting for a slot does not count; the start counts."""
    held = [run(-2) for _ in range(2)]
    outcomes = await session.collect([*held, run(0)], max_in_flight=1, timeout=0.4)
    assert [type(outcome.error) for outcome in outcomes[:2]] == [ExecutionTimeout] * 2
    assert [outcome.error.timeout for outcome in outcomes[:2]] == [0.4] * 2  # type: ignore[union-attr]
    assert all(outcome.snapshot is not None for outcome in outcomes[:2])
    assert outcomes[2].ok


async def test_a_lost_start_is_that_item_s_error(sim: Simulator, session: Session) -> None:
    """The start is not repeated."""
    sim.inject(Fault.disconnect())
    outcomes = await session.collect([run(0), run(2), run(4)], max_in_flight=1)
    assert [type(outcome.error) for outcome in outcomes] == [StartUnknown, type(None), type(None)]
    assert len(sim.runs) == 3


async def test_a_401_ends_the_fan_out_and_abandons_the_rest(
    sim: Simulator, session: Session, held: int, our_tasks: Callable[[], list[str]]
) -> None:
    """No later item can succeed: items in flight get it as their outcome, then it is raised."""
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in [held, held, done(sim), 424242, *[held] * 100]:
            taken += 1
            yield item

    outcomes: list[Outcome[int, Any]] = []

    async def consume() -> None:
        async with aclosing(session.as_completed(items(), max_in_flight=3)) as completed:
            async for outcome in completed:
                if outcome.ok:
                    sim.inject(Fault.status(401, execution_id=424242))
                outcomes.append(outcome)

    with pytest.raises(Unauthorized) as caught:
        await consume()
    assert caught.value.execution_id == 424242
    assert outcomes[0].index == 2
    assert len(outcomes) == taken <= 6
    refused = outcomes[1:]
    assert {type(outcome.error) for outcome in refused} == {Unauthorized}
    for outcome in refused:
        assert outcome.execution is not None
        assert outcome.error.execution_id == outcome.execution.id  # type: ignore[union-attr]
    watched = [outcome for outcome in refused if outcome.item == held]
    assert all(o.snapshot is o.error.last_snapshot is not None for o in watched[:2])  # type: ignore[union-attr]
    assert our_tasks() == SUPERVISOR


async def test_a_401_says_of_a_start_on_the_wire_that_it_may_have_started(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """That no run was started is true only of the item that was refused."""
    sim.inject(Fault.delay(0.1))

    async def items() -> AsyncIterator[StartRequest]:
        yield run(1)
        await sim.wait_for_requests(1)
        sim.inject(Fault.status(401))
        yield run(2)

    outcomes: dict[int, Any] = {}

    async def consume() -> None:
        async for outcome in session.as_completed(items()):
            outcomes[outcome.index] = outcome

    with pytest.raises(Unauthorized, match="no run of workflow"):
        await consume()
    await session.aclose()
    assert str(outcomes[0].error).startswith(
        "this item was cancelled, because another item failed (if its start request was already"
    )
    assert "execution 1001 of workflow" in caplog.text


async def test_closing_the_session_ends_the_fan_out(
    sim: Simulator, session: Session, held: int, our_tasks: Callable[[], list[str]]
) -> None:
    """Items in flight get `SessionClosed` as their outcome, then it is raised."""
    outcomes: list[Outcome[Any, Any]] = []

    async def consume() -> None:
        async with aclosing(session.as_completed([held, held, run(-2)])) as completed:
            async for outcome in completed:
                outcomes.append(outcome)  # noqa: PERF401 - an error would lose them all

    consuming = asyncio.create_task(consume())
    await sim.wait_for_requests(4)
    await session.aclose()
    with pytest.raises(SessionClosed):
        await consuming
    assert sorted(outcome.index for outcome in outcomes) == [0, 1, 2]
    assert {type(outcome.error) for outcome in outcomes} == {SessionClosed}
    assert our_tasks() == []


async def test_a_closed_session_refuses_a_fan_out(session: Session) -> None:
    """It raises `SessionClosed` and takes no item."""
    items = iter([1, 2])
    await session.aclose()
    with pytest.raises(SessionClosed):
        await session.collect(items)
    assert next(items) == 1


@pytest.mark.parametrize("kind", ["iterable", "async iterable"])
async def test_an_error_of_the_items_waits_for_the_items_in_flight(
    sim: Simulator, session: Session, held: int, kind: str
) -> None:
    """The outcomes of items in flight are yielded first, then the error is raised unchanged."""

    def items() -> Iterator[int]:
        yield held
        yield done(sim)
        raise LookupError("the cursor was closed")

    async def async_items() -> AsyncIterator[int]:
        for item in items():
            yield item

    outcomes: list[Outcome[int, Any]] = []

    async def consume() -> None:
        supply = items() if kind == "iterable" else async_items()
        async with aclosing(session.as_completed(supply)) as completed:
            async for outcome in completed:
                outcomes.append(outcome)
                if outcome.index == 1:
                    sim.finish(held, "Answer")

    with pytest.raises(LookupError, match="the cursor was closed"):
        await consume()
    assert [outcome.index for outcome in outcomes] == [1, 0]
    assert all(outcome.ok for outcome in outcomes)


@pytest.mark.parametrize("ending", ["stopping early", "a 401", "closing", "a cancelled consumer"])
@pytest.mark.parametrize("waits", ["for the next item", "for a slot"])
async def test_an_async_generator_is_closed_and_may_clean_up(
    sim: Simulator, session: Session, held: int, ending: str, waits: str
) -> None:
    """Its `finally` may await any number of times."""
    seen = []

    async def items() -> AsyncIterator[int]:
        try:
            yield done(sim)
            yield held
            while waits == "for a slot":
                yield held
            await asyncio.Event().wait()
        finally:
            seen.append("closing")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            seen.append("closed")

    async def consume() -> None:
        async with aclosing(session.as_completed(items(), max_in_flight=2)) as completed:
            async for _ in completed:
                if ending == "stopping early":
                    await sim.wait_for_requests(3)
                    break
                if ending == "a 401":
                    sim.inject(Fault.status(401, execution_id=held))

    consuming = asyncio.create_task(consume())
    await sim.wait_for_requests(3)
    if ending == "closing":
        await session.aclose()
    elif ending == "a cancelled consumer":
        consuming.cancel()
    await asyncio.wait([consuming])
    assert seen == ["closing", "closed"]
    expected = {"a 401": Unauthorized, "closing": SessionClosed}.get(ending, type(None))
    if not consuming.cancelled():
        assert type(consuming.exception()) is expected


async def test_stopping_early_leaves_no_task(
    sim: Simulator, session: Session, held: int, our_tasks: Callable[[], list[str]]
) -> None:
    """No watch remains, and no start that was not sent."""
    async with aclosing(session.as_completed([done(sim), held, held + 0, run(-2)])) as outcomes:
        async for outcome in outcomes:
            assert outcome.index == 0
            break
    assert our_tasks() == SUPERVISOR
    count = sim.request_count
    for _ in range(20):
        await asyncio.sleep(0)
    assert sim.request_count <= count + 1


async def test_stopping_early_cancels_the_starts_that_wait(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """Nothing was started, and nothing more is sent."""
    sim.inject(Fault.status(429, times=None, retry_after=60))
    completed = session.as_completed(run(n) for n in range(0, 40, 2))
    first = asyncio.create_task(anext(completed))
    await recorder.next(RequestRetried)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await completed.aclose()
    assert sim.runs == []
    assert recorder.of(ExecutionStarted) == []


async def test_stopping_early_reports_the_starts_on_the_wire(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """Their answers are read to the end."""
    completed = session.as_completed([done(sim), run(-2), run(-4)])
    sim.inject(Fault.delay(0.0))
    sim.inject(Fault.delay(0.1, times=2))
    async with aclosing(completed):
        async for _ in completed:
            await sim.wait_for_requests(3)
            break
    await session.aclose()
    abandoned = {e.execution_id for e in recorder.of(ExecutionStarted) if e.abandoned}
    assert abandoned == {run.execution_id for run in sim.runs}
    assert len(abandoned) == 2


async def test_lost_starts_whose_outcomes_nobody_gets_are_logged(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """Their runs may have started, and be billed."""
    sim.inject(Fault.disconnect(times=3))
    all_unknown = asyncio.Event()

    async def items() -> AsyncIterator[StartRequest]:
        for n in (0, 2, 4):
            yield run(n)
        all_unknown.set()
        await asyncio.Event().wait()

    collecting = asyncio.create_task(session.collect(items(), max_in_flight=1))
    await all_unknown.wait()
    collecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await collecting
    (message,) = caplog.messages
    assert message.startswith(
        "3 runs may have started, because the response was lost: key 'item 0', key 'item 2', key"
        " 'item 4'. Look in PromptLayer"
    )


@pytest.mark.parametrize("interruption", ["a cancellation", "an exception"])
async def test_an_interrupted_fan_out_logs_its_runs_in_one_line(
    sim: Simulator,
    open_session: Callable[..., Session],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    interruption: str,
) -> None:
    """How many they are, the call that finds them by key, and the ids of those without one."""
    are_started, is_answered = asyncio.Event(), asyncio.Event()
    started: list[int | None] = []

    def observe(event: Event) -> None:
        if isinstance(event, ExecutionStarted):
            started.append(event.execution_id)
            if len(started) == 20:
                are_started.set()

    async def answer_one_late(_: Any, answer: Any) -> Any:
        response = answer()
        if sim.runs[-1].inputs["n"] == -100:
            await is_answered.wait()
        return response

    sim.inject(Fault(answer_one_late, times=None), path="/run")
    session = open_session(
        starts=SQLStartStore(f"sqlite:///{tmp_path / 'starts'}"), observers=[observe]
    )
    requests = [run(n) for n in range(-100, -62, 2)]
    without_key = [StartRequest("w", {"n": -2}), StartRequest("w", {"n": -4})]

    async def consume() -> None:
        async with aclosing(session.as_completed([done(sim), *requests, *without_key])) as outcomes:
            async for _ in outcomes:
                await are_started.wait()
                if interruption == "an exception":
                    raise LookupError

    consuming = asyncio.create_task(consume())
    await are_started.wait()
    await sim.wait_for_requests(22)
    if interruption == "a cancellation":
        consuming.cancel()
    await asyncio.wait([consuming])
    assert caplog.messages == []
    is_answered.set()
    await session.aclose()
    ids = [str(run.execution_id) for run in sim.runs if run.inputs["n"] > -10]
    (message,) = caplog.messages
    assert message.startswith(
        "21 runs started, but nobody received their outcomes. session.find(key) picks up 19 of them"
        " by their keys, session.execution(id) the others by their ids: "
    )
    assert message.rpartition(": ")[2].split(", ") == ids
    assert len(ids) == 2


@pytest.mark.parametrize("has_store", [True, False])
async def test_an_interrupted_collect_logs_all_runs_in_one_line(
    sim: Simulator,
    open_session: Callable[..., Session],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    has_store: bool,
) -> None:
    """Those in progress, and those whose outcomes it held."""
    store = SQLStartStore(f"sqlite:///{tmp_path / 'starts'}") if has_store else None
    session = open_session(starts=store)

    async def items() -> AsyncIterator[StartRequest]:
        yield run(0)
        yield run(2)
        yield run(-2)

    collecting = asyncio.create_task(session.collect(items(), max_in_flight=1))
    await sim.wait_for_requests(5)
    collecting.cancel()
    await asyncio.wait([collecting])
    await session.aclose()
    keys = "'item 0', 'item 2', 'item -2'"
    way_back = f"session.find(key) picks up each by its key: {keys}"
    if not has_store:
        way_back = "session.execution(id) picks up each by its id: 1001 (key 'item 0'), 1002"
        way_back += " (key 'item 2'), 1003 (key 'item -2')"
    assert caplog.messages == [
        f"3 runs started, but nobody received their outcomes. {way_back}",
    ]


async def test_a_cancellation_after_any_number_of_steps_leaves_no_task(
    sim: Simulator, open_session: Callable[..., Session], our_tasks: Callable[[], list[str]]
) -> None:
    """Every run that was started is reported."""
    reported: set[int | None] = set()

    def observe(event: Any) -> None:
        if isinstance(event, ExecutionStarted):
            reported.add(event.execution_id)

    session = open_session(observers=[observe])
    await session.get_results(done(sim))
    for steps in itertools.count():
        collecting = asyncio.create_task(session.collect([run(0), done(sim), "bad"]))
        for _ in range(steps):
            await asyncio.sleep(0)
        was_done = collecting.done()
        collecting.cancel()
        await asyncio.wait([collecting])
        assert was_done or collecting.cancelled()
        if was_done:
            break
    assert steps > 10
    await session.aclose()
    assert our_tasks() == []
    assert reported == {run.execution_id for run in sim.runs}


@pytest.mark.parametrize("how", ["cancelled", "collect and 401"])
async def test_no_id_of_a_started_run_is_lost_when_its_fan_out_ends(
    sim: Simulator, session: Session, recorder: Any, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """The log has the id of each run whose outcome nobody gets, because the run was paid for."""
    sim.add_workflow("slow", Scenario([SimNode("A", duration=None, is_output_node=True)]))
    requests: list[Any] = [StartRequest("slow") for _ in range(3)]

    async def use() -> None:
        async with aclosing(session.as_completed(requests)) as outcomes:
            async for _ in outcomes:
                pass

    if how == "collect and 401":
        task = asyncio.create_task(session.collect([*requests, 787]))
    else:
        task = asyncio.create_task(use())
    while len(recorder.of(ExecutionStarted)) < 3:
        await recorder.next(ExecutionStarted)
    if how == "collect and 401":
        sim.inject(Fault.status(401, times=100))
        with pytest.raises(Unauthorized):
            await task
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await session.aclose()
    (message,) = caplog.messages
    assert message.endswith("by its id: 1001, 1002, 1003")


async def test_no_id_of_a_completed_run_is_lost_when_its_outcome_is_not_taken(
    sim: Simulator, session: Session, recorder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever stops at the first outcome finds the others in the log."""
    async with aclosing(session.as_completed([run(n) for n in (0, 2, 4)])) as outcomes:
        first = await anext(outcomes)
        while len(recorder.of(WatchEnded)) < 3:
            await recorder.next(WatchEnded)
        await asyncio.sleep(0)
    assert first.execution is not None
    (message,) = caplog.messages
    for id_ in {it.execution_id for it in sim.runs} - {first.execution.id}:
        assert f"{id_} (key " in message
