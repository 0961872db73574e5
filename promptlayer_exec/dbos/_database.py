"""The connection to the database: retries and threads."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TypeVar

import anyio
import psycopg
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite

from promptlayer_exec import ConfigurationError
from promptlayer_exec.dbos._connector import (
    POSTGRES_OPTIONS,
    Connector,
    DatabaseLost,
    Trouble,
    reason_of,
)
from promptlayer_exec.dbos._engine import mark_lost_connections, migrate
from promptlayer_exec.dbos._location import shown
from promptlayer_exec.dbos._tables import tables as _tables

T = TypeVar("T")

# Seconds for which calls are retried while the database cannot be reached, and between two tries.
RETRY_FOR = 90.0
_RETRY_INTERVAL = 0.5
# Writing transactions lock the file when they begin. A call of SQLite waits so many seconds for the
# others, and cannot be interrupted; `Connector` repeats it.
_SQLITE_OPTIONS = {"isolation_level": "IMMEDIATE", "timeout": 1.0}
_CREATE_TABLES_LOCK = 0x70726F6D707479
_OTHER_SCHEMAS = sa.text(
    """
    SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE relname = 'promptlayer_batch' AND relkind = 'r'
    """
)
_OWN_TABLE = sa.select(sa.func.to_regclass("promptlayer_batch"))
# A worker has one more to PostgreSQL, on which DBOS listens. Calls wait for a connection as long as
# they would retry. To SQLite there are as many as are needed (0): those that wait for a locked file
# would keep all others waiting, and nothing can end that.
_CONNECTIONS = 5
_stop_retrying: ContextVar[threading.Event] = ContextVar("stop_retrying")


class Database:
    """A database whose calls are retried for a while.

    All methods block, except `run_in_thread`. While the database cannot be reached, they retry for
    up to 90 seconds, unless they say otherwise, and then raise `ConfigurationError`.

    Attributes:
        precondition: called first in each transaction, which an error of it ends.
        users: how many calls use it; the last one closes it.
    """

    precondition: Callable[[sa.Connection], None] | None = None
    users = 0

    def __init__(self, url: sa.URL) -> None:
        self.url = url.render_as_string(hide_password=False)
        # Ends the retries of calls that do not come through `run_in_thread`: those of the worker.
        self.stop_retrying = threading.Event()
        self.is_sqlite = url.get_backend_name() == "sqlite"
        dialect = sqlite if self.is_sqlite else postgresql
        self.insert: Callable[[sa.Table], Any] = dialect.insert
        options = {name: value for name, value in POSTGRES_OPTIONS.items() if name not in url.query}
        # DBOS creates its tables on connections of its own, which take their options from the URL.
        self._migrated = (
            url
            if self.is_sqlite
            else url.update_query_pairs((name, str(value)) for name, value in options.items())
        )
        self.engine = sa.create_engine(
            url,
            pool_size=0 if self.is_sqlite else _CONNECTIONS,
            max_overflow=0,
            pool_timeout=RETRY_FOR,
            connect_args=_SQLITE_OPTIONS if self.is_sqlite else options,
        )
        self.connector = Connector(shown(url), RETRY_FOR, self.is_cancelled)
        self.connector.attach(self.engine)
        self._is_closed = False
        sa.event.listen(self.engine, "checkin", self._close_if_returned_late)
        if not self.is_sqlite:
            mark_lost_connections(self.engine)

    def prepare(self) -> None:
        """Create the tables that are missing; retry only if a connection that stood breaks.

        A database that cannot be reached at all, or not with this password, is said at once.
        """
        try:
            try:
                self._prepare()
            except exc.DBAPIError as error:
                if self.is_sqlite or not (error.connection_invalidated or error.statement):
                    raise
                self.retry(self._prepare)
        except ConfigurationError:
            raise
        except Exception as error:
            raise self._unusable(error) from error

    def _prepare(self) -> None:
        if self.is_sqlite:
            # What cannot be opened may be mistyped: only an engine's connections are waited for.
            arguments, options = self.engine.dialect.create_connect_args(self.engine.url)
            self.engine.dialect.connect(*arguments, **options).close()
            # DBOS would wait for a locked file, too, but could not be ended
            with self.engine.begin() as connection:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
        migrate(self._migrated.render_as_string(hide_password=False))
        with self.engine.begin() as connection:
            # Two processes that create the same table at once would collide.
            if self.is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.execute(sa.func.pg_advisory_xact_lock(_CREATE_TABLES_LOCK))
                _check_schema(connection)
            _tables.create_all(connection)
        if self.is_sqlite:
            # With WAL, readers do not wait for the writer, and commits flush once. This fails
            # while another process does the same. Once is enough: the file keeps the mode.
            with suppress(exc.OperationalError), self.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")

    async def run_in_thread(
        self, work: Callable[..., T], *arguments: Any, stops_all: bool = False
    ) -> T:
        """Call a blocking function in a thread; if cancelled, stop retrying, but wait for it.

        It ends soon, because connections that PostgreSQL leaves without an answer are shut then,
        or after its patience in any case. What takes many transactions must ask `is_cancelled`.
        One that `stops_all` ends the retries of other threads, too: they may hold the connections
        that it waits for.
        """
        stop = self.stop_retrying if stops_all else threading.Event()

        def call() -> T:
            _stop_retrying.set(stop)  # in the context of this call alone
            return work(*arguments)

        running = asyncio.ensure_future(asyncio.to_thread(call))
        try:
            while not running.done():
                await asyncio.wait([running], timeout=_RETRY_INTERVAL)
                self.connector.abandon_if_stuck()
            return running.result()
        except asyncio.CancelledError:
            stop.set()
            with anyio.CancelScope(shield=True):
                while not running.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([running], timeout=_RETRY_INTERVAL)
                    self.connector.end_long_uses()
            if not running.cancelled():
                running.exception()  # otherwise asyncio logs it
            raise

    def is_cancelled(self) -> bool:
        """Return True if nobody waits for what this thread does: it should end soon."""
        return _stop_retrying.get(self.stop_retrying).is_set()

    def close(self) -> None:
        """Close the connections, and those in use as soon as they are returned."""
        self._is_closed = True  # first: one that is returned just now would stay in the old pool
        self.engine.dispose()

    def _close_if_returned_late(self, _: object, record: sa.pool.ConnectionPoolEntry) -> None:
        """Close a connection that a thread of DBOS, which may outlast `DBOS.destroy`, returns."""
        if self._is_closed:
            record.invalidate()

    def rows(self, query: sa.Select[Any], *, once: bool = False) -> Sequence[Any]:
        """Return the rows of a query."""

        def read() -> Sequence[Any]:
            with self.reading() as connection:
                return connection.execute(query).all()

        return self.retry(read, once=once)

    def reading(self) -> sa.Connection:
        """Return a connection for one query, without the round trips of a transaction."""
        connection = self.engine.connect()
        # SQLite begins no transaction to read, and SQLAlchemy would not set "IMMEDIATE" again.
        return (
            connection
            if self.is_sqlite
            else connection.execution_options(isolation_level="AUTOCOMMIT")
        )

    def transact(self, work: Callable[[sa.Connection], T], *, once: bool = False) -> T:
        """Do some work in one transaction, after its `precondition`."""

        def transact() -> T:
            with self.engine.begin() as connection:
                if (check := self.precondition) is not None:
                    check(connection)
                before = _changes(connection)
                done = work(connection)
                has_written = _changes(connection) != before
                # SQLite begins the transaction with the first write: nothing changes after that.
                if check is not None and has_written:
                    check(connection)
            if has_written or not self.is_sqlite:
                self.connector.writing.ended()
            return done

        return self.retry(transact, once=once, trouble=self.connector.writing)

    def retry(
        self, work: Callable[[], T], *, once: bool = False, trouble: Trouble | None = None
    ) -> T:
        """Call a function, again and again while the database cannot be reached, unless `once`.

        With a `trouble`, all calls that meet it have one patience together: some wait in turn.
        """
        since = time.monotonic()
        while True:
            try:
                return work()
            except (exc.SQLAlchemyError, DatabaseLost) as error:
                may_pass = isinstance(error, exc.OperationalError | exc.InterfaceError) or (
                    isinstance(error, exc.DBAPIError) and error.connection_invalidated
                )
                if may_pass and not once:
                    patience = self.connector.patience
                    if trouble is not None:
                        since = trouble.failed(reason_of(error), patience)
                    stop = _stop_retrying.get(self.stop_retrying)
                    if time.monotonic() < since + patience and not stop.wait(_RETRY_INTERVAL):
                        continue
                raise self._unusable(error) from error

    def explain(self, error: Exception) -> Exception:
        """Return an error as the caller should get it: no raw error of the database."""
        if isinstance(error.__cause__, ConfigurationError):
            return error.__cause__  # the shared rate's: a session calls it a defect of its limiter
        if isinstance(error, (exc.SQLAlchemyError, DatabaseLost)):
            unusable = self._unusable(error)
            unusable.__cause__ = error
            return unusable
        return error

    def _unusable(self, error: Exception) -> ConfigurationError:
        cause = getattr(error, "orig", None) or error
        remedy = ""
        if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_CANTOPEN:
            remedy = "; it must be a file, or a new one in a directory that you can write to"
        elif isinstance(cause, psycopg.errors.UntranslatableCharacter):
            remedy = "; use one whose encoding is UTF8: `createdb -T template0 -E UTF8 batches`"
        return ConfigurationError(
            f"the database {shown(self.engine.url)} cannot be used: {reason_of(error):.300}{remedy}"
        )


def _changes(connection: sa.Connection) -> int:
    """Return how many rows a connection to SQLite has changed; to change none proves nothing."""
    return getattr(connection.connection.dbapi_connection, "total_changes", 0)


def _check_schema(connection: sa.Connection) -> None:
    """Refuse to make the tables if another schema has them, which this connection does not see.

    DBOS has its tables in one schema, `dbos`, so two batches of one name would share their items.
    """
    if connection.execute(_OWN_TABLE).scalar_one() is not None:
        return
    found = connection.execute(_OTHER_SCHEMAS).scalars().all()
    if found:
        raise ConfigurationError(
            f"the batches of the database {shown(connection.engine.url)} are in the schema"
            f" {found[0]!r}, which is not where this connection looks: use a database of its own,"
            " or one schema for all (https://www.postgresql.org/docs/current/ddl-schemas.html)"
        )
