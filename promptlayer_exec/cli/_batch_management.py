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

from promptlayer_exec._advice import explain, explain_stored
from promptlayer_exec._integration import printable
from promptlayer_exec.cli import _batch_lookup as lookup
from promptlayer_exec.cli import _batch_options as options
from promptlayer_exec.cli._exit import (
    PROGRAM,
    ExitCode,
    Misuse,
    Subject,
    command,
    hint,
    run_command,
    server_option,
)
from promptlayer_exec.cli._options import BaseUrl, Database, JsonLines
from promptlayer_exec.cli._printing import err, out, preview, quoted
from promptlayer_exec.cli._result_file import open_results, write_results

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch, RunAttempt, StoredItem


@command
async def status(
    name: Annotated[str | None, options.name_option("all batches")] = None,
    database: Database = None,
    *,
    as_json: JsonLines = False,
) -> None:
    """Print the progress of the batches in a database."""
    batch_names = await lookup.names(database, needed=name is not None)
    if name is not None:
        batch_names = [lookup.choose(name, batch_names)]

    for batch_name in batch_names:
        _, batch = await lookup.chosen_batch(batch_name, database)
        counts = await batch.status()
        if as_json:
            out(json.dumps({"batch": batch_name, **attrs.asdict(counts)}))
            continue

        out(lookup.status_line(batch_name, counts))
        flags = lookup.command_flags(batch_name, database)
        for line in lookup.hint_lines(counts, flags):
            err(line)


@command
async def list_batches(database: Database = None, *, as_json: JsonLines = False) -> None:
    """List the batches in a database, with their settings.

    Each line shows the counts of the items, when the batch was created (UTC), and its limits.
    """
    batch_names = await lookup.names(database, needed=False)
    if batch_names and database is None and not as_json:
        err(f"in {lookup.shown_database(database)}")

    for batch_name in batch_names:
        _, batch = await lookup.chosen_batch(batch_name, database)
        settings, counts = await batch.settings(), await batch.status()
        if as_json:
            row = {"batch": batch_name, **attrs.asdict(settings), **attrs.asdict(counts)}
            out(json.dumps(row, default=datetime.isoformat))
            continue

        created = "-" if settings.created is None else _time(settings.created)
        rate = f"{settings.rate or lookup.DEFAULT_RATE:g}"
        shown = f"max-in-flight {settings.max_in_flight or 100}, rate {rate}"
        if settings.attempts not in (None, 1):
            shown += f", attempts {settings.attempts}"
        out(f"{lookup.status_line(batch_name, counts)}; {created}, {shown}")


@command
async def show(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key of the item.")],
    name: options.OnlyBatch = None,
    database: Database = None,
    *,
    as_json: JsonLines = False,
) -> None:
    """Print one item, with its request and its history (UTC)."""
    chosen, batch = await lookup.chosen_batch(name, database)
    item = await batch.item(key)
    if item is None:
        raise Misuse(f"batch '{printable(chosen)}' has no item '{printable(key)}'")

    if as_json:
        outcome = item.outcome and json.loads(item.outcome.to_json())
        attempts = [attrs.asdict(attempt) for attempt in item.attempts]
        fields = {"key": key, "request": item.request, "attempts": attempts, "outcome": outcome}
        out(json.dumps(fields, default=datetime.isoformat))
        return
    for line in _item_lines(chosen, item):
        out(line)


def _item_lines(batch: str, item: StoredItem) -> list[str]:
    outcome = item.outcome
    state: str = "stored"
    if outcome is not None:
        state = outcome.kind
    elif item.attempts:
        state = item.attempts[-1].state
    lines = [f"item {printable(item.key)} of batch {printable(batch)}: {state}"]
    for name, value in item.request.items():
        if value is not None:
            shown = value if isinstance(value, str) else preview(value)
            lines.append(f"  {name}: {printable(shown)}")

    lines += [f"  {at}  {event}" for at, event in _events(item)]

    # The outcome comes last, even if the clocks of two machines differ.
    if outcome is not None:
        lines.append(f"  {_time(outcome.finished)}  {outcome.kind}")
        if outcome.error is None:
            lines.append(f"  output: {preview(outcome.output)}")
        else:
            lines.append(f"  {outcome.error.type}: {explain_stored(*attrs.astuple(outcome.error))}")
    return lines


def _events(item: StoredItem) -> list[tuple[str, str]]:
    """Return what happened to an item before its outcome, and when."""
    events = []
    outcome = item.outcome
    for attempt in item.attempts:
        events.append((_time(attempt.added), f"attempt {attempt.number} added"))
        if attempt.taken is not None:
            worker = printable(attempt.worker or "")
            events.append((_time(attempt.taken), f"attempt {attempt.number} taken by {worker}"))

        # The outcome is that of the last attempt.
        is_last = attempt.number == item.attempts[-1].number
        if attempt.finished is not None and not (is_last and outcome is not None):
            events.append((_time(attempt.finished), _ending(attempt)))

    if outcome is not None and outcome.started is not None:
        events.append((_time(outcome.started), f"execution {outcome.execution_id} started"))

    # Events of the same second keep this order.
    return sorted(events, key=itemgetter(0))


def _ending(attempt: RunAttempt) -> str:
    text = f"attempt {attempt.number} finished"
    if attempt.execution_id is not None:
        text += f", execution {attempt.execution_id}"
    if attempt.error is not None:
        text += f": {attempt.error.type}: {explain_stored(*attrs.astuple(attempt.error))}"
    return text


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}Z"


@command
async def export(
    results: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File to write: a table in a .csv file, else JSON Lines.",
            show_default="standard output",
        ),
    ] = None,
    name: options.OnlyBatch = None,
    database: Database = None,
    base_url: BaseUrl = None,
    *,
    same_server: options.SameServer = False,
) -> None:
    """Write the results of all items that have finished so far.

    The fields are those of `batch run --out` (`help items`). In a table, an error has the columns
    error_type and error_message, and an output that is not text is JSON.
    """
    _, batch = await lookup.chosen_batch(name, database, base_url, same_server=same_server)
    await batch.check_server()  # before it creates the file
    with open_results(results) as file:
        await write_results(batch, file, until_done=False)


@command
async def recheck(
    name: options.OnlyBatch = None,
    database: Database = None,
    base_url: BaseUrl = None,
    *,
    same_server: options.SameServer = False,
) -> None:
    """Follow every run without an output again, and start none."""
    chosen, batch = await lookup.chosen_batch(name, database, base_url, same_server=same_server)
    flags = lookup.command_flags(chosen, database) + server_option(base_url)
    _report_requeued(chosen, await batch.recheck(), "follow", flags)


@command
async def retry(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="Only the items with these keys.")
    ] = None,
    name: options.OnlyBatch = None,
    database: Database = None,
    base_url: BaseUrl = None,
    *,
    same_server: options.SameServer = False,
    failed: Annotated[bool, typer.Option("--failed", help="Start failed items again.")] = False,
    unknown: Annotated[
        bool,
        typer.Option(
            "--unknown", help="Start unknown items again. You may pay for some of them twice."
        ),
    ] = False,
) -> None:
    """Start items that did not succeed once more.

    With keys, only those items are started. Keys without an option mean --failed.
    """
    if not (failed or unknown or keys):
        raise Misuse("give --failed, --unknown, both, or the keys of failed items")

    chosen, batch = await lookup.chosen_batch(name, database, base_url, same_server=same_server)
    if keys:
        await _check_keys(chosen, batch, keys, unknown=unknown)
    count = await batch.retry(failed=failed or not unknown, unknown=unknown, keys=keys or None)
    flags = lookup.command_flags(chosen, database) + server_option(base_url)
    _report_requeued(chosen, count, "start", flags)


async def _check_keys(name: str, batch: Batch, keys: list[str], *, unknown: bool) -> None:
    """Refuse keys that no item has, and name the items that need --unknown."""
    kinds = await batch.kinds(keys)
    absent = [key for key in keys if key not in kinds]
    if absent:
        raise Misuse(f"batch '{printable(name)}' has no item {quoted(absent[0])}")

    if not unknown:
        for key, kind in kinds.items():
            if kind == "unknown":
                err(
                    f"item {quoted(key)} is unknown and stays so: its run may have started and be"
                    " billed. To start it again, give --unknown"
                )


def _report_requeued(batch: str, count: int, act: str, flags: str) -> None:
    if not count:
        err(f"batch {printable(batch)}: there is no item to {act} again")
        return
    text = f"batch {printable(batch)}: a worker will {act} {lookup.item_count(count)} again"
    err(hint(f"{text}. Start one with:", f"{PROGRAM} batch work{flags}"))


def delete(
    name: options.OnlyBatch = None,
    database: Database = None,
    *,
    is_confirmed: Annotated[
        bool, typer.Option("--yes", help="Skip the confirmation prompt.")
    ] = False,
) -> None:
    """Delete a batch, with all its items and their results.

    This fails while a worker works on the batch. Runs on PromptLayer are not affected, but their
    ids are gone.
    """

    async def describe() -> None:
        nonlocal name
        name, batch = await lookup.chosen_batch(name, database)
        err(lookup.status_line(name, await batch.status()))
        if not sys.stdin.isatty():
            flags = lookup.command_flags(name, database)
            raise Misuse(
                "deleting a batch needs a terminal to ask on, or --yes",
                hint=hint("delete it with:", f"{PROGRAM} batch delete --yes{flags}"),
            )

    async def delete_chosen() -> None:
        chosen, batch = await lookup.chosen_batch(name, database)
        try:
            deleted = await batch.delete()
        except RuntimeError as error:
            raise Misuse(explain(error)) from error
        err(f"deleted batch {printable(chosen)} with {lookup.item_count(deleted)}")

    if not is_confirmed:
        if code := run_command(describe(), Subject()):
            raise typer.Exit(code)

        # Not within `run_command`, which would wait for the user's reply after Ctrl-C.
        try:
            is_confirmed = typer.confirm("Delete this batch with all its results?", err=True)
        except typer.Abort:
            err("\ninterrupted: nothing was deleted")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        if not is_confirmed:
            err("nothing was deleted")
            raise typer.Exit(ExitCode.FAILED)

    raise typer.Exit(run_command(delete_chosen(), Subject()))
