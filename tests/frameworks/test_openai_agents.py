"""The recipe for the OpenAI Agents SDK, with a server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import agents
import pytest

from promptlayer_exec import StartUnknown
from promptlayer_exec.simulator import Fault, Simulator


def message(body: dict[str, Any]) -> dict[str, Any]:
    """Call the tool with the question as the topic, and answer with what it returned."""
    last = body["messages"][-1]
    if last["role"] == "tool":
        return {"role": "assistant", "content": f"It says: {last['content']}"}
    arguments = json.dumps({"topic": last["content"]})
    function = {"name": body["tools"][0]["function"]["name"], "arguments": arguments}
    call = {"id": "call-1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.fixture
async def page(load: Callable[..., ModuleType], serve_model: Callable[..., Any]) -> ModuleType:
    """Return the recipe."""
    await serve_model(message)
    return load("OpenAI Agents SDK", "openai_agents_recipe")


async def test_the_model_gets_the_report(server: Simulator, page: ModuleType) -> None:
    """Its argument becomes the workflow's input."""
    assert await page.answer("otters") == "It says: Otters are fine."
    assert [run.inputs for run in server.runs] == [{"topic": "otters"}]


async def test_the_model_reads_why_a_workflow_failed(server: Simulator, page: ModuleType) -> None:
    """A failed execution does not end the run."""
    answer = await page.answer("unicorns")
    (run,) = server.runs
    assert answer.startswith(f"It says: There is no report: execution {run.execution_id} failed: ")


async def test_a_lost_start_ends_the_run(server: Simulator, page: ModuleType) -> None:
    """The model does not see it, so it cannot start another run."""
    server.inject(Fault.disconnect(), path="/run")
    with pytest.raises(agents.UserError) as caught:
        await page.answer("otters")
    assert isinstance(caught.value.__cause__, StartUnknown)
    assert len(server.runs) == 1
