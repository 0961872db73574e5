"""Items that ended and are run again: followed once more, or started once more, deliberately.

Each begins its next attempt, a DBOS workflow of its own. One that is only followed keeps the result
of the earlier start in its row, so that it starts nothing.

An unknown item is followed when the callback of its start has come. That may be before the item is
unknown: the worker that sent the start has died, but nobody knows it yet. So each callback is
stored, and both who stores one and who stores an unknown outcome look afterwards for items that
have both. Whoever comes second finds them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from promptlayer_exec.dbos._records import Ending, StoredOutcome, start_record
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import callbacks, called_back, items, lock_batch

_AT_ONCE = 500
_item = items.c
_callback_id = callbacks.c.execution_id


def recheck(store: Store, batch: str) -> int:
    """Follow again every failed item whose id is known, if only by a callback; return how many."""
    return _reopen(store, batch, _item.kind == "failed", starts=False)


def retry(store: Store, batch: str, kinds: Sequence[str]) -> int:
    """Start items of these kinds again; return how many.

    One that has a run which is not known to have failed is followed instead: it may be paid for.
    """
    return _reopen(store, batch, _item.kind.in_(kinds), starts=True)


def resolve(store: Store, batch: str, *which: sa.ColumnElement[bool]) -> int:
    """Follow each unknown item whose callback is stored; return how many there were."""
    return _reopen(
        store, batch, _item.kind == "unknown", _callback_id.is_not(None), *which, starts=False
    )


def record_callback(store: Store, batch: str, token: str, execution_id: int) -> bool:
    """Store the callback of a start, the first one counts; return True if its item is followed."""
    insert = store.insert(callbacks).values(batch=batch, token=token, execution_id=execution_id)
    store.execute(insert.on_conflict_do_nothing())
    return resolve(store, batch, _item.intent == token) > 0


def finish(store: Store, batch: str, endings: Sequence[Ending]) -> list[bool]:
    """Store the outcomes of items, and let those unknown be followed whose callbacks are stored.

    Returns for each whether it was stored.
    """
    stored = store.finish(batch, endings)
    if any(ending.kind == "unknown" for ending in endings):
        resolve(store, batch)
    return [(ending.key, ending.attempt) in stored for ending in endings]


def _reopen(store: Store, batch: str, *which: sa.ColumnElement[bool], starts: bool) -> int:
    ended = sa.select().select_from(items.outerjoin(callbacks, called_back))
    ended = ended.where(_item.batch == batch, *which)
    page = ended.add_columns(_item.key).order_by(_item.key).limit(_AT_ONCE)
    query = ended.add_columns(_item.key, _item.attempt, _item.kind, _item.outcome, _callback_id)
    count, last = 0, ""
    while not store.is_cancelled() and (rows := store.rows(page.where(_item.key > last))):
        some = query.where(_item.key.in_([row.key for row in rows]))
        count += store.transact(partial(_begin, store, batch, some, starts=starts))
        last = rows[-1].key
    return count


def _begin(
    store: Store, batch: str, ended: sa.Select[Any], connection: sa.Connection, *, starts: bool
) -> int:
    """Begin the next attempt of items that ended, and return how many there are."""
    try:
        lock_batch(connection, batch)
    except exc.NoResultFound:  # the batch was just deleted
        return 0
    chosen = []
    for row in connection.execute(ended):
        outcome = StoredOutcome.from_json(row.outcome)
        # Its callback may have come while this waited for the lock.
        execution_id = outcome.execution_id or row.execution_id
        has_failed = outcome.error is not None and outcome.error.type == "ExecutionFailed"
        started = None
        if execution_id is not None and not (starts and has_failed):
            at = outcome.started or outcome.finished
            started = json.dumps(start_record(execution_id, at=at))
        if starts or started is not None:
            chosen.append((row, started))
    if chosen:
        changes = dict.fromkeys(("kind", "seq", "outcome", "intent", "seconds"))
        connection.execute(
            sa.update(items)
            .where(_item.batch == batch, _item.key == sa.bindparam("the_key"))
            .values(attempt=_item.attempt + 1, started=sa.bindparam("result"), **changes),
            [{"the_key": row.key, "result": started} for row, started in chosen],
        )
        counts = Counter(row.kind for row, _ in chosen)
        store.count(connection, batch, {kind: -count for kind, count in counts.items()})
        store.enqueue(connection, batch, [(row.key, row.attempt + 1) for row, _ in chosen])
    return len(chosen)
