"""One poller for one execution, and any number of followers. It knows no HTTP."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from random import random
from typing import TYPE_CHECKING, Any, Protocol, cast

import attrs

from promptlayer_exec._engine.retry import RetryState
from promptlayer_exec._engine.tasks import (
    PatientTimer,
    clock,
    foreign_cancellation,
    is_cancelled,
    resolve,
)
from promptlayer_exec._errors import (
    ExecutionTimeout,
    PromptLayerExecError,
    SessionClosed,
    copy_error,
)
from promptlayer_exec._events import (
    Emit,
    Polled,
    WakeSource,
    WatchEnded,
    WatchStarted,
    WatchWoken,
    logger,
)
from promptlayer_exec._models import FINAL, FrozenMap, Node, NodeStatus, NodeTimes, Snapshot
from promptlayer_exec._policies import Deadline, PollPolicy, RetryPolicy
from promptlayer_exec._push.safety_net import SafetyNet

if TYPE_CHECKING:
    from promptlayer_exec._api.executions import NodeMap, Reply


class Fetch(Protocol):
    """A function that requests an execution's node map, with retries."""

    async def __call__(self, state: RetryState, *, due: float, first: bool) -> Reply[NodeMap]:
        """Return the answer to a request that is due at `due`, on the loop's clock.

        One that goes `first` does not wait for the rate behind others.
        """


def take_snapshot(
    execution_id: int, reply: Reply[NodeMap], *, elapsed: float, previous: Snapshot | None = None
) -> Snapshot:
    """Return the snapshot of a reply; it keeps the node times of the previous snapshot."""
    nodes = reply.value.nodes
    if previous is None:
        poll, times = 1, _first_seen(nodes, {}, elapsed)
    elif nodes is previous.nodes:
        poll, times = previous.poll + 1, previous.times
    else:
        poll, times = previous.poll + 1, _first_seen(nodes, previous.times, elapsed)
    return Snapshot(
        execution_id,
        reply.value.complete,
        nodes,
        raw=reply.value.raw,
        poll=poll,
        elapsed=elapsed,
        times=times,
    )


# The shortest time between two polls after wake-ups, if the policy's floor is longer.
_WAKE_GAP = 0.5
_UNSEEN = NodeTimes()
_RUNNING = NodeStatus.RUNNING
_GONE_NODES = 1000
_NAMES_OF_GONE_NODES = 1_000_000


def _first_seen(
    nodes: Mapping[str, Node], before: Mapping[str, NodeTimes], elapsed: float
) -> Mapping[str, NodeTimes]:
    running = final = None  # made when needed, and shared
    times = {}
    for name, node in nodes.items():
        status = node.status
        if status in FINAL:
            times[name] = final = final or NodeTimes(None, elapsed)
        elif status is _RUNNING:
            times[name] = running = running or NodeTimes(elapsed)
        else:
            times[name] = _UNSEEN
    for name, earlier in before.items():
        now = times.get(name, _UNSEEN)
        first_running = now.running if earlier.running is None else earlier.running
        first_final = now.final if earlier.final is None else earlier.final
        is_news = first_running is not earlier.running or first_final is not earlier.final
        times[name] = NodeTimes(first_running, first_final) if is_news else earlier
    # If node names keep changing, drop the times of the nodes gone longest: they come last.
    gone = len(times) - len(nodes)
    length = sum(map(len, times)) if gone else 0
    while gone > _GONE_NODES or (gone and length > _NAMES_OF_GONE_NODES):
        length -= len(times.popitem()[0])
        gone -= 1
    return FrozenMap(times)


# What each follower waits on, and until when.
Waiters = dict[asyncio.Future[None], Deadline]


@attrs.define(eq=False)
class Watch:
    """Polls one execution while it has followers.

    With a safety net it polls seldom, while push stands and nobody streams snapshots.
    """

    execution_id: int
    _fetch: Fetch
    _poll: PollPolicy
    _retry: RetryPolicy
    _emit: Emit
    _on_end: Callable[[Watch], None]
    _net: SafetyNet | None = None
    _workflow: str | int | None = None
    _base_url: str = ""
    latest: Snapshot | None = attrs.field(init=False, default=None)
    _followers: int = attrs.field(init=False, default=0)
    _has_ended: bool = attrs.field(init=False, default=False)
    _streams: int = attrs.field(init=False, default=0)
    _snapshot_waiters: Waiters = attrs.field(init=False, factory=dict)
    _completion_waiters: Waiters = attrs.field(init=False, factory=dict)
    _retries: RetryState = attrs.field(init=False)
    _changed_at: float = attrs.field(init=False, default=0.0)
    _final_count: int = attrs.field(init=False, default=0)
    _error: Exception | None = attrs.field(init=False, default=None)
    _task: asyncio.Task[Any] | None = attrs.field(init=False, default=None)
    _loop: asyncio.AbstractEventLoop = attrs.field(init=False)  # while it runs
    # Resolved at the time of the next poll, or by a wake-up; None during a poll.
    _alarm: asyncio.Future[None] | None = attrs.field(init=False, default=None)
    _woken_by: WakeSource | None = attrs.field(init=False, default=None)
    _is_woken: bool = attrs.field(init=False, default=False)  # the poll in flight
    # Until a woken poll finds no completion: those of many watches would leave others no slots.
    _goes_first: bool = attrs.field(init=False, default=True)
    _woken_at: float = attrs.field(init=False, default=0.0)
    _no_wake_before: float = attrs.field(init=False, default=-math.inf)

    def __attrs_post_init__(self) -> None:
        self._retries = RetryState(self._retry, self._retry.watch_outage)
        if self._net is not None:
            self._net.changed = self._reschedule

    def add_follower(self, *, streams: bool = False) -> None:
        """Add a follower; one that `streams` wants every snapshot, not just the complete one."""
        self._followers += 1
        self._streams += streams

    def remove_follower(self, *, streams: bool = False) -> None:
        """Remove a follower; polling stops after the last one."""
        self._followers -= 1
        self._streams -= streams
        if not self._followers:
            self._on_end(self)
            if self._task is not None:
                # A cancel scope would take one more loop step, in which an answer may arrive.
                self._task.cancel()

    def wake(self, source: WakeSource) -> None:
        """Poll now, or once more if a poll is in flight; many wake-ups lead to a single poll.

        A flood of them polls at most every half second, or every `floor` seconds if that is less;
        and none comes before the time that the server asked to wait.
        """
        if self._woken_by is None:
            self._woken_by, self._woken_at = source, clock()
            self._reschedule()

    def _reschedule(self) -> None:
        """Find out again when the next poll is due."""
        if self._alarm is not None:
            resolve(self._alarm)

    def has_newer(self, seen: Snapshot | None) -> bool:
        """Return True if there is another snapshot than `seen`, or the error of the poller."""
        return self.latest is not seen or self._error is not None

    async def newer(self, seen: Snapshot | None, deadline: Deadline) -> Snapshot:
        """Wait until the latest snapshot is not `seen`, and return it.

        Raises:
            ExecutionTimeout: the deadline passed before there was a complete snapshot.
            PromptLayerExecError: the poller failed, or the session was closed.
        """
        while (snapshot := self._newer(seen, deadline)) is None:
            await self._wait(self._snapshot_waiters, deadline)
        return snapshot

    async def completed(self, deadline: Deadline) -> Snapshot:
        """Wait for the complete snapshot, and return it; errors are those of `newer`."""
        while (snapshot := self._complete(deadline)) is None:
            await self._wait(self._completion_waiters, deadline)
        return snapshot

    async def _wait(self, waiters: Waiters, deadline: Deadline) -> None:
        """Wait for a notification or the deadline."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters[future] = deadline
        if self._net is not None:
            self._reschedule()  # the deadline may be the first, or the follower one that streams
        timer = PatientTimer(deadline.at, resolve, future)
        try:
            await future
        finally:
            del waiters[future]
            timer.cancel()

    def _complete(self, deadline: Deadline) -> Snapshot | None:
        snapshot = self._newer(None, deadline)
        if snapshot is not None and not snapshot.complete:
            if self._error is not None:
                raise copy_error(self._error)
            return None
        return snapshot

    def _newer(self, seen: Snapshot | None, deadline: Deadline) -> Snapshot | None:
        late = clock() >= deadline.at
        latest = self.latest
        if latest is not None and latest is not seen and (latest.complete or not late):
            return latest
        if late:
            cause = self._error or self._retries.error
            raise timed_out(self.execution_id, deadline, latest, cause) from cause
        if self._error is not None:
            raise copy_error(self._error)  # a traceback belongs to one task
        return None

    async def run(self) -> None:
        """Poll until the execution is complete, the last follower is removed, or a poll fails."""
        if not self._followers or self._has_ended:  # and was cancelled in its last step
            return
        self._task = task = cast("asyncio.Task[None]", asyncio.current_task())
        self._loop = asyncio.get_running_loop()
        started = self._changed_at = self._loop.time()
        error: Exception | None = None
        following: float | None = started
        try:
            self._emit(WatchStarted(self.execution_id, self._workflow, self._base_url))
            while following is not None:
                due = await self._sleep_until(following, task)
                following = await self._poll_once(started, due)
        except asyncio.CancelledError as cancelled:
            if self._followers:
                closed = is_cancelled()
                error = SessionClosed() if closed else foreign_cancellation("a poll", cancelled)
        except Exception as failure:  # noqa: BLE001 - raised to the followers
            error = failure
        except BaseException as fatal:  # noqa: BLE001 - raised to the followers
            error = RuntimeError(f"a poll ended in {type(fatal).__name__}")
            error.__cause__ = fatal
        finally:
            self._has_ended = True
            self._task = None
            if self._net is not None:
                self._net.release(self._reschedule)
            self._end(error, elapsed=self._loop.time() - started)

    async def _sleep_until(self, scheduled: float, task: asyncio.Task[None]) -> float:
        """Sleep until the next poll, and return when it was due: as scheduled, or woken."""
        if task.cancelling():  # and a limiter, for example, suppressed it
            raise asyncio.CancelledError
        loop = self._loop
        # What is found out only now does not make the poll late, as waiting for the rate does.
        earliest = loop.time()
        while (due := max(self._due(scheduled), earliest)) > loop.time():
            self._alarm = loop.create_future()
            timer = loop.call_at(due, resolve, self._alarm)
            try:
                await self._alarm
            finally:
                timer.cancel()
                self._alarm = None
            earliest = min(due, loop.time())
        self._is_woken = self._woken_by is not None
        if self._woken_by is not None:
            self._emit(WatchWoken(self.execution_id, self._woken_by))
            self._woken_by = None
            self._no_wake_before = loop.time() + min(self._poll.floor, _WAKE_GAP)
        return due

    def _due(self, scheduled: float) -> float:
        if self._woken_by is not None:
            return min(scheduled, max(self._woken_at, self._no_wake_before))
        if self._net is None or self._streams:
            return scheduled
        due = self._net.due(
            scheduled, floor=self._poll.floor, deadlines=self._completion_waiters.values()
        )
        return max(due, self._no_wake_before)

    async def _poll_once(self, started: float, due: float) -> float | None:
        """Poll, and return the time of the next poll, or None if the execution is complete."""
        # A separate method, so that a poll's locals are freed while the watch sleeps.
        if self._retries.failures:
            self._retries = RetryState(self._retry, self._retry.watch_outage)
        first = self._is_woken and self._goes_first
        reply = await self._fetch(self._retries, due=due, first=first)
        now = self._loop.time()
        previous = self.latest
        snapshot = take_snapshot(self.execution_id, reply, elapsed=now - started, previous=previous)
        if previous is None or snapshot.nodes is not previous.nodes:
            self._final_count = sum(node.final for node in snapshot.nodes.values())
            if previous is None or _statuses(previous) != _statuses(snapshot):
                self._changed_at = now
        self.latest = snapshot
        if self._net is not None:
            self._net.polled(
                reply.sent_at,
                waited=reply.lateness,
                complete=snapshot.complete,
                woken=self._is_woken,
            )
        if self._is_woken and not snapshot.complete:
            self._goes_first = False
        self._notify(ended=snapshot.complete)
        self._emit(
            Polled(
                self.execution_id,
                snapshot,
                duration=reply.duration,
                lateness=reply.lateness,
                body_bytes=reply.body_bytes,
            )
        )
        if snapshot.complete:
            return None
        announced = self._retry.announced(reply.retry_after)
        if announced:
            self._no_wake_before = max(self._no_wake_before, now + announced)
        return now + self._poll.delay(
            elapsed=now - started,
            final=self._final_count,
            nodes=len(snapshot.nodes),
            unchanged=now - self._changed_at,
            chance=random(),
            retry_after=announced,
        )

    def _notify(self, *, ended: bool) -> None:
        for future in self._snapshot_waiters:
            resolve(future)
        if ended:
            for future in self._completion_waiters:
                resolve(future)

    def _end(self, error: Exception | None, *, elapsed: float) -> None:
        is_complete = self.latest is not None and self.latest.complete
        succeeded = self.latest.succeeded if self.latest is not None and is_complete else None
        if error is not None:
            if isinstance(error, PromptLayerExecError):
                error.execution_id = self.execution_id
                error.last_snapshot = self.latest
            else:
                error.add_note(f"while watching execution {self.execution_id}")
            self._error = error
            self._on_end(self)
            self._notify(ended=True)
            state = f"the watch ended in {type(error).__name__}"
        elif is_complete:
            state = "complete"
        else:
            state = "no longer followed"
        polls = self.latest.poll if self.latest is not None else 0
        logger.info(
            "execution %d: %s (%d polls in %.1f s)", self.execution_id, state, polls, elapsed
        )
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


def _statuses(snapshot: Snapshot) -> list[NodeStatus | str]:
    return [node.status for node in snapshot.nodes.values()]


def timed_out(
    execution_id: int | None, deadline: Deadline, seen: Snapshot | None, cause: Exception | None
) -> ExecutionTimeout:
    """Return the error for a deadline that passed, with the progress and the last failure."""
    timeout = deadline.timeout or 0.0
    if seen is None:
        state = "no answer came"
    elif seen.complete:
        state = "every node was final, but the main output was not available"
    else:
        final = sum(node.final for node in seen.nodes.values())
        state = f"{final} of {len(seen.nodes)} nodes were final"
        for node in seen.nodes.values():
            if not isinstance(node.status, NodeStatus):
                state += f", and {node.name!r:.100} had the unknown status {node.status!r:.100}"
                break
    what = f"not complete within {timeout:g} s: {state}"
    if execution_id is None:
        what = f"no answer within {timeout:g} s"
    failure = f"; last failure: {cause.args[0]}" if cause is not None and cause.args else ""
    return ExecutionTimeout(
        what + failure,
        timeout=timeout,
        execution_id=execution_id,
        last_snapshot=seen,
    )


class Followed(Protocol):
    """What a follower follows: a `Watch`, or what stands in for one."""

    async def newer(self, seen: Snapshot | None, deadline: Deadline) -> Snapshot:
        """Wait until the latest snapshot is not `seen`, and return it."""

    def remove_follower(self) -> None:
        """Remove a follower."""


# Adds a follower, and returns what it follows and its deadline.
Join = Callable[[], Awaitable[tuple[Followed, Deadline]]]


async def follow(join: Join) -> AsyncGenerator[Snapshot, None]:
    """Yield each new snapshot of a watch, from the latest available to the complete one.

    Raises:
        ExecutionTimeout: the deadline passed before there was a complete snapshot.
        PromptLayerExecError: the poller failed, or the session was closed.
    """
    watch, deadline = await join()
    try:
        snapshot: Snapshot | None = None
        while snapshot is None or not snapshot.complete:
            snapshot = await watch.newer(snapshot, deadline)
            yield snapshot
    finally:
        watch.remove_follower()


async def finished_nodes(join: Join) -> AsyncGenerator[Node, None]:
    """Yield each node once, when it becomes final or the execution is complete.

    Errors are those of `follow`.
    """
    watch, deadline = await join()
    yielded = set()
    try:
        snapshot: Snapshot | None = None
        while snapshot is None or not snapshot.complete:
            snapshot = await watch.newer(snapshot, deadline)
            for name, node in snapshot.nodes.items():
                if name in yielded or not (node.final or snapshot.complete):
                    continue
                if not snapshot.complete and clock() >= deadline.at:
                    break  # after the deadline, only a complete snapshot is delivered
                yielded.add(name)
                yield node
    finally:
        watch.remove_follower()
