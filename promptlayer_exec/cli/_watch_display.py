"""How a command shows an execution that it watches: as lines, or as a live table."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeAlias

import attrs

from promptlayer_exec import NodeStatus, Snapshot
from promptlayer_exec._integration import printable
from promptlayer_exec.cli._printing import err, out
from promptlayer_exec.cli._sentences import MOST_SKIPPED, node_detail, result_line

if TYPE_CHECKING:
    from promptlayer_exec.cli._live import LiveDisplay


@attrs.define
class LineDisplay:
    """Writes changes to standard output, as text or as JSON, and warnings to standard error."""

    _as_json: bool
    _previous: Snapshot | None = attrs.field(init=False, default=None)

    def waiting(self, _text: str) -> AbstractContextManager[None]:
        return nullcontext()

    def warn(self, text: str) -> None:
        err(text)

    def show(self, snapshot: Snapshot) -> None:
        """Write what changed since the last snapshot and, if it is the last one, the result."""
        is_first = self._previous is None
        changes = snapshot.diff(self._previous)
        self._previous = snapshot

        if self._as_json:
            if is_first or changes or snapshot.complete:
                out(json.dumps(snapshot.to_dict()))
            return

        # Names are aligned. A very long one shifts only its own line.
        longest = max((len(printable(name)) for name in snapshot.nodes), default=0)
        width = min(longest, 24)
        nodes = [change.node for change in changes]
        skipped = [node for node in nodes if node.status == NodeStatus.SKIPPED]
        are_many = len(skipped) > MOST_SKIPPED
        for node in nodes:
            if are_many and node.status == NodeStatus.SKIPPED:
                continue
            columns = f"{printable(node.name):<{width}}  {printable(node.status):<7}"
            out(f"{snapshot.elapsed:7.1f} s  {columns}  {node_detail(node)}".rstrip())

        if are_many:
            out(f"{snapshot.elapsed:7.1f} s  {len(skipped)} other nodes were SKIPPED")
        if snapshot.complete:
            out(result_line(snapshot))


Display: TypeAlias = "LineDisplay | LiveDisplay"


def choose_display(*, as_json: bool) -> Display:
    """Return a live table for a terminal, else lines."""
    if not as_json and sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 - slow to import

        from promptlayer_exec.cli._live import LiveDisplay  # noqa: PLC0415

        if (console := Console()).is_interactive:
            return LiveDisplay(console)
    return LineDisplay(as_json)
