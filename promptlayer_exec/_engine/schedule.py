"""When a watch polls: as the policy says, sooner after a wake-up, rarely while push works."""

from __future__ import annotations

import asyncio
import math
from random import random

import attrs

from promptlayer_exec._engine.follow import Followers
from promptlayer_exec._engine.tasks import clock, resolve
from promptlayer_exec._events import WakeSource
from promptlayer_exec._models import NodeStatus, Snapshot
from promptlayer_exec._policies import PollPolicy
from promptlayer_exec._push.safety_net import SafetyNet

# The shortest time between two polls after wake-ups, if the policy's floor is longer.
_WAKE_GAP = 0.5
# How long a stream in another process counts; it is announced again before this is over.
_STREAMED_SECONDS = 20.0


@attrs.define(eq=False)
class Schedule:
    """The times of one watch's polls, on the event loop's clock."""

    _poll: PollPolicy
    _followers: Followers
    _net: SafetyNet | None
    _started: float = attrs.field(init=False, factory=clock)
    _scheduled: float = attrs.field(init=False, default=-math.inf)
    _changed_at: float = attrs.field(init=False, factory=clock)
    _final_count: int = attrs.field(init=False, default=0)
    # Resolved at the time of the next poll, or by a wake-up; None during a poll.
    _alarm: asyncio.Future[None] | None = attrs.field(init=False, default=None)
    _woken_by: WakeSource | None = attrs.field(init=False, default=None)
    _woken_at: float = attrs.field(init=False, default=0.0)
    _no_wake_before: float = attrs.field(init=False, default=-math.inf)
    _is_woken: bool = attrs.field(init=False, default=False)  # the poll in flight
    _wakes_for_nothing: bool = attrs.field(init=False, default=False)
    _is_shared: bool = attrs.field(init=False, default=False)  # another process polls
    _streamed_until: float = attrs.field(init=False, default=-math.inf)

    def __attrs_post_init__(self) -> None:
        if self._net is not None:
            self._net.channel.attach(self.changed)
            self._followers.changed = self.changed

    def wake(self, source: WakeSource) -> None:
        """Poll now, or once more if a poll is in flight; many wake-ups lead to a single poll.

        A flood of wake-ups polls at most every half second, or every `floor` seconds if that is
        less. No poll comes before the time that the server asked to wait has passed.
        """
        if self._woken_by is None:
            self._woken_by, self._woken_at = source, clock()
            self.changed()

    def stream_elsewhere(self) -> None:
        """Poll as for a stream for a while, because another process has a stream."""
        self._streamed_until = clock() + _STREAMED_SECONDS
        self.changed()

    def changed(self) -> None:
        """Compute again when the next poll is due."""
        if self._alarm is not None:
            resolve(self._alarm)

    @property
    def goes_first(self) -> bool:
        """Whether the next poll goes before others: a wake-up most likely brings a result."""
        return self._is_woken and not self._wakes_for_nothing

    async def next_poll(self) -> tuple[float, WakeSource | None]:
        """Sleep until the next poll; return when it was due, and what woke the watch, or None."""
        loop = asyncio.get_running_loop()
        # A poll that turns out to be overdue is not late; one that waits for the rate is.
        earliest = loop.time()
        while (due := max(self._due(), earliest)) > loop.time():
            self._alarm = loop.create_future()
            timer = loop.call_at(due, resolve, self._alarm)
            try:
                await self._alarm
            finally:
                timer.cancel()
                self._alarm = None
            earliest = min(due, loop.time())
        source, self._woken_by = self._woken_by, None
        self._is_woken = source is not None
        if source is not None:
            self._no_wake_before = loop.time() + min(self._poll.floor, _WAKE_GAP)
        return due, source

    def _due(self) -> float:
        if self._woken_by is not None:
            return min(self._scheduled, max(self._woken_at, self._no_wake_before))
        streams = self._followers.streams or clock() < self._streamed_until
        if self._net is None or streams or self._is_shared:
            return self._scheduled
        due = self._net.due(
            self._scheduled, floor=self._poll.floor, deadlines=self._followers.deadlines()
        )
        return max(due, self._no_wake_before)

    def polled(
        self,
        snapshot: Snapshot,
        previous: Snapshot | None,
        *,
        sent_at: float,
        waited: float,
        announced: float,
        shared: bool,
    ) -> None:
        """Record a good poll, and compute when the next one is due.

        It waited for a connection or the rate for so many seconds, and the server `announced` how
        long to wait now. After a `shared` one, the next waits for the other process's next answer.
        """
        now = clock()
        is_woken = self._is_woken and not shared
        if previous is None or snapshot.nodes is not previous.nodes:
            self._final_count = sum(node.final for node in snapshot.nodes.values())
            if previous is None or _statuses(previous) != _statuses(snapshot):
                self._changed_at = now
        if self._net is not None:
            self._net.polled(sent_at, waited=waited, complete=snapshot.complete, woken=is_woken)
        self._wakes_for_nothing |= is_woken and not snapshot.complete
        if announced:
            self._no_wake_before = max(self._no_wake_before, now + announced)
        self._is_shared, self._scheduled = shared, now
        if not shared:
            self._scheduled += self._poll.delay(
                elapsed=now - self._started,
                final=self._final_count,
                nodes=len(snapshot.nodes),
                unchanged=now - self._changed_at,
                chance=random(),
                retry_after=announced,
            )

    def end(self) -> None:
        """Release the safety net: the watch does not poll any more."""
        if self._net is not None:
            self._net.channel.release(self.changed)


def _statuses(snapshot: Snapshot) -> list[NodeStatus | str]:
    return [node.status for node in snapshot.nodes.values()]
