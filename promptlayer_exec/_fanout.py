"""Many executions at once: bounded, lazy, each outcome as it comes. It knows no HTTP."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
)
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import anyio

from promptlayer_exec._errors import (
    PromptLayerExecError,
    SessionClosed,
    Unauthorized,
    copy_error,
)
from promptlayer_exec._models import Outcome, Snapshot
from promptlayer_exec._tasks import Tasks, is_cancelled, stray

if TYPE_CHECKING:
    from promptlayer_exec._execution import Execution

ItemT = TypeVar("ItemT")
Spawn = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


class Flight(Generic[ItemT]):
    """One item under way, and what is known of it so far.

    Attributes:
        index: its place among the items.
        item: the item.
        execution: its handle, once there is an execution.
        snapshot: the last that was seen of it.
    """

    __slots__ = ("execution", "index", "item", "snapshot")

    def __init__(self, index: int, item: ItemT) -> None:
        self.index = index
        self.item = item
        self.execution: Execution | None = None
        self.snapshot: Snapshot | None = None

    def see(self, snapshot: Snapshot) -> None:
        """Take note of a snapshot."""
        self.snapshot = snapshot

    def end(self, output: Any = None, error: Exception | None = None) -> Outcome[ItemT, Any]:
        """Return how it ended."""
        return Outcome(self.index, self.item, self.execution, self.snapshot, output, error)


async def fan_out(
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    carry_out: Callable[[Flight[ItemT]], Awaitable[Any]],
    *,
    max_in_flight: int,
    join: Callable[[], Awaitable[Spawn]],
) -> AsyncGenerator[Outcome[ItemT, Any], None]:
    """Yield the outcome of each item as it comes.

    Args:
        items: taken one at a time, when there is a place for the next; an async generator is
            closed at the end.
        carry_out: does the work of one item, notes what it learns of it, and returns the output.
        max_in_flight: how many may be under way, or have ended without being yielded yet.
        join: returns what runs a task until it ends by itself or the session is closed.

    Raises:
        Unauthorized, SessionClosed: an item met it, so that no later one could succeed. Those
            under way were given up; each of them was yielded, with that error.
        BaseException: one of `items` itself, after those under way have ended by themselves.
    """
    fan = _Fan(items, carry_out, max_in_flight)
    (await join())(fan.run)
    try:
        while (outcome := await fan.next()) is not None:
            yield outcome
    finally:
        await fan.leave()


class _Fan(Generic[ItemT]):
    def __init__(
        self,
        items: Iterable[ItemT] | AsyncIterable[ItemT],
        carry_out: Callable[[Flight[ItemT]], Awaitable[Any]],
        max_in_flight: int,
    ) -> None:
        self._items = items
        self._carry_out = carry_out
        # Given back when an outcome is taken, so that nothing piles up before a slow consumer.
        self._places = anyio.Semaphore(max_in_flight)
        self._scope = anyio.CancelScope()
        self._outcomes: deque[Outcome[ItemT, Any]] = deque()
        self._news = anyio.Event()
        self._runs = False
        self._flights = Tasks()
        self._ended = anyio.Event()
        self._left = False
        self._error: BaseException | None = None

    async def next(self) -> Outcome[ItemT, Any] | None:
        """Return the next outcome; None after the last."""
        while not self._outcomes:
            if self._ended.is_set():
                if self._error is not None:
                    raise self._error
                return None
            self._news = anyio.Event()
            await self._news.wait()
        self._places.release()
        return self._outcomes.popleft()

    async def leave(self) -> None:
        """Give up what is under way, and wait until it is."""
        self._left = True
        self._scope.cancel()
        if self._runs:
            with anyio.CancelScope(shield=True):
                await self._ended.wait()

    async def run(self) -> None:
        """Take up items, and see them to their ends."""
        self._runs = True
        try:
            with self._scope:
                try:
                    await self._supply()
                    await self._flights.ended()
                finally:
                    self._flights.cancel()
                    with anyio.CancelScope(shield=True):
                        await self._flights.ended()
        except anyio.get_cancelled_exc_class():
            self._error = self._error or SessionClosed()
            raise
        finally:
            self._ended.set()
            self._news.set()

    async def _supply(self) -> None:
        # In a task that is cancelled but once: a scope would cancel each `await` of the clean-up in
        # an async generator of the user's.
        supply = asyncio.create_task(self._admit(), name="promptlayer_exec.items")
        try:
            await asyncio.wait([supply])
        finally:
            supply.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([supply])

    async def _admit(self) -> None:
        try:
            async with aclosing(each(self._items)) as items:
                index = 0
                while True:
                    await self._places.acquire()
                    flight = Flight(index, await anext(items))
                    index += 1
                    self._flights.start(self._fly(flight), name="promptlayer_exec.Flight")
        except StopAsyncIteration:
            pass
        except asyncio.CancelledError as error:
            if not is_cancelled():
                self._error = self._error or stray("items", error)
        except BaseException as error:  # noqa: BLE001 - whatever `items` raises, it is the consumer's
            self._error = self._error or error

    async def _fly(self, flight: Flight[ItemT]) -> None:
        try:
            outcome = flight.end(output=await self._carry_out(flight))
        except asyncio.CancelledError as error:
            if not is_cancelled():
                outcome = flight.end(error=stray("an item", error))
            elif self._left:
                raise
            else:
                outcome = flight.end(error=self._given_up(flight))
        except (Unauthorized, SessionClosed) as error:
            outcome = flight.end(error=error)
            self._fail(copy_error(error))
        except Exception as error:  # noqa: BLE001 - one item's failure is its own
            outcome = flight.end(error=error)
        except BaseException as error:  # noqa: BLE001 - passed on, it would end the whole session
            self._fail(error)
            return
        self._outcomes.append(outcome)
        self._news.set()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._scope.cancel()

    def _given_up(self, flight: Flight[ItemT]) -> PromptLayerExecError:
        error: Any = SessionClosed()
        if isinstance(self._error, PromptLayerExecError):
            error = copy_error(self._error)
        error.execution_id = None if flight.execution is None else flight.execution.id
        error.last_snapshot = flight.snapshot
        return cast(PromptLayerExecError, error)


async def each(items: Iterable[ItemT] | AsyncIterable[ItemT]) -> AsyncGenerator[ItemT, None]:
    """Yield the items of an iterable or async iterable; an async generator is closed at the end."""
    if not isinstance(items, AsyncIterable):
        for item in items:
            yield item
        return
    iterator = aiter(items)
    try:
        async for item in iterator:
            yield item
    finally:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()
