"""The tasks extension: a run is a task, and the execution's id is its handle.

https://modelcontextprotocol.io/extensions/tasks
"""

from __future__ import annotations

from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any, Literal

import attrs
from mcp import MCPError
from mcp.server import Server, ServerRequestContext
from mcp.types import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    ClientCapabilities,
    RequestParams,
    Result,
)
from mcp.types.version import MODERN_PROTOCOL_VERSIONS

from promptlayer_exec import Execution, NotFound, PromptLayerExecError, Snapshot
from promptlayer_exec.mcp._arguments import parse_id
from promptlayer_exec.mcp._calls import Calls
from promptlayer_exec.mcp._results import state_text
from promptlayer_exec.mcp._values import clip

EXTENSION = "io.modelcontextprotocol/tasks"
_CAPABILITIES = ClientCapabilities(extensions={EXTENSION: {}})
_POLL_INTERVAL_MS = 2_000
_MOST_TASKS = 1_000
_GOES_ON = "PromptLayer cannot cancel a run: it goes on, and is paid for"


class TaskParams(RequestParams):
    """The parameters of the methods on tasks."""

    task_id: str


class TaskResult(Result):
    """The state of a task, as the creation of a task and `tasks/get` return it."""

    result_type: Literal["complete", "task"] = "complete"
    task_id: str
    status: str
    status_message: str
    created_at: str
    last_updated_at: str
    ttl_ms: int | None = None
    poll_interval_ms: int = _POLL_INTERVAL_MS
    result: dict[str, Any] | None = None

    def dump(self) -> dict[str, Any]:
        """Return the fields; a time to live of null means that there is no limit."""
        fields = self.model_dump(by_alias=True, mode="json", exclude_none=True)
        return {**fields, "ttlMs": self.ttl_ms}


@attrs.define
class _Known:
    """What the results of an execution do not say."""

    created: str
    updated: str
    state: object = None
    is_cancelled: bool = False


@attrs.define
class Tasks:
    """Serves the methods on tasks."""

    _calls: Calls
    # Only times and requests to cancel: a server that was restarted knows every task by its id.
    _known: OrderedDict[int, _Known] = attrs.field(init=False, factory=OrderedDict)

    def add_to(self, server: Server[Any]) -> None:
        """Advertise the extension, and serve its methods."""
        server.extensions[EXTENSION] = {}
        for method, handle in (
            ("tasks/get", self._get),
            ("tasks/update", self._update),
            ("tasks/cancel", self._cancel),
        ):
            server.add_request_handler(method, TaskParams, handle)

    def created(self, execution: Execution) -> dict[str, Any]:
        """Return the task of a run that has just started."""
        known = self._find(execution.id)
        warning = (
            f"; the server warns: {clip(execution.warning, 1_000)}" if execution.warning else ""
        )
        return TaskResult(
            result_type="task",
            task_id=str(execution.id),
            status="working",
            status_message=f"execution {execution.id} has started{warning}",
            created_at=known.created,
            last_updated_at=known.updated,
        ).dump()

    async def _get(self, ctx: ServerRequestContext[Any], params: TaskParams) -> dict[str, Any]:
        execution, snapshot = await self._read(ctx, params)
        known = self._find(snapshot.execution_id)
        state = (snapshot.complete, dict(snapshot.counts))
        if known.state != state:
            known.state, known.updated = state, _now()
        result = None
        if snapshot.complete:
            answer = await self._calls.result(execution, snapshot)
            result = answer.model_dump(by_alias=True, mode="json", exclude_none=True)
        text = state_text(snapshot)
        if known.is_cancelled and not snapshot.complete:
            text = f"{_GOES_ON}: {text}"
        return TaskResult(
            task_id=str(snapshot.execution_id),
            status="completed" if snapshot.complete else "working",
            status_message=text,
            created_at=known.created,
            last_updated_at=known.updated,
            result=result,
        ).dump()

    async def _update(self, ctx: ServerRequestContext[Any], params: TaskParams) -> dict[str, Any]:
        await self._read(ctx, params)
        return {}  # no task ever asks for input

    async def _cancel(self, ctx: ServerRequestContext[Any], params: TaskParams) -> dict[str, Any]:
        _, snapshot = await self._read(ctx, params)
        if snapshot.complete:
            return {}
        self._find(snapshot.execution_id).is_cancelled = True
        return {"_meta": {"promptlayer-exec/message": f"{_GOES_ON}."}}

    async def _read(
        self, ctx: ServerRequestContext[Any], params: TaskParams
    ) -> tuple[Execution, Snapshot]:
        if ctx.protocol_version not in MODERN_PROTOCOL_VERSIONS:
            raise MCPError(METHOD_NOT_FOUND, "Method not found", ctx.method)
        if not declares_tasks(ctx):
            raise MCPError(
                MISSING_REQUIRED_CLIENT_CAPABILITY,
                "Missing required client capability",
                {"requiredCapabilities": {"extensions": {EXTENSION: {}}}},
            )
        execution_id = parse_id(params.task_id)
        if execution_id is None:
            raise MCPError(INVALID_PARAMS, f"there is no task {clip(params.task_id, 80)!r}")
        try:
            return await self._calls.read(execution_id)
        except NotFound as error:
            raise MCPError(INVALID_PARAMS, f"there is no task '{execution_id}': {error}") from error
        except PromptLayerExecError as error:
            raise MCPError(INTERNAL_ERROR, str(error)) from error

    def _find(self, execution_id: int) -> _Known:
        if execution_id not in self._known:
            now = _now()
            self._known[execution_id] = _Known(now, now)
            if len(self._known) > _MOST_TASKS:
                self._known.popitem(last=False)
        return self._known[execution_id]


def declares_tasks(ctx: ServerRequestContext[Any]) -> bool:
    """Return whether a request allows that its answer is a task."""
    is_modern = ctx.protocol_version in MODERN_PROTOCOL_VERSIONS
    return is_modern and ctx.session.check_client_capability(_CAPABILITIES)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
