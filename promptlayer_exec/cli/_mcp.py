"""The command `mcp`: workflows as tools for agents."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from promptlayer_exec import RetryPolicy
from promptlayer_exec._integration import install_hint
from promptlayer_exec.cli._arguments import BaseUrl, Outage, Push
from promptlayer_exec.cli._definitions import complete_workflow
from promptlayer_exec.cli._exit import ExitCode, Misuse, Subject, run_command
from promptlayer_exec.cli._session import open_session
from promptlayer_exec.cli._stdio import err
from promptlayer_exec.cli._text import printable

# A start, and any other single request, ends before the client gives up, often after 60 s.
_REQUEST_TIME = 45.0
# A client waits about two seconds for the process to end, and then kills it.
_CLOSE_TIME = 0.5


def mcp(
    workflows: Annotated[
        list[str],
        typer.Option(
            "--workflow",
            metavar="NAME",
            help="Workflow that can be started, and no other; repeatable.",
            autocompletion=complete_workflow,
        ),
    ] = [],  # noqa: B006 - Typer's way to declare a list
    *,
    push: Push = False,
    base_url: BaseUrl = None,
    outage: Outage = 10,
) -> None:
    """Serve workflows to agents as tools of an MCP server.

    MCP is the Model Context Protocol; the command needs the extra `mcp`. An MCP client starts it,
    and speaks with it over standard input and output. The tools list, describe and start workflows,
    wait for executions with progress, and read them.

    With --workflow, only the named workflows can be started, and each has a tool of its own with
    its required inputs as arguments, which starts a run and waits for its output.

    The command ends when standard input is closed. Executions that were running then go on; their
    ids are written to standard error.
    """
    if not all(workflows):
        raise typer.BadParameter("must not be empty", param_hint="'--workflow'")

    is_served = False

    async def work() -> ExitCode:
        nonlocal is_served
        try:
            from promptlayer_exec.mcp import serve_stdio  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            raise Misuse(f"the MCP server needs an extra: {install_hint('mcp')}") from error
        logging.getLogger("promptlayer_exec").addHandler(_ToStandardError())
        session = open_session(
            base_url, RetryPolicy(outage=outage), wait_timeout=_REQUEST_TIME, push=push
        )
        if sys.stdin.isatty():
            err("this is a server for MCP clients, which start it themselves; Ctrl-C ends it")
        is_served = True
        try:
            await serve_stdio(session, workflows=workflows)
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIME):
                    await session.aclose()
        return ExitCode.SUCCEEDED

    code = run_command(work(), Subject(base_url=base_url))
    if is_served:
        _exit(code)
    raise typer.Exit(code)


def _exit(code: ExitCode) -> NoReturn:
    """Exit without freeing every object first, which takes longer than all of the above."""
    atexit._run_exitfuncs()  # exporters of traces and metrics have theirs there
    os._exit(code)


class _ToStandardError(logging.Handler):
    """Writes warnings as lines; standard output is the protocol's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        err(printable(record.getMessage()))
