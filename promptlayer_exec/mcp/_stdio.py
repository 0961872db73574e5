"""Serving over standard input and output."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterable
from typing import Any, cast

import anyio
from anyio.to_thread import run_sync
from mcp.server.stdio import stdio_server

from promptlayer_exec import Session
from promptlayer_exec.mcp._calls import Calls
from promptlayer_exec.mcp._server import make_server


async def serve_stdio(session: Session, *, workflows: Iterable[str] = ()) -> None:
    """Serve one MCP client over standard input and output, until it closes them.

    Meanwhile, what anything else prints goes to standard error. At the end, the logger
    `promptlayer_exec` names the executions that were not complete when they were last seen.

    If it is cancelled, a thread still waits for the next line of standard input. It keeps the
    process alive unless that ends with `os._exit`, as the command does.

    Args:
        session: as for `create_server`.
        workflows: as for `create_server`.

    Raises:
        TypeError: as for `create_server`.
        ValueError: as for `create_server`.
    """
    calls = Calls(session, workflows)
    server = make_server(calls)
    try:
        async with stdio_server(cast("Any", _Lines())) as (given, sent):
            await server.run(given, sent, server.create_initialization_options())
    except* (BrokenPipeError, anyio.BrokenResourceError):
        pass  # the client has gone
    finally:
        calls.close()


class _Lines:
    """The lines of standard input; the SDK's own reader cannot be cancelled before the next one."""

    async def __aiter__(self) -> AsyncIterator[str]:
        while line := await run_sync(sys.stdin.buffer.readline, abandon_on_cancel=True):
            yield line.decode("utf-8", "replace")
