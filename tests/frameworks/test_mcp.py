"""The recipe for MCP, with the OpenAI Agents SDK and a server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from promptlayer_exec.simulator import Fault, Simulator


class Model:
    """A model that follows the messages of the tools, and keeps what it read."""

    def __init__(self) -> None:
        self.tools: list[str] = []
        self.read: list[dict[str, Any]] = []

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the next message: a call of a tool, or the answer."""
        self.tools = [tool["function"]["name"] for tool in body["tools"]]
        last = body["messages"][-1]
        if last["role"] == "user":
            inputs = {"topic": last["content"]}
            return self.call("start_workflow", workflow="write-report", inputs=inputs)
        (content,) = last["content"]
        try:
            result = json.loads(content["text"])
        except ValueError:
            return {"role": "assistant", "content": f"I was told: {content['text']}"}
        self.read.append(result)
        return self.follow(result, result["execution_id"])

    def follow(self, result: dict[str, Any], execution_id: str) -> dict[str, Any]:
        """Wait, explain what failed, or answer."""
        if "complete" not in result:
            return self.call("wait_execution", execution_id=execution_id, timeout=0.05)
        if result["timed_out"]:
            return self.call("wait_execution", execution_id=execution_id)
        if result["succeeded"]:
            return {"role": "assistant", "content": f"It says: {result['output']}"}
        if len(self.read) == 3:
            (name,) = [it for it, node in result["nodes"].items() if node["status"] == "FAILED"]
            return self.call("get_execution", execution_id=execution_id, node=name)
        return {"role": "assistant", "content": f"I was told: {result['message']}"}

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Return the message that calls a tool."""
        function = {"name": tool, "arguments": json.dumps(arguments)}
        call = {"id": f"call-{len(self.read)}", "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.fixture
async def model(serve_model: Callable[..., Any]) -> Model:
    """Serve a model."""
    model = Model()
    await serve_model(model.answer)
    return model


@pytest.fixture
def page(
    server: Simulator, load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """Return the recipe, which finds the command next to this Python."""
    scripts = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([scripts, os.environ["PATH"]]))
    return load("MCP", "mcp_recipe")


async def test_the_model_starts_waits_and_gets_the_report(
    server: Simulator, page: ModuleType, model: Model
) -> None:
    """It sees the tools, the progress of the run, and its output."""
    assert await page.answer("otters") == "It says: Otters are fine."
    assert model.tools[:2] == ["list_workflows", "describe_workflow"]
    assert "run_write-report" in model.tools
    (run,) = server.runs
    assert run.inputs == {"topic": "otters"}
    _, waiting, done = model.read
    assert waiting["timed_out"]
    assert waiting["progress"] < done["progress"] == 1


async def test_the_model_reads_which_node_failed(
    server: Simulator, page: ModuleType, model: Model
) -> None:
    """It asks for that node, and explains it."""
    answer = await page.answer("unicorns")
    (run,) = server.runs
    assert answer == f"I was told: Node 'Report' of execution {run.execution_id}: FAILED."
    assert "'Report' FAILED" in model.read[2]["message"]


async def test_the_model_is_told_not_to_repeat_a_lost_start(
    server: Simulator, page: ModuleType, model: Model
) -> None:
    """Its error says what may have happened."""
    server.inject(Fault.disconnect(), path="/run")
    assert "Do not call this tool again" in await page.answer("otters")
    assert len(server.runs) == 1
