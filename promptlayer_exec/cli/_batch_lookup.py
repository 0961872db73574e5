"""Finds the batch that a command is about, and describes it in lines."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from itertools import count
from types import ModuleType
from typing import TYPE_CHECKING, Any

import attrs
import typer

from promptlayer_exec import ConfigurationError, Session
from promptlayer_exec import _integration as integration
from promptlayer_exec._advice import explain_stored
from promptlayer_exec._integration import install_hint, printable
from promptlayer_exec._ways_out import (
    batch_option,
    command_about,
    database_option,
    is_undecided,
    is_usual_database,
    out_of_items,
    server_option,
)
from promptlayer_exec.cli._exit import ExitCode, Misuse, Subject, hint, run_command, way_hints
from promptlayer_exec.cli._printing import err, shorten

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch, BatchStatus, Failure

DEFAULT_RATE = 100.0
_MOST_CAUSES = 10  # causes to print


def dbos() -> ModuleType:
    try:
        from promptlayer_exec import dbos  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise Misuse(f"batches need {install_hint('cli', 'dbos')}") from error
    return dbos


async def working_batch(
    name: str, session: Callable[[], Session], *, rate: float | None, **settings: Any
) -> Batch:
    """Return a batch to work on, with the command line's default rate if it stores none."""
    session()  # reports a missing key before anything is stored

    make = partial(dbos().Batch, name, session=session, **settings)
    batch: Batch = make(rate=rate)
    await batch.check_server()
    if rate is None and (await batch.settings()).rate is None:
        batch = make(rate=DEFAULT_RATE)
    return batch


async def chosen_batch(
    name: str | None, database: str | None, base_url: str | None = None, **options: Any
) -> tuple[str, Batch]:
    """Return the name of an existing batch, and the batch. None means the only one."""
    chosen = choose(name, await names(database))
    session = partial(Session, base_url=base_url)
    return chosen, dbos().Batch(chosen, database_url=database, session=session, **options)


def choose(name: str | None, found: list[str]) -> str:
    """Return the name of a batch that exists."""
    if name is None and len(found) == 1:
        return found[0]
    if name in found:
        return name

    problem = "there are several batches: choose one with --name"
    if name is not None:
        problem = f"there is no batch '{printable(name)}'"
    known = ", ".join(map(printable, found))
    raise Misuse(f"{problem}. The batches in the database are: {known}")


async def names(database: str | None, *, needed: bool = True) -> list[str]:
    """Return the names of the batches in a database. Print a line if there are none."""
    found: list[str] = await dbos().batch_names(database)
    if not found:
        where = shown_database(database)
        problem = f"there is no batch in {where}. Check --db or PROMPTLAYER_EXEC_DB"
        if needed:
            raise Misuse(problem)
        err(problem)
    return found


async def wait_for_batch(name: str | None, database: str | None) -> str:
    """Return the name of a batch as soon as it exists. None means the only one."""
    for attempt in count():
        found = await _names_so_far(database)
        if name in found or (name is None and found):
            break

        if attempt == 0:
            wanted = "a batch" if name is None else f"batch '{printable(name)}'"
            message = f"waiting for {wanted} in {shown_database(database)}"
            if found:
                message += f" (it has {', '.join(map(printable, found))})"
            err(f"{message}. Ctrl-C stops")
        await asyncio.sleep(1.0)
    return choose(name, found)


async def _names_so_far(database: str | None) -> list[str]:
    """Return the names of the batches, none if `batch run` has yet to create the database."""
    try:
        found: list[str] = await dbos().batch_names(database)
    except ConfigurationError as error:
        if error.setting != "database_url":
            raise
        return []
    return found


def shown_database(database: str | None) -> str:
    """Return the URL of the database, without its password."""
    return printable(dbos().shown_database_url(database))


def command_flags(name: str, database: str | None) -> str:
    """Return the flags that another command needs to find a batch."""
    flags = batch_option(name)
    if database is not None and not is_usual_database(database):
        flags += database_option(database, shown_database(database))
    return printable(flags)


async def working_flags(
    batch: Batch,
    name: str,
    database: str | None,
    base_url: str | None = None,
    *,
    same_server: bool = False,
) -> str:
    """Return the flags that another command needs to find a batch and its server."""
    flags = command_flags(name, database) + await server_flag(batch, base_url)
    return flags + " --same-server" if same_server else flags


async def server_flag(batch: Batch, base_url: str | None) -> str:
    """Return the flag that another command needs to find the server of a batch."""
    server = base_url
    if server is None:
        server = (await batch.settings()).server
        if server == integration.base_url(Session()):
            server = None
    return server_option(server)


def status_line(name: str, status: BatchStatus) -> str:
    counts = []
    if status.finished < status.total:
        counts += [f"{status.waiting} waiting", f"{status.running} running"]
    counts += [f"{status.succeeded} succeeded", f"{status.failed} failed"]
    counts.append(f"{status.unknown} unknown")
    return f"batch {printable(name)}: {item_count(status.total)}: {', '.join(counts)}"


def item_count(count: int) -> str:
    """Return `1 item`, `2 items` and so on."""
    return f"{count} item" if count == 1 else f"{count} items"


def confirm(
    describe: Coroutine[Any, Any, None],
    question: str,
    *,
    act: str,
    repeat: Callable[[], str],
    unchanged: str,
) -> None:
    """Describe what a command would do, and exit unless the user agrees to it.

    `repeat` returns the command that does it without a question.
    """

    async def describe_on_terminal() -> None:
        await describe
        if not sys.stdin.isatty():
            raise Misuse(
                f"{act} needs a terminal to ask on, or --yes",
                hint=hint("do it with:", repeat()),
            )

    if code := run_command(describe_on_terminal(), Subject()):
        raise typer.Exit(code)

    # Not within `run_command`, which would wait for the user's reply after Ctrl-C.
    try:
        is_confirmed = typer.confirm(question, err=True)
    except typer.Abort:
        err(f"\ninterrupted: {unchanged}")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if not is_confirmed:
        err(unchanged)
        raise typer.Exit(ExitCode.FAILED)


def cause_lines(failures: Sequence[Failure]) -> list[str]:
    """Return a line for each cause of failures, the most frequent first."""
    lines = []
    for failure in failures[:_MOST_CAUSES]:
        reason = explain_stored(*attrs.astuple(failure.error))
        example = shorten(f"{printable(failure.key)}: {reason}", 160)
        lines.append(f"{failure.count} {failure.error.type}, for example {example}")

    if rest := len(failures) - len(lines):
        lines.append(f"and {rest} other causes: `batch export` writes the reason of each item")
    return lines


def undecided_count(failures: Sequence[Failure]) -> int:
    """Return how many failed items have a run that may still bring an output."""
    errors = [(failure.count, failure.error) for failure in failures]
    return sum(count for count, error in errors if is_undecided(error.type, error.data))


def work_hint(text: str, flags: str) -> str:
    """Return a text, and how to continue with the items of the batch."""
    repeat = "Repeat its `batch run`, or continue without a results file with:"
    return hint(f"{text}. {repeat}", command_about("batch work", flags))


def hint_lines(status: BatchStatus, failures: Sequence[Failure], flags: str) -> list[str]:
    """Return, for each kind of items without an output, the commands that continue with them."""
    lines = []
    if status.finished < status.total and not status.workers:
        left = item_count(status.total - status.finished)
        them = "it" if status.total - status.finished == 1 else "them"
        lines.append(work_hint(f"{left} not finished, and nobody is working on {them}", flags))

    undecided = undecided_count(failures)
    if status.failed > undecided:
        lines += way_hints(out_of_items("failed", flags))
    if undecided:
        lines += way_hints(out_of_items("undecided", flags))
    if status.unknown:
        lines += way_hints(out_of_items("unknown", flags))
    return lines
