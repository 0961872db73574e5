"""Lost starts: each is found again by the callback to its own URL."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest

from promptlayer_exec import (
    ExecutionStarted,
    PromptLayerExecError,
    RetryPolicy,
    Session,
    SessionClosed,
    StartRequest,
    StartUnknown,
    WatchStarted,
)
from promptlayer_exec._engine.callbacks import CallbackLog
from promptlayer_exec._engine.retry import RecentRuns
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


def token_in(start: Any) -> str:
    """Return the token in the callback URL of a start."""
    return str(start["callback_url"]).rpartition("/")[2]


async def test_each_start_has_a_callback_url_of_its_own(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """Only the request has it: events have what the caller asked for, so nobody logs a token.

    Its callback is to have all nodes, as PromptLayer documents it.
    """
    for _ in range(2):
        await session.start("report", {"topic": "otters"})
    assert [run.body["return_all_outputs"] for run in sim.runs] == [True, True]
    first, second = (run.body["callback_url"] for run in sim.runs)
    assert first != second
    for url in (first, second):
        assert url.startswith(f"{CALLBACKS.url}/")
        assert CALLBACKS.is_genuine(url.rpartition("/")[2])
    assert {event.request.callback_url for event in recorder.of(ExecutionStarted)} == {None}
    assert {event.recovered for event in recorder.of(ExecutionStarted)} == {False}


@pytest.mark.parametrize("status", [201, 307, 400, 422, 429, 503])
async def test_the_token_is_in_no_error_and_no_log_line(
    raw_server: Any, open_session: Callable[..., Session], caplog: Any, status: int
) -> None:
    """A server may quote what it got; whoever has the token can forge the callback."""
    tokens = []

    async def quote(request: Any) -> None:
        url = json.loads(request.body)["callback_url"]
        tokens.append(url.rpartition("/")[2])
        said = {"message": f"no {url}", "detail": [{"input": {"url": url}}]}
        await request.answer(f"{status} No", said, f"Location: {url}")

    raw_server.respond = quote
    settings: Any = {"callbacks": CALLBACKS, "retry": RetryPolicy(outage=0.1)}
    session = open_session(base_url=raw_server.url, **settings)
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
    with pytest.raises(ValueError, match="did not have its own callback URL"):
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
    assert (event.abandoned, event.request) == (False, StartRequest("report"))
    assert event.duration > 0


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
    assert warning.startswith("execution 1001 of workflow 'report' did start, although the respo")
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
    session = open_session(callbacks=CALLBACKS, request_timeout=0.5)
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
    problem = "Server disconnected, and no callback came within 0.01 s"
    assert f"{problem}. Session.recover(error) waits for its callback. Look" in str(again)
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
    await asyncio.sleep(0)
    receive_callback(session, token_of(error), 1001)
    recovering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await recovering
    assert caplog.messages[-1].startswith("execution 1001 ")
    assert caplog.messages[-1].endswith("session.execution(1001) picks it up")


async def test_what_cannot_be_recovered_is_named(sim: Simulator, session: Session) -> None:
    """Another error, and a start of another application's."""
    error = await lose(sim, session)
    with pytest.raises(TypeError, match="must be a StartUnknown"):
        await session.recover(ValueError("x"))  # type: ignore[arg-type]
    error.callback_token = Callbacks(CALLBACKS.url, secret="other").new_token()
    with pytest.raises(ValueError, match="has a different secret"):
        await session.recover(error)


async def test_a_session_without_callbacks_can_receive_them(
    sim: Simulator, session: Session, open_session: Callable[..., Session]
) -> None:
    """So a process that starts nothing can recover what others lost."""
    error = await lose(sim, session)
    other = open_session()
    with pytest.raises(StartUnknown, match=r"within 0\.01 s \(this session has no callbacks=\)"):
        await other.recover(error, timeout=0.01)
    receive_callback(other, token_of(error), 1001)
    assert (await other.recover(error)).id == 1001


def test_a_callback_is_remembered_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeat does not prolong it, and the first id counts."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log = CallbackLog(lambda _: None, RecentRuns(0.0))
    log.receive("a", 1)
    now += 3599
    log.receive("a", 2)
    assert log.execution_id("a") == 1
    now += 2
    assert log.execution_id("a") is None
