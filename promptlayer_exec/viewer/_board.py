"""The executions that the page shows; they are followed whether or not a page is open."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Self

import attrs

from promptlayer_exec import Execution, PromptLayerExecError, Session, Snapshot


@attrs.define(eq=False)
class Card:
    """One execution of the board, with its latest snapshot."""

    execution: Execution
    snapshot: Snapshot | None = None
    received: float = 0.0  # when the snapshot was received, by the loop's clock
    error: str | None = None  # why the execution is no longer followed, if it is not complete

    @property
    def state(self) -> str:
        """The state as a word: `lost`, `waiting`, `running`, `succeeded` or `failed`."""
        if self.error is not None:
            return "lost"
        if self.snapshot is None:
            return "waiting"
        if not self.snapshot.complete:
            return "running"
        return "succeeded" if self.snapshot.succeeded else "failed"

    @property
    def elapsed(self) -> float:
        """How many seconds the execution has been followed, until it was complete."""
        if self.snapshot is None:
            return 0.0
        if self.state != "running":
            return self.snapshot.elapsed
        return self.snapshot.elapsed + asyncio.get_running_loop().time() - self.received


class Board:
    """Follows executions, and keeps the latest snapshot of each until it is removed.

    A page that is opened late, or reloaded, therefore shows when each node ran, and not only how
    it ended. Use the board with `async with`, in the loop of its session.

    Args:
        session: the session that follows executions; the board does not close it.
        note: a text that the page shows above the executions.
    """

    def __init__(self, session: Session, *, note: str = "") -> None:
        self.cards: dict[int, Card] = {}  # by execution id, in the order of the page
        self.note = note
        self.instance = secrets.token_hex(8)
        self.opened = asyncio.Event()
        self.is_closed = False
        self.changed = asyncio.Event()
        self._session = session
        self._watches: dict[Card, asyncio.Task[None]] = {}

    def follow(self, execution_id: int) -> None:
        """Follow an execution as the last of the page, without checking that it exists."""
        self._follow(self._session.execution(execution_id))

    async def add(self, execution_id: int) -> None:
        """Follow an execution as the first of the page, if the server knows it.

        An execution that is already followed, or complete, is not changed.

        Raises:
            PromptLayerExecError: the server does not know the execution, or did not answer.
        """
        card = self.cards.get(execution_id)
        if card is None or card.error is not None:
            execution = self._session.execution(execution_id) if card is None else card.execution
            await execution.snapshot()
            self._follow(execution, first=True)

    async def start(self, workflow: str, inputs: Mapping[str, Any]) -> Execution:
        """Start a run of a workflow, and follow it as the first of the page.

        Raises:
            TypeError: JSON cannot represent the inputs.
            ValueError: JSON cannot represent the inputs.
            PromptLayerExecError: it was not started, or it is unknown whether it was.
        """
        execution = await self._session.start(workflow, inputs)
        self._follow(execution, first=True)
        return execution

    def remove(self, execution_id: int) -> None:
        """Stop following an execution; it continues at the server."""
        card = self.cards.pop(execution_id, None)
        if card in self._watches:
            self._watches[card].cancel()
        self._notify()

    def close(self) -> None:
        """End the events of every page."""
        self.is_closed = True
        self._notify()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        for watch in self._watches.values():
            watch.cancel()
        if self._watches:
            await asyncio.wait(self._watches.values())

    def _follow(self, execution: Execution, *, first: bool = False) -> None:
        before = self.cards.get(execution.id)
        if before is not None and before.error is None:
            return
        card = Card(execution)
        start = {execution.id: card} if first and before is None else {}
        self.cards = {**start, **self.cards, execution.id: card}
        watch = asyncio.create_task(self._watch(card), name=f"viewer {execution.id}")
        self._watches[card] = watch
        watch.add_done_callback(lambda _: self._watches.pop(card))
        self._notify()

    async def _watch(self, card: Card) -> None:
        try:
            async with aclosing(card.execution.stream(timeout=None)) as snapshots:
                async for snapshot in snapshots:
                    card.snapshot = snapshot
                    card.received = asyncio.get_running_loop().time()
                    self._notify()
        except PromptLayerExecError as error:
            card.error = str(error)
            self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()
