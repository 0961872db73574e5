"""The retry state of one request, the recent starts, and the log of outages."""

from __future__ import annotations

import attrs

from promptlayer_exec._errors import RequestError, printable
from promptlayer_exec._events import logger
from promptlayer_exec._policies import RetryPolicy, or_infinity

_MOST_STARTS = 10_000


@attrs.define(eq=False)
class RetryState:
    """The failures of one logical request since its last good answer.

    A request is given up `limit` seconds after its first failed attempt. Waiting that is not the
    server's fault, or that the server asked for, does not count.
    """

    _policy: RetryPolicy
    limit: float | None
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
        left = or_infinity(self.limit) - (now - self._since - self._excused)
        if left <= 0:
            return None
        delay = min(self._policy.delay(self.failures, chance), left)
        announced = self._policy.announced(retry_after)
        self._excused += announced
        return max(delay, announced)


@attrs.define(eq=False)
class RecentStarts:
    """The latest starts: which workflow they run, and whether the server may still answer 404.

    It may for `grace` seconds. Starts are remembered for longer, unless there are too many.
    """

    _grace: float
    _started: dict[int, tuple[float, str | int]] = attrs.field(factory=dict)  # oldest first

    def add(self, execution_id: int, workflow: str | int, *, now: float) -> None:
        self._started[execution_id] = (now, workflow)
        while len(self._started) > _MOST_STARTS:
            oldest = next(iter(self._started))
            if self.covers(oldest, now=now):
                break
            del self._started[oldest]

    def workflow(self, execution_id: int) -> str | int | None:
        """Return the name or id of the workflow with which an execution was started, if known."""
        return self._started.get(execution_id, (0.0, None))[1]

    def covers(self, execution_id: int | None, *, now: float) -> bool:
        """Return True if an execution was started less than `grace` seconds ago."""
        started = self._started.get(execution_id) if execution_id else None
        return started is not None and now - started[0] < self._grace


@attrs.define(eq=False)
class OutageLog:
    """Logs the outages of a session: one line when an outage begins, one when it has ended.

    All requests that fail at the same time are one outage. It lasts at least until the delay of a
    failed request has passed, which limits the lines in the log.
    """

    _failing: set[RetryState] = attrs.field(factory=set)
    _answered: bool = False

    def begin(self, error: RequestError, state: RetryState, *, is_start: bool) -> None:
        """Record that a request failed and will be sent again."""
        if not self._failing:
            self._answered = False
            limit = "" if state.limit is None else f" for up to {state.limit:g} s"
            subject = "a start" if is_start else "a request"
            if error.execution_id is not None:
                subject = f"execution {error.execution_id}"
            # Not the whole error: its text also quotes the body and ends with advice.
            logger.warning("%s: %s; trying again%s", subject, printable(str(error.args[0])), limit)
        self._failing.add(state)

    def end(self, state: RetryState, *, answered: bool) -> None:
        """Record that a request will not be sent again: it was answered, or given up."""
        if state not in self._failing:
            return
        self._failing.remove(state)
        self._answered |= answered
        if self._answered and not self._failing:
            logger.info("the server answers again")
