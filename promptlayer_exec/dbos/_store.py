"""The database: DBOS's tables, and three of our own for batches, items and workers.

DBOS stores which items to run and the progress of each. Our tables store the outcomes in the order
in which they were stored, what is needed to start each item once, the heartbeats of the workers,
and the next slot of the shared rate.

A database of an older version gets the columns that it lacks. They are all nullable, and null in
the rows that an older version writes.

The stored names and formats are fixed, because a batch from an older version must be continued:
tables and columns, `APPLICATION` and `WORKFLOW`, queue names and workflow ids, the arguments of the
workflow, the names and results of its steps in `_worker`, the JSON of requests and outcomes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import anyio
import attrs
import sqlalchemy as sa
from dbos import DBOSClient, DBOSPortableJSONSerializer, EnqueueOptions
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateColumn

from promptlayer_exec import ConfigurationError
from promptlayer_exec.dbos._dbos_internals import mark_lost_connections, migrate
from promptlayer_exec.dbos._requests import Row, differences, digest_of
from promptlayer_exec.dbos._values import BatchStatus

APPLICATION = "promptlayer-exec"
WORKFLOW = "promptlayer_exec.item.2"
# The workflow of the items that version 0.1 added.
FIRST_WORKFLOW = "promptlayer_exec.item"
# The version of an item's steps: DBOS gives an item only to workers of the same version. Workers of
# a later version take over the items of these earlier ones.
VERSION = "2"
EARLIER_VERSIONS = ("1",)

T = TypeVar("T")

# Seconds for which calls are retried while the database cannot be reached, and between two tries.
_RETRY_FOR = 120.0
_RETRY_INTERVAL = 0.5
# Writing transactions lock the file when they begin, and wait for each other for up to 30 s.
_SQLITE_OPTIONS = {"isolation_level": "IMMEDIATE", "timeout": 30.0}
_QUEUE_INTERVAL = 0.2
_CREATE_TABLES_LOCK = 0x70726F6D707479
# A worker has one more to PostgreSQL, on which DBOS listens. Calls wait for a connection as long as
# they would retry.
_CONNECTIONS = 5
# A worker reserves slots of the shared rate for at most this many seconds at once, and uses a slot
# for at most this many seconds after its time.
_MAX_RESERVED = 0.2
_MAX_LATE = 0.05

_tables = sa.MetaData()
_batches = sa.Table(
    "promptlayer_batch",
    _tables,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("next_request", sa.Double, nullable=False),
    # The clock when a slot was last reserved; it may have been put back since.
    sa.Column("reserved_at", sa.Double),
)
_items = sa.Table(
    "promptlayer_item",
    _tables,
    sa.Column("batch", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("kind", sa.Text),
    sa.Column("seq", sa.BigInteger),
    sa.Column("outcome", sa.Text),
    # What the key stands for; see `_requests`.
    sa.Column("digest", sa.Text),
    # The token of the start whose request may have left, or null.
    sa.Column("intent", sa.Text),
    sa.Index("promptlayer_item_kind", "batch", "kind"),
    sa.Index("promptlayer_item_seq", "batch", "seq"),
)
_item = _items.c
_workers = sa.Table(
    "promptlayer_worker",
    _tables,
    sa.Column("executor", sa.Text, primary_key=True),
    sa.Column("beat", sa.BigInteger, nullable=False),
    sa.Column("process", sa.Text, nullable=False),
)


# PostgreSQL: all items of a call in one round trip. `dbos.enqueue_workflow` is documented, and
# writes the JSON of `DBOSPortableJSONSerializer`.
_ADD = sa.text(
    """
    WITH given AS (
        SELECT * FROM unnest(
            CAST(:keys AS text[]), CAST(:requests AS text[]), CAST(:digests AS text[])
        ) AS t (key, request, digest)
    ), new AS (
        INSERT INTO promptlayer_item (batch, key, attempt, digest)
        SELECT :batch, key, 1, digest FROM given
        ON CONFLICT DO NOTHING RETURNING key
    )
    SELECT count(dbos.enqueue_workflow(
        workflow_name => :workflow,
        queue_name => :queue,
        positional_args => ARRAY[to_json(given.key), to_json(1), to_json(given.request)],
        workflow_id => :prefix || given.key,
        application_name => :application,
        app_version => :version
    )) FROM given JOIN new USING (key)
    """
)
_FINISH = sa.text(
    """
    UPDATE promptlayer_item SET kind = t.kind, outcome = t.outcome, seq = :first + t.position - 1
    FROM unnest(
        CAST(:keys AS text[]), CAST(:attempts AS int[]), CAST(:kinds AS text[]),
        CAST(:outcomes AS text[])
    ) WITH ORDINALITY AS t (key, attempt, kind, outcome, position)
    WHERE promptlayer_item.batch = :batch AND promptlayer_item.key = t.key
        AND promptlayer_item.attempt = t.attempt AND promptlayer_item.kind IS NULL
    """
)
_FINISH_ONE = sa.text(
    """
    UPDATE promptlayer_item SET kind = :kind, outcome = :outcome, seq = :seq
    WHERE batch = :batch AND key = :key AND attempt = :attempt AND kind IS NULL
    """
)


class Ending(NamedTuple):
    """How an attempt of an item ended: its kind, and the outcome as JSON."""

    key: str
    attempt: int
    kind: str
    outcome: str


class Heartbeat(NamedTuple):
    """What a worker last recorded: a number that grows, and which process it is."""

    number: int
    process: str


def check_url(database_url: str) -> sa.URL:
    """Return the URL of a SQLite file or a PostgreSQL database as SQLAlchemy and DBOS take it."""
    try:
        url = sa.make_url(database_url)
    except (exc.ArgumentError, ValueError):
        raise ConfigurationError(
            "database_url is not a URL; use sqlite:///batches.sqlite or"
            " postgresql://user@host/database"
        ) from None
    backend = url.get_backend_name()
    if backend in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ConfigurationError(f"database_url must be sqlite or postgresql, got {backend}")
    if url.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "database_url must name a file; a SQLite database in memory ends with its process"
        )
    return url


class Store:
    """The database of batches.

    All methods block, except `run_in_thread`. While the database cannot be reached, they retry for
    up to two minutes, unless they say otherwise, and then raise `ConfigurationError`.
    """

    def __init__(self, url: sa.URL) -> None:
        self.url = url.render_as_string(hide_password=False)
        self._stop_retrying = threading.Event()
        self._is_sqlite = url.get_backend_name() == "sqlite"
        dialect = sqlite if self._is_sqlite else postgresql
        self._insert: Callable[[sa.Table], Any] = dialect.insert
        self.engine = sa.create_engine(
            url,
            pool_size=_CONNECTIONS,
            max_overflow=0,
            pool_timeout=_RETRY_FOR,
            connect_args=_SQLITE_OPTIONS if self._is_sqlite else {},
        )
        if not self._is_sqlite:
            mark_lost_connections(self.engine)
        # JSON, because DBOS's default is pickle: with it, write access to the database would be
        # enough to run code in every worker.
        self._client = DBOSClient(
            system_database_engine=self.engine,
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
            lazy=True,
            retry_connection_errors=False,
        )

    def prepare(self) -> None:
        """Create the tables that are missing, without retrying."""
        try:
            migrate(self.url)
            with self.engine.begin() as connection:
                # Two processes that create the same table at once would collide.
                if self._is_sqlite:
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                else:
                    connection.execute(sa.func.pg_advisory_xact_lock(_CREATE_TABLES_LOCK))
                _tables.create_all(connection)
                self._add_columns(connection)
            if self._is_sqlite:
                # With WAL, readers do not wait for the writer, and commits flush once. This fails
                # while another process does the same. Once is enough: the file keeps the mode.
                with suppress(exc.OperationalError), self.engine.connect() as connection:
                    connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        except Exception as error:
            raise self._unusable(error) from error

    def _add_columns(self, connection: sa.Connection) -> None:
        """Add the columns that a database of an older version lacks."""
        inspector = sa.inspect(connection)
        quote_name = connection.dialect.identifier_preparer.format_table
        for table in _tables.sorted_tables:
            existing = {column["name"] for column in inspector.get_columns(table.name)}
            for column in table.columns:
                if column.name not in existing:
                    definition = CreateColumn(column).compile(dialect=connection.dialect)
                    connection.exec_driver_sql(
                        f"ALTER TABLE {quote_name(table)} ADD COLUMN {definition}"
                    )

    async def run_in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call a blocking function in a thread; if cancelled, stop retrying, but wait for it."""
        running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self._stop_retrying.set()
            with anyio.CancelScope(shield=True):
                while not running.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([running])
            raise

    def close(self) -> None:
        """Close the connections."""
        self._client.destroy()
        self.engine.dispose()

    def batches(self) -> list[str]:
        """Return the names of all batches."""
        query = sa.select(_batches.c.name).order_by(_batches.c.name)
        return [row.name for row in self._rows(query)]

    def check(self, batch: str, rows: Sequence[Row]) -> None:
        """Raise ValueError if a key that is already there stands for another request."""

        def check() -> None:
            with self._reading() as connection:
                self._check(connection, batch, rows)

        self._retry(check, _RETRY_FOR)

    def add(self, batch: str, rows: Sequence[Row]) -> int:
        """Add and enqueue the items that are new, and return how many were; checks the others."""
        insert_batch = self._insert(_batches).on_conflict_do_nothing()
        unique: dict[str, Row] = {}
        for row in rows:
            unique.setdefault(row.key, row)

        def add(connection: sa.Connection) -> int:
            connection.execute(insert_batch, {"name": batch, "last_seq": 0, "next_request": 0.0})
            if not self._is_sqlite:
                return self._add_in_one_statement(connection, batch, unique)
            insert = self._insert(_items).on_conflict_do_nothing().returning(_item.key)
            items = [
                {"batch": batch, "key": key, "attempt": 1, "digest": row.digest}
                for key, row in unique.items()
            ]
            keys = connection.execute(insert, items).scalars().all()
            for key in keys:
                self._enqueue(connection, batch, key, 1, unique[key].request)
            return len(keys)

        def add_and_check(connection: sa.Connection) -> int:
            new = add(connection)
            if new < len(rows):
                self._check(connection, batch, rows)
            return new

        return self._transact(add_and_check)

    def _add_in_one_statement(
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
        return int(connection.execute(_ADD, values).scalar_one())

    def _check(self, connection: sa.Connection, batch: str, rows: Sequence[Row]) -> None:
        query = sa.select(_item.key, _item.attempt, _item.digest).where(
            _item.batch == batch, _item.key.in_([row.key for row in rows])
        )
        found = {key: (attempt, digest) for key, attempt, digest in connection.execute(query)}
        known = [row for row in rows if row.key in found]
        # Version 0.1 stored no digest.
        unclear = [row.key for row in known if found[row.key][1] != row.digest]
        stored = self._stored_requests(batch, {key: found[key][0] for key in unclear})
        for row in known:
            request = stored.get(row.key)
            digest = found[row.key][1] or (request and digest_of(request)) or row.digest
            if digest != row.digest:
                what = f" ({differences(request, row.request)} differs)" if request else ""
                raise ValueError(
                    f"the key {row.key!r:.100} of batch {batch!r} stands for another request{what}:"
                    " give this one another key, or add it to another batch; nothing was added"
                )

    def _stored_requests(self, batch: str, attempts: dict[str, int]) -> dict[str, str]:
        """Return the JSON requests of items, by key, of the given attempts, if DBOS has them."""
        if not attempts:
            return {}
        ids = [workflow_id(batch, key, attempt) for key, attempt in attempts.items()]
        stored: Any = self._client.list_workflows(workflow_ids=ids, load_output=False)
        return {workflow.input["args"][0]: workflow.input["args"][2] for workflow in stored}

    def finish(self, batch: str, endings: Sequence[Ending]) -> None:
        """Store the outcome of each item, unless it has one or a later attempt has begun."""
        # This locks the batch's row: nobody gets the next numbers before these are visible, so
        # `outcomes` skips none.
        number = (
            sa.update(_batches)
            .where(_batches.c.name == batch)
            .values(last_seq=_batches.c.last_seq + len(endings))
            .returning(_batches.c.last_seq)
        )

        def finish(connection: sa.Connection) -> None:
            first = connection.execute(number).scalar_one() - len(endings) + 1
            if self._is_sqlite:
                rows = [
                    {"seq": seq, "batch": batch} | ending._asdict()
                    for seq, ending in enumerate(endings, first)
                ]
                connection.execute(_FINISH_ONE, rows)
                return
            keys, attempts, kinds, outcomes = map(list, zip(*endings, strict=True))
            values = {"keys": keys, "attempts": attempts, "kinds": kinds, "outcomes": outcomes}
            connection.execute(_FINISH, {"batch": batch, "first": first, **values})

        self._transact(finish)

    def restart_unknown(self, batch: str) -> None:
        """Enqueue each unknown item again, as its next attempt."""
        update = (
            sa.update(_items)
            .where(_item.batch == batch, _item.kind == "unknown")
            .values(attempt=_item.attempt + 1, kind=None, seq=None, outcome=None, intent=None)
            .returning(_item.key, _item.attempt)
        )

        def restart(connection: sa.Connection) -> None:
            attempts: dict[str, int] = dict(connection.execute(update).all())
            last = {key: attempt - 1 for key, attempt in attempts.items()}
            for key, request in self._stored_requests(batch, last).items():
                self._enqueue(connection, batch, key, attempts[key], request)

        self._transact(restart)

    def outcomes(self, batch: str, after: int, limit: int, size: int) -> list[tuple[int, str]]:
        """Return the numbers and the JSON of the next outcomes, in the order they were stored.

        They are `limit` at most, and not more than one longer than `size` bytes.
        """
        query = sa.select(_item.seq, _item.outcome).where(_item.batch == batch, _item.seq > after)
        query = query.order_by(_item.seq).limit(limit)
        if not self._is_sqlite:  # its driver would fetch all rows before it returns the first
            rows = query.subquery()
            length = sa.func.octet_length(rows.c.outcome)
            before = sa.func.sum(length).over(order_by=rows.c.seq) - length
            sizes = sa.select(rows, before.label("before")).subquery()
            query = sa.select(sizes.c.seq, sizes.c.outcome).where(sizes.c.before < size)
            query = query.order_by(sizes.c.seq)

        def read() -> list[tuple[int, str]]:
            found, read = [], 0
            with self._reading() as connection, connection.execute(query) as result:
                for seq, outcome in result:
                    found.append((seq, outcome))
                    read += len(outcome)
                    if read >= size:
                        break
            return found

        return self._retry(read, _RETRY_FOR)

    def is_finished(self, batch: str) -> bool:
        """Return True if every item has an outcome."""
        query = sa.select(_item.key).where(_item.batch == batch, _item.kind.is_(None))
        return not self._rows(query.limit(1))

    def status(self, batch: str) -> BatchStatus:
        """Return how many items are in which state."""
        query = sa.select(_item.kind, sa.func.count()).where(_item.batch == batch)
        counts: dict[str | None, int] = dict(self._rows(query.group_by(_item.kind)))
        pending = counts.get(None, 0)
        # DBOS may record the end of an item later than its outcome is stored.
        running = min(len(self.running(batch)), pending)
        ended = {kind: counts.get(kind, 0) for kind in ("succeeded", "failed", "unknown")}
        total = pending + sum(ended.values())
        return BatchStatus(waiting=pending - running, running=running, **ended, total=total)

    def running(self, batch: str, *, retry_for: float = _RETRY_FOR) -> list[str]:
        """Return, for each running item, the executor that runs it."""
        workflows = self._retry(
            lambda: self._client.list_workflows(
                queue_name=queue_name(batch), status="PENDING", load_input=False, load_output=False
            ),
            retry_for,
        )
        return [workflow.executor_id or "" for workflow in workflows]

    def register_queue(self, batch: str, max_in_flight: int) -> None:
        """Create the batch's queue in DBOS, or change its limit if it exists."""
        self._client.register_queue(
            queue_name(batch),
            global_concurrency=max_in_flight,
            polling_interval_sec=_QUEUE_INTERVAL,
        )

    def record_heartbeat(self, executor: str, process: str) -> None:
        """Record that a worker is alive, without retrying."""
        row = {"executor": executor, "beat": 1, "process": process}
        insert = self._insert(_workers).on_conflict_do_update(
            index_elements=["executor"], set_={"beat": _workers.c.beat + 1}
        )
        self._transact(lambda connection: connection.execute(insert, row), retry_for=0.0)

    def heartbeats(self) -> dict[str, Heartbeat]:
        """Return the last heartbeat of each worker by its executor, without retrying."""
        rows = self._rows(sa.select(_workers), retry_for=0.0)
        return {row.executor: Heartbeat(row.beat, row.process) for row in rows}

    def remove_worker(self, executor: str) -> None:
        """Delete the heartbeat of a worker that has stopped, without retrying."""
        delete = sa.delete(_workers).where(_workers.c.executor == executor)
        self._transact(lambda connection: connection.execute(delete), retry_for=0.0)

    def reserve(self, batch: str, slots: int, rate: float) -> float:
        """Reserve the next slots of a rate per second; return the seconds until the first one."""
        now: Any = sa.literal(time.time())
        latest: Any = sa.func.max
        if not self._is_sqlite:
            now = sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Double)
            latest = sa.func.greatest
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
        return self._transact(lambda connection: float(connection.execute(update).scalar_one()))

    def _enqueue(
        self, connection: sa.Connection, batch: str, key: str, attempt: int, request: str
    ) -> None:
        options: EnqueueOptions = {
            "workflow_name": WORKFLOW,
            "queue_name": queue_name(batch),
            "workflow_id": workflow_id(batch, key, attempt),
            "app_version": VERSION,
        }
        self._client.enqueue_in_transaction(connection, options, key, attempt, request)

    def _rows(self, query: sa.Select[Any], *, retry_for: float = _RETRY_FOR) -> Sequence[Any]:
        def read() -> Sequence[Any]:
            with self._reading() as connection:
                return connection.execute(query).all()

        return self._retry(read, retry_for)

    def _reading(self) -> sa.Connection:
        """Return a connection for one query, without the round trips of a transaction."""
        return self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def _transact(self, work: Callable[[sa.Connection], T], retry_for: float = _RETRY_FOR) -> T:
        def transact() -> T:
            with self.engine.begin() as connection:
                return work(connection)

        return self._retry(transact, retry_for)

    def _retry(self, work: Callable[[], T], seconds: float) -> T:
        give_up = time.monotonic() + seconds
        while True:
            try:
                return work()
            except (exc.OperationalError, exc.InterfaceError) as error:
                if time.monotonic() >= give_up or self._stop_retrying.wait(_RETRY_INTERVAL):
                    raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> ConfigurationError:
        shown = self.engine.url.render_as_string(hide_password=True)
        reason = str(getattr(error, "orig", None) or error).strip()
        return ConfigurationError(f"the database {shown} cannot be used: {reason:.300}")


@attrs.define(eq=False)
class SharedRate:
    """A limiter that admits HTTP attempts at a rate that all workers share through the database.

    Each attempt takes one slot. A busy worker reserves several slots at once, to save round trips
    to the database; one that missed a slot goes back to reserving one.
    """

    _store: Store
    _batch: str
    _rate: float  # slots per second
    _slots: deque[float] = attrs.field(init=False, factory=deque)
    _size: int = attrs.field(init=False, default=1)

    async def acquire(self) -> None:
        """Return when one more HTTP attempt may be made."""
        clock = asyncio.get_running_loop().time
        missed = False
        while True:
            while self._slots:
                wait = self._slots.popleft() - clock()
                if wait >= -_MAX_LATE:
                    await asyncio.sleep(max(wait, 0.0))
                    return
                missed = True
            most = max(1, int(self._rate * _MAX_RESERVED))
            size = self._size = 1 if missed else min(2 * self._size, most)
            delay = await asyncio.to_thread(self._store.reserve, self._batch, size, self._rate)
            first = clock() + delay
            self._slots.extend(first + index / self._rate for index in range(size))


def queue_name(batch: str) -> str:
    """Return the name of a batch's queue."""
    return f"{APPLICATION}/{batch}"


def workflow_id(batch: str, key: str, attempt: int) -> str:
    """Return the id of the DBOS workflow that runs one attempt of an item."""
    return f"{APPLICATION}/{quote(batch, safe='')}/{attempt}/{key}"
