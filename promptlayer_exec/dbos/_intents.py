"""The intent to start an item, and the result of the request, both in the row of the item.

A worker records the intent just before it sends the request, and takes it back if it did not send
the request. An item with an intent, but without a result, may have a run: it is unknown. Because an
item has room for one intent, only one worker sends its request, and only that worker can record the
result. A worker that stood still while another one took over its items starts none of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import attrs
import sqlalchemy as sa

from promptlayer_exec import ConfigurationError, StartUnknown, StoreUnavailable
from promptlayer_exec import _integration as integration
from promptlayer_exec._database.threads import Group
from promptlayer_exec.dbos._records import StartRecord
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import (
    attempt_of,
    callbacks,
    called_back,
    items,
    the_attempt,
)

_item = items.c
_token: sa.BindParameter[str] = sa.bindparam("token")
_is_free = sa.or_(_item.intent.is_(None), _item.intent == _token)
_RECORD = (
    sa.update(items).where(the_attempt, _item.started.is_(None), _is_free).values(intent=_token)
)
_RECORD_START = (
    sa.update(items)
    .where(the_attempt, _is_free)
    .values(intent=_token, started=sa.bindparam("result"))
)
_TAKE_BACK = sa.update(items).where(the_attempt, _item.intent == _token).values(intent=None)


class SendResult(NamedTuple):
    """The result of the request that a worker sent, as JSON, with the token of its intent."""

    key: str
    attempt: int
    token: str
    result: str


class Item(NamedTuple):
    """An attempt of an item without an outcome yet, and what its row contains about the request.

    Attributes:
        request: what to start, as JSON.
        called_back: the execution id in the callback of the run with this intent.
    """

    key: str
    attempt: int
    request: str
    intent: str | None
    started: str | None
    called_back: int | None


@attrs.frozen
class Intent:
    """The intent of a worker to start one attempt of an item, or its withdrawal.

    Attributes:
        token: distinguishes the intents of several workers. It is in the run's callback URL.
    """

    key: str
    attempt: int
    token: str
    is_taken_back: bool = False


class IntentRefused(integration.AlreadyClaimed):
    """Another worker has the item, or it has an outcome."""


@attrs.define(eq=False, repr=False)
class PendingSend:
    """A start to be sent, with the hooks around its sending.

    Attributes:
        task: waits for the response.
        may_be_sent: whether the request may have been sent, so that its response matters.
        recording: records the id of the run, once it has started.
    """

    _intent: Intent
    _intents: Group[Intent, bool]
    task: asyncio.Task[Any]
    _record: Callable[[int], Coroutine[Any, Any, StartRecord | None]]
    may_be_sent: bool = attrs.field(init=False, default=False)
    recording: asyncio.Task[StartRecord | None] | None = attrs.field(init=False, default=None)
    _is_cancelled: bool = attrs.field(init=False, default=False)

    async def before_send(self) -> None:
        if self._is_cancelled:  # the cancellation is still on its way here
            await asyncio.Event().wait()
        self.may_be_sent = True
        if not await self._intents.add(self._intent):
            self.may_be_sent = False
            raise IntentRefused

    async def not_sent(self) -> None:
        await self._take_back()
        if self._is_cancelled:
            self.task.cancel()

    async def ended(self, outcome: integration.SendOutcome) -> None:
        """Begin to record the id of a run, or take the intent back if there is none."""
        if isinstance(outcome, integration.NewRun):
            # Not awaited here: while the database is away, other starts continue.
            self.recording = asyncio.create_task(self._record(outcome.execution_id))
        elif not isinstance(outcome, StartUnknown):
            with suppress(ConfigurationError, StoreUnavailable):  # then the item is unknown
                await self._take_back()

    async def _take_back(self) -> None:
        if self.may_be_sent:
            await self._intents.add(attrs.evolve(self._intent, is_taken_back=True))
            self.may_be_sent = False

    def cancel(self) -> None:
        """Cancel the request, unless the session may have sent it."""
        self._is_cancelled = True
        if not self.may_be_sent:
            self.task.cancel()


def write(store: Store, batch: str, intents: Sequence[Intent]) -> list[bool]:
    """Record intents, or take them back, and return for each whether the row has it now.

    It is not if the item has an outcome, another worker's intent, or a later attempt.
    """
    given: list[dict[str, object]] = []
    taken_back: list[dict[str, object]] = []
    for intent in {intent.token: intent for intent in intents}.values():  # the last of each token
        row = attempt_of(batch, intent.key, intent.attempt) | {"token": intent.token}
        if intent.is_taken_back:
            taken_back.append(row)
        else:
            given.append(row)

    def write(connection: sa.Connection) -> set[str]:
        if taken_back:
            connection.execute(_TAKE_BACK.values(since=store.now), taken_back)
        if given:
            connection.execute(_RECORD.values(since=store.now), given)
        return _recorded(connection, batch, [intent.key for intent in intents])

    recorded = store.transact(write)
    return [intent.token in recorded for intent in intents]


def write_started(store: Store, batch: str, starts: Sequence[SendResult]) -> list[bool]:
    """Record the results of requests, and return for each whether the row has it now.

    It is not if the item has an outcome, another worker's intent, or a later attempt.
    """
    rows = [
        {
            **attempt_of(batch, start.key, start.attempt),
            "token": start.token,
            "result": start.result,
        }
        for start in starts
    ]

    def write(connection: sa.Connection) -> set[str]:
        connection.execute(_RECORD_START.values(since=store.now), rows)
        return _recorded(connection, batch, [start.key for start in starts], with_result=True)

    recorded = store.transact(write)
    return [start.token in recorded for start in starts]


def _recorded(
    connection: sa.Connection, batch: str, keys: Sequence[str], *, with_result: bool = False
) -> set[str]:
    """Return the intents of items with these keys that have no outcome."""
    query = sa.select(_item.intent, _item.kind, _item.started)
    query = query.where(_item.batch == batch, _item.key.in_(keys))

    unfinished = [row for row in connection.execute(query) if row.kind is None]
    if with_result:
        unfinished = [row for row in unfinished if row.started is not None]
    return {row.intent for row in unfinished}


def read(store: Store, batch: str, attempts: Sequence[tuple[str, int]]) -> list[Item | None]:
    """Return attempts of items, given as key and number, or None for one that has finished."""
    columns = (_item.key, _item.attempt, _item.request, _item.intent, _item.started)
    query = (
        sa.select(*columns, callbacks.c.execution_id)
        .outerjoin(callbacks, called_back)
        .where(_item.batch == batch, _item.key.in_([key for key, _ in attempts]))
        # As in `the_attempt`, not IS NULL.
        .where(sa.func.coalesce(_item.kind, "") == "")
    )
    found = {(row.key, row.attempt): Item(*row) for row in store.rows(query)}
    return [found.get(attempt) for attempt in attempts]
