"""The drawing of a workflow's graph, in the manner of `git log --graph`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping

import attrs

from promptlayer_exec import Workflow

NODE, OUTPUT = "●", "◎"
# For terminals that have no box-drawing characters.
ASCII = str.maketrans(f"{NODE}{OUTPUT}│├┤─╮╯╰", "*@|||-.'`")
# Edges of the same origin share a lane: all nodes that depend on the same nodes hang off one.
_Lane = frozenset[str]
# Takes up the column of a node until its last edge has left it.
_TAKEN: _Lane = frozenset()


def in_encoding(line: str) -> str:
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
