"""Many executions in parallel: bounded and lazy, with each outcome as soon as it arrives."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Iterable
from contextlib import AsyncExitStack, aclosing, suppress
from functools import partial
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import anyio
import attrs
from typing_extensions import TypeVar as DefaultTypeVar

from promptlayer_exec._engine.abandoned import AbandonedRuns
from promptlayer_exec._engine.tasks import clock
from promptlayer_exec._session.execution import Execution
from promptlayer_exec._values.arguments import positive_int64
from promptlayer_exec._values.errors import (
    PromptLayerExecError,
    SessionClosed,
    StartUnknown,
    Unauthorized,
    copy_error,
)
from promptlayer_exec._values.models import Snapshot, StartRequest
from promptlayer_exec._values.policies import Deadline, check_timeout
from promptlayer_exec._values.text import short_repr

if TYPE_CHECKING:
    from promptlayer_exec._session.session import Session

ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")
# `promptlayer_exec.sync` has handles of its own.
HandleT = DefaultTypeVar("HandleT", default=Execution)


@attrs.frozen
class Outcome(Generic[ItemT, OutputT, HandleT]):
    """The result of one item, from `Session.as_completed` or `Session.collect`.

    Attributes:
        index: the item's position among the items, from 0.
        item: the item itself.
        execution: the handle of its execution, if it has one.
        snapshot: the last snapshot of the execution, if there was one.
        output: its main output, or None if there is an error.
        error: the error, or None if the item succeeded.
    """

    index: int
    item: ItemT = attrs.field(repr=short_repr)
    execution: HandleT | None = None
    snapshot: Snapshot | None = None
    output: OutputT = attrs.field(default=cast(Any, None), repr=short_repr)
    error: Exception | None = attrs.field(default=None, repr=short_repr)

    @property
    def ok(self) -> bool:
        """Whether the item succeeded.

        It tells type checkers nothing about `error`. They know its type after
        `if outcome.error is not None`.
        """
        return self.error is None

    def result(self) -> OutputT:
        """Return the output, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.output


def fan_out(
    session: Session,
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    *,
    max_in_flight: int,
    timeout: float | EllipsisType | None,
    into: Any,
) -> FanOut[ItemT]:
    """Return the fan-out of `Session.as_completed` and `Session.collect`."""
    if not isinstance(items, Iterable | AsyncIterable):
        raise TypeError(f"items must be an iterable or async iterable, not {items!r:.100}")
    into = Any if into is None else into
    session._check_type(into)
    slots = positive_int64("max_in_flight", max_in_flight, "an int of at least 1")
    return FanOut(session, items, anyio.Semaphore(slots), check_timeout(timeout), into)


def report_abandoned(outcomes: Iterable[Outcome[Any, Any]]) -> None:
    """Log, in one line, the runs of outcomes that nobody will get."""
    abandoned = AbandonedRuns()
    with abandoned.gathering():
        for outcome in outcomes:
            _add_abandoned(abandoned, outcome)


def _add_abandoned(abandoned: AbandonedRuns, outcome: Outcome[Any, Any]) -> None:
    if not isinstance(outcome.item, StartRequest):
        return
    if outcome.execution is not None:
        abandoned.add(outcome.execution._abandoned())
    elif isinstance(outcome.error, StartUnknown):
        abandoned.add_lost(outcome.error)


@attrs.define(eq=False)
class _Item(Generic[ItemT]):
    """One item in flight, with its execution so far."""

    index: int
    item: ItemT
    execution: Execution | None = None

    @property
    def snapshot(self) -> Snapshot | None:
        """The last snapshot of its execution, if there is one."""
        if self.execution is None:
            return None
        return self.execution._last


@attrs.define(eq=False)
class FanOut(Generic[ItemT]):
    """One task takes items while a slot is free. Each item runs in its own task."""

    _session: Session
    _items: Iterable[ItemT] | AsyncIterable[ItemT]
    # Released when the consumer takes an outcome, so that outcomes do not pile up.
    _slots: anyio.Semaphore
    _timeout: float | EllipsisType | None
    _into: Any
    _error: Exception | None = attrs.field(init=False, default=None)
    _outcomes: asyncio.Queue[Outcome[ItemT, Any] | None] = attrs.field(
        init=False, factory=asyncio.Queue
    )
    _abandoned: AbandonedRuns = attrs.field(init=False, factory=AbandonedRuns)
    _is_abandoned: bool = attrs.field(init=False, default=False)
    _tasks: set[asyncio.Task[Any]] = attrs.field(init=False, factory=set)

    async def outcomes(self) -> AsyncGenerator[Outcome[ItemT, Any], None]:
        """Yield each outcome as soon as it arrives, or raise the errors of `as_completed`."""
        lifetime = self._session._open().lifetime
        taking = lifetime.spawn(self._take(), name="promptlayer_exec.items")
        self._tasks.add(taking)
        self._abandoned.begin()  # until the last task has ended
        taking.add_done_callback(self._taken)

        try:
            while (outcome := await self._outcomes.get()) is not None:
                self._slots.release()
                yield outcome
            if self._error is not None:
                raise self._error
        finally:
            await self._abandon()

    async def collect(self) -> list[Outcome[ItemT, Any]]:
        """Return all outcomes in the order of the items. On an error, log every started run."""
        outcomes = []
        with self._abandoned.gathering():
            try:
                async with aclosing(self.outcomes()) as completed:
                    async for outcome in completed:
                        outcomes.append(outcome)  # noqa: PERF401 - not inside of aclosing
            except BaseException:
                for outcome in outcomes:
                    _add_abandoned(self._abandoned, outcome)
                raise
        return sorted(outcomes, key=lambda outcome: outcome.index)

    async def _take(self) -> None:
        """Take items, and run each in its own task."""
        async with aclosing(each(self._items)) as items:
            indexes = itertools.count()
            while True:
                # Wait for the slot first, so that an item that cannot run yet stays in its
                # iterable.
                await self._slots.acquire()
                try:
                    item = _Item(next(indexes), await anext(items))
                except StopAsyncIteration:
                    return

                task = self._session._open().lifetime.spawn(
                    self._run(item), name="promptlayer_exec.item", cancel=lambda: None
                )
                self._tasks.add(task)
                task.add_done_callback(partial(self._ended, item))

    async def _run(self, running: _Item[ItemT]) -> Any:
        session, item = self._session, running.item
        if not isinstance(item, StartRequest):
            running.execution = handle_of(session, item)
        deadline = session._settings.deadline(self._timeout, now=clock())
        if not isinstance(item, StartRequest):
            return await self._output_of(cast(Execution, running.execution), deadline)

        with session._calling(item) as call:
            running.execution = call.execution = await session._start(
                item, deadline, abandoned=self._abandoned
            )
            return await self._output_of(call.execution, deadline)

    def _output_of(self, execution: Execution, deadline: Deadline) -> Awaitable[Any]:
        into = self._into if execution._into is Any else execution._into
        return execution._output(deadline, into)

    def _taken(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._error = self._error or SessionClosed()
        elif isinstance(error := task.exception(), Exception):
            self._error = self._error or error
        self._remove(task)

    def _ended(self, item: _Item[ItemT], task: asyncio.Task[Any]) -> None:
        output: Any = None
        error: Exception | None = None

        if task.cancelled():
            error = self._end_error(item)
        elif (failure := task.exception()) is None:
            output = task.result()
        else:
            error = cast(Exception, failure)
            if isinstance(error, Unauthorized | SessionClosed) and self._error is None:
                self._error = copy_error(error)  # no later item could succeed
                self._cancel()

        outcome = Outcome(item.index, item.item, item.execution, item.snapshot, output, error)
        if self._is_abandoned:
            _add_abandoned(self._abandoned, outcome)
        else:
            self._outcomes.put_nowait(outcome)
        self._remove(task)

    def _remove(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._outcomes.put_nowait(None)
            self._abandoned.end()

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _abandon(self) -> None:
        """Cancel the items in flight, and wait until they have stopped."""
        self._is_abandoned = True
        with self._abandoned.gathering():
            while not self._outcomes.empty():
                if (outcome := self._outcomes.get_nowait()) is not None:
                    _add_abandoned(self._abandoned, outcome)
            self._cancel()
            while self._tasks:
                await asyncio.wait(self._tasks)

    def _end_error(self, item: _Item[ItemT]) -> PromptLayerExecError:
        """Return the error for an item in flight when the fan-out had to stop."""
        is_start = isinstance(item.item, StartRequest)
        # A task that was cancelled before its first step has not made the handle.
        if item.execution is None and not is_start:
            with suppress(TypeError, ValueError):
                item.execution = handle_of(self._session, item.item)

        error: PromptLayerExecError = SessionClosed()
        if isinstance(self._error, PromptLayerExecError):
            error = cast(PromptLayerExecError, copy_error(self._error))

        # The 401 concerns the other item: "no run was started" need not be true of this one.
        if isinstance(error, Unauthorized):
            what = "this item was cancelled, because another item failed"
            if item.execution is None and is_start:
                what += " (if its start request was already sent, the log has its id)"
            error._add_context(what)

        error.execution_id = None
        if item.execution is not None:
            error.execution_id = item.execution.id
        error.last_snapshot = item.snapshot
        return error


async def each(items: Iterable[ItemT] | AsyncIterable[ItemT]) -> AsyncGenerator[ItemT, None]:
    """Yield the items of an iterable or async iterable, and close it if it is a generator."""
    if not isinstance(items, AsyncIterable):
        for item in items:
            yield item
        return

    async with AsyncExitStack() as stack:
        iterator = aiter(items)
        if isinstance(iterator, AsyncGenerator):
            await stack.enter_async_context(aclosing(iterator))
        async for item in iterator:
            yield item


def handle_of(session: Session, item: Any) -> Execution:
    """Return the handle of an item that is not a `StartRequest`."""
    if not isinstance(item, Execution):
        try:
            return session.execution(item)
        except TypeError:
            raise TypeError(
                "an item must be an execution id, an Execution or a StartRequest,"
                f" not {item!r:.100}"
            ) from None

    if item._session is None:  # it was unpickled
        return Execution(
            *(session, item.id, item.workflow),
            warning=item.warning,
            key=item._key,
            into=item._into,
        )
    if item._session is not session:
        raise ValueError(f"execution {item.id} belongs to another session. Pass its id instead")
    return item
