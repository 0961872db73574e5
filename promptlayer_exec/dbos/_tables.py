"""The tables of batches, their items and workers, and the statements for many items at once."""

from __future__ import annotations

from typing import Any

import attrs
import sqlalchemy as sa

from promptlayer_exec.dbos._values import StoredOutcome

COUNTS = ("total", "succeeded", "failed", "unknown")

tables = sa.MetaData()
batches = sa.Table(
    "promptlayer_batch",
    tables,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("next_request", sa.Double, nullable=False),
    # The clock when a slot was last reserved; it may have been put back since.
    sa.Column("reserved_at", sa.Double),
    sa.Column("created", sa.Double),
    # What the batch belongs to; see `_owner`.
    sa.Column("server", sa.Text),
    sa.Column("key_digest", sa.Text),
    # Of the push channel that all workers share, so that one that takes over is woken, too.
    sa.Column("channel_suffix", sa.Text),
    # The settings that all workers share; without a rate, there is no limit beside each session's.
    sa.Column("max_in_flight", sa.Integer),
    sa.Column("rate", sa.Double),
    # How many items there are, and how many of them ended how, so that `status` need not count.
    *(sa.Column(name, sa.BigInteger) for name in COUNTS),
)
items = sa.Table(
    "promptlayer_item",
    tables,
    sa.Column("batch", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("kind", sa.Text),
    sa.Column("seq", sa.BigInteger),
    sa.Column("outcome", sa.Text),
    # What the key stands for; see `_requests`.
    sa.Column("digest", sa.Text),
    # The token of the start whose request may have been sent, or was refused; or null.
    sa.Column("intent", sa.Text),
    # The result of that start as JSON, once the execution id is known.
    sa.Column("started", sa.Text),
    # How long its run took, in seconds.
    sa.Column("seconds", sa.Double),
    sa.Index("promptlayer_item_kind", "batch", "kind"),
    sa.Index("promptlayer_item_seq", "batch", "seq"),
)
workers = sa.Table(
    "promptlayer_worker",
    tables,
    sa.Column("executor", sa.Text, primary_key=True),
    sa.Column("beat", sa.BigInteger, nullable=False),
    sa.Column("process", sa.Text, nullable=False),
    sa.Column("seen_at", sa.Double),
    # Who puts the items of this worker back, if it is dead, and since when.
    sa.Column("rescuer", sa.Text),
    sa.Column("rescued_at", sa.Double),
    sa.Column("batch", sa.Text),
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
# DBOS's table of workflows, which it documents, by the dialect of SQL.
WORKFLOWS = {
    dialect: sa.table(
        "workflow_status",
        *map(
            sa.column,
            (
                *("workflow_uuid", "name", "status", "queue_name", "executor_id", "owner_xid"),
                *("application_version", "started_at_epoch_ms", "updated_at"),
            ),
        ),
        schema=schema,
    )
    for dialect, schema in (("sqlite", None), ("postgresql", "dbos"))
}

# PostgreSQL: all items of a call in one round trip. `dbos.enqueue_workflow` is documented, and
# writes the JSON of `DBOSPortableJSONSerializer`.
ADD = sa.text(
    """
    WITH given AS (
        SELECT * FROM unnest(
            CAST(:keys AS text[]), CAST(:requests AS text[]), CAST(:digests AS text[])
        ) AS t (key, request, digest)
    ), new AS (
        INSERT INTO promptlayer_item (batch, key, attempt, digest)
        SELECT :batch, key, 1, digest FROM given ORDER BY key
        ON CONFLICT DO NOTHING RETURNING key
    )
    SELECT count(dbos.enqueue_workflow(
        workflow_name => :workflow,
        queue_name => :queue,
        positional_args => ARRAY[to_json(given.key), to_json(1), to_json(given.request)],
        workflow_id => :prefix || given.key,
        application_name => :application,
        app_version => :version
    )) FROM given JOIN new USING (key)
    """
)
FINISH = sa.text(
    """
    UPDATE promptlayer_item
    SET kind = t.kind, outcome = t.outcome, seconds = t.seconds, seq = :first + t.position - 1,
        intent = coalesce(promptlayer_item.intent, t.intent)
    FROM unnest(
        CAST(:key AS text[]), CAST(:attempt AS int[]), CAST(:kind AS text[]),
        CAST(:outcome AS text[]), CAST(:seconds AS float[]), CAST(:intent AS text[]),
        CAST(:of_another AS text[])
    ) WITH ORDINALITY AS t (key, attempt, kind, outcome, seconds, intent, of_another, position)
    WHERE promptlayer_item.batch = :batch AND promptlayer_item.key = t.key
        AND promptlayer_item.attempt = t.attempt AND promptlayer_item.kind IS NULL
        AND (
            promptlayer_item.started IS NULL
            OR t.kind <> 'unknown' AND t.intent IS NULL AND t.of_another IS NULL
        )
        AND (t.intent IS NULL OR coalesce(promptlayer_item.intent, t.intent) = t.intent)
        AND (t.of_another IS NULL OR promptlayer_item.intent = t.of_another)
    RETURNING t.key, t.attempt, t.kind
    """
)
FINISH_ONE = sa.text(
    """
    UPDATE promptlayer_item SET kind = :kind, outcome = :outcome, seconds = :seconds, seq = :seq,
        intent = coalesce(intent, :intent)
    WHERE batch = :batch AND key = :key AND attempt = :attempt AND kind IS NULL
        AND (started IS NULL OR :kind <> 'unknown' AND :intent IS NULL AND :of_another IS NULL)
        AND (:intent IS NULL OR coalesce(intent, :intent) = :intent)
        AND (:of_another IS NULL OR intent = :of_another)
    """
)


def lock_batch(connection: sa.Connection, batch: str) -> None:
    """Lock the batch's row, as storing outcomes does: until the end, no item ends.

    Others may wait for it with all connections of this process, so whoever has the lock must not
    need another one.
    """
    connection.execute(sa.update(batches).where(batches.c.name == batch).values(name=batch))


def created_of(batch: str) -> sa.Select[Any]:
    """Return the query for when a batch was created, which tells it from others of its name."""
    return sa.select(batches.c.created).where(batches.c.name == batch)


def delete_items(batch: str, which: sa.ColumnElement[bool], connection: sa.Connection) -> None:
    """Delete some items of a batch; none of them can be started again meanwhile."""
    lock_batch(connection, batch)
    connection.execute(sa.delete(items).where(which))


def delete_if_empty(connection: sa.Connection, batch: str) -> bool:
    """Delete a batch, unless it has items; return whether it is deleted."""
    if connection.dialect.name == "sqlite":
        lock_batch(connection, batch)  # a transaction begins with a write
    lock = sa.select(batches.c.name).where(batches.c.name == batch).with_for_update()
    found = connection.execute(lock).first()
    if connection.execute(sa.select(items.c.key).where(items.c.batch == batch).limit(1)).first():
        return False
    for column in (callbacks.c.batch, workers.c.batch):
        connection.execute(sa.delete(column.table).where(column == batch))
    if found:  # a batch that was added since then stays
        connection.execute(sa.delete(batches).where(batches.c.name == batch))
    return True


@attrs.frozen
class Ending:
    """How an attempt of an item ended: its kind, and the outcome as JSON.

    Attributes:
        intent: the token of the start that started no run, or may have. If another one is recorded
            meanwhile, the item goes on with that.
        of_another: the token of another worker's start, which may have started a run. If it is no
            longer recorded, it was taken back or replaced, and the item goes on.
    """

    key: str
    attempt: int
    kind: str
    outcome: str
    seconds: float | None = None
    intent: str | None = None
    of_another: str | None = None

    @classmethod
    def of(
        cls,
        attempt: int,
        outcome: StoredOutcome,
        intent: str | None = None,
        *,
        of_another: str | None = None,
    ) -> Ending:
        """Return the ending of an attempt with this outcome; `intent` is that of its own start."""
        seconds = None
        if outcome.started is not None:  # the clock may have been put back
            seconds = max((outcome.finished - outcome.started).total_seconds(), 0.0)
        if outcome.execution_id is not None:
            intent = of_another = None
        if intent is not None:  # it replaced the other worker's
            of_another = None
        kind, text = outcome.kind, outcome.to_json()
        return cls(outcome.key, attempt, kind, text, seconds, intent, of_another)
