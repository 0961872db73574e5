"""The API key, the list of workflows, and one definition."""

from __future__ import annotations

import re
from typing import Any

from promptlayer_exec._api.catalog import (
    WorkflowsPage,
    read_workflow,
    workflow_request,
    workflows_request,
)
from promptlayer_exec._api.messages import decode
from promptlayer_exec._doctor.examination import Examination
from promptlayer_exec._doctor.exchanges import Exchange
from promptlayer_exec._doctor.report import (
    Finding,
    broken_rule,
    counted,
    differs,
    failed,
    ok,
    skipped,
)
from promptlayer_exec._engine.settings import find_api_key
from promptlayer_exec._values.errors import ConfigurationError, InvalidResponse
from promptlayer_exec._values.workflow_definition import WorkflowDefinition

REPORT_IT = "Please report it."
_UNCHECKED = f"Runs start without a check of their inputs. {REPORT_IT}"
# Types that an input may have. Any other text might be a user's.
_KINDS = {"string", "integer", "number", "float", "boolean", "object", "array", "json", "image"}


async def check_key(examination: Examination) -> Finding:  # noqa: PLR0911 - a table
    try:
        api_key = find_api_key(None)
    except ConfigurationError as error:
        return failed(broken_rule(error), "Copy the key again.")
    if api_key is None:
        return failed(
            "there is no API key", "Set PROMPTLAYER_API_KEY to one from PromptLayer's settings."
        )

    examination.private.append(api_key)
    examination.api_key = examination.wire.api_key = api_key
    listed = examination.listed = await examination.wire.ask("GET", workflows_request(1, {}).target)
    match listed.status:
        case 200:
            return ok("accepted")
        case 401:
            return failed(
                f"PromptLayer refused it: {listed.status_name}",
                "Check PROMPTLAYER_API_KEY: was it revoked, or does it belong to another server?",
            )
        case 403 | 404:
            # It may still run a workflow. The next check judges the list.
            return ok(f"not refused: {listed.status_name}")
        case 429:
            return failed(f"the server responded {listed.status_name}", "Try again in a minute.")
    return failed(
        f"the server responded {listed.status_name}",
        "Check that --base-url is the PromptLayer API.",
    )


async def check_workflows(examination: Examination) -> Finding:
    """Read the first page of the list, and choose the workflow to look at."""
    examination.chosen = examination.scope.workflow
    match examination.listed.status:
        case 403:
            return failed(
                f"PromptLayer refused to list workflows: {examination.listed.status_name}",
                "Check what the key may do in its workspace.",
            )
        case 404:
            return failed(
                f"the server has no list of workflows: {examination.listed.status_name}",
                "Check that --base-url is the PromptLayer API.",
            )

    try:
        page = WorkflowsPage(examination.listed.response, 1)
    except InvalidResponse as error:
        return failed(
            f"the list of workflows has an unknown shape{_place_in(error)}",
            f"Check that --base-url is the PromptLayer API. {REPORT_IT}",
        )

    existing = [summary for summary in page.summaries if not summary.is_deleted]
    if examination.chosen is None and existing:
        examination.chosen = examination.workflow_id = existing[0].id

    count = str(len(existing))
    if page.following is not None:
        count += " on the first page"
    return ok(f"{count} listed")


async def check_definition(examination: Examination) -> Finding:
    """Read the definition of the chosen workflow."""
    if examination.chosen is None:
        return skipped("no workflow is listed, and there is no --workflow")

    target = workflow_request(examination.chosen, None, None).target
    exchange = await examination.wire.ask("GET", target)
    if exchange.status == 404 and examination.scope.workflow is not None:
        return failed(
            f"there is no workflow of this name: {exchange.status_name}",
            "Check --workflow. `promptlayer-exec workflows` lists the names.",
        )
    if exchange.status != 200:
        return failed(f"could not read it: {exchange.status_name}", _UNCHECKED)

    try:
        workflow = read_workflow(exchange.response)
    except InvalidResponse as error:
        return differs("a known shape", f"an unknown shape{_place_in(error)}", _UNCHECKED)
    examination.workflow_id = workflow.id
    examination.required_inputs = workflow.required_inputs
    return _judge_definition(exchange, workflow)


def _judge_definition(exchange: Exchange, workflow: WorkflowDefinition) -> Finding:
    body: Any = decode(exchange.response)

    if body.get("workflow_id") is None or body.get("workflow_name") is None:
        return differs(
            "the documented fields, workflow_id and workflow_name among them",
            "only the object 'workflow', as from a development server",
            _UNCHECKED,
        )
    if not isinstance(body.get("nodes"), list):
        return differs("nodes", "none", f"There is no graph to show. {REPORT_IT}")
    if body.get("version") is None:
        field = "no version"
        if workflow.version is not None:
            field = "'version_number', as in an example of the documentation"
        return differs("the version in 'version'", field, f"Nothing depends on it. {REPORT_IT}")

    required = workflow.required_inputs or {}
    inputs = counted(len(required), "input") if required else "names no inputs"
    if types := set(required.values()):
        named = sorted(types & _KINDS) + ["another type"] * bool(types - _KINDS)
        inputs += f" ({', '.join(named)})"
    return ok(f"documented shape: {inputs}, {counted(len(workflow.nodes), 'node')}")


def _place_in(error: InvalidResponse) -> str:
    """Return which field of a body is wrong. The rest of the path may be a user's name."""
    if not error.path:
        return ": not JSON"
    found = re.match(r"\$\.(\w+)", error.path)
    return f" (in {found[1]!r})" if found else ""
