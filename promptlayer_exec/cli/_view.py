"""The page in the browser: `promptlayer-exec view`."""

import asyncio
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import anyio

from promptlayer_exec import PollPolicy, RetryPolicy, Session
from promptlayer_exec.simulator import Simulator

from ._agents import STARTS, add_agents, invitation
from ._ending import ExitCode, Misuse
from ._hints import PROGRAM
from ._session import open_session, report_retries
from ._streams import err, out

if TYPE_CHECKING:
    from promptlayer_exec.viewer import Board

TOKEN = "PROMPTLAYER_EXEC_VIEW_TOKEN"  # noqa: S105 - a variable's name
_NEEDED = ("fastapi", "pydantic", "sse_starlette", "starlette", "uvicorn")


async def view(
    execution_ids: Sequence[int],
    *,
    host: str,
    port: int,
    is_demo: bool,
    base_url: str | None,
    outage: float,
) -> ExitCode:
    """Serve the page until cancelled, which is its ordinary end.

    Args:
        execution_ids: what it shows at first.
        host: the address to listen on.
        port: the port; 0 takes a free one.
        is_demo: whether to show a few agents of an embedded simulator instead.
        base_url: the server, if not the one from the environment.
        outage: seconds for which a watch survives a server in trouble.
    """
    _demand_extra()
    from promptlayer_exec.viewer import Address, Board, listen, serve  # noqa: PLC0415 - an extra

    token = _token()
    async with AsyncExitStack() as stack:
        session = await _session(stack, is_demo=is_demo, base_url=base_url, outage=outage)
        try:
            listener = stack.enter_context(listen(host, port))
        except (OSError, UnicodeError) as error:  # the latter for a malformed name
            # create_server puts the address behind the reason, once more.
            reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
            hint = f"; `{PROGRAM} view --port 0` takes a free one" if port else ""
            raise Misuse(f"cannot listen on {host}, port {port}: {reason}{hint}") from None
        address = Address(host, listener.getsockname()[1])
        board = await stack.enter_async_context(
            Board(session, note=invitation() if is_demo else "")
        )
        for execution_id in execution_ids:
            board.follow(execution_id)
        _invite(f"{address.base_url}/#token={token}", is_loopback=address.is_loopback)
        with suppress(asyncio.CancelledError):
            async with anyio.create_task_group() as tasks:
                if is_demo:
                    tasks.start_soon(_start_agents, board)
                await serve(board, listener, address, token)
    return ExitCode.SUCCEEDED


def _demand_extra() -> None:
    try:
        import promptlayer_exec.viewer  # noqa: F401, PLC0415 - it may not be there
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _NEEDED:
            raise
        what = "the viewer needs an extra: pip install 'promptlayer-exec[viewer]'"
        raise Misuse(what) from None


def _token() -> str:
    """Return a new token, or the environment's, where a page is to survive a restart."""
    token = os.environ.get(TOKEN)
    if not token:
        return secrets.token_urlsafe(32)
    if not re.fullmatch(r"[\w-]{22,}", token, re.ASCII):
        raise Misuse(f"{TOKEN} is too weak: at least 22 letters, digits, - or _, chosen at random")
    return token


async def _session(
    stack: AsyncExitStack, *, is_demo: bool, base_url: str | None, outage: float
) -> Session:
    if not is_demo:
        retry = RetryPolicy(outage=min(outage, 10.0), watch_outage=outage)
        return await stack.enter_async_context(open_session(base_url, retry, err))
    simulator = await stack.enter_async_context(Simulator(log_requests=False))
    add_agents(simulator)
    return await stack.enter_async_context(
        Session(
            simulator.api_key,
            base_url=simulator.base_url,
            poll=PollPolicy(floor=0.2, ceiling=0.4),  # often, so that short nodes are seen running
            observers=[report_retries(err)],
        )
    )


async def _start_agents(board: "Board") -> None:
    """Start the agents of the demonstration, once there is somebody to look."""
    await board.opened.wait()
    for workflow, inputs in STARTS.items():
        await board.start(workflow, inputs)


def _invite(url: str, *, is_loopback: bool) -> None:
    if not is_loopback:
        err(
            "warning: other machines can reach this page, over plain http: whoever reads along has"
            " its token, and with it your key's executions"
        )
    err("Open this page, which is for you alone (Ctrl-C ends it):")
    out(url)
