"""The connections to the database: what happens while there are none, retries and threads."""

from __future__ import annotations

import asyncio
import logging
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
from promptlayer_exec.dbos._dbos_calls import mark_lost_connections, migrate
from promptlayer_exec.dbos._location import shown
from promptlayer_exec.dbos._tables import tables as _tables

T = TypeVar("T")

logger = logging.getLogger("promptlayer_exec")
# Seconds for which calls are retried while the database cannot be used, and between two tries.
RETRY_FOR = 90.0
_RETRY_INTERVAL = 0.5
# Without these, a connection over which nothing comes any more keeps its thread for many minutes.
# In seconds, except for the one in milliseconds.
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
# Milliseconds after which the server ends a transaction in which nothing happens: that of a worker
# that stands still, or whose machine is lost, would lock out all others. And after which it ends a
# statement that waits for a lock: nothing else would. Set when the connection stands, because
# PgBouncer takes no such options.
_IDLE_IN_TRANSACTION = 10_000
_LOCKED = 4_000
# Writing transactions lock the file when they begin, and wait so many seconds for each other.
_SQLITE_OPTIONS = {"isolation_level": "IMMEDIATE", "timeout": 10.0}
_CREATE_TABLES_LOCK = 0x70726F6D707479
# Connections to PostgreSQL, of ours and of DBOS. A worker has one more, on which DBOS listens. Each
# has its own, because while the database is away, the threads of DBOS wait in all of theirs. To
# SQLite there are as many as are needed (0): those that wait for a locked file would keep all
# others waiting.
_CONNECTIONS = 5
_CONNECTIONS_OF_DBOS = 3
_ENDED = "the work was ended"
_stop: ContextVar[threading.Event] = ContextVar("stop")


class DatabaseLost(Exception):
    """The database could not be used for too long, or nobody waits for it any more.

    None of SQLAlchemy's errors: DBOS would retry those for ever.
    """


class Database:
    """A database whose calls are retried for a while.

    All methods block, except `run_in_thread`. While the database cannot be used, all threads wait
    for it, those of DBOS too, and then raise `ConfigurationError`.

    Attributes:
        patience: for how many seconds they wait.
        users: how many calls use it; the last one closes it.
        ended: set to let no thread wait for the database any more.
    """

    patience = RETRY_FOR
    users = 0

    def __init__(self, url: sa.URL) -> None:
        self._shown = shown(url)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        dialect = sqlite if self.is_sqlite else postgresql
        self.insert: Callable[[sa.Table], Any] = dialect.insert
        if not self.is_sqlite:
            # In the URL, because DBOS creates its tables on connections of its own.
            url = url.set(query=_POSTGRES_OPTIONS | url.query)
        self.url = url.render_as_string(hide_password=False)
        self.engine, self.engine_of_dbos = (
            sa.create_engine(
                url,
                pool_size=0 if self.is_sqlite else size,
                max_overflow=0,
                pool_timeout=RETRY_FOR,
                connect_args=_SQLITE_OPTIONS if self.is_sqlite else {},
            )
            for size in (_CONNECTIONS, _CONNECTIONS_OF_DBOS)
        )
        sa.event.listen(self.engine, "do_connect", self._connect)
        sa.event.listen(self.engine_of_dbos, "do_connect", self._wait_to_connect)
        for engine in (self.engine, self.engine_of_dbos):
            sa.event.listen(engine, "handle_error", self._translate)
            if not self.is_sqlite:
                mark_lost_connections(engine)
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._away_since: float | None = None

    @property
    def away_for(self) -> float:
        """For how many seconds the database could not be used."""
        since = self._away_since
        return 0.0 if since is None else time.monotonic() - since

    def is_cancelled(self) -> bool:
        """Return True if nobody waits for what this thread does: it should end soon."""
        return self.ended.is_set() or _stop.get(self.ended).is_set()

    def prepare(self) -> None:
        """Create the tables that are missing; does not wait for a database that is not there."""
        try:
            if self.is_sqlite:
                # DBOS would wait for a file that is locked or no file, and could not be ended.
                with self.engine.begin() as connection:
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
            migrate(self.url)
            with self.engine.begin() as connection:
                # Two processes that create the same table at once would collide.
                if self.is_sqlite:
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                else:
                    connection.execute(sa.func.pg_advisory_xact_lock(_CREATE_TABLES_LOCK))
                _tables.create_all(connection)
            if self.is_sqlite:
                # With WAL, readers do not wait for the writer, and commits flush once. This fails
                # while another process does the same. Once is enough: the file keeps the mode.
                with suppress(exc.OperationalError), self.engine.connect() as connection:
                    connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        except Exception as error:
            raise self._unusable(error) from error

    async def run_in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call a blocking function in a thread; if cancelled, stop retrying, but wait for it.

        What takes many transactions must ask `is_cancelled`.
        """
        stop = threading.Event()

        def call() -> T:
            _stop.set(stop)  # in the context of this call alone
            return work(*arguments)

        running = asyncio.ensure_future(asyncio.to_thread(call))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([running])
            if not running.cancelled():
                running.exception()  # otherwise asyncio logs it
            raise

    def close(self) -> None:
        """Close the connections that are not in use."""
        self.engine.dispose()
        self.engine_of_dbos.dispose()

    def rows(self, query: sa.Select[Any]) -> Sequence[Any]:

        def read() -> Sequence[Any]:
            with self.engine.connect() as connection:
                # This saves the round trips of a transaction, which SQLite does not begin to read.
                # SQLAlchemy would not set its "IMMEDIATE" again.
                if not self.is_sqlite:
                    connection.execution_options(isolation_level="AUTOCOMMIT")
                return connection.execute(query).all()

        return self.retry(read)

    def transact(self, work: Callable[[sa.Connection], T]) -> T:

        def transact() -> T:
            with self.engine.begin() as connection:
                return work(connection)

        return self.retry(transact)

    def execute(self, statement: sa.Executable) -> None:
        """Execute a statement in a transaction of its own."""
        self.transact(lambda connection: connection.execute(statement))

    def retry(self, work: Callable[[], T], *, once: bool = False) -> T:
        """Call a function, again and again while the database cannot be used, unless `once`."""
        since = time.monotonic()
        while True:
            if self.ended.is_set():
                raise self._unusable(DatabaseLost(_ENDED))
            try:
                done = work()
            except (exc.SQLAlchemyError, DatabaseLost) as error:
                may_pass = isinstance(error, exc.OperationalError | exc.InterfaceError) or (
                    isinstance(error, exc.DBAPIError) and error.connection_invalidated
                )
                is_late = time.monotonic() - since > self.patience
                if is_late and self.patience < RETRY_FOR:  # at a worker's end: all give up now
                    self.ended.set()
                if not may_pass or once or is_late:
                    raise self._unusable(error) from error
                self._failed(error)
                if _stop.get(self.ended).wait(_RETRY_INTERVAL) or self.is_cancelled():
                    raise self._unusable(error) from error
            else:
                self._worked()
                return done

    def _connect(self, dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        connection = dialect.connect(*arguments, **options)
        if not self.is_sqlite:
            _limit_transactions(connection)
        return connection

    def _wait_to_connect(self, dialect: Any, *arguments: Any) -> Any:
        """Make a connection for DBOS, which would give up too soon: wait until one can be made."""
        began = time.monotonic()
        while not self.ended.is_set():
            try:
                return self._connect(dialect, *arguments)
            except dialect.loaded_dbapi.OperationalError as error:
                self._failed(error)
                is_late = time.monotonic() - began > self.patience
                if is_late or _stop.get(self.ended).wait(_RETRY_INTERVAL):
                    raise DatabaseLost(reason_of(error)) from error
        raise DatabaseLost(_ENDED)

    def _translate(self, context: sa.ExceptionContext) -> None:
        if self.ended.is_set():  # DBOS would try again for ever
            error = context.original_exception
            raise DatabaseLost(reason_of(error)) from error

    def _failed(self, error: Exception) -> None:
        with self._lock:
            if self._away_since is None:
                self._away_since = time.monotonic()
                text = "the database %s cannot be used: %.300s; trying again"
                logger.warning(text, self._shown, reason_of(error))

    def _worked(self) -> None:
        with self._lock:
            if self._away_since is not None:
                self._away_since = None
                logger.warning("the database %s can be used again", self._shown)

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
            f"the database {self._shown} cannot be used: {reason_of(error):.300}{remedy}"
        )


def _limit_transactions(connection: psycopg.Connection[Any]) -> None:
    connection.autocommit = True  # one round trip
    connection.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_IN_TRANSACTION}".encode())
    connection.execute(f"SET lock_timeout = {_LOCKED}".encode())
    connection.autocommit = False


def reason_of(error: BaseException) -> str:
    """Return what an error of the database says, on one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
