"""Explains why a node failed, and renders snapshots and workflows for notebooks.

Notebooks get static HTML and SVG, without scripts. It takes its colours from the page around it,
except for the statuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from promptlayer_exec._values.statuses import NodeStatus, status_entry
from promptlayer_exec._values.text import message_text, printable, short_repr

if TYPE_CHECKING:
    from promptlayer_exec._values.models import Node, Snapshot
    from promptlayer_exec._values.workflow_definition import WorkflowDefinition


def error_text(node: Node) -> str | None:
    """Return why a node failed: its message, or else the last line of the details."""
    if node.error_message or node.status != NodeStatus.FAILED:
        return node.error_message
    details = error_details(node)
    return details and details.rstrip().rpartition("\n")[2]


def error_details(node: Node) -> str | None:
    """Return the details of a node's error as text, for example a traceback."""
    return message_text(node.raw_error_message) or None


@attrs.frozen
class _Layout:
    """The measures of a notebook's table and graph, in pixels.

    A box fits a label of 20 characters. Columns of boxes have room for an arrow between them.
    """

    cell: str = "padding:2px 12px 2px 0;text-align:left;vertical-align:top"
    width: int = 160  # of a box
    height: int = 40
    gap_x: int = 32  # between boxes
    gap_y: int = 14
    margin: int = 4


_LAYOUT = _Layout()


def _name(text: str) -> str:
    return _text(text, 60)


def _label(text: str) -> str:
    return _text(text, 20)


def _text(text: str, longest: int = 200) -> str:
    """Return text from a server, shortened and escaped."""
    from html import escape  # noqa: PLC0415 - only notebooks need it

    if len(text) > longest:
        text = f"{text[: longest - 1]}…"
    return escape(printable(text))


def snapshot_html(snapshot: Snapshot) -> str:
    """Return the state of an execution, and a table of its nodes."""
    nodes = list(snapshot.nodes.values())
    head = _head(snapshot)
    if not nodes:
        return f"<div><div>{head}</div></div>"

    # If there are too many nodes, show the failed and running ones first.
    ranked = sorted(range(len(nodes)), key=lambda index: status_entry(nodes[index].status).rank)
    shown = sorted(ranked[:100])

    # Only a watch sees when a node becomes final. A single request is poll 1.
    columns = ["Node", "Status", "Value or error"]
    is_watched = snapshot.poll > 1
    if is_watched:
        columns.insert(2, "Ended at, s")

    rows = [_row(snapshot, nodes[index], is_watched=is_watched) for index in shown]
    if rest := len(nodes) - len(rows):
        rows.append(f'<tr><td colspan="5" style="{_LAYOUT.cell}">… {rest} more</td></tr>')

    titles = "".join(f'<th scope="col" style="{_LAYOUT.cell}">{column}</th>' for column in columns)
    return (
        f"<div><div>{head}</div>"
        '<table style="border-collapse:collapse;color:inherit">'
        f"<thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _head(snapshot: Snapshot) -> str:
    """Return the state of an execution as one line."""
    state = "running"
    if snapshot.complete:
        state = "succeeded" if snapshot.succeeded else "failed"
    final = sum(node.final for node in snapshot.nodes.values())
    count = f"{final} of {len(snapshot.nodes)} nodes final"
    return f"<b>Execution {snapshot.execution_id}</b> · {state} · {count}"


def _row(snapshot: Snapshot, node: Node, *, is_watched: bool) -> str:
    name = _name(node.name)
    if node.is_output_node:
        name = f"<b>{name}</b> (output)"

    entry = status_entry(node.status)
    mark = f'<span style="color:{entry.colour}">{entry.mark}</span>'
    cells = [name, f'<span style="white-space:nowrap">{mark} {_label(node.status)}</span>']

    if is_watched:
        times = snapshot.times.get(node.name)
        if times is None or times.final is None:
            cells.append("")
        else:
            cells.append(f"{times.final:.1f}")

    if (error := error_text(node)) is not None:
        cells.append(_text(error))
    elif node.value is not None or node.succeeded:
        cells.append(f"<code>{_text(short_repr(node.value))}</code>")
    else:
        cells.append("")

    return "<tr>" + "".join(f'<td style="{_LAYOUT.cell}">{cell}</td>' for cell in cells) + "</tr>"


def workflow_html(workflow: WorkflowDefinition) -> str:
    """Return the required inputs, the state of the run and the graph of a workflow."""
    name = _name(workflow.name)
    facts = [f"<b>{name}</b> · workflow {workflow.id}"]
    if workflow.version is not None:
        facts.append(f"version {workflow.version}")
    facts += map(_label, workflow.labels[:100])
    lines = [" · ".join(facts)]

    if workflow.required_inputs is not None:
        inputs = [
            f"<code>{_name(variable)}</code> ({_label(kind)})"
            for variable, kind in list(workflow.required_inputs.items())[:100]
        ]
        lines.append(f"Required inputs: {', '.join(inputs) or 'none'}")

    if workflow.run is not None:
        lines.append(_head(workflow.run))

    nodes = len(workflow.nodes)
    edges = sum(len(node.dependencies) for node in workflow.nodes.values())
    graph = ""
    if not nodes:
        lines.append("The server described no nodes.")
    elif nodes > 200 or edges > 1000:
        lines.append(f"{nodes} nodes and {edges} edges: too many to draw.")
    else:
        graph = _graph(workflow, name)

    heads = "".join(f"<div>{line}</div>" for line in lines)
    return f"<div>{heads}{graph}</div>"


def _graph(workflow: WorkflowDefinition, title: str) -> str:
    """Draw the layers as columns, from left to right."""
    layers = workflow.layers()
    rows = max(map(len, layers))
    column_width = _LAYOUT.width + _LAYOUT.gap_x
    row_height = _LAYOUT.height + _LAYOUT.gap_y

    places = {
        name: (
            _LAYOUT.margin + column * column_width,
            # Each column is centred.
            _LAYOUT.margin + (row + (rows - len(names)) / 2) * row_height,
        )
        for column, names in enumerate(layers)
        for row, name in enumerate(names)
    }
    boxes = [_box(workflow, name, *places[name]) for name in workflow.nodes]

    # Edges that skip layers run below all boxes. The edges of one node share a lane.
    bottom = 2 * _LAYOUT.margin + rows * row_height
    lanes: dict[str, float] = {}
    conditional = {(edge.source, edge.target) for edge in workflow.edges if edge.conditional}
    arrows = []
    for name, node in workflow.nodes.items():
        for source in node.dependencies:
            if source not in places:
                continue
            lane = None
            if places[name][0] - places[source][0] > column_width:
                lane = lanes.setdefault(source, bottom + _LAYOUT.gap_y * len(lanes))
            is_dashed = (source, name) in conditional
            arrows.append(_arrow(*places[source], *places[name], lane=lane, dashed=is_dashed))

    width = 2 * _LAYOUT.margin + len(layers) * column_width - _LAYOUT.gap_x
    height = bottom + _LAYOUT.gap_y * len(lanes)
    return (
        '<div style="overflow-x:auto;margin-top:6px">'
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" role="img" aria-label="The graph of {title}"'
        ' fill="currentColor" text-anchor="middle"'
        ' style="color:inherit;font-family:sans-serif;max-width:none">'
        f"{''.join((*arrows, *boxes))}</svg></div>"
    )


def _arrow(x: float, y: float, left: float, top: float, *, lane: float | None, dashed: bool) -> str:
    """Draw an edge from one box to another, in a lane if it skips layers."""
    gap = _LAYOUT.gap_x
    bend = gap / 2
    x += _LAYOUT.width
    y += _LAYOUT.height / 2
    end = top + _LAYOUT.height / 2

    path = f"M{x:g} {y:g}"
    if lane is not None:
        path += f"c{bend:g} 0 {bend:g} {lane - y:g} {gap} {lane - y:g}H{left - gap:g}"
        x, y = left - gap, lane
    path += f"C{x + bend:g} {y:g} {left - bend:g} {end:g} {left - 6:g} {end:g}"

    dash = ""
    if dashed:
        dash = ' stroke-dasharray="4 3"'
    return (
        f'<path d="{path}" fill="none" stroke="currentColor" stroke-opacity="0.55"{dash}/>'
        f'<path d="M{left:g} {end:g}l-7 -4v8z" fill-opacity="0.7"/>'
    )


def _box(workflow: WorkflowDefinition, name: str, x: float, y: float) -> str:
    node = workflow.nodes[name]
    kind = _text(node.node_type, 24)
    thickness = 1
    if node.is_output_node:
        kind = f"{kind} · output".removeprefix(" · ")
        thickness = 2

    # Of a run, the status takes the place of the type.
    colour, title = "currentColor", _text(name)
    found = None if workflow.run is None else workflow.run.nodes.get(name)
    if found is not None:
        entry = status_entry(found.status)
        colour, kind = entry.colour, f"{entry.mark} {_label(found.status)}"
        if (error := error_text(found)) is not None:
            title += f": {_text(error)}"

    middle = x + _LAYOUT.width / 2
    if kind:
        below = _line(middle, y + 33, 10, kind, 0.75)
        if found is not None:
            below = f'<g fill="{colour}">{_line(middle, y + 33, 11, kind, 1)}</g>'
        lines = _line(middle, y + 18, 13, _label(name), 1) + below
    else:
        lines = _line(middle, y + 24, 13, _label(name), 1)

    return (
        f"<g><title>{title}</title>"
        f'<rect x="{x:g}" y="{y:g}" width="{_LAYOUT.width}" height="{_LAYOUT.height}" rx="6"'
        f' fill-opacity="0.06" stroke="{colour}" stroke-width="{thickness}"/>{lines}</g>'
    )


def _line(x: float, y: float, size: int, text: str, opacity: float) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill-opacity="{opacity:g}">{text}</text>'
