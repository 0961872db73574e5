"""What the page requests: executions, starts, and the history."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from typing import Annotated, Any

from fastapi import Body, FastAPI, Path, Query
from starlette.responses import PlainTextResponse, Response

from promptlayer_exec import (
    InvalidInputs,
    Node,
    PromptLayerExecError,
    Session,
    StartUnknown,
    WorkflowDefinition,
)
from promptlayer_exec._integration import MAX_ID
from promptlayer_exec.viewer._board import Board, Card
from promptlayer_exec.viewer._graphs import (
    NoDefinition,
    WorkflowList,
    find_definition,
    graph_view,
    suggest_workflow,
)
from promptlayer_exec.viewer._history import History
from promptlayer_exec.viewer._live_stream import value_text
from promptlayer_exec.viewer._problems import explain

_Text = Annotated[str, Body(embed=True)]
_OptionalText = Annotated[str | None, Body(embed=True)]
_Flag = Annotated[bool, Body(embed=True)]
_Metadata = Annotated[dict[str, str] | None, Body(embed=True)]
_Key = Annotated[int, Path(ge=1, le=MAX_ID)]
_Offset = Annotated[int, Query(ge=0, le=MAX_ID)]


def add_execution_routes(app: FastAPI, board: Board) -> None:
    """Add the routes that follow executions, and read what is known of them."""

    @app.post("/api/executions")
    async def add_execution(execution_id: _Text, is_listed: _Flag = False) -> Response:
        text = execution_id.strip()
        if not re.fullmatch("[0-9]{1,19}", text) or not 1 <= int(text) <= MAX_ID:
            message = f"An execution id must be a whole number from 1 to {MAX_ID}."
            return refuse(message, 422, "execution_id")
        try:
            await board.add(int(text), is_listed=is_listed)
        except PromptLayerExecError as error:
            kind, message = explain(error)
            return refuse(message, 404 if kind == "missing" else 502, "execution_id")
        return json_response({"execution_id": str(int(text))}, 201)

    @app.delete("/api/executions/{execution_id}")
    async def remove_execution(execution_id: int) -> Response:
        board.remove(execution_id)
        return Response(status_code=204)

    _add_value_routes(app, board)


def _add_value_routes(app: FastAPI, board: Board) -> None:
    @app.get("/api/executions/{execution_id}/nodes/{index}")
    async def get_value(execution_id: int, index: int) -> Response:
        card = board.cards.get(execution_id)
        nodes = list[Node]()
        if card is not None and card.snapshot is not None:
            nodes = [*card.snapshot.nodes.values()]
        if not 0 <= index < len(nodes):
            return refuse("This node no longer exists.", 404)
        return text_response(value_text(nodes[index].value))

    @app.get("/api/executions/{execution_id}/snapshot")
    async def get_snapshot(execution_id: int) -> Response:
        card = board.cards.get(execution_id)
        if card is None or card.snapshot is None:
            return refuse("The viewer does not follow this execution.", 404)
        return json_response(card.snapshot.to_dict())

    @app.get("/api/executions/{execution_id}/inputs")
    async def get_inputs(execution_id: int) -> Response:
        card = board.cards.get(execution_id)
        if card is None or card.inputs is None:
            return refuse("The inputs of this execution are not known here.", 404)
        return text_response(card.inputs)

    @app.get("/api/compare/{left}/{right}")
    async def compare(left: int, right: int) -> Response:
        one, other = board.cards.get(left), board.cards.get(right)
        if one is None or one.snapshot is None or other is None or other.snapshot is None:
            return refuse("The viewer does not follow both of these executions.", 404)

        changed = [change.node.name for change in other.snapshot.diff(one.snapshot)]
        is_known = one.inputs is not None and other.inputs is not None
        return json_response(
            {"changed": changed, "inputs_differ": is_known and one.inputs != other.inputs}
        )


def add_workflow_routes(app: FastAPI, board: Board) -> None:
    """Add the routes that describe workflows, and record which one an execution is of."""
    listed = WorkflowList(board.session)
    _add_key_route(app, board)
    _add_graph_routes(app, board, listed)

    @app.get("/api/workflows")
    async def get_workflows() -> Response:
        try:
            summaries = await listed.get()
        except NoDefinition as error:
            return json_response({"workflows": [], "reason": str(error)})
        workflows = [{"id": str(summary.id), "name": summary.name} for summary in summaries]
        return json_response({"workflows": workflows, "reason": None})

    @app.get("/api/definition")
    async def get_definition(
        workflow: str, label: str | None = None, version: int | None = None
    ) -> Response:
        try:
            latest = await find_definition(board.session, workflow)
            found = await find_definition(board.session, workflow, label, version)
        except NoDefinition as error:
            return json_response({"definition": None, "reason": str(error)})
        labels = await _labels(listed, found)
        view = graph_view(found) | {"labels": labels, "latest_version": latest.version}
        return json_response({"definition": view, "reason": None})


def _add_graph_routes(app: FastAPI, board: Board, listed: WorkflowList) -> None:
    @app.get("/api/executions/{execution_id}/graph")
    async def get_graph(execution_id: int) -> Response:
        card = board.cards.get(execution_id)
        if card is None:
            return refuse("The viewer does not follow this execution.", 404)
        return await _find_graph(board.session, card)

    @app.get("/api/executions/{execution_id}/suggestion")
    async def get_suggestion(execution_id: int) -> Response:
        card = board.cards.get(execution_id)
        nodes = set[str]()
        if card is not None and card.snapshot is not None:
            nodes = set(card.snapshot.nodes)
        return json_response(await suggest_workflow(board.session, listed, board.history, nodes))

    @app.put("/api/executions/{execution_id}/workflow")
    async def set_workflow(execution_id: int, workflow: _Text) -> Response:
        card = board.cards.get(execution_id)
        try:
            found = await find_definition(board.session, workflow)
        except NoDefinition as error:
            return refuse(str(error), 502, "workflow")
        if card is not None:
            board.assign(card, found.name)
        return _graph(found)


def _add_key_route(app: FastAPI, board: Board) -> None:
    @app.get("/api/key")
    async def check_key() -> Response:
        # Nothing is kept: workflows may be added before anybody asks for their names.
        try:
            await WorkflowList(board.session).get()
        except NoDefinition as error:
            return json_response({"kind": error.kind, "reason": str(error)})
        return json_response({"kind": None, "reason": None})


async def _find_graph(session: Session, card: Card) -> Response:
    if card.workflow is None:
        return _graph(None, "PromptLayer does not report which workflow this is a run of.")
    try:
        found = await find_definition(session, card.workflow, card.label, card.version)
    except NoDefinition as error:
        return _graph(None, f"There is no graph: {error}")
    return _graph(found)


async def _labels(listed: WorkflowList, workflow: WorkflowDefinition) -> list[str]:
    """Return the labels of all versions of a workflow, or at least those of this one."""
    with suppress(NoDefinition):
        for summary in await listed.get():
            if summary.id == workflow.id:
                return list(dict.fromkeys([*summary.labels, *workflow.labels]))
    return list(workflow.labels)


def _graph(found: WorkflowDefinition | None, reason: str | None = None) -> Response:
    if found is None:
        return json_response({"definition": None, "reason": reason})
    if not found.nodes:
        reason = "There is no graph: PromptLayer describes no nodes of this workflow."
        return json_response({"definition": None, "reason": reason})
    return json_response({"definition": graph_view(found), "reason": None})


def add_start_routes(app: FastAPI, board: Board) -> None:

    @app.post("/api/runs")
    async def start_run(
        workflow: _Text,
        inputs: _Text,
        label: _OptionalText = None,
        version: _OptionalText = None,
        metadata: _Metadata = None,
    ) -> Response:
        if not workflow.strip():
            return refuse("Enter the name or the id of a workflow.", 422, "workflow")
        if version and not re.fullmatch("[1-9][0-9]{0,8}", version):
            return refuse("A version is a whole number from 1.", 422, "version")

        try:
            execution = await board.start(
                workflow,
                _read_inputs(inputs),
                label=label or None,
                version=int(version) if version else None,
                metadata=metadata,
            )
        except (PromptLayerExecError, TypeError, ValueError) as error:
            return _refuse_start(error)

        return json_response({"execution_id": str(execution.id)}, 201)


def _refuse_start(error: Exception) -> Response:
    kind, message = explain(error)
    if isinstance(error, InvalidInputs) or not isinstance(error, PromptLayerExecError):
        return refuse(message, 422, "inputs")
    if kind == "missing":
        return refuse(message, 404, "workflow")
    return refuse(message, 502, is_unknown=isinstance(error, StartUnknown))


def add_history_routes(app: FastAPI, history: History) -> None:

    @app.get("/api/history")
    async def get_history(
        search: str = "",
        outcome: str = "",
        workflow: str = "",
        days: float = 0,
        offset: _Offset = 0,
    ) -> Response:
        since = 0.0
        if days > 0:
            since = time.time() - 86400 * days
        found = await history.search(
            search, outcome=outcome, workflow=workflow, since=since, offset=offset
        )
        return json_response(found)

    @app.get("/api/history/trends")
    async def get_trends() -> Response:
        return json_response(await history.trends())

    @app.get("/api/history/usual")
    async def get_usual(workflow: str) -> Response:
        return json_response(await history.usual(workflow))

    @app.get("/api/history/{key}/inputs")
    async def get_remembered_inputs(key: _Key) -> Response:
        known = await history.find_row(key)
        if known is None or known["inputs"] is None:
            return refuse("The inputs of this execution are not known here.", 404)
        return text_response(known["inputs"])

    @app.delete("/api/history/{key}")
    async def forget(key: _Key) -> Response:
        await history.delete(key)
        return Response(status_code=204)

    @app.delete("/api/history")
    async def forget_all() -> Response:
        await history.delete_all()
        return Response(status_code=204)


def refuse(message: str, status: int, field: str | None = None, **more: Any) -> Response:
    """Return a response with the reason why a request failed, and the wrong field of the form."""
    return json_response({"message": message, "field": field, **more}, status)


def _read_inputs(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}

    try:
        inputs = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"This is not JSON: {error.msg} at {where}.") from None

    if not isinstance(inputs, dict):
        raise TypeError('The inputs must be a JSON object, for example {"topic": "otters"}.')
    return inputs


def json_response(content: Any, status: int = 200) -> Response:
    """Return a response with JSON."""
    # ASCII can represent lone surrogates, but UTF-8 cannot.
    return Response(json.dumps(content), status, media_type="application/json")


def text_response(text: str) -> Response:
    """Return a response with text."""
    return PlainTextResponse(text.encode("utf-8", "backslashreplace"))
