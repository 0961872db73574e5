"""Serving over standard input and output."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, cast

import anyio
from mcp.server.stdio import stdio_server

from promptlayer_exec import Session
from promptlayer_exec.mcp._calls import Calls
from promptlayer_exec.mcp._server import make_server

_PATIENCE = 1.0  # seconds for the last answers, once the client has closed standard input


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
        async with asyncio.timeout(None) as limit:
            with _standard_output() as output:
                async with stdio_server(cast("Any", _Lines()), cast("Any", output)) as (
                    given,
                    sent,
                ):
                    await server.run(given, sent, server.create_initialization_options())
                    limit.reschedule(asyncio.get_running_loop().time() + _PATIENCE)
    except* (BrokenPipeError, TimeoutError):
        pass  # the client has gone, or does not read
    except* anyio.BrokenResourceError:
        pass  # the SDK's, if it is cancelled while it passes a message on
    finally:
        calls.close()
    task = asyncio.current_task()
    if task is not None and task.cancelling():  # which such an error hides
        raise asyncio.CancelledError


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


@contextmanager
def _standard_output() -> Iterator[_Output]:
    """Yield standard output; what anything else prints goes to standard error meanwhile."""
    wire = os.dup(1)
    os.dup2(2, 1)
    try:
        yield _Output(wire)
    finally:
        os.dup2(wire, 1)


class _Output:
    """Standard output, for the SDK.

    Nothing can end a write that blocks, because the client does not read. So threads write, one at
    a time, which do not keep the process alive, as a thread of the SDK's own writer would.
    """

    def __init__(self, file: int) -> None:
        self._file = file

    async def write(self, text: str) -> None:
        written: Future[None] = Future()
        written.set_running_or_notify_cancel()
        threading.Thread(target=self._write, args=(text.encode(), written), daemon=True).start()
        await asyncio.wrap_future(written)

    def _write(self, data: bytes, written: Future[None]) -> None:
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            written.set_exception(error)
        else:
            written.set_result(None)

    async def flush(self) -> None:
        """Do nothing: nothing is buffered."""
