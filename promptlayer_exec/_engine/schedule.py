"""When a watch polls: by the policy, sooner after a wake-up, and rarely while push works."""

from __future__ import annotations

import math
from collections.abc import Collection
from random import random
from typing import TYPE_CHECKING

import attrs

from promptlayer_exec._engine.tasks import clock
from promptlayer_exec._engine.waiter import Waiter
from promptlayer_exec._values.events import WakeSource
from promptlayer_exec._values.models import NodeStatus, Snapshot
from promptlayer_exec._values.policies import PollPolicy

if TYPE_CHECKING:
    from promptlayer_exec._push.channels import PushedRun


@attrs.define(eq=False)
class Schedule:
    """Computes when one watch polls next, on the event loop's clock. It never sleeps."""

    _policy: PollPolicy
    # When the next poll is due by the policy alone.
    _scheduled: float = attrs.field(init=False, default=-math.inf)
    # When the status of a node last changed, in seconds since the watch began.
    _changed_at: float = attrs.field(init=False, default=0.0)
    _final_count: int = attrs.field(init=False, default=0)
    _wake: tuple[WakeSource, float] | None = attrs.field(init=False, default=None)
    _no_wake_before: float = attrs.field(init=False, default=-math.inf)
    _is_shared: bool = attrs.field(init=False, default=False)  # another process polls
    _streamed_until: float = attrs.field(init=False, default=-math.inf)

    def wake(self, source: WakeSource) -> None:
        """Make the next poll due now. If one is in flight, there will be another.

        A flood of wake-ups causes at most one poll in half a second, or in `floor` seconds if that
        is less. It always respects a pause that the server asked for.
        """
        if self._wake is None:
            self._wake = source, clock()

    def stream_elsewhere(self) -> None:
        """For a while, poll as for a stream, because another process has one."""
        # The other process repeats the announcement before this runs out.
        self._streamed_until = clock() + 20.0

    def due(self, waiters: Collection[Waiter], pushed: PushedRun | None) -> float:
        """Return when the next poll is due for these waiters. Without push, `pushed` is None."""
        if self._wake is not None:
            return min(self._scheduled, max(self._wake[1], self._no_wake_before))

        # A stream wants every snapshot, not only the complete one.
        if pushed is None or self._is_shared or clock() < self._streamed_until:
            return self._scheduled
        if any(waiter.streams for waiter in waiters):
            return self._scheduled

        deadlines = (waiter.deadline for waiter in waiters)
        due = pushed.next_poll(self._scheduled, floor=self._policy.floor, deadlines=deadlines)
        return max(due, self._no_wake_before)

    def begin(self) -> WakeSource | None:
        """Record that a poll begins, and return the source of the wake-up, if there was one."""
        if self._wake is None:
            return None
        source, self._wake = self._wake[0], None
        self._no_wake_before = clock() + min(self._policy.floor, 0.5)
        return source

    def polled(
        self, snapshot: Snapshot, previous: Snapshot | None, *, announced: float, shared: bool
    ) -> None:
        """Record a good poll, and compute when the next one is due.

        `announced` is how long the server asked to wait now. After a `shared` poll, the next one
        waits for the other process's next response.
        """
        now = clock()
        if previous is None or snapshot.nodes is not previous.nodes:
            self._final_count = sum(node.final for node in snapshot.nodes.values())
            if previous is None or _statuses(previous) != _statuses(snapshot):
                self._changed_at = snapshot.elapsed

        if announced:
            self._no_wake_before = max(self._no_wake_before, now + announced)
        self._is_shared, self._scheduled = shared, now
        if not shared:
            self._scheduled += self._policy.delay(
                elapsed=snapshot.elapsed,
                final=self._final_count,
                nodes=len(snapshot.nodes),
                unchanged=snapshot.elapsed - self._changed_at,
                chance=random(),
                retry_after=announced,
            )


def _statuses(snapshot: Snapshot) -> list[NodeStatus | str]:
    return [node.status for node in snapshot.nodes.values()]
