"""The path of an item, from the queue to its outcome.

DBOS stores which items to run, and which worker runs each:

1. `Store.add` stores the item and enqueues its DBOS workflow, in one transaction.
2. DBOS dequeues the workflow in a worker, which calls `Items.run`.
3. `_send` waits for a slot. When the connection is open, and before the session writes anything to
   it, `PendingSend.before_send` records the intent in the item's row. Then the session sends the
   request. `PendingSend.ended` records the execution id in the same row, even if nobody waits for
   it any more. The session resends a request that provably started nothing. Until then, the intent
   is gone from the row.
4. `Following` waits until the run has ended, whatever the server responds, and `Store.finish`
   stores the outcome.

If the worker dies, another one follows the execution whose id is in the row. If the row has only an
intent, the request may have left, so the item is unknown. A worker reads and writes the rows of
many items at a time: a step of DBOS would take eight round trips for each.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from functools import partial
from typing import Any, cast

import attrs

from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    ExecutionFailed,
    ExecutionTimeout,
    InvalidInputs,
    RateLimited,
    RequestError,
    RequestTimeout,
    Session,
    SessionClosed,
    StartRequest,
    StartUnknown,
    StatusError,
    StoreUnavailable,
    Unauthorized,
)
from promptlayer_exec import _integration as integration
from promptlayer_exec._database.threads import Group
from promptlayer_exec.dbos import _intents as intents
from promptlayer_exec.dbos import _requeue as requeue
from promptlayer_exec.dbos._breaker import Breaker, Probes
from promptlayer_exec.dbos._following import FollowedRun, Following, RunEnd
from promptlayer_exec.dbos._intents import Intent, IntentRefused, Item, PendingSend, SendResult
from promptlayer_exec.dbos._records import (
    Ending,
    StartRecord,
    StoredError,
    StoredOutcome,
    start_record,
    stored_error,
)
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import workflow_id

# A run that a worker takes over, and finds over within this time, ended before.
_FIRST_LOOK = timedelta(seconds=5)

logger = logging.getLogger("promptlayer_exec")
# Errors of a request that every other item would also meet.
_NOT_THE_ITEMS_FAULT = (
    *(Unauthorized, ConnectionFailed, RateLimited, RequestTimeout),
    *(SessionClosed, ConfigurationError, StoreUnavailable),
)


@attrs.frozen
class Patience:
    """How long a worker waits for a start request and for the database, in seconds.

    A start request that was not sent in time is repeated after `restart_delay`.

    If an id is not in its row after `recorded_within`, the worker logs it, because the process may
    be killed. If it already noticed that the database is away, it does so after `look_after`.

    Rows wait `gather` for others that join their transaction, three times for each item. Ids of
    runs do not: they are paid for, and a process that is killed meanwhile would lose them.
    """

    restart_delay: float = 1.0
    recorded_within: float = 10.0
    look_after: float = 0.5
    gather: float = 0.02


PATIENCE = Patience()


@attrs.define(eq=False, repr=False)
class Items:
    """Runs the items of one worker, in the event loop of the session.

    Attributes:
        active: the DBOS workflows of the running items, and the tasks that run them.
        following: the runs that it follows.
    """

    _store: Store
    _batch: str
    _session: Session
    _stop: Callable[[Exception], None]  # stops the work with an error
    following: Following
    active: dict[str, asyncio.Task[Any]] = attrs.field(init=False, factory=dict)
    _pending: set[PendingSend] = attrs.field(init=False, factory=set)
    _intents: Group[Intent, bool] = attrs.field(init=False)
    _read: Group[tuple[str, int], Item | None] = attrs.field(init=False)
    _started: Group[SendResult, bool] = attrs.field(init=False)
    _endings: Group[Ending, bool] = attrs.field(init=False)
    _starts: Breaker = attrs.field(init=False)
    _probes: Probes = attrs.field(init=False)
    _reported: set[int] = attrs.field(init=False, factory=set)
    _is_closing: bool = attrs.field(init=False, default=False)
    _has_warned: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        policy = integration.settings(self._session).retry
        self._starts = Breaker(policy.outage, self._end)
        self._probes = Probes(self._end)

        store, batch, gather = self._store, self._batch, PATIENCE.gather
        self._read = Group(partial(intents.read, store, batch), gather=gather)
        self._intents = Group(partial(intents.write, store, batch), gather=gather)
        self._started = Group(partial(intents.write_started, store, batch))
        finish = partial(requeue.finish, store, batch)
        self._endings = Group(finish, lambda ending: len(ending.outcome), gather=gather)

    async def run(self, key: str, attempt: int) -> bool:
        """Run an attempt of an item. Return False if the next worker must run it again."""
        workflow = workflow_id(self._batch, key, attempt)
        # A worker that stood still may get an item again that it is still running.
        while (earlier := self.active.get(workflow)) is not None:
            await asyncio.wait([earlier])

        self.active[workflow] = cast("asyncio.Task[Any]", asyncio.current_task())
        try:
            await self._run(key, attempt)
        except (IntentRefused, _Closing):
            return False
        except Exception as error:  # noqa: BLE001 - DBOS would end the item with it
            self._end(error)
            return False
        else:
            return True
        finally:
            self._probes.leave(workflow)
            del self.active[workflow]

    def let_go(self, workflows: Iterable[str]) -> None:
        """Stop following the runs of items that somebody has given up or deleted."""
        for workflow in workflows:
            if workflow in self.active:
                self.following.let_go(self.active[workflow])

    async def close(self) -> None:
        """Stop sending requests and following executions, but record the responses that are due."""
        self._is_closing = True
        running = {*self.active.values()}
        sending = {start.task for start in self._pending}
        for task in running - sending:
            task.cancel()
        for start in self._pending:
            start.cancel()

        while running:
            _, running = await asyncio.wait(running, timeout=self._store.patience)
            if self._store.unavailable_for > self._store.patience:
                self._store.ended.set()

    def _end(self, error: Exception) -> None:
        """Stop the work with an error, and send no more starts."""
        self._is_closing = True
        self._stop(error)

    async def _run(self, key: str, attempt: int) -> None:
        while True:  # another worker may meanwhile record a run
            self._check_open()
            item = await self._read.add((key, attempt))
            if item is None:
                return  # it has an outcome, or a later attempt
            started = await self._start(item)
            if started is None:
                return

            followed = await self._follow(item, started)
            if followed is None:
                continue  # somebody gave it up, or deleted it
            outcome, end = followed
            follows_again = started.get("followed_from") is not None
            ending = Ending.of(attempt, outcome, follows_again=follows_again)
            if end is not None and not end.is_seen:
                ending = attrs.evolve(ending, seconds=None)
            is_stored = await self._endings.add(ending)
            self._note_end(item, end)
            if is_stored:
                return

    def _note_end(self, item: Item, end: RunEnd | None) -> None:
        if end is None:
            return
        if end.is_refused:
            self._probes.refused(self._workflow(item), cast("Exception", end.error))
        elif end.error is None or isinstance(end.error, ExecutionFailed):
            self._probes.read()

    def _workflow(self, item: Item) -> str:
        return workflow_id(self._batch, item.key, item.attempt)

    def _check_open(self) -> None:
        if self._is_closing:
            raise _Closing

    async def _start(self, item: Item) -> StartRecord | None:
        """Return the result of the request, which may be an earlier one."""
        if item.started is not None:
            return cast("StartRecord", json.loads(item.started))
        if item.intent is not None:  # of a worker that may have sent the request
            if item.called_back is not None:  # it has
                return await self._record(item, item.intent, item.called_back)
            text = "the worker that sent the start request stopped before it recorded the response"
            workflow = json.loads(item.request)["workflow"]
            error = StartUnknown(text, workflow=workflow, reason=text)
            return start_record(self._store.moment(), error=error)

        token = integration.start_token(self._session)
        intent = Intent(item.key, item.attempt, token)
        task = self.active[self._workflow(item)]
        pending = PendingSend(intent, self._intents, task, partial(self._record, item, token))
        self._pending.add(pending)
        try:
            return await self._send(item, pending, token)
        finally:
            self._pending.discard(pending)

    async def _record(self, item: Item, token: str, execution_id: int) -> StartRecord | None:
        """Record the id of a run. Return None if the item continues with another one."""
        result = start_record(self._store.moment(), execution_id)
        row = SendResult(item.key, item.attempt, token, json.dumps(result))
        recording = asyncio.ensure_future(self._started.add(row))
        try:
            await asyncio.wait([recording], timeout=PATIENCE.look_after)
            if not (recording.done() or self._store.unavailable_for):
                await asyncio.wait([recording], timeout=PATIENCE.recorded_within)
            if not recording.done():
                self._report_unrecorded(item, execution_id)
            if await recording:
                return result

            # Another worker has taken over the item, and may have declared it unknown.
            is_followed = await self._store.run_in_thread(
                requeue.record_callback, self._store, self._batch, token, execution_id
            )
            if is_followed:
                text = (
                    "execution %d started for item %.100r while another worker took over the item,"
                    " which now follows this execution"
                )
                integration.warn_of_run(text, execution_id, item.key)
                return None
        except BaseException:
            self._report_unrecorded(item, execution_id)
            raise
        self._report_unrecorded(item, execution_id)
        return None

    async def _send(self, item: Item, pending: PendingSend, token: str) -> StartRecord | None:
        """Send a start request, with a new slot each time, until it has a result."""
        request = self._to_send(item)
        workflow = self._workflow(item)

        while True:
            await self._probes.turn(workflow)
            async with self._starts.slot() as since:
                self._check_open()
                if not self._probes.allows(workflow):
                    continue
                try:
                    await integration.start(self._session, request, hooks=pending, token=token)
                    self._starts.succeeded()
                except IntentRefused:
                    raise
                except Exception as error:  # noqa: BLE001 - some are the item's
                    # Even if the session was closed, a request that it sent may have an id.
                    if pending.recording is None:
                        result = self._judge(item, error, since)
                        if result is not None:
                            return result

            if pending.recording is not None:
                return await pending.recording
            # Without the slot, so that others can use it.
            await asyncio.sleep(PATIENCE.restart_delay)

    def _judge(self, item: Item, error: Exception, since: float) -> StartRecord | None:
        """Return the result of a failed start request, or None to try it again."""
        if isinstance(error, StartUnknown):
            cause = error.__cause__
            self._starts.failed(cause if isinstance(cause, RequestError) else error, since=since)
            return start_record(self._store.moment(), error=error)

        # From here on, nothing was started.
        if isinstance(error, ExecutionTimeout):
            self._note_late_start(item, error, since)
            return None
        if isinstance(error, StatusError):
            is_about_account = error.status in (402, 403)
            if is_about_account or integration.is_from_gateway(error):
                self._starts.failed(error, since=since)
                return None
        if isinstance(error, _NOT_THE_ITEMS_FAULT):
            raise error

        if isinstance(error, RequestError):
            self._starts.succeeded()
        elif not isinstance(error, InvalidInputs):
            raise error
        return start_record(self._store.moment(), error=error)

    def _note_late_start(self, item: Item, error: ExecutionTimeout, since: float) -> None:
        """Handle a request that the session could not send within its `wait_timeout`."""
        if not self._has_warned:  # all may have to wait for the rate
            self._has_warned = True
            text = "could not start item %.100r in time, trying again, as for later ones: %s"
            logger.warning(text, item.key, integration.log_text(error))

        # Otherwise the rate is to blame, or the server asked to wait.
        cause = error.__cause__
        if isinstance(cause, RequestError) and getattr(cause, "retry_after", None) is None:
            self._starts.failed(cause, since=since)

    def _to_send(self, item: Item) -> StartRequest:
        """Return a stored request, with metadata to find its run in PromptLayer."""
        stored = StartRequest(**json.loads(item.request), key=item.key)
        ours = {"promptlayer_exec.batch": self._batch, integration.KEY_METADATA: item.key}
        return attrs.evolve(stored, metadata={**(stored.metadata or {}), **ours})

    def _report_unrecorded(self, item: Item, execution_id: int) -> None:
        if execution_id not in self._reported:
            self._reported.add(execution_id)
            subject = f"item {item.key!r:.1000} of batch {self._batch!r}"
            integration.report_unrecorded(execution_id, subject)

    async def _follow(
        self, item: Item, started: StartRecord
    ) -> tuple[StoredOutcome, RunEnd | None] | None:
        """Return the outcome of an item, and how its run ended, if there is one.

        Return None if the item is no longer this worker's.
        """
        key = item.key
        at = datetime.fromisoformat(started["at"])
        execution_id = started["execution_id"]
        if execution_id is None:
            error = StoredError(*(started["error"] or ("", "")))
            return StoredOutcome(key, None, False, None, error, None, at), None

        self._check_open()
        run = FollowedRun(
            json.loads(item.request)["workflow"],
            execution_id,
            at,
            datetime.fromisoformat(started.get("followed_from") or started["at"]),
        )
        began = self._store.moment()
        end = await self.following.end(run)
        if end is None:
            return None

        now = self._store.moment()
        if began - at > _FIRST_LOOK and now - began < _FIRST_LOOK:
            end = attrs.evolve(end, is_seen=False)

        stored = None if end.error is None else stored_error(end.error)
        outcome = StoredOutcome(key, execution_id, stored is None, end.output, stored, at, now)
        try:
            outcome.to_json()
        except RecursionError as error:  # nobody can store that output
            stored = stored_error(error)
            outcome = StoredOutcome(key, execution_id, False, None, stored, at, now)
        return outcome, end


class _Closing(Exception):
    """The work is stopping, so this item is neither started nor followed."""
