"""The group `batch`, and its commands that work on items: `run` and `work`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from promptlayer_exec import RequestError, Unauthorized
from promptlayer_exec._advice import explain
from promptlayer_exec._integration import duration, printable
from promptlayer_exec._ways_out import PROGRAM, command_about, out_of_item, server_option
from promptlayer_exec.cli import _batch_lookup as lookup
from promptlayer_exec.cli import _batch_management as management
from promptlayer_exec.cli import _batch_options as options
from promptlayer_exec.cli import _batch_retry as retrying
from promptlayer_exec.cli._exit import THIS_SUBJECT, ExitCode, Misuse, command, hint, may_pass
from promptlayer_exec.cli._help import Program, help_epilog
from promptlayer_exec.cli._item_file import ItemFile
from promptlayer_exec.cli._options import BaseUrl, Database, NoPush, open_session
from promptlayer_exec.cli._printing import err, quoted, utc_time
from promptlayer_exec.cli._result_file import (
    LineFile,
    Result,
    TableFile,
    open_results,
    write_results,
)

if TYPE_CHECKING:
    from promptlayer_exec.cli._live import BatchProgress
    from promptlayer_exec.dbos import Batch

_REFRESH_INTERVAL = 0.25
_NO_LOSS = "No item is lost"
_NOTE = f"{_NO_LOSS}: run the same command again to continue."
_STOPPING = (
    "stopping: waiting for the ids of runs that may have started (Ctrl-C again stops waiting)"
)

batch_app = Program(help="Run a file of items as a durable, resumable batch.")


@batch_app.command(
    "run",
    epilog=help_epilog(
        "batch run night.jsonl --workflow grade --out results.jsonl",
        "batch run topics.csv --workflow grade --out results.csv",
    ),
)
@command
async def _run(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The items, as JSON Lines, or as CSV in a .csv file."),
    ],
    *,
    workflow: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name or id of the workflow, unless a line has its own."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File for the results: JSON Lines, appended to as items finish, or a table in a"
            " .csv file, written last.",
            show_default="standard output",
        ),
    ] = None,
    name: Annotated[str | None, options.name_option("FILE, without its suffix")] = None,
    database: Database = None,
    max_in_flight: options.MaxInFlight = None,
    rate: options.Rate = None,
    attempts: options.Attempts = None,
    give_up_after: options.GiveUpAfter = None,
    same_server: options.SameServer = False,
    stop_after_failures: options.StopAfterFailures = None,
    no_push: NoPush = False,
    base_url: BaseUrl = None,
    outage: options.BatchOutage = 600,
) -> ExitCode:
    """Run the items of FILE, each once, and write their results.

    A line of FILE is one item: {"key": "a", "inputs": {"topic": "otters"}}. See `help items` for
    its other fields, for CSV, and for the results. All lines are checked before anything starts.

    If the command stops for any reason, run it again to continue. It follows runs that have
    started, and never starts them twice. If a process was killed while it started a run, nobody can
    tell whether that run exists: its item is then unknown.

    Limits are stored with the batch. To let other machines help, see `batch work`.
    """
    batch_name = name or file.stem
    items = ItemFile(file, workflow)
    session = open_session(base_url, outage, no_push=no_push)

    work_flags = lookup.command_flags(batch_name, database) + server_option(base_url)
    helping = command_about("batch work", work_flags)
    with open_results(results, helping=helping) as result_file:
        batch = await lookup.working_batch(
            batch_name,
            lambda: session,
            database_url=database,
            max_in_flight=max_in_flight,
            rate=rate,
            attempts=attempts,
            give_up_after=give_up_after,
            same_server=same_server,
        )

        # All checks come first: if one fails, nothing is added, and you pay for nothing.
        if result_file is not None:
            shown = f"batch '{printable(batch_name)}' in {lookup.shown_database(database)}"
            await _refuse_foreign_results(batch, shown, result_file)
        # One session for both, which reads each definition once.
        async with session:
            await items.check_inputs(session, batch, base_url)
            new, count = await _add(batch, items), len(items.lines)

        known = f", {count - new} added before" if new < count else ""
        err(f"batch {printable(batch_name)}: {lookup.item_count(count)}{known}")

        work = partial(_work_on, batch_name, batch, database, base_url, stop_after_failures)
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
    *,
    attempts: options.Attempts = None,
    give_up_after: options.GiveUpAfter = None,
    same_server: options.SameServer = False,
    stop_after_failures: options.StopAfterFailures = None,
    no_push: NoPush = False,
    base_url: BaseUrl = None,
    outage: options.BatchOutage = 600,
) -> ExitCode:
    """Work on a batch until all of its items have finished.

    Any number of processes can work on a batch at the same time, and on any number of machines
    if the database is PostgreSQL. If one dies, the others take over its items within 30 seconds.
    If the batch does not exist yet, the command waits for it, however long that takes.
    """
    chosen = await lookup.wait_for_batch(name, database)

    batch = await lookup.working_batch(
        chosen,
        partial(open_session, base_url, outage, no_push=no_push),
        database_url=database,
        max_in_flight=max_in_flight,
        rate=rate,
        attempts=attempts,
        give_up_after=give_up_after,
        same_server=same_server,
    )

    return await _work_on(chosen, batch, database, base_url, stop_after_failures)


for _name, _command, *_examples in (
    ("status", management.status, "batch status"),
    ("list", management.list_batches, "batch list"),
    ("items", management.items, "batch items --state unknown --older-than 1h"),
    ("show", management.show, "batch show item-17"),
    ("recheck", retrying.recheck, "batch recheck"),
    ("retry", retrying.retry, "batch retry --failed", "batch retry item-17 item-18"),
    ("adopt", retrying.adopt, "batch adopt item-17 1002"),
    ("give-up", retrying.give_up, "batch give-up item-17", "batch give-up --running-for 6h"),
    ("export", management.export, "batch export --out results.csv"),
    ("delete", management.delete, "batch delete --name night-2026-05-01"),
):
    batch_app.command(_name, epilog=help_epilog(*_examples))(_command)


async def _refuse_foreign_results(batch: Batch, shown: str, file: LineFile | TableFile) -> None:
    """Refuse to run items if the file has results of them that the database does not have."""
    kinds = await batch.kinds({result.key for result in file.results})

    foreign = []
    for result in file.results:
        is_doubtful = result.succeeded and kinds.get(result.key) != "succeeded"
        if result.key not in kinds or (is_doubtful and not await _is_earlier(batch, result)):
            foreign.append(result.key)

    if foreign:
        raise Misuse(
            f"{file.name} has {len(foreign)} results that {shown} does not have, for example of"
            f" {quoted(min(foreign))}: you would pay for that item again. Use the database that"
            " produced these results (--db, PROMPTLAYER_EXEC_DB), or another --out"
        )


async def _is_earlier(batch: Batch, result: Result) -> bool:
    """Return True if the result is of an earlier attempt, because somebody retried the item."""
    item = await batch.item(result.key)
    finished = [attempt.finished for attempt in item.attempts] if item is not None else []
    return result.finished in [moment.isoformat() for moment in finished if moment is not None]


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
        raise Misuse(explain(error)) from error
    finally:
        adding.cancel()
        await asyncio.wait([adding])


async def _work_on(
    name: str,
    batch: Batch,
    database: str | None,
    base_url: str | None,
    stop_after: int | None,
    *,
    write: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> ExitCode:
    """Work until all items have finished, `write` results meanwhile, and print a summary."""
    from promptlayer_exec.cli._live import BatchProgress  # noqa: PLC0415 - slow to import

    subject = THIS_SUBJECT.get()
    subject.note = _NOTE
    seen_with = f"{PROGRAM} batch status{lookup.command_flags(name, database)}"
    subject.hint = hint("see how far it is with:", seen_with)
    subject.stopping = _STOPPING

    status = await batch.status()
    if status.finished == status.total:
        err(
            f"all items of batch {printable(name)} have already finished, so nothing runs again."
            " To run them as a new batch, give `batch run` another --name"
        )

    began = time.monotonic()
    progress = BatchProgress()
    works: list[asyncio.Task[Any]] = [asyncio.create_task(batch.work())]
    if write is not None:
        works.append(asyncio.create_task(write()))
    describe = partial(_longest_running, name, batch, database, base_url)
    following = asyncio.create_task(_follow(batch, progress, stop_after, describe))
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
                if _is_about_runs(result):
                    flags = await lookup.working_flags(batch, name, database, base_url)
                    recheck = f"{PROGRAM} batch recheck{flags}"
                    subject.note = f"{_NO_LOSS}."
                    subject.hint = hint("once their runs can be read, follow them with:", recheck)
                    subject.hint += "\nand then run the same command again to continue"
                raise result
        if is_stopped:
            err(f"stopped, because {stop_after} items in a row did not succeed. {_NOTE}")

        status = await batch.status()
        progress.show(status)

    lines = [f"{lookup.status_line(name, status)}, in {duration(time.monotonic() - began)}"]
    if durations := await batch.durations():
        median, p95, longest = map(duration, attrs.astuple(durations))
        lines.append(f"  a run took {median} (median), 95 % at most {p95}, the longest {longest}")
    failures = await batch.failures()
    lines += lookup.cause_lines(failures)
    flags = await lookup.working_flags(batch, name, database, base_url)
    lines += lookup.hint_lines(status, failures, flags)
    err("\n".join(lines))
    if status.succeeded < status.total:
        return ExitCode.FAILED
    return ExitCode.SUCCEEDED


def _is_about_runs(error: Exception) -> bool:
    """Return True if the work stopped because nobody can read how runs end."""
    if not isinstance(error, RequestError) or isinstance(error, Unauthorized):
        return False
    return error.execution_id is not None and not may_pass(error)


async def _follow(
    batch: Batch,
    progress: BatchProgress,
    stop_after: int | None,
    describe: Callable[[], Coroutine[Any, Any, str | None]],
) -> None:
    """Show the progress, and return once `stop_after` items in a row have not succeeded.

    `describe` describes what the batch waits for, once, when no item finishes any more.
    """
    # Do not count the failures of an earlier command.
    latest = await batch.latest_kinds(1)
    last_before = latest[0][0] if latest else 0

    is_described = False
    while True:
        progress.show(await batch.status())
        if progress.is_stalled and not is_described and (description := await describe()):
            progress.warn(description)
            is_described = True

        if stop_after is not None:
            latest = await batch.latest_kinds(stop_after)
            kinds = [kind for number, kind in latest if number > last_before]
            if len(kinds) == stop_after and "succeeded" not in kinds:
                return

        await asyncio.sleep(_REFRESH_INTERVAL)


async def _longest_running(
    name: str, batch: Batch, database: str | None, base_url: str | None
) -> str | None:
    """Return which item has been followed for the longest time, and how to end it."""
    async with aclosing(batch.items(state="following")) as items:
        followed = [item async for item in items]
    if not followed:
        return None

    item = min(followed, key=attrgetter("since"))
    flags = await lookup.working_flags(batch, name, database, base_url)
    (way,) = out_of_item("following", item.key, flags)
    return hint(
        f"no item has finished for a minute. Item {quoted(item.key)} (execution"
        f" {item.execution_id}) has been running the longest, since {utc_time(item.since)}. If it"
        f" takes too long, {way.what}:",
        way.command,
    )
