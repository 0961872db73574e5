"""The intent to start an item, and the result of the start, both in the row of the item.

The intent is recorded just before the request is sent, and taken back if it was not sent. An item
with an intent and no result of its start may have been started: it is unknown. Recording an intent
is also what lets only one worker send the request of an item, and only that worker can record the
result. A worker that stood still while another one took over its items starts none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa

from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import (
    attempt_of,
    callbacks,
    called_back,
    items,
    the_attempt,
)

_item, _callback = items.c, callbacks.c
_token: sa.BindParameter[str] = sa.bindparam("token")
_replaced: sa.BindParameter[str | None] = sa.bindparam("replaced")
_no_callback = ~sa.exists().where(
    _callback.batch == sa.bindparam("the_batch"), _callback.token == _replaced
)
_is_free = sa.or_(_item.intent.is_(None), _item.intent == _token)
_RECORD = (
    sa.update(items)
    .where(the_attempt, _item.started.is_(None))
    .where(sa.or_(_is_free, sa.and_(_item.intent == _replaced, _no_callback)))
    .values(intent=_token)
)
_RECORD_START = (
    sa.update(items)
    .where(the_attempt, _is_free)
    .values(intent=_token, started=sa.bindparam("result"))
)
_TAKE_BACK = sa.update(items).where(the_attempt, _item.intent == _token).values(intent=None)


class Started(NamedTuple):
    """The result of the start that a worker sent, as JSON, with the token of its intent."""

    key: str
    attempt: int
    token: str
    result: str


class State(NamedTuple):
    """Whether an attempt of an item has no outcome yet, and what is recorded about its start.

    Attributes:
        request: what is to be started, as JSON.
        called_back: the execution id in the callback of the start with this intent.
    """

    is_open: bool
    request: str = ""
    intent: str | None = None
    started: str | None = None
    called_back: int | None = None


_CLOSED = State(False)


class Intent(NamedTuple):
    """The intent of a worker to start one attempt of an item, or that it is taken back.

    Attributes:
        token: distinguishes the intents of several workers.
        replaced: the token of another worker's intent that this one may replace, unless its
            callback has come.
    """

    key: str
    attempt: int
    token: str
    replaced: str | None
    is_taken_back: bool


def write(store: Store, batch: str, intents: Sequence[Intent]) -> list[bool]:
    """Record intents, or take them back; return for each whether it is recorded now.

    One is not recorded if the item has an outcome, another worker's intent, or a later attempt.
    """
    given: list[dict[str, object]] = []
    taken_back: list[dict[str, object]] = []
    for intent in {intent.token: intent for intent in intents}.values():  # the last of each token
        row = attempt_of(batch, intent.key, intent.attempt) | {"token": intent.token}
        if intent.is_taken_back:
            taken_back.append(row)
        else:
            given.append(row | {"replaced": intent.replaced})

    def write(connection: sa.Connection) -> set[str]:
        if taken_back:
            connection.execute(_TAKE_BACK, taken_back)
        if given:
            connection.execute(_RECORD, given)
        return _recorded(connection, batch, [intent.key for intent in intents])

    recorded = store.transact(write)
    return [intent.token in recorded for intent in intents]


def write_started(store: Store, batch: str, starts: Sequence[Started]) -> list[bool]:
    """Record the results of starts; return for each whether it is recorded now.

    One is not recorded if the item has an outcome, another worker's intent, or a later attempt.
    """
    rows = [
        attempt_of(batch, start.key, start.attempt) | {"token": start.token, "result": start.result}
        for start in starts
    ]

    def write(connection: sa.Connection) -> set[str]:
        connection.execute(_RECORD_START, rows)
        return _recorded(connection, batch, [start.key for start in starts], with_result=True)

    recorded = store.transact(write)
    return [start.token in recorded for start in starts]


def _recorded(
    connection: sa.Connection, batch: str, keys: Sequence[str], *, with_result: bool = False
) -> set[str]:
    """Return the intents of items with these keys that have no outcome."""
    query = sa.select(_item.intent, _item.kind, _item.started)
    query = query.where(_item.batch == batch, _item.key.in_(keys))
    return {
        row.intent
        for row in connection.execute(query)
        if row.kind is None and not (with_result and row.started is None)
    }


def read(store: Store, batch: str, attempts: Sequence[tuple[str, int]]) -> list[State]:
    """Return the state of attempts of items, given as key and number."""
    query = (
        sa.select(
            *(_item.key, _item.attempt, _item.kind, _item.request, _item.intent, _item.started),
            _callback.execution_id,
        )
        .outerjoin(callbacks, called_back)
        .where(_item.batch == batch, _item.key.in_([key for key, _ in attempts]))
    )
    found = {
        (row.key, row.attempt): State(True, row.request, row.intent, row.started, row.execution_id)
        for row in store.rows(query)
        if row.kind is None
    }
    return [found.get(each, _CLOSED) for each in attempts]
