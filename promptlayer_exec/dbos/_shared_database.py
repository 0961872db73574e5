"""The database that batches share with DBOS, which has its own threads and connections."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import exc

from promptlayer_exec import ConfigurationError, StoreUnavailable
from promptlayer_exec._database.database import Database, DatabaseLost, dispose, reason_of
from promptlayer_exec.dbos._dbos_calls import migrate
from promptlayer_exec.dbos._tables import tables as _tables

T = TypeVar("T")

# Connections of DBOS to PostgreSQL, and threads that use them: on a SQLite file, more of them would
# only wait for each other. A worker has one more, on which DBOS listens. We do not share them,
# because while the database is away, the threads of DBOS wait in all of them.
CONNECTIONS_OF_DBOS = 3


class SharedDatabase(Database):
    """A database that DBOS also uses. While it is away, DBOS's threads wait for it.

    Attributes:
        patience: how many seconds they wait.
        users: how many calls use it. The last one closes it.
    """

    users = 0

    def __init__(self, url: sa.URL) -> None:
        super().__init__(url)
        self.patience = self.limits.retry_for
        self.engine_of_dbos = self.create_engine(CONNECTIONS_OF_DBOS)
        sa.event.listen(self.engine_of_dbos, "do_connect", self._wait_to_connect)
        if self.is_sqlite:
            sa.event.listen(self.engine_of_dbos, "connect", _flush_later)
        for engine in (self.engine, self.engine_of_dbos):
            sa.event.listen(engine, "handle_error", self._translate)

    def prepare(self, *, creates: bool = True) -> None:
        """Create missing tables, without waiting for a database that is away.

        DBOS also creates a missing PostgreSQL database, which only `creates` allows.
        """
        try:
            if not (creates or self.is_sqlite):
                with self.engine.connect():  # fails if there is no such database
                    pass
            if self.is_sqlite:
                # For a file that is locked or invalid, DBOS would wait, and could not be stopped.
                with self.engine.begin() as connection:
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
            migrate(self.url)
            with self.creating() as connection:
                _tables.create_all(connection)
        except Exception as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        super().close()
        dispose(self.engine_of_dbos)

    def rows(self, query: sa.Select[Any]) -> Sequence[Any]:
        return self.transact(lambda connection: connection.execute(query).all())

    def transact(self, work: Callable[[sa.Connection], T]) -> T:

        def transact() -> T:
            with self.engine.begin() as connection:
                return work(connection)

        return self.retry(transact)

    def execute(self, statement: sa.Executable) -> None:
        """Execute a statement in a separate transaction."""
        self.transact(lambda connection: connection.execute(statement))

    def retry(self, work: Callable[[], T], *, once: bool = False) -> T:
        """Call a function, and again while the database is away, unless `once`."""
        since = time.monotonic()

        def keep_trying() -> bool:
            is_late = time.monotonic() - since > self.patience
            if is_late and self.patience < self.limits.retry_for:
                self.ended.set()  # a worker is stopping: all give up now
            return not (is_late or once)

        return self.retry_while(keep_trying, work)

    def explain(self, error: Exception) -> Exception:
        """Return an error for the caller, instead of a raw error of the database."""
        if isinstance(error.__cause__, ConfigurationError | StoreUnavailable):
            return error.__cause__  # the session reports the shared rate's as a limiter's defect
        if isinstance(error, (exc.SQLAlchemyError, DatabaseLost)):
            unusable = self._unusable(error)
            unusable.__cause__ = error
            return unusable
        return error

    def _wait_to_connect(self, dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        """Open a connection for DBOS. Wait for the database, because DBOS gives up too early."""
        began = time.monotonic()
        while not self.ended.is_set():
            try:
                return dialect.connect(*arguments, **options)
            except dialect.loaded_dbapi.OperationalError as error:
                self._failed(error)
                is_late = time.monotonic() - began > self.patience
                if is_late or not self._pause():
                    raise DatabaseLost(reason_of(error)) from error
        raise DatabaseLost("the work has stopped")

    def _translate(self, context: sa.ExceptionContext) -> None:
        if self.ended.is_set():  # DBOS would try again forever
            error = context.original_exception
            raise DatabaseLost(reason_of(error)) from error


def _flush_later(connection: Any, _record: Any) -> None:
    """Let commits of DBOS reach the disk together with our next one.

    A flush of SQLite's write-ahead log covers all commits before it. So a power cut loses at most
    what DBOS recorded after our last commit: that it took an item, or finished one. Whoever runs
    that item again finds in its row what is left to do.

    In any other journal mode, this might damage the file.
    """
    if connection.execute("PRAGMA journal_mode").fetchone() == ("wal",):
        connection.execute("PRAGMA synchronous = NORMAL")
