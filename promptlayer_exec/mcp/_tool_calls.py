"""The calls of the tools."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from mcp.types import CallToolResult, Tool

from promptlayer_exec import (
    Execution,
    ExecutionFailed,
    ExecutionTimeout,
    NotFound,
    PromptLayerExecError,
    RequestError,
    Session,
    Snapshot,
    StartRequest,
    Workflow,
    WorkflowDefinition,
    WorkflowSummary,
)
from promptlayer_exec._integration import (
    ExpiringDict,
    definition,
    settings,
    structure_inputs,
    warn_of_run,
    workflows_by_name,
)
from promptlayer_exec.mcp import _tool_arguments as read
from promptlayer_exec.mcp import _tool_results as results
from promptlayer_exec.mcp._tool_arguments import CallFailed
from promptlayer_exec.mcp._tool_errors import error_result
from promptlayer_exec.mcp._tool_values import clean, clip, fitting, show
from promptlayer_exec.mcp._tools import (
    IDEMPOTENCY_KEY,
    WAIT,
    common_tools,
    run_arguments,
    run_tool,
    run_tool_names,
)

Report = Callable[[float, float | None, str | None], Awaitable[None]]

_logger = logging.getLogger("promptlayer_exec")
_MOST_WORKFLOWS = 100


def _names_of(summary: WorkflowSummary) -> tuple[str, ...]:
    """Return the names by which you can call a workflow, none if it was deleted."""
    if summary.is_deleted:
        return ()
    return summary.name, str(summary.id)


def _absence(name: str, known: Iterable[str]) -> str:
    """Return a sentence that a workflow does not exist, with similar names."""
    which = "has the id" if name.isdecimal() else "is named"
    return f"no workflow {which} {read.shown(name)}{read.near(name, known)}"


def _strings_among(names: Iterable[str], workflow: WorkflowDefinition | None) -> list[str]:
    """Return the names of inputs that a workflow requires as strings."""
    if workflow is None or workflow.required_inputs is None:
        return []
    required = workflow.required_inputs
    return [name for name in names if required.get(name) == "string"]


class Calls:
    """The tools of one server, and the executions that it has seen."""

    def __init__(self, session: Session, workflows: Iterable[str | Workflow[Any, Any]]) -> None:
        self.session = session
        self.workflows = workflows_by_name(workflows)
        self.allowed = tuple(self.workflows)
        self.run_tools = run_tool_names(self.allowed)  # the workflow of each tool `run_...`
        # The argument for the key of a request, by its name, if the session has a start store.
        self.keys: Mapping[str, Any] = {}
        if settings(session).starts is not None:
            self.keys = {"idempotency_key": IDEMPOTENCY_KEY}
        # Executions that were running when last seen, the latest last, with their workflows.
        self.running: ExpiringDict[int, str | None] = ExpiringDict(most=1_000)
        self._inputs: dict[str, Mapping[str, str]] = {}

    async def tools(self) -> list[Tool]:
        """Return the tools, with the inputs of the allowed workflows if they are available."""
        reads = (self._definition(StartRequest(it)) for it in self.workflows.values())
        found = await asyncio.gather(*reads)

        for name, known in zip(self.allowed, found, strict=True):
            if known is not None:
                self._inputs[name] = known.required_inputs or {}
        own = [
            run_tool(tool, self.workflows[name], known, self.keys)
            for (tool, name), known in zip(self.run_tools.items(), found, strict=True)
        ]
        return [*common_tools(self.allowed, self.keys), *own]

    async def _definition(
        self, request: StartRequest, *, fresh: bool = False
    ) -> WorkflowDefinition | None:
        """Return the definition of what to run, or None, after a warning, if reading it fails."""
        name, label, version = request.workflow, request.label, request.version
        try:
            return await definition(self.session, name, label=label, version=version, fresh=fresh)
        except PromptLayerExecError as error:
            _logger.warning("could not read the inputs of workflow %r: %s", name, error)
            return None

    async def call(self, tool: str, arguments: Mapping[str, Any], report: Report) -> CallToolResult:
        """Call a tool. Errors of the call or of PromptLayer become results."""
        try:
            if tool in self.run_tools:
                return await self._run(tool, arguments, report)
            (schema,) = (
                known.input_schema
                for known in common_tools(self.allowed, self.keys)
                if known.name == tool
            )
            return await CALLS[tool](self, read.check(arguments, schema), report)
        except (CallFailed, PromptLayerExecError) as error:
            return error_result(error)

    async def start_run(self, tool: str, arguments: Mapping[str, Any]) -> Execution:
        execution, _ = await self._start(self._run_request(tool, arguments)[0])
        return execution

    async def read(self, execution_id: int) -> tuple[Execution, Snapshot]:
        """Read an execution, and record whether it is running."""
        execution = self.session.execution(execution_id)
        return execution, self._seen(await execution.snapshot())

    def close(self) -> None:
        """Log which runs continue, because nobody can ask this server any more."""
        for execution_id, workflow in self.running.items():
            which = ""
            if workflow is not None:
                which = f" of workflow {workflow!r:.100}"
            warn_of_run(
                "execution %d%s continues on PromptLayer. Follow it with:"
                " promptlayer-exec watch %d",
                execution_id,
                which,
                execution_id,
            )

    async def list_workflows(self, arguments: Mapping[str, Any], _: Report) -> CallToolResult:
        search = arguments.get("search", "").casefold()
        listed: list[dict[str, Any]] = []
        known: list[str] = []

        async with aclosing(self.session.workflows(sort_by="name", sort_order="asc")) as found:
            async for summary in found:
                names = _names_of(summary)
                known.extend(names)
                is_allowed = not self.allowed or {*names} & {*self.allowed}
                if names and is_allowed and search in summary.name.casefold():
                    entry = {
                        "id": summary.id,
                        "name": clean(summary.name),
                        "labels": [clean(label) for label in summary.labels],
                        "latest_version": summary.latest_version,
                    }
                    listed.append(entry | self._description(*names))
                if len(listed) > _MOST_WORKFLOWS:
                    break

        workflows = fitting(listed[:_MOST_WORKFLOWS])
        if len(workflows) < len(listed):
            message = f"The first {len(workflows)} workflows. There are more: use search."
        else:
            s = "" if len(listed) == 1 else "s"
            absent = [_absence(name, known) for name in self.allowed if name not in known]
            message = " ".join([f"{len(listed)} workflow{s}.", *absent])
        message += " describe_workflow shows which inputs one needs."
        return results.tool_result({"message": message, "workflows": workflows})

    async def describe_workflow(self, arguments: Mapping[str, Any], _: Report) -> CallToolResult:
        request = read.start_request(self.workflows, **arguments)
        try:
            found = await definition(
                self.session, request.workflow, label=request.label, version=request.version
            )
        except NotFound as error:
            raise CallFailed(await self._not_found(request)) from error
        description = self._description(arguments["workflow"])
        return results.tool_result(results.workflow_fields(found, **description))

    def _description(self, *names: str) -> dict[str, str]:
        """Return what a workflow is for, as a field, if the app has described it."""
        described = (self.workflows[name] for name in names if name in self.workflows)
        for workflow in described:
            if workflow.description is not None:
                return {"description": clip(workflow.description, 2_000)}
        return {}

    async def start_workflow(self, arguments: Mapping[str, Any], _: Report) -> CallToolResult:
        execution, warning = await self._start(read.start_request(self.workflows, **arguments))
        name = clean(arguments["workflow"])
        message = f"Execution {execution.id} of workflow {name!r:.200} has started."
        if not execution.is_new:
            message = f"An earlier call with this idempotency_key started execution {execution.id}"
            message += f" of workflow {name!r:.200}. This is the same run, not a new one."
        message += f" Call wait_execution with execution_id '{execution.id}' for its output."
        return results.tool_result(
            {"message": message, "execution_id": str(execution.id), **warning}
        )

    async def wait_execution(self, arguments: Mapping[str, Any], report: Report) -> CallToolResult:
        execution = self.session.execution(read.execution_id(arguments))
        seconds = arguments.get("timeout", WAIT)
        return results.tool_result(await self._wait(execution, seconds, report))

    async def get_execution(self, arguments: Mapping[str, Any], _: Report) -> CallToolResult:
        execution_id, node = read.execution_id(arguments), arguments.get("node")
        start, length = arguments.get("start", 0), arguments.get("length")
        execution, snapshot = await self.read(execution_id)
        if node is None:
            return results.tool_result(await self.fields(execution, snapshot, start, length))

        found = {clean(name): known for name, known in snapshot.nodes.items()}.get(node)
        if found is None:
            few = results.names_of(snapshot.nodes.values())
            what = f"execution {execution_id} has no node {read.shown(node)}. It has: {few}"
            raise CallFailed(what + read.near(node, snapshot.nodes))
        return results.tool_result(results.node_fields(snapshot, found, start, length))

    def _run_request(self, tool: str, arguments: Mapping[str, Any]) -> tuple[StartRequest, float]:
        """Return the request and the timeout from the arguments of a tool `run_...`.

        The inputs are separate arguments. A call may also pass them in `inputs`, as to
        `start_workflow`.
        """
        name = self.run_tools[tool]
        required = self._inputs.get(name, {})
        workflow = self.workflows[name]
        if "inputs" in arguments and "inputs" not in required:
            options = read.check(arguments, run_arguments(workflow, self.keys))
            seconds = options.pop("timeout", WAIT)
            return read.start_request(self.workflows, name, **options), seconds

        inputs = dict(arguments)
        own = {"timeout", *self.keys} - required.keys()
        options = {option: inputs.pop(option) for option in own & inputs.keys()}
        options = read.check(options, run_arguments(workflow, self.keys))
        request = StartRequest(workflow, inputs, key=options.get("idempotency_key"))
        return request, options.get("timeout", WAIT)

    async def _run(self, tool: str, arguments: Mapping[str, Any], report: Report) -> CallToolResult:
        request, seconds = self._run_request(tool, arguments)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        execution, warning = await self._start(request)
        left = max(0.0, deadline - loop.time())
        return results.tool_result({**await self._wait(execution, left, report), **warning})

    async def _start(self, request: StartRequest) -> tuple[Execution, dict[str, str]]:
        """Start a run, and return it with the server's warning, if any, as a field."""
        name = str(request.workflow)
        await self._refuse_numbers(request)

        try:
            inputs = request.inputs
            if name in self.workflows:
                inputs = structure_inputs(self.session, self.workflows[name], inputs)
            execution = await self.session.start(
                request.workflow,
                inputs,
                label=request.label,
                version=request.version,
                metadata=request.metadata,
                key=request.key,
            )
        except NotFound as error:
            raise CallFailed(await self._not_found(request)) from error
        except PromptLayerExecError:
            raise
        except (TypeError, ValueError) as error:
            raise CallFailed(
                f"{clip(str(error), 2_000)}. No run was started. describe_workflow lists the"
                " inputs of the workflow."
            ) from error

        self.running.add(execution.id, name)
        if not execution.warning:
            return execution, {}
        return execution, {"warning": clip(execution.warning, 1_000)}

    async def _refuse_numbers(self, request: StartRequest) -> None:
        """Refuse numbers for inputs that must be strings, before you pay for a run."""
        numbers = {
            name: value for name, value in request.inputs.items() if type(value) in (int, float)
        }
        if not numbers:
            return

        # The definition may have changed since, so read it again before refusing anything.
        wrong = _strings_among(numbers, await self._definition(request))
        if wrong:
            wrong = _strings_among(numbers, await self._definition(request, fresh=True))
        for name in wrong:
            raise CallFailed(
                f"the input {read.shown(name)} must be a string, got the number"
                f" {read.shown(numbers[name])}: write it in quotation marks. No run was started."
            )

    async def _not_found(self, request: StartRequest) -> str:
        """Return whether the workflow does not exist, or only its version."""
        name, known = str(request.workflow), list[str]()
        with suppress(PromptLayerExecError, TimeoutError):
            async with (
                asyncio.timeout(5.0),
                aclosing(self.session.workflows()) as found,
            ):
                known = [known_name async for summary in found for known_name in _names_of(summary)]

        if name in known:
            return (
                f"workflow {read.shown(name)} does not have this version or label (404 Not Found)."
                " describe_workflow shows the latest version."
            )
        absence = _absence(name, known)
        if name in self.allowed:
            absence += " The user started this server with this name: ask them to correct it."
        elif not self.allowed:
            absence += " list_workflows shows all workflows."
        return absence

    async def _wait(self, execution: Execution, seconds: float, report: Report) -> dict[str, Any]:
        reported = -1
        try:
            async with aclosing(execution.stream(timeout=seconds)) as snapshots:
                async for snapshot in snapshots:
                    self._seen(snapshot)
                    if snapshot.nodes and (count := results.final_count(snapshot)) > reported:
                        reported = count
                        text = f"execution {execution.id}: {results.state_text(snapshot)}"
                        await report(count, len(snapshot.nodes), text)

        except ExecutionTimeout as error:
            snapshot = error.last_snapshot or Snapshot(execution.id, False, {})
            message = f"Execution {execution.id} is not complete after {round(seconds, 2):g} s:"
            message += f" {results.state_text(snapshot)}. It continues. Call wait_execution with"
            message += f" execution_id '{execution.id}' to wait longer. Do not start it again."
            return results.execution_fields(snapshot, message, timed_out=True)

        return await self.fields(execution, snapshot)

    async def fields(
        self, execution: Execution, snapshot: Snapshot, start: int = 0, length: int | None = None
    ) -> dict[str, Any]:
        """Return the state of an execution, with its output, or a range of it."""
        execution_id = execution.id
        if not snapshot.complete:
            message = f"Execution {execution_id} is not complete: {results.state_text(snapshot)}."
            message += f" Call wait_execution with execution_id '{execution_id}'."
            return results.execution_fields(snapshot, message)

        try:
            value = await execution.output(timeout=10.0)
        except ExecutionFailed as error:
            return results.execution_fields(snapshot, results.failure_text(error))
        except (ExecutionTimeout, RequestError) as error:
            message = f"Execution {execution_id} succeeded. Could not read its output:"
            message += f" {clip(error.problem, 1_000)} Call get_execution for it."
            return results.execution_fields(snapshot, message)

        output = show("output", value, start, length)
        message = f"Execution {execution_id} succeeded: {results.state_text(snapshot)}."
        message += results.rest_text(output.get("output_range"), execution_id)
        return results.execution_fields(snapshot, message) | output

    def _seen(self, snapshot: Snapshot) -> Snapshot:
        if snapshot.complete:
            self.running.pop(snapshot.execution_id)
        else:
            self.running.add(snapshot.execution_id, self.running.get(snapshot.execution_id))
        return snapshot


CALLS: Mapping[str, Callable[[Calls, Mapping[str, Any], Report], Awaitable[CallToolResult]]] = {
    "list_workflows": Calls.list_workflows,
    "describe_workflow": Calls.describe_workflow,
    "start_workflow": Calls.start_workflow,
    "wait_execution": Calls.wait_execution,
    "get_execution": Calls.get_execution,
}
