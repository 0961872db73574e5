"""How executions are displayed while they are watched, and batches while they run."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import attrs
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from promptlayer_exec import Node, NodeStatus, Snapshot
from promptlayer_exec._integration import status_entry
from promptlayer_exec.cli._text import (
    Writer,
    duration,
    err,
    failure_reason,
    final_count,
    in_options,
    node_detail,
    out,
    printable,
    result_line,
    running_time,
    shorten,
)

if TYPE_CHECKING:
    from promptlayer_exec.dbos import BatchStatus, Durations, Failure

_BAR_WIDTH = 40
_MAX_NAME_WIDTH = 24
_RATE_WINDOW = 30.0
_LINE_INTERVAL = 9.5  # looked at a few times a second: a line comes at least every ten seconds
_OTHER_LINES = 4  # of a live display: its progress, an empty line, the header, and the cursor's


@attrs.define
class LineDisplay:
    """Writes what changes to standard output, as text or as JSON; warnings to standard error."""

    _as_json: bool
    _previous: Snapshot | None = attrs.field(init=False, default=None)

    def waiting(self, _text: str) -> AbstractContextManager[None]:
        """Return a context for the display."""
        return nullcontext()

    def warn(self, text: str) -> None:
        """Write a problem."""
        err(text)

    def show(self, snapshot: Snapshot) -> None:
        """Write what changed since the last snapshot, and how the execution ended."""
        is_first, changes = self._previous is None, snapshot.diff(self._previous)
        self._previous = snapshot
        if self._as_json:
            if is_first or changes or snapshot.complete:
                out(json.dumps(snapshot.to_dict()))
            return
        names = [len(printable(name)) for name in snapshot.nodes]
        width = min(max(names, default=0), _MAX_NAME_WIDTH)
        for node in (change.node for change in changes):
            columns = f"{printable(node.name):<{width}}  {printable(node.status):<7}"
            out(f"{snapshot.elapsed:7.1f} s  {columns}  {node_detail(node)}".rstrip())
        if snapshot.complete:
            out(result_line(snapshot))


class LiveDisplay:
    """A table of all nodes under a progress line, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._snapshot: Snapshot | None = None
        self._shown_at = 0.0
        self._warning = ""
        self._is_over = False
        self._spinner = Spinner("line")
        self._live = Live(console=console)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Draw `text` until the first snapshot; when the context ends, the last one stays."""
        self._spinner.update(text=Text(text))
        # A new one each time: it erases as many lines as its last refresh wrote.
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=8)
        self._live.start()
        try:
            yield
        finally:
            self._warning = ""
            # What does not fit scrolls up, where it can be read.
            self._is_over = self._snapshot is not None and self._snapshot.complete
            self._live.transient = self._snapshot is None
            self._live.stop()
            if self._snapshot is not None and self._is_over:
                self._console.print("", *_summary(self._snapshot), sep="\n", soft_wrap=True)

    def show(self, snapshot: Snapshot) -> None:
        """Replace the snapshot shown before."""
        self._snapshot, self._shown_at = snapshot, time.monotonic()
        self._warning = ""
        self._live.refresh()

    def warn(self, text: str) -> None:
        """Show the problem above the table until the next snapshot."""
        self._warning = text
        self._live.refresh()

    def _render(self) -> RenderableType:
        warning = [Text(self._warning, style="yellow")] if self._warning else []
        snapshot = self._snapshot
        if snapshot is None:
            return Group(self._spinner, *warning)
        now = snapshot.elapsed
        if not snapshot.complete:
            now += time.monotonic() - self._shown_at
        lines = sum(len(self._console.render_lines(text)) for text in warning)
        rows = None if self._is_over else max(1, self._console.height - _OTHER_LINES - lines)
        nodes, rest = _in_sight(snapshot, rows)
        table = node_table(snapshot, nodes, now)
        return Group(_progress_line(snapshot, now), *warning, "", table, *rest)


Display: TypeAlias = LiveDisplay | LineDisplay


def choose_display(*, as_json: bool) -> Display:
    """Return the display that suits standard output."""
    console = Console()
    is_live = not as_json and sys.stdout.isatty() and console.is_interactive
    return LiveDisplay(console) if is_live else LineDisplay(as_json)


def _progress_line(snapshot: Snapshot, now: float) -> Table:
    # Above the table: a terminal with too few lines cuts off the bottom.
    grid = Table.grid("", Column(max_width=_BAR_WIDTH), "", "", padding=(0, 1))
    grid.add_row(
        Text(f"execution {snapshot.execution_id}", style="bold", no_wrap=True),
        ProgressBar(total=1.0, completed=snapshot.progress),
        Text(final_count(snapshot), no_wrap=True),
        Text(duration(now), style="dim", no_wrap=True),
    )
    return grid


def node_table(
    snapshot: Snapshot, nodes: Iterable[Node] | None = None, now: float | None = None
) -> Table:
    """Return a table of nodes, by default of all, without times if `now` is None."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("Node", "Status", *([] if now is None else ["Time"]), "Value"):
        table.add_column(heading, justify="right" if heading == "Time" else "left")
    for node in snapshot.nodes.values() if nodes is None else nodes:
        failed = node.status == NodeStatus.FAILED
        table.add_row(
            _cell(printable(node.name)),
            _cell(printable(node.status), status_entry(node.status).style),
            *([] if now is None else [_cell(running_time(snapshot.times[node.name], now))]),
            _cell(node_detail(node), "red" if failed else ""),
        )
    return table


def _in_sight(snapshot: Snapshot, rows: int | None) -> tuple[list[Node], list[Text]]:
    """Return the nodes of most interest, in the server's order, and a line that counts the rest."""
    nodes = list(snapshot.nodes.values())
    if rows is None or len(nodes) <= rows:
        return nodes, []
    chosen = sorted(nodes, key=partial(_interest, snapshot))[: rows - 1]
    names = {node.name for node in chosen}
    rest = Counter(str(node.status) for node in nodes if node.name not in names)
    counts = ", ".join(f"{count} {printable(status)}" for status, count in rest.most_common())
    line = Text(f"… {rest.total()} more: {counts}", style="dim", no_wrap=True, overflow="ellipsis")
    return [node for node in nodes if node.name in names], [line]


def _interest(snapshot: Snapshot, node: Node) -> tuple[int, float]:
    """Return a key that sorts by the ranks of statuses, and the latest ones first in each."""
    return status_entry(node.status).rank, -(snapshot.times[node.name].final or 0.0)


def _cell(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True)  # a column cuts it off with an ellipsis


def _summary(snapshot: Snapshot) -> list[Text]:
    lines = []
    for node in snapshot.failed_nodes:
        line = Text.assemble((printable(node.name), "bold red"), ": ")
        lines.append(line.append(printable(failure_reason(node), keep="\n\t")))
    result = Text(result_line(snapshot))
    style = "bold green" if snapshot.succeeded else "bold red"
    result.stylize(style, end=result.plain.index(" after "))
    return [*lines, result]


class BatchProgress(logging.Handler):
    """Shows the progress on standard error: a bar on a terminal, otherwise a line at times.

    It also shows warnings of the log. An outage is one warning, however many requests fail in it.
    """

    def __init__(self, *, transient: bool = False) -> None:
        super().__init__(logging.WARNING)
        self._history: deque[tuple[float, int]] = deque()
        self._printed_at = time.monotonic()
        console = Console(stderr=True)
        columns = (BarColumn(), TextColumn("{task.description}"))
        disable = not (sys.stderr.isatty() and console.is_interactive)
        self._bar = Progress(*columns, console=console, disable=disable, transient=transient)
        self._task = self._bar.add_task("starting", total=None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar, and the warnings of the log, in this context."""
        log = logging.getLogger("promptlayer_exec")
        with nullcontext() if self._bar.disable else self._bar, closing(Writer("stderr")) as writer:
            self._writer = writer
            log.addHandler(self)
            try:
                yield
            finally:
                log.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a warning, without waiting for it."""
        self._writer.start(self._warn, printable(record.getMessage()))

    def _warn(self, text: str) -> None:
        if self._bar.disable:
            err(text)
        else:
            self._bar.console.print(text, style="yellow", markup=False, highlight=False)

    def show_added(self, added: int, total: int) -> None:
        """Show how many of the items are in the database already."""
        self._show(f"{added}/{total} items added", added, total)

    async def follow(self, status: BatchStatus) -> None:
        """Show the current status in a thread, while the work goes on."""
        await self._writer.call(self.show, status)

    def show(self, status: BatchStatus) -> None:
        """Show the current status."""
        now = time.monotonic()
        self._history.append((now, status.finished))
        while now - self._history[0][0] > _RATE_WINDOW:
            self._history.popleft()
        self._show(self._text(status), status.finished, status.total)

    def _show(self, text: str, done: int, total: int) -> None:
        self._bar.update(self._task, total=total, completed=done, description=text)
        now = time.monotonic()
        if self._bar.disable and now - self._printed_at >= _LINE_INTERVAL:
            self._printed_at = now
            err(text)

    def _text(self, status: BatchStatus) -> str:
        parts = [f"{status.finished}/{status.total} done", f"{status.running} running"]
        parts += [f"{status.failed} failed"] * (status.failed > 0)
        parts += [f"{status.unknown} unknown"] * (status.unknown > 0)
        (first, before), (last, after) = self._history[0], self._history[-1]
        if after > before:
            rate = (after - before) / (last - first)
            parts.append(f"{rate:.1f}/s")
            if remaining := status.total - status.finished:
                parts.append(f"{duration(remaining / rate)} left")
        return ", ".join(parts)


def failure_lines(failures: Iterable[Failure]) -> list[str]:
    """Return a line with an example for each type of error."""
    lines = []
    for failure in failures:
        example = shorten(printable(f"{failure.key}: {in_options(failure.message)}"), 160)
        lines.append(f"  {failure.count} {failure.type}, for example {example}")
    return lines


def duration_lines(durations: Durations | None) -> list[str]:
    """Return a line about how long the runs took; none if there were none."""
    if durations is None:
        return []
    median, p95, longest = map(duration, attrs.astuple(durations))
    return [f"  a run took {median} (median); 95 % took at most {p95}, the longest {longest}"]


def hint_lines(status: BatchStatus, options: str, *, has_open_ends: bool = True) -> list[str]:
    """Return a line for each kind of items without an output: the commands that go on with them.

    These have the `options`. `has_open_ends` if it may be unknown how the run of a failed item
    ended.
    """
    lines = []
    if status.finished < status.total and not status.workers:
        lines.append(
            f"nobody works on the items that wait or are running: `batch work{options}`, or the"
            " same `batch run` again, goes on"
        )
    if status.failed:
        line = f"failed: `batch retry --failed{options}` starts those again whose run failed or did"
        line += " not start"
        if has_open_ends:
            line += f"; `batch recheck{options}` asks again how runs ended, and starts nothing"
        lines.append(line)
    if status.unknown:
        lines.append(
            "unknown: these runs may have started and be billed: look in PromptLayer, then start"
            f" them again with `batch retry --unknown{options}`, or leave them"
        )
    return lines


def status_line(name: str, status: BatchStatus) -> str:
    """Return the status of a batch as one line."""
    open_parts = [f"{status.waiting} waiting", f"{status.running} running"]
    parts = [f"{status.succeeded} succeeded", f"{status.failed} failed"]
    parts.append(f"{status.unknown} unknown")
    shown = parts if status.finished == status.total else open_parts + parts
    return f"batch {printable(name)}: {item_count(status.total)}: {', '.join(shown)}"


def item_count(count: int) -> str:
    """Return `1 item`, `2 items` and so on."""
    return f"{count} item" if count == 1 else f"{count} items"
