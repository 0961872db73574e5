"""What the `batch` commands share: options, the batch that they name, and lines about it."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Callable
from functools import partial
from itertools import count
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptlayer_exec import Session
from promptlayer_exec._integration import install_hint, printable
from promptlayer_exec.cli._arguments import seconds
from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._text import err

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch, BatchStatus

DEFAULT_RATE = 100.0
_WAIT_INTERVAL = 1.0


def name_option(default: str) -> Any:
    return typer.Option(metavar="NAME", help="Name of the batch.", show_default=default)


OnlyBatch = Annotated[str | None, name_option("the only batch")]
Database = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="URL",
        envvar="PROMPTLAYER_EXEC_DB",
        help="Database: sqlite:///FILE, or postgresql://... for several machines.",
        show_default="a file of your own, whatever the directory",
    ),
]
MaxInFlight = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        min=1,
        help="Maximum number of items in progress, over all workers; stored with the batch.",
        show_default="as stored, at first 100",
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        metavar="PER_SECOND",
        help="Maximum requests per second, over all workers; stored with the batch. One worker"
        " sends at most 100.",
        show_default="as stored, at first 100",
    ),
]
StopAfterFailures = Annotated[
    int | None,
    typer.Option(
        "--stop-after-failures",
        min=1,
        metavar="N",
        help="Stop when N items in a row did not succeed.",
        show_default="never",
    ),
]
SameServer = Annotated[
    bool,
    typer.Option(
        "--same-server",
        help="Go on with a batch of another address or API key: they are those of the same server"
        " and workspace.",
    ),
]
BatchOutage = Annotated[
    float,
    seconds(
        "Maximum time to keep retrying while the server is unreachable or failing; longer than for"
        " other commands, as nobody watches a batch at night."
    ),
]


def dbos() -> ModuleType:
    try:
        from promptlayer_exec import dbos  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise Misuse(f"batches need {install_hint('cli', 'dbos')}") from error
    return dbos


async def working_batch(
    name: str, session: Callable[[], Session], *, rate: float | None, **settings: Any
) -> Batch:
    """Return a batch to work on, with the command's default for a rate that nobody has set."""
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
    """Return the name of an existing batch, of the only one for None, and the batch."""
    chosen = choose(name, await names(database))
    session = partial(Session, base_url=base_url)
    return chosen, dbos().Batch(chosen, database_url=database, session=session, **options)


def choose(name: str | None, found: list[str]) -> str:
    """Return the name of a batch that exists."""
    if name is None and len(found) == 1:
        return found[0]
    if name in found:
        return name
    known = ", ".join(map(printable, found))
    what = "give --name" if name is None else f"there is no batch '{printable(name)}'"
    raise Misuse(f"{what}; batches in the database: {known}")


async def names(database: str | None, *, needed: bool = True) -> list[str]:
    """Return the names of the batches in a database; say if there are none."""
    found: list[str] = await dbos().batch_names(database)
    if not found:
        what = f"there is no batch in {shown_database(database)}"
        if needed:
            raise Misuse(what)
        err(what)
    return found


async def wait_for_batch(name: str | None, database: str | None) -> str:
    """Return the name of a batch as soon as it exists; the only one for None."""
    for attempt in count():
        found = await dbos().batch_names(database)
        if name in found or (name is None and found):
            break
        if not attempt:
            what = "a batch" if name is None else f"batch '{printable(name)}'"
            others = f", which has {', '.join(map(printable, found))}" if found else ""
            err(f"waiting for {what} in {shown_database(database)}{others}")
        await asyncio.sleep(_WAIT_INTERVAL)
    return choose(name, found)


def shown_database(database: str | None) -> str:
    """Return the URL of the database, without its password."""
    return printable(dbos().shown_database_url(database))


async def command_options(name: str | None, chosen: str, database: str | None) -> str:
    """Return the options that another command needs to find a batch; `name` was given for it."""
    is_only = name is None and len(await names(database)) == 1
    options = "" if is_only else f" --name {shlex.quote(chosen)}"
    if database and database != os.environ.get("PROMPTLAYER_EXEC_DB"):
        options += f" --db {shlex.quote(shown_database(database))}"
    return printable(options)


def status_line(name: str, status: BatchStatus) -> str:
    open_parts = [f"{status.waiting} waiting", f"{status.running} running"]
    parts = [f"{status.succeeded} succeeded", f"{status.failed} failed"]
    parts.append(f"{status.unknown} unknown")
    shown = parts if status.finished == status.total else open_parts + parts
    return f"batch {printable(name)}: {item_count(status.total)}: {', '.join(shown)}"


def item_count(count: int) -> str:
    """Return `1 item`, `2 items` and so on."""
    return f"{count} item" if count == 1 else f"{count} items"


def hint_lines(status: BatchStatus, options: str) -> list[str]:
    """Return a line for each kind of items without an output: the commands that go on with them."""
    lines = []
    if status.finished < status.total and not status.workers:
        lines.append(
            f"nobody works on the items that wait or are running: `batch work{options}`, or the"
            " same `batch run` again, goes on"
        )
    if status.failed:
        lines.append(
            f"failed: `batch retry --failed{options}` starts those again whose run failed or did"
            f" not start; `batch recheck{options}` asks again how runs ended, and starts nothing"
        )
    if status.unknown:
        lines.append(
            "unknown: these runs may have started and be billed: look in PromptLayer, then start"
            f" them again with `batch retry --unknown{options}`, or leave them"
        )
    return lines
