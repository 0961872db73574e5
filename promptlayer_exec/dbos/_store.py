"""The database: DBOS's tables, and our own for batches, items, workers and callbacks.

DBOS stores which items to run and the progress of each. Our tables store the outcomes in the order
in which they were stored, what is needed to start each item once, the heartbeats of the workers,
and the next slot of the shared rate.

The stored names and formats stay the same within a version: tables and columns, `APPLICATION` and
`WORKFLOW`, queue names and workflow ids, the arguments of the workflow, the JSON of requests and
outcomes.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import attrs
import sqlalchemy as sa
from dbos import DBOSClient, DBOSPortableJSONSerializer, EnqueueOptions

from promptlayer_exec import ConfigurationError
from promptlayer_exec.dbos._database import Database
from promptlayer_exec.dbos._engine import (
    running_executors,
    taken,
)
from promptlayer_exec.dbos._names import (
    APPLICATION,
    WORKFLOW,
    key_and_attempt,
    queue_name,
    workflow_id,
)
from promptlayer_exec.dbos._requests import Row, another_request, digest_of
from promptlayer_exec.dbos._tables import (
    ADD,
    COUNTS,
    FINISH,
    FINISH_ONE,
    WORKFLOWS,
    Ending,
    created_of,
    delete_if_empty,
    delete_items,
)
from promptlayer_exec.dbos._tables import batches as _batches
from promptlayer_exec.dbos._tables import items as _items
from promptlayer_exec.dbos._tables import workers as _workers
from promptlayer_exec.dbos._values import BatchStatus

# DBOS gives an item only to workers of the same version.
VERSION = "3"

T = TypeVar("T")

_QUEUE_INTERVAL = 0.2
_DELETED_AT_ONCE = 500
_item = _items.c
# The process of a worker about which nothing is known.
_NOWHERE = "[null, null, 0, null]"


class Heartbeat(NamedTuple):
    """What a worker last recorded: a number that grows, and which process it is."""

    number: int
    process: str


class Store(Database):
    """The database of batches; each method is a call that `Database` retries."""

    def __init__(self, url: sa.URL) -> None:
        super().__init__(url)
        # JSON, because DBOS's default is pickle: with it, write access to the database would be
        # enough to run code in every worker.
        self._client = DBOSClient(
            system_database_engine=self.engine,
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
            lazy=True,
            retry_connection_errors=False,
        )

    def close(self) -> None:
        self._client.destroy()
        super().close()

    def batches(self) -> list[str]:
        """Return the names of all batches."""
        query = sa.select(_batches.c.name).order_by(_batches.c.name)
        return [row.name for row in self.rows(query)]

    def create(self, batch: str) -> None:
        """Create a batch without items, unless it exists."""
        insert = self.insert(_batches).on_conflict_do_nothing()
        self.transact(lambda connection: connection.execute(insert, _new_batch(batch)))

    def channel_suffix(self, batch: str) -> str | None:
        """Return the suffix of the push channel that a batch's workers share."""
        query = sa.select(_batches.c.channel_suffix).where(_batches.c.name == batch)
        rows = self.rows(query)
        return rows[0].channel_suffix if rows else None

    def check(self, batch: str, rows: Sequence[Row]) -> None:
        """Raise ValueError if a key that is already there stands for another request."""

        def read() -> dict[str, tuple[int, str | None]]:
            with self.reading() as connection:
                return _unclear(connection, batch, rows)

        unclear = self.retry(read)
        stored = self.stored_requests(batch, {key: found[0] for key, found in unclear.items()})
        for row in rows:
            if row.key in unclear:
                request = stored.get(row.key)
                digest = unclear[row.key][1] or (request and digest_of(request))
                if digest and digest != row.digest:
                    raise another_request(batch, row, request)

    def add(
        self, batch: str, rows: Sequence[Row], settings: Mapping[str, float] | None = None
    ) -> int:
        """Add and enqueue the items that are new, and return how many were; checks the others.

        The settings are those of a batch that does not exist yet.
        """
        insert_batch = self.insert(_batches).on_conflict_do_nothing()
        # FOR KEY SHARE: others cannot delete the batch, but can still change its row.
        keep_batch = sa.select(_batches.c.name).where(_batches.c.name == batch)
        keep_batch = keep_batch.with_for_update(read=True, key_share=True)
        insert = self._insert_each if self.is_sqlite else self._insert_in_one_statement
        unique: dict[str, Row] = {}
        for row in rows:
            known = unique.setdefault(row.key, row)
            if known.digest != row.digest:
                raise another_request(batch, row, known.request)

        def add(connection: sa.Connection) -> int:
            is_kept = False
            while not is_kept:
                connection.execute(insert_batch, _new_batch(batch) | dict(settings or {}))
                is_kept = connection.execute(keep_batch).first() is not None
            new = insert(connection, batch, unique)
            if new:
                count = sa.update(_batches).where(_batches.c.name == batch)
                connection.execute(count.values(total=_batches.c.total + new))
            return new

        def add_and_check(connection: sa.Connection) -> int:
            new = add(connection)
            if new < len(unique) and _unclear(connection, batch, rows):
                raise _Unclear
            return new

        try:
            return self.transact(add_and_check)
        except _Unclear:
            self.check(batch, rows)
            return self.transact(add)

    def _insert_each(self, connection: sa.Connection, batch: str, rows: dict[str, Row]) -> int:
        insert = self.insert(_items).on_conflict_do_nothing().returning(_item.key)
        items = [
            {"batch": batch, "key": key, "attempt": 1, "digest": row.digest}
            for key, row in rows.items()
        ]
        new = connection.execute(insert, items).scalars().all()
        for key in new:
            self.enqueue(connection, batch, key, 1, request=rows[key].request)
        return len(new)

    def _insert_in_one_statement(
        self, connection: sa.Connection, batch: str, rows: dict[str, Row]
    ) -> int:
        values = {
            "batch": batch,
            "keys": [*rows],
            "requests": [row.request for row in rows.values()],
            "digests": [row.digest for row in rows.values()],
            "workflow": WORKFLOW,
            "queue": queue_name(batch),
            "prefix": workflow_id(batch, "", 1),
            "application": APPLICATION,
            "version": VERSION,
        }
        return int(connection.execute(ADD, values).scalar_one())

    def stored_requests(self, batch: str, attempts: dict[str, int]) -> dict[str, str]:
        """Return the JSON requests of items, by key, of the given attempts, if DBOS has them."""
        if not attempts:
            return {}
        ids = [workflow_id(batch, key, attempt) for key, attempt in attempts.items()]
        stored: Any = self._list_workflows(ids)
        return {it.input["args"][0]: it.input["args"][2] for it in stored}

    def finish(self, batch: str, endings: Sequence[Ending]) -> set[tuple[str, int]]:
        """Store the outcome of each item; return the keys and attempts of those that were stored.

        It is not if the item has one, a later attempt has begun, or another start goes on.
        """
        counts = Counter(ending.kind for ending in endings)
        # This locks the batch's row: nobody gets the next numbers before these are visible, so
        # `outcomes` skips none.
        number = (
            sa.update(_batches)
            .where(_batches.c.name == batch)
            .values(last_seq=_batches.c.last_seq + len(endings), **_added(counts))
            .returning(_batches.c.last_seq)
        )
        finish = self._finish_each if self.is_sqlite else self._finish_in_one_statement

        def transact(connection: sa.Connection) -> set[tuple[str, int]]:
            first = connection.execute(number).scalar_one() - len(endings) + 1
            kinds = finish(connection, batch, first, endings)
            stored = Counter(kinds.values())
            if stored != counts:
                stored.subtract(counts)
                correct = sa.update(_batches).where(_batches.c.name == batch)
                connection.execute(correct.values(**_added(stored)))
            return {*kinds}

        return self.transact(transact)

    def _finish_each(
        self, connection: sa.Connection, batch: str, first: int, endings: Sequence[Ending]
    ) -> dict[tuple[str, int], str]:
        return {
            (ending.key, ending.attempt): ending.kind
            for seq, ending in enumerate(endings, first)
            if connection.execute(
                FINISH_ONE, {"seq": seq, "batch": batch} | attrs.asdict(ending)
            ).rowcount
        }

    def _finish_in_one_statement(
        self, connection: sa.Connection, batch: str, first: int, endings: Sequence[Ending]
    ) -> dict[tuple[str, int], str]:
        rows = [attrs.asdict(ending) for ending in endings]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        parameters = {"batch": batch, "first": first} | columns
        found = connection.execute(FINISH, parameters)
        return {(row.key, row.attempt): row.kind for row in found}

    def created(self, batch: str) -> float | None:
        """Return when a batch was created, as `created_of` does; None if there is no batch."""
        rows = self.rows(created_of(batch))
        return rows[0].created if rows else None

    def outcomes(
        self, batch: str, after: int, limit: int, size: int, created: float | None = None
    ) -> list[tuple[int, str]]:
        """Return the numbers and the JSON of the next outcomes, in the order they were stored.

        They are `limit` at most, and not more than one longer than `size` bytes. Raises an error if
        the batch is not the one that was created then.
        """
        query = sa.select(_item.seq, _item.outcome).where(_item.batch == batch, _item.seq > after)
        query = query.order_by(_item.seq).limit(limit)
        if not self.is_sqlite:  # its driver would fetch all rows before it returns the first
            rows = query.subquery()
            length = sa.func.octet_length(rows.c.outcome)
            before = sa.func.sum(length).over(order_by=rows.c.seq) - length
            sizes = sa.select(rows, before.label("before")).subquery()
            query = sa.select(sizes.c.seq, sizes.c.outcome).where(sizes.c.before < size)
            query = query.order_by(sizes.c.seq)

        def read() -> list[tuple[int, str]]:
            found, read = [], 0
            with self.reading() as connection, connection.execute(query) as result:
                for seq, outcome in result:
                    found.append((seq, outcome))
                    read += len(outcome)
                    if read >= size:
                        break
                if created is not None and connection.scalar(created_of(batch)) != created:
                    raise ConfigurationError(
                        f"batch {batch!r} was deleted while its outcomes were read; to read those"
                        " of a new batch of that name, call outcomes again"
                    )
            return found

        return self.retry(read)

    def is_finished(self, batch: str) -> bool:
        """Return True if every item has an outcome."""
        query = sa.select(_item.key).where(_item.batch == batch, _item.kind.is_(None))
        # Ordered for the sake of the index: where statistics are old, PostgreSQL takes most items
        # for unfinished, and would read millions to find one.
        return not self.rows(query.order_by(_item.kind).limit(1))

    def status(self, batch: str) -> BatchStatus:
        """Return how many items are in which state."""
        table = WORKFLOWS[self.engine.dialect.name]
        running = sa.select(sa.func.count()).where(
            table.c.queue_name == queue_name(batch), table.c.status == "PENDING"
        )
        query = sa.select(*(_batches.c[name] for name in COUNTS), running.scalar_subquery())
        rows = self.rows(query.where(_batches.c.name == batch))
        if not rows:
            return BatchStatus(0, 0, 0, 0, 0, 0)
        total, succeeded, failed, unknown, running_count = rows[0]
        pending = total - succeeded - failed - unknown
        # DBOS may record the end of an item later than its outcome is stored.
        running_count = min(running_count, pending)
        return BatchStatus(
            pending - running_count, running_count, succeeded, failed, unknown, total
        )

    def store_settings(self, batch: str, given: dict[str, float]) -> dict[str, float]:
        """Store the settings that are given, and return those of `given` that replaced others."""
        insert_batch = self.insert(_batches).on_conflict_do_nothing()
        update = sa.update(_batches).where(_batches.c.name == batch)

        def work(connection: sa.Connection) -> dict[str, float]:
            connection.execute(insert_batch, _new_batch(batch))
            # Writes first, because a reading transaction on SQLite may not write later.
            locked = connection.execute(update.values(name=batch).returning(_batches))
            before = locked.mappings().one()
            changes = {name: value for name, value in given.items() if before[name] != value}
            if "rate" in changes:  # the slot after the last one of a slow rate is far away
                connection.execute(update.values(next_request=0.0))
            if changes:
                connection.execute(update.values(**changes))
            return {name: before[name] for name in changes if before[name] is not None}

        return self.transact(work)

    def workflows(self, batch: str, key: str, attempts: int) -> list[Any]:
        """Return the DBOS workflows of the attempts of an item, the first one first."""
        ids = [workflow_id(batch, key, attempt) for attempt in range(1, attempts + 1)]
        found = self._list_workflows(ids)
        return sorted(found, key=lambda each: key_and_attempt(each.workflow_id)[1])

    def _list_workflows(self, ids: list[str]) -> list[Any]:
        found = partial(self._client.list_workflows, workflow_ids=ids, load_output=False)
        return self.retry(found)

    def delete(self, batch: str) -> int:
        """Delete a batch and its items, a few hundred at a time; return how many items it had."""
        some = (
            sa.select(_item.key, _item.attempt).where(_item.batch == batch).limit(_DELETED_AT_ONCE)
        )
        deleted, is_deleted = 0, False
        # First: from now on it is not the batch whose outcomes others read.
        renew = sa.update(_batches).where(_batches.c.name == batch).values(created=time.time())
        self.transact(lambda connection: connection.execute(renew))
        self.retry(lambda: self._client.delete_queue(queue_name(batch)))
        while not (is_deleted or self.is_cancelled()):  # or items were added meanwhile
            while not self.is_cancelled() and (rows := self.rows(some)):
                ids = [
                    workflow_id(batch, row.key, attempt)
                    for row in rows
                    for attempt in range(1, row.attempt + 1)
                ]
                self.retry(partial(self._client.delete_workflows, ids))
                these = (_item.batch == batch, _item.key.in_([row.key for row in rows]))
                # One that was started again meanwhile has one more workflow.
                same = sa.tuple_(_item.key, _item.attempt).in_([tuple(row) for row in rows])
                self.transact(partial(delete_items, batch, sa.and_(*these, same)))
                deleted += len(rows) - len(self.rows(sa.select(_item.key).where(*these)))
            is_deleted = self.transact(partial(delete_if_empty, batch=batch))
        return deleted

    def register_queue(self, batch: str, max_in_flight: int) -> None:
        """Create the batch's queue in DBOS, or change its limit if it exists."""
        register = partial(
            self._client.register_queue,
            queue_name(batch),
            global_concurrency=max_in_flight,
            polling_interval_sec=_QUEUE_INTERVAL,
        )
        self.retry(register)

    def record_heartbeat(self, batch: str, executor: str, process: str) -> None:
        """Record that a worker is alive, without retrying."""
        row = {"executor": executor, "beat": 1, "process": process, "batch": batch}
        insert = self.insert(_workers).values(**row, seen_at=self._now)
        insert = insert.on_conflict_do_update(
            index_elements=["executor"], set_={"beat": _workers.c.beat + 1, "seen_at": self._now}
        )
        self.transact(lambda connection: connection.execute(insert), once=True)

    @property
    def _now(self) -> sa.ColumnElement[float]:
        """The time on the database's clock, in seconds since the epoch."""
        if self.is_sqlite:
            return sa.literal(time.time())
        return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Double)

    def processes(self, batch: str, within: float) -> list[str]:
        """Return the processes of the workers of a batch with a heartbeat in so many seconds."""
        is_recent = _workers.c.seen_at > self._now - within
        query = sa.select(_workers.c.process).where(_workers.c.batch == batch, is_recent)
        return [row.process for row in self.rows(query)]

    def heartbeats(self, batch: str | None = None) -> dict[str, Heartbeat]:
        """Return the last heartbeat of each worker by its executor, without retrying.

        With a batch, only those of its workers.
        """
        query = sa.select(_workers.c.executor, _workers.c.beat, _workers.c.process)
        if batch is not None:
            query = query.where(_workers.c.batch == batch)
        rows = self.rows(query, once=True)
        return {row.executor: Heartbeat(row.beat, row.process) for row in rows}

    def running_executors(self, batch: str) -> set[str]:
        """Return the executors that have running items, without retrying."""
        query = partial(running_executors, queue=queue_name(batch))
        return self.transact(query, once=True)

    def claim_rescue(self, batch: str, dead: str, executor: str, within: float) -> bool:
        """Return True if this worker may put the items of a dead one back into the queue.

        Only one may: DBOS would take an item from a live worker that has dequeued it meanwhile. A
        claim expires after so many seconds, as its worker may die, too. Without retrying.
        """
        row = {"executor": dead, "beat": 0, "process": _NOWHERE, "batch": batch}
        insert = self.insert(_workers).values(row).on_conflict_do_nothing()
        is_free = sa.or_(
            _workers.c.rescuer.is_(None),
            _workers.c.rescuer == executor,
            _workers.c.rescued_at < self._now - within,
        )
        claim = (
            sa.update(_workers)
            .where(_workers.c.executor == dead, is_free)
            .values(rescuer=executor, rescued_at=self._now)
        )

        def work(connection: sa.Connection) -> bool:
            connection.execute(insert)
            return connection.execute(claim).rowcount > 0

        return self.transact(work, once=True)

    def requeue(self, batch: str, workflows: Collection[str]) -> None:
        """Put items back into their batch's queue, by their workflows, without retrying."""
        resume = partial(self._client.resume_workflows, [*workflows], queue_name=queue_name(batch))
        if workflows:
            self.retry(resume, once=True)

    def taken(self, batch: str, executor: str) -> set[str]:
        """Return the workflows of the items that a worker has taken, without retrying."""
        query = partial(taken, queue=queue_name(batch), executor=executor)
        return self.transact(query, once=True)

    def remove_worker(self, executor: str) -> None:
        """Delete the heartbeat of a worker that has stopped, without retrying."""
        delete = sa.delete(_workers).where(_workers.c.executor == executor)
        self.transact(lambda connection: connection.execute(delete), once=True)

    def reserve(self, batch: str, slots: int, rate: float) -> float:
        """Reserve the next slots of a rate per second; return the seconds until the first one."""
        now = self._now
        latest: Any = sa.func.max if self.is_sqlite else sa.func.greatest
        length = slots / rate
        # By how much the clock was put back since the last reservation: the next slot moves along.
        put_back = latest(sa.func.coalesce(_batches.c.reserved_at, now) - now, 0.0)
        update = (
            sa.update(_batches)
            .where(_batches.c.name == batch)
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
        key: str,
        attempt: int,
        *,
        request: str,
        started: Mapping[str, Any] | None = None,
    ) -> None:
        """Enqueue an attempt of an item; with the result of a start, it is only followed."""
        options: EnqueueOptions = {
            "workflow_name": WORKFLOW,
            "queue_name": queue_name(batch),
            "workflow_id": workflow_id(batch, key, attempt),
            "app_version": VERSION,
        }
        known = [] if started is None else [dict(started)]
        self._client.enqueue_in_transaction(connection, options, key, attempt, request, *known)


class _Unclear(Exception):
    """Ends a transaction: DBOS has to be asked what a key stands for, on another connection."""


def _unclear(
    connection: sa.Connection, batch: str, rows: Sequence[Row]
) -> dict[str, tuple[int, str | None]]:
    """Return the attempt and the digest of the items whose keys may stand for other requests."""
    digests = {row.key: row.digest for row in rows}
    query = sa.select(_item.key, _item.attempt, _item.digest)
    query = query.where(_item.batch == batch, _item.key.in_(digests))
    return {
        key: (attempt, digest)
        for key, attempt, digest in connection.execute(query)
        if digest != digests[key]
    }


def _new_batch(name: str) -> dict[str, Any]:
    row = {"name": name, "last_seq": 0, "next_request": 0.0, "created": time.time()}
    row["channel_suffix"] = secrets.token_hex(16)
    return row | dict.fromkeys(COUNTS, 0)


def _added(counts: Mapping[str, int]) -> dict[str, Any]:
    return {kind: _batches.c[kind] + count for kind, count in counts.items()}
