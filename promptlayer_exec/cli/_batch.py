"""The `batch` commands: their options, and what they do."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Coroutine
from contextlib import aclosing, closing
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import attrs
import typer

from promptlayer_exec import RetryPolicy, Session
from promptlayer_exec._integration import install_hint
from promptlayer_exec.cli._arguments import BaseUrl, JsonLines, Outage, Push
from promptlayer_exec.cli._batch_files import ItemFile, ResultFile
from promptlayer_exec.cli._display import BatchProgress, failure_lines, item_count, status_line
from promptlayer_exec.cli._exit import ExitCode, Misuse, Subject, help_epilog, run_command
from promptlayer_exec.cli._session import open_session
from promptlayer_exec.cli._stdio import err, out
from promptlayer_exec.cli._text import printable

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch

_REFRESH_INTERVAL = 0.25
_SQLITE = "sqlite:///"
_DEFAULT_DATABASE = "sqlite:///promptlayer-batches.sqlite"
_NOTE = "no item is lost: run the same command again to continue"
_EPILOG = help_epilog(batch=True)

batch_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Run many executions that survive a crash."
)


def _positive(value: float) -> float:
    if not 0 < value < math.inf:
        raise typer.BadParameter("must be a number greater than 0")
    return value


def _name_option(default: str) -> Any:
    return typer.Option(metavar="NAME", help="Name of the batch.", show_default=default)


_Database = Annotated[
    str,
    typer.Option(
        "--db",
        metavar="URL",
        envvar="PROMPTLAYER_EXEC_DB",
        help="Database: sqlite:///FILE, or postgresql://... for several machines.",
    ),
]
_MaxInFlight = Annotated[
    int, typer.Option(min=1, help="Maximum number of items in progress, over all workers.")
]
_Rate = Annotated[
    float,
    typer.Option(
        metavar="PER_SECOND",
        callback=_positive,
        help="Maximum requests per second, over all workers; one worker sends at most 100.",
    ),
]
_RestartUnknown = Annotated[
    bool,
    typer.Option(
        "--restart-unknown",
        help="Start unknown items again, at the risk of paying for them twice.",
    ),
]


@attrs.frozen
class Settings:
    """The settings of a `Batch` that `batch run` and `batch work` share."""

    database_url: str
    max_in_flight: int
    rate: float
    restart_unknown: bool


@batch_app.command("run", epilog=_EPILOG)
def _run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON Lines, one item per line.")],
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
            help="File for the results, continued if it exists; standard output gets all of them.",
            show_default="standard output",
        ),
    ] = None,
    name: Annotated[str | None, _name_option("FILE without its suffix")] = None,
    database: _Database = _DEFAULT_DATABASE,
    max_in_flight: _MaxInFlight = 100,
    rate: _Rate = 100,
    restart_unknown: _RestartUnknown = False,
    push: Push = False,
    base_url: BaseUrl = None,
    outage: Outage = 600,
) -> None:
    """Run the items of FILE, each once, and write their results.

    Each line of FILE is one item:

    \b
      {"key": "a", "inputs": {"topic": "otters"}}

    An item can also have a "workflow", a "label" or "version", and "metadata". Its default key is
    the number of its line. Invalid lines are reported before anything starts.

    Each line of the results is one finished item, in the order in which the items finish. Its
    fields are key, execution_id, succeeded, output, error ({"type": ..., "message": ...} or null),
    started and finished (UTC).

    If the command stops for any reason, run it again to continue. A run that was started is watched
    again, never started again. If a process is killed while it starts a run, there is no way to
    find out whether the run was started; such an item ends as unknown, with the error StartUnknown.
    To let other processes help, see `batch work`.
    """  # noqa: D301 - \b is Typer's mark for preformatted text
    settings = Settings(database, max_in_flight, rate, restart_unknown)
    subject = Subject()
    batch_name = name or file.stem

    async def work() -> ExitCode:
        items = ItemFile(file, workflow)
        with closing(ResultFile(results)) as result_file:
            batch = _batch(batch_name, settings, base_url, outage, push=push)
            try:
                new = await batch.add(items)
            except (TypeError, ValueError) as error:
                raise Misuse(str(error)) from error
            subject.note = _NOTE
            known = f", {items.count - new} already known" if new < items.count else ""
            err(f"batch {printable(batch_name)}: {item_count(items.count)}{known}")
            status = await batch.status()
            restarted = status.unknown if restart_unknown else 0
            if status.finished - restarted == status.total:
                err("all of them have already finished: to run them again, use another --name")
            return await _work_on(batch_name, batch, _write(batch, result_file))

    raise typer.Exit(run_command(work(), subject))


@batch_app.command("work", epilog=_EPILOG)
def _work(
    name: Annotated[str | None, _name_option("the only batch")] = None,
    database: _Database = _DEFAULT_DATABASE,
    max_in_flight: _MaxInFlight = 100,
    rate: _Rate = 100,
    *,
    restart_unknown: _RestartUnknown = False,
    push: Push = False,
    base_url: BaseUrl = None,
    outage: Outage = 600,
) -> None:
    """Work on a batch until all of its items have finished.

    Other processes can work on it at the same time, also on other machines with the same PostgreSQL
    database. The death of a worker is noticed within 30 seconds, and the others take over its
    items.
    """
    settings = Settings(database, max_in_flight, rate, restart_unknown)
    subject = Subject()

    async def work() -> ExitCode:
        chosen = _choose(name, await _names(database))
        subject.note = _NOTE
        return await _work_on(chosen, _batch(chosen, settings, base_url, outage, push=push))

    raise typer.Exit(run_command(work(), subject))


@batch_app.command("status")
def _status(
    name: Annotated[str | None, _name_option("all batches")] = None,
    database: _Database = _DEFAULT_DATABASE,
    *,
    as_json: JsonLines = False,
) -> None:
    """Print the progress of the batches in a database."""

    async def work() -> ExitCode:
        names = await _names(database)
        for each in names if name is None else [_choose(name, names)]:
            status = await _dbos().Batch(each, database_url=database, session=Session).status()
            fields = {"batch": each} | attrs.asdict(status)
            out(json.dumps(fields) if as_json else status_line(each, status))
        return ExitCode.SUCCEEDED

    raise typer.Exit(run_command(work(), Subject()))


def _dbos() -> ModuleType:
    try:
        from promptlayer_exec import dbos  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise Misuse(f"batches need an extra: {install_hint('cli', 'dbos')}") from error
    return dbos


def _batch(
    name: str, settings: Settings, base_url: str | None, outage: float, *, push: bool
) -> Batch:
    retry = RetryPolicy(outage=outage, watch_outage=outage)
    session = partial(open_session, base_url, retry, push=push)
    session()  # reports a missing key before anything is stored
    batch: Batch = _dbos().Batch(name, session=session, **attrs.asdict(settings))
    return batch


async def _names(database: str) -> list[str]:
    path = database.removeprefix(_SQLITE)
    if path != database and not await anyio.Path(path).exists():  # opening would create it
        raise Misuse(f"there is no database {printable(database)}")
    names: list[str] = await _dbos().batch_names(database)
    return names


def _choose(name: str | None, names: list[str]) -> str:
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        return name
    known = ", ".join(map(printable, names)) or "none"
    what = "give --name" if name is None else f"there is no batch '{printable(name)}'"
    raise Misuse(f"{what}; batches in the database: {known}")


async def _work_on(name: str, batch: Batch, *others: Coroutine[Any, Any, None]) -> ExitCode:
    progress = BatchProgress()
    with progress.shown():
        works = (batch.work(), _follow(batch, progress), *others)
        tasks = [asyncio.create_task(work) for work in works]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    async with aclosing(batch.outcomes()) as outcomes:
        failures = await failure_lines(outcomes)
    status = await batch.status()
    for line in (status_line(name, status), *failures):
        err(line)
    if status.unknown:
        err(
            "unknown: these runs may have started and be billed: look in PromptLayer, then start"
            " them again with --restart-unknown, or leave them"
        )
    return ExitCode.SUCCEEDED if status.succeeded == status.total else ExitCode.FAILED


async def _follow(batch: Batch, progress: BatchProgress) -> None:
    while True:
        status = await batch.status()
        progress.show(status)
        if status.finished == status.total:
            return
        await asyncio.sleep(_REFRESH_INTERVAL)


async def _write(batch: Batch, file: ResultFile) -> None:
    async with aclosing(batch.outcomes()) as outcomes:
        async for outcome in outcomes:
            file.write(outcome)
