"""The commands `workflows` and `workflow`, and the drawing of a graph like `git log --graph`."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import aclosing, suppress
from graphlib import CycleError, TopologicalSorter
from itertools import count
from typing import Annotated, Literal

import attrs
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from promptlayer_exec import Workflow, WorkflowNode, WorkflowSummary
from promptlayer_exec._integration import printable
from promptlayer_exec.cli import _arguments as arguments
from promptlayer_exec.cli._exit import Misuse, command
from promptlayer_exec.cli._text import err, out, shorten

_WIDEST_GRAPH = 0.5  # of the terminal
NODE, OUTPUT = "●", "◎"
# For terminals that have no box-drawing characters.
ASCII = str.maketrans(f"{NODE}{OUTPUT}│├┤─╮╯╰", "*@|||-.'`")
# Edges of the same origin share a lane: all nodes that depend on the same nodes hang off one.
_Lane = frozenset[str]


@command
async def workflows(
    sort_by: Annotated[
        Literal["created_at", "updated_at", "name", "id"], typer.Option(help="Field to sort by.")
    ] = "name",
    sort_order: Annotated[Literal["asc", "desc"], typer.Option(help="Order to sort in.")] = "asc",
    as_json: arguments.JsonLines = False,
    base_url: arguments.BaseUrl = None,
    outage: arguments.Outage = None,
) -> None:
    """List the workflows of the workspace.

    On a terminal, the list is a table. Otherwise each workflow is written as one line with its id,
    its latest version, its name and its labels, separated by tabs.

    With --json, each is written as one line of ASCII JSON:

    \b
      {"id": 3, "name": "support-agent", "labels": ["prod"], "latest_version": 7,
       "is_deleted": false}
    """  # noqa: D301 - \b is Typer's mark for preformatted text
    is_table = sys.stdout.isatty() and not as_json
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("Id", "Version", "Name", "Labels"):
        table.add_column(heading, overflow="fold")
    async with (
        arguments.open_session(base_url, outage, err) as session,
        aclosing(session.workflows(sort_by=sort_by, sort_order=sort_order)) as found,
    ):
        async for summary in found:
            if is_table:
                table.add_row(*map(Text, _columns(summary)))
            elif as_json:
                out(json.dumps(attrs.asdict(summary)))
            else:
                out("\t".join(_columns(summary)))
    if table.row_count:
        Console().print(table)
    elif is_table:
        err("the workspace has no workflows")


def _columns(summary: WorkflowSummary) -> tuple[str, str, str, str]:
    version = "" if summary.latest_version is None else str(summary.latest_version)
    labels = [*summary.labels, *(["(deleted)"] if summary.is_deleted else [])]
    return str(summary.id), version, printable(summary.name), printable(", ".join(labels))


@command
async def workflow(
    workflow: arguments.WorkflowName,
    *,
    label: arguments.Label = None,
    version: arguments.Version = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one line of JSON.")] = False,
    base_url: arguments.BaseUrl = None,
    outage: arguments.Outage = None,
) -> None:
    """Show what a workflow requires, its labels and its graph.

    Without --label and --version, it is the latest version. In the graph, each node comes below
    those that it depends on; an output node is marked with ◎.

    With --json, the workflow is written as one line of ASCII JSON with the keys "id", "name",
    "version", "labels", "required_inputs", "nodes", "edges" and "layers".
    """
    async with arguments.open_session(base_url, outage, err) as session:
        try:
            found = await session.workflow(workflow, label=label, version=version)
        except (TypeError, ValueError) as error:
            raise Misuse(str(error)) from error
    if as_json:
        inputs = found.required_inputs
        fields = {
            "id": found.id,
            "name": found.name,
            "version": found.version,
            "labels": found.labels,
            "required_inputs": None if inputs is None else dict(inputs),
            "nodes": [attrs.asdict(node) for node in found.nodes.values()],
            "edges": [attrs.asdict(edge) for edge in found.edges],
            "layers": found.layers(),
        }
        out(json.dumps(fields))
        return
    for line in _description(found):
        if sys.stdout.isatty():
            Console(highlight=False).print(line, no_wrap=True, overflow="ellipsis")
        else:
            out(line.plain)


def _description(found: Workflow) -> Iterator[Text]:
    version = "" if found.version is None else f", version {found.version}"
    yield Text.assemble((printable(found.name), "bold"), f" (workflow {found.id}{version})")
    if found.labels:
        yield Text(f"labels: {printable(', '.join(found.labels))}")
    inputs = found.required_inputs
    if inputs is not None:
        yield Text("inputs:" if inputs else "inputs: none required")
        width = max((len(printable(name)) for name in inputs), default=0)
        for name, kind in inputs.items():
            yield Text.assemble(f"  {printable(name):<{width}}  ", (printable(kind), "dim"))
    yield Text("")
    if not found.nodes:
        yield Text("The server did not describe its nodes.")
        return
    lines = draw(found)
    width = max((len(line) for line, _ in lines), default=0)
    if width > shutil.get_terminal_size().columns * _WIDEST_GRAPH:
        yield from _list(found, [name for layer in found.layers() for name in layer])
        return
    for line, node in lines:
        drawn = in_encoding(f"{line:<{width}}  ")
        yield Text(drawn.rstrip()) if node is None else Text(drawn) + _details(found, node)
    names = {node for _, node in lines}
    if cycle := [name for name in found.nodes if name not in names]:
        yield Text("In a cycle, or after one:")
        yield from _list(found, cycle)


def _list(found: Workflow, names: list[str]) -> Iterator[Text]:
    """Yield a line for each node that cannot be drawn, or not on this terminal."""
    for name in names:
        after = ", ".join(map(printable, found.nodes[name].dependencies))
        yield _details(found, name) + Text(f"  after {shorten(after, 60)}" if after else "")


def _details(found: Workflow, name: str) -> Text:
    node: WorkflowNode = found.nodes[name]
    facts = [printable(node.node_type)] if node.node_type else []
    facts += ["output"] * node.is_output_node
    if any(edge.conditional and edge.target == name for edge in found.edges):
        facts.append("conditional")
    return Text.assemble(printable(name), (f"  {', '.join(facts)}" if facts else "", "dim"))


def in_encoding(line: str) -> str:
    """Return a line of a graph in characters that standard output has."""
    try:
        line.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return line.translate(ASCII)
    return line


def draw(workflow: Workflow) -> list[tuple[str, str | None]]:
    """Return the lines of the graph, each with the name of the node that is in it, if one is.

    They are drawn from top to bottom. Nodes in a cycle, and those after them, are left out.
    """
    drawing = _Drawing(workflow)
    for name in drawing.lanes_into:
        drawing.add(name, OUTPUT if workflow.nodes[name].is_output_node else NODE)
    return drawing.lines


def _in_depth_order(workflow: Workflow) -> Iterator[str]:
    """Yield each node after all that it depends on, and soon after the last of them."""
    sorter = TopologicalSorter(dict.fromkeys(workflow.nodes, ()))
    for name, node in workflow.nodes.items():
        sorter.add(name, *workflow.nodes.keys() & node.dependencies)
    with suppress(CycleError):  # it still has the nodes before a cycle
        sorter.prepare()
    stack = [*reversed(sorter.get_ready())]
    while stack:
        yield stack[-1]
        sorter.done(stack.pop())
        stack += reversed(sorter.get_ready())


class _Drawing:
    def __init__(self, workflow: Workflow) -> None:
        self.lanes_into: dict[str, _Lane] = {
            name: frozenset(workflow.nodes[name].dependencies).intersection(workflow.nodes)
            for name in _in_depth_order(workflow)
        }
        self.lines: list[tuple[str, str | None]] = []
        self._columns: dict[_Lane, int] = {}
        self._targets_left = Counter(self.lanes_into.values())

    def add(self, name: str, mark: str) -> None:
        """Draw a node, and the edges that leave it."""
        lane = self.lanes_into[name]
        if not lane:
            # Not right below another node: it would look as if it depended on that one.
            above = self.lines[-1][0] if self.lines else ""
            at = self._free_column()
            while above[2 * at : 2 * at + 1].strip():
                at = self._free_column(at + 1)
            self._draw({at: mark}, name)
        else:
            column = self._columns[lane]
            self._targets_left[lane] -= 1
            if self._targets_left[lane]:
                at = self._free_column(column + 1)
                self._draw({column: "├", at: mark}, name)
            else:
                at = column
                self._draw({at: mark}, name)
                del self._columns[lane]
        leaving = [it for it in self._targets_left if name in it]
        new = [it for it in leaving if it not in self._columns]
        joined = [self._columns[it] for it in leaving if it in self._columns]
        for lane in new[1:]:
            column = self._free_column(at + 1)
            self._draw({at: "├", column: "╮"})
            self._columns[lane] = column
        for index, column in enumerate(joined, 1):
            goes_on = bool(new) or index < len(joined)
            if column < at:
                self._draw({column: "├", at: "┤" if goes_on else "╯"})
            else:
                self._draw({at: "├" if goes_on else "╰", column: "┤"})
        if new:
            self._columns[new[0]] = at

    def _free_column(self, start: int = 0) -> int:
        return next(it for it in count(start) if it not in self._columns.values())

    def _draw(self, marks: Mapping[int, str], name: str | None = None) -> None:
        """Add a line; marks in two columns are connected, behind the lanes between them."""
        first, last = min(marks), max(marks)
        lanes = set(self._columns.values())
        text = ""
        for column in range(max({last, *lanes}) + 1):
            passing = "─" if first < column < last else " "
            text += marks.get(column) or ("│" if column in lanes else passing)
            text += "─" if first <= column < last else " "
        self.lines.append((text.rstrip(), name))
