"""When to poll an execution whose completion is pushed: seldom, and never on trust alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import attrs

from promptlayer_exec._policies import Deadline

# Seconds between two polls, as long as push can be trusted: doubling from the first to the longest.
_FIRST = 5.0
_LONGEST = 60.0
# A poll comes this many seconds before a deadline, so that its error has a snapshot.
_LAST_CALL = 1.0
# A first poll waits this long for the first subscription, which then makes it unnecessary.
_SUBSCRIBING = 0.5


class Subscription(Protocol):
    """What push knows of the channel on which a run's completion will be published.

    Attributes:
        since: the time since which every completion reaches us, on the loop's clock; None: now
            none does.
        is_starting: whether it is being subscribed to for the first time.
        has_announced: whether push has announced a completion that was true.
    """

    since: float | None
    is_starting: bool

    @property
    def has_announced(self) -> bool: ...

    def completed(self, execution_id: int, *, expected: bool) -> None:
        """Record that a poll found a completion; `expected`: push should have announced it."""


def _do_nothing() -> None:
    """Nobody polls the execution at present."""


@attrs.define(eq=False)
class SafetyNet:
    """When to poll one execution that was started with push; it outlives its watches.

    Polls are seldom only while the subscription has stood since the execution was last known to
    run: since its start was sent, or a poll that found it incomplete.

    Attributes:
        execution_id: the execution's id.
        subscription: the state of its channel.
        changed: called when that state has changed.
    """

    execution_id: int
    subscription: Subscription
    _known_at: float
    changed: Callable[[], None] = attrs.field(init=False, default=_do_nothing)
    _polls: int = attrs.field(init=False, default=0)
    _is_polled: bool = attrs.field(init=False, default=False)
    _is_doubted: bool = attrs.field(init=False, default=False)

    def due(self, scheduled: float, *, floor: float, deadlines: Iterable[Deadline]) -> float:
        """Return when to poll the execution.

        Args:
            scheduled: when a watch without push would poll.
            floor: the policy's.
            deadlines: those of the followers, which all wait for the completion.
        """
        since = self.subscription.since
        if self._is_doubted:
            return scheduled
        if since is None:
            if self.subscription.is_starting and not self._is_polled:
                return max(scheduled, self._known_at + min(floor, _SUBSCRIBING))
            return scheduled
        if since > self._known_at:
            return min(scheduled, self._known_at + floor)  # one poll for what was missed
        doublings = min(self._polls, 64) if self.subscription.has_announced else 0
        due = max(scheduled, self._known_at + min(_FIRST * 2.0**doublings, _LONGEST))
        last_calls = (one.at - min(_LAST_CALL, (one.timeout or 0.0) / 2) for one in deadlines)
        return min([due, *(at for at in last_calls if at > self._known_at)])

    def distrust(self) -> None:
        """Leave the execution to the ordinary schedule from now on."""
        self._is_doubted = True
        self.changed()

    def release(self, changed: Callable[[], None]) -> None:
        """Forget the watch that set `changed`, unless another one has followed it."""
        if self.changed == changed:
            self.changed = _do_nothing

    def polled(
        self,
        sent_at: float,
        *,
        complete: bool,
        woken: bool,
    ) -> None:
        """Record a good poll.

        Args:
            sent_at: when it was sent.
            complete: whether it found the execution complete.
            woken: whether a wake-up led to it, which should have come with the completion.
        """
        since = self.subscription.since
        is_covered = since is not None and since <= self._known_at
        if complete:
            self.subscription.completed(self.execution_id, expected=is_covered)
        self._is_doubted |= woken and not complete
        self._polls = self._polls + 1 if is_covered else 0
        self._is_polled = True
        self._known_at = sent_at
