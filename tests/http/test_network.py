"""A bad network: a proxy that fails on demand, and cancellation at every await."""

from __future__ import annotations

import asyncio
import gc
import gzip
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import aiohttp
import pytest
from yarl import URL

from promptlayer_exec import (
    ConnectionFailed,
    Execution,
    ExecutionStarted,
    InvalidResponse,
    PollPolicy,
    RequestError,
    RequestRetried,
    RequestTimeout,
    RetryPolicy,
    Session,
    SessionClosed,
    Snapshot,
    StartUnknown,
)
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

SHORT = 0.25  # a request timeout that should expire
LONG = 10.0  # a request timeout that should not expire
# Sleeps that end in the next step of the loop, so that steps can be counted.
AT_ONCE = RetryPolicy(base=0.0)
NO_TIME = "0.000000001"


Action: TypeAlias = Callable[[Any], Awaitable[None]]
Framing: TypeAlias = Callable[[bytes, bytes], tuple[bytes, bytes]]


def sized(head: bytes, body: bytes) -> tuple[bytes, bytes]:
    """State the body's length in the head."""
    return re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head), body


def chunked(head: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Send the body in two chunks."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:2], body[2:]))
    head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
    return head, chunks + b"0\r\n\r\n"


async def behave(request: Any) -> None:
    """Forward the request and its answer."""
    await request.send(b"".join(await request.fetch()))


async def reset(request: Any) -> None:
    """End the connection with a TCP reset."""
    request.reset()


async def silence(request: Any) -> None:
    """Send nothing more."""
    await request.hold()


async def cut(request: Any) -> None:
    """Close the connection cleanly."""
    request.close()


def stop(after: str, ending: Action, framing: Framing = sized) -> Action:
    """Return an action that sends a part of the answer and then stops."""

    async def action(request: Any) -> None:
        head, body = framing(*await request.fetch())
        size = {
            "nothing": 0,
            "half the head": len(head) // 2,
            "the head": len(head),
            "half the body": len(head) + len(body) // 2,
        }[after]
        await request.send((head + body)[:size])
        await ending(request)

    return action


def trickle(pause: float, size: int = 1) -> Action:
    """Return an action that sends the answer in small pieces."""

    async def action(request: Any) -> None:
        data = b"".join(await request.fetch())
        for start in range(0, len(data), size):
            await request.send(data[start : start + size])
            await request.hold(pause)

    return action


async def corrupt_text(request: Any) -> None:
    """Answer with a body that is not valid UTF-8."""
    head, body = await request.fetch()
    middle = len(body) // 2
    await request.send(head + body[:middle] + b"\xff" + body[middle + 1 :])


async def corrupt_gzip(request: Any) -> None:
    """Answer with a compressed body that has one wrong byte."""
    head, body = await request.fetch()
    packed = bytearray(gzip.compress(body))
    packed[-8] ^= 0xFF  # in the checksum
    answer = sized(head[:-2] + b"Content-Encoding: gzip\r\n\r\n", bytes(packed))
    await request.send(b"".join(answer))


@pytest.fixture
async def proxy(raw_server: Any, sim: Simulator) -> AsyncIterator[Any]:
    """Return a server of raw answers that forwards requests to `sim`.

    At the end of the test, the session must have closed its connections.
    """
    raw_server.upstream = URL(sim.base_url).port
    raw_server.respond = behave
    yield raw_server
    await raw_server.wait_until_closed()


@pytest.fixture
def connect(proxy: Any, open_session: Callable[..., Session]) -> Callable[..., Session]:
    """Return a function that makes sessions that reach `sim` through `proxy`."""

    def make(**overrides: Any) -> Session:
        return open_session(base_url=proxy.url, **overrides)

    return make


NODES = {"Plan": "done", "Answer": "42"}


@pytest.fixture
def done(sim: Simulator) -> int:
    """Return the id of an execution that is complete."""
    return sim.add_execution(
        Scenario([SimNode("Plan", "done"), SimNode("Answer", "42", is_output_node=True)])
    )


def values(snapshot: Snapshot) -> dict[str, Any]:
    """Return the nodes' values."""
    return {name: node.value for name, node in snapshot.nodes.items()}


@dataclass(frozen=True)
class Failure:
    """A failure of one request.

    Attributes:
        action: what the proxy does.
        error: the error of a GET.
        request_timeout: the session's setting, in seconds.
        reaches_server: whether the server gets the request.
    """

    action: Action
    error: type[RequestError]
    request_timeout: float = LONG
    reaches_server: bool = True


FAILURES = {
    "reset on arrival": Failure(reset, ConnectionFailed, reaches_server=False),
    "reset before the head": Failure(stop("nothing", reset), ConnectionFailed),
    "reset within the head": Failure(stop("half the head", reset), ConnectionFailed),
    "reset after the head": Failure(stop("the head", reset), InvalidResponse),
    "reset within the body": Failure(stop("half the body", reset), InvalidResponse),
    "cut before the head": Failure(stop("nothing", cut), ConnectionFailed),
    "cut within the head": Failure(stop("half the head", cut), ConnectionFailed),
    "cut after the head": Failure(stop("the head", cut), InvalidResponse),
    "cut within the body": Failure(stop("half the body", cut), InvalidResponse),
    "cut within a chunk": Failure(stop("half the body", cut, chunked), InvalidResponse),
    "silence": Failure(stop("nothing", silence), RequestTimeout, SHORT),
    "silence within the body": Failure(stop("half the body", silence), RequestTimeout, SHORT),
    "a byte every 50 ms": Failure(trickle(0.05), RequestTimeout, SHORT),
    "corrupt UTF-8": Failure(corrupt_text, InvalidResponse),
    "corrupt gzip": Failure(corrupt_gzip, InvalidResponse),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_a_watch_survives_it(
    connect: Callable[..., Session],
    proxy: Any,
    sim: Simulator,
    held: int,
    recorder: Any,
    *,
    failure: Failure,
) -> None:
    """Every follower gets the complete snapshot at the end, and no poll twice."""
    execution = connect(request_timeout=failure.request_timeout).execution(held)
    waiting = asyncio.create_task(execution.wait())
    polls = []
    async with aclosing(execution.stream()) as snapshots:
        async for snapshot in snapshots:
            polls.append(snapshot.poll)
            if snapshot.poll == 1:
                proxy.answers.append(failure.action)
            elif snapshot.poll == 2:
                sim.finish(held, "Answer")
    assert polls == [1, 2, 3]
    assert (values(snapshot), await waiting) == (NODES, snapshot)
    (retried,) = recorder.of(RequestRetried)
    assert type(retried.error) is failure.error
    assert sim.request_count == 3 + failure.reaches_server


async def test_an_answer_that_trickles_in_is_read(
    connect: Callable[..., Session], proxy: Any, flow: str, recorder: Any
) -> None:
    """A slow answer is a good answer, also to a start."""
    proxy.answers.extend([trickle(0.0), trickle(0.0)])
    execution = await connect().start(flow)
    assert (await execution.snapshot()).complete
    assert recorder.of(RequestRetried) == []
    assert proxy.count("POST") == 1


async def test_a_watch_continues_when_the_server_is_back(
    connect: Callable[..., Session], proxy: Any, sim: Simulator, held: int, recorder: Any
) -> None:
    """The final node map has exactly what happened while the server was down."""
    session = connect()
    waiting = asyncio.create_task(session.execution(held).wait())
    async with aclosing(session.execution(held).stream()) as snapshots:
        first = await anext(snapshots)
        await proxy.refuse()
        for _ in range(3):
            refused = await recorder.next(RequestRetried)
            assert type(refused.error) is ConnectionFailed
        sim.finish(held, "Answer", value={"deep": [1.5, None]})
        await proxy.listen()
        second = await anext(snapshots)
        assert [snapshot async for snapshot in snapshots] == []
    assert await waiting is second
    assert not first.complete
    assert (second.complete, second.poll) == (True, 2)
    assert values(second) == {"Plan": "done", "Answer": {"deep": [1.5, None]}}
    assert second.raw == (await session.get_results(held, return_all_outputs=True)).raw
    assert second.times["Plan"] == first.times["Plan"]


@pytest.fixture
def flow(sim: Simulator) -> str:
    """Return the name of a workflow."""
    sim.add_workflow("flow", Scenario([SimNode("Answer", "42", is_output_node=True)]))
    return "flow"


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings in the library's log."""
    records = [record for record in caplog.records if record.name == "promptlayer_exec"]
    assert {record.levelname for record in records} <= {"WARNING"}
    return [
        record.getMessage()
        for record in records
        if record.levelno == logging.WARNING and ". Trying again" not in record.getMessage()
    ]


def started(sim: Simulator) -> list[int]:
    """Return the ids of the runs that the server started."""
    return [run.execution_id for run in sim.runs]


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_a_start_whose_answer_is_lost_is_unknown(
    connect: Callable[..., Session],
    proxy: Any,
    sim: Simulator,
    flow: str,
    recorder: Any,
    *,
    failure: Failure,
) -> None:
    """One request is sent, whatever the policy allows; the error has the workflow and the cause."""
    session = connect(request_timeout=failure.request_timeout)
    proxy.answers.append(failure.action)
    with pytest.raises(StartUnknown) as caught:
        await session.start(flow, {"question": "?"})
    error = caught.value
    assert (error.workflow, error.execution_id, error.last_snapshot) == (flow, None, None)
    assert error.reason
    assert type(error.__cause__) is failure.error
    assert error.__cause__.__cause__ is not None
    assert recorder.of(RequestRetried) == recorder.of(ExecutionStarted) == []
    assert len(proxy.writers) == 1
    assert proxy.count("POST") == 1
    assert len(started(sim)) == failure.reaches_server


async def test_a_start_that_is_lost_after_a_429_is_unknown(
    connect: Callable[..., Session], proxy: Any, sim: Simulator, flow: str
) -> None:
    """The refusal of the first request says nothing about the second."""
    sim.inject(Fault.status(429, retry_after=0.01))
    proxy.answers.extend([behave, stop("nothing", reset)])
    with pytest.raises(StartUnknown):
        await connect().start(flow)
    assert proxy.count("POST") == 2
    assert len(started(sim)) == 1


async def test_a_start_waits_for_a_server_that_is_not_up_yet(
    connect: Callable[..., Session], proxy: Any, sim: Simulator, flow: str, recorder: Any
) -> None:
    """A refused connection is retried, and the request is sent once."""
    await proxy.refuse()
    starting = asyncio.create_task(connect().start(flow))
    for _ in range(3):
        refused = await recorder.next(RequestRetried)
        assert type(refused.error) is ConnectionFailed
        assert refused.execution_id is None
    await proxy.listen()
    execution = await starting
    assert started(sim) == [execution.id]
    assert proxy.count("POST") == 1


@pytest.mark.parametrize(
    "base_url", [None, "https://nowhere.invalid"], ids=["refused port", "unknown name"]
)
async def test_a_start_that_never_reaches_a_server_is_connection_failed(
    proxy: Any, flow: str, base_url: str | None
) -> None:
    """Once `outage` has passed, it is certain that nothing was started."""
    await proxy.refuse()
    retry = RetryPolicy(outage=0.02, base=0.001)
    async with Session("key", base_url=base_url or proxy.url, retry=retry) as session:
        with pytest.raises(ConnectionFailed) as caught:
            await session.start(flow)
    assert caught.value.attempts > 1
    assert len(proxy.writers) == 0


@pytest.mark.parametrize("refused_by", ["the server", "the network"])
@pytest.mark.parametrize("interrupt", [asyncio.Task.cancel, None], ids=["cancelled", "closed"])
async def test_a_start_that_is_abandoned_between_attempts_is_not_sent(
    connect: Callable[..., Session],
    proxy: Any,
    sim: Simulator,
    flow: str,
    recorder: Any,
    *,
    caplog: pytest.LogCaptureFixture,
    refused_by: str,
    interrupt: Callable[[Any], bool] | None,
) -> None:
    """It cannot have started anything, so nothing more is sent and nothing is logged."""
    session = connect(retry=RetryPolicy(base=3600.0, ceiling=7200.0, outage=1e6))
    if refused_by == "the server":
        sim.inject(Fault.status(429, retry_after=3600))
    else:
        await proxy.refuse()
    starting = asyncio.create_task(session.start(flow))
    await recorder.next(RequestRetried)
    if interrupt is not None:
        interrupt(starting)
    await session.aclose()
    (outcome,) = await asyncio.gather(starting, return_exceptions=True)
    assert type(outcome) is (SessionClosed if interrupt is None else asyncio.CancelledError)
    assert getattr(outcome, "execution_id", None) is None
    assert started(sim) == []
    assert warnings_in(caplog) == []


async def test_a_start_of_a_borrowed_session_whose_answer_is_lost_is_not_sent_again(
    connect: Callable[..., Session], proxy: Any, sim: Simulator, flow: str
) -> None:
    """Not even by aiohttp."""
    proxy.answers.append(stop("nothing", reset))
    async with aiohttp.ClientSession() as http, connect(http=http) as session:
        with pytest.raises(StartUnknown):
            await session.start(flow)
    assert proxy.count("POST") == len(started(sim)) == 1


def test_a_start_is_logged_when_its_loop_ends(
    threaded_sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """`asyncio.run` cancels every task, and the log still says that a run may have started."""
    threaded_sim.add_workflow("flow", Scenario([]))
    threaded_sim.inject(Fault.stall())

    async def main() -> None:
        session = Session(threaded_sim.api_key, base_url=threaded_sim.base_url, check_inputs=False)
        starting = asyncio.create_task(session.start("flow"))
        await threaded_sim.wait_for_requests(1)
        assert not starting.done()

    asyncio.run(main())
    (warning,) = warnings_in(caplog)
    assert "'flow'" in warning


async def loop_steps(count: int) -> None:
    """Let the event loop run for some steps."""
    for _ in range(count):
        await asyncio.sleep(0)


Operation: TypeAlias = Callable[[Session, Any], Awaitable[Any]]

OPERATIONS: dict[str, Operation] = {
    "get_results": lambda session, ids: session.get_results(ids.done),
    "wait": lambda session, ids: session.execution(ids.done).wait(),
    "output": lambda session, ids: session.execution(ids.rivals).output(),
    "start": lambda session, ids: session.start(ids.flow),
}


@dataclass(frozen=True)
class Ids:
    """What the operations use: `rivals` has two output nodes, so `output` must send a request."""

    done: int
    rivals: int
    flow: str


@pytest.fixture
def ids(sim: Simulator, done: int, flow: str) -> Ids:
    """Return executions that are complete, and a workflow."""
    nodes = [SimNode(name, name, is_output_node=True) for name in "AB"]
    return Ids(done, sim.add_execution(Scenario(nodes)), flow)


class Run:
    """An operation that runs in a task, to be interrupted."""

    def __init__(self, session: Session, operate: Callable[[], Awaitable[Any]]) -> None:
        self.session = session
        self.scope = asyncio.timeout(None)
        self._operate = operate
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> Any:
        async with self.scope:
            return await self._operate()

    async def outcome(self) -> Any:
        """Return the operation's result or error."""
        async with asyncio.timeout(LONG):
            (outcome,) = await asyncio.gather(self.task, return_exceptions=True)
        return outcome


async def cancel(run: Run) -> None:
    """Cancel the task."""
    run.task.cancel()


async def time_out(run: Run) -> None:
    """Let the `asyncio.timeout` around the operation expire."""
    await loop_steps(1)  # to be entered
    if not run.task.done():
        run.scope.reschedule(0.0)


async def close(run: Run) -> None:
    """Close the session."""
    await run.session.aclose()


INTERRUPTIONS: dict[Callable[[Run], Awaitable[None]], type[BaseException]] = {
    cancel: asyncio.CancelledError,
    time_out: TimeoutError,
    close: SessionClosed,
}
by_each_interruption = pytest.mark.parametrize(
    "interrupt", INTERRUPTIONS, ids=[interrupt.__name__ for interrupt in INTERRUPTIONS]
)


async def until_it_ends_by_itself(
    run: Callable[[], Run], interrupt: Callable[[Run], Awaitable[None]]
) -> AsyncIterator[tuple[Run, Any]]:
    """Interrupt a run after 0, 1, 2 ... steps of the loop, and yield each run with its outcome."""
    for count in range(2000):
        this = run()
        await loop_steps(count)
        if this.task.done():
            yield this, await this.outcome()
            return
        await interrupt(this)
        await loop_steps(3)
        assert this.task.done(), "it was not released at once"
        yield this, await this.outcome()
    raise AssertionError("it never ended by itself")


@pytest.fixture(
    params=[
        "plain tasks",
        pytest.param(
            "eager tasks",
            marks=pytest.mark.skipif(
                not hasattr(asyncio, "eager_task_factory"), reason="new in Python 3.12"
            ),
        ),
    ]
)
async def tasks(request: pytest.FixtureRequest) -> None:
    """Let the loop create plain or eager tasks."""
    if request.param == "eager tasks":
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)


@by_each_interruption
@pytest.mark.parametrize("operate", OPERATIONS.values(), ids=OPERATIONS)
async def test_an_operation_can_be_interrupted_at_every_await(
    open_session: Callable[..., Session],
    ids: Ids,
    tasks: None,
    our_tasks: Any,
    *,
    operate: Operation,
    interrupt: Callable[[Run], Awaitable[None]],
) -> None:
    """The caller gets the interruption at once, and no task remains when the session closes."""

    def run() -> Run:
        session = open_session()
        return Run(session, lambda: operate(session, ids))

    outcomes = []
    async for this, outcome in until_it_ends_by_itself(run, interrupt):
        outcomes.append(outcome)
        await this.session.aclose()
        assert our_tasks() == []
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(error) for error in errors} == {INTERRUPTIONS[interrupt]}
    assert len(errors) > 5
    assert not isinstance(outcomes[-1], BaseException)
    if interrupt is close and operate is not OPERATIONS["start"]:
        assert {error.execution_id for error in errors} <= {ids.done, ids.rivals}
    gc.collect()  # anything left open would warn


def refused_first(sim: Simulator, proxy: Any) -> None:
    """Refuse the first request with a 429."""
    sim.inject(Fault.status(429, retry_after=NO_TIME))


def answered_in_pieces(sim: Simulator, proxy: Any) -> None:
    """Send the answer in many pieces."""
    proxy.answers.append(trickle(0.0, size=24))


@by_each_interruption
@pytest.mark.parametrize(
    "prepare", [None, refused_first, answered_in_pieces], ids=["smooth", "refused", "in pieces"]
)
async def test_no_run_is_lost_wherever_its_start_is_interrupted(
    connect: Callable[..., Session],
    proxy: Any,
    sim: Simulator,
    flow: str,
    recorder: Any,
    *,
    tasks: None,
    caplog: pytest.LogCaptureFixture,
    interrupt: Callable[[Run], Awaitable[None]],
    prepare: Callable[[Simulator, Any], None] | None,
) -> None:
    """Every run on the server is returned, or reported and logged as abandoned."""

    def run() -> Run:
        sim.clear_faults()
        proxy.answers.clear()
        if prepare is not None:
            prepare(sim, proxy)
        session = connect(retry=AT_ONCE)
        return Run(session, lambda: session.start(flow))

    returned, abandoned, in_errors = [], [], []
    async for this, outcome in until_it_ends_by_itself(run, interrupt):
        known = len(returned) + len(abandoned)
        await this.session.aclose()
        if isinstance(outcome, Execution):
            returned.append(outcome.id)
        else:
            assert type(outcome) is INTERRUPTIONS[interrupt]
            abandoned += started(sim)[known:]
        if isinstance(outcome, SessionClosed) and outcome.execution_id is not None:
            in_errors.append(outcome.execution_id)
    await loop_steps(20)  # wait for late runs
    assert abandoned
    assert len(started(sim)) == len(returned) + len(abandoned)
    events = {event.execution_id: event.abandoned for event in recorder.of(ExecutionStarted)}
    assert events == {**dict.fromkeys(returned, False), **dict.fromkeys(abandoned, True)}
    assert len(recorder.of(ExecutionStarted)) == len(events)
    warnings = warnings_in(caplog)
    assert all(f"execution {i} " in w for i, w in zip(abandoned, warnings, strict=True))
    assert in_errors == (abandoned if interrupt is close else [])


@pytest.mark.parametrize("operate", OPERATIONS.values(), ids=OPERATIONS)
async def test_a_session_works_after_each_cancellation(
    open_session: Callable[..., Session],
    sim: Simulator,
    ids: Ids,
    our_tasks: Any,
    *,
    operate: Operation,
) -> None:
    """The next call is answered, also after a cancellation between polls or attempts."""
    session = open_session(poll=PollPolicy.fixed(1e-9), retry=AT_ONCE)
    await session.get_results(ids.done)
    resting = our_tasks()

    def run() -> Run:
        sim.clear_faults()
        if operate is not OPERATIONS["start"]:
            sim.inject(Fault.status(503))
            sim.inject(Fault.status(202, body=b'{"Answer": {"status": "RUNNING"}}'))
        return Run(session, lambda: operate(session, ids))

    outcomes = []
    async for _, outcome in until_it_ends_by_itself(run, cancel):
        outcomes.append(outcome)
        if operate is not OPERATIONS["start"]:  # a start on the wire goes on without its caller
            assert our_tasks() == resting
        if len(outcomes) % 5 == 0:
            sim.clear_faults()
            assert (await session.get_results(ids.done)).value == "42"
    assert {type(outcome) for outcome in outcomes[:-1]} == {asyncio.CancelledError}
    assert not isinstance(outcomes[-1], BaseException)
