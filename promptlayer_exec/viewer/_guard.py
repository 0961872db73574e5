"""Refuses requests that are not the page's own: any page in a browser could send some.

The server has an API key, and can start runs that cost money.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from secrets import compare_digest

import attrs
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - to recognise them
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


@attrs.frozen
class Address:
    """The host and port that the viewer listens on.

    Args:
        host: an IP address or a host name.
        port: the port.
    """

    host: str
    port: int

    @property
    def base_url(self) -> str:
        """The URL of the viewer on its own machine."""
        if self.host in _WILDCARDS:
            return f"http://127.0.0.1:{self.port}"
        return f"http://{_in_url(self.host)}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only its own machine can reach it."""
        ip = _read_ip(self.host)
        return self.host.lower() == "localhost" or (ip is not None and ip.is_loopback)

    def is_meant(self, host: str) -> bool:
        """Return True if a `Host` header names this server. Any other may be DNS rebinding."""
        name, _, port = host.lower().rpartition(":")
        if self.port == 80 and not port.isdecimal():
            name, port = host.lower(), "80"
        is_any_ip = self.host in _WILDCARDS and _read_ip(name.strip("[]")) is not None
        known = ("127.0.0.1", "localhost", "[::1]", _in_url(self.host))
        is_name = is_any_ip or name in known
        return is_name and port == str(self.port)


@attrs.frozen(eq=False)
class Guard:
    """Serves only requests of the viewer's own page, and those under `/api/` only with the token.

    The token is a bearer token, because browsers would also send a cookie to other ports of the
    machine. A page of another origin can neither read the token nor send it.
    """

    _app: ASGIApp
    _address: Address
    _token: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app = self._refusal(scope, Headers(scope=scope)) or self._app
        await app(scope, receive, guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if not self._address.is_meant(host):
            return _forbidden("the Host header does not name this viewer")

        origin = headers.get("origin")
        if origin is not None and origin.lower() != f"http://{host.lower()}":
            return _forbidden("the request is from another origin")

        # Any site may link to the page, which shows nothing without the token.
        mode, destination = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
        is_navigation = mode == "navigate" and destination == "document"
        is_link = scope["path"] == "/" and is_navigation
        site = headers.get("sec-fetch-site", "none")
        if site not in ("same-origin", "none") and not is_link:
            return _forbidden("the request is from another site")

        authorization = headers.get("authorization", "").encode()
        is_allowed = compare_digest(authorization, f"Bearer {self._token}".encode())
        if is_allowed or not scope["path"].startswith("/api/"):
            return None
        message = "The token is missing or wrong: open the URL that promptlayer-exec view printed."
        return JSONResponse({"message": message}, 401, {"WWW-Authenticate": "Bearer"})


def _forbidden(reason: str) -> Response:
    return PlainTextResponse(f"Refused: {reason}.\n", 403)


def _in_url(host: str) -> str:
    return f"[{host.lower()}]" if ":" in host else host.lower()


def _read_ip(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
