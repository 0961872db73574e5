"""Items that ended and are run again: followed once more, or started once more, deliberately.

Each begins its next attempt, a DBOS workflow of its own. One that is only followed keeps the result
of the earlier start in its row, so that it starts nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import sqlalchemy as sa

from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import (
    batches,
    callbacks,
    called_back,
    items,
    lock_batch,
)
from promptlayer_exec.dbos._values import StoredOutcome, start_result

_AT_ONCE = 500
_item = items.c
# The result of a step "start", which a new attempt follows; None to start a run.
Started = Mapping[str, Any] | None


class _Again(NamedTuple):
    """An item that is to be run again."""

    key: str
    attempt: int  # the one that ended
    kind: str | None
    started: Started


def recheck(store: Store, batch: str) -> int:
    """Follow again every failed item whose id is known, if only by a callback; return how many."""

    def choose(outcome: StoredOutcome) -> tuple[bool, Started]:
        started = _started(outcome)
        return started is not None, started

    return _reopen(store, batch, ["failed"], choose)


def retry(store: Store, batch: str, kinds: Sequence[str]) -> int:
    """Start items of these kinds again; return how many.

    One that has a run which is not known to have failed is followed instead: it may be paid for.
    """

    def choose(outcome: StoredOutcome) -> tuple[bool, Started]:
        has_failed = outcome.error is not None and outcome.error.type == "ExecutionFailed"
        return True, None if has_failed else _started(outcome)

    return _reopen(store, batch, kinds, choose)


def adopt(
    store: Store,
    batch: str,
    *,
    key: str,
    attempt: int,
    token: str,
    started: Mapping[str, Any],
) -> bool:
    """Follow a run whose start another worker takes for unknown; return whether it can be.

    `token` is that of the intent to start it.
    """
    query = sa.select(_item.key, _item.attempt, _item.kind, _item.outcome).where(
        _item.batch == batch,
        _item.key == key,
        _item.attempt == attempt,
        _item.intent == token,
        sa.or_(_item.kind.is_(None), _item.kind == "unknown"),
    )

    def work(connection: sa.Connection) -> bool:
        lock_batch(connection, batch)
        rows = connection.execute(query).all()
        chosen = [_Again(row.key, row.attempt, row.kind, started) for row in rows]
        return bool(_begin(store, connection, batch, chosen))

    return store.transact(work)


def _started(outcome: StoredOutcome) -> Started:
    if outcome.execution_id is None:
        return None
    at = (outcome.started or outcome.finished).isoformat()
    return {"execution_id": outcome.execution_id, "at": at, "error": None}


def _reopen(
    store: Store,
    batch: str,
    kinds: Sequence[str],
    choose: Callable[[StoredOutcome], tuple[bool, Started]],
) -> int:
    ended = sa.and_(_item.batch == batch, _item.kind.in_(kinds))
    page = sa.select(_item.key).where(ended).order_by(_item.key).limit(_AT_ONCE)
    query = (
        sa.select(_item.key, _item.attempt, _item.kind, _item.outcome, callbacks.c.execution_id)
        .outerjoin(callbacks, called_back)
        .where(ended)
    )
    count, last = 0, ""

    def work(keys: Sequence[str], connection: sa.Connection) -> int:
        lock_batch(connection, batch)
        chosen = []
        for row in connection.execute(query.where(_item.key.in_(keys))):
            outcome = StoredOutcome.from_json(row.outcome)
            is_chosen, started = choose(outcome)
            # Its callback may have come while this waited for the lock.
            if row.execution_id is not None and outcome.execution_id is None:
                is_chosen, started = True, start_result(row.execution_id)
            if is_chosen:
                chosen.append(_Again(row.key, row.attempt, row.kind, started))
        return _begin(store, connection, batch, chosen)

    while not store.is_cancelled() and (rows := store.rows(page.where(_item.key > last))):
        count += store.transact(partial(work, [row.key for row in rows]))
        last = rows[-1].key
    return count


def _begin(store: Store, connection: sa.Connection, batch: str, chosen: Sequence[_Again]) -> int:
    """Begin the next attempt of items, whose rows are locked, and return how many there are."""
    if not chosen:
        return 0
    changes = dict.fromkeys(("kind", "seq", "outcome", "intent", "seconds"))
    connection.execute(
        sa.update(items)
        .where(_item.batch == batch, _item.key == sa.bindparam("the_key"))
        .values(attempt=_item.attempt + 1, started=sa.bindparam("result"), **changes),
        [
            {"the_key": again.key, "result": again.started and json.dumps(again.started)}
            for again in chosen
        ],
    )
    counts = Counter(again.kind for again in chosen if again.kind is not None)
    if counts:
        fewer = {kind: batches.c[kind] - count for kind, count in counts.items()}
        connection.execute(sa.update(batches).where(batches.c.name == batch).values(**fewer))
    store.enqueue(connection, batch, [(again.key, again.attempt + 1) for again in chosen])
    return len(chosen)
