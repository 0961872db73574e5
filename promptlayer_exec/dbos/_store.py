"""The database: DBOS's tables, and beside them the items, the workers and the throttle.

DBOS keeps what is to be done and how far each item is. What it does not keep is an ordered feed of
results with counts by kind, who is alive, and when the next request may leave.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import anyio
import psycopg
import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer
from sqlalchemy import event, exc
from sqlalchemy.dialects import postgresql, sqlite

from promptlayer_exec import ConfigurationError

APPLICATION = "promptlayer-exec"
WORKFLOW = "promptlayer_exec.item"

T = TypeVar("T")

# A database that restarts is waited for.
_PATIENCE = 120.0
_PAUSE = 0.5
_SQLITE_BUSY_MS = 30_000
_QUEUE_INTERVAL = 0.2
_LOCK = 0x70726F6D707479
# As many as DBOS keeps by itself. SQLite has one writer at a time, and each connection a cache of
# statements and pages.
_CONNECTIONS = 20
_SQLITE_CONNECTIONS = 6

_tables = sa.MetaData()
_batches = sa.Table(
    "promptlayer_batch",
    _tables,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("next_request", sa.Double, nullable=False),
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
    sa.Index("promptlayer_item_kind", "batch", "kind"),
    sa.Index("promptlayer_item_seq", "batch", "seq"),
)
_workers = sa.Table(
    "promptlayer_worker",
    _tables,
    sa.Column("executor", sa.Text, primary_key=True),
    sa.Column("beat", sa.BigInteger, nullable=False),
    sa.Column("process", sa.Text, nullable=False),
)


class Beat(NamedTuple):
    """A worker's sign of life: a number that grows, and where its process is."""

    number: int
    process: str


def check_url(database_url: str) -> sa.URL:
    """Return the URL as SQLAlchemy and DBOS take it.

    Raises:
        ConfigurationError: it is none, or not one of a database that lasts.
    """
    try:
        url = sa.make_url(database_url)
    except (exc.ArgumentError, ValueError):
        raise ConfigurationError(
            "database_url is not a URL such as sqlite:///batches.sqlite or"
            " postgresql://user@host/database"
        ) from None
    backend = url.get_backend_name()
    if backend in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ConfigurationError(f"database_url: {backend} is neither sqlite nor postgresql")
    if url.database in (None, "", ":memory:"):
        raise ConfigurationError("database_url: a SQLite database needs a file, or nothing lasts")
    return url


class Store:
    """A connection to the database; all of its methods block, but for `do`.

    Where the database is away they wait for it, and raise `ConfigurationError` in the end.

    Args:
        url: from `check_url`.
        pooled: whether connections are kept, as a worker does.
    """

    def __init__(self, url: sa.URL, *, pooled: bool = False) -> None:
        self._url = url
        self._hurry = threading.Event()
        self._is_sqlite = url.get_backend_name() == "sqlite"
        dialect = sqlite if self._is_sqlite else postgresql
        self._insert: Callable[[sa.Table], Any] = dialect.insert
        options: dict[str, Any] = {"poolclass": sa.NullPool}
        if pooled:
            size = _SQLITE_CONNECTIONS if self._is_sqlite else _CONNECTIONS
            options = {"pool_size": size, "max_overflow": 0, "pool_pre_ping": True}
        self._engine = sa.create_engine(url, **options)
        if self._is_sqlite:
            event.listen(self._engine, "connect", _prepare_sqlite)
        else:
            event.listen(self._engine, "handle_error", _mark_lost_connection)
        # Its pickles are nobody's to write into a database that others read.
        self._client = DBOSClient(
            system_database_engine=self._engine,
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
            lazy=True,
            retry_connection_errors=False,
        )

    @property
    def engine(self) -> sa.Engine:
        """Its connections, which DBOS shares."""
        return self._engine

    @property
    def url(self) -> str:
        """The URL, with its password."""
        return self._url.render_as_string(hide_password=False)

    def prepare(self) -> None:
        """Create what is missing.

        Raises:
            ConfigurationError: the database cannot be used.
        """
        try:
            DBOS.migrate(self.url)
            with self._engine.begin() as connection:
                # Two that create a table at once would collide.
                if self._is_sqlite:
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                else:
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                _tables.create_all(connection)
            if self._is_sqlite:
                self._keep_a_write_ahead_log()
        except Exception as error:
            raise self._unusable(error) from error

    def _keep_a_write_ahead_log(self) -> None:
        """Let readers not wait for the writer, and a commit be flushed once, not twice."""
        # It fails while another process does the same; once is enough, the file remembers.
        with suppress(exc.OperationalError), self._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")

    async def do(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do what blocks in a thread, and wait for its end even when cancelled.

        It ends soon then: a database that is away is not waited for any more.
        """
        running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self._hurry.set()
            with anyio.CancelScope(shield=True):
                while not running.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([running])
            raise

    def close(self) -> None:
        """Close its connections."""
        self._client.destroy()
        self._engine.dispose()

    def batches(self) -> list[str]:
        """Return the names of all batches."""
        query = sa.select(_batches.c.name).order_by(_batches.c.name)
        return self._transact(lambda connection: list(connection.execute(query).scalars()))

    def add(self, batch: str, requests: Sequence[tuple[str, str]]) -> int:
        """Add the items whose keys are new, each with its request; return how many they were."""
        one = self._insert(_items).on_conflict_do_nothing().returning(_items.c.key)

        def add(connection: sa.Connection) -> int:
            row = {"name": batch, "last_seq": 0, "next_request": 0.0}
            connection.execute(self._insert(_batches).on_conflict_do_nothing(), row)
            new = 0
            for key, request in requests:
                row = {"batch": batch, "key": key, "attempt": 1}
                if connection.execute(one, row).first() is not None:
                    new += 1
                    self._enqueue(connection, batch, key, 1, request)
            return new

        return self._transact(add)

    def finish(self, batch: str, key: str, attempt: int, kind: str, outcome: str) -> None:
        """Store how an item ended, unless that is known already."""
        # It also keeps others from the next number until this one can be seen.
        number = (
            sa.update(_batches)
            .where(_batches.c.name == batch)
            .values(last_seq=_batches.c.last_seq + 1)
            .returning(_batches.c.last_seq)
        )
        store = sa.update(_items).where(
            _items.c.batch == batch,
            _items.c.key == key,
            _items.c.attempt == attempt,
            _items.c.kind.is_(None),
        )

        def finish(connection: sa.Connection) -> None:
            seq = connection.execute(number).scalar_one()
            connection.execute(store.values(kind=kind, seq=seq, outcome=outcome))

        self._transact(finish)

    def restart_unknown(self, batch: str) -> None:
        """Put the items that may or may not have been started back, each once."""
        unknown = sa.select(_items.c.key, _items.c.attempt).where(
            _items.c.batch == batch, _items.c.kind == "unknown"
        )

        def restart(connection: sa.Connection) -> None:
            for key, attempt in connection.execute(unknown).all():
                again = (
                    sa.update(_items)
                    .where(_items.c.batch == batch, _items.c.key == key)
                    .where(_items.c.attempt == attempt)
                    .values(attempt=attempt + 1, kind=None, seq=None, outcome=None)
                )
                if connection.execute(again).rowcount == 1:
                    request = self._request(workflow_id(batch, key, attempt))
                    self._enqueue(connection, batch, key, attempt + 1, request)

        self._transact(restart)

    def outcomes(self, batch: str, *, after: int, limit: int) -> list[tuple[int, str]]:
        """Return the next outcomes, in the order in which they were stored, with their numbers."""
        query = (
            sa.select(_items.c.seq, _items.c.outcome)
            .where(_items.c.batch == batch, _items.c.seq > after)
            .order_by(_items.c.seq)
            .limit(limit)
        )
        return self._transact(
            lambda connection: [(row[0], row[1]) for row in connection.execute(query)]
        )

    def is_finished(self, batch: str) -> bool:
        """Tell whether every item has an outcome."""
        query = sa.select(sa.literal(1)).where(_items.c.batch == batch, _items.c.kind.is_(None))
        first = query.limit(1)
        return self._transact(lambda connection: connection.execute(first).first() is None)

    def counts(self, batch: str) -> dict[str | None, int]:
        """Return how many items there are of each kind; None stands for those without outcome."""
        query = (
            sa.select(_items.c.kind, sa.func.count())
            .where(_items.c.batch == batch)
            .group_by(_items.c.kind)
        )
        return self._transact(
            lambda connection: {row[0]: row[1] for row in connection.execute(query)}
        )

    def running(self, batch: str, *, patience: float = _PATIENCE) -> list[str]:
        """Return, for each item that is begun, the executor that has it."""

        def running() -> list[str]:
            begun = self._client.list_workflows(
                queue_name=queue_name(batch), status="PENDING", load_input=False, load_output=False
            )
            return [workflow.executor_id or "" for workflow in begun]

        return self._patiently(running, patience)

    def register_queue(self, batch: str, max_in_flight: int) -> None:
        """Let DBOS know of the batch's queue; the last who does decides its limit."""
        self._client.register_queue(
            queue_name(batch),
            global_concurrency=max_in_flight,
            polling_interval_sec=_QUEUE_INTERVAL,
        )

    def beat(self, executor: str, process: str) -> None:
        """Show that a worker lives."""
        row = {"executor": executor, "beat": 1, "process": process}
        more = {"beat": _workers.c.beat + 1}
        insert = self._insert(_workers).on_conflict_do_update(
            index_elements=["executor"], set_=more
        )
        self._transact(lambda connection: connection.execute(insert, row), patience=0.0)

    def beats(self) -> dict[str, Beat]:
        """Return the last sign of life of each worker."""
        query = sa.select(_workers.c.executor, _workers.c.beat, _workers.c.process)
        return self._transact(
            lambda connection: {row[0]: Beat(row[1], row[2]) for row in connection.execute(query)},
            patience=0.0,
        )

    def forget(self, executor: str) -> None:
        """Take note that a worker works no more."""
        delete = sa.delete(_workers).where(_workers.c.executor == executor)
        self._transact(lambda connection: connection.execute(delete), patience=0.0)

    def reserve(self, batch: str, requests: int, rate: float) -> float:
        """Reserve the next departures, `1 / rate` apart, and return the seconds until the first."""
        now: Any = sa.literal(time.time())
        latest: Any = sa.func.max
        if not self._is_sqlite:
            now = sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Double)
            latest = sa.func.greatest
        length = requests / rate
        reserve = (
            sa.update(_batches)
            .where(_batches.c.name == batch)
            .values(next_request=latest(_batches.c.next_request, now) + length)
            .returning(_batches.c.next_request - length - now)
        )
        return self._transact(lambda connection: float(connection.execute(reserve).scalar_one()))

    def _enqueue(
        self, connection: sa.Connection, batch: str, key: str, attempt: int, request: str
    ) -> None:
        self._client.enqueue_in_transaction(
            connection,
            {
                "workflow_name": WORKFLOW,
                "queue_name": queue_name(batch),
                "workflow_id": workflow_id(batch, key, attempt),
            },
            key,
            attempt,
            request,
        )

    def _request(self, workflow: str) -> str:
        (found,) = self._client.list_workflows(workflow_ids=[workflow], load_output=False)
        if found.input is None:
            raise LookupError(f"{workflow} has no input")
        return str(found.input["args"][2])

    def _transact(self, work: Callable[[sa.Connection], T], *, patience: float = _PATIENCE) -> T:
        def transact() -> T:
            with self._engine.begin() as connection:
                return work(connection)

        return self._patiently(transact, patience)

    def _patiently(self, work: Callable[[], T], patience: float) -> T:
        """Do work; where the database is away, wait and do it again, for so many seconds."""
        give_up = time.monotonic() + patience
        while True:
            try:
                return work()
            except (exc.OperationalError, exc.InterfaceError) as error:
                if time.monotonic() >= give_up or self._hurry.wait(_PAUSE):
                    raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> ConfigurationError:
        shown = self._url.render_as_string(hide_password=True)
        reason = str(getattr(error, "orig", None) or error).strip()
        return ConfigurationError(f"the database {shown} cannot be used: {reason:.300}")


def queue_name(batch: str) -> str:
    """Return the name of a batch's queue."""
    return f"{APPLICATION}/{batch}"


def workflow_id(batch: str, key: str, attempt: int) -> str:
    """Return the id of the workflow that carries out an item."""
    return f"{APPLICATION}/{quote(batch, safe='')}/{attempt}/{key}"


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = "IMMEDIATE"
    connection.execute(f"PRAGMA busy_timeout={_SQLITE_BUSY_MS}")


def _mark_lost_connection(context: sa.ExceptionContext) -> None:
    # DBOS repeats what failed of a lost connection, but knows only some of psycopg's wordings: an
    # error that the server did not send has no state.
    error = context.original_exception
    if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:
        context.is_disconnect = True
