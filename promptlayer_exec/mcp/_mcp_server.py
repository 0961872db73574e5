"""The server, which connects the protocol with the tools, and serves over stdio."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Iterable
from typing import Any, cast

import anyio
import attrs
from anyio.to_thread import run_sync
from mcp import MCPError, types
from mcp.server import Server, ServerRequestContext
from mcp.server.stdio import stdio_server

from promptlayer_exec import PromptLayerExecError, Session, Workflow, __version__
from promptlayer_exec.mcp._tool_arguments import CallFailed, parse_id, shown
from promptlayer_exec.mcp._tool_calls import CALLS, Calls
from promptlayer_exec.mcp._tool_errors import error_result, error_text
from promptlayer_exec.mcp._tool_tasks import Tasks, declares_tasks
from promptlayer_exec.mcp._tools import INSTRUCTIONS, KEY_INSTRUCTIONS

_SCHEME = "execution://"
_JSON = "application/json"
_Context = ServerRequestContext[Any]
_Page = types.PaginatedRequestParams | None


def create_server(
    session: Session, *, workflows: Iterable[str | Workflow[Any, Any]] = ()
) -> Server[Any]:
    """Return an MCP server whose tools run workflows and wait for them.

    It supports all revisions of the protocol and all transports of the SDK. It has no
    authorization: anyone who can reach it can do what the session's key can do.

    https://modelcontextprotocol.io

    Args:
        session: starts and follows executions. You close it. With `starts=`, the tools that start a
            run take an optional `idempotency_key`. A repeated call with the same key gets the same
            run.
        workflows: the workflows that agents may start, as names, ids in text form or `Workflow`s.
            Empty means all. Each of them gets its own tool, `run_...`, which waits for the output.
            Agents read the description of a `Workflow` first. It runs with its own metadata and, if
            it has one, only with its own label or version. Inputs that do not match its type start
            nothing.

    Raises:
        TypeError: `workflows` is a single string, or contains something else.
        ValueError: a name is empty, or two workflows share one.
    """
    return make_server(Calls(session, workflows))


async def serve_stdio(
    session: Session, *, workflows: Iterable[str | Workflow[Any, Any]] = ()
) -> None:
    """Serve one MCP client over standard input and output, until it closes them.

    Give agents one workflow as a tool::

        async with Session() as session:
            await serve_stdio(session, workflows=["write-report"])

    Meanwhile, everything else that prints goes to standard error. Then it logs the executions that
    were still running when it last saw them, to the logger `promptlayer_exec`.

    After you cancel it, a thread still waits for the next line of standard input, and keeps the
    process alive unless you call `os._exit`, as the command does.

    Args:
        session: as for `create_server`.
        workflows: as for `create_server`.
    """
    calls = Calls(session, workflows)
    server = make_server(calls)

    try:
        async with stdio_server(cast("Any", _Lines())) as (given, sent):
            await server.run(given, sent, server.create_initialization_options())
    except* (BrokenPipeError, anyio.BrokenResourceError):
        pass  # the client is gone
    finally:
        calls.close()


def make_server(calls: Calls) -> Server[Any]:
    """Return the server of these calls."""
    tasks = Tasks(calls)
    handlers = _Handlers(calls, tasks)
    instructions = INSTRUCTIONS
    if calls.keys:
        instructions += KEY_INSTRUCTIONS

    server: Server[Any] = Server(
        "promptlayer-exec",
        version=__version__,
        title="PromptLayer workflows",
        instructions=instructions,
        on_list_tools=handlers.list_tools,
        on_call_tool=handlers.call_tool,
        on_list_resources=handlers.list_resources,
        on_list_resource_templates=handlers.list_templates,
        on_read_resource=handlers.read_resource,
        # No argument comes from a header. Over HTTP, the SDK would list the tools to find that out.
        get_tool_input_schema=lambda _name: None,
    )

    tasks.add_to(server)
    return server


@attrs.define
class _Handlers:
    """One method for each method of the protocol."""

    _calls: Calls
    _tasks: Tasks

    async def list_tools(self, _ctx: _Context, _params: _Page) -> types.ListToolsResult:
        return types.ListToolsResult(tools=await self._calls.tools())

    async def call_tool(self, ctx: _Context, params: types.CallToolRequestParams) -> Any:
        calls, arguments = self._calls, params.arguments or {}
        known = [*CALLS, *calls.run_tools]
        if params.name not in known:
            what = f"there is no tool {shown(params.name)}. The tools are: {', '.join(known)}"
            raise MCPError(types.INVALID_PARAMS, what)

        if not (params.name in calls.run_tools and declares_tasks(ctx)):
            return await calls.call(params.name, arguments, ctx.session.report_progress)
        try:
            execution = await calls.start_run(params.name, arguments)
        except (CallFailed, PromptLayerExecError) as error:
            return error_result(error)
        return self._tasks.created(execution)

    async def list_resources(self, _ctx: _Context, _params: _Page) -> types.ListResourcesResult:
        return types.ListResourcesResult(
            resources=[
                types.Resource(
                    uri=f"{_SCHEME}{execution_id}",
                    name=f"execution {execution_id}",
                    description=None if workflow is None else f"A run of {workflow!r:.100}",
                    mime_type=_JSON,
                )
                for execution_id, workflow in reversed(self._calls.running.items()[-100:])
            ]
        )

    async def list_templates(
        self, _ctx: _Context, _params: _Page
    ) -> types.ListResourceTemplatesResult:
        template = types.ResourceTemplate(
            uri_template=f"{_SCHEME}{{id}}",
            name="execution",
            title="An execution",
            description="An execution as it is now: its nodes and, if it is complete, its output.",
            mime_type=_JSON,
        )
        return types.ListResourceTemplatesResult(resource_templates=[template])

    async def read_resource(
        self, _ctx: _Context, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        uri = str(params.uri)
        execution_id = None
        if uri.startswith(_SCHEME):
            execution_id = parse_id(uri.removeprefix(_SCHEME))
        if execution_id is None:
            what = f"there is no resource {shown(uri)}: the URI of an execution is {_SCHEME}{{id}}"
            raise MCPError(types.INVALID_PARAMS, what)

        try:
            fields = await self._calls.fields(*await self._calls.read(execution_id))
        except PromptLayerExecError as error:
            raise MCPError(types.INVALID_PARAMS, error_text(error)) from error

        text = json.dumps(fields, ensure_ascii=False)
        contents = types.TextResourceContents(uri=uri, mime_type=_JSON, text=text)
        return types.ReadResourceResult(contents=[contents])


class _Lines:
    """The lines of standard input. The SDK's reader reacts to a cancellation only between lines."""

    async def __aiter__(self) -> AsyncIterator[str]:
        while line := await run_sync(sys.stdin.buffer.readline, abandon_on_cancel=True):
            yield line.decode("utf-8", "replace")
