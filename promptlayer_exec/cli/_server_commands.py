"""The commands that serve: the page of `view`, `simulate`, and `mcp` for agents."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import socket
import sys
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from anyio import create_task_group, move_on_after

from promptlayer_exec import StartStore
from promptlayer_exec._integration import base_url as session_base_url
from promptlayer_exec._integration import install_hint
from promptlayer_exec.cli import _options as options
from promptlayer_exec.cli._exit import Misuse, Subject, command, listening, run_command
from promptlayer_exec.cli._printing import err, out, show_warnings

TOKEN = "PROMPTLAYER_EXEC_VIEW_TOKEN"  # noqa: S105 - the name of a variable
MCP_TOKEN = "PROMPTLAYER_EXEC_MCP_TOKEN"  # noqa: S105 - the name of a variable
_HTTP = "With --http"


@command
async def view(
    execution_ids: Annotated[
        list[int] | None,
        typer.Argument(metavar="ID", parser=options.parse_id, help="Ids of executions to show."),
    ] = None,
    *,
    host: options.Host = "127.0.0.1",
    port: options.Port = 0,
    is_demo: Annotated[
        bool, typer.Option("--demo", help="Show simulated executions, without a key.")
    ] = False,
    has_history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history",
            help="Remember executions on this machine.",
            show_default="history",
        ),
    ] = True,
    base_url: options.BaseUrl = None,
    outage: options.Outage = None,
) -> None:
    """Show executions in your browser while they run.

    The command prints the URL of a page on this machine, and serves it until you press Ctrl-C. The
    page shows the executions of ID. You can add others by id, and start new ones.

    Whoever has the URL can do what your API key can do: it contains a token, new each time. To keep
    the URL, set PROMPTLAYER_EXEC_VIEW_TOKEN to your own token, and use --port.

    A file that only you can read stores the latest 2000 executions, with the inputs of those you
    started on the page. With --no-history, the file is neither read nor written.
    """
    if is_demo and (execution_ids or base_url is not None):
        raise Misuse("cannot combine --demo with ID or --base-url")

    try:
        import platformdirs  # noqa: PLC0415 - an extra

        from promptlayer_exec.viewer import Address, Board, History, listen, serve  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise Misuse(f"the viewer needs {install_hint('viewer')}") from error

    board: Board  # made once the session is open
    token = _token(TOKEN) or secrets.token_urlsafe(32)
    show_warnings(err)

    async with AsyncExitStack() as stack:
        if is_demo:
            from promptlayer_exec.cli import _demo as demo  # noqa: PLC0415 - slow to import

            simulator = await stack.enter_async_context(demo.simulator_with_workflows())
            session = options.demo_session(simulator, err)
            directory = Path(stack.enter_context(TemporaryDirectory()))
        else:
            directory = platformdirs.user_state_path("promptlayer-exec", appauthor=False)
            # The page shows an error early, and a person can try again.
            session = options.open_session(
                base_url,
                outage,
                longest_retry=10.0,
                observer=lambda event: board.observe(event),  # noqa: PLW0108 - made below
            )
        await stack.enter_async_context(session)

        with listening(host, port):
            listener = stack.enter_context(listen(host, port))
        address = Address(host, listener.getsockname()[1])

        history = None
        if has_history:
            history = History(directory / "history.sqlite", server=session_base_url(session))
            if is_demo:
                demo.add_past_runs(simulator, history, time.time())
        board = Board(session, note=demo.NOTE if is_demo else "", history=history)
        await stack.enter_async_context(board)
        for execution_id in execution_ids or ():
            board.follow(execution_id)

        url = f"{address.base_url}/#token={token}"
        _print_url(url, is_loopback=address.is_loopback)

        # People stop it with Ctrl-C.
        with suppress(asyncio.CancelledError):
            async with create_task_group() as tasks:
                if is_demo:
                    tasks.start_soon(demo.start_runs, board)
                await serve(board, listener, address, token)


def _token(variable: str) -> str | None:
    """Return the token from the environment, which survives a restart."""
    token = os.environ.get(variable)
    if not token:
        return None
    if not re.fullmatch(r"[\w-]{22,}", token, re.ASCII):
        raise Misuse(f"{variable} is too weak: use at least 22 random letters, digits, - or _")
    return token


def _print_url(url: str, *, is_loopback: bool) -> None:
    if not is_loopback:
        err(
            "warning: other machines can reach this page over plain http: anyone who reads the"
            " traffic gets its token, and with it access to your executions"
        )
    err("Open this page, and keep its URL to yourself (Ctrl-C stops the server):")
    out(url)


@command
async def simulate(
    host: options.Host = "127.0.0.1",
    port: options.Port = 8787,
    webhook_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where to post a signed webhook when a run finishes."),
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="FILE",
            help="Respond as in a recording of `doctor --record`, or in another HAR file.",
        ),
    ] = None,
) -> None:
    """Serve a simulated PromptLayer for trying things out.

    It prints the two variables to set, some executions, its workflows, and then every request,
    until you press Ctrl-C. The workflows include those of the README and the tutorial.
    """
    from promptlayer_exec.cli._demo import serve  # noqa: PLC0415 - slow to import

    await serve(host, port, webhook_url, recording)


def mcp(
    workflows: Annotated[
        list[str],
        typer.Option(
            "--workflow",
            metavar="NAME",
            help="Workflow that agents may start. Repeatable.",
            show_default="all",
        ),
    ] = [],  # noqa: B006 - Typer's way to declare a list
    *,
    is_http: Annotated[
        bool,
        typer.Option(
            "--http", help="Serve a team over HTTP, not one client.", rich_help_panel=_HTTP
        ),
    ] = False,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Address to listen on.", rich_help_panel=_HTTP),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            metavar="PORT",
            min=0,
            max=65535,
            help="Port to listen on, 0 for a free one.",
            rich_help_panel=_HTTP,
        ),
    ] = 8788,
    allowed_hosts: Annotated[
        list[str],
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="Host in the URL that clients use, such as mcp.example.com. Repeatable.",
            rich_help_panel=_HTTP,
        ),
    ] = [],  # noqa: B006 - Typer's way to declare a list
    database: options.Database = None,
    no_push: options.NoPush = False,
    base_url: options.BaseUrl = None,
    outage: Annotated[
        float,
        options.seconds(
            "How long to retry failing requests. MCP clients wait about a minute.",
            heading=options.CONNECTION,
        ),
    ] = 10,
) -> None:
    """Serve workflows as tools for agents, over MCP.

    MCP is the Model Context Protocol; this needs the extra `mcp`. An MCP client starts the command
    and talks to it over standard input and output. The tools list, describe and start workflows,
    and follow executions. With --workflow, agents can start only these, each by its own tool.

    With the extra `starts`, an agent can pass an idempotency_key, so that a repeated call does not
    start a second run. --db stores the keys.

    The command exits when its standard input is closed. Runs continue on PromptLayer; their ids go
    to standard error.

    With --http and --workflow, a team shares one server by its URL, and nobody else needs the API
    key. Clients send `Authorization: Bearer TOKEN` with the token in PROMPTLAYER_EXEC_MCP_TOKEN.
    The server listens on this machine, without TLS: for other machines, put a proxy such as Caddy
    in front, and give its host with --allow-host.
    """

    async def work() -> None:
        if not all(workflows):
            raise Misuse("--workflow must not be empty")

        token = None
        if is_http:
            token = _team_token(workflows)
        elif (host, port, allowed_hosts) != ("127.0.0.1", 8788, []):
            raise Misuse("--host, --port and --allow-host need --http")

        try:
            from promptlayer_exec.mcp import serve_http, serve_stdio  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            raise Misuse(f"the MCP server needs {install_hint('mcp')}") from error

        show_warnings(err)
        # Clients often give up after 60 s. Starting a run and every single request give up earlier.
        session = options.open_session(
            base_url, outage, wait_timeout=45.0, no_push=no_push, starts=_start_store(database)
        )

        try:
            if token is None:
                if sys.stdin.isatty():
                    err(
                        "this server is for MCP clients, which start it themselves."
                        " Press Ctrl-C to stop it"
                    )
                await serve_stdio(session, workflows=workflows)
                return

            listener, name = _listen_for_agents(host, port)
            names = [name, *allowed_hosts]
            # The SDK warns of each call that it can no longer respond to.
            logging.getLogger("mcp.shared").setLevel(logging.ERROR)
            # People stop it with Ctrl-C.
            with suppress(asyncio.CancelledError):
                await serve_http(session, listener, token=token, workflows=workflows, hosts=names)
        finally:
            # A client waits about two seconds for the process to exit, and then kills it.
            with move_on_after(0.5):
                await session.aclose()

    code = run_command(work(), Subject())
    if code > 128:  # after a signal, a thread still waits for a line of standard input
        os._exit(code)
    raise typer.Exit(code)


def _team_token(workflows: list[str]) -> str:
    """Return the token for a team's server, which must have a list of workflows."""
    if not workflows:
        raise Misuse("--http needs --workflow: list each workflow that clients may start")

    token = _token(MCP_TOKEN)
    if token is None:
        raise Misuse(
            f"--http needs a token for the clients: set {MCP_TOKEN} to at least 22 random"
            " characters, such as those of `openssl rand -hex 32`"
        )
    return token


def _listen_for_agents(host: str, port: int) -> tuple[socket.socket, str]:
    """Return a listening socket, and the host in its URL, and print the URL."""
    with listening(host, port):
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)

    wildcards = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - to recognise them
    name = wildcards.get(host, host.lower())
    if ":" in name:
        name = f"[{name}]"

    if host.lower() not in ("127.0.0.1", "localhost", "::1"):
        err(
            "warning: other machines can reach this server over plain http, and anyone who reads"
            " the traffic gets the token: let only a proxy with TLS reach it"
        )
    err("Agents reach this MCP server, with the token, at (Ctrl-C stops it):")
    out(f"http://{name}:{listener.getsockname()[1]}/mcp")
    return listener, name


def _start_store(database: str | None) -> StartStore | None:
    """Return the start store, or None if its extra is missing and the user named no database."""
    try:
        return options.start_store(database, "--db")
    except Misuse:
        # A variable in the environment may be meant for batches.
        if database not in (None, os.environ.get("PROMPTLAYER_EXEC_DB")):
            raise
        return None
