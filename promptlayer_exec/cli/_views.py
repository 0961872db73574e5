"""How an execution is shown while it is watched."""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from rich.console import Console

from promptlayer_exec import Snapshot

from ._live import LiveView
from ._streams import err, out
from ._text import about, counted, duration, printable, verdict, width_of


class View(Protocol):
    """Shows one execution."""

    def awaiting(self, what: str) -> AbstractContextManager[None]:
        """Return a context in which to show, and to tell what is awaited until then."""

    def show(self, snapshot: Snapshot) -> None:
        """Show what one poll saw."""

    def warn(self, text: str) -> None:
        """Show that something goes wrong for the moment."""


def choose_view(*, as_json: bool) -> View:
    """Return the view that fits standard output."""
    if as_json:
        return JsonView()
    console = Console()
    if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console)
    return PlainView()


class _LinesView:
    """Writes lines that stay as they are, and troubles to standard error."""

    def __init__(self) -> None:
        self._previous: Snapshot | None = None

    def awaiting(self, what: str) -> AbstractContextManager[None]:  # noqa: ARG002 - the protocol's
        return nullcontext()

    def warn(self, text: str) -> None:
        err(text)


class PlainView(_LinesView):
    """One line for each change of a node, and one for the end."""

    def show(self, snapshot: Snapshot) -> None:
        """Write what changed."""
        width = width_of(map(printable, snapshot.nodes), 24)
        for change in snapshot.diff(self._previous):
            node = change.node
            columns = f"{printable(node.name):<{width}}  {printable(node.status):<7}"
            out(f"{snapshot.elapsed:7.1f} s  {columns}  {about(node)}".rstrip())
        self._previous = snapshot
        if snapshot.complete:
            out(
                f"execution {snapshot.execution_id} {verdict(snapshot)}"
                f" after {duration(snapshot.elapsed)}: {counted(snapshot)}"
            )


class JsonView(_LinesView):
    """One JSON object for each snapshot that brought news."""

    def show(self, snapshot: Snapshot) -> None:
        """Write the snapshot, if anything changed."""
        previous, self._previous = self._previous, snapshot
        if previous is None or snapshot.complete or snapshot.diff(previous):
            out(snapshot_json(snapshot))


def snapshot_json(snapshot: Snapshot) -> str:
    """Return a snapshot as one line of ASCII JSON."""
    return json.dumps(snapshot.to_dict())
