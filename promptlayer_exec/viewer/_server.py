"""Serving a board on a socket, until it is told to stop."""

import asyncio
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from ._address import Address
from ._app import create_app
from ._board import Board

_GRACE = 2


class _Server(uvicorn.Server):
    """Uvicorn without its hold on signals: they are the program's."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: the address, or a name of it.
        port: the port; 0 takes a free one.

    Raises:
        OSError: the address is not one of this machine's, or the port is taken.
    """
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(place[:2], family=family)


async def serve(board: Board, listener: socket.socket, address: Address, token: str) -> None:
    """Serve a board until cancelled; then open pages are told, and it ends within two seconds.

    Args:
        board: the executions; it is closed at the end.
        listener: the socket; it is closed at the end, too.
        address: what the socket is called.
        token: what the page must bring.
    """
    config = uvicorn.Config(
        _ending_quietly(create_app(board, address, token)),
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
        # What is left: pages that do not read, and requests that wait for PromptLayer.
        for connection in server.server_state.connections:
            connection.transport.abort()
        for task in server.server_state.tasks:
            task.cancel()
        await serving


def _ending_quietly(app: ASGIApp) -> ASGIApp:
    """Return the app, but cancelled without an error that uvicorn would show the traceback of."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return run
