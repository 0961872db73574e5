"""The server of the page: its routes, and serving them on a socket until cancelled."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import attrs
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from promptlayer_exec import ConfigurationError, NodeStatus, StoreUnavailable
from promptlayer_exec import _integration as integration
from promptlayer_exec._advice import explain
from promptlayer_exec._uvicorn import serve_until_cancelled
from promptlayer_exec.viewer import _routes as routes
from promptlayer_exec.viewer._batch_pages import HAS_BATCHES, add_batch_routes
from promptlayer_exec.viewer._board import Board
from promptlayer_exec.viewer._guard import Address, Guard
from promptlayer_exec.viewer._incidents import add_incident_routes
from promptlayer_exec.viewer._item_pages import add_item_routes
from promptlayer_exec.viewer._live_stream import board_events
from promptlayer_exec.viewer._reruns import add_rerun_routes

_PAGE = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# As one response, for which the first line of the page waits. Each has the styles of one view, or
# of what several share.
_STYLES = (
    *("viewer", "board", "incident", "nodes", "run"),
    *("graph", "history", "batches", "start", "compare"),
)
_GRACE = 2.0  # seconds that open pages have to end


def create_app(board: Board, address: Address, token: str) -> ASGIApp:
    """Return the app that shows a board to the clients that have the token.

    Args:
        board: the executions.
        address: the address that will serve it. The app refuses requests with another `Host`.
        token: the token that the page sends. It takes it from the fragment of its URL.
    """
    app = FastAPI(openapi_url=None)

    for path in _PAGE.rglob("*"):
        if path.suffix not in _TYPES:
            continue
        name = path.relative_to(_PAGE).as_posix()
        if name == "index.html":
            name = ""
        file = Response(path.read_bytes(), media_type=_TYPES[path.suffix])
        app.routes.append(Route(f"/{name}", file, methods=["GET"]))

    styles = "".join((_PAGE / f"{name}.css").read_text("utf-8") for name in _STYLES)
    sheet = Response(styles, media_type=_TYPES[".css"])
    app.routes.append(Route("/styles.css", sheet, methods=["GET"]))

    script = Response(_statuses_script(), media_type=_TYPES[".js"])
    app.routes.append(Route("/statuses.js", script, methods=["GET"]))

    routes.add_execution_routes(app, board)
    routes.add_workflow_routes(app, board)
    routes.add_start_routes(app, board)
    add_rerun_routes(app, board)
    if HAS_BATCHES:
        add_batch_routes(app, board.session)
        add_item_routes(app, board)
    add_incident_routes(app, board, board.history)
    if board.history is not None:
        routes.add_history_routes(app, board.history)

    async def report(_: Request, error: Exception) -> Response:
        return routes.refuse(explain(error), 503)

    for of_the_databases in (ConfigurationError, StoreUnavailable):
        app.add_exception_handler(of_the_databases, report)

    @app.get("/api/events")
    async def get_events() -> Response:
        return StreamingResponse(board_events(board), media_type="text/event-stream")

    return Guard(app, address, token)


def _statuses_script() -> str:
    """Return the page's module that has the client's table of statuses."""
    known = [(status, attrs.asdict(integration.status_entry(status))) for status in NodeStatus]
    unknown = attrs.asdict(integration.UNKNOWN_STATUS)
    return (
        f"export const STATUSES = new Map({json.dumps(known)});\n"
        f"export const UNKNOWN = {json.dumps(unknown)};\n"
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Args:
        host: an IP address or a host name of this machine.
        port: the port. 0 takes a free one.

    Raises:
        OSError: the address is not one of this machine's, or the port is in use.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


async def serve(board: Board, listener: socket.socket, address: Address, token: str) -> None:
    """Serve a board until cancelled. Then send open pages an `end` event, and stop within 2 s.

    Args:
        board: the executions. The server closes the board afterwards.
        listener: the socket, which it also closes.
        address: the address of the socket.
        token: the token that the page sends.
    """
    app = create_app(board, address, token)
    await serve_until_cancelled(
        app, listener, name="viewer", patience=_GRACE, lifespan="off", on_end=board.close
    )
