"""`promptlayer-exec mcp --http`: the tools over Streamable HTTP, driven by the official client."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from typer.testing import CliRunner

from promptlayer_exec import Session
from promptlayer_exec.cli._app import app as command_line
from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._server_commands import _listen_for_agents
from promptlayer_exec.mcp import serve_http
from promptlayer_exec.simulator import Scenario, SimNode, Simulator
from promptlayer_exec.starts import SQLStartStore

TOKEN = "a-token-of-the-team-0123456789"
MODES = ("legacy", "auto")
WATCH = "promptlayer_exec.Watch 1001"
SLOW = Scenario([SimNode("Answer", "42", None, is_output_node=True)])
Serve = Callable[..., Awaitable[str]]


@asynccontextmanager
async def connect(url: str, mode: str = "auto", token: str = TOKEN) -> AsyncIterator[Client]:
    """Connect the official client with a token."""
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60) as http,
        Client(streamable_http_client(url, http_client=http), mode=mode) as client,
    ):
        yield client


async def call(client: Client, tool: str, **arguments: Any) -> Any:
    """Call a tool that must not fail, and return its data."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result
    return result.structured_content


async def post(
    url: str,
    method: str,
    params: dict[str, Any] | None = None,
    *,
    version: str = "2026-07-28",
    **headers: str,
) -> httpx2.Response:
    """Send one request of the protocol, with the token."""
    prefix = "io.modelcontextprotocol"
    meta = {f"{prefix}/protocolVersion": version, f"{prefix}/clientCapabilities": {}}
    needed = {
        "Authorization": f"bearer {TOKEN}",
        "Accept": "application/json, text/event-stream",
        "MCP-Protocol-Version": version,
        "Mcp-Method": method,
    }
    body = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": method,
        "params": {**(params or {}), "_meta": meta},
    }
    async with httpx2.AsyncClient() as http:
        return await http.post(url, json=body, headers={**needed, **headers})


@pytest.fixture
def slow(sim: Simulator) -> Simulator:
    """Return the simulator with two workflows whose runs go on until they are finished."""
    sim.add_workflow("slow", SLOW)
    sim.add_workflow("other", SLOW)
    return sim


@pytest.fixture
async def serve_team(session: Session) -> AsyncIterator[Serve]:
    """Return a function that serves the workflow `slow`, and returns the URL."""
    async with AsyncExitStack() as stack:

        async def start(session: Session = session, **options: Any) -> str:
            listener = socket.create_server(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            options = {"token": TOKEN, "workflows": ["slow"], **options}
            serving = asyncio.create_task(serve_http(session, listener, **options))

            async def stop() -> None:
                serving.cancel()
                await asyncio.wait([serving])
                assert serving.cancelled()

            stack.push_async_callback(stop)
            return f"http://127.0.0.1:{port}/mcp"

        yield start


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", "é"])
async def test_without_the_token_nothing_is_served(
    slow: Simulator, serve_team: Serve, authorization: str | None
) -> None:
    """The response is 401, whatever the method and the path, and PromptLayer is not asked."""
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    url = await serve_team()
    async with httpx2.AsyncClient(headers=headers) as http:
        for method, path in (("POST", ""), ("GET", ""), ("DELETE", ""), ("GET", "/other")):
            response = await http.request(method, url + path)
            assert response.status_code == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert TOKEN not in response.text
    assert slow.request_count == 0


async def test_a_client_with_a_wrong_token_does_not_connect(
    slow: Simulator, serve_team: Serve
) -> None:
    """Its error says why."""
    url = await serve_team()
    problem = pytest.RaisesExc(MCPError, match="the bearer token is missing or wrong")
    with pytest.RaisesGroup(problem, flatten_subgroups=True):
        async with connect(url, token="wrong"):
            raise AssertionError


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "mcp.example.com", "Origin": "https://mcp.example.com"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
@pytest.mark.parametrize("version", ["2025-11-25", "2026-07-28"])
async def test_only_known_hosts_and_origins_are_served(
    slow: Simulator, serve_team: Serve, headers: dict[str, str], status: int, version: str
) -> None:
    """Although the token is right: a page in a browser could reach the server by another name."""
    url = await serve_team(hosts=["MCP.example.com"])
    if version == "2026-07-28":
        response = await post(url, "tools/list", **headers)
    else:
        client = {"name": "test", "version": "1"}
        params = {"protocolVersion": version, "capabilities": {}, "clientInfo": client}
        response = await post(url, "initialize", params, version=version, **headers)
    assert response.status_code == status


async def test_a_call_reads_no_definitions(slow: Simulator, serve_team: Serve) -> None:
    """The SDK would list the tools first, to compare arguments with headers that there are none."""
    execution_id = str(slow.add_execution(SLOW))
    call = {"name": "get_execution", "arguments": {"execution_id": execution_id}}
    response = await post(await serve_team(), "tools/call", call, **{"Mcp-Name": "get_execution"})
    assert response.json()["result"]["structuredContent"]["execution_id"] == execution_id
    assert slow.request_count == 1


@pytest.mark.parametrize("mode", MODES)
async def test_a_run_is_followed_with_progress(
    slow: Simulator, serve_team: Serve, mode: str
) -> None:
    """The tools are those of the other transport, and only the named workflow is among them."""
    seen = []
    started = asyncio.Event()

    async def record(progress: float, total: float | None, _message: str | None) -> None:
        seen.append((progress, total))
        started.set()

    async with connect(await serve_team(), mode) as client:
        names = [tool.name for tool in (await client.list_tools()).tools]
        assert names[2:] == ["start_workflow", "wait_execution", "get_execution", "run_slow"]
        running = asyncio.create_task(
            client.call_tool("run_slow", {"inputs": {"n": 1}}, progress_callback=record)
        )
        await started.wait()
        slow.finish(1001, "Answer")
        result = (await running).structured_content
        refused = await client.call_tool("start_workflow", {"workflow": "other"})
    assert result is not None
    assert (result["succeeded"], result["output"]) == (True, "42")
    assert seen == [(0, 1), (1, 1)]
    assert refused.is_error
    assert [run.inputs for run in slow.runs] == [{"n": 1}]


@pytest.mark.parametrize("mode", MODES)
async def test_a_cancelled_call_stops_following(
    slow: Simulator, serve_team: Serve, mode: str
) -> None:
    """The run goes on, and the same client can wait for it."""
    started = asyncio.Event()

    async def record(*_: Any) -> None:
        started.set()

    async with connect(await serve_team(), mode) as client:
        running = asyncio.create_task(client.call_tool("run_slow", {}, progress_callback=record))
        await started.wait()
        watches = [task for task in asyncio.all_tasks() if task.get_name() == WATCH]
        assert len(watches) == 1
        running.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait(watches)
        assert slow.state(1001) == {"Answer": "RUNNING"}
        slow.finish(1001, "Answer")
        assert (await call(client, "wait_execution", execution_id="1001"))["output"] == "42"


async def test_two_clients_are_served_at_once(slow: Simulator, serve_team: Serve) -> None:
    """One of each revision; each gets the output and the progress of its own run."""
    started = [asyncio.Event(), asyncio.Event()]
    messages: list[list[str | None]] = [[], []]

    async def run(client: Client, number: int) -> Any:
        async def record(_progress: float, _total: float | None, message: str | None) -> None:
            messages[number].append(message)
            started[number].set()

        arguments = {"inputs": {"n": number}}
        return await client.call_tool("run_slow", arguments, progress_callback=record)

    url = await serve_team()
    async with connect(url, "legacy") as first, connect(url, "auto") as second:
        running = [asyncio.create_task(run(client, n)) for n, client in enumerate((first, second))]
        for event in started:
            await event.wait()
        for execution_id in (1001, 1002):
            slow.finish(execution_id, "Answer")
        results = [(await task).structured_content for task in running]

    ids = [result["execution_id"] for result in results]
    assert sorted(ids) == ["1001", "1002"]
    for execution_id, texts in zip(ids, messages, strict=True):
        assert all(text is not None and execution_id in text for text in texts)


async def test_a_key_stands_for_one_run_of_the_team(
    slow: Simulator, open_session: Callable[..., Session], serve_team: Serve, tmp_path: Path
) -> None:
    """Clients that call with the same key get the same run, also if they call at once."""
    starts = SQLStartStore(f"sqlite:///{tmp_path / 'starts.sqlite'}")
    url = await serve_team(open_session(starts=starts))
    arguments = {"workflow": "slow", "inputs": {"n": 1}, "idempotency_key": "a"}
    async with connect(url, "legacy") as first, connect(url, "auto") as second:
        calls = (call(client, "start_workflow", **arguments) for client in (first, second))
        results = await asyncio.gather(*calls)
    assert [result["execution_id"] for result in results] == ["1001", "1001"]
    assert len(slow.runs) == 1


@pytest.mark.parametrize("options", [{"token": ""}, {"workflows": []}])
async def test_a_server_for_a_team_is_limited(session: Session, options: dict[str, Any]) -> None:
    """It has a token, and names its workflows."""
    options = {"token": TOKEN, "workflows": ["a"], **options}
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ValueError, match="needs a token and at least"),
    ):
        await serve_http(session, listener, **options)


@pytest.mark.parametrize(("mode", "end"), [("legacy", signal.SIGTERM), ("auto", signal.SIGINT)])
async def test_a_signal_ends_the_command_while_a_call_waits(
    slow: Simulator, mode: str, end: signal.Signals
) -> None:
    """Within seconds, with exit code 0; what was running is named, and no secret or traceback."""
    environment = {
        **os.environ,
        "PROMPTLAYER_API_KEY": slow.api_key,
        "PROMPTLAYER_BASE_URL": slow.base_url,
        "PROMPTLAYER_EXEC_MCP_TOKEN": TOKEN,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "promptlayer_exec", "mcp"),
        *("--http", "--port", "0", "--workflow", "slow"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    started = asyncio.Event()

    async def record(*_: Any) -> None:
        started.set()

    try:
        url = (await process.stdout.readline()).decode().strip()
        async with connect(url, mode) as client:
            calling = client.call_tool("run_slow", {}, progress_callback=record)
            running = asyncio.create_task(calling)
            await started.wait()
            process.send_signal(end)
            async with asyncio.timeout(20):
                out, errors = await process.communicate()
            running.cancel()
            await asyncio.wait([running])
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()

    assert (process.returncode, out) == (0, b"")
    lines = errors.decode().splitlines()
    assert lines[0] == "Agents reach this MCP server, with the token, at (Ctrl-C stops it):"
    assert lines[1].startswith("execution 1001 of workflow 'slow' continues on PromptLayer.")
    assert lines[2:] == []


@pytest.mark.parametrize(
    ("host", "shown", "is_open"),
    [
        ("127.0.0.1", "127.0.0.1", False),
        ("LOCALHOST", "localhost", False),
        ("0.0.0.0", "127.0.0.1", True),
        ("::1", "[::1]", False),
        ("::", "[::1]", True),
    ],
)
def test_the_command_prints_its_url(
    capsys: pytest.CaptureFixture[str], host: str, shown: str, is_open: bool
) -> None:
    """It is one for this machine; a warning says if other machines can reach it, too."""
    try:
        listener, name = _listen_for_agents(host, 0)
    except Misuse:
        pytest.skip("this machine has no IPv6")
    with listener:
        port = listener.getsockname()[1]
    output = capsys.readouterr()
    assert (name, output.out) == (shown, f"http://{shown}:{port}/mcp\n")
    assert ("warning: other machines can reach this server over plain" in output.err) is is_open


@pytest.mark.parametrize(
    ("arguments", "token", "problem"),
    [
        (["--http"], TOKEN, "--http needs --workflow: list each workflow that clients may start"),
        (
            ["--http", "--workflow", "a"],
            None,
            (
                "--http needs a token for the clients: set PROMPTLAYER_EXEC_MCP_TOKEN to at least"
                " 22 random characters, such as those of `openssl rand -hex 32`"
            ),
        ),
        (
            ["--http", "--workflow", "a"],
            "secret",
            (
                "PROMPTLAYER_EXEC_MCP_TOKEN is too weak: use at least 22 random letters, digits, -"
                " or _"
            ),
        ),
        (["--port", "80"], TOKEN, "--host, --port and --allow-host need --http"),
        (["--allow-host", "a"], TOKEN, "--host, --port and --allow-host need --http"),
    ],
)
def test_the_command_says_what_a_team_needs(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], token: str | None, problem: str
) -> None:
    """In one line, before anything else is looked at."""
    if token is not None:
        monkeypatch.setenv("PROMPTLAYER_EXEC_MCP_TOKEN", token)
    result = CliRunner().invoke(command_line, ["mcp", *arguments])
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"{problem}\n")


def test_a_port_may_be_taken(monkeypatch: pytest.MonkeyPatch, threaded_sim: Simulator) -> None:
    """The command says so."""
    monkeypatch.setenv("PROMPTLAYER_EXEC_MCP_TOKEN", TOKEN)
    monkeypatch.setenv("PROMPTLAYER_API_KEY", threaded_sim.api_key)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = ["mcp", "--http", "--workflow", "a", "--port", port]
        result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1, port {port}: " in result.stderr
