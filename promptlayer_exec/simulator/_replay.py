"""Serves recorded responses again, in the order in which they came.

Recordings are HTTP Archives, which browsers and proxies write as well:
http://www.softwareishard.com/blog/har-12-spec/
"""

from __future__ import annotations

import base64
import json
import re
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import attrs
from aiohttp import web
from yarl import URL

# The operations, below any prefix of a base URL.
_PATHS = re.compile(
    ".*?(/workflow-version-execution-results|/workflows(?:/[^/]+(?:/run)?)?|/ws-token-request-library)"
)
# All other headers belong to the recorded connection.
_HEADERS = {"content-type", "location", "retry-after", "retry-after-ms"}
# An aborted request, a WebSocket, and a request without the right key.
_LEFT_OUT = {0, 101, 401}

# The method, the path without the workflow, and for results the id and the flag.
RecordedOperation: TypeAlias = tuple[str, ...]


@attrs.frozen
class _RecordedResponse:
    """One response, as it was recorded."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of_entry(cls, response: Mapping[str, Any]) -> _RecordedResponse:
        content = response["content"]
        text = content.get("text", "")
        if content.get("encoding") == "base64":
            body = base64.b64decode(text)
        else:
            body = text.encode("utf-8", "surrogatepass")

        headers = {
            header["name"]: header["value"]
            for header in response["headers"]
            if header["name"].lower() in _HEADERS
        }
        return cls(response["status"], headers, body)


@attrs.define(eq=False)
class Replay:
    """The recorded responses to each operation. The last one is repeated."""

    _responses: dict[RecordedOperation, deque[_RecordedResponse]] = attrs.field(
        factory=dict, init=False
    )

    def load(self, path: str | Path) -> list[int]:
        """Add the responses in a file, and return the ids of the executions in it."""
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))["log"]["entries"]
            recorded = [
                (_operation_of(entry["request"]), _RecordedResponse.of_entry(entry["response"]))
                for entry in entries
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not an HTTP Archive (HAR 1.2): {error!r}") from error

        ids: dict[int, None] = {}
        for operation, response in recorded:
            if operation is None or response.status in _LEFT_OUT:
                continue
            self._responses.setdefault(operation, deque()).append(response)
            if len(operation) > 2:
                ids[int(operation[2])] = None
        return list(ids)

    def take(self, method: str, path: str, query: Mapping[str, str]) -> web.Response | None:
        """Return the next response to a request, or None if none was recorded."""
        operation = _operation(method, path, query)
        responses = self._responses.get(operation) if operation is not None else None
        if not responses:
            return None

        recorded = responses.popleft() if len(responses) > 1 else responses[0]
        return web.Response(status=recorded.status, body=recorded.body, headers=recorded.headers)


def _operation_of(request: Mapping[str, Any]) -> RecordedOperation | None:
    url = URL(request["url"], encoded=True)
    return _operation(request["method"], url.raw_path, url.query)


def _operation(method: str, path: str, query: Mapping[str, str]) -> RecordedOperation | None:
    found = _PATHS.fullmatch(path)
    if found is None:
        return None
    if found[1] != "/workflow-version-execution-results":
        return method, re.sub("^/workflows/[^/]+", "/workflows/*", found[1])

    execution_id = query.get("workflow_version_execution_id", "")
    if not re.fullmatch("[0-9]{1,19}", execution_id):
        return None
    flag = query.get("return_all_outputs", "false").lower()
    return method, found[1], execution_id, flag
