"""The server of the page: its routes, and serving them on a socket until cancelled."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from promptlayer_exec import NotFound, PromptLayerExecError
from promptlayer_exec.viewer._board import Board
from promptlayer_exec.viewer._events import board_events, value_text
from promptlayer_exec.viewer._guard import Address, Guard

_PAGE = Path(__file__).with_name("page")
_FILES = {
    "/": ("index.html", "text/html"),
    "/viewer.css": ("viewer.css", "text/css"),
    "/viewer.js": ("viewer.js", "text/javascript"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
_MAX_ID = 2**63 - 1
_GRACE = 2

_Text = Annotated[str, Body(embed=True)]


def create_app(board: Board, address: Address, token: str) -> ASGIApp:
    """Return the app that shows a board to the clients that have the token.

    Args:
        board: the executions.
        address: where it will be served; requests with another `Host` are refused.
        token: the token that the page sends; it takes it from the fragment of its URL.
    """
    app = FastAPI(openapi_url=None)
    for path, (name, media_type) in _FILES.items():
        file = Response((_PAGE / name).read_bytes(), media_type=media_type)
        app.routes.append(Route(path, file, methods=["GET"]))
    _add_change_routes(app, board)

    @app.get("/api/events")
    async def get_events() -> Response:
        return StreamingResponse(board_events(board), media_type="text/event-stream")

    @app.get("/api/executions/{execution_id}/nodes/{index}")
    async def get_value(execution_id: int, index: int) -> Response:
        card = board.cards.get(execution_id)
        nodes = [] if card is None or card.snapshot is None else [*card.snapshot.nodes.values()]
        if not 0 <= index < len(nodes):
            return _refuse("This node no longer exists.", 404)
        return PlainTextResponse(value_text(nodes[index].value).encode("utf-8", "backslashreplace"))

    return Guard(app, address, token)


def _add_change_routes(app: FastAPI, board: Board) -> None:
    @app.post("/api/executions")
    async def add_execution(execution_id: _Text) -> Response:
        text = execution_id.strip()
        if not re.fullmatch("[0-9]{1,19}", text) or not 1 <= int(text) <= _MAX_ID:
            message = f"An execution id must be a whole number from 1 to {_MAX_ID}."
            return _refuse(message, 422, "execution_id")
        try:
            await board.add(int(text))
        except PromptLayerExecError as error:
            return _refuse(str(error), 404 if isinstance(error, NotFound) else 502, "execution_id")
        return JSONResponse({"execution_id": str(int(text))}, 201)

    @app.delete("/api/executions/{execution_id}")
    async def remove_execution(execution_id: int) -> Response:
        board.remove(execution_id)
        return Response(status_code=204)

    @app.post("/api/runs")
    async def start_run(workflow: _Text, inputs: _Text) -> Response:
        if not workflow.strip():
            return _refuse("Enter the name or the id of a workflow.", 422, "workflow")
        try:
            execution = await board.start(workflow, _read_inputs(inputs))
        except NotFound as error:
            return _refuse(str(error), 404, "workflow")
        except PromptLayerExecError as error:
            return _refuse(str(error), 502)
        except (TypeError, ValueError) as error:
            return _refuse(str(error), 422, "inputs")
        return JSONResponse({"execution_id": str(execution.id)}, 201)


def _read_inputs(text: str) -> dict[str, Any]:
    try:
        inputs = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"This is not JSON: {error.msg} at {where}.") from None
    except RecursionError:
        raise ValueError("This is nested too deeply.") from None
    if not isinstance(inputs, dict):
        raise TypeError('The inputs must be a JSON object, for example {"topic": "otters"}.')
    return inputs


def _refuse(message: str, status: int, field: str | None = None) -> Response:
    return JSONResponse({"message": message, "field": field}, status)


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: the program has its own."""

    def capture_signals(self) -> Any:
        return nullcontext()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Args:
        host: an IP address or a host name of this machine.
        port: the port; 0 takes a free one.

    Raises:
        OSError: the address is not one of this machine's, or the port is taken.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


async def serve(board: Board, listener: socket.socket, address: Address, token: str) -> None:
    """Serve a board until cancelled; then send open pages an `end` event, and stop within 2 s.

    Args:
        board: the executions; it is closed at the end.
        listener: the socket; it is closed at the end, too.
        address: the address of the socket.
        token: the token that the page sends.
    """
    app = create_app(board, address, token)

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):  # uvicorn would log its traceback
            await app(scope, receive, send)

    config = uvicorn.Config(
        run,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]), name="viewer")
    try:
        await asyncio.wait([serving])
    finally:
        board.close()
        server.should_exit = True
        await asyncio.wait([serving], timeout=_GRACE)
        # Still open: pages that do not read, and requests that wait for PromptLayer.
        for connection in server.server_state.connections:
            connection.transport.abort()
        for task in server.server_state.tasks:
            task.cancel()
        await serving
