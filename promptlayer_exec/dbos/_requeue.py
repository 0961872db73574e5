"""Items that run again, because a worker follows or starts them once more.

Each begins its next attempt, which is a new DBOS workflow. If the worker is only to follow it, its
row keeps the earlier result, so that it starts nothing.

A worker follows an unknown item once the callback of its run has arrived. That may be before the
item is unknown: the worker that sent the request has died, but nobody has noticed yet. So the batch
stores each callback. After storing a callback or an unknown outcome, a process looks for items that
have both, and the second one finds them.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import attrs
import sqlalchemy as sa
from sqlalchemy import exc

from promptlayer_exec import ExecutionTimeout
from promptlayer_exec._integration import duration
from promptlayer_exec.dbos._records import Ending, StoredOutcome, start_record, stored_error
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import batches, callbacks, called_back, items, lock_batch

_item = items.c
_callback_id = callbacks.c.execution_id
_ROWS_AT_ONCE = 500


class Reason(enum.Enum):
    """Why finished items run again, which decides whether a worker may start them."""

    RECHECK = "the server may report by now how the run finished"
    RETRY = "the user wants to start those again that failed, and pays for it"
    AGAIN = "the user wants to start all of them again, whatever has become of their runs"
    CALLBACK = "the callback of an unknown start has arrived"


@attrs.frozen
class RestartPauses:
    """Seconds before an item starts again after a run without an output.

    The cause, such as an overloaded model, may need a while to pass. So each pause is four times as
    long as the one before.
    """

    first: float = 5.0
    longest: float = 300.0

    def after(self, runs: int) -> float:
        """Return the pause after this many runs."""
        return float(min(self.first * 4 ** (runs - 1), self.longest))


RESTART_PAUSES = RestartPauses()


@attrs.frozen
class NextAttempt:
    """The next attempt of an item.

    Attributes:
        kind: how the item had finished, or None if it had not.
        started: the result with the run to follow, as JSON, or None to start the item.
        history: the earlier attempts, as JSON.
        pause: how many seconds it waits in the queue.
    """

    key: str
    number: int
    kind: str | None
    started: str | None
    history: str
    pause: float = 0.0


def requeue(
    store: Store,
    batch: str,
    reason: Reason,
    *,
    kinds: Sequence[str],
    keys: Iterable[str] | None = None,
    token: str | None = None,
    unknown_for: float = 0.0,
) -> int:
    """Put finished items back into the queue, and return how many.

    They finished as one of `kinds`. `keys` and `token`, the token of their run, narrow them down.
    Unknown ones must have been unknown for `unknown_for` seconds.

    Only `RETRY` and `AGAIN` start items. For `RETRY`, if an item has a run that may not have
    failed, the worker follows it instead: you have paid for that run.
    """
    which = [_item.batch == batch, _item.kind.in_(kinds)]
    if reason is Reason.CALLBACK:
        which.append(_callback_id.is_not(None))
    if token is not None:
        which.append(_item.intent == token)

    ended = sa.select(_item.key, _item.attempt, _item.kind, _item.outcome, _item.history)
    ended = ended.add_columns(_callback_id).select_from(items.outerjoin(callbacks, called_back))
    ((now,),) = store.rows(sa.select(store.now))
    choose = partial(_next_attempt, reason, datetime.fromtimestamp(now, UTC), unknown_for)

    count = 0
    for page in _pages(store, which, keys):
        query = ended.where(*which, _item.key.in_(page))
        count += store.transact(partial(_requeue_page, store, batch, query, choose))
    return count


def _pages(
    store: Store, which: list[sa.ColumnElement[bool]], keys: Iterable[str] | None
) -> Iterable[list[str]]:
    """Yield the keys of items, a few hundred at a time. Stop early if cancelled."""
    if keys is not None:
        given = [*dict.fromkeys(keys)]
        for start in range(0, len(given), _ROWS_AT_ONCE):
            if not store.is_cancelled():
                yield given[start : start + _ROWS_AT_ONCE]
        return

    ended = sa.select(_item.key).select_from(items.outerjoin(callbacks, called_back))
    ended = ended.where(*which).order_by(_item.key).limit(_ROWS_AT_ONCE)
    last = ""
    while not store.is_cancelled() and (rows := store.rows(ended.where(_item.key > last))):
        yield [row.key for row in rows]
        last = rows[-1].key


def _requeue_page(
    store: Store,
    batch: str,
    ended: sa.Select[Any],
    choose: Callable[[Any], NextAttempt | None],
    connection: sa.Connection,
) -> int:
    try:
        lock_batch(connection, batch)
    except exc.NoResultFound:  # the batch was just deleted
        return 0

    found = [choose(row) for row in connection.execute(ended)]
    chosen = [attempt for attempt in found if attempt is not None]
    _begin(store, connection, batch, chosen)
    return len(chosen)


def _next_attempt(
    reason: Reason, now: datetime, unknown_for: float, row: Any
) -> NextAttempt | None:
    """Return the next attempt of a finished item, or None if it must not run again."""
    outcome = StoredOutcome.from_json(row.outcome)
    is_limited = row.kind == "unknown" and unknown_for > 0.0  # without a limit, no clocks count
    if is_limited and (now - outcome.finished).total_seconds() < unknown_for:
        return None

    # Its callback may have arrived while this waited for the lock.
    execution_id = outcome.execution_id or row.execution_id
    started = _start_to_follow(reason, now, outcome, execution_id)
    if started is None and reason not in (Reason.RETRY, Reason.AGAIN):
        return None

    history = _with_attempt(row.history, row.attempt, attrs.evolve(outcome, output=None))
    return NextAttempt(row.key, row.attempt + 1, row.kind, started, history)


def _start_to_follow(
    reason: Reason, now: datetime, outcome: StoredOutcome, execution_id: int | None
) -> str | None:
    """Return the result with the run to follow, as JSON, or None if there is no run."""
    has_failed = outcome.error is not None and outcome.error.type == "ExecutionFailed"
    if execution_id is None or reason is Reason.AGAIN or (reason is Reason.RETRY and has_failed):
        return None
    started_at = outcome.started or outcome.finished
    followed_from = None if reason is Reason.CALLBACK else now
    return json.dumps(start_record(started_at, execution_id, followed_from=followed_from))


def adopt(store: Store, batch: str, key: str, execution_id: int) -> bool:
    """Let a worker follow the run that somebody found for an unknown item.

    Returns False if there is no such item, or it is not unknown.

    Raises:
        ValueError: another item of the batch has this run.
    """
    id_in_json = f'%"execution_id": {execution_id},%'
    others = sa.select(_item.key).where(
        _item.batch == batch,
        _item.key != key,
        sa.or_(
            _item.started.like(id_in_json),
            _item.history.like(id_in_json),
            _callback_id == execution_id,  # a worker will follow it, once the item is unknown
        ),
    )
    others = others.select_from(items.outerjoin(callbacks, called_back))
    query = sa.select(_item.attempt, _item.kind, _item.outcome, _item.history, store.now)
    query = query.where(_item.batch == batch, _item.key == key, _item.kind == "unknown")

    def work(connection: sa.Connection) -> bool:
        try:
            lock_batch(connection, batch)
        except exc.NoResultFound:  # the batch does not exist
            return False
        if other := connection.execute(others.limit(1)).scalar():
            raise ValueError(f"execution {execution_id} is the run of item {other!r:.100}")

        for attempt, kind, text, history, now in connection.execute(query).all():
            outcome = StoredOutcome.from_json(text)
            moment = datetime.fromtimestamp(now, UTC)
            record = start_record(outcome.finished, execution_id, followed_from=moment)
            earlier = _with_attempt(history, attempt, outcome)
            found = NextAttempt(key, attempt + 1, kind, json.dumps(record), earlier)
            _begin(store, connection, batch, [found])
            return True
        return False

    return store.transact(work)


def give_up(
    store: Store, batch: str, keys: Iterable[str] | None = None, *, running_for: float = 0.0
) -> int:
    """End items whose run is known and has no end, and return how many.

    Each run has been followed for `running_for` seconds. The workers notice it.
    """
    which = [_item.batch == batch, _item.kind.is_(None), _item.started.is_not(None)]
    followed = sa.select(_item.key, _item.attempt, _item.started, store.now.label("now"))

    count = 0
    for page in _pages(store, which, keys):
        rows = store.rows(followed.where(*which, _item.key.in_(page)))
        endings = [ending for row in rows if (ending := _given_up(row, running_for)) is not None]
        if endings:
            count += len(store.finish(batch, endings))
    return count


def _given_up(row: Any, running_for: float) -> Ending | None:
    """Return the ending of an item that is given up, or None if its run is not old enough."""
    record = json.loads(row.started)
    now = datetime.fromtimestamp(row.now, UTC)
    followed_from = datetime.fromisoformat(record.get("followed_from") or record["at"])
    if (now - followed_from).total_seconds() < running_for:
        return None

    started = datetime.fromisoformat(record["at"])
    age = max((now - started).total_seconds(), 0.0)
    error = ExecutionTimeout(
        f"given up by hand {duration(age)} after its start, still running then",
        timeout=age,
        execution_id=record["execution_id"],
    )
    stored = stored_error(error)
    outcome = StoredOutcome(row.key, record["execution_id"], False, None, stored, started, now)
    return Ending.of(row.attempt, outcome)


def record_callback(store: Store, batch: str, token: str, execution_id: int) -> bool:
    """Store the first callback of a run. Return True if a worker now follows its item."""
    insert = store.insert(callbacks).values(batch=batch, token=token, execution_id=execution_id)
    store.execute(insert.on_conflict_do_nothing())
    return requeue(store, batch, Reason.CALLBACK, kinds=["unknown"], token=token) > 0


def finish(store: Store, batch: str, endings: Sequence[Ending]) -> list[bool]:
    """Store the outcomes of items, or begin another attempt of items that have one left.

    It lets workers follow unknown items with a stored callback. Returns for each item whether it
    stored the outcome or began another attempt.
    """
    without_output = [ending for ending in endings if ending.may_restart]
    done = _restart(store, batch, without_output) if without_output else set()
    ended = [ending for ending in endings if (ending.key, ending.attempt) not in done]
    if ended:
        done |= store.finish(batch, ended)
    if any(ending.kind == "unknown" for ending in ended):
        requeue(store, batch, Reason.CALLBACK, kinds=["unknown"])
    return [(ending.key, ending.attempt) in done for ending in endings]


def _restart(store: Store, batch: str, endings: Sequence[Ending]) -> set[tuple[str, int]]:
    """Begin another attempt of items whose runs had no output, up to the batch's `attempts`.

    Returns the keys and attempts of these items.
    """
    setting = store.rows(sa.select(batches.c.attempts).where(batches.c.name == batch))
    if not any((row.attempts or 1) > 1 for row in setting):
        return set()

    query = sa.select(_item.key, _item.attempt, _item.history)
    query = query.where(_item.batch == batch, _item.kind.is_(None))
    query = query.where(_item.key.in_([ending.key for ending in endings]))
    outcomes = {
        (ending.key, ending.attempt): StoredOutcome.from_json(ending.outcome) for ending in endings
    }

    def work(connection: sa.Connection) -> set[tuple[str, int]]:
        try:
            most = lock_batch(connection, batch)["attempts"] or 1
        except exc.NoResultFound:  # the batch was just deleted
            return set()

        chosen = []
        for row in connection.execute(query):
            outcome = outcomes.get((row.key, row.attempt))
            if outcome is None:  # another worker was faster
                continue
            history = _with_attempt(row.history, row.attempt, outcome)
            runs = len({attempt["execution_id"] for attempt in json.loads(history)} - {None})
            if runs < most:
                pause = RESTART_PAUSES.after(runs)
                chosen.append(NextAttempt(row.key, row.attempt + 1, None, None, history, pause))
        _begin(store, connection, batch, chosen)
        return {(attempt.key, attempt.number - 1) for attempt in chosen}

    return store.transact(work)


def _with_attempt(history: str | None, number: int, outcome: StoredOutcome) -> str:
    """Return the history of an item, as JSON, with one more finished attempt."""
    ended = json.loads(outcome.to_json())
    del ended["key"], ended["succeeded"], ended["output"]
    return json.dumps([*json.loads(history or "[]"), {"attempt": number, **ended}])


def _begin(
    store: Store, connection: sa.Connection, batch: str, attempts: Sequence[NextAttempt]
) -> None:
    """Begin attempts of items. The caller has locked the batch."""
    if not attempts:
        return
    nothing = dict.fromkeys(("kind", "seq", "outcome", "intent", "seconds"))
    connection.execute(
        sa.update(items)
        .where(_item.batch == batch, _item.key == sa.bindparam("the_key"))
        .values(
            attempt=sa.bindparam("number"),
            started=sa.bindparam("start"),
            history=sa.bindparam("earlier"),
            since=store.now,
            **nothing,
        ),
        [
            {
                "the_key": attempt.key,
                "number": attempt.number,
                "start": attempt.started,
                "earlier": attempt.history,
            }
            for attempt in attempts
        ],
    )

    counts = Counter(attempt.kind for attempt in attempts if attempt.kind is not None)
    store.count(connection, batch, {kind: -count for kind, count in counts.items()})

    for pause in {attempt.pause for attempt in attempts}:
        numbers = [(attempt.key, attempt.number) for attempt in attempts if attempt.pause == pause]
        store.enqueue(connection, batch, numbers, pause=pause)
