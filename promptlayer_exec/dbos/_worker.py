"""One worker: it runs DBOS, with DBOS's own threads and event loop, and uses the caller's session.

The path of an item (DBOS stores the result of each step):

1. `Store.add` stores the item and enqueues its DBOS workflow, in one transaction.
2. DBOS dequeues the workflow in a worker: `_item` calls `Worker.run_item`.
3. Step "intend": `_record_intent` returns the token of this try once the request can be sent.
4. Step "start": `_send` sends the request if the stored token is that of this try, and returns the
   execution id or the error. If it returns neither, no run was started: 3 and 4 are repeated.
5. `_follow` waits until the execution is complete, and `Store.finish` stores the outcome.

If the worker dies, another one gets the stored results instead of running those steps, and follows
the execution whose id is stored. If only a token is stored, the request may have been sent: the
item is unknown, or is started again with `restart_unknown`.

Only what uses the session runs in the caller's event loop; the rest runs in DBOS's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn, TypedDict, TypeVar
from uuid import uuid4

import anyio
import attrs
from dbos import DBOS, DBOSPortableJSONSerializer

from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    Execution,
    ExecutionTimeout,
    NotFound,
    RateLimited,
    RequestTimeout,
    Session,
    SessionClosed,
    StartRequest,
    StartUnknown,
    Unauthorized,
)
from promptlayer_exec import _integration as integration
from promptlayer_exec.dbos._dbos_internals import ItemTaken, log_quietly, stop_dequeuing
from promptlayer_exec.dbos._groups import Group
from promptlayer_exec.dbos._liveness import Liveness
from promptlayer_exec.dbos._store import (
    APPLICATION,
    FIRST_WORKFLOW,
    VERSION,
    WORKFLOW,
    Store,
    queue_name,
)
from promptlayer_exec.dbos._tables import Ending
from promptlayer_exec.dbos._values import StoredError, StoredOutcome

T = TypeVar("T")

logger = logging.getLogger("promptlayer_exec")
_CHECK_INTERVAL = 0.25
# Seconds for which the server may answer 404 for an execution that was started.
_NOT_FOUND_GRACE = 10.0
_DRAIN_TIMEOUT = 60.0
_THREADS = 16
# Errors that say nothing about the item: every other item would meet them, too.
_NOT_THE_ITEMS_FAULT = (Unauthorized, ConnectionFailed, RateLimited, SessionClosed)


class _StartResult(TypedDict):
    """The stored result of the step "start"; without id and error, no run was started."""

    execution_id: int | None
    at: str
    error: list[str] | None


@attrs.define(eq=False)
class PendingStart:
    """One try to start a run, in three steps: `wait_ready`, record the intent, `send`.

    The intent is recorded immediately before the request is sent, so that few items are unknown
    when a worker is killed. The methods are called in the session's event loop.
    """

    # Awaits `before_send()`, its only argument, before it sends the request.
    _start: Callable[..., Coroutine[Any, Any, Execution]]
    token: str = attrs.field(init=False, factory=lambda: uuid4().hex)
    execution: Execution | None = attrs.field(init=False, default=None)
    _ready: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _recorded: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _task: asyncio.Task[Execution] | None = attrs.field(init=False, default=None)
    _is_cancelled: bool = attrs.field(init=False, default=False)

    async def wait_ready(self) -> None:
        """Prepare the start, and return once its request can be sent or the start has ended."""
        if self._is_cancelled:
            return
        self._task = asyncio.create_task(self._start(before_send=self._wait_until_recorded))
        self._task.add_done_callback(self._end)
        await self._ready.wait()

    async def send(self) -> Execution | None:
        """Send the request, and return its run; None if the start was cancelled before that."""
        self._recorded.set()
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self.execution = self._task.result()
        return self.execution

    def cancel(self) -> None:
        """Cancel the start, unless its request may have been sent."""
        self._is_cancelled = True
        if self._task is not None and not self._recorded.is_set():
            self._task.cancel()

    async def _wait_until_recorded(self) -> None:
        self._ready.set()
        await self._recorded.wait()

    def _end(self, task: asyncio.Task[Execution]) -> None:
        if not task.cancelled():
            task.exception()  # otherwise asyncio logs it if `send` is never called
        self._ready.set()


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
    # Each with an event that is set when its result is recorded.
    _pending: dict[PendingStart, asyncio.Event] = attrs.field(init=False, factory=dict)
    _is_stopping: bool = attrs.field(init=False, default=False)
    _error: Exception | None = attrs.field(init=False, default=None)
    _endings: Group[Ending] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._endings = Group(self._store_endings, lambda ending: len(ending.outcome))
        self._executor = f"{socket.gethostname()}-{uuid4().hex}"
        self._liveness = Liveness(self._store, self._batch, self._executor)

    async def run(self, *, until_done: bool) -> None:
        """Work on the batch, and wait at the end for the starts that are being sent."""
        global _worker  # noqa: PLW0603 - DBOS is one per process, and so is its worker
        if _worker is not None:
            raise RuntimeError("this process already works on a batch; work on one batch at a time")
        _worker = self
        self._store.stop_retrying.clear()
        try:
            if self._owns_session:
                await self._session.__aenter__()
            await self._store.run_in_thread(self._launch)
            await self._wait(until_done=until_done)
        except asyncio.CancelledError:
            self._store.stop_retrying.set()
            raise
        finally:
            self._is_stopping = True
            # A cancelled scope of anyio would cancel every await in here, too.
            with anyio.CancelScope(shield=True):
                try:
                    await self._shut_down()
                finally:
                    _worker = None
        if self._error is not None:
            raise self._error

    def _launch(self) -> None:
        log_quietly()
        self._store.register_queue(self._batch, self._max_in_flight)
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
        self._dbos = dbos
        self._liveness.record_heartbeat()
        DBOS.listen_queues([queue_name(self._batch)])
        DBOS.launch()
        self._liveness.start()

    async def _wait(self, *, until_done: bool) -> None:
        while not self._is_stopping:
            if until_done and await self._store.run_in_thread(self._store.is_finished, self._batch):
                await self._wait_until_idle()
                return
            await asyncio.sleep(_CHECK_INTERVAL)

    async def _wait_until_idle(self) -> None:
        """Wait up to 2 s until DBOS has ended the last items; other workers would recover them."""
        give_up = time.monotonic() + 2.0
        while time.monotonic() < give_up:
            running = await self._store.run_in_thread(self._store.running, self._batch)
            if self._executor not in running:
                return
            await asyncio.sleep(0.02)

    async def run_item(self, key: str, attempt: int, request: str) -> None:
        """Run an item until its outcome is stored; called in DBOS's event loop."""
        self._dbos_loop = asyncio.get_running_loop()
        try:
            started = await self._start(key, request)
            outcome = await self._in_callers_loop(self._follow(key, started))
            await self._endings.add(Ending.of(attempt, outcome))
        except Exception as error:  # noqa: BLE001 - DBOS would end the item with it
            self._give_up(error)
            await _suspend()

    def _store_endings(self, endings: list[Ending]) -> None:
        self._store.finish(self._batch, endings)

    async def _start(self, key: str, request: str) -> _StartResult:
        start = partial(integration.start, self._session, self._to_send(key, request))
        while not self._is_stopping:
            pending = PendingStart(start)
            self._pending[pending] = asyncio.Event()
            try:
                token = await DBOS.run_step_async({"name": "intend"}, self._record_intent, pending)
                result = await DBOS.run_step_async(
                    {"name": "start"}, self._send, pending, request, is_mine=token == pending.token
                )
            except ItemTaken:
                if pending.execution is not None:
                    logger.warning(
                        "execution %d was started, but another worker has taken over its item and"
                        " stores it as unknown: %s",
                        pending.execution.id,
                        DBOS.workflow_id,
                    )
                raise
            finally:
                self._pending.pop(pending).set()
                self._loop.call_soon_threadsafe(pending.cancel)
            if result["execution_id"] is not None or result["error"] is not None:
                return result
        return await _suspend()

    def _to_send(self, key: str, request: str) -> StartRequest:
        """Return a stored request with metadata by which its run can be found in PromptLayer."""
        stored = StartRequest(**json.loads(request), key=key)
        ours = {"promptlayer_exec.batch": self._batch, "promptlayer_exec.key": key}
        return attrs.evolve(stored, metadata={**(stored.metadata or {}), **ours})

    async def _record_intent(self, pending: PendingStart) -> str:
        """Return the token of a start that is ready to be sent, for DBOS to store."""
        await self._in_callers_loop(pending.wait_ready())
        return pending.token

    async def _send(self, pending: PendingStart, request: str, *, is_mine: bool) -> _StartResult:
        """Send a start, unless an earlier worker recorded the intent to do so."""
        if is_mine:
            return await self._in_callers_loop(self._send_pending(pending))
        if self._restart_unknown:
            return _start_result()
        message = "the worker that sent the start stopped before it recorded the answer"
        error = StartUnknown(message, workflow=json.loads(request)["workflow"], reason=message)
        return _start_result(error=error)

    async def _send_pending(self, pending: PendingStart) -> _StartResult:
        try:
            execution = await pending.send()
            return _start_result(execution_id=None if execution is None else execution.id)
        except (*_NOT_THE_ITEMS_FAULT, RequestTimeout) as error:
            if error.execution_id is not None:  # only `SessionClosed` can have the id of a run
                return _start_result(execution_id=error.execution_id)
            self._give_up(error)
        except ExecutionTimeout:
            pass  # there was no free slot within the session's `wait_timeout`
        except Exception as error:  # noqa: BLE001 - any other error is the item's
            return _start_result(error=error)
        return _start_result()

    async def _follow(self, key: str, started: _StartResult) -> StoredOutcome:
        at = datetime.fromisoformat(started["at"])
        execution_id = started["execution_id"]
        if execution_id is None:
            error = StoredError(*(started["error"] or ("", "")))
            return StoredOutcome(key, None, False, None, error, None, at)
        try:
            output = await self._output(execution_id)
            outcome = StoredOutcome(key, execution_id, True, output, None, at, _now())
            outcome.to_json()  # an output that cannot be stored is an error of the item
        except _NOT_THE_ITEMS_FAULT as error:
            self._give_up(error)
            await _suspend()
        except Exception as error:  # noqa: BLE001 - any other error is the item's
            stored = StoredError(type(error).__name__, str(error))
            return StoredOutcome(key, execution_id, False, None, stored, at, _now())
        return outcome

    async def _output(self, execution_id: int) -> Any:
        # Counted from now, not from the start: another machine's clock may have recorded the start.
        give_up = time.monotonic() + _NOT_FOUND_GRACE
        while True:
            try:
                return await self._session.execution(execution_id).output()
            except NotFound:
                if time.monotonic() > give_up:
                    raise
            await asyncio.sleep(_CHECK_INTERVAL)

    async def _in_callers_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _give_up(self, error: Exception) -> None:
        """Stop working, and let `run` raise the error, unless the worker is already stopping."""
        if not self._is_stopping:
            self._error = error
            self._is_stopping = True

    async def _shut_down(self) -> None:
        try:
            if self._owns_session:
                await self._session.aclose()
            if self._dbos_loop is not None:
                draining = asyncio.run_coroutine_threadsafe(self._drain(), self._dbos_loop)
                await asyncio.wait([asyncio.wrap_future(draining)], timeout=_DRAIN_TIMEOUT)
        finally:  # also if cancelled again: the threads would keep the process alive
            await self._store.run_in_thread(self._end)

    async def _drain(self) -> None:
        """Cancel the starts that were not sent, and wait until all results are recorded."""
        for pending in self._pending:
            self._loop.call_soon_threadsafe(pending.cancel)
        for recorded in [*self._pending.values()]:
            await recorded.wait()

    def _end(self) -> None:
        self._liveness.stop()
        if self._dbos is not None:
            stop_dequeuing(self._dbos, queue_name(self._batch), _DRAIN_TIMEOUT)
            DBOS.destroy()
            with suppress(ConfigurationError):  # the other workers will miss its heartbeat
                self._store.remove_worker(self._executor)


_worker: Worker | None = None


async def _run(key: str, attempt: int, request: str) -> None:
    if _worker is None:
        await _suspend()
    await _worker.run_item(key, attempt, request)


@DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
async def _item(key: str, attempt: int, request: str) -> None:
    await _run(key, attempt, request)


@DBOS.workflow(name=FIRST_WORKFLOW, max_recovery_attempts=None)
async def _first_item(key: str, attempt: int, request: str) -> None:
    await _run(key, attempt, request)


async def _suspend() -> NoReturn:
    """Wait until DBOS ends: the item stays as it is stored, for the next worker."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("this future is never done")


def _start_result(execution_id: int | None = None, error: Exception | None = None) -> _StartResult:
    what = None if error is None else [type(error).__name__, str(error)]
    return {"execution_id": execution_id, "at": _now().isoformat(), "error": what}


def _now() -> datetime:
    return datetime.now(UTC)
