"""The `batch` commands that work on items: `run` and `work`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from promptlayer_exec._integration import printable
from promptlayer_exec.cli import _batch_operate as operate
from promptlayer_exec.cli._arguments import BaseUrl, NoPush, find_problems
from promptlayer_exec.cli._batch_items import ItemFile
from promptlayer_exec.cli._batch_options import (
    BatchOutage,
    Database,
    MaxInFlight,
    Rate,
    RestartUnknown,
    SameServer,
    StopAfterFailures,
    command_options,
    name_option,
    names,
    shown_database,
    wait_for_batch,
    working_batch,
)
from promptlayer_exec.cli._batch_results import LineFile, TableFile, open_results, write_results
from promptlayer_exec.cli._display import (
    duration_lines,
    failure_lines,
    hint_lines,
    item_count,
    status_line,
)
from promptlayer_exec.cli._exit import (
    ExitCode,
    Misuse,
    Subject,
    describe,
    help_epilog,
    run_command,
    server_option,
)
from promptlayer_exec.cli._session import open_session, retry_policy
from promptlayer_exec.cli._text import duration, err, shorten

if TYPE_CHECKING:
    from promptlayer_exec import Session
    from promptlayer_exec.cli._live import BatchProgress
    from promptlayer_exec.dbos import Batch

_REFRESH_INTERVAL = 0.25
_KNOWN_ENDS = ("ExecutionFailed", "StartUnknown")  # or a hint of its own
_NOTE = "no item is lost: run the same command again to continue"

batch_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Run many executions that survive a crash."
)


class _TooManyFailures(Exception):
    """The last items did not succeed, as many as `--stop-after-failures` says."""


@batch_app.command(
    "run",
    epilog=help_epilog(
        "batch run night.jsonl --workflow grade --out results.jsonl",
        "batch run topics.csv --workflow grade --out results.csv --rate 50",
    ),
)
def _run(
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
            " that is written at the end if it ends with .csv or .parquet.",
            show_default="standard output, which gets all of them",
        ),
    ] = None,
    name: Annotated[str | None, name_option("FILE without its suffix")] = None,
    database: Database = None,
    max_in_flight: MaxInFlight = None,
    rate: Rate = None,
    restart_unknown: RestartUnknown = False,
    same_server: SameServer = False,
    stop_after_failures: StopAfterFailures = None,
    no_push: NoPush = False,
    base_url: BaseUrl = None,
    outage: BatchOutage = 600,
) -> None:
    """Run the items of FILE, each once, and write their results.

    Each line of FILE is one item:

    \b
      {"key": "a", "inputs": {"topic": "otters"}}

    An item can also have a "workflow", a "label" or "version", and "metadata". Its default key is a
    digest of its line. Invalid lines, also those whose inputs the workflow cannot use, are reported
    before anything is added.

    In CSV, the first line names the columns. The columns key, workflow, label, version and
    metadata.NAME have the same meaning; every other column is an input, a text.

    Each line of the results is one finished item, in the order in which the items finish. Its
    fields are key, execution_id, succeeded, output, error ({"type": ..., "message": ...} or null),
    started and finished (UTC). One command at a time writes to a file.

    If the command stops for any reason, run it again to continue, from any directory. A run that
    was started is watched again, never started again. If a process is killed while it starts a run,
    there is no way to find out whether the run was started; such an item ends as unknown, with the
    error StartUnknown. To let other processes help, see `batch work`.
    """  # noqa: D301 - \b is Typer's mark for preformatted text
    subject = Subject()
    batch_name = name or file.stem
    session = partial(open_session, base_url, retry_policy(outage), no_push=no_push)

    async def work() -> ExitCode:
        items = ItemFile(file, workflow)
        with open_results(results) as result_file:
            batch = await working_batch(
                batch_name,
                session,
                database_url=database,
                max_in_flight=max_in_flight,
                rate=rate,
                restart_unknown=restart_unknown,
                same_server=same_server,
            )
            shown = f"batch '{printable(batch_name)}' in {shown_database(database)}"
            if result_file is not None:
                await _refuse_foreign_results(batch, shown, result_file)
            await _check_inputs(batch, items, session(), base_url)
            new = await _add(batch, items)
            options = command_options(name, batch_name, await names(database), database)
            subject.note = _note(options)
            known = f", {items.count - new} already known" if new < items.count else ""
            err(f"batch {printable(batch_name)}: {item_count(items.count)}{known}")
            await _say_if_ended(batch_name, batch, restarts=restart_unknown)
            options += server_option(base_url)
            if isinstance(result_file, TableFile):
                code = await _work_on(batch_name, batch, options, stop_after_failures)
                await write_results(batch, result_file, until_done=False)
                return code
            lines = write_results(batch, result_file, until_done=True)
            return await _work_on(batch_name, batch, options, stop_after_failures, lines)

    raise typer.Exit(run_command(work(), subject))


@batch_app.command(
    "work",
    epilog=help_epilog("batch work --db postgresql://me@db.internal/batches"),
)
def _work(
    name: Annotated[str | None, name_option("the only batch")] = None,
    database: Database = None,
    max_in_flight: MaxInFlight = None,
    rate: Rate = None,
    *,
    restart_unknown: RestartUnknown = False,
    same_server: SameServer = False,
    stop_after_failures: StopAfterFailures = None,
    no_push: NoPush = False,
    base_url: BaseUrl = None,
    outage: BatchOutage = 600,
) -> None:
    """Work on a batch until all of its items have finished.

    If the batch does not exist yet, the command waits for it. Other processes can work on it at the
    same time, also on other machines with the same PostgreSQL database. The death of a worker is
    noticed within 30 seconds, and the others take over its items.
    """
    subject = Subject()

    async def work() -> ExitCode:
        chosen = await wait_for_batch(name, database)
        options = command_options(name, chosen, await names(database), database)
        subject.note = _note(options)
        batch = await working_batch(
            chosen,
            partial(open_session, base_url, retry_policy(outage), no_push=no_push),
            database_url=database,
            max_in_flight=max_in_flight,
            rate=rate,
            restart_unknown=restart_unknown,
            same_server=same_server,
        )
        await _say_if_ended(chosen, batch, restarts=restart_unknown)
        options += server_option(base_url)
        return await _work_on(chosen, batch, options, stop_after_failures)

    raise typer.Exit(run_command(work(), subject))


for _name, _command, *_examples in (
    ("status", operate.status, "batch status"),
    ("list", operate.list_batches, "batch list"),
    ("show", operate.show, "batch show item-17"),
    ("recheck", operate.recheck, "batch recheck"),
    ("retry", operate.retry, "batch retry --failed"),
    ("export", operate.export, "batch export --out results.parquet"),
    ("delete", operate.delete, "batch delete --name night-2026-05-01"),
):
    batch_app.command(_name, epilog=help_epilog(*_examples, has_codes=False))(_command)


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
        what = "a result" if len(foreign) == 1 else f"{len(foreign)} results"
        raise Misuse(
            f"{file.name} has {what} that {shown} does not have, for example"
            f" of '{shorten(printable(min(foreign)), 100)}': that item would be run and paid for"
            " again. Use the database that the results are from (--db, PROMPTLAYER_EXEC_DB), or"
            " another --out"
        )


async def _check_inputs(
    batch: Batch, items: ItemFile, session: Session, base_url: str | None
) -> None:
    """Refuse lines that cannot run, unless the batch has them already."""
    async with session:
        problems = await find_problems(session, items.starts, base_url)
    if problems:
        keys = dict(items.keys(problems))
        known = await batch.kinds(keys.values())
        problems = {number: why for number, why in problems.items() if keys[number] not in known}
    items.refuse(problems)


async def _add(batch: Batch, items: ItemFile) -> int:
    before = (await batch.status()).total
    adding = asyncio.create_task(batch.add(items))
    progress = _progress(transient=True)
    try:
        with progress.shown():
            while not (await asyncio.wait([adding], timeout=_REFRESH_INTERVAL))[0]:
                progress.show_added((await batch.status()).total - before, items.count)
        return await adding
    except (TypeError, ValueError) as error:
        raise Misuse(describe(error)) from error
    finally:
        adding.cancel()
        await asyncio.wait([adding])


def _progress(*, transient: bool = False) -> BatchProgress:
    from promptlayer_exec.cli._live import BatchProgress  # noqa: PLC0415 - slow to import

    return BatchProgress(transient=transient)


def _note(options: str) -> str:
    return f"{_NOTE}; `batch status{options}` shows how far it is"


async def _say_if_ended(name: str, batch: Batch, *, restarts: bool) -> None:
    status = await batch.status()
    if status.finished - (status.unknown if restarts else 0) == status.total:
        err(
            f"all items of batch {printable(name)} have already ended, and none is started again:"
            " for a new night, use `batch run` with another --name"
        )


async def _work_on(
    name: str,
    batch: Batch,
    options: str,
    stop_after: int | None,
    *others: Coroutine[Any, Any, None],
) -> ExitCode:
    progress = _progress()
    began = time.monotonic()
    code: ExitCode | None = None
    works: list[asyncio.Task[Any]] = [asyncio.create_task(each) for each in (batch.work(), *others)]
    meanwhile = [asyncio.create_task(_follow(batch, progress))]
    if stop_after is not None:
        meanwhile.append(asyncio.create_task(_stop_after(batch, stop_after)))
    with progress.shown():
        ended: asyncio.Future[Any] = asyncio.gather(*works)
        try:
            await asyncio.wait({ended, *meanwhile}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*works, *meanwhile):
                task.cancel()
            results = await asyncio.gather(*works, *meanwhile, ended, return_exceptions=True)
        for result in results:
            if isinstance(result, _TooManyFailures):
                err(str(result))
                code = ExitCode.FAILED
            elif isinstance(result, Exception):
                raise result
        status = await batch.status()
        progress.show(status)
    failures = await batch.failures()
    has_open_ends = any(failure.type not in _KNOWN_ENDS for failure in failures)
    lines = duration_lines(await batch.durations()) + failure_lines(failures)
    lines += hint_lines(status, options, has_open_ends=has_open_ends)
    took = duration(time.monotonic() - began)
    err(f"{status_line(name, status)}, in {took}")
    for line in lines:
        err(line)
    if code is not None:
        return code
    return ExitCode.SUCCEEDED if status.succeeded == status.total else ExitCode.FAILED


async def _follow(batch: Batch, progress: BatchProgress) -> NoReturn:
    while True:
        progress.show(await batch.status())
        await asyncio.sleep(_REFRESH_INTERVAL)


async def _stop_after(batch: Batch, failures: int) -> NoReturn:
    before = await batch.latest_kinds(1)
    first = before[0][0] if before else 0
    while True:
        latest = [kind for number, kind in await batch.latest_kinds(failures) if number > first]
        if len(latest) == failures and "succeeded" not in latest:
            raise _TooManyFailures(
                f"stopped, because {failures} items in a row did not succeed; {_NOTE}"
            )
        await asyncio.sleep(_REFRESH_INTERVAL)
