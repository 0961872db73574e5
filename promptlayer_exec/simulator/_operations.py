"""The HTTP operations: authorization, rate limit, and the exact response to each request."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from functools import partial
from typing import TypeAlias
from urllib.parse import unquote

import attrs
from aiohttp import web

from promptlayer_exec.simulator import _wire as wire
from promptlayer_exec.simulator._backend import Backend
from promptlayer_exec.simulator._faults import FaultQueue
from promptlayer_exec.simulator._log import Log, SimRequest
from promptlayer_exec.simulator._notifications import Notifications
from promptlayer_exec.simulator._push_server import PushServer
from promptlayer_exec.simulator._replay import Replay

Operation: TypeAlias = Callable[..., web.Response]


@attrs.define
class TokenBucket:
    """Lets `rate` requests per second through, and up to `burst` together. It is full at first."""

    rate: float
    burst: float
    _updated: float = attrs.field(default=0.0, init=False)
    _tokens: float = attrs.field(default=math.inf, init=False)

    def take(self, now: float) -> float:
        """Take a token at `now`. Return 0.0, or the seconds until there is one."""
        self._tokens = min(self.burst, self._tokens + (now - self._updated) * self.rate)
        self._updated = now
        # The tolerance lets a request through that waited exactly the announced time.
        if self._tokens < 1 - 1e-6:
            return (1 - self._tokens) / self.rate
        self._tokens -= 1
        return 0.0


@attrs.define(eq=False)
class Operations:
    """Responds to every request that reaches the server.

    The order is: log, faults, route, key, rate limit, recorded response, operation.
    """

    _api_key: str
    _clock: Callable[[], float]
    _backend: Backend
    _log: Log[SimRequest]
    _push_server: PushServer
    _notifications: Notifications
    faults: FaultQueue
    bucket: TokenBucket | None = attrs.field(default=None, init=False)
    replay: Replay = attrs.field(factory=Replay, init=False)
    _created_at: float = attrs.field(
        init=False, default=attrs.Factory(lambda self: self._clock(), takes_self=True)
    )

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.content.read()
        path, at = request.rel_url.raw_path, self._clock() - self._created_at
        seen = SimRequest(request.method, path, request.query, request.headers, body, at)
        self._log.record(seen)
        answer = partial(self._answer, seen)

        fault = self.faults.take(lambda fault: fault.concerns(request))
        if fault is not None:
            response = await fault.effect(request, answer)
            if response is not None:
                return response

        if path == "/connection/websocket":
            return await self._push_server.serve(request)
        return answer()

    def _answer(self, request: SimRequest) -> web.Response:
        for pattern, method, operation in _ROUTES:
            match = pattern.fullmatch(request.path)
            if match is None:
                continue

            if request.method != method:
                return wire.error_response(405, "Method Not Allowed", Allow=method)
            if request.headers.get("X-API-KEY") != self._api_key:
                return wire.error_response(401, "Invalid or missing API key")
            if self.bucket is not None and (wait := self.bucket.take(self._clock())):
                seconds = f"{math.ceil(wait * 1000) / 1000:.12g}"
                return wire.error_response(429, "Too Many Requests", **{"Retry-After": seconds})

            response = self.replay.take(method, request.path, request.query)
            if response is None:
                response = self._perform(operation, request, *map(unquote, match.groups()))
            return response

        return wire.error_response(404, "Not Found")

    def _perform(self, operation: Operation, request: SimRequest, *names: str) -> web.Response:
        try:
            return operation(self, request, *names)
        except wire.RequestValidationError as error:
            return wire.json_response(422, wire.encode({"detail": error.detail}))

    def _results(self, request: SimRequest) -> web.Response:
        execution_id, all_outputs = wire.parse_results_query(request.query)
        try:
            results = self._backend.results(execution_id)
        except LookupError:
            return wire.error_response(404, "Workflow version execution not found")

        return wire.json_response(*results.response(all_outputs=all_outputs))

    def _workflow(self, request: SimRequest, id_or_name: str) -> web.Response:
        workflow = self._backend.find_workflow(id_or_name)
        label = request.query.get("label")
        number = wire.parse_integer(request.query, "version", range(1, 2**63))
        if label is not None and number is not None:
            message = "label and version are mutually exclusive"
            raise wire.RequestValidationError(message, "value_error", "query", "label")

        if workflow is None:
            return wire.error_response(404, "Workflow not found")
        version = workflow.select(label, number)
        if version is None:
            return wire.error_response(404, "Workflow not found")
        return wire.json_response(200, wire.encode(workflow.describe(version)))

    def _workflows(self, request: SimRequest) -> web.Response:
        return wire.json_response(200, wire.encode(self._backend.list_workflows(request.query)))

    def _run(self, request: SimRequest, id_or_name: str) -> web.Response:
        workflow = self._backend.find_workflow(id_or_name)
        if workflow is None:
            return wire.error_response(404, "Workflow not found")

        body = wire.parse_run(request.body)
        label, number = body.get("workflow_label_name"), body.get("workflow_version_number")
        if label is not None and number is not None:
            return wire.error_response(
                400, "Give workflow_label_name or workflow_version_number, not both"
            )
        version = workflow.select(label, number)
        if version is None:
            return wire.error_response(404, "Workflow version not found")

        execution_id = self._backend.run(workflow, version, body)
        self._notifications.follow(execution_id, workflow, body)
        answer = {
            "success": True,
            "message": "Workflow execution created successfully",
            "warning": version.warning_for(body.get("input_variables", {})),
            "workflow_version_execution_id": execution_id,
        }

        status = 201 if body.get("callback_url") is None else 202
        return wire.json_response(status, wire.encode(answer))

    def _token(self, request: SimRequest) -> web.Response:
        channels = wire.required_values(request.query, "capability")
        issued = time.time()
        details = {
            "token": self._push_server.issue_token(channels),
            # Only announced: a connection lasts as long as the client wants.
            "expires": int((issued + 3600.0) * 1000),
            "issued": int(issued * 1000),
            "capability": {channel: ["presence", "subscribe"] for channel in channels},
            "clientId": "1",
        }

        # Without the backend's name, older versions of the vendor's SDK use Ably.
        answer = {"success": True, "messaging_backend": "centrifugo", "token_details": details}
        return wire.json_response(201, wire.encode(answer))


_ROUTES: tuple[tuple[re.Pattern[str], str, Operation], ...] = (
    (re.compile("/workflow-version-execution-results"), "GET", Operations._results),
    (re.compile("/workflows"), "GET", Operations._workflows),
    (re.compile("/workflows/([^/]+)"), "GET", Operations._workflow),
    (re.compile("/workflows/([^/]+)/run"), "POST", Operations._run),
    (re.compile("/ws-token-request-library"), "POST", Operations._token),
)
