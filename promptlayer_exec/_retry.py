"""The state of retries: of one request, of executions started just now, and what the log says."""

from __future__ import annotations

import math

import attrs

from promptlayer_exec._errors import RequestError, printable
from promptlayer_exec._events import logger
from promptlayer_exec._policies import RetryPolicy, or_infinity


@attrs.define(eq=False)
class RetryState:
    """The failures of one logical request since its last good answer.

    The request is given up `limit` seconds after its first failed attempt. Waiting that is not the
    server's fault, or that the server asked for, does not count.
    """

    _policy: RetryPolicy
    limit: float = attrs.field(converter=or_infinity)
    _since: float | None = None
    _excused: float = 0.0
    failures: int = 0
    error: Exception | None = None

    def excuse(self, seconds: float) -> None:
        """Do not count `seconds` of waiting against the limit."""
        if self._since is not None:
            self._excused += seconds

    def delay(
        self, error: Exception, *, now: float, chance: float, retry_after: float | None = None
    ) -> float | None:
        """Record a failed attempt, and return the seconds before the next; None: give up.

        `chance` is a random number in [0, 1), and `retry_after` what the server asked to wait.
        """
        self.error = error
        self.failures += 1
        if self._since is None:
            self._since = now
        left = self.limit - (now - self._since - self._excused)
        if left <= 0:
            return None
        delay = min(self._policy.delay(self.failures, chance), left)
        announced = self._policy.announced(retry_after)
        self._excused += announced
        return max(delay, announced)


@attrs.define(eq=False)
class RecentStarts:
    """The starts of the last `grace` seconds, which the server may not know everywhere yet."""

    _grace: float
    _started: dict[int, float] = attrs.field(factory=dict)  # in the order of time

    def add(self, execution_id: int, *, now: float) -> None:
        """Record a start."""
        while self._started and not self.covers(oldest := next(iter(self._started)), now=now):
            del self._started[oldest]
        self._started[execution_id] = now

    def covers(self, execution_id: int | None, *, now: float) -> bool:
        """Return True if an execution was started less than the grace ago."""
        started = self._started.get(execution_id, -math.inf) if execution_id else -math.inf
        return now - started < self._grace


@attrs.define(eq=False)
class OutageLog:
    """Logs the outages of a session: one line when one begins, one when it has ended.

    However many requests fail at once, to the log they are one outage. A failed request is not
    sent again before its delay has passed, and the outage lasts at least until then, so the log
    never gets more lines than that.
    """

    _failing: set[RetryState] = attrs.field(factory=set)
    _answered: bool = False

    def begin(self, error: RequestError, state: RetryState) -> None:
        """Record that a request failed and will be sent again."""
        if not self._failing:
            self._answered = False
            limit = "" if state.limit == math.inf else f" for up to {state.limit:g} s"
            number = error.execution_id
            subject = "a start" if number is None else f"execution {number}"
            # Not the whole error: its text also quotes the body and ends with advice.
            what = printable(str(error.args[0]))
            logger.warning("%s: %s; trying again%s", subject, what, limit)
        self._failing.add(state)

    def end(self, state: RetryState, *, answered: bool) -> None:
        """Record that a request will not be sent again: it was answered, or given up."""
        if state not in self._failing:
            return
        self._failing.remove(state)
        self._answered |= answered
        if self._answered and not self._failing:
            logger.info("the server answers again")
