"""The database, with DBOS's tables and ours for batches, items, workers and callbacks.

DBOS stores which items to run and the progress of each. Our tables store the outcomes in the order
in which they came, what it takes to start each item once, the heartbeats of the workers, and the
next slot of the shared rate.

The stored names and formats stay the same within a version: tables and columns, `APPLICATION` and
`WORKFLOW`, queue names and workflow ids, the arguments of the workflow, the JSON of requests and
outcomes.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import attrs
import sqlalchemy as sa
from dbos import DBOSClient, DBOSPortableJSONSerializer, EnqueueOptions

from promptlayer_exec.dbos._records import BatchStatus, Ending
from promptlayer_exec.dbos._requests import Row, another_request, by_key
from promptlayer_exec.dbos._shared_database import SharedDatabase
from promptlayer_exec.dbos._tables import (
    APPLICATION,
    COUNTS,
    WORKFLOW,
    attempt_of,
    callbacks,
    lock_batch,
    queue_name,
    the_attempt,
    update_batch,
    workflow_id,
)
from promptlayer_exec.dbos._tables import batches as _batches
from promptlayer_exec.dbos._tables import items as _items
from promptlayer_exec.dbos._tables import workers as _workers

# DBOS gives an item only to workers of the same version.
VERSION = "4"


@attrs.frozen
class Sizes:
    """How much one statement reads or writes.

    It reads or deletes at most `keys` items. It reads at most `outcomes` outcomes, and stops after
    the one that brings their length to `outcome_length` characters, because one may have megabytes.
    """

    keys: int = 500
    outcomes: int = 1000
    outcome_length: int = 4 * 2**20


SIZES = Sizes()

# Seconds after which DBOS looks again for items in the queue.
QUEUE_INTERVAL = 0.2

_item = _items.c
# PostgreSQL: DBOS's documented function for other languages. From Python, each takes four round
# trips. Its arguments are the JSON of `DBOSPortableJSONSerializer`.
_ENQUEUE = sa.text(
    """
    SELECT dbos.enqueue_workflow(
        workflow_name => :workflow, queue_name => :queue, workflow_id => :id,
        positional_args => CAST(:arguments AS json[]),
        application_name => :application, app_version => :version,
        delay_until_epoch_ms => CAST(:ready_at AS bigint)
    )
    """
)
_FINISH = (
    sa.update(_items)
    .where(the_attempt, sa.or_(_item.started.is_(None), sa.bindparam("has_run")))
    .values({name: sa.bindparam(f"new_{name}") for name in ("kind", "outcome", "seconds", "seq")})
)
# The process of an unknown worker.
_NOWHERE = "[null, null, 0]"


class Store(SharedDatabase):
    """The database of batches. `Database` retries each method."""

    # The database's clock minus this process's monotonic one, since the first heartbeat.
    _ahead: float

    def __init__(self, url: sa.URL) -> None:
        super().__init__(url)
        # JSON, because DBOS's default is pickle: with it, write access to the database would be
        # enough to run code in every worker.
        self._client = DBOSClient(
            system_database_engine=self.engine_of_dbos,
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
            lazy=True,
            retry_connection_errors=False,
        )

    def close(self) -> None:
        self._client.destroy()
        super().close()

    def batches(self) -> list[str]:
        query = sa.select(_batches.c.name).order_by(_batches.c.name)
        return [row.name for row in self.rows(query)]

    def create(self, batch: str, settings: Mapping[str, float]) -> None:
        """Create a batch with these settings, and without items, unless it exists."""
        self.execute(self._insert_batch(batch, settings))

    def _insert_batch(self, name: str, settings: Mapping[str, float]) -> Any:
        row = {"name": name, "last_seq": 0, "next_request": 0.0, "created": self.now}
        row |= dict.fromkeys(COUNTS, 0) | {"channel_suffix": secrets.token_hex(16)}
        return self.insert(_batches).values(row | dict(settings)).on_conflict_do_nothing()

    def channel_suffix(self, batch: str) -> str:
        """Return the suffix of the push channel that a batch's workers share."""
        query = sa.select(_batches.c.channel_suffix).where(_batches.c.name == batch)
        return str(self.rows(query)[0].channel_suffix)

    def check(self, batch: str, rows: Iterable[Row]) -> set[str]:
        """Return the keys that are already there.

        Raises:
            KeyConflict: a key belongs to another request.
        """
        given = {row.key: row for row in rows}
        known = set()
        for key, digest in self.rows_of(batch, [*given], _item.digest):
            if digest != given[key].digest:
                ((_, request),) = self.rows_of(batch, [key], _item.request)
                raise another_request(batch, given[key], request)
            known.add(key)
        return known

    def rows_of(
        self, batch: str, keys: Sequence[str], *columns: sa.ColumnElement[Any]
    ) -> Iterator[Any]:
        """Yield the key and these columns of each existing item. Stop early if cancelled."""
        query = sa.select(_item.key, *columns).where(_item.batch == batch)
        for start in range(0, len(keys), SIZES.keys):
            if self.is_cancelled():
                return
            page = keys[start : start + SIZES.keys]
            yield from self.rows(query.where(_item.key.in_(page)))

    def add(self, batch: str, rows: Sequence[Row]) -> int:
        """Add and enqueue the new items, check the others, and return how many were new."""
        unique = by_key(batch, rows)
        insert = self.insert(_items).values(since=self.now)
        insert = insert.on_conflict_do_nothing().returning(_item.key)
        items = [
            {"batch": batch, "attempt": 1, "key": key, "request": row.request, "digest": row.digest}
            for key, row in unique.items()
        ]

        def add(connection: sa.Connection) -> int:
            connection.execute(self._insert_batch(batch, {}))  # it may have been deleted meanwhile
            new = {*connection.execute(insert, items).scalars()}
            if new:
                self.enqueue(connection, batch, [(key, 1) for key in unique if key in new])
                self.count(connection, batch, {"total": len(new)})
            return len(new)

        added = self.transact(add)
        if added < len(unique):
            self.check(batch, rows)
        return added

    def finish(self, batch: str, endings: Sequence[Ending]) -> set[tuple[str, int]]:
        """Store the outcomes of items, and return the keys and attempts of the stored ones.

        It does not store one if the item already has one, a later attempt has begun, or the row has
        another run.
        """
        count = len(endings)
        # This locks the batch's row: nobody gets the next numbers before these are visible, so that
        # `outcomes` skips none.
        number = update_batch(batch).values(last_seq=_batches.c.last_seq + count)
        number = number.returning(_batches.c.last_seq)

        def finish(connection: sa.Connection) -> set[tuple[str, int]]:
            first = connection.execute(number).scalar_one() - count + 1
            rows = [
                {
                    **attempt_of(batch, ending.key, ending.attempt),
                    "has_run": ending.has_run,
                    "new_kind": ending.kind,
                    "new_seq": seq,
                    "new_outcome": ending.outcome,
                    "new_seconds": ending.seconds,
                }
                for seq, ending in enumerate(endings, first)
            ]
            connection.execute(_FINISH.values(since=self.now), rows)

            # Some may not have been stored.
            new = sa.select(_item.key, _item.attempt, _item.kind)
            new = new.where(_item.batch == batch, _item.seq >= first)
            stored = connection.execute(new).all()
            self.count(connection, batch, Counter(row.kind for row in stored))
            return {(row.key, row.attempt) for row in stored}

        return self.transact(finish)

    def count(self, connection: sa.Connection, batch: str, more: Mapping[str, int]) -> None:
        """Add to the counts of a batch's items. Numbers can be negative."""
        if more:
            values = {name: _batches.c[name] + number for name, number in more.items()}
            connection.execute(update_batch(batch).values(**values))

    def outcomes(self, batch: str, after: int) -> Sequence[Any]:
        """Return the numbers and the JSON of the next outcomes, in the order of storing.

        `SIZES` limits how many.
        """
        later = _item.batch == batch, _item.seq > after
        length = sa.func.length(_item.outcome).label("length")
        lengths = sa.select(_item.seq, length).where(*later).order_by(_item.seq)

        total, last = 0, after
        for row in self.rows(lengths.limit(SIZES.outcomes)):
            total += row.length
            last = row.seq
            if total >= SIZES.outcome_length:
                break
        if last == after:
            return []

        query = sa.select(_item.seq, _item.outcome).where(*later, _item.seq <= last)
        return self.rows(query.order_by(_item.seq))

    def is_finished(self, batch: str) -> bool:
        query = sa.select(_item.key).where(_item.batch == batch, _item.kind.is_(None))
        # Ordered for the sake of the index: with old statistics, PostgreSQL assumes that most items
        # are unfinished, and would read millions to find one.
        return not self.rows(query.order_by(_item.kind).limit(1))

    def status(self, batch: str) -> BatchStatus:
        rows = self.rows(
            sa.select(*(_batches.c[name] for name in COUNTS)).where(_batches.c.name == batch)
        )
        if not rows:
            return BatchStatus(0, 0, 0, 0, 0, 0)

        total, succeeded, failed, unknown = rows[0]
        pending = total - succeeded - failed - unknown
        # DBOS may record that an item has finished after we store its outcome.
        running = min(len(self.taken(batch)), pending)
        return BatchStatus(pending - running, running, succeeded, failed, unknown, total)

    def store_settings(self, batch: str, given: dict[str, float]) -> dict[str, float]:
        """Store the given settings, and return the earlier values of those that changed."""

        def work(connection: sa.Connection) -> dict[str, float]:
            before = lock_batch(connection, batch)
            changes = {name: value for name, value in given.items() if before[name] != value}
            if "rate" in changes:  # with a slow rate, the next slot may be far away
                connection.execute(update_batch(batch).values(next_request=0.0))
            if changes:
                connection.execute(update_batch(batch).values(**changes))

            return {name: before[name] for name in changes if before[name] is not None}

        return self.transact(work)

    def workflows(self, batch: str, key: str, attempts: int) -> list[Any]:
        """Return the DBOS workflows of the attempts of an item, the first one first."""
        ids = [workflow_id(batch, key, attempt) for attempt in range(1, attempts + 1)]
        return list(self._list_workflows(workflow_ids=ids))

    def _list_workflows(self, **which: Any) -> Any:
        select = partial(self._client.list_workflows, load_input=False, load_output=False)
        return self.retry(partial(select, **which))

    def delete(self, batch: str) -> int:
        """Delete a batch and its items, a few hundred at a time. Return how many items it had."""
        some = sa.select(_item.key, _item.attempt).where(_item.batch == batch).limit(SIZES.keys)
        deleted = 0
        while rows := self.rows(some):
            if self.is_cancelled():
                return deleted

            # DBOS's workflows first: with the items, their ids would be lost.
            ids = [
                workflow_id(batch, row.key, attempt)
                for row in rows
                for attempt in range(1, row.attempt + 1)
            ]
            self.retry(partial(self._client.delete_workflows, ids))

            keys = [row.key for row in rows]
            self.execute(sa.delete(_items).where(_item.batch == batch, _item.key.in_(keys)))
            deleted += len(rows)

        self.retry(partial(self._client.delete_queue, queue_name(batch)))
        for column in (callbacks.c.batch, _workers.c.batch, _batches.c.name):
            self.execute(sa.delete(column.table).where(column == batch))
        return deleted

    def register_queue(self, batch: str, max_in_flight: int) -> None:
        """Create the batch's queue in DBOS, or change its limit if it exists."""
        register = partial(
            self._client.register_queue,
            queue_name(batch),
            global_concurrency=max_in_flight,
            polling_interval_sec=QUEUE_INTERVAL,
        )
        self.retry(register)

    def record_heartbeat(self, batch: str, executor: str, process: str) -> None:
        row = {"executor": executor, "beat": 1, "process": process, "batch": batch}
        insert = self.insert(_workers).values(**row, seen_at=self.now)
        insert = insert.on_conflict_do_update(
            index_elements=["executor"], set_={"beat": _workers.c.beat + 1, "seen_at": self.now}
        )

        def work(connection: sa.Connection) -> None:
            seen_at = connection.execute(insert.returning(_workers.c.seen_at)).scalar_one()
            self._ahead = seen_at - time.monotonic()

        self.transact(work)

    def moment(self) -> datetime:
        """Return the time on the database's clock (UTC), reckoned from the last heartbeat.

        What other workers compare must not depend on the clock of this machine.
        """
        return datetime.fromtimestamp(time.monotonic() + self._ahead, UTC)

    def processes(self, batch: str, within: float) -> list[str]:
        """Return the processes of a batch's workers with a heartbeat within that many seconds."""
        is_recent = _workers.c.seen_at > self.now - within
        query = sa.select(_workers.c.process).where(_workers.c.batch == batch, is_recent)
        return [row.process for row in self.rows(query)]

    def heartbeats(self, batch: str) -> dict[str, Any]:
        """Return each worker's number of heartbeats and its process, by its executor."""
        query = sa.select(_workers.c.executor, _workers.c.beat, _workers.c.process)
        rows = self.rows(query.where(_workers.c.batch == batch))
        return {row.executor: row for row in rows}

    def claim_rescue(self, batch: str, dead: str, executor: str, within: float) -> bool:
        """Return True if this worker may put the items of a dead one back into the queue.

        Only one worker may: a second one would take items from live workers that have dequeued
        them meanwhile. A claim expires after `within` seconds, because its worker may die.
        """
        row = {"executor": dead, "beat": 0, "process": _NOWHERE, "batch": batch}
        insert = self.insert(_workers).values(row).on_conflict_do_nothing()
        is_free = sa.or_(
            _workers.c.rescuer.is_(None),
            _workers.c.rescuer == executor,
            _workers.c.rescued_at < self.now - within,
        )
        claim = (
            sa.update(_workers)
            .where(_workers.c.executor == dead, is_free)
            .values(rescuer=executor, rescued_at=self.now)
        )

        def work(connection: sa.Connection) -> bool:
            connection.execute(insert)
            return connection.execute(claim).rowcount > 0

        return self.transact(work)

    def taken(self, batch: str) -> dict[str, str]:
        """Return the executor that has taken each running item, by the item's workflow."""
        found = self._list_workflows(status="PENDING", queue_name=queue_name(batch))
        return {workflow.workflow_id: workflow.executor_id or "" for workflow in found}

    def put_back(self, batch: str, workflows: Collection[str]) -> None:
        """Put attempts, given by their workflows, back into their batch's queue.

        It does not retry: if this succeeded although the connection broke, others have them now.
        """
        resume = partial(self._client.resume_workflows, [*workflows], queue_name=queue_name(batch))
        if workflows:
            self.retry(resume, once=True)

    def remove_worker(self, executor: str) -> None:
        self.execute(sa.delete(_workers).where(_workers.c.executor == executor))

    def reserve(self, batch: str, slots: int, rate: float) -> float:
        """Reserve the next slots of a rate per second. Return the seconds until the first one."""
        now = self.now
        latest: Any = sa.func.max if self.is_sqlite else sa.func.greatest
        # Somebody may have replaced the rate since it was read.
        length = float(slots) / sa.func.coalesce(_batches.c.rate, rate)
        # If the clock was put back since the last reservation, the next slot moves by as much.
        put_back = latest(sa.func.coalesce(_batches.c.reserved_at, now) - now, 0.0)

        update = (
            update_batch(batch)
            .values(
                next_request=latest(_batches.c.next_request - put_back, now) + length,
                reserved_at=now,
            )
            .returning(_batches.c.next_request - length - now)
        )
        return self.transact(lambda connection: float(connection.execute(update).scalar_one()))

    def enqueue(
        self,
        connection: sa.Connection,
        batch: str,
        attempts: Sequence[tuple[str, int]],
        *,
        pause: float = 0.0,
    ) -> None:
        """Enqueue attempts of items, given as key and number. Workers take them after a pause."""
        queue = queue_name(batch)
        if not self.is_sqlite:  # all in one round trip
            # DBOS compares it with the clock of a worker's machine, not with the database's.
            ready_at = int((time.time() + pause) * 1000) if pause else None
            rows = [
                {
                    "id": workflow_id(batch, *attempt),
                    "arguments": [json.dumps(argument) for argument in attempt],
                    "workflow": WORKFLOW,
                    "queue": queue,
                    "application": APPLICATION,
                    "version": VERSION,
                    "ready_at": ready_at,
                }
                for attempt in attempts
            ]
            connection.execute(_ENQUEUE, rows)
            return

        for attempt in attempts:
            options: EnqueueOptions = {
                "workflow_name": WORKFLOW,
                "queue_name": queue,
                "workflow_id": workflow_id(batch, *attempt),
                "app_version": VERSION,
            }
            if pause:
                options["delay_seconds"] = pause
            self._client.enqueue_in_transaction(connection, options, *attempt)
