"""The tasks extension: a run is a task, and the execution's id is its handle.

https://modelcontextprotocol.io/extensions/tasks
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import attrs
from mcp import MCPError, types
from mcp.server import Server, ServerRequestContext
from mcp.server.mcpserver import require_client_extension
from mcp.types.version import MODERN_PROTOCOL_VERSIONS

from promptlayer_exec import Execution, NotFound, PromptLayerExecError, Snapshot
from promptlayer_exec.mcp._tool_arguments import parse_id
from promptlayer_exec.mcp._tool_calls import Calls
from promptlayer_exec.mcp._tool_errors import error_text
from promptlayer_exec.mcp._tool_results import state_text, tool_result
from promptlayer_exec.mcp._tool_values import clip

EXTENSION = "io.modelcontextprotocol/tasks"
_CAPABILITIES = types.ClientCapabilities(extensions={EXTENSION: {}})


class TaskParams(types.RequestParams):
    task_id: str


@attrs.define
class Tasks:
    """Serves the methods on tasks, without storing any: a task's id is enough."""

    _calls: Calls

    def add_to(self, server: Server[Any]) -> None:
        """Advertise the extension, and serve its methods."""
        server.extensions[EXTENSION] = {}
        server.add_request_handler("tasks/get", TaskParams, self._get)
        server.add_request_handler("tasks/update", TaskParams, self._update)
        server.add_request_handler("tasks/cancel", TaskParams, self._cancel)

    def created(self, execution: Execution) -> dict[str, Any]:
        message = f"execution {execution.id} has started"
        if execution.warning:
            message += f". PromptLayer warns: {clip(execution.warning, 1_000)}"
        return _task(execution.id, "working", message, resultType="task")

    async def _get(self, ctx: ServerRequestContext[Any], params: TaskParams) -> dict[str, Any]:
        execution, snapshot = await self._read(ctx, params)
        if not snapshot.complete:
            return _task(execution.id, "working", state_text(snapshot))
        answer = tool_result(await self._calls.fields(execution, snapshot))
        result = answer.model_dump(by_alias=True, mode="json", exclude_none=True)
        return _task(execution.id, "completed", state_text(snapshot), result=result)

    async def _update(self, ctx: ServerRequestContext[Any], params: TaskParams) -> dict[str, Any]:
        await self._read(ctx, params)
        return {}  # no task ever asks for input

    async def _cancel(self, ctx: ServerRequestContext[Any], params: TaskParams) -> dict[str, Any]:
        _, snapshot = await self._read(ctx, params)
        if snapshot.complete:
            return {}
        message = "PromptLayer cannot cancel a run: it continues, and you pay for it."
        return {"_meta": {"promptlayer-exec/message": message}}

    async def _read(
        self, ctx: ServerRequestContext[Any], params: TaskParams
    ) -> tuple[Execution, Snapshot]:
        if ctx.protocol_version not in MODERN_PROTOCOL_VERSIONS:
            raise MCPError(types.METHOD_NOT_FOUND, "Method not found", ctx.method)
        require_client_extension(ctx, EXTENSION)

        execution_id = parse_id(params.task_id)
        if execution_id is None:
            raise MCPError(types.INVALID_PARAMS, f"there is no task {clip(params.task_id, 80)!r}")
        try:
            return await self._calls.read(execution_id)
        except PromptLayerExecError as error:
            code = types.INVALID_PARAMS if isinstance(error, NotFound) else types.INTERNAL_ERROR
            raise MCPError(code, error_text(error)) from error


def _task(execution_id: int, status: str, message: str, **more: Any) -> dict[str, Any]:
    """Return the state of a task. Its times are now, because PromptLayer sends none."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {
        "resultType": "complete",
        "taskId": str(execution_id),
        "status": status,
        "statusMessage": message,
        "createdAt": now,
        "lastUpdatedAt": now,
        "ttlMs": None,  # there is no limit
        "pollIntervalMs": 2_000,
        **more,
    }


def declares_tasks(ctx: ServerRequestContext[Any]) -> bool:
    """Return whether the client of a request accepts a task as its response."""
    is_modern = ctx.protocol_version in MODERN_PROTOCOL_VERSIONS
    return is_modern and ctx.session.check_client_capability(_CAPABILITIES)
