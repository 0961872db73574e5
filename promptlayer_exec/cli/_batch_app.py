"""The `batch` commands and their options."""

import math
from pathlib import Path
from typing import Annotated

import typer

from ._batch import Settings, run_batch, show_status, work_on_batch
from ._ending import Subject, conclude
from ._options import BaseUrl, Outage

_DATABASE = "sqlite:///promptlayer-batches.sqlite"
_EXIT_CODES = """\b
Exit codes:
  0    every item succeeded
  1    some failed, or are unknown
  2    the command was used wrongly, or the API key is missing
  4    the API refused, or could not be reached: items wait
  70   an error in this program
  74   standard output could not be written to
  130  interrupted
  141  standard output was closed
  143  terminated"""

batch_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Run many executions that survive a crash."
)


def _positive(value: float) -> float:
    if not 0 < value < math.inf:
        raise typer.BadParameter("it is a number, more than 0")
    return value


_Database = Annotated[
    str,
    typer.Option(
        "--db",
        metavar="URL",
        envvar="PROMPTLAYER_EXEC_DB",
        help="sqlite:///FILE, or postgresql://... for several machines.",
    ),
]
_Name = Annotated[
    str | None, typer.Option(metavar="NAME", help="The batch; by default the only one there is.")
]
_MaxInFlight = Annotated[
    int, typer.Option(min=1, help="How many items are under way at most, over all workers.")
]
_Rate = Annotated[
    float,
    typer.Option(
        metavar="PER_SECOND",
        callback=_positive,
        help="How many requests are sent at most, over all workers; 100 each at most.",
    ),
]
_RestartUnknown = Annotated[
    bool,
    typer.Option(
        "--restart-unknown",
        help="Start those again of which nobody knows if they were started: you may pay twice.",
    ),
]

_RUN = """Run the items of FILE, each once, and write how each ended.

A line of FILE is one item:

\b
  {"key": "a", "inputs": {"topic": "otters"}}

It may have a "workflow", "label" or "version", and "metadata" of its own. Without a key, its key is
the line's number. Lines that are wrong are told before anything starts.

A line of the results is one item that has ended, in that order, with these fields: key,
execution_id, succeeded, output, error ({"type": ..., "message": ...} or null), started, finished
(UTC).

Whatever happens, give the same command again: it goes on where it was. What was started is watched
again, never started again. Of what was being started just when a process was killed nobody knows;
such items end as unknown, with the error StartUnknown. Others can help: see `batch work`. The key
is taken from PROMPTLAYER_API_KEY alone."""


@batch_app.command("run", help=_RUN, epilog=_EXIT_CODES)
def _run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON Lines, one item each.")],
    *,
    workflow: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The workflow's name or id, where a line has none."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Where the results go; it is continued. Else standard output, with all of them.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The batch; by default FILE's name.")
    ] = None,
    database: _Database = _DATABASE,
    max_in_flight: _MaxInFlight = 100,
    rate: _Rate = 100,
    restart_unknown: _RestartUnknown = False,
    base_url: BaseUrl = None,
    outage: Outage = 600,
) -> None:
    settings = Settings(database, base_url, max_in_flight, rate, outage, restart_unknown)
    subject = Subject()
    work = run_batch(name or file.stem, file, workflow, results, settings=settings, subject=subject)
    raise typer.Exit(conclude(work, subject))


_WORK = """Work on a batch beside the processes that do already, until all of it is done.

It may be on another machine, with the same PostgreSQL database. A worker that dies is noticed
within 30 seconds, and its items go on elsewhere."""


@batch_app.command("work", help=_WORK, epilog=_EXIT_CODES)
def _work(
    name: _Name = None,
    database: _Database = _DATABASE,
    max_in_flight: _MaxInFlight = 100,
    rate: _Rate = 100,
    *,
    restart_unknown: _RestartUnknown = False,
    base_url: BaseUrl = None,
    outage: Outage = 600,
) -> None:
    settings = Settings(database, base_url, max_in_flight, rate, outage, restart_unknown)
    subject = Subject()
    raise typer.Exit(conclude(work_on_batch(name, settings, subject), subject))


@batch_app.command("status", help="Print how far the batches of a database are.")
def _status(
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The batch; by default all of them.")
    ] = None,
    database: _Database = _DATABASE,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON Lines.")] = False,
) -> None:
    raise typer.Exit(conclude(show_status(name, database, as_json=as_json), Subject()))
