"""Follows many executions in one loop, without a task for each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable
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


@attrs.define(eq=False)
class _Followed:
    """One execution that is still followed."""

    execution: Execution
    watch: Watch
    waiter: Waiter
    seen: Snapshot | None = None


class CombinedStream:
    """The snapshots of many executions, for one reader.

    A slow reader gets the latest snapshot of each execution and skips older ones, so at most one
    per execution waits for it.
    """

    def __init__(
        self,
        session: Session,
        executions: Iterable[Execution],
        timeout: float | EllipsisType | None = ...,
    ) -> None:
        """Join the watch of each execution. `close` leaves them.

        Raises:
            ConfigurationError: the session has no API key.
            SessionClosed: the session was closed.
        """
        client = session._open()
        self._lifetime = client.lifetime
        self._deadline = client.deadline(timeout)

        self._followed: dict[int, _Followed] = {}
        # Handles with a complete snapshot need no watch.
        self._complete: list[Execution] = []
        # Executions with a new snapshot or error, in the order of arrival.
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

    @property
    def has_ended(self) -> bool:
        """Whether `next` has returned the last event of every execution."""
        return not self._followed and not self._complete

    async def next(
        self, *, until: float = math.inf
    ) -> tuple[Execution, Snapshot | Exception] | None:
        """Return an execution with its next snapshot, or with its error.

        Return None once every execution has finished, or at the time `until`, on the loop's clock.
        """
        if self._complete:
            execution = self._complete.pop()
            assert execution._last is not None  # noqa: S101 - for mypy
            return execution, execution._last

        while self._followed:
            while self._news:
                execution_id = next(iter(self._news))
                del self._news[execution_id]
                if (event := self._look(self._followed[execution_id])) is not None:
                    return event

            await self._wait(until)
            if clock() >= self._deadline.at:
                self._news.update(dict.fromkeys(self._followed))
            elif not self._news and clock() >= until:
                break
        return None

    def close(self) -> None:
        """Leave all watches. The ones without other waiters stop polling."""
        for followed in list(self._followed.values()):
            self._leave(followed)

    def _look(self, followed: _Followed) -> tuple[Execution, Snapshot | Exception] | None:
        execution, watch = followed.execution, followed.watch
        try:
            snapshot = watch.look(followed.waiter, followed.seen)
        except Exception as error:  # noqa: BLE001 - it concerns this execution alone
            if isinstance(error, PromptLayerExecError):
                execution._recall(error)
            self._leave(followed)
            return execution, error

        if snapshot is None:
            return None
        snapshot = followed.seen = execution._remember(snapshot)
        if snapshot.complete:
            self._leave(followed)
        elif watch.error is not None:  # nothing will wake this reader for it again
            self._news[execution.id] = None
        return execution, snapshot

    def _leave(self, followed: _Followed) -> None:
        execution_id = followed.execution.id
        del self._followed[execution_id]
        self._news.pop(execution_id, None)
        followed.watch.leave(followed.waiter)

    def _wake(self, execution_id: int) -> None:
        self._news[execution_id] = None
        if self._waiting is not None:
            resolve(self._waiting)

    async def _wait(self, until: float) -> None:
        """Wait for news, for the deadline, or until the time `until`."""
        self._lifetime.check_loop()
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        timer = None
        if (at := min(until, self._deadline.at)) < math.inf:
            timer = loop.call_at(at, resolve, self._waiting)

        try:
            await self._waiting
        finally:
            self._waiting = None
            if timer is not None:
                timer.cancel()


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
    stream = CombinedStream(session, executions, timeout)

    try:
        while (event := await stream.next()) is not None:
            execution, result = event
            if isinstance(result, Snapshot):
                yield execution, result
            elif isinstance(result, Unauthorized | SessionClosed):
                raise result  # no other execution can be followed either
            else:
                failures.append(result)
    finally:
        stream.close()

    if failures:
        first, *others = failures
        for failure in others:
            first.add_note(f"{type(failure).__name__}: {failure}")
        raise first
