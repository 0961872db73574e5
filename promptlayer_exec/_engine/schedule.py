"""When a watch polls: as the policy says, sooner after a wake-up, rarely while push works."""

from __future__ import annotations

import math
from collections.abc import Collection
from random import random
from typing import TYPE_CHECKING

import attrs

from promptlayer_exec._engine.tasks import clock
from promptlayer_exec._engine.waiter import Waiter
from promptlayer_exec._events import WakeSource
from promptlayer_exec._models import NodeStatus, Snapshot
from promptlayer_exec._policies import PollPolicy

if TYPE_CHECKING:
    from promptlayer_exec._push.channels import PushedRun


@attrs.define(eq=False)
class Schedule:
    """When one watch polls, on the event loop's clock: it computes, and never sleeps."""

    _policy: PollPolicy
    # When the next poll is due by the policy alone.
    _scheduled: float = attrs.field(init=False, default=-math.inf)
    # When the status of a node last changed, counted from the beginning of the watch.
    _changed_at: float = attrs.field(init=False, default=0.0)
    _final_count: int = attrs.field(init=False, default=0)
    _wake: tuple[WakeSource, float] | None = attrs.field(init=False, default=None)
    _no_wake_before: float = attrs.field(init=False, default=-math.inf)
    _is_shared: bool = attrs.field(init=False, default=False)  # another process polls
    _streamed_until: float = attrs.field(init=False, default=-math.inf)

    def wake(self, source: WakeSource) -> None:
        """Have the next poll now, or one more if a poll is in flight.

        A flood of wake-ups polls at most every half second, or every `floor` seconds if that is
        less. No poll comes before the time that the server asked to wait has passed.
        """
        if self._wake is None:
            self._wake = source, clock()

    def stream_elsewhere(self) -> None:
        """Poll as for a stream for a while, because another process has a stream."""
        # It is announced again before this is over.
        self._streamed_until = clock() + 20.0

    def due(self, waiters: Collection[Waiter], pushed: PushedRun | None) -> float:
        """Return when the next poll is due for these waiters; without push, `pushed` is None."""
        if self._wake is not None:
            return min(self._scheduled, max(self._wake[1], self._no_wake_before))

        # Whoever streams wants every snapshot, not only the complete one.
        if pushed is None or self._is_shared or clock() < self._streamed_until:
            return self._scheduled
        if any(waiter.streams for waiter in waiters):
            return self._scheduled

        deadlines = (waiter.deadline for waiter in waiters)
        due = pushed.next_poll(self._scheduled, floor=self._policy.floor, deadlines=deadlines)
        return max(due, self._no_wake_before)

    def begin(self) -> WakeSource | None:
        """Record that a poll begins, and return what woke the watch, if something has."""
        if self._wake is None:
            return None
        source, self._wake = self._wake[0], None
        self._no_wake_before = clock() + min(self._policy.floor, 0.5)
        return source

    def polled(
        self, snapshot: Snapshot, previous: Snapshot | None, *, announced: float, shared: bool
    ) -> None:
        """Record a good poll, and compute when the next one is due.

        The server `announced` how long to wait now. After a `shared` one, the next waits for the
        other process's next answer.
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
