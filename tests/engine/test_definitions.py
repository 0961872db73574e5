"""Inputs are checked before a run is paid for, by the definition of the version that would run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from promptlayer_exec import (
    ExecutionStarted,
    ExecutionTimeout,
    Forbidden,
    InvalidInputs,
    RequestTimeout,
    Session,
    SessionClosed,
    StartFailed,
    StartRequest,
)
from promptlayer_exec._engine import definitions
from promptlayer_exec._integration import definition
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

DONE = Scenario([SimNode("Answer", "42", is_output_node=True)])
MISSPELT = r"missing input for workflow 'w': 'topic' \(string\)\. .* 'topik' \(did you mean 'topic'"


@pytest.fixture
def checking(open_session: Callable[..., Session], sim: Simulator) -> Session:
    """Return a session that checks inputs; the workflow `w` requires a topic."""
    sim.add_workflow("w", DONE, inputs={"topic": "string"}, labels=["prod"])
    return open_session(check_inputs=True)


def reads(sim: Simulator) -> int:
    """Return how often a definition was asked for."""
    return [(it.method, it.path) for it in sim.requests].count(("GET", "/workflows/w"))


async def test_a_misspelt_input_starts_nothing(
    sim: Simulator, checking: Session, recorder: Any
) -> None:
    """`start`, `run` and a fan-out say what was meant."""
    inputs = {"topik": "otters"}
    for attempt in (checking.start, checking.run):
        with pytest.raises(ValueError, match=MISSPELT):
            await attempt("w", inputs)
    (outcome,) = await checking.collect([StartRequest("w", inputs)])
    with pytest.raises(ValueError, match=MISSPELT):
        outcome.result()
    assert sim.runs == []
    assert [type(event.error) for event in recorder.of(StartFailed)] == [InvalidInputs] * 3
    assert recorder.of(ExecutionStarted) == []


async def test_the_version_that_would_run_is_looked_at(sim: Simulator, checking: Session) -> None:
    """A label or a number selects it."""
    sim.add_version("w", DONE, inputs={"text": "string"})
    for chosen in ({"label": "prod"}, {"version": 1}):
        with pytest.raises(ValueError, match="'topic'"):
            await checking.start("w", {"text": "x"}, **chosen)
        await checking.start("w", {"topic": "x"}, **chosen)
    with pytest.raises(ValueError, match="'text'"):
        await checking.start("w", {"topic": "x"})


async def test_starts_share_one_definition(sim: Simulator, checking: Session) -> None:
    """Those at once, and those of the next five minutes."""
    requests = [StartRequest("w", {"topic": "otters"})] * 20
    assert all(outcome.ok for outcome in await checking.collect(requests))
    await checking.start("w", {"topic": "otters"})
    assert (len(sim.runs), reads(sim)) == (21, 1)


async def test_after_five_minutes_a_definition_is_read_again(
    sim: Simulator, checking: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have changed meanwhile."""
    monkeypatch.setattr(definitions, "_LIMITS", definitions._Limits(kept_for=0.0))
    for _ in range(2):
        await checking.start("w", {"topic": "otters"})
    assert reads(sim) == 2


async def test_nothing_is_refused_on_a_kept_definition(sim: Simulator, checking: Session) -> None:
    """It is read once more first: the input may have been renamed."""
    await checking.start("w", {"topic": "otters"})
    sim.add_version("w", DONE, inputs={"text": "string"})
    await checking.start("w", {"text": "otters"})
    with pytest.raises(ValueError, match="'text'"):
        await checking.start("w", {})
    assert (len(sim.runs), reads(sim)) == (2, 3)


@pytest.mark.parametrize("fault", [Fault.status(403), Fault.status(200, body=b"[]"), Fault.stall()])
async def test_a_start_goes_on_without_a_definition(
    sim: Simulator, checking: Session, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """That there is none is kept, too: the next start does not wait for it."""
    monkeypatch.setattr(definitions, "_LIMITS", definitions._Limits(timeout=0.3))
    sim.inject(fault)
    await checking.start("w")
    await checking.start("w")
    assert (len(sim.runs), reads(sim)) == (2, 1)


async def test_a_check_can_be_turned_off(
    sim: Simulator, checking: Session, open_session: Callable[..., Session]
) -> None:
    """Then the start is the only request."""
    await open_session(check_inputs=False).start("w")
    assert [request.method for request in sim.requests] == ["POST"]


async def test_a_number_for_a_string_is_a_warning(
    sim: Simulator, checking: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """One for each input, without the value; PromptLayer may take the number."""
    sim.add_workflow("n", DONE, inputs={"text": "string", "count": "number", "flag": "string"})
    with caplog.at_level(logging.WARNING, "promptlayer_exec"):
        for _ in range(2):
            await checking.start("n", {"text": 12345, "count": 1, "flag": True})
    (said,) = caplog.messages
    assert said == "workflow 'n' expects its input 'text' as a string, but gets a number"


async def test_all_parts_of_a_session_share_one_definition(
    sim: Simulator, checking: Session
) -> None:
    """What a start has read, the viewer and the MCP server show, until they want a new one."""
    await checking.start("w", {"topic": "otters"})
    shared = await definition(checking, "w")
    assert (shared.required_inputs, [*shared.nodes]) == ({"topic": "string"}, ["Answer"])
    assert await definition(checking, "w") is shared
    assert reads(sim) == 1
    await definition(checking, "w", fresh=True)
    assert reads(sim) == 2


async def test_inputs_are_kept_of_more_definitions_than_nodes(
    sim: Simulator, checking: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes may be many, and only those who show a graph ask for them."""
    monkeypatch.setattr(definitions, "_LIMITS", definitions._Limits(most_with_nodes=1))
    sim.add_workflow("other", DONE)
    for name in ("w", "other"):
        await definition(checking, name)
    await checking.start("w", {"topic": "otters"})
    assert reads(sim) == 1
    await definition(checking, "w")
    assert reads(sim) == 2


async def test_why_there_is_no_definition_is_not_kept(sim: Simulator, checking: Session) -> None:
    """Whoever asks again may have corrected it; all who ask at once get an error of their own."""
    sim.inject(Fault.status(403))
    errors = await asyncio.gather(
        definition(checking, "w"), definition(checking, "w"), return_exceptions=True
    )
    assert [type(error) for error in errors] == [Forbidden] * 2
    assert str(errors[0]) == str(errors[1])
    assert str(errors[0]).startswith("workflow 'w': the server returned 403")
    assert (await definition(checking, "w")).name == "w"
    assert reads(sim) == 2


async def test_a_definition_that_does_not_come_is_given_up(
    sim: Simulator, checking: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After seconds, long before `request_timeout`."""
    monkeypatch.setattr(definitions, "_LIMITS", definitions._Limits(timeout=0.05))
    sim.inject(Fault.stall())
    with pytest.raises(RequestTimeout, match=r"workflow 'w': no response within 0.05 s"):
        await definition(checking, "w")


async def test_closing_the_session_ends_a_reading(sim: Simulator, checking: Session) -> None:
    """Like any other call."""
    sim.inject(Fault.stall())
    reading = asyncio.create_task(definition(checking, "w"))
    await sim.wait_for_requests(1)
    await checking.aclose()
    with pytest.raises(SessionClosed):
        await reading


class TestEnds:
    """Whatever ends a start while its workflow's definition does not come."""

    @pytest.fixture
    async def starting(self, sim: Simulator, checking: Session, recorder: Any) -> asyncio.Task[Any]:
        """Return a start that waits for the definition."""
        sim.inject(Fault.stall(), path="/workflows/w")
        starting = asyncio.create_task(checking.run("w", {"topic": "otters"}, timeout=0.5))
        await sim.wait_for_requests(1)
        return starting

    async def test_a_cancellation(
        self, sim: Simulator, checking: Session, starting: asyncio.Task[Any], recorder: Any
    ) -> None:
        """It is prompt, nothing is started, and others still get the definition."""
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert (sim.runs, len(recorder.of(StartFailed))) == ([], 1)

    async def test_a_deadline(self, sim: Simulator, starting: asyncio.Task[Any]) -> None:
        """The error says that nothing was started, and why."""
        with pytest.raises(ExecutionTimeout, match="no run was started: the definition of"):
            await starting
        assert sim.runs == []

    async def test_the_end_of_the_session(
        self, sim: Simulator, checking: Session, starting: asyncio.Task[Any]
    ) -> None:
        """The start ends like any call."""
        await checking.aclose()
        with pytest.raises(SessionClosed):
            await starting
        assert sim.runs == []
