"""`Workflow`: a value that describes a workflow once, in place of its name."""

# ruff: noqa: D101 - the classes are what users would write

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypedDict, TypeVar

import attrs
import pytest
from pydantic import BaseModel

from promptlayer_exec import (
    ConnectionFailed,
    ExecutionStarted,
    ExecutionTimeout,
    InvalidInputs,
    InvalidOutput,
    RetryPolicy,
    Session,
    StartFailed,
    StartRequest,
    Workflow,
)
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

T = TypeVar("T")


@attrs.frozen
class Topic:
    topic: str


@attrs.frozen
class Report:
    title: str


class Row(TypedDict):
    title: str


class Model(BaseModel):
    topic: str


@dataclasses.dataclass
class Order:
    topic: str


@attrs.frozen
class Boxed(Generic[T]):
    topic: T


class Plain:
    pass


class Named(Protocol):
    topic: str


WRITE = Workflow("write-report", inputs=Topic, output=Report, label="prod", metadata={"app": "a"})


@pytest.fixture(autouse=True)
def _workflow(sim: Simulator) -> None:
    def write(inputs: Any) -> Scenario:
        return Scenario([SimNode("Report", {"title": inputs["topic"]}, is_output_node=True)])

    sim.add_workflow("write-report", write, inputs={"topic": "string"}, labels=["prod", "canary"])


def test_a_workflow_is_a_value() -> None:
    """It compares by value, and can be hashed, pickled, copied and changed."""
    same = Workflow(
        "write-report", inputs=Topic, output=Report, label="prod", metadata={"app": "a"}
    )
    assert same == WRITE
    assert len({WRITE, same}) == 1
    assert pickle.loads(pickle.dumps(WRITE)) == copy.deepcopy(WRITE) == WRITE
    canary = attrs.evolve(WRITE, label="canary")
    assert (canary.label, canary.output, canary.metadata) == ("canary", Report, {"app": "a"})
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        WRITE.label = "canary"  # type: ignore[misc]


def test_a_workflow_keeps_its_metadata() -> None:
    """Later changes of the caller's dict do not reach it."""
    metadata = {"app": "a"}
    workflow = Workflow("w", metadata=metadata)
    metadata["app"] = "b"
    assert workflow.metadata == {"app": "a"}


@pytest.mark.parametrize(
    ("workflow", "shown"),
    [
        (WRITE, "<Workflow 'write-report' label 'prod': Topic -> Report>"),
        (Workflow(7, version=3), "<Workflow 7 version 3>"),
        (Workflow("w", output=list[Row]), f"<Workflow 'w': Any -> list[{__name__}.Row]>"),
    ],
)
def test_a_workflow_prints_what_it_is(workflow: Workflow, shown: str) -> None:
    """Its version and its types, without its metadata and description."""
    assert repr(workflow) == shown


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": 1.5}, TypeError, "workflow must be a name or an int id"),
        ({"name": True}, TypeError, "workflow must be a name or an int id"),
        ({"output": "Report"}, TypeError, "output must be a type, such as the class Report, not"),
        ({"inputs": "Topic"}, TypeError, "inputs must be a type"),
        ({"label": "prod", "version": 1}, ValueError, "either label or version"),
    ],
)
def test_a_mistake_is_found_when_the_workflow_is_made(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Not in the first call."""
    with pytest.raises(error, match=message):
        Workflow(**{"name": "w", **arguments})


async def test_run_takes_a_workflow(sim: Simulator, session: Session) -> None:
    """It sends its label and metadata, and returns its output's type."""
    assert await session.run(WRITE, Topic("otters"), metadata={"job": "1"}) == Report("otters")
    (run,) = sim.runs
    assert run.body["workflow_label_name"] == "prod"
    assert run.body["metadata"] == {"app": "a", "job": "1"}
    assert run.body["input_variables"] == {"topic": "otters"}


async def test_a_call_replaces_the_version_and_adds_metadata(
    sim: Simulator, session: Session
) -> None:
    """A label replaces a version too, and a call's entries take precedence."""
    await session.run(WRITE, Topic("a"), version=1, metadata={"app": "b"})
    await session.run(Workflow("write-report", version=1), {"topic": "a"}, label="canary")
    first, second = (run.body for run in sim.runs)
    assert first["workflow_version_number"] == 1
    assert "workflow_label_name" not in first
    assert first["metadata"] == {"app": "b"}
    assert second["workflow_label_name"] == "canary"
    assert "workflow_version_number" not in second


async def test_a_handle_keeps_the_type_of_the_output(sim: Simulator, session: Session) -> None:
    """Also pickled, or made from an id; `into=` replaces it."""
    execution = await session.start(WRITE, Topic("otters"))
    assert execution.workflow == "write-report"
    assert await execution.output() == Report("otters")
    assert await execution.output(into=Row) == {"title": "otters"}

    found = session.execution(execution.id, WRITE)
    assert (found.workflow, found) == ("write-report", execution)
    assert await found.output() == Report("otters")
    assert session.execution(execution.id, "write-report").workflow == "write-report"
    assert await session.execution(execution.id, 7).output() == {"title": "otters"}

    unpickled = pickle.loads(pickle.dumps(execution))
    (outcome,) = await session.collect([unpickled])
    assert outcome.result() == Report("otters")


async def test_a_session_describes_the_version_of_a_workflow(
    sim: Simulator, session: Session
) -> None:
    """`definition` asks for its label, or for that of the call."""
    assert (await session.definition(WRITE)).labels == ("prod", "canary")
    await session.definition(WRITE, version=1)
    asked = [request.query for request in sim.requests]
    assert asked == [{"label": "prod"}, {"version": "1"}]


async def test_a_fan_out_gives_each_item_the_type_of_its_workflow(session: Session) -> None:
    """`into=` is for the items that have none."""
    handle = await session.start(WRITE, Topic("c"))
    items = [
        StartRequest(WRITE, Topic("a")),
        StartRequest("write-report", {"topic": "b"}),
        handle,
        handle.id,
        StartRequest("write-report", {"topic": "e"}, into=dict[str, str]),
    ]
    results = [outcome.result() for outcome in await session.collect(items)]
    assert results == [
        *(Report("a"), {"title": "b"}),
        *(Report("c"), {"title": "c"}, {"title": "e"}),
    ]
    outcomes = await session.collect(items[1:], into=list[str])
    assert [outcome.ok for outcome in outcomes] == [False, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"into": Report}, TypeError, "into= is for a workflow given by name"),
        (
            {"inputs": Report("x")},
            TypeError,
            "'write-report' takes inputs of type Topic, got Report",
        ),
        ({"inputs": {"topik": "x"}}, InvalidInputs, "did you mean 'topic'"),
        ({"label": "prod", "version": 1}, ValueError, "either label or version"),
    ],
)
async def test_misuse_is_found_before_anything_is_sent(
    sim: Simulator,
    open_session: Callable[..., Session],
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    """A mapping may stand for the inputs' class, and is checked like any other."""
    session = open_session(check_inputs=True)
    with pytest.raises(error, match=message):
        await session.run(WRITE, **{"inputs": Topic("x"), **arguments})
    assert not sim.runs


async def test_an_output_type_without_a_rule_is_found_before_anything_is_sent(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """By `start` as well. It depends on the session's converter."""
    workflow = Workflow("write-report", output=Plain)
    with pytest.raises(TypeError, match="cannot structure into"):
        await session.start(workflow, {"topic": "x"})
    assert sim.request_count == 0
    (failed,) = recorder.of(StartFailed)
    assert failed.request.workflow == "write-report"


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (Topic, Topic("x"), Report("x")),
        (Order, Order("x"), Topic("x")),
        (Model, Model(topic="x"), Topic("x")),
        (Boxed[str], Boxed("x"), Topic("x")),
        (Topic | Order, Order("x"), Model(topic="x")),
        (Row, {"topic": "x"}, Topic("x")),
        (dict[str, str], {"topic": "x"}, Topic("x")),
    ],
)
def test_an_instance_of_another_class_is_no_input(form: Any, good: Any, bad: Any) -> None:
    """Whatever the kind of the class."""
    workflow: Workflow = Workflow("w", inputs=form)
    assert StartRequest(workflow, good).inputs is good
    assert StartRequest(workflow).inputs == {}
    with pytest.raises(TypeError, match="workflow 'w' takes inputs of type"):
        StartRequest(workflow, bad)


def test_a_type_that_no_value_can_be_compared_with_is_let_through() -> None:
    """Type checkers compare with a protocol."""
    workflow: Workflow = Workflow("w", inputs=Named)
    assert StartRequest(workflow, Topic("x")).inputs == Topic("x")


async def test_an_output_of_another_type_is_invalid(sim: Simulator, session: Session) -> None:
    """The run exists, so the error has its id."""
    with pytest.raises(InvalidOutput, match=r"\$\.title: is missing") as caught:
        await session.run(attrs.evolve(WRITE, output=Report, name=sim_other(sim)), Topic("x"))
    assert caught.value.execution_id == sim.runs[0].execution_id


def sim_other(sim: Simulator) -> str:
    """Add a workflow with another output, and return its name."""
    sim.add_workflow("other", Scenario([SimNode("A", {}, is_output_node=True)]), labels=["prod"])
    return "other"


def test_a_request_can_be_changed() -> None:
    """It keeps the type of its output."""
    request = attrs.evolve(StartRequest(WRITE, Topic("a")), label="canary", key="k")
    assert (request.workflow, request.label, request.key) == ("write-report", "canary", "k")
    assert request.into is Report
    assert pickle.loads(pickle.dumps(request)) == request


async def test_a_start_gives_up_before_it_sends_the_request(
    open_session: Callable[..., Session], raw_server: Any
) -> None:
    """`timeout=` limits the retries of a server that cannot be reached; nothing was started."""
    await raw_server.refuse()
    session = open_session(base_url=raw_server.url, retry=RetryPolicy(base=0.01))
    with pytest.raises(ExecutionTimeout, match=r"within 0\.5 s, so no run was started") as caught:
        await session.start(WRITE, Topic("x"), timeout=0.5)
    assert isinstance(caught.value.__cause__, ConnectionFailed)


async def test_a_start_waits_for_a_response_whose_id_would_be_lost(
    sim: Simulator, session: Session, recorder: Any
) -> None:
    """Without a key, the timeout no longer matters once the request was sent."""
    sim.inject(Fault.delay(0.6), path="/run")
    execution = await session.start(WRITE, Topic("x"), timeout=0.5)
    assert execution.id == sim.runs[0].execution_id
    (started,) = recorder.of(ExecutionStarted)
    assert not started.abandoned
    assert started.duration > 0.5


@pytest.mark.parametrize(
    ("timeout", "error"), [(-1, ValueError), ("5", TypeError), (True, TypeError)]
)
async def test_a_start_refuses_an_unusable_timeout(
    sim: Simulator, session: Session, timeout: Any, error: type[Exception]
) -> None:
    """As every other call does."""
    with pytest.raises(error, match="timeout must"):
        await session.start(WRITE, Topic("x"), timeout=timeout)
    assert sim.request_count == 0
