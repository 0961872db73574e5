"""The server over HTTP, for a team: the SDK's Streamable HTTP behind a token."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from secrets import compare_digest
from typing import Any

import attrs
from mcp import types
from mcp.server.transport_security import TransportSecuritySettings
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from promptlayer_exec import Session, Workflow
from promptlayer_exec._uvicorn import serve_until_cancelled
from promptlayer_exec.mcp._mcp_server import make_server
from promptlayer_exec.mcp._tool_calls import Calls

# Clients show the message of an error that has this form.
_REFUSAL = {
    "jsonrpc": "2.0",
    "id": None,
    "error": {
        "code": types.INVALID_REQUEST,
        "message": "the bearer token is missing or wrong: ask the operator of this server for it",
    },
}


async def serve_http(
    session: Session,
    listener: socket.socket,
    *,
    token: str,
    workflows: Iterable[str | Workflow[Any, Any]],
    hosts: Iterable[str] = (),
) -> None:
    """Serve MCP clients over Streamable HTTP, at the path `/mcp`, until cancelled.

    Every request needs the token as a bearer token. Anyone who has it can start the listed
    workflows, and read every execution of the key's workspace. The key itself never leaves this
    process.

    When you cancel it, calls get one second to finish. Then it logs the executions that were still
    running when it last saw them, to the logger `promptlayer_exec`.

    Args:
        session: as for `create_server`.
        listener: a listening socket, which the server closes afterwards. The server uses plain
            HTTP: if other machines can reach it, put a proxy with TLS in front.
        token: a secret that nobody can guess.
        workflows: as for `create_server`, but at least one.
        hosts: the names by which clients reach the server, besides 127.0.0.1, localhost and [::1].
            The server refuses requests with another `Host`, or with the `Origin` of another site.

    Raises:
        TypeError: `workflows` is a single string.
        ValueError: the token or `workflows` is empty.
    """
    calls = Calls(session, workflows)
    if not token or not calls.allowed:
        raise ValueError("serve_http needs a token and at least one workflow")

    app = make_server(calls).streamable_http_app(transport_security=_security(hosts))
    # A call waits up to a minute for its run, and some clients keep a stream open all the time:
    # uvicorn cuts off both. The lifespan closes the sessions of clients.
    await serve_until_cancelled(
        _TokenCheck(app, token),
        listener,
        name="mcp",
        patience=1.0,
        lifespan="on",
        on_end=calls.close,
    )


def _security(hosts: Iterable[str]) -> TransportSecuritySettings:
    names = ["127.0.0.1", "localhost", "[::1]", *(host.lower() for host in hosts)]
    any_port = [f"{name}:*" for name in names]
    allowed = [*names, *any_port]
    origins = [f"{scheme}://{host}" for scheme in ("http", "https") for host in allowed]
    return TransportSecuritySettings(allowed_hosts=allowed, allowed_origins=origins)


@attrs.frozen(eq=False)
class _TokenCheck:
    """Passes on only the requests that have the token."""

    _app: ASGIApp
    _token: str = attrs.field(repr=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and not self._is_allowed(Headers(scope=scope)):
            app = JSONResponse(_REFUSAL, 401, {"WWW-Authenticate": "Bearer"})
        await app(scope, receive, send)

    def _is_allowed(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_same = compare_digest(given.strip().encode(), self._token.encode())
        return is_same and scheme.lower() == "bearer"
