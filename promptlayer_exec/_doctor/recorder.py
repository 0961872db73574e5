"""Records what the server sent, without what is private, for `Simulator.replay`.

The file is an HTTP Archive, which browsers and proxies write and read as well:
http://www.softwareishard.com/blog/har-12-spec/
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from http.client import responses as standard_phrases
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import aiohttp
import attrs
from yarl import URL

from promptlayer_exec._doctor.anonymizer import Anonymizer
from promptlayer_exec._version import __version__

_HEADERS = {"content-type", "date", "retry-after", "retry-after-ms", "server"}
# Below any prefix of the base URL.
_PATHS = re.compile(
    ".*?(/workflow-version-execution-results|/ws-token-request-library|/connection/websocket"
    "|/workflows(?:/(?P<workflow>[^/]+)(?P<run>/run)?)?)"
)


@attrs.frozen
class _RecordedExchange:
    """One request and its response. Without a response, the status is 0."""

    at: datetime
    seconds: float
    method: str
    url: URL
    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = ""
    body: bytes = attrs.field(default=b"", repr=False)


@attrs.define(eq=False)
class Recorder:
    """A middleware of aiohttp that keeps every response, and writes a file about them."""

    _recorded: list[_RecordedExchange] = attrs.field(factory=list, init=False)
    # Hundreds of polls may get the same body.
    _bodies: dict[bytes, bytes] = attrs.field(factory=dict, init=False)

    @property
    def count(self) -> int:
        """The number of requests so far."""
        return len(self._recorded)

    async def __call__(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Send a request, and record the response, or that there was none."""
        at, clock = datetime.now(UTC), asyncio.get_running_loop().time
        began = clock()
        method, url = request.method, request.url
        try:
            response = await handler(request)
        except BaseException:
            self._recorded.append(_RecordedExchange(at, clock() - began, method, url))
            raise

        body = b""
        if response.status != 101:
            # Whoever reads the response gets the same error.
            with suppress(aiohttp.ClientError, OSError):
                body = await response.read()
        self._recorded.append(
            _RecordedExchange(
                at,
                clock() - began,
                method,
                url,
                response.status,
                tuple(response.headers.items()),
                response.content_type,
                self._bodies.setdefault(body, body),
            )
        )
        return response

    def save(self, path: Path, private: Iterable[str]) -> None:
        """Write the file.

        Args:
            path: the file.
            private: known texts that no message of the server may contain, such as the inputs.

        Raises:
            OSError: the file cannot be written.
        """
        anonymizer = Anonymizer(private)
        # The first time, to know all names and texts before any message of the server is written.
        for _ in range(2):
            anonymizer.restart()
            entries = [_entry(recorded, anonymizer) for recorded in self._recorded]
        log = {
            "version": "1.2",
            "creator": {"name": "promptlayer_exec", "version": __version__},
            "entries": entries,
        }
        path.write_text(json.dumps({"log": log}, indent=1) + "\n", encoding="ascii")


def _entry(recorded: _RecordedExchange, anonymizer: Anonymizer) -> dict[str, Any]:
    """Return one entry of the file, with all fields that the format requires."""
    milliseconds = recorded.seconds * 1000
    unknown = {"httpVersion": "HTTP/1.1", "cookies": [], "headersSize": -1}
    query = [
        {"name": name, "value": anonymizer.parameter(value)}
        for name, value in recorded.url.query.items()
    ]
    path = _path(recorded.url, anonymizer)
    parameters = "&".join(f"{item['name']}={item['value']}" for item in query)
    url = f"https://promptlayer.invalid{path}{'?' if query else ''}{parameters}"

    headers = [
        {"name": name, "value": value if name.lower() in _HEADERS else "***"}
        for name, value in recorded.headers
    ]
    text = anonymizer.body(recorded.body, path, recorded.url.query, recorded.status)
    content = {"size": len(recorded.body), "mimeType": recorded.content_type, "text": text}
    return {
        "startedDateTime": recorded.at.isoformat(),
        "time": milliseconds,
        "request": {
            "method": recorded.method,
            "url": url,
            "headers": [],
            "queryString": query,
            "bodySize": -1,
            **unknown,
        },
        "response": {
            "status": recorded.status,
            "statusText": standard_phrases.get(recorded.status, ""),
            "headers": headers,
            "content": content,
            "redirectURL": "",
            "bodySize": len(recorded.body),
            **unknown,
        },
        "cache": {},
        "timings": {"send": 0, "wait": milliseconds, "receive": 0},
    }


def _path(url: URL, anonymizer: Anonymizer) -> str:
    """Return the path of an operation, without a prefix and without the workflow's name."""
    found = _PATHS.fullmatch(url.raw_path)
    if found is None:
        return "/"
    if found["workflow"] is None:
        return found[1]
    name = unquote(found["workflow"])
    alias = name if name.isdecimal() else anonymizer.alias(name).replace(" ", "-")
    return f"/workflows/{alias}{found['run'] or ''}"
