"""The command `view`: a page in the browser."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Annotated

import anyio
import typer

from promptlayer_exec import RetryPolicy
from promptlayer_exec.cli._arguments import MAX_ID, BaseUrl, Host, Outage, Port, listen_failure
from promptlayer_exec.cli._exit import PROGRAM, ExitCode, Misuse, Subject, run_command
from promptlayer_exec.cli._session import demo_session, open_session
from promptlayer_exec.cli._stdio import err, out
from promptlayer_exec.cli._workflows import DEMO_NOTE, DEMO_WORKFLOWS
from promptlayer_exec.simulator import Simulator

if TYPE_CHECKING:
    from promptlayer_exec.viewer import Board

TOKEN = "PROMPTLAYER_EXEC_VIEW_TOKEN"  # noqa: S105 - the name of a variable


def view(
    execution_ids: Annotated[
        list[int] | None,
        typer.Argument(metavar="ID", min=1, max=MAX_ID, help="Ids of the executions."),
    ] = None,
    *,
    host: Host = "127.0.0.1",
    port: Port = 0,
    is_demo: Annotated[bool, typer.Option("--demo", help="Show simulated executions.")] = False,
    base_url: BaseUrl = None,
    outage: Outage = 600,
) -> None:
    """Show executions in the browser, as they run.

    The command prints the URL of a page on this machine, and serves the page until Ctrl-C, with
    exit code 0. The page follows the executions of ID, and others that are added to it by id or
    started on it. With --demo, it shows simulated executions, and needs no key and no network.

    The page can do what your key can do, so its URL contains a token, new at each start. For a page
    that survives a restart, set PROMPTLAYER_EXEC_VIEW_TOKEN to a token of your own, and use --port.

    The API key is read from PROMPTLAYER_API_KEY only.
    """
    if is_demo and (execution_ids or base_url is not None):
        raise typer.BadParameter("cannot be combined with ID or --base-url", param_hint="'--demo'")

    async def work() -> ExitCode:
        try:
            from promptlayer_exec.viewer import Address, Board, listen, serve  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            what = "the viewer needs an extra: pip install 'promptlayer-exec[viewer]'"
            raise Misuse(what) from error
        token = _token()
        async with AsyncExitStack() as stack:
            if is_demo:
                simulator = await stack.enter_async_context(Simulator(log_requests=False))
                for workflow, (scenario, _) in DEMO_WORKFLOWS.items():
                    simulator.add_workflow(workflow, scenario)
                session = demo_session(simulator, err)
            else:
                retry = RetryPolicy(outage=min(outage, 10.0), watch_outage=outage)
                session = open_session(base_url, retry, err)
            await stack.enter_async_context(session)
            try:
                listener = stack.enter_context(listen(host, port))
            except (OSError, UnicodeError) as error:
                hint = f"; `{PROGRAM} view --port 0` takes a free port" if port else ""
                raise Misuse(listen_failure(host, port, error) + hint) from None
            address = Address(host, listener.getsockname()[1])
            board = Board(session, note=DEMO_NOTE if is_demo else "")
            await stack.enter_async_context(board)
            for execution_id in execution_ids or ():
                board.follow(execution_id)
            _print_url(f"{address.base_url}/#token={token}", is_loopback=address.is_loopback)
            with suppress(asyncio.CancelledError):
                async with anyio.create_task_group() as tasks:
                    if is_demo:
                        tasks.start_soon(_start_demo_runs, board)
                    await serve(board, listener, address, token)
        return ExitCode.SUCCEEDED

    raise typer.Exit(run_command(work(), Subject()))


def _token() -> str:
    """Return the token of the environment, which survives a restart, or a new one."""
    token = os.environ.get(TOKEN)
    if not token:
        return secrets.token_urlsafe(32)
    if not re.fullmatch(r"[\w-]{22,}", token, re.ASCII):
        raise Misuse(f"{TOKEN} is too weak: use at least 22 random letters, digits, - or _")
    return token


async def _start_demo_runs(board: Board) -> None:
    """Start the runs of the demonstration once a page is open."""
    await board.opened.wait()
    for workflow, (_, inputs) in DEMO_WORKFLOWS.items():
        await board.start(workflow, inputs)


def _print_url(url: str, *, is_loopback: bool) -> None:
    if not is_loopback:
        err(
            "warning: other machines can reach this page over plain http: anyone who reads the"
            " traffic gets its token, and with it your key's executions"
        )
    err("Open this page, which is for you alone (Ctrl-C ends it):")
    out(url)
