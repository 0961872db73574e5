"""What batches rely on in DBOS beyond its reference, all by public names, and why.

All else is in `dbos.__all__` and at https://docs.dbos.dev/python/reference. When DBOS removes or
changes what is used here, `test_dbos_still_has` in tests/test_dbos.py fails.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import psycopg
import sqlalchemy as sa
from dbos import DBOS

from promptlayer_exec.dbos._tables import WORKFLOWS

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


def running_executors(connection: sa.Connection, queue: str) -> set[str]:
    """Return the executors that have running items."""
    table = WORKFLOWS[connection.dialect.name]
    query = sa.select(table.c.executor_id).distinct()
    query = query.where(table.c.queue_name == queue, table.c.status == "PENDING")
    return {executor or "" for executor in connection.execute(query).scalars()}


def owned(connection: sa.Connection, executor: str, workflows: Collection[str]) -> set[str]:
    """Return those of the workflows that an executor has dequeued and still has."""
    table = WORKFLOWS[connection.dialect.name]
    query = sa.select(table.c.workflow_uuid).where(table.c.workflow_uuid.in_(workflows))
    query = query.where(table.c.status == "PENDING", table.c.executor_id == executor)
    return {*connection.execute(query).scalars()}


def taken(connection: sa.Connection, queue: str, executor: str) -> set[str]:
    """Return the workflows that an executor has dequeued, as far as the database knows.

    The executor itself may not: DBOS dequeues in a transaction, and if the connection
    is lost while it commits, DBOS logs the error and never runs what it has dequeued.
    """
    table = WORKFLOWS[connection.dialect.name]
    query = sa.select(table.c.workflow_uuid)
    query = query.where(table.c.queue_name == queue, table.c.status == "PENDING")
    return {*connection.execute(query.where(table.c.executor_id == executor)).scalars()}
