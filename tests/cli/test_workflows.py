"""The commands on workflows, `run` before it starts, and small terminals."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest
import typer
from rich.console import Console

from promptlayer_exec import (
    Node,
    NodeTimes,
    Snapshot,
    WorkflowDefinition,
    WorkflowNode,
    __version__,
)
from promptlayer_exec.cli import app
from promptlayer_exec.cli._graph_drawing import draw
from promptlayer_exec.cli._live import LiveDisplay
from promptlayer_exec.cli._watch_display import LineDisplay
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

Call = Callable[..., Any]

DONE = Scenario([SimNode("reply", "Good day", is_output_node=True)])
AGENT = Scenario(
    [
        SimNode("read", node_type="CODE_EXECUTION"),
        SimNode("search", after=["read"], when=lambda _: True, node_type=""),
        SimNode("reply", after=["read", "search"], is_output_node=True),
    ]
)


@pytest.fixture(scope="module")
def sim() -> Iterator[Simulator]:
    """Serve from a thread."""
    with Simulator() as simulator:
        simulator.add_workflow(
            "support agent",
            AGENT,
            inputs={"letter": "string", "language": "string"},
            labels=["old"],
        )
        simulator.add_version("support agent", AGENT, inputs={"letter": "string"}, labels=["prod"])
        simulator.add_workflow("echo", DONE)
        simulator.add_workflow("strange\x1b[2J", DONE, labels=["\x9b"], inputs={})
        yield simulator


@pytest.mark.parametrize("command", ["run", "workflow"])
def test_a_misspelt_workflow_has_a_suggestion(sim: Simulator, call: Call, command: str) -> None:
    """One that the workspace has. Nothing is suggested if no name is near."""
    code, out, err = call(command, "suport agent")
    assert (code, out) == (4 if command == "run" else 1, "")
    lines = err.splitlines()
    assert lines[-2].startswith("did you mean 'support agent'?")
    assert lines[-1] == "  promptlayer-exec workflow 'support agent'"
    assert "did you mean" not in call(command, "otters")[2]
    assert "did you mean" not in call("workflow", "echo", "--label", "none")[2]


class TestWorkflows:
    """`workflows`."""

    def test_lines(self, call: Call) -> None:
        """A pipe gets ids, versions, names and labels, with nothing that steers a terminal."""
        assert call("workflows") == (
            0,
            "2\t1\techo\t\n3\t1\tstrange\\x1b[2J\t\\x9b\n1\t2\tsupport agent\told, prod\n",
            "",
        )

    def test_json(self, call: Call) -> None:
        """With --json, each is a line of JSON, sorted by name."""
        code, out, _ = call("workflows", "--json")
        lines = [json.loads(line) for line in out.splitlines()]
        assert code == 0
        assert [line["id"] for line in lines] == [2, 3, 1]
        assert lines[2] == {
            "id": 1,
            "name": "support agent",
            "labels": ["old", "prod"],
            "latest_version": 2,
            "is_deleted": False,
        }

    def test_a_terminal_gets_a_table(self, call: Call) -> None:
        """It has headings, and is not cut off."""
        code, out, _ = call("workflows", on_screen=True)
        assert code == 0
        lines = [line.split() for line in out.splitlines()]
        assert lines[0] == ["Id", "Version", "Name", "Labels"]
        assert lines[3] == ["1", "2", "support", "agent", "old,", "prod"]

    def test_none(self, sim: Simulator, call: Call) -> None:
        """A terminal shows that; what is deleted, or has no version, shows."""
        empty = {"items": [], "page": 1, "has_next": False}
        sim.inject(Fault.status(200, body=json.dumps(empty).encode()))
        assert call("workflows", on_screen=True) == (0, "", "the workspace has no workflows\n")
        gone = {"items": [{"id": 9, "name": "gone", "is_deleted": True}]}
        sim.inject(Fault.status(200, body=json.dumps(gone).encode()))
        assert call("workflows").out == "9\t\tgone\t(deleted)\n"


class TestWorkflow:
    """`workflow NAME`."""

    def test_text(self, call: Call) -> None:
        """It has the inputs, the labels and the graph of the latest version."""
        code, out, err = call("workflow", "support agent")
        assert (code, err) == (0, "")
        assert out.splitlines() == [
            "support agent (workflow 1, version 2)",
            "labels: prod",
            "inputs:",
            "  letter  string",
            "",
            "●    read  CODE_EXECUTION",
            "├─╮",
            "● │  search  conditional",
            "╰─┤",
            "  ◎  reply  PROMPT_TEMPLATE, output",
        ]

    @pytest.mark.parametrize("options", [("--label", "old"), ("--version", 1)])
    def test_an_older_version(self, call: Call, options: tuple[object, ...]) -> None:
        """A label or a number selects it; a workflow can be named by its id."""
        code, out, _ = call("workflow", 1, *options)
        assert code == 0
        assert "(workflow 1, version 1)\nlabels: old\ninputs:\n  letter    string\n" in out

    def test_json(self, call: Call) -> None:
        """With --json, it is one line."""
        code, out, _ = call("workflow", "support agent", "--json")
        assert code == 0
        (line,) = out.splitlines()
        found = json.loads(line)
        assert found["required_inputs"] == {"letter": "string"}
        assert found["layers"] == [["read"], ["search"], ["reply"]]
        assert found["nodes"][1] == {
            "name": "search",
            "node_type": "",
            "is_output_node": False,
            "dependencies": ["read"],
        }
        assert found["edges"][0] == {"source": "read", "target": "search", "conditional": True}

    def test_a_terminal(self, call: Call) -> None:
        """Lines that are too long are cut off."""
        code, out, _ = call("workflow", "support agent", on_screen=True, COLUMNS="24")
        assert code == 0
        assert max(map(len, out.splitlines())) <= 24
        assert "  ◎  reply  PROMPT_TEMP…" in out

    def test_an_encoding_without_lines(self, call: Call) -> None:
        """The graph is drawn in ASCII."""
        code, out, _ = call("workflow", "support agent", encoding="ascii")
        assert code == 0
        assert out.endswith(
            "*    read  CODE_EXECUTION\n"
            "|-.\n"
            "* |  search  conditional\n"
            "`-|\n"
            "  @  reply  PROMPT_TEMPLATE, output\n"
        )

    def test_a_description_without_parts(self, sim: Simulator, call: Call) -> None:
        """What the server does not say is left out, and nothing steers the terminal."""
        assert call("workflow", 3).out == (
            "strange\\x1b[2J (workflow 3, version 1)\nlabels: \\x9b\ninputs: none required\n\n"
            "◎  reply  PROMPT_TEMPLATE, output\n"
        )
        body = {"success": True, "workflow": {"id": 3, "name": "analyze_1"}}
        sim.inject(Fault.status(200, body=json.dumps(body).encode()))
        assert call("workflow", "analyze_1").out == (
            "analyze_1 (workflow 3)\n\nPromptLayer did not describe its nodes.\n"
        )

    def test_a_cycle_and_a_wide_graph_are_listed(self, sim: Simulator, call: Call) -> None:
        """What cannot be drawn, or not on this terminal, is a list in the order of the layers."""

        def respond(**dependencies: list[str]) -> None:
            nodes = [{"name": it, "dependencies": after} for it, after in dependencies.items()]
            body = {"workflow_id": 1, "workflow_name": "w", "nodes": nodes}
            sim.inject(Fault.status(200, body=json.dumps(body).encode()))

        respond(start=[], a=["start", "b"], b=["a"])
        assert call("workflow", "w").out.endswith(
            "●  start\nIn a cycle, or after one:\na  after start, b\nb  after a\n"
        )
        wide: dict[str, list[str]] = {f"n{n}": [] for n in range(60)}
        respond(**wide, end=list(wide))
        lines = call("workflow", "w").out.splitlines()
        assert (lines[2], lines[61]) == ("n0", "n59")
        assert lines[62] == "end  after " + ", ".join(wide)[:59] + "…"

    def test_mistakes(self, call: Call) -> None:
        """A misuse is exit code 2, and an unknown workflow 1."""
        for arguments, message in (
            (("x", "--label", "a", "--version", 1), "pass either label or version, not both"),
            (("x", "--version", "latest"), "Invalid value for '--version'"),
            (("",), "must not be empty"),
        ):
            code, out, err = call("workflow", *arguments)
            assert (code, out) == (2, "")
            assert message in err
        code, out, err = call("workflow", "unknown", "--json")
        assert (code, json.loads(out)["error"]["type"]) == (1, "NotFound")
        assert "Workflow not found" in err


class TestRun:
    """`run`, before it starts anything."""

    def test_missing_inputs_cost_nothing(self, sim: Simulator, call: Call) -> None:
        """All of them are named, with what may have been meant, and nothing is started."""
        before = len(sim.runs)
        options = ("-i", "leter=Hi", "--label", "old", "--base-url", sim.base_url)
        code, out, err = call("run", "support agent", *options)
        assert (code, out) == (2, "")
        assert err == (
            "missing inputs for workflow 'support agent': 'letter' (string), 'language' (string)."
            " It has no required input 'leter' (did you mean 'letter'?). This command started no"
            " run.\nsee its inputs with:\n"
            f"  promptlayer-exec workflow 'support agent' --base-url {sim.base_url}\n"
        )
        assert len(sim.runs) == before

    def test_the_version_that_would_run_is_checked(self, sim: Simulator, call: Call) -> None:
        """The latest one needs less; inputs beyond those required are let through."""
        code, out, _ = call("run", "support agent", "-i", "letter=Hi", "-i", "more=1", "--no-watch")
        assert (code, out) == (0, f"{sim.runs[-1].execution_id}\n")
        assert sim.runs[-1].inputs == {"letter": "Hi", "more": 1}

    def test_without_a_description_the_run_is_started(self, sim: Simulator, call: Call) -> None:
        """The server may refuse it, or not have it."""
        sim.inject(Fault.status(404))
        assert call("run", "support agent", "--no-watch").code == 0
        assert sim.runs[-1].inputs == {}


def test_the_version(call: Call) -> None:
    """`--version` prints it."""
    assert call("--version") == (0, f"promptlayer-exec {__version__}\n", "")


def commands() -> Iterator[click.Command]:
    """Yield every command of the program."""
    waiting = [typer.main.get_command(app)]
    while waiting:
        command = waiting.pop()
        if hasattr(command, "commands"):
            waiting += command.commands.values()
        else:
            yield command


# The options that several commands have, in the order in which every command lists them.
ORDER = [
    *("--input", "--label", "--version", "--host", "--port", "--out", "--name", "--db"),
    *("--max-in-flight", "--rate", "--watch", "--timeout", "--no-push"),
    *("--all", "--json", "--base-url", "--outage"),
]


@pytest.mark.parametrize("command", list(commands()), ids=lambda command: command.name)
def test_help_texts_have_one_order_and_style(command: Any) -> None:
    """Options that commands share are in one order; each text is a sentence."""
    names = [parameter.opts[0] for parameter in command.params if parameter.opts[0] in ORDER]
    assert names == sorted(names, key=ORDER.index)
    for parameter in command.params:
        text = parameter.help
        assert re.fullmatch(r"[A-Z-].*\.", text), text
    shown = command.get_help(typer.Context(command, terminal_width=80))
    assert re.findall(r"<\w|{[A-Z]|x>=|\(\$|True|None", shown) == []  # Python's, or Typer's
    assert len(shown.splitlines()) <= 56
    assert max(map(len, shown.splitlines())) <= 80
    summary = command.help.partition("\n\n")[0]
    assert re.fullmatch(r"[A-Z][^.]*\.", summary), summary
    assert len(summary) <= 66  # or the list of commands cuts it off


TANGLED: dict[str, tuple[str, ...]] = {
    "a": (),
    "b": ("a",),
    "c": ("a", "b"),
    "d": ("b", "a"),
    "e": ("b", "c"),
    "f": ("b", "c", "d"),
}


def graph(**dependencies: tuple[str, ...]) -> list[str]:
    """Return the lines of the graph of nodes with dependencies."""
    nodes = {it: WorkflowNode(it, dependencies=after) for it, after in dependencies.items()}
    lines = draw(WorkflowDefinition(1, "w", nodes=nodes))
    return [f"{line:<8} {name or ''}".rstrip() for line, name in lines]


def test_a_chain_is_a_column() -> None:
    """Each node is below the one that it depends on."""
    assert graph(c=("b",), a=(), b=("a",)) == ["●        a", "●        b", "●        c"]


def test_nodes_that_depend_on_the_same_share_a_lane() -> None:
    """However many there are, the graph stays narrow."""
    middle: dict[str, tuple[str, ...]] = {f"n{n}": ("a",) for n in range(3)}
    assert graph(a=(), **middle, z=tuple(middle)) == [
        "●        a",
        "├─●      n0",
        "├─│─●    n1",
        "│ ├─╯",
        "● │      n2",
        "╰─┤",
        "  ●      z",
    ]
    leaves: dict[str, tuple[str, ...]] = {f"n{n}": ("a",) for n in range(60)}
    assert {line[:8].rstrip() for line in graph(a=(), **leaves)} == {"●", "├─●"}


def test_unrelated_nodes_are_not_below_each_other() -> None:
    """It would look as if they depended on each other."""
    assert graph(a=(), b=(), c=(), d=("a", "c")) == [
        "●        a",
        "│ ●      b",
        "│   ●    c",
        "├───╯",
        "●        d",
    ]


def test_a_node_of_several_lanes_leaves_them_one_by_one() -> None:
    """Lanes are joined from the left and from the right."""
    assert graph(**TANGLED) == [
        "●        a",
        "├─╮",
        "● │      b",
        "├─│─╮",
        "├─┤ │",
        "│ ├─│─●  c",
        "├─│─│─┤",
        "│ │ ├─╯",
        "● │ │    e",
        "  ● │    d",
        "  ╰─┤",
        "    ●    f",
    ]


def show(snapshot: Snapshot, *, height: int, warning: str = "") -> list[str]:
    """Return the lines of a live display on a terminal of 80 columns."""
    console = Console(
        file=io.StringIO(), width=80, height=height, force_terminal=True, color_system=None
    )
    display = LiveDisplay(console)
    with display.waiting("waiting"):
        display.show(snapshot)
        if warning:
            display.warn(warning)
        lines = console.render_lines(display._render(), pad=False)
        return ["".join(segment.text for segment in line).rstrip() for line in lines]


def large(statuses: dict[int, str], *, complete: bool = False) -> Snapshot:
    """Return a snapshot of 60 nodes, which succeeded one by one unless another status is given."""
    nodes = {f"n{n}": Node(f"n{n}", statuses.get(n, "SUCCESS"), n) for n in range(60)}
    final = {name: float(name[1:]) if node.final else None for name, node in nodes.items()}
    times = {name: NodeTimes(0.0, at) for name, at in final.items()}
    return Snapshot(787, complete, nodes, poll=9, elapsed=70.0, times=times)


def test_a_small_terminal_keeps_failed_and_running_nodes_in_sight() -> None:
    """At 80 x 24, of 60 nodes, the rest is counted; the latest ones fill the space."""
    states = {0: "FAILED", 5: "RUNNING", 30: "PAUSED", 59: "FAILED", 7: "QUEUED", 8: "SKIPPED"}
    lines = show(large(states), height=24)
    assert len(lines) <= 23
    names = [line.split()[0] for line in lines[3:-1]]
    assert names[:3] == ["n0", "n5", "n30"]
    assert names[-3:] == ["n57", "n58", "n59"]
    assert names == sorted(names, key=lambda name: int(name[1:]))
    assert lines[-1] == "… 41 more: 39 SUCCESS, 1 QUEUED, 1 SKIPPED"


def test_many_skipped_nodes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """They do not hide what failed, neither in the last table nor in a pipe. A few have lines."""
    states = {0: "FAILED"} | dict.fromkeys(range(10, 60), "SKIPPED")
    lines = show(large(states, complete=True), height=24)
    assert [line.split()[0] for line in lines[3:-1]] == [f"n{number}" for number in range(10)]
    assert lines[-1] == "… 50 more: 50 SKIPPED"
    few = show(large({0: "FAILED", 1: "SKIPPED"}, complete=True), height=24)
    assert len(few) == 63

    LineDisplay(as_json=False).show(large(states, complete=True))
    printed = capsys.readouterr().out
    assert re.search("n0 +FAILED ", printed)
    assert printed.count("SKIPPED") == 1
    assert "50 other nodes were SKIPPED" in printed


def test_a_warning_takes_the_place_of_nodes() -> None:
    """The display never gets higher than the terminal."""
    lines = show(
        large({}), height=24, warning="could not reach it. Trying again for up to 60 s " * 3
    )
    assert len(lines) <= 23
    assert lines[-1].startswith("… 43 more: 43 SUCCESS")


def test_a_large_terminal_shows_all() -> None:
    """So does any terminal once the execution is complete: what does not fit scrolls up."""
    assert not any("more" in line for line in show(large({0: "RUNNING"}), height=64))
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    display = LiveDisplay(console)
    with display.waiting("waiting"):
        display.show(large({}, complete=True))
    assert isinstance(console.file, io.StringIO)
    last = console.file.getvalue().rpartition("Status")[2]
    assert [name for name in (f"n{n}" for n in range(60)) if name not in last] == []
