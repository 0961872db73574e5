"""Starts: each is sent at most once, and no started run is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import pickle
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import anyio
import pytest

from promptlayer_exec import (
    BadRequest,
    ConfigurationError,
    ConnectionFailed,
    Execution,
    ExecutionStarted,
    ExecutionTimeout,
    NotFound,
    Polled,
    PollPolicy,
    RateLimited,
    RequestRetried,
    RequestTimeout,
    RetryPolicy,
    Session,
    SessionClosed,
    StartFailed,
    StartRequest,
    StartUnknown,
    StatusError,
    Throttled,
    Unauthorized,
    UnprocessableEntity,
)
from promptlayer_exec import _integration as integration
from promptlayer_exec._api.executions import Started
from promptlayer_exec._engine.lifetime import Lifetime
from promptlayer_exec._engine.retry import RetryState
from promptlayer_exec._engine.start import Start
from promptlayer_exec._policies import Deadline
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

DONE = Scenario([SimNode("Answer", "42", is_output_node=True)])
NAME = "a/b?c#d é"


@pytest.fixture(autouse=True)
def _workflow(request: pytest.FixtureRequest) -> None:
    if "sim" in request.fixturenames:
        request.getfixturevalue("sim").add_workflow(NAME, DONE)


async def on_the_wire(sim: Simulator, session: Session) -> asyncio.Task[Execution]:
    """Return a start whose request has reached the server."""
    before = posts(sim)
    task = asyncio.create_task(session.start(NAME))
    while posts(sim) == before:  # a watch may poll meanwhile
        await sim.wait_for_requests(sim.request_count + 1)
    return task


def posts(sim: Simulator) -> int:
    """Return how many starts reached the server."""
    return sum(request.method == "POST" for request in sim.requests)


async def test_a_start_is_one_request_with_all_that_was_asked(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """Path, key, type and body are as documented, and the answer becomes a handle."""
    execution = await session.start(
        NAME,
        {"topic": "cats", "rows": [1, {"x": None}]},
        label="prod",
        metadata={"user": "maria"},
        callback_url="http://127.0.0.1:9/done",
    )
    (request,) = sim.requests
    assert (request.method, request.path) == ("POST", "/workflows/a%2Fb%3Fc%23d%20%C3%A9/run")
    assert request.headers["X-API-KEY"] == sim.api_key
    assert request.headers["Content-Type"] == "application/json"
    assert json.loads(request.body) == {
        "input_variables": {"topic": "cats", "rows": [1, {"x": None}]},
        "workflow_label_name": "prod",
        "metadata": {"user": "maria"},
        "callback_url": "http://127.0.0.1:9/done",
    }
    (run,) = sim.runs
    assert execution == session.execution(run.execution_id)
    assert (execution.id, execution.workflow, execution.warning) == (run.execution_id, NAME, None)
    (event,) = recorder.of(ExecutionStarted)
    assert event.execution_id == execution.id
    assert event.abandoned is False
    assert event.request == StartRequest(
        NAME,
        {"topic": "cats", "rows": [1, {"x": None}]},
        label="prod",
        metadata={"user": "maria"},
        callback_url="http://127.0.0.1:9/done",
    )


async def test_a_started_execution_is_followed_like_any_other(session: Session) -> None:
    """A started execution is followed from its start to the complete snapshot."""
    snapshot = await (await session.start(NAME)).wait()
    assert snapshot.nodes["Answer"].value == "42"


async def test_a_workflow_may_be_given_by_id_and_a_version_by_number(
    sim: Simulator, session: Session
) -> None:
    """They are sent as numbers."""
    workflow_id = sim.add_workflow("other", DONE)
    execution = await session.start(workflow_id, version=3)
    assert execution.workflow == workflow_id
    assert sim.requests[0].path == f"/workflows/{workflow_id}/run"
    assert json.loads(sim.requests[0].body) == {
        "input_variables": {},
        "workflow_version_number": 3,
    }


async def test_a_key_that_is_a_word_of_the_answer_costs_no_id() -> None:
    """Only the warning is redacted."""
    async with (
        Simulator(api_key="execution") as sim,
        Session("execution", base_url=sim.base_url) as session,
    ):
        sim.add_workflow(NAME, DONE)
        assert (await session.start(NAME)).id == sim.runs[0].execution_id


async def test_the_key_is_redacted_in_the_server_s_warning(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes to the log."""
    sim.add_workflow("careless", DONE, warning=f"the key {sim.api_key} expires soon")
    assert (await session.start("careless")).warning == "the key *** expires soon"
    await session.run("careless")
    assert "the key *** expires soon" in caplog.text
    assert sim.api_key not in caplog.text


async def test_the_server_s_warning_is_on_the_handle(sim: Simulator, session: Session) -> None:
    """The warning has the server's words."""
    sim.add_workflow("careless", DONE, warning="missing input variables: topic")
    assert (await session.start("careless")).warning == "missing input variables: topic"


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"workflow": ""}, ValueError, "not be empty"),
        ({"workflow": None}, TypeError, "a name or an int id"),
        ({"workflow": NAME, "label": "a", "version": 1}, ValueError, "not both"),
        ({"workflow": NAME, "metadata": {"n": 1}}, TypeError, r"metadata\['n'\] must be a str"),
        ({"workflow": NAME, "inputs": {"when": object()}}, TypeError, "inputs.when"),
        (
            {"workflow": NAME, "inputs": {"rows": [0, float("nan")]}},
            ValueError,
            r"inputs.rows\[1\]",
        ),
    ],
)
async def test_unusable_arguments_are_named_before_any_io(
    arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    """Unusable arguments are named before a missing key."""
    with pytest.raises(error, match=said) as caught:
        await Session().start(**arguments)
    assert not isinstance(caught.value, ConfigurationError)


LOST = {
    "never answered": Fault.stall(),
    "reset after reading": Fault.disconnect(),
    "408": Fault.status(408),
    "500": Fault.status(500),
    "502": Fault.status(502),
    "503 with Retry-After": Fault.status(503, retry_after=0.01),
    "201 without an id": Fault.status(201, body=b'{"success": true, "message": "created"}'),
    "201 with null for an id": Fault.status(201, body=b'{"workflow_version_execution_id": null}'),
    "201 with an id out of range": Fault.status(201, body=b'{"workflow_version_execution_id": 0}'),
    "201 with true for an id": Fault.status(201, body=b'{"workflow_version_execution_id": true}'),
    "201 that is no object": Fault.status(201, body=b"[787]"),
    "204": Fault.status(204, body=b""),
    "200 that is HTML": Fault.status(200, body=b"<html>hello</html>"),
    "cut short": Fault.truncate(),
    "too large": Fault.oversize(200_000),
    "trickling": Fault.trickle(interval=0.05),
}


@pytest.mark.parametrize("fault", LOST.values(), ids=LOST)
async def test_a_lost_answer_is_start_unknown_and_never_repeated(
    sim: Simulator, open_session: Callable[..., Session], recorder: Any, fault: Fault
) -> None:
    """The run may have started: there is one POST, and the error has the workflow and the cause."""
    session = open_session(request_timeout=0.5, max_response_bytes=100_000)
    sim.inject(fault)
    with pytest.raises(StartUnknown) as caught:
        await session.start(NAME)
    error = caught.value
    assert posts(sim) == 1
    assert (error.workflow, error.execution_id) == (NAME, None)
    assert error.reason
    assert error.reason in str(error)
    assert "may have started" in str(error)
    assert error.__cause__ is not None
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.workflow, copy.reason, str(copy)) == (NAME, error.reason, str(error))
    assert [event.error for event in recorder.events] == [error]
    assert await (await session.start(NAME)).wait()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (302, StatusError),
        (307, StatusError),
        (400, BadRequest),
        (401, Unauthorized),
        (404, NotFound),
        (409, StatusError),
        (422, UnprocessableEntity),
        (425, StatusError),
    ],
)
async def test_a_refused_start_is_its_status_error(
    sim: Simulator, session: Session, status: int, expected: type[StatusError]
) -> None:
    """Nothing is started or repeated, although a watch would retry some of these statuses."""
    sim.inject(Fault.status(status, retry_after=0.01))
    with pytest.raises(expected) as caught:
        await session.start(NAME)
    assert type(caught.value) is expected
    assert caught.value.status == status
    assert posts(sim) == 1


async def test_a_start_refused_with_429_is_sent_again(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """The server refused the start, so no run can have started."""
    sim.inject(Fault.status(429, times=2, retry_after=0.02))
    execution = await session.start(NAME)
    assert posts(sim) == 3
    assert [run.execution_id for run in sim.runs] == [execution.id]
    assert [type(event) for event in recorder.events] == [
        *[Throttled, RequestRetried] * 2,
        ExecutionStarted,
    ]
    first, second, third = (request.at for request in sim.requests)
    assert second - first >= 0.02
    assert third - second >= 0.02


async def test_a_429_that_the_policy_does_not_survive_is_raised(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """With an `outage` of 0, it is raised to the caller."""
    session = open_session(retry=RetryPolicy(outage=0.0))
    sim.inject(Fault.status(429))
    with pytest.raises(RateLimited):
        await session.start(NAME)
    assert posts(sim) == 1


async def test_a_lost_answer_after_a_429_is_not_repeated(sim: Simulator, session: Session) -> None:
    """Each attempt counts by itself."""
    sim.inject(Fault.status(429))
    sim.inject(Fault.disconnect())
    with pytest.raises(StartUnknown):
        await session.start(NAME)
    assert posts(sim) == 2


@pytest.fixture
def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


async def test_a_server_that_comes_up_in_time_gets_one_start(
    open_session: Callable[..., Session], recorder: Any, free_port: int
) -> None:
    """A refused connection has sent nothing, so the start is retried."""
    session = open_session(base_url=f"http://127.0.0.1:{free_port}")
    starting = asyncio.create_task(session.start(NAME))
    retried = await recorder.next(RequestRetried)
    assert isinstance(retried.error, ConnectionFailed)
    async with Simulator(port=free_port) as late:
        late.add_workflow(NAME, DONE)
        execution = await starting
        assert [run.execution_id for run in late.runs] == [execution.id]


@pytest.mark.parametrize("wait", ["connecting", "rate", "borrowed"])
async def test_a_deadline_while_connecting_names_the_connection(
    open_session: Callable[..., Session], wait: str
) -> None:
    """What caused it is a `RequestTimeout`, and not the rate: a batch takes it for an outage.

    In a borrowed session the start may wait for a connection that others use.
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it never answers the handshake
        base_url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        async with aiohttp.ClientSession() as theirs:
            http = theirs if wait == "borrowed" else None
            session = open_session(base_url=base_url, wait_timeout=0.05, rate=0.01, http=http)
            if wait == "rate":
                with pytest.raises(ExecutionTimeout):
                    await session.start(NAME)
            with pytest.raises(ExecutionTimeout) as caught:
                await session.start(NAME)
    error = caught.value
    assert isinstance(error.__cause__, RequestTimeout) == (wait == "connecting")
    assert ("no connection to https://127.0.0.1" in str(error)) == (wait == "connecting")


@pytest.mark.parametrize("where", ["refused", "unresolvable"])
async def test_a_server_that_cannot_be_reached_is_connection_failed(
    sim: Simulator, open_session: Callable[..., Session], free_port: int, where: str
) -> None:
    """It is raised after several attempts, and none of them can have started a run."""
    base_url = {
        "refused": f"http://127.0.0.1:{free_port}",
        "unresolvable": "https://nowhere.invalid",
    }[where]
    retry = RetryPolicy(outage=0.05, base=0.02, ceiling=0.04)
    session = open_session(base_url=base_url, retry=retry)
    with pytest.raises(ConnectionFailed) as caught:
        await session.start(NAME)
    assert caught.value.attempts > 1
    assert sim.request_count == 0


async def test_a_connection_that_is_never_made_is_not_an_unknown_start(
    open_session: Callable[..., Session], recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timeout before the request was sent is not `StartUnknown`."""
    async with aiohttp.ClientSession(connector=_StuckConnector()) as http:
        session = open_session(
            http=http, request_timeout=0.05, retry=RetryPolicy(outage=0.06, base=0.01)
        )
        with pytest.raises(TimeoutError) as caught:
            await session.start(NAME)
    assert not isinstance(caught.value, StartUnknown)
    assert len(recorder.of(RequestRetried)) >= 1


class _StuckConnector(aiohttp.TCPConnector):
    async def connect(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.Event().wait()


async def test_a_start_has_a_connection_of_its_own(sim: Simulator, session: Session) -> None:
    """A reused connection may be closing, so a start opens one and does not keep it."""
    await session.get_results(sim.add_execution(DONE))
    for _ in range(2):
        await session.start(NAME)
    assert [r.headers.get("Connection") for r in sim.requests] == [None, "close", "close"]


async def test_starts_do_not_wait_behind_polls_nor_polls_behind_starts(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """Starts and polls have separate slots."""
    session = open_session(max_connections=2, request_timeout=5.0)
    sim.inject(Fault.stall())
    stalled = asyncio.create_task(session.get_results(held))
    await sim.wait_for_requests(1)
    await session.start(NAME)
    stalled.cancel()
    sim.inject(Fault.delay(0.2))
    starting = await on_the_wire(sim, session)
    assert not (await session.get_results(held)).complete
    assert not starting.done()
    await starting


async def test_a_woken_poll_waits_for_one_other_at_most(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """However many polls wait for a connection."""
    session = open_session(max_connections=2, poll=PollPolicy.fixed(3600.0))
    following = asyncio.create_task(session.execution(held).wait())
    await sim.wait_for_requests(1)
    sim.inject(Fault.delay(0.05, times=None))
    others = [sim.add_execution(DONE) for _ in range(6)]
    reading = asyncio.gather(*(session.get_results(other) for other in others))
    await sim.wait_for_requests(2)
    assert session.wake(held)
    await reading
    asked = [int(request.query["workflow_version_execution_id"]) for request in sim.requests]
    assert asked[:2] == [held, others[0]]
    assert held in asked[2:4]
    following.cancel()


@pytest.mark.parametrize("limit", [1, 2, 0])
async def test_a_borrowed_session_starts_and_polls_within_its_own_limit(
    sim: Simulator, open_session: Callable[..., Session], limit: int
) -> None:
    """Even a session with one connection is enough."""
    connector = aiohttp.TCPConnector(limit=limit)
    async with aiohttp.ClientSession(connector=connector, headers={"X-Team": "a"}) as http:
        session = open_session(http=http)
        executions = await asyncio.gather(*(session.start(NAME) for _ in range(5)))
        await asyncio.gather(*(execution.wait() for execution in executions))
    assert {request.headers["X-Team"] for request in sim.requests} == {"a"}


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.status(400), BadRequest),
        (Fault.disconnect(), StartUnknown),
        (Fault.status(503), StartUnknown),
    ],
)
async def test_a_failed_start_is_an_event(
    sim: Simulator, session: Session, recorder: Any, fault: Fault, error: type[Exception]
) -> None:
    """It has the request, the error that the caller got, how long it took, and the server."""
    sim.inject(fault)
    with pytest.raises(error) as caught:
        await session.start(NAME, {"topic": "cats"})
    (event,) = recorder.of(StartFailed)
    assert event.error is caught.value
    assert event.request == StartRequest(NAME, {"topic": "cats"})
    assert 0.0 < event.duration < 10.0
    assert event.base_url == sim.base_url
    assert recorder.of(ExecutionStarted) == []


async def test_a_start_that_cannot_be_prepared_is_an_event(session: Session, recorder: Any) -> None:
    """Its inputs may be wrong, or the session closed; it has no server then."""
    with pytest.raises(TypeError):
        await session.start(NAME, {"when": object()})
    await session.aclose()
    with pytest.raises(SessionClosed):
        await session.start(NAME)
    events = recorder.of(StartFailed)
    assert [type(event.error) for event in events] == [TypeError, SessionClosed]
    assert {event.base_url for event in events} == {""}


# Cancelled callers and closed sessions


async def test_a_start_cancelled_on_the_wire_is_read_to_its_end_and_reported(
    sim: Simulator, session: Session, recorder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller is released at once; the id is in an event and in the log."""
    sim.inject(Fault.delay(0.05))
    starting = await on_the_wire(sim, session)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert recorder.of(ExecutionStarted) == []
    event = await recorder.next(ExecutionStarted)
    (run,) = sim.runs
    assert (event.execution_id, event.abandoned) == (run.execution_id, True)
    assert event.request.workflow == NAME
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("promptlayer_exec", logging.WARNING)
    assert str(run.execution_id) in record.getMessage()
    assert (await session.execution(run.execution_id).wait()).complete


async def test_a_start_cancelled_by_a_timeout_is_reported(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """`asyncio.timeout` also cancels the caller."""
    sim.inject(Fault.delay(0.2))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await session.start(NAME)
    assert (await recorder.next(ExecutionStarted)).abandoned


async def test_a_start_cancelled_before_it_was_sent_starts_nothing(
    sim: Simulator, open_session: Callable[..., Session], recorder: Any
) -> None:
    """A start that waits for the limiter ends with its caller."""
    allowed = asyncio.Event()
    asked = asyncio.Event()

    class Gate:
        async def acquire(self) -> None:
            asked.set()
            await allowed.wait()

    session = open_session(limiter=Gate())
    starting = asyncio.create_task(session.start(NAME))
    await asked.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    allowed.set()
    await session.start(NAME)
    assert posts(sim) == 1
    assert [event.abandoned for event in recorder.of(ExecutionStarted)] == [False]
    (failed,) = recorder.of(StartFailed)
    assert isinstance(failed.error, asyncio.CancelledError)
    assert (failed.execution_id, failed.request.workflow) == (None, NAME)


async def test_a_log_handler_that_raises_changes_nothing(
    sim: Simulator, session: Session, recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its error is printed; the session goes on, and its events are emitted."""

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            """Fail at each record."""
            raise LookupError("no log")

    sim.inject(Fault.delay(0.05))
    starting = await on_the_wire(sim, session)
    handler = Broken()
    logging.getLogger("promptlayer_exec").addHandler(handler)
    try:
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        event = await recorder.next(ExecutionStarted)
    finally:
        logging.getLogger("promptlayer_exec").removeHandler(handler)
    assert event.abandoned
    assert "LookupError: no log" in capsys.readouterr().err
    await session.start(NAME)


async def test_before_send_may_hold_a_start_back(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """Durable batches record the intent there; polls and other starts go on meanwhile."""
    hooks = Hooks()
    hooks.may_be_sent.clear()
    session = open_session()
    held = asyncio.create_task(integration.start(session, StartRequest(NAME), hooks=hooks))
    await hooks.is_ready.wait()
    other = await session.start(NAME)
    await other.output()
    assert posts(sim) == 1
    hooks.may_be_sent.set()
    assert (await held).id != other.id
    assert posts(sim) == 2


async def test_a_start_that_before_send_holds_too_long_is_tried_again(
    sim: Simulator, open_session: Callable[..., Session], recorder: Any
) -> None:
    """The error names the hook: the server did nothing wrong."""
    hooks = Hooks()
    hooks.may_be_sent.clear()
    session = open_session(request_timeout=0.2, retry=RetryPolicy(base=0.01))
    held = asyncio.create_task(integration.start(session, StartRequest(NAME), hooks=hooks))
    async with asyncio.timeout(10):
        await hooks.is_ready.wait()  # on a busy machine, connecting may take too long at first
        while hooks.calls[-1] != "not_sent":  # noqa: ASYNC110 - the list has no event
            await asyncio.sleep(0.01)
    hooks.may_be_sent.set()
    assert (await held).id == sim.runs[0].execution_id
    assert posts(sim) == 1
    errors = [str(event.error) for event in recorder.of(RequestRetried)]
    reason = "it was not sent within 0.2 s, because its before_send hook waited"
    assert any(reason in error for error in errors)


async def test_before_send_is_awaited_when_the_connection_stands(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """So not while the server refuses connections; attempts that started nothing are reported."""
    hooks = Hooks()
    async with Session("key", base_url="http://127.0.0.1:9", retry=RetryPolicy(outage=0.0)) as away:
        with pytest.raises(ConnectionFailed):
            await integration.start(away, StartRequest(NAME), hooks=hooks)
    assert hooks.calls == []
    sim.inject(Fault.status(429, retry_after=0.01))
    await integration.start(open_session(), StartRequest(NAME), hooks=hooks)
    assert hooks.calls == ["before_send", "not_sent", "before_send"]
    assert len(sim.runs) == 1


@pytest.mark.parametrize("how", ["a cancelled caller", "closing"])
async def test_before_send_may_clean_up_before_the_session_is_closed(
    session: Session, how: str
) -> None:
    """It is called by aiohttp in a task of its own, which would be left."""
    waits = asyncio.Event()
    cleaned_up = False

    class Tidy(Hooks):
        async def before_send(self) -> None:
            nonlocal cleaned_up
            waits.set()
            try:
                await asyncio.Event().wait()
            finally:
                for _ in range(50):
                    await asyncio.sleep(0)
                cleaned_up = True

    starting = asyncio.create_task(integration.start(session, StartRequest(NAME), hooks=Tidy()))
    await waits.wait()
    if how == "a cancelled caller":
        starting.cancel()
    await session.aclose()
    assert cleaned_up
    await asyncio.wait([starting])
    assert starting.cancelled() or isinstance(starting.exception(), SessionClosed)


async def test_not_sent_is_not_interrupted_because_the_caller_is_gone(
    sim: Simulator, session: Session
) -> None:
    """It takes back what was recorded before the start, which the server refused."""
    ended = asyncio.Event()

    class Slow(Hooks):
        async def not_sent(self) -> None:
            await asyncio.sleep(0)
            ended.set()

    sim.inject(Fault.status(429, times=None))
    request = StartRequest(NAME)
    starting = asyncio.create_task(integration.start(session, request, hooks=Slow()))
    await sim.wait_for_requests(1)
    starting.cancel()
    async with asyncio.timeout(5):
        await ended.wait()
    await session.aclose()
    assert posts(sim) == 1


async def test_not_sent_cannot_hold_a_caller_whose_deadline_has_passed(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """It has a second, as what suppresses a cancellation has."""

    class Endless(Hooks):
        async def not_sent(self) -> None:
            await asyncio.Event().wait()

    async def slow_429(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        response: aiohttp.ClientResponse = await handler(request)
        await asyncio.sleep(0.1)
        return response

    sim.inject(Fault.status(429, times=None))
    async with aiohttp.ClientSession(middlewares=[slow_429]) as http:
        session = open_session(http=http, wait_timeout=0.05)
        async with asyncio.timeout(5):
            with pytest.raises(ExecutionTimeout):
                await integration.start(session, StartRequest(NAME), hooks=Endless())
    assert posts(sim) == 1


async def test_an_error_of_before_send_is_raised_and_nothing_is_sent(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """It is no failure of the connection, so it is not retried."""
    hooks = Hooks()
    hooks.error = LookupError("no intent")
    with pytest.raises(LookupError, match="no intent"):
        await integration.start(open_session(), StartRequest(NAME), hooks=hooks)
    assert hooks.calls == ["before_send"]
    assert posts(sim) == 0


async def test_the_log_names_the_key_of_an_abandoned_start(
    sim: Simulator, open_session: Callable[..., Session], caplog: pytest.LogCaptureFixture
) -> None:
    """Both if it started and if that is not known."""
    session = open_session()
    for fault in (Fault.delay(0.05), Fault.disconnect()):
        hooks = Hooks()
        sim.inject(fault)
        starting = asyncio.create_task(
            integration.start(session, StartRequest(NAME, key="k7"), hooks=hooks)
        )
        await sim.wait_for_requests(sim.request_count + 1)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    await session.aclose()
    assert len(caplog.messages) == 2
    assert all("(key 'k7')" in message for message in caplog.messages)


class Hooks:
    """Hooks that keep what was called; the event is when `before_send` has been called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.is_ready = asyncio.Event()
        self.may_be_sent = asyncio.Event()
        self.may_be_sent.set()

    async def before_send(self) -> None:
        """Wait until the start may be sent, or raise the error."""
        self.calls.append("before_send")
        self.is_ready.set()
        await self.may_be_sent.wait()
        if self.error is not None:
            raise self.error

    async def not_sent(self) -> None:
        """Keep the call."""
        self.calls.append("not_sent")


async def test_closing_reads_a_start_on_the_wire_to_its_end(
    sim: Simulator, session: Session, recorder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its caller gets `SessionClosed` with the id, which is also in an event and in the log."""
    sim.inject(Fault.delay(0.05))
    starting = await on_the_wire(sim, session)
    await session.aclose()
    (run,) = sim.runs
    with pytest.raises(SessionClosed) as caught:
        await starting
    assert caught.value.execution_id == run.execution_id
    (event,) = recorder.of(ExecutionStarted)
    assert (event.execution_id, event.abandoned) == (run.execution_id, True)
    assert str(run.execution_id) in caplog.text


async def test_closing_awaits_an_abandoned_start_for_request_timeout_at_most(
    sim: Simulator, open_session: Callable[..., Session], caplog: pytest.LogCaptureFixture
) -> None:
    """The log says that its run may exist, because no caller remains to raise it to."""
    session = open_session(request_timeout=0.2)
    sim.inject(Fault.stall())
    starting = await on_the_wire(sim, session)
    starting.cancel()
    async with asyncio.timeout(10):
        await session.aclose()
    with pytest.raises(asyncio.CancelledError):
        await starting
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "may have started" in record.getMessage()
    assert repr(NAME) in record.getMessage()


async def test_closing_ends_everything_else_at_once_while_a_start_is_on_the_wire(
    sim: Simulator, session: Session, held: int, recorder: Any
) -> None:
    """Watches and calls do not wait for the start."""
    waiting = asyncio.create_task(session.execution(held).wait())
    await recorder.next(Polled)
    sim.inject(Fault.stall(None))  # the watch also polls
    calling = asyncio.create_task(session.get_results(held + 1))
    await sim.wait_for_requests(sim.request_count + 1)
    starting = await on_the_wire(sim, session)
    closing = asyncio.create_task(session.aclose())
    for released in (waiting, calling):
        with pytest.raises(SessionClosed):
            async with asyncio.timeout(5):
                await released
    assert not starting.done()
    assert not closing.done()
    closing.cancel()
    await sim.__aexit__(None, None, None)
    with pytest.raises(StartUnknown):
        await starting


async def test_closing_cancels_a_start_that_was_not_sent(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """A start that waits for its retry has started nothing."""
    sim.inject(Fault.status(429, times=None, retry_after=60))
    starting = asyncio.create_task(session.start(NAME))
    await recorder.next(RequestRetried)
    await session.aclose()
    with pytest.raises(SessionClosed) as caught:
        await starting
    assert caught.value.execution_id is None
    assert recorder.of(ExecutionStarted) == []


async def test_a_closed_session_starts_nothing(sim: Simulator, session: Session) -> None:
    """It raises `SessionClosed` and sends nothing."""
    await session.get_results(sim.add_execution(DONE))
    await session.aclose()
    with pytest.raises(SessionClosed):
        await session.start(NAME)
    assert posts(sim) == 0


async def test_a_start_that_cannot_be_sent_in_time_is_a_timeout(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """The error says that nothing was started, and what prevented the start."""
    session = open_session(wait_timeout=0.05)
    sim.inject(Fault.status(429, times=None, retry_after=60))
    with pytest.raises(
        ExecutionTimeout, match=r"could not send the start within 0\.05 s; no run was started"
    ) as caught:
        await session.start(NAME)
    assert isinstance(caught.value.__cause__, RateLimited)
    assert "429" in str(caught.value)
    assert "goes on at the server" not in str(caught.value)


# The grace for a 404


async def test_a_404_right_after_the_start_is_survived(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """The server may not know the execution yet; watches and single calls retry."""
    execution = await session.start(NAME)
    sim.inject(Fault.status(404, times=2))
    assert (await execution.snapshot()).complete
    sim.inject(Fault.status(404, times=2))
    assert (await session.execution(execution.id).wait()).complete
    assert [type(event.error) for event in recorder.of(RequestRetried)] == [NotFound] * 4


async def test_the_grace_for_a_404_ends(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """After `not_found_grace`, a 404 is raised."""
    session = open_session(retry=RetryPolicy(not_found_grace=0.05, base=0.01, ceiling=0.02))
    execution = await session.start(NAME)
    sim.inject(Fault.status(404, times=None))
    with pytest.raises(NotFound) as caught:
        await execution.wait()
    assert caught.value.attempts > 1


async def test_a_404_on_another_execution_is_raised_at_once(
    sim: Simulator, session: Session
) -> None:
    """An execution that this session did not start has no grace."""
    await session.start(NAME)
    with pytest.raises(NotFound) as caught:
        await session.execution(424242).wait()
    assert caught.value.attempts == 1


# Step by step, with an answer that the test gives


class Server:
    """A fake transport: it sends at once, and answers when the test sets `answer`."""

    def __init__(self) -> None:
        self.sent = asyncio.Event()
        self.answer: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        self.start: Any = None

    async def post(self, state: RetryState, once: Start) -> Started:
        """Wait for the answer."""
        self.start = once
        once.mark_sent()
        self.sent.set()
        return await asyncio.shield(self.answer)


@pytest.fixture
async def begin(recorder: Any) -> AsyncIterator[Callable[..., Any]]:
    """Return a function that runs a start and returns the task of its caller."""
    lifetime = Lifetime(AsyncExitStack())
    await lifetime.ready()

    def run(post: Any, *, timeout: float | None = None, state: Any = None) -> Any:
        state = state or RetryState(RetryPolicy(), 60.0)
        start = Start(StartRequest(NAME), post, state, emit=recorder, is_closing=lambda: False)
        lifetime.spawn(start.run)
        deadline = Deadline.after(timeout, now=anyio.current_time())
        return asyncio.create_task(start.result(deadline))

    yield run
    lifetime.close()
    await lifetime.wait_closed()


LOSS = RequestTimeout("no answer")


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (None, "execution 787 "),
        (LOSS, "may have started"),
        (NotFound("no", status=404, server_message=""), ""),
    ],
    ids=["started", "lost", "refused"],
)
@pytest.mark.parametrize("steps", range(5))
async def test_a_cancellation_beside_the_answer_loses_nothing(
    begin: Callable[..., Any],
    recorder: Any,
    caplog: pytest.LogCaptureFixture,
    *,
    error: Exception | None,
    logged: str,
    steps: int,
) -> None:
    """Whatever the step, a result that the caller does not get is reported."""
    server = Server()
    caller = begin(server.post)
    await server.sent.wait()
    if error is None:
        server.answer.set_result(Started(787, None))
    else:
        server.answer.set_exception(error)
    for _ in range(steps):
        await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    for _ in range(5):
        await asyncio.sleep(0)
    events = [(event.execution_id, event.abandoned) for event in recorder.of(ExecutionStarted)]
    failures = recorder.of(StartFailed)
    assert len(recorder.events) == 1
    if caller.cancelled():
        assert events == ([(787, True)] if error is None else [])
        assert logged in caplog.text
        assert len(caplog.records) == bool(logged)
        expected = [] if error is None else [StartUnknown if error is LOSS else NotFound]
        assert [type(failure.error) for failure in failures] == expected
    else:
        assert steps > 1
        assert events == ([(787, False)] if error is None else [])
        assert [failure.error for failure in failures] == (
            [] if error is None else [caller.exception()]
        )
        assert caplog.records == []


async def test_an_abandoned_start_that_is_refused_with_429_is_not_sent_again(
    begin: Callable[..., Any], recorder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing started, and the caller was cancelled, so it is not sent again."""
    server = Server()
    resent = False

    async def post(state: RetryState, once: Start) -> Started:
        nonlocal resent
        await server.post(state, once)
        once.mark_rejected()
        await once.not_sent()
        await asyncio.sleep(0)
        resent = True
        raise AssertionError

    caller = begin(post)
    await server.sent.wait()
    caller.cancel()
    await asyncio.wait([caller])
    server.answer.set_result(Started(787, None))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not resent
    (failed,) = recorder.events
    assert isinstance(failed.error, asyncio.CancelledError)
    assert caplog.records == []


async def test_a_cancelled_request_cannot_be_sent(begin: Callable[..., Any]) -> None:
    """This holds even if the body's writer runs before the cancellation arrives."""
    writer_may_run = asyncio.Event()
    refused: list[OSError] = []

    async def post(state: RetryState, once: Start) -> Started:
        async def write() -> None:
            await writer_may_run.wait()
            try:
                once.mark_sent()
            except OSError as error:
                refused.append(error)

        writer = asyncio.create_task(write())
        try:
            return await asyncio.Future()
        finally:
            await asyncio.wait([writer])

    caller = begin(post)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    writer_may_run.set()
    await asyncio.wait([caller])
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(refused) == 1


async def test_an_attempt_that_times_out_does_not_cancel_the_start(
    begin: Callable[..., Any],
) -> None:
    """A timeout cancels the task for a moment: nothing may be sent then, but it may be later."""
    refused: list[OSError] = []

    async def post(state: RetryState, once: Start) -> Started:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            once.mark_sent()
        except OSError as error:
            refused.append(error)
        task.uncancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        assert not once.cancelled
        once.mark_sent()
        return Started(787, None)

    assert (await begin(post)).execution_id == 787
    assert len(refused) == 1


async def test_a_caller_that_is_closed_before_the_first_step_starts_nothing(recorder: Any) -> None:
    """The request finds that its caller is closed."""
    server = Server()
    state = RetryState(RetryPolicy(), 60.0)
    start = Start(StartRequest(NAME), server.post, state, emit=recorder, is_closing=lambda: False)
    caller = start.result(Deadline(None, 0.0))
    caller.send(None)
    caller.close()
    await asyncio.wait([asyncio.create_task(start.run())])
    assert not start.sent
    assert [type(event.error) for event in recorder.events] == [asyncio.CancelledError]


async def test_the_deadline_is_for_sending(begin: Callable[..., Any]) -> None:
    """Once the request is sent, its answer is awaited to the end."""
    server = Server()
    caller = begin(server.post, timeout=0.02)
    await server.sent.wait()
    await asyncio.sleep(0.05)
    server.answer.set_result(Started(787, None))
    assert await caller == Started(787, None)


async def test_a_refusal_after_the_deadline_is_a_timeout(begin: Callable[..., Any]) -> None:
    """No time is left to send it again."""
    server = Server()
    own_state = RetryState(RetryPolicy(), 60.0)
    refusal = RateLimited("429", status=429, server_message="slow down")

    async def post(state: RetryState, once: Start) -> Started:
        await server.post(state, once)
        own_state.delay(refusal, now=0.0, chance=0.0)
        once.mark_rejected()
        await once.not_sent()
        return await asyncio.Future()

    caller = begin(post, timeout=0.02, state=own_state)
    await server.sent.wait()
    await asyncio.sleep(0.05)
    server.answer.set_result(Started(787, None))
    with pytest.raises(ExecutionTimeout) as caught:
        await caller
    assert caught.value.__cause__ is refusal


async def test_a_timeout_names_a_missing_slot(begin: Callable[..., Any]) -> None:
    """The error has no cause."""

    async def post(state: RetryState, once: Start) -> Started:
        return await asyncio.Future()

    with pytest.raises(
        ExecutionTimeout, match="no connection was free, or the rate did not allow it"
    ) as caught:
        await begin(post, timeout=0.01)
    assert caught.value.__cause__ is None


async def test_a_loop_that_shuts_down_makes_the_start_unknown(begin: Callable[..., Any]) -> None:
    """`asyncio.run` cancels every task, and there is no time to wait for the answer."""
    server = Server()
    caller = begin(server.post)
    await server.sent.wait()
    server.start._task.cancel()
    with pytest.raises(StartUnknown, match="it was cancelled"):
        await caller


async def test_a_foreign_cancellation_in_a_limiter_does_not_close_the_session(
    open_session: Callable[..., Session],
) -> None:
    """A foreign cancellation does not cancel the caller, either."""

    class Limiter:
        async def acquire(self) -> None:
            cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            cancelled.cancel()
            await cancelled

    session = open_session(limiter=Limiter())
    with pytest.raises(RuntimeError, match="the start awaited something that was cancelled"):
        await session.start(NAME)
    with pytest.raises(RuntimeError, match="the call awaited something that was cancelled"):
        await session.get_results(787)
    (outcome,) = await session.collect([StartRequest(NAME)])
    assert type(outcome.error) is RuntimeError


async def test_a_limiter_that_swallows_the_cancellation_cannot_prolong_a_start(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """The deadline holds, and nothing is sent."""

    class Limiter:
        async def acquire(self) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    session = open_session(limiter=Limiter(), wait_timeout=0.05)
    with pytest.raises(ExecutionTimeout, match="could not send the start within"):
        await session.start(NAME)
    assert sim.request_count == 0


async def test_a_limiter_may_clean_up_when_the_caller_is_cancelled(
    open_session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the start any more, so the cancellation is repeated only after a while."""
    monkeypatch.setattr("promptlayer_exec._engine.start.AGAIN", 0.0)
    entered, released = asyncio.Event(), asyncio.Event()

    class Limiter:
        async def acquire(self) -> None:
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                for _ in range(20):
                    await asyncio.sleep(0)
                released.set()

    starting = asyncio.create_task(open_session(limiter=Limiter()).start(NAME))
    await entered.wait()
    starting.cancel()
    async with asyncio.timeout(5.0):
        await released.wait()
    with pytest.raises(asyncio.CancelledError):
        await starting


async def test_a_limiter_that_swallows_a_cancellation_and_waits_on_is_cancelled_again(
    sim: Simulator, open_session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one with `asyncio.wait_for` in a loop does at times on Python 3.11."""
    monkeypatch.setattr("promptlayer_exec._engine.start.AGAIN", 0.01)

    class Limiter:
        async def acquire(self) -> None:
            for _ in range(3):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()

    session = open_session(limiter=Limiter(), wait_timeout=0.05)
    async with asyncio.timeout(5.0):
        with pytest.raises(ExecutionTimeout, match="could not send the start within"):
            await session.start(NAME)
    assert sim.request_count == 0


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_foreign_error_after_the_request_was_sent_is_an_unknown_start(
    begin: Callable[..., Any], caplog: pytest.LogCaptureFixture, cancelled: bool
) -> None:
    """A borrowed session's middleware may raise it: it reaches the caller, or the log."""
    server = Server()
    caller = begin(server.post)
    await server.sent.wait()
    if cancelled:
        caller.cancel()
        await asyncio.wait([caller])
    server.answer.set_exception(ZeroDivisionError("division"))
    if cancelled:
        for _ in range(5):
            await asyncio.sleep(0)
        assert "ZeroDivisionError: division" in caplog.text
    else:
        with pytest.raises(StartUnknown, match="ZeroDivisionError: division"):
            await caller


class Unprintable(Exception):
    """An error whose text is an error, as those of some libraries are."""

    def __str__(self) -> str:
        raise LookupError("no text")

    __repr__ = __str__


@pytest.mark.parametrize("is_sent", [True, False])
async def test_an_error_without_a_text_ends_the_start(
    begin: Callable[..., Any], *, is_sent: bool
) -> None:
    """It is raised, or named by its type."""
    server = Server()

    async def fail(state: RetryState, once: Start) -> Started:
        if is_sent:
            return await server.post(state, once)
        raise Unprintable

    server.answer.set_exception(Unprintable())
    with pytest.raises(StartUnknown if is_sent else Unprintable) as caught:
        await begin(fail)
    if is_sent:
        assert caught.value.reason == "Unprintable"  # type: ignore[attr-defined]


async def test_the_log_of_an_abandoned_start_survives_a_key_without_a_repr(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """A row of an object-relational mapper has none after its transaction."""
    sim.inject(Fault.delay(0.05))
    request = StartRequest(NAME, key=Unprintable())
    starting = asyncio.create_task(session.collect([request]))
    await sim.wait_for_requests(1)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await session.aclose()
    (run,) = sim.runs
    assert f"execution {run.execution_id} of workflow" in caplog.text
    assert "(key <Unprintable instance at " in caplog.text


async def test_an_unexpected_error_reaches_only_the_caller(begin: Callable[..., Any]) -> None:
    """It ends neither the session nor other starts."""

    async def post(state: RetryState, once: Start) -> Started:
        raise ZeroDivisionError

    other = Server()
    waiting = begin(other.post)
    with pytest.raises(ZeroDivisionError):
        await begin(post)
    other.answer.set_result(Started(787, None))
    assert await waiting == Started(787, None)


async def test_a_caller_that_is_closed_unfinished_is_reported_like_a_cancelled_one(
    recorder: Any,
) -> None:
    """A dropped coroutine gets `GeneratorExit`."""
    server = Server()
    state = RetryState(RetryPolicy(), 60.0)
    start = Start(StartRequest(NAME), server.post, state, emit=recorder, is_closing=lambda: False)
    caller = start.result(Deadline(None, 0.0))
    caller.send(None)
    running = asyncio.create_task(start.run())
    await server.sent.wait()
    caller.close()
    server.answer.set_result(Started(787, None))
    await running
    assert [(event.execution_id, event.abandoned) for event in recorder.events] == [(787, True)]
