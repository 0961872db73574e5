"""Retries requests until there is a good response, and logs outages."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from random import random
from typing import TypeVar

import attrs

from promptlayer_exec._api.attempt import AtMostOnce, Attempt, Priority, Send
from promptlayer_exec._api.messages import Reply, Request, Response
from promptlayer_exec._engine.expiring import ExpiringDict
from promptlayer_exec._engine.tasks import clock
from promptlayer_exec._values.errors import NotFound, RateLimited, RequestError, StatusError
from promptlayer_exec._values.events import Emit, RequestRetried, logger
from promptlayer_exec._values.policies import RetryPolicy, is_transient, or_infinity
from promptlayer_exec._values.text import printable

T = TypeVar("T")


@attrs.define(eq=False)
class RetryState:
    """The failures of one logical request since its last good response.

    The session gives up `limit` seconds after the first failed attempt. Waiting does not count if
    the server asked for it, or had no part in it. It calls `on_failure` for each failure that leads
    to another attempt. `deadline` returns when its last caller stops waiting.

    Attributes:
        since: the time of the first failure, on the loop's clock.
        error: the latest failure.
    """

    _policy: RetryPolicy
    limit: float | None
    _on_failure: Callable[[], object] | None = None
    _deadline: Callable[[], float] = lambda: math.inf
    since: float | None = attrs.field(init=False, default=None)
    failures: int = attrs.field(init=False, default=0)
    error: Exception | None = attrs.field(init=False, default=None)
    _excused: float = attrs.field(init=False, default=0.0)

    def excuse(self, seconds: float) -> None:
        """Do not count `seconds` of waiting against the limit."""
        if self.since is not None:
            self._excused += seconds

    def patience(self, limit: float | None, *, now: float) -> float | None:
        """Return for how many seconds retries may go on, or None if that has no limit.

        That is `limit`, unless the last caller stops waiting before.
        """
        left = self._deadline() - now
        if left >= or_infinity(limit):
            return limit
        return round(left) if left >= 1.0 else float(f"{left:.1g}")

    def delay(
        self, error: Exception, *, now: float, chance: float, retry_after: float | None = None
    ) -> float | None:
        """Record a failed attempt, and return the seconds before the next, or None to give up.

        `chance` is a random number in [0, 1), and `retry_after` how long the server asked to wait.
        """
        self.error = error
        self.failures += 1
        if self.since is None:
            self.since = now

        left = or_infinity(self.limit) - (now - self.since - self._excused)
        if left <= 0:
            return None
        if self._on_failure is not None:
            self._on_failure()

        delay = min(self._policy.delay(self.failures, chance), left)
        announced = self._policy.announced(retry_after)
        self._excused += announced
        return max(delay, announced)


@attrs.define(eq=False)
class RecentRuns:
    """The latest starts: which workflow they run, and whether the server may still return 404.

    That can happen for `grace` seconds. The starts stay here for longer.
    """

    _grace: float
    _started: ExpiringDict[int, tuple[float, str | int | None]] = attrs.field(factory=ExpiringDict)

    def add(self, execution_id: int, workflow: str | int | None, *, now: float) -> None:
        self._started.add(execution_id, (now, workflow))

    def workflow(self, execution_id: int) -> str | int | None:
        """Return the workflow of an execution, by the name or id in its start, if known."""
        started = self._started.get(execution_id)
        return None if started is None else started[1]

    def covers(self, execution_id: int | None, *, now: float) -> bool:
        """Return True if an execution started less than `grace` seconds ago."""
        started = self._started.get(execution_id) if execution_id else None
        return started is not None and now - started[0] < self._grace


@attrs.define(eq=False)
class OutageLog:
    """Logs the outages of a session: one line when an outage begins, and one when it is over.

    All requests that fail at the same time belong to one outage. An outage lasts at least as long
    as the delay before a retry, which limits the number of lines.
    """

    _failing: set[RetryState] = attrs.field(factory=set)
    _answered: bool = False

    def begin(
        self, error: RequestError, state: RetryState, *, seconds: float | None, is_start: bool
    ) -> None:
        """Record that a request failed, and that retries may take up to `seconds`."""
        if not self._failing:
            self._answered = False
            limit = "" if seconds is None else f" for up to {seconds:g} s"
            subject = "starting a run" if is_start else "a request"
            if error.execution_id is not None:
                subject = f"execution {error.execution_id}"
            # Not the whole error, because its text also quotes the body and has advice.
            logger.warning("%s: %s. Trying again%s", subject, printable(str(error.args[0])), limit)
        self._failing.add(state)

    def end(self, state: RetryState, *, answered: bool) -> None:
        """Record that the retries are over: there was a response, or the session gave up."""
        if state not in self._failing:
            return
        self._failing.remove(state)
        self._answered |= answered
        if self._answered and not self._failing:
            logger.info("PromptLayer is reachable again")


@attrs.define(eq=False)
class Retrying:
    """Sends requests until there is a good response or there are no retries left."""

    _send: Send
    _policy: RetryPolicy
    _recent_runs: RecentRuns
    _emit: Emit
    _outages: OutageLog = attrs.field(init=False, factory=OutageLog)

    async def call(
        self,
        request: Request,
        read: Callable[[Response], T],
        state: RetryState,
        *,
        due: float,
        priority: Priority = Priority.FIRST,
        start: AtMostOnce | None = None,
        on_sending: Callable[[bool], object] | None = None,
    ) -> Reply[T]:
        """Return the first good response to a request due at `due`, or raise the last error.

        An error in `read` counts like any other failure. `state` has the failures so far, of this
        request or of its watch. The rest is the same as for an `Attempt`.
        """
        attempt = Attempt(due, priority, start, on_sending)
        answered = False

        try:
            while True:
                try:
                    reply = await self._send(request, read, attempt)
                except RequestError as error:
                    state.excuse(error.waited)
                    if (delay := self._delay(error, request, state, start)) is None:
                        raise
                    if start is not None:
                        await start.not_sent()
                else:
                    answered = True
                    return reply

                attempt = attrs.evolve(attempt, due=clock() + delay)
                await asyncio.sleep(delay)
        finally:
            if state.failures:
                self._outages.end(state, answered=answered)

    def _delay(
        self, error: RequestError, request: Request, state: RetryState, start: AtMostOnce | None
    ) -> float | None:
        """Record a failed attempt, and return the seconds before the next, or None to give up."""
        error.execution_id = request.execution_id
        error.attempts = state.failures + 1
        if not self._is_transient(error, start):
            return None

        delay = state.delay(
            error,
            now=clock(),
            chance=random(),
            retry_after=error.retry_after if isinstance(error, StatusError) else None,
        )
        if delay is None:
            return None

        if start is not None and start.sent:
            start.mark_rejected()
        seconds = state.limit
        if self._is_new_run(error):
            seconds = self._policy.not_found_grace
        seconds = state.patience(seconds, now=clock())
        self._outages.begin(error, state, seconds=seconds, is_start=start is not None)
        self._emit(RequestRetried(request.execution_id, error, delay))
        return delay

    def _is_transient(self, error: RequestError, start: AtMostOnce | None) -> bool:
        if start is not None:
            may_have_arrived = start.sent or isinstance(error, StatusError)
            # A 429 starts nothing.
            if start.cancelled or (may_have_arrived and not isinstance(error, RateLimited)):
                return False
        return self._is_new_run(error) or is_transient(error, self._policy.statuses)

    def _is_new_run(self, error: RequestError) -> bool:
        """Return True for a 404 on a run that started so recently that it may still appear."""
        return isinstance(error, NotFound) and self._recent_runs.covers(
            error.execution_id, now=clock()
        )
