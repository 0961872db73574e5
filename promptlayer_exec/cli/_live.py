"""The table that changes on a terminal while an execution is watched."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from promptlayer_exec import Node, NodeStatus, Snapshot

from ._text import about, counted, duration, error_of, final_of, printable, running_time, verdict

_STYLES = {
    NodeStatus.QUEUED: "dim",
    NodeStatus.RUNNING: "yellow",
    NodeStatus.SUCCESS: "green",
    NodeStatus.FAILED: "bold red",
    NodeStatus.SKIPPED: "dim",
}
_BAR_WIDTH = 40


class LiveView:
    """One table of all nodes, kept up to date, under a line that tells how far it is.

    Args:
        console: the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._snapshot: Snapshot | None = None
        self._seen_at = 0.0
        self._trouble = ""
        self._spinner = Spinner("line")
        self._live = Live(console=console)

    @contextmanager
    def awaiting(self, what: str) -> Iterator[None]:
        """Take the screen's next lines; in the end, leave there what was seen, if anything was."""
        self._spinner.update(text=Text(what))
        # A new one each time: it erases as many lines as it wrote when it was last refreshed.
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=8)
        self._live.start()
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        self._trouble = ""
        self._live.transient = self._snapshot is None
        self._live.stop()
        if self._snapshot is not None and self._snapshot.complete:
            self._console.print("", *_ending(self._snapshot), sep="\n", soft_wrap=True)

    def show(self, snapshot: Snapshot) -> None:
        """Show the snapshot in place of the one before."""
        self._snapshot, self._seen_at = snapshot, time.monotonic()
        self._trouble = ""
        self._live.refresh()

    def warn(self, text: str) -> None:
        """Show the trouble above the table until an answer comes."""
        self._trouble = text
        self._live.refresh()

    def _render(self) -> RenderableType:
        trouble = [Text(self._trouble, style="yellow")] if self._trouble else []
        snapshot = self._snapshot
        if snapshot is None:
            return Group(self._spinner, *trouble)
        now = snapshot.elapsed
        if not snapshot.complete:
            now += time.monotonic() - self._seen_at
        return Group(_progress(snapshot, now), *trouble, "", node_table(snapshot, now))


def _progress(snapshot: Snapshot, now: float) -> Table:
    # Above the table: the lower end is what a terminal with too few lines does not show.
    grid = Table.grid(padding=(0, 1))
    for max_width in (None, _BAR_WIDTH, None, None):
        grid.add_column(max_width=max_width)
    grid.add_row(
        Text(f"execution {snapshot.execution_id}", style="bold", no_wrap=True),
        ProgressBar(total=1.0, completed=snapshot.progress),
        Text(final_of(snapshot), no_wrap=True),
        Text(duration(now), style="dim", no_wrap=True),
    )
    return grid


def node_table(snapshot: Snapshot, now: float | None = None) -> Table:
    """Return a table of all nodes, in the server's order.

    Args:
        snapshot: what one poll saw.
        now: the present, in seconds into the watch; None leaves the times out.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("Node", "Status", *([] if now is None else ["Time"]), "Value"):
        table.add_column(heading, justify="right" if heading == "Time" else "left")
    for node in snapshot.nodes.values():
        times = []
        if now is not None:
            times.append(Text(running_time(snapshot.times[node.name], now), no_wrap=True))
        table.add_row(
            _cell(printable(node.name)),
            _cell(printable(node.status), _style(node)),
            *times,
            _cell(about(node), "red" if node.status == NodeStatus.FAILED else ""),
        )
    return table


def _style(node: Node) -> str:
    return _STYLES[node.status] if isinstance(node.status, NodeStatus) else "magenta"


def _cell(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _ending(snapshot: Snapshot) -> list[Text]:
    lines = []
    for node in snapshot.failed_nodes:
        line = Text.assemble((printable(node.name), "bold red"), ": ")
        lines.append(line.append(printable(error_of(node), keep="\n\t")))
    style = "bold green" if snapshot.succeeded else "bold red"
    result = Text(f"execution {snapshot.execution_id} {verdict(snapshot)}", style=style)
    lines.append(result.append(f" after {duration(snapshot.elapsed)}", style="not bold default"))
    lines[-1].append(f": {counted(snapshot)}", style="not bold default")
    return lines
