"""The simulated execution as a function of time, and the token bucket."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from promptlayer_exec.simulator import Scenario, SimNode
from promptlayer_exec.simulator._run import SimulatedRun


def run(*nodes: SimNode) -> SimulatedRun:
    """Return an execution that started at the time 0."""
    return SimulatedRun(Scenario(nodes), 0.0)


def statuses(execution: SimulatedRun, now: float) -> dict[str, str]:
    """Return every node's status at a time."""
    return {name: state.status for name, state in execution.results(now).states.items()}


def output(execution: SimulatedRun, now: float) -> Any:
    """Return the decoded main output at a time, or `...` if there is none."""
    text = execution.results(now).main_output()
    return ... if text is None else json.loads(text)


def nodes_json(execution: SimulatedRun, now: float) -> dict[str, Any]:
    """Return the decoded node map at a time."""
    decoded: dict[str, Any] = json.loads(execution.results(now).node_map())
    return decoded


def finish(execution: SimulatedRun, name: str, now: float, **ending: Any) -> None:
    """Finish a held node; it succeeds by default."""
    execution.finish(name, now, **{"status": "SUCCESS", **ending})


def test_node_runs_for_its_duration() -> None:
    """A node without dependencies is RUNNING from the start, and final exactly at its duration."""
    execution = run(SimNode("a", 1, duration=2.0))
    assert statuses(execution, 0.0) == {"a": "RUNNING"}
    assert statuses(execution, 1.999) == {"a": "RUNNING"}
    assert statuses(execution, 2.0) == {"a": "SUCCESS"}


def test_dependent_is_queued_until_the_last_dependency_is_final() -> None:
    """A node starts when the latest of its dependencies ends, whatever their order."""
    execution = run(
        SimNode("join", duration=1.0, after=("slow", "fast")),
        SimNode("fast", duration=1.0),
        SimNode("slow", duration=3.0),
    )
    assert statuses(execution, 2.0) == {"join": "QUEUED", "fast": "SUCCESS", "slow": "RUNNING"}
    assert statuses(execution, 3.5)["join"] == "RUNNING"
    assert statuses(execution, 4.0)["join"] == "SUCCESS"


def test_held_node_waits_for_finish() -> None:
    """A node with duration=None stays RUNNING until `finish`, and then has the value given."""
    execution = run(SimNode("a", "own", duration=None), SimNode("b", after=("a",)))
    assert statuses(execution, 1e9) == {"a": "RUNNING", "b": "QUEUED"}
    finish(execution, "a", 1e9, value="given")
    assert statuses(execution, 1e9) == {"a": "SUCCESS", "b": "SUCCESS"}
    assert nodes_json(execution, 1e9)["a"]["value"] == "given"


def test_finish_with_a_failure_sets_its_messages() -> None:
    """A held node can be made to fail, with messages that replace the scenario's."""
    execution = run(
        SimNode("a", 1, duration=None, error_message="scenario's"),
        SimNode("b", duration=None, error_message="hidden", raw_error_message="scenario's"),
    )
    finish(execution, "a", 1.0, status="FAILED", raw_error_message={"raw": "Traceback"})
    finish(execution, "b", 1.0, status="FAILED", error_message="given")
    assert nodes_json(execution, 1.0)["a"] == {
        "status": "FAILED",
        "value": None,
        "error_message": "scenario's",
        "raw_error_message": {"raw": "Traceback"},
        "is_output_node": False,
    }
    second = nodes_json(execution, 1.0)["b"]
    assert (second["error_message"], second["raw_error_message"]) == ("given", "scenario's")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("held", ValueError, "already final: SUCCESS"),
        ("timed", ValueError, "finishes by itself"),
        ("unknown", LookupError, "no node 'unknown'"),
    ],
)
def test_finish_refuses_nodes_that_are_not_held(
    name: str, error: type[Exception], message: str
) -> None:
    """Finishing a final, a timed or an unknown node is a clear error."""
    execution = run(SimNode("held", duration=None), SimNode("timed", duration=9.0))
    finish(execution, "held", 1.0)
    with pytest.raises(error, match=message):
        finish(execution, name, 2.0)


def test_failed_dependency_skips_dependents() -> None:
    """Nodes that depend on a failed node, directly or indirectly, are SKIPPED when it fails."""
    execution = run(
        SimNode("a", duration=1.0, status="FAILED"),
        SimNode("ok"),
        SimNode("b", duration=9.0, after=("a", "ok")),
        SimNode("c", duration=9.0, after=("b",)),
    )
    assert statuses(execution, 0.0)["b"] == "QUEUED"
    states = execution.results(1.0).states
    assert [state.status for state in states.values()] == ["FAILED", "SUCCESS"] + ["SKIPPED"] * 2
    assert states["c"].at == 1.0


def test_when_selects_a_branch_and_the_join_runs() -> None:
    """A false predicate skips a branch; a node that joins it with another branch still runs."""
    execution = run(
        SimNode("classify", "refund"),
        SimNode("refund", 7, after=("classify",), when=lambda v: v["classify"] == "refund"),
        SimNode("other", 8, after=("classify",), when=lambda v: v["classify"] == "other"),
        SimNode("other 2", 8, after=("other",)),
        SimNode("join", lambda v: [v["refund"], v["other 2"]], after=("refund", "other 2")),
    )
    assert list(statuses(execution, 0.0).values()) == [
        *("SUCCESS", "SUCCESS", "SKIPPED", "SKIPPED", "SUCCESS")
    ]
    assert nodes_json(execution, 0.0)["join"]["value"] == [7, None]


def test_functions_get_all_upstream_values_and_are_called_once() -> None:
    """`when` and `value` get the values of direct and indirect dependencies, and run once."""
    seen: list[tuple[str, Mapping[str, Any]]] = []

    def record(kind: str) -> Callable[[Mapping[str, Any]], str]:
        def called(values: Mapping[str, Any]) -> str:
            seen.append((kind, dict(values)))
            return kind

        return called

    execution = run(
        SimNode("unrelated", 0),
        SimNode("a", 1),
        SimNode("b", 2, after=("a",)),
        SimNode("c", record("value"), after=("b",), duration=1.0, when=record("when")),
    )
    for now in (0.0, 0.5, 1.0, 2.0):
        execution.results(now)
    assert seen == [("when", {"a": 1, "b": 2}), ("value", {"a": 1, "b": 2})]
    assert nodes_json(execution, 2.0)["c"]["value"] == "value"


def test_unknown_status_keeps_the_execution_running() -> None:
    """A status that is not final is sent as it is, and no node after it starts."""
    execution = run(SimNode("a", 1, status="PAUSED"), SimNode("b", after=("a",)))
    assert statuses(execution, 1e9) == {"a": "PAUSED", "b": "QUEUED"}
    assert nodes_json(execution, 1e9)["a"]["value"] is None
    assert not execution.results(1e9).complete


def test_failure_is_a_failed_status() -> None:
    """`FAILURE` is final, skips dependents and has error messages, like `FAILED`."""
    execution = run(SimNode("a", status="FAILURE", error_message="no"), SimNode("b", after=("a",)))
    assert execution.results(0.0).complete
    assert statuses(execution, 0.0)["b"] == "SKIPPED"
    assert nodes_json(execution, 0.0)["a"]["error_message"] == "no"


def test_messages_of_a_node_that_did_not_fail_are_null() -> None:
    """The error fields are null unless the node failed; the value is null unless it succeeded."""
    execution = run(
        SimNode("ok", 1, error_message="e", raw_error_message="r"),
        SimNode("later", 2, duration=1.0, error_message="e", raw_error_message="r"),
    )
    nodes = nodes_json(execution, 0.0)
    assert [node["error_message"] for node in nodes.values()] == [None, None]
    assert [node["raw_error_message"] for node in nodes.values()] == [None, None]
    assert [node["value"] for node in nodes.values()] == [1, None]


def test_main_output_is_the_first_successful_output_node() -> None:
    """Of several output nodes, the one that succeeded first is used; failed ones are ignored."""
    execution = run(
        SimNode("failed", 0, is_output_node=True, status="FAILED"),
        SimNode("slow", 1, is_output_node=True, duration=3.0),
        SimNode("fast", 2, is_output_node=True, duration=2.0),
        SimNode("inner", 3, duration=1.0),
    )
    assert output(execution, 3.0) == 2


def test_without_marks_the_last_success_is_the_main_output() -> None:
    """If no node is marked as output, the node that succeeded last has the main output."""
    execution = run(
        SimNode("a", 1, duration=2.0, is_output_node=None),
        SimNode("b", 2, is_output_node=None),
        SimNode("c", 3, duration=3.0, status="FAILED", is_output_node=None),
    )
    assert output(execution, 3.0) == 1
    assert output(run(SimNode("a", 1), SimNode("b", 2)), 0.0) == 2


def test_any_json_is_an_error_message() -> None:
    """A diagnostic of another kind than text is written as it is."""
    diagnostic = {"raw": ["no", 5]}
    execution = run(SimNode("a", status="FAILED", error_message=diagnostic))
    assert nodes_json(execution, 0.0)["a"]["error_message"] == diagnostic


def test_another_status_without_an_output_node_is_refused() -> None:
    """PromptLayer has described three."""
    with pytest.raises(ValueError, match="no_output_status"):
        Scenario([], no_output_status=404)


def test_empty_scenario_is_complete() -> None:
    """An execution without nodes is complete, with an empty node map and no main output."""
    execution = run()
    assert execution.results(0.0).complete
    assert nodes_json(execution, 0.0) == {}
    assert output(execution, 0.0) is ...


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "NaN"),
        (-math.inf, "-Infinity"),
        (10**30, str(10**30)),
        ("\ud800", '"\\ud800"'),
        ("é", '"\\u00e9"'),
        ({"a": [1, None]}, '{"a":[1,null]}'),
    ],
)
def test_values_are_written_as_the_standard_library_does(value: object, text: str) -> None:
    """NaN, big integers and lone surrogates are sent as Python's `json` writes them."""
    results = run(SimNode("a", value, is_output_node=True)).results(0.0)
    assert results.main_output() == text
    assert f'"value":{text},' in results.node_map()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([SimNode("a"), SimNode("a")], "two nodes are named 'a'"),
        ([SimNode("a", after=("b",))], "'a' comes after 'b', which is not a node"),
        ([SimNode("a", after=("a",))], "cycle: 'a' -> 'a'"),
        ([SimNode("a", after=("b",)), SimNode("b", after=("a",))], "in a cycle"),
    ],
)
def test_impossible_scenarios_are_refused(nodes: list[SimNode], message: str) -> None:
    """Repeated names, unknown dependencies and cycles are errors when a scenario is created."""
    with pytest.raises(ValueError, match=message):
        Scenario(nodes)


@pytest.mark.parametrize("duration", [-1.0, math.inf, math.nan])
def test_impossible_durations_are_refused(duration: float) -> None:
    """A negative, infinite or NaN duration is an error when a node is created."""
    with pytest.raises(ValueError, match="duration must be finite"):
        SimNode("a", duration=duration)


def test_values_that_are_not_json_are_refused() -> None:
    """The error for a value that JSON cannot represent names the node."""
    with pytest.raises(TypeError, match="node 'a': its value is not JSON"):
        SimNode("a", {1, 2})


def test_a_single_name_is_not_a_list_of_names() -> None:
    """`after="ab"` is an error; it does not mean the two nodes a and b."""
    with pytest.raises(TypeError, match=r"write after=\('ab',\)"):
        SimNode("c", after="ab")
