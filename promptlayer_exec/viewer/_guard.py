"""Refuses requests that are not the page's own: any page in a browser could send some.

The server has an API key, and can start runs that cost money.
"""

from __future__ import annotations

from secrets import compare_digest

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from promptlayer_exec.viewer._address import Address

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_NAVIGATION = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


class Guard:
    """Serves only requests of the viewer's own page, and those under `/api/` only with the token.

    The token is a bearer token: a cookie would be sent to other ports of the machine, too, and a
    page of another origin can neither read the token nor send it.

    Args:
        app: serves the requests that are not refused.
        address: where the viewer is served.
        token: the token.
    """

    def __init__(self, app: ASGIApp, address: Address, token: str) -> None:
        self._app = app
        self._address = address
        self._credentials = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app = self._refusal(scope, Headers(scope=scope)) or self._app
        await app(scope, receive, guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._address.is_meant(hosts[0]):
            return _forbidden("the Host header does not name this viewer")
        origins = headers.getlist("origin")
        if any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins):
            return _forbidden("the request is from another origin")
        if not _is_own(scope, headers):
            return _forbidden("the request is from another site")
        if not scope["path"].startswith("/api/"):
            return None
        if compare_digest(headers.get("authorization", "").encode(), self._credentials):
            return None
        message = "The token is missing or wrong: open the URL that promptlayer-exec view printed."
        return JSONResponse({"message": message}, 401, {"WWW-Authenticate": "Bearer"})


def _is_own(scope: Scope, headers: Headers) -> bool:
    if headers.get("sec-fetch-site", "none") in ("same-origin", "none"):
        return True
    # Any site may link to the page, which shows nothing without the token.
    return scope["path"] == "/" and all(headers.get(k) == v for k, v in _NAVIGATION.items())


def _forbidden(reason: str) -> Response:
    return PlainTextResponse(f"Refused: {reason}.\n", 403)
