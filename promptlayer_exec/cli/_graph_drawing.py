"""Draws the graph of a workflow in lines, like `git log --graph`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from itertools import count
from typing import TypeAlias

from promptlayer_exec import WorkflowDefinition

# Edges of the same origin share a lane: all nodes that depend on the same nodes hang off one.
_Lane: TypeAlias = frozenset[str]


def draw(workflow: WorkflowDefinition) -> list[tuple[str, str | None]]:
    """Return the lines of the graph, each with the name of the node that is in it, if one is.

    They are drawn from top to bottom. Nodes in a cycle, and those after them, are left out.
    """
    drawing = _Drawing(workflow)
    for name in drawing.lanes_into:
        drawing.add(name, "◎" if workflow.nodes[name].is_output_node else "●")
    return drawing.lines


def in_encoding(line: str) -> str:
    """Return a line of a graph in characters that standard output has."""
    try:
        line.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return line.translate(str.maketrans("●◎│├┤─╮╯╰", "*@|||-.'`"))
    return line


def _in_depth_order(workflow: WorkflowDefinition) -> Iterator[str]:
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
    """The lines so far, and the columns of the lanes that are open below the last one."""

    def __init__(self, workflow: WorkflowDefinition) -> None:
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
        column = self._add_below(lane, name, mark) if lane else self._add_first(name, mark)
        self._branch(name, column)

    def _add_first(self, name: str, mark: str) -> int:
        """Draw a node that depends on none, and return its column."""
        # Not right below another node: it would look as if it depended on that one.
        above = self.lines[-1][0] if self.lines else ""
        column = self._free_column()
        while above[2 * column : 2 * column + 1].strip():
            column = self._free_column(column + 1)

        self._draw({column: mark}, name)
        return column

    def _add_below(self, lane: _Lane, name: str, mark: str) -> int:
        """Draw a node at the lane of its edges, and return its column."""
        lane_column = self._columns[lane]
        self._targets_left[lane] -= 1

        if self._targets_left[lane]:  # the lane continues beside the node
            column = self._free_column(lane_column + 1)
            self._draw({lane_column: "├", column: mark}, name)
            return column

        self._draw({lane_column: mark}, name)
        del self._columns[lane]
        return lane_column

    def _branch(self, name: str, column: int) -> None:
        """Draw the edges that leave a node in a column."""
        leaving = [lane for lane in self._targets_left if name in lane]
        new = [lane for lane in leaving if lane not in self._columns]
        joined = [self._columns[lane] for lane in leaving if lane in self._columns]

        for lane in new[1:]:
            lane_column = self._free_column(column + 1)
            self._draw({column: "├", lane_column: "╮"})
            self._columns[lane] = lane_column

        for index, lane_column in enumerate(joined, 1):
            is_last = not new and index == len(joined)
            if lane_column < column:
                self._draw({lane_column: "├", column: "╯" if is_last else "┤"})
            else:
                self._draw({column: "╰" if is_last else "├", lane_column: "┤"})

        if new:
            self._columns[new[0]] = column

    def _free_column(self, start: int = 0) -> int:
        return next(column for column in count(start) if column not in self._columns.values())

    def _draw(self, marks: Mapping[int, str], name: str | None = None) -> None:
        """Add a line. It connects marks in two columns, behind the lanes between them."""
        first, last = min(marks), max(marks)
        lanes = set(self._columns.values())

        text = ""
        for column in range(max({last, *lanes}) + 1):
            if column in marks:
                text += marks[column]
            elif column in lanes:
                text += "│"
            else:
                text += "─" if first < column < last else " "
            text += "─" if first <= column < last else " "

        self.lines.append((text.rstrip(), name))
