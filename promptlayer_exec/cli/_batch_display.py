"""The progress of a batch, and its summary."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING

import attrs
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from promptlayer_exec.cli._stdio import Writer, err
from promptlayer_exec.cli._text import duration, in_options, printable, shorten

if TYPE_CHECKING:
    from promptlayer_exec.dbos import BatchStatus, Durations, Failure

_RATE_WINDOW = 30.0
_LINE_INTERVAL = 10.0


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
