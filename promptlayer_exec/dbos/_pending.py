"""One start of an item that is to be sent, and what is known about it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import attrs

from promptlayer_exec import Execution, StartUnknown
from promptlayer_exec.dbos._breaker import Breaker
from promptlayer_exec.dbos._groups import Group
from promptlayer_exec.dbos._intents import Intent
from promptlayer_exec.dbos._values import StartResult, start_result

# Seconds between two checks whether an id is recorded: the process may be killed.
_RECORDED_WITHIN = 1.0
# How often an item is refused, while others are not, before the refusal is its own.
_REFUSALS = 3


@attrs.frozen(repr=False)  # DBOS logs the arguments of a step that is cancelled
class Item:
    """One attempt to run an item.

    Attributes:
        request: the request as JSON.
        started: the start of an earlier attempt, which this one only follows.
    """

    key: str
    attempt: int
    request: str
    started: StartResult | None = None


def unknown_start(item: Item) -> StartResult:
    """Return the result of a start that another worker may have sent."""
    message = "the worker that sent the start stopped before it recorded the answer"
    workflow = json.loads(item.request)["workflow"]
    return start_result(error=StartUnknown(message, workflow=workflow, reason=message))


@attrs.define(eq=False, repr=False)
class PendingStart:
    """A start that is to be sent: the hooks around its sending, and what is known about it.

    Attributes:
        may_be_sent: whether its intent may be recorded, so that it must not be cancelled any more.
        is_refused: whether its intent, or its result, was not recorded: another one is there.
        replaced: the token of the intent of another worker, which may have sent the start: this one
            replaces it, or is not sent.
        recorded_intent: the token of its intent, if that was recorded, even if it was taken back.
        settled: set when its result is recorded, or there is nothing to record.
    """

    _item: Item
    _intents: Group[Intent, bool]
    token: str  # also the one in the start's callback URL, if it has one of its own
    replaced: str | None = attrs.field(init=False, default=None)
    execution: Execution | None = attrs.field(init=False, default=None)
    task: asyncio.Task[Any] | None = attrs.field(init=False, default=None)
    may_be_sent: bool = attrs.field(init=False, default=False)
    is_cancelled: bool = attrs.field(init=False, default=False)
    is_refused: bool = attrs.field(init=False, default=False)
    recorded_intent: str | None = attrs.field(init=False, default=None)
    settled: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    is_reported: bool = attrs.field(init=False, default=False)
    _timer: asyncio.TimerHandle | None = attrs.field(init=False, default=None)
    _refusals: int = attrs.field(init=False, default=0)
    _successes_seen: int = attrs.field(init=False, default=-1)

    async def before_send(self) -> None:
        """Record the intent."""
        if self.is_cancelled:  # in the step before: the cancellation is still on its way here
            await asyncio.Event().wait()
        self.may_be_sent = True
        if not await self._intents.add(self._intent()):
            self.is_refused = True
            raise IntentRefused
        self.recorded_intent = self.token

    async def not_sent(self) -> None:
        """Take the intent back."""
        if self.may_be_sent:
            await self._intents.add(self._intent(is_taken_back=True))
            self.may_be_sent = False
        if self.is_cancelled and self.task is not None:
            self.task.cancel()

    def cancel(self) -> None:
        """Cancel the start, unless its request may be sent."""
        self.is_cancelled = True
        if self.task is not None and not self.may_be_sent:
            self.task.cancel()

    def is_refused_alone(self, starts: Breaker) -> bool:
        """Return True if the server refused this start several times, and others in between not."""
        if starts.successes > self._successes_seen:
            self._refusals, self._successes_seen = self._refusals + 1, starts.successes
        return self._refusals >= (_REFUSALS if starts.is_busy else _REFUSALS - 1)

    def warn_if_late(self, warn: Callable[[], None]) -> None:
        """Call `warn` each second until the result is recorded; in DBOS's event loop."""
        loop = asyncio.get_running_loop()

        def warn_again() -> None:
            warn()
            self._timer = loop.call_later(_RECORDED_WITHIN, warn_again)

        self._timer = loop.call_later(_RECORDED_WITHIN, warn_again)

    def recorded(self) -> None:
        """Record that the result is recorded, or will not be; in DBOS's event loop."""
        if self._timer is not None:
            self._timer.cancel()
        self.settled.set()

    def _intent(self, *, is_taken_back: bool = False) -> Intent:
        key, attempt = self._item.key, self._item.attempt
        return Intent(key, attempt, self.token, self.replaced, is_taken_back)


class IntentRefused(Exception):
    """Another worker may have sent the start, or the item has an outcome."""
