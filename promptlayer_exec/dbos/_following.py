"""Follows the run of an item until it has an outcome, whatever the server responds.

A run that PromptLayer reports as over gets an outcome, also if nobody can read its results. An
outage stops the work instead, and the item stays, unless only this run has the problem.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any, cast

import attrs

from promptlayer_exec import (
    ExecutionFailed,
    ExecutionTimeout,
    InvalidResponse,
    RequestError,
    Session,
    Snapshot,
    StatusError,
    Unauthorized,
)
from promptlayer_exec import _integration as integration


@attrs.frozen
class ReadPatience:
    """How often and how long a worker asks for results that it cannot read, in seconds.

    Complete responses of another shape, or larger than the session's limit, end the item after
    `responses` of them. Refused requests (4xx) end it after `refused_alone` if only this run has
    the problem, and else after `refused`, because gateways refuse requests during a deployment.

    A run that is older than the batch's limit is followed for `last_look`. Pauses between requests
    grow from `first_delay` to `longest_delay`. Time limits are kept within `precision`.
    """

    responses: int = 3
    refused_alone: float = 60.0
    refused: float = 600.0
    last_look: float = 60.0
    first_delay: float = 1.0
    longest_delay: float = 30.0
    precision: float = 1.0


READ_PATIENCE = ReadPatience()


@attrs.frozen
class FollowedRun:
    """A run to follow.

    Attributes:
        started: when it started (UTC).
        followed_from: when `recheck` or `retry` put its item back (UTC), else `started`.
    """

    workflow: str | int
    execution_id: int
    started: datetime
    followed_from: datetime


@attrs.frozen
class RunEnd:
    """How a run ended: with an output, or with an error.

    Attributes:
        is_refused: whether the error is a response that stays the same, and that nobody can read.
        is_seen: whether the run may have ended just now. One that was over before a worker took it
            over ended at a time that nobody knows.
    """

    output: Any = None
    error: Exception | None = None
    is_refused: bool = False
    is_seen: bool = True


@attrs.define
class Trouble:
    """The failures to read the results of one run, since they could last be read.

    Attributes:
        since: when the first of them happened.
        refused_since: when the server began to refuse, or None if the last failure was an outage's.
        unreadable: how many complete responses in a row were unreadable.
    """

    since: float
    refused_since: float | None = None
    unreadable: int = 0

    def add(self, failure: RequestError, now: float) -> None:
        if not is_refusal(failure):
            self.refused_since = None
        elif self.refused_since is None:
            self.refused_since = now

        if self.refused_since is not None and isinstance(failure, InvalidResponse):
            self.unreadable += 1
        else:
            self.unreadable = 0

    def delay(self, now: float) -> float:
        """Return the pause before the next request, which doubles the time since the first."""
        lasted = max(now - self.since, READ_PATIENCE.first_delay)
        return min(lasted, READ_PATIENCE.longest_delay)


@attrs.define(eq=False, repr=False)
class Following:
    """Follows the runs of one worker, in the event loop of the session.

    Attributes:
        give_up_after: for how many seconds to follow a run that does not end.
    """

    _session: Session
    _now: Callable[[], datetime]
    give_up_after: float
    _outage_limit: float = attrs.field(init=False)
    # The tasks that follow runs, those that shall let go of theirs, and those cancelled from here.
    _waiting: set[asyncio.Task[Any]] = attrs.field(init=False, factory=set)
    _let_go: set[asyncio.Task[Any]] = attrs.field(init=False, factory=set)
    _interrupted: set[asyncio.Task[Any]] = attrs.field(init=False, factory=set)
    # When the server last reported that a run has ended, or is still running after its time.
    _read_at: float = attrs.field(init=False, default=float("-inf"))

    def __attrs_post_init__(self) -> None:
        policy = integration.settings(self._session).retry
        self._outage_limit = integration.or_infinity(policy.watch_outage)

    async def end(self, run: FollowedRun) -> RunEnd | None:
        """Wait for the end of a run. Return None if this worker shall let go of it.

        Raises:
            PromptLayerExecError: every other run would have this problem, too. The item stays.
        """
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._waiting.add(task)
        try:
            while task not in self._let_go:
                try:
                    return await self._follow(run)
                except asyncio.CancelledError:
                    if task not in self._interrupted or task.uncancel():  # it was somebody else
                        raise
                    self._interrupted.discard(task)
            return None
        finally:
            for tasks in (self._waiting, self._let_go, self._interrupted):
                tasks.discard(task)

    def change_limit(self, give_up_after: float) -> None:
        """Change the limit, also for the runs that are followed now."""
        if give_up_after != self.give_up_after:
            self.give_up_after = give_up_after
            for task in self._waiting:
                self._interrupt(task)

    def let_go(self, task: asyncio.Task[Any]) -> None:
        """Let the task stop following its run, if it does."""
        if task in self._waiting:
            self._let_go.add(task)
            self._interrupt(task)

    def _interrupt(self, task: asyncio.Task[Any]) -> None:
        if task not in self._interrupted:
            self._interrupted.add(task)
            task.cancel()

    async def _follow(self, run: FollowedRun) -> RunEnd:
        trouble: Trouble | None = None
        while True:
            try:
                output = await self._output(run)
            except Unauthorized:
                raise
            except (ExecutionFailed, ExecutionTimeout, RequestError) as caught:
                error = caught
            else:
                self._read_at = _clock()
                return RunEnd(output)
            if isinstance(error, ExecutionFailed):
                self._read_at = _clock()
                return RunEnd(error=error)

            failure = _failure(error)
            seen = error.last_snapshot
            if seen is not None and not (seen.complete and failure is not None):
                trouble = None  # before any failure, the server has shown that the run is not over
                if self._seconds_left(run) < READ_PATIENCE.precision:
                    self._read_at = _clock()
                    return RunEnd(error=self._unfinished(run, seen))

            if failure is not None:
                trouble = self._add(trouble, failure, has_waited=failure is error)
                if self._is_settled(trouble, failure):
                    is_refused = trouble.refused_since is not None
                    return RunEnd(error=failure, is_refused=is_refused)
                await asyncio.sleep(trouble.delay(_clock()))

    async def _output(self, run: FollowedRun) -> Any:
        # Another worker may have started it.
        integration.expect(self._session, run.workflow, run.execution_id)
        left = self._seconds_left(run)
        timeout = left if left > 0.0 else READ_PATIENCE.last_look
        return await self._session.execution(run.execution_id).output(timeout=timeout)

    def _seconds_left(self, run: FollowedRun) -> float:
        return self.give_up_after - (self._now() - run.followed_from).total_seconds()

    def _add(self, trouble: Trouble | None, failure: RequestError, *, has_waited: bool) -> Trouble:
        """Return the trouble with one more failure, for which the session may have waited."""
        now = _clock()
        if trouble is None:
            # After several attempts, the session has used up its patience with an outage.
            is_used_up = has_waited and failure.attempts > 1 and not is_refusal(failure)
            trouble = Trouble(now - self._outage_limit if is_used_up else now)
        trouble.add(failure, now)
        return trouble

    def _is_settled(self, trouble: Trouble, failure: RequestError) -> bool:
        """Return True if the trouble ends the item. Raise the failure if it stops the work."""
        now = _clock()
        if trouble.refused_since is None:
            if now - trouble.since < self._outage_limit:
                return False
            if not self._is_alone(trouble.since):
                raise failure
            return True

        if trouble.unreadable >= READ_PATIENCE.responses:
            return True
        is_alone = self._is_alone(trouble.refused_since)
        patience = READ_PATIENCE.refused_alone if is_alone else READ_PATIENCE.refused
        return now - trouble.refused_since >= patience

    def _is_alone(self, since: float) -> bool:
        """Return True if another run ended readably in the second half of the time since then.

        In the first half, an outage may not have reached all runs yet.
        """
        return self._read_at > (since + _clock()) / 2

    def _unfinished(self, run: FollowedRun, seen: Snapshot | None) -> ExecutionTimeout:
        """Return the error of a run that has not ended in time."""
        age = integration.duration((self._now() - run.started).total_seconds())
        text = f"still running {age} after its start"
        if seen is not None and seen.complete:
            text = f"complete, but its main output had not arrived {age} after its start"
        return ExecutionTimeout(
            text,
            timeout=self.give_up_after,
            execution_id=run.execution_id,
            last_snapshot=seen,
        )


def _failure(error: ExecutionTimeout | RequestError) -> RequestError | None:
    """Return the error of the last request, or None if that succeeded."""
    if isinstance(error, RequestError):
        return error
    cause = error.__cause__
    return cause if isinstance(cause, RequestError) else None


def is_refusal(error: RequestError) -> bool:
    """Return True if waiting does not help, and the error may concern one run alone."""
    if integration.is_transient(error):
        return False
    if isinstance(error, StatusError):
        return 400 <= error.status < 500 and error.status != 402  # 402 is about the account
    return isinstance(error, InvalidResponse)


def _clock() -> float:
    return asyncio.get_running_loop().time()
