"""One worker: it runs DBOS, with DBOS's own threads and event loop, and uses the caller's session.

What happens to each item is in `_items`.
"""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from uuid import uuid4

import anyio
import attrs
from dbos import DBOS, DBOSPortableJSONSerializer

from promptlayer_exec import ConfigurationError, Session
from promptlayer_exec import _integration as integration
from promptlayer_exec.dbos._connector import PATIENCE_AT_END
from promptlayer_exec.dbos._engine import log_quietly
from promptlayer_exec.dbos._items import Items, suspend
from promptlayer_exec.dbos._liveness import Liveness, check_of
from promptlayer_exec.dbos._names import (
    APPLICATION,
    WORKFLOW,
    queue_name,
)
from promptlayer_exec.dbos._pending import Item
from promptlayer_exec.dbos._store import VERSION, Store
from promptlayer_exec.dbos._values import StartResult

_CHECK_INTERVAL = 0.25
# Seconds in which the answers of all starts that were sent are recorded.
_RECORDING_TIMEOUT = 30.0
_THREADS = 16
# Whole seconds in which DBOS stops taking items from the queue, if it may have more of them.
_ENDING = 1
# Seconds for which no item may come while all others wait for the server, before the work ends.
_IDLE = 3.0


@attrs.define(eq=False)
class Worker:
    """Runs the items of one batch; opens and closes the session only if it owns it."""

    _store: Store
    _batch: str
    _session: Session
    _owns_session: bool
    _max_in_flight: int
    _restart_unknown: bool
    _executor: str = attrs.field(init=False)
    _liveness: Liveness = attrs.field(init=False)
    _loop: asyncio.AbstractEventLoop = attrs.field(init=False, factory=asyncio.get_running_loop)
    _dbos: DBOS | None = attrs.field(init=False, default=None)
    _dbos_loop: asyncio.AbstractEventLoop | None = attrs.field(init=False, default=None)
    _is_stopping: bool = attrs.field(init=False, default=False)
    _error: Exception | None = attrs.field(init=False, default=None)
    _items: Items = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._executor = f"{socket.gethostname()}-{uuid4().hex}"
        self._items = Items(
            self._store,
            self._batch,
            self._session,
            self._executor,
            self._restart_unknown,
            self._give_up,
        )
        self._liveness = Liveness(
            self._store,
            self._batch,
            self._executor,
            self._items.active,
            self._loop.is_closed,
            self._give_up,
        )

    async def run(self, *, until_done: bool) -> None:
        """Work on the batch, and wait at the end for the starts that are being sent."""
        global _worker  # noqa: PLW0603 - DBOS is one per process, and so is its worker
        if _worker is not None:
            raise RuntimeError("this process already works on a batch; work on one batch at a time")
        _worker = self
        self._store.stop_retrying.clear()
        watching = asyncio.create_task(self._watch_database())
        try:
            suffix = await self._store.run_in_thread(self._store.channel_suffix, self._batch)
            integration.share_channel(self._session, suffix)
            if self._owns_session:
                await self._session.__aenter__()
            await self._store.run_in_thread(self._launch, stops_all=True)
            await self._wait(until_done=until_done)
        except asyncio.CancelledError:
            self._store.stop_retrying.set()
            raise
        finally:
            self._is_stopping = True
            # A cancelled scope of anyio would cancel every await in here, too.
            with anyio.CancelScope(shield=True):
                patience = self._store.connector.patience
                try:
                    await self._shut_down()
                finally:
                    self._store.connector.patience = patience
                    self._store.precondition = None  # others may use the store for longer
                    _worker = None
                    watching.cancel()
                    await asyncio.wait([watching])
        if self._error is not None:
            raise self._error

    def _launch(self) -> None:
        log_quietly()
        self._store.precondition = check_of(self._store, self._batch)
        self._store.register_queue(self._batch, self._max_in_flight)
        self._liveness.record_heartbeat()
        self._store.retry(self._launch_dbos)
        self._liveness.start()

    def _launch_dbos(self) -> None:
        dbos = DBOS(
            config={
                "name": APPLICATION,
                "system_database_url": self._store.url,
                "system_database_engine": self._store.engine,
                "application_version": VERSION,
                "executor_id": self._executor,
                "log_level": "WARNING",
                "max_executor_threads": _THREADS,
                "notification_listener_polling_interval_sec": _CHECK_INTERVAL,
                "serializer": DBOSPortableJSONSerializer(),
            }
        )
        if DBOS.executor_id != self._executor:
            raise RuntimeError(
                "this process already uses DBOS; work on the batch in another process"
            )
        DBOS.listen_queues([queue_name(self._batch)])
        try:
            DBOS.launch()
        except BaseException:
            DBOS.destroy()  # it cannot be launched twice
            raise
        self._dbos = dbos

    async def _watch_database(self) -> None:
        """Abandon the database when it does not answer, also while the work ends."""
        while True:
            await asyncio.sleep(_CHECK_INTERVAL)
            self._store.connector.abandon_if_stuck()

    async def _wait(self, *, until_done: bool) -> None:
        store = self._store
        waiting_since = None
        while not self._is_stopping:
            if until_done and await store.run_in_thread(
                store.is_finished, self._batch, stops_all=True
            ):
                await self._wait_until_idle()
                return
            if not until_done or len(self._items.waiting) < max(len(self._items.active), 1):
                waiting_since = None
            elif waiting_since is None:
                waiting_since = time.monotonic()
            elif time.monotonic() - waiting_since > _IDLE:
                self._give_up(next(iter(self._items.waiting.values())))
            await asyncio.sleep(_CHECK_INTERVAL)

    async def _wait_until_idle(self) -> None:
        """Wait up to 2 s until DBOS has ended the last items; other workers would recover them."""
        store = self._store
        give_up = time.monotonic() + 2.0
        while time.monotonic() < give_up:
            with suppress(ConfigurationError):  # all items have ended: nothing is lost
                if not await store.run_in_thread(
                    store.taken, self._batch, self._executor, stops_all=True
                ):
                    return
            await asyncio.sleep(0.02)

    async def run_item(self, item: Item) -> None:
        """Run an item until its outcome is stored; called in DBOS's event loop."""
        self._dbos_loop = asyncio.get_running_loop()
        await self._items.run(item)

    def _give_up(self, error: Exception) -> None:
        """Stop working, and let `run` raise the error, unless the worker is already stopping."""
        if not self._is_stopping:
            self._error = self._store.explain(error)
            self._is_stopping = True

    async def _shut_down(self) -> None:
        self._store.connector.patience = PATIENCE_AT_END
        self._items.close()
        # A start that was sent has an answer, or fails, within the request timeout.
        timeout = integration.settings(self._session).request_timeout + _RECORDING_TIMEOUT
        try:
            if self._dbos_loop is not None:
                draining = asyncio.run_coroutine_threadsafe(self._drain(), self._dbos_loop)
                await integration.wait_even_if_cancelled(asyncio.wrap_future(draining), timeout)
        finally:  # also if cancelled again: the threads would keep the process alive
            try:
                if self._owns_session:
                    closing = asyncio.ensure_future(self._session.aclose())
                    await integration.wait_even_if_cancelled(closing, timeout)
                    if closing.done():
                        closing.result()
            finally:
                await self._store.run_in_thread(self._end)
                await self._wait_for_threads()

    async def _wait_for_threads(self) -> None:
        """Wait until no thread waits for PostgreSQL any more, whose caller was cancelled."""
        ended = time.monotonic()
        while True:
            if self._store.connector.longest_use <= time.monotonic() - ended:
                return
            await asyncio.sleep(0.02)

    async def _drain(self) -> None:
        """Cancel the starts that were not sent, and wait until all other results are recorded."""
        pending = [*self._items.pending]
        for start in pending:
            self._loop.call_soon_threadsafe(start.cancel)
        for start in pending:
            await start.settled.wait()

    def _is_empty(self) -> bool:
        """Return True if no item is in the queue."""
        with suppress(ConfigurationError):
            return not self._store.status(self._batch).waiting
        return False

    def _end(self) -> None:
        if self._store.connector.is_failing:
            self._store.connector.abandon()
        self._liveness.stop()
        if self._dbos is not None:
            DBOS.destroy(workflow_completion_timeout_sec=0 if self._is_empty() else _ENDING)
            with suppress(ConfigurationError):  # the other workers will miss its heartbeat
                self._store.remove_worker(self._executor)


_worker: Worker | None = None


async def _run(item: Item) -> None:
    if _worker is None:
        await suspend()
    await _worker.run_item(item)


@DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
async def _item(key: str, attempt: int, request: str, started: StartResult | None = None) -> None:
    await _run(Item(key, attempt, request, started))
