"""Centrifugo's JSON protocol on a WebSocket: one subscription, as long as its connection.

https://centrifugal.dev/docs/transports/client_protocol
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import aiohttp
import attrs

from promptlayer_exec._values.events import logger


@attrs.frozen
class SubscriptionPolicy:
    """The dials of a subscription: how long the server may be silent, and when to renew the token.

    Args:
        ping_delay: seconds by which the server's ping may be late before the connection counts as
            dead.
        renewal: the fraction of a token's lifetime after which to renew it.
        shortest: the least seconds between two renewals, even if the server sends no lifetime.
    """

    ping_delay: float = 10.0
    renewal: float = 0.8
    shortest: float = 1.0


_POLICY = SubscriptionPolicy()


class SubscriptionEnded(Exception):
    """The subscription is gone.

    Args:
        what: what happened, in our own words.
        reason: the server's words, which may name anything, or the library's.
        code: the server's number for it.
    """

    def __init__(self, what: str, reason: object = None, code: int | None = None) -> None:
        number = "" if code is None else f" ({code})"
        self.summary = f"{what}{number}"
        super().__init__(self.summary if reason is None else f"{what}: {reason}{number}")


class SubscriptionLost(SubscriptionEnded):
    """The subscription is gone, but another one may succeed."""


class SubscriptionRefused(SubscriptionEnded):
    """The server permanently refuses the subscription."""


@attrs.define(eq=False, kw_only=True)
class Subscription:
    """One subscription to a channel, on one open WebSocket.

    It calls `get_token` whenever the last token is about to expire.
    """

    _socket: aiohttp.ClientWebSocketResponse
    channel: str
    get_token: Callable[[], Awaitable[str]]
    on_subscribed: Callable[[], object]
    on_message: Callable[[Any], object]
    _numbers: itertools.count[int] = attrs.field(init=False, factory=lambda: itertools.count(1))
    # One future for the reply to each command, by the command's number.
    _replies: dict[int, asyncio.Future[dict[str, Any]]] = attrs.field(init=False, factory=dict)
    _patience: float | None = attrs.field(init=False, default=None)  # seconds without a frame

    async def run(self, token: str) -> NoReturn:
        """Subscribe, stay subscribed until that fails, and then close the WebSocket.

        Raises:
            SubscriptionLost: the subscription is gone, but another one may succeed.
            SubscriptionRefused: the server permanently refuses it.
            Exception: `get_token` raised it.
        """
        work = self._read(), self._subscribe(token)
        tasks = [asyncio.create_task(part, name="promptlayer_exec.Push") for part in work]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            await self._socket.close()

        raise next(outcome for outcome in outcomes if isinstance(outcome, Exception))

    async def _subscribe(self, token: str) -> None:
        """Connect, subscribe, and keep renewing the token if it expires."""
        reply = await self._ask("connect", token=token, name="promptlayer_exec")
        if ping := _seconds(reply, "ping"):
            self._patience = ping + _POLICY.ping_delay

        await self._ask("subscribe", channel=self.channel)
        self.on_subscribed()

        while reply.get("expires"):
            lifetime = _seconds(reply, "ttl")
            await asyncio.sleep(max(lifetime * _POLICY.renewal, _POLICY.shortest))
            reply = await self._ask("refresh", token=await self.get_token())

    async def _ask(self, command: str, **fields: str) -> dict[str, Any]:
        number = next(self._numbers)
        replied = self._replies[number] = asyncio.get_running_loop().create_future()
        await self._send({"id": number, command: fields})
        reply = await replied

        match reply.get("error"):
            case {"code": code, **error} if code != 105:  # already subscribed
                is_temporary = code == 109 or error.get("temporary")  # the token has expired
                ended = SubscriptionLost if is_temporary else SubscriptionRefused
                raise ended(f"the server refused to {command}", error.get("message"), code)

        result = reply.get(command)
        return result if isinstance(result, dict) else {}

    async def _send(self, frame: dict[str, Any]) -> None:
        try:
            await self._socket.send_str(json.dumps(frame))
        except (aiohttp.ClientError, ConnectionError) as error:
            raise SubscriptionLost("the connection is closed") from error

    async def _read(self) -> NoReturn:
        while True:
            try:
                frame = await self._socket.receive(self._patience)
            except TimeoutError:
                raise SubscriptionLost(f"the server was silent for {self._patience:g} s") from None

            if frame.type is aiohttp.WSMsgType.TEXT:
                # Not splitlines: strings in JSON may contain other line separators.
                for line in frame.data.split("\n"):
                    await self._handle(line)
            elif frame.type is not aiohttp.WSMsgType.BINARY:
                self._end(frame)

    async def _handle(self, line: str) -> None:
        """Handle one line of a frame. Ignore lines that are not JSON or of an unknown kind."""
        try:
            message: Any = json.loads(line) if line else None
        except ValueError as error:
            logger.debug("push: ignored a line that is not JSON (%s)", type(error).__name__)
            return

        match message:
            case {"id": int(number)}:
                replied = self._replies.pop(number, None)
                if replied is not None and not replied.done():
                    replied.set_result(message)
            case {"push": {"channel": self.channel, "pub": {"data": data}}}:
                self.on_message(data)
            case {"push": {"channel": self.channel, "unsubscribe": {"code": int(code), **more}}}:
                # From 2500, the client may subscribe again.
                ended = SubscriptionLost if code >= 2500 else SubscriptionRefused
                raise ended("the server stopped the subscription", more.get("reason"), code)
            case dict() if not message:  # a ping
                await self._send({})

    def _end(self, frame: aiohttp.WSMessage) -> NoReturn:
        if frame.type is aiohttp.WSMsgType.ERROR:
            raise SubscriptionLost("the connection broke", frame.data)
        code = self._socket.close_code or 0
        must_not_reconnect = 3500 <= code < 4000 or 4500 <= code < 5000
        ended = SubscriptionRefused if must_not_reconnect else SubscriptionLost
        raise ended("the server closed the connection", frame.extra or "no reason", code)


def _seconds(reply: dict[str, Any], name: str) -> float:
    value = reply.get(name)
    return float(value) if isinstance(value, int | float) and value > 0 else 0.0
