"""When to poll an execution whose completion is pushed: seldom, and never on trust alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from promptlayer_exec._policies import Deadline

if TYPE_CHECKING:
    from promptlayer_exec._push.channels import Channel

# Seconds between two polls, as long as push can be trusted: doubling from the first to the longest.
_FIRST = 5.0
_LONGEST = 60.0
# Where requests wait for the rate, more polls would make all wait longer: there are at least
# this many times as many seconds between two polls as the last request waited.
_TIMES_WAITED = 10.0
# A poll comes this many seconds before a deadline, so that its error has a snapshot.
_LAST_CALL = 1.0
# A first poll waits this long for the first subscription, which then makes it unnecessary.
_SUBSCRIBING = 0.5


@attrs.define(eq=False)
class SafetyNet:
    """When to poll one execution that was started with push; it outlives its watches.

    Polls are seldom only while the subscription has stood since the execution was last known to
    run: since its start was sent, or a poll that found it incomplete.
    """

    execution_id: int
    channel: Channel
    _known_at: float
    _waited: float
    is_announced: bool = attrs.field(init=False, default=False)  # its completion, by push
    _polls: int = attrs.field(init=False, default=0)
    _is_polled: bool = attrs.field(init=False, default=False)
    _is_complete: bool = attrs.field(init=False, default=False)
    _is_doubted: bool = attrs.field(init=False, default=False)

    def due(self, scheduled: float, *, floor: float, deadlines: Iterable[Deadline]) -> float:
        """Return when to poll, where a watch without push would poll when `scheduled`.

        The `floor` is the policy's. The followers with these deadlines wait for the completion.
        """
        since = self.channel.since
        if self._is_doubted or self._is_complete:
            return scheduled
        if since is None:
            if self.channel.is_starting and not self._is_polled:
                return max(scheduled, self._known_at + min(floor, _SUBSCRIBING))
            return scheduled
        if since > self._known_at:
            return min(scheduled, self._known_at + min(floor, _FIRST))
        doublings = min(self._polls, 64) if self.channel.has_announced else 0
        gap = max(_FIRST * 2.0**doublings, _TIMES_WAITED * self._waited)
        due = max(scheduled, self._known_at + min(gap, _LONGEST))
        last_calls = (one.at - min(_LAST_CALL, (one.timeout or 0.0) / 2) for one in deadlines)
        return min([due, *(at for at in last_calls if at > self._known_at)])

    def polled(self, sent_at: float, *, waited: float, complete: bool, woken: bool) -> None:
        """Record a good poll, which waited for so many seconds for a connection or the rate.

        A wake-up that led to it should have come with the completion.
        """
        since = self.channel.since
        is_covered = since is not None and since <= self._known_at
        if not complete:
            self.channel.need()
        elif not self._is_complete:
            self._is_complete = True
            self.channel.completed(self, expected=is_covered)
        self._is_doubted |= woken and not complete
        self._polls = self._polls + 1 if is_covered else 0
        self._is_polled = True
        self._known_at, self._waited = sent_at, waited
