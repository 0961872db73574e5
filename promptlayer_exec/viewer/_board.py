"""The executions that the page shows, followed whether or not a page is open."""

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import aclosing
from types import MappingProxyType, TracebackType
from typing import Any, Self

import anyio
from attrs import define, field

from promptlayer_exec import Execution, PromptLayerExecError, Session, Snapshot


@define(eq=False)
class Card:
    """One execution of the board.

    Attributes:
        execution: what is followed.
        snapshot: the last that was seen of it.
        seen: when that was, by the loop's clock.
        error: why it is followed no more, if it is not complete.
    """

    execution: Execution
    snapshot: Snapshot | None = None
    seen: float = 0.0
    error: str | None = None
    _task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def state(self) -> str:
        """Return `lost`, `waiting`, `running`, `succeeded` or `failed`."""
        if self.error is not None:
            return "lost"
        if self.snapshot is None:
            return "waiting"
        if not self.snapshot.complete:
            return "running"
        return "succeeded" if self.snapshot.succeeded else "failed"

    @property
    def elapsed(self) -> float:
        """Return the seconds that the execution has been followed for, until it was complete."""
        if self.snapshot is None:
            return 0.0
        if self.state != "running":
            return self.snapshot.elapsed
        return self.snapshot.elapsed + asyncio.get_running_loop().time() - self.seen


class Board:
    """Follows executions, and keeps what was seen of each until it is removed.

    So a page that is opened late, or again, shows when each node ran, and not just how it ended.
    Use it with `async with`, in the loop of its session; it starts nothing and adds nothing by
    itself.

    Args:
        session: what to follow executions with; it is not closed.
        note: what the page is to say about them all.
    """

    def __init__(self, session: Session, *, note: str = "") -> None:
        self.note = note
        self.instance = secrets.token_hex(8)
        self.opened = asyncio.Event()
        self.is_closed = False
        self.changed = anyio.Event()
        self._session = session
        self._cards: dict[int, Card] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def cards(self) -> Mapping[int, Card]:
        """The executions by id, in the order of the page."""
        return MappingProxyType(self._cards)

    def follow(self, execution_id: int) -> None:
        """Follow an execution, as the last of the page; at once, and whatever comes of it."""
        self._follow(self._session.execution(execution_id))

    async def add(self, execution_id: int) -> None:
        """Follow an execution, as the first of the page, if the server knows it.

        One that is being followed, or is complete, stays as it is.

        Raises:
            PromptLayerExecError: the server does not know it, or does not answer.
        """
        card = self._cards.get(execution_id)
        if card is None:
            execution = self._session.execution(execution_id)
        elif card.error is not None:
            execution = card.execution
        else:
            return
        await execution.snapshot()
        self._follow(execution, first=True)

    async def start(self, workflow: str, inputs: Mapping[str, Any]) -> Execution:
        """Start a run of a workflow, and follow it as the first of the page.

        Raises:
            TypeError, ValueError: the inputs are not what JSON can carry.
            PromptLayerExecError: it did not start, or nobody knows whether it did.
        """
        execution = await self._session.start(workflow, inputs)
        self._follow(execution, first=True)
        return execution

    def remove(self, execution_id: int) -> None:
        """Follow an execution no more; it goes on at the server."""
        card = self._cards.pop(execution_id, None)
        if card is not None and card._task is not None:
            card._task.cancel()
        self._wake()

    def close(self) -> None:
        """Let every page know that there will be nothing more."""
        self.is_closed = True
        self._wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _follow(self, execution: Execution, *, first: bool = False) -> None:
        before = self._cards.get(execution.id)
        if before is not None and before.error is None:
            return
        card = Card(execution)
        is_new_first = first and before is None
        start = {execution.id: card} if is_new_first else {}
        self._cards = {**start, **self._cards, execution.id: card}
        card._task = asyncio.create_task(self._watch(card), name=f"viewer {execution.id}")
        self._tasks.add(card._task)
        card._task.add_done_callback(self._tasks.discard)
        self._wake()

    async def _watch(self, card: Card) -> None:
        try:
            async with aclosing(card.execution.stream(timeout=None)) as snapshots:
                async for snapshot in snapshots:
                    card.snapshot = snapshot
                    card.seen = asyncio.get_running_loop().time()
                    self._wake()
        except PromptLayerExecError as error:
            card.error = str(error)
            self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()
