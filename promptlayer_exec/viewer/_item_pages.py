"""Everything that is known of one item of a batch: for its page, and for that of its run."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import attrs
from fastapi import Body, FastAPI
from starlette.responses import Response

from promptlayer_exec import ConfigurationError, PromptLayerExecError, Session
from promptlayer_exec._advice import explain as explain_to_person
from promptlayer_exec._advice import explain_stored
from promptlayer_exec._integration import indented
from promptlayer_exec._ways_out import command_about, out_of_item, way_state
from promptlayer_exec.viewer._batch_pages import import_batches, reading_flags, working_flags
from promptlayer_exec.viewer._board import Board
from promptlayer_exec.viewer._live_stream import value_text
from promptlayer_exec.viewer._problems import explain
from promptlayer_exec.viewer._routes import json_response, refuse, text_response

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch, RunAttempt, StoredItem

_Text = Annotated[str, Body(embed=True)]

_SETTINGS = ("workflow", "label", "version", "metadata")  # of a request, besides its inputs


def add_item_routes(app: FastAPI, board: Board) -> None:
    """Add the routes that show an item, and those that follow its run, or run it again."""
    _add_reading_routes(app, board.session)
    _add_acting_routes(app, board)


def _add_reading_routes(app: FastAPI, session: Session) -> None:
    @app.get("/api/item")
    async def get_item(batch: str, item: str) -> Response:
        opened, found = await _find(session, batch, item)
        if found is None:
            return _missing(batch, item)
        return json_response(await _item_view(opened, batch, found))

    @app.get("/api/item/inputs")
    async def get_inputs(batch: str, item: str) -> Response:
        _, found = await _find(session, batch, item)
        if found is None:
            return _missing(batch, item)
        return text_response(indented(found.request["inputs"]))

    @app.get("/api/item/output")
    async def get_output(batch: str, item: str) -> Response:
        _, found = await _find(session, batch, item)
        if found is None or found.outcome is None or found.outcome.error is not None:
            return refuse(f"Item {item} of batch {batch} has no output.", 404)
        return text_response(value_text(found.outcome.output))


def _add_acting_routes(app: FastAPI, board: Board) -> None:
    @app.post("/api/item/run")
    async def open_run(batch: _Text, item: _Text, execution_id: _Text) -> Response:
        opened, found = await _find(board.session, batch, item)
        known = None if found is None else _known_of_run(batch, found, execution_id)
        if known is None:
            return refuse(f"Item {item} of batch {batch} has no run {execution_id}.", 404)
        try:
            await opened.check_server()
            await board.add(int(execution_id), known=known)
        except PromptLayerExecError as error:
            kind, message = explain(error)
            return refuse(message, 404 if kind == "missing" else 502)
        return json_response({"execution_id": execution_id}, 201)

    @app.post("/api/item/retry")
    async def retry(batch: _Text, item: _Text) -> Response:
        opened, found = await _find(board.session, batch, item)
        if found is None:
            return _missing(batch, item)
        if found.state == "succeeded":
            await opened.retry(keys=[item], again=True)
        elif found.state == "failed":
            await opened.retry(keys=[item], failed=True)
        else:
            return refuse(f"Item {item} is {found.state}, so it does not run again.", 409)
        return json_response({}, 202)


async def _find(session: Session, name: str, key: str) -> tuple[Batch, StoredItem | None]:
    batch: Batch = (await import_batches()).Batch(name, session=session)
    return batch, await batch.item(key)


def _missing(name: str, key: str) -> Response:
    return refuse(f"Batch {name} has no item {key}.", 404)


async def _item_view(batch: Batch, name: str, item: StoredItem) -> dict[str, Any]:
    problem = None
    try:
        await batch.check_server()
    except ConfigurationError as error:  # its ids mean nothing here
        problem = explain_to_person(error)

    flags = await working_flags(batch, name)
    ways = out_of_item(way_state(item), item.key, flags, reading_flags(name))
    runs = [attempt for attempt in item.attempts if attempt.execution_id is not None]
    outcome = item.outcome
    return {
        "key": item.key,
        "state": item.state,
        "since": item.since.timestamp(),
        "problem": problem,
        "execution_id": str(runs[-1].execution_id) if runs else None,
        "settings": {name: item.request[name] for name in _SETTINGS},
        "has_output": outcome is not None and outcome.error is None,
        "error": None if outcome is None else _error_view(outcome.error),
        "attempts": [_attempt_view(attempt) for attempt in item.attempts],
        "workers": (await batch.status()).workers,
        "work": command_about("batch work", flags),
        "ways": [attrs.asdict(way) for way in ways],
    }


def _attempt_view(attempt: RunAttempt) -> dict[str, Any]:
    return {
        "number": attempt.number,
        "state": attempt.state,
        "execution_id": None if attempt.execution_id is None else str(attempt.execution_id),
        "worker": attempt.worker,
        "added": _moment(attempt.added),
        "taken": _moment(attempt.taken),
        "started": _moment(attempt.started),
        "finished": _moment(attempt.finished),
        "error": _error_view(attempt.error),
    }


def _error_view(error: Any) -> dict[str, str] | None:
    """Return the class of a stored error, and what happened, with what a person can do."""
    if error is None:
        return None
    return {"type": error.type, "text": explain_stored(error.type, error.message, error.data)}


def _known_of_run(name: str, item: StoredItem, execution_id: str) -> dict[str, Any] | None:
    """Return what the batch knows of a run of an item, as fields of its card."""
    attempts = [it for it in item.attempts if str(it.execution_id) == execution_id]
    if not attempts:
        return None

    request = item.request
    first = attempts[0]  # a later attempt may have followed the run again
    is_seen = first.error is None or first.error.type == "ExecutionFailed"
    metadata = request["metadata"]
    return {
        "batch": name,
        "item": item.key,
        "workflow": str(request["workflow"]),
        "label": request["label"],
        "version": request["version"],
        "metadata": None if metadata is None else json.dumps(metadata),
        "inputs": indented(request["inputs"]),
        "started": _moment(first.started),
        "ended": _moment(first.finished) if is_seen else None,
    }


def _moment(at: datetime | None) -> float | None:
    return None if at is None else at.timestamp()
