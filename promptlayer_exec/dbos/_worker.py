"""One process that works on a batch: a DBOS executor, and the session that it uses.

DBOS runs in threads and an event loop of its own; only what needs the session runs in the caller's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn, TypedDict, TypeVar
from uuid import uuid4

import anyio
from dbos import DBOS, DBOSPortableJSONSerializer
from dbos import error as dbos_errors

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
from promptlayer_exec.dbos._departure import Departure
from promptlayer_exec.dbos._liveness import Liveness
from promptlayer_exec.dbos._store import APPLICATION, WORKFLOW, Store, queue_name
from promptlayer_exec.dbos._values import StoredError, StoredOutcome

T = TypeVar("T")

logger = logging.getLogger("promptlayer_exec")
# The steps of an item in the database are those of this version of them.
_VERSION = "1"
# Seconds for which an execution that was started may be unknown to some part of the server.
_NEWBORN = 10.0
_DRAIN = 60.0
_THREADS = 16
_CHECK = 0.25
# They say nothing of the item: no later one could fare better.
_NOT_THE_ITEMS_FAULT = (Unauthorized, ConnectionFailed, RateLimited, SessionClosed)


class _Answer(TypedDict):
    """What came of a start, as it is recorded; without id and error, it is to be made again."""

    execution_id: int | None
    at: str
    error: list[str] | None


class Worker:
    """Carries out the items of one batch.

    Args:
        store: the database.
        batch: the batch's name.
        session: starts and watches the runs.
        owns_session: whether the session is opened and closed here.
        max_in_flight: how many items all workers have begun at most.
        restart_unknown: whether an item whose start was cut off is started again.
    """

    def __init__(
        self,
        store: Store,
        batch: str,
        session: Session,
        *,
        owns_session: bool,
        max_in_flight: int,
        restart_unknown: bool,
    ) -> None:
        self._store = store
        self._batch = batch
        self._session = session
        self._owns_session = owns_session
        self._max_in_flight = max_in_flight
        self._restart_unknown = restart_unknown
        self._executor = f"{socket.gethostname()}-{uuid4().hex}"
        self._loop = asyncio.get_running_loop()
        self._dbos_loop: asyncio.AbstractEventLoop | None = None
        self._departures: set[Departure] = set()
        self._none_departs = asyncio.Event()
        self._stopped = asyncio.Event()
        self._is_stopping = False
        self._dbos: DBOS | None = None
        self._error: Exception | None = None
        self._liveness = Liveness(store, batch, self._executor, DBOS._recover_pending_workflows)

    async def run(self, *, until_done: bool) -> None:
        """Work until every item has an outcome, or for ever; starts on the wire are awaited.

        Args:
            until_done: whether to stop then.

        Raises:
            Unauthorized, ConnectionFailed, RequestTimeout, RateLimited, SessionClosed: no item can
                be carried out for now. None of them was lost.
            ConfigurationError: the database cannot be used, or a setting is missing.
            RuntimeError: this process works on a batch already, or uses DBOS otherwise.
        """
        global _worker  # noqa: PLW0603 - DBOS is one per process, and so is its worker
        if _worker is not None:
            raise RuntimeError("this process works on a batch already: one at a time")
        _worker = self
        try:
            if self._owns_session:
                await self._session.__aenter__()
            await self._store.do(self._launch)
            await self._wait(until_done=until_done)
        finally:
            self._is_stopping = True
            # A scope of anyio's that is cancelled would cancel every step of the end, too.
            with anyio.CancelScope(shield=True):
                try:
                    await self._shut_down()
                finally:
                    _worker = None
        if self._error is not None:
            raise self._error

    def _launch(self) -> None:
        # With a handler of its own, DBOS does not write to standard error.
        logging.getLogger("dbos").addHandler(_SILENCE)
        self._store.register_queue(self._batch, self._max_in_flight)
        dbos = DBOS(
            config={
                "name": APPLICATION,
                "system_database_url": self._store.url,
                "system_database_engine": self._store.engine,
                "application_version": _VERSION,
                "executor_id": self._executor,
                "log_level": "WARNING",
                "max_executor_threads": _THREADS,
                "notification_listener_polling_interval_sec": _CHECK,
                "serializer": DBOSPortableJSONSerializer(),
            }
        )
        if DBOS.executor_id != self._executor:
            raise RuntimeError("this process uses DBOS already: work on a batch in another one")
        self._dbos = dbos
        self._liveness.announce()
        DBOS.listen_queues([queue_name(self._batch)])
        DBOS.launch()
        self._liveness.start()

    async def _wait(self, *, until_done: bool) -> None:
        while not self._stopped.is_set():
            if until_done and await self._store.do(self._store.is_finished, self._batch):
                await self._settle()
                return
            try:
                async with asyncio.timeout(_CHECK):
                    await self._stopped.wait()
            except TimeoutError:
                pass

    async def _settle(self) -> None:
        """Let DBOS take note that the last items have ended, too."""
        give_up = time.monotonic() + 2.0
        while time.monotonic() < give_up:
            if self._executor not in await self._store.do(self._store.running, self._batch):
                return
            await asyncio.sleep(0.02)

    async def _shut_down(self) -> None:
        try:
            if self._owns_session:
                await self._session.aclose()
            if self._dbos_loop is not None:
                draining = asyncio.run_coroutine_threadsafe(self._drain(), self._dbos_loop)
                await asyncio.wait([asyncio.wrap_future(draining)], timeout=_DRAIN)
        finally:  # also for who is cancelled again: its threads would keep the process alive
            await self._store.do(self._end)

    def _end(self) -> None:
        self._liveness.stop()
        if self._dbos is not None:
            self._take_no_more(self._dbos)
            DBOS.destroy()
            with suppress(ConfigurationError):  # the others learn it from its silence, too
                self._store.forget(self._executor)

    def _take_no_more(self, dbos: DBOS) -> None:
        # DBOS ends its loop first, and then what still hands items over to it.
        for stop in dbos.background_thread_stop_events:
            stop.set()
        for thread in threading.enumerate():
            if thread.name == f"queue-worker-{queue_name(self._batch)}":
                thread.join(_DRAIN)

    async def _drain(self) -> None:
        """Call off the starts that have not left, and wait until what came of each is recorded."""
        for departure in self._departures:
            self._loop.call_soon_threadsafe(departure.call_off)
        if self._departures:
            self._none_departs.clear()
            await self._none_departs.wait()

    def _give_up(self, error: Exception) -> None:
        self._is_stopping = True
        self._error = self._error or error
        self._loop.call_soon_threadsafe(self._stopped.set)

    async def carry_out(self, key: str, attempt: int, request: str) -> None:
        """See an item to its stored outcome; runs in DBOS's loop."""
        self._dbos_loop = asyncio.get_running_loop()
        try:
            answer = await self._start(request)
            outcome = await self._in_callers_loop(self._outcome(key, answer))
            await asyncio.to_thread(
                self._store.finish,
                self._batch,
                key,
                attempt,
                outcome.kind,
                outcome.to_json(),
            )
        except dbos_errors.DBOSWorkflowConflictIDError:  # another worker has the item now
            raise
        except Exception as error:  # noqa: BLE001 - DBOS would take it for the item's end
            self._give_up(error)
            await _park()

    async def _start(self, request: str) -> _Answer:
        while not self._is_stopping:
            departure = Departure(partial(self._begin, StartRequest(**json.loads(request))))
            self._departures.add(departure)
            try:
                is_mine = await _intend(self, departure) == departure.token
                answer = await _post(self, departure, request, is_mine=is_mine)
            except dbos_errors.DBOSWorkflowConflictIDError:
                if departure.execution is not None:
                    logger.warning(
                        "execution %d was started, but another worker has its item now, and stores"
                        " it as unknown: %s",
                        departure.execution.id,
                        DBOS.workflow_id,
                    )
                raise
            finally:
                self._departures.discard(departure)
                if not self._departures:
                    self._none_departs.set()
                self._loop.call_soon_threadsafe(departure.call_off)
            if answer["execution_id"] is not None or answer["error"] is not None:
                return answer
        return await _park()

    async def _begin(
        self, request: StartRequest, clearance: Callable[[], Awaitable[None]]
    ) -> Execution:
        return await integration.start(self._session, request, before_send=clearance)

    async def intend(self, departure: Departure) -> str:
        """Return the token of a start whose turn has come."""
        await self._in_callers_loop(departure.due())
        return departure.token

    async def post(self, departure: Departure, request: str, *, is_mine: bool) -> _Answer:
        """Start a run, if this very execution of the item intended it."""
        if is_mine:
            return await self._in_callers_loop(self._leave(departure))
        if self._restart_unknown:
            return _answer()
        message = "the process that started it was killed before the answer was recorded"
        error = StartUnknown(message, workflow=json.loads(request)["workflow"], reason=message)
        return _answer(error=error)

    async def _leave(self, departure: Departure) -> _Answer:
        try:
            execution = await departure.leave()
        except SessionClosed as error:
            if error.execution_id is not None:
                return _answer(execution_id=error.execution_id)
            self._give_up_unless_stopping(error)
        except (*_NOT_THE_ITEMS_FAULT, RequestTimeout) as error:  # none of them may have left
            self._give_up_unless_stopping(error)
        except ExecutionTimeout:
            pass  # its turn did not come
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the item's
            return _answer(error=error)
        else:
            if execution is not None:
                return _answer(execution_id=execution.id)
        return _answer()

    async def _outcome(self, key: str, answer: _Answer) -> StoredOutcome:
        at = datetime.fromisoformat(answer["at"])
        if answer["execution_id"] is None:
            error = StoredError(*(answer["error"] or ("", "")))
            return StoredOutcome(key, None, False, None, error, None, at)
        execution_id = answer["execution_id"]
        try:
            output = await self._output(execution_id)
            outcome = StoredOutcome(key, execution_id, True, output, None, at, _now())
            outcome.to_json()  # one that cannot be stored has failed
        except _NOT_THE_ITEMS_FAULT as error:
            self._give_up_unless_stopping(error)
            await _park()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the item's
            what = StoredError(type(error).__name__, str(error))
            return StoredOutcome(key, execution_id, False, None, what, at, _now())
        return outcome

    async def _output(self, execution_id: int) -> Any:
        # Not since it was started: that was perhaps on a machine whose clock is another.
        give_up = time.monotonic() + _NEWBORN
        while True:
            try:
                return await self._session.execution(execution_id).output()
            except NotFound:
                if time.monotonic() > give_up:
                    raise
            await asyncio.sleep(_CHECK)

    def _give_up_unless_stopping(self, error: Exception) -> None:
        if not self._is_stopping:
            self._give_up(error)

    async def _in_callers_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


_worker: Worker | None = None
_SILENCE = logging.NullHandler()


@DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
async def _item(key: str, attempt: int, request: str) -> None:
    if _worker is None:
        await _park()
    await _worker.carry_out(key, attempt, request)


@DBOS.step(name="intend")
async def _intend(worker: Worker, departure: Departure) -> str:
    """Record who is about to start the run: a replay returns the token of an earlier execution."""
    return await worker.intend(departure)


@DBOS.step(name="start")
async def _post(worker: Worker, departure: Departure, request: str, *, is_mine: bool) -> _Answer:
    return await worker.post(departure, request, is_mine=is_mine)


def _answer(*, execution_id: int | None = None, error: Exception | None = None) -> _Answer:
    what = None if error is None else [type(error).__name__, str(error)]
    return {"execution_id": execution_id, "at": _now().isoformat(), "error": what}


def _now() -> datetime:
    return datetime.now(UTC)


async def _park() -> NoReturn:
    """Leave an item as it is, for whoever comes next: this process stops working on it."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody ends it but the loop's end")
