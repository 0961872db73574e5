"""Follows many executions in one loop, without a task for each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from functools import partial
from types import EllipsisType
from typing import TYPE_CHECKING

import attrs

from promptlayer_exec._engine.tasks import clock, resolve
from promptlayer_exec._engine.waiter import Waiter
from promptlayer_exec._engine.watch import Watch
from promptlayer_exec._session.execution import Execution
from promptlayer_exec._session.fanout import handle_of
from promptlayer_exec._values.errors import PromptLayerExecError, SessionClosed, Unauthorized
from promptlayer_exec._values.models import Snapshot, StartRequest
from promptlayer_exec._values.policies import check_timeout

if TYPE_CHECKING:
    from promptlayer_exec._session.session import Session


@attrs.frozen
class Waiting:
    """Why there has been no news of an execution for a while.

    Attributes:
        failure: why the latest poll failed. The session tries again. None if there was no response
            yet.
    """

    failure: Exception | None


# The error is the last news of an execution.
News = tuple[Execution, Snapshot | Waiting | Exception]


@attrs.define(eq=False)
class _Followed:
    """One execution that is still followed."""

    execution: Execution
    watch: Watch
    waiter: Waiter
    seen: Snapshot | None = None
    timer: asyncio.TimerHandle | None = None  # for when it has been waiting for a while

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class CombinedStream:
    """The news of many executions, for one reader.

    A slow reader gets the latest snapshot of each execution and skips older ones, so at most one
    per execution waits for it.
    """

    def __init__(
        self,
        session: Session,
        executions: Iterable[Execution],
        timeout: float | EllipsisType | None,
        patience: float,
    ) -> None:
        """Join the watch of each execution. `close` leaves them.

        Raises:
            ConfigurationError: the session has no API key.
            SessionClosed: the session was closed.
        """
        client = session._open()
        self._lifetime = client.lifetime
        self._deadline = client.deadline(timeout)
        self._patience = patience
        self._joined = clock()

        self._followed: dict[int, _Followed] = {}
        # Handles with a complete snapshot need no watch.
        self._complete: list[Execution] = []
        # Executions that may have news, in the order of arrival.
        self._news: dict[int, None] = {}
        self._waiting: asyncio.Future[None] | None = None

        for execution in executions:
            if execution._last is not None and execution._last.complete:
                self._complete.append(execution)
                continue
            watch = client.watch(execution.id)
            waiter = watch.join(self._deadline, streams=True)
            waiter.wake = partial(self._wake, execution.id)
            self._followed[execution.id] = _Followed(execution, watch, waiter)
            self._news[execution.id] = None

    async def next(self) -> News | None:
        """Return an execution with its news, or None once all executions have finished."""
        if self._complete:
            execution = self._complete.pop()
            assert execution._last is not None  # noqa: S101 - for mypy
            return execution, execution._last

        while self._followed:
            while self._news:
                execution_id = next(iter(self._news))
                del self._news[execution_id]
                followed = self._followed[execution_id]
                if (news := self._look(followed)) is not None:
                    return followed.execution, news

            await self._wait()
            if clock() >= self._deadline.at:
                self._news.update(dict.fromkeys(self._followed))
        return None

    def close(self) -> None:
        """Leave all watches. The ones without other waiters stop polling."""
        for followed in list(self._followed.values()):
            self._leave(followed)

    def _look(self, followed: _Followed) -> Snapshot | Waiting | Exception | None:
        execution, watch = followed.execution, followed.watch
        try:
            snapshot = watch.look(followed.waiter, followed.seen)
        except Exception as error:  # noqa: BLE001 - it concerns this execution alone
            if isinstance(error, PromptLayerExecError):
                execution._recall(error)
            self._leave(followed)
            return error

        if snapshot is None:
            return self._look_for_failures(followed)

        followed.cancel_timer()
        snapshot = followed.seen = execution._remember(snapshot)
        if snapshot.complete:
            self._leave(followed)
        elif watch.error is not None or watch.retries.failures:
            # Look again: nothing else may wake this reader for it.
            self._news[execution.id] = None
        return snapshot

    def _look_for_failures(self, followed: _Followed) -> Waiting | None:
        """Return why there is no news, now or by a timer when that has lasted long enough."""
        followed.cancel_timer()
        retries = followed.watch.retries
        # A poll that takes long is no failure, but a reader without a snapshot has nothing to show.
        since = self._joined if followed.seen is None else retries.since
        if since is None:
            return None

        at = since + self._patience
        if clock() >= at:
            return Waiting(retries.error)
        if at < math.inf:
            wake = partial(self._wake, followed.execution.id)
            followed.timer = asyncio.get_running_loop().call_at(at, wake)
        return None

    def _leave(self, followed: _Followed) -> None:
        execution_id = followed.execution.id
        del self._followed[execution_id]
        self._news.pop(execution_id, None)
        followed.cancel_timer()
        followed.watch.leave(followed.waiter)

    def _wake(self, execution_id: int) -> None:
        self._news[execution_id] = None
        if self._waiting is not None:
            resolve(self._waiting)

    async def _wait(self) -> None:
        """Wait until there may be news, or for the deadline."""
        self._lifetime.check_loop()
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        timer = None
        if self._deadline.at < math.inf:
            timer = loop.call_at(self._deadline.at, resolve, self._waiting)

        try:
            await self._waiting
        finally:
            self._waiting = None
            if timer is not None:
                timer.cancel()


async def follow(
    session: Session,
    executions: Iterable[Execution],
    timeout: float | EllipsisType | None = ...,
    *,
    patience: float = math.inf,
) -> AsyncGenerator[News, None]:
    """Yield the news of many executions until all have finished.

    That an execution is `Waiting` is news once its polls have failed for `patience` seconds, or
    once it has had no snapshot for so long, and then again for each poll that fails.
    """
    stream = CombinedStream(session, executions, timeout, patience)
    try:
        while (news := await stream.next()) is not None:
            yield news
    finally:
        stream.close()


def snapshots_of(
    session: Session,
    items: Iterable[int | str | Execution],
    timeout: float | EllipsisType | None,
) -> AsyncGenerator[tuple[Execution, Snapshot], None]:
    """Do what `Session.stream_all` does."""
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise TypeError(f"items must be an iterable of ids or executions, not {items!r:.100}")

    executions: dict[int, Execution] = {}
    for item in items:
        if isinstance(item, StartRequest):
            raise TypeError(f"stream_all starts no runs: start it first, got {item!r:.100}")
        execution = handle_of(session, item)
        executions.setdefault(execution.id, execution)
    return _stream(session, list(executions.values()), check_timeout(timeout))


async def _stream(
    session: Session, executions: list[Execution], timeout: float | EllipsisType | None
) -> AsyncGenerator[tuple[Execution, Snapshot], None]:
    failures: list[Exception] = []
    async with aclosing(follow(session, executions, timeout)) as news:
        async for execution, result in news:
            if isinstance(result, Snapshot):
                yield execution, result
            elif isinstance(result, Unauthorized | SessionClosed):
                raise result  # no other execution can be followed either
            elif isinstance(result, Exception):
                failures.append(result)

    if failures:
        first, *others = failures
        for failure in others:
            first.add_note(f"{type(failure).__name__}: {failure}")
        raise first
