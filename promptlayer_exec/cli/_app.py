"""The program and its commands."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Annotated

import typer

from promptlayer_exec.cli._batch import batch_app
from promptlayer_exec.cli._executions import demo, results, run, watch
from promptlayer_exec.cli._exit import PROGRAM, help_epilog, report_crash
from promptlayer_exec.cli._servers import simulate, view
from promptlayer_exec.cli._stdio import guard_streams

app = typer.Typer(
    name=PROGRAM,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(epilog=help_epilog())
def _program(
    trust_env: Annotated[
        bool,
        typer.Option(
            "--trust-env",
            help="Use the proxies of HTTP_PROXY, HTTPS_PROXY and NO_PROXY, and .netrc.",
            show_default="$PROMPTLAYER_EXEC_TRUST_ENV",
        ),
    ] = False,
) -> None:
    """Follow PromptLayer workflow executions, node by node.

    The API key is read from the environment variable PROMPTLAYER_API_KEY only: every user of the
    machine can see the arguments of a command. To see how it works, try `demo`.
    """
    if trust_env:
        os.environ["PROMPTLAYER_EXEC_TRUST_ENV"] = "1"
    # The commands report outages in their own words.
    logging.getLogger("promptlayer_exec").addHandler(logging.NullHandler())


app.command("demo")(demo)
app.command("run", epilog=help_epilog())(run)
app.command("watch", epilog=help_epilog())(watch)
app.command("results", epilog=help_epilog())(results)
app.command("view")(view)
app.command("simulate")(simulate)
app.add_typer(batch_app, name="batch")


def main() -> None:
    """Run the command line, and exit."""
    guard_streams()
    try:
        app(prog_name=PROGRAM)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the last resort
        sys.exit(report_crash(error))
