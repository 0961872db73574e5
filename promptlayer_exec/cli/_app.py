"""The program and its commands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

import typer

from promptlayer_exec import __version__
from promptlayer_exec._ways_out import PROGRAM
from promptlayer_exec.cli._batch_commands import batch_app
from promptlayer_exec.cli._doctor_command import doctor
from promptlayer_exec.cli._exit import report_crash
from promptlayer_exec.cli._help import Program, help_epilog, show_help
from promptlayer_exec.cli._printing import out, prepare_streams
from promptlayer_exec.cli._run_commands import demo, results, run, watch
from promptlayer_exec.cli._server_commands import mcp, simulate, view
from promptlayer_exec.cli._starts_commands import starts_app
from promptlayer_exec.cli._workflow_commands import workflow, workflows

app = Program(name=PROGRAM, context_settings={"help_option_names": ["-h", "--help"]})


def _print_version(value: bool) -> None:
    if value:
        out(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(epilog=f"Exit codes, environment variables and more: `{PROGRAM} help`")
def _program(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Run PromptLayer workflows, and follow them node by node.

    Set the environment variable PROMPTLAYER_API_KEY to your API key. To try it without a key, use
    `demo`.
    """
    # The commands print outages themselves.
    logging.getLogger("promptlayer_exec").addHandler(logging.NullHandler())


app.command("demo")(demo)
app.command(
    "run",
    context_settings={"allow_extra_args": True},  # to explain how to give inputs
    epilog=help_epilog(
        "run support-agent -i letter@letter.txt --label prod",
        "run support-agent -i @inputs.json --json | jq .progress",
    ),
)(run)
app.command("watch", epilog=help_epilog("watch 787"))(watch)
app.command("results", epilog=help_epilog("results 787 > report.md"))(results)
app.command("workflows", epilog=help_epilog("workflows --json | jq .name"))(workflows)
app.command("workflow", epilog=help_epilog("workflow support-agent --label prod"))(workflow)
app.command(
    "doctor", epilog=help_epilog("doctor", "doctor --workflow support-agent -i letter@letter.txt")
)(doctor)
app.command("view", epilog=help_epilog("view 787"))(view)
app.command("mcp", epilog=help_epilog("mcp --workflow support-agent"))(mcp)
app.command("simulate")(simulate)
app.add_typer(batch_app, name="batch")
app.add_typer(starts_app, name="starts")
app.command("help")(show_help)


@cache
def _commands() -> Callable[..., Any]:
    """Return the commands; a process that calls `main` often reads their signatures once."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line, and exit."""
    prepare_streams()
    try:
        _commands()(prog_name=PROGRAM)
    except Exception as error:  # noqa: BLE001 - the last resort
        sys.exit(report_crash(error))
