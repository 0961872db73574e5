"""Options that several commands have."""

import math
from typing import Annotated

import typer


def seconds(value: float) -> float:
    """Return an option's value, a number of seconds.

    Raises:
        typer.BadParameter: it is none.
    """
    if not 0 <= value < math.inf:
        raise typer.BadParameter("it is a number of seconds, at least 0")
    return value


BaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The server; else PROMPTLAYER_BASE_URL, else https://api.promptlayer.com.",
        show_default=False,
    ),
]
Outage = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        callback=seconds,
        help="For how long a server that is unreachable, or in trouble, is asked again.",
    ),
]
