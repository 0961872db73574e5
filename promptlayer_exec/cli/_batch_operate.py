"""The `batch` commands that show batches, and change them without running items."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from promptlayer_exec._integration import printable
from promptlayer_exec.cli import _batches as batches
from promptlayer_exec.cli._arguments import BaseUrl, JsonLines
from promptlayer_exec.cli._batch_results import open_results, write_results
from promptlayer_exec.cli._exit import (
    ExitCode,
    Misuse,
    Subject,
    command,
    describe_stored,
    run_command,
)
from promptlayer_exec.cli._text import err, out, preview

if TYPE_CHECKING:
    from promptlayer_exec.dbos import StoredItem


@command
async def status(
    name: Annotated[str | None, batches.name_option("all batches")] = None,
    database: batches.Database = None,
    *,
    as_json: JsonLines = False,
) -> None:
    """Print the progress of the batches in a database."""
    found = await batches.names(database, needed=name is not None)
    for each in found if name is None else [batches.choose(name, found)]:
        _, batch = await batches.chosen_batch(each, database)
        counts = await batch.status()
        if as_json:
            out(json.dumps({"batch": each, **attrs.asdict(counts)}))
            continue
        out(batches.status_line(each, counts))
        options = await batches.command_options(name, each, database)
        for line in batches.hint_lines(counts, options):
            err(line)


@command
async def list_batches(database: batches.Database = None, *, as_json: JsonLines = False) -> None:
    """List the batches in a database, with their settings.

    After the counts of its items, a line has the time when the first was added (UTC), and the
    settings: how many items run at most, and how many requests are sent per second at most.
    """
    found = await batches.names(database, needed=False)
    if found and database is None and not as_json:
        err(f"in {batches.shown_database(database)}")
    for each in found:
        _, batch = await batches.chosen_batch(each, database)
        settings, counts = await batch.settings(), await batch.status()
        if as_json:
            row = {"batch": each, **attrs.asdict(settings), **attrs.asdict(counts)}
            out(json.dumps(row, default=datetime.isoformat))
            continue
        created = "-" if settings.created is None else _time(settings.created)
        rate = f"{settings.rate or batches.DEFAULT_RATE:g}"
        shown = f"max-in-flight {settings.max_in_flight or 100}, rate {rate}"
        out(f"{batches.status_line(each, counts)}; {created}, {shown}")


@command
async def show(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key of the item.")],
    name: batches.OnlyBatch = None,
    database: batches.Database = None,
    *,
    as_json: JsonLines = False,
) -> None:
    """Print one item: its request, and its history (UTC)."""
    chosen, batch = await batches.chosen_batch(name, database)
    item = await batch.item(key)
    if item is None:
        raise Misuse(f"batch '{printable(chosen)}' has no item '{printable(key)}'")
    if as_json:
        outcome = item.outcome and json.loads(item.outcome.to_json())
        attempts = [attrs.asdict(attempt) for attempt in item.attempts]
        fields = {"key": key, "request": item.request, "attempts": attempts, "outcome": outcome}
        out(json.dumps(fields, default=datetime.isoformat))
    else:
        for line in _item_lines(chosen, item):
            out(line)


def _item_lines(batch: str, item: StoredItem) -> list[str]:
    outcome = item.outcome
    state = outcome.kind if outcome else item.attempts[-1].state if item.attempts else "stored"
    lines = [f"item {printable(item.key)} of batch {printable(batch)}: {state}"]
    for name, value in item.request.items():
        if value is not None:
            shown = value if isinstance(value, str) else preview(value)
            lines.append(f"  {name}: {printable(shown)}")
    events = []
    for attempt in item.attempts:
        events.append((_time(attempt.added), f"attempt {attempt.number} added"))
        if attempt.taken is not None:
            worker = printable(attempt.worker or "")
            events.append((_time(attempt.taken), f"attempt {attempt.number} taken by {worker}"))
    if outcome is not None and outcome.started is not None:
        events.append((_time(outcome.started), f"execution {outcome.execution_id} started"))
    events.sort(key=itemgetter(0))  # within a second, which is what DBOS stores, as they are
    lines += [f"  {at}  {what}" for at, what in events]
    if outcome is not None:  # after all else, also if the clocks of machines differ
        lines.append(f"  {_time(outcome.finished)}  {outcome.kind}")
        result = f"output: {preview(outcome.output)}"
        if outcome.error is not None:
            result = f"{outcome.error.type}: {describe_stored(*outcome.error)}"
        lines.append(f"  {result}")
    return lines


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}Z"


@command
async def export(
    results: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File to write: a table if it ends with .csv, else JSON Lines.",
            show_default="JSON Lines on standard output",
        ),
    ] = None,
    name: batches.OnlyBatch = None,
    database: batches.Database = None,
    base_url: BaseUrl = None,
    *,
    same_server: batches.SameServer = False,
) -> None:
    """Write the results of all items that have finished so far.

    The fields are those of `batch run --out`. In a table, the error has the columns error_type and
    error_message, and an output that is no text is written as JSON.
    """
    _, batch = await batches.chosen_batch(name, database, base_url, same_server=same_server)
    await batch.check_server()  # before the file is made
    with open_results(results) as file:
        await write_results(batch, file, until_done=False)


@command
async def recheck(
    name: batches.OnlyBatch = None,
    database: batches.Database = None,
    base_url: BaseUrl = None,
    *,
    same_server: batches.SameServer = False,
) -> None:
    """Follow every run again that has no output, and start none."""
    chosen, batch = await batches.chosen_batch(name, database, base_url, same_server=same_server)
    _report_again(chosen, await batch.recheck(), "followed")


@command
async def retry(
    name: batches.OnlyBatch = None,
    database: batches.Database = None,
    base_url: BaseUrl = None,
    *,
    same_server: batches.SameServer = False,
    failed: Annotated[bool, typer.Option("--failed", help="Items that failed.")] = False,
    unknown: Annotated[
        bool, typer.Option("--unknown", help="Unknown items, at the risk of paying for them twice.")
    ] = False,
) -> None:
    """Start items again that did not succeed, once each."""
    if not failed and not unknown:
        raise Misuse("give --failed, --unknown, or both")
    chosen, batch = await batches.chosen_batch(name, database, base_url, same_server=same_server)
    _report_again(chosen, await batch.retry(failed=failed, unknown=unknown), "started")


def _report_again(batch: str, count: int, what: str) -> None:
    text = f"batch {printable(batch)}: {batches.item_count(count)} will be {what} again"
    err(f"{text} by a worker: `batch work`, or the same `batch run`" if count else text)


def delete(
    name: batches.OnlyBatch = None,
    database: batches.Database = None,
    *,
    is_confirmed: Annotated[
        bool, typer.Option("--yes", help="Do not ask whether to do so.")
    ] = False,
) -> None:
    """Delete a batch with all its items and their results.

    It is refused while a worker works on the batch. What runs at PromptLayer is not affected, and
    can no longer be found from here.
    """

    async def look() -> None:
        nonlocal name
        name, batch = await batches.chosen_batch(name, database)
        err(batches.status_line(name, await batch.status()))
        if not sys.stdin.isatty():
            raise Misuse("to delete this batch with all its results, give --yes")

    async def work() -> None:
        chosen, batch = await batches.chosen_batch(name, database)
        try:
            deleted = await batch.delete()
        except RuntimeError as error:
            raise Misuse(str(error)) from error
        err(f"deleted batch {printable(chosen)} with {batches.item_count(deleted)}")

    if not is_confirmed:
        if code := run_command(look(), Subject()):
            raise typer.Exit(code)
        try:  # not within `run_command`, whose handling of SIGINT waits for the answer
            is_confirmed = typer.confirm("Delete this batch with all its results?", err=True)
        except typer.Abort:
            err("\ninterrupted; nothing was deleted")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        if not is_confirmed:
            err("nothing was deleted")
            raise typer.Exit(ExitCode.FAILED)
    raise typer.Exit(run_command(work(), Subject()))
