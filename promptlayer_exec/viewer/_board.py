"""The executions that the page shows. The board follows them even if no page is open."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Self

import attrs

from promptlayer_exec import (
    Event,
    Execution,
    Node,
    RequestRetried,
    Session,
    Snapshot,
    StartUnknown,
)
from promptlayer_exec._causes import NO_REASON, common_reason
from promptlayer_exec._integration import error_text, indented, warn_of_run
from promptlayer_exec.viewer._history import History
from promptlayer_exec.viewer._problems import Problem, explain, next_problem
from promptlayer_exec.viewer._timeline import Observation, Timeline


@attrs.define(eq=False)
class Card:
    """One execution of the board, with its latest snapshot.

    Moments are seconds since 1970.
    """

    execution: Execution
    workflow: str | None = None
    label: str | None = None
    version: int | None = None
    inputs: str | None = None  # JSON, if the run was started in a viewer
    metadata: str | None = None  # JSON as well
    started: float | None = None  # when, if it was started here, or by a batch
    ended: float | None = None  # when, as a batch has stored it
    batch: str | None = None  # the batch whose run it is, and the key of the item
    item: str | None = None
    is_listed: bool = True  # on the page of all executions, and not only on its own
    is_new: bool = False  # this viewer has started it, and sees all of it
    timeline: Timeline = attrs.Factory(Timeline)
    snapshot: Snapshot | None = None
    received: float = 0.0  # when the snapshot was received, by the loop's clock
    problem: Problem | None = None  # since the latest snapshot
    is_lost: bool = False  # it is no longer followed, though it is not complete

    @property
    def state(self) -> str:
        """The state as a word: `lost`, `waiting`, `running`, `succeeded` or `failed`."""
        if self.is_lost:
            return "lost"
        if self.snapshot is None:
            return "waiting"
        if not self.snapshot.complete:
            return "running"
        return "succeeded" if self.snapshot.succeeded else "failed"

    @property
    def failed_node(self) -> Node | None:
        """The first node that failed, of an execution that failed."""
        if self.snapshot is None or self.state != "failed" or not self.snapshot.failed_nodes:
            return None
        return self.snapshot.failed_nodes[0]

    @property
    def cause(self) -> str | None:
        """Why it failed, without what differs from run to run. None if it did not fail."""
        if self.state != "failed":
            return None
        return common_reason(_reason(self.failed_node))

    @property
    def elapsed(self) -> float | None:
        """The seconds since the origin of its times, until it was complete. None if unknown."""
        elapsed = self.timeline.elapsed
        if elapsed is None or self.state != "running":
            return elapsed
        return elapsed + asyncio.get_running_loop().time() - self.received

    @property
    def duration(self) -> float | None:
        """The seconds that it took, counted from the first poll if others started it."""
        if self.started is not None and self.ended is not None:
            return max(0.0, self.ended - self.started)
        if self.snapshot is None or not self.snapshot.complete or self.elapsed is None:
            return None
        origin = self.timeline.origin or 0.0
        return max(0.0, origin - (self.started or origin)) + self.elapsed


class Board:
    """Follows executions, and keeps the latest snapshot of each until you remove it.

    A page that you open late, or reload, therefore shows when each node ran, and not only its last
    status. Use the board with `async with`, in the loop of its session.

    Args:
        session: the session that follows executions. The board does not close it.
        note: a text that the page shows above the executions.
        history: remembers executions. The board closes it. None: nothing remembers them.
    """

    def __init__(self, session: Session, *, note: str = "", history: History | None = None) -> None:
        self.cards: dict[int, Card] = {}  # by execution id, in the order of the page
        self.note = note
        self.history = history
        self.instance = secrets.token_hex(8)
        self.opened = asyncio.Event()
        self.is_closed = False
        self.changed = asyncio.Event()
        self.session = session
        self._watches: dict[Card, asyncio.Task[None]] = {}

    def observe(self, event: Event) -> None:
        """Record why the session retries polls. Pass this method to the session as an observer."""
        card = self.cards.get(event.execution_id or 0)
        if card is not None and isinstance(event, RequestRetried):
            card.problem = next_problem(card.problem, event.error, delay=event.delay)
            self._notify()

    def follow(self, execution_id: int) -> None:
        """Follow an execution as the last of the page, without checking that it exists."""
        self._follow(Card(self.session.execution(execution_id)))

    async def add(
        self, execution_id: int, *, is_listed: bool = False, known: Mapping[str, Any] | None = None
    ) -> None:
        """Follow an execution as the first of the page, if it exists.

        One that is over by now does not join the list of the page unless it `is_listed`, because
        you opened it to look at it. An execution that is already on the board stays where it is.

        Args:
            execution_id: its id.
            is_listed: whether to list it in any case.
            known: what a batch has stored of it, by the names of the card's fields.

        Raises:
            PromptLayerExecError: the execution does not exist, or the server did not respond.
        """
        card = self.cards.get(execution_id)
        if card is not None and not card.is_lost:
            if known is not None:
                self._learn(card, known)
            if is_listed and not card.is_listed:
                card.is_listed = True
                self.cards = {execution_id: card, **self.cards}
                self._notify()
            return

        if card is None:
            new = Card(self.session.execution(execution_id), is_listed=is_listed)
        else:
            new = attrs.evolve(card, snapshot=None, problem=None, is_lost=False, is_new=False)
        if known is not None:
            self._learn(new, known)
        snapshot = await new.execution.snapshot()
        new.is_listed = new.is_listed or is_listed or not snapshot.complete
        self._follow(new, first=True)

        # Somebody opened executions that have only their own page to look at them once. The board
        # keeps the latest 20, and reads others again when it needs them.
        unlisted = [old_id for old_id, old in self.cards.items() if not old.is_listed]
        for old_id in unlisted[20:]:
            self.remove(old_id)

    async def start(
        self,
        workflow: str,
        inputs: Mapping[str, Any],
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Execution:
        """Start a run of a workflow, and follow it as the first of the page.

        Raises:
            TypeError: JSON cannot represent the inputs.
            ValueError: JSON cannot represent the inputs.
            PromptLayerExecError: the run did not start, or it is unknown whether it did.
        """
        known: dict[str, Any] = {
            "workflow": workflow,
            "label": label,
            "version": version,
            "metadata": None if metadata is None else json.dumps(dict(metadata)),
            "inputs": indented(inputs),
        }
        row = {**known, "began": time.time(), "is_started": True}

        try:
            execution = await self.session.start(
                workflow, inputs, label=label, version=version, metadata=metadata
            )
        except (StartUnknown, asyncio.CancelledError) as error:
            problem = "the viewer stopped before PromptLayer responded to the start request"
            if isinstance(error, StartUnknown):
                _, problem = explain(error)
            self._record(**row, outcome="unknown", problem=problem)
            raise

        self._record(**row, execution_id=execution.id, outcome="running")
        self._follow(Card(execution, started=row["began"], is_new=True, **known), first=True)
        if self.is_closed:  # perhaps no page gets the response
            warn_of_run("execution %d of workflow %.100r started", execution.id, workflow)
        return execution

    def assign(self, card: Card, workflow: str) -> None:
        """Set the workflow of an execution that you added by its id."""
        card.workflow = workflow
        self._update(card, workflow=workflow)
        self._notify()

    def _learn(self, card: Card, known: Mapping[str, Any]) -> None:
        """Fill in what is not known of an execution yet."""
        for name, value in known.items():
            if getattr(card, name) is None:
                setattr(card, name, value)
        self._update(card, workflow=card.workflow)
        self._notify()

    def remove(self, execution_id: int) -> None:
        """Stop following an execution. It continues on PromptLayer."""
        card = self.cards.pop(execution_id, None)
        if card in self._watches:
            self._watches[card].cancel()
        self._notify()

    def close(self) -> None:
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
        if self.history is not None:
            await self.history.aclose()

    def _follow(self, card: Card, *, first: bool = False) -> None:
        execution_id = card.execution.id
        before = self.cards.get(execution_id)
        if before is not None and not before.is_lost:
            return

        if first and before is None:
            self.cards = {execution_id: card, **self.cards}
        else:
            self.cards = {**self.cards, execution_id: card}

        watch = asyncio.create_task(self._watch(card), name=f"viewer {execution_id}")
        self._watches[card] = watch
        watch.add_done_callback(lambda _: self._watches.pop(card))
        self._notify()

    async def _watch(self, card: Card) -> None:
        try:
            observation = Observation(await self._recall(card), is_new=card.is_new)

            async with aclosing(card.execution.stream(timeout=None)) as snapshots:
                async for snapshot in snapshots:
                    self._show(card, snapshot, observation)
        except Exception as error:  # noqa: BLE001 - shown on the page, else it would show as running
            card.problem, card.is_lost = next_problem(card.problem, error), True
            self._update(card, outcome="lost", problem=card.problem.text)
            self._notify()

        finally:
            if card.snapshot is not None and not card.snapshot.complete:
                self._update(card, origin=card.timeline.origin, times=card.timeline.dump())

    async def _recall(self, card: Card) -> Timeline:
        """Fill in what the history has of an execution that you added by its id."""
        if card.is_new:
            return Timeline()
        if self.history is None:
            return attrs.evolve(card.timeline, elapsed=None)
        known = await self.history.find(card.execution.id)
        if known is not None and card.inputs is None:
            card.workflow = card.workflow or known["workflow"]
            card.label, card.version = known["label"], known["version"]
            card.inputs, card.metadata = known["inputs"], known["metadata"]
            card.started = known["began"] if known["is_started"] else None
        return Timeline.read(known)

    def _show(self, card: Card, snapshot: Snapshot, observation: Observation) -> None:
        """Show a new snapshot of an execution, and record what is new in it."""
        is_first = card.snapshot is None
        card.timeline = observation.update(snapshot, time.time())
        card.snapshot, card.problem = snapshot, None
        card.received = asyncio.get_running_loop().time()

        if is_first:
            self._record(
                execution_id=card.execution.id,
                workflow=card.workflow,
                outcome=card.state,
                began=card.started or card.timeline.origin or time.time(),
                nodes=len(snapshot.nodes),
            )
        if snapshot.complete:
            self._update(
                card,
                outcome=card.state,
                duration=card.duration,
                nodes=len(snapshot.nodes),
                problem=_problem(card),
                failed_node=card.failed_node and card.failed_node.name,
                origin=card.timeline.origin,
                times=card.timeline.dump(),
            )

        self._notify()

    def _update(self, card: Card, **fields: Any) -> None:
        if self.history is not None:
            self.history.update(card.execution.id, **fields)

    def _record(self, **fields: Any) -> None:
        if self.history is not None:
            self.history.record(**fields)

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


def _problem(card: Card) -> str | None:
    if card.state != "failed":
        return None
    node = card.failed_node
    return _reason(node) if node is None else f"{node.name}: {_reason(node)}"


def _reason(failed: Node | None) -> str:
    if failed is None:
        return "No output node succeeded."
    return error_text(failed) or NO_REASON
