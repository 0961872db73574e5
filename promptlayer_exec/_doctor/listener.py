"""Listening to one push channel, and keeping its messages."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import aiohttp
import attrs

from promptlayer_exec._push.centrifugo import Subscription, SubscriptionEnded
from promptlayer_exec._push.channels import read_completion


class NotSubscribed(Exception):
    """There is no subscription. Its text contains the reason."""


@attrs.frozen
class Message:
    """One published message: when it came, on the event loop's clock, and whose completion it is.

    It is None if the message announces no completion.
    """

    at: float
    execution_id: int | None


@attrs.define(eq=False)
class Listener:
    """A subscription to one channel, through the code that sessions use.

    Attributes:
        messages: what came since it became active.
        lost: why it was lost. Empty while it is active.
    """

    channel: str
    messages: list[Message] = attrs.field(init=False, factory=list)
    lost: str = attrs.field(init=False, default="")
    _news: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _task: asyncio.Task[None] | None = attrs.field(init=False, default=None)

    async def subscribe(
        self, socket: aiohttp.ClientWebSocketResponse, token: str, patience: float
    ) -> None:
        """Subscribe, and stay subscribed in a task."""
        is_subscribed = asyncio.Event()

        async def same_token() -> str:
            return token  # an examination is shorter than the lifetime of a token

        subscription = Subscription(
            socket=socket,
            channel=self.channel,
            get_token=same_token,
            on_subscribed=is_subscribed.set,
            on_message=self._receive,
        )
        self._task = asyncio.create_task(self._stay(subscription, token))

        waiting = asyncio.create_task(is_subscribed.wait())
        try:
            await asyncio.wait(
                (waiting, self._task), timeout=patience, return_when=asyncio.FIRST_COMPLETED
            )
        except asyncio.CancelledError:
            await self.aclose()
            raise
        finally:
            waiting.cancel()
        if not is_subscribed.is_set():
            reason = self.lost or f"no response within {patience:g} s"
            await self.aclose()
            raise NotSubscribed(reason)

    async def _stay(self, subscription: Subscription, token: str) -> None:
        try:
            await subscription.run(token)
        except SubscriptionEnded as error:
            self.lost = error.summary  # without the server's own words: they may name anything

    def _receive(self, data: Any) -> None:
        now = asyncio.get_running_loop().time()
        self.messages.append(Message(now, read_completion(data)))
        self._news.set()

    def announcement(self, execution_id: int) -> Message | None:
        """Return the message that announces the completion of a run, or None if none did so far."""
        return next((it for it in self.messages if it.execution_id == execution_id), None)

    async def wait_for(self, execution_id: int) -> None:
        """Wait until a message announces the completion of a run."""
        while self.announcement(execution_id) is None:
            self._news.clear()
            await self._news.wait()

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
