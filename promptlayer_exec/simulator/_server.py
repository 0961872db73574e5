"""A listening socket that serves the API, in this loop or in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Self, TypeVar

from aiohttp import web
from yarl import URL

from promptlayer_exec.simulator._api import Api

_T = TypeVar("_T")


class Server:
    """A server in the running loop, created by `start`; stopping it aborts open requests."""

    def __init__(
        self, api: Api, web_server: web.Server, listener: asyncio.Server, host: str
    ) -> None:
        self.loop = asyncio.get_running_loop()
        port = listener.sockets[0].getsockname()[1]
        self.base_url = str(URL.build(scheme="http", host=host, port=port))
        self._api = api
        self._web_server = web_server
        self._listener = listener

    @classmethod
    async def start(cls, api: Api, host: str, port: int) -> Self:
        """Start to listen.

        Raises:
            OSError: the address cannot be listened on.
        """
        # Cancelling the handler of a client that disconnects is what ends a stalled answer.
        web_server = web.Server(api.handle, handler_cancellation=True, access_log=None)
        listener = await asyncio.get_running_loop().create_server(web_server, host, port)
        return cls(api, web_server, listener, host)

    async def stop(self) -> None:
        """Stop listening, and abort every connection."""
        await self._stop_accepting()
        self._listener.close()
        while connections := self._web_server.connections:
            for connection in connections:
                if connection.transport is not None:
                    connection.transport.abort()
            await asyncio.sleep(0)
        await self._api.stop()

    async def _stop_accepting(self) -> None:
        """Let asyncio hand over accepted connections, which `close` would leak."""
        for listening in self._listener.sockets:
            with suppress(NotImplementedError):  # on Windows
                self.loop.remove_reader(listening.fileno())
        for _ in range(3):
            await asyncio.sleep(0)


class ServerThread:
    """A `Server` in a thread with a loop of its own; its methods block."""

    def __init__(self, api: Api, host: str, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="promptlayer-simulator", daemon=True
        )
        self._thread.start()
        try:
            self.server = self._call(Server.start(api, host, port))
        except BaseException:
            self._end()
            raise

    def stop(self) -> None:
        """Stop the server and end the thread."""
        try:
            self._call(self.server.stop())
        finally:
            self._end()

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _end(self) -> None:
        # Resolving a host name has started a thread in the loop's executor.
        self._call(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
