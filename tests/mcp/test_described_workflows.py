"""`create_server(workflows=[Workflow(...)])`: what agents read, and what they may pass."""

# ruff: noqa: D101 - the classes are what users would write

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import attrs
import pytest
from mcp import Client, types

from promptlayer_exec import Session, Workflow
from promptlayer_exec.mcp import create_server
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

PURPOSE = "Writes a report on an animal. Takes a minute. Use it for questions about zoology."


@attrs.frozen
class Topic:
    topic: str
    length: int = 3


REPORT = Workflow(
    "write report",
    inputs=Topic,
    label="prod",
    metadata={"app": "agents"},
    description=PURPOSE,
)
Connect = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture(autouse=True)
def _workflow(sim: Simulator) -> None:
    done = Scenario([SimNode("Report", "fine", is_output_node=True)])
    sim.add_workflow("write report", done, inputs={"topic": "string"}, labels=["prod"])
    sim.add_version("write report", done, inputs={}, labels=["canary"])


@pytest.fixture
def connect(open_session: Callable[..., Session]) -> Connect:
    """Return a function that connects the official client to a server in this process."""

    @asynccontextmanager
    async def connect(*workflows: str | Workflow[Any, Any]) -> AsyncIterator[Client]:
        session = open_session(check_inputs=True)
        async with Client(create_server(session, workflows=workflows)) as client:
            yield client

    return connect


async def call(client: Client, tool: str, **arguments: Any) -> Any:
    """Call a tool that must not fail, and return its data."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result
    return result.structured_content


async def refused(client: Client, tool: str, **arguments: Any) -> str:
    """Call a tool that must fail, and return what the model reads."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result
    (content,) = result.content
    assert isinstance(content, types.TextContent)
    return content.text


async def test_an_agent_reads_first_what_a_workflow_is_for(connect: Connect) -> None:
    """In the tool of its own, in the list, and in the description of its inputs."""
    async with connect(REPORT, Workflow("x")) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        listed = await call(client, "list_workflows")
        described = await call(client, "describe_workflow", workflow="write report")
    tool = tools["run_write_report"]
    assert (tool.description or "").startswith(f"{PURPOSE}\n\nRun the PromptLayer workflow")
    assert (tools["run_x"].description or "").startswith("Run the PromptLayer workflow 'x'")
    assert [entry["description"] for entry in listed["workflows"]] == [PURPOSE]
    assert described["message"].startswith(f"{PURPOSE}\n\nWorkflow 'write report', version 1.")


async def test_the_tool_describes_the_version_that_it_runs(
    sim: Simulator, connect: Connect
) -> None:
    """Its inputs are those of the label, and its runs have the label and the metadata."""
    async with connect(REPORT) as client:
        (tool,) = [it for it in (await client.list_tools()).tools if it.name.startswith("run_")]
        assert tool.input_schema["required"] == ["topic"]
        described = await call(client, "describe_workflow", workflow="write report")
        assert described["required_inputs"] == {"topic": "string"}
        await call(client, "run_write_report", topic="otters")
        await call(client, "start_workflow", workflow="write report", inputs={"topic": "newts"})
        await call(client, "run_write_report", inputs={"topic": "eels"})
    assert [run.body["workflow_label_name"] for run in sim.runs] == ["prod"] * 3
    assert [run.body["metadata"] for run in sim.runs] == [{"app": "agents"}] * 3
    assert sim.runs[0].inputs == {"topic": "otters", "length": 3}


@pytest.mark.parametrize(
    "tool", ["start_workflow", "run_write_report", "run_write_report with an object"]
)
async def test_inputs_of_another_type_cost_nothing(
    sim: Simulator, connect: Connect, tool: str
) -> None:
    """The error has the path, and what to do."""
    tool, _, as_object = tool.partition(" ")
    inputs: Any = {"topic": "otters", "length": "long"}
    arguments = {"inputs": inputs} if as_object or tool == "start_workflow" else inputs
    if tool == "start_workflow":
        arguments["workflow"] = "write report"
    async with connect(REPORT) as client:
        await client.list_tools()
        text = await refused(client, tool, **arguments)
    assert "at $.length: expected an integer, got a string. No run was started." in text
    assert "describe_workflow" in text
    assert not sim.runs


@pytest.mark.parametrize("choice", [{"label": "canary"}, {"version": 2}])
async def test_an_agent_cannot_choose_another_version(
    sim: Simulator, connect: Connect, choice: dict[str, Any]
) -> None:
    """Naming the same label is no error. Without a label of its own, the agent chooses."""
    arguments: dict[str, Any] = {"workflow": "write report", "inputs": {"topic": "x"}}
    async with connect(REPORT) as client:
        text = await refused(client, "start_workflow", **arguments, **choice)
        assert "with the label 'prod' alone" in text
        assert not sim.runs
        await refused(client, "describe_workflow", workflow="write report", **choice)
        await call(client, "start_workflow", **arguments, label="prod")
    async with connect(attrs.evolve(REPORT, label=None)) as client:
        await call(client, "start_workflow", **arguments, **choice)
    assert [run.body.get("workflow_label_name") for run in sim.runs] == [
        "prod",
        choice.get("label"),
    ]


async def test_the_arguments_of_a_fixed_version_do_not_offer_a_choice(
    sim: Simulator, connect: Connect
) -> None:
    """Where the inputs are unknown, the tool takes an object, and no label."""
    sim.add_workflow("open", Scenario([]), labels=["prod"])
    async with connect(Workflow("open", label="prod"), Workflow("write report")) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools["run_open"].input_schema["properties"]) == {"inputs", "timeout"}
