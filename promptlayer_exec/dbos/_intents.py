"""The intent to start an item, and the result of the start, both in the row of the item.

The intent is recorded just before the request is sent, and taken back if it was not sent. An item
with an intent and no result of its start may have been started: it is unknown. Recording an intent
is also what lets only one worker send the request of an item: the one that DBOS gave the item last.
A worker that stood still while another one took over its items starts none of them. If the intent
of a worker is there, only that worker can record the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa

from promptlayer_exec.dbos._engine import owned
from promptlayer_exec.dbos._names import workflow_id
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import callbacks, called_back, items

_item = items.c
# PostgreSQL: all intents of a call in one round trip.
_RECORD = sa.text(
    """
    UPDATE promptlayer_item SET intent = t.token
    FROM unnest(
        CAST(:keys AS text[]), CAST(:attempts AS int[]), CAST(:tokens AS text[]),
        CAST(:replaced AS text[]), CAST(:workflows AS text[])
    ) AS t (key, attempt, token, replaced, workflow)
    WHERE promptlayer_item.batch = :batch AND promptlayer_item.key = t.key
        AND promptlayer_item.attempt = t.attempt AND promptlayer_item.kind IS NULL
        AND promptlayer_item.started IS NULL
        AND (coalesce(promptlayer_item.intent, t.token) = t.token
            OR promptlayer_item.intent = t.replaced AND NOT EXISTS (
                SELECT 1 FROM promptlayer_callback AS c
                WHERE c.batch = :batch AND c.token = t.replaced
            ))
        AND (CAST(:worker AS text) IS NULL OR EXISTS (
            SELECT 1 FROM dbos.workflow_status AS w
            WHERE w.workflow_uuid = t.workflow AND w.executor_id = :worker AND w.status = 'PENDING'
        ))
    RETURNING t.token
    """
)
_RECORD_ONE = sa.text(
    """
    UPDATE promptlayer_item SET intent = :token
    WHERE batch = :batch AND key = :key AND attempt = :attempt AND kind IS NULL
        AND started IS NULL
        AND (coalesce(intent, :token) = :token
            OR intent = :replaced AND NOT EXISTS (
                SELECT 1 FROM promptlayer_callback AS c
                WHERE c.batch = :batch AND c.token = :replaced
            ))
        AND (:worker IS NULL OR EXISTS (
            SELECT 1 FROM workflow_status AS w
            WHERE w.workflow_uuid = :workflow AND w.executor_id = :worker AND w.status = 'PENDING'
        ))
    RETURNING intent
    """
)
_TAKE_BACK = sa.text(
    "UPDATE promptlayer_item SET intent = NULL WHERE batch = :batch AND key = :key"
    " AND intent = :token"
)
_RECORD_STARTS = sa.text(
    """
    UPDATE promptlayer_item SET started = t.started, intent = t.token
    FROM unnest(
        CAST(:keys AS text[]), CAST(:attempts AS int[]), CAST(:tokens AS text[]),
        CAST(:started AS text[])
    ) AS t (key, attempt, token, started)
    WHERE promptlayer_item.batch = :batch AND promptlayer_item.key = t.key
        AND promptlayer_item.attempt = t.attempt AND promptlayer_item.kind IS NULL
        AND coalesce(promptlayer_item.intent, t.token) = t.token
    RETURNING t.token
    """
)
_RECORD_START = sa.text(
    """
    UPDATE promptlayer_item SET started = :started, intent = :token
    WHERE batch = :batch AND key = :key AND attempt = :attempt AND kind IS NULL
        AND coalesce(intent, :token) = :token
    RETURNING intent
    """
)


class Started(NamedTuple):
    """The result of the start that a worker sent, as JSON, with the token of its intent."""

    key: str
    attempt: int
    token: str
    started: str


class State(NamedTuple):
    """Whether an attempt of an item has no outcome yet, and what is recorded about its start.

    Attributes:
        digest: says what the key stands for.
        called_back: the execution id in the callback of the start with this intent.
    """

    is_open: bool
    intent: str | None = None
    started: str | None = None
    digest: str | None = None
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


def write(
    store: Store, batch: str, intents: Sequence[Intent], worker: str | None = None
) -> list[bool]:
    """Record intents, or take them back; return for each whether it is recorded now.

    One is not recorded if the item has an outcome, another worker's intent, or a later attempt, or
    if it was taken from the `worker`, given as its DBOS executor.
    """
    latest = {intent.token: intent for intent in intents}
    given = [intent for intent in latest.values() if not intent.is_taken_back]
    taken_back = [intent for intent in latest.values() if intent.is_taken_back]

    def write(connection: sa.Connection) -> set[str]:
        recorded: set[str] = set()
        if given and not store.is_sqlite:
            keys, attempts, tokens, replaced, _ = map(list, zip(*given, strict=True))
            values = {
                "batch": batch,
                "worker": worker,
                "keys": keys,
                "attempts": attempts,
                "tokens": tokens,
                "replaced": replaced,
                "workflows": [workflow_id(batch, each.key, each.attempt) for each in given],
            }
            recorded.update(connection.execute(_RECORD, values).scalars())
        elif given:
            for intent in given:
                row = {
                    "batch": batch,
                    "workflow": workflow_id(batch, intent.key, intent.attempt),
                    "worker": worker,
                    "key": intent.key,
                    "attempt": intent.attempt,
                    "token": intent.token,
                    "replaced": intent.replaced,
                }
                recorded.update(connection.execute(_RECORD_ONE, row).scalars())
        # One that is refused now may have been recorded before, by a transaction that committed
        # although its connection was lost.
        refused = [intent for intent in given if intent.token not in recorded]
        rows = [
            {"batch": batch, "key": each.key, "token": each.token} for each in taken_back + refused
        ]
        if rows:
            connection.execute(_TAKE_BACK, rows)
        return recorded

    recorded = store.transact(write)
    return [intent.token in recorded for intent in intents]


def write_started(store: Store, batch: str, starts: Sequence[Started]) -> list[bool]:
    """Record the results of starts; return for each whether it is recorded now.

    One is not recorded if the item has an outcome, another worker's intent, or a later attempt:
    then its DBOS workflow may end.
    """

    def write(connection: sa.Connection) -> set[str]:
        if store.is_sqlite:
            recorded: set[str] = set()
            for key, attempt, token, started in starts:
                row = {"batch": batch, "key": key, "attempt": attempt, "token": token}
                result = connection.execute(_RECORD_START, row | {"started": started})
                recorded.update(result.scalars())
            return recorded
        keys, attempts, tokens, results = map(list, zip(*starts, strict=True))
        values = {"keys": keys, "attempts": attempts, "tokens": tokens, "started": results}
        return set(connection.execute(_RECORD_STARTS, {"batch": batch, **values}).scalars())

    recorded = store.transact(write)
    return [start.token in recorded for start in starts]


def read(
    store: Store, batch: str, attempts: Sequence[tuple[str, int]], worker: str | None = None
) -> list[State]:
    """Return the state of attempts of items, given as key and number.

    One that was taken from the `worker` is not open: whoever has it now goes on with it.
    """
    query = (
        sa.select(
            *(_item.key, _item.attempt, _item.kind, _item.intent, _item.started, _item.digest),
            callbacks.c.execution_id,
        )
        .outerjoin(callbacks, called_back)
        .where(_item.batch == batch, _item.key.in_([key for key, _ in attempts]))
    )
    workflows = {workflow_id(batch, *each): each for each in attempts}

    def read() -> dict[tuple[str, int], State]:
        with store.reading() as connection:
            found = {
                (row.key, row.attempt): State(
                    True, row.intent, row.started, row.digest, row.execution_id
                )
                for row in connection.execute(query)
                if row.kind is None
            }
            if worker is not None:
                kept = {workflows[each] for each in owned(connection, worker, workflows)}
                found = {each: state for each, state in found.items() if each in kept}
        return found

    found = store.retry(read)
    return [found.get(each, _CLOSED) for each in attempts]
