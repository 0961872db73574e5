"""A listening socket that serves the API."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

import attrs
from aiohttp import web
from yarl import URL

from promptlayer_exec.simulator._api import Api


@attrs.define(eq=False)
class Server:
    """A server in the running loop, created by `start`; stopping it aborts open requests."""

    base_url: str
    _web_server: web.Server
    _listener: asyncio.Server

    @classmethod
    async def start(cls, api: Api, host: str, port: int) -> Self:
        """Start to listen; raise `OSError` if the address cannot be listened on."""
        # Cancelling the handler of a client that disconnects is what ends a stalled answer.
        web_server = web.Server(api.handle, handler_cancellation=True, access_log=None)
        listener = await asyncio.get_running_loop().create_server(web_server, host, port)
        port = listener.sockets[0].getsockname()[1]
        base_url = str(URL.build(scheme="http", host=host, port=port))
        return cls(base_url, web_server, listener)

    async def stop(self) -> None:
        """Stop listening, and abort every connection."""
        # asyncio must first hand over accepted connections, which `close` would leak.
        for listening in self._listener.sockets:
            with suppress(NotImplementedError):  # on Windows
                asyncio.get_running_loop().remove_reader(listening.fileno())
        for _ in range(3):
            await asyncio.sleep(0)
        self._listener.close()
        while connections := self._web_server.connections:
            for connection in connections:
                if connection.transport is not None:
                    connection.transport.abort()
            await asyncio.sleep(0)
