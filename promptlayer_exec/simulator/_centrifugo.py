"""Centrifugo's JSON client protocol, as far as a subscriber needs it: tokens and channels.

https://centrifugal.dev/docs/transports/client_protocol
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from uuid import uuid4

import attrs
from aiohttp import WSMsgType, web

from promptlayer_exec.simulator._wire import encode, error_response

_TOKEN_EXPIRED = {"code": 109, "message": "token expired"}
_PERMISSION_DENIED = {"code": 103, "message": "permission denied"}
# Seconds that a client has for a new token after the old one expired, as in Centrifugo.
_EXPIRED_CLOSE_DELAY = 25.0
_ALREADY_SUBSCRIBED = {"code": 105, "message": "already subscribed"}


class _Disconnect(Exception):
    """Ends a connection with a code and a reason; clients reconnect after codes below 3500."""


@attrs.define(eq=False)
class Centrifugo:
    """Publishes to the subscribers of channels, each allowed by its token.

    There are `ping_interval` seconds between pings; a client that did not answer the last one is
    disconnected, and so is one that did not renew its token in time.
    """

    clock: Callable[[], float]
    ping_interval: float
    # The channels that each token allows, and the time at which it expires.
    tokens: dict[str, tuple[frozenset[str], float]] = attrs.field(factory=dict, init=False)
    _connections: set[_Connection] = attrs.field(factory=set, init=False)

    def issue_token(self, channels: Iterable[str], lifetime: float) -> str:
        """Return a new token for some channels that is valid for `lifetime` seconds."""
        token = secrets.token_urlsafe()
        self.tokens[token] = frozenset(channels), self.clock() + lifetime
        return token

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve a client until its connection ends."""
        # Some clients offer an empty subprotocol: named here, it causes no warning, and no header.
        socket = web.WebSocketResponse(compress=False, protocols=("",))
        with suppress(ConnectionError):
            try:
                await socket.prepare(request)
            except web.HTTPBadRequest:
                return error_response(400, "Bad Request")
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
        """Send data to every subscriber of a channel; a slow one delays only the caller."""
        push = encode({"push": {"channel": channel, "pub": {"data": data}}})
        subscribers = [one for one in self._connections if channel in one.subscriptions]
        sends = [subscriber.socket.send_str(push) for subscriber in subscribers]
        await asyncio.gather(*sends, return_exceptions=True)  # some may be gone


@attrs.define(eq=False)
class _Connection:
    """One client; `_channels` are those that its token allows, None until it has connected."""

    _centrifugo: Centrifugo
    socket: web.WebSocketResponse
    _channels: frozenset[str] | None = attrs.field(default=None, init=False)
    _expires: float = attrs.field(default=math.inf, init=False)
    _awaits_pong: bool = attrs.field(default=False, init=False)
    _client: str = attrs.field(factory=lambda: str(uuid4()), init=False)
    subscriptions: set[str] = attrs.field(factory=set, init=False)

    async def execute_commands(self) -> None:
        loop = asyncio.get_running_loop()
        next_ping = loop.time() + self._centrifugo.ping_interval
        while True:
            try:
                async with asyncio.timeout_at(next_ping):
                    message = await self.socket.receive()
            except TimeoutError:
                await self._ping()
                next_ping = loop.time() + self._centrifugo.ping_interval
                continue
            if message.type is not WSMsgType.TEXT:
                return
            for line in message.data.strip().split("\n"):
                await self._execute(line)

    async def _ping(self) -> None:
        if self._channels is None:
            raise _Disconnect(3502, "stale")
        if self._awaits_pong:
            raise _Disconnect(3012, "no pong")
        if self._centrifugo.clock() >= self._expires + _EXPIRED_CLOSE_DELAY:
            raise _Disconnect(3005, "connection expired")
        self._awaits_pong = True
        await self.socket.send_str(encode({}))

    async def _execute(self, line: str) -> None:
        command: Any
        try:
            command = json.loads(line)
        except (ValueError, RecursionError):
            command = None
        match command:
            case {"id": int(number), **request} if number > 0:
                await self.socket.send_str(encode({"id": number, **self._answer(request)}))
            case dict() if not command:
                self._awaits_pong = False
            case _:
                raise _Disconnect(3501, "bad request")

    def _answer(self, request: dict[Any, Any]) -> dict[str, Any]:
        match request:
            case {"connect": {"token": str(token)}} if self._channels is None:
                return self._take_token(token, "connect", ping=self._ping_seconds, pong=True)
            case _ if self._channels is None or "connect" in request:
                raise _Disconnect(3501, "bad request")
            case {"refresh": {"token": str(token)}}:
                return self._take_token(token, "refresh")
            case {"subscribe": {"channel": str(channel)}} if channel in self._channels:
                if channel in self.subscriptions:
                    return {"error": _ALREADY_SUBSCRIBED}
                self.subscriptions.add(channel)
                return {"subscribe": {}}
            case {"unsubscribe": {"channel": str(channel)}}:
                self.subscriptions.discard(channel)
                return {"unsubscribe": {}}
        return {"error": _PERMISSION_DENIED}

    @property
    def _ping_seconds(self) -> int:
        return math.ceil(self._centrifugo.ping_interval)

    def _take_token(self, token: str, command: str, **more: Any) -> dict[str, Any]:
        if token not in self._centrifugo.tokens:
            raise _Disconnect(3500, "invalid token")
        channels, expires = self._centrifugo.tokens[token]
        left = expires - self._centrifugo.clock()
        if left <= 0:
            return {"error": _TOKEN_EXPIRED}
        self._channels, self._expires = channels, expires
        expiry = {"expires": True, "ttl": math.ceil(left)}
        return {command: {"client": self._client, "version": "", **more, **expiry}}
