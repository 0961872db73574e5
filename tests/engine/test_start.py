"""Starts: each is sent at most once, and no started run is lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import socket
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from promptlayer_exec import (
    BadRequest,
    ConfigurationError,
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
    asked: dict[str, Any] = {
        "workflow": NAME,
        "inputs": {"topic": "cats", "rows": [1, {"x": None}]},
        "label": "prod",
        "metadata": {"user": "maria"},
        "callback_url": "http://127.0.0.1:9/done",
    }
    execution = await session.start(**asked)
    (request,) = sim.requests
    assert (request.method, request.path) == ("POST", "/workflows/a%2Fb%3Fc%23d%20%C3%A9/run")
    assert request.headers["X-API-KEY"] == sim.api_key
    assert request.headers["Content-Type"] == "application/json"
    assert json.loads(request.body) == {
        "input_variables": {"topic": "cats", "rows": [1, {"x": None}]},
        "workflow_label_name": "prod",
        "metadata": {"user": "maria"},
        "callback_url": "http://127.0.0.1:9/done",
        "return_all_outputs": True,
    }
    (run,) = sim.runs
    assert execution == session.execution(run.execution_id)
    assert (execution.id, execution.workflow, execution.warning) == (run.execution_id, NAME, None)
    (event,) = recorder.of(ExecutionStarted)
    assert event.execution_id == execution.id
    assert event.abandoned is False
    assert event.request == StartRequest(**asked)


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


async def test_the_server_s_warning_is_on_the_handle_without_the_key(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """It also goes to the log."""
    sim.add_workflow("careless", DONE, warning=f"no topic; {sim.api_key} expires soon")
    assert (await session.start("careless")).warning == "no topic; *** expires soon"
    await session.run("careless")
    assert "no topic; *** expires soon" in caplog.text
    assert sim.api_key not in caplog.text


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
    "408": Fault.status(408),
    "500": Fault.status(500),
    "503 with Retry-After": Fault.status(503, retry_after=0.01),
    "201 without an id": Fault.status(201, body=b'{"success": true, "message": "created"}'),
    "201 with null for an id": Fault.status(201, body=b'{"workflow_version_execution_id": null}'),
    "201 with an id out of range": Fault.status(201, body=b'{"workflow_version_execution_id": 0}'),
    "201 with true for an id": Fault.status(201, body=b'{"workflow_version_execution_id": true}'),
    "201 that is no object": Fault.status(201, body=b"[787]"),
    "204": Fault.status(204, body=b""),
    "too large": Fault.oversize(200_000),
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
    assert (await (await session.start(NAME)).wait()).complete


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (302, StatusError),
        (400, BadRequest),
        (401, Unauthorized),
        (404, NotFound),
        (422, UnprocessableEntity),
        (425, StatusError),
        (499, StatusError),
    ],
)
async def test_a_refused_start_is_its_status_error(
    sim: Simulator, session: Session, recorder: Any, status: int, expected: type[StatusError]
) -> None:
    """It is not repeated, although a watch would retry some of these; the event has the details."""
    sim.inject(Fault.status(status, retry_after=0.01))
    with pytest.raises(expected) as caught:
        await session.start(NAME, {"topic": "cats"})
    assert type(caught.value) is expected
    assert caught.value.status == status
    assert posts(sim) == 1
    (event,) = recorder.events
    assert event.error is caught.value
    assert event.request == StartRequest(NAME, {"topic": "cats"})
    assert 0.0 < event.duration < 10.0
    assert event.base_url == sim.base_url


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


@pytest.fixture
def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize("wait", ["429", "connecting", "rate"])
async def test_a_start_that_cannot_be_sent_in_time_is_a_timeout(
    sim: Simulator, open_session: Callable[..., Session], wait: str
) -> None:
    """The error says that nothing was started, and what prevented it."""
    sim.inject(Fault.status(429, times=None, retry_after=60))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it never answers the handshake
        session = open_session(
            base_url=sim.base_url
            if wait == "429"
            else f"https://127.0.0.1:{silent.getsockname()[1]}",
            wait_timeout=0.3,
            rate=0.01 if wait == "rate" else None,
        )
        for _ in range(2 if wait == "rate" else 1):
            with pytest.raises(
                ExecutionTimeout,
                match=r"could not send the start request within 0\.3 s, so no run was started",
            ) as caught:
                await session.start(NAME)
    text = str(caught.value)
    assert isinstance(caught.value.__cause__, RateLimited) == (wait == "429")
    assert ("429" if wait == "429" else "still waiting for a connection") in text
    assert "continues on PromptLayer" not in text


async def test_a_start_without_any_time_is_a_timeout(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """Its deadline has passed before it can be sent."""
    with pytest.raises(ExecutionTimeout, match="within 0 s") as caught:
        await open_session(wait_timeout=0).start(NAME)
    assert caught.value.timeout == 0.0
    assert posts(sim) == 0


async def test_a_connection_that_is_never_made_is_not_an_unknown_start(
    open_session: Callable[..., Session], recorder: Any
) -> None:
    """A `request_timeout` before the request was sent is retried."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it never answers the handshake
        session = open_session(
            base_url=f"https://127.0.0.1:{silent.getsockname()[1]}",
            request_timeout=0.05,
            retry=RetryPolicy(outage=0.06, base=0.01),
        )
        with pytest.raises(RequestTimeout):
            await session.start(NAME)
    assert len(recorder.of(RequestRetried)) >= 1


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


async def test_a_start_cancelled_before_it_was_sent_starts_nothing(
    sim: Simulator, open_session: Callable[..., Session], recorder: Any
) -> None:
    """A start that waits for the limiter ends with its caller."""
    asked = asyncio.Event()

    class Gate:
        async def acquire(self) -> None:
            asked.set()
            await asyncio.Event().wait()

    starting = asyncio.create_task(open_session(limiter=Gate()).start(NAME))
    await asked.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    failed = await recorder.next(StartFailed)
    assert isinstance(failed.error, asyncio.CancelledError)
    assert (failed.execution_id, failed.request.workflow) == (None, NAME)
    assert recorder.of(ExecutionStarted) == []
    assert posts(sim) == 0


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


# An answer that comes when the test says


class Server:
    """Answers starts when the test says."""

    def __init__(self, raw_server: Any) -> None:
        raw_server.respond = self.respond
        self.base_url = raw_server.url
        self.posts = 0
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.status = 201

    async def respond(self, request: Any) -> None:
        """Answer one start."""
        self.posts += 1
        self.asked.set()
        await self.may_answer.wait()
        await request.answer(f"{self.status} X", {"workflow_version_execution_id": 787})


@pytest.fixture
def server(raw_server: Any) -> Server:
    """Return a server that answers starts when the test says."""
    return Server(raw_server)


@pytest.mark.parametrize(
    ("status", "logged"),
    [(201, "execution 787 "), (500, "may have started"), (404, "")],
    ids=["started", "lost", "refused"],
)
async def test_a_cancellation_beside_the_answer_loses_nothing(
    open_session: Callable[..., Session],
    recorder: Any,
    caplog: pytest.LogCaptureFixture,
    server: Server,
    *,
    status: int,
    logged: str,
) -> None:
    """Whatever the step, there is one event; the log has what the caller does not get."""
    server.status = status
    for steps in itertools.count():
        session = open_session(base_url=server.base_url)
        starting = asyncio.create_task(session.start(NAME))
        await server.asked.wait()
        server.may_answer.set()
        for _ in range(steps):
            await asyncio.sleep(0)
        was_done = starting.done()
        starting.cancel()
        await asyncio.wait([starting])
        await session.aclose()
        (event,) = recorder.events
        if status == 201:
            assert (event.execution_id, event.abandoned) == (787, starting.cancelled())
        else:
            assert type(event.error) is (StartUnknown if status == 500 else NotFound)
            assert starting.cancelled() or starting.exception() is event.error
        assert len(caplog.records) == (starting.cancelled() and bool(logged))
        assert not caplog.records or logged in caplog.text
        if was_done:
            break
        recorder.events.clear()
        caplog.clear()
        server.asked.clear()
        server.may_answer.clear()
    assert steps > 3


@pytest.mark.parametrize("status", [201, 429])
async def test_the_deadline_is_for_sending(
    open_session: Callable[..., Session], server: Server, status: int
) -> None:
    """An answer is awaited beyond it; after a 429, no time is left to send the start again."""
    server.status = status
    session = open_session(base_url=server.base_url, wait_timeout=0.5)
    starting = asyncio.create_task(session.start(NAME))
    await server.asked.wait()
    await asyncio.wait([starting], timeout=0.6)
    server.may_answer.set()
    if status == 201:
        assert (await starting).id == 787
    else:
        with pytest.raises(ExecutionTimeout) as caught:
            await starting
        assert isinstance(caught.value.__cause__, RateLimited)
    assert server.posts == 1


# Errors that are not the server's


async def test_an_error_of_a_limiter_reaches_only_its_caller(
    sim: Simulator, open_session: Callable[..., Session], recorder: Any
) -> None:
    """It is raised as it is, nothing is sent, and other starts go on."""

    class Limiter:
        error: Exception | None = LookupError("no limit")

        async def acquire(self) -> None:
            if self.error is not None:
                raise self.error

    limiter = Limiter()
    session = open_session(limiter=limiter)
    with pytest.raises(LookupError) as caught:
        await session.start(NAME)
    assert caught.value is limiter.error
    (outcome,) = await session.collect([StartRequest(NAME)])
    assert outcome.error is limiter.error
    assert [event.error for event in recorder.of(StartFailed)] == [limiter.error] * 2
    assert posts(sim) == 0
    limiter.error = None
    await session.start(NAME)


async def test_an_error_of_a_middleware_after_the_request_was_sent_is_an_unknown_start(
    open_session: Callable[..., Session], recorder: Any
) -> None:
    """Whatever it is, the run may have started."""
    error = ZeroDivisionError("by 0")

    async def fail(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        await handler(request)
        raise error

    async with aiohttp.ClientSession(middlewares=[fail]) as http:
        with pytest.raises(StartUnknown, match=type(error).__name__) as caught:
            await open_session(http=http).start(NAME)
    assert caught.value.__cause__ is error
    assert [event.error for event in recorder.events] == [caught.value]


async def test_the_log_names_the_key_of_an_abandoned_start(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """Both if it started and if that is not known."""
    for fault in (Fault.delay(0.05), Fault.disconnect()):
        sim.inject(fault)
        collecting = asyncio.create_task(session.collect([StartRequest(NAME, key="k7")]))
        await sim.wait_for_requests(sim.request_count + 1)
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting
    await session.aclose()
    assert len(caplog.messages) == 2
    assert all("key 'k7'" in message for message in caplog.messages)


async def test_hooks_that_fail_at_the_end_change_no_outcome(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller gets the handle all the same, and the log has the error."""

    class Failing:
        async def before_send(self) -> None: ...
        async def not_sent(self) -> None: ...
        async def ended(self, outcome: Any) -> None:
            raise RuntimeError("a bug of the hooks")

    execution = await integration.start(session, StartRequest(NAME), hooks=Failing())
    assert [execution.id] == [run.execution_id for run in sim.runs]
    assert "could not record the result of a start request" in caplog.text
    assert "a bug of the hooks" in caplog.text
