"""The changes of a board as Server-Sent Events, for one page.

All executions share one connection, as browsers open at most six to an origin.
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any
from weakref import WeakKeyDictionary

import anyio
import attrs
from sse_starlette import ServerSentEvent

from promptlayer_exec import Node, NodeStatus, NodeTimes, Snapshot
from promptlayer_exec._integration import base_url, error_details, error_text, indented, node_dict
from promptlayer_exec.viewer._batch_pages import HAS_BATCHES
from promptlayer_exec.viewer._board import Board, Card
from promptlayer_exec.viewer._brief import brief_inputs
from promptlayer_exec.viewer._problems import Problem

_HEARTBEAT = 15.0
# After how many seconds the page learns that polls still get responses, though none has anything
# new. It calls a run stale after fifteen seconds without one.
_UNCHANGED = 5.0

_Shown = tuple[Snapshot | None, Problem | None, bool, str | None, str | None]


async def board_events(board: Board) -> AsyncGenerator[bytes, None]:
    """Yield the events for one page: first everything, then the changes.

    `board` has the ids of the executions, in order, and those of others that have their own page.
    `nodes` has the changed nodes of one execution, or all of them if some are new or gone.
    `execution` has its state and progress. `end` is the last event. A page that reads slowly gets
    the latest state, and no backlog.
    """
    board.opened.set()
    order: tuple[list[str], ...] = ()
    # By card, as a new card of an execution is a new watch, whose times start again.
    sent: WeakKeyDictionary[Card, _Shown] = WeakKeyDictionary()
    sent_at: WeakKeyDictionary[Card, float] = WeakKeyDictionary()
    while True:
        changed = board.changed
        if board.is_closed:
            yield _event("end", {})
            return

        cards = dict(board.cards)
        listed = [str(card_id) for card_id, card in cards.items() if card.is_listed]
        aside = [str(card_id) for card_id, card in cards.items() if not card.is_listed]
        if order != (order := (listed, aside)):
            board_view = {
                "instance": board.instance,
                "note": board.note,
                "server": base_url(board.session),
                "has_history": board.history is not None,
                "has_batches": HAS_BATCHES,
                "executions": listed,
                "aside": aside,
            }
            yield _event("board", board_view)

        for card in cards.values():
            before = sent.get(card)
            now = (card.snapshot, card.problem, card.is_lost, card.workflow, card.item)
            if before == now:
                continue
            is_recent = anyio.current_time() - sent_at.get(card, -_UNCHANGED) < _UNCHANGED
            if before is not None and is_recent and _is_alike(before, now):
                continue

            sent[card] = now
            sent_at[card] = anyio.current_time()
            if card.snapshot is not None:
                view = _nodes_view(card, card.snapshot, before[0] if before else None)
                if view["nodes"]:
                    yield _event("nodes", view)
            yield _event("execution", _card_view(card))

        with anyio.move_on_after(_HEARTBEAT):
            await changed.wait()
        if not changed.is_set():
            yield ServerSentEvent(comment="", sep="\n").encode()


def _is_alike(before: _Shown, now: _Shown) -> bool:
    """Return whether only time has passed."""
    if before[0] is None or now[0] is None or before[1:] != now[1:]:
        return False
    return (before[0].complete, before[0].nodes) == (now[0].complete, now[0].nodes)


def value_text(value: Any) -> str:
    """Return a value as text to read: a string as it is, anything else as JSON.

    It is text because JavaScript rounds integers beyond 2**53, and its JSON has no `NaN`.
    """
    if isinstance(value, str):
        return value
    try:
        return indented(value)
    except RecursionError:
        return "(nested too deeply to be shown)"


def _nodes_view(card: Card, snapshot: Snapshot, previous: Snapshot | None) -> dict[str, Any]:
    # The page requests values by the node's index, which must be the same in both.
    if previous is not None and [*previous.nodes] != [*snapshot.nodes]:
        previous = None

    changed = {change.node.name for change in snapshot.diff(previous)}
    nodes = [
        _node_view(card, snapshot, node, index)
        for index, node in enumerate(snapshot.nodes.values())
        if node.name in changed
    ]
    return {"execution_id": str(snapshot.execution_id), "all": previous is None, "nodes": nodes}


def _card_view(card: Card) -> dict[str, Any]:
    nodes = list[Node]()
    if card.snapshot is not None:
        nodes = [*card.snapshot.nodes.values()]

    return {
        "execution_id": str(card.execution.id),
        "workflow": card.workflow,
        "label": card.label,
        "version": card.version,
        "metadata": None if card.metadata is None else json.loads(card.metadata),
        "has_inputs": card.inputs is not None,
        "inputs": brief_inputs(card.inputs),
        "failed_node": card.failed_node and card.failed_node.name,
        "cause": card.cause,
        "batch": card.batch,
        "item": card.item,
        "started": card.started,
        "ended": card.ended,
        "since": card.timeline.origin,
        "warning": card.execution.warning,
        "state": card.state,
        "problem": None if card.problem is None else attrs.asdict(card.problem),
        "elapsed": _rounded(card.elapsed),
        "duration": _rounded(card.duration),
        "final": sum(node.final for node in nodes),
        "total": len(nodes),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _node_view(card: Card, snapshot: Snapshot, node: Node, index: int) -> dict[str, Any]:
    """Return a node as in `Snapshot.to_dict`, with its value and its errors as text to read."""
    text = ""
    has_value = node.value is not None or node.succeeded
    if has_value:
        text = value_text(node.value)

    message, details = error_text(node), error_details(node)
    if details == message:
        details = None
    if not message and node.status == NodeStatus.FAILED:
        message = "The server gave no reason."

    times = card.timeline.nodes.get(node.name, NodeTimes())
    return {
        **node_dict(snapshot, node.name),
        "running": _rounded(times.running),
        "final": _rounded(times.final),
        "index": index,
        "value": text[:10_000] if has_value else None,  # the page asks for the rest
        "length": len(text),
        "is_text": isinstance(node.value, str),
        "error_message": message or None,
        "raw_error_message": details,
    }


def _event(kind: str, data: Any) -> bytes:
    # ASCII can represent lone surrogates, but UTF-8 cannot.
    text = json.dumps(data, separators=(",", ":"))
    return ServerSentEvent(text, event=kind, sep="\n").encode()
