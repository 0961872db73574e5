"""The options that several `batch` commands have."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from promptlayer_exec.cli._options import seconds


def name_option(default: str) -> Any:
    return typer.Option(metavar="NAME", help="Name of the batch.", show_default=default)


OnlyBatch = Annotated[str | None, name_option("the only batch")]
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
Attempts = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        min=1,
        help="Maximum number of runs of an item, each of them billed: a run that completes without"
        " an output is followed by another one. Stored with the batch.",
        show_default="as stored, at first 1",
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
