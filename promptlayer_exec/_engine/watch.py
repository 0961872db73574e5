"""The poller of one execution, without HTTP."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from promptlayer_exec._api.attempt import Priority
from promptlayer_exec._api.messages import Reply
from promptlayer_exec._api.runs import NodeMap
from promptlayer_exec._engine.backplane import SharedPolls
from promptlayer_exec._engine.lifetime import Lifetime
from promptlayer_exec._engine.retry import RetryState
from promptlayer_exec._engine.schedule import Schedule
from promptlayer_exec._engine.snapshots import take_snapshot
from promptlayer_exec._engine.tasks import Alarm, clock, resolve
from promptlayer_exec._engine.waiter import Waiter, timed_out
from promptlayer_exec._values.errors import PromptLayerExecError, SessionClosed, copy_error
from promptlayer_exec._values.events import (
    Emit,
    Polled,
    WakeSource,
    WatchEnded,
    WatchStarted,
    WatchWoken,
    logger,
)
from promptlayer_exec._values.models import Snapshot
from promptlayer_exec._values.policies import Deadline, PollPolicy, RetryPolicy

if TYPE_CHECKING:
    from promptlayer_exec._push.channels import PushedRun


class Fetch(Protocol):
    """A function that requests an execution's node map, with retries."""

    async def __call__(
        self,
        retries: RetryState,
        *,
        due: float,
        priority: Priority,
        on_sending: Callable[[bool], object] | None = None,
    ) -> Reply[NodeMap]:
        """Return the response to a request due at `due`, on the loop's clock.

        The rest is the same as for an `Attempt`.
        """


class Watch:
    """Polls one execution while somebody waits for it.

    Attributes:
        latest: the latest snapshot.
        error: the error that stopped the watch.
        retries: the failures since the last good poll.
    """

    def __init__(
        self,
        execution_id: int,
        fetch: Fetch,
        *,
        lifetime: Lifetime,
        poll: PollPolicy,
        retry: RetryPolicy,
        pushed: PushedRun | None,
        shared: SharedPolls | None,
        emit: Emit,
        on_end: Callable[[Watch], None],
        workflow: str | int | None,
        base_url: str,
    ) -> None:
        self.execution_id = execution_id
        self.latest: Snapshot | None = None
        self.error: Exception | None = None
        self._retry = retry
        self.retries = self._no_failures()

        self._fetch = fetch
        self._lifetime = lifetime
        self._pushed = pushed
        self._shared = shared
        self._emit = emit
        self._on_end = on_end
        self._workflow = workflow

        self._waiters: dict[Waiter, None] = {}  # in the order of arrival
        self._has_false_wakes = False
        self._started = clock()
        self._schedule = Schedule(poll)
        self._alarm = Alarm()

        if pushed is not None:
            pushed.channel.attach(self._alarm.recheck)
        self._task = lifetime.spawn(
            self._run(base_url), name=f"promptlayer_exec.Watch {execution_id}"
        )
        self._task.add_done_callback(self._ended)

    # Called by the waiters.

    def join(self, deadline: Deadline, *, streams: bool = False) -> Waiter:
        """Add a waiter. One that `streams` wants every snapshot, not only the complete one."""
        waiter = Waiter(deadline, streams)
        self._waiters[waiter] = None
        self._alarm.recheck()
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Remove a waiter. Polling stops after the last one."""
        del self._waiters[waiter]
        if not self._waiters:
            self._on_end(self)
            self._task.cancel()

    async def next(self, waiter: Waiter, seen: Snapshot | None = None) -> Snapshot:
        """Wait for a snapshot other than `seen` that the waiter wants, or raise the error."""
        while (snapshot := self.look(waiter, seen)) is None:
            await self._wait(waiter)
        return snapshot

    def look(self, waiter: Waiter, seen: Snapshot | None) -> Snapshot | None:
        """Do what `next` does, or return None if it would have to wait."""
        is_late = clock() >= waiter.deadline.at
        new = None if self.latest is seen else self.latest
        if new is not None and (new.complete or (waiter.streams and not is_late)):
            return new

        if is_late:
            cause = self.error or self.retries.error
            raise timed_out(self.execution_id, waiter.deadline, self.latest, cause) from cause
        if self.error is not None:
            raise copy_error(self.error)  # a traceback belongs to one task
        return None

    async def _wait(self, waiter: Waiter) -> None:
        self._lifetime.check_loop()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        waiter.wake = partial(resolve, future)
        timer = None
        if waiter.deadline.at < math.inf:
            timer = loop.call_at(waiter.deadline.at, resolve, future)
        try:
            await future
        finally:
            waiter.wake = None
            if timer is not None:
                timer.cancel()

    def _no_failures(self) -> RetryState:
        outage = self._retry.watch_outage
        return RetryState(self._retry, outage, self._notify, self._last_deadline)

    def _last_deadline(self) -> float:
        return max((waiter.deadline.at for waiter in self._waiters), default=math.inf)

    def _notify(self, *, ended: bool = False) -> None:
        for waiter in self._waiters:
            if waiter.wake is not None and (ended or waiter.streams):
                waiter.wake()

    # These may change the time of the next poll.

    def wake(self, source: WakeSource) -> None:
        """Poll now, or once more if a poll is in flight. Many wake-ups lead to a single poll."""
        self._schedule.wake(source)
        self._alarm.recheck()

    def stream_elsewhere(self) -> None:
        """For a while, poll as for a stream, because another process has one."""
        self._schedule.stream_elsewhere()
        self._alarm.recheck()

    def _streams(self) -> bool:
        return any(waiter.streams for waiter in self._waiters)

    def _due(self) -> float:
        return self._schedule.due(self._waiters, self._pushed)

    # The task.

    async def _run(self, base_url: str) -> None:
        """Poll until the execution is complete, the last waiter leaves, or a poll fails."""
        error: Exception | None = None

        try:
            self._emit(WatchStarted(self.execution_id, self._workflow, base_url))
            is_complete = False
            while not is_complete:
                due = await self._alarm.sleep_until(self._due)
                source = self._schedule.begin()
                if source is not None:
                    self._emit(WatchWoken(self.execution_id, source))
                is_complete = await self._poll_once(due, woken=source is not None)
        except asyncio.CancelledError:
            error = SessionClosed() if self._waiters else None
        except Exception as failure:  # noqa: BLE001 - raised to the waiters
            error = failure

        self._report_end(error)

    async def _poll_once(self, due: float, *, woken: bool) -> bool:
        """Poll, and return True if the execution is complete."""
        # A separate method, which frees a poll's locals while the watch sleeps.
        reply = await self._request(due, self._priority(woken=woken))
        if self.retries.failures:
            self.retries = self._no_failures()

        previous, elapsed = self.latest, clock() - self._started
        snapshot = take_snapshot(self.execution_id, reply, elapsed=elapsed, previous=previous)
        announced = self._retry.announced(reply.retry_after)
        self._schedule.polled(snapshot, previous, announced=announced, shared=reply.shared)

        # A true wake-up would have found the execution complete.
        is_false_wake = woken and not reply.shared and not snapshot.complete
        self._has_false_wakes |= is_false_wake
        if self._pushed is not None:
            self._pushed.polled(
                reply.sent_at,
                waited=reply.lateness,
                complete=snapshot.complete,
                false_wake=is_false_wake,
            )

        self.latest = snapshot
        self._notify(ended=snapshot.complete)
        self._emit(
            Polled(
                self.execution_id,
                snapshot,
                duration=reply.duration,
                lateness=reply.lateness,
                body_bytes=reply.body_bytes,
                shared=reply.shared,
            )
        )
        return snapshot.complete

    def _priority(self, *, woken: bool) -> Priority:
        if woken and not self._has_false_wakes:
            return Priority.URGENT
        return Priority.FIRST if self.latest is None else Priority.REPEATED

    async def _request(self, due: float, priority: Priority) -> Reply[NodeMap]:
        if self._shared is None:
            return await self._fetch(self.retries, due=due, priority=priority)
        poll = partial(self._fetch, self.retries, priority=priority)
        return await self._shared.next_answer(poll, due=due, streams=self._streams)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._pushed is not None:
            self._pushed.channel.release(self._alarm.recheck)
        if self._shared is not None:
            self._shared.end()
        if task.cancelled():  # before its first step
            self._fail(SessionClosed())

    def _fail(self, error: Exception) -> None:
        if isinstance(error, PromptLayerExecError):
            error.execution_id = self.execution_id
            error.last_snapshot = self.latest
        else:
            error.add_note(f"while watching execution {self.execution_id}")
        self.error = error
        self._on_end(self)
        self._notify(ended=True)

    def _report_end(self, error: Exception | None) -> None:
        elapsed = clock() - self._started
        latest = self.latest

        succeeded, state = None, "no longer followed"
        if error is not None:
            self._fail(error)
            state = f"the watch failed with {type(error).__name__}"
        elif latest is not None and latest.complete:
            succeeded, state = latest.succeeded, "complete"

        polls = 0 if latest is None else latest.poll
        times = f"{polls} poll{'s' * (polls != 1)} in {elapsed:.1f} s"
        logger.info("execution %d: %s (%s)", self.execution_id, state, times)

        self._emit(
            WatchEnded(
                self.execution_id,
                polls=polls,
                elapsed=elapsed,
                error=error,
                succeeded=succeeded,
                workflow=self._workflow,
            )
        )
