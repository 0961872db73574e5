"""The public API of a batch: add items, work on them, and read their outcomes."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, closing, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

import anyio
import attrs

from promptlayer_exec import (
    ConfigurationError,
    InvalidOutput,
    Session,
    StartRequest,
    StoreUnavailable,
)
from promptlayer_exec import _integration as integration
from promptlayer_exec._database.location import database_url as locate
from promptlayer_exec._database.location import prepare_default, shown
from promptlayer_exec.dbos import _owner as owner
from promptlayer_exec.dbos import _reports as reports
from promptlayer_exec.dbos import _requeue as requeue
from promptlayer_exec.dbos._adding import Addition, check_text
from promptlayer_exec.dbos._following import Following
from promptlayer_exec.dbos._liveness import count_workers
from promptlayer_exec.dbos._rate import SharedRate
from promptlayer_exec.dbos._records import BatchStatus, Kind, StoredOutcome, stored_error
from promptlayer_exec.dbos._reports import (
    BatchItem,
    BatchSettings,
    Durations,
    Failure,
    ItemState,
    StoredItem,
)
from promptlayer_exec.dbos._requeue import Reason
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._worker import Worker

if TYPE_CHECKING:
    from typing_extensions import TypeForm

T = TypeVar("T")

logger = logging.getLogger("promptlayer_exec")

# Seconds between two reads of new outcomes, and of settings that another worker may have stored.
POLL_INTERVAL = 0.25
SETTINGS_INTERVAL = 2.0
# Seconds after which to give up a run that does not end, unless the batch stores another number.
GIVE_UP_AFTER = 86400.0


class Batch:
    """Many executions, each started once, even if the processes that start them die.

    Creating a batch does no I/O. Its name identifies it: any number of processes, on any machine
    that can reach the database, can use the same batch at the same time.

    Example:
        Run it again after a crash: it continues, and starts nothing twice::

            batch = Batch("nightly", session=Session)
            await batch.add(
                StartRequest("grade", {"prompt": text}, key=name) for name, text in prompts.items()
            )
            await batch.work()
            async for outcome in batch.outcomes():
                print(outcome.key, outcome.output or outcome.error)

    Args:
        name: the name of the batch, 1 to 200 bytes.
        database_url: `sqlite:///FILE` or `postgresql://user@host/database`. None: the environment
            variable `PROMPTLAYER_EXEC_DB`, else one SQLite file per user.
        session: starts and follows the executions: either a session that you open and close, or a
            function that returns one, which the batch opens and closes.
        max_in_flight: the maximum number of items in progress, for all workers together. The batch
            stores it: `work` changes it for all workers, even while they run. None: the stored
            number, or 100.
        rate: the maximum number of HTTP attempts per second, for all workers together. The batch
            stores it, as above. None: the stored rate, or only the limit of each session.
        attempts: the maximum number of runs for an item. You pay for each of them: if one completes
            without an output, another one starts after a pause, of 5 seconds at first. The batch
            never repeats an item in state `unknown`. It stores the number, as above. None: the
            stored number, or 1.
        give_up_after: how many seconds after its start to stop following a run that does not end.
            Its item then fails with `ExecutionTimeout`, and `recheck` follows it again. `math.inf`
            means never. The batch stores the number, as above. None: the stored number, or 86400, a
            day.
        same_server: whether a batch may continue after its server's address or your API key
            changed. Use it only if the workspace is the same: otherwise its ids are those of other
            runs.

    Raises:
        ConfigurationError: a setting is malformed. `add`, `work`, `outcomes`, `recheck`, `retry`
            and `check_server` also raise it if the batch belongs to another server. Each method
            raises it if you may not use the database, and `StoreUnavailable` if the database is
            unavailable.
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
        give_up_after: float | None = None,
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
        if give_up_after is not None:
            if give_up_after != math.inf:
                integration.check_seconds("give_up_after", give_up_after, zero=False)
            self._settings["give_up_after"] = float(give_up_after)

        self._store: Store | None = None
        self._is_prepared = False
        # How many calls of `work` there are now. `outcomes` must not return before them.
        self._working = 0

    async def add(self, requests: Iterable[StartRequest] | AsyncIterable[StartRequest]) -> int:
        """Add items to the database. Adding the same item twice adds it once.

        Add many items at a time: each call requests the definitions of their workflows, unless the
        session has `check_inputs=False`.

        Args:
            requests: the runs to start, each with a unique `key`, a str of 1 to 1000 bytes. The
                call checks all of them before it adds the first. From an async iterable, it checks
                and adds portions of at most a thousand, or about 2 MiB.

        Returns:
            The number of new items.

        Raises:
            TypeError: a request contains a value of the wrong type.
            ValueError: an argument in a request is out of range, or the database cannot store its
                key.
            InvalidInputs: an input that a workflow requires is missing.
            KeyConflict: a key belongs to another request, with another workflow, inputs, label,
                version or metadata.
        """
        async with self._open(creates=True) as store:
            adding = Addition(store, self._name, self._session, self._checking_session)

            # It is impossible to check the last one before adding the first.
            if isinstance(requests, AsyncIterable):
                await self._claim(store)
                return await adding.add_as_they_come(requests)

            return await adding.add_all(requests, before=partial(self._claim, store))

    async def work(self, *, until_done: bool = True) -> BatchStatus:
        """Start items, follow them, and store their outcomes, together with all other workers.

        If you cancel it, it waits for the responses to requests in flight, and the next worker
        continues with the other items. An error that it raises does not fail any item: call it
        again later.

        Args:
            until_done: whether to return once every item has an outcome. If False, it waits for
                more items until you cancel it.

        Returns:
            How many items are in which state.

        Raises:
            InvalidResponse, StatusError: three runs in a row, started one at a time, ended in a way
                that nobody can read. Or PromptLayer was failing for longer than `watch_outage`.
            Unauthorized: PromptLayer refused the API key.
            ConnectionFailed: the session could not reach PromptLayer.
            RequestTimeout: PromptLayer did not respond in time.
            RateLimited: PromptLayer responded only with 429, and without a time to wait.
            SessionClosed: the session was closed.
            ConfigurationError: a setting is missing, or this process uses DBOS for something else.
            RuntimeError: this process already works on a batch.
        """
        # Before the first await: `outcomes` must not return before items are queued.
        self._working += until_done
        try:
            async with self._open(creates=True) as store:
                await self._claim(store)
                await self._requeue(store, Reason.CALLBACK, kinds=["unknown"])

                # While a worker stops, a callback may make another item unfinished.
                while not until_done or not await self._is_finished(store):
                    await self._work(store, until_done=until_done)
                return await store.run_in_thread(store.status, self._name)
        finally:
            self._working -= until_done

    async def _work(self, store: Store, *, until_done: bool) -> None:
        replaced = await store.run_in_thread(store.store_settings, self._name, self._settings)
        for name, before in replaced.items():
            logger.warning(
                "batch %r: %s changed from %g to %g for all its workers",
                *(self._name, name, before, self._settings[name]),
            )

        settings = await store.run_in_thread(reports.settings, store, self._name)
        limiter = SharedRate(store, self._name, settings.rate)
        following = Following(self._session, store.moment, _give_up_after(settings))
        worker = Worker(
            store,
            self._name,
            self._session,
            owns_session=self._session is not self._source,
            max_in_flight=settings.max_in_flight or 100,
            following=following,
        )

        refreshing = asyncio.create_task(self._refresh_settings(store, limiter, following))
        try:
            with integration.limited(self._session, limiter):
                await worker.run(until_done=until_done)
        finally:
            refreshing.cancel()
            await asyncio.wait([refreshing])

    async def _refresh_settings(
        self, store: Store, limiter: SharedRate, following: Following
    ) -> None:
        """Use the rate and the time limit that another worker stores meanwhile."""
        while True:
            await asyncio.sleep(SETTINGS_INTERVAL)
            with suppress(
                ConfigurationError, StoreUnavailable
            ):  # the worker notices and reports it
                settings = await store.run_in_thread(reports.settings, store, self._name)
                limiter.rate = settings.rate
                following.change_limit(_give_up_after(settings))

    @overload
    def outcomes(
        self, *, into: None = None, until_done: bool = True
    ) -> AsyncGenerator[StoredOutcome, None]: ...

    @overload
    def outcomes(
        self, *, into: TypeForm[T], until_done: bool = True
    ) -> AsyncGenerator[StoredOutcome[T], None]: ...

    async def outcomes(
        self, *, into: Any = None, until_done: bool = True
    ) -> AsyncGenerator[StoredOutcome[Any], None]:
        """Yield the outcome of each item: first the stored ones, then each as soon as it finishes.

        The iterator stops when every item has an outcome and no `work` of this object is still
        running. An item that runs again gets a second outcome. To stop early, use
        `contextlib.aclosing`.

        Args:
            into: the type of the outputs, as for `Execution.output`. If an output does not match,
                its outcome has an `InvalidOutput` as error, and `succeeded` is False. That changes
                nothing in the database: the run has succeeded, and `retry` does not repeat it.
            until_done: whether to wait for new outcomes, or to stop after the last stored one.

        Raises:
            TypeError: `into` is not a type that values can be structured into.
        """
        if into is not None:
            integration.check_type(self._session, into)
        last = 0
        async with self._open_to_work() as store:
            is_last = False
            while not is_last:
                # Checked before the last read, so that no outcome is missed in between.
                is_last = not until_done or (not self._working and await self._is_finished(store))
                while rows := await store.run_in_thread(store.outcomes, self._name, last):
                    for row in rows:
                        yield self._typed(StoredOutcome.from_json(row.outcome), into)
                    last = rows[-1].seq
                if not is_last:
                    await asyncio.sleep(POLL_INTERVAL)

    def _typed(self, outcome: StoredOutcome[Any], into: Any) -> StoredOutcome[Any]:
        """Return an outcome with an output of a type, or else with the error."""
        if into is None or not outcome.succeeded:
            return outcome
        try:
            output = integration.structure_output(
                self._session, outcome.execution_id, outcome.output, into
            )
        except InvalidOutput as error:
            return attrs.evolve(outcome, succeeded=False, output=None, error=stored_error(error))
        return attrs.evolve(outcome, output=output)

    async def recheck(self) -> int:
        """Follow every failed item that has an execution id again, without starting anything.

        The items go back into the queue. The next `work`, or one that is running, asks PromptLayer
        again how these executions finished. If an execution failed, its item fails again.

        Returns:
            The number of these items.
        """
        async with self._open_to_work() as store:
            return await self._requeue(store, Reason.RECHECK, kinds=["failed"])

    async def retry(
        self,
        *,
        failed: bool = False,
        unknown: bool = False,
        keys: Iterable[str] | None = None,
        unknown_for: float = 0.0,
        again: bool = False,
    ) -> int:
        """Start finished items again. PromptLayer bills the new runs.

        It starts only unknown items, and those whose run certainly failed or did not start. It
        follows the others again, for free, because their runs may still bring an output. A
        restarted item gets a second outcome.

        Args:
            failed: whether to start items whose run failed or did not start.
            unknown: whether to start unknown items, whose runs may already exist.
            keys: only these items. None means all. It ignores keys that the batch does not have.
            unknown_for: start an unknown item only if it has been unknown for this many seconds,
                so that its callback has time to arrive.
            again: whether to pay for a new run of each of `keys` that has finished, even if its
                first run succeeded, or may still be running. Pass it with `keys` alone.

        Returns:
            The number of these items.

        Raises:
            TypeError: `keys` is a str, or contains something else than str.
            ValueError: `unknown_for` is negative, or `again` comes without keys, or with another
                choice.
        """
        integration.check_seconds("unknown_for", unknown_for)
        if again and (keys is None or failed or unknown or unknown_for):
            raise ValueError("again=True starts new runs of `keys`, and takes no other choice")
        chosen = None if keys is None else _check_keys(keys)
        kinds = [kind for kind, is_meant in (("failed", failed), ("unknown", unknown)) if is_meant]

        async with self._open_to_work() as store:
            if again:
                kinds = ["succeeded", "failed", "unknown"]
                return await self._requeue(store, Reason.AGAIN, kinds=kinds, keys=chosen)

            await self._requeue(store, Reason.CALLBACK, kinds=["unknown"])
            return await self._requeue(
                store, Reason.RETRY, kinds=kinds, keys=chosen, unknown_for=unknown_for
            )

    async def adopt(self, key: str, execution_id: int) -> bool:
        """Follow the run that you found for an unknown item, without starting anything.

        Look for it on PromptLayer's dashboard: its `metadata` has `promptlayer_exec.batch` and
        `promptlayer_exec.key`. This asks PromptLayer nothing. The next `work`, or one that is
        running, follows the run.

        Args:
            key: the key of the item.
            execution_id: the id of its run.

        Returns:
            True if the item has this run now. False if it has another one, is not unknown, or does
            not exist.

        Raises:
            TypeError: `key` is not a str, or `execution_id` not an int.
            ValueError: the run belongs to another item of the batch, or `execution_id` is out of
                range.
        """
        _check_keys([key])
        execution_id = integration.check_execution_id(execution_id)
        async with self._open_to_work() as store:
            act = partial(requeue.adopt, store, self._name, key, execution_id)
            return await store.run_in_thread(act)

    async def give_up(self, keys: Iterable[str] | None = None, *, running_for: float = 0.0) -> int:
        """End items that the batch follows, without waiting for the ends of their runs.

        They fail with `ExecutionTimeout` and the id of their run, which continues on PromptLayer.
        Workers let go of them within seconds. `recheck` follows the runs again.

        Args:
            keys: only these items. None means all. It ignores items without a known run, and those
                that have finished.
            running_for: only items that have been followed for this many seconds.

        Returns:
            The number of these items.

        Raises:
            TypeError: `keys` is a str, or contains something else than str.
            ValueError: `running_for` is negative.
        """
        integration.check_seconds("running_for", running_for)
        chosen = None if keys is None else _check_keys(keys)
        async with self._open_to_work() as store:
            act = partial(requeue.give_up, store, self._name, chosen, running_for=running_for)
            return await store.run_in_thread(act)

    async def _requeue(self, store: Store, reason: Reason, **which: Any) -> int:
        act = partial(requeue.requeue, store, self._name, reason, **which)
        return await store.run_in_thread(act)

    async def check_server(self) -> None:
        """Check that the batch, if it exists, belongs to the session's server and API key.

        The other methods check it before they change anything.

        Raises:
            ConfigurationError: it does not.
        """
        async with self._open_to_work():
            pass

    async def status(self) -> BatchStatus:
        """Return how many items are in which state, and how many workers are alive."""
        async with self._open() as store:
            found = await store.run_in_thread(store.status, self._name)
            workers = await store.run_in_thread(count_workers, store, self._name)
            return attrs.evolve(found, workers=workers)

    async def items(
        self,
        *,
        state: ItemState | None = None,
        older_than: float = 0.0,
        containing: str = "",
    ) -> AsyncGenerator[BatchItem, None]:
        """Yield the items of the batch, in the order of their keys, each as it is now.

        Args:
            state: only items in this state: `waiting`, `sending`, `following`, `unknown`, `failed`
                or `succeeded`. None means all.
            older_than: only items whose state has not changed for this many seconds.
            containing: only items with this text in their key, their request (its inputs, for
                example) or their error. Case does not matter, at least for ASCII letters.

        Raises:
            ValueError: `state` is another one, or `older_than` is negative.
        """
        reports.check_state(state)
        integration.check_seconds("older_than", older_than)
        last = ""
        async with self._open() as store:
            read = partial(reports.items_after, store, self._name, containing=containing)
            while page := await store.run_in_thread(read, last, state, older_than):
                for item in page:
                    yield item
                last = page[-1].key

    async def counts(self) -> dict[ItemState, int]:
        """Return how many items are in each state.

        It reads every item that has not finished. `status` is faster, and counts those that a
        worker has as running. So an item that `recheck` or `retry` put back is `following` here,
        and waiting there, until a worker takes it.
        """
        return await self._report(reports.counts)

    async def settings(self) -> BatchSettings:
        """Return the settings that all workers share."""
        return await self._report(reports.settings)

    async def kinds(self, keys: Iterable[str]) -> dict[str, Kind | None]:
        """Return how the items of these keys finished, None for one that has not.

        It leaves out keys that the batch does not have.
        """
        return await self._report(reports.kinds, keys)

    async def latest_kinds(self, count: int) -> list[tuple[int, Kind]]:
        """Return how the latest items finished, each with a growing number, the newest first."""
        return await self._report(reports.latest_kinds, count)

    async def latest_outcome(self) -> StoredOutcome | None:
        """Return the latest stored outcome, or None if no item has finished."""
        return await self._report(reports.latest_outcome)

    async def item(self, key: str) -> StoredItem | None:
        """Return what the batch stores about an item, or None if it does not have the item."""
        return await self._report(reports.item, key)

    async def failures(self) -> tuple[Failure, ...]:
        """Return why items failed, the most frequent cause first."""
        return await self._report(reports.failures)

    async def durations(self) -> Durations | None:
        """Return how long the runs took, or None if none has finished."""
        return await self._report(reports.durations)

    async def delete(self) -> int:
        """Delete the batch with all its items and outcomes, and return how many items it had.

        Executions continue on PromptLayer. If something interrupts the call, some items may remain:
        call it again.

        Raises:
            RuntimeError: a worker works on the batch. One on another machine counts for 12 seconds
                after it died.
        """
        async with self._open() as store:
            if await store.run_in_thread(count_workers, store, self._name):
                raise RuntimeError(
                    f"a worker works on batch {self._name!r}, so nothing was deleted. Stop it first"
                )
            return await store.run_in_thread(store.delete, self._name)

    async def _report(self, report: Callable[..., T], *arguments: Any) -> T:
        async with self._open() as store:
            return await store.run_in_thread(report, store, self._name, *arguments)

    async def resolve(self, token: str, execution_id: int) -> bool:
        """Resolve an unknown item with the callback of its run, without starting anything.

        Give the workers a session with `callbacks`, and pass this method to its router as
        `on_callback`. Any process may receive a callback, at any time and more than once. The batch
        stores it, even before the item is unknown. The next worker then follows the execution.

        Args:
            token: the token from the callback's URL. It must be genuine.
            execution_id: the id from the callback.

        Returns:
            True if this resolved an unknown item.

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
    async def _open(self, *, creates: bool = False) -> AsyncIterator[Store]:
        """Yield the database, which all concurrent calls of this batch share.

        With `creates`, a missing PostgreSQL database is created. Otherwise a mistake in its name
        would look like a database without batches.
        """
        if self._store is None or self._store.ended.is_set():
            self._store = Store(self._url)

        store = self._store
        store.users += 1
        try:
            # Only once: `prepare` does not retry, and everything else does.
            if not self._is_prepared:
                prepare_default(self._url)
                await store.run_in_thread(partial(store.prepare, creates=creates))
                self._is_prepared = True
            yield store
        finally:
            store.users -= 1
            if not store.users:
                if self._store is store:
                    self._store = None
                # Not in the event loop: SQLite writes its log back into the file.
                await store.run_in_thread(store.close)

    @asynccontextmanager
    async def _open_to_work(self) -> AsyncIterator[Store]:
        """Yield the database to a call that adds items or works, or that comes before one.

        Raises:
            ConfigurationError: the batch belongs to another server, or to another API key.
        """
        async with self._open(creates=True) as store:
            await self._check_owner(store)
            yield store

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
    """Return the names of all batches in a database, without creating it.

    A SQLite file that does not exist has no batches.

    Args:
        database_url: as for `Batch`.

    Raises:
        StoreUnavailable: the database is unavailable.
        ConfigurationError: there is no such PostgreSQL database.
    """
    url = locate(database_url)
    if url.get_backend_name() == "sqlite":
        with suppress(OSError):  # opening the file reports it better
            if not await anyio.Path(str(url.database)).exists():
                return []

    prepare_default(url)
    with closing(Store(url)) as store:
        await store.run_in_thread(partial(store.prepare, creates=False))
        return await store.run_in_thread(store.batches)


def _give_up_after(settings: BatchSettings) -> float:
    return settings.give_up_after or GIVE_UP_AFTER


def _check_keys(keys: Iterable[str]) -> list[str]:
    chosen = [keys] if isinstance(keys, str) else [*keys]
    if isinstance(keys, str) or not all(isinstance(key, str) for key in chosen):
        raise TypeError(f"keys must be an iterable of str, got {keys!r:.100}")
    return chosen
