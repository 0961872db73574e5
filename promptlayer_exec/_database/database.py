"""The connections to a database: what happens while there are none, retries and threads."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

import anyio
import attrs
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite

from promptlayer_exec._database.location import shown
from promptlayer_exec._database.threads import finished
from promptlayer_exec._values.errors import ConfigurationError, StoreUnavailable

T = TypeVar("T")

logger = logging.getLogger("promptlayer_exec")

# Without these, a connection over which nothing comes any more keeps its thread for many minutes.
# In seconds, except for the one in milliseconds. libpq acts on all of them itself. It sends only
# `client_encoding`, which PgBouncer accepts.
_POSTGRES_OPTIONS = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "2",
    "tcp_user_timeout": "15000",
    # A server that became a standby cannot be used: the next connection is to wait for the primary.
    "target_session_attrs": "read-write",
    # Whatever the settings of the role, the database or the environment are.
    "client_encoding": "utf8",
}

# States of PostgreSQL's errors.
_UNTRANSLATABLE_CHARACTER = "22P05"
_READ_ONLY_TRANSACTION = "25006"

# SQLite's codes for a file that cannot be used right now: locked, full, or on a disk that fails.
_PASSING_FILE_TROUBLE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_PROTOCOL,
}

_stop: ContextVar[threading.Event] = ContextVar("stop")


@attrs.frozen
class DatabaseLimits:
    """How long a database may keep its callers waiting, and how many of them in parallel.

    Attributes:
        retry_for: seconds for which to retry calls while the database is unavailable.
        retry_interval: seconds between two tries.
        idle_in_transaction: seconds after which PostgreSQL aborts an idle transaction. Otherwise a
            worker that stands still, or whose machine is lost, would lock out all others.
        locked: seconds after which PostgreSQL aborts a statement that waits for a lock. Nothing
            else would.
        locked_file: seconds for which a statement waits for a locked SQLite file.
        connections: connections to PostgreSQL. SQLite has no such limit, because connections that
            wait for a locked file would keep all others waiting.
        threads: threads that use the database. The event loop's own threads stay free for name
            resolution and for the program's calls of `asyncio.to_thread`.
    """

    retry_for: float = 90.0
    retry_interval: float = 0.5
    idle_in_transaction: float = 10.0
    locked: float = 4.0
    locked_file: float = 10.0
    connections: int = 5
    threads: int = 16


LIMITS = DatabaseLimits()


class DatabaseLost(Exception):
    """The database was unavailable for too long, or nobody waits for it any more.

    None of SQLAlchemy's errors: DBOS would retry those for ever.
    """


class Database:
    """A database that retries its calls for a while.

    All methods block, except those that are coroutines. While the database is unavailable, all
    threads wait for it, and then raise `StoreUnavailable`. What waiting cannot help, such as a
    missing permission, raises `ConfigurationError`.

    Args:
        url: the URL of the database, as `check_url` returns it.
        limits: how long calls wait for it. None: the default ones.

    Attributes:
        ended: set to let no thread wait for the database any more.
    """

    def __init__(self, url: sa.URL, limits: DatabaseLimits | None = None) -> None:
        self.limits = limits or LIMITS
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._shown = shown(url)
        if not self.is_sqlite:
            # In the URL, because DBOS creates its tables on its own connections.
            url = url.set(query=_POSTGRES_OPTIONS | url.query)
        self.url = url.render_as_string(hide_password=False)

        dialect = sqlite if self.is_sqlite else postgresql
        self.insert: Callable[[sa.Table], Any] = dialect.insert
        self.engine = self.create_engine(self.limits.connections)

        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._error: Exception | None = None
        self._threads = ThreadPoolExecutor(self.limits.threads, "promptlayer-exec-database")

    def create_engine(self, connections: int) -> sa.Engine:
        """Return an engine whose transactions keep to the limits."""
        if self.is_sqlite:
            # Writing transactions lock the file when they begin, and wait for each other.
            options = {"isolation_level": "IMMEDIATE", "timeout": self.limits.locked_file}
            return sa.create_engine(self.url, pool_size=0, connect_args=options)

        # A pooler such as PgBouncer may execute each transaction on another connection to the
        # server. A statement prepared in an earlier one does not exist there, or is another
        # client's. With AUTOCOMMIT, psycopg leaves BEGIN to `_begin`.
        engine = sa.create_engine(
            self.url,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=self.limits.retry_for,
            isolation_level="AUTOCOMMIT",
            connect_args={"prepare_threshold": None},
        )
        sa.event.listen(engine, "begin", self._begin)
        sa.event.listen(engine, "handle_error", _mark_lost_connections)
        return engine

    def _begin(self, connection: sa.Connection) -> None:
        """Begin a transaction that keeps to the limits, in one round trip.

        A pooler would hand on what is set for a session to the next client of the connection.
        """
        isolation = connection.get_execution_options().get("isolation_level")
        if isolation == "AUTOCOMMIT":  # no transaction is wanted
            return
        limits = {
            "idle_in_transaction_session_timeout": self.limits.idle_in_transaction,
            "lock_timeout": self.limits.locked,
        }
        statements = [f"SET LOCAL {name} = {value * 1000:.0f}" for name, value in limits.items()]
        if isolation is None:  # with any other level, psycopg itself begins the transaction
            # Whatever the default of the server is: what others have committed is to be seen.
            statements.insert(0, "BEGIN ISOLATION LEVEL READ COMMITTED")
        connection.exec_driver_sql("; ".join(statements))

    @property
    def now(self) -> sa.ColumnElement[float]:
        """The time on the database's clock, in seconds since the epoch."""
        if self.is_sqlite:
            return (sa.func.julianday("now", type_=sa.Double) - 2440587.5) * 86400.0
        return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Double)

    @property
    def unavailable_for(self) -> float:
        """For how many seconds the database has been unavailable."""
        since = self._away_since
        return 0.0 if since is None else time.monotonic() - since

    def is_cancelled(self) -> bool:
        """Return True if nobody waits for what this thread does: it should end soon."""
        return self.ended.is_set() or _stop.get(self.ended).is_set()

    @contextmanager
    def creating(self) -> Iterator[sa.Connection]:
        """Yield a connection on which to create tables: two processes in parallel would collide."""
        with self.engine.begin() as connection:
            if self.is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                lock = sa.func.pg_advisory_xact_lock(0x70726F6D707479)
                connection.execute(sa.select(lock))
            yield connection

        if self.is_sqlite:
            # With WAL, readers do not wait for the writer, and commits flush once. This fails
            # while another process does the same. Once is enough: the file keeps the mode.
            with suppress(exc.OperationalError), self.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")

    async def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call a blocking function in a thread. If cancelled, let it stop retrying."""
        running, stop = self._call(work, arguments)
        try:
            return await finished(running)
        finally:
            stop.set()

    async def run_in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call a blocking function in a thread. If cancelled, stop retrying, but wait for it.

        What takes many transactions must ask `is_cancelled`.
        """
        running, stop = self._call(work, arguments)
        try:
            return await finished(running)
        except asyncio.CancelledError:
            stop.set()
            with anyio.CancelScope(shield=True), suppress(Exception):
                await finished(running)
            raise

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call a blocking function in a thread, after the calls before if there is one thread."""
        return self._call(work, arguments)[0]

    def _call(
        self, work: Callable[..., T], arguments: tuple[Any, ...]
    ) -> tuple[Future[T], threading.Event]:
        stop = threading.Event()

        def call() -> T:
            _stop.set(stop)  # in the context of this call alone
            return work(*arguments)

        return self._threads.submit(copy_context().run, call), stop

    def close(self) -> None:
        """Close the connections, and let the threads stop. What still runs may finish."""
        self._threads.shutdown(wait=False)
        dispose(self.engine)

    def retry_while(self, keep_trying: Callable[[], bool], work: Callable[[], T]) -> T:
        """Call a function, and again while the database is unavailable and `keep_trying()`."""
        while True:
            if self.ended.is_set():
                raise self._unusable(DatabaseLost("the work has stopped"))

            try:
                done = work()
            except (exc.SQLAlchemyError, DatabaseLost) as error:
                if not _may_pass(error) or not keep_trying():
                    raise self._unusable(error) from error
                self._failed(error)
                if not self._pause():
                    raise self._unusable(error) from error
            else:
                self._worked()
                return done

    def _pause(self) -> bool:
        """Wait until the next try. Return False if there is to be none."""
        _stop.get(self.ended).wait(self.limits.retry_interval)
        return not self.is_cancelled()

    def _failed(self, error: Exception) -> None:
        self._error = error
        with self._lock:
            if self._away_since is None:
                self._away_since = time.monotonic()
                text = "cannot use the database %s, trying again: %.300s"
                logger.warning(text, self._shown, reason_of(error))

    def _worked(self) -> None:
        with self._lock:
            if self._away_since is not None:
                self._away_since = None
                logger.warning("the database %s works again", self._shown)

    def late(self, seconds: float) -> StoreUnavailable | ConfigurationError:
        """Return the error of a call that has waited for this long."""
        if self._error is not None and self.unavailable_for:
            return self._unusable(self._error)
        return self._unusable(DatabaseLost(f"no response within {seconds:g} s"))

    def _unusable(self, error: Exception) -> StoreUnavailable | ConfigurationError:
        cause = getattr(error, "orig", None) or error
        needed = ""
        if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_CANTOPEN:
            needed = ". It must be a file, or a new one in a directory that you can write to"
        elif getattr(cause, "sqlstate", None) == _UNTRANSLATABLE_CHARACTER:
            needed = ". Its encoding must be UTF8: `createdb -T template0 -E UTF8 batches`"
        elif "password" in reason_of(error):  # the driver gives no state of a refused connection
            needed = ". Check the user and the password in its URL"
        text = f"cannot use the database {self._shown}: {reason_of(error):.300}{needed}"
        if _is_missing(error):
            advice = "Check its name, or create it with `createdb -T template0 -E UTF8`."
            return ConfigurationError(text, advice=advice, setting="database_url")
        return StoreUnavailable(text) if _is_away(error) else ConfigurationError(text)


def dispose(engine: sa.Engine) -> None:
    """Close an engine's connections, those in use as soon as they return to the pool.

    By itself, SQLAlchemy leaves those to the garbage collector.
    """
    sa.event.listen(engine.pool, "checkin", lambda _, entry: entry.close())
    engine.dispose()


def reason_of(error: BaseException) -> str:
    """Return the message of a database error, on one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())


def _may_pass(error: Exception) -> bool:
    """Return True if a later try may succeed: the database is away, locked or restarting."""
    if isinstance(error, exc.OperationalError | exc.InterfaceError):
        return True
    return isinstance(error, exc.DBAPIError) and error.connection_invalidated


def _is_away(error: Exception) -> bool:
    """Return True if an error is about a database that is away, not about how it is set up."""
    if isinstance(error, DatabaseLost | exc.TimeoutError):
        return True
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _PASSING_FILE_TROUBLE  # an extended code has its class there
    return _may_pass(error)


def _is_missing(error: Exception) -> bool:
    """Return True if PostgreSQL runs, in English, but has no database of this name."""
    return re.search(r'FATAL: +database ".*" does not exist', reason_of(error)) is not None


def _mark_lost_connections(context: sa.ExceptionContext) -> None:
    """Replace a connection that is lost, or whose server became a standby.

    Like us, DBOS retries after an error that SQLAlchemy calls a disconnect. By themselves, both
    recognize only some of psycopg's messages.
    """
    error: Any = context.original_exception
    psycopg = context.dialect.loaded_dbapi
    # An error that the server did not send has no state.
    is_lost = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
    if is_lost or getattr(error, "sqlstate", None) == _READ_ONLY_TRANSACTION:
        context.is_disconnect = True
