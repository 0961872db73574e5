"""The commands that serve: `view` a page, `simulate` a PromptLayer, and `mcp` tools for agents."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, NoReturn

import anyio
import typer

from promptlayer_exec import RetryPolicy
from promptlayer_exec._integration import base_url as session_base_url
from promptlayer_exec._integration import install_hint
from promptlayer_exec.cli._arguments import BaseUrl, Host, Outage, Port, Push, parse_id
from promptlayer_exec.cli._browser import open_in_browser
from promptlayer_exec.cli._definitions import complete_workflow
from promptlayer_exec.cli._exit import PROGRAM, ExitCode, Misuse, Subject, run_command
from promptlayer_exec.cli._session import demo_session, open_session
from promptlayer_exec.cli._stdio import err, out
from promptlayer_exec.cli._text import printable
from promptlayer_exec.cli._workflows import (
    DEMO_NOTE,
    DEMO_WORKFLOWS,
    add_demo_workflows,
    add_past_runs,
    support_agent,
)
from promptlayer_exec.simulator import Scenario, SimNode, SimRequest, Simulator

if TYPE_CHECKING:
    from promptlayer_exec.viewer import Board

TOKEN = "PROMPTLAYER_EXEC_VIEW_TOKEN"  # noqa: S105 - the name of a variable
_HELD = "read letter"
_WORKFLOW = "support-agent"
# A start, and any other single request, ends before the client gives up, often after 60 s.
_REQUEST_TIME = 45.0
# A client waits about two seconds for the process to end, and then kills it.
_CLOSE_TIME = 0.5


def view(
    execution_ids: Annotated[
        list[int] | None,
        typer.Argument(metavar="ID", parser=parse_id, help="Ids of the executions."),
    ] = None,
    *,
    host: Host = "127.0.0.1",
    port: Port = 0,
    is_demo: Annotated[bool, typer.Option("--demo", help="Show simulated executions.")] = False,
    is_opened: Annotated[
        bool, typer.Option("--open", help="Open the page in your browser, too.")
    ] = False,
    has_history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history", help="Remember executions for later visits, on this machine."
        ),
    ] = True,
    base_url: BaseUrl = None,
    outage: Outage = 600,
) -> None:
    """Show executions in the browser, as they run.

    The command prints the URL of a page on this machine, and serves the page until Ctrl-C, with
    exit code 0. The page follows the executions of ID, and others that are added to it by id or
    started on it. With --demo, it shows simulated executions, and needs no key and no network.

    The page can do what your key can do, so its URL contains a token, new at each start. For a page
    that survives a restart, set PROMPTLAYER_EXEC_VIEW_TOKEN to a token of your own, and use --port.

    The latest 2000 executions that were followed or started are remembered, with the inputs of
    those started here, in a file that only you can read. --no-history neither reads nor writes it.
    """
    if is_demo and (execution_ids or base_url is not None):
        raise typer.BadParameter("cannot be combined with ID or --base-url", param_hint="'--demo'")

    async def work() -> ExitCode:
        try:
            import platformdirs  # noqa: PLC0415 - an extra

            from promptlayer_exec.viewer import (  # noqa: PLC0415 - an extra
                Address,
                Board,
                History,
                listen,
                serve,
            )
        except ModuleNotFoundError as error:
            raise Misuse(f"the viewer needs {install_hint('viewer')}") from error
        token = _token()
        async with AsyncExitStack() as stack:
            simulator = None
            if is_demo:
                simulator = await stack.enter_async_context(Simulator(log_requests=False))
                add_demo_workflows(simulator)
                session = demo_session(simulator, err, push=True)
                directory = Path(stack.enter_context(TemporaryDirectory()))
            else:
                directory = platformdirs.user_state_path("promptlayer-exec", appauthor=False)
                retry = RetryPolicy(outage=min(outage, 10.0), watch_outage=outage)
                session = open_session(base_url, retry, err)
            await stack.enter_async_context(session)
            with _listening(host, port):
                listener = stack.enter_context(listen(host, port))
            address = Address(host, listener.getsockname()[1])
            history = None
            if has_history:
                history = History(directory / "history.sqlite", server=session_base_url(session))
                if simulator is not None:
                    add_past_runs(simulator, history, time.time())
            board = Board(session, note=DEMO_NOTE if is_demo else "", history=history)
            await stack.enter_async_context(board)
            for execution_id in execution_ids or ():
                board.follow(execution_id)
            url = f"{address.base_url}/#token={token}"
            _print_url(url, is_loopback=address.is_loopback)
            with suppress(asyncio.CancelledError):
                async with anyio.create_task_group() as tasks:
                    if is_opened:
                        tasks.start_soon(open_in_browser, url, board.opened)
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


def _incomplete(node: SimNode) -> Scenario:
    first = SimNode(_HELD, "Dear all, ...", None)
    return Scenario([first, node, SimNode("final reply", after=[node.name], is_output_node=True)])


_EXECUTIONS = {
    1: ("ten nodes, succeeds after seven seconds", support_agent(reading=None)),
    2: ("a node fails, so there is no reply", support_agent(reading=None, failing=True)),
    3: (
        "a node gets an unknown status: never complete",
        _incomplete(SimNode("approve", None, 1.0, after=[_HELD], status="AWAITING_APPROVAL")),
    ),
    4: (
        "a node never ends: try --timeout 5, or Ctrl-C",
        _incomplete(SimNode("think", None, None, after=[_HELD])),
    ),
}


def simulate(
    host: Host = "127.0.0.1",
    port: Port = 8787,
    webhook_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Post a signed webhook there when a run is complete."),
    ] = None,
) -> None:
    """Serve a simulated PromptLayer.

    Use it to try `run`, `watch`, `results` and your own code. It prints its base URL, its key and
    the ids of some executions, and then every request, until Ctrl-C, with exit code 0.
    """
    raise typer.Exit(run_command(_serve(host, port, webhook_url), Subject()))


async def _serve(host: str, port: int, webhook_url: str | None) -> ExitCode:
    requests: asyncio.Queue[SimRequest] = asyncio.Queue()
    simulator = Simulator(
        host=host,
        port=port,
        log_requests=False,
        on_request=requests.put_nowait,
        webhook_url=webhook_url,
    )
    for execution_id, (_, scenario) in _EXECUTIONS.items():
        simulator.add_execution(scenario, execution_id=execution_id)
    simulator.add_workflow(
        _WORKFLOW, support_agent, definition=support_agent(), inputs={"letter": "string"}
    )
    async with AsyncExitStack() as stack:
        with _listening(host, port):
            await stack.enter_async_context(simulator)
        out(_introduction(simulator))
        with suppress(asyncio.CancelledError):
            await _print_requests(simulator, requests)
    return ExitCode.SUCCEEDED


def _introduction(simulator: Simulator) -> str:
    watch = "\n".join(
        f"  {PROGRAM} watch {execution_id}   # {description}"
        for execution_id, (description, _) in _EXECUTIONS.items()
    )
    return f"""\
A simulated PromptLayer listens at {simulator.base_url} (Ctrl-C ends it).

In another terminal:

  {_set_variable("PROMPTLAYER_BASE_URL", simulator.base_url)}
  {_set_variable("PROMPTLAYER_API_KEY", simulator.api_key)}
{watch}

Each execution begins at its first request. To start another one like the first:

  {PROGRAM} run {_WORKFLOW} -i letter="Where is my refund?"
{_webhooks(simulator)}
Requests:"""


def _set_variable(name: str, value: str) -> str:
    """Return the line that sets an environment variable in the platform's usual shell."""
    return f'$env:{name} = "{value}"' if os.name == "nt" else f"export {name}={value}"


def _webhooks(simulator: Simulator) -> str:
    url, secret = simulator.webhook_url, simulator.webhook_secret
    return "" if url is None else f"\nIts webhook goes to {url}, with the secret {secret}\n"


async def _print_requests(simulator: Simulator, requests: asyncio.Queue[SimRequest]) -> NoReturn:
    waiting = {str(execution_id): execution_id for execution_id in _EXECUTIONS}
    while True:
        request = await requests.get()
        query = "&".join(f"{name}={value}" for name, value in request.query.items())
        path = f"{request.path}?{query}" if query else request.path
        out(printable(f"{time.strftime('%H:%M:%S')} {request.method} {path}"))
        requested = request.query.get("workflow_version_execution_id", "")
        if (execution_id := waiting.pop(requested, None)) is not None:
            simulator.finish(execution_id, _HELD)


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
            raise Misuse(f"the MCP server needs {install_hint('mcp')}") from error
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


@contextmanager
def _listening(host: str, port: int) -> Iterator[None]:
    """Report that a server cannot listen; a `UnicodeError` stands for a malformed host name."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        # socket.create_server repeats the address after the reason.
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        hint = "; --port 0 takes a free port" if port else ""
        raise Misuse(f"cannot listen on {host}, port {port}: {reason}{hint}") from None
