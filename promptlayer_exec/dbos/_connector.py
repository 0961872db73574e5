"""The connections to the database, and what happens while they cannot be made."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import attrs
import psycopg
import sqlalchemy as sa

logger = logging.getLogger("promptlayer_exec")
# Seconds between two attempts, and between two checks whether they are still wanted.
_INTERVAL = 0.5
_STEP = 0.1
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
}


class DatabaseLost(Exception):
    """The database could not be reached for too long.

    It is none of SQLAlchemy's errors, so that DBOS, which would retry those for ever, raises it.
    """


@attrs.define(eq=False)
class Connector:
    """Makes an engine's connections: where one cannot be made, it waits, and then gives up.

    All threads that need the database wait here, those of DBOS too, so that all of them end in
    time. `abandon` ends them at once.
    """

    _shown: str  # the database, without its password
    patience: float  # seconds, from the first connection that could not be made
    _is_cancelled: Callable[[], bool]  # whether the call that needs the connection is cancelled
    _failing_since: float | None = attrs.field(init=False, default=None)
    _abandoned: threading.Event = attrs.field(init=False, factory=threading.Event)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock)
    _connections: WeakSet[psycopg.Connection[Any]] = attrs.field(init=False, factory=WeakSet)

    def attach(self, engine: sa.Engine) -> None:
        """Make the connections of an engine from now on."""
        sa.event.listen(engine, "do_connect", self.connect)
        sa.event.listen(engine, "handle_error", self._translate)

    @property
    def is_failing(self) -> bool:
        """Whether the last attempt to make a connection failed."""
        return self._failing_since is not None

    def abandon(self) -> None:
        """Make every use of the database fail from now on, also one that is under way."""
        self._abandoned.set()
        with self._lock:
            connections = [*self._connections]
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
                raise DatabaseLost("the work was ended")
            try:
                connection = dialect.connect(*args, **options)
            except dialect.loaded_dbapi.OperationalError as error:
                self._failed(error)
            else:
                self._succeeded()
                if isinstance(connection, psycopg.Connection):
                    with self._lock:
                        self._connections.add(connection)
                return connection

    def _failed(self, error: Exception) -> None:
        """Wait a little, or raise `DatabaseLost`."""
        now = time.monotonic()
        with self._lock:
            is_first = self._failing_since is None
            since = self._failing_since = (
                now if self._failing_since is None else self._failing_since
            )
        reason = " ".join(str(error).split())
        if is_first and self.patience > 0:
            text = "the database %s cannot be reached: %.300s; trying again for up to %g s"
            logger.warning(text, self._shown, reason, self.patience)
        until = min(now + _INTERVAL, since + self.patience)
        if until <= now:
            raise DatabaseLost(reason) from error
        while time.monotonic() < until:
            if self._abandoned.wait(_STEP) or self._is_cancelled():
                raise DatabaseLost(reason) from error

    def _succeeded(self) -> None:
        with self._lock:
            was_failing, self._failing_since = self._failing_since is not None, None
        if was_failing:
            logger.warning("the database %s can be reached again", self._shown)

    def _translate(self, context: sa.ExceptionContext) -> None:
        if self._abandoned.is_set():
            raise DatabaseLost("the work was ended") from context.original_exception
