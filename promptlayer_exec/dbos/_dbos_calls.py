"""What batches rely on in DBOS beyond its reference, all by public names, and why.

All else is in `dbos.__all__` and at https://docs.dbos.dev/python/reference. When DBOS removes or
changes what is used here, `test_dbos_still_has` in tests/dbos/test_dbos.py fails.
"""

from __future__ import annotations

import logging

import psycopg
import sqlalchemy as sa
from dbos import DBOS

_HANDLER = logging.NullHandler()


def migrate(url: str) -> None:
    """Create or migrate DBOS's tables.

    The public `run_dbos_database_migrations` prints errors to standard output, and raises an
    exception without the reason.
    """
    DBOS.migrate(url)


def log_quietly() -> None:
    """Let DBOS log as other libraries do: to standard error only if the application wants that.

    Relies on DBOS adding its console handler only to a logger without a handler. The documented
    `console_log_level` makes that handler quiet, but DBOS still turns off propagation to the root.
    """
    DBOS.logger.addHandler(_HANDLER)


def mark_lost_connections(engine: sa.Engine) -> None:
    """Let DBOS retry on PostgreSQL whenever a connection is lost, or its server became a standby.

    Relies on DBOS retrying after an error that SQLAlchemy calls a disconnect. By itself, DBOS
    recognizes only some of psycopg's messages.
    """

    @sa.event.listens_for(engine, "handle_error")
    def mark(context: sa.ExceptionContext) -> None:
        error = context.original_exception
        # An error that the server did not send has no state.
        is_lost = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
        if is_lost or isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
            context.is_disconnect = True
