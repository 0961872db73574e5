"""Reports on a batch: an item's history, how items failed, and how long runs took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import attrs
import sqlalchemy as sa

from promptlayer_exec._causes import stored_cause
from promptlayer_exec._ways_out import is_undecided
from promptlayer_exec.dbos._records import Kind, StoredError, StoredOutcome
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import COUNTS, batches, items, key_and_attempt

_item = items.c
_PAGE = 500


@attrs.frozen
class BatchSettings:
    """The settings that all workers of a batch share.

    Attributes:
        max_in_flight: the maximum number of items in progress, or None if nobody has set it yet.
        rate: the maximum number of HTTP attempts per second. None: no shared limit.
        attempts: the maximum number of runs for an item. None: one.
        give_up_after: for how many seconds to follow a run that does not end. None: a day.
        created: when the first item was added (UTC), or an interrupted deletion began, or None if
            the batch does not exist.
        server: the URL of the server that has its runs, or None if the batch does not exist.
    """

    max_in_flight: int | None
    rate: float | None
    attempts: int | None
    give_up_after: float | None
    created: datetime | None
    server: str | None


ItemState = Literal["waiting", "sending", "following", "unknown", "failed", "succeeded"]


@attrs.frozen
class BatchItem:
    """The state of an item, and what led to it.

    Attributes:
        key: its key.
        state: `waiting` in the queue, `sending` its start request, `following` its run, `unknown`
            if the run may or may not have started, `failed` or `succeeded`.
        why: why it has no output, or None if it has one, or has not finished.
        since: when its state last changed (UTC).
        execution_id: the id of its run, or None if none is known.
    """

    key: str
    state: ItemState
    why: str | None
    since: datetime
    execution_id: int | None


@attrs.frozen
class RunAttempt:
    """One attempt to run an item. A retry begins the next one.

    Attributes:
        number: 1 for the first attempt.
        added: when it joined the queue (UTC).
        taken: when the last worker took it (UTC), or None if none has.
        worker: the worker that has it, or the last one that had it: its host, and an id.
        state: that of the item in this attempt, as in `BatchItem`.
        execution_id: its run, or None if it has no known run.
        started: when its run started (UTC), or None if that is unknown.
        error: why it finished without an output, or None if it did not.
        finished: when that became known (UTC).
    """

    number: int
    added: datetime
    taken: datetime | None
    worker: str | None
    state: ItemState
    execution_id: int | None = None
    started: datetime | None = None
    error: StoredError | None = None
    finished: datetime | None = None


@attrs.frozen
class StoredItem:
    """What a batch stores about an item.

    Attributes:
        key: its key.
        state: its state, as in `BatchItem`.
        since: when its state last changed (UTC).
        request: the JSON object of its request: workflow, inputs, label, version, metadata.
        attempts: its attempts, the first one first.
        outcome: how it finished, or None if it has not.
    """

    key: str
    state: ItemState
    since: datetime
    request: dict[str, Any]
    attempts: tuple[RunAttempt, ...]
    outcome: StoredOutcome | None


@attrs.frozen
class Failure:
    """Items that failed for one cause: the same node and reason, but for ids and numbers.

    Either all of them have a run that may still bring an output, or none has.

    Attributes:
        count: the number of items.
        key: the key of one of them.
        error: its error.
    """

    count: int
    key: str
    error: StoredError


@attrs.frozen
class Durations:
    """How long the runs of a batch took, in seconds.

    Attributes:
        median: half of the runs took at most this long.
        p95: 95% of the runs took at most this long.
        longest: the longest run took this long.
    """

    median: float
    p95: float
    longest: float


_state = sa.case(
    (_item.kind.is_not(None), _item.kind),
    (_item.started.is_not(None), "following"),
    (_item.intent.is_not(None), "sending"),
    else_="waiting",
).label("state")


def check_state(state: Any) -> None:
    if state is not None and state not in get_args(ItemState):
        known = ", ".join(get_args(ItemState))
        raise ValueError(f"state must be one of {known}, got {state!r:.100}")


def items_after(
    store: Store,
    batch: str,
    last: str,
    state: ItemState | None,
    older_than: float,
    *,
    containing: str,
) -> list[BatchItem]:
    """Return the next items after a key, in the order of their keys."""
    # An output may have megabytes, and the id of its run is in the row.
    outcome = sa.case((_item.kind != "succeeded", _item.outcome)).label("outcome")
    query = sa.select(_item.key, _state, _item.started, _item.since, outcome)
    query = query.where(_item.batch == batch, _item.key > last)

    if state in ("succeeded", "failed", "unknown"):
        query = query.where(_item.kind == state)
    elif state is not None:
        query = query.where(_item.kind.is_(None), _state == state)
    if older_than:
        query = query.where(_item.since <= store.now - older_than)
    if containing:
        query = query.where(_contains(containing))
    return [_batch_item(row) for row in store.rows(query.order_by(_item.key).limit(_PAGE))]


def _contains(text: str) -> Any:
    """Return the condition that an item's key, request or error contains a text."""
    error = sa.case((_item.kind != "succeeded", _item.outcome))
    forms = {text, json.dumps(text)[1:-1]}  # within a string, JSON escapes some characters
    columns = (_item.key, _item.request, error)
    return sa.or_(*(it.icontains(form, autoescape=True) for it in columns for form in forms))


def _batch_item(row: Any) -> BatchItem:
    execution_id = None if row.started is None else json.loads(row.started)["execution_id"]
    why = None
    if row.outcome is not None:
        outcome = StoredOutcome.from_json(row.outcome)
        execution_id = outcome.execution_id
        why = None if outcome.error is None else outcome.error.message
    since = datetime.fromtimestamp(row.since, UTC)
    return BatchItem(row.key, row.state, why, since, execution_id)


def kinds(store: Store, batch: str, keys: Iterable[str]) -> dict[str, Kind | None]:
    """Return how each item finished, None for one that has not. Leave out unknown keys."""
    return {row.key: row.kind for row in store.rows_of(batch, [*keys], _item.kind)}


def counts(store: Store, batch: str) -> dict[ItemState, int]:
    """Return how many items are in each state."""
    query = sa.select(*(batches.c[name] for name in COUNTS)).where(batches.c.name == batch)
    rows = store.rows(query)
    if not rows:
        return dict.fromkeys(get_args(ItemState), 0)

    _, succeeded, failed, unknown = rows[0]
    is_unfinished = sa.and_(_item.batch == batch, _item.kind.is_(None))
    number = sa.func.count().label("number")
    unfinished = store.rows(sa.select(_state, number).where(is_unfinished).group_by(_state))
    return {
        **dict.fromkeys(get_args(ItemState), 0),
        **{row.state: row.number for row in unfinished},
        "unknown": unknown,
        "failed": failed,
        "succeeded": succeeded,
    }


def latest_kinds(store: Store, batch: str, count: int) -> list[tuple[int, Kind]]:
    """Return the numbers and kinds of the latest outcomes, the newest first."""
    query = sa.select(_item.seq, _item.kind).where(_item.batch == batch, _item.seq.is_not(None))
    rows = store.rows(query.order_by(_item.seq.desc()).limit(count))
    return [(row.seq, row.kind) for row in rows]


def latest_outcome(store: Store, batch: str) -> StoredOutcome | None:
    query = sa.select(_item.outcome).where(_item.batch == batch, _item.seq.is_not(None))
    rows = store.rows(query.order_by(_item.seq.desc()).limit(1))
    return StoredOutcome.from_json(rows[0].outcome) if rows else None


def settings(store: Store, batch: str) -> BatchSettings:
    query = sa.select(batches).where(batches.c.name == batch)
    for row in store.rows(query):
        created = datetime.fromtimestamp(row.created, UTC)
        limits = (row.max_in_flight, row.rate, row.attempts, row.give_up_after)
        return BatchSettings(*limits, created, row.server)
    return BatchSettings(None, None, None, None, None, None)


def item(store: Store, batch: str, key: str) -> StoredItem | None:
    columns = (_item.attempt, _item.outcome, _item.request, _item.history, _item.started)
    query = sa.select(*columns, _item.since, _state)
    query = query.where(_item.batch == batch, _item.key == key)
    for row in store.rows(query):
        # What is known about each attempt, by its number.
        known = {attempt["attempt"]: attempt for attempt in json.loads(row.history or "[]")}
        outcome = None
        if row.outcome is not None:
            outcome = StoredOutcome.from_json(row.outcome)
            known[row.attempt] = json.loads(row.outcome)
        elif row.started is not None:  # a worker follows its run, or is about to
            started = json.loads(row.started)
            known[row.attempt] = {
                "execution_id": started["execution_id"],
                "started": started["at"],
                "error": None,
                "finished": None,
            }

        workflows = store.workflows(batch, key, row.attempt)
        attempts = tuple(_attempt(workflow, known, row) for workflow in workflows)
        since = datetime.fromtimestamp(row.since, UTC)
        return StoredItem(key, row.state, since, json.loads(row.request), attempts, outcome)
    return None


def _attempt(workflow: Any, known: Mapping[int, Mapping[str, Any]], row: Any) -> RunAttempt:
    number = key_and_attempt(workflow.workflow_id)[1]
    state = row.state if number == row.attempt else _ended_state(known[number]["error"])
    taken = None
    if workflow.dequeued_at is not None:
        taken = datetime.fromtimestamp(workflow.dequeued_at / 1000, UTC)
    attempt = RunAttempt(
        number,
        datetime.fromtimestamp(workflow.created_at / 1000, UTC),
        taken,
        workflow.executor_id or None,
        state,
    )

    if number not in known:
        return attempt
    run = known[number]
    error = run["error"]
    return attrs.evolve(
        attempt,
        execution_id=run["execution_id"],
        started=_moment(run["started"]),
        error=None if error is None else StoredError(**error),
        finished=_moment(run["finished"]),
    )


def _ended_state(error: Mapping[str, Any] | None) -> ItemState:
    if error is None:
        return "succeeded"
    return "unknown" if error["type"] == "StartUnknown" else "failed"


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def failures(store: Store, batch: str) -> tuple[Failure, ...]:
    found: dict[tuple[str, bool, str], list[tuple[str, StoredError]]] = {}
    query = sa.select(_item.key, _item.outcome).order_by(_item.kind, _item.key)
    query = query.where(_item.batch == batch, _item.kind.in_(["failed", "unknown"]))
    for key, text in store.rows(query):
        error = StoredOutcome.from_json(text).error or StoredError("", "")
        cause = stored_cause(error.type, error.message, error.data)
        group = (error.type, is_undecided(error.type, error.data), cause)
        found.setdefault(group, []).append((key, error))
    most_first = sorted(found.values(), key=len, reverse=True)
    return tuple(Failure(len(examples), *examples[0]) for examples in most_first)


def durations(store: Store, batch: str) -> Durations | None:
    query = sa.select(_item.seconds).order_by(_item.seconds)
    rows = store.rows(query.where(_item.batch == batch, _item.seconds.is_not(None)))
    if not rows:
        return None

    positions = (len(rows) // 2, min(len(rows) - 1, len(rows) * 95 // 100), len(rows) - 1)
    return Durations(*(rows[position].seconds for position in positions))
