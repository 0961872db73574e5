"""`Session.run`: a start and its output in one call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from promptlayer_exec import (
    ExecutionFailed,
    ExecutionStarted,
    ExecutionTimeout,
    InvalidOutput,
    NotFound,
    PromptLayerExecError,
    Session,
    SessionClosed,
)
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator


@pytest.fixture(autouse=True)
def _workflows(sim: Simulator) -> None:
    def echo(inputs: Any) -> Scenario:
        return Scenario([SimNode("Answer", dict(inputs), is_output_node=True)])

    sim.add_workflow("echo", echo)
    sim.add_workflow("held", Scenario([SimNode("Answer", 1, None, is_output_node=True)]))
    failing = SimNode("Answer", status="FAILED", error_message="no", is_output_node=True)
    sim.add_workflow("fails", Scenario([failing]))


async def test_run_returns_the_main_output(sim: Simulator, session: Session) -> None:
    """The arguments of the start are sent, and `into` is applied to the output."""
    output = await session.run(
        "echo",
        {"topic": "x"},
        version=3,
        metadata={"a": "b"},
        callback_url=f"{sim.base_url}/callback",
        into=dict[str, str],
    )
    assert output == {"topic": "x"}
    (run,) = sim.runs
    assert run.body["workflow_version_number"] == 3
    assert run.body["metadata"] == {"a": "b"}
    assert run.body["callback_url"] == f"{sim.base_url}/callback"
    assert await session.run("echo", label="prod") == {}
    assert sim.runs[1].body["workflow_label_name"] == "prod"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"into": 5}, TypeError, "cannot structure into 5"),
        ({"timeout": -1}, ValueError, "timeout must not be negative"),
        ({"timeout": "5"}, TypeError, "timeout must be a number"),
        ({"inputs": {"x": {1}}}, TypeError, r"inputs\.x"),
        ({"label": "a", "version": 1}, ValueError, "either label or version"),
        ({"input_variables": {}}, TypeError, "it is inputs= here"),
        (
            {"return_all_outputs": True},
            TypeError,
            r"a snapshot with raw",
        ),
    ],
)
async def test_arguments_are_checked_before_anything_is_sent(
    sim: Simulator,
    session: Session,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    """A mistake costs no run."""
    with pytest.raises(error, match=message):
        await session.run("echo", **arguments)
    assert sim.request_count == 0


async def test_the_servers_warning_is_logged(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """No handle is returned that could have it."""
    done = Scenario([SimNode("Answer", 1, is_output_node=True)])
    sim.add_workflow("warns", done, warning="missing: topic\n\x1b[31m")
    await session.run("warns")
    (run,) = sim.runs
    text = "PromptLayer warns: missing: topic\\n\\x1b[31m"
    assert caplog.messages == [f"execution {run.execution_id} of workflow 'warns': {text}"]
    await session.run("echo")
    assert len(caplog.messages) == 1


async def test_a_refused_run_names_its_workflow(session: Session) -> None:
    """The server's own message does not."""
    with pytest.raises(NotFound) as caught:
        await session.run("report")
    text = "no run of workflow 'report' started: the server returned 404 Not Found"
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("workflow", "into", "error"), [("fails", None, ExecutionFailed), ("echo", int, InvalidOutput)]
)
async def test_an_error_of_the_output_has_the_id_and_the_snapshot(
    sim: Simulator, session: Session, workflow: str, into: Any, error: type[PromptLayerExecError]
) -> None:
    """The run was paid for: it can be found again."""
    with pytest.raises(error) as caught:
        await session.run(workflow, into=into)
    assert caught.value.execution_id == sim.runs[0].execution_id
    assert caught.value.last_snapshot is not None


async def test_the_timeout_covers_start_and_wait(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """The error has the id once there is one; a start that was not sent has none."""
    session = open_session()
    with pytest.raises(ExecutionTimeout) as caught:
        await session.run("held", timeout=0.5)
    assert caught.value.execution_id == sim.runs[0].execution_id
    assert caught.value.timeout == 0.5
    slow = open_session(rate=0.001)
    await slow.start("echo")
    with pytest.raises(ExecutionTimeout, match="no run was started") as unsent:
        await slow.run("echo", timeout=0.01)
    assert unsent.value.execution_id is None


@pytest.mark.parametrize("end", ["refused", "closed"])
async def test_every_error_after_the_start_has_the_id(
    sim: Simulator, session: Session, end: str
) -> None:
    """So has that of a session that is closed meanwhile."""
    running = asyncio.create_task(session.run("held"))
    await sim.wait_for_requests(3)
    if end == "closed":
        await session.aclose()
    else:
        sim.inject(Fault.status(403, times=None))
    with pytest.raises(PromptLayerExecError) as caught:
        await running
    assert isinstance(caught.value, SessionClosed) is (end == "closed")
    assert caught.value.execution_id == sim.runs[0].execution_id
    assert caught.value.last_snapshot is not None


async def test_an_error_that_is_not_ours_does_not_lose_the_id(
    sim: Simulator, open_session: Callable[..., Session], caplog: pytest.LogCaptureFixture
) -> None:
    """A limiter fails after the start: the id is in the log."""

    class Limiter:
        calls = 0

        async def acquire(self) -> None:
            self.calls += 1
            if self.calls == 3:  # after the start and one poll
                raise ZeroDivisionError

    outputs = [SimNode("A", 1, is_output_node=True), SimNode("B", 2, is_output_node=True)]
    sim.add_workflow("two outputs", Scenario(outputs))
    with pytest.raises(ZeroDivisionError):
        await open_session(limiter=Limiter()).run("two outputs")
    (run,) = sim.runs
    assert f"execution {run.execution_id} of workflow 'two outputs' started" in caplog.text


async def test_cancelling_after_the_start_logs_the_id(
    sim: Simulator, session: Session, recorder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on at the server, and can be found."""
    running = asyncio.create_task(session.run("held"))
    await sim.wait_for_requests(2)
    with caplog.at_level(logging.WARNING, "promptlayer_exec"):
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    (record,) = caplog.records
    assert f"execution {sim.runs[0].execution_id} of workflow 'held'" in record.getMessage()
    assert len(recorder.of(ExecutionStarted)) == 1
