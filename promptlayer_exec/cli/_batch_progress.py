"""How far a batch is, on a terminal or in lines, and how it ended."""

import sys
import time
from collections import Counter, deque
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ._streams import err
from ._text import duration, printable, shorten

if TYPE_CHECKING:
    from promptlayer_exec.dbos import BatchStatus, StoredOutcome

_WINDOW = 30.0
_EVERY = 10.0


class BatchProgress:
    """Shows on standard error how far a batch is: a bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._history: deque[tuple[float, int]] = deque()
        self._said = time.monotonic()
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
            columns = (BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("starting", total=None)

    def shown(self) -> AbstractContextManager[Any]:
        """Return a context in which the bar is shown."""
        return nullcontext() if self._bar is None else self._bar

    def warn(self, text: str) -> None:
        """Tell of a trouble."""
        if self._bar is None:
            err(text)
        else:
            self._bar.console.print(text, style="yellow", markup=False, highlight=False)

    def show(self, status: "BatchStatus") -> None:
        """Show the present status."""
        now = time.monotonic()
        self._history.append((now, status.finished))
        while now - self._history[0][0] > _WINDOW:
            self._history.popleft()
        text = self._text(status)
        if self._bar is not None:
            done = status.finished
            self._bar.update(self._task, total=status.total, completed=done, description=text)
        elif now - self._said >= _EVERY:
            self._said = now
            err(text)

    def _text(self, status: "BatchStatus") -> str:
        parts = [f"{status.finished}/{status.total} done"]
        parts += [f"{status.failed} failed"] * (status.failed > 0)
        parts += [f"{status.unknown} unknown"] * (status.unknown > 0)
        (first, before), (last, after) = self._history[0], self._history[-1]
        if after > before:
            rate = (after - before) / (last - first)
            parts.append(f"{rate:.1f}/s")
            if left := status.total - status.finished:
                parts.append(f"{duration(left / rate)} left")
        return ", ".join(parts)


class Failures:
    """The errors of a batch by kind, with an example of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def see(self, outcome: "StoredOutcome") -> None:
        """Count an outcome's error, if it has one."""
        if outcome.error is not None:
            self._counts[outcome.error.type] += 1
            example = f"{outcome.key}: {outcome.error.message}"
            self._examples.setdefault(outcome.error.type, shorten(printable(example), 160))

    def lines(self) -> list[str]:
        """Return them as lines, the most frequent first."""
        return [
            f"  {count} {kind}, such as {self._examples[kind]}"
            for kind, count in self._counts.most_common()
        ]


def counted(name: str, status: "BatchStatus") -> str:
    """Return a batch's status as one line."""
    open_parts = [f"{status.waiting} waiting", f"{status.running} running"]
    parts = [f"{status.succeeded} succeeded", f"{status.failed} failed"]
    parts.append(f"{status.unknown} unknown")
    shown = parts if status.finished == status.total else open_parts + parts
    return f"batch {printable(name)}: {items(status.total)}: {', '.join(shown)}"


def items(count: int) -> str:
    """Return a number of items as people write it."""
    return f"{count} item" if count == 1 else f"{count} items"
