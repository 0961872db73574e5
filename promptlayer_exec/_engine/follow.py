"""The followers of one execution: what they wait for, and until when."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable

import attrs

from promptlayer_exec._engine.retry import RetryState
from promptlayer_exec._engine.tasks import clock, resolve
from promptlayer_exec._errors import ExecutionTimeout, copy_error
from promptlayer_exec._models import NodeStatus, Snapshot
from promptlayer_exec._policies import Deadline

# What each follower waits on, and until when.
_Waiters = dict[asyncio.Future[None], Deadline]


@attrs.define(eq=False)
class Followers:
    """All followers of one watch, the latest snapshot, and how the watch ended.

    A follower is a `stream`, `finished_nodes`, `wait` or `output` call. Deadlines belong to
    followers, never to the watch.
    """

    execution_id: int
    retries: RetryState  # since the last good poll
    _check_loop: Callable[[], None]
    _last_left: Callable[[], None]
    # Called when a follower's new deadline may change the time of the next poll.
    changed: Callable[[], None] = attrs.field(init=False, default=lambda: None)
    latest: Snapshot | None = attrs.field(init=False, default=None)
    error: Exception | None = attrs.field(init=False, default=None)  # that ended the watch
    count: int = attrs.field(init=False, default=0)
    streams: int = attrs.field(init=False, default=0)  # those that want every snapshot
    _snapshot_waiters: _Waiters = attrs.field(init=False, factory=dict)
    _completion_waiters: _Waiters = attrs.field(init=False, factory=dict)

    def add(self, *, streams: bool) -> None:
        """Add a follower; one that `streams` wants every snapshot, not only the complete one."""
        self.count += 1
        self.streams += streams

    def remove(self, *, streams: bool) -> None:
        """Remove a follower; polling stops after the last one."""
        self.count -= 1
        self.streams -= streams
        if not self.count:
            self._last_left()

    def deadlines(self) -> Iterable[Deadline]:
        """Return the deadlines of the completion waiters."""
        return self._completion_waiters.values()

    async def newer(self, seen: Snapshot | None, deadline: Deadline) -> Snapshot:
        """Wait until the latest snapshot is not `seen`, and return it, or raise the error."""
        while (snapshot := self._newer(seen, deadline)) is None:
            await self._wait(self._snapshot_waiters, deadline)
        return snapshot

    async def completed(self, deadline: Deadline) -> Snapshot:
        """Wait for the complete snapshot, and return it, or raise the error."""
        while True:
            snapshot = self._newer(None, deadline)
            if snapshot is not None and snapshot.complete:
                return snapshot
            if self.error is not None:
                raise copy_error(self.error)
            await self._wait(self._completion_waiters, deadline)

    def _newer(self, seen: Snapshot | None, deadline: Deadline) -> Snapshot | None:
        late = clock() >= deadline.at
        latest = self.latest
        if latest is not None and latest is not seen and (latest.complete or not late):
            return latest
        if late:
            cause = self.error or self.retries.error
            raise timed_out(self.execution_id, deadline, latest, cause) from cause
        if self.error is not None:
            raise copy_error(self.error)  # a traceback belongs to one task
        return None

    async def _wait(self, waiters: _Waiters, deadline: Deadline) -> None:
        self._check_loop()
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        waiters[future] = deadline
        self.changed()
        timer = None
        if deadline.at < math.inf:
            timer = loop.call_at(deadline.at, resolve, future)
        try:
            await future
        finally:
            del waiters[future]
            if timer is not None:
                timer.cancel()

    def notify(self, *, ended: bool) -> None:
        """Wake the snapshot waiters, and at the end the completion waiters, too."""
        for future in self._snapshot_waiters:
            resolve(future)
        if ended:
            for future in self._completion_waiters:
                resolve(future)


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
        what + failure, timeout=timeout, execution_id=execution_id, last_snapshot=seen
    )
