"""When to poll again, and what to survive: arithmetic alone, with time and chance as arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import EllipsisType
from typing import Any, Self

import attrs

from promptlayer_exec._errors import ConfigurationError


def check_seconds(name: str, value: Any, *, zero: bool = True) -> float:
    """Return `value` as seconds.

    Raises:
        ConfigurationError: it is no number, or negative, or not finite, or 0 where `zero` is false.
    """
    seconds = _number(value)
    if seconds is None or not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not zero):
        least = "at least 0" if zero else "more than 0"
        raise ConfigurationError(f"{name} must be a finite number, {least}, not {value!r:.100}")
    return seconds


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@attrs.frozen
class PollPolicy:
    """When to look at an execution again.

    The first poll is at once. While several nodes are left, the next comes after a sixth of the
    time that they seem to need, and not later than a delay that grows slowly with the time that
    has passed; while one is left, after half of that. It is never sooner than `floor` nor later
    than `ceiling`.

    Args:
        floor: the least delay, in seconds; more than 0.
        ceiling: the greatest delay, in seconds.
        jitter: a delay is lengthened by up to this fraction of it, and by at most this many
            seconds, so that executions started together are not polled together.

    Raises:
        ConfigurationError: a value is out of range.
    """

    floor: float = 0.5
    ceiling: float = 5.0
    jitter: float = 0.1

    def __attrs_post_init__(self) -> None:
        check_seconds("PollPolicy.floor", self.floor, zero=False)
        check_seconds("PollPolicy.jitter", self.jitter)
        if check_seconds("PollPolicy.ceiling", self.ceiling) < self.floor:
            raise ConfigurationError(
                f"PollPolicy.ceiling ({self.ceiling!r}) must not be below floor ({self.floor!r})"
            )

    @classmethod
    def fixed(cls, seconds: float) -> Self:
        """Return the policy that polls every `seconds`, without jitter."""
        return cls(floor=seconds, ceiling=seconds, jitter=0.0)

    def delay(
        self,
        *,
        elapsed: float,
        final: int,
        nodes: int,
        unchanged: float,
        chance: float,
        retry_after: float = 0.0,
    ) -> float:
        """Return the seconds from the last answer to the next poll.

        Args:
            elapsed: seconds since the watch began.
            final: how many nodes are final.
            nodes: how many there are.
            unchanged: seconds since a node's status last changed.
            chance: a random number in [0, 1).
            retry_after: seconds that the server asked to wait: never less than that.
        """
        left = nodes - final
        progressed = elapsed - unchanged  # how long it took until the last change
        if not final or progressed <= 0:
            delay = self._growing(elapsed)
        elif left > 1:
            delay = min(left * progressed / final / 6, self._growing(elapsed))
        else:
            delay = self._growing(max(unchanged, progressed / final)) / 2
        delay = min(max(delay, self.floor), self.ceiling)
        return max(delay + self.jitter * min(delay, 1.0) * chance, retry_after)

    def _growing(self, seconds: float) -> float:
        # An execution may end at any time of any order of magnitude, and the sooner the likelier.
        return 1.6 * self.floor * math.sqrt(math.sqrt(1.0 + seconds))


TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})


def _frozen(statuses: Iterable[int]) -> frozenset[int]:
    try:
        return frozenset(statuses)
    except TypeError:
        raise ConfigurationError(
            f"RetryPolicy.statuses takes a set of HTTP statuses, not {statuses!r}"
        ) from None


@attrs.frozen
class RetryPolicy:
    """What to survive, and for how long.

    Args:
        outage: seconds for which a single call is retried, from its first failed attempt.
        watch_outage: the same for each poll of a watch; None: until the followers' deadlines.
        base: the first delay between attempts, in seconds; it doubles with every failure.
        ceiling: the greatest such delay, in seconds.
        retry_after_ceiling: the longest wait, in seconds, that a server may ask for.
        not_found_grace: seconds for which a 404 on an execution that this session started is
            taken for a server that does not know it yet.
        statuses: the HTTP statuses that are worth another attempt.

    Raises:
        ConfigurationError: a value is out of range.
    """

    outage: float = 60.0
    watch_outage: float | None = 600.0
    base: float = 0.5
    ceiling: float = 10.0
    retry_after_ceiling: float = 120.0
    not_found_grace: float = 10.0
    statuses: frozenset[int] = attrs.field(default=TRANSIENT_STATUSES, converter=_frozen)

    def __attrs_post_init__(self) -> None:
        for name in ("outage", "base", "ceiling", "retry_after_ceiling", "not_found_grace"):
            check_seconds(f"RetryPolicy.{name}", getattr(self, name))
        if self.watch_outage is not None:
            check_seconds("RetryPolicy.watch_outage", self.watch_outage)
        if unknown := [s for s in self.statuses if s not in range(300, 600)]:
            raise ConfigurationError(
                f"RetryPolicy.statuses takes HTTP statuses from 300 to 599, not {unknown!r}"
            )

    def delay(self, failures: int, chance: float) -> float:
        """Return the seconds before the next attempt, at most `ceiling`.

        Args:
            failures: how many attempts have failed in a row, from 1.
            chance: a random number in [0, 1): it lengthens the delay, to twice as long.
        """
        doublings = min(failures - 1, 64)  # beyond, a float would overflow
        step = min(self.base * 2.0**doublings, self.ceiling / 2)
        return step * (1.0 + chance)

    def announced(self, retry_after: float | None) -> float:
        """Return how much of the wait that a server asked for is granted, in seconds."""
        return min(retry_after or 0.0, self.retry_after_ceiling)


@attrs.frozen
class Deadline:
    """When a wait ends at the latest, whatever it waits for.

    Attributes:
        timeout: the seconds that were allowed; None: no limit.
        at: the time, on the clock that `after` was given.
    """

    timeout: float | None
    at: float

    @classmethod
    def after(cls, timeout: float | None, *, now: float) -> Self:
        """Return the deadline that lies `timeout` seconds after `now`."""
        return cls(timeout, math.inf if timeout is None else now + timeout)

    @property
    def when(self) -> float | None:
        """The time, as `asyncio.timeout_at` takes it: None where there is no limit."""
        return None if self.timeout is None else self.at


def check_timeout(timeout: Any) -> float | EllipsisType | None:
    """Return a timeout in seconds; None and infinity stand for no limit, `...` for the default.

    Raises:
        TypeError: it is neither a number nor None.
        ValueError: it is negative or no number at all.
    """
    if timeout is None or timeout is ...:
        return timeout
    seconds = _number(timeout)
    if seconds is None:
        raise TypeError(f"timeout is a number of seconds or None, not {timeout!r}")
    if not seconds >= 0:
        raise ValueError(f"timeout must not be negative or NaN, and is {timeout!r:.100}")
    return None if seconds == math.inf else seconds
