"""The options that the `batch` commands share, and the batch that they name."""

from __future__ import annotations

import asyncio
import math
import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer

from promptlayer_exec import Session
from promptlayer_exec._integration import install_hint, printable
from promptlayer_exec.cli._arguments import seconds
from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._text import err

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch

_SQLITE = "sqlite:///"
_DEFAULT_RATE = 100.0
_WAIT_INTERVAL = 1.0


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter("must be a number greater than 0")
    return value


def name_option(default: str) -> Any:
    """Return the option for the name of a batch."""
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
        callback=_positive,
        help="Maximum requests per second, over all workers; stored with the batch. One worker"
        " sends at most 100.",
        show_default="as stored, at first 100",
    ),
]
RestartUnknown = Annotated[
    bool,
    typer.Option(
        "--restart-unknown",
        help="Start unknown items again, at the risk of paying for them twice.",
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
    """Return the package of batches, which is an extra."""
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
    batch: Batch = dbos().Batch(name, session=session, rate=rate, **settings)
    await batch.check_server()
    if rate is None and (await batch.settings()).rate is None:
        batch = dbos().Batch(name, session=session, rate=_DEFAULT_RATE, **settings)
    return batch


async def chosen_batch(
    name: str | None, database: str | None, base_url: str | None = None, **options: Any
) -> tuple[str, Batch]:
    """Return the batch of that name, or the only one, with its name; its session stays closed."""
    chosen = choose(name, await names(database))
    session = partial(Session, base_url=base_url)
    return chosen, dbos().Batch(chosen, database_url=database, session=session, **options)


def shown_database(database: str | None) -> str:
    """Return the URL of the database, without its password."""
    return printable(dbos().shown_database_url(database))


def command_options(name: str | None, chosen: str, found: list[str], database: str | None) -> str:
    """Return the options with which another command finds a batch, and which it needs for that.

    `name` is the one that was given, and `found` are the batches in the database.
    """
    options = "" if name is None and len(found) == 1 else f" --name {shlex.quote(chosen)}"
    if database and database != os.environ.get("PROMPTLAYER_EXEC_DB"):
        options += f" --db {shlex.quote(shown_database(database))}"
    return printable(options)


async def names(database: str | None) -> list[str]:
    """Return the names of the batches in a database, which has to exist."""
    if not await _exists(database):
        where = shown_database(database)
        raise Misuse(f"there is no batch, because there is no database {where}")
    found: list[str] = await dbos().batch_names(database)
    return found


async def wait_for_batch(name: str | None, database: str | None) -> str:
    """Return the name of a batch as soon as it exists; the only one for None."""
    for attempt in count():
        found = await dbos().batch_names(database) if await _exists(database) else []
        if name in found or (name is None and found):
            break
        if not attempt:
            known = f"; there are {', '.join(map(printable, found))}" if found else ""
            what = "a batch" if name is None else f"batch '{printable(name)}'"
            err(f"waiting for {what} in {shown_database(database)}{known}")
        await asyncio.sleep(_WAIT_INTERVAL)
    return choose(name, found)


async def _exists(database: str | None) -> bool:
    """Return False for a file that does not exist: opening it would create it."""
    url: str = dbos().shown_database_url(database)
    path = url.removeprefix(_SQLITE)
    with suppress(OSError):  # opening it says why
        return path == url or await anyio.Path(path).exists()
    return True


def choose(name: str | None, found: list[str]) -> str:
    """Return the name of a batch that exists."""
    if name is None and len(found) == 1:
        return found[0]
    if name in found:
        return name
    known = ", ".join(map(printable, found)) or "none"
    what = "give --name" if name is None else f"there is no batch '{printable(name)}'"
    raise Misuse(f"{what}; batches in the database: {known}")
