"""One run per key (extra `starts`): the start store, in SQLite or PostgreSQL."""

from __future__ import annotations

import asyncio
import copy
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, Self

import attrs

from promptlayer_exec._integration import (
    StartClaim,
    StartStore,
    StoredStart,
    check_execution_id,
    check_key,
    check_seconds,
    install_hint,
    warn_of_run,
    workflow_of,
)

try:
    import sqlalchemy as sa

    from promptlayer_exec._database.database import LIMITS, Database
    from promptlayer_exec._database.location import database_url as locate
    from promptlayer_exec._database.location import prepare_default, shown, shown_database_url
    from promptlayer_exec._database.threads import Group, OneThread, finished
except ModuleNotFoundError as error:
    error.add_note(f"this needs {install_hint('starts')}")
    raise

from promptlayer_exec import ConfigurationError, StoreUnavailable

__all__ = ["SQLStartStore", "StartClaim", "StartStore", "StoredStart", "shown_database_url"]

_tables = sa.MetaData()
_starts = sa.Table(
    "promptlayer_exec_starts",
    _tables,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("execution_id", sa.BigInteger),
    sa.Column("server", sa.Text, nullable=False),
    # The fingerprint of the request.
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("token", sa.Text, nullable=False, unique=True),
    # The token of the previous attempt, whose callback may still arrive.
    sa.Column("earlier_token", sa.Text, index=True),
    sa.Column("attempts", sa.Integer, nullable=False),
    # In seconds since the epoch, on the database's clock.
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("updated", sa.Double, nullable=False),
    # Until when the request may be in flight. From then on it counts as unknown, even if its sender
    # was killed before it could record that. It is 0 if an earlier attempt was unknown for long
    # enough.
    sa.Column("until", sa.Double, nullable=False),
)
_row = _starts.c
# Few of millions of records are not settled, so that those are found at once.
sa.Index(
    "promptlayer_exec_starts_unsettled",
    _row.key,
    postgresql_where=_row.state != "started",
    sqlite_where=_row.state != "started",
)
_has_token = sa.or_(
    _row.token == sa.bindparam("the_token"), _row.earlier_token == sa.bindparam("the_token")
)


class _Recorded(NamedTuple):
    key: str
    token: str
    execution_id: int | None


class _Resolved(NamedTuple):
    token: str
    execution_id: int


class _Adopted(NamedTuple):
    key: str
    execution_id: int


class _RecordPage(NamedTuple):
    """A page of the records, by key."""

    after: str
    older_than: float
    only_unknown: bool


class _Forgotten(NamedTuple):
    key: str
    only_unknown: bool


class _Released(NamedTuple):
    key: str
    token: str


# Whether a key now has a run, or why it cannot.
_Done = bool | ValueError

# How many records one query returns.
_PAGE_SIZE = 200


@attrs.define(eq=False)
class _StoreCall:
    """One call of a store: its argument, and how long its caller waits."""

    argument: Any
    give_up: float
    is_abandoned: bool = False

    def is_wanted(self) -> bool:
        return not self.is_abandoned and time.monotonic() < self.give_up


class _RecordTable:
    """The statements. Each takes the arguments of many calls, and returns a result for each.

    Args:
        database: the database of the table.
        restart_after: seconds after which another call may claim an unknown start. None: never.
    """

    def __init__(self, database: Database, restart_after: float | None) -> None:
        self._restart_after = restart_after
        self._now = now = database.now
        self._is_sqlite = database.is_sqlite
        insert = database.insert(_starts).values(
            key=sa.bindparam("the_key"),
            state="sending",
            server=sa.bindparam("the_server"),
            request=sa.bindparam("the_request"),
            token=sa.bindparam("the_token"),
            attempts=1,
            created=now,
            updated=now,
            # A little longer than its sender waits, which must also record the response.
            until=now + sa.bindparam("the_timeout", type_=sa.Double) + 3.0,
        )
        new = insert.excluded
        self._claim = insert.on_conflict_do_update(
            index_elements=["key"],
            set_={
                "state": "sending",
                "token": new.token,
                "earlier_token": _row.token,
                "attempts": _row.attempts + 1,
                "updated": now,
                "until": new.until,
            },
            # If it is false, PostgreSQL still locks the row, so that we can read it.
            where=sa.false()
            if restart_after is None
            else sa.and_(
                _row.state != "started",
                _row.until + restart_after <= now,
                _row.server == new.server,
                _row.request == new.request,
            ),
        ).execution_options(preserve_rowcount=True)

        unsettled = sa.update(_starts).where(_row.state != "started")
        started = unsettled.where(_has_token).values(
            state="started", execution_id=sa.bindparam("the_id"), updated=now
        )
        of_key = _row.key == sa.bindparam("the_key")
        of_token = _row.token == sa.bindparam("the_token")
        self._resolve = started
        self._adopt = (
            sa.update(_starts)
            .where(of_key, self._is_unknown)
            .values(state="started", execution_id=sa.bindparam("the_id"), updated=now)
        )
        self._record = started.where(of_key)
        self._record_unknown = (
            sa.update(_starts)
            .where(of_key, of_token, _row.state == "sending")
            .values(state="unknown", updated=now, until=now)
        )
        has_earlier = _row.earlier_token.is_not(None)
        self._take_back = unsettled.where(of_key, of_token, has_earlier).values(
            state="unknown",
            token=_row.earlier_token,
            earlier_token=None,
            attempts=_row.attempts - 1,
            updated=now,
            until=0.0,
        )
        self._remove = sa.delete(_starts).where(
            of_key, of_token, _row.attempts == 1, _row.state != "started"
        )

    def find(self, connection: sa.Connection, keys: Sequence[str]) -> list[StoredStart | None]:
        rows = self._rows(connection, _row.key.in_(keys))
        found = {row.key: self._stored(row) for row in rows}
        return [found.get(key) for key in keys]

    def claim(
        self, connection: sa.Connection, claims: Sequence[StartClaim]
    ) -> list[StoredStart | None]:
        parameters = [
            {
                "the_key": claim.key,
                "the_server": claim.server,
                "the_request": claim.request,
                "the_token": claim.token,
                "the_timeout": claim.request_timeout,
            }
            for claim in claims
        ]
        # In the same order in all processes, or else two transactions could deadlock.
        parameters.sort(key=lambda row: str(row["the_key"]))
        written = connection.execute(self._claim, parameters)
        if written.rowcount == len(claims):  # the usual case: each is a new row
            return [None] * len(claims)

        found = self.find(connection, [claim.key for claim in claims])
        return [
            None if start is None or start.token == claim.token else start
            for start, claim in zip(found, claims, strict=True)
        ]

    def record(self, connection: sa.Connection, records: Sequence[_Recorded]) -> list[bool]:
        known = [
            {"the_key": key, "the_token": token, "the_id": execution_id}
            for key, token, execution_id in sorted(records, key=lambda record: record.key)
            if execution_id is not None
        ]
        unknown = [
            {"the_key": key, "the_token": token}
            for key, token, execution_id in sorted(records, key=lambda record: record.key)
            if execution_id is None
        ]
        changed = 0
        if known:
            changed += connection.execute(self._record, known).rowcount
        if unknown:
            changed += connection.execute(self._record_unknown, unknown).rowcount
        if changed == len(records):  # the usual case
            return [True] * len(records)

        keys = [record.key for record in records]
        rows = {row.key: row for row in self._rows(connection, _row.key.in_(keys))}
        return [_is_recorded(rows.get(record.key), record) for record in records]

    def release(self, connection: sa.Connection, released: Sequence[_Released]) -> list[None]:
        parameters = [{"the_key": key, "the_token": token} for key, token in sorted(released)]
        connection.execute(self._remove, parameters)
        connection.execute(self._take_back, parameters)
        return [None] * len(released)

    def resolve(self, connection: sa.Connection, resolved: Sequence[_Resolved]) -> list[bool]:
        parameters = [{"the_token": token, "the_id": number} for token, number in sorted(resolved)]
        connection.execute(self._resolve, parameters)

        tokens = [token for token, _ in resolved]
        which = sa.or_(_row.token.in_(tokens), _row.earlier_token.in_(tokens))
        rows = self._rows(connection, which)
        found = {token: row for row in rows for token in (row.token, row.earlier_token)}
        for token, execution_id in resolved:
            row = found.get(token)
            if row is not None and row.execution_id not in (None, execution_id):
                warn_of_run(
                    "execution %d also started for the key %.100r, which belongs to execution"
                    " %d. session.execution(%d) picks it up",
                    execution_id,
                    row.key,
                    row.execution_id,
                    execution_id,
                )
        return [
            token in found and found[token].execution_id == execution_id
            for token, execution_id in resolved
        ]

    def adopt(self, connection: sa.Connection, adopted: Sequence[_Adopted]) -> list[_Done]:
        """Record runs that people found. The result is an error if a run is another key's."""
        if not self._is_sqlite:  # there, writing transactions take turns anyway
            lock = sa.func.pg_advisory_xact_lock(0x61646F7074)
            connection.execute(sa.select(lock))

        return [self._adopt_one(connection, *pair) for pair in adopted]

    def _adopt_one(self, connection: sa.Connection, key: str, execution_id: int) -> _Done:
        owner = sa.select(_row.key).where(
            _row.execution_id == execution_id,
            _row.key != key,
            _row.server == sa.select(_row.server).where(_row.key == key).scalar_subquery(),
        )
        if (other := connection.execute(owner.limit(1)).scalar()) is not None:
            return ValueError(f"execution {execution_id} belongs to the key {other!r:.500}")

        connection.execute(self._adopt, {"the_key": key, "the_id": execution_id})
        found = self._rows(connection, _row.key == key)
        return bool(found) and found[0].execution_id == execution_id

    def page(
        self, connection: sa.Connection, pages: Sequence[_RecordPage]
    ) -> list[list[StoredStart]]:
        """Return the next records after a key."""
        found = []
        for after, older_than, only_unknown in pages:
            which = [_row.key > after, _row.updated <= self._now - older_than]
            if only_unknown:
                # The first condition lets the database use the index.
                is_unsettled = _row.state != sa.literal_column("'started'")
                which += [is_unsettled, self._is_unknown]
            query = sa.select(_starts, self._now.label("now")).where(*which)
            query = query.order_by(_row.key).limit(_PAGE_SIZE)
            found.append([self._stored(row) for row in connection.execute(query)])
        return found

    def forget(self, connection: sa.Connection, forgotten: Sequence[_Forgotten]) -> list[bool]:
        done = []
        for key, only_unknown in forgotten:
            deletion = sa.delete(_starts).where(_row.key == key)
            if only_unknown:
                deletion = deletion.where(self._is_unknown)
            done.append(connection.execute(deletion).rowcount > 0)
        return done

    def prune(self, connection: sa.Connection, older_than: Sequence[float]) -> list[int]:
        is_in_flight = sa.and_(_row.state == "sending", _row.until > self._now)
        deleted = []
        for seconds in older_than:
            old = sa.delete(_starts).where(_row.updated <= self._now - seconds, ~is_in_flight)
            deleted.append(connection.execute(old).rowcount)
        return deleted

    @property
    def _is_unknown(self) -> sa.ColumnElement[bool]:
        is_lost = sa.and_(_row.state == "sending", _row.until <= self._now)
        return sa.or_(_row.state == "unknown", is_lost)

    def _rows(self, connection: sa.Connection, which: sa.ColumnElement[bool]) -> Sequence[Any]:
        query = sa.select(_starts, self._now.label("now")).where(which)
        return connection.execute(query).all()

    def _stored(self, row: Any) -> StoredStart:
        state, reason = row.state, None
        if state == "unknown":
            reason = "there was no usable response to its start request"
        elif state == "sending" and row.until <= row.now:
            state = "unknown"
            reason = "the process that sent its start request recorded no response"

        after = self._restart_after
        is_over = after is not None and row.until + after <= row.now
        return StoredStart(
            key=row.key,
            state=state,
            execution_id=row.execution_id,
            workflow=workflow_of(row.request),
            attempts=row.attempts,
            created=datetime.fromtimestamp(row.created, UTC),
            updated=datetime.fromtimestamp(row.updated, UTC),
            server=row.server,
            request=row.request,
            token=row.token,
            earlier_token=row.earlier_token,
            age=max(0.0, row.now - row.updated),
            replaceable=state == "unknown" and is_over,
            reason=reason,
        )


def _is_recorded(row: Any, record: _Recorded) -> bool:
    """Return True if a row has the values of a record."""
    if row is None:
        return False
    if record.execution_id is None:
        return bool(row.token == record.token and row.state != "started")
    has_token = record.token in (row.token, row.earlier_token)
    return has_token and bool(row.execution_id == record.execution_id)


class _OpenStore:
    """The connections and the threads of a store in one process.

    Args:
        url: the URL of the database.
        restart_after: as for `SQLStartStore`.
        patience: as for `SQLStartStore`.
    """

    def __init__(self, url: sa.URL, restart_after: float | None, patience: float) -> None:
        # Calls are retried until their patience runs out, so a single try must be short.
        limits = attrs.evolve(LIMITS, locked=1.0, locked_file=1.0, connections=3, threads=1)
        self._url = url
        self._patience = patience
        self.database = Database(url, limits)
        self._is_prepared = False
        self._running: set[Future[Any]] = set()

        table = _RecordTable(self.database, restart_after)
        works = [
            (table.find, table.page, table.forget, table.prune),
            (table.claim, table.release),
            (table.record, table.resolve, table.adopt),
        ]
        # Over a network, starts need not wait for each other's round trips. Connections to one file
        # would only block each other.
        thread = OneThread()
        self._groups: dict[str, Group[_StoreCall, Any]] = {}
        for works_of_thread in works:
            if not self.database.is_sqlite:
                thread = OneThread()
            for work in works_of_thread:
                self._groups[work.__name__] = Group(partial(self._write, work), thread=thread)

    def submit(self, what: str, call: _StoreCall) -> Future[Any]:
        future = self._groups[what].submit(call)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def release_after(self, claiming: Future[Any], call: _StoreCall) -> None:
        """Release a claim as soon as it has finished."""
        ended: Future[None] = Future()
        self._running.add(ended)
        ended.add_done_callback(self._running.discard)

        def begin(_: Future[Any]) -> None:
            future = self._groups["release"].submit(call)
            future.add_done_callback(lambda _: ended.set_result(None))

        claiming.add_done_callback(begin)

    def _write(
        self,
        work: Callable[[sa.Connection, list[Any]], Sequence[Any]],
        calls: list[_StoreCall],
    ) -> Sequence[Any]:
        arguments = [call.argument for call in calls]

        def write() -> Sequence[Any]:
            self._prepare()
            with self.database.engine.begin() as connection:
                return work(connection, arguments)

        return self.database.retry_while(lambda: any(call.is_wanted() for call in calls), write)

    def _prepare(self) -> None:
        if not self._is_prepared:
            prepare_default(self._url)
            with self.database.creating() as connection:
                _tables.create_all(connection)
            self._is_prepared = True

    async def aclose(self) -> None:
        """Wait for the calls in progress, and close the connections."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                await self._all_finished()

        # A server that stands still may keep a call for longer. Do not try that call again.
        self.database.ended.set()
        try:
            await self.database.run_in_thread(self.database.close)
        except RuntimeError:  # the interpreter exits: no thread can start, and nobody is waiting
            self.database.close()

    async def _all_finished(self) -> None:
        while self._running:
            with suppress(Exception):  # its caller gets the error, or has given up
                await finished(next(iter(self._running)))


class SQLStartStore:
    """Records in a database which run each key started, so that each key starts only one run.

    Pass it to the sessions of all processes that may use the same keys::

        async with (
            SQLStartStore("postgresql://app@db/app") as store,
            Session(starts=store) as session,
        ):
            execution = await session.start("write-report", {"topic": "otters"}, key="order-42")

    Creating it does no I/O. Its first call creates the table `promptlayer_exec_starts`. Any number
    of sessions, event loops and processes may use it, even after a fork.

    Args:
        database_url: `sqlite:///` and the path of a file, or `postgresql://user@host/database`.
            By default the database that batches use: the one in `$PROMPTLAYER_EXEC_DB`, or else a
            SQLite file in your user's state directory.
        restart_unknown_after: seconds after which the next call with the same key resends a request
            whose response was lost. **The first request may have started a run as well**, and you
            pay for both. None: only a callback, `adopt` or `forget` settles the key.
        patience: seconds for which each call waits for the database.

    Raises:
        ConfigurationError: an argument is malformed. Each method also raises it if you may not use
            the database, and `StoreUnavailable` if it is unavailable for `patience` seconds.
    """

    def __init__(
        self,
        database_url: str | None = None,
        *,
        restart_unknown_after: float | None = None,
        patience: float = 5.0,
    ) -> None:
        self._url = locate(database_url)
        self._patience = check_seconds("patience", patience, zero=False)
        if restart_unknown_after is not None:
            restart_unknown_after = check_seconds("restart_unknown_after", restart_unknown_after)
        self._restart_after = restart_unknown_after
        # By process id. A forked process must neither use nor close its parent's connections, so
        # they stay here.
        self._open: dict[int, _OpenStore] = {}

    async def find(self, key: str, *, patience: float | None = None) -> StoredStart | None:
        """Return the record of a key, or None if it has none.

        Each method that takes `patience` uses the store's own if you pass none.
        """
        found: StoredStart | None = await self._call("find", check_key(key), patience)
        return found

    async def claim(
        self, claim: StartClaim, *, patience: float | None = None
    ) -> StoredStart | None:
        """Record that the session is about to send a request. See `StartStore.claim`.

        If you cancel the call or it fails, it releases the claim soon after.
        """
        found: StoredStart | None = await self._call("claim", claim, patience)
        return found

    async def record(
        self, key: str, token: str, execution_id: int | None, *, patience: float | None = None
    ) -> bool:
        """Record the id of the run that a request started. See `StartStore.record`."""
        done: bool = await self._call("record", _Recorded(key, token, execution_id), patience)
        return done

    async def release(self, key: str, token: str, *, patience: float | None = None) -> None:
        """Forget a claim whose request started nothing. See `StartStore.release`."""
        await self._call("release", _Released(key, token), patience)

    async def resolve(
        self, token: str, execution_id: int, *, patience: float | None = None
    ) -> bool:
        """Record the id of the run in a callback. See `StartStore.resolve`."""
        resolved = _Resolved(token, check_execution_id(execution_id))
        done: bool = await self._call("resolve", resolved, patience)
        return done

    async def adopt(self, key: str, execution_id: int) -> bool:
        """Record the run that you found for an unknown key.

        From then on, each call with the key returns the handle of this run. A late response or
        callback with another id changes nothing, and logs that id.

        Args:
            key: the key.
            execution_id: the id of the run on PromptLayer, which shows it with the metadata
                `promptlayer_exec.key`. The store does not ask PromptLayer about it.

        Returns:
            Whether the key now has this run. False if it has another one, if its request is still
            in flight, or if it has no record.

        Raises:
            ValueError: the run belongs to another key in this store.
        """
        adopted = _Adopted(check_key(key), check_execution_id(execution_id))
        done: _Done = await self._call("adopt", adopted)
        if isinstance(done, ValueError):
            raise done
        return done

    def unknown(self, *, older_than: float = 0.0) -> AsyncGenerator[StoredStart, None]:
        """Yield the records of keys that may have started a run that nobody knows, sorted by key.

        Look for each run on PromptLayer, and then `adopt` it, or `forget` the key.

        Args:
            older_than: the least age of a record, in seconds since it last changed.
        """
        return self._pages(check_seconds("older_than", older_than), only_unknown=True)

    def records(self, *, older_than: float = 0.0) -> AsyncGenerator[StoredStart, None]:
        """Yield the records of all keys, sorted by key.

        Args:
            older_than: the least age of a record, in seconds since it last changed.
        """
        return self._pages(check_seconds("older_than", older_than), only_unknown=False)

    async def _pages(
        self, older_than: float, *, only_unknown: bool
    ) -> AsyncGenerator[StoredStart, None]:
        after = ""
        while True:
            page = _RecordPage(after, older_than, only_unknown)
            found: list[StoredStart] = await self._call("page", page)
            for record in found:
                yield record
            if len(found) < _PAGE_SIZE:
                return
            after = found[-1].key

    async def forget(self, key: str, *, only_unknown: bool = False) -> bool:
        """Delete the record of a key, so that its next request starts a new run.

        If the key is unknown, its first run may exist all the same, and you pay for both.

        Args:
            key: the key.
            only_unknown: whether to keep a record whose run has become known meanwhile.

        Returns:
            Whether it deleted a record.
        """
        done: bool = await self._call("forget", _Forgotten(check_key(key), only_unknown))
        return done

    async def prune(self, *, older_than: float) -> int:
        """Delete old records, except for requests in flight.

        Args:
            older_than: the least age of a record, in seconds since it last changed.

        Returns:
            The number of deleted records.
        """
        seconds = check_seconds("older_than", older_than)
        pruned: int = await self._call("prune", seconds)
        return pruned

    async def aclose(self) -> None:
        """Wait for the calls in progress, and disconnect. A later call connects again."""
        opened = self._open.pop(os.getpid(), None)
        if opened is not None:
            await opened.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<SQLStartStore in {shown(self._url)}>"

    async def _call(self, what: str, argument: Any, patience: float | None = None) -> Any:
        patience = self._patience if patience is None else patience
        opened = self._open.get(os.getpid())
        if opened is None:
            # Another thread may have made one meanwhile.
            new = _OpenStore(self._url, self._restart_after, self._patience)
            opened = self._open.setdefault(os.getpid(), new)

        call = _StoreCall(argument, time.monotonic() + patience)
        future = opened.submit(what, call)
        try:
            async with asyncio.timeout(patience):
                return await finished(future)
        except BaseException as error:
            call.is_abandoned = True
            self._give_up(opened, what, argument, future)
            if isinstance(error, TimeoutError):
                raise opened.database.late(patience) from error
            if isinstance(error, ConfigurationError | StoreUnavailable):
                raise copy.copy(error) from error  # other callers get the same one
            raise

    def _give_up(self, opened: _OpenStore, what: str, argument: Any, future: Future[Any]) -> None:
        """Undo a claim whose caller has given up, unless cancelling it is still possible."""
        if not future.cancel() and what == "claim":
            released = _Released(argument.key, argument.token)
            opened.release_after(future, _StoreCall(released, time.monotonic() + 10.0))
