"""The group `batch`, and its commands that work on items: `run` and `work`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from promptlayer_exec._integration import printable
from promptlayer_exec.cli import _batch_lookup as lookup
from promptlayer_exec.cli import _batch_management as management
from promptlayer_exec.cli import _batch_options as options
from promptlayer_exec.cli._exit import (
    THIS_SUBJECT,
    ExitCode,
    Misuse,
    command,
    describe,
    describe_stored,
    help_epilog,
    server_option,
)
from promptlayer_exec.cli._item_file import ItemFile
from promptlayer_exec.cli._options import BaseUrl, Database, NoPush, open_session
from promptlayer_exec.cli._printing import duration, err, quoted, shorten
from promptlayer_exec.cli._result_file import LineFile, TableFile, open_results, write_results

if TYPE_CHECKING:
    from promptlayer_exec.cli._live import BatchProgress
    from promptlayer_exec.dbos import Batch

_REFRESH_INTERVAL = 0.25
_NOTE = "no item is lost: run the same command again to continue"
_STOPPING = "stopping: starts that were sent are still awaited (interrupt again to stop at once)"

batch_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Run many executions that survive a crash."
)


@batch_app.command(
    "run",
    epilog=help_epilog(
        "batch run night.jsonl --workflow grade --out results.jsonl",
        "batch run topics.csv --workflow grade --out results.csv --rate 50",
    ),
)
@command
async def _run(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The items: JSON Lines, or CSV if it ends with .csv."),
    ],
    *,
    workflow: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name or id of the workflow, for lines without one."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File for the results: JSON Lines, which are continued if it exists, or a table"
            " that is written at the end if it ends with .csv.",
            show_default="standard output, which gets all of them",
        ),
    ] = None,
    name: Annotated[str | None, options.name_option("FILE without its suffix")] = None,
    database: Database = None,
    max_in_flight: options.MaxInFlight = None,
    rate: options.Rate = None,
    attempts: options.Attempts = None,
    same_server: options.SameServer = False,
    stop_after_failures: options.StopAfterFailures = None,
    no_push: NoPush = False,
    base_url: BaseUrl = None,
    outage: options.BatchOutage = 600,
) -> ExitCode:
    """Run the items of FILE, each once, and write their results.

    Each line of FILE is one item:

    \b
      {"key": "a", "inputs": {"topic": "otters"}}

    An item can also have a "workflow", a "label" or "version", and "metadata". Its default key is a
    digest of its line. Invalid lines, also those whose inputs the workflow cannot use, are reported
    before anything is added.

    In CSV, with commas, semicolons or tabs, the first line names the columns. The columns key,
    workflow, label, version and metadata.NAME have the same meaning; every other column is an
    input, a text.

    Each line of the results is one finished item, in the order in which the items finish. Its
    fields are key, execution_id, succeeded, output, error ({"type": ..., "message": ...} or null),
    started and finished (UTC). One command at a time writes to a file.

    If the command stops for any reason, run it again to continue, from any directory. A run that
    was started is watched again, never started again. If a process is killed while it starts a run,
    there is no way to find out whether the run was started; such an item ends as unknown, with the
    error StartUnknown. To let other processes help, see `batch work`.
    """  # noqa: D301 - \b is Typer's mark for preformatted text
    batch_name = name or file.stem
    items = ItemFile(file, workflow)
    session = open_session(base_url, outage, no_push=no_push)

    with open_results(results) as result_file:
        batch = await lookup.working_batch(
            batch_name,
            lambda: session,
            database_url=database,
            max_in_flight=max_in_flight,
            rate=rate,
            attempts=attempts,
            same_server=same_server,
        )

        # All checks come first, so that nothing is added or paid for if one fails.
        if result_file is not None:
            shown = f"batch '{printable(batch_name)}' in {lookup.shown_database(database)}"
            await _refuse_foreign_results(batch, shown, result_file)
        # One session for both, so that each definition is read once.
        async with session:
            await items.check_inputs(session, batch, base_url)
            new, count = await _add(batch, items), len(items.lines)

        known = f", {count - new} added before" if new < count else ""
        err(f"batch {printable(batch_name)}: {lookup.item_count(count)}{known}")

        flags = await lookup.command_flags(name, batch_name, database)
        work = partial(_work_on, batch_name, batch, flags, base_url, stop_after_failures)
        if isinstance(result_file, TableFile):
            code = await work()
            await write_results(batch, result_file, until_done=False)
            return code
        return await work(write=partial(write_results, batch, result_file, until_done=True))


@batch_app.command(
    "work", epilog=help_epilog("batch work --db postgresql://me@db.internal/batches")
)
@command
async def _work(
    name: Annotated[str | None, options.name_option("the only batch")] = None,
    database: Database = None,
    max_in_flight: options.MaxInFlight = None,
    rate: options.Rate = None,
    attempts: options.Attempts = None,
    *,
    same_server: options.SameServer = False,
    stop_after_failures: options.StopAfterFailures = None,
    no_push: NoPush = False,
    base_url: BaseUrl = None,
    outage: options.BatchOutage = 600,
) -> ExitCode:
    """Work on a batch until all of its items have finished.

    If the batch does not exist yet, the command waits for it. Other processes can work on it at the
    same time, also on other machines with the same PostgreSQL database. The death of a worker is
    noticed within 30 seconds, and the others take over its items.
    """
    chosen = await lookup.wait_for_batch(name, database)

    batch = await lookup.working_batch(
        chosen,
        partial(open_session, base_url, outage, no_push=no_push),
        database_url=database,
        max_in_flight=max_in_flight,
        rate=rate,
        attempts=attempts,
        same_server=same_server,
    )

    flags = await lookup.command_flags(name, chosen, database)
    return await _work_on(chosen, batch, flags, base_url, stop_after_failures)


for _name, _command, *_examples in (
    ("status", management.status, "batch status"),
    ("list", management.list_batches, "batch list"),
    ("show", management.show, "batch show item-17"),
    ("recheck", management.recheck, "batch recheck"),
    ("retry", management.retry, "batch retry --failed", "batch retry item-17 item-18"),
    ("export", management.export, "batch export --out results.csv"),
    ("delete", management.delete, "batch delete --name night-2026-05-01"),
):
    batch_app.command(_name, epilog=help_epilog(*_examples))(_command)


async def _refuse_foreign_results(batch: Batch, shown: str, file: LineFile | TableFile) -> None:
    """Refuse to run items whose results are in the file, although the database has none of them."""
    kinds = await batch.kinds({result.key for result in file.results})

    # An item that did not succeed may wait again meanwhile; one that succeeded stays as it is.
    foreign = [
        result.key
        for result in file.results
        if result.key not in kinds or (result.succeeded and kinds[result.key] != "succeeded")
    ]

    if foreign:
        raise Misuse(
            f"{file.name} has {len(foreign)} results that {shown} does not have, for example of"
            f" {quoted(min(foreign))}: that item would be run and paid for again. Use the database"
            " that the results are from (--db, PROMPTLAYER_EXEC_DB), or another --out"
        )


async def _add(batch: Batch, items: ItemFile) -> int:
    from promptlayer_exec.cli._live import BatchProgress  # noqa: PLC0415 - slow to import

    before = (await batch.status()).total
    adding = asyncio.create_task(batch.add(items))
    progress = BatchProgress(transient=True)

    try:
        with progress.shown():
            while not (await asyncio.wait([adding], timeout=_REFRESH_INTERVAL))[0]:
                progress.show_added((await batch.status()).total - before, len(items.lines))
        return await adding
    except (TypeError, ValueError) as error:
        raise Misuse(describe(error)) from error
    finally:
        adding.cancel()
        await asyncio.wait([adding])


async def _work_on(
    name: str,
    batch: Batch,
    flags: str,
    base_url: str | None,
    stop_after: int | None,
    *,
    write: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> ExitCode:
    """Work until all items have finished, and print a summary; `write` results meanwhile."""
    from promptlayer_exec.cli._live import BatchProgress  # noqa: PLC0415 - slow to import

    subject = THIS_SUBJECT.get()
    subject.note = f"{_NOTE}; `batch status{flags}` shows how far it is"
    subject.stopping = _STOPPING

    status = await batch.status()
    if status.finished == status.total:
        err(
            f"all items of batch {printable(name)} have already ended, and none is started again:"
            " for a new night, use `batch run` with another --name"
        )

    began = time.monotonic()
    progress = BatchProgress()
    works: list[asyncio.Task[Any]] = [asyncio.create_task(batch.work())]
    if write is not None:
        works.append(asyncio.create_task(write()))
    following = asyncio.create_task(_follow(batch, progress, stop_after))
    with progress.shown():
        ended: asyncio.Future[Any] = asyncio.gather(*works)
        try:
            await asyncio.wait({ended, following}, return_when=asyncio.FIRST_COMPLETED)
            is_stopped = following.done()
        finally:
            for task in (*works, following):
                task.cancel()
            results = await asyncio.gather(*works, following, ended, return_exceptions=True)

        for result in results:
            if isinstance(result, Exception):
                raise result
        if is_stopped:
            err(f"stopped, because {stop_after} items in a row did not succeed; {_NOTE}")

        status = await batch.status()
        progress.show(status)

    lines = [f"{lookup.status_line(name, status)}, in {duration(time.monotonic() - began)}"]
    lines += await _summary(batch)
    lines += lookup.hint_lines(status, flags + server_option(base_url))
    err("\n".join(lines))
    if status.succeeded < status.total:
        return ExitCode.FAILED
    return ExitCode.SUCCEEDED


async def _follow(batch: Batch, progress: BatchProgress, stop_after: int | None) -> None:
    """Show the progress until `stop_after` items in a row have not succeeded."""
    # Failures of an earlier command do not count.
    latest = await batch.latest_kinds(1)
    last_before = latest[0][0] if latest else 0

    while True:
        progress.show(await batch.status())

        if stop_after is not None:
            latest = await batch.latest_kinds(stop_after)
            kinds = [kind for number, kind in latest if number > last_before]
            if len(kinds) == stop_after and "succeeded" not in kinds:
                return

        await asyncio.sleep(_REFRESH_INTERVAL)


async def _summary(batch: Batch) -> list[str]:
    """Return a line about how long the runs took, and one for each type of error."""
    lines = []
    if durations := await batch.durations():
        median, p95, longest = map(duration, attrs.astuple(durations))
        lines = [f"  a run took {median} (median); 95 % took at most {p95}, the longest {longest}"]

    for failure in await batch.failures():
        reason = describe_stored(failure.type, failure.message)
        example = shorten(f"{printable(failure.key)}: {reason}", 160)
        lines.append(f"  {failure.count} {failure.type}, for example {example}")
    return lines
