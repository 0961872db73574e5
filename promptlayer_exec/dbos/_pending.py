"""One start of an item that is to be sent, and what is known about it."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import attrs

from promptlayer_exec import StartUnknown
from promptlayer_exec.dbos._groups import Group
from promptlayer_exec.dbos._intents import Intent
from promptlayer_exec.dbos._values import StartResult, start_result


def current_task() -> asyncio.Task[Any]:
    """Return the running task, which every coroutine has."""
    return cast("asyncio.Task[Any]", asyncio.current_task())


@attrs.frozen(repr=False)  # DBOS logs the arguments of a step that is cancelled
class Item:
    """One attempt to run an item, and its request as JSON."""

    key: str
    attempt: int
    request: str


def unknown_start(item: Item) -> StartResult:
    """Return the result of a start that another worker may have sent."""
    message = "the worker that sent the start stopped before it recorded the answer"
    workflow = json.loads(item.request)["workflow"]
    return start_result(error=StartUnknown(message, workflow=workflow, reason=message))


@attrs.define(eq=False, repr=False)
class PendingStart:
    """A start that is to be sent, with the hooks around its sending.

    Attributes:
        token: of its intent, and in its callback URL.
        replaced: the token of another worker's intent, which this one replaces.
        task: waits for the answer.
        may_be_sent: whether the request may be sent, so that its answer must be waited for.
    """

    _item: Item
    _intents: Group[Intent, bool]
    token: str
    replaced: str | None
    task: asyncio.Task[Any] = attrs.field(init=False, factory=current_task)
    may_be_sent: bool = attrs.field(init=False, default=False)
    _is_cancelled: bool = attrs.field(init=False, default=False)

    async def before_send(self) -> None:
        """Record the intent."""
        if self._is_cancelled:  # the cancellation is still on its way here
            await asyncio.Event().wait()
        self.may_be_sent = True
        if not await self._intents.add(self._intent()):
            raise IntentRefused

    async def not_sent(self) -> None:
        """Take the intent back."""
        if self.may_be_sent:
            await self._intents.add(self._intent(is_taken_back=True))
            self.may_be_sent = False
        if self._is_cancelled:
            self.task.cancel()

    def cancel(self) -> None:
        """Cancel the start, unless its request may be sent."""
        self._is_cancelled = True
        if not self.may_be_sent:
            self.task.cancel()

    def _intent(self, *, is_taken_back: bool = False) -> Intent:
        key, attempt = self._item.key, self._item.attempt
        return Intent(key, attempt, self.token, self.replaced, is_taken_back)


class IntentRefused(Exception):
    """Another worker has the item, or it has an outcome."""
