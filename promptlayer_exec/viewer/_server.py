"""Serving a board on a socket, until cancelled."""

from __future__ import annotations

import asyncio
import socket
from contextlib import nullcontext, suppress
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from promptlayer_exec.viewer._app import create_app
from promptlayer_exec.viewer._board import Board
from promptlayer_exec.viewer._guard import Address

_GRACE = 2


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: the program has its own."""

    def capture_signals(self) -> Any:
        return nullcontext()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Args:
        host: an IP address or a host name of this machine.
        port: the port; 0 takes a free one.

    Raises:
        OSError: the address is not one of this machine's, or the port is taken.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


async def serve(board: Board, listener: socket.socket, address: Address, token: str) -> None:
    """Serve a board until cancelled; then send open pages an `end` event, and stop within 2 s.

    Args:
        board: the executions; it is closed at the end.
        listener: the socket; it is closed at the end, too.
        address: the address of the socket.
        token: the token that the page sends.
    """
    app = create_app(board, address, token)

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):  # uvicorn would log its traceback
            await app(scope, receive, send)

    config = uvicorn.Config(
        run,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]), name="viewer")
    try:
        await asyncio.wait([serving])
    finally:
        board.close()
        server.should_exit = True
        await asyncio.wait([serving], timeout=_GRACE)
        # Still open: pages that do not read, and requests that wait for PromptLayer.
        for connection in server.server_state.connections:
            connection.transport.abort()
        for task in server.server_state.tasks:
            task.cancel()
        await serving
