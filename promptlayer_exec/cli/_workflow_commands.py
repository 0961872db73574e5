"""The commands `workflows` and `workflow`."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import aclosing
from typing import Annotated, Any

import attrs
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from promptlayer_exec import NotFound, WorkflowDefinition, WorkflowNode, WorkflowSummary
from promptlayer_exec._advice import explain
from promptlayer_exec._integration import printable
from promptlayer_exec._ways_out import suggest
from promptlayer_exec.cli import _options as options
from promptlayer_exec.cli._exit import THIS_SUBJECT, Misuse, command, hint
from promptlayer_exec.cli._graph_drawing import draw, in_encoding
from promptlayer_exec.cli._printing import err, out, quoted, shorten


@command
async def workflows(
    as_json: options.JsonLines = False,
    base_url: options.BaseUrl = None,
    outage: options.Outage = None,
) -> None:
    """List the workflows of your workspace, sorted by name.

    On a terminal, you get a table; in a pipe, lines with the id, the latest version, the name and
    the labels, separated by tabs. With --json, a line is:

    \b
      {"id": 3, "name": "support-agent", "labels": ["prod"], "latest_version": 7,
       "is_deleted": false}
    """  # noqa: D301 - \b is Typer's mark for preformatted text
    is_table = sys.stdout.isatty() and not as_json
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("Id", "Version"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Name", "Labels"):
        table.add_column(heading, overflow="fold")

    async with (
        options.open_session(base_url, outage, err) as session,
        aclosing(session.workflows(sort_by="name", sort_order="asc")) as found,
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
    labels = list(summary.labels)
    if summary.is_deleted:
        labels.append("(deleted)")
    return str(summary.id), version, printable(summary.name), printable(", ".join(labels))


@command
async def workflow(
    workflow: options.WorkflowName,
    *,
    label: options.Label = None,
    version: options.Version = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    base_url: options.BaseUrl = None,
    outage: options.Outage = None,
) -> None:
    """Show the required inputs of a workflow, its labels and its graph.

    In the graph, each node is below those that it depends on, and ◎ marks output nodes.

    With --json, you get one line of JSON with the keys "id", "name", "version", "labels",
    "required_inputs", "nodes", "edges" and "layers".
    """
    async with options.open_session(base_url, outage, err) as session:
        try:
            found = await session.definition(workflow, label=label, version=version)
        except NotFound:
            if name := await options.near_workflow(session, workflow):
                shown = suggest(f"workflow {shlex.quote(name)}", base_url)
                THIS_SUBJECT.get().hint = hint(f"did you mean {quoted(name)}?", shown)
            raise
        except (TypeError, ValueError) as error:
            raise Misuse(explain(error)) from error

    if as_json:
        out(json.dumps(_fields(found)))
        return
    for line in _description(found):
        if sys.stdout.isatty():
            Console(highlight=False).print(line, no_wrap=True, overflow="ellipsis")
        else:
            out(line.plain)


def _fields(found: WorkflowDefinition) -> dict[str, Any]:
    inputs = found.required_inputs
    return {
        "id": found.id,
        "name": found.name,
        "version": found.version,
        "labels": found.labels,
        "required_inputs": None if inputs is None else dict(inputs),
        "nodes": [attrs.asdict(node) for node in found.nodes.values()],
        "edges": [attrs.asdict(edge) for edge in found.edges],
        "layers": found.layers(),
    }


def _description(found: WorkflowDefinition) -> Iterator[Text]:
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
    if found.nodes:
        yield from _graph(found)
    else:
        yield Text("PromptLayer did not describe its nodes.")


def _graph(found: WorkflowDefinition) -> Iterator[Text]:
    lines = draw(found)
    width = max((len(line) for line, _ in lines), default=0)

    # The other half of the terminal is for the names and types.
    if width > shutil.get_terminal_size().columns / 2:
        yield from _list(found, [name for layer in found.layers() for name in layer])
        return

    for line, node in lines:
        drawn = in_encoding(f"{line:<{width}}  ")
        if node is None:
            yield Text(drawn.rstrip())
        else:
            yield Text(drawn) + _details(found, node)

    names = {node for _, node in lines}
    if cycle := [name for name in found.nodes if name not in names]:
        yield Text("In a cycle, or after one:")
        yield from _list(found, cycle)


def _list(found: WorkflowDefinition, names: list[str]) -> Iterator[Text]:
    """Yield a line for each node that cannot be drawn, or that this terminal has no room for."""
    for name in names:
        after = ", ".join(map(printable, found.nodes[name].dependencies))
        yield _details(found, name) + Text(f"  after {shorten(after, 60)}" if after else "")


def _details(found: WorkflowDefinition, name: str) -> Text:
    node: WorkflowNode = found.nodes[name]
    facts = []
    if node.node_type:
        facts.append(printable(node.node_type))
    if node.is_output_node:
        facts.append("output")
    if any(edge.conditional and edge.target == name for edge in found.edges):
        facts.append("conditional")
    return Text.assemble(printable(name), (f"  {', '.join(facts)}" if facts else "", "dim"))
