"""The server and the API key of a batch: elsewhere, its ids are those of other runs."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping

import attrs
import sqlalchemy as sa

from promptlayer_exec import ConfigurationError
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import batches, items, lock_batch, update_batch, workers


@attrs.frozen
class Owner:
    """A server's URL, and the API key of a session, None if it has none."""

    base_url: str
    api_key: str | None = attrs.field(repr=False)


def claim(
    store: Store, batch: str, owner: Owner, settings: Mapping[str, float], *, moves: bool
) -> None:
    """Let a batch belong to `owner`, away from another owner only with `moves`.

    A new batch gets these settings. A batch without a started item belongs to nobody, because the
    first key may have a typo.

    Raises:
        ConfigurationError: the batch has runs of another server, or of another key.
    """
    store.create(batch, settings)

    def work(connection: sa.Connection) -> None:
        stored = lock_batch(connection, batch)
        if not moves and connection.scalar(sa.select(_begun(batch))):
            _check(batch, owner, stored["server"], stored["key_digest"])
        changes = {"server": owner.base_url}
        if owner.api_key is not None and not _matches(owner.api_key, stored["key_digest"]):
            changes["key_digest"] = _digest(owner.api_key, secrets.token_hex(8))
        connection.execute(update_batch(batch).values(**changes))

    store.transact(work)


def check(store: Store, batch: str, owner: Owner) -> None:
    """Raise `ConfigurationError` if a batch belongs to another server or key."""
    query = sa.select(batches.c.server, batches.c.key_digest).where(batches.c.name == batch)
    for stored in store.rows(query.where(_begun(batch))):
        _check(batch, owner, *stored)


def _begun(batch: str) -> sa.ColumnElement[bool]:
    """Return whether a worker may have sent a request of a batch, or is about to send one."""
    item = items.c
    was_sent = sa.or_(item.kind.is_not(None), item.intent.is_not(None), item.started.is_not(None))
    return sa.or_(
        sa.exists().where(item.batch == batch, was_sent),
        sa.exists().where(workers.c.batch == batch),
    )


def _check(batch: str, owner: Owner, server: str | None, key_digest: str | None) -> None:
    if server is not None and server != owner.base_url:
        raise ConfigurationError(
            f"batch {batch!r} started on {server}. On {owner.base_url}, its ids would belong to"
            " other runs",
            advice=f"Continue on {server}, or choose another name for a new batch. If this is the"
            " same server under a new address, pass same_server=True.",
            setting="same_server",
        )
    if key_digest is not None and owner.api_key and not _matches(owner.api_key, key_digest):
        raise ConfigurationError(
            f"batch {batch!r} started on {server} with another API key, so its runs may belong"
            " to another workspace",
            advice="Use that key, or choose another name for a new batch. If both keys belong to"
            " the same workspace, pass same_server=True.",
            setting="same_server",
        )


def _matches(api_key: str, key_digest: str | None) -> bool:
    salt = (key_digest or "").partition(":")[0]
    return hmac.compare_digest(_digest(api_key, salt), key_digest or "")


def _digest(api_key: str, salt: str) -> str:
    return f"{salt}:{hashlib.sha256(f'{salt}{api_key}'.encode()).hexdigest()}"
