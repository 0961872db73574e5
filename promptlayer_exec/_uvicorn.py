"""Serving an app with uvicorn until cancelled, as the viewer and the MCP server do."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, Literal, cast
from weakref import WeakSet

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from promptlayer_exec._integration import wait_even_if_cancelled


async def serve_until_cancelled(
    app: ASGIApp,
    listener: socket.socket,
    *,
    name: str,
    patience: float,
    lifespan: Literal["on", "off"],
    on_end: Callable[[], None],
) -> None:
    """Serve an app on a listening socket, and close the socket afterwards.

    Args:
        app: the app.
        listener: the socket.
        name: the name of the task.
        patience: how many seconds open requests have once it is cancelled. After that, it cuts off
            clients that do not read, and requests that wait for PromptLayer.
        lifespan: whether the app gets lifespan events.
        on_end: called first once it is cancelled.
    """
    # uvicorn waits for late requests and connections, and can end neither.
    connections: WeakSet[asyncio.Transport] = WeakSet()
    requests: WeakSet[asyncio.Task[Any]] = WeakSet()

    class KnownConnection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            connections.add(transport)
            super().connection_made(transport)

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        requests.add(cast("asyncio.Task[Any]", asyncio.current_task()))
        with suppress(asyncio.CancelledError):  # uvicorn would log its traceback
            await app(scope, receive, send)

    async def end() -> None:
        await asyncio.wait([serving], timeout=patience)
        for connection in connections:
            connection.abort()
        for request in requests:
            request.cancel()
        await serving

    config = uvicorn.Config(
        run,
        http=KnownConnection,
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = _SignalFreeServer(config)
    serving = asyncio.create_task(server.serve([listener]), name=name)
    try:
        await asyncio.wait([serving])
    finally:
        on_end()
        server.should_exit = True
        ending = asyncio.create_task(end())
        await wait_even_if_cancelled(ending)
        ending.result()


class _SignalFreeServer(uvicorn.Server):
    """Uvicorn without its signal handlers: the program has its own."""

    def capture_signals(self) -> Any:
        return nullcontext()
