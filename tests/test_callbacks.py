"""Lost starts: each is found again by the callback to its own URL."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import re
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from promptlayer_exec import (
    Event,
    ExecutionStarted,
    NotFound,
    PromptLayerExecError,
    RequestRetried,
    RetryPolicy,
    Session,
    SessionClosed,
    StartRequest,
    StartUnknown,
    WatchStarted,
    _callbacks,
)
from promptlayer_exec._engine.callbacks import CallbackLog
from promptlayer_exec._engine.retry import RecentStarts
from promptlayer_exec._integration import receive_callback
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.webhooks import Callbacks

CALLBACKS = Callbacks("http://127.0.0.1:9/callbacks", secret="s3cret")
REQUEST = StartRequest("report", {"topic": "otters"})
DONE = Scenario([SimNode("Report", "done", is_output_node=True)])


@pytest.fixture
def session(sim: Simulator, open_session: Callable[..., Session]) -> Session:
    """Return a session with callbacks, on a simulator with a workflow."""
    sim.add_workflow("report", DONE)
    return open_session(callbacks=CALLBACKS)


async def lose(sim: Simulator, session: Session) -> StartUnknown:
    """Return the error of a start that began a run, but whose answer was lost."""
    sim.inject(Fault.disconnect())
    with pytest.raises(StartUnknown) as caught:
        await session.start("report", {"topic": "otters"})
    return caught.value


def token_of(error: StartUnknown) -> str:
    """Return the token of a start that can be recovered."""
    assert error.callback_token is not None
    return error.callback_token


async def read_start(reader: asyncio.StreamReader) -> Any:
    """Return the body of the POST that a server gets."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    assert length is not None
    return json.loads(await reader.readexactly(int(length[1])))


def token_in(start: Any) -> str:
    """Return the token in the callback URL of a start."""
    return str(start["callback_url"]).rpartition("/")[2]


async def test_each_start_has_a_callback_url_of_its_own(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """Only the request has it: events have what the caller asked for, so nobody logs a token."""
    for _ in range(2):
        await session.start("report", {"topic": "otters"})
    first, second = (run.body["callback_url"] for run in sim.runs)
    assert first != second
    for url in (first, second):
        assert url.startswith(f"{CALLBACKS.url}/")
        assert CALLBACKS.is_genuine(url.rpartition("/")[2])
    assert {event.request.callback_url for event in recorder.of(ExecutionStarted)} == {None}
    assert {event.recovered for event in recorder.of(ExecutionStarted)} == {False}


@pytest.mark.parametrize("status", [201, 307, 400, 422, 429, 503])
async def test_the_token_is_in_no_error_and_no_log_line(
    listen: Any, open_session: Callable[..., Session], caplog: Any, status: int
) -> None:
    """A server may quote what it got; whoever has the token can forge the callback."""
    tokens = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while start := await read_start(reader):
            url = start["callback_url"]
            tokens.append(url.rpartition("/")[2])
            body = json.dumps({"message": f"no {url}", "detail": [{"input": {"url": url}}]})
            writer.write(
                f"HTTP/1.1 {status} No\r\nLocation: {url}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )

    base_url = f"http://127.0.0.1:{await listen(serve)}"
    session = open_session(base_url=base_url, callbacks=CALLBACKS, retry=RetryPolicy(outage=0.1))
    with caplog.at_level(logging.DEBUG), pytest.raises(PromptLayerExecError) as caught:
        await session.start("report")
    error: BaseException | None = caught.value
    shown = caplog.text
    while error is not None:
        attributes = {k: v for k, v in vars(error).items() if k != "callback_token"}
        shown += f"{error} {attributes}"
        error = error.__cause__ or error.__context__
    assert tokens
    assert tokens[0] not in shown


async def test_a_callback_url_of_the_caller_s_wins(sim: Simulator, session: Session) -> None:
    """PromptLayer posts to one URL; the start then cannot be recovered, and the error says why."""
    sim.inject(Fault.disconnect())
    with pytest.raises(StartUnknown) as caught:
        await session.start("report", callback_url="http://127.0.0.1:9/mine")
    assert sim.runs[0].body["callback_url"] == "http://127.0.0.1:9/mine"
    assert caught.value.callback_token is None
    with pytest.raises(ValueError, match="no callback URL of its own"):
        await session.recover(caught.value)


@pytest.mark.parametrize("first", ["callback", "recover"])
async def test_a_lost_start_is_found_by_its_callback(
    sim: Simulator, session: Session, recorder: Any, first: str
) -> None:
    """Whichever comes first, `recover` returns the execution; there is one POST in all."""
    error = await lose(sim, session)
    (run,) = sim.runs
    assert run.body["callback_url"] == CALLBACKS.url_for(token_of(error))
    if first == "callback":
        receive_callback(session, token_of(error), run.execution_id)
    recovering = asyncio.create_task(session.recover(error))
    await asyncio.sleep(0)
    if first == "recover":
        receive_callback(session, token_of(error), run.execution_id)
    execution = await recovering
    assert execution == session.execution(run.execution_id)
    assert execution.workflow == "report"
    assert await execution.output() == "done"
    assert [request.method for request in sim.requests].count("POST") == 1
    (event,) = recorder.of(ExecutionStarted)
    assert (event.execution_id, event.recovered) == (run.execution_id, True)
    assert (event.abandoned, event.request) == (False, REQUEST)
    assert event.duration > 0


async def test_a_callback_that_has_come_is_used_though_the_deadline_has_passed(
    sim: Simulator, session: Session, open_session: Callable[..., Session]
) -> None:
    """Here, an observer takes long."""
    error = await lose(sim, session)

    def observe(event: Event) -> None:
        time.sleep(0.1)

    other = open_session(callbacks=CALLBACKS, observers=[observe])
    receive_callback(other, token_of(error), 1001)
    assert (await other.recover(error, timeout=0.01)).id == 1001


async def test_a_recovery_is_reported_once_however_often_the_callback_comes(
    sim: Simulator, session: Session, recorder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if nobody waits for it: then the log has the id, but not the token."""
    error = await lose(sim, session)
    for _ in range(3):
        receive_callback(session, token_of(error), 1001)
    for _ in range(2):
        assert (await session.recover(error)).id == 1001
    assert [event.recovered for event in recorder.of(ExecutionStarted)] == [True]
    warnings = [line.message for line in caplog.records if "although" in line.message]
    (warning,) = warnings
    assert warning.startswith("execution 1001 of workflow 'report' had started, although its answ")
    assert token_of(error) not in caplog.text + str(error) + repr(error)


async def test_a_recovery_that_somebody_waits_for_is_not_a_warning(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """Any number of callers can wait for it."""
    error = await lose(sim, session)
    waiting = [asyncio.create_task(session.recover(error)) for _ in range(3)]
    await asyncio.sleep(0)
    receive_callback(session, token_of(error), 1001)
    assert {execution.id for execution in await asyncio.gather(*waiting)} == {1001}
    assert not any("although" in line.message for line in caplog.records)


async def test_the_callback_of_a_start_that_was_answered_is_no_recovery(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """It was reported as started already."""
    execution = await session.start("report")
    token = token_in(sim.runs[0].body)
    receive_callback(session, token, execution.id)
    assert [event.recovered for event in recorder.of(ExecutionStarted)] == [False]


@pytest.mark.parametrize(
    ("statuses", "callback"),
    [
        *(([status], callback) for status in (307, 403) for callback in ("first", "last")),
        *(([429], "last"), ([429, 201], "last")),
    ],
    ids=str,
)
async def test_the_callback_of_a_run_that_the_answer_denied_is_reported(
    listen: Any,
    open_session: Callable[..., Session],
    caplog: pytest.LogCaptureFixture,
    statuses: list[int],
    callback: str,
) -> None:
    """A gateway can refuse a start that it has passed on; the event and the log have the id."""
    tokens: list[str] = []
    to_send = iter(statuses)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tokens.append(token_in(await read_start(reader)))
        if callback == "first":
            for execution_id in (1001, 1003, 1001):
                receive_callback(session, tokens[0], execution_id)
        body = b'{"workflow_version_execution_id": 1002}'
        status = next(to_send)
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    events: list[Event] = []
    session = open_session(
        base_url=f"http://127.0.0.1:{await listen(serve)}",
        callbacks=CALLBACKS,
        retry=RetryPolicy(outage=5.0 if 201 in statuses else 0.0, base=0.001),
        observers=[events.append],
    )
    if 201 in statuses:
        assert (await session.start("report", {"topic": "otters"})).id == 1002
        why = "was begun by the same start as execution 1002"
    else:
        with pytest.raises(PromptLayerExecError) as caught:
            await session.start("report", {"topic": "otters"})
        why = "had started, although its start failed"
        assert caught.value.execution_id == (1001 if callback == "first" else None)
        assert ("no run of workflow 'report'" in str(caught.value)) is (callback == "last")
    for execution_id in (1001, 1003, 1001) if callback == "last" else (1001,):
        receive_callback(session, tokens[0], execution_id)
    found = [it for it in events if isinstance(it, ExecutionStarted) and it.recovered]
    assert [(event.execution_id, event.abandoned) for event in found] == [
        (1001, False),
        (1003, False),
    ]
    assert found[0].request == StartRequest("report")
    warnings = [line.message for line in caplog.records if "follow it by its id" in line.message]
    assert len(warnings) == 2
    assert warnings[0] == f"execution 1001 of workflow 'report' {why}; follow it by its id"


@pytest.mark.parametrize(
    "moment", ["waiting", "connecting", "given up", "not repeated", "client session closed"]
)
async def test_a_start_is_not_sent_again_once_its_callback_has_come(
    listen: Any,
    open_session: Callable[..., Session],
    caplog: pytest.LogCaptureFixture,
    moment: str,
) -> None:
    """A gateway refused with 429 what it had passed on: that run is the start's."""
    tokens: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tokens.append(token_in(await read_start(reader)))
        if moment in {"waiting", "not repeated"}:
            receive_callback(session, tokens[0], 1001)
        writer.write(b"HTTP/1.1 429 X\r\nContent-Length: 0\r\n\r\n")

    async def connect(*_: Any) -> None:
        if tokens:
            receive_callback(session, tokens[0], 1001)
            if moment == "client session closed":
                await http.close()
                raise AssertionError  # as aiohttp does then
            if moment == "given up":
                raise ConnectionRefusedError

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_start.append(connect)
    events: list[Event] = []
    async with aiohttp.ClientSession(trace_configs=[trace]) as http:
        session = open_session(
            base_url=f"http://127.0.0.1:{await listen(serve)}",
            callbacks=CALLBACKS,
            retry=RetryPolicy(
                outage={"given up": 0.1, "not repeated": 0.0}.get(moment, 5.0), base=0.001
            ),
            observers=[events.append],
            http=http,
        )
        execution = await session.start("report", {"topic": "otters"})
    assert (execution.id, execution.workflow, execution.warning) == (1001, "report", None)
    assert len(tokens) == 1
    found = [event for event in events if isinstance(event, ExecutionStarted)]
    assert [(event.execution_id, event.recovered) for event in found] == [(1001, False)]
    assert "follow it by its id" not in caplog.text


@pytest.mark.parametrize("end", ["deadline", "close", "cancel"])
async def test_a_start_that_ends_while_it_waits_knows_its_callback(
    listen: Any, open_session: Callable[..., Session], caplog: pytest.LogCaptureFixture, end: str
) -> None:
    """It was refused with 429, and says nowhere that no run was started."""
    has_called_back = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        token = token_in(await read_start(reader))
        writer.write(b"HTTP/1.1 429 X\r\nRetry-After: 60\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        await refused.wait()
        receive_callback(session, token, 1001)
        has_called_back.set()

    refused = asyncio.Event()
    events: list[Event] = []

    def observe(event: Event) -> None:
        events.append(event)
        if isinstance(event, RequestRetried):
            refused.set()

    session = open_session(
        base_url=f"http://127.0.0.1:{await listen(serve)}",
        callbacks=CALLBACKS,
        wait_timeout=0.5 if end == "deadline" else 30.0,
        observers=[observe],
    )
    starting = asyncio.create_task(session.start("report", {"topic": "otters"}))
    await has_called_back.wait()
    if end == "deadline":
        assert (await starting).id == 1001
    elif end == "close":
        await session.aclose()
        with pytest.raises(SessionClosed) as caught:
            await starting
        assert caught.value.execution_id == 1001
    else:
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await session.aclose()
    found = [event for event in events if isinstance(event, ExecutionStarted)]
    assert [(event.execution_id, event.abandoned) for event in found] == [(1001, end != "deadline")]
    assert ("execution 1001 of workflow 'report' started" in caplog.text) is (end != "deadline")
    assert "no run" not in caplog.text


def test_the_inputs_of_only_a_hundred_lost_starts_are_remembered() -> None:
    """They may have a megabyte each, and ten thousand starts are remembered."""
    events: list[Any] = []
    log = CallbackLog(events.append, RecentStarts(0.0))
    for number in range(102):
        log.lose(str(number), StartRequest("report", {"n": number}, key=number), "")
    for number in range(102):
        log.receive(str(number), 1000 + number)
    requests = [event.request for event in events]
    assert requests[:2] == [StartRequest("report", key=number) for number in range(2)]
    assert requests[2:] == [
        StartRequest("report", {"n": number}, key=number) for number in range(2, 102)
    ]


@pytest.mark.parametrize("callbacks", ["before", "after"])
async def test_the_second_run_of_a_lost_start_is_reported_too(
    sim: Simulator, session: Session, recorder: Any, callbacks: str
) -> None:
    """A proxy can send a start twice; `recover` has the one that came first."""
    sim.inject(Fault.stall())
    starting = asyncio.create_task(session.start("report"))
    await sim.wait_for_requests(1)
    token = token_in(json.loads(sim.requests[0].body))
    ids = (1001, 1002, 1001, 1002)
    if callbacks == "before":
        for execution_id in ids:
            receive_callback(session, token, execution_id)
    await sim.__aexit__()
    with pytest.raises(StartUnknown) as caught:
        await starting
    for execution_id in ids if callbacks == "after" else (1001,):
        receive_callback(session, token, execution_id)
    assert [event.execution_id for event in recorder.of(ExecutionStarted)] == [1001, 1002]
    assert (await session.recover(caught.value)).id == 1001


@pytest.mark.parametrize("outcome", ["lost", "refused"])
def test_a_callback_that_is_repeated_after_ten_thousand_others_is_not_news(outcome: str) -> None:
    """By then it is forgotten, but the start is not."""
    events: list[Any] = []
    log = CallbackLog(events.append, RecentStarts(0.0))
    if outcome == "lost":
        log.lose("a", REQUEST, "")
    else:
        log.settle("a", REQUEST, "", None, 0.0)
    log.receive("a", 1)
    for number in range(10_000):
        log.receive(f"of another start {number}", 2 + number)
    log.receive("a", 1)
    assert [event.execution_id for event in events] == [1]


async def test_a_404_on_a_run_that_only_its_callback_has_told_of_is_not_final(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """As on any run that this session has just started."""
    sim.inject(Fault.disconnect())
    with pytest.raises(StartUnknown):
        await session.start("report")
    (run,) = sim.runs
    receive_callback(session, token_in(run.body), run.execution_id)
    sim.inject(Fault.status(404))
    assert (await session.execution(run.execution_id).wait()).complete
    (watch,) = recorder.of(WatchStarted)
    assert watch.workflow == "report"


@pytest.mark.parametrize("outcome", ["lost", "refused"])
def test_runs_of_a_start_that_is_sent_again_are_reported_once(outcome: str) -> None:
    """A durable batch does so after a refusal; meanwhile, a callback may be that of any attempt."""
    events: list[Any] = []
    log = CallbackLog(events.append, RecentStarts(0.0))
    log.begin("a")
    log.settle("a", REQUEST, "", None, 0.0)
    log.receive("a", 1)
    log.begin("a")
    log.receive("a", 2)
    assert [event.execution_id for event in events] == [1]
    if outcome == "lost":
        log.lose("a", REQUEST, "")
    else:
        log.settle("a", REQUEST, "", 2, 0.0)
    for execution_id in (1, 2, 3):
        log.receive("a", execution_id)
    reported = [1, 2, 3] if outcome == "lost" else [1, 3]
    assert [event.execution_id for event in events] == reported


def test_at_most_a_hundred_runs_of_one_start_are_reported(caplog: Any) -> None:
    """Whoever has its token can name any number of them."""
    caplog.set_level(logging.CRITICAL)
    events: list[Any] = []
    log = CallbackLog(events.append, RecentStarts(0.0))
    for execution_id in range(1, 1000):
        log.receive("a", execution_id)
    log.lose("a", REQUEST, "")
    assert [event.execution_id for event in events] == list(range(1, 101))
    assert events[0].request is REQUEST


def test_a_run_is_reported_though_the_observer_of_another_was_interrupted() -> None:
    """Its next callback does so."""
    reported = []

    def observe(event: Any) -> None:
        reported.append(event.execution_id)
        if reported == [1]:
            raise KeyboardInterrupt

    log = CallbackLog(observe, RecentStarts(0.0))
    for execution_id in (1, 2):
        log.receive("a", execution_id)
    with pytest.raises(KeyboardInterrupt):
        log.lose("a", REQUEST, "")
    log.receive("a", 2)
    assert reported == [1, 2]


@pytest.mark.parametrize(
    ("is_abandoned", "interrupted"), [(False, 7), (True, 1001)], ids=["awaited", "abandoned"]
)
def test_no_run_is_lost_if_the_observer_of_another_is_interrupted(
    is_abandoned: bool, interrupted: int
) -> None:
    """A callback has proved a first run of the start, which is answered with a second one."""
    started = []

    def observe(event: Event) -> None:
        if isinstance(event, ExecutionStarted):
            started.append((event.execution_id, event.recovered))
            if event.execution_id == interrupted:
                raise SystemExit

    async def start() -> None:
        async with Simulator() as sim:
            sim.add_workflow("report", DONE)
            sim.inject(Fault.delay(0.05))
            settings: Any = {"base_url": sim.base_url, "callbacks": CALLBACKS}
            async with Session(sim.api_key, observers=[observe], **settings) as session:
                starting = asyncio.create_task(session.start("report"))
                await sim.wait_for_requests(1)
                receive_callback(session, token_in(json.loads(sim.requests[0].body)), 7)
                if is_abandoned:
                    starting.cancel()
                await asyncio.wait([starting])
                await asyncio.sleep(10)

    with pytest.raises(SystemExit):
        asyncio.run(start())
    assert sorted(started) == [(7, True), (1001, False)]


async def test_a_callback_may_come_before_the_answer_is_lost(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """A short run can be complete before its start fails; the recovery is reported then."""
    sim.inject(Fault.stall())
    starting = asyncio.create_task(session.start("report"))
    await sim.wait_for_requests(1)
    token = token_in(json.loads(sim.requests[0].body))
    receive_callback(session, token, 1001)
    assert recorder.events == []
    await sim.__aexit__()
    with pytest.raises(StartUnknown) as caught:
        await starting
    assert caught.value.callback_token == token
    assert [event.execution_id for event in recorder.of(ExecutionStarted)] == [1001]


async def test_a_start_whose_caller_was_cancelled_is_recovered_too(
    sim: Simulator, open_session: Callable[..., Session], recorder: Any
) -> None:
    """Nobody has its error, so the event and the log are all that there is."""
    sim.add_workflow("report", DONE)
    session = open_session(callbacks=CALLBACKS, request_timeout=0.2)
    sim.inject(Fault.stall())
    starting = asyncio.create_task(session.start("report"))
    await sim.wait_for_requests(1)
    token = token_in(json.loads(sim.requests[0].body))
    starting.cancel()
    receive_callback(session, token, 1001)
    event = await recorder.next(ExecutionStarted)
    assert (event.execution_id, event.recovered) == (1001, True)


async def test_a_pickled_error_is_recovered_in_another_session(
    sim: Simulator, session: Session, open_session: Callable[..., Session], recorder: Any
) -> None:
    """In the one that receives the callback; it knows of the request no more than the workflow."""
    error = pickle.loads(pickle.dumps(await lose(sim, session)))
    other = open_session(callbacks=Callbacks(CALLBACKS.url, secret="s3cret"))
    recovering = asyncio.create_task(other.recover(error))
    await asyncio.sleep(0)
    receive_callback(other, error.callback_token, sim.runs[0].execution_id)
    assert await (await recovering).output() == "done"
    (event,) = recorder.of(ExecutionStarted)
    assert (event.recovered, event.request) == (True, StartRequest("report"))


async def test_silence_proves_nothing(sim: Simulator, session: Session) -> None:
    """After the timeout, the same is not known as before, and the same error can be used again."""
    first = await lose(sim, session)
    with pytest.raises(StartUnknown) as caught:
        await session.recover(first, timeout=0.01)
    again = caught.value
    problem = (
        "no callback came within 0.01 s; the run may still be running, so call Session.recover"
    )
    assert f"{problem} again. The run may have started" in str(again)
    assert (again.callback_token, again.reason) == (first.callback_token, first.reason)
    assert (again.workflow, again.execution_id) == ("report", None)
    assert again.__cause__ is first
    with pytest.raises(StartUnknown) as caught:
        await session.recover(again, timeout=0.0)
    assert str(caught.value).count("no callback came") == 1
    receive_callback(session, token_of(first), 1001)
    assert (await session.recover(caught.value, timeout=0)).id == 1001


async def test_closing_the_session_ends_a_recovery(sim: Simulator, session: Session) -> None:
    """The error can still be recovered after the session is opened again."""
    error = await lose(sim, session)
    recovering = asyncio.create_task(session.recover(error, timeout=None))
    await asyncio.sleep(0)
    await session.aclose()
    with pytest.raises(SessionClosed):
        await recovering
    receive_callback(session, token_of(error), 1001)
    async with session:
        assert (await session.recover(error)).id == 1001


async def test_a_callback_that_comes_as_its_recovery_is_cancelled_is_logged(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody gets the handle, and the callback will not come again."""
    error = await lose(sim, session)
    recovering = asyncio.create_task(session.recover(error))
    await asyncio.sleep(0.01)
    receive_callback(session, token_of(error), 1001)
    recovering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await recovering
    assert caplog.messages[-1] == (
        "execution 1001 had started, although its answer was lost, but its caller did not get the"
        " handle; follow it by its id"
    )


def test_a_callback_ignores_who_waited_in_a_loop_that_was_closed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A loop that is stopped and closed, as in a notebook, ends none of its tasks."""
    log = CallbackLog(lambda _: None, RecentStarts(0.0))
    stopped = asyncio.new_event_loop()
    dead = [stopped.create_task(log.wait(token)) for token in ("followed", "left")]
    stopped.run_until_complete(asyncio.sleep(0))
    stopped.close()

    async def recover() -> int:
        waiting = asyncio.create_task(log.wait("followed"))
        await asyncio.sleep(0)
        for token in ("followed", "left"):
            log.lose(token, REQUEST, "http://127.0.0.1:9")
            log.receive(token, 1001)
        return await waiting

    assert asyncio.run(recover()) == 1001
    assert ["had started" in message for message in caplog.messages] == [True]
    for task in dead:
        task.get_coro().close()  # type: ignore[union-attr]


async def test_a_recovered_run_may_not_be_known_to_all_of_the_server(
    sim: Simulator, session: Session
) -> None:
    """Its first 404 is retried, as after any other start."""
    error = await lose(sim, session)
    receive_callback(session, token_of(error), 1001)
    execution = await session.recover(error)
    sim.inject(Fault.status(404))
    assert await execution.output() == "done"
    other = session.execution(1002)
    with pytest.raises(NotFound):
        await other.wait()


async def test_what_cannot_be_recovered_is_named(sim: Simulator, session: Session) -> None:
    """Another error, and a start of another application's."""
    error = await lose(sim, session)
    with pytest.raises(TypeError, match="must be a StartUnknown"):
        await session.recover(ValueError("x"))  # type: ignore[arg-type]
    error.callback_token = Callbacks(CALLBACKS.url, secret="other").new_token()
    with pytest.raises(ValueError, match="with other callbacks"):
        await session.recover(error)


async def test_a_session_without_callbacks_can_receive_them(
    sim: Simulator, session: Session, open_session: Callable[..., Session]
) -> None:
    """So a process that starts nothing can recover what others lost."""
    error = await lose(sim, session)
    other = open_session()
    with pytest.raises(StartUnknown, match="to this session, which has no callbacks=; the run may"):
        await other.recover(error, timeout=0.01)
    receive_callback(other, token_of(error), 1001)
    assert (await other.recover(error)).id == 1001


class Clock:
    """A monotonic clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock that the log of callbacks uses."""
    clock = Clock()
    monkeypatch.setattr(_callbacks.time, "monotonic", clock)
    return clock


async def is_known(log: CallbackLog, token: str) -> bool:
    """Return True if the callback of a start is remembered."""
    waiting = asyncio.create_task(log.wait(token))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    return not waiting.cancelled()


async def test_a_callback_is_remembered_for_an_hour(clock: Clock) -> None:
    """A repeat does not prolong it, and the first id counts."""
    log = CallbackLog(lambda _: None, RecentStarts(0.0))
    log.receive("a", 1)
    clock.now += 3599
    log.receive("a", 2)
    assert await log.wait("a") == 1
    clock.now += 2
    assert not await is_known(log, "a")


async def test_at_most_ten_thousand_callbacks_are_remembered(clock: Clock) -> None:
    """The oldest is forgotten first."""
    log = CallbackLog(lambda _: None, RecentStarts(0.0))
    for number in range(10_001):
        log.receive(str(number), number + 1)
    assert not await is_known(log, "0")
    assert await is_known(log, "1")
    assert await log.wait("10000") == 10_001


def test_at_most_ten_thousand_lost_starts_are_remembered(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """So an outage of any length needs bounded memory."""
    caplog.set_level(logging.CRITICAL)
    events: list[Any] = []
    log = CallbackLog(events.append, RecentStarts(0.0))
    for number in range(10_001):
        log.lose(str(number), REQUEST, "", elapsed=2.0)
    clock.now += 5.0
    for number in range(10_001):
        log.receive(str(number), number + 1)
    assert [event.execution_id for event in events] == list(range(2, 10_002))
    assert {event.duration for event in events} == {7.0}


def test_at_most_ten_thousand_other_starts_are_remembered(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """They drive out no lost one."""
    caplog.set_level(logging.CRITICAL)
    events: list[Any] = []
    log = CallbackLog(events.append, RecentStarts(0.0))
    log.lose("lost", REQUEST, "")
    for number in range(10_001):
        log.settle(str(number), REQUEST, "", None, 2.0)
    clock.now += 5.0
    for number in range(10_001):
        log.receive(str(number), number + 1)
    log.receive("lost", 20_000)
    assert [event.execution_id for event in events] == [*range(2, 10_002), 20_000]
    assert {event.duration for event in events[:-1]} == {7.0}
