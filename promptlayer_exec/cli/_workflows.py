"""The commands `workflows` and `workflow`, a workflow's graph, and completing names."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal

import attrs
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from promptlayer_exec import RetryPolicy, Workflow, WorkflowNode, WorkflowSummary
from promptlayer_exec.cli._arguments import (
    BaseUrl,
    JsonLines,
    Label,
    Outage,
    Version,
    check_version,
)
from promptlayer_exec.cli._exit import PROGRAM, ExitCode, Misuse, Subject, run_command
from promptlayer_exec.cli._session import open_session
from promptlayer_exec.cli._text import err, out, printable, shorten

_COMPLETION_TIMEOUT = 2.0
_MOST_COMPLETIONS = 200
_WIDEST_GRAPH = 0.5  # of the terminal
NODE, OUTPUT = "●", "◎"
# For terminals that have no box-drawing characters.
ASCII = str.maketrans(f"{NODE}{OUTPUT}│├┤─╮╯╰", "*@|||-.'`")
# Edges of the same origin share a lane: all nodes that depend on the same nodes hang off one.
_Lane = frozenset[str]
# Takes up the column of a node until its last edge has left it.
_TAKEN: _Lane = frozenset()


async def _complete(base_url: str | None, incomplete: str) -> list[str]:
    names: list[str] = []
    async with (
        asyncio.timeout(_COMPLETION_TIMEOUT),
        open_session(base_url, RetryPolicy(outage=0.0)) as session,
        aclosing(session.workflows(sort_by="name", sort_order="asc")) as found,
    ):
        async for summary in found:
            if summary.name.startswith(incomplete) and not summary.is_deleted:
                names.append(summary.name)
            if len(names) == _MOST_COMPLETIONS:
                break
    return names


def complete_workflow(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of workflows that begin with `incomplete`, for the shell; none on errors."""
    # A message would be printed into the line that is being typed.
    logging.getLogger("promptlayer_exec").addHandler(logging.NullHandler())
    try:
        names = asyncio.run(_complete(context.params.get("base_url"), incomplete))
    except Exception:  # noqa: BLE001 - no key, no network, or too slow
        return []
    if os.environ.get(f"_{PROGRAM.replace('-', '_')}_COMPLETE".upper()) == "complete_bash":
        # bash puts a completion into the line as it is; other shells quote it.
        names = [re.sub(r"([^\w%+,./:=@-])", r"\\\1", name) for name in names]
    return [name for name in names if name.isprintable()]


WorkflowName = Annotated[
    str,
    typer.Argument(
        metavar="WORKFLOW", help="Name or id of the workflow.", autocompletion=complete_workflow
    ),
]


def workflows(
    sort_by: Annotated[
        Literal["created_at", "updated_at", "name", "id"], typer.Option(help="Field to sort by.")
    ] = "name",
    sort_order: Annotated[Literal["asc", "desc"], typer.Option(help="Order to sort in.")] = "asc",
    as_json: JsonLines = False,
    base_url: BaseUrl = None,
    outage: Outage = 10,
) -> None:
    """List the workflows of the workspace.

    On a terminal, the list is a table. Otherwise each workflow is written as one line with its id,
    its latest version, its name and its labels, separated by tabs.

    With --json, each is written as one line of ASCII JSON:

    \b
      {"id": 3, "name": "support-agent", "labels": ["prod"], "latest_version": 7,
       "is_deleted": false}
    """  # noqa: D301 - \b is Typer's mark for preformatted text

    async def work() -> ExitCode:
        is_table = sys.stdout.isatty() and not as_json
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("Id", "Version", "Name", "Labels"):
            table.add_column(heading, overflow="fold")
        async with (
            open_session(base_url, RetryPolicy(outage=outage), err) as session,
            aclosing(session.workflows(sort_by=sort_by, sort_order=sort_order)) as found,
        ):
            async for summary in found:
                if is_table:
                    table.add_row(*map(Text, _columns(summary)))
                elif as_json:
                    out(_summary_json(summary))
                else:
                    out("\t".join(_columns(summary)))
        if table.row_count:
            Console().print(table)
        elif is_table:
            err("the workspace has no workflows")
        return ExitCode.SUCCEEDED

    raise typer.Exit(run_command(work(), Subject(base_url=base_url), as_json=as_json))


def _columns(summary: WorkflowSummary) -> tuple[str, str, str, str]:
    version = "" if summary.latest_version is None else str(summary.latest_version)
    labels = [*summary.labels, *(["(deleted)"] if summary.is_deleted else [])]
    return str(summary.id), version, printable(summary.name), printable(", ".join(labels))


def _summary_json(summary: WorkflowSummary) -> str:
    fields = ("id", "name", "labels", "latest_version", "is_deleted")
    return json.dumps({name: getattr(summary, name) for name in fields})


def workflow(
    workflow: WorkflowName,
    *,
    label: Label = None,
    version: Version = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one line of JSON.")] = False,
    base_url: BaseUrl = None,
    outage: Outage = 10,
) -> None:
    """Show what a workflow requires, its labels and its graph.

    Without --label and --version, it is the latest version. In the graph, each node comes below
    those that it depends on; an output node is marked with ◎.

    With --json, the workflow is written as one line of ASCII JSON with the keys "id", "name",
    "version", "labels", "required_inputs", "nodes", "edges" and "layers".
    """
    check_version(label, version)

    async def work() -> ExitCode:
        async with open_session(base_url, RetryPolicy(outage=outage), err) as session:
            try:
                found = await session.workflow(workflow, label=label, version=version)
            except (TypeError, ValueError) as error:
                raise Misuse(str(error)) from error
        if as_json:
            out(json.dumps(_fields(found)))
            return ExitCode.SUCCEEDED
        for line in _description(found):
            _print(line)
        return ExitCode.SUCCEEDED

    raise typer.Exit(run_command(work(), Subject(base_url=base_url), as_json=as_json))


def _fields(found: Workflow) -> dict[str, Any]:
    inputs = found.required_inputs
    return {
        "id": found.id,
        "name": found.name,
        "version": found.version,
        "labels": found.labels,
        "required_inputs": None if inputs is None else dict(inputs),
        "nodes": [
            {
                "name": node.name,
                "node_type": node.node_type,
                "is_output_node": node.is_output_node,
                "dependencies": node.dependencies,
            }
            for node in found.nodes.values()
        ],
        "edges": [
            {"source": edge.source, "target": edge.target, "conditional": edge.conditional}
            for edge in found.edges
        ],
        "layers": found.layers(),
    }


def _print(line: Text) -> None:
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
        drawn = _in_encoding(f"{line:<{width}}  ")
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


def _in_encoding(line: str) -> str:
    """Return a line of a graph in characters that standard output has."""
    try:
        line.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return line.translate(ASCII)
    return line


def draw(workflow: Workflow) -> list[tuple[str, str | None]]:
    """Return the lines of the graph, each with the name of the node that is in it, if one is.

    They are drawn from top to bottom, like those of `git log --graph`.

    Nodes in a cycle, and those after them, are left out.
    """
    drawing = _Drawing(
        {
            name: frozenset(workflow.nodes[name].dependencies).intersection(workflow.nodes)
            for name in _in_depth_order(workflow)
        }
    )
    for name in drawing.lanes_into:
        drawing.add(name, OUTPUT if workflow.nodes[name].is_output_node else NODE)
    return drawing.lines


def _in_depth_order(workflow: Workflow) -> Iterator[str]:
    """Yield each node after all that it depends on, and soon after the last of them."""
    waiting = {
        name: set(node.dependencies) & workflow.nodes.keys()
        for name, node in workflow.nodes.items()
    }
    dependents: dict[str, list[str]] = {name: [] for name in waiting}
    for name, missing in waiting.items():
        for dependency in missing:
            dependents[dependency].append(name)
    stack = [name for name in reversed(waiting) if not waiting[name]]
    while stack:
        done = stack.pop()
        yield done
        for name in dependents[done]:
            waiting[name].remove(done)
        stack += [name for name in reversed(dependents[done]) if not waiting[name]]


@attrs.define(eq=False)
class _Drawing:
    lanes_into: Mapping[str, _Lane]
    lines: list[tuple[str, str | None]] = attrs.field(init=False, factory=list)
    _columns: list[_Lane | None] = attrs.field(init=False, factory=list)
    _targets_left: Counter[_Lane] = attrs.field(init=False)
    _lanes_from: dict[str, list[_Lane]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._targets_left = Counter(self.lanes_into.values())
        self._lanes_from = {name: [] for name in self.lanes_into}
        for lane in dict.fromkeys(self.lanes_into.values()):
            for name in lane:
                self._lanes_from[name].append(lane)

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
            column = self._columns.index(lane)
            self._targets_left[lane] -= 1
            if self._targets_left[lane]:
                at = self._free_column(column + 1)
                self._draw({column: "├", at: mark}, name)
            else:
                at = column
                self._draw({at: mark}, name)
        self._columns[at] = _TAKEN
        leaving = self._lanes_from[name]
        new = [it for it in leaving if it not in self._columns]
        joined = [self._columns.index(it) for it in leaving if it in self._columns]
        for lane in new[1:]:
            column = self._free_column(at + 1)
            self._draw({at: "├", column: "╮"})
            self._columns[column] = lane
        for index, column in enumerate(joined, 1):
            goes_on = bool(new) or index < len(joined)
            if column < at:
                self._draw({column: "├", at: "┤" if goes_on else "╯"})
            else:
                self._draw({at: "├" if goes_on else "╰", column: "┤"})
        self._columns[at] = new[0] if new else None
        while self._columns and self._columns[-1] is None:
            self._columns.pop()

    def _free_column(self, start: int = 0) -> int:
        for column in range(start, len(self._columns)):
            if self._columns[column] is None:
                return column
        self._columns += [None] * (max(start, len(self._columns)) + 1 - len(self._columns))
        return len(self._columns) - 1

    def _draw(self, marks: Mapping[int, str], name: str | None = None) -> None:
        """Add a line; marks in two columns are connected, behind the lanes between them."""
        first, last = min(marks), max(marks)
        text = ""
        for column, lane in enumerate(self._columns):
            is_between = first < column < last
            passing = "─" if is_between else " "
            text += marks.get(column) or (passing if lane is None else "│")
            text += "─" if first <= column < last else " "
        self.lines.append((text.rstrip(), name))
