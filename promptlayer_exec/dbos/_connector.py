"""The connections to the database, and what happens while there are none, or the file is locked."""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import psycopg
import sqlalchemy as sa

logger = logging.getLogger("promptlayer_exec")
# Seconds between two attempts, and between two checks whether they are still wanted.
_INTERVAL = 0.5
_STEP = 0.1
# Seconds that a database which cannot be used may keep a call that is cancelled.
PATIENCE_AT_END = 5.0
# Seconds for which workers that write to one SQLite file may lock each other out.
_CONTENTION = 5.0
# Seconds without a failure after which the next one is another trouble; a failure may take 10.
_FORGOTTEN_AFTER = 30.0
# Without these, a connection over which nothing comes any more keeps its thread for many minutes.
# In seconds, except for the one in milliseconds.
POSTGRES_OPTIONS = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    # A server that became a standby cannot be used: the next connection is to wait for the primary.
    "target_session_attrs": "read-write",
    # Whatever the settings of the role, the database or the environment are.
    "client_encoding": "utf8",
}

# Milliseconds after which the server ends a transaction in which nothing happens: that of a worker
# that stands still, or whose machine is lost, would lock out all others. Set when the connection
# stands, because PgBouncer takes no such option.
_IDLE_IN_TRANSACTION = 10_000


class DatabaseLost(Exception):
    """The database could not be reached for too long.

    It is none of SQLAlchemy's errors, so that DBOS, which would retry those for ever, raises it.
    """


@attrs.define(eq=False)
class Trouble:
    """What fails for all threads that use a database, and since when."""

    _shown: str  # the database, without its password
    _what: str  # the database cannot be ...
    _grace: float  # seconds before it is logged
    _since: float | None = attrs.field(init=False, default=None)
    _last: float = attrs.field(init=False, default=0.0)
    _is_logged: bool = attrs.field(init=False, default=False)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock)

    @property
    def lasts(self) -> bool:
        """Whether it has been there for longer than the grace."""
        since = self._since
        return since is not None and self._last - since >= self._grace

    def failed(self, reason: str, patience: float) -> float:
        """Record a failure; return when the first one was."""
        now = time.monotonic()
        with self._lock:
            if self._since is None or now - self._last > _FORGOTTEN_AFTER:
                self._since, self._is_logged = now, False
            since, self._last = self._since, now
            is_news = self.lasts and not self._is_logged and now < since + patience
            self._is_logged = self._is_logged or is_news
        if is_news:
            text = "the database %s cannot be %s: %.300s; trying again for up to %g s"
            logger.warning(text, self._shown, self._what, reason, patience)
        return since

    def ended(self) -> None:
        """Record that it works."""
        if self._since is None:
            return
        with self._lock:
            was_logged, self._is_logged, self._since = self._is_logged, False, None
        if was_logged:
            logger.warning("the database %s can be %s again", self._shown, self._what)


@attrs.define(eq=False)
class Connector:
    """Makes an engine's connections: where one cannot be made, it waits, and then gives up.

    It also waits while another program has locked a SQLite file. All threads that need the database
    wait here, those of DBOS too, so that all of them end in time. `abandon` ends them at once, also
    those that wait for an answer of PostgreSQL, for which nothing else limits the time.

    Attributes:
        patience: the seconds for which a trouble may last, for all threads together.
        writing: the trouble with transactions.
    """

    _shown: str
    patience: float
    _is_cancelled: Callable[[], bool]  # whether the call that needs the connection is cancelled
    writing: Trouble = attrs.field(init=False)
    _reaching: Trouble = attrs.field(init=False)
    _abandoned: threading.Event = attrs.field(init=False, factory=threading.Event)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock)
    _ended_by: str = attrs.field(init=False, default="the work was ended")
    # Since when each connection to PostgreSQL is used, None if it is not.
    _connections: WeakKeyDictionary[psycopg.Connection[Any], float | None] = attrs.field(
        init=False, factory=WeakKeyDictionary
    )
    _connecting: dict[int, float] = attrs.field(init=False, factory=dict)  # threads, since when

    def __attrs_post_init__(self) -> None:
        self.writing = Trouble(self._shown, "written", _CONTENTION)
        self._reaching = Trouble(self._shown, "reached", 0.0)

    def attach(self, engine: sa.Engine) -> None:
        """Make the connections of an engine from now on."""
        sa.event.listen(engine, "do_connect", self.connect)
        sa.event.listen(engine, "handle_error", self._translate)
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "do_execute", partial(self._execute, sqlite3.Cursor.execute))
            many = partial(self._execute, sqlite3.Cursor.executemany)
            sa.event.listen(engine, "do_executemany", many)
        else:
            sa.event.listen(engine, "checkout", self._used)
            for event in ("checkin", "detach"):  # DBOS listens on one that it has detached
                sa.event.listen(engine, event, self._not_used)

    @property
    def is_failing(self) -> bool:
        """Whether no connection can be made, or nothing has been written for some seconds."""
        return self._reaching.lasts or self.writing.lasts

    @property
    def longest_use(self) -> float:
        """For how many seconds a connection to PostgreSQL has been used or made, at most."""
        began = [since for _, since in self._in_use()] + [*self._connecting.copy().values()]
        return time.monotonic() - min(began) if began else 0.0

    @property
    def is_stuck(self) -> bool:
        """Whether PostgreSQL has not answered for longer than the patience."""
        return self.longest_use > self.patience

    @property
    def is_abandoned(self) -> bool:
        """Whether every use of the database fails."""
        return self._abandoned.is_set()

    def abandon(self, reason: str | None = None) -> None:
        """Make every use of the database fail from now on, also one that is under way."""
        self._ended_by = reason or self._ended_by
        self._abandoned.set()
        with self._lock:
            connections = [*self._connections]
        self._shut(connections)

    def abandon_if_stuck(self) -> None:
        """Make every use of the database fail if PostgreSQL has not answered for too long."""
        if self.is_stuck:
            self.abandon(f"it has not answered for {self.patience:g} s")

    def end_long_uses(self) -> None:
        """Let what has used a connection for longer than the patience at the end fail, once."""
        before = time.monotonic() - PATIENCE_AT_END
        self._shut([connection for connection, since in self._in_use() if since < before])

    def _in_use(self) -> list[tuple[psycopg.Connection[Any], float]]:
        with self._lock:
            return [
                (connection, since)
                for connection, since in self._connections.items()
                if since is not None and not connection.closed
            ]

    def _used(self, connection: psycopg.Connection[Any], *_: object) -> None:
        with self._lock:
            self._connections[connection] = time.monotonic()

    def _not_used(self, connection: psycopg.Connection[Any] | None, *_: object) -> None:
        if connection is not None:  # otherwise it is lost
            with self._lock:
                self._connections[connection] = None

    def _shut(self, connections: list[psycopg.Connection[Any]]) -> None:
        for connection in connections:
            # Whatever another thread waits for on it ends with an error.
            with (
                suppress(OSError, psycopg.Error),
                socket.socket(fileno=os.dup(connection.fileno())) as wire,
            ):
                wire.shutdown(socket.SHUT_RDWR)

    def connect(self, dialect: Any, _record: Any, args: Any, options: Any) -> Any:
        """Make a connection for SQLAlchemy's event `do_connect`; wait until one can be made.

        Raises:
            DatabaseLost: it could not be made for too long, or is not wanted any more.
        """
        while True:
            if self._abandoned.is_set():
                raise DatabaseLost(self._ended_by)
            self._connecting[threading.get_ident()] = time.monotonic()
            try:
                connection = dialect.connect(*args, **options)
                if isinstance(connection, psycopg.Connection):
                    self._used(connection)
                    if self._abandoned.is_set():  # meanwhile
                        self._shut([connection])
                    _limit_transactions(connection)
            except dialect.loaded_dbapi.OperationalError as error:
                self._wait(error)
            else:
                self._reaching.ended()
                return connection
            finally:
                self._connecting.pop(threading.get_ident(), None)

    def _wait(self, error: Exception) -> None:
        """Wait a little, or raise `DatabaseLost`."""
        reason = reason_of(error)
        since = self._reaching.failed(reason, self.patience)
        now = time.monotonic()
        until = min(now + _INTERVAL, since + self.patience)
        if until <= now:
            raise DatabaseLost(reason) from error
        while time.monotonic() < until:
            if self._abandoned.wait(_STEP) or self._is_cancelled():
                raise DatabaseLost(reason) from error

    def _execute(
        self,
        execute: Callable[[sqlite3.Cursor, str, Any], object],
        cursor: sqlite3.Cursor,
        statement: str,
        parameters: Any,
        _context: Any,
    ) -> bool:
        """Execute a statement for SQLAlchemy; wait until another program unlocks the file.

        SQLite's own wait could not be ended.

        Raises:
            DatabaseLost: it was locked for too long, or is not wanted any more.
        """
        if cursor.connection.in_transaction:  # which has locked the file
            return False
        while True:
            try:
                execute(cursor, statement, parameters)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
                cursor.connection.rollback()  # of what this statement began
                since = self.writing.failed(reason_of(error), self.patience)
                patience = self.patience
                if self._is_cancelled():
                    patience = min(patience, PATIENCE_AT_END)
                if self._abandoned.is_set() or time.monotonic() >= since + patience:
                    raise DatabaseLost(reason_of(error)) from error
            else:
                return True

    def _translate(self, context: sa.ExceptionContext) -> None:
        error = context.original_exception
        if self._abandoned.is_set():
            raise DatabaseLost(self._ended_by) from error
        if context.is_disconnect and self._is_cancelled():  # DBOS would try again for ever
            raise DatabaseLost(reason_of(error)) from error


def _limit_transactions(connection: psycopg.Connection[Any]) -> None:
    connection.autocommit = True  # one round trip
    connection.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_IN_TRANSACTION}".encode())
    connection.autocommit = False


def reason_of(error: BaseException) -> str:
    """Return what an error of the database says, on one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
