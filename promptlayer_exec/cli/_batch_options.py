"""The options that several `batch` commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from promptlayer_exec.cli._options import CONNECTION, STORAGE, seconds
from promptlayer_exec.cli._printing import quoted

_LIMITS = "Limits, for all workers together"


def name_option(default: str) -> Any:
    return typer.Option(
        metavar="NAME",
        help="Name of the batch.",
        show_default=default,
        rich_help_panel=STORAGE,
    )


def _parse_count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise typer.BadParameter(f"must be a whole number, got {quoted(text, 40)}")
    if int(text) < 1:
        raise typer.BadParameter("must be at least 1")
    return int(text)


def _parse_rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a number, got {quoted(text, 40)}") from None


OnlyBatch = Annotated[str | None, name_option("the only batch")]
MaxInFlight = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        parser=_parse_count,
        help="Maximum number of items in progress.",
        show_default="as stored, or 100",
        rich_help_panel=_LIMITS,
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        metavar="PER_SECOND",
        parser=_parse_rate,
        help="Maximum requests per second. One worker sends at most 100.",
        show_default="as stored, or 100",
        rich_help_panel=_LIMITS,
    ),
]
Attempts = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        parser=_parse_count,
        help="Maximum number of runs for an item, each of them billed: another one starts when one"
        " finishes without an output.",
        show_default="as stored, or 1",
        rich_help_panel=_LIMITS,
    ),
]
GiveUpAfter = Annotated[
    float | None,
    seconds(
        "How long to follow a run before its item fails, such as 1h, or inf.",
        default="as stored, or 1d",
        heading=_LIMITS,
    ),
]
StopAfterFailures = Annotated[
    int | None,
    typer.Option(
        "--stop-after-failures",
        parser=_parse_count,
        metavar="N",
        help="Stop after N items in a row that did not succeed.",
        show_default="never",
        rich_help_panel=_LIMITS,
    ),
]
SameServer = Annotated[
    bool,
    typer.Option(
        "--same-server",
        help="Continue a batch although the server's address or the API key changed, if the"
        " workspace is the same.",
        rich_help_panel=CONNECTION,
    ),
]
BatchOutage = Annotated[
    float,
    seconds("How long to retry failing requests.", heading=CONNECTION),
]
