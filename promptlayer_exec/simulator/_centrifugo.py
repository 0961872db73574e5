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

from promptlayer_exec.simulator._wire import Reply, encode

_TOKEN_EXPIRED = {"code": 109, "message": "token expired"}
_PERMISSION_DENIED = {"code": 103, "message": "permission denied"}
_ALREADY_SUBSCRIBED = {"code": 105, "message": "already subscribed"}


class _Disconnect(Exception):
    """Ends a connection with a code and a reason; clients reconnect after codes below 3500."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@attrs.frozen
class _Grant:
    """The channels that a token allows, until the clock reads `expires`."""

    channels: frozenset[str]
    expires: float


@attrs.define(eq=False)
class Centrifugo:
    """Publishes to the subscribers of channels, each allowed by its token.

    Args:
        clock: returns the time in seconds, by which tokens expire.
        ping_interval: seconds between pings; a client that did not answer the last one is
            disconnected.
    """

    _clock: Callable[[], float]
    ping_interval: float
    _grants: dict[str, _Grant] = attrs.field(factory=dict, init=False)
    _subscribers: dict[str, set[_Connection]] = attrs.field(factory=dict, init=False)

    def issue_token(self, channels: Iterable[str], lifetime: float) -> str:
        """Return a new token for some channels that is valid for `lifetime` seconds."""
        token = secrets.token_urlsafe()
        self._grants[token] = _Grant(frozenset(channels), self._clock() + lifetime)
        return token

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve a client until its connection ends."""
        # Some clients offer an empty subprotocol: named here, it causes no warning, and no header.
        socket = web.WebSocketResponse(compress=False, protocols=("",))
        with suppress(ConnectionError):
            try:
                await socket.prepare(request)
            except web.HTTPBadRequest:
                return Reply.error(400, "Bad Request").response()
            await _Connection(self, socket).serve()
        return socket

    async def publish(self, channel: str, data: object) -> None:
        """Send data to every subscriber of a channel; a slow one delays only the caller."""
        push = encode({"push": {"channel": channel, "pub": {"data": data}}})
        subscribers = self._subscribers.get(channel, ())
        await asyncio.gather(*(subscriber.push(push) for subscriber in subscribers))

    def find_grant(self, token: str) -> _Grant | None:
        """Return what a token allows, or None if it has expired."""
        grant = self._grants.get(token)
        if grant is None:
            raise _Disconnect(3500, "invalid token")
        return grant if self._clock() < grant.expires else None

    def subscribe(self, channel: str, connection: _Connection) -> bool:
        """Add a subscriber; return False if it already is one."""
        subscribers = self._subscribers.setdefault(channel, set())
        if connection in subscribers:
            return False
        subscribers.add(connection)
        return True

    def unsubscribe(self, channel: str, connection: _Connection) -> None:
        """Remove a subscriber, if it is one."""
        subscribers = self._subscribers.get(channel, set())
        subscribers.discard(connection)
        if not subscribers:
            self._subscribers.pop(channel, None)


@attrs.define(eq=False)
class _Connection:
    """One client."""

    _centrifugo: Centrifugo
    _socket: web.WebSocketResponse
    _grant: _Grant | None = attrs.field(default=None, init=False)
    _awaits_pong: bool = attrs.field(default=False, init=False)

    async def serve(self) -> None:
        try:
            await self._receive_commands()
        except _Disconnect as end:
            await self._socket.close(code=end.code, message=end.reason.encode())
        finally:
            for channel in self._grant.channels if self._grant else ():
                self._centrifugo.unsubscribe(channel, self)

    async def push(self, push: str) -> None:
        with suppress(ConnectionError):
            await self._socket.send_str(push)

    async def _receive_commands(self) -> None:
        loop = asyncio.get_running_loop()
        next_ping = loop.time() + self._centrifugo.ping_interval
        while True:
            try:
                async with asyncio.timeout_at(next_ping):
                    message = await self._socket.receive()
            except TimeoutError:
                await self._ping()
                next_ping = loop.time() + self._centrifugo.ping_interval
                continue
            if message.type is not WSMsgType.TEXT:
                return
            for line in message.data.strip().split("\n"):
                await self._execute(line)

    async def _ping(self) -> None:
        if self._grant is None:
            raise _Disconnect(3502, "stale")
        if self._awaits_pong:
            raise _Disconnect(3012, "no pong")
        self._awaits_pong = True
        await self._send({})

    async def _execute(self, line: str) -> None:
        command: Any
        try:
            command = json.loads(line)
        except (ValueError, RecursionError):
            command = None
        match command:
            case {"id": int(number), **request} if number > 0:
                await self._send({"id": number, **self._answer(request)})
            case dict() if not command:
                self._awaits_pong = False
            case _:
                raise _Disconnect(3501, "bad request")

    def _answer(self, request: dict[Any, Any]) -> dict[str, Any]:
        match request:
            case {"connect": {"token": str(token)}} if self._grant is None:
                return self._connect(token)
            case {"subscribe": {"channel": str(channel)}} if self._grant is not None:
                return self._subscribe(channel, self._grant)
            case {"unsubscribe": {"channel": str(channel)}} if self._grant is not None:
                self._centrifugo.unsubscribe(channel, self)
                return {"unsubscribe": {}}
            case _ if self._grant is None or "connect" in request:
                raise _Disconnect(3501, "bad request")
        return {"error": _PERMISSION_DENIED}

    def _connect(self, token: str) -> dict[str, Any]:
        self._grant = self._centrifugo.find_grant(token)
        if self._grant is None:
            return {"error": _TOKEN_EXPIRED}
        ping = math.ceil(self._centrifugo.ping_interval)
        return {"connect": {"client": str(uuid4()), "version": "", "ping": ping, "pong": True}}

    def _subscribe(self, channel: str, grant: _Grant) -> dict[str, Any]:
        if channel not in grant.channels:
            return {"error": _PERMISSION_DENIED}
        if not self._centrifugo.subscribe(channel, self):
            return {"error": _ALREADY_SUBSCRIBED}
        return {"subscribe": {}}

    async def _send(self, reply: dict[str, Any]) -> None:
        await self._socket.send_str(encode(reply))
