"""Serving over standard input and output."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any, cast

from mcp.server.stdio import stdio_server

from promptlayer_exec import Session
from promptlayer_exec.mcp._calls import Calls
from promptlayer_exec.mcp._server import make_server


async def serve_stdio(session: Session, *, workflows: Iterable[str] = ()) -> None:
    """Serve one MCP client over standard input and output, until it closes them.

    Meanwhile, what anything else prints goes to standard error. At the end, the logger
    `promptlayer_exec` names the executions that were not complete when they were last seen.

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
        async with stdio_server(cast("Any", _Lines())) as (read_stream, write_stream):
            await server.run(read_stream, write_stream, server.create_initialization_options())
    except* BrokenPipeError:
        pass  # the client has gone
    finally:
        calls.close()


class _Lines:
    """The lines of standard input.

    Nothing can cancel a blocked read of it. So a thread reads, which does not keep the process
    alive, as a thread of the SDK's own reader would.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        threading.Thread(target=self._read, name="standard input", daemon=True).start()

    def _read(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            # A buffer of its own: the interpreter locks that of sys.stdin when it exits.
            with suppress(OSError), open(sys.stdin.fileno(), "rb", closefd=False) as stream:
                for line in stream:
                    text = line.decode("utf-8", "replace")
                    self._loop.call_soon_threadsafe(self._lines.put_nowait, text)
            self._loop.call_soon_threadsafe(self._lines.put_nowait, None)

    async def __aiter__(self) -> AsyncIterator[str]:
        while (line := await self._lines.get()) is not None:
            yield line
