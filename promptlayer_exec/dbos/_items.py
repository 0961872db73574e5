"""The path of an item, from the queue to its outcome.

DBOS stores that an item is to be run, and which worker runs it:

1. `Store.add` stores the item and enqueues its DBOS workflow, in one transaction.
2. DBOS dequeues the workflow in a worker, which calls `Items.run`.
3. `_send` waits for a slot. When the connection stands and nothing has been written to
   it, the intent is recorded in the item's row (`PendingStart.before_send`), and then the request
   is sent. The execution id is recorded there, too. A request that provably started nothing is
   sent again, and its intent is taken back while it waits.
4. `_follow` waits until the execution is complete, and `Store.finish` stores the outcome.

If the worker dies, another one follows the execution whose id is recorded. If only an intent is
recorded, the request may have been sent: the item is unknown, or is started again with
`restart_unknown`. Rows are read and written for many items at a time: a step of DBOS would take
eight round trips for each.

Only what uses the session runs in the caller's event loop; the rest runs in DBOS's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import attrs

from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    ExecutionFailed,
    ExecutionTimeout,
    NotFound,
    PromptLayerExecError,
    RateLimited,
    RequestError,
    RequestTimeout,
    Session,
    SessionClosed,
    StartRequest,
    StartUnknown,
    StatusError,
    Unauthorized,
)
from promptlayer_exec import _integration as integration
from promptlayer_exec.dbos import _again as again
from promptlayer_exec.dbos import _callbacks as callbacks
from promptlayer_exec.dbos import _intents as intents
from promptlayer_exec.dbos._breaker import FAILURES, Breaker
from promptlayer_exec.dbos._connector import PATIENCE_AT_END
from promptlayer_exec.dbos._groups import Group
from promptlayer_exec.dbos._intents import Intent, Started, State
from promptlayer_exec.dbos._names import workflow_id
from promptlayer_exec.dbos._pending import IntentRefused, Item, PendingStart, unknown_start
from promptlayer_exec.dbos._requests import digest_of
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import Ending
from promptlayer_exec.dbos._values import StartResult, StoredError, StoredOutcome, start_result

T = TypeVar("T")

logger = logging.getLogger("promptlayer_exec")
# Seconds for which the server may answer 404 for an execution that was started.
_NOT_FOUND_GRACE = 60.0
# Seconds between two reads of an execution about which the server says nothing.
_FIRST_DELAY = 1.0
_LONGEST_DELAY = 30.0
# Seconds after which an id that is not recorded yet is logged although the database can be reached.
_SLOWLY_RECORDED_WITHIN = 30.0
# Errors of a start or a poll that every other item would meet, too.
_NOT_THE_ITEMS_FAULT = (Unauthorized, ConnectionFailed, RateLimited, SessionClosed)
_ACCOUNT_STATUSES = (402, 403)


@attrs.define(eq=False, repr=False)
class Items:
    """Runs items; `run` is called in DBOS's event loop, and the session is in another one.

    Attributes:
        active: the DBOS workflows of the items that run, and what is set when they end.
        waiting: the errors of workflows whose end the server has not reported for too long.
        pending: the starts that have no recorded result yet.
    """

    _store: Store
    _batch: str
    _session: Session
    _executor: str
    _restart_unknown: bool
    _stop: Callable[[Exception], None]  # ends the work with an error
    _loop: asyncio.AbstractEventLoop = attrs.field(factory=asyncio.get_running_loop)
    active: dict[str, asyncio.Event] = attrs.field(init=False, factory=dict)
    waiting: dict[str, Exception] = attrs.field(init=False, factory=dict)
    pending: set[PendingStart] = attrs.field(init=False, factory=set)
    _intents: Group[Intent, bool] = attrs.field(init=False)
    _states: Group[tuple[str, int], State] = attrs.field(init=False)
    _started: Group[Started, bool] = attrs.field(init=False)
    _endings: Group[Ending, bool] = attrs.field(init=False)
    _starts: Breaker = attrs.field(init=False)
    _patience: float = attrs.field(init=False)
    # When the server last said how an execution ended, and about which it said nothing since.
    _answered_at: float = attrs.field(init=False, default=float("-inf"))
    _unanswered: set[int] = attrs.field(init=False, factory=set)
    _has_warned: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        policy = integration.settings(self._session).retry
        self._intents = Group(
            partial(intents.write, self._store, self._batch, worker=self._executor)
        )
        self._states = Group(partial(intents.read, self._store, self._batch, worker=self._executor))
        self._started = Group(partial(intents.write_started, self._store, self._batch))
        self._endings = Group(self._store_endings, lambda ending: len(ending.outcome))
        self._starts = Breaker(policy.outage, self._end, self._loop.time)
        self._patience = float("inf") if policy.watch_outage is None else policy.watch_outage

    async def run(self, item: Item) -> None:
        """Run an item until its outcome is stored."""
        workflow = workflow_id(self._batch, item.key, item.attempt)
        # A worker that stood still may be given an item again that it still runs.
        while (earlier := self.active.get(workflow)) is not None:
            await earlier.wait()
        ended = self.active[workflow] = asyncio.Event()
        try:
            is_stored = False
            while not is_stored:  # another worker may have started it meanwhile
                token = integration.start_token(self._session)
                pending = PendingStart(item, self._intents, token)
                started = await self._start(item, pending)
                if started is None:
                    return  # it has an outcome, or another worker, or a later attempt
                if pending.is_refused:
                    continue
                outcome = await self._in_callers_loop(self._follow(item, started))
                intent, of_another = pending.recorded_intent, pending.replaced
                ending = Ending.of(item.attempt, outcome, intent, of_another=of_another)
                is_stored = await self._endings.add(ending)
                is_stored = is_stored or item.started is not None
        except Exception as error:  # noqa: BLE001 - DBOS would end the item with it
            self._end(error)
            await suspend()
        finally:
            del self.active[workflow]
            ended.set()

    def close(self) -> None:
        """Send no start any more, whatever is still taken from the queue."""
        self._starts.close()

    def _end(self, error: Exception) -> None:
        """End the work with an error, and send no start any more."""
        self.close()
        self._stop(error)

    def _store_endings(self, endings: list[Ending]) -> list[bool]:
        stored = callbacks.finish(self._store, self._batch, endings)
        return [(ending.key, ending.attempt) in stored for ending in endings]

    async def _start(self, item: Item, pending: PendingStart) -> StartResult | None:
        self.pending.add(pending)
        try:
            return await self._start_in_row(item, pending)
        except BaseException:
            self._report_unrecorded(item, pending)
            raise
        finally:
            pending.recorded()
            self.pending.discard(pending)
            self._loop.call_soon_threadsafe(pending.cancel)

    async def _start_in_row(self, item: Item, pending: PendingStart) -> StartResult | None:
        state = await self._states.add((item.key, item.attempt))
        if not state.is_open:
            return None
        if state.digest != digest_of(item.request):
            raise ConfigurationError(
                f"item {item.key!r:.100} of batch {self._batch!r} has another request in DBOS than"
                " in the table of items. If two schemas of one database share DBOS's, use one."
                " Otherwise, an earlier batch of this name left it behind: delete the batch and"
                " add it again"
            )
        # An item that was started before is only followed.
        started = item.started or json.loads(state.started or "null")
        if started is not None:
            return cast("StartResult", started)
        if state.intent is not None:  # of a worker that may have sent the start
            if state.called_back is not None:  # it has
                result = start_result(state.called_back)
                return await self._record(item, pending, state.intent, result)
            pending.replaced = state.intent
            if not self._restart_unknown:
                return unknown_start(item)
        result = await self._send(item, pending)
        if result["execution_id"] is None:
            return result
        return await self._record(item, pending, pending.token, result)

    async def _record(
        self, item: Item, pending: PendingStart, token: str, result: StartResult
    ) -> StartResult:
        start = Started(item.key, item.attempt, token, json.dumps(result))
        if not await self._started.add(start):
            pending.is_refused = True
            await self._rescue(item, pending)
        return result

    async def _send(self, item: Item, pending: PendingStart) -> StartResult:
        try:
            result = await self._in_callers_loop(self._send_pending(item, pending))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            pending.settled.set()
            await suspend()  # the start was cancelled, because the worker stops
        except Exception as error:  # noqa: BLE001 - DBOS would store it as the result
            pending.settled.set()
            self._end(error)
            await suspend()
        if result["execution_id"] is not None:
            answered_at = self._loop.time()
            pending.warn_if_late(partial(self._report_late, item, pending, answered_at))
        return result

    def _report_late(self, item: Item, pending: PendingStart, answered_at: float) -> None:
        is_late = self._loop.time() - answered_at >= _SLOWLY_RECORDED_WITHIN
        connector = self._store.connector
        if is_late or connector.is_failing or connector.longest_use >= PATIENCE_AT_END:
            self._report_unrecorded(item, pending)

    async def _send_pending(self, item: Item, pending: PendingStart) -> StartResult:
        """Send a start, in a slot of its own each time, until it has a result."""
        pending.task = asyncio.current_task()
        request = self._to_send(item)
        while not pending.is_cancelled:
            pause = 0.0
            async with self._starts.slot() as since:
                result: StartResult | None = None
                try:
                    execution = await integration.start(
                        self._session, request, hooks=pending, token=pending.token
                    )
                except IntentRefused:
                    result = start_result()
                except ExecutionTimeout as error:  # not sent within the session's `wait_timeout`
                    pause = _FIRST_DELAY
                    self._warn_of_late_start(item.key, error)
                    cause = error.__cause__
                    # Otherwise the rate is to blame, or the server said how long to wait.
                    if isinstance(cause, RequestError) and not _is_announced(cause):
                        self._starts.failed(cause, since=since)
                    with suppress(ConfigurationError):  # then the item is unknown
                        await pending.not_sent()
                except Exception as error:  # noqa: BLE001 - some are the item's
                    result = await self._judge(pending, request, error, since)
                else:
                    self._starts.succeeded()
                    pending.execution = execution
                    result = start_result(execution.id)
                if result is not None:
                    return result
            await asyncio.sleep(pause)
        raise asyncio.CancelledError

    def _warn_of_late_start(self, key: str, error: ExecutionTimeout) -> None:
        """Log the first start that is not sent in time: all may have to wait for the rate."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "item %.100r was not started in time, and is tried again, as any other: %s",
                key,
                integration.log_text(error),
            )

    async def _judge(
        self, pending: PendingStart, request: StartRequest, error: Exception, since: float
    ) -> StartResult | None:
        """Return the result of a start that failed; None if it is to be tried again."""
        if isinstance(error, StartUnknown):
            cause = error.__cause__
            self._starts.failed(cause if isinstance(cause, RequestError) else error, since=since)
            return start_result(error=error)
        if isinstance(error, SessionClosed) and error.execution_id is not None:
            pending.execution = self._session.execution(error.execution_id)
            return start_result(error.execution_id)
        with suppress(ConfigurationError):  # then the item is unknown
            await pending.not_sent()
        if isinstance(error, StatusError) and error.status in _ACCOUNT_STATUSES:
            self._starts.failed(error, since=since)
            return start_result(error=error) if pending.is_refused_alone(self._starts) else None
        if not _is_the_items(error):
            if self._cannot_be_sent(request) or (
                type(error) is ValueError and await integration.lacks_inputs(self._session, request)
            ):
                return start_result(error=error)  # the server has said nothing
            self._starts.close()
            raise error
        self._starts.succeeded()
        return start_result(error=error)

    def _cannot_be_sent(self, request: StartRequest) -> bool:
        """Return True if the request itself cannot be sent; a limiter can raise the same errors."""
        try:
            integration.encode_inputs(self._session, request)
        except (TypeError, ValueError):
            return True
        return False

    def _to_send(self, item: Item) -> StartRequest:
        """Return a stored request with metadata by which its run can be found in PromptLayer."""
        stored = StartRequest(**json.loads(item.request), key=item.key)
        ours = {"promptlayer_exec.batch": self._batch, "promptlayer_exec.key": item.key}
        return attrs.evolve(stored, metadata={**(stored.metadata or {}), **ours})

    async def _rescue(self, item: Item, pending: PendingStart) -> None:
        """Keep the id of a run whose start could not be recorded."""
        if pending.execution is not None:
            adopt = partial(again.adopt, self._store, self._batch, request=item.request)
            adopt = partial(adopt, key=item.key, attempt=item.attempt, token=pending.token)
            started = start_result(pending.execution.id)
            with suppress(ConfigurationError):
                if await asyncio.to_thread(adopt, started=started):
                    logger.warning(
                        "execution %d was started for item %.100r while another worker took the"
                        " item over; it is followed",
                        pending.execution.id,
                        item.key,
                    )
                    return
        self._report_unrecorded(item, pending)

    def _report_unrecorded(self, item: Item, pending: PendingStart) -> None:
        if pending.execution is None or pending.is_reported:
            return
        pending.is_reported = True
        text = (
            f"execution {pending.execution.id} was started for item {item.key!r:.1000} of batch"
            f" {self._batch!r}, but the database could not record it yet: keep this line"
        )
        logger.error("%s", text)
        if logger.hasHandlers() and not _logs_to_stderr():
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - the id must not get lost

    async def _follow(self, item: Item, started: StartResult) -> StoredOutcome:
        key = item.key
        at = datetime.fromisoformat(started["at"])
        execution_id = started["execution_id"]
        if execution_id is None:
            error = StoredError(*(started["error"] or ("", "")))
            return StoredOutcome(key, None, False, None, error, None, at)
        try:
            output = await self._output(item, execution_id)
            outcome = StoredOutcome(key, execution_id, True, output, None, at, _now())
            outcome.to_json()  # an output that cannot be stored is an error of the item
        except (ExecutionFailed, NotFound, RecursionError) as failure:
            stored = StoredError(type(failure).__name__, str(failure))
            outcome = StoredOutcome(key, execution_id, False, None, stored, at, _now())
        self._answered()
        return outcome

    async def _output(self, item: Item, execution_id: int) -> Any:
        """Return the output; raises only what the server said about how the execution ended."""
        workflow = workflow_id(self._batch, item.key, item.attempt)
        of = json.loads(item.request)["workflow"]
        clock = self._loop.time
        failing_since: float | None = None
        unknown_since: float | None = None
        delay = _FIRST_DELAY
        try:
            while True:
                try:
                    # Another worker may have started it.
                    integration.expect(self._session, of, execution_id)
                    return await self._session.execution(execution_id).output()
                except ExecutionFailed:
                    raise
                except ExecutionTimeout as error:
                    failing_since = unknown_since = None
                    delay = _FIRST_DELAY
                    self._wait_for(item.key, workflow, error)
                except NotFound:
                    unknown_since = unknown_since or clock()
                    if clock() - unknown_since >= _NOT_FOUND_GRACE:
                        raise
                except (Unauthorized, SessionClosed) as error:
                    self._end(error)
                    await suspend()
                except RequestError as error:
                    unknown_since = None
                    # After several attempts, the session's own patience is used up.
                    spent = self._patience if error.attempts > 1 else 0.0
                    failing_since = failing_since or clock() - spent
                    self._not_answered(execution_id, error)
                    if clock() - failing_since >= self._patience:
                        if self._answered_at < failing_since:
                            self._end(error)
                            await suspend()
                        self._wait_for(item.key, workflow, error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY)
        finally:
            self.waiting.pop(workflow, None)

    def _answered(self) -> None:
        self._answered_at = self._loop.time()
        self._unanswered.clear()
        self._starts.hold(False)

    def _not_answered(self, execution_id: int, error: RequestError) -> None:
        if execution_id in self._unanswered:
            return  # one alone keeps no other item waiting
        self._unanswered.add(execution_id)
        if len(self._unanswered) == FAILURES:
            logger.warning(
                "the server does not say how executions ended, so no item is started: %s",
                integration.log_text(error),
            )
            self._starts.hold(True)

    def _wait_for(self, key: str, workflow: str, error: PromptLayerExecError) -> None:
        if workflow not in self.waiting:
            text = "item %.100r has to wait, and is still followed: %s"
            logger.warning(text, key, integration.log_text(error))
        self.waiting[workflow] = error

    async def _in_callers_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


async def suspend() -> NoReturn:
    """Wait until DBOS ends: the item stays as it is stored, for the next worker."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("this future is never done")


def _is_announced(error: RequestError) -> bool:
    """Return True if the server said how long to wait, which is no outage."""
    return isinstance(error, StatusError) and error.retry_after is not None


def _is_the_items(error: Exception) -> bool:
    """Return True if a start was refused because of the item."""
    if isinstance(error, (*_NOT_THE_ITEMS_FAULT, RequestTimeout, ConfigurationError)):
        return False
    return isinstance(error, RequestError)


def _now() -> datetime:
    return datetime.now(UTC)


def _logs_to_stderr() -> bool:
    """Return True if a handler of the logger writes to standard error."""
    source: logging.Logger | None = logger
    while source is not None:
        for handler in source.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
                return True
        source = source.parent if source.propagate else None
    return False
