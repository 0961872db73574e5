"""One poller for one execution, and any number of followers. It knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from random import random
from typing import TYPE_CHECKING, Any, Protocol

from promptlayer_exec._errors import (
    ExecutionTimeout,
    PromptLayerExecError,
    SessionClosed,
    copy_error,
)
from promptlayer_exec._events import Emit, Polled, WatchEnded, WatchStarted, logger
from promptlayer_exec._models import FINAL, FrozenMap, Node, NodeStatus, NodeTimes, Snapshot
from promptlayer_exec._policies import Deadline, PollPolicy, RetryPolicy
from promptlayer_exec._retry import RetryState
from promptlayer_exec._tasks import PatientTimer, clock, foreign_cancellation, is_cancelled, resolve

if TYPE_CHECKING:
    from promptlayer_exec._wire import NodeMap, Reply


class Fetch(Protocol):
    """Requests an execution's node map, and retries where that is worth it."""

    async def __call__(self, state: RetryState, *, due: float) -> Reply[NodeMap]:
        """Return the answer to a request that should be sent at `due`."""


def take_snapshot(
    execution_id: int, reply: Reply[NodeMap], *, elapsed: float, previous: Snapshot | None = None
) -> Snapshot:
    """Return the snapshot that a reply describes, with the times that the one before had seen."""
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


_UNSEEN = NodeTimes()
_GONE_NODES = 1000
_NAMES_OF_GONE_NODES = 1_000_000


def _first_seen(
    nodes: Mapping[str, Node], before: Mapping[str, NodeTimes], elapsed: float
) -> Mapping[str, NodeTimes]:
    seen_now: dict[NodeStatus | str, NodeTimes] = dict.fromkeys(FINAL, NodeTimes(final=elapsed))
    seen_now[NodeStatus.RUNNING] = NodeTimes(running=elapsed)
    times = {name: seen_now.get(node.status, _UNSEEN) for name, node in nodes.items()}
    for name, earlier in before.items():
        now = times.get(name, _UNSEEN)
        running = now.running if earlier.running is None else earlier.running
        final = now.final if earlier.final is None else earlier.final
        is_news = running is not earlier.running or final is not earlier.final
        times[name] = NodeTimes(running, final) if is_news else earlier
    # Where names come and go, the times of those gone longest are forgotten: they come last.
    gone = len(times) - len(nodes)
    length = sum(map(len, times)) if gone else 0
    while gone > _GONE_NODES or (gone and length > _NAMES_OF_GONE_NODES):
        length -= len(times.popitem()[0])
        gone -= 1
    return FrozenMap(times)


class Watch:
    """Polls one execution for as long as somebody follows it."""

    def __init__(
        self,
        execution_id: int,
        fetch: Fetch,
        *,
        poll: PollPolicy,
        retry: RetryPolicy,
        emit: Emit,
        on_end: Callable[[Watch], None],
    ) -> None:
        self.execution_id = execution_id
        self.latest: Snapshot | None = None
        self._fetch = fetch
        self._poll = poll
        self._retry = retry
        self._emit = emit
        self._on_end = on_end
        self._followers = 0
        self._snapshot_waiters: set[asyncio.Future[None]] = set()
        self._completion_waiters: set[asyncio.Future[None]] = set()
        self._retries = RetryState(retry, retry.watch_outage)
        self._changed_at = 0.0
        self._final_count = 0
        self._error: Exception | None = None
        self._task: asyncio.Task[Any] | None = None

    def add_follower(self) -> None:
        """Count one more follower."""
        self._followers += 1

    def remove_follower(self) -> None:
        """Count one follower less; without any, polling stops."""
        self._followers -= 1
        if not self._followers:
            self._on_end(self)
            if self._task is not None:
                # A cancel scope would take one more step of the loop while an answer is arriving.
                self._task.cancel()

    async def newer(self, seen: Snapshot | None, deadline: Deadline) -> Snapshot:
        """Return the latest snapshot, as soon as there is another one than `seen`.

        Raises:
            ExecutionTimeout: the deadline passed before there was a complete snapshot.
            PromptLayerExecError: the poller failed, or the session was closed.
        """
        while (snapshot := self._newer(seen, deadline)) is None:
            await self._wait(self._snapshot_waiters, deadline)
        return snapshot

    async def completed(self, deadline: Deadline) -> Snapshot:
        """Return the complete snapshot; errors are those of `newer`."""
        while (snapshot := self._complete(deadline)) is None:
            await self._wait(self._completion_waiters, deadline)
        return snapshot

    async def _wait(self, waiters: set[asyncio.Future[None]], deadline: Deadline) -> None:
        """Wait for news, or for the deadline."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters.add(future)
        timer = None
        if deadline.when is not None:
            timer = PatientTimer(deadline.when, resolve, future)
        try:
            await future
        finally:
            waiters.discard(future)
            if timer is not None:
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
        """Poll until the execution is complete, the last follower has left, or a poll fails."""
        if not self._followers:
            return
        self._task = asyncio.current_task()
        started = clock()
        self._emit(WatchStarted(self.execution_id))
        error: Exception | None = None
        try:
            error = await self._poll_until_complete(started)
        except asyncio.CancelledError as cancelled:
            if not self._followers:
                error = None
            elif not is_cancelled():
                error = foreign_cancellation("a poll", cancelled)
            else:
                error = SessionClosed()
        except BaseException as fatal:  # noqa: BLE001 - the followers must learn of it
            error = RuntimeError(f"a poll ended in {type(fatal).__name__}")
            error.__cause__ = fatal
        finally:
            self._task = None
            self._end(error, elapsed=clock() - started)

    async def _poll_until_complete(self, started: float) -> Exception | None:
        due = self._changed_at = started
        try:
            while (following := await self._poll_once(started, due)) is not None:
                due = following
                await asyncio.sleep(due - clock())
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the followers
            return error
        return None

    async def _poll_once(self, started: float, due: float) -> float | None:
        """Poll, and return the time of the next poll; None: the execution is complete."""
        # Apart from the loop, so that nothing of a poll is kept while the watch sleeps.
        if self._retries.failures:
            self._retries = RetryState(self._retry, self._retry.watch_outage)
        reply = await self._fetch(self._retries, due=due)
        now = clock()
        previous = self.latest
        snapshot = take_snapshot(self.execution_id, reply, elapsed=now - started, previous=previous)
        if previous is None or snapshot.nodes is not previous.nodes:
            self._final_count = sum(node.final for node in snapshot.nodes.values())
            if previous is None or _statuses(previous) != _statuses(snapshot):
                self._changed_at = now
        self._publish(snapshot)
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
        return now + self._poll.delay(
            elapsed=now - started,
            final=self._final_count,
            nodes=len(snapshot.nodes),
            unchanged=now - self._changed_at,
            chance=random(),
            retry_after=self._retry.announced(reply.retry_after),
        )

    def _publish(self, snapshot: Snapshot) -> None:
        self.latest = snapshot
        self._notify(ended=snapshot.complete)

    def _notify(self, *, ended: bool) -> None:
        for future in self._snapshot_waiters:
            resolve(future)
        if ended:
            for future in self._completion_waiters:
                resolve(future)

    def _end(self, error: Exception | None, *, elapsed: float) -> None:
        if error is not None:
            if isinstance(error, PromptLayerExecError):
                error.execution_id = self.execution_id
                error.last_snapshot = self.latest
            else:
                error.add_note(f"while watching execution {self.execution_id}")
            self._error = error
            self._on_end(self)
            self._notify(ended=True)
        polls = self.latest.poll if self.latest is not None else 0
        logger.info(
            "execution %d: %s (%d polls in %.1f s)",
            self.execution_id,
            self._end_state(),
            polls,
            elapsed,
        )
        self._emit(WatchEnded(self.execution_id, polls=polls, elapsed=elapsed, error=error))

    def _end_state(self) -> str:
        if self._error is not None:
            return f"the watch ended in {type(self._error).__name__}"
        if self.latest is not None and self.latest.complete:
            return "complete"
        return "no longer followed"


def _statuses(snapshot: Snapshot) -> list[NodeStatus | str]:
    return [node.status for node in snapshot.nodes.values()]


def timed_out(
    execution_id: int | None, deadline: Deadline, seen: Snapshot | None, cause: Exception | None
) -> ExecutionTimeout:
    """Return the error for a deadline that passed: what was seen by then, and the last failure."""
    timeout = deadline.timeout or 0.0
    if seen is None:
        state = "no answer came"
    elif seen.complete:
        state = "every node is final, but the main output was not there"
    else:
        final = sum(node.final for node in seen.nodes.values())
        state = f"{final} of {len(seen.nodes)} nodes were final"
        for node in seen.nodes.values():
            if not isinstance(node.status, NodeStatus):
                state += f", and {node.name!r:.100} had the unknown status {node.status!r:.100}"
                break
    failure = f"; last failure: {cause.args[0]}" if cause is not None and cause.args else ""
    return ExecutionTimeout(
        f"not complete within {timeout:g} s: {state}{failure}",
        timeout=timeout,
        execution_id=execution_id,
        last_snapshot=seen,
    )


# Returns a watch, with one more follower, and until when it is followed.
Join = Callable[[], Awaitable[tuple[Watch, Deadline]]]


async def follow(join: Join) -> AsyncGenerator[Snapshot, None]:
    """Yield each new snapshot of a watch: first the latest there is, last the complete one.

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
    """Yield each node once, when it becomes final; at completion the rest follow.

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
                    break  # only a complete snapshot may still be delivered
                yielded.add(name)
                yield node
    finally:
        watch.remove_follower()
