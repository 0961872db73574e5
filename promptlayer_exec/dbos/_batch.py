"""A batch: what is added to it, who works on it, and how its items end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any

from promptlayer_exec import ConfigurationError, Session, StartRequest
from promptlayer_exec import _integration as integration
from promptlayer_exec.dbos._rate import SharedRate
from promptlayer_exec.dbos._store import Store, check_url
from promptlayer_exec.dbos._values import BatchStatus, StoredOutcome
from promptlayer_exec.dbos._worker import Worker

_DEFAULT_URL = "sqlite:///promptlayer-batches.sqlite"
_CHUNK = 500
_LONGEST_NAME = 200
_LONGEST_KEY = 1000
_LOOK_AGAIN = 0.25


class Batch:
    """Executions that are started once each, whatever happens to the processes that start them.

    Making one does no I/O. Any number of processes, on any machines that reach the database, may
    use the batch of one name at once.

    Args:
        name: the batch's.
        database_url: `sqlite:///` and the path of a file, or `postgresql://` and so on.
        session: starts and watches the runs: a session that you open and close, or a function that
            makes one, which is then opened and closed here.
        max_in_flight: how many items are under way at most, over all workers.
        rate: HTTP attempts per second at most, over all workers; None: what each session allows.
        restart_unknown: whether an item of which nobody knows if it was started is started again,
            at the risk of paying for it twice.

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
        if not _is_plain(name, _LONGEST_NAME):
            raise ConfigurationError(
                f"a batch's name is a text of 1 to {_LONGEST_NAME} bytes, not {name!r:.100}"
            )
        self._name = name
        self._url = check_url(database_url)
        self._source = session
        self._made: Session | None = None
        self._max_in_flight = integration.check_count("max_in_flight", max_in_flight)
        self._rate = None if rate is None else integration.check_seconds("rate", rate, zero=False)
        self._restart_unknown = restart_unknown
        self._is_prepared = False
        self._is_restarting = False

    async def add(self, requests: Iterable[StartRequest] | AsyncIterable[StartRequest]) -> int:
        """Add items, durably; one whose key is there already stays as it was.

        Args:
            requests: each with a `key` of its own, a str. They are taken a few hundred at a time.

        Returns:
            How many were new.

        Raises:
            TypeError: something in a request is of an unusable type.
            ValueError: something in it cannot be sent, or its key cannot be stored. Those before
                it may have been added; adding them again does no harm.
            ConfigurationError: the database cannot be used.
        """
        new = 0
        async with self._open() as store, aclosing(_chunks(requests)) as chunks:
            async for chunk in chunks:
                rows = [self._row(request) for request in chunk]
                new += await store.do(store.add, self._name, rows)
        return new

    async def work(self, *, until_done: bool = True) -> BatchStatus:
        """Start and watch items, beside all others who do, and store how each ends.

        Cancelled, it waits for the starts that are on the wire; the rest is for the next worker.

        Args:
            until_done: whether to return once every item has an outcome; else it works for ever.

        Returns:
            How far the batch is.

        Raises:
            Unauthorized, ConnectionFailed, RequestTimeout, RateLimited: the server takes nothing
                from us for now. No item failed of it: work again later.
            SessionClosed: the session was closed.
            ConfigurationError: the database cannot be used, or a setting is missing.
            RuntimeError: this process works on a batch already, or uses DBOS otherwise.
        """
        # Before anything is awaited: `outcomes`, followed meanwhile, must not end too early.
        self._is_restarting = self._restart_unknown
        try:
            async with self._open(pooled=True) as store:
                if self._restart_unknown:
                    await store.do(store.restart_unknown, self._name)
                    self._is_restarting = False
                if not until_done or not await store.do(store.is_finished, self._name):
                    await self._work(store, until_done=until_done)
                return await store.do(_status, store, self._name)
        finally:
            self._is_restarting = False

    async def _work(self, store: Store, *, until_done: bool) -> None:
        session = self._session()
        worker = Worker(
            store,
            self._name,
            session,
            owns_session=session is not self._source,
            max_in_flight=self._max_in_flight,
            restart_unknown=self._restart_unknown,
        )
        with ExitStack() as stack:
            if self._rate is not None:
                shared = SharedRate(store, self._name, self._rate)
                stack.enter_context(integration.limited(session, shared))
            await worker.run(until_done=until_done)

    async def outcomes(self) -> AsyncGenerator[StoredOutcome, None]:
        """Yield each item's outcome, those from before first, and end when all have one.

        An item of which it is unknown whether it was started comes again if it is restarted while
        this runs. Leave early through `contextlib.aclosing`.

        Raises:
            ConfigurationError: the database cannot be used.
        """
        last = 0
        async with self._open(pooled=True) as store:
            while True:
                is_finished = not self._is_restarting and await store.do(
                    store.is_finished, self._name
                )
                while rows := await store.do(_next_outcomes, store, self._name, last):
                    for seq, text in rows:
                        last = seq
                        yield StoredOutcome.from_json(text)
                if is_finished:
                    return
                await asyncio.sleep(_LOOK_AGAIN)

    async def status(self) -> BatchStatus:
        """Return how far the batch is.

        Raises:
            ConfigurationError: the database cannot be used.
        """
        async with self._open() as store:
            return await store.do(_status, store, self._name)

    def __repr__(self) -> str:
        return f"<Batch {self._name!r} in {self._url.render_as_string(hide_password=True)}>"

    @asynccontextmanager
    async def _open(self, *, pooled: bool = False) -> AsyncIterator[Store]:
        store = Store(self._url, pooled=pooled)
        try:
            # Once: afterwards a database that is away is waited for, and preparing it is not.
            if not self._is_prepared:
                await store.do(store.prepare)
                self._is_prepared = True
            yield store
        finally:
            store.close()

    def _session(self) -> Session:
        if isinstance(self._source, Session):
            return self._source
        if self._made is None:
            self._made = self._source()
        return self._made

    def _row(self, request: StartRequest) -> tuple[str, str]:
        if not isinstance(request, StartRequest):
            raise TypeError(f"a batch takes StartRequests, not {request!r:.100}")
        key = request.key
        if not isinstance(key, str):
            raise TypeError(f"an item's key is a str, not {key!r:.100}")
        if not _is_plain(key, _LONGEST_KEY):
            raise ValueError(
                f"an item's key is a text of 1 to {_LONGEST_KEY} bytes, not {key!r:.100}"
            )
        inputs = integration.encode_inputs(self._session(), request)
        return key, json.dumps(
            {
                "workflow": request.workflow,
                "inputs": inputs,
                "label": request.label,
                "version": request.version,
                "metadata": None if request.metadata is None else dict(request.metadata),
                "callback_url": request.callback_url,
            }
        )


async def batch_names(database_url: str = _DEFAULT_URL) -> list[str]:
    """Return the names of the batches in a database.

    Raises:
        ConfigurationError: the database cannot be used.
    """
    store = Store(check_url(database_url))
    try:
        await store.do(store.prepare)
        return await store.do(store.batches)
    finally:
        store.close()


def _status(store: Store, batch: str) -> BatchStatus:
    counts = store.counts(batch)
    pending = counts.get(None, 0)
    running = min(len(store.running(batch)), pending)
    ended = {kind: counts.get(kind, 0) for kind in ("succeeded", "failed", "unknown")}
    return BatchStatus(
        waiting=pending - running, running=running, **ended, total=sum(counts.values())
    )


def _next_outcomes(store: Store, batch: str, last: int) -> list[tuple[int, str]]:
    return store.outcomes(batch, after=last, limit=_CHUNK)


def _is_plain(text: Any, longest: int) -> bool:
    try:
        return isinstance(text, str) and 1 <= len(text.encode()) <= longest and "\0" not in text
    except UnicodeEncodeError:
        return False


async def _chunks(
    requests: Iterable[StartRequest] | AsyncIterable[StartRequest],
) -> AsyncGenerator[list[Any], None]:
    chunk: list[Any] = []
    async with aclosing(integration.each(requests)) as each:
        async for request in each:
            chunk.append(request)
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk
