"""The public API of a batch: add items, work on them, read their outcomes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, closing, suppress
from functools import cached_property, partial
from typing import Any, TypeVar

import anyio
import attrs

from promptlayer_exec import ConfigurationError, Session, StartRequest
from promptlayer_exec import _integration as integration
from promptlayer_exec._database.location import database_url as locate
from promptlayer_exec._database.location import prepare_default, shown
from promptlayer_exec.dbos import _owner as owner
from promptlayer_exec.dbos import _reports as reports
from promptlayer_exec.dbos import _requeue as requeue
from promptlayer_exec.dbos._adding import Addition, check_text
from promptlayer_exec.dbos._liveness import count_workers
from promptlayer_exec.dbos._rate import SharedRate
from promptlayer_exec.dbos._records import BatchStatus, Kind, StoredOutcome
from promptlayer_exec.dbos._reports import BatchSettings, Durations, Failure, StoredItem
from promptlayer_exec.dbos._requeue import Reason
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._worker import Worker

T = TypeVar("T")

logger = logging.getLogger("promptlayer_exec")

# Seconds between two looks for new outcomes, and for settings that another worker has stored.
POLL_INTERVAL = 0.25
SETTINGS_INTERVAL = 2.0


class Batch:
    """Executions that are each started once, even if the processes that start them die.

    Making a batch does no I/O. Any number of processes, on any machines that reach the database,
    can use the same batch, which is found by its name, at the same time.

    Args:
        name: the batch's name, 1 to 200 bytes.
        database_url: `sqlite:///` and the path of a file, or `postgresql://user@host/database`.
            None: that of the environment variable `PROMPTLAYER_EXEC_DB`, else a file of the user's
            own in the platform's directory for the state of programs.
        session: starts and follows the executions: a session that you open and close, or a
            function that makes one, which the batch then opens and closes.
        max_in_flight: how many items all workers together run at most. It is stored with the batch:
            `work` changes it for all workers, also while they run. None: what is stored, else 100.
        rate: how many HTTP attempts per second all workers together make at most; stored likewise.
            None: what is stored, else no limit beside that of each session.
        attempts: how many runs each item may have that complete without an output, each of them
            billed. Before the next one there is a pause, of 5 seconds at first. An unknown start is
            never repeated. It is stored likewise. None: what is stored, else 1.
        same_server: whether a batch that was begun at another server, or with another API key, is
            moved to those of `session`: for a server with a new address, or a key that was replaced
            by one of the same workspace. A batch belongs to its server, and others are refused.

    Raises:
        ConfigurationError: a setting is malformed. Each method raises it, too, if the database
            cannot be used; and `add`, `work`, `outcomes`, `recheck`, `retry` and `check_server` if
            the batch belongs to another server.
    """

    def __init__(
        self,
        name: str,
        *,
        database_url: str | None = None,
        session: Session | Callable[[], Session],
        max_in_flight: int | None = None,
        rate: float | None = None,
        attempts: int | None = None,
        same_server: bool = False,
    ) -> None:
        self._name = check_text("batch name", name, 200, ConfigurationError)
        self._url = locate(database_url)
        self._source = session
        self._same_server = same_server

        self._settings: dict[str, float] = {}  # those that are given
        if max_in_flight is not None:
            self._settings["max_in_flight"] = integration.check_count(
                "max_in_flight", max_in_flight
            )
        if rate is not None:
            self._settings["rate"] = integration.check_seconds("rate", rate, zero=False)
        if attempts is not None:
            self._settings["attempts"] = integration.check_count("attempts", attempts)

        self._store: Store | None = None
        self._is_prepared = False
        # How many calls of `work` there are now, before whose end `outcomes` must not end.
        self._working = 0

    async def add(self, requests: Iterable[StartRequest] | AsyncIterable[StartRequest]) -> int:
        """Add items to the database; one whose key and request are already there is not new.

        Unless the session has `check_inputs=False`, the definitions of their workflows are read
        once for each call, so add many items at a time.

        Args:
            requests: what to start, each with a unique `key`: a str of 1 to 1000 bytes. All of them
                are checked before the first is added, unless they come from an async iterable:
                these are checked and added at most a thousand, or some 2 MiB, at a time.

        Returns:
            How many items were new.

        Raises:
            TypeError: something in a request is of an unusable type.
            ValueError: something in a request cannot be sent, or its key cannot be stored.
            InvalidInputs: inputs that a workflow requires are missing.
            KeyConflict: a key stands for another request: another workflow, or other inputs, label,
                version or metadata.
        """
        async with self._open() as store:
            adding = Addition(store, self._name, self._session, self._checking_session)

            # Those that come later cannot be checked before the first is added.
            if isinstance(requests, AsyncIterable):
                await self._claim(store)
                return await adding.add_as_they_come(requests)

            return await adding.add_all(requests, before=partial(self._claim, store))

    async def work(self, *, until_done: bool = True) -> BatchStatus:
        """Start items, follow them, and store their outcomes, together with all other workers.

        If cancelled, it waits for the starts that are being sent; the next worker continues with
        all other items. No item fails because of an error that this raises: work again later.

        Args:
            until_done: whether to return once every item has an outcome. Otherwise it waits for
                more items until it is cancelled.

        Returns:
            How many items are in which state.

        Raises:
            Unauthorized: the server refused the key.
            ConnectionFailed: the server could not be reached.
            RequestTimeout: the server did not answer in time.
            RateLimited: the server answered nothing but 429, and named no time to wait.
            SessionClosed: the session was closed.
            ConfigurationError: a setting is missing, or this process uses DBOS for something else.
            RuntimeError: this process already works on a batch.
        """
        # Before the first await: `outcomes` must not end before items are put into the queue.
        self._working += until_done
        try:
            async with self._open() as store:
                await self._claim(store)
                await self._requeue(store, Reason.CALLBACK, kinds=["unknown"])

                # While a worker ends, a callback may make one more item unfinished.
                while not until_done or not await self._is_finished(store):
                    await self._work(store, until_done=until_done)
                return await store.run_in_thread(store.status, self._name)
        finally:
            self._working -= until_done

    async def _work(self, store: Store, *, until_done: bool) -> None:
        replaced = await store.run_in_thread(store.store_settings, self._name, self._settings)
        for name, before in replaced.items():
            logger.warning(
                "batch %r: %s is now %g for all its workers; it was %g",
                *(self._name, name, self._settings[name], before),
            )

        settings = await store.run_in_thread(reports.settings, store, self._name)
        limiter = SharedRate(store, self._name, settings.rate)
        worker = Worker(
            store,
            self._name,
            self._session,
            owns_session=self._session is not self._source,
            max_in_flight=settings.max_in_flight or 100,
        )

        following = asyncio.create_task(self._follow_rate(store, limiter))
        try:
            with integration.limited(self._session, limiter):
                await worker.run(until_done=until_done)
        finally:
            following.cancel()
            await asyncio.wait([following])

    async def _follow_rate(self, store: Store, limiter: SharedRate) -> None:
        """Let the limiter have the rate that another worker stores meanwhile."""
        while True:
            await asyncio.sleep(SETTINGS_INTERVAL)
            with suppress(ConfigurationError):  # the worker itself notices that, and says so
                settings = await store.run_in_thread(reports.settings, store, self._name)
                limiter.rate = settings.rate

    async def outcomes(self, *, until_done: bool = True) -> AsyncGenerator[StoredOutcome, None]:
        """Yield the outcome of each item: first those that are stored, then each new one.

        The iteration ends when every item has an outcome, and no `work` of this object is waiting
        for that. An item that is run again is yielded again. To end the iteration early,
        use `contextlib.aclosing`.

        Args:
            until_done: whether to wait for new outcomes, or to end with the last stored one.
        """
        last = 0
        async with self._open() as store:
            await self._check_owner(store)

            is_last = False
            while not is_last:
                # Asked before the last look: what is stored in between is yielded.
                is_last = not until_done or (not self._working and await self._is_finished(store))
                while rows := await store.run_in_thread(store.outcomes, self._name, last):
                    for row in rows:
                        yield StoredOutcome.from_json(row.outcome)
                    last = rows[-1].seq
                if not is_last:
                    await asyncio.sleep(POLL_INTERVAL)

    async def recheck(self) -> int:
        """Put every failed item with an execution id back into the queue, to be followed.

        Nothing is started. The next `work`, or one that runs now, asks the server again how these
        executions ended. An item whose execution failed fails again.

        Returns:
            How many items there are.
        """
        async with self._open() as store:
            await self._check_owner(store)
            return await self._requeue(store, Reason.RECHECK, kinds=["failed"])

    async def retry(
        self,
        *,
        failed: bool = False,
        unknown: bool = False,
        keys: Iterable[str] | None = None,
        unknown_for: float = 0.0,
    ) -> int:
        """Put items that ended back into the queue, to be started again and billed again.

        An item whose run is not known to have failed is followed once more, and not started: the
        server may have said 404 for a run that exists. To start such an item again, add it under
        another key. A restarted item gets a new outcome in addition.

        Args:
            failed: whether to start the items again whose runs failed, or did not start.
            unknown: whether to start the unknown items again, each of which may already run.
            keys: only these items; None means all. Those that the batch does not have are ignored.
            unknown_for: how many seconds ago an unknown item must have become unknown; give its
                callback time to come.

        Returns:
            How many items there are.

        Raises:
            TypeError: `keys` is a str or has anything but str.
            ValueError: `unknown_for` is negative.
        """
        integration.check_seconds("unknown_for", unknown_for)
        chosen = None if keys is None else _check_keys(keys)
        kinds = [kind for kind, is_meant in (("failed", failed), ("unknown", unknown)) if is_meant]

        async with self._open() as store:
            await self._check_owner(store)
            await self._requeue(store, Reason.CALLBACK, kinds=["unknown"])
            return await self._requeue(
                store, Reason.RETRY, kinds=kinds, keys=chosen, unknown_for=unknown_for
            )

    async def _requeue(self, store: Store, reason: Reason, **which: Any) -> int:
        act = partial(requeue.requeue, store, self._name, reason, **which)
        return await store.run_in_thread(act)

    async def check_server(self) -> None:
        """Check that the batch, if it exists, belongs to the server and the key of the session.

        The other methods that need them do so, too, before they change anything.

        Raises:
            ConfigurationError: it does not.
        """
        async with self._open() as store:
            await self._check_owner(store)

    async def status(self) -> BatchStatus:
        """Return how many items are in which state, and how many workers are alive."""
        async with self._open() as store:
            found = await store.run_in_thread(store.status, self._name)
            workers = await store.run_in_thread(count_workers, store, self._name)
            return attrs.evolve(found, workers=workers)

    async def settings(self) -> BatchSettings:
        """Return the settings that all workers share."""
        return await self._report(reports.settings)

    async def kinds(self, keys: Iterable[str]) -> dict[str, Kind | None]:
        """Return how the items of these keys ended, None for one that has not.

        Keys that the batch does not have are left out.
        """
        return await self._report(reports.kinds, keys)

    async def latest_kinds(self, count: int) -> list[tuple[int, Kind]]:
        """Return how the last items ended, each with a growing number, the newest first."""
        return await self._report(reports.latest_kinds, count)

    async def latest_outcome(self) -> StoredOutcome | None:
        """Return the outcome that was stored last; None if no item has ended."""
        return await self._report(reports.latest_outcome)

    async def item(self, key: str) -> StoredItem | None:
        """Return what is stored about an item; None if the batch does not have it."""
        return await self._report(reports.item, key)

    async def failures(self) -> tuple[Failure, ...]:
        """Return the types of errors that items ended with, the most frequent first."""
        return await self._report(reports.failures)

    async def durations(self) -> Durations | None:
        """Return how long the runs took; None if none has ended."""
        return await self._report(reports.durations)

    async def delete(self) -> int:
        """Delete the batch with all its items and their outcomes, and return how many there were.

        What was started runs on. If this is interrupted, some items may be left: call it again.

        Raises:
            RuntimeError: a worker works on the batch; for 12 seconds, one on another machine may
                only seem to.
        """
        async with self._open() as store:
            if await store.run_in_thread(count_workers, store, self._name):
                raise RuntimeError(
                    f"a worker works on batch {self._name!r}: stop it first; nothing was deleted"
                )
            return await store.run_in_thread(store.delete, self._name)

    async def _report(self, report: Callable[..., T], *arguments: Any) -> T:
        async with self._open() as store:
            return await store.run_in_thread(report, store, self._name, *arguments)

    async def resolve(self, token: str, execution_id: int) -> bool:
        """Let an unknown item be followed, because the callback of its start has come.

        The workers need a session with `callbacks`, whose router gets this as `on_callback`. Any
        process may receive a callback, of any start, at any time and several times: it is stored,
        also before its item is unknown. The next worker follows the execution; nothing is started.

        Args:
            token: the token in the callback's URL; it must be genuine.
            execution_id: the id in the callback.

        Returns:
            True if an unknown item is followed now.

        Raises:
            TypeError: `token` is not a str, or `execution_id` not an int.
            ValueError: `execution_id` is out of range.
        """
        if not isinstance(token, str):
            raise TypeError(f"token must be a str, got {token!r:.100}")
        execution_id = integration.check_execution_id(execution_id)

        async with self._open() as store:
            return await store.run_in_thread(
                requeue.record_callback, store, self._name, token, execution_id
            )

    def __repr__(self) -> str:
        return f"<Batch {self._name!r} in {shown(self._url)}>"

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Store]:
        """Yield the database, one for all that is done with the batch at the same time."""
        if self._store is None or self._store.ended.is_set():
            self._store = Store(self._url)

        store = self._store
        store.users += 1
        try:
            # Only once: `prepare` does not retry, and all else does.
            if not self._is_prepared:
                prepare_default(self._url)
                await store.run_in_thread(store.prepare)
                self._is_prepared = True
            yield store
        finally:
            store.users -= 1
            if not store.users:
                if self._store is store:
                    self._store = None
                # Not in the event loop: SQLite writes its log back into the file.
                await store.run_in_thread(store.close)

    async def _is_finished(self, store: Store) -> bool:
        return await store.run_in_thread(store.is_finished, self._name)

    async def _claim(self, store: Store) -> None:
        claim = partial(owner.claim, moves=self._same_server)
        await store.run_in_thread(claim, store, self._name, self._owner, self._settings)

    async def _check_owner(self, store: Store) -> None:
        if not self._same_server:
            await store.run_in_thread(owner.check, store, self._name, self._owner)

    @property
    def _owner(self) -> owner.Owner:
        return owner.Owner(*integration.server_of(self._session))

    @cached_property
    def _session(self) -> Session:
        return self._source if isinstance(self._source, Session) else self._source()

    @asynccontextmanager
    async def _checking_session(self) -> AsyncIterator[Session]:
        """Yield an open session: the batch's own if it is open, else another one."""
        if isinstance(self._source, Session) or integration.is_open(self._session):
            yield self._session
        else:
            async with self._source() as session:
                yield session


async def batch_names(database_url: str | None = None) -> list[str]:
    """Return the names of all batches in a database; a SQLite file is not made for that.

    Args:
        database_url: as for `Batch`.

    Raises:
        ConfigurationError: the database cannot be used.
    """
    url = locate(database_url)
    if url.get_backend_name() == "sqlite":
        with suppress(OSError):  # opening the file says why
            if not await anyio.Path(str(url.database)).exists():
                return []

    prepare_default(url)
    with closing(Store(url)) as store:
        await store.run_in_thread(store.prepare)
        return await store.run_in_thread(store.batches)


def _check_keys(keys: Iterable[str]) -> list[str]:
    chosen = [keys] if isinstance(keys, str) else [*keys]
    if isinstance(keys, str) or not all(isinstance(key, str) for key in chosen):
        raise TypeError(f"keys must be several str, got {keys!r:.100}")
    return chosen
