"""The public API of a batch: add items, work on them, read their outcomes."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
)
from contextlib import aclosing, asynccontextmanager, closing, suppress
from functools import cached_property
from itertools import islice
from typing import IO, Any

from promptlayer_exec import ConfigurationError, Session, StartRequest
from promptlayer_exec import _integration as integration
from promptlayer_exec.dbos._requests import Row, encode
from promptlayer_exec.dbos._store import SharedRate, Store, check_url
from promptlayer_exec.dbos._values import BatchStatus, StoredOutcome
from promptlayer_exec.dbos._worker import Worker

_DEFAULT_URL = "sqlite:///promptlayer-batches.sqlite"
_CHUNK = 1000
_CHUNK_BYTES = 4 * 1024 * 1024
_LONGEST_NAME = 200
_LONGEST_KEY = 1000
_POLL_INTERVAL = 0.25


class Batch:
    """Executions that are each started once, even if the processes that start them die.

    Making a batch does no I/O. Any number of processes, on any machines that reach the database,
    can use the same batch, which is found by its name, at the same time.

    Args:
        name: the batch's name, 1 to 200 bytes.
        database_url: `sqlite:///` and the path of a file, or `postgresql://user@host/database`.
        session: starts and follows the executions: a session that you open and close, or a
            function that makes one, which the batch then opens and closes.
        max_in_flight: how many items all workers together run at most.
        rate: how many HTTP attempts per second all workers together make at most; None: no limit
            beside that of each session.
        restart_unknown: whether `work` restarts unknown items. An item is unknown if its start was
            cut off, so that it may or may not run; restarted, it may run, and be billed, twice.

    Raises:
        ConfigurationError: a setting is malformed.
    """

    def __init__(
        self,
        name: str,
        *,
        database_url: str = _DEFAULT_URL,
        session: Session | Callable[[], Session],
        max_in_flight: int = 100,
        rate: float | None = None,
        restart_unknown: bool = False,
    ) -> None:
        self._name = _check_text("batch name", name, _LONGEST_NAME, ConfigurationError)
        self._url = check_url(database_url)
        self._source = session
        self._max_in_flight = integration.check_count("max_in_flight", max_in_flight)
        self._rate = None if rate is None else integration.check_seconds("rate", rate, zero=False)
        self._restart_unknown = restart_unknown
        self._is_prepared = False
        self._is_restarting = False

    async def add(self, requests: Iterable[StartRequest] | AsyncIterable[StartRequest]) -> int:
        """Add items to the database; one whose key and request are already there is not new.

        Args:
            requests: what to start, each with a unique `key`: a str of 1 to 1000 bytes. All of them
                are checked before the first is added, unless they come from an async iterable:
                these are checked and added a few hundred at a time.

        Returns:
            How many items were new.

        Raises:
            TypeError: something in a request is of an unusable type.
            ValueError: something in a request cannot be sent, its key cannot be stored, or its key
                stands for another request: another workflow, or other inputs, label, version or
                metadata.
            ConfigurationError: the database cannot be used.
        """
        async with self._open() as store:
            if isinstance(requests, AsyncIterable):
                return await self._add_as_they_come(store, requests)
            with tempfile.TemporaryFile() as spool:  # a million items need no memory
                for number, request in enumerate(requests, 1):
                    spool.write(json.dumps(self._row(request)).encode() + b"\n")
                    if number % _CHUNK == 0:
                        await asyncio.sleep(0)
                for rows in _chunks(spool):
                    await store.run_in_thread(store.check, self._name, rows)
                return sum(
                    [
                        await store.run_in_thread(store.add, self._name, rows)
                        for rows in _chunks(spool)
                    ]
                )

    async def _add_as_they_come(self, store: Store, requests: AsyncIterable[StartRequest]) -> int:
        new, rows = 0, []
        async with aclosing(integration.each(requests)) as each:
            async for request in each:
                rows.append(self._row(request))
                if len(rows) == _CHUNK:
                    new += await store.run_in_thread(store.add, self._name, rows)
                    rows = []
            if rows:
                new += await store.run_in_thread(store.add, self._name, rows)
        return new

    async def work(self, *, until_done: bool = True) -> BatchStatus:
        """Start items, follow them, and store their outcomes, together with all other workers.

        If cancelled, it waits for the starts that are being sent; the next worker continues with
        all other items.

        Args:
            until_done: whether to return once every item has an outcome. Otherwise it waits for
                more items until it is cancelled.

        Returns:
            How many items are in which state.

        Raises:
            Unauthorized: the server refused the key. No item failed: work again later.
            ConnectionFailed: the server could not be reached. No item failed: work again later.
            RequestTimeout: the server did not answer in time. No item failed: work again later.
            RateLimited: the server answered nothing but 429. No item failed: work again later.
            SessionClosed: the session was closed.
            ConfigurationError: the database cannot be used, or a setting is missing.
            RuntimeError: this process already works on a batch, or uses DBOS otherwise.
        """
        # Set before the first await: until the items are restarted, `outcomes` must not end.
        self._is_restarting = self._restart_unknown
        try:
            async with self._open() as store:
                if self._restart_unknown:
                    await store.run_in_thread(store.restart_unknown, self._name)
                    self._is_restarting = False
                if not until_done or not await self._is_finished(store):
                    await self._work(store, until_done=until_done)
                return await store.run_in_thread(store.status, self._name)
        finally:
            self._is_restarting = False

    async def _work(self, store: Store, *, until_done: bool) -> None:
        worker = Worker(
            store,
            self._name,
            self._session,
            owns_session=self._session is not self._source,
            max_in_flight=self._max_in_flight,
            restart_unknown=self._restart_unknown,
        )
        if self._rate is None:
            await worker.run(until_done=until_done)
            return
        with integration.limited(self._session, SharedRate(store, self._name, self._rate)):
            await worker.run(until_done=until_done)

    async def outcomes(self) -> AsyncGenerator[StoredOutcome, None]:
        """Yield the outcome of each item: first those that are stored, then each new one.

        The iteration ends when every item has an outcome. An unknown item that is restarted is
        yielded again. To end the iteration early, use `contextlib.aclosing`.

        Raises:
            ConfigurationError: the database cannot be used.
        """
        last = 0
        async with self._open() as store:
            while True:
                is_finished = not self._is_restarting and await self._is_finished(store)
                while rows := await store.run_in_thread(
                    store.outcomes, self._name, last, _CHUNK, _CHUNK_BYTES
                ):
                    for seq, text in rows:
                        last = seq
                        yield StoredOutcome.from_json(text)
                if is_finished:
                    return
                await asyncio.sleep(_POLL_INTERVAL)

    async def status(self) -> BatchStatus:
        """Return how many items are in which state.

        Raises:
            ConfigurationError: the database cannot be used.
        """
        async with self._open() as store:
            return await store.run_in_thread(store.status, self._name)

    def __repr__(self) -> str:
        return f"<Batch {self._name!r} in {self._url.render_as_string(hide_password=True)}>"

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Store]:
        with closing(Store(self._url)) as store:
            # Only once: `prepare` does not retry, and all else does.
            if not self._is_prepared:
                await store.run_in_thread(store.prepare)
                self._is_prepared = True
            yield store

    async def _is_finished(self, store: Store) -> bool:
        return await store.run_in_thread(store.is_finished, self._name)

    @cached_property
    def _session(self) -> Session:
        return self._source if isinstance(self._source, Session) else self._source()

    def _row(self, request: StartRequest) -> Row:
        if not isinstance(request, StartRequest):
            raise TypeError(f"batch item must be a StartRequest, got {request!r:.100}")
        if not isinstance(request.key, str):
            raise TypeError(f"item key must be a str, got {request.key!r:.100}")
        _check_text("item key", request.key, _LONGEST_KEY, ValueError)
        return encode(request, integration.encode_inputs(self._session, request))


def _chunks(spool: IO[bytes]) -> Iterator[list[Row]]:
    """Yield the rows that were written to a file, a few hundred at a time."""
    spool.seek(0)
    while lines := list(islice(spool, _CHUNK)):
        yield [Row(*json.loads(line)) for line in lines]


async def batch_names(database_url: str = _DEFAULT_URL) -> list[str]:
    """Return the names of all batches in a database.

    Args:
        database_url: as for `Batch`.

    Raises:
        ConfigurationError: the database cannot be used.
    """
    with closing(Store(check_url(database_url))) as store:
        await store.run_in_thread(store.prepare)
        return await store.run_in_thread(store.batches)


def _check_text(what: str, text: Any, longest: int, error: type[ValueError]) -> str:
    with suppress(UnicodeEncodeError):
        if isinstance(text, str) and 1 <= len(text.encode()) <= longest and "\0" not in text:
            return text
    raise error(f"{what} must be 1 to {longest} bytes of text without NUL, got {text!r:.100}")
