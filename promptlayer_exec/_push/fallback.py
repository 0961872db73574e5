"""When to poll a run whose completion is pushed: seldom, and never on trust alone."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from promptlayer_exec._policies import Deadline


@attrs.frozen
class FallbackPolicy:
    """The dials of polling while push is active: times in seconds, and arithmetic alone.

    Args:
        first: between two polls while the subscription stands; doubles with each of them.
        longest: the longest of these gaps.
        times_waited: where requests wait for the rate, more polls would make all wait longer: a gap
            is at least this many times as long as the last request waited.
        last_call: so long before a deadline there is a poll, so that its error has a snapshot.
        subscribing: so long a first poll waits for the first subscription, which then makes that
            poll unnecessary.
    """

    first: float = 5.0
    longest: float = 60.0
    times_waited: float = 10.0
    last_call: float = 1.0
    subscribing: float = 0.5

    def next_poll(
        self,
        scheduled: float,
        *,
        floor: float,
        known_at: float,
        subscribed_at: float | None,
        is_subscribing: bool = False,
        polls: int = 0,
        waited: float = 0.0,
        deadlines: Iterable[Deadline] = (),
    ) -> float:
        """Return when to poll a run, all times on one clock.

        Args:
            scheduled: when it would be polled without push.
            floor: the shortest delay of the session's poll policy.
            known_at: when the last request was sent that showed the run to be going on.
            subscribed_at: since when completions are announced; None: they are not.
            is_subscribing: whether that is about to begin, for the first time.
            polls: the polls in a row since then that push made unnecessary.
            waited: how long the last request waited for a connection or the rate.
            deadlines: of those who wait for the completion.
        """
        if subscribed_at is None:
            if is_subscribing:
                return max(scheduled, known_at + min(floor, self.subscribing))
            return scheduled

        # The run may have ended before the subscription: one poll makes up for that.
        if subscribed_at > known_at:
            return min(scheduled, known_at + min(floor, self.first))

        gap = max(self.first * 2.0 ** min(polls, 64), self.times_waited * waited)
        due = max(scheduled, known_at + min(gap, self.longest))
        for deadline in deadlines:
            last_call = deadline.at - min(self.last_call, (deadline.timeout or 0.0) / 2)
            if last_call > known_at:
                due = min(due, last_call)
        return due
