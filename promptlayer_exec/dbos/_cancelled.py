"""Items whose workflow was cancelled, ended or deleted by others, as by `dbos workflow cancel`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from promptlayer_exec.dbos import _callbacks as callbacks
from promptlayer_exec.dbos._names import (
    FIRST_WORKFLOW,
    INTENT_IN_ROW,
    workflow_id,
    workflow_prefix,
)
from promptlayer_exec.dbos._tables import NO_INTENT, WORKFLOWS, Ending, items
from promptlayer_exec.dbos._values import StoredError, StoredOutcome

if TYPE_CHECKING:
    from promptlayer_exec.dbos._store import Store

_AT_ONCE = 500
_PAGE = 2000
_item = items.c
_DELETED = StoredError(
    "Cancelled",
    "the workflow of the item was deleted in DBOS, and its request with it: to run it again, add it"
    " under a new key, or to a batch with another name",
)
_CANCELLED = StoredError(
    "Cancelled",
    "the item was cancelled in DBOS: `batch recheck` follows its run if it has one, and"
    " `batch retry --failed` starts it again",
)
_UNKNOWN = StoredError(
    "StartUnknown", "the item was cancelled or deleted in DBOS while its start may have been sent"
)


def end_cancelled(store: Store, batch: str, until: float = math.inf) -> bool:
    """Store the outcome of each item that nobody runs any more; return False if some are left.

    Without this, the batch would wait for them for ever. It takes some hundreds at a time, and the
    next ones only until `until`, on the clock of `time.monotonic`.
    """
    rows = store.rows(_cancelled(store.engine.dialect.name, batch), once=True)
    for first in range(0, len(rows), _AT_ONCE):
        part = rows[first : first + _AT_ONCE]
        _end(store, batch, part, _CANCELLED)
        if time.monotonic() > until:
            return first + len(part) == len(rows)
    return True


def end_deleted(store: Store, batch: str, after: str = "", until: float = math.inf) -> str:
    """Store the outcomes of items whose workflow is gone, in the order of their keys.

    It looks at two thousand items at a time, counting those that have ended, until `until`, on the
    clock of `time.monotonic`. It returns the last key, from which the next call goes on, or ""
    after the last item.
    """
    workflow = WORKFLOWS[store.engine.dialect.name].c.workflow_uuid
    page = (
        sa.select(
            *(_item.key, _item.kind, _item.attempt, _item.intent, _item.started),
            sa.null().label("name"),
            # Version 0.1, which stored no digest, had its intents in the workflow that is gone.
            sa.or_(_item.intent.is_not(None), _item.digest.is_(None)).label("may_be_sent"),
        )
        .where(_item.batch == batch)
        .order_by(_item.key)
        .limit(_PAGE)
    )
    while rows := store.rows(page.where(_item.key > after), once=True):
        # Left out only here: to find the next ones, the database might read millions that have one.
        waiting = [row for row in rows if row.kind is None]
        ids = {workflow_id(batch, row.key, row.attempt): row for row in waiting}
        found = store.rows(sa.select(workflow).where(workflow.in_(ids)), once=True)
        there = {row.workflow_uuid for row in found}
        _end(store, batch, [row for each, row in ids.items() if each not in there], _DELETED)
        after = rows[-1].key
        if time.monotonic() > until:
            return after
    return ""


def _end(store: Store, batch: str, rows: Sequence[Any], error: StoredError) -> None:
    endings = []
    for row in rows:
        started = json.loads(row.started) if row.started else None
        is_sent = row.may_be_sent
        if started is None and row.name == FIRST_WORKFLOW:
            # Only items of version 0.1 have steps in DBOS, for which it takes a query each.
            steps = store.steps(row.workflow_uuid)
            started, is_sent = _started(steps), is_sent or _may_be_sent(steps)
        outcome = _outcome(row.key, started, error, is_sent=is_sent)
        # It may be started meanwhile; then this is decided again at the next look.
        intent = NO_INTENT if row.intent is None else None
        endings.append(Ending.of(row.attempt, outcome, intent, of_another=row.intent))
    if endings:
        callbacks.finish(store, batch, endings)


def _cancelled(dialect: str, batch: str) -> sa.Select[Any]:
    """Return the query for the items without an outcome whose workflow has ended."""
    workflow = WORKFLOWS[dialect].c
    prefix = workflow_prefix(batch)
    # The id of a workflow is the prefix, the number of the attempt, a slash, and the key.
    rest = sa.func.substr(workflow.workflow_uuid, len(prefix) + 1)
    find = sa.func.instr if dialect == "sqlite" else sa.func.strpos
    slash = find(rest, "/")
    return sa.select(
        *(_item.key, _item.attempt, _item.intent, _item.started),
        *(workflow.workflow_uuid, workflow.name),
        _item.intent.is_not(None).label("may_be_sent"),
    ).where(
        workflow.status.in_(["CANCELLED", "ERROR", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]),
        sa.func.substr(workflow.workflow_uuid, 1, len(prefix)) == prefix,
        _item.batch == batch,
        _item.key == sa.func.substr(rest, slash + 1),
        sa.cast(_item.attempt, sa.Text) == sa.func.substr(rest, 1, slash - 1),
        # Without the index on `kind`: where its statistics are old, PostgreSQL would begin with it,
        # and then read all workflows once for each item.
        sa.func.coalesce(_item.kind, "") == "",
    )


def _started(steps: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the result of the step that started a run; only items of version 0.1 have it."""
    for step in steps:
        output = step["output"]
        if step["function_name"] == "start" and output and output["execution_id"] is not None:
            return dict(output)
    return None


def _may_be_sent(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if a worker of version 0.1 recorded its intent to start a run, and no result."""
    return any(
        step["function_name"] == "intend" and step["output"] != INTENT_IN_ROW for step in steps[-1:]
    )


def _outcome(
    key: str, started: Mapping[str, Any] | None, error: StoredError, *, is_sent: bool
) -> StoredOutcome:
    now = datetime.now(UTC)
    if started is not None:
        at = datetime.fromisoformat(started["at"])
        return StoredOutcome(key, started["execution_id"], False, None, error, at, now)
    return StoredOutcome(key, None, False, None, _UNKNOWN if is_sent else error, None, now)
