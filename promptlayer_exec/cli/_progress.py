"""The progress of a batch, on standard error."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from promptlayer_exec._integration import printable
from promptlayer_exec.cli._text import duration, err

if TYPE_CHECKING:
    from promptlayer_exec.dbos import BatchStatus

_RATE_WINDOW = 30.0
_LINE_INTERVAL = 9.5  # looked at a few times a second: a line comes at least every ten seconds


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
        with nullcontext() if self._bar.disable else self._bar:
            log.addHandler(self)
            try:
                yield
            finally:
                log.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a warning."""
        text = printable(record.getMessage())
        if self._bar.disable:
            err(text)
        else:
            self._bar.console.print(text, style="yellow", markup=False, highlight=False)

    def show_added(self, added: int, total: int) -> None:
        """Show how many of the items are in the database already."""
        self._show(f"{added}/{total} items added", added, total)

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
