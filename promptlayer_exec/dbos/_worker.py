"""A worker of a batch: DBOS takes items from the queue, and the caller's session runs them.

DBOS has its own threads and event loop. `_items` describes the path of each item.
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

from promptlayer_exec import ConfigurationError, Session, StoreUnavailable
from promptlayer_exec import _integration as integration
from promptlayer_exec.dbos._dbos_calls import log_quietly
from promptlayer_exec.dbos._following import Following
from promptlayer_exec.dbos._items import Items
from promptlayer_exec.dbos._liveness import Liveness, release
from promptlayer_exec.dbos._shared_database import CONNECTIONS_OF_DBOS
from promptlayer_exec.dbos._store import VERSION, Store
from promptlayer_exec.dbos._tables import APPLICATION, WORKFLOW, queue_name


@attrs.frozen
class WorkerTimes:
    """How often a worker checks whether its work is done, and how it stops, in seconds.

    While it stops, each call waits at most `patience_at_end` for a database that is away, and DBOS
    gets `ending` to stop taking items, if there may be more of them.
    """

    check_interval: float = 0.25
    patience_at_end: float = 4.0
    ending: int = 1


TIMES = WorkerTimes()


@attrs.define(eq=False)
class Worker:
    """Runs the items of one batch. It opens and closes a session that it made."""

    _store: Store
    _batch: str
    _session: Session
    _owns_session: bool
    _max_in_flight: int
    _following: Following
    _executor: str = attrs.field(
        init=False, factory=lambda: f"{socket.gethostname()}-{uuid4().hex}"
    )
    _loop: asyncio.AbstractEventLoop = attrs.field(init=False, factory=asyncio.get_running_loop)
    _error: Exception | None = attrs.field(init=False, default=None)
    _items: Items = attrs.field(init=False)
    _liveness: Liveness = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        store, batch = self._store, self._batch
        self._items = Items(store, batch, self._session, self._give_up, self._following)
        self._liveness = Liveness(
            store, batch, self._executor, self._items.active, self._items.let_go
        )

    async def run(self, *, until_done: bool) -> None:
        """Work on the batch. Before returning, wait for the responses to requests in flight."""
        global _worker  # noqa: PLW0603 - DBOS is one per process, and so is its worker
        if _worker is not None:
            raise RuntimeError("this process already works on a batch. Work on one batch at a time")
        _worker = self
        patience, self._store.patience = self._store.patience, float("inf")
        watching: asyncio.Task[None] | None = None

        try:
            suffix = await self._store.run_in_thread(self._store.channel_suffix, self._batch)
            integration.share_channel(self._session, suffix)
            if self._owns_session:
                await self._session.__aenter__()
            await self._store.run_in_thread(self._launch)
            watching = asyncio.create_task(self._liveness.run())
            await self._wait(watching, until_done=until_done)
        finally:
            # A cancelled scope of anyio would also cancel every await in here.
            with anyio.CancelScope(shield=True):
                try:
                    await self._shut_down(watching)
                finally:
                    self._store.patience = patience
                    _worker = None

        if self._error is not None:
            raise self._error

    def _launch(self) -> None:
        log_quietly()
        self._store.register_queue(self._batch, self._max_in_flight)
        self._liveness.record_heartbeat()
        self._store.retry(self._launch_dbos)

    def _launch_dbos(self) -> None:
        DBOS(
            config={
                "name": APPLICATION,
                "system_database_url": self._store.url,
                "system_database_engine": self._store.engine_of_dbos,
                "application_version": VERSION,
                "executor_id": self._executor,
                "log_level": "WARNING",
                "max_executor_threads": CONNECTIONS_OF_DBOS,
                "notification_listener_polling_interval_sec": TIMES.check_interval,
                "serializer": DBOSPortableJSONSerializer(),
            }
        )
        if DBOS.executor_id != self._executor:
            raise ConfigurationError(
                "this process already uses DBOS, so it cannot work on a batch",
                advice="Work on it in another process, for example with `promptlayer-exec batch"
                " work`.",
            )

        DBOS.listen_queues([queue_name(self._batch)])
        try:
            DBOS.launch()
        except BaseException:
            DBOS.destroy()  # it cannot be launched twice
            raise

    async def _wait(self, watching: asyncio.Task[None], *, until_done: bool) -> None:
        store = self._store
        while self._error is None:
            if watching.done():
                await watching
            if until_done and await store.run_in_thread(store.is_finished, self._batch):
                await self._wait_until_idle()
                return

            await asyncio.sleep(TIMES.check_interval)

    async def _wait_until_idle(self) -> None:
        """Wait up to 2 s for DBOS to finish the last items. Other workers would recover them."""
        give_up = time.monotonic() + 2.0
        while time.monotonic() < give_up:
            taken = await self._store.run_in_thread(self._store.taken, self._batch)
            if self._executor not in taken.values():
                return
            await asyncio.sleep(0.02)

    async def run_item(self, key: str, attempt: int) -> bool:
        """Run an item, in DBOS's event loop. Return True if it has finished."""
        run = self._items.run(key, attempt)
        running = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run, self._loop))
        await asyncio.wait([running])
        return not running.cancelled() and running.result()

    def _give_up(self, error: Exception) -> None:
        """Stop working, and let `run` raise the error, unless there is an earlier one."""
        if self._error is None:
            self._error = self._store.explain(error)

    async def _shut_down(self, watching: asyncio.Task[None] | None) -> None:
        self._store.patience = TIMES.patience_at_end
        try:
            await self._items.close()
            if watching is not None:
                watching.cancel()
                await asyncio.wait([watching])
            if self._owns_session:
                await self._session.aclose()
        finally:
            await self._store.run_in_thread(self._end)

    def _end(self) -> None:
        is_finished = False
        if self._store.unavailable_for:
            self._store.ended.set()
        with suppress(ConfigurationError, StoreUnavailable):
            is_finished = self._store.is_finished(self._batch)

        if DBOS.executor_id == self._executor:  # it was launched
            DBOS.destroy(workflow_completion_timeout_sec=0 if is_finished else TIMES.ending)

        # If it cannot, the other workers notice its missing heartbeat.
        with suppress(ConfigurationError, StoreUnavailable):
            release(self._store, self._batch, self._executor)


_worker: Worker | None = None


@DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
async def _item(key: str, attempt: int) -> None:
    if _worker is None or not await _worker.run_item(key, attempt):
        # Wait until DBOS stops: the item stays as it is stored, for the next worker.
        await asyncio.Event().wait()
