"""The `batch` commands that show batches, and change them without running items."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import attrs
import typer

from promptlayer_exec._advice import explain, explain_stored
from promptlayer_exec._integration import KEY_METADATA, printable
from promptlayer_exec._ways_out import PROGRAM, command_about, out_of_item, way_state
from promptlayer_exec.cli import _batch_lookup as lookup
from promptlayer_exec.cli import _batch_options as options
from promptlayer_exec.cli._exit import Misuse, Subject, command, hint, run_command, way_hints
from promptlayer_exec.cli._options import BaseUrl, Database, JsonLines, seconds
from promptlayer_exec.cli._printing import err, out, out_lines, out_record, preview, utc_time
from promptlayer_exec.cli._result_file import open_results, write_results

if TYPE_CHECKING:
    from promptlayer_exec.dbos import BatchItem, RunAttempt, StoredItem


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

        out_lines(lookup.status_line(batch_name, counts))
        failures = await batch.failures()
        for line in lookup.cause_lines(failures):
            err(line)
        flags = await lookup.working_flags(batch, batch_name, database)
        for line in lookup.hint_lines(counts, failures, flags):
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

        created = "-" if settings.created is None else utc_time(settings.created)
        rate = f"{settings.rate or lookup.DEFAULT_RATE:g}"
        shown = f"max-in-flight {settings.max_in_flight or 100}, rate {rate}"
        if settings.attempts not in (None, 1):
            shown += f", attempts {settings.attempts}"
        out_lines(f"{lookup.status_line(batch_name, counts)}; {created}, {shown}")


@command
async def items(
    name: options.OnlyBatch = None,
    database: Database = None,
    *,
    state: Annotated[
        str | None,
        typer.Option(
            metavar="STATE",
            help="Only items that are waiting, sending, following, unknown, failed or succeeded.",
        ),
    ] = None,
    older_than: Annotated[
        float, seconds("Only items whose state has not changed for this long, such as 1h.")
    ] = 0.0,
    as_json: JsonLines = False,
) -> None:
    """List the items of a batch, each with the command to run next.

    A line shows the state of an item, since when (UTC), its run, and why it has no output. An item
    is `sending` while the response may still come, and `unknown` if it was lost.
    """
    chosen, batch = await lookup.chosen_batch(name, database)
    flags = await lookup.working_flags(batch, chosen, database)
    reading_flags = lookup.command_flags(chosen, database)
    listed = batch.items(state=cast("Any", state), older_than=older_than)

    count, unknown = 0, 0
    try:
        async with aclosing(listed):
            async for item in listed:
                count += 1
                unknown += item.state == "unknown"
                way_out = out_of_item(item.state, item.key, flags, reading_flags)[0].command
                if as_json:
                    out(_json_line(item, way_out))
                else:
                    out_record(_line(item), way_out)
    except ValueError as error:  # of the state
        raise Misuse(str(error)) from error

    if not count:
        err(f"batch {printable(chosen)}: there is no such item")
    if unknown and not as_json:
        err(
            hint(
                f"{lookup.item_count(unknown)} unknown: each may have started a run, and you may be"
                f" billed. In PromptLayer, search for the metadata {KEY_METADATA} = KEY. If the run"
                " is there, adopt it with the command of its item. If it is not, start the item"
                " again with:",
                command_about("batch retry --unknown", flags, "KEY"),
            )
        )


def _line(item: BatchItem) -> str:
    text = f"{item.state} since {utc_time(item.since)}"
    if item.execution_id is not None:
        text += f", execution {item.execution_id}"
    if item.why is not None:
        text += f": {printable(item.why)}"
    return f"{printable(item.key)}  {text}"


def _json_line(item: BatchItem, way_out: str) -> str:
    fields = attrs.asdict(item) | {"command": way_out}
    return json.dumps(fields, default=datetime.isoformat)


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
        fields = {"key": key, "state": item.state, "since": item.since, "request": item.request}
        fields |= {"attempts": attempts, "outcome": outcome}
        out(json.dumps(fields, default=datetime.isoformat))
        return
    for line in _item_lines(chosen, item):
        out_lines(line, hanging="    ")
    if item.state != "succeeded":
        flags = await lookup.working_flags(batch, chosen, database)
        if item.state == "unknown":
            err(f"to find its run, search PromptLayer for {KEY_METADATA} = {printable(key)}")
        for line in way_hints(out_of_item(way_state(item), key, flags)):
            err(line)


def _item_lines(batch: str, item: StoredItem) -> list[str]:
    outcome = item.outcome
    state = f"{item.state} since {utc_time(item.since)}"
    lines = [f"item {printable(item.key)} of batch {printable(batch)}: {state}"]
    for name, value in item.request.items():
        if value is not None:
            shown = value if isinstance(value, str) else preview(value)
            lines.append(f"  {name}: {printable(shown)}")

    lines += [f"  {at}  {event}" for at, event in _events(item)]
    if outcome is None and item.attempts and item.attempts[-1].execution_id is not None:
        lines.append(f"  execution {item.attempts[-1].execution_id} is followed")

    # The outcome comes last, even if the clocks of two machines differ.
    if outcome is not None:
        lines.append(f"  {utc_time(outcome.finished)}  {outcome.kind}")
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
        events.append((utc_time(attempt.added), f"attempt {attempt.number} added"))
        if attempt.taken is not None:
            worker = printable(attempt.worker or "")
            events.append((utc_time(attempt.taken), f"attempt {attempt.number} taken by {worker}"))

        # The outcome is that of the last attempt.
        is_last = attempt.number == item.attempts[-1].number
        if attempt.finished is not None and not (is_last and outcome is not None):
            events.append((utc_time(attempt.finished), _ending(attempt)))

    for execution_id, started in dict.fromkeys(_runs(item)):
        events.append((utc_time(started), f"execution {execution_id} started"))

    # Events of the same second keep this order.
    return sorted(events, key=itemgetter(0))


def _runs(item: StoredItem) -> Iterator[tuple[int, datetime]]:
    """Yield the runs of an item, and when they started. Several attempts may follow one run."""
    for attempt in item.attempts:
        if attempt.execution_id is not None and attempt.started is not None:
            yield attempt.execution_id, attempt.started


def _ending(attempt: RunAttempt) -> str:
    text = f"attempt {attempt.number} finished"
    if attempt.execution_id is not None:
        text += f", execution {attempt.execution_id}"
    if attempt.error is not None:
        text += f": {attempt.error.type}: {explain_stored(*attrs.astuple(attempt.error))}"
    return text


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

    async def delete_chosen() -> None:
        chosen, batch = await lookup.chosen_batch(name, database)
        try:
            deleted = await batch.delete()
        except RuntimeError as error:
            raise Misuse(explain(error)) from error
        err(f"deleted batch {printable(chosen)} with {lookup.item_count(deleted)}")

    if not is_confirmed:
        lookup.confirm(
            describe(),
            "Delete this batch with all its results?",
            act="deleting a batch",
            repeat=lambda: (
                f"{PROGRAM} batch delete --yes{lookup.command_flags(name or '', database)}"
            ),
            unchanged="nothing was deleted",
        )
    raise typer.Exit(run_command(delete_chosen(), Subject()))
