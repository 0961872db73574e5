"""Why a node failed, in words, and what a notebook shows of a snapshot and of a workflow.

The latter is static HTML and SVG, without scripts. Its colours are those of the page around it,
except for those of statuses.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from promptlayer_exec._statuses import NodeStatus, status_entry
from promptlayer_exec._text import printable, short_repr

if TYPE_CHECKING:
    from promptlayer_exec._models import Node, Snapshot
    from promptlayer_exec._workflows import Workflow


def error_text(node: Node) -> str | None:
    """Return why a node failed: its message, or else the last line of the details."""
    if node.error_message or node.status != NodeStatus.FAILED:
        return node.error_message
    details = error_details(node)
    return details and details.rstrip().rpartition("\n")[2]


def error_details(node: Node) -> str | None:
    """Return the details of a node's error as text, for example a traceback."""
    raw = node.raw_error_message
    raw = raw.get("raw", raw) if isinstance(raw, dict) else raw
    return (raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False)) if raw else None


_MOST_ROWS, _MOST_NODES, _MOST_EDGES = 100, 200, 1000
_LONGEST_NAME, _LONGEST_LABEL, _LONGEST_ERROR = 60, 20, 200
_CELL = "padding:2px 12px 2px 0;text-align:left;vertical-align:top"
_WIDTH, _HEIGHT = 160, 40
_GAP_X, _GAP_Y, _MARGIN = 32, 14, 4


def _text(text: object, longest: int) -> str:
    """Return text that came from a server, cut and escaped."""
    from html import escape  # noqa: PLC0415 - only notebooks need it

    words = str(text)
    return escape(printable(words if len(words) <= longest else f"{words[: longest - 1]}…"))


def snapshot_html(snapshot: Snapshot) -> str:
    nodes = list(snapshot.nodes.values())
    final = sum(node.final for node in nodes)
    state = "running" if not snapshot.complete else ("failed", "succeeded")[snapshot.succeeded]
    head = f"Execution {snapshot.execution_id}</b> · {state} · {final} of {len(nodes)} nodes final"
    # Where not all fit, those that failed or run say the most.
    is_watched = snapshot.poll > 1  # the times of a single request say nothing
    ranked = sorted(range(len(nodes)), key=lambda index: status_entry(nodes[index].status).rank)
    shown = sorted(ranked[:_MOST_ROWS])
    rows = [_row(snapshot, nodes[index], is_watched=is_watched) for index in shown]
    if rest := len(nodes) - len(rows):
        rows.append(f'<tr><td colspan="5" style="{_CELL}">… {rest} more</td></tr>')
    columns = ("Node", "Status", *(("Ended at, s",) if is_watched else ()), "Value or error")
    titles = "".join(f'<th scope="col" style="{_CELL}">{column}</th>' for column in columns)
    table = ""
    if rows:
        table = (
            '<table style="border-collapse:collapse;color:inherit">'
            f"<thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )
    return f"<div><div><b>{head}</div>{table}</div>"


def _row(snapshot: Snapshot, node: Node, *, is_watched: bool) -> str:
    entry = status_entry(node.status)
    mark = f'<span style="color:{entry.colour}">{entry.mark}</span>'
    name = _text(node.name, _LONGEST_NAME)
    times = snapshot.times.get(node.name)
    ended_at = "" if times is None or times.final is None else f"{times.final:.1f}"
    result = ""
    if (error := error_text(node)) is not None:
        result = _text(error, _LONGEST_ERROR)
    elif node.value is not None or node.succeeded:
        result = f"<code>{_text(short_repr(node.value), _LONGEST_ERROR)}</code>"
    cells = [
        f"<b>{name}</b> (output)" if node.is_output_node else name,
        f'<span style="white-space:nowrap">{mark} {_text(node.status, _LONGEST_LABEL)}</span>',
        *([ended_at] if is_watched else []),
        result,
    ]
    return "<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in cells) + "</tr>"


def workflow_html(workflow: Workflow) -> str:
    """Return what a workflow needs, and its graph."""
    name = _text(workflow.name, _LONGEST_NAME)
    facts = [f"<b>{name}</b> · workflow {workflow.id}"]
    if workflow.version is not None:
        facts.append(f"version {workflow.version}")
    facts += [_text(label, _LONGEST_LABEL) for label in workflow.labels[:_MOST_ROWS]]
    lines = [" · ".join(facts)]
    if workflow.required_inputs is not None:
        inputs = [
            f"<code>{_text(it, _LONGEST_NAME)}</code> ({_text(kind, _LONGEST_LABEL)})"
            for it, kind in list(workflow.required_inputs.items())[:_MOST_ROWS]
        ]
        lines.append(f"Required inputs: {', '.join(inputs) or 'none'}")
    nodes = len(workflow.nodes)
    edges = sum(len(node.dependencies) for node in workflow.nodes.values())
    graph = ""
    if not nodes:
        lines.append("The server described no nodes.")
    elif nodes > _MOST_NODES or edges > _MOST_EDGES:
        lines.append(f"{nodes} nodes and {edges} edges: too many to draw.")
    else:
        graph = _graph(workflow, name)
    heads = "".join(f"<div>{line}</div>" for line in lines)
    return f"<div>{heads}{graph}</div>"


def _graph(workflow: Workflow, title: str) -> str:
    """Draw the layers as columns, from left to right."""
    layers = workflow.layers()
    rows = max(map(len, layers))
    places = {
        name: (
            _MARGIN + column * (_WIDTH + _GAP_X),
            # Each column is centred.
            _MARGIN + (row + (rows - len(names)) / 2) * (_HEIGHT + _GAP_Y),
        )
        for column, names in enumerate(layers)
        for row, name in enumerate(names)
    }
    conditional = {(edge.source, edge.target) for edge in workflow.edges if edge.conditional}
    bottom = 2 * _MARGIN + rows * (_HEIGHT + _GAP_Y)
    lanes: dict[str, float] = {}  # one below all boxes, for the edges of a node that skip layers
    arrows = []
    for name, node in workflow.nodes.items():
        for source in node.dependencies:
            if source in places:
                lane = None
                if places[name][0] - places[source][0] > _WIDTH + _GAP_X:
                    lane = lanes.setdefault(source, bottom + _GAP_Y * len(lanes))
                is_dashed = (source, name) in conditional
                arrows.append(_arrow(*places[source], *places[name], lane=lane, dashed=is_dashed))
    boxes = [_box(workflow, name, *places[name]) for name in workflow.nodes]
    width = 2 * _MARGIN + len(layers) * (_WIDTH + _GAP_X) - _GAP_X
    height = bottom + _GAP_Y * len(lanes)
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
    x, y, end, bend = x + _WIDTH, y + _HEIGHT / 2, top + _HEIGHT / 2, _GAP_X / 2
    path = f"M{x:g} {y:g}"
    if lane is not None:
        path += f"c{bend:g} 0 {bend:g} {lane - y:g} {_GAP_X} {lane - y:g}H{left - _GAP_X:g}"
        x, y = left - _GAP_X, lane
    path += f"C{x + bend:g} {y:g} {left - bend:g} {end:g} {left - 6:g} {end:g}"
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<path d="{path}" fill="none" stroke="currentColor" stroke-opacity="0.55"{dash}/>'
        f'<path d="M{left:g} {end:g}l-7 -4v8z" fill-opacity="0.7"/>'
    )


def _box(workflow: Workflow, name: str, x: float, y: float) -> str:
    node = workflow.nodes[name]
    kind = _text(node.node_type, 24)
    if node.is_output_node:
        kind = f"{kind} · output" if kind else "output"
    middle = x + _WIDTH / 2
    label = _line(middle, y + (18 if kind else 24), 13, _text(name, _LONGEST_LABEL), 1)
    below = _line(middle, y + 33, 10, kind, 0.75) if kind else ""
    thickness = 2 if node.is_output_node else 1
    return (
        f"<g><title>{_text(name, _LONGEST_ERROR)}</title>"
        f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6"'
        f' fill-opacity="0.06" stroke="currentColor" stroke-width="{thickness}"/>{label}{below}</g>'
    )


def _line(x: float, y: float, size: int, text: str, opacity: float) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill-opacity="{opacity:g}">{text}</text>'
