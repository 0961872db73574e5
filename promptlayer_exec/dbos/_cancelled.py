"""Items whose DBOS workflow was ended by others, for example by `dbos workflow cancel`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from promptlayer_exec.dbos import _callbacks as callbacks
from promptlayer_exec.dbos._names import key_and_attempt
from promptlayer_exec.dbos._tables import NO_INTENT, Ending, items
from promptlayer_exec.dbos._values import StoredError, StoredOutcome

if TYPE_CHECKING:
    from promptlayer_exec.dbos._store import Store

_AT_ONCE = 500
_item = items.c
_CANCELLED = StoredError(
    "Cancelled",
    "the item was cancelled in DBOS: `batch recheck` follows its run if it has one, and"
    " `batch retry --failed` starts it again",
)
_UNKNOWN = StoredError(
    "StartUnknown", "the item was cancelled in DBOS while its start may have been sent"
)


def end_cancelled(store: Store, batch: str) -> int:
    """Store the outcome of each item that nobody runs any more; return how many there were.

    Otherwise the batch would wait for them for ever.
    """
    count = 0
    # Only items of version 0.1 have steps in DBOS, for which it takes a query each.
    stopped = [
        (key_and_attempt(workflow), workflow if is_first_version else None)
        for workflow, is_first_version in store.stopped(batch).items()
    ]
    for first in range(0, len(stopped), _AT_ONCE):
        part = dict(stopped[first : first + _AT_ONCE])
        keys = [key for key, _ in part]
        query = sa.select(_item.key, _item.attempt, _item.intent, _item.started)
        query = query.where(_item.batch == batch, _item.key.in_(keys), _item.kind.is_(None))
        endings = []
        for row in store.rows(query, once=True):
            if (row.key, row.attempt) in part:
                started = json.loads(row.started) if row.started else None
                if (workflow := part[row.key, row.attempt]) is not None:
                    started = started or _started(store.steps(workflow))
                outcome = _outcome(row.key, started, is_sent=row.intent is not None)
                # It may be started meanwhile; then this is decided again at the next look.
                intent = NO_INTENT if row.intent is None else None
                ending = Ending.of(row.attempt, outcome, intent, of_another=row.intent)
                endings.append(ending)
        if endings:
            callbacks.finish(store, batch, endings)
        count += len(endings)
    return count


def _started(steps: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the result of the step that started a run; only items of version 0.1 have it."""
    for step in steps:
        output = step["output"]
        if step["function_name"] == "start" and output and output["execution_id"] is not None:
            return dict(output)
    return None


def _outcome(key: str, started: Mapping[str, Any] | None, *, is_sent: bool) -> StoredOutcome:
    now = datetime.now(UTC)
    if started is not None:
        at = datetime.fromisoformat(started["at"])
        return StoredOutcome(key, started["execution_id"], False, None, _CANCELLED, at, now)
    return StoredOutcome(key, None, False, None, _UNKNOWN if is_sent else _CANCELLED, None, now)
