"""The recipes of docs/frontends.md, with the real packages from npm: `nox -s frontends`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from playwright.async_api import Browser, Locator, async_playwright, expect
from pytest_asyncio import fixture

import promptlayer_exec.fastapi
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")

RunNode = Callable[..., Awaitable[str]]
AUTHORIZATION = {"Authorization": "Basic bWU6c2VjcmV0"}  # me:secret
MODULE = Path(promptlayer_exec.fastapi.__file__).with_name("client.js")


DOCS = Path(__file__).parents[2] / "docs"
# Where npm has installed the packages.
NODE_MODULES = Path(os.environ.get("PROMPTLAYER_EXEC_NODE_MODULES", "node_modules")).resolve()
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def write_report(inputs: Any) -> Scenario:
    """Fail for unicorns, and hold the reports on newts."""
    status = "FAILED" if inputs["topic"] == "unicorns" else "SUCCESS"
    duration = None if inputs["topic"] == "newts" else 0.2
    report = SimNode("Report", "Otters are fine.", duration, ["Plan"], status, is_output_node=True)
    return Scenario([SimNode("Plan", "a plan", 0.2), report])


@fixture(loop_scope="session")
async def sim() -> AsyncIterator[Simulator]:
    """Return a simulator with the docs' workflow."""
    async with Simulator() as simulator:
        simulator.add_workflow("write-report", write_report)
        yield simulator


async def until(process: asyncio.subprocess.Process, pattern: str) -> re.Match[str]:
    """Return the first match in what a process prints."""
    assert process.stdout is not None
    log = ""
    while (found := re.search(pattern, log)) is None:
        line = re.sub(r"\x1b\[\d*m", "", (await process.stdout.readline()).decode())
        assert line, log
        log += line
    return found


@fixture(loop_scope="session")
async def project(tmp_path: Path) -> Path:
    """Return a directory with the files of the page for React, and the installed packages."""
    (tmp_path / "src").mkdir()
    (tmp_path / "node_modules").symlink_to(NODE_MODULES, target_is_directory=True)
    (tmp_path / "package.json").write_text('{"private": true, "type": "module"}')
    for name, language in (
        ("vite.config.js", "js"),
        ("src/useRun.ts", "ts"),
        ("src/main.tsx", "tsx"),
        ("index.html", "html"),
    ):
        (tmp_path / name).write_text(blocks("frontends.md", language)[0])
    (copy,) = blocks("frontends.md", "sh")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    copying = await asyncio.create_subprocess_shell(
        copy, cwd=tmp_path, env={**os.environ, "PATH": path}
    )
    assert await copying.wait() == 0
    return tmp_path


class Elsewhere:
    """A server that serves one page; Chromium lets no other origin reach loopback addresses."""

    def __init__(self) -> None:
        self.url = ""
        self.page = ""

    async def answer(self, request: web.Request) -> web.Response:
        """Send the page."""
        return web.Response(text=self.page, content_type="text/html")


@fixture(loop_scope="session")
async def elsewhere() -> AsyncIterator[Elsewhere]:
    """Return a running server."""
    server = Elsewhere()
    application = web.Application()
    application.router.add_get("/", server.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


class App:
    """The docs' app as a process, which can be killed, and started again on the same port."""

    def __init__(self, folder: Path, sim: Simulator) -> None:
        self.port = 0
        self._folder = folder
        self._environment = {
            **os.environ,
            "APP_PASSWORD": "secret",
            "APP_SECRET": "of the app",
            "PROMPTLAYER_API_KEY": sim.api_key,
            "PROMPTLAYER_BASE_URL": sim.base_url,
        }
        self._process: asyncio.subprocess.Process

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "uvicorn", "app:app", "--port", str(self.port)),
            cwd=self._folder,
            env=self._environment,
            stderr=asyncio.subprocess.STDOUT,
            stdout=asyncio.subprocess.PIPE,
        )
        self.port = int((await until(self._process, r"running on http://127\.0\.0\.1:(\d+)"))[1])

    async def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        await self._process.communicate()


@fixture(loop_scope="session")
async def server(sim: Simulator, project: Path, elsewhere: Elsewhere) -> AsyncIterator[App]:
    """Return the docs' app, with everything that the page on front ends adds to it."""
    program = [blocks("fastapi.md", "python")[0], *blocks("frontends.md", "python")]
    text = "\n\n".join(program).replace("https://www.example.com", elsewhere.url)
    (project / "app.py").write_text(text)
    (project / "page.html").write_text(blocks("fastapi.md", "html")[0])
    app = App(project, sim)
    await app.start()
    yield app
    await app.kill()


@pytest.fixture
def app(server: App) -> str:
    """Return where the app listens."""
    return server.url


@pytest.fixture
def run_node(project: Path) -> Callable[..., Awaitable[str]]:
    """Return a function that runs a program for Node.js, and returns what it prints."""

    async def run(program: str, *arguments: str) -> str:
        (project / "program.mjs").write_text(program)
        node = shutil.which("node") or "node"
        process = await asyncio.create_subprocess_exec(
            *(node, "program.mjs", *arguments),
            cwd=project,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        return output.decode()

    return run


@fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Return Debian's Chromium, headless."""
    async with async_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        await browser.close()


async def execute(*command: str, cwd: Path) -> str:
    """Run a program of npm's, and return what it prints."""
    process = await asyncio.create_subprocess_exec(
        str(NODE_MODULES / ".bin" / command[0]),
        *command[1:],
        cwd=cwd,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


STRICT = (
    *("--strict", "--target", "es2023", "--module", "es2022", "--moduleResolution", "bundler"),
    *("--lib", "es2023,dom,dom.iterable"),
)


async def test_the_declarations_are_those_of_the_module(tmp_path: Path) -> None:
    """TypeScript makes them from the comments of the module."""
    (tmp_path / "client.js").write_bytes(MODULE.read_bytes())
    emit = ("--allowJs", "--checkJs", "--declaration", "--emitDeclarationOnly")
    await execute("tsc", *STRICT, *emit, "client.js", cwd=tmp_path)
    made = (tmp_path / "client.d.ts").read_text()
    assert MODULE.with_suffix(".d.ts").read_text() == made


async def test_the_recipe_for_react_has_correct_types(project: Path) -> None:
    """Those of the package, and those of React."""
    options = ("--noEmit", "--jsx", "react-jsx", "--skipLibCheck")
    await execute("tsc", *STRICT, *options, "src/main.tsx", cwd=project)


async def serve_by_vite(project: Path, app: str) -> tuple[Any, str]:
    """Start Vite's server for development, with the docs' configuration."""
    config = project / "vite.config.js"
    config.write_text(config.read_text().replace("http://127.0.0.1:8000", app))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = await asyncio.create_subprocess_exec(
        str(NODE_MODULES / ".bin" / "vite"),
        *("--host", "127.0.0.1", "--port", port, "--strictPort"),
        cwd=project,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    found = await until(process, r"(http://127\.0\.0\.1:\d+)/")
    return process, found[1]


async def expect_all(rows: list[Locator], text: str, count: int, *, within: float) -> None:
    """Wait until each of some lists has so many rows with a text, `within` milliseconds each."""
    for shown in rows:
        await expect(shown.filter(has_text=text)).to_have_count(count, timeout=within)


@pytest.mark.parametrize("mode", ["build", "development"])
async def test_lists_in_react_have_one_connection_each(
    sim: Simulator, server: App, project: Path, browser: Browser, mode: str
) -> None:
    """Twenty runs in three tabs in StrictMode, live within 4 s; a crash loses no row."""
    vite = None
    address = f"{server.url}/list/"
    if mode == "build":
        built = await execute("vite", "build", cwd=project)
        assert "warning" not in built.lower()
    else:
        vite, address = await serve_by_vite(project, server.url)

    credentials = {"username": "me", "password": "secret"}
    context = await browser.new_context(
        http_credentials=credentials, extra_http_headers=AUTHORIZATION
    )
    streams: list[str] = []
    errors: list[str] = []
    context.on("request", lambda it: "/events?" in it.url and streams.append(it.url))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    try:
        started = await context.request.post(f"{server.url}/reports", data=["newts"] * 20)
        assert started.ok
        tabs = [await context.new_page() for _ in range(3)]
        for tab in tabs:
            await tab.goto(address)
        rows = [tab.locator("li") for tab in tabs]
        for shown in rows:
            await expect(shown).to_have_count(20, timeout=20_000)
        await expect_all(rows, "50 %", 20, within=4_000)
        assert len(streams) == 3

        if mode == "build":  # Vite's proxy does not end what the app no longer sends
            await server.kill()
        for run in sim.runs[:10]:
            sim.finish(run.execution_id, "Report")
        if mode == "build":
            await server.start()
        await expect_all(rows, "Succeeded", 10, within=20_000)
        for run in sim.runs[10:]:
            sim.finish(run.execution_id, "Report")
        await expect_all(rows, "Succeeded", 20, within=10_000)
        assert errors == []
    finally:
        await context.close()
        if vite is not None:
            # The wheel with Node.js starts it in a process of its own.
            os.killpg(vite.pid, signal.SIGTERM)
            await vite.communicate()


ELSEWHERE = """IMPORTED
import { start } from "https://app.example.com/executions/client.js";
const show = (view) => (document.title = `${view.state} ${view.succeeded}`);
const headers = { Authorization: "Basic bWU6c2VjcmV0" };
const { execution_id: id, ticket } = await start("write-report", { topic: "otters" }, { headers });
CALLED
"""


async def test_a_page_on_another_origin_follows_with_a_ticket(
    app: str, elsewhere: Elsewhere, browser: Browser
) -> None:
    """It imports the module from the app, starts a run with a header, and follows it."""
    imported, called = blocks("frontends.md", "js")[1].splitlines()
    program = ELSEWHERE.replace("CALLED", called).replace("IMPORTED", imported)
    program = program.replace("https://app.example.com", app)
    context = await browser.new_context()
    page = await context.new_page()
    elsewhere.page = f'<script type="module">{program}</script>'
    await page.goto(elsewhere.url)
    await expect(page).to_have_title("complete true", timeout=15_000)
    await context.close()


AG_UI = """
import { HttpAgent } from "@ag-ui/client";
const [url, topic] = process.argv.slice(2);
const agent = new HttpAgent({ url, headers: { Authorization: "Basic bWU6c2VjcmV0" } });
agent.addMessage({ id: "1", role: "user", content: topic });
const states = [], types = [];
let failure = null;
await agent.runAgent({}, {
  onEvent: ({ event }) => void types.push(event.type),
  onStateSnapshotEvent: ({ event }) => void states.push(event.snapshot),
  onRunErrorEvent: ({ event }) => void (failure = event.message),
}).catch(() => {});
const { messages, state } = agent;
console.log(JSON.stringify({ states, types, failure, messages, state }));
"""


async def test_ag_ui_shows_the_progress_and_the_output(app: str, run_node: RunNode) -> None:
    """Its own client reads the events, and checks their order."""
    result = json.loads(await run_node(AG_UI, f"{app}/agent", "otters"))
    assert result["types"][0] == "RUN_STARTED"
    assert result["types"][-1] == "RUN_FINISHED"
    assert [state["progress"] for state in result["states"]] == sorted(
        state["progress"] for state in result["states"]
    )
    assert result["state"] == {"progress": 1, "nodes": {"Plan": "SUCCESS", "Report": "SUCCESS"}}
    assert result["messages"][-1]["content"] == "Otters are fine."
    failed = json.loads(await run_node(AG_UI, f"{app}/agent", "unicorns"))
    assert failed["failure"] == "The report could not be written."


AI_SDK = """
import { DefaultChatTransport, readUIMessageStream } from "ai";
const [api, topic] = process.argv.slice(2);
const transport = new DefaultChatTransport({
  api, headers: { Authorization: "Basic bWU6c2VjcmV0" },
});
const stream = await transport.sendMessages({
  trigger: "submit-message", chatId: "1", abortSignal: undefined,
  messages: [{ id: "1", role: "user", parts: [{ type: "text", text: topic }] }],
});
let message, failure = null;
const progress = [];
const messages = readUIMessageStream({ stream, onError: (error) => (failure = error.message) });
for await (message of messages)
  for (const part of message.parts)
    if (part.type === "data-progress") progress.push(part.data.progress);
console.log(JSON.stringify({ message, progress, failure }));
"""


async def test_the_ai_sdk_shows_the_progress_and_the_output(app: str, run_node: RunNode) -> None:
    """Its own transport reads the stream."""
    result = json.loads(await run_node(AI_SDK, f"{app}/api/chat", "otters"))
    parts = {part["type"]: part for part in result["message"]["parts"]}
    assert set(parts) == {"data-progress", "text"}
    assert parts["text"]["text"] == "Otters are fine."
    assert parts["data-progress"]["data"]["progress"] == 1
    assert result["progress"] == sorted(result["progress"])
    failed = json.loads(await run_node(AI_SDK, f"{app}/api/chat", "unicorns"))
    assert failed["failure"] == "The report could not be written."


async def test_the_page_names_the_versions_that_are_tested() -> None:
    """They are those that npm has installed."""
    text = " ".join((DOCS / "frontends.md").read_text(encoding="utf-8").split())
    (sentence,) = re.findall(r"real packages from npm: (.*?)\. \*\*", text)
    for name, version in re.findall(r"`([@\w/-]+)`(?: and `[\w-]+`)? ([\d.]+)", sentence):
        installed = json.loads((NODE_MODULES / name / "package.json").read_text())["version"]
        assert f"{installed}.".startswith(f"{version}."), name
