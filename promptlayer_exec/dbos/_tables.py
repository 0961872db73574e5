"""Our tables of batches, items, workers and callbacks, and their names in DBOS."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

APPLICATION = "promptlayer-exec"
WORKFLOW = "promptlayer_exec.item"
COUNTS = ("total", "succeeded", "failed", "unknown")

tables = sa.MetaData()
batches = sa.Table(
    "promptlayer_batch",
    tables,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("next_request", sa.Double, nullable=False),
    # The time when a slot was last reserved, to notice that the clock was put back.
    sa.Column("reserved_at", sa.Double),
    sa.Column("created", sa.Double, nullable=False),
    # The server and the key that the batch belongs to. See `_owner`.
    sa.Column("server", sa.Text),
    sa.Column("key_digest", sa.Text),
    # For the push channel that all workers share, so that push also wakes one that takes over.
    sa.Column("channel_suffix", sa.Text, nullable=False),
    # The settings that all workers share. Without a rate, only the limit of each session applies.
    sa.Column("max_in_flight", sa.Integer),
    sa.Column("rate", sa.Double),
    # The maximum number of runs for an item. None: one.
    sa.Column("attempts", sa.Integer),
    # For how many seconds to follow a run that does not end. None: a day.
    sa.Column("give_up_after", sa.Double),
    # How many items there are of each kind, so that `status` need not count.
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in COUNTS),
)
items = sa.Table(
    "promptlayer_item",
    tables,
    sa.Column("batch", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    # The request that the key belongs to, as JSON. See `_requests`.
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    # How it finished, the number of its outcome, and the outcome as JSON.
    sa.Column("kind", sa.Text),
    sa.Column("seq", sa.BigInteger),
    sa.Column("outcome", sa.Text),
    # The token of a request that a worker may have sent.
    sa.Column("intent", sa.Text),
    # The result of that request, or an earlier attempt's run to follow, as JSON.
    sa.Column("started", sa.Text),
    # How long its run took, in seconds.
    sa.Column("seconds", sa.Double),
    # When its state last changed, by the database's clock.
    sa.Column("since", sa.Double, nullable=False),
    # The earlier attempts and how they finished, as JSON.
    sa.Column("history", sa.Text),
    sa.Index("promptlayer_item_kind", "batch", "kind"),
    sa.Index("promptlayer_item_seq", "batch", "seq"),
)
workers = sa.Table(
    "promptlayer_worker",
    tables,
    sa.Column("executor", sa.Text, primary_key=True),
    sa.Column("batch", sa.Text, nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False),
    sa.Column("process", sa.Text, nullable=False),
    sa.Column("seen_at", sa.Double),
    # If it is dead: the worker that puts its items back, and since when.
    sa.Column("rescuer", sa.Text),
    sa.Column("rescued_at", sa.Double),
)
# By the token of its start, which is the intent of an item.
callbacks = sa.Table(
    "promptlayer_callback",
    tables,
    sa.Column("batch", sa.Text, primary_key=True),
    sa.Column("token", sa.Text, primary_key=True),
    sa.Column("execution_id", sa.BigInteger, nullable=False),
)

# The callback of an item's start.
called_back = sa.and_(callbacks.c.batch == items.c.batch, callbacks.c.token == items.c.intent)

# One unfinished attempt of an item, by the parameters that `attempt_of` returns. With old
# statistics, PostgreSQL would read the whole index of kinds for "kind IS NULL".
the_attempt = sa.and_(
    items.c.batch == sa.bindparam("the_batch"),
    items.c.key == sa.bindparam("the_key"),
    items.c.attempt == sa.bindparam("the_attempt"),
    sa.func.coalesce(items.c.kind, "") == "",
)


def queue_name(batch: str) -> str:
    return f"{APPLICATION}/{batch}"


def workflow_id(batch: str, key: str, attempt: int) -> str:
    """Return the id of the DBOS workflow that runs one attempt of an item."""
    return f"{APPLICATION}/{quote(batch, safe='')}/{attempt}/{key}"


def key_and_attempt(workflow_id: str) -> tuple[str, int]:
    """Return the key and the attempt from the id of a workflow."""
    _, _, attempt, key = workflow_id.split("/", 3)
    return key, int(attempt)


def attempt_of(batch: str, key: str, attempt: int) -> dict[str, Any]:
    return {"the_batch": batch, "the_key": key, "the_attempt": attempt}


def update_batch(batch: str) -> sa.Update:
    return sa.update(batches).where(batches.c.name == batch)


def lock_batch(connection: sa.Connection, batch: str) -> Any:
    """Lock the batch's row, as storing outcomes does, and return it.

    No item can finish until the transaction is over. Others may wait for the lock with all
    connections of this process, so the transaction must not need a second one. The lock writes,
    because SQLite may refuse a later write to a transaction that has only read.
    """
    lock = update_batch(batch).values(name=batch).returning(batches)
    return connection.execute(lock).mappings().one()
