"""Callbacks of starts whose answers were lost: they turn unknown items into items with an id.

A callback may come before its item is unknown: the worker that sent the start has died, but nobody
knows it yet. So each callback is stored, and both who stores one and who stores an unknown outcome
look afterwards for items that have both. Whoever comes second finds them.

A callback may also contradict the answer: a gateway refused a start that it passed on, or a start
that was sent again after a 429 began two runs. Then the item stays as it is, and a warning tells of
the run that its outcome does not know.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa

from promptlayer_exec.dbos import _again as again
from promptlayer_exec.dbos._tables import (
    Ending,
    callbacks,
    called_back,
    earlier_starts,
    items,
)
from promptlayer_exec.dbos._values import start_result

if TYPE_CHECKING:
    from promptlayer_exec.dbos._store import Store

logger = logging.getLogger("promptlayer_exec")
_item, _callback = items.c, callbacks.c
# The outcome may be large, and is needed only if version 0.1 started the item.
_without_start = sa.case((_item.started.is_(None), _item.outcome))
_RECORD = sa.text(
    "INSERT INTO promptlayer_callback (batch, token, execution_id)"
    " VALUES (:batch, :token, :execution_id) ON CONFLICT DO NOTHING"
)


def record(store: Store, batch: str, token: str, execution_id: int) -> None:
    """Store a callback; the first one of a start counts.

    Warn of its execution if the item's outcome denies or does not know it. While there is no
    outcome, `finish` will do so, except for a later callback, which is not stored.
    """
    row = {"batch": batch, "token": token, "execution_id": execution_id}
    is_first = store.transact(lambda connection: connection.execute(_RECORD, row).rowcount > 0)
    for key, kind, known, first in _called_back(store, batch, _item.intent == token):
        is_news = execution_id != first or (is_first and kind is not None)
        if is_news and execution_id != known:
            _warn(batch, key, execution_id, first if kind is None and known is None else known)
    of_earlier = (earlier_starts.c.batch == batch, earlier_starts.c.token == token)
    query = (
        sa.select(_item.key, _item.started, _callback.execution_id)
        .join(earlier_starts, sa.and_(_item.key == earlier_starts.c.key, *of_earlier))
        .join(callbacks, sa.and_(_callback.batch == batch, _callback.token == token))
        .where(_item.batch == batch)
    )
    for key, started, first in store.rows(query):
        is_news = is_first or execution_id != first
        if is_news and (started is None or json.loads(started)["execution_id"] != execution_id):
            logger.warning(
                "batch %r: execution %d was begun by an earlier start of item %.100r",
                *(batch, execution_id, key),
            )


def finish(store: Store, batch: str, endings: Sequence[Ending]) -> set[tuple[str, int]]:
    """Store the outcomes of items, and let those unknown be followed whose callbacks are stored.

    Warn of callbacks that the outcomes deny or do not know. Returns the keys and attempts of those
    that were stored.
    """
    stored = store.finish(batch, endings)
    if any(ending.kind == "unknown" for ending in endings):
        resolve(store, batch, to_the_end=True)
    keys = [each.key for each in endings if (each.key, each.attempt) in stored]
    for key, _, known, first in _called_back(store, batch, _item.key.in_(keys)):
        if first != known:
            _warn(batch, key, first, known)
    return stored


def _called_back(
    store: Store, batch: str, which: sa.ColumnElement[bool]
) -> Iterator[tuple[str, str | None, int | None, int]]:
    """Yield the key and kind of items with callbacks, their id, and that in the first callback."""
    query = (
        sa.select(_item.key, _item.kind, _item.started, _without_start, _callback.execution_id)
        .join(callbacks, called_back)
        .where(_item.batch == batch, _item.kind.is_distinct_from("unknown"), which)
    )
    for key, kind, started, outcome, first in store.rows(query):
        known = json.loads(started or outcome or '{"execution_id": null}')["execution_id"]
        yield key, kind, known, first


def resolve(store: Store, batch: str, *, to_the_end: bool = False) -> int:
    """Let each unknown item whose callback is stored be followed; return how many there were.

    There may be many. If this is cancelled, it stops before the next one, unless it goes on
    `to_the_end`, as when the items have just become unknown: then nobody may look for them again.
    """
    query = (
        sa.select(_item.key, _item.attempt, _item.intent, _callback.execution_id)
        .join(callbacks, called_back)
        .where(_item.batch == batch, _item.kind == "unknown")
    )
    return sum(
        again.adopt(
            store,
            batch,
            key=row.key,
            attempt=row.attempt,
            token=row.intent,
            started=start_result(row.execution_id),
        )
        for row in store.rows(query)
        if to_the_end or not store.is_cancelled()
    )


def _warn(batch: str, key: str, execution_id: int, known: int | None) -> None:
    if known is None:
        logger.warning(
            "batch %r: execution %d of item %.100r had started, although its start failed; recheck"
            " follows it",
            *(batch, execution_id, key),
        )
    else:
        logger.warning(
            "batch %r: execution %d was begun by the same start as execution %d of item %.100r",
            *(batch, execution_id, known, key),
        )
