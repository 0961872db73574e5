"""When to poll a run although push will announce its completion: rarely, in case push fails."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from promptlayer_exec._values.policies import Deadline


@attrs.frozen
class FallbackPolicy:
    """The dials of polling while push is active. Pure arithmetic, with times in seconds.

    Args:
        first: the gap between two polls under an active subscription. It doubles with each poll.
        longest: the longest of these gaps.
        times_waited: the least gap, as a multiple of how long the last request waited for the rate:
            more polls would make all requests wait longer.
        last_call: how long before a deadline to poll, so that its error has a recent snapshot.
        subscribing: how long a first poll waits for the first subscription, which may make it
            unnecessary.
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
            scheduled: when to poll it without push.
            floor: the shortest delay of the session's poll policy.
            known_at: when the last request that showed it running was sent.
            subscribed_at: when the subscription became active, or None if it is not.
            is_subscribing: whether the first subscription is about to become active.
            polls: how many polls in a row, under this subscription, found the run incomplete.
            waited: how long the last request waited for a connection or the rate.
            deadlines: the deadlines of its waiters.
        """
        if subscribed_at is None:
            if is_subscribing:
                return max(scheduled, known_at + min(floor, self.subscribing))
            return scheduled

        # The run may have completed before the subscription: one poll finds out.
        if subscribed_at > known_at:
            return min(scheduled, known_at + min(floor, self.first))

        gap = max(self.first * 2.0 ** min(polls, 64), self.times_waited * waited)
        due = max(scheduled, known_at + min(gap, self.longest))
        for deadline in deadlines:
            last_call = deadline.at - min(self.last_call, (deadline.timeout or 0.0) / 2)
            if last_call > known_at:
                due = min(due, last_call)
        return due
