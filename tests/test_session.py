"""The session: settings, opening and closing, single calls."""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections import UserDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any

import aiohttp
import anyio
import pytest

from promptlayer_exec import (
    ConfigurationError,
    Event,
    Execution,
    ExecutionStarted,
    ExecutionTimeout,
    MainOutput,
    NotFound,
    Polled,
    PollPolicy,
    RequestRetried,
    RetryPolicy,
    ServerError,
    Session,
    SessionClosed,
    Snapshot,
    StartFailed,
    StartRequest,
    Unauthorized,
    WatchEnded,
    WatchStarted,
)
from promptlayer_exec._integration import limited
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator


async def test_get_results_with_all_outputs_is_a_snapshot(
    sim: Simulator, session: Session, held: int
) -> None:
    """It sends one GET with the flag, the key and our User-Agent, and structures the answer."""
    snapshot = await session.get_results(held, return_all_outputs=True)
    assert isinstance(snapshot, Snapshot)
    assert (snapshot.execution_id, snapshot.complete, snapshot.poll) == (held, False, 1)
    assert list(snapshot.nodes) == ["Plan", "Answer"]
    assert snapshot.elapsed > 0
    (request,) = sim.requests
    assert request.method == "GET"
    assert request.path == "/workflow-version-execution-results"
    assert dict(request.query) == {
        "workflow_version_execution_id": str(held),
        "return_all_outputs": "true",
    }
    assert request.headers["X-API-KEY"] == sim.api_key
    assert request.headers["User-Agent"].startswith("promptlayer-exec/")


async def test_get_results_is_the_main_output_by_default(
    sim: Simulator, session: Session, held: int
) -> None:
    """It returns the body of a 200 unchanged; a 202 has `complete=False`."""
    running = await session.get_results(held)
    assert isinstance(running, MainOutput)
    assert not running.complete
    sim.finish(held, "Answer")
    done = await session.get_results(held, return_all_outputs=False)
    assert done == MainOutput(held, complete=True, value="42")
    assert sim.requests[-1].query["return_all_outputs"] == "false"


async def test_snapshot_is_one_request(sim: Simulator, session: Session, held: int) -> None:
    """The request is the same as a poll, but it starts no poller."""
    snapshot = await session.execution(held).snapshot()
    assert snapshot.poll == 1
    assert snapshot.times["Answer"].running == snapshot.elapsed
    assert sim.request_count == 1


@pytest.mark.parametrize("execution_id", [0, -1, 2**63, True, "7", 7.0, None])
async def test_a_bad_execution_id_is_refused_before_any_request(
    sim: Simulator, session: Session, execution_id: Any
) -> None:
    """Both the handle and the call refuse it."""
    with pytest.raises((TypeError, ValueError), match="execution id"):
        session.execution(execution_id)
    with pytest.raises((TypeError, ValueError), match="execution id"):
        await session.get_results(execution_id)
    assert sim.request_count == 0


async def test_a_single_call_is_retried_within_an_outage(
    sim: Simulator, session: Session, held: int, recorder: Any
) -> None:
    """Two 503s cost two more attempts, and each is reported."""
    sim.inject(Fault.status(503, times=2))
    await session.get_results(held)
    assert sim.request_count == 3
    assert [event.error.attempts for event in recorder.of(RequestRetried)] == [1, 2]


async def test_a_single_call_ends_at_wait_timeout(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """It ends even if `outage` allows more; the last failure is the cause."""
    sim.inject(Fault.status(503, times=None))
    session = open_session(wait_timeout=0.3, retry=RetryPolicy(base=0.01))
    with pytest.raises(ExecutionTimeout, match="503") as caught:
        await session.get_results(held)
    assert caught.value.execution_id == held
    assert getattr(caught.value.__cause__, "status", None) == 503


def test_a_session_is_made_without_a_key_a_loop_or_a_request() -> None:
    """A session can be made at module level."""
    assert repr(Session()) == "<Session https://api.promptlayer.com, not open>"


async def test_a_missing_key_is_reported_at_first_use() -> None:
    """Calls, streams and `async with` say what to set; once it is set, it is found."""
    session = Session()
    with pytest.raises(ConfigurationError, match="PROMPTLAYER_API_KEY") as caught:
        await session.get_results(7)
    assert caught.value.execution_id == 7
    with pytest.raises(ConfigurationError, match="PROMPTLAYER_API_KEY"):
        await session.execution(7).wait()
    with pytest.raises(ConfigurationError, match="PROMPTLAYER_API_KEY"):
        await session.__aenter__()


async def test_settings_from_the_environment_are_found_at_first_use(
    sim: Simulator, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables set after the session was made are found, too."""
    session = Session(poll=PollPolicy.fixed(0.01))
    monkeypatch.setenv("PROMPTLAYER_API_KEY", sim.api_key)
    monkeypatch.setenv("PROMPTLAYER_BASE_URL", sim.base_url)
    async with session:
        assert repr(session) == f"<Session {sim.base_url}, open>"
        assert not (await session.get_results(held)).complete


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"api_key": ""}, "api_key"),
        ({"api_key": "se cret"}, "api_key"),
        ({"api_key": "secret\n"}, "api_key"),
        ({"base_url": "ftp://host"}, "base_url"),
        ({"base_url": "http://a..b"}, "base_url"),
        ({"base_url": "http://host\r\nX: y"}, "base_url"),
        ({"wait_timeout": -1}, "wait_timeout"),
        ({"wait_timeout": "5"}, "wait_timeout"),
        ({"request_timeout": 0}, "request_timeout"),
        ({"request_timeout": None}, "request_timeout"),
        ({"max_connections": 0}, "max_connections"),
        ({"max_connections": 1.5}, "max_connections"),
        ({"max_response_bytes": True}, "max_response_bytes"),
        ({"rate": 0}, "rate"),
        ({"rate": float("nan")}, "rate"),
    ],
)
def test_a_malformed_setting_is_refused_at_once(settings: Any, named: str) -> None:
    """The error names the setting and does not show the key."""
    with pytest.raises(ConfigurationError, match=named) as caught:
        Session(**{"api_key": "good", **settings})
    assert "secret" not in str(caught.value)
    assert "se cret" not in str(caught.value)


@pytest.mark.parametrize("wait_timeout", [None, float("inf")])
async def test_without_a_wait_timeout_a_wait_has_no_limit(
    sim: Simulator, open_session: Callable[..., Session], held: int, wait_timeout: float | None
) -> None:
    """Infinity has the same meaning as None."""
    session = open_session(wait_timeout=wait_timeout)
    waiting = asyncio.create_task(session.execution(held).wait())
    await sim.wait_for_requests(2)
    sim.finish(held, "Answer")
    assert (await waiting).complete
    assert (await session.get_results(held)).complete


async def test_async_with_raises_the_body_s_own_exception(
    open_session: Callable[..., Session], held: int
) -> None:
    """It is not wrapped in an `ExceptionGroup`, even while a watch runs."""
    error = ZeroDivisionError()
    waits = []

    async def body() -> None:
        async with open_session() as session:
            waits.append(asyncio.ensure_future(session.execution(held).wait()))
            await asyncio.sleep(0)
            raise error

    with pytest.raises(ZeroDivisionError) as caught:
        await body()
    assert caught.value is error
    with pytest.raises(SessionClosed):
        await waits[0]


async def test_a_session_may_be_entered_in_one_task_and_closed_in_another(
    open_session: Callable[..., Session], sim: Simulator, held: int
) -> None:
    """Fixtures, lifespans and exit stacks do this."""
    stack = AsyncExitStack()
    session = open_session()
    await asyncio.create_task(stack.enter_async_context(session))
    waiting = asyncio.create_task(session.execution(held).wait())
    await sim.wait_for_requests(2)
    await asyncio.create_task(stack.aclose())
    with pytest.raises(SessionClosed):
        await waiting


async def test_use_after_closing_raises(session: Session, held: int) -> None:
    """Every call raises with the execution's id; closing again does nothing."""
    async with session:
        await session.get_results(held)
    await session.aclose()
    execution = session.execution(held)
    for use in (execution.snapshot, execution.wait, lambda: anext(execution.stream())):
        with pytest.raises(SessionClosed) as caught:
            await use()
        assert caught.value.execution_id == held


async def test_closing_a_session_that_was_never_opened_closes_it() -> None:
    """A call after closing is refused."""
    session = Session("key")
    await session.aclose()
    with pytest.raises(SessionClosed):
        await session.get_results(1)


async def test_a_closed_session_can_be_entered_again(session: Session, held: int) -> None:
    """A session can be closed and entered any number of times."""
    for _ in range(3):
        async with session:
            await session.get_results(held)


@pytest.mark.parametrize("steps", range(4))
async def test_a_cancelled_entering_leaves_nothing_open(steps: int, held: int, sim: Any) -> None:
    """`__aexit__` never runs then, and the session can be entered again."""
    session = quick(sim)

    async def body() -> None:
        async with session:
            await asyncio.Event().wait()

    entering = asyncio.create_task(body())
    for _ in range(steps):
        await asyncio.sleep(0)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    for _ in range(10):
        await asyncio.sleep(0)
    assert [t for t in asyncio.all_tasks() if t.get_name() == "promptlayer_exec.Session"] == []
    async with session:
        await session.get_results(held)


async def test_a_second_limiter_may_apply_for_a_while(
    open_session: Callable[..., Session], held: int
) -> None:
    """Durable batches share one rate this way, even over open sessions."""
    asked = []

    class Asked:
        def __init__(self, name: str) -> None:
            self._name = name

        async def acquire(self) -> None:
            asked.append(self._name)

    session = open_session(limiter=Asked("own"))
    await session.get_results(held)
    with limited(session, Asked("lent")):
        await session.get_results(held)
    await session.get_results(held)
    assert asked == ["own", "own", "lent", "own"]


async def test_closing_waits_until_the_calls_have_ended(
    open_session: Callable[..., Session], held: int
) -> None:
    """It waits however long their clean-up takes."""
    at_the_limiter = asyncio.Event()

    class Tidy:
        async def acquire(self) -> None:
            try:
                at_the_limiter.set()
                await asyncio.Event().wait()
            finally:
                with anyio.CancelScope(shield=True):
                    for _ in range(10):
                        await asyncio.sleep(0)

    session = open_session(limiter=Tidy())
    call = asyncio.create_task(session.get_results(held))
    await at_the_limiter.wait()
    await session.aclose()
    assert isinstance(call.exception(), SessionClosed)


async def test_entering_a_closing_session_waits_until_it_is_closed(
    session: Session, held: int
) -> None:
    """The earlier close does not close the new open client."""
    await session.__aenter__()
    closing = asyncio.create_task(session.aclose())
    await asyncio.sleep(0)
    await session.__aenter__()
    await closing
    await session.get_results(held)


async def test_closing_twice_at_once_closes_once(session: Session, held: int) -> None:
    """Both callers return once the session is closed."""
    await session.get_results(held)
    await asyncio.gather(session.aclose(), session.aclose())
    with pytest.raises(SessionClosed):
        await session.get_results(held)


async def test_closing_ends_once_however_often_all_tasks_are_cancelled(
    sim: Simulator, open_session: Callable[..., Session], our_tasks: Callable[[], list[str]]
) -> None:
    """As by a shutdown routine and by asyncio.run; here, while the connections are closed."""
    done = sim.add_execution(Scenario([SimNode("A", duration=0.0)]))
    for steps in range(12):
        session = open_session()
        await asyncio.gather(*(session.get_results(done) for _ in range(3)))
        closing = asyncio.create_task(session.aclose())
        for _ in range(steps):
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task(), closing}:
            if task.get_name().startswith("promptlayer_exec"):
                task.cancel()
        await closing
        assert our_tasks() == []


async def test_a_cancelled_closing_still_closes(session: Session, held: int) -> None:
    """Only the wait for the closing is cancelled."""
    await session.get_results(held)
    closing = asyncio.create_task(session.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(SessionClosed):
        await session.get_results(held)


def in_new_loops(*mains: Callable[[], Any]) -> None:
    """Run each coroutine function in a new event loop, one after the other."""
    for main in mains:
        asyncio.run(main())


def quick(sim: Simulator) -> Session:
    """Return a session for a simulator; no fixture cleans it up."""
    return Session(sim.api_key, base_url=sim.base_url, poll=PollPolicy.fixed(0.01))


def test_a_closed_session_can_be_entered_in_another_loop(threaded_sim: Simulator) -> None:
    """A closed session is not bound to its first loop."""
    held = threaded_sim.add_execution(Scenario([SimNode("A", duration=None)]))
    session = quick(threaded_sim)

    async def main() -> None:
        async with session:
            assert not (await session.get_results(held)).complete

    in_new_loops(main, main)
    assert threaded_sim.request_count == 2


def test_an_open_session_is_refused_in_a_second_loop(threaded_sim: Simulator) -> None:
    """Every way to use or close it raises `RuntimeError`."""
    held = threaded_sim.add_execution(Scenario([SimNode("A", duration=None)]))
    session = quick(threaded_sim)
    refusals = []
    stream = session.execution(held).stream()

    async def elsewhere() -> None:
        for use in (
            lambda: session.get_results(held),
            session.execution(held).wait,
            session.__aenter__,
            session.aclose,
            lambda: anext(stream),
        ):
            with pytest.raises(RuntimeError, match="another event loop"):
                await use()
            refusals.append(use)

    async def main() -> None:
        async with session:
            await anext(stream)
            thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
            thread.start()
            await asyncio.to_thread(thread.join)
            await session.get_results(held)

    asyncio.run(main())
    assert len(refusals) == 5


def test_a_stream_may_end_in_a_second_loop_if_it_need_not_wait(threaded_sim: Simulator) -> None:
    """The complete snapshot is at hand, and the session is closed."""
    held = threaded_sim.add_execution(Scenario([SimNode("A", duration=None)]))
    session = quick(threaded_sim)
    stream = session.execution(held).stream()

    async def begin() -> None:
        assert not (await anext(stream)).complete
        threaded_sim.finish(held, "A")
        await session.execution(held).wait()
        await session.aclose()

    async def end() -> None:
        assert [snapshot.complete async for snapshot in stream] == [True]

    loops = [asyncio.new_event_loop(), asyncio.new_event_loop()]
    loops[0].run_until_complete(begin())  # `asyncio.run` would close the stream
    loops[1].run_until_complete(end())
    for loop in loops:
        loop.close()


class Closable(asyncio.SelectorEventLoop):
    """A loop that can say that it is closed; the tasks of one that is would only warn."""

    says_closed = False

    def is_closed(self) -> bool:
        """Return True if the loop is closed, or should say so."""
        return self.says_closed or super().is_closed()

    def call_soon(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
        """Refuse calls if it should be closed."""
        if self.says_closed:
            raise RuntimeError("Event loop is closed")
        return super().call_soon(*args, **kwargs)

    call_soon_threadsafe = call_soon


@pytest.mark.parametrize("is_closed", [False, True], ids=["stopped", "closed"])
@pytest.mark.parametrize("name", ["stream", "finished_nodes", "as_completed"])
def test_what_was_begun_in_a_loop_is_refused_in_a_second_one(
    threaded_sim: Simulator, name: str, *, is_closed: bool
) -> None:
    """The first loop was never told to end, so nothing would ever come from it."""
    nodes = [SimNode("A", duration=0.0), SimNode("B", duration=None)]
    held = threaded_sim.add_execution(Scenario(nodes))
    done = threaded_sim.add_execution(Scenario([SimNode("A", duration=0.0)]))
    session = quick(threaded_sim)
    begin: dict[str, Callable[[], AsyncGenerator[Any, None]]] = {
        "stream": session.execution(held).stream,
        "finished_nodes": session.execution(held).finished_nodes,
        "as_completed": lambda: session.as_completed([done, held]),
    }
    values = begin[name]()

    async def take() -> None:
        await anext(values)

    async def take_all() -> None:
        async with asyncio.timeout(5), aclosing(values):
            while True:
                await take()

    async def take_elsewhere() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await take_all()

    first, second = Closable(), asyncio.new_event_loop()
    first.run_until_complete(take())
    first.says_closed = is_closed
    second.run_until_complete(take_elsewhere())
    second.close()
    first.says_closed = False
    first.run_until_complete(session.aclose())
    first.close()


@pytest.mark.parametrize("how", ["anext", "aclose"])
def test_a_fan_out_that_is_continued_elsewhere_loses_no_started_run(
    threaded_sim: Simulator, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """It is ended where it began, and the log has the ids of all runs that it did not deliver."""
    threaded_sim.add_workflow("Example", Scenario([SimNode("A", duration=0.0)]))
    session = quick(threaded_sim)
    requests = (StartRequest("Example", key=str(number)) for number in itertools.count())
    outcomes = session.as_completed(requests, max_in_flight=4)
    delivered: set[int] = set()

    async def take() -> None:
        outcome = await anext(outcomes)
        assert outcome.execution is not None
        delivered.add(outcome.execution.id)

    async def take_all() -> None:
        while how == "anext":
            await take()
        await outcomes.aclose()

    async def take_elsewhere() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await take_all()

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    first.run_until_complete(take())
    second.run_until_complete(take_elsewhere())
    second.close()
    first.run_until_complete(asyncio.sleep(0))  # now it ends
    count = len(threaded_sim.runs)
    first.run_until_complete(session.aclose())
    first.close()
    logged = {int(number) for number in re.findall(r"execution (\d+) of", caplog.text)}
    assert {run.execution_id for run in threaded_sim.runs} == delivered | logged
    assert len(threaded_sim.runs) <= count + 4


def test_a_fan_out_that_is_continued_elsewhere_logs_the_runs_in_flight_at_once(
    threaded_sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop that follows them may never run again; if it does, they are not logged again."""
    durations = iter([0.0, None, None])
    threaded_sim.add_workflow(
        "Example", lambda _: Scenario([SimNode("A", duration=next(durations))])
    )
    session = quick(threaded_sim)
    outcomes = session.as_completed(StartRequest("Example") for _ in range(3))

    async def begin() -> None:
        await anext(outcomes)
        await threaded_sim.wait_for_requests(6)  # all are started, and polled

    async def go_on() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await anext(outcomes)

    def logged() -> list[str]:
        return sorted(re.findall(r"execution (\d+) of .* was not delivered", caplog.text))

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    first.run_until_complete(begin())
    second.run_until_complete(go_on())
    second.close()
    assert len(logged()) == 2
    first.run_until_complete(session.aclose())
    first.close()
    assert len(logged()) == 2


@pytest.mark.parametrize("steps", range(5))
def test_a_fan_out_that_is_left_while_it_fails_logs_a_start_on_the_wire(
    threaded_sim: Simulator, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    """Also in the step in which its caller is cancelled, because another item got a 401."""
    threaded_sim.add_workflow("Example", Scenario([SimNode("A", duration=None)]))
    tracing = aiohttp.TraceConfig()

    def stop_after(steps: int) -> None:
        if steps:
            first.call_soon(stop_after, steps - 1)
        else:
            first.stop()

    async def stop_at_401(http: Any, context: Any, request: Any) -> None:
        if request.response.status == 401:
            stop_after(steps)

    tracing.on_request_end.append(stop_at_401)

    async def requests() -> AsyncIterator[Any]:
        yield threaded_sim.add_execution(Scenario([SimNode("A", duration=0.0)]))
        await is_taken.wait()
        threaded_sim.inject(Fault.delay(0.2))
        yield StartRequest("Example", key="on the wire")
        await threaded_sim.wait_for_requests(2)
        threaded_sim.inject(Fault.status(401))
        yield StartRequest("Example", key="refused")

    async def begin() -> None:
        async with (
            aiohttp.ClientSession(trace_configs=[tracing]) as http,
            Session(threaded_sim.api_key, base_url=threaded_sim.base_url, http=http) as session,
        ):
            outcomes.append(session.as_completed(requests()))
            await anext(outcomes[0])
            is_taken.set()
            await asyncio.Event().wait()

    async def go_on() -> None:
        while True:
            delivered.append((await anext(outcomes[0])).item.key)

    outcomes: list[Any] = []
    delivered: list[str] = []
    is_taken = asyncio.Event()
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    task = first.create_task(begin())
    first.run_forever()
    with pytest.raises((RuntimeError, Unauthorized)):
        second.run_until_complete(go_on())
    second.close()
    is_logged = "(key 'on the wire')" in caplog.text
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        first.run_until_complete(task)
    first.close()
    assert is_logged or "on the wire" in delivered


def test_a_fan_out_is_not_stuck_after_its_outcomes_were_taken_in_another_loop(
    threaded_sim: Simulator, recorder: Any
) -> None:
    """Each outcome that is taken makes room for another item, wherever it is taken."""
    node = SimNode("A", 1, duration=0.0, is_output_node=True)
    threaded_sim.add_workflow("Example", Scenario([node]))
    session = Session(threaded_sim.api_key, base_url=threaded_sim.base_url, observers=[recorder])
    outcomes = session.as_completed((StartRequest("Example") for _ in range(5)), max_in_flight=1)

    async def take_and_wait() -> None:
        await anext(outcomes)
        while len(recorder.of(WatchEnded)) < 2:
            await recorder.next(WatchEnded)
        for _ in range(20):  # until the second outcome waits
            await asyncio.sleep(0)

    async def take() -> None:
        await anext(outcomes)

    async def take_all() -> None:
        async with asyncio.timeout(10):
            assert len([outcome async for outcome in outcomes]) == 3

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    first.run_until_complete(take_and_wait())
    second.run_until_complete(take())
    second.close()
    first.run_until_complete(take_all())
    first.run_until_complete(session.aclose())
    first.close()


def test_a_fan_out_whose_loop_was_closed_delivers_what_waits(
    threaded_sim: Simulator, recorder: Any
) -> None:
    """Although `items` waits for a place there."""
    node = SimNode("A", 1, duration=0.0, is_output_node=True)
    threaded_sim.add_workflow("Example", Scenario([node]))
    session = Session(
        threaded_sim.api_key, base_url=threaded_sim.base_url, observers=[recorder], rate=None
    )
    outcomes = session.as_completed(
        (StartRequest("Example") for _ in itertools.count()), max_in_flight=3
    )

    async def begin() -> int:
        first = await anext(outcomes)
        assert first.execution is not None
        while len(recorder.of(WatchEnded)) < 4:
            await recorder.next(WatchEnded)
        for _ in range(20):  # until their outcomes wait
            await asyncio.sleep(0)
        return first.execution.id

    async def take() -> None:
        async for outcome in outcomes:
            assert outcome.execution is not None
            delivered.append(outcome.execution.id)

    async def go_on() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await take()

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    delivered = [first.run_until_complete(begin())]
    first.close()
    second.run_until_complete(go_on())
    second.close()
    assert sorted(delivered) == [run.execution_id for run in threaded_sim.runs]
    assert len(delivered) == 4


@pytest.mark.parametrize("is_refused", [False, True], ids=["started", "refused"])
def test_a_fan_out_that_is_continued_elsewhere_knows_the_answers_that_it_read(
    threaded_sim: Simulator, caplog: pytest.LogCaptureFixture, *, is_refused: bool
) -> None:
    """The log has the id of such a run, and does not say of a refused one that it may go on."""
    threaded_sim.add_workflow("Example", Scenario([SimNode("A", duration=0.0)]))
    tracing = aiohttp.TraceConfig()

    async def stop_at_second_answer(http: Any, context: Any, request: Any) -> None:
        if request.method == "POST" and threaded_sim.request_count > 1:
            first.stop()  # at the end of this step, in which the answer is read

    tracing.on_request_end.append(stop_at_second_answer)
    requests = (StartRequest("Example", key=f"key {number}") for number in itertools.count())

    async def begin() -> None:
        async with (
            aiohttp.ClientSession(trace_configs=[tracing]) as http,
            Session(threaded_sim.api_key, base_url=threaded_sim.base_url, http=http) as session,
        ):
            outcomes.append(session.as_completed(requests, max_in_flight=1))
            await anext(outcomes[0])
            if is_refused:
                threaded_sim.inject(Fault.status(400))
            await asyncio.Event().wait()

    async def go_on() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await anext(outcomes[0])

    outcomes: list[Any] = []
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    task = first.create_task(begin())
    first.run_forever()
    second.run_until_complete(go_on())
    second.close()
    assert "not known" not in caplog.text
    ids = [run.execution_id for run in threaded_sim.runs[1:]]
    logged = re.findall(r"execution (\d+) of workflow 'Example' \(key 'key 1'\)", caplog.text)
    assert list(map(int, logged)) == ids
    assert len(ids) == (not is_refused)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        first.run_until_complete(task)
    first.close()


@pytest.mark.parametrize("is_closed", [False, True], ids=["stopped", "closed"])
def test_a_fan_out_that_is_continued_elsewhere_logs_a_start_on_the_wire(
    threaded_sim: Simulator, caplog: pytest.LogCaptureFixture, *, is_closed: bool
) -> None:
    """Nobody knows if it started a run, and that loop may never run again. Others were not sent."""
    threaded_sim.add_workflow("Example", Scenario([SimNode("A", duration=0.0)]))
    session = Session(
        threaded_sim.api_key, base_url=threaded_sim.base_url, rate=None, max_connections=1
    )

    async def requests() -> AsyncIterator[StartRequest]:
        yield StartRequest("Example", key="key 0")
        await is_taken.wait()
        yield StartRequest("Example", key="key 1")
        yield StartRequest("Example", key="key 2")

    outcomes = session.as_completed(requests(), max_in_flight=2)
    is_taken = asyncio.Event()

    async def begin() -> None:
        await anext(outcomes)
        threaded_sim.inject(Fault.delay(0.2))
        is_taken.set()
        await threaded_sim.wait_for_requests(3)
        for _ in range(20):  # the next item waits for the connection
            await asyncio.sleep(0)

    async def go_on() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await anext(outcomes)

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    first.run_until_complete(begin())
    if is_closed:
        first.close()
    second.run_until_complete(go_on())
    second.close()
    assert "a run of workflow 'Example' started: its event loop was left" in caplog.text
    assert "(key 'key 1')" in caplog.text
    assert "key 2" not in caplog.text
    if not is_closed:
        first.run_until_complete(session.aclose())
        first.close()


def test_a_fan_out_that_is_closed_without_a_loop_is_ended_in_its_own(
    threaded_sim: Simulator,
) -> None:
    """As when the generator is dropped after its loop has stopped."""
    held = threaded_sim.add_execution(Scenario([SimNode("A", duration=None)]))
    done = threaded_sim.add_execution(Scenario([SimNode("A", duration=0.0)]))
    session = quick(threaded_sim)
    outcomes = session.as_completed([done, held])

    async def begin() -> None:
        await anext(outcomes)

    async def polls() -> int:
        for _ in range(20):
            await asyncio.sleep(0)
        return len(asyncio.all_tasks())

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    closing = outcomes.aclose()
    with pytest.raises(RuntimeError, match="another event loop"):
        closing.send(None)
    assert loop.run_until_complete(polls()) == 2  # this one and the session
    loop.run_until_complete(session.aclose())
    loop.close()


def test_a_stream_whose_watch_failed_raises_its_error_in_a_second_loop(
    threaded_sim: Simulator,
) -> None:
    """There is nothing to wait for."""
    held = threaded_sim.add_execution(Scenario([SimNode("A", duration=None)]))
    session = quick(threaded_sim)
    stream = session.execution(held).stream()

    async def begin() -> None:
        await anext(stream)
        threaded_sim.inject(Fault.status(404))
        with pytest.raises(NotFound):
            await session.execution(held).wait()

    async def go_on() -> None:
        with pytest.raises(NotFound):
            await anext(stream)

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    first.run_until_complete(begin())
    second.run_until_complete(go_on())
    second.close()
    first.run_until_complete(session.aclose())
    first.close()


def test_a_session_left_open_ends_with_its_loop(threaded_sim: Simulator) -> None:
    """Nothing leaks; another loop can use it once it has entered it."""
    held = threaded_sim.add_execution(Scenario([SimNode("A", duration=None)]))
    session = quick(threaded_sim)

    async def use() -> None:
        await session.get_results(held)

    async def refused() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await use()

    async def enter() -> None:
        async with session:
            await use()

    in_new_loops(use, refused, enter)


def test_a_session_of_a_dead_loop_can_be_entered_again(threaded_sim: Simulator) -> None:
    """This holds even if the loop was closed without ending its tasks."""
    held = threaded_sim.add_execution(Scenario([SimNode("A", duration=None)]))
    session = quick(threaded_sim)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(session.get_results(held))
    supervisor = next(iter(asyncio.all_tasks(loop)))
    supervisor.cancel()
    loop.run_until_complete(asyncio.gather(supervisor, return_exceptions=True))
    loop.close()

    async def enter() -> None:
        async with session:
            await session.get_results(held)

    asyncio.run(enter())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("what", ["wait", "stream", "start", "collect", "get_results", "aclose"])
def test_nothing_waits_for_a_loop_that_shuts_down(
    threaded_sim: Simulator, what: str, *, is_open: bool, steps: int
) -> None:
    """asyncio.run cancels all tasks, some before their first step; clean-ups use the session."""
    held = threaded_sim.add_execution(Scenario([SimNode("A", duration=None)]))
    session = quick(threaded_sim)
    uses: dict[str, Callable[[], Awaitable[object]]] = {
        "wait": lambda: session.execution(held).wait(),
        "stream": lambda: anext(session.execution(held).stream()),
        "start": lambda: session.start("Example"),
        "collect": lambda: session.collect([held]),
        "get_results": lambda: session.get_results(held),
        "aclose": session.aclose,
    }
    ends: list[BaseException | None] = []

    async def use() -> None:
        try:
            await session.get_results(held)
            await asyncio.Event().wait()
        finally:
            try:
                await uses[what]()
            except SessionClosed as error:
                ends.append(error)
            else:
                ends.append(None)

    async def main() -> None:
        if is_open:
            await session.get_results(held)
        tasks = [asyncio.create_task(use()) for _ in range(2)]
        for _ in range(steps):
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    thread.join(10.0)
    assert not thread.is_alive()
    assert len(ends) == 2
    assert what == "aclose" or all(ends)


def test_a_session_left_open_can_be_closed_from_another_loop(threaded_sim: Simulator) -> None:
    """Its own loop has already ended it, so there is nothing to wait for."""
    held = threaded_sim.add_execution(Scenario([SimNode("A", duration=None)]))
    session = quick(threaded_sim)

    async def use() -> None:
        await session.get_results(held)

    async def closed() -> None:
        await session.aclose()
        with pytest.raises(SessionClosed):
            await use()

    in_new_loops(use, closed)


async def test_a_supervisor_cancelled_from_outside_closes_the_session(
    sim: Simulator, session: Session, held: int
) -> None:
    """Waiting callers are released, and further calls are refused."""
    waiting = asyncio.create_task(session.execution(held).wait())
    await sim.wait_for_requests(1)
    for task in asyncio.all_tasks():
        if task.get_name() == "promptlayer_exec.Session":
            task.cancel()
    with pytest.raises(SessionClosed):
        await waiting
    with pytest.raises(SessionClosed):
        await session.get_results(held)


async def test_closing_ends_a_call_in_its_retry_sleep(
    sim: Simulator, open_session: Callable[..., Session], held: int, recorder: Any
) -> None:
    """A single call and a watch, each in a sleep of an hour, are released at once."""
    session = open_session(retry=RetryPolicy(base=3600.0, ceiling=7200.0, outage=1e6))
    sim.inject(Fault.status(503, times=2))
    call = asyncio.create_task(session.get_results(held))
    wait = asyncio.create_task(session.execution(held).wait())
    while len(recorder.of(RequestRetried)) < 2:
        await recorder.next(RequestRetried)
    await session.aclose()
    for task in (call, wait):
        with pytest.raises(SessionClosed) as caught:
            await task
        assert caught.value.execution_id == held


async def test_closing_ends_a_call_that_waits_for_the_server(
    sim: Simulator, session: Session, held: int
) -> None:
    """The connection is dropped during the request."""
    sim.inject(Fault.stall())
    call = asyncio.create_task(session.get_results(held))
    await sim.wait_for_requests(1)
    await session.aclose()
    with pytest.raises(SessionClosed):
        await call


async def test_closing_ends_a_call_that_waits_for_the_rate(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """Requests that were not sent yet are never sent."""
    session = open_session(rate=0.001)
    calls = [asyncio.create_task(session.get_results(held)) for _ in range(3)]
    await sim.wait_for_requests(1)
    await calls[0]
    await session.aclose()
    for call in calls[1:]:
        with pytest.raises(SessionClosed):
            await call
    assert sim.request_count == 1


async def test_closing_ends_waiting_calls_in_their_order(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """In another order, each would be searched for in the queue of the connections."""
    sim.inject(Fault.stall(None))
    ended: list[int] = []

    async def wait(number: int) -> None:
        with pytest.raises(SessionClosed):
            await session.get_results(held)
        ended.append(number)

    session = open_session(max_connections=1, rate=None)
    calls = [asyncio.create_task(wait(number)) for number in range(100)]
    await sim.wait_for_requests(1)
    await session.aclose()
    await asyncio.gather(*calls)
    assert ended[1:] == list(range(1, 100))  # the first closes its connection


async def test_cancelling_a_call_cancels_it_alone(
    sim: Simulator, session: Session, held: int
) -> None:
    """The session stays usable."""
    sim.inject(Fault.stall())
    call = asyncio.create_task(session.get_results(held))
    await sim.wait_for_requests(1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await session.get_results(held)


async def test_a_borrowed_client_session_is_used_and_left_open(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """Its headers apply, ours are added, and its User-Agent stays."""
    headers = {"X-Proxy": "yes", "User-Agent": "mine/1"}
    async with aiohttp.ClientSession(headers=headers, raise_for_status=True) as http:
        session = open_session(http=http)
        await session.get_results(held)
        sim.inject(Fault.status(401))
        with pytest.raises(Unauthorized):
            await session.get_results(held)
        await session.aclose()
        assert not http.closed
    request = sim.requests[0]
    assert request.headers["X-Proxy"] == "yes"
    assert request.headers["User-Agent"] == "mine/1"
    assert request.headers["X-API-KEY"] == sim.api_key


async def test_a_borrowed_client_session_that_waits_for_100_continue_is_refused() -> None:
    """It sends the headers of a start early, and the server may answer before it is sent."""
    async with aiohttp.ClientSession(headers={"expect": "100-continue"}) as http:
        with pytest.raises(ConfigurationError, match="http= must not have the header Expect"):
            Session("key", http=http)


def test_a_start_that_fails_reaches_its_caller_though_an_observer_is_interrupted(
    threaded_sim: Simulator,
) -> None:
    """A notebook's event loop goes on after Ctrl-C, and with it whoever waits."""
    assert isinstance(interrupted_start(threaded_sim, StartFailed), NotFound)


def test_the_id_of_a_start_is_logged_if_an_observer_is_interrupted(
    threaded_sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """Its caller gets the interrupt instead of the handle."""
    threaded_sim.add_workflow("Example", Scenario([SimNode("A")]))
    error = interrupted_start(threaded_sim, ExecutionStarted)
    assert isinstance(error, KeyboardInterrupt)
    assert "execution 1002 of workflow 'Example' started" in caplog.text


async def test_the_id_of_a_start_is_logged_if_an_observer_cancels_its_caller(
    sim: Simulator, open_session: Callable[..., Session], caplog: pytest.LogCaptureFixture
) -> None:
    """Asyncio drops what a task returns if its cancellation has not arrived by then."""
    sim.add_workflow("Example", Scenario([SimNode("A")]))
    starting: asyncio.Task[Any]

    def observe(event: Event) -> None:
        if isinstance(event, ExecutionStarted):
            starting.cancel()

    starting = asyncio.create_task(open_session(observers=[observe]).start("Example"))
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert "execution 1001 of workflow 'Example' started" in caplog.text


@pytest.mark.parametrize("event", [WatchStarted, Polled, WatchEnded])
def test_a_wait_ends_though_an_observer_is_interrupted(
    threaded_sim: Simulator, event: type[Event]
) -> None:
    """Whoever follows the execution learns that its watch has ended."""
    done = threaded_sim.add_execution(Scenario([SimNode("A", duration=0.0)]))
    ended = interrupted(threaded_sim, event, lambda session: session.execution(done).wait())
    assert isinstance(ended.exception(), RuntimeError) or ended.result().complete


def interrupted_start(sim: Simulator, event: type[Event]) -> BaseException | None:
    """Return how a start ends when an observer of an event is interrupted."""
    return interrupted(sim, event, lambda session: session.start("Example")).exception()


def interrupted(
    sim: Simulator, event: type[Event], call: Callable[[Session], Coroutine[Any, Any, Any]]
) -> asyncio.Task[Any]:
    """Return a call that has ended, although an observer was interrupted; the session goes on."""
    held = sim.add_execution(Scenario([SimNode("A", duration=None)]))

    def observe(seen: Event) -> None:
        if isinstance(seen, event):
            raise KeyboardInterrupt

    session = Session(sim.api_key, base_url=sim.base_url, observers=[observe])
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        task = loop.create_task(call(session))
        with suppress(KeyboardInterrupt):
            loop.run_until_complete(asyncio.wait([task]))
        with suppress(KeyboardInterrupt):  # the result may come before the interrupt
            loop.run_until_complete(asyncio.wait([task], timeout=5.0))
        assert task.done()
        loop.run_until_complete(session.get_results(held))
        loop.run_until_complete(session.aclose())
        return task


async def test_a_fan_out_whose_task_is_cancelled_does_not_close_the_session(
    sim: Simulator, session: Session, held: int
) -> None:
    """It ends, and nothing else does."""
    waiting = asyncio.create_task(session.execution(held).wait())
    await sim.wait_for_requests(1)
    collecting = asyncio.create_task(session.collect([held]))
    await sim.wait_for_requests(2)
    for task in asyncio.all_tasks():
        if task.get_name() == "promptlayer_exec.Session.spawn":
            task.cancel()
    with pytest.raises(SessionClosed):
        await collecting
    sim.finish(held, "Answer")
    assert (await waiting).complete


async def test_a_start_whose_task_is_cancelled_in_its_last_step_does_not_close_the_session(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """Here, an observer cancels it; so does the library itself when a handshake is refused."""

    def observe(event: Event) -> None:
        task = asyncio.current_task()
        if isinstance(event, StartFailed) and task is not None:
            task.cancel()

    session = open_session(observers=[observe])
    waiting = asyncio.create_task(session.execution(held).wait())
    await sim.wait_for_requests(1)
    with pytest.raises(NotFound):
        await session.start("Unknown")
    sim.finish(held, "Answer")
    assert (await waiting).complete


async def test_a_borrowed_client_session_that_was_closed_is_reported(
    open_session: Callable[..., Session], held: int
) -> None:
    """It raises `SessionClosed` with the execution's id, without a retry."""
    http = aiohttp.ClientSession()
    await http.close()
    with pytest.raises(SessionClosed, match="borrowed") as caught:
        await open_session(http=http).get_results(held)
    assert caught.value.execution_id == held


async def test_a_limiter_is_acquired_once_per_attempt(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """Retries acquire it, too."""

    class Counter:
        acquired = 0

        async def acquire(self) -> None:
            self.acquired += 1

    limiter = Counter()
    sim.inject(Fault.status(503, times=2))
    await open_session(limiter=limiter).get_results(held)
    assert limiter.acquired == sim.request_count == 3


async def test_an_error_of_ours_that_a_limiter_raises_is_not_taken_for_the_server_s(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """It is not retried, and a start that it prevented is not unknown."""
    calls = 0

    class Refusing:
        async def acquire(self) -> None:
            nonlocal calls
            calls += 1
            raise ServerError("over budget", status=503, server_message="over budget")

    session = open_session(limiter=Refusing())
    for call in (session.get_results(787), session.start("name"), session.execution(7).wait()):
        with pytest.raises(RuntimeError, match="the limiter raised ServerError") as caught:
            await call
        assert isinstance(caught.value.__cause__, ServerError)
    assert calls == 3
    assert sim.requests == []


async def test_the_base_url_s_path_prefix_is_kept(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """A gateway may serve the API under a path."""
    session = open_session(base_url=f"{sim.base_url}/gate%20way/")
    with pytest.raises(Exception, match="404"):
        await session.get_results(1)
    assert sim.requests[0].path == "/gate%20way/workflow-version-execution-results"


def test_a_repr_survives_a_malformed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repr is for debugging, so it does not raise."""
    session = Session("key")
    monkeypatch.setenv("PROMPTLAYER_BASE_URL", "nonsense")
    assert repr(session) == "<Session with a malformed base URL, not open>"


async def test_a_session_dropped_unclosed_lives_until_its_loop_ends(
    sim: Simulator, held: int
) -> None:
    """The garbage collector does not collect it, and its task can still be found and ended."""

    async def use_and_drop() -> None:
        await quick(sim).get_results(held)

    await use_and_drop()
    gc.collect()
    (supervisor,) = [t for t in asyncio.all_tasks() if t.get_name() == "promptlayer_exec.Session"]
    supervisor.cancel()
    await supervisor


def test_handles_are_equal_by_session_and_id() -> None:
    """Equal handles have equal hashes, and the repr shows session and id."""
    session, other = Session("key"), Session("key")
    assert session.execution(7) == session.execution(7)
    assert hash(session.execution(7)) == hash(session.execution(7))
    assert session.execution(7) != session.execution(8)
    assert session.execution(7) != other.execution(7)
    assert session.execution(7) != 7
    assert repr(session.execution(7)) == "<Execution 7>"
    assert repr(Execution(session, 7, "Agent")) == "<Execution 7 of 'Agent'>"


def test_a_handle_is_pickled_without_its_session() -> None:
    """A copy is the handle itself; a pickled one keeps the id and says that it has no session."""
    execution = Execution(Session("secret-key"), 7, "Agent", "careful")
    assert copy.copy(execution) is execution
    assert copy.deepcopy(execution) is execution
    pickled = pickle.dumps(execution)
    assert b"secret" not in pickled
    restored = pickle.loads(pickled)
    assert (restored.id, restored.workflow, restored.warning) == (7, "Agent", "careful")
    with pytest.raises(RuntimeError, match=r"session\.execution\(7\)"):
        restored.stream()


def test_a_session_neither_pickles_nor_shows_its_key() -> None:
    """The key is in no repr, and a pickle is refused."""
    session = Session("secret-key")
    assert "secret" not in repr(session)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(session)


PROGRAM = """
    import asyncio, logging
    from contextlib import aclosing
    from promptlayer_exec import *
    from promptlayer_exec.simulator import *

    logging.getLogger("promptlayer_exec").setLevel("ERROR")  # the outage below is a warning

    async def main():
        asyncio.get_running_loop().slow_callback_duration = 60.0  # a busy machine is no leak
        async with Simulator() as sim:
            held = sim.add_execution(Scenario([SimNode("A", duration=None)]))
            session = Session(sim.api_key, base_url=sim.base_url, poll=PollPolicy.fixed(0.01))
            sim.inject(Fault.status(503))
            waits = [asyncio.create_task(session.execution(held).wait()) for _ in range(3)]
            async with aclosing(session.execution(held).stream()) as snapshots:
                async for snapshot in snapshots:
                    if snapshot.poll == 3:
                        break
            sim.inject(Fault.stall())
            await sim.wait_for_requests(sim.request_count + 1)
            {close}
            await asyncio.gather(*waits, return_exceptions=True)

    asyncio.run(main())
"""


@pytest.mark.parametrize("close", ["await session.aclose()", "[wait.cancel() for wait in waits]"])
def test_a_program_leaks_nothing(close: str) -> None:
    """In development mode, where every leak is a warning, standard error stays empty."""
    finished = subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-W",
            "error",
            "-c",
            textwrap.dedent(PROGRAM).format(close=close),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.stderr == ""
    assert finished.returncode == 0


def test_plain_http_to_another_machine_warns_once() -> None:
    """The warning is for the line that makes the session, however often it is opened."""
    with pytest.warns(UserWarning, match=r"http://gateway\.test is plain http") as caught:
        session = Session("key", base_url="http://gateway.test")
    assert [warning.filename for warning in caught] == [__file__]
    for _ in range(2):
        asyncio.run(open_and_close(session))


def test_plain_http_from_a_later_environment_warns_at_first_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A session at module level may be made before the environment is set."""
    session = Session("key")
    monkeypatch.setenv("PROMPTLAYER_BASE_URL", "http://later.test")
    with pytest.warns(UserWarning, match=r"http://later\.test is plain http"):
        asyncio.run(open_and_close(session))
    asyncio.run(open_and_close(session))


async def open_and_close(session: Session) -> None:
    """Open and close the session, without any I/O."""
    async with session:
        pass


@pytest.mark.parametrize("base_url", ["https://api.test", "http://localhost:1", "http://[::1]"])
def test_https_and_loopback_do_not_warn(base_url: str) -> None:
    """Warnings are errors in the tests, so this passes without one."""
    asyncio.run(open_and_close(Session("key", base_url=base_url)))


class SlowEnvironment(UserDict[str, str]):
    """Environment variables that are read so slowly that all threads read them at once."""

    def __getitem__(self, name: str) -> str:
        time.sleep(0.01)
        return super().__getitem__(name)


def test_only_one_of_many_threads_gets_the_session(
    threaded_sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads use it first at the same time, and all but one get a clear error."""
    execution_id = threaded_sim.add_execution(Scenario([SimNode("A")]))
    monkeypatch.setattr(
        os, "environ", SlowEnvironment(os.environ, PROMPTLAYER_API_KEY=threaded_sim.api_key)
    )
    session = Session(base_url=threaded_sim.base_url)
    together = threading.Barrier(16)
    ended: list[str] = []

    async def use() -> None:
        together.wait()
        try:
            await session.get_results(execution_id)
        except RuntimeError as error:
            ended.append(str(error))
            together.wait()
        else:
            ended.append("fine")
            together.wait()  # its loop stays open until the others have tried
            await session.aclose()

    threads = [threading.Thread(target=asyncio.run, args=[use()]) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended.count("fine") == 1
    assert sum("open in another event loop" in text for text in ended) == 15


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("suppressed_by", ["limiter", "middleware"])
async def test_a_call_ends_in_time_even_if_its_cancellation_is_suppressed(
    sim: Simulator, monkeypatch: pytest.MonkeyPatch, *, suppressed_by: str, close: bool
) -> None:
    """As `asyncio.wait_for` of Python 3.11 does at times; no cancellation stays pending."""
    monkeypatch.setattr("promptlayer_exec._engine.tasks.AGAIN", 0.05)
    waits = asyncio.Event()

    async def suppress_one() -> None:
        waits.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    class Limiter:
        async def acquire(self) -> None:
            if suppressed_by == "limiter":
                await suppress_one()

    async def middleware(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        if suppressed_by == "middleware":
            await suppress_one()
        return await handler(request)

    async def call() -> int:
        with pytest.raises(SessionClosed if close else ExecutionTimeout):
            await session.get_results(7)
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    sim.inject(Fault.stall())
    timeout = None if close else 0.05
    async with (
        aiohttp.ClientSession(middlewares=[middleware]) as http,
        Session(
            sim.api_key, base_url=sim.base_url, limiter=Limiter(), http=http, wait_timeout=timeout
        ) as session,
    ):
        calling = asyncio.create_task(call())
        await waits.wait()
        if close:
            await session.aclose()
        assert await calling == 0
    assert sim.request_count == (suppressed_by == "middleware")


async def test_a_timeout_of_the_limiter_s_own_reaches_the_caller(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """It is no timeout of the call or of the request, so it is not retried either."""

    class Limiter:
        async def acquire(self) -> None:
            raise TimeoutError("the limiter's own")

    with pytest.raises(TimeoutError, match="the limiter's own") as caught:
        await open_session(limiter=Limiter()).get_results(7)
    assert type(caught.value) is TimeoutError
    assert sim.request_count == 0
