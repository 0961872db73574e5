"""The main output: which value it is, and when there is none."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from promptlayer_exec import (
    ExecutionFailed,
    ExecutionTimeout,
    InvalidOutput,
    InvalidResponse,
    Node,
    RetryPolicy,
    Session,
    Snapshot,
    strict_converter,
)
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

NODE_MAP = {
    "x": {
        "status": "FAILED",
        "value": None,
        "error_message": "no",
        "raw_error_message": None,
        "is_output_node": True,
    }
}
VALUES: list[Any] = [False, None, 0, {}, [], "", "AAA", NODE_MAP, float("inf"), 2**70]


def complete(*nodes: tuple[str, str, Any, bool | None]) -> Snapshot:
    """Return a complete snapshot of nodes, given as name, status, value and is_output_node."""
    made = {
        name: Node(name, status, value, is_output_node=mark) for name, status, value, mark in nodes
    }
    raw = json.dumps({name: attrs.asdict(node) for name, node in made.items()})
    return Snapshot(787, True, made, raw=json.loads(raw))


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_complete_snapshot_has_the_output(value: Any) -> None:
    """The value of the only successful output node is the output, whatever the others are."""
    snapshot = complete(
        ("Plan", "FAILED", None, False),
        ("Other", "FAILED", None, True),
        ("Late", "SKIPPED", None, True),
        ("Answer", "SUCCESS", value, True),
        ("Note", "SUCCESS", "n", None),
    )
    assert snapshot.output() is value


def test_a_snapshot_structures_its_output() -> None:
    """What does not fit is an error with the snapshot."""
    snapshot = complete(("Answer", "SUCCESS", '{"a": 1}', True))
    assert snapshot.output(into=dict[str, int]) == {"a": 1}
    with pytest.raises(InvalidOutput) as caught:
        snapshot.output(into=list[str])
    assert (caught.value.execution_id, caught.value.last_snapshot) == (787, snapshot)
    with pytest.raises(TypeError, match="cannot structure into 5"):
        snapshot.output(into=5)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("snapshot", "message"),
    [
        (Snapshot(787, False, {"a": Node("a", "SUCCESS", is_output_node=True)}), "still running"),
        (complete(("A", "SUCCESS", 1, True), ("B", "SUCCESS", 1, True)), "several output nodes"),
        (complete(("A", "SUCCESS", 1, None)), "no node is marked"),
        (complete(), "no node is marked"),
    ],
)
def test_a_snapshot_does_not_guess_its_output(snapshot: Snapshot, message: str) -> None:
    """Where only the server can tell, the error says whom to ask."""
    with pytest.raises(ValueError, match=message) as caught:
        snapshot.output()
    assert "787" in str(caught.value)


def test_a_failed_snapshot_has_no_output() -> None:
    """It is the error of `Execution.output`."""
    with pytest.raises(ExecutionFailed):
        complete(("A", "FAILED", None, True)).output()


async def decided(sim: Simulator, session: Session, snapshot: Snapshot, *answers: Any) -> Any:
    """Return the main output of a complete execution; the server gives these answers if asked."""
    for body in (snapshot.raw, *answers):
        sim.inject(Fault.status(200, body=json.dumps(body).encode()))
    try:
        return await session.execution(787).output()
    finally:
        assert sim.request_count == 1 + len(answers)


async def test_of_several_output_nodes_the_server_may_send_the_node_map(
    sim: Simulator, session: Session
) -> None:
    """The output of a workflow may look like its own nodes."""
    snapshot = complete(("A", "SUCCESS", 1, True), ("B", "SUCCESS", 2, True))
    assert await decided(sim, session, snapshot, snapshot.raw) == snapshot.raw


@pytest.mark.parametrize(
    "nodes",
    [
        [("Plan", "SUCCESS", "p", False), ("Out", "FAILED", None, True)],
        [("Plan", "SUCCESS", "p", False), ("Out", "SKIPPED", None, True)],
        [("Out 1", "FAILED", None, True), ("Out 2", "AWAITING_APPROVAL", None, True)],
        [("A", "SUCCESS", 1, None), ("B", "FAILED", None, None)],
        [("A", "SUCCESS", 1, False), ("B", "FAILED", None, False)],
    ],
)
async def test_where_no_output_node_succeeded_or_some_node_failed_there_is_no_output(
    sim: Simulator, session: Session, nodes: Any
) -> None:
    """The first where any is marked, the second where none is; the server is not asked."""
    with pytest.raises(ExecutionFailed, match=r"execution 787 (failed|completed)") as caught:
        await decided(sim, session, complete(*nodes))
    assert caught.value.last_snapshot is not None
    assert caught.value.failed == caught.value.last_snapshot.failed_nodes


@pytest.mark.parametrize("status", ["SUCCESS", "SKIPPED"])
@pytest.mark.parametrize("value", VALUES, ids=repr)
async def test_without_output_nodes_and_failures_the_server_decides(
    sim: Simulator, session: Session, status: str, value: Any
) -> None:
    """Its response is the output."""
    assert await decided(sim, session, complete(("A", status, 1, None)), value) == value


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [("A", "SKIPPED", None, None)],
        [("A", "SUCCESS", float("nan"), None)],
        [("A", "SUCCESS", 1, False), ("B", "SUCCESS", True, None)],
    ],
)
async def test_without_output_nodes_the_node_map_means_no_output(
    sim: Simulator, session: Session, nodes: Any
) -> None:
    """It is compared with the snapshot; its shape alone means nothing."""
    snapshot = complete(*nodes)
    with pytest.raises(ExecutionFailed, match="without a main output") as caught:
        await decided(sim, session, snapshot, snapshot.raw)
    assert caught.value.failed == ()
    assert caught.value.last_snapshot is not None


async def test_a_node_map_that_differs_from_the_snapshot_is_an_output(
    sim: Simulator, session: Session
) -> None:
    """`1` is not `true`."""
    snapshot = complete(("A", "SUCCESS", 1, None))
    answer = {"A": {**snapshot.raw["A"], "value": True}}
    assert await decided(sim, session, snapshot, answer) == answer


def answer(value: Any = None, **settings: Any) -> SimNode:
    """Return an output node."""
    return SimNode("Answer", value, is_output_node=True, **settings)


@pytest.mark.parametrize("value", VALUES[:-2], ids=repr)
async def test_output_of_a_complete_execution(sim: Simulator, session: Session, value: Any) -> None:
    """It takes one poll."""
    execution_id = sim.add_execution(Scenario([SimNode("Plan"), answer(value)]))
    assert await session.execution(execution_id).output() == value
    assert sim.request_count == 1


async def test_output_asks_the_server_which_of_several_it_is(
    sim: Simulator, session: Session
) -> None:
    """Of two output nodes, the first to succeed is the output; only the server knows which."""
    nodes = [
        SimNode("Slow", "second", 0.02, is_output_node=True),
        SimNode("Quick", "first", 0.01, is_output_node=True),
    ]
    execution_id = sim.add_execution(Scenario(nodes))
    assert await session.execution(execution_id).output() == "first"
    assert sim.requests[-1].query["return_all_outputs"] == "false"


async def test_a_202_to_the_deciding_request_is_polled_again(
    sim: Simulator, session: Session
) -> None:
    """Two responses of the server may disagree; the body of the 202 is ignored."""
    execution_id = sim.add_execution(Scenario([SimNode("A", 1), SimNode("B", 2, after=["A"])]))
    sim.inject(Fault.delay(0.0))
    sim.inject(Fault.status(202, body=b'"not yet"', times=2))
    assert await session.execution(execution_id).output() == 2
    assert [r.query["return_all_outputs"] for r in sim.requests] == ["true", *["false"] * 3]


async def test_a_202_to_the_deciding_request_is_polled_until_the_deadline(
    sim: Simulator, session: Session
) -> None:
    """The timeout then has the complete snapshot."""
    execution_id = sim.add_execution(Scenario([SimNode("A", 1)]))
    sim.inject(Fault.delay(0.0))
    sim.inject(Fault.status(202, times=None))
    with pytest.raises(ExecutionTimeout, match="its main output did not arrive within") as caught:
        await session.execution(execution_id).output(timeout=0.5)
    assert caught.value.timeout == 0.5
    assert caught.value.execution_id == execution_id
    assert caught.value.last_snapshot is not None
    assert caught.value.last_snapshot.complete


async def test_an_error_of_the_deciding_request_has_the_snapshot(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """The last snapshot is not lost."""
    session = open_session(retry=RetryPolicy(outage=0.0, watch_outage=0.0))
    execution_id = sim.add_execution(Scenario([SimNode("A", 1)]))
    sim.inject(Fault.delay(0.0))
    sim.inject(Fault.malformed())
    with pytest.raises(InvalidResponse) as caught:
        await session.execution(execution_id).output()
    assert caught.value.execution_id == execution_id
    assert caught.value.last_snapshot is not None
    assert caught.value.last_snapshot.nodes["A"].value == 1


@attrs.frozen
class Report:
    """The output of a workflow."""

    title: str
    score: float


async def test_output_into_a_class(sim: Simulator, session: Session) -> None:
    """The value becomes an instance of the class."""
    execution_id = sim.add_execution(Scenario([answer({"title": "t", "score": 1})]))
    output = await session.execution(execution_id).output(into=Report)
    assert output == Report("t", 1.0)
    assert type(output.score) is float


async def test_output_that_does_not_fit_the_class_is_invalid(
    sim: Simulator, session: Session
) -> None:
    """The error has path, value, reason, id and snapshot, and pickles."""
    value = {"title": "t", "score": "high"}
    execution_id = sim.add_execution(Scenario([answer(value)]))
    with pytest.raises(InvalidOutput) as caught:
        await session.execution(execution_id).output(into=Report)
    error = caught.value
    assert (error.path, error.value, error.execution_id) == ("$.score", value, execution_id)
    assert error.last_snapshot is not None
    assert error.last_snapshot.complete
    assert "$.score" in str(error)
    assert error.reason in str(error)
    assert str(execution_id) in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.value, copy.reason) == (error.path, value, error.reason)


async def test_a_strict_converter_of_the_session_has_hooks_of_the_user(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """They are used at any depth, and the strict rules for all other types."""
    converter = strict_converter()
    converter.register_structure_hook(float, lambda value, _: float(value))
    session = open_session(converter=converter)
    execution_id = sim.add_execution(Scenario([answer([{"title": "t", "score": "2.5"}])]))
    execution = session.execution(execution_id)
    assert await execution.output(into=list[Report]) == [Report("t", 2.5)]
    with pytest.raises(InvalidOutput):
        await execution.output(into=list[dict[str, int]])
