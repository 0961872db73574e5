"""Requests of the examination, and what exactly came back."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

import aiohttp
import attrs
from yarl import URL

from promptlayer_exec._api.messages import Response
from promptlayer_exec._api.status import status_name
from promptlayer_exec._doctor.recorder import Recorder
from promptlayer_exec._http.failures import reason_of, tls_problem
from promptlayer_exec._values.errors import TLSProblem

if TYPE_CHECKING:
    from aiohttp.tracing import Trace

# The checks judge statuses, so none of them raises. A redirect would take the key to another host.
_OPTIONS: dict[str, Any] = {"allow_redirects": False, "raise_for_status": False}


class NoResponse(Exception):
    """No response came. Its text contains the reason, without the host.

    Attributes:
        tls: why there is no TLS connection, or None if TLS did not fail.
    """

    def __init__(self, reason: str, *, tls: TLSProblem | None = None) -> None:
        super().__init__(reason)
        self.tls = tls


@attrs.frozen
class Exchange:
    """One request and its response. `sent_at` is on the event loop's clock."""

    method: str
    target: str
    status: int
    body: bytes = attrs.field(repr=False)
    sent_at: float
    duration: float

    @property
    def status_name(self) -> str:
        return status_name(self.status)

    @property
    def response(self) -> Response:
        """The response as this package reads it."""
        return Response(self.status, self.body)


class _WatchedConnector(aiohttp.TCPConnector):
    """Remembers the TLS connection that was made last."""

    tls: ssl.SSLObject | None = None

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> aiohttp.connector.Connection:
        connection = await super().connect(req, traces, timeout)
        if connection.transport is not None:
            self.tls = connection.transport.get_extra_info("ssl_object")
        return connection


class Wire:
    """The connections of an examination. A session may borrow them, to start a run.

    Args:
        base_url: the server, without a trailing slash.
        proxy: the URL of the proxy, if there is one.
        timeout: seconds that each request may take.
        recorder: records all requests, if there is one.

    Attributes:
        api_key: the key, once it is known.
        start: the start request that a session has sent, and its response.
    """

    def __init__(
        self, base_url: str, proxy: str | None, timeout: float, recorder: Recorder | None = None
    ) -> None:
        self._base_url = base_url
        self._timeout = timeout
        self.api_key = ""
        self.start: Exchange | None = None

        self._connector = _WatchedConnector()
        self.http = aiohttp.ClientSession(
            connector=self._connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            middlewares=[self._watch] if recorder is None else [recorder, self._watch],
            proxy=proxy,
        )

    @property
    def tls(self) -> ssl.SSLObject | None:
        return self._connector.tls

    async def aclose(self) -> None:
        await self.http.close()

    async def _watch(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Keep the response to a session's start, and let no WebSocket follow a redirect."""
        clock = asyncio.get_running_loop().time
        sent_at = clock()
        response = await handler(request)

        if request.method == "POST" and request.url.raw_path.endswith("/run"):
            body, target = await response.read(), request.url.raw_path_qs
            duration = clock() - sent_at
            self.start = Exchange("POST", target, response.status, body, sent_at, duration)

        if "Upgrade" in request.headers and 300 <= response.status < 400:
            response.close()
            raise aiohttp.WSServerHandshakeError(response.request_info, (), status=response.status)
        return response

    async def ask(self, method: str, target: str, *, with_key: bool = True) -> Exchange:
        """Send one request without a body. `target` is the path and query below the base URL."""
        headers = {"Accept": "application/json"}
        if with_key:
            headers["X-API-KEY"] = self.api_key
        url = URL(self._base_url + target, encoded=True)
        sent_at = asyncio.get_running_loop().time()

        try:
            async with (
                asyncio.timeout(self._timeout),
                self.http.request(method, url, headers=headers, **_OPTIONS) as response,
            ):
                body = await response.read()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self._no_response(error) from None

        duration = asyncio.get_running_loop().time() - sent_at
        return Exchange(method, target, response.status, body, sent_at, duration)

    async def open_websocket(self, path: str) -> aiohttp.ClientWebSocketResponse:
        """Open a WebSocket, without the key."""
        url = URL(self._base_url + path, encoded=True)
        try:
            async with asyncio.timeout(self._timeout):
                return await self.http.ws_connect(
                    url, timeout=aiohttp.ClientWSTimeout(ws_close=0.1)
                )
        except aiohttp.WSServerHandshakeError as error:
            raise NoResponse(status_name(error.status)) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._no_response(error) from None

    def _no_response(self, error: Exception) -> NoResponse:
        # The errors of aiohttp show request headers, and so the key: none of them is a cause.
        if isinstance(error, TimeoutError):
            return NoResponse(f"no response within {self._timeout:g} s")
        return NoResponse(reason_of(error), tls=tls_problem(error))
