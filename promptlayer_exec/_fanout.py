"""Many executions at once: bounded, lazy, each outcome as it arrives. It knows no HTTP."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import anyio
import attrs

from promptlayer_exec._display import short_repr
from promptlayer_exec._engine.start import Start, log_unknown
from promptlayer_exec._engine.tasks import CLEAN_UP, Tasks, foreign_cancellation, is_cancelled
from promptlayer_exec._errors import (
    PromptLayerExecError,
    SessionClosed,
    StartUnknown,
    Unauthorized,
    copy_error,
)
from promptlayer_exec._models import Snapshot, StartRequest

if TYPE_CHECKING:
    from promptlayer_exec._execution import Execution

ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")
Spawn = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


@attrs.frozen
class Outcome(Generic[ItemT, OutputT]):
    """How one item of a fan-out ended.

    Attributes:
        index: the item's position among the items, from 0.
        item: the item itself.
        execution: its handle, if there is an execution.
        snapshot: the last snapshot of the execution, if there was one.
        output: its main output; None if there is an error.
        error: the error, if the item failed.
    """

    index: int
    item: ItemT = attrs.field(repr=short_repr)
    execution: Execution | None = None
    snapshot: Snapshot | None = None
    output: OutputT = attrs.field(default=cast(Any, None), repr=short_repr)
    error: Exception | None = attrs.field(default=None, repr=short_repr)

    @property
    def ok(self) -> bool:
        """Whether the item ended without an error."""
        return self.error is None

    def result(self) -> OutputT:
        """Return the output, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.output


@attrs.define(eq=False)
class RunningItem(Generic[ItemT]):
    """One item in flight, with its start, execution and last snapshot so far."""

    index: int
    item: ItemT
    start: Start | None = None
    execution: Execution | None = None
    is_reported: bool = False

    @property
    def snapshot(self) -> Snapshot | None:
        return None if self.execution is None else self.execution._last


def report_abandoned(ended: Outcome[Any, Any] | RunningItem[Any]) -> None:
    """Log what was started, or may have been, if its outcome will not be delivered."""
    if not isinstance(ended.item, StartRequest):
        return
    if ended.execution is not None:
        ended.execution._report_undelivered("outcome")
    elif isinstance(ended, Outcome) and isinstance(ended.error, StartUnknown):
        log_unknown(ended.error, ended.item)


async def fan_out(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    run_item: Callable[[RunningItem[ItemT]], Awaitable[Any]],
    *,
    max_in_flight: int,
    open_client: Callable[[], Awaitable[Spawn]],
) -> AsyncGenerator[Outcome[ItemT, Any], None]:
    """Yield the outcome of each item as it arrives; errors are those of `Session.as_completed`.

    Items are taken one at a time, when fewer than `max_in_flight` are in flight or wait to be
    yielded. `open_client` returns a function that runs a task until the session is closed.
    `run_item` may be called in a task that is cancelled already: then it must begin nothing.
    """
    fan = _FanOut(items, run_item, anyio.Semaphore(max_in_flight))
    (await open_client())(fan.run)
    try:
        while (outcome := await fan.next_outcome()) is not None:
            yield outcome
        if fan.error is not None:
            raise fan.error
    finally:
        await fan.cancel()


_ELSEWHERE = (
    "this fan-out began in another event loop, where it is ended now; the log has the ids of the"
    " runs that it started and did not deliver"
)


@attrs.define(eq=False)
class _FanOut(Generic[ItemT]):
    _items: Iterable[ItemT] | AsyncIterable[ItemT]
    _run_item: Callable[[RunningItem[ItemT]], Awaitable[Any]]
    # Released when an outcome is taken, so that a slow consumer does not let outcomes pile up.
    _slots: anyio.Semaphore
    error: BaseException | None = None
    _loop: asyncio.AbstractEventLoop = attrs.field(factory=asyncio.get_running_loop)
    _outcomes: asyncio.Queue[Outcome[ItemT, Any] | None] = attrs.field(factory=asyncio.Queue)
    _scope: anyio.CancelScope = attrs.field(factory=anyio.CancelScope)
    _is_running: bool = False
    _is_taking: bool = True
    _is_abandoned: bool = False
    _tasks: Tasks = attrs.field(factory=Tasks)
    _in_flight: set[RunningItem[ItemT]] = attrs.field(factory=set)
    _ended: anyio.Event = attrs.field(factory=anyio.Event)

    async def next_outcome(self) -> Outcome[ItemT, Any] | None:
        """Wait for the next outcome; None means that there are no more."""
        if not self._is_elsewhere():
            outcome = await self._outcomes.get()
            if outcome is not None:
                self._slots.release()
            return outcome
        if self._outcomes.empty():
            raise RuntimeError(_ELSEWHERE)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._slots.release)
        return self._outcomes.get_nowait()

    def _is_elsewhere(self) -> bool:
        try:
            return self._loop is not asyncio.get_running_loop()
        except RuntimeError:  # there is none: the generator was dropped
            return True

    async def cancel(self) -> None:
        """Cancel what is in flight, and wait until it has ended."""
        self._is_abandoned = True
        while not self._outcomes.empty():
            if (outcome := self._outcomes.get_nowait()) is not None:
                report_abandoned(outcome)
        if self._ended.is_set():
            return
        if self._is_elsewhere():
            for item in list(self._in_flight):  # that loop may never run again
                item.is_reported = item.execution is not None
                if item.is_reported:
                    report_abandoned(item)
                elif item.start is not None:
                    item.start.report_left()
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._scope.cancel)
            raise RuntimeError(_ELSEWHERE)
        self._scope.cancel()
        if self._is_running:
            with anyio.CancelScope(shield=True):
                await self._ended.wait()

    async def run(self) -> None:
        """Take items, and run each to its end."""
        self._is_running = True
        # Items are taken in a task of their own, which is cancelled once, and again if it seems to
        # have suppressed that: a scope would cancel each `await` in a user's clean-up.
        taking = Tasks()
        taking.start(self._take, name="promptlayer_exec.items")
        try:
            with self._scope:
                try:
                    await taking.ended()
                    await self._tasks.ended()
                finally:
                    self._is_taking = False
                    taking.cancel()
                    self._tasks.cancel()
                    with anyio.CancelScope(shield=True):
                        await self._tasks.ended_by_cancellation()
                        await taking.ended_by_cancellation(CLEAN_UP)
        except anyio.get_cancelled_exc_class():
            self.error = self.error or SessionClosed()
            raise
        finally:
            self._ended.set()
            self._outcomes.put_nowait(None)

    async def _take(self) -> None:
        try:
            async with aclosing(each(self._items)) as items:
                indexes = itertools.count()
                while True:
                    await self._slots.acquire()
                    self._start(RunningItem(next(indexes), await anext(items)))
        except StopAsyncIteration:
            pass
        except asyncio.CancelledError as error:
            if not is_cancelled():
                self.error = self.error or foreign_cancellation("items", error)
        except BaseException as error:  # noqa: BLE001 - raised to the consumer
            self.error = self.error or error

    def _start(self, item: RunningItem[ItemT]) -> None:
        if not self._is_taking:  # `items` suppressed its cancellation
            raise asyncio.CancelledError
        self._in_flight.add(item)
        self._tasks.start(partial(self._run_one, item), name="promptlayer_exec.item")

    async def _run_one(self, item: RunningItem[ItemT]) -> None:
        if item not in self._in_flight:  # it ended, and was cancelled in its last step
            return
        output: Any = None
        error: Exception | None = None
        try:
            output = await self._run_item(item)
        except asyncio.CancelledError as cancelled:
            foreign = not is_cancelled()
            error = foreign_cancellation("an item", cancelled) if foreign else self._end_error(item)
        except Exception as failure:  # noqa: BLE001 - the error of this outcome
            error = failure
            if isinstance(failure, Unauthorized | SessionClosed):
                self._fail(copy_error(failure))
        except BaseException as fatal:  # noqa: BLE001 - raised, it would end the session
            self._fail(fatal)
            report_abandoned(item)
            return
        finally:
            self._in_flight.discard(item)
        outcome = Outcome(item.index, item.item, item.execution, item.snapshot, output, error)
        if not self._is_abandoned:
            self._outcomes.put_nowait(outcome)
        elif not item.is_reported:
            report_abandoned(outcome)

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self._scope.cancel()

    def _end_error(self, item: RunningItem[ItemT]) -> PromptLayerExecError:
        """Return the error of an item that is cancelled because the fan-out cannot continue."""
        cause = self.error if isinstance(self.error, PromptLayerExecError) else SessionClosed()
        error = cast(PromptLayerExecError, copy_error(cause))
        if isinstance(error, Unauthorized):  # its text may say that no run was started
            what = "this item was given up, because another failed"
            if item.execution is None and isinstance(item.item, StartRequest):
                what += " (if its start was sent already, its id is in the log)"
            error.args = (f"{what}: {error.args[0]}",)
        error.execution_id = None if item.execution is None else item.execution.id
        error.last_snapshot = item.snapshot
        return error


async def each(items: Iterable[ItemT] | AsyncIterable[ItemT]) -> AsyncGenerator[ItemT, None]:
    """Yield the items of an iterable or async iterable; an async generator is closed at the end."""
    if not isinstance(items, AsyncIterable):
        for item in items:
            yield item
        return
    iterator = aiter(items)
    async with aclosing(iterator) if isinstance(iterator, AsyncGenerator) else nullcontext():
        async for item in iterator:
            yield item
