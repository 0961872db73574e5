"""The public names of DBOS that batches use beyond its reference, and why.

All others are in `dbos.__all__` and at https://docs.dbos.dev/python/reference. If DBOS removes or
changes something that this module uses, `test_dbos_still_has` in tests/dbos/test_batch.py fails.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import sqlalchemy as sa
from dbos import DBOS

_HANDLER = logging.NullHandler()


def migrate(url: str) -> None:
    """Create or migrate DBOS's tables.

    The public `run_dbos_database_migrations` prints errors to standard output, and raises an
    exception without the reason. Both open their own connections, without `connect_args`.
    """
    thread = threading.get_ident()

    def connect(dialect: Any, _record: Any, _arguments: Any, options: dict[str, Any]) -> None:
        """Let DBOS use a pooler: see `Database.create_engine`."""
        if threading.get_ident() == thread and dialect.name == "postgresql":
            options["prepare_threshold"] = None
            if given is None:
                del options["options"]
            else:
                options["options"] = given

    # Unless the URL has a timeout, DBOS sets one for the session, and a pooler passes that on to
    # its next client. A pooler refuses the one in the URL, so `connect` removes it.
    parsed = sa.make_url(url)
    given = parsed.query.get("options")
    if parsed.get_backend_name() == "postgresql":
        own = f"{given or ''} -c idle_in_transaction_session_timeout=60000"
        url = parsed.update_query_dict({"options": own}).render_as_string(hide_password=False)

    DBOS.logger.addFilter(_is_news)
    sa.event.listen(sa.Engine, "do_connect", connect)
    try:
        DBOS.migrate(url)
    finally:
        sa.event.remove(sa.Engine, "do_connect", connect)


def log_quietly() -> None:
    """Let DBOS log as other libraries do: to standard error only if the application wants that.

    DBOS adds its console handler only to a logger without a handler. The documented
    `console_log_level` makes that handler quiet, but DBOS still turns off propagation to the root.
    """
    DBOS.logger.addHandler(_HANDLER)
    DBOS.logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for two warnings that help nobody.

    One is about each item that still runs when a worker stops: the next worker continues with it.
    The other one says that DBOS could not look whether the database exists. If it does not, or is
    away, an error follows.
    """
    helpless = ("Asyncio task cancelled for workflow", "Could not connect to postgres database")
    return not record.getMessage().startswith(helpless)
