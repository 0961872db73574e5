"""The session: settings, opening and closing, single calls."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import aiohttp
import pytest

from promptlayer_exec import (
    ConfigurationError,
    Execution,
    ExecutionTimeout,
    MainOutput,
    PollPolicy,
    RequestRetried,
    RetryPolicy,
    Session,
    SessionClosed,
    Snapshot,
    Unauthorized,
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


async def test_an_execution_id_may_be_a_string_of_its_digits(
    sim: Simulator, session: Session, held: int
) -> None:
    """JSON carries ids so, in our own commands and routes too."""
    assert session.execution(str(held)) == session.execution(held)
    assert (await session.get_results(str(held))).execution_id == held
    assert (await session.get_results(str(held), return_all_outputs=True)).execution_id == held
    collecting = asyncio.create_task(session.collect([str(held)]))
    await sim.wait_for_requests(3)
    assert session.wake(str(held)) is True
    sim.finish(held, "Answer")
    assert [outcome.output for outcome in await collecting] == ["42"]


@pytest.mark.parametrize(
    ("error", "execution_id"),
    [
        *[(TypeError, value) for value in (True, 7.0, None, b"7", "", "7 ", "+7", "\u0667", "7_0")],
        *[(ValueError, value) for value in (0, -1, 2**63, "0", str(2**63))],
    ],
)
async def test_a_bad_execution_id_is_refused_before_any_request(
    sim: Simulator, session: Session, error: type[Exception], execution_id: Any
) -> None:
    """It is named, whatever is called with it."""
    for call in (session.execution, session.wake):
        with pytest.raises(error, match="execution id must be"):
            call(execution_id)
    with pytest.raises(error, match="execution id must be"):
        await session.get_results(execution_id)
    assert sim.request_count == 0


async def test_a_string_is_no_type_to_structure_into(
    sim: Simulator, session: Session, held: int
) -> None:
    """The error says so before a run is paid for."""
    into: Any = "Report"
    execution = session.execution(held)
    sim.finish(held, "Answer")
    snapshot = await execution.snapshot()
    for call in (execution.output, partial(session.run, "name"), partial(session.collect, [held])):
        with pytest.raises(TypeError, match="into must be a type, such as the class Report"):
            await call(into=into)
    with pytest.raises(TypeError, match="into must be a type, such as the class Report"):
        snapshot.output(into=into)
    assert sim.request_count == 1


async def test_the_log_names_the_grace_for_a_404_after_the_start(
    sim: Simulator, open_session: Callable[..., Session], caplog: pytest.LogCaptureFixture
) -> None:
    """Other failures of a watch are survived for longer."""
    sim.add_workflow("Example", Scenario([SimNode("Answer", 1, is_output_node=True)]))
    execution = await open_session(retry=RetryPolicy(base=0.001)).start("Example")
    sim.inject(Fault.status(404))
    await execution.wait()
    sim.inject(Fault.status(503))
    await open_session(retry=RetryPolicy(base=0.001)).execution(execution.id).wait()
    told = [text.rsplit(". ", 1)[1] for text in caplog.messages]
    assert told == ["Trying again for up to 10 s", "Trying again for up to 600 s"]


def test_a_session_is_asynchronous() -> None:
    """The error of `with` says what to write."""
    with pytest.raises(TypeError, match="use `async with`, not `with`"), Session("key"):
        pass


async def test_a_single_call_is_retried_within_an_outage(
    sim: Simulator, open_session: Callable[..., Session], held: int, recorder: Any
) -> None:
    """Two 503s cost two more attempts; each is reported, and acquires the limiter."""

    class Counter:
        acquired = 0

        async def acquire(self) -> None:
            self.acquired += 1

    limiter = Counter()
    sim.inject(Fault.status(503, times=2))
    await open_session(limiter=limiter).get_results(held)
    assert limiter.acquired == sim.request_count == 3
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
    assert repr(Session()) == "<Session, not open>"


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
        ({"base_url": "ftp://host"}, "base_url"),
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


async def test_closing_twice_at_once_closes_once(session: Session, held: int) -> None:
    """Both callers return once the session is closed."""
    await session.get_results(held)
    await asyncio.gather(session.aclose(), session.aclose())
    with pytest.raises(SessionClosed):
        await session.get_results(held)


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


def test_a_session_left_open_ends_with_its_loop(threaded_sim: Simulator) -> None:
    """Nothing leaks; the next loop opens it again by using it, whichever way."""
    held = threaded_sim.add_execution(Scenario([SimNode("A", duration=None)]))
    session = quick(threaded_sim)

    async def use() -> None:
        await session.get_results(held)

    async def wake() -> None:
        assert not session.wake(held)
        await use()

    async def enter() -> None:
        async with session:
            await use()

    in_new_loops(use, use, wake, enter)
    assert threaded_sim.request_count == 4


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


async def test_the_base_url_s_path_prefix_is_kept(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """A gateway may serve the API under a path."""
    session = open_session(base_url=f"{sim.base_url}/gate%20way/")
    with pytest.raises(Exception, match="404"):
        await session.get_results(1)
    assert sim.requests[0].path == "/gate%20way/workflow-version-execution-results"


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
    execution = Execution(Session("secret-key"), 7, "Agent", warning="careful")
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
    with pytest.raises(TypeError, match="cannot pickle"):
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


@pytest.mark.parametrize("host", ["gateway.test", "10.0.0.1", "127.0.0.1.evil.test"])
def test_plain_http_to_another_machine_warns_once(host: str) -> None:
    """The warning is for the line that makes the session, however often it is opened."""
    with pytest.warns(UserWarning, match=f"http://{host} is plain http") as caught:
        session = Session("key", base_url=f"http://{host}")
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


@pytest.mark.parametrize(
    "base_url", ["https://api.test", "http://LOCALHOST:1", "http://127.9.9.9", "http://[::1]"]
)
def test_https_and_loopback_do_not_warn(base_url: str) -> None:
    """Warnings are errors in the tests, so this passes without one."""
    asyncio.run(open_and_close(Session("key", base_url=base_url)))
