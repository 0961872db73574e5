"""Which workflow an execution is of, and what the page learns of workflows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from promptlayer_exec import Session, WorkflowDefinition, WorkflowEdge, WorkflowNode
from promptlayer_exec._engine import definitions
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.viewer import Board, History
from promptlayer_exec.viewer._graphs import graph_view

TWO = Scenario([SimNode("plan", "p"), SimNode("answer", "a", after=["plan"], is_output_node=True)])


async def _graph(viewer: Any, execution_id: int) -> Any:
    viewer.board.follow(execution_id)
    while viewer.board.cards[execution_id].snapshot is None:
        await viewer.board.changed.wait()
    status, answer = await viewer.send("GET", f"executions/{execution_id}/graph")
    assert status == 200
    return answer


async def test_the_workflow_of_an_id_is_asked_and_never_guessed(
    sim: Simulator, viewer: Any, session: Session, tmp_path: Path
) -> None:
    """Nothing is requested for it; the answer is remembered, for other viewers too."""
    sim.add_workflow("report", TWO)
    execution_id = sim.add_execution(TWO)
    before = sim.request_count
    answer = await _graph(viewer, execution_id)
    assert sim.request_count == before + 1  # the poll
    assert answer["definition"] is None
    assert "does not report which workflow" in answer["reason"]
    path = f"executions/{execution_id}/workflow"
    assert (await viewer.send("PUT", path, {"workflow": "none"}))[0] == 502
    status, chosen = await viewer.send("PUT", path, {"workflow": "1"})
    assert (status, chosen["definition"]["name"]) == (200, "report")
    assert (await _graph(viewer, execution_id))["definition"]["name"] == "report"
    await viewer.board.history.find(execution_id)  # once what was recorded before it is in the file
    again = History(tmp_path / "history.sqlite", server="of a test")
    async with session, Board(session, history=again) as board:
        board.follow(execution_id)
        while board.cards[execution_id].snapshot is None:
            await board.changed.wait()
        assert board.cards[execution_id].workflow == "report"


async def test_the_workflow_with_the_same_nodes_is_suggested(sim: Simulator, viewer: Any) -> None:
    """That of a run that the history has, or else one of the catalog; otherwise none."""
    other = Scenario([SimNode("else", "x", is_output_node=True)])
    for name, scenario in (("other", other), ("report", TWO)):
        sim.add_workflow(name, scenario)
    run, unlike = sim.add_execution(TWO), sim.add_execution(Scenario([SimNode("new", "x")]))
    for execution_id in (run, unlike):
        await _graph(viewer, execution_id)
    path = f"executions/{run}/suggestion"
    assert (await viewer.send("GET", path))[1] == {"workflow": "report", "shared": 2}
    nothing = (await viewer.send("GET", f"executions/{unlike}/suggestion"))[1]
    assert nothing == {"workflow": None, "shared": 0}
    viewer.board.history.record(
        execution_id=5,
        workflow="nightly",
        outcome="failed",
        began=1.0,
        times='{"plan": [0, 1], "answer": [1, null]}',
    )
    viewer.board.history.record(  # nobody saw its nodes
        execution_id=6, workflow="nightly", outcome="failed", began=2.0, times="{}"
    )
    before = sim.request_count
    assert (await viewer.send("GET", path))[1] == {"workflow": "nightly", "shared": 2}
    assert sim.request_count == before


async def test_without_a_definition_there_is_a_reason(sim: Simulator, viewer: Any) -> None:
    """That the server does not say, or describes no nodes."""
    execution_id = sim.add_execution(TWO)
    sim.inject(Fault.status(403))
    sim.inject(Fault.status(403, execution_id=execution_id, times=None))
    assert "403 Forbidden" in (await viewer.send("GET", "workflows"))[1]["reason"]
    sim.clear_faults()
    assert (await viewer.send("GET", "executions/5/graph"))[0] == 404
    sim.add_workflow("hidden", lambda _: TWO)  # described without nodes
    _, started = await viewer.send("POST", "runs", {"workflow": "hidden", "inputs": ""})
    answer = await _graph(viewer, int(started["execution_id"]))
    assert "describes no nodes" in answer["reason"]


async def test_an_error_of_the_server_is_a_reason(sim: Simulator, viewer: Any) -> None:
    """The rest of the page does without the graph."""
    sim.add_workflow("report", TWO)
    sim.inject(Fault.status(403, times=2), path="/workflows/report")
    execution_id = (await viewer.board.start("report", {})).id
    answer = await _graph(viewer, execution_id)
    assert "403 Forbidden" in answer["reason"]


async def test_the_graph_of_a_run_costs_no_request(sim: Simulator, viewer: Any) -> None:
    """The definition that the start was checked with has it."""
    sim.add_workflow("report", TWO)
    execution_id = (await viewer.board.start("report", {})).id
    assert (await _graph(viewer, execution_id))["definition"]["layers"] == [["plan"], ["answer"]]
    assert [request.path for request in sim.requests].count("/workflows/report") == 1


async def test_the_form_knows_inputs_labels_and_versions(sim: Simulator, viewer: Any) -> None:
    """Labels are those of all versions; the inputs those of the version that is asked for."""
    sim.add_workflow("report", TWO, inputs={"topic": "string"}, labels=["prod"])
    sim.add_version("report", TWO, inputs={"topic": "string", "n": "number"}, labels=["beta"])
    assert (await viewer.send("GET", "workflows"))[1]["workflows"] == [
        {"id": "1", "name": "report"}
    ]
    _, latest = await viewer.send("GET", "definition?workflow=report")
    assert latest["definition"]["required_inputs"] == {"topic": "string", "n": "number"}
    assert latest["definition"]["latest_version"] == 2
    assert sorted(latest["definition"]["labels"]) == ["beta", "prod"]
    _, prod = await viewer.send("GET", "definition?workflow=report&label=prod")
    assert prod["definition"]["required_inputs"] == {"topic": "string"}
    _, none = await viewer.send("GET", "definition?workflow=none")
    assert none["definition"] is None
    assert "the server returned 404 Not Found" in none["reason"]


async def test_inputs_are_checked_before_a_start(sim: Simulator, viewer: Any) -> None:
    """Those of the label or version that is to run; nothing is started if some are missing."""
    sim.add_workflow("report", TWO, inputs={"topic": "string"}, labels=["prod"])
    sim.add_version("report", TWO, inputs={"subject": "string"})
    start = {"workflow": "report", "inputs": '{"topik": 1}'}
    status, answer = await viewer.send("POST", "runs", start | {"label": "prod"})
    assert (status, answer["field"]) == (422, "inputs")
    assert "did you mean 'topic'?" in answer["message"]
    for version in ("x", "-1", "0"):
        answer = await viewer.send("POST", "runs", start | {"version": version})
        assert (answer[0], answer[1]["field"]) == (422, "version")
    assert sim.runs == []
    start["inputs"] = '{"topic": "otters"}'
    assert (await viewer.send("POST", "runs", start))[0] == 422
    assert (await viewer.send("POST", "runs", start | {"version": "1"}))[0] == 201
    assert sim.runs[0].body["workflow_version_number"] == 1


async def test_a_workflow_that_does_not_come_is_given_up(
    sim: Simulator, viewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds, and not the session's patience."""
    monkeypatch.setattr(definitions, "_LIMITS", definitions._Limits(timeout=0.05))
    monkeypatch.setattr("promptlayer_exec.viewer._graphs._LIST_TIMEOUT", 0.05)
    sim.inject(Fault.stall(times=None))
    _, answer = await viewer.send("GET", "definition?workflow=report")
    assert answer["reason"] == "Workflow 'report': no response within 0.05 s. Try again."
    _, answer = await viewer.send("GET", "workflows")
    assert "did not arrive within" in answer["reason"]


def test_a_definition_has_an_edge_for_each_dependency() -> None:
    """Edges of nodes that do not exist are left out; a cycle is one layer."""
    nodes = {
        "a": WorkflowNode("a", "CODE"),
        "b": WorkflowNode("b", dependencies=("a",)),
        "c": WorkflowNode("c", dependencies=("d",)),
        "d": WorkflowNode("d", dependencies=("c",)),
    }
    edges = (WorkflowEdge("a", "b", True), WorkflowEdge("a", "c"), WorkflowEdge("a", "gone"))
    view = graph_view(WorkflowDefinition(1, "w", nodes=nodes, edges=edges))
    assert view["layers"] == (("a",), ("b",), ("c", "d"))
    assert [(one["source"], one["target"], one["conditional"]) for one in view["edges"]] == [
        ("a", "b", True),
        ("d", "c", False),
        ("c", "d", False),
        ("a", "c", False),
    ]


async def test_the_nodes_of_two_executions_are_compared(sim: Simulator, viewer: Any) -> None:
    """Values are compared as JSON, whole."""
    long, other = "x" * 20_000, "half \ud800"
    one = sim.add_execution(Scenario([SimNode("same", {"a": 1}), SimNode(other, long + "a")]))
    two = sim.add_execution(Scenario([SimNode("same", {"a": 1}), SimNode(other, long + "b")]))
    for execution_id in (one, two):
        viewer.board.follow(execution_id)
        while viewer.board.cards[execution_id].state != "succeeded":
            await viewer.board.changed.wait()
    answer = await viewer.send("GET", f"compare/{one}/{two}")
    assert answer == (200, {"changed": [other], "inputs_differ": False})
    assert (await viewer.send("GET", f"compare/{one}/5"))[0] == 404
    assert (await viewer.send("GET", f"executions/{one}/inputs"))[0] == 404
    _, snapshot = await viewer.send("GET", f"executions/{one}/snapshot")
    assert snapshot == viewer.board.cards[one].snapshot.to_dict()
    assert (await viewer.send("GET", "executions/5/snapshot"))[0] == 404
