"""Callbacks of starts whose answers were lost: they turn unknown items into items with an id.

A callback may come before its item is unknown: the worker that sent the start has died, but nobody
knows it yet. So each callback is stored, and both who stores one and who stores an unknown outcome
look afterwards for items that have both. Whoever comes second finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa

from promptlayer_exec.dbos import _again as again
from promptlayer_exec.dbos._tables import (
    Ending,
    callbacks,
    called_back,
    items,
)
from promptlayer_exec.dbos._values import start_result

if TYPE_CHECKING:
    from promptlayer_exec.dbos._store import Store

_item, _callback = items.c, callbacks.c


def record(store: Store, batch: str, token: str, execution_id: int) -> None:
    """Store a callback; the first one of a start counts."""
    insert = store.insert(callbacks).values(batch=batch, token=token, execution_id=execution_id)
    store.execute(insert.on_conflict_do_nothing())


def finish(store: Store, batch: str, endings: Sequence[Ending]) -> set[tuple[str, int]]:
    """Store the outcomes of items, and let those unknown be followed whose callbacks are stored.

    Returns the keys and attempts of those that were stored.
    """
    stored = store.finish(batch, endings)
    if any(ending.kind == "unknown" for ending in endings):
        resolve(store, batch)
    return stored


def resolve(store: Store, batch: str) -> int:
    """Let each unknown item whose callback is stored be followed; return how many there were.

    There may be many: if this is cancelled, it stops before the next one.
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
        if not store.is_cancelled()
    )
