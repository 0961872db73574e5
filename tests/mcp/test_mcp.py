"""`promptlayer_exec.mcp`: workflows as tools, driven by the official client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from mcp import Client, MCPError, types
from mcp.client.extension import ClaimContext, ClientExtension, ResultClaim
from mcp.client.stdio import StdioServerParameters, stdio_client
from pydantic import ConfigDict
from typer.testing import CliRunner

from promptlayer_exec import Session
from promptlayer_exec._install import install_hint
from promptlayer_exec.cli._app import app as command_line
from promptlayer_exec.mcp import create_server
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.starts import SQLStartStore

TRACEBACK = "Traceback (most recent call last):\n" + "  File ...\n" * 300 + "OrderClosed: PO-4711"
MODES = ("legacy", "auto")
Connect = Callable[..., Any]


def write_report(inputs: Any) -> Scenario:
    """Fail for unicorns."""
    fails = inputs.get("topic") == "unicorns"
    return Scenario(
        [
            SimNode("Plan", "a plan"),
            SimNode(
                "Report",
                {"text": "Otters are fine."},
                after=["Plan"],
                status="FAILED" if fails else "SUCCESS",
                error_message="no such animal",
                raw_error_message={"raw": TRACEBACK},
                is_output_node=True,
            ),
        ]
    )


@pytest.fixture
def workspace(sim: Simulator) -> Simulator:
    """Return the simulator with two workflows."""
    sim.add_workflow(
        "write report",
        write_report,
        inputs={"topic": "string", "rows": "array", "when": "date"},
        definition=write_report({}),
        labels=["prod"],
    )
    sim.add_workflow("other", write_report)
    return sim


@pytest.fixture
def session(open_session: Callable[..., Session]) -> Session:
    """Return a session that checks inputs, as by default."""
    return open_session(check_inputs=True)


@pytest.fixture
def connect(session: Session) -> Connect:
    """Return a function that connects the official client to a server in this process."""

    @asynccontextmanager
    async def connect(*workflows: str, mode: str = "auto", **options: Any) -> AsyncIterator[Client]:
        async with Client(create_server(session, workflows=workflows), mode=mode, **options) as it:
            yield it

    return connect


async def call(client: Client, tool: str, **arguments: Any) -> Any:
    """Call a tool that must not fail, and return its data."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result
    (content,) = result.content
    assert isinstance(content, types.TextContent)
    assert json.loads(content.text) == result.structured_content
    assert len(content.text) < 50_000
    return result.structured_content


async def refused(client: Client, tool: str, **arguments: Any) -> str:
    """Call a tool that must fail, and return what the model reads."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result
    (content,) = result.content
    assert isinstance(content, types.TextContent)
    assert "Traceback" not in content.text
    return content.text


INPUTS = {"topic": "otters", "rows": [1], "when": "today"}


@pytest.mark.parametrize("mode", MODES)
async def test_a_run_is_started_awaited_and_read(
    workspace: Simulator, connect: Connect, mode: str
) -> None:
    """Progress only grows, and the output is data and text."""
    seen: list[tuple[float, float | None]] = []

    async def record(progress: float, total: float | None, message: str | None) -> None:
        assert message is not None
        assert "1001" in message
        seen.append((progress, total))

    async with connect(mode=mode) as client:
        assert client.protocol_version == {"legacy": "2025-11-25", "auto": "2026-07-28"}[mode]
        started = await call(client, "start_workflow", workflow="other", inputs={"n": 1})
        assert started["execution_id"] == "1001"
        waited = await client.call_tool(
            "wait_execution", {"execution_id": "1001"}, progress_callback=record
        )
        result = waited.structured_content
        assert result["output"] == {"text": "Otters are fine."}
        assert (result["complete"], result["succeeded"], result["timed_out"]) == (True, True, False)
        assert result == {**await call(client, "get_execution", execution_id=1001), **result}
    assert seen
    assert seen[-1] == (2, 2)
    assert all(one < other for one, other in pairwise(seen))
    assert workspace.runs[0].inputs == {"n": 1}


@pytest.mark.parametrize("mode", MODES)
async def test_progress_is_reported_when_the_wait_begins_and_when_a_node_finishes(
    sim: Simulator, connect: Connect, mode: str
) -> None:
    """However often the server is polled; each report has a total, and is further than the last."""
    names = ("One", "Two", "Three")
    execution_id = sim.add_execution(Scenario([SimNode(name, "v", None) for name in names]))
    seen = []
    reported = asyncio.Event()

    async def record(progress: float, total: float | None, _message: str | None) -> None:
        seen.append((progress, total))
        reported.set()

    async with connect(mode=mode) as client:
        waiting = asyncio.create_task(
            client.call_tool(
                "wait_execution", {"execution_id": execution_id}, progress_callback=record
            )
        )
        for name in names:
            await sim.wait_for_requests(sim.request_count + 3)
            reported.clear()
            sim.finish(execution_id, name)
            async with asyncio.timeout(10):
                await reported.wait()
        await waiting
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("mode", MODES)
async def test_the_tools_say_what_they_do(
    workspace: Simulator, connect: Connect, mode: str
) -> None:
    """Paid starts are marked; a named workflow has a tool with its inputs."""
    async with connect("write report", "no such", mode=mode) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert client.instructions
    assert [*tools] == [
        "list_workflows",
        "describe_workflow",
        "start_workflow",
        "wait_execution",
        "get_execution",
        "run_write_report",
        "run_no_such",
    ]
    for name, tool in tools.items():
        starts = name.startswith(("start", "run"))
        assert tool.annotations is not None
        assert tool.annotations.read_only_hint is not starts
        assert tool.annotations.destructive_hint is (True if starts else None)
        assert ("paid" in (tool.title or "")) is starts
    schema = tools["run_write_report"].input_schema
    assert {*schema["required"]} == {"topic", "rows", "when"}
    assert schema["properties"]["topic"] == {"type": "string"}
    assert schema["properties"]["rows"] == {"type": "array"}
    assert "type" not in schema["properties"]["when"]
    schema = tools["run_no_such"].input_schema
    assert [*schema["properties"]] == ["inputs", "label", "version", "timeout"]


async def test_a_wait_ends_before_the_execution(held: int, connect: Connect) -> None:
    """That is no error: the result has the id, and says what to do."""
    async with connect() as client:
        result = await call(client, "wait_execution", execution_id=str(held), timeout=0.5)
        assert (result["timed_out"], result["complete"], result["succeeded"]) == (True, False, None)
        assert result["execution_id"] == str(held)
        assert result["progress"] == 0.5
        assert result["nodes"]["Answer"]["status"] == "RUNNING"
        assert f"Call wait_execution with execution_id '{held}'" in result["message"]
        read = await call(client, "get_execution", execution_id=str(held))
        assert "is not complete: 1 of 2 nodes are final, running: 'Answer'" in read["message"]


async def test_a_silent_server_does_not_lose_the_id(
    sim: Simulator, held: int, connect: Connect
) -> None:
    """A wait ends in time without any answer."""
    sim.inject(Fault.stall())
    async with connect() as client:
        result = await call(client, "wait_execution", execution_id=held, timeout=0.05)
    assert (result["timed_out"], result["execution_id"], result["nodes"]) == (True, str(held), {})


async def test_a_failed_execution_is_a_result(workspace: Simulator, connect: Connect) -> None:
    """It names the failed node, whose whole error is read in parts."""
    async with connect("write report") as client:
        result = await call(client, "run_write_report", topic="unicorns", rows=[], when=1)
        assert (result["complete"], result["succeeded"]) == (True, False)
        assert "output" not in result
        assert "node 'Report' FAILED: no such animal" in result["message"]
        assert "node 'Report'" in result["message"]
        node = result["nodes"]["Report"]
        assert node["error_message"] == "no such animal"
        assert node["raw_error_message"].startswith("Traceback")
        asked = {"execution_id": result["execution_id"], "node": "Report"}
        whole = (await call(client, "get_execution", **asked))["nodes"]["Report"]
        assert whole["raw_error_message"] == TRACEBACK
        part = (await call(client, "get_execution", **asked, start=10, length=6))["nodes"]["Report"]
        assert part["raw_error_message"] == TRACEBACK[10:16]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param("x" * 50_000, None, id="long"),
        pytest.param('"\\\n' * 9_000, None, id="escapes"),
        pytest.param("\x00" * 9_000, None, id="controls"),
        pytest.param("a\ud800b", "a\\ud800b", id="surrogate"),
        pytest.param({"rows": ["é" * 99] * 300}, None, id="list"),
        pytest.param([float("nan"), float("inf")], "[NaN, Infinity]", id="nan"),
        pytest.param(json.loads("[" * 300 + "]" * 300), "[" * 300 + "]" * 300, id="deep"),
    ],
)
@pytest.mark.parametrize("node", [None, "Answer"])
async def test_a_long_or_odd_output_is_read_in_parts(
    sim: Simulator, connect: Connect, value: Any, text: str | None, node: str | None
) -> None:
    """Each part says where the next one begins; together they are the whole."""
    if text is None:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    execution_id = sim.add_execution(Scenario([SimNode("Answer", value, is_output_node=True)]))
    parts, start = [], 0
    async with connect() as client:
        while True:
            asked = {"execution_id": execution_id, "start": start}
            if node is not None:
                asked["node"] = node
            result = await call(client, "get_execution", **asked)
            name, fields = ("output", result) if node is None else ("value", result["nodes"][node])
            shown = fields[f"{name}_range"]
            parts.append(fields[name])
            assert shown["start"] == start
            if (start := shown["end"]) == shown["size"]:
                break
            assert f"start {start} for the next ones" in result["message"]
    assert "".join(parts) == text
    assert start == len(text)


async def test_a_plain_output_is_data(sim: Simulator, connect: Connect) -> None:
    """It comes as it is, without a range."""
    value = {"rows": [1.5, 2**62, None, True, "é"], "text": '"quoted"'}
    execution_id = sim.add_execution(Scenario([SimNode("Answer", value, is_output_node=True)]))
    async with connect() as client:
        result = await call(client, "get_execution", execution_id=execution_id)
    assert result["output"] == value
    assert "output_range" not in result


async def test_only_some_of_many_nodes_are_shown(sim: Simulator, connect: Connect) -> None:
    """Those that failed are, with their errors cut; the number of the others is."""
    nodes = [SimNode(f"Node {number} of many", "v") for number in range(2_000)]
    failed = SimNode("Odd one", status="FAILED", error_message="e" * 9_000)
    execution_id = sim.add_execution(Scenario([*nodes, failed]))
    async with connect() as client:
        result = await call(client, "wait_execution", execution_id=execution_id)
    assert result["nodes"]["Odd one"]["error_message"].endswith("(9,000 characters in all)")
    assert len(result["nodes"]) + result["nodes_left_out"] == 2_001
    assert result["nodes_left_out"] > 1_000


@pytest.mark.parametrize(
    ("tool", "arguments", "problem"),
    [
        ("start_workflow", {}, "'workflow' is a required property. The arguments are workflow,"),
        ("start_workflow", {"workflow": ["x"]}, "workflow: ['x'] is not of type 'string'"),
        ("start_workflow", {"workflow": ""}, "workflow: '' should be non-empty"),
        ("start_workflow", {"workflow": "other", "topic": 1}, "('topic' was unexpected)"),
        ("start_workflow", {"workflow": "other", "inputs": "{}"}, "inputs: '{}' is not of type"),
        ("start_workflow", {"workflow": "other", "version": True}, "version: True is not of type"),
        ("start_workflow", {"workflow": "other", "version": 1, "label": "a"}, "not both"),
        ("wait_execution", {"execution_id": "1e3"}, "got '1e3'. Do not guess ids"),
        ("wait_execution", {"execution_id": "787", "timeout": -1}, "-1 is less than the minimum"),
        ("wait_execution", {"execution_id": "787", "timeout": 10**400}, "is greater than the max"),
        (
            "wait_execution",
            {"execution_id": "787", "timeout": "9" * 999},
            "is not of type 'number'",
        ),
        (
            "wait_execution",
            {"execution_id": "787"},
            "execution 787: the server returned 404 Not Found",
        ),
        (
            "get_execution",
            {"execution_id": "787"},
            "execution 787: the server returned 404 Not Found",
        ),
    ],
)
async def test_what_is_wrong_with_a_call_is_said(
    workspace: Simulator, connect: Connect, tool: str, arguments: dict[str, Any], problem: str
) -> None:
    """The text names the argument, and no setting of the server; nothing is started."""
    async with connect() as client:
        text = await refused(client, tool, **arguments)
    assert problem in text
    assert "base_url" not in text
    assert workspace.runs == []


async def test_near_names_are_suggested(workspace: Simulator, connect: Connect) -> None:
    """Of workflows, of inputs, and of nodes."""
    async with connect() as client:
        for tool in ("describe_workflow", "start_workflow"):
            text = await refused(client, tool, workflow="write_report")
            assert "no workflow is named 'write_report'. Did you mean 'write report'?" in text
        text = await refused(
            client, "start_workflow", workflow="write report", inputs={"Topik": 1, "rows": []}
        )
        assert "missing inputs for workflow 'write report': 'topic' (string), 'when' (date)" in text
        assert "did you mean 'topic'?" in text
        assert "No run was started. describe_workflow" in text
        text = await refused(client, "start_workflow", workflow="write report", version=9)
        assert text.startswith("workflow 'write report' does not have this version or label (404")
        assert "describe_workflow shows the latest version" in text
        assert workspace.runs == []
        workspace.inject(Fault.status(404))
        workspace.inject(Fault.status(403, times=None))
        assert "list_workflows" in await refused(client, "describe_workflow", workflow="none")
        workspace.clear_faults()
        execution_id = workspace.add_execution(write_report({}))
        text = await refused(client, "get_execution", execution_id=execution_id, node="report")
        assert "It has: 'Plan', 'Report'. Did you mean 'Report'?" in text


async def test_a_number_is_no_string(workspace: Simulator, connect: Connect) -> None:
    """It is refused with the reason before a run is paid for, whichever tool starts that."""
    inputs = {"topic": 5, "rows": [], "when": 1}
    async with connect("write report", "other") as client:
        for tool, arguments in (
            ("start_workflow", {"workflow": "write report", "inputs": inputs}),
            ("run_write_report", inputs),
        ):
            text = await refused(client, tool, **arguments)
            assert text.startswith("the input 'topic' must be a string, got the number 5")
        assert workspace.runs == []
        assert (await call(client, "run_write_report", **{**inputs, "topic": "5"}))["succeeded"]
        assert (await call(client, "run_other", n=1.5))["succeeded"]


async def test_no_number_is_refused_on_a_kept_definition(sim: Simulator, connect: Connect) -> None:
    """It is read once more first; otherwise all tools share one request."""
    sim.add_workflow("count", write_report, inputs={"n": "string"})
    async with connect() as client:
        await call(client, "describe_workflow", workflow="count")
        await call(client, "start_workflow", workflow="count", inputs={"n": "5"})
        assert [request.path for request in sim.requests].count("/workflows/count") == 1
        sim.add_version("count", write_report, inputs={"n": "number"})
        await call(client, "start_workflow", workflow="count", inputs={"n": 5})
    assert len(sim.runs) == 2


async def test_a_lost_start_is_not_repeated(workspace: Simulator, connect: Connect) -> None:
    """The model is told not to start it again."""
    workspace.inject(Fault.disconnect(), path="/run")
    async with connect("other") as client:
        text = await refused(client, "run_other", topic="otters")
    assert "a run of workflow 'other' may have started" in text
    assert "Do not call this tool again" in text
    assert len(workspace.runs) == 1


@pytest.fixture
def connect_keyed(open_session: Callable[..., Session], tmp_path: Path) -> Connect:
    """Return a function that connects a client to a server with a record of starts."""

    @asynccontextmanager
    async def connect(*workflows: str) -> AsyncIterator[Client]:
        starts = SQLStartStore(f"sqlite:///{tmp_path / 'starts.sqlite'}")
        server = create_server(open_session(starts=starts), workflows=workflows)
        async with Client(server) as client:
            yield client

    return connect


async def test_a_call_that_is_repeated_with_its_key_gets_the_same_run(
    workspace: Simulator, connect_keyed: Connect
) -> None:
    """Of any tool, and of any server with the same database; the message says so."""
    asked = {"workflow": "other", "inputs": {"n": 1}, "idempotency_key": "a"}
    async with connect_keyed() as client:
        assert client.instructions is not None
        assert "idempotency_key" in client.instructions
        first = await call(client, "start_workflow", **asked)
        assert "has started. Call wait_execution" in first["message"]
    async with connect_keyed("other", "write report") as client:
        again = await call(client, "start_workflow", **asked)
        assert "the same run, not a new one. Call wait_execution" in again["message"]
        assert again["execution_id"] == first["execution_id"] == "1001"
        result = await call(client, "run_other", inputs={"n": 1}, idempotency_key="a")
        assert (result["execution_id"], result["succeeded"]) == ("1001", True)

        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        for name in ("start_workflow", "run_other", "run_write_report"):
            schema = tools[name].input_schema
            assert "idempotency_key" in schema["properties"]
            assert "idempotency_key" not in schema["required"]
        for _ in range(2):
            await call(client, "run_write_report", **INPUTS, idempotency_key="b")
    assert [run.inputs for run in workspace.runs] == [{"n": 1}, INPUTS]


async def test_another_call_under_a_key_starts_nothing(
    workspace: Simulator, connect_keyed: Connect
) -> None:
    """The model reads what differs, and what to do; so it does if a start was lost."""
    async with connect_keyed() as client:
        await call(client, "start_workflow", workflow="other", idempotency_key="a")
        asked = {"workflow": "other", "inputs": {"n": 1}, "idempotency_key": "a"}
        error = await refused(client, "start_workflow", **asked)
        assert "(changed: inputs.n)" in error
        assert error.endswith("A new run needs a new idempotency_key.")

        workspace.inject(Fault.disconnect(), path="/run")
        for _ in range(2):
            error = await refused(client, "start_workflow", **{**asked, "idempotency_key": "b"})
            assert "Another call with this idempotency_key starts nothing: ask the user." in error
            assert "forget" not in error  # no tool does this
    assert len(workspace.runs) == 2


async def test_without_a_record_of_starts_there_is_no_key(connect: Connect) -> None:
    """A model that makes one up is told; nothing is started behind its back."""
    async with connect() as client:
        assert client.instructions is not None
        assert "idempotency_key" not in client.instructions
        error = await refused(client, "start_workflow", workflow="other", idempotency_key="a")
    assert "'idempotency_key' was unexpected" in error


async def test_a_refused_key_is_no_secret(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """The error says which setting to check, without the key."""
    session = open_session(api_key="pl_not_the_right_one")
    async with Client(create_server(session)) as client:
        text = await refused(client, "start_workflow", workflow="other")
    assert "401 Unauthorized" in text
    assert "PROMPTLAYER_API_KEY" in text
    assert "pl_not" not in text


async def test_workflows_are_listed_and_described(workspace: Simulator, connect: Connect) -> None:
    """A search finds parts of names; a long list is cut."""
    for number in range(150):
        workspace.add_workflow(f"evaluation {number}", write_report)
    async with connect() as client:
        listed = await call(client, "list_workflows")
        assert len(listed["workflows"]) == 100
        assert "There are more: use search" in listed["message"]
        found = await call(client, "list_workflows", search="REPORT")
        (report,) = found["workflows"]
        assert (report["name"], report["labels"]) == ("write report", ["prod"])
        described = await call(client, "describe_workflow", workflow="write report", label="prod")
        assert described["required_inputs"] == {"topic": "string", "rows": "array", "when": "date"}
        assert [node["name"] for node in described["nodes"]] == ["Plan", "Report"]
        assert "It needs the inputs 'topic', 'rows', 'when'" in described["message"]
        by_id = await call(client, "describe_workflow", workflow=report["id"])
        assert by_id == described


async def test_a_big_workflow_is_described_in_part(sim: Simulator, connect: Connect) -> None:
    """What it needs is said in any case."""
    big = Scenario([SimNode(f"Node {number}", "v") for number in range(500)])
    sim.add_workflow("big", big, inputs={}, definition=big)
    async with connect() as client:
        described = await call(client, "describe_workflow", workflow="big")
        assert "It needs no inputs." in described["message"]
        assert len(described["nodes"]) + described["nodes_left_out"] == 500


async def test_only_named_workflows_are_known(workspace: Simulator, connect: Connect) -> None:
    """No other can be started, described or found."""
    async with connect("write report") as client:
        (found,) = (await call(client, "list_workflows"))["workflows"]
        assert found["name"] == "write report"
        for tool in ("start_workflow", "describe_workflow"):
            text = await refused(client, tool, workflow="other")
            assert text.startswith("workflow: 'other' is not one of ['write report']")
        with pytest.raises(MCPError, match=r"no tool 'run_other'\. The tools are: list_"):
            await client.call_tool("run_other", {})
    assert workspace.runs == []


@pytest.mark.parametrize("mode", MODES)
async def test_a_name_that_the_server_was_started_with_may_be_misspelt(
    workspace: Simulator, connect: Connect, mode: str
) -> None:
    """Each tool says so, and which name was perhaps meant; an id can be wrong, too."""
    problem = "no workflow is named 'write-reprot'. Did you mean 'write report'?"
    async with connect("write-reprot", "77", mode=mode) as client:
        listed = await call(client, "list_workflows")
        assert listed["workflows"] == []
        assert listed["message"].startswith(f"0 workflows. {problem} no workflow has the id '77'.")
        for tool, arguments in (
            ("run_write-reprot", {"inputs": INPUTS}),
            ("start_workflow", {"workflow": "write-reprot"}),
            ("describe_workflow", {"workflow": "write-reprot"}),
        ):
            text = await refused(client, tool, **arguments)
            assert text.startswith(problem)
            assert text.endswith("started this server with this name: ask them to correct it.")
    assert workspace.runs == []


async def test_a_server_that_does_not_answer_leaves_inputs_unknown(
    workspace: Simulator, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """The tools are listed all the same, and the log says why they lack the inputs."""
    workspace.inject(Fault.status(403))
    async with connect("write report") as client:
        tools = (await client.list_tools()).tools
    assert tools[-1].name == "run_write_report"
    assert "could not read the inputs of workflow 'write report': " in caplog.text


async def test_a_named_workflow_is_run_by_its_tool(workspace: Simulator, connect: Connect) -> None:
    """Its inputs are arguments, or the arguments are those of start_workflow."""
    async with connect("write report") as client:
        for tools_are_listed in (False, True):
            if tools_are_listed:
                await client.list_tools()
            result = await call(client, "run_write_report", **INPUTS, timeout=30)
            assert result["output"] == {"text": "Otters are fine."}
            nested = {"inputs": INPUTS, "label": "prod", "timeout": 30}
            assert (await call(client, "run_write_report", **nested))["succeeded"]
        assert "missing inputs for workflow" in await refused(
            client, "run_write_report", topic="otters"
        )
    assert [run.inputs for run in workspace.runs] == [INPUTS] * 4


async def test_inputs_may_be_named_like_options(sim: Simulator, connect: Connect) -> None:
    """A required input wins."""
    names = {"timeout": "string", "inputs": "object"}
    sim.add_workflow("odd", write_report, inputs=names, definition=write_report({}))
    async with connect("odd") as client:
        (tool,) = [it for it in (await client.list_tools()).tools if it.name == "run_odd"]
        assert tool.input_schema["properties"]["timeout"] == {"type": "string"}
        await call(client, "run_odd", timeout="soon", inputs={"a": 1})
    assert sim.runs[0].inputs == {"timeout": "soon", "inputs": {"a": 1}}


async def test_the_wait_of_a_run_ends_in_time(sim: Simulator, connect: Connect) -> None:
    """The first message has the id already, and the execution is a resource."""
    sim.add_workflow("slow", Scenario([SimNode("Answer", "42", None, is_output_node=True)]))
    seen = []

    async def record(progress: float, _total: float | None, message: str | None) -> None:
        seen.append((progress, message))

    async with connect("slow") as client:
        result = await client.call_tool("run_slow", {"timeout": 0.5}, progress_callback=record)
        assert result.structured_content["timed_out"]
        assert seen == [(0, "execution 1001: 0 of 1 nodes are final, running: 'Answer'")]
        (resource,) = (await client.list_resources()).resources
        assert (resource.uri, resource.description) == ("execution://1001", "A run of 'slow'")


@pytest.mark.parametrize("mode", MODES)
async def test_a_cancelled_call_keeps_the_id(
    sim: Simulator, connect: Connect, our_tasks: Callable[[], list[str]], mode: str
) -> None:
    """Nothing follows the execution any more; it goes on, and is a resource."""
    sim.add_workflow("slow", Scenario([SimNode("Answer", "42", None, is_output_node=True)]))
    started = asyncio.Event()
    watch = "promptlayer_exec.Watch 1001"

    async def record(_progress: float, _total: float | None, _message: str | None) -> None:
        started.set()

    async with connect("slow", mode=mode) as client:
        running = asyncio.create_task(client.call_tool("run_slow", {}, progress_callback=record))
        await started.wait()
        await sim.wait_for_requests(sim.request_count + 2)
        assert watch in our_tasks()
        running.cancel()
        await asyncio.wait([running])
        (resource,) = (await client.list_resources()).resources
        assert resource.uri == "execution://1001"
        assert watch not in our_tasks()
    assert sim.state(1001) == {"Answer": "RUNNING"}


async def test_tools_have_names_that_clients_accept(connect: Connect) -> None:
    """Characters are replaced, long names cut, and equal ones numbered."""
    async with connect("a b", "a_b", "a.b", "ü" * 99, "ö" * 99, "42") as client:
        tools = (await client.list_tools()).tools[5:]
    assert [tool.name.removeprefix("run_") for tool in tools] == [
        "a_b",
        "a_b_2",
        "a.b",
        "_" * 60,
        "_" * 58 + "_2",
        "42",
    ]
    assert tools[1].title == "Run 'a_b' (paid)"


def test_a_workflow_has_a_name(session: Session) -> None:
    """An empty one would allow nothing, or everything; a single string would be its letters."""
    with pytest.raises(ValueError, match="must not be empty"):
        create_server(session, workflows=["a", ""])
    with pytest.raises(TypeError, match="names and Workflows, got 7"):
        create_server(session, workflows=["a", 7])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"write \['report'\]"):
        create_server(session, workflows="report")


@pytest.mark.parametrize("mode", MODES)
async def test_an_execution_is_a_resource(
    workspace: Simulator, connect: Connect, held: int, mode: str
) -> None:
    """It is read as it is now, and those that are running are listed."""
    async with connect(mode=mode) as client:
        (template,) = (await client.list_resource_templates()).resource_templates
        assert template.uri_template == "execution://{id}"
        assert (await client.list_resources()).resources == []
        read = await client.read_resource(f"execution://{held}")
        (content,) = read.contents
        assert isinstance(content, types.TextResourceContents)
        assert json.loads(content.text)["progress"] == 0.5
        assert [it.uri for it in (await client.list_resources()).resources] == [
            f"execution://{held}"
        ]
        workspace.finish(held, "Answer")
        await client.read_resource(f"execution://{held}", cache_mode="bypass")
        listed = await client.list_resources(cache_mode="bypass")
        assert listed.resources == []
        for uri, problem in (("execution://x", "there is no resource"), ("execution://9", "404")):
            with pytest.raises(MCPError, match=problem):
                await client.read_resource(uri)


class TaskResult(types.Result):
    """A task in place of a result."""

    result_type: Literal["task"] = "task"
    task_id: str
    created_at: str
    status: str
    status_message: str
    ttl_ms: int | None


class Tasks(ClientExtension):
    """A client that declares the tasks extension."""

    identifier = "io.modelcontextprotocol/tasks"

    def claims(self) -> list[ResultClaim[Any]]:
        """Take a task for a result of its own."""

        async def resolve(_task: TaskResult, _context: ClaimContext) -> types.CallToolResult:
            raise NotImplementedError

        return [ResultClaim(result_type="task", model=TaskResult, resolve=resolve)]


class Anything(types.Result):
    """A result with all its fields."""

    model_config = ConfigDict(extra="allow")


async def request(client: Client, method: str, task_id: Any) -> dict[str, Any]:
    """Send a request of the extension, and return all fields of its result."""
    asked = types.Request[dict[str, Any], str](method=method, params={"taskId": task_id})
    return (await client.session.send_request(asked, Anything)).model_dump(by_alias=True)


async def test_a_run_may_be_a_task(workspace: Simulator, connect: Connect) -> None:
    """The execution's id is its handle, also for a server that has never seen it."""
    slow = Scenario([SimNode("Answer", "42", None, is_output_node=True)])
    workspace.add_workflow("slow", slow, warning="old model")
    async with connect("slow", extensions=[Tasks()]) as client:
        capabilities = client.server_capabilities
        assert capabilities.extensions == {"io.modelcontextprotocol/tasks": {}}
        task = await client.session.call_tool("run_slow", {}, allow_claimed=True)
        assert isinstance(task, TaskResult)
        assert (task.task_id, task.status, task.ttl_ms) == ("1001", "working", None)
        assert task.status_message.endswith("has started. PromptLayer warns: old model")
        working = await request(client, "tasks/get", "1001")
        assert working["status"] == "working"
        assert working["statusMessage"] == "0 of 1 nodes are final, running: 'Answer'"
        assert working["ttlMs"] is None
        cancelled = await request(client, "tasks/cancel", "1001")
        assert "it continues, and you pay for it" in str(cancelled["_meta"])
        assert (await request(client, "tasks/get", "1001"))["status"] == "working"
        assert (await request(client, "tasks/update", "1001"))["resultType"] == "complete"
        workspace.finish(1001, "Answer")
        done = await request(client, "tasks/get", "1001")
        assert done["status"] == "completed"
        assert done["result"]["structuredContent"]["output"] == "42"
        assert done["lastUpdatedAt"] >= task.created_at
        await request(client, "tasks/cancel", "1001")
    async with connect(extensions=[Tasks()]) as client:
        again = await request(client, "tasks/get", "1001")
        assert again["result"] == done["result"]


async def test_a_call_that_starts_nothing_is_no_task(
    workspace: Simulator, connect: Connect
) -> None:
    """Neither one that only waits, nor one whose arguments are wrong."""
    async with connect("write report", extensions=[Tasks()]) as client:
        assert "missing" in await refused(client, "run_write_report", rows=[])
        started = await call(client, "start_workflow", workflow="write report", inputs=INPUTS)
        assert (await call(client, "wait_execution", execution_id=started["execution_id"]))[
            "succeeded"
        ]


@pytest.mark.parametrize("method", ["tasks/get", "tasks/update", "tasks/cancel"])
async def test_tasks_are_for_those_who_declare_them(
    workspace: Simulator, connect: Connect, method: str
) -> None:
    """Others get the result, and the errors that the extension asks for."""
    async with connect("write report") as client:
        result = await call(client, "run_write_report", **INPUTS)
        assert result["succeeded"]
        with pytest.raises(MCPError) as caught:
            await request(client, method, "1001")
        assert caught.value.error.code == types.MISSING_REQUIRED_CLIENT_CAPABILITY
        assert "io.modelcontextprotocol/tasks" in str(caught.value.error.data)
    async with connect("write report", mode="legacy", extensions=[Tasks()]) as client:
        assert client.server_capabilities.extensions is None
        assert (await call(client, "run_write_report", **INPUTS))["succeeded"]
        with pytest.raises(MCPError) as caught:
            await request(client, method, "1001")
        assert caught.value.error.code == types.METHOD_NOT_FOUND
    async with connect(extensions=[Tasks()]) as client:
        for task_id, problem in (("nonsense", "there is no task"), ("999", "execution 999: ")):
            with pytest.raises(MCPError, match=problem) as caught:
                await request(client, method, task_id)
            assert caught.value.error.code == types.INVALID_PARAMS
        workspace.inject(Fault.status(403))
        with pytest.raises(MCPError, match="403") as caught:
            await request(client, method, "1001")
        assert caught.value.error.code == types.INTERNAL_ERROR


async def test_an_output_that_cannot_be_read_is_no_failure(
    sim: Simulator, connect: Connect
) -> None:
    """The execution succeeded; only the request for its output failed."""
    execution_id = sim.add_execution(
        Scenario([SimNode("A", 1, is_output_node=True), SimNode("B", 2, is_output_node=True)])
    )
    async with connect() as client:
        reading = asyncio.create_task(call(client, "wait_execution", execution_id=execution_id))
        await sim.wait_for_requests(1)
        sim.inject(Fault.status(403))
        result = await reading
        assert (result["succeeded"], "output" in result) == (True, False)
        assert "Could not read its output" in result["message"]
        assert (await call(client, "get_execution", execution_id=execution_id))["output"] == 1


@pytest.fixture
def environment(sim: Simulator) -> dict[str, str]:
    """Return the environment of a server."""
    settings = {"PROMPTLAYER_API_KEY": sim.api_key, "PROMPTLAYER_BASE_URL": sim.base_url}
    return {**os.environ, **settings}


Serve = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
async def serve_mcp(environment: dict[str, str]) -> AsyncIterator[Serve]:
    """Return a function that starts the command, and speaks the older revision to it."""
    processes = []

    async def start(*messages: dict[str, Any]) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "promptlayer_exec", "mcp"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )
        processes.append(process)
        client = {"protocolVersion": "2025-06-18", "capabilities": {}}
        client["clientInfo"] = {"name": "test", "version": "1"}
        for message in (
            {"id": 0, "method": "initialize", "params": client},
            {"method": "notifications/initialized"},
            *messages,
        ):
            process.stdin.write((json.dumps({"jsonrpc": "2.0", **message}) + "\n").encode())
        return process

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def tool_call(tool: str, **arguments: Any) -> dict[str, Any]:
    """Return a call with a token for its progress."""
    meta = {"progressToken": "t"}
    return {
        "id": 1,
        "method": "tools/call",
        "params": {"name": tool, "arguments": arguments, "_meta": meta},
    }


# Starts the command, and writes its id and then its exit code into a file.
WRAPPER = """\
import pathlib, subprocess, sys
state = pathlib.Path(sys.argv[1])
process = subprocess.Popen([sys.executable, "-m", "promptlayer_exec", "mcp"])
state.write_text(str(process.pid))
state.write_text(f"exit {process.wait()}")
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
async def test_the_process_ends_by_a_signal(
    held: int, environment: dict[str, str], tmp_path: Path, end: signal.Signals
) -> None:
    """Although a call waits and standard input is open; what was running is named."""
    state, log = tmp_path / "state", tmp_path / "log"
    server = StdioServerParameters(
        command=sys.executable, args=["-c", WRAPPER, str(state)], env=environment
    )
    with log.open("w") as errors:
        async with Client(stdio_client(server, errlog=errors)) as client:
            waits = asyncio.Event()
            asked = {"execution_id": str(held)}

            async def report(*_: Any) -> None:
                waits.set()

            wait = client.call_tool("wait_execution", asked, progress_callback=report)
            waiting = asyncio.create_task(wait)
            await waits.wait()
            os.kill(int(state.read_text()), end)
            with pytest.raises(MCPError, match="closed"):
                await waiting
    assert state.read_text() == f"exit {128 + end}"
    assert f"execution {held} continues on PromptLayer. Follow it with: promptlayer-exec watch" in (
        log.read_text()
    )


async def test_the_process_ends_with_its_client(held: int, serve_mcp: Serve) -> None:
    """Although a call waits, which it names. Each line of its standard output is a message."""
    process = await serve_mcp(tool_call("wait_execution", execution_id=held))
    lines = [json.loads(await process.stdout.readline()) for _ in range(2)]
    assert lines[1]["method"] == "notifications/progress"
    process.stdin.close()
    out, errors = await process.communicate()
    lines.extend(map(json.loads, out.splitlines()))
    assert all(line["jsonrpc"] == "2.0" for line in lines)
    assert process.returncode == 0
    assert f"execution {held} continues on PromptLayer. Follow it with".encode() in errors


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "there is no API key. Set the environment variable"),
        (["--workflow", ""], "must not be empty"),
        (["--db", "mysql://x/y"], "Check --db"),
    ],
)
def test_the_command_says_what_it_lacks(arguments: list[str], problem: str) -> None:
    """On standard error: standard output is the protocol's."""
    result = CliRunner().invoke(command_line, ["mcp", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert problem in result.stderr


def test_a_database_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """If one was named; without the extra, the tools have no keys, and all else works."""
    monkeypatch.setitem(sys.modules, "promptlayer_exec.starts", None)
    result = CliRunner().invoke(command_line, ["mcp", "--db", "sqlite:///starts.sqlite"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"--db needs {install_hint('cli', 'starts')}\n"
    assert "no API key" in CliRunner().invoke(command_line, ["mcp"]).stderr


def test_the_command_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the SDK, it says what to install."""
    monkeypatch.setitem(sys.modules, "promptlayer_exec.mcp", None)
    result = CliRunner().invoke(command_line, ["mcp"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"the MCP server needs {install_hint('mcp')}\n"


@pytest.mark.parametrize(("end", "code"), [("signal", 143), ("stdin", 0)])
async def test_the_process_ends_while_a_start_has_no_answer(
    workspace: Simulator, serve_mcp: Serve, end: str, code: int
) -> None:
    """It says that a run may have started."""
    workspace.inject(Fault.status(404))
    workspace.inject(Fault.stall())
    process = await serve_mcp(tool_call("start_workflow", workflow="other"))
    await workspace.wait_for_requests(2, timeout=40)
    if end == "signal":
        process.send_signal(signal.SIGTERM)
    else:
        process.stdin.close()
    _, err = await process.communicate()
    assert process.returncode == code
    assert b"a run of workflow 'other' may have started" in err
