"""What a page is told of a board, as Server-Sent Events on one connection.

One for all executions, as browsers open no more than six to an origin.
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import json
from collections.abc import AsyncGenerator
from typing import Any

import anyio

from promptlayer_exec import Node, NodeTimes, Snapshot

from ._board import Board, Card

_HEARTBEAT = 15.0
_CUT = 10_000


async def board_events(board: Board) -> AsyncGenerator[bytes, None]:
    """Yield the events for one page: everything first, and then what changes.

    `board` tells which executions there are, in their order; `nodes` which nodes of one changed,
    or all of them, where some came or went; `execution` how far it is; `end` is the last. A page
    that is slow is told the latest, and no backlog.
    """
    board.opened.set()
    order: list[str] | None = None
    told: dict[int, tuple[Card, Snapshot | None, str | None]] = {}
    while True:
        changed = board.changed
        if board.is_closed:
            yield _event("end", {})
            return
        cards = dict(board.cards)
        if order != (order := [str(execution_id) for execution_id in cards]):
            board_view = {"instance": board.instance, "note": board.note, "executions": order}
            yield _event("board", board_view)
        told = {key: value for key, value in told.items() if key in cards}
        for execution_id, card in cards.items():
            before = told.get(execution_id)
            now = (card, card.snapshot, card.error)
            if before == now:
                continue
            told[execution_id] = now
            # A card that is not the one before is another watch: its times begin anew.
            previous = before[1] if before is not None and before[0] is card else None
            if not _is_of_one_shape(previous, card.snapshot):
                previous = None
            if card.snapshot is not None and (nodes := _news(card.snapshot, previous)):
                view = {"execution_id": str(execution_id), "all": previous is None, "nodes": nodes}
                yield _event("nodes", view)
            yield _event("execution", _card_view(card))
        if not await _happens(changed):
            yield b":\n\n"


async def _happens(changed: anyio.Event) -> bool:
    with anyio.move_on_after(_HEARTBEAT):
        await changed.wait()
    return changed.is_set()


def _is_of_one_shape(one: Snapshot | None, other: Snapshot | None) -> bool:
    """Tell whether each node has the place that it had: the page asks for values by that."""
    return one is None or other is None or [*one.nodes] == [*other.nodes]


def _news(snapshot: Snapshot, previous: Snapshot | None) -> list[dict[str, Any]]:
    changed = {change.node.name for change in snapshot.diff(previous)}
    return [
        _node_view(index, node, snapshot)
        for index, node in enumerate(snapshot.nodes.values())
        if node.name in changed
    ]


def _card_view(card: Card) -> dict[str, Any]:
    workflow, snapshot = card.execution.workflow, card.snapshot
    return {
        "execution_id": str(card.execution.id),
        "workflow": None if workflow is None else str(workflow),
        "warning": card.execution.warning,
        "state": card.state,
        "error": card.error,
        "poll": 0 if snapshot is None else snapshot.poll,
        "elapsed": round(card.elapsed, 3),
        "final": 0 if snapshot is None else sum(n.final for n in snapshot.nodes.values()),
        "total": 0 if snapshot is None else len(snapshot.nodes),
    }


def _node_view(index: int, node: Node, snapshot: Snapshot) -> dict[str, Any]:
    times = snapshot.times.get(node.name, NodeTimes())
    has_value = node.value is not None or node.succeeded
    value = value_text(node.value) if has_value else None
    error, detail = _error_of(node)
    return {
        "index": index,
        "name": node.name,
        "status": node.status,
        "is_final": node.final,
        "is_output": bool(node.is_output_node),
        "value": None if value is None else value[:_CUT],
        "length": 0 if value is None else len(value),
        "error": error,
        "detail": detail,
        "running": times.running,
        "final": times.final,
    }


def value_text(value: Any) -> str:
    """Return a value as people read it: a string as it is, and anything else as JSON.

    As text, because JavaScript rounds integers beyond 2**53, and knows no `NaN` in JSON.
    """
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, indent=2)
    except RecursionError:
        return "(nested too deeply to be shown)"


def _error_of(node: Node) -> tuple[str | None, str | None]:
    """Return why a node failed, and what more there is to say, such as a traceback."""
    raw = node.raw_error_message
    if isinstance(raw, dict) and raw.keys() == {"raw"}:
        raw = raw["raw"]
    detail = value_text(raw) if raw not in (None, "") else None
    if node.error_message:
        return node.error_message, None if detail == node.error_message else detail
    if node.status != "FAILED":
        return None, detail
    if detail is None:
        return "The server gave no reason.", None
    return (detail.splitlines()[-1] if isinstance(raw, str) else json.dumps(raw)), detail


def _event(kind: str, data: Any) -> bytes:
    # In ASCII, which carries lone surrogates, too.
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
