"""The operations over HTTP: who may ask, what is asked, and the exact answer."""

import math
import re
import time
from collections.abc import Callable
from functools import partial
from typing import TypeAlias
from urllib.parse import unquote

from aiohttp import web
from attrs import Factory, define, field, frozen
from multidict import MultiMapping

from ._backend import Backend
from ._bucket import TokenBucket
from ._centrifugo import Centrifugo
from ._completion import Completions
from ._faults import FaultQueue
from ._log import RequestLog, SimRequest
from ._parameters import RequestValidationError, ResultsQuery, parse_capability, parse_run
from ._reply import Reply
from ._scenario import encode

_WEBSOCKET = "/connection/websocket"
_TOKEN_LIFETIME = 3600.0


@frozen
class _Call:
    """What an operation is called with; `workflow` is the name or id in the path."""

    query: MultiMapping[str]
    body: bytes
    workflow: str


@define(eq=False)
class Api:
    """Answers every request that reaches the server.

    The order is: log, faults, route, key, rate limit, operation.
    """

    _api_key: str
    _clock: Callable[[], float]
    _backend: Backend
    _log: RequestLog
    _faults: FaultQueue
    _centrifugo: Centrifugo
    _completions: Completions
    bucket: TokenBucket | None = field(default=None, init=False)
    announce_retry: bool = field(default=True, init=False)
    _origin: float = field(default=Factory(lambda api: api._clock(), takes_self=True), init=False)
    _epoch: float = field(
        default=Factory(lambda api: time.time() - api._origin, takes_self=True), init=False
    )

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request."""
        body = await request.content.read()
        self._log.record(
            SimRequest(
                method=request.method,
                path=request.rel_url.raw_path,
                query=request.query,
                headers=request.headers,
                body=body,
                at=self._clock() - self._origin,
            )
        )
        fault = self._faults.take(request)
        response = None
        if fault is not None:
            response = await fault.effect(request, partial(self._answer, request, body))
        if response is None and request.rel_url.raw_path == _WEBSOCKET:
            response = await self._centrifugo.serve(request)
        return self._answer(request, body).response() if response is None else response

    async def stop(self) -> None:
        """Stop following runs."""
        await self._completions.stop()

    def _answer(self, request: web.BaseRequest, body: bytes) -> Reply:
        for pattern, method, operation in _ROUTES:
            if match := pattern.fullmatch(request.rel_url.raw_path):
                call = _Call(request.query, body, *map(unquote, match.groups("")))
                return self._refuse(request, method) or self._perform(operation, call)
        return Reply.error(404, "Not Found")

    def _refuse(self, request: web.BaseRequest, method: str) -> Reply | None:
        if request.method != method:
            return Reply.error(405, "Method Not Allowed", {"Allow": method})
        if request.headers.get("X-API-KEY") != self._api_key:
            return Reply.error(401, "Invalid or missing API key")
        if self.bucket is not None and (wait := self.bucket.take(self._clock())):
            headers = {"Retry-After": f"{math.ceil(wait * 1000) / 1000:.12g}"}
            return Reply.error(429, "Too Many Requests", headers if self.announce_retry else None)
        return None

    def _perform(self, operation: "_Operation", call: _Call) -> Reply:
        try:
            return operation(self, call)
        except RequestValidationError as error:
            return Reply.json(422, encode({"detail": error.detail}))

    def _results(self, call: _Call) -> Reply:
        query = ResultsQuery.parse(call.query)
        try:
            results = self._backend.results(query.execution_id)
        except LookupError:
            return Reply.error(404, "Workflow version execution not found")
        body = results.json(all_outputs=query.all_outputs)
        return Reply.json(200 if results.complete else 202, body)

    def _workflow(self, call: _Call) -> Reply:
        workflow = self._backend.find_workflow(call.workflow)
        if workflow is None:
            return Reply.error(404, "Workflow not found")
        description = {
            "id": workflow.id,
            "workspace_id": 1,
            "user_id": None,
            "name": workflow.name,
            "is_draft": False,
            "is_deleted": False,
        }
        answer = {"success": True, "workflow_id": workflow.id, "workflow": description}
        return Reply.json(200, encode(answer))

    def _run(self, call: _Call) -> Reply:
        workflow = self._backend.find_workflow(call.workflow)
        if workflow is None:
            return Reply.error(404, "Workflow not found")
        body = parse_run(call.body)
        label, version = body.get("workflow_label_name"), body.get("workflow_version_number")
        if label is not None and version is not None:
            return Reply.error(400, "Give workflow_label_name or workflow_version_number, not both")
        execution_id = self._backend.run(workflow, body)
        self._completions.follow(execution_id, workflow.id, body)
        answer = {
            "success": True,
            "message": "Workflow execution created successfully",
            "warning": workflow.warning,
            "workflow_version_execution_id": execution_id,
        }
        return Reply.json(201 if body.get("callback_url") is None else 202, encode(answer))

    def _token(self, call: _Call) -> Reply:
        channels = parse_capability(call.query)
        issued = self._epoch + self._clock()
        details = {
            "token": self._centrifugo.issue_token(channels, _TOKEN_LIFETIME),
            "expires": int((issued + _TOKEN_LIFETIME) * 1000),
            "issued": int(issued * 1000),
            "capability": {channel: ["presence", "subscribe"] for channel in channels},
            "clientId": "1",
        }
        # Without the backend's name, older clients of the vendor's turn to Ably.
        answer = {"success": True, "messaging_backend": "centrifugo", "token_details": details}
        return Reply.json(201, encode(answer))


_Operation: TypeAlias = Callable[[Api, _Call], Reply]

_ROUTES: tuple[tuple[re.Pattern[str], str, _Operation], ...] = (
    (re.compile("/workflow-version-execution-results()"), "GET", Api._results),
    (re.compile("/workflows/([^/]+)"), "GET", Api._workflow),
    (re.compile("/workflows/([^/]+)/run"), "POST", Api._run),
    (re.compile("/ws-token-request-library()"), "POST", Api._token),
)
