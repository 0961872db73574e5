"""Nodes, snapshots and the other values: their properties, and that they cannot be changed."""

import copy
import json
import pickle
import re
from collections.abc import Mapping

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptlayer_exec._session.execution import Execution
from promptlayer_exec._session.fanout import Outcome
from promptlayer_exec._values.errors import ExecutionFailed, NotFound
from promptlayer_exec._values.models import (
    FrozenMap,
    MainOutput,
    Node,
    NodeChange,
    NodeStatus,
    NodeTimes,
    Snapshot,
    StartRequest,
)

NAN = float("nan")


def snapshot(*nodes, complete=False, **fields):
    """Return a snapshot of execution 787 with nodes."""
    return Snapshot(787, complete, {node.name: node for node in nodes}, **fields)


def statuses(*words, complete=False):
    """Return a snapshot of nodes N0, N1 and so on with these statuses."""
    return snapshot(
        *(Node(f"N{index}", word) for index, word in enumerate(words)), complete=complete
    )


@pytest.mark.parametrize("status", ["PAUSED", "", "success", "Success ", "FAILURES"])
def test_unknown_status(status):
    """An unknown status stays a plain string, and is neither final nor successful."""
    node = Node("Node 1", status)
    assert node.status == status
    assert type(node.status) is str
    assert not node.final
    assert not node.succeeded


@pytest.mark.parametrize(
    ("status", "final", "succeeded"),
    [
        ("QUEUED", False, False),
        ("RUNNING", False, False),
        ("SUCCESS", True, True),
        ("FAILED", True, False),
        ("FAILURE", True, False),
        ("SKIPPED", True, False),
    ],
)
def test_final_and_succeeded(status, final, succeeded):
    """The last three statuses are final, and only SUCCESS is successful."""
    node = Node("Node 1", status)
    assert (node.final, node.succeeded) == (final, succeeded)


def test_counts():
    """Counts have the number of nodes with each status, unknown ones included, or 0."""
    seen = statuses("SUCCESS", "RUNNING", "SUCCESS", "PAUSED", "FAILURE")
    assert dict(seen.counts) == {"SUCCESS": 2, "RUNNING": 1, "PAUSED": 1, "FAILED": 1}
    assert seen.counts[NodeStatus.SUCCESS] == 2
    assert seen.counts[NodeStatus.QUEUED] == 0
    assert isinstance(seen.counts, Mapping)


@pytest.mark.parametrize(
    ("seen", "progress"),
    [
        (statuses(), 0.0),
        (statuses(complete=True), 1.0),
        (statuses("QUEUED", "RUNNING"), 0.0),
        (statuses("SUCCESS", "FAILED", "SKIPPED", "RUNNING"), 0.75),
        (statuses("SUCCESS", "PAUSED"), 0.5),
        (statuses("SUCCESS"), 1.0),
        (statuses("SUCCESS", "PAUSED", complete=True), 1.0),
    ],
    ids=[
        "empty",
        "empty-complete",
        "none-final",
        "some-final",
        "unknown-is-not-final",
        "all-final",
        "complete-by-the-server",
    ],
)
def test_progress(seen, progress):
    """Progress is the share of final nodes: 1.0 when complete, 0.0 with no nodes."""
    assert seen.progress == progress


def test_output_and_failed_nodes():
    """Output nodes are marked true, failed nodes are FAILED; both in the server's order."""
    nodes = [
        Node("z", "FAILED", is_output_node=True),
        Node("b", "SUCCESS", is_output_node=False),
        Node("a", "FAILURE", is_output_node=None),
        Node("c", "SUCCESS", is_output_node=True),
    ]
    seen = snapshot(*nodes)
    assert seen.output_nodes == (nodes[0], nodes[3])
    assert seen.failed_nodes == (nodes[0], nodes[2])


def test_to_dict():
    """The id is a string, times are rounded to milliseconds, and statuses are plain strings."""
    nodes = [
        Node("a", "SUCCESS", [1], is_output_node=True),
        Node("b", "FAILED", None, "boom", {"raw": "Traceback"}),
    ]
    seen = snapshot(
        *nodes, complete=True, poll=3, elapsed=1.23456, times={"a": NodeTimes(0.50004, 1.0)}
    )
    data = seen.to_dict()
    assert data == {
        "execution_id": "787",
        "poll": 3,
        "elapsed": 1.235,
        "complete": True,
        "succeeded": True,
        "progress": 1.0,
        "nodes": {
            "a": {
                "name": "a",
                "status": "SUCCESS",
                "value": [1],
                "error_message": None,
                "raw_error_message": None,
                "is_output_node": True,
                "running": 0.5,
                "final": 1.0,
            },
            "b": {
                "name": "b",
                "status": "FAILED",
                "value": None,
                "error_message": "boom",
                "raw_error_message": {"raw": "Traceback"},
                "is_output_node": None,
                "running": None,
                "final": None,
            },
        },
    }
    assert type(data["nodes"]["a"]["status"]) is str
    assert data["nodes"]["a"]["value"] is nodes[0].value
    assert attrs.evolve(seen, complete=False).to_dict()["succeeded"] is None


S, F, K = "SUCCESS", "FAILED", "SKIPPED"


def outputs(*pairs, complete=True):
    """Return a snapshot of nodes, given as pairs of status and is_output_node."""
    return snapshot(
        *(Node(f"N{n}", status, is_output_node=out) for n, (status, out) in enumerate(pairs)),
        complete=complete,
    )


SUCCESSES = {
    "one-output": outputs((S, True)),
    "an-output-among-failures": outputs((F, None), (S, True), (F, True)),
    "nothing-marked": outputs((S, None), (K, False)),
    "nothing-marked-all-skipped": outputs((K, None)),
    "nothing-marked-unknown-status": outputs(("PAUSED", None)),
    "no-nodes": outputs(),
}
FAILURES = {
    "failed-output": outputs((S, False), (F, True)),
    "skipped-output": outputs((S, False), (K, True)),
    "unknown-output": outputs(("PAUSED", True)),
    "nothing-marked-one-failed": outputs((S, None), (F, None)),
}


@pytest.mark.parametrize("seen", SUCCESSES.values(), ids=SUCCESSES)
def test_succeeded(seen):
    """A successful output node, or none marked and no failed node, is a success when complete."""
    assert seen.succeeded
    seen.raise_for_failure()
    assert not attrs.evolve(seen, complete=False).succeeded


@pytest.mark.parametrize("seen", FAILURES.values(), ids=FAILURES)
def test_failed(seen):
    """No successful output node is a failure; the error has the id, snapshot and failed nodes."""
    assert not seen.succeeded
    with pytest.raises(ExecutionFailed) as caught:
        seen.raise_for_failure()
    assert caught.value.execution_id == 787
    assert caught.value.last_snapshot is seen
    assert caught.value.failed == seen.failed_nodes
    attrs.evolve(seen, complete=False).raise_for_failure()  # it has not failed yet


def test_failure_names_the_failed_nodes():
    """The message names each failed node, with its error message if there is one."""
    seen = snapshot(
        Node("Node/1", "FAILED", error_message="division by zero"),
        Node("Node 2", "FAILED", error_message=""),
        Node("Node 3", "SUCCESS"),
        Node("Out", "SKIPPED", is_output_node=True),
        complete=True,
    )
    with pytest.raises(ExecutionFailed) as caught:
        seen.raise_for_failure()
    text = str(caught.value)
    assert text.startswith(
        "execution 787 failed: node 'Node/1' FAILED: division by zero; node 'Node 2' FAILED."
    )
    assert "Node 3" not in text


def test_failure_of_many_nodes_names_the_first():
    """However many and however long their names are, the text stays short."""
    nodes = (Node("N" * 1000, "FAILED"), *(Node(f"N{i}", "FAILED") for i in range(1000)))
    with pytest.raises(ExecutionFailed) as caught:
        snapshot(*nodes, complete=True).raise_for_failure()
    assert len(caught.value.failed) == 1001
    assert "'N18' FAILED; and 981 more nodes." in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_failure_without_failed_nodes_names_the_outputs():
    """If no node failed, the message names the output nodes and their statuses."""
    with pytest.raises(ExecutionFailed) as caught:
        outputs((S, False), (K, True), ("PAUSED", True)).raise_for_failure()
    assert caught.value.failed == ()
    assert "no output node succeeded: node 'N1' SKIPPED; node 'N2' PAUSED." in str(caught.value)


def test_diff_of_status():
    """A change has the previous status, unknown ones included."""
    before = statuses("QUEUED", "RUNNING", "PAUSED", "SUCCESS")
    now = statuses("RUNNING", "PAUSED", "SUCCESS", "SUCCESS")
    assert [(change.node.name, change.before) for change in now.diff(before)] == [
        ("N0", "QUEUED"),
        ("N1", "RUNNING"),
        ("N2", "PAUSED"),
    ]


def test_diff_of_added_and_removed_nodes():
    """A new node is a change from None; a removed node is not a change."""
    before = snapshot(Node("old", "RUNNING"), Node("kept", "RUNNING"))
    now = snapshot(Node("new", "QUEUED"), Node("kept", "RUNNING"))
    assert now.diff(before) == (NodeChange(now.nodes["new"], None),)


def test_diff_ignores_other_fields():
    """Only status and value are compared: a new error message alone is not a change."""
    before = snapshot(Node("a", "FAILED", error_message=None))
    now = snapshot(Node("a", "FAILED", error_message="late", is_output_node=True))
    assert now.diff(before) == ()


def of_value(value):
    """Return a snapshot of one node with this value."""
    return snapshot(Node("a", "SUCCESS", value=value))


DIFFERENT = {
    "int-true": (1, True),
    "int-float": (1, 1.0),
    "null-empty": (None, ""),
    "nan-number": (NAN, 1.0),
    "list-order": ([1, 2], [2, 1]),
    "null-key": ({"a": None}, {}),
}


@pytest.mark.parametrize(("before", "now"), DIFFERENT.values(), ids=DIFFERENT)
def test_different_values(before, now):
    """Different JSON is a change, even if the values are equal in Python."""
    (change,) = of_value(now).diff(of_value(before))
    assert change.before is NodeStatus.SUCCESS
    assert change.node.value is now


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@given(JSON, JSON)
def test_a_change_is_a_change_of_canonical_json(before, now):
    """A value changes if its JSON with sorted keys changes, except for the sign of 0.0."""
    one, other = (
        re.sub(r"-0\.0(?!\d)", "0.0", json.dumps(value, sort_keys=True)) for value in (before, now)
    )
    assert bool(of_value(now).diff(of_value(before))) is (one != other)
    assert of_value(copy.deepcopy(now)).diff(of_value(now)) == ()


def test_nodes_keep_the_server_s_order():
    """Pickling and `diff` keep it, too."""
    names = ["z", "a", "", "Node 10", "Node 9", "é"]
    seen = snapshot(*(Node(name, "QUEUED") for name in names))
    assert list(seen.nodes) == names
    assert list(pickle.loads(pickle.dumps(seen)).nodes) == names
    assert [change.node.name for change in seen.diff(None)] == names


def test_a_snapshot_copies_its_nodes_and_times():
    """Changing the dicts that it was created from does not change the snapshot."""
    nodes = {"a": Node("a", "QUEUED")}
    times = {"a": NodeTimes(0.5)}
    seen = Snapshot(787, False, nodes, times=times)
    nodes.clear()
    times.clear()
    assert list(seen.nodes) == list(seen.times) == ["a"]


@pytest.mark.parametrize("field", ["nodes", "times"])
def test_maps_are_read_only(field):
    """No item can be set, deleted, or changed by a method."""
    mapping = getattr(
        Snapshot(787, False, {"a": Node("a", "QUEUED")}, times={"a": NodeTimes()}), field
    )
    assert isinstance(mapping, FrozenMap)
    with pytest.raises(TypeError):
        mapping["a"] = None
    with pytest.raises(TypeError):
        del mapping["a"]
    for method in ("clear", "pop", "popitem", "setdefault", "update", "__ior__"):
        assert not hasattr(mapping, method)
    with pytest.raises(AttributeError):
        mapping.extra = 1
    assert not hasattr(mapping, "__dict__")


VALUE = {"list": [1, {"deep": None}], "text": "\ud800"}
NODE = Node("Node 1", "SUCCESS", VALUE, "message", {"raw": "Traceback"}, True)
SNAPSHOT = Snapshot(
    787,
    True,
    {"Node 1": NODE, "Node 2": Node("Node 2", "PAUSED")},
    raw={"Node 1": {"status": "SUCCESS", "value": VALUE, "extra": 1}},
    poll=4,
    elapsed=1.5,
    times={"Node 1": NodeTimes(0.5, 1.5), "Node 2": NodeTimes()},
)
REQUEST = StartRequest("a/b", {"rows": [1]}, "prod", None, {"k": "v"}, "https://x.test/", ("key",))
VALUES = {
    "Node": NODE,
    "NodeTimes": NodeTimes(0.5, 1.5),
    "NodeChange": NodeChange(NODE, NodeStatus.RUNNING),
    "NodeChange-unknown": NodeChange(NODE, "PAUSED"),
    "Snapshot": SNAPSHOT,
    "Snapshot-empty": Snapshot(1, False, {}),
    "MainOutput": MainOutput(787, True, VALUE),
    "StartRequest": REQUEST,
    "Outcome": Outcome(3, REQUEST, None, SNAPSHOT, VALUE),
    "FrozenMap": FrozenMap({"a": [1]}),
}
MAKERS = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_copies(value, make):
    """Pickling and copying give an equal value of the same class."""
    other = make(value)
    assert other == value
    assert type(other) is type(value)
    assert repr(other) == repr(value)


def test_outcome_with_execution_and_error_pickles():
    """An outcome takes its error along, and its execution as a handle without a session."""
    error = NotFound("gone", status=404, server_message="gone", execution_id=787)
    outcome = Outcome(
        0, 787, Execution(object(), 787, "a/b", warning="careful"), SNAPSHOT, error=error
    )
    twin = pickle.loads(pickle.dumps(outcome))
    assert (twin.execution.id, twin.execution.workflow) == (787, "a/b")
    assert twin.execution.warning == "careful"
    assert twin.execution == Execution(None, 787)
    assert type(twin.error) is NotFound
    assert twin.error.execution_id == 787
    assert twin.snapshot == SNAPSHOT
    deep = copy.deepcopy(outcome)
    assert deep.execution is outcome.execution
    assert deep.error.status == 404


FROZEN = {name: value for name, value in VALUES.items() if attrs.has(type(value))}


@pytest.mark.parametrize("value", FROZEN.values(), ids=FROZEN)
def test_frozen_with_slots(value):
    """No attribute can be set, deleted or added, and there is no `__dict__`."""
    name = attrs.fields(type(value))[0].name
    assert not hasattr(value, "__dict__")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(value, name, None)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        value.extra = None
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        delattr(value, name)


@pytest.mark.parametrize("output", [None, False, 0, "", {}, [], "AAA"], ids=repr)
def test_outcome_ok(output):
    """Without an error an outcome is ok, and its result is the output, however empty."""
    outcome = Outcome(0, "item", output=output)
    assert outcome.ok
    assert outcome.result() is output


def test_outcome_error():
    """With an error an outcome is not ok, and its result raises that error."""
    error = ValueError("bad item")
    outcome = Outcome(0, "item", error=error)
    assert not outcome.ok
    with pytest.raises(ValueError, match="bad item") as caught:
        outcome.result()
    assert caught.value is error
