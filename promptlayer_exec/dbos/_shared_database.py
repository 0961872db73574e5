"""The database that batches share with DBOS, which has threads and connections of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import exc

from promptlayer_exec import ConfigurationError
from promptlayer_exec._database.database import Database, DatabaseLost, dispose, reason_of
from promptlayer_exec.dbos._dbos_calls import migrate
from promptlayer_exec.dbos._tables import tables as _tables

T = TypeVar("T")

# Connections of DBOS to PostgreSQL. A worker has one more, on which DBOS listens. They are not
# ours, because while the database is away, the threads of DBOS wait in all of theirs.
_CONNECTIONS_OF_DBOS = 3


class SharedDatabase(Database):
    """A database for whose return the threads of DBOS wait, too.

    Attributes:
        patience: for how many seconds they wait.
        users: how many calls use it; the last one closes it.
    """

    users = 0

    def __init__(self, url: sa.URL) -> None:
        super().__init__(url)
        self.patience = self.limits.retry_for
        self.engine_of_dbos = self.create_engine(_CONNECTIONS_OF_DBOS)
        sa.event.listen(self.engine_of_dbos, "do_connect", self._wait_to_connect)
        for engine in (self.engine, self.engine_of_dbos):
            sa.event.listen(engine, "handle_error", self._translate)

    def prepare(self) -> None:
        """Create the tables that are missing; does not wait for a database that is not there."""
        try:
            if self.is_sqlite:
                # DBOS would wait for a file that is locked or no file, and could not be ended.
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
        """Execute a statement in a transaction of its own."""
        self.transact(lambda connection: connection.execute(statement))

    def retry(self, work: Callable[[], T], *, once: bool = False) -> T:
        """Call a function, again and again while the database cannot be used, unless `once`."""
        since = time.monotonic()

        def keep_trying() -> bool:
            is_late = time.monotonic() - since > self.patience
            if is_late and self.patience < self.limits.retry_for:
                self.ended.set()  # at a worker's end: all give up now
            return not (is_late or once)

        return self.retry_while(keep_trying, work)

    def explain(self, error: Exception) -> Exception:
        """Return an error as the caller should get it: no raw error of the database."""
        if isinstance(error.__cause__, ConfigurationError):
            return error.__cause__  # the shared rate's: a session calls it a defect of its limiter
        if isinstance(error, (exc.SQLAlchemyError, DatabaseLost)):
            unusable = self._unusable(error)
            unusable.__cause__ = error
            return unusable
        return error

    def _wait_to_connect(self, dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        """Make a connection for DBOS, which would give up too soon: wait until one can be made."""
        began = time.monotonic()
        while not self.ended.is_set():
            try:
                return dialect.connect(*arguments, **options)
            except dialect.loaded_dbapi.OperationalError as error:
                self._failed(error)
                is_late = time.monotonic() - began > self.patience
                if is_late or not self._pause():
                    raise DatabaseLost(reason_of(error)) from error
        raise DatabaseLost("the work was ended")

    def _translate(self, context: sa.ExceptionContext) -> None:
        if self.ended.is_set():  # DBOS would try again for ever
            error = context.original_exception
            raise DatabaseLost(reason_of(error)) from error
