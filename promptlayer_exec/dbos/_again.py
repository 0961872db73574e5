"""Items that ended and are run again: followed once more, or started once more, deliberately.

Each begins its next attempt, a DBOS workflow of its own. One that is only followed gets the result
of the earlier start as an argument, so that it starts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import sqlalchemy as sa

from promptlayer_exec.dbos._store import Queued, Store
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
    request: str | None = None,
) -> bool:
    """Follow a run whose start another worker takes for unknown; return whether it can be.

    `token` is that of the intent to start it. Without the `request`, the item is unknown, and DBOS
    has the request.
    """
    query = sa.select(_item.key, _item.attempt, _item.kind, _item.outcome).where(
        _item.batch == batch,
        _item.key == key,
        _item.attempt == attempt,
        _item.intent == token,
        sa.or_(_item.kind.is_(None), _item.kind == "unknown"),
    )
    requests = store.stored_requests(batch, {key: attempt}) if request is None else {key: request}

    def work(connection: sa.Connection) -> bool:
        lock_batch(connection, batch)
        rows = connection.execute(query).all()
        chosen = [_Again(row.key, row.attempt, row.kind, started) for row in rows]
        return bool(_begin(store, connection, batch, chosen, requests))

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
    page = sa.select(_item.key, _item.attempt).where(ended).order_by(_item.key).limit(_AT_ONCE)
    query = (
        sa.select(_item.key, _item.attempt, _item.kind, _item.outcome, callbacks.c.execution_id)
        .outerjoin(callbacks, called_back)
        .where(ended)
    )
    count, last = 0, ""

    def work(requests: Mapping[str, str], connection: sa.Connection) -> int:
        lock_batch(connection, batch)
        chosen = []
        for row in connection.execute(query.where(_item.key.in_(requests))):
            outcome = StoredOutcome.from_json(row.outcome)
            is_chosen, started = choose(outcome)
            # Its callback may have come while this waited for the lock.
            if row.execution_id is not None and outcome.execution_id is None:
                is_chosen, started = True, start_result(row.execution_id)
            if is_chosen:
                chosen.append(_Again(row.key, row.attempt, row.kind, started))
        return _begin(store, connection, batch, chosen, requests)

    while not store.is_cancelled() and (rows := store.rows(page.where(_item.key > last))):
        requests = store.stored_requests(batch, {row.key: row.attempt for row in rows})
        count += store.transact(partial(work, requests))
        last = rows[-1].key
    return count


def _begin(
    store: Store,
    connection: sa.Connection,
    batch: str,
    chosen: Sequence[_Again],
    requests: Mapping[str, str],
) -> int:
    """Begin the next attempt of items, whose rows are locked, and return how many there are."""
    # DBOS no longer has the others, for example because its rows were deleted.
    possible = [again for again in chosen if again.key in requests]
    if not possible:
        return 0
    these = (_item.batch == batch, _item.key.in_([again.key for again in possible]))
    update = sa.update(items).where(*these)
    changes = dict.fromkeys(("kind", "seq", "outcome", "intent", "started", "seconds"))
    connection.execute(update.values(attempt=_item.attempt + 1, **changes))
    counts = Counter(again.kind for again in possible if again.kind is not None)
    if counts:
        fewer = {kind: batches.c[kind] - count for kind, count in counts.items()}
        connection.execute(sa.update(batches).where(batches.c.name == batch).values(**fewer))
    queued = [
        Queued(again.key, again.attempt + 1, requests[again.key], again.started)
        for again in possible
    ]
    store.enqueue(connection, batch, queued)
    return len(possible)
