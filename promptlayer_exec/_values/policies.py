"""When to poll again and when to retry: pure arithmetic, with time and chance as arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import EllipsisType
from typing import Any, Protocol, Self

import attrs

from promptlayer_exec._values.errors import (
    ConfigurationError,
    InvalidResponse,
    RequestError,
    ResponseTooLarge,
    StatusError,
)


def check_seconds(name: str, value: Any, *, zero: bool = True) -> float:
    """Return a setting in seconds as a float, or raise `ConfigurationError`."""
    if _is_number(value) and math.isfinite(value) and (value > 0 or (value == 0 and zero)):
        return float(value)
    least = "of at least 0" if zero else "greater than 0"
    setting = name.rpartition(".")[2]
    rule = f"{name} must be a finite number {least}"
    raise ConfigurationError(rule, setting=setting, got=f"{value!r:.100}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@attrs.frozen
class PollPolicy:
    """When to poll an execution again.

    A watch polls immediately, and then after delays between `floor` and `ceiling`. The delay grows
    slowly with the age of the watch. Once the first nodes are final, it is at most a sixth of the
    expected time for the remaining nodes. For the last node, it is half of a delay that grows
    slowly with the time since the last change.

    Args:
        floor: the shortest delay in seconds, greater than 0.
        ceiling: the longest delay in seconds, before the jitter.
        jitter: a random extra for each delay: at most this fraction of the delay, and at most this
            number of seconds. It keeps executions that started together from polling together.

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
                f"PollPolicy.ceiling must not be below floor ({self.floor!r})",
                setting="ceiling",
                got=repr(self.ceiling),
            )

    @classmethod
    def fixed(cls, seconds: float) -> Self:
        """Return a policy that polls at a fixed interval, without jitter.

        Args:
            seconds: the interval, greater than 0.

        Raises:
            ConfigurationError: the interval is out of range.
        """
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
        """Return the seconds from the last response to the next poll.

        Args:
            elapsed: seconds since the watch started.
            final: the number of final nodes.
            nodes: the number of nodes.
            unchanged: seconds since the status of a node last changed.
            chance: a random number in [0, 1).
            retry_after: the seconds that the server asked to wait. The delay is at least that long.
        """
        remaining = nodes - final
        changed_at = elapsed - unchanged

        if not final or changed_at <= 0:  # nothing yet to judge the pace of the nodes by
            delay = self._growing(elapsed)
        elif remaining > 1:
            delay = min(remaining * changed_at / final / 6, self._growing(elapsed))
        else:
            delay = self._growing(max(unchanged, changed_at / final)) / 2

        delay = min(max(delay, self.floor), self.ceiling)
        return max(delay + self.jitter * min(delay, 1.0) * chance, retry_after)

    def _growing(self, seconds: float) -> float:
        # Executions take from seconds to hours, and short ones are more common.
        return 1.6 * self.floor * math.sqrt(math.sqrt(1.0 + seconds))


# Cloudflare uses 520 to 530 for failures between itself and the server.
TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 531)})


def is_transient(error: RequestError, statuses: frozenset[int] = TRANSIENT_STATUSES) -> bool:
    """Return True if a request that failed may succeed later."""
    if isinstance(error, StatusError):
        return error.status in statuses
    if isinstance(error, InvalidResponse):  # it broke off, or is a gateway's page
        return error.path is None and not isinstance(error, ResponseTooLarge)
    return not error.is_permanent


def is_from_gateway(error: StatusError) -> bool:
    """Return True for the 404 of a gateway that knows no server, as while one is deployed.

    PromptLayer's own errors are JSON objects. With other statuses, a gateway may refuse the content
    of one request.
    """
    return error.status == 404 and not isinstance(error.body, dict)


def _frozen(statuses: Iterable[int]) -> frozenset[int]:
    try:
        return frozenset(statuses)
    except TypeError:
        raise ConfigurationError(
            "RetryPolicy.statuses must be a set of HTTP statuses",
            setting="statuses",
            got=f"{statuses!r:.100}",
        ) from None


@attrs.frozen
class RetryPolicy:
    """Which failures to retry, and for how long.

    Args:
        outage: for how many seconds to retry a single call, from its first failed attempt.
        watch_outage: for how many seconds a watch retries a poll. None retries until the waiters'
            timeouts.
        base: the first delay between attempts in seconds. It doubles with every failure.
        ceiling: the longest delay between attempts in seconds.
        retry_after_ceiling: the longest wait in seconds that a server can ask for.
        not_found_grace: for how many seconds to retry a 404 for a run that has just started.
        statuses: the HTTP statuses to retry.

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
        if unknown := [status for status in self.statuses if status not in range(300, 600)]:
            raise ConfigurationError(
                "RetryPolicy.statuses must be HTTP statuses from 300 to 599",
                setting="statuses",
                got=f"{unknown!r:.100}",
            )

    def delay(self, failures: int, chance: float) -> float:
        """Return the seconds before the next attempt, at most `ceiling`.

        Args:
            failures: the number of attempts that failed in a row, from 1.
            chance: a random number in [0, 1), which makes the delay up to twice as long.
        """
        doublings = min(failures - 1, 64)  # more would overflow a float
        step = min(self.base * 2.0**doublings, self.ceiling / 2)
        return step * (1.0 + chance)

    def announced(self, retry_after: float | None) -> float:
        """Return the seconds to wait because the server asked for a pause.

        Args:
            retry_after: the seconds that it asked for, or None if it did not ask.

        Returns:
            At most `retry_after_ceiling`, or 0 if the server did not ask.
        """
        return min(retry_after or 0.0, self.retry_after_ceiling)


class Limiter(Protocol):
    """Your own rate limit, for example one that several processes share."""

    async def acquire(self) -> None:
        """Return when one more HTTP attempt may go. Only one attempt at a time calls this."""


@attrs.frozen
class Deadline:
    """The time `at` which a wait times out, infinity if it has no limit."""

    timeout: float | None
    at: float

    @classmethod
    def after(cls, timeout: float | None, *, now: float) -> Self:
        """Return the deadline `timeout` seconds after `now`, or None for no limit."""
        return cls(timeout, now + or_infinity(timeout))


def or_infinity(limit: float | None) -> float:
    """Return a limit as a number. None means no limit."""
    return math.inf if limit is None else limit


def check_timeout(timeout: Any) -> float | EllipsisType | None:
    """Return a timeout in seconds. None and infinity mean no limit, `...` the default."""
    if timeout is None or timeout is ...:
        return timeout
    if not _is_number(timeout):
        raise TypeError(f"timeout must be a number of seconds or None, got {timeout!r:.100}")
    if not timeout >= 0:
        raise ValueError(f"timeout must not be negative or NaN, got {timeout!r:.100}")
    if timeout == math.inf:
        return None
    return float(timeout)
