"""How executions are displayed while they are watched, and the lines about batches."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeAlias

import attrs

from promptlayer_exec import Snapshot
from promptlayer_exec._integration import printable
from promptlayer_exec.cli._exit import describe_stored
from promptlayer_exec.cli._text import duration, err, node_detail, out, result_line, shorten

if TYPE_CHECKING:
    from promptlayer_exec.cli._live import LiveDisplay
    from promptlayer_exec.dbos import BatchStatus, Durations, Failure

_MAX_NAME_WIDTH = 24


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


Display: TypeAlias = "LineDisplay | LiveDisplay"


def choose_display(*, as_json: bool) -> Display:
    """Return the display that suits standard output."""
    if not as_json and sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 - slow to import

        from promptlayer_exec.cli._live import LiveDisplay  # noqa: PLC0415

        if (console := Console()).is_interactive:
            return LiveDisplay(console)
    return LineDisplay(as_json)


def failure_lines(failures: Iterable[Failure]) -> list[str]:
    """Return a line with an example for each type of error."""
    lines = []
    for failure in failures:
        reason = describe_stored(failure.type, failure.message)
        example = shorten(f"{printable(failure.key)}: {reason}", 160)
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
