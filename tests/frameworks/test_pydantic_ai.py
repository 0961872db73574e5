"""The recipe for pydantic-ai, with the model that it has for tests."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from promptlayer_exec import StartUnknown
from promptlayer_exec.simulator import Fault, Simulator


def call_once(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Call the tool with the question as the topic, and answer with what it returned."""
    last = messages[-1].parts[-1]
    if last.part_kind == "tool-return":
        return ModelResponse(parts=[TextPart(f"It says: {last.content}")])
    (tool,) = info.function_tools
    return ModelResponse(parts=[ToolCallPart(tool.name, {"topic": last.content})])


@pytest.fixture
def page(load: Callable[..., ModuleType]) -> ModuleType:
    """Return the recipe."""
    return load("pydantic-ai", "pydantic_ai_recipe")


async def test_the_model_gets_the_report(server: Simulator, page: ModuleType) -> None:
    """Its argument becomes the workflow's input."""
    with page.agent.override(model=FunctionModel(call_once)):
        assert await page.answer("otters") == "It says: Otters are fine."
    assert [run.inputs for run in server.runs] == [{"topic": "otters"}]


async def test_the_model_reads_why_a_workflow_failed(server: Simulator, page: ModuleType) -> None:
    """A failed execution does not end the agent's run."""
    with page.agent.override(model=FunctionModel(call_once)):
        answer = await page.answer("unicorns")
    (run,) = server.runs
    assert answer.startswith(f"It says: There is no report: execution {run.execution_id} failed: ")


async def test_a_lost_start_ends_the_agents_run(server: Simulator, page: ModuleType) -> None:
    """The model does not see it, so it cannot start another run."""
    server.inject(Fault.disconnect(), path="/run")
    with page.agent.override(model=FunctionModel(call_once)), pytest.raises(StartUnknown):
        await page.answer("otters")
    assert len(server.runs) == 1
