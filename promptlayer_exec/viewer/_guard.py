"""Who may ask: the server holds a key, and browsers carry requests for whichever page is open."""

from secrets import compare_digest

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ._address import Address

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
    """Lets in only what our own page asks, and under `/api/` only with the token.

    The token comes as a bearer, so it is in no cookie, which other ports of the machine would get,
    too, and a page of another origin can neither read nor send it.
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
            return _forbidden("this Host is not one of the viewer's")
        origins = headers.getlist("origin")
        if any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins):
            return _forbidden("another origin must not ask the viewer")
        if not _is_own(scope, headers):
            return _forbidden("another site must not ask the viewer")
        if not scope["path"].startswith("/api/"):
            return None
        if compare_digest(headers.get("authorization", "").encode(), self._credentials):
            return None
        message = "The token is missing or wrong: open the URL that promptlayer-exec view printed."
        return JSONResponse({"message": message}, 401, {"WWW-Authenticate": "Bearer"})


def _is_own(scope: Scope, headers: Headers) -> bool:
    if headers.get("sec-fetch-site", "none") in ("same-origin", "none"):
        return True
    # A link to the page may stand anywhere; the page tells nothing without the token.
    return scope["path"] == "/" and all(headers.get(k) == v for k, v in _NAVIGATION.items())


def _forbidden(reason: str) -> Response:
    return PlainTextResponse(f"Refused: {reason}.\n", 403)
