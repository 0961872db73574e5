"""The intent to start an item: recorded just before its request is sent, and taken back if not.

An item with an intent and no result of its start may have been started: it is unknown. Recording
one is also what lets only one worker send the request of an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from promptlayer_exec.dbos._tables import items

if TYPE_CHECKING:
    from promptlayer_exec.dbos._store import Store

_item = items.c
# PostgreSQL: all intents of a call in one round trip.
_RECORD = sa.text(
    """
    UPDATE promptlayer_item SET intent = t.token
    FROM unnest(
        CAST(:keys AS text[]), CAST(:attempts AS int[]), CAST(:tokens AS text[]),
        CAST(:replaced AS text[])
    ) AS t (key, attempt, token, replaced)
    WHERE promptlayer_item.batch = :batch AND promptlayer_item.key = t.key
        AND promptlayer_item.attempt = t.attempt AND promptlayer_item.kind IS NULL
        AND coalesce(promptlayer_item.intent, t.token) IN (t.token, t.replaced)
    RETURNING t.token
    """
)
_RECORD_ONE = sa.text(
    """
    UPDATE promptlayer_item SET intent = :token
    WHERE batch = :batch AND key = :key AND attempt = :attempt AND kind IS NULL
        AND coalesce(intent, :token) IN (:token, :replaced)
    RETURNING intent
    """
)
_TAKE_BACK = sa.text(
    "UPDATE promptlayer_item SET intent = NULL WHERE batch = :batch AND key = :key"
    " AND intent = :token"
)


class Intent(NamedTuple):
    """The intent of a worker to start one attempt of an item, or that it is taken back.

    Attributes:
        token: tells the intents of several workers apart.
        replaced: the token of another worker's intent that this one may replace.
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
    latest = {intent.token: intent for intent in intents}
    given = [intent for intent in latest.values() if not intent.is_taken_back]
    taken_back = [intent for intent in latest.values() if intent.is_taken_back]

    def write(connection: sa.Connection) -> set[str]:
        recorded: set[str] = set()
        if given and not store.is_sqlite:
            keys, attempts, tokens, replaced, _ = map(list, zip(*given, strict=True))
            values = {"keys": keys, "attempts": attempts, "tokens": tokens, "replaced": replaced}
            recorded.update(connection.execute(_RECORD, {"batch": batch, **values}).scalars())
        elif given:
            for intent in given:
                row = {
                    "batch": batch,
                    "key": intent.key,
                    "attempt": intent.attempt,
                    "token": intent.token,
                    "replaced": intent.replaced,
                }
                recorded.update(connection.execute(_RECORD_ONE, row).scalars())
        if taken_back:
            rows = [{"batch": batch, "key": each.key, "token": each.token} for each in taken_back]
            connection.execute(_TAKE_BACK, rows)
        return recorded

    recorded = store.transact(write)
    return [intent.token in recorded for intent in intents]


def read(store: Store, batch: str, key: str, attempt: int) -> tuple[bool, str | None]:
    """Return whether this attempt of an item has no outcome yet, and the token of its intent."""
    query = sa.select(_item.kind, _item.intent)
    query = query.where(_item.batch == batch, _item.key == key, _item.attempt == attempt)
    rows = store.rows(query)
    return (True, rows[0].intent) if rows and rows[0].kind is None else (False, None)
