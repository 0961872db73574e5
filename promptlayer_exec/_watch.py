"""One poller for one execution, and any number of followers. It knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
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
from promptlayer_exec._policies import Deadline, Outage, PollPolicy, RetryPolicy
from promptlayer_exec._tasks import Timers, clock, is_cancelled, resolve, stray

if TYPE_CHECKING:
    from promptlayer_exec._wire import NodeMap, Reply


class Fetch(Protocol):
    """Gets an execution's node map, over an outage if need be."""

    async def __call__(self, outage: Outage, *, due: float) -> Reply[NodeMap]:
        """Return the answer to a request that should leave at `due`."""


def take_snapshot(
    execution_id: int, reply: Reply[NodeMap], *, elapsed: float, previous: Snapshot | None = None
) -> Snapshot:
    """Return what a reply says, with what the snapshot before it had seen."""
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
    return FrozenMap.adopt(times)


class Watch:
    """Polls one execution for as long as somebody follows it.

    Args:
        execution_id: the execution.
        fetch: gets its node map.
        timers: wake it and its followers.
        poll: when to look again.
        retry: what to survive.
        emit: told of polls, and of the watch's beginning and end.
        on_end: called when late joiners can have no more from this watch; maybe more than once.
    """

    def __init__(
        self,
        execution_id: int,
        fetch: Fetch,
        timers: Timers,
        *,
        poll: PollPolicy,
        retry: RetryPolicy,
        emit: Emit,
        on_end: Callable[[Watch], None],
    ) -> None:
        self.execution_id = execution_id
        self.latest: Snapshot | None = None
        self._fetch = fetch
        self._timers = timers
        self._poll = poll
        self._retry = retry
        self._emit = emit
        self._on_end = on_end
        self._followers = 0
        # Followers who wait for any news, and those who wait for the end alone.
        self._curious: set[asyncio.Future[None]] = set()
        self._patient: set[asyncio.Future[None]] = set()
        self._outage = Outage(retry, retry.watch_outage)
        self._changed_at = 0.0
        self._final = 0  # how many nodes are
        self._error: Exception | None = None
        self._task: asyncio.Task[Any] | None = None

    def join(self) -> None:
        """Count one more follower."""
        self._followers += 1

    def leave(self) -> None:
        """Count one follower less; the last one stops the poller."""
        self._followers -= 1
        if not self._followers:
            self._on_end(self)
            if self._task is not None:
                # Not by a cancel scope: that would take a turn more while an answer is arriving.
                self._task.cancel()

    async def newer(self, seen: Snapshot | None, deadline: Deadline) -> Snapshot:
        """Return the latest snapshot as soon as it is another than `seen`.

        Raises:
            ExecutionTimeout: the deadline passed, and there is no complete snapshot.
            PromptLayerExecError: the poller failed, or the session was closed.
        """
        while (snapshot := self._there(seen, deadline)) is None:
            await self._wait(self._curious, deadline)
        return snapshot

    async def completed(self, deadline: Deadline) -> Snapshot:
        """Return the complete snapshot; errors are those of `newer`."""
        while (snapshot := self._complete(deadline)) is None:
            await self._wait(self._patient, deadline)
        return snapshot

    async def _wait(self, waiting: set[asyncio.Future[None]], deadline: Deadline) -> None:
        future = self._timers.loop.create_future()
        waiting.add(future)
        timer = None
        if deadline.timeout is not None:
            timer = self._timers.call_at(deadline.at, partial(resolve, future))
        try:
            await future
        finally:
            waiting.discard(future)
            if timer is not None:
                self._timers.cancel(timer)

    def _complete(self, deadline: Deadline) -> Snapshot | None:
        snapshot = self._there(None, deadline)
        if snapshot is not None and not snapshot.complete:
            if self._error is not None:
                raise copy_error(self._error)
            return None
        return snapshot

    def _there(self, seen: Snapshot | None, deadline: Deadline) -> Snapshot | None:
        late = clock() >= deadline.at
        latest = self.latest
        if latest is not None and latest is not seen and (latest.complete or not late):
            return latest
        if late:
            cause = self._error or self._outage.error
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
                error = stray("a poll", cancelled)
            else:
                error = SessionClosed()
        except BaseException as fatal:  # noqa: BLE001 - of a limiter, say: the followers must know
            error = RuntimeError(f"a poll ended in {type(fatal).__name__}")
            error.__cause__ = fatal
        finally:
            self._task = None
            self._end(error, elapsed=clock() - started)

    async def _poll_until_complete(self, started: float) -> Exception | None:
        due = self._changed_at = started
        try:
            while (following := await self._look(started, due)) is not None:
                due = following
                await self._timers.sleep_until(due)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the followers
            return error
        return None

    async def _look(self, started: float, due: float) -> float | None:
        """Poll once, and return when to do so again."""
        # Apart from the loop, so that nothing of a poll is kept while the watch sleeps.
        if self._outage.failures:
            self._outage = Outage(self._retry, self._retry.watch_outage)
        reply = await self._fetch(self._outage, due=due)
        now = clock()
        previous = self.latest
        snapshot = take_snapshot(self.execution_id, reply, elapsed=now - started, previous=previous)
        if previous is None or snapshot.nodes is not previous.nodes:
            self._final = sum(node.final for node in snapshot.nodes.values())
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
            final=self._final,
            nodes=len(snapshot.nodes),
            unchanged=now - self._changed_at,
            chance=random(),
            retry_after=self._retry.announced(reply.retry_after),
        )

    def _publish(self, snapshot: Snapshot) -> None:
        self.latest = snapshot
        self._wake(over=snapshot.complete)

    def _wake(self, *, over: bool) -> None:
        for future in self._curious:
            resolve(future)
        if over:
            for future in self._patient:
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
            self._wake(over=True)
        polls = self.latest.poll if self.latest is not None else 0
        logger.info(
            "execution %d: %s (%d polls in %.1f s)",
            self.execution_id,
            self._how_it_ended(),
            polls,
            elapsed,
        )
        self._emit(WatchEnded(self.execution_id, polls=polls, elapsed=elapsed, error=error))

    def _how_it_ended(self) -> str:
        if self._error is not None:
            return f"the watch ended in {type(self._error).__name__}"
        if self.latest is not None and self.latest.complete:
            return "complete"
        return "nobody follows it any more"


def _statuses(snapshot: Snapshot) -> list[NodeStatus | str]:
    return [node.status for node in snapshot.nodes.values()]


def timed_out(
    execution_id: int | None, deadline: Deadline, seen: Snapshot | None, cause: Exception | None
) -> ExecutionTimeout:
    """Return the error for a deadline that passed: what was seen by then, and what was wrong."""
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
    trouble = f"; last failure: {cause.args[0]}" if cause is not None and cause.args else ""
    return ExecutionTimeout(
        f"not complete within {timeout:g} s: {state}{trouble}",
        timeout=timeout,
        execution_id=execution_id,
        last_snapshot=seen,
    )


async def follow(
    join: Callable[[], Awaitable[Watch]], timeout: float | None
) -> AsyncGenerator[Snapshot, None]:
    """Yield each new snapshot of a watch, the latest there is first, the complete one last.

    Args:
        join: returns the watch, this follower counted.
        timeout: seconds from the first `anext`; None: no limit.

    Raises:
        ExecutionTimeout: the deadline passed, and there is no complete snapshot.
        PromptLayerExecError: the poller failed, or the session was closed.
    """
    deadline = Deadline.after(timeout, now=clock())
    watch = await join()
    try:
        snapshot: Snapshot | None = None
        while snapshot is None or not snapshot.complete:
            snapshot = await watch.newer(snapshot, deadline)
            yield snapshot
    finally:
        watch.leave()


async def finished_nodes(
    join: Callable[[], Awaitable[Watch]], timeout: float | None
) -> AsyncGenerator[Node, None]:
    """Yield each node once, when it becomes final; at completion the rest follow.

    Args and errors are those of `follow`.
    """
    deadline = Deadline.after(timeout, now=clock())
    yielded = set()
    async with aclosing(follow(join, timeout)) as snapshots:
        async for snapshot in snapshots:
            for name, node in snapshot.nodes.items():
                if name in yielded or not (node.final or snapshot.complete):
                    continue
                if not snapshot.complete and clock() >= deadline.at:
                    break  # only a complete snapshot may still be delivered: `follow` decides
                yielded.add(name)
                yield node
