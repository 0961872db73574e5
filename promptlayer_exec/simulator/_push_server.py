"""Centrifugo's JSON client protocol, as far as a subscriber needs it: tokens and channels.

https://centrifugal.dev/docs/transports/client_protocol
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from uuid import uuid4

import attrs
from aiohttp import web

from promptlayer_exec.simulator._wire import encode


class _Disconnect(Exception):
    """Closes a connection with a code and a reason. Clients reconnect after codes below 3500."""


@attrs.define(eq=False)
class PushServer:
    """Publishes to the subscribers of channels, each allowed by its token. Sends no pings."""

    # The channels that each token allows. None expires.
    tokens: dict[str, frozenset[str]] = attrs.field(factory=dict, init=False)
    _connections: set[_Connection] = attrs.field(factory=set, init=False)

    def issue_token(self, channels: Iterable[str]) -> str:
        token = secrets.token_urlsafe()
        self.tokens[token] = frozenset(channels)
        return token

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        # Some clients offer an empty subprotocol: named here, it causes no warning, and no header.
        socket = web.WebSocketResponse(compress=False, protocols=("",))

        with suppress(ConnectionError):
            await socket.prepare(request)
            connection = _Connection(self, socket)
            self._connections.add(connection)
            try:
                await connection.execute_commands()
            except _Disconnect as end:
                code, reason = end.args
                await socket.close(code=code, message=reason.encode())
            finally:
                self._connections.remove(connection)

        return socket

    async def publish(self, channel: str, data: object) -> None:
        """Send data to every subscriber of a channel. A slow one delays only the caller."""
        push = encode({"push": {"channel": channel, "pub": {"data": data}}})
        sends = [
            connection.socket.send_str(push)
            for connection in self._connections
            if channel in connection.subscriptions
        ]
        await asyncio.gather(*sends, return_exceptions=True)  # some may be gone


@attrs.define(eq=False)
class _Connection:
    """One client. `_channels` are those that its token allows, None until it has connected."""

    _push_server: PushServer
    socket: web.WebSocketResponse
    _channels: frozenset[str] | None = attrs.field(default=None, init=False)
    subscriptions: set[str] = attrs.field(factory=set, init=False)

    async def execute_commands(self) -> None:
        async for message in self.socket:
            try:
                commands = [json.loads(line) for line in message.data.strip().split("\n")]
            except ValueError:
                raise _Disconnect(3501, "bad request") from None

            for command in commands:
                match command:
                    case {"id": int(number), **request} if number > 0:
                        await self.socket.send_str(encode({"id": number, **self._answer(request)}))
                    case dict() if not command:
                        pass  # a pong, which some clients send unasked
                    case _:
                        raise _Disconnect(3501, "bad request")

    def _answer(self, request: dict[Any, Any]) -> dict[str, Any]:
        match request:
            case {"connect": {"token": str(token)}} if self._channels is None:
                if token not in self._push_server.tokens:
                    raise _Disconnect(3500, "invalid token")
                self._channels = self._push_server.tokens[token]
                return {"connect": {"client": str(uuid4()), "version": ""}}

            case _ if self._channels is None or "connect" in request:
                raise _Disconnect(3501, "bad request")

            case {"subscribe": {"channel": str(channel)}} if channel in self._channels:
                self.subscriptions.add(channel)
                return {"subscribe": {}}

            case {"unsubscribe": {"channel": str(channel)}}:
                self.subscriptions.discard(channel)
                return {"unsubscribe": {}}

        return {"error": {"code": 103, "message": "permission denied"}}
