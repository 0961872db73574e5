"""`promptlayer_exec.sync`: the session for synchronous code."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from promptlayer_exec import (
    ConfigurationError,
    Event,
    ExecutionFailed,
    ExecutionStarted,
    NotFound,
    SessionClosed,
    StartRequest,
    StartUnknown,
    Workflow,
)
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.starts import SQLStartStore
from promptlayer_exec.sync import Session


@pytest.fixture
def sim() -> Iterator[Simulator]:
    """Serve from a thread, and hold one workflow until the test finishes it."""
    with Simulator() as sim:

        def echo(inputs: Any) -> Scenario:
            return Scenario([SimNode("Answer", dict(inputs), is_output_node=True)])

        sim.add_workflow("echo", echo)
        sim.add_workflow("held", Scenario([SimNode("Answer", 1, None, is_output_node=True)]))
        failing = SimNode("Answer", status="FAILED", error_message="no", is_output_node=True)
        sim.add_workflow("fails", Scenario([failing]))
        yield sim


@pytest.fixture
def session(sim: Simulator) -> Iterator[Session]:
    """Return an open session."""
    with Session(sim.api_key, base_url=sim.base_url) as session:
        yield session


def test_run_returns_the_main_output(session: Session) -> None:
    """It has the type that `into` or the workflow asks for, and errors are the usual ones."""
    assert session.run("echo", {"n": 1}) == {"n": 1}
    assert session.run("echo", {"n": 1}, into=dict[str, float]) == {"n": 1.0}
    assert session.run(Workflow("echo", output=dict[str, float]), {"n": 1}) == {"n": 1.0}
    with pytest.raises(ExecutionFailed, match="no"):
        session.run("fails")
    with pytest.raises(NotFound):
        session.run("nothing")


def test_a_handle_follows_its_run(sim: Simulator, session: Session) -> None:
    """Its calls return and yield what those of the asynchronous handle do."""
    execution = session.start("held")
    snapshots = execution.stream()
    assert not next(snapshots).complete
    assert not execution.snapshot().complete

    sim.finish(execution.id, "Answer", value="done")
    assert [snapshot.complete for snapshot in snapshots][-1]
    assert [node.value for node in execution.finished_nodes()] == ["done"]
    assert execution.wait().complete
    assert execution.output() == "done"
    assert execution.outputs() == {"Answer": "done"}
    assert session.execution(execution.id) == session.execution(str(execution.id))
    assert session.get_results(execution.id).value == "done"


def test_a_fan_out_takes_items_in_the_thread_that_asks_for_outcomes(session: Session) -> None:
    """So a database cursor can give them, and as few as there is room for are taken."""
    threads = set()

    def items() -> Iterator[StartRequest]:
        for n in range(5):
            threads.add(threading.get_ident())
            yield StartRequest("echo", {"n": n})

    outputs = [outcome.output["n"] for outcome in session.as_completed(items(), max_in_flight=2)]
    assert sorted(outputs) == [0, 1, 2, 3, 4]
    assert [outcome.output["n"] for outcome in session.collect(items())] == [0, 1, 2, 3, 4]
    assert threads == {threading.get_ident()}


def test_an_error_of_the_items_ends_a_fan_out(session: Session) -> None:
    """What has started gets its outcome first."""

    def items() -> Iterator[StartRequest]:
        yield StartRequest("echo", {"n": 0})
        raise LookupError("the next item")

    outcomes = session.as_completed(items())
    assert next(outcomes).ok
    with pytest.raises(LookupError, match="the next item"):
        next(outcomes)
    with pytest.raises(TypeError, match="must be an iterable, not 5"):
        session.collect(5)  # type: ignore[call-overload]


def test_outcomes_have_the_items_and_handles_of_the_caller(session: Session) -> None:
    """The handle in an outcome makes the same blocking calls."""
    given = session.start("echo", {"n": 1})
    followed, by_id, started = session.collect([given, given.id, StartRequest("echo")])
    assert followed.item is given
    assert followed.execution is given
    assert by_id.execution == given
    assert started.execution is not None
    assert started.execution.output() == {}

    streamed = list(session.stream_all([given, started.execution.id]))
    assert {execution.id for execution, _ in streamed} == {given.id, started.execution.id}


def test_a_key_finds_its_run(sim: Simulator, tmp_path: Path) -> None:
    """And starts nothing."""
    store = SQLStartStore(f"sqlite:///{tmp_path / 'starts.sqlite'}")
    with Session(sim.api_key, base_url=sim.base_url, starts=store) as session:
        assert session.find("order-1") is None
        assert session.run("echo", {"n": 1}, key="order-1") == {"n": 1}
        found = session.find("order-1")
        assert found is not None
        assert found.output() == {"n": 1}
    assert len(sim.runs) == 1


def test_workflows_and_their_definitions(session: Session) -> None:
    """Workflows are listed by an iterator."""
    assert {summary.name for summary in session.workflows()} == {"echo", "fails", "held"}
    assert session.definition("echo").name == "echo"


def test_settings_are_checked_when_it_is_made() -> None:
    """With the messages of the asynchronous session."""
    with pytest.raises(TypeError, match="wait_timeout"):
        Session(timeout=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="poll"):
        Session(poll=1.0)  # type: ignore[arg-type]


def test_a_missing_key_is_an_error_of_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left running."""
    monkeypatch.delenv("PROMPTLAYER_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="no API key"), Session():
        pass
    assert "promptlayer_exec.sync" not in {thread.name for thread in threading.enumerate()}


def test_threads_share_a_session(session: Session) -> None:
    """Each gets its own output."""
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda n: session.run("echo", {"n": n})["n"], range(20)))
    assert outputs == list(range(20))


def test_closing_ends_the_waits_of_other_threads(sim: Simulator) -> None:
    """Each raises `SessionClosed` with the id of its run."""
    followed = threading.Event()

    def observe(event: Event) -> None:
        if type(event).__name__ == "Polled":
            followed.set()

    session = Session(sim.api_key, base_url=sim.base_url, observers=[observe])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(session.run, "held")
        assert followed.wait(10)
        session.close()
        error = waiting.exception(10)
    assert isinstance(error, SessionClosed)
    assert error.execution_id == sim.runs[0].execution_id


def test_a_closed_session_can_be_entered_again(sim: Simulator) -> None:
    """Until then, calls raise `SessionClosed`, but a complete handle keeps its output."""
    with Session(sim.api_key, base_url=sim.base_url) as session:
        execution = session.start("echo", {"n": 1})
        unfinished = session.start("held")
        stream = unfinished.stream()
        next(stream)
        execution.wait()

    assert execution.output() == {"n": 1}
    with pytest.raises(SessionClosed):
        next(stream)
    with pytest.raises(SessionClosed) as caught:
        unfinished.output()
    assert caught.value.execution_id == unfinished.id
    with pytest.raises(SessionClosed):
        session.run("echo")
    with session:
        assert session.run("echo", {"n": 2}) == {"n": 2}
    session.close()


async def test_in_a_coroutine_it_is_an_error(sim: Simulator) -> None:
    """The error names the session for coroutines. A callback would block the loop as well."""
    session = Session(sim.api_key, base_url=sim.base_url)
    with pytest.raises(RuntimeError, match=r"use promptlayer_exec\.Session"):
        session.run("echo")

    called: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def callback() -> None:
        try:
            called.set_result(session.run("echo"))
        except RuntimeError as error:
            called.set_exception(error)

    asyncio.get_running_loop().call_soon(callback)
    with pytest.raises(RuntimeError, match=r"use promptlayer_exec\.Session"):
        await called


def test_an_observer_cannot_wait_for_a_call(sim: Simulator) -> None:
    """The loop of the session calls it, so it would wait for ever."""
    errors: list[Exception] = []

    def observe(event: Event) -> None:
        if not errors:
            try:
                session.run("echo")
            except RuntimeError as error:
                errors.append(error)

    with Session(sim.api_key, base_url=sim.base_url, observers=[observe]) as session:
        session.run("echo")
    assert "use promptlayer_exec.Session" in str(errors)


async def test_it_works_in_the_cell_of_a_notebook(sim: Simulator) -> None:
    """A notebook runs the code of a cell in a loop, and waits for it."""
    cell = (
        "def call():\n    return session.run('echo', {'n': 1})\nwith session:\n    output = call()"
    )
    names: dict[str, Any] = {"session": Session(sim.api_key, base_url=sim.base_url)}
    exec(compile(cell, "<cell>", "exec"), names)
    assert names["output"] == {"n": 1}


def test_an_exception_in_the_with_block_logs_the_ids_of_runs(
    sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """Of those whose outcome nobody received. A block that ends as planned logs nothing."""
    with Session(sim.api_key, base_url=sim.base_url) as session:
        session.start("held")
    assert caplog.messages == []

    with suppress(LookupError), session:
        session.start("echo").output()
        with suppress(ExecutionFailed):
            session.start("fails").output()
        session.start("held")
        raise LookupError
    (message,) = caplog.messages
    lost = sim.runs[-1].execution_id
    assert message.startswith(f"execution {lost} of workflow 'held' started, but nobody")


def only_errors() -> logging.Handler:
    """Return a handler that takes no warnings."""
    handler = logging.StreamHandler()
    handler.setLevel("ERROR")
    return handler


LOGGING: dict[str, tuple[list[logging.Handler], dict[str, Any]]] = {
    "none": ([], {}),
    "no handler": ([logging.NullHandler()], {}),
    "a handler for errors": ([only_errors()], {}),
    "another level": ([logging.StreamHandler()], {"level": logging.ERROR}),
    "disabled": ([logging.StreamHandler()], {"disabled": True}),
}


@pytest.mark.parametrize("configuration", LOGGING)
def test_logging_that_drops_warnings_loses_no_id(
    sim: Simulator, capsys: pytest.CaptureFixture[str], configuration: str
) -> None:
    """The line goes to stderr, once."""
    handlers, of_logger = LOGGING[configuration]
    logger = logging.getLogger("promptlayer_exec")
    with pytest.MonkeyPatch.context() as patch, suppress(LookupError):
        patch.setattr(logging.getLogger(), "handlers", handlers)
        patch.setattr(logger, "handlers", [])
        patch.setattr(logger, "disabled", of_logger.get("disabled", False))
        logger.setLevel(of_logger.get("level", logging.NOTSET))
        with Session(sim.api_key, base_url=sim.base_url) as session:
            session.start("held")
            raise LookupError
    logger.setLevel(logging.NOTSET)
    lines = capsys.readouterr().err.splitlines()
    assert [f"execution {sim.runs[0].execution_id} of" in line for line in lines] == [True]


@pytest.mark.parametrize("call", ["run", "start", "as_completed"])
def test_another_ctrl_c_gives_up_the_response_to_a_start(
    sim: Simulator, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    """The first one says at once what closing waits for. The other names what may have started."""

    class Stderr(io.StringIO):
        def write(self, text: str) -> int:
            if "waiting" in text:
                signal.raise_signal(signal.SIGUSR1)
            return super().write(text)

    def interrupt(*_: object) -> None:
        raise LookupError

    def slow(inputs: Any) -> Scenario:
        signal.raise_signal(signal.SIGUSR1)
        return Scenario([])

    sim.add_workflow("slow", slow)
    sim.inject(Fault.delay_response(60.0), path="/run")
    store = SQLStartStore(f"sqlite:///{tmp_path / 'starts.sqlite'}")
    session = Session(sim.api_key, base_url=sim.base_url, starts=store)
    request = StartRequest("slow", key="order-1")

    def make_call() -> None:
        with session:
            if call == "as_completed":
                list(session.as_completed([request]))
            else:
                getattr(session, call)("slow", key="order-1")

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logging.getLogger(), "handlers", [])
            patch.setattr(sys, "stderr", stderr := Stderr())
            with pytest.raises(LookupError):
                make_call()
    finally:
        signal.signal(signal.SIGUSR1, previous)

    waiting, unknown = stderr.getvalue().splitlines()
    assert waiting == (
        "waiting up to 30 s for the response to 1 start request, so that no id is lost."
        " Ctrl-C gives up"
    )
    assert unknown.startswith(
        "a run of workflow 'slow' with the key 'order-1' may have started: the program did not wait"
        " for the response."
    )
    with session, pytest.raises(StartUnknown):
        session.find("order-1")


def test_another_ctrl_c_names_the_runs_of_other_threads(sim: Simulator) -> None:
    """The program then ends, and its last lines name the runs that may have started."""
    program = """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(2) as pool, session:
            list(pool.map(lambda _: session.run("slow"), range(2)))
    """
    has_started = threading.Semaphore(0)

    def slow(inputs: Any) -> Scenario:
        has_started.release()
        return Scenario([])

    sim.add_workflow("slow", slow)
    sim.inject(Fault.delay_response(60.0, times=2), path="/run")
    with subprocess.Popen(
        command(program), env=environment(sim), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert has_started.acquire(timeout=20)
        assert has_started.acquire(timeout=20)
        process.send_signal(signal.SIGINT)
        assert "response to 2 start requests" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=20)
    assert printed.count("a run of workflow 'slow' may have started") == 2


def test_leaving_a_fan_out_early_logs_the_ids_of_its_runs(
    sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """As in asyncio."""
    started = threading.Semaphore(0)

    def observe(event: Event) -> None:
        if isinstance(event, ExecutionStarted):
            started.release()

    with Session(sim.api_key, base_url=sim.base_url, observers=[observe]) as session:
        requests = [StartRequest("echo"), StartRequest("held"), StartRequest("held")]
        for outcome in session.as_completed(requests):
            assert outcome.ok
            assert all(started.acquire(timeout=10) for _ in requests)
            break
    held = [run.execution_id for run in sim.runs if run.execution_id != outcome.execution.id]  # type: ignore[union-attr]
    logged = " ".join(caplog.messages)
    assert held
    assert all(str(execution_id) in logged for execution_id in held)


def test_a_child_process_opens_it_afresh(sim: Simulator) -> None:
    """Even while a thread of its parent waits, and its parent keeps its connections."""
    program = """
        waiting = threading.Thread(target=lambda: session.run("held"), daemon=True)
        waiting.start()
        execution = session.start("echo", {"n": 1})
        print(execution.output())
        child = os.fork()
        print(session.run("echo", {"n": 2}), execution.output(), session.start("echo").output())
        if child:
            assert os.waitpid(child, 0)[1] == 0
            print(session.run("echo", {"n": 3}))
    """
    finished = run_program(sim, program)
    assert sorted(finished.stdout.split("\n")) == sorted(
        ["{'n': 1}", *["{'n': 2} {'n': 1} {}"] * 2, "{'n': 3}", ""]
    )
    # Only the parent has this run.
    (held,) = (run.execution_id for run in sim.runs if run.workflow == "held")
    assert finished.stderr.count(f"execution {held} of") == 1


HEADER = """
import os, signal, sys, threading
from promptlayer_exec import StartRequest
from promptlayer_exec.starts import SQLStartStore
from promptlayer_exec.sync import Session
session = Session()
"""


def command(program: str) -> list[str]:
    """Return the command that runs a program with a session."""
    lines = [line.removeprefix("        ") for line in program.splitlines()]
    return [sys.executable, "-c", HEADER + "\n".join(lines)]


def environment(sim: Simulator) -> dict[str, str]:
    """Return an environment in which sessions call the simulator."""
    keys = {"PROMPTLAYER_API_KEY": sim.api_key, "PROMPTLAYER_BASE_URL": sim.base_url}
    return {**os.environ, **keys}


def run_program(sim: Simulator, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        command(program),
        env=environment(sim),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )


def test_an_interpreter_that_exits_prints_the_ids_of_an_open_session(
    sim: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also of a session that it has dropped, and of the calls of its threads. Stores close too."""
    monkeypatch.setenv("PROMPTLAYER_EXEC_DB", f"sqlite:///{tmp_path / 'starts.sqlite'}")
    program = """
        def start():
            Session(starts=SQLStartStore()).start("held", key="order-1")
        start()
        threading.Thread(target=lambda: session.run("held"), daemon=True).start()
        while len(list(session.workflows())) < 3:
            pass
        session.start("held").snapshot()
    """
    finished = run_program(sim, program)
    assert len(sim.runs) == 3
    assert all(f"execution {run.execution_id} of" in finished.stderr for run in sim.runs)
    assert "never retrieved" not in finished.stderr


INTERRUPTED = {
    "run": 'session.run("held")',
    "as_completed": """
for outcome in session.as_completed([StartRequest("held")] * 8, max_in_flight=3): pass
""",
}


# tests/kill has the other calls, and many more moments.
@pytest.mark.parametrize(("call", "has_logging"), [("run", False), ("as_completed", True)])
def test_ctrl_c_prints_the_ids(sim: Simulator, call: str, has_logging: bool) -> None:
    """At any moment, of all runs that started."""
    configure = "import logging; logging.basicConfig(level=logging.INFO)\n" if has_logging else ""
    sim.inject(Fault.delay_response(random.uniform(0.0, 0.3), times=8))
    with subprocess.Popen(
        command(configure + 'print("begins", flush=True)\n' + INTERRUPTED[call]),
        env=environment(sim),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.uniform(0.0, 1.0))  # the moment
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=30)

    assert "KeyboardInterrupt" in printed
    lines = [line for line in printed.splitlines() if "started, but " in line]
    assert len(lines) == bool(sim.runs)
    assert all(str(run.execution_id) in lines[0] for run in sim.runs), printed


@pytest.mark.parametrize("has_handle", [False, True])
def test_what_interrupts_a_call_in_its_thread_cancels_it(
    sim: Simulator, caplog: pytest.LogCaptureFixture, has_handle: bool
) -> None:
    """A signal handler may raise any exception, as Celery does at the end of a time limit."""

    def handle(*_: object) -> None:
        raise LookupError("the time limit of the task")

    def observe(event: Event) -> None:
        if type(event).__name__ == "Polled":
            signal.raise_signal(signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, handle)
    session = Session(sim.api_key, base_url=sim.base_url, observers=[observe])
    call = partial(session.run, "held")
    if has_handle:
        call = session.start("held").output
    try:
        with pytest.raises(LookupError, match="time limit"):
            call()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    (message,) = caplog.messages
    assert message.startswith(f"execution {sim.runs[0].execution_id} of workflow 'held' started")
    session.close()
