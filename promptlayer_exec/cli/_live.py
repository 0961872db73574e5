"""What a terminal shows live: the table of an execution, and the bar of a batch."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from promptlayer_exec import Node, NodeStatus, Snapshot
from promptlayer_exec._integration import (
    STALLED_AFTER,
    duration,
    printable,
    status_entry,
    time_left,
)
from promptlayer_exec.cli._printing import err, running_time, show_warnings
from promptlayer_exec.cli._sentences import (
    MOST_SKIPPED,
    final_count,
    node_detail,
    result_line,
    skipped_count,
    was_seen_running,
)

if TYPE_CHECKING:
    from promptlayer_exec.dbos import BatchStatus


class LiveDisplay:
    """A table of all nodes under a progress line, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._snapshot: Snapshot | None = None
        self._shown_at = 0.0
        self._warning = ""
        self._live = Live(console=console)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Draw `text` until the first snapshot. The last one stays when the context exits."""
        self._spinner = Spinner("line", Text(text))

        # A new one each time: it erases as many lines as its last refresh wrote.
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=8)
        self._live.start()
        try:
            yield
        finally:
            self._warning = ""
            self._live.transient = self._snapshot is None
            self._live.stop()
            if self._snapshot is not None and self._snapshot.complete:
                self._console.print("", _result(self._snapshot), sep="\n")

    def show(self, snapshot: Snapshot) -> None:
        self._snapshot, self._shown_at = snapshot, time.monotonic()
        self._warning = ""
        self._live.refresh()

    def warn(self, text: str) -> None:
        """Show the problem above the table until the next snapshot."""
        self._warning = text
        self._live.refresh()

    def _render(self) -> RenderableType:
        warning = []
        if self._warning:
            warning.append(Text(self._warning, style="yellow"))
        snapshot = self._snapshot
        if snapshot is None:
            return Group(self._spinner, *warning)

        if snapshot.complete:  # what does not fit scrolls up, and can still be read
            now = snapshot.elapsed
            rows = len(snapshot.nodes)
            if (skipped := skipped_count(snapshot)) > MOST_SKIPPED:
                rows -= skipped - 1  # one line counts them
        else:
            now = snapshot.elapsed + time.monotonic() - self._shown_at
            # The other lines: the progress, an empty line, the header, and the cursor's line.
            lines = 4 + sum(len(self._console.render_lines(text)) for text in warning)
            rows = max(1, self._console.height - lines)

        nodes, rest = _in_sight(snapshot, rows)
        table = node_table(snapshot, nodes, now)
        return Group(_progress_line(snapshot, now), *warning, "", table, *rest)


def _progress_line(snapshot: Snapshot, now: float) -> Table:
    # Above the table: a terminal with too few lines cuts off the bottom.
    grid = Table.grid("", Column(max_width=40), "", "", padding=(0, 1))
    is_unknown = snapshot.complete and not was_seen_running(snapshot)
    time_text = "" if is_unknown else duration(now)
    failed = bool(snapshot.failed_nodes) if not snapshot.complete else not snapshot.succeeded
    grid.add_row(
        Text(f"execution {snapshot.execution_id}", style="bold", no_wrap=True),
        ProgressBar(
            total=1.0,
            completed=snapshot.progress,
            complete_style="red" if failed else "yellow",
            finished_style="red" if failed else "green",
        ),
        Text(final_count(snapshot), no_wrap=True),
        Text(time_text, style="dim", no_wrap=True),
    )
    return grid


def node_table(
    snapshot: Snapshot, nodes: Iterable[Node] | None = None, now: float | None = None
) -> Table:
    """Return a table of nodes, by default of all, without times if `now` is None."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("Node")
    table.add_column("Status")
    if now is not None:
        table.add_column("Time", justify="right")
    table.add_column("Value")

    for node in snapshot.nodes.values() if nodes is None else nodes:
        cells = [
            _cell(printable(node.name)),
            _cell(printable(node.status), status_entry(node.status).style),
        ]
        if now is not None:
            cells.append(_cell(running_time(snapshot.times[node.name], now)))
        failed = node.status == NodeStatus.FAILED
        cells.append(_cell(node_detail(node), "red" if failed else ""))
        table.add_row(*cells)

    return table


def _in_sight(snapshot: Snapshot, rows: int) -> tuple[list[Node], list[Text]]:
    """Return the most interesting nodes, in the server's order, and a line that counts the rest."""
    nodes = list(snapshot.nodes.values())
    if len(nodes) <= rows:
        return nodes, []

    def interest(node: Node) -> tuple[int, float]:
        # Among nodes with the same status, the latest to finish come first.
        return status_entry(node.status).rank, -(snapshot.times[node.name].final or 0.0)

    names = {node.name for node in sorted(nodes, key=interest)[: rows - 1]}

    rest = Counter(str(node.status) for node in nodes if node.name not in names)
    counts = ", ".join(f"{count} {printable(status)}" for status, count in rest.most_common())
    line = Text(f"… {rest.total()} more: {counts}", style="dim", no_wrap=True, overflow="ellipsis")
    return [node for node in nodes if node.name in names], [line]


def _cell(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True)  # a narrow column cuts it with an ellipsis


def _result(snapshot: Snapshot) -> Text:
    result = Text(result_line(snapshot))
    style = "bold green" if snapshot.succeeded else "bold red"
    result.stylize(style, end=result.plain.index(": "))
    return result


class BatchProgress:
    """Shows the progress on standard error: a bar on a terminal, else a line every ten seconds.

    It also shows the log's warnings. An outage is one warning, however many requests fail, and one
    line when it is over.
    """

    def __init__(self, *, transient: bool = False) -> None:
        console = Console(stderr=True)
        self._column = BarColumn(complete_style="yellow", finished_style="green")
        self._bar = Progress(
            self._column,
            TextColumn("{task.description}"),
            console=console,
            get_time=time.monotonic,
            disable=not (sys.stderr.isatty() and console.is_interactive),
            transient=transient,
        )
        self._bar.add_task("starting", total=None)
        self._printed_at = time.monotonic()
        self._finished = 0
        self._finished_at = time.monotonic()
        self._unknown = 0
        self._is_losing = False  # the latest items became unknown, as while start requests fail

    @property
    def is_stalled(self) -> bool:
        """True if no item has finished for a minute."""
        return time.monotonic() - self._finished_at >= STALLED_AFTER

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar in this context, and warnings from now on."""
        show_warnings(self.warn, outages=True)
        if self._bar.disable:
            yield
            return
        with self._bar:
            yield

    def warn(self, text: str) -> None:
        """Print a text above the bar."""
        if self._bar.disable:
            err(text)
        else:
            self._bar.console.print(text, style="yellow", markup=False, highlight=False)

    def show_added(self, added: int, total: int) -> None:
        self._show(f"{added}/{total} items added", added, total)

    def show(self, status: BatchStatus) -> None:
        self._bar.update(self._bar.task_ids[0], total=status.total, completed=status.finished)
        if status.finished != self._finished:
            self._finished, self._finished_at = status.finished, time.monotonic()
            self._is_losing = status.unknown > self._unknown
            self._unknown = status.unknown

        parts = [f"{status.finished}/{status.total} done", f"{status.running} running"]
        if status.failed or status.unknown:
            self._column.complete_style = self._column.finished_style = "red"
        if status.failed:
            parts.append(f"{status.failed} failed")
        if status.unknown:
            parts.append(f"{status.unknown} unknown")
        idle = time.monotonic() - self._finished_at
        speed = self._bar.tasks[0].speed
        remaining = status.total - status.finished
        left = time_left(remaining, speed, idle=idle)
        if idle >= STALLED_AFTER:
            parts.append(f"none finished for {duration(idle)}")
        elif self._is_losing and remaining:
            pass  # a speed would promise that the others end soon
        elif speed and not remaining:
            parts.append(f"{speed:.1f}/s")
        elif left is not None:
            parts += [f"{speed:.1f}/s", f"{duration(left)} left"]

        self._show(", ".join(parts), status.finished, status.total)

    def _show(self, text: str, done: int, total: int) -> None:
        self._bar.update(self._bar.task_ids[0], total=total, completed=done, description=text)

        # Callers come a few times a second, so there is a line at least every ten seconds.
        now = time.monotonic()
        if self._bar.disable and now - self._printed_at >= 9.5:
            self._printed_at = now
            err(text)
