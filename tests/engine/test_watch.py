"""The watch: one poller, many followers, over a real socket."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import anyio
import pytest

from promptlayer_exec import (
    ExecutionTimeout,
    Forbidden,
    NodeStatus,
    NodeTimes,
    NotFound,
    Polled,
    PollPolicy,
    RetryPolicy,
    Session,
    SessionClosed,
    Snapshot,
    WatchEnded,
    WatchStarted,
)
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

SUPERVISOR = "promptlayer_exec.Session"


async def failure(
    session: Session, execution_id: int, sim: Simulator, fault: Fault, timeout: float | None = None
) -> Exception:
    """Follow an execution, inject a fault after its first snapshot, and return the error."""
    try:
        async with aclosing(session.execution(execution_id).stream(timeout=timeout)) as snapshots:
            async for snapshot in snapshots:
                if snapshot.poll == 1:
                    sim.inject(fault)
    except Exception as error:  # noqa: BLE001 - it is what the test is about
        return error
    raise AssertionError("the watch did not fail")


async def one_step() -> None:
    """Let the event loop run one step."""
    await asyncio.sleep(0)


async def test_stream_yields_a_snapshot_on_every_poll(
    sim: Simulator, session: Session, held: int
) -> None:
    """A prompt consumer gets the snapshot of each poll; the stream ends after the complete one."""
    polls = []
    async with aclosing(session.execution(held).stream()) as snapshots:
        async for snapshot in snapshots:
            polls.append((snapshot.poll, snapshot.complete))
            if snapshot.poll == 3:
                sim.finish(held, "Answer")
    assert polls == [(1, False), (2, False), (3, False), (4, True)]
    assert sim.request_count == 4


async def test_what_is_seen_first_goes_before_repeated_polls(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """Beside watches that use up the rate, single reads, first polls and starts hardly wait."""
    done = Scenario([SimNode("Answer", "done", is_output_node=True)])
    sim.add_workflow("report", done)
    session = open_session(rate=100.0, poll=PollPolicy.fixed(0.05), max_connections=20)
    held = Scenario([SimNode("Answer", "42", None, is_output_node=True)])
    ids = [sim.add_execution(held) for _ in range(100)]
    streams = [
        asyncio.create_task(anext(session.execution(execution_id).stream())) for execution_id in ids
    ]
    waits = [asyncio.create_task(session.execution(execution_id).wait()) for execution_id in ids]
    await asyncio.gather(*streams)

    async def requests_until(work: Awaitable[Any]) -> int:
        before = sim.request_count
        await work
        return sim.request_count - before

    assert await requests_until(session.execution(ids[0]).snapshot()) < 15
    assert await requests_until(session.get_results(ids[0])) < 15
    assert await requests_until(session.start("report")) < 15
    assert await requests_until(session.execution(sim.add_execution(done)).wait()) < 15
    for waiting in waits:
        waiting.cancel()
    await asyncio.wait(waits)


async def test_snapshots_have_the_time_when_each_node_was_first_seen(
    sim: Simulator, session: Session, held: int
) -> None:
    """`times` has when a node was first seen running and final, in seconds of the watch."""
    seen = []
    async with aclosing(session.execution(held).stream()) as snapshots:
        async for snapshot in snapshots:
            seen.append(snapshot)
            if snapshot.poll == 2:
                sim.finish(held, "Answer")
    first, last = seen[0], seen[-1]
    assert first.times["Plan"].running is None
    assert first.times["Plan"].final == first.elapsed
    assert last.times["Plan"] == first.times["Plan"]
    assert last.times["Answer"].running == first.elapsed
    assert last.times["Answer"].final == last.elapsed
    assert 0 < first.elapsed < last.elapsed


async def test_a_slow_follower_skips_to_the_latest_and_delays_nobody(
    sim: Simulator, session: Session, held: int
) -> None:
    """While one consumer is busy, the other gets every poll; the busy one then gets the latest."""
    execution = session.execution(held)
    async with aclosing(execution.stream()) as slow, aclosing(execution.stream()) as fast:
        first = await anext(slow)
        polls = [(await anext(fast)).poll for _ in range(6)]
        assert polls == [1, 2, 3, 4, 5, 6]
        latest = await anext(slow)
        assert (first.poll, latest.poll) == (1, 6)


async def test_a_late_follower_first_gets_the_latest_snapshot(
    sim: Simulator, session: Session, held: int
) -> None:
    """It sends no request of its own, and shares the poller's count."""
    execution = session.execution(held)
    async with aclosing(execution.stream()) as early, aclosing(execution.stream()) as late:
        await anext(early)
        second = await anext(early)
        assert await anext(late) is second
        assert (await anext(late)).poll == 3
    assert sim.request_count == 3


async def test_all_followers_share_one_poller(
    sim: Simulator, session: Session, held: int, recorder: Any
) -> None:
    """Forty streams, finished-node iterators and waits send as many requests as one."""
    execution = session.execution(held)

    async def stream() -> Snapshot:
        async with aclosing(execution.stream()) as snapshots:
            return [snapshot async for snapshot in snapshots][-1]

    async def finished() -> list[str]:
        async with aclosing(session.execution(held).finished_nodes()) as nodes:
            return [node.name async for node in nodes]

    async with asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(stream()) for _ in range(10)]
        finishes = [tasks.create_task(finished()) for _ in range(10)]
        waits = [tasks.create_task(session.execution(held).wait()) for _ in range(20)]
        await sim.wait_for_requests(3)
        sim.finish(held, "Answer")
    (started,) = recorder.of(WatchStarted)
    (ended,) = recorder.of(WatchEnded)
    assert started.execution_id == ended.execution_id == held
    assert ended.polls == sim.request_count
    assert ended.succeeded is True
    assert ended.error is None
    assert {id(task.result()) for task in (*streams, *waits)} == {id(waits[0].result())}
    assert [task.result() for task in finishes] == [["Plan", "Answer"]] * 10


async def test_events_of_a_watch_name_the_workflow_if_the_session_started_the_run(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """Whichever handle follows it, also after the session was reopened; else it is None."""
    sim.add_workflow("report", Scenario([SimNode("Answer", status="FAILED")]))
    execution = await session.start("report")
    await session.execution(execution.id).wait()
    await session.aclose()
    other = sim.add_execution(Scenario([SimNode("Answer")]))
    async with session:
        await session.execution(execution.id).wait()
        await session.execution(other).wait()
    assert [
        (event.execution_id, event.workflow, event.base_url) for event in recorder.of(WatchStarted)
    ] == [
        (execution.id, "report", sim.base_url),
        (execution.id, "report", sim.base_url),
        (other, None, sim.base_url),
    ]
    assert [(event.workflow, event.succeeded) for event in recorder.of(WatchEnded)] == [
        ("report", False),
        ("report", False),
        (None, True),
    ]


async def by_exhaustion(sim: Simulator, held: int, snapshots: AsyncGenerator[Any, None]) -> None:
    """Read on to the end."""
    sim.finish(held, "Answer")
    async for _ in snapshots:
        pass


async def by_aclose(sim: Simulator, held: int, snapshots: AsyncGenerator[Any, None]) -> None:
    """Close the generator."""
    await snapshots.aclose()


async def by_cancellation(sim: Simulator, held: int, snapshots: AsyncGenerator[Any, None]) -> None:
    """Cancel the task that waits for the next snapshot."""
    reader = asyncio.ensure_future(anext(snapshots))
    await one_step()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


async def by_an_error_of_the_consumer(
    sim: Simulator, held: int, snapshots: AsyncGenerator[Any, None]
) -> None:
    """Throw an error into the generator."""
    with pytest.raises(ZeroDivisionError):
        await snapshots.athrow(ZeroDivisionError())


@pytest.mark.parametrize(
    "stop", [by_exhaustion, by_aclose, by_cancellation, by_an_error_of_the_consumer]
)
@pytest.mark.parametrize("kind", ["stream", "finished_nodes"])
async def test_the_poller_ends_one_step_after_the_last_follower(
    sim: Simulator, session: Session, held: int, *, stop: Any, kind: str, our_tasks: Any
) -> None:
    """However the last follower stops, no poller remains and no further request is sent."""
    snapshots = getattr(session.execution(held), kind)()
    await anext(snapshots)
    assert our_tasks() == [SUPERVISOR, f"promptlayer_exec.Watch {held}"]
    await stop(sim, held, snapshots)
    await one_step()
    assert our_tasks() == [SUPERVISOR]


async def test_the_poller_ends_one_step_after_a_timeout(
    session: Session, held: int, our_tasks: Any
) -> None:
    """The poller stops when the deadline of its last follower passes."""
    with pytest.raises(ExecutionTimeout):
        await session.execution(held).wait(timeout=0.02)
    await one_step()
    assert our_tasks() == [SUPERVISOR]


async def test_the_poller_ends_when_an_abandoned_generator_is_finalised(
    session: Session, held: int, our_tasks: Any
) -> None:
    """After a bare `break`, the poller stops when Python finalises the generator."""
    snapshots = session.execution(held).stream()
    async for _ in snapshots:
        break
    del snapshots
    gc.collect()
    await one_step()  # the loop schedules aclose
    await one_step()  # aclose runs
    await one_step()
    assert our_tasks() == [SUPERVISOR]


async def test_the_poller_stops_during_a_request(
    sim: Simulator, session: Session, held: int, our_tasks: Any
) -> None:
    """A request without an answer is dropped as soon as its last follower stops."""
    sim.inject(Fault.stall())
    waiting = asyncio.ensure_future(session.execution(held).wait())
    await sim.wait_for_requests(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await one_step()
    assert our_tasks() == [SUPERVISOR]


async def test_one_follower_that_stops_does_not_disturb_the_others(
    sim: Simulator, session: Session, held: int
) -> None:
    """The poller goes on for the others after a cancelled wait and a closed stream."""
    execution = session.execution(held)
    stopping = asyncio.ensure_future(execution.wait())
    staying = asyncio.ensure_future(execution.wait())
    async with aclosing(execution.stream()) as snapshots:
        await anext(snapshots)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    sim.finish(held, "Answer")
    assert (await staying).complete


async def test_a_new_follower_in_the_step_in_which_the_last_one_stops_gets_a_new_poller(
    sim: Simulator, session: Session, held: int
) -> None:
    """It does not join the poller that stops, so its count starts again."""
    execution = session.execution(held)
    old = execution.stream()
    await anext(old)
    await anext(old)
    await old.aclose()
    async with aclosing(execution.stream()) as new:
        assert (await anext(new)).poll == 1


async def test_finished_nodes_yields_each_node_once(sim: Simulator, session: Session) -> None:
    """Each node is yielded once, in the order in which the nodes become final."""
    held = sim.add_execution(Scenario([SimNode("A", 1, None), SimNode("B", 2, None)]))
    names = []
    async with aclosing(session.execution(held).finished_nodes()) as nodes:
        sim.finish(held, "B")
        async for node in nodes:
            names.append((node.name, node.status))
            if node.name == "B":
                sim.finish(held, "A", status="FAILED")
    assert names == [("B", NodeStatus.SUCCESS), ("A", NodeStatus.FAILED)]


async def test_finished_nodes_yields_the_rest_at_completion(
    sim: Simulator, session: Session
) -> None:
    """A node that is not final in a complete execution is yielded, too."""
    body = b'{"A":{"status":"SUCCESS"},"B":{"status":"RUNNING"},"C":{"status":"PAUSED"}}'
    sim.inject(Fault.status(200, body=body, times=3))
    async with aclosing(session.execution(1).finished_nodes()) as nodes:
        assert [node.name async for node in nodes] == ["A", "B", "C"]


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes it 2,000 s later at once."""

    def jump() -> None:
        loop = asyncio.get_running_loop()
        now = loop.time
        monkeypatch.setattr(loop, "time", lambda: now() + 2000.0)

    return jump


async def test_finished_nodes_keeps_the_deadline_between_two_nodes_of_one_poll(
    sim: Simulator, session: Session, pass_time: Callable[[], None]
) -> None:
    """Once the deadline has passed, no more nodes of an incomplete snapshot are yielded."""
    two_done = sim.add_execution(
        Scenario([SimNode("A"), SimNode("B"), SimNode("C", duration=None, is_output_node=True)])
    )
    async with aclosing(session.execution(two_done).finished_nodes(timeout=1000.0)) as nodes:
        assert (await anext(nodes)).name == "A"
        pass_time()
        with pytest.raises(ExecutionTimeout) as caught:
            await anext(nodes)
    assert caught.value.last_snapshot is not None
    assert caught.value.last_snapshot.nodes["B"].final


async def test_a_202_with_only_final_nodes_is_polled_again(
    sim: Simulator, session: Session
) -> None:
    """The status code decides whether an execution is complete."""
    sim.inject(Fault.status(202, body=b'{"A":{"status":"SUCCESS"}}'))
    sim.inject(Fault.status(200, body=b'{"A":{"status":"SUCCESS"}}'))
    async with aclosing(session.execution(1).stream()) as snapshots:
        seen = [(snapshot.complete, snapshot.progress) async for snapshot in snapshots]
    assert seen == [(False, 1.0), (True, 1.0)]


EARLY = b'{"A":{"status":"RUNNING"},"B":{"status":"SUCCESS","is_output_node":false}}'


@pytest.mark.parametrize("early", [1, 2, 3])
async def test_a_200_that_contradicts_its_nodes_is_believed_the_third_time(
    sim: Simulator, session: Session, early: int
) -> None:
    """Until then, the execution counts as running, because the server may be too early."""
    sim.inject(Fault.status(200, body=EARLY, times=early))
    sim.inject(Fault.status(200, body=b'{"A":{"status":"SUCCESS"}}'))
    async with aclosing(session.execution(1).stream()) as snapshots:
        *running, last = [snapshot async for snapshot in snapshots]
    assert [snapshot.complete for snapshot in running] == [False] * min(early, 2)
    assert last.complete
    assert last.nodes["A"].succeeded is (early < 3)


async def test_only_poll_after_poll_makes_a_200_that_contradicts_its_nodes_credible(
    sim: Simulator, session: Session
) -> None:
    """A 202 between them shows that the execution still runs, however often it alternates."""
    for _ in range(4):
        sim.inject(Fault.status(200, body=EARLY))
        sim.inject(Fault.status(202, body=EARLY))
    sim.inject(Fault.status(200, body=b'{"A":{"status":"SUCCESS"}}'))
    snapshot = await session.execution(1).wait()
    assert (snapshot.poll, snapshot.nodes["A"].succeeded) == (9, True)


async def test_a_single_read_shows_a_200_that_contradicts_its_nodes(
    sim: Simulator, session: Session
) -> None:
    """The handle does not keep it: a wait asks again."""
    sim.inject(Fault.status(200, body=EARLY, times=2))
    sim.inject(Fault.status(200, body=b'{"A":{"status":"SUCCESS"}}'))
    assert (await session.get_results(1, return_all_outputs=True)).complete
    execution = session.execution(1)
    assert (await execution.snapshot()).complete
    assert (await execution.wait()).nodes["A"].succeeded


@pytest.mark.parametrize(
    "body",
    [
        b'{"A":{"status":"PAUSED"}}',
        b'{"A":{"status":"SUCCESS","is_output_node":true},"B":{"status":"RUNNING"}}',
        b"{}",
    ],
)
async def test_a_200_without_a_contradiction_is_believed_immediately(
    sim: Simulator, session: Session, body: bytes
) -> None:
    """An unknown status may be final, and a node may outlast the output."""
    sim.inject(Fault.status(200, body=body))
    snapshot = await session.execution(1).wait()
    assert (snapshot.complete, snapshot.poll) == (True, 1)


async def test_every_follower_gets_its_own_copy_of_the_error(
    sim: Simulator, session: Session, held: int
) -> None:
    """Each copy has the execution, the last snapshot and the cause."""
    execution = session.execution(held)

    followers = [asyncio.ensure_future(execution.wait()) for _ in range(3)]
    await sim.wait_for_requests(2)
    sim.inject(Fault.status(404))
    errors = await asyncio.gather(*followers, return_exceptions=True)
    assert len({id(error) for error in errors}) == 3
    for error in errors:
        assert isinstance(error, NotFound)
        assert error.execution_id == held
        assert error.last_snapshot is not None
        assert error.last_snapshot.nodes["Plan"].succeeded
        assert error.status == 404


async def test_a_watch_ends_when_the_outage_outlasts_the_policy(
    sim: Simulator, open_session: Callable[..., Session], held: int, recorder: Any
) -> None:
    """The last failure is raised with its attempts, the execution and the last snapshot."""
    session = open_session(retry=RetryPolicy(watch_outage=0.05, base=0.01))
    error: Any = await failure(session, held, sim, Fault.status(503, times=None))
    assert error.execution_id == held
    assert error.last_snapshot.poll == 1
    assert error.attempts == sim.request_count - 1 >= 2
    (ended,) = recorder.of(WatchEnded)
    assert ended.error.status == 503
    assert ended.succeeded is None


async def test_a_timeout_has_the_last_snapshot_and_the_last_failure(
    sim: Simulator, session: Session, held: int
) -> None:
    """If the server keeps failing, the error has the last snapshot, and the failure as cause."""
    error = await failure(session, held, sim, Fault.status(503, times=None), timeout=0.5)
    assert isinstance(error, ExecutionTimeout)
    assert error.timeout == 0.5
    assert error.execution_id == held
    assert error.last_snapshot is not None
    assert getattr(error.__cause__, "status", None) == 503
    assert "1 of 2 nodes done" in str(error)
    assert "503" in str(error)


async def test_a_timeout_names_no_failure_that_is_over(
    sim: Simulator, session: Session, held: int
) -> None:
    """After a good poll, it is not why the execution is still running."""
    sim.inject(Fault.status(503))
    with pytest.raises(ExecutionTimeout) as caught:
        await session.execution(held).wait(timeout=0.5)
    assert caught.value.__cause__ is None
    assert "503" not in str(caught.value)


async def test_a_timeout_names_an_unknown_status(sim: Simulator, session: Session) -> None:
    """More time may not help an execution that waits for a person, for example."""
    odd = SimNode("approve", status="AWAITING_APPROVAL")
    waiting = sim.add_execution(Scenario([SimNode("A"), odd, SimNode("B", duration=None)]))
    with pytest.raises(ExecutionTimeout, match="'approve' has the unknown status 'AWAITING_APPR"):
        await session.execution(waiting).wait(timeout=0.5)


async def test_a_timeout_before_any_answer_says_so(
    sim: Simulator, session: Session, held: int
) -> None:
    """If the server never answered, there is no snapshot to report."""
    sim.inject(Fault.stall())
    with pytest.raises(ExecutionTimeout, match="no response within") as caught:
        await session.execution(held).wait(timeout=0.05)
    assert caught.value.last_snapshot is None


@pytest.mark.parametrize("timeout", [True, "5", -1, float("nan"), -(10**400)])
@pytest.mark.parametrize("method", ["stream", "finished_nodes"])
def test_a_malformed_timeout_is_refused_at_the_call(method: str, timeout: Any) -> None:
    """The call raises, not the first `anext`."""
    execution = Session("key").execution(1)
    with pytest.raises((TypeError, ValueError), match="timeout"):
        getattr(execution, method)(timeout=timeout)


async def test_polled_events_measure_each_poll(
    sim: Simulator, session: Session, held: int, recorder: Any
) -> None:
    """Every good answer is reported with its snapshot, duration, lateness and size."""
    async with aclosing(session.execution(held).stream()) as snapshots:
        seen = [await anext(snapshots), await anext(snapshots)]
    events = recorder.of(Polled)[:2]
    assert [event.snapshot for event in events] == seen
    for event in events:
        assert event.execution_id == held
        assert 0 < event.duration < 10
        assert 0 <= event.lateness < 10
        assert event.body_bytes > 100


async def test_followers_of_a_closed_session_are_released(
    session: Session, held: int, recorder: Any
) -> None:
    """They get `SessionClosed` with the execution and the last snapshot."""
    waiting = asyncio.ensure_future(session.execution(held).wait())
    await recorder.next(Polled)
    await session.aclose()
    with pytest.raises(SessionClosed) as caught:
        await waiting
    assert caught.value.execution_id == held
    assert caught.value.last_snapshot is not None
    (ended,) = recorder.of(WatchEnded)
    assert isinstance(ended.error, SessionClosed)


@pytest.mark.parametrize("how", ["wait", "output"])
async def test_a_deadline_is_not_overshot(
    sim: Simulator, session: Session, held: int, how: str
) -> None:
    """A run that completes a fifth of a second after the deadline is too late."""
    asyncio.get_running_loop().call_later(0.3, sim.finish, held, "Answer")
    with pytest.raises(ExecutionTimeout):
        await getattr(session.execution(held), how)(timeout=0.1)


async def test_past_its_deadline_a_follower_gets_a_complete_snapshot(
    sim: Simulator, session: Session, held: int, pass_time: Callable[[], None]
) -> None:
    """A complete snapshot is delivered, however late the follower asks for it."""
    async with aclosing(session.execution(held).stream(timeout=1000.0)) as snapshots:
        await anext(snapshots)
        sim.finish(held, "Answer")
        complete = await session.execution(held).wait()
        pass_time()
        assert await anext(snapshots) is complete


async def test_past_its_deadline_a_follower_gets_nothing_else(
    session: Session, held: int, pass_time: Callable[[], None]
) -> None:
    """An incomplete snapshot that it has not seen is in the error, and is not yielded."""
    execution = session.execution(held)
    async with (
        aclosing(execution.stream(timeout=1000.0)) as slow,
        aclosing(execution.stream()) as fast,
    ):
        await anext(slow)
        await anext(fast)
        latest = await anext(fast)
        pass_time()
        with pytest.raises(ExecutionTimeout) as caught:
            await anext(slow)
    assert caught.value.last_snapshot is latest


async def test_past_its_deadline_a_follower_gets_the_timeout_before_an_error(
    sim: Simulator, session: Session, held: int, pass_time: Callable[[], None]
) -> None:
    """The poller's error is the cause of the timeout."""
    execution = session.execution(held)
    async with aclosing(execution.stream(timeout=1000.0)) as snapshots:
        await anext(snapshots)
        sim.inject(Fault.status(403))
        with pytest.raises(Forbidden):
            await execution.wait()
        pass_time()
        with pytest.raises(ExecutionTimeout) as caught:
            await anext(snapshots)
    assert isinstance(caught.value.__cause__, Forbidden)


async def test_a_wait_without_any_time_sends_nothing(
    sim: Simulator, session: Session, held: int, our_tasks: Any
) -> None:
    """Its poller ends before its first step."""
    with pytest.raises(ExecutionTimeout):
        await session.execution(held).wait(timeout=0)
    await one_step()
    assert our_tasks() == [SUPERVISOR]
    assert sim.request_count == 0


async def test_each_good_answer_resets_the_outage_limit(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """A watch survives any number of failures if the server answers in between."""
    session = open_session(retry=RetryPolicy(watch_outage=0.2, base=0.02))
    started = anyio.current_time()
    async with aclosing(session.execution(held).stream()) as snapshots:
        async for snapshot in snapshots:
            if snapshot.complete:
                break
            sim.inject(Fault.status(503))
            if anyio.current_time() - started > 0.25:
                sim.finish(held, "Answer")
    assert snapshot.complete


async def test_a_watch_that_ends_forgets_only_itself(
    sim: Simulator, session: Session, held: int, recorder: Any
) -> None:
    """The last follower of a failed watch does not remove the watch that replaced it."""
    execution = session.execution(held)
    old = execution.stream()
    await anext(old)
    sim.inject(Fault.status(403))
    with pytest.raises(Exception, match="403"):
        await execution.wait()
    async with aclosing(execution.stream()) as new:
        assert (await anext(new)).poll == 1
        await old.aclose()
        async with aclosing(execution.stream()) as third:
            await anext(third)
    assert len(recorder.of(WatchStarted)) == 2


async def test_an_error_of_the_users_limiter_is_copied_for_each_follower(
    open_session: Callable[..., Session], held: int
) -> None:
    """Each copy has a note that names the execution."""

    class Broken:
        async def acquire(self) -> None:
            raise ZeroDivisionError("limiter")

    execution = open_session(limiter=Broken()).execution(held)
    errors = await asyncio.gather(*(execution.wait() for _ in range(3)), return_exceptions=True)
    assert len({id(error) for error in errors}) == 3
    for error in errors:
        assert isinstance(error, ZeroDivisionError)
        assert error.__notes__ == [f"while watching execution {held}"]


async def test_retry_after_on_a_good_answer_postpones_the_next_poll(
    sim: Simulator, session: Session, held: int
) -> None:
    """It is a minimum for the delay until the next poll."""
    sim.inject(Fault.status(202, body=b"{}", retry_after=0.05))
    sim.finish(held, "Answer")
    await session.execution(held).wait()
    first, second = sim.requests
    assert second.at - first.at >= 0.05


async def test_the_schedule_sees_what_the_watch_has_seen(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """The policy gets the nodes, the final nodes, and the time since a status last changed."""
    asked: list[dict[str, Any]] = []

    class Policy(PollPolicy):
        def delay(self, **seen: Any) -> float:
            asked.append(seen)
            return 0.001

    for status in ("QUEUED", "QUEUED", "RUNNING"):
        body = b'{"A": {"status": "%b"}, "B": {"status": "SKIPPED"}}' % status.encode()
        sim.inject(Fault.status(202, body=body))
    sim.inject(Fault.status(200, body=b"{}"))
    await open_session(poll=Policy()).execution(1).wait()
    assert [(seen["nodes"], seen["final"]) for seen in asked[:3]] == [(2, 1)] * 3
    first, second, third = (seen["unchanged"] for seen in asked[:3])
    assert first == third == 0.0 < second
    assert asked[1]["elapsed"] > 0


async def test_a_single_snapshot_has_times_of_its_own(session: Session, held: int) -> None:
    """It is poll 1, and its nodes are seen when it has taken so long."""
    snapshot = await session.execution(held).snapshot()
    assert snapshot.poll == 1
    assert snapshot.times["Plan"] == NodeTimes(None, snapshot.elapsed)
    assert snapshot.times["Answer"] == NodeTimes(snapshot.elapsed)
