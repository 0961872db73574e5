"""How values are displayed: short reprs, what notebooks show, and one table of statuses."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.style import Style
from rich.text import Text

from promptlayer_exec import (
    Execution,
    MainOutput,
    Node,
    NodeStatus,
    NodeTimes,
    Outcome,
    Snapshot,
    StartRequest,
    WorkflowDefinition,
    WorkflowEdge,
    WorkflowNode,
)
from promptlayer_exec._integration import error_details, error_text, printable
from promptlayer_exec._values.statuses import STATUS_TABLE, UNKNOWN_STATUS, status_entry
from promptlayer_exec.cli._live import node_table
from promptlayer_exec.dbos import StoredOutcome

HOSTILE = "<script>alert('1')</script>\"&\x1b[31m\ud800"
HUGE: list[Any] = [
    "x" * 10**6,
    ["y" * 1000] * 1000,
    {"k" * 1000: {"v": ["z" * 1000]}} | {f"key {n}": n for n in range(1000)},
    [[[[[["deep"]]]]]],
    10**4000,
    b"bytes" * 1000,
]


class Page:
    """The text, the tags and the attributes of what a notebook shows, which is valid XML, too."""

    def __init__(self, shown: Any) -> None:
        self.html: str = shown._repr_html_()
        self.html.encode()  # as it is sent to a browser
        self.elements = list(ElementTree.fromstring(self.html).iter())
        self.tags = [it.tag.rpartition("}")[2] for it in self.elements]
        self.attributes = [name for it in self.elements for name in it.attrib]
        self.text = " ".join(" ".join(self.elements[0].itertext()).split())


def svg(shown: WorkflowDefinition) -> ElementTree.Element:
    """Return the graph of a workflow."""
    return next(it for it in Page(shown).elements if it.tag.endswith("svg"))


def repr_of(value: Any) -> str:
    """Return the repr of a value as that of a model has it."""
    return repr(MainOutput(787, True, value)).partition("value=")[2].removesuffix(")")


def snapshot(*nodes: Node, **fields: Any) -> Snapshot:
    """Return a snapshot of execution 787."""
    return Snapshot(787, fields.pop("complete", False), {it.name: it for it in nodes}, **fields)


def workflow(*nodes: WorkflowNode, **fields: Any) -> WorkflowDefinition:
    """Return a workflow named `w`."""
    return WorkflowDefinition(
        3, fields.pop("name", "w"), nodes={it.name: it for it in nodes}, **fields
    )


def test_every_status_has_an_entry() -> None:
    """The table has the documented statuses and no others, each with a mark of its own."""
    assert list(STATUS_TABLE) == list(NodeStatus)
    marks = {entry.mark for entry in (*STATUS_TABLE.values(), UNKNOWN_STATUS)}
    assert len(marks) == len(NodeStatus) + 1


@pytest.mark.parametrize("status", [*NodeStatus, "PAUSED", ""])
def test_models_and_displays_read_the_table(status: str) -> None:
    """Whether a node is final, its mark in a notebook and its style in a terminal are there."""
    entry = status_entry(status)
    shown = snapshot(Node("a", status))
    assert shown.nodes["a"].final is entry.final
    assert f'<span style="color:{entry.colour}">{entry.mark}</span> {status}' in shown._repr_html_()
    (cell,) = node_table(shown).columns[1].cells
    assert isinstance(cell, Text)
    assert cell.style == entry.style
    Style.parse(entry.style)


@pytest.mark.parametrize(
    ("message", "raw", "text", "details"),
    [
        ("why", {"raw": "Traceback\nwhy"}, "why", "Traceback\nwhy"),
        ("", {"raw": "Traceback\nwhy\n"}, "why", "Traceback\nwhy\n"),
        (None, "why", "why", "why"),
        (None, {"code": 7}, '{"code": 7}', '{"code": 7}'),
        (None, {"raw": ""}, None, None),
        (None, None, None, None),
    ],
)
def test_why_a_node_failed(
    message: str | None, raw: Any, text: str | None, details: str | None
) -> None:
    """It is the error message, or else the last line of the details, as on every display."""
    node = Node("n", "FAILED", None, message, raw)
    assert (error_text(node), error_details(node)) == (text, details)
    assert Page(snapshot(node)).text.endswith(f"✗ FAILED {text or ''}".strip())


def test_text_that_does_not_print_is_escaped() -> None:
    """Spaces of all kinds, and the characters to keep, stay."""
    assert printable("a\u00a0\u3000é日\n\t\x7f\ud800", keep="\n") == (
        "a\u00a0\u3000é日\n\\t\\x7f\\ud800"
    )


@pytest.mark.parametrize("value", HUGE, ids=lambda value: type(value).__name__)
def test_values_of_any_size_have_short_reprs(value: Any) -> None:
    """At most 80 characters of a value or a message are shown, and under 1,000 in all."""
    text = str(value) if type(value) is not int else "x" * 5000
    node = Node(text, text, value, text, value, True)
    snapshot = Snapshot(787, True, {text + str(n): node for n in range(100)}, raw=value)
    execution = Execution(None, 787, text)
    outcome = Outcome(
        0, StartRequest(text, {"a": value}), execution, snapshot, value, ValueError(text)
    )
    now = datetime.now(UTC)
    stored = StoredOutcome(text, 787, True, value, None, now, now)
    request = StartRequest(text, value, text, None, {"a": text}, text, value)
    for shown in (node, snapshot, outcome, stored, request, MainOutput(787, True, value)):
        assert 20 < len(repr(shown)) < 1000
    assert len(repr_of(value)) <= 80


@given(st.recursive(st.none() | st.integers() | st.text() | st.floats(), st.lists, max_leaves=5))
def test_small_values_are_shown_whole(value: Any) -> None:
    """A value is shown in at most 80 characters, and in full if it needs at most 20."""
    if len(repr(value)) <= 20:
        assert repr_of(value) == repr(value)
    assert len(repr_of(value)) <= 80


def test_the_start_and_the_end_of_a_value_are_shown() -> None:
    """An ellipsis stands for what is left out; the keys of a dict are sorted."""
    assert repr_of("a" * 50 + "b" * 50) == "'" + "a" * 37 + "..." + "b" * 38 + "'"
    assert repr_of({"b": 1, "a": {}, "c": [{"d": {"e": {"f": 1}}}]}) == (
        "{'a': {}, 'b': 1, 'c': [{'d': {...}}]}"
    )
    assert repr_of(dict.fromkeys("edcba", 0)) == "{'a': 0, 'b': 0, 'c': 0, 'd': 0, ...}"


def test_a_snapshot_shows_its_counts_and_no_values() -> None:
    """The repr of a snapshot counts the nodes of each status, of at most eight statuses."""
    nodes = {str(n): Node(str(n), "SUCCESS" if n else "FAILED", "secret") for n in range(3)}
    assert repr(Snapshot(787, False, nodes, poll=4, elapsed=1.23456)) == (
        "Snapshot(execution_id=787, complete=False, nodes=<1 FAILED, 2 SUCCESS>, poll=4,"
        " elapsed=1.235)"
    )
    assert "nodes=<no nodes>" in repr(Snapshot(787, True, {}))
    strange = {str(n): Node(str(n), f"STATUS {n}") for n in range(9)}
    assert "1 STATUS 7, ...>" in repr(Snapshot(787, False, strange))


def test_a_snapshot_is_a_table_of_its_nodes() -> None:
    """A row has the status of a node, when it ended, and its value or error."""
    nodes = (
        Node("plan", "SUCCESS", {"a": 1}),
        Node("check", "FAILED", None, "no answer"),
        Node("wait", "RUNNING"),
        Node("approve", "AWAITING_APPROVAL"),
        Node("write", "SUCCESS", None, is_output_node=True),
    )
    page = Page(snapshot(*nodes, poll=3, times={"plan": NodeTimes(0.5, 1.25)}))
    assert page.text == (
        "Execution 787 · running · 3 of 5 nodes final Node Status Ended at, s Value or error"
        " plan ✓ SUCCESS 1.2 {'a': 1} check ✗ FAILED no answer wait ● RUNNING"
        " approve ? AWAITING_APPROVAL write (output) ✓ SUCCESS None"
    )
    assert page.tags.count("tr") == 6


@pytest.mark.parametrize(("status", "state"), [("SUCCESS", "succeeded"), ("FAILED", "failed")])
def test_a_complete_snapshot_says_how_it_ended(status: str, state: str) -> None:
    """The state is in the first line; a single request knows no times, so it shows none."""
    page = Page(snapshot(Node("a", status), complete=True))
    assert f"· {state} · 1 of 1 nodes final" in page.text
    assert "Ended" not in page.text


def test_of_many_nodes_the_failed_and_running_are_shown() -> None:
    """Failed, running and unknown nodes come first; rows keep the server's order."""
    nodes = [Node(f"n{n}", "SUCCESS") for n in range(150)]
    nodes[10] = Node("skipped", "SKIPPED")
    nodes[11] = Node("queued", "QUEUED")
    nodes[110] = Node("paused", "PAUSED")
    nodes[120] = Node("late", "RUNNING")
    nodes[140] = Node("bad", "FAILED")
    page = Page(snapshot(*nodes))
    assert page.tags.count("tr") == 102
    assert "… 50 more" in page.text
    last = page.text.split("n98 ")[1]
    assert re.findall(r"[a-z]+(?= \S [A-Z])", last) == ["paused", "late", "bad"]
    assert "skipped" not in page.text
    assert "queued" not in page.text


def test_nothing_of_a_server_is_markup() -> None:
    """Names, statuses, errors, values, labels and inputs are escaped, and cut where long."""
    long = HOSTILE * 100
    shown = [
        snapshot(Node(HOSTILE, HOSTILE, HOSTILE, HOSTILE), Node(long, "SUCCESS", long)),
        workflow(
            WorkflowNode(HOSTILE, HOSTILE, True),
            WorkflowNode(long, long, dependencies=(HOSTILE,)),
            name=HOSTILE,
            version=2,
            labels=(HOSTILE,),
            required_inputs={HOSTILE: HOSTILE, long: long},
        ),
    ]
    for it in shown:
        page = Page(it)
        assert "script" not in page.tags
        assert not [name for name in page.attributes if name.startswith("on") or name == "href"]
        assert "\x1b" not in page.html
        assert len(page.html) < 6000


def test_snapshots_and_workflows_without_nodes() -> None:
    """A notebook shows no empty table and no empty graph."""
    assert Page(snapshot()).tags == ["div", "div", "b"]
    assert "The server described no nodes." in Page(workflow()).text
    assert "Required inputs: none" in Page(workflow(required_inputs={})).text


def test_a_workflow_is_a_graph() -> None:
    """Nodes are boxes in layers from left to right; edges are lines, conditional ones dashed."""
    shown = workflow(
        WorkflowNode("plan", "CODE_EXECUTION"),
        WorkflowNode("write", "", True, ("plan",)),
        WorkflowNode("check", "", dependencies=("plan", "write")),
        version=7,
        labels=("prod",),
        required_inputs={"topic": "string"},
        edges=(WorkflowEdge("plan", "write", True), WorkflowEdge("plan", "gone")),
    )
    page = Page(shown)
    assert "w · workflow 3 · version 7 · prod Required inputs: topic (string)" in page.text
    graph = svg(shown)
    assert graph.get("aria-label") == "The graph of w"
    boxes = [box for box in graph.iter() if box.tag.endswith("rect")]
    places = [(float(box.get("x", "")), box.get("stroke-width")) for box in boxes]
    assert places == [(4.0, "1"), (196.0, "2"), (388.0, "1")]
    lines = [it for it in graph.iter() if it.get("fill") == "none"]
    assert [line.get("stroke-dasharray") is not None for line in lines] == [True, False, False]
    # The one from plan to check passes below the layer between them.
    assert ["H" in line.get("d", "") for line in lines] == [False, True, False]
    width, height = float(graph.get("width", "")), float(graph.get("height", ""))
    for box in boxes:
        assert 0 <= float(box.get("x", "")) <= width - 160
        assert 0 <= float(box.get("y", "")) <= height - 40


def test_a_graph_shows_the_statuses_of_a_run() -> None:
    """Each box has the colour, the mark and the status; a node that the run lacks has none."""
    drawn = workflow(
        WorkflowNode("plan"), WorkflowNode("write", "", True, ("plan",)), WorkflowNode("new")
    )
    run = snapshot(
        Node("plan", "SUCCESS", "p"), Node("write", "FAILED", error_message=HOSTILE), complete=True
    )
    shown = drawn.with_run(run)
    page = Page(shown)
    assert "Execution 787 · failed · 2 of 2 nodes final" in page.text
    assert all(f"{status_entry(it).mark} {it}" in page.text for it in ("SUCCESS", "FAILED"))
    boxes = [box.get("stroke") for box in svg(shown).iter() if box.tag.endswith("rect")]
    colours = [status_entry(it).colour for it in ("SUCCESS", "FAILED")]
    assert boxes == [*colours, "currentColor"]
    titles = [it.text for it in svg(shown).iter() if it.tag.endswith("title")]
    assert titles[1] == f"write: {printable(HOSTILE)}"
    assert "script" not in page.tags


def test_a_cycle_and_unknown_dependencies_are_drawn() -> None:
    """A cycle is one layer; what is no node is left out."""
    graph = svg(
        workflow(
            WorkflowNode("a", dependencies=("b", "gone")), WorkflowNode("b", dependencies=("a",))
        )
    )
    boxes = [box for box in graph.iter() if box.tag.endswith("rect")]
    assert {box.get("x") for box in boxes} == {"4"}
    assert len([it for it in graph.iter() if it.get("fill") == "none"]) == 2


def test_a_graph_of_many_nodes_or_edges_is_not_drawn() -> None:
    """A page of thousands of boxes or lines would help nobody, and take long to draw."""
    page = Page(workflow(*(WorkflowNode(f"n{n}") for n in range(201))))
    assert "201 nodes and 0 edges: too many to draw." in page.text
    assert "svg" not in page.tags
    names = [f"n{n}" for n in range(46)]
    every = [WorkflowNode(it, "", False, tuple(names[:n])) for n, it in enumerate(names)]
    assert "46 nodes and 1035 edges: too many to draw." in Page(workflow(*every)).text
    assert "svg" in Page(workflow(*every[:45])).tags
