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
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from playwright.async_api import Browser, BrowserContext, Locator, async_playwright, expect
from pytest_asyncio import fixture

import promptlayer_exec.fastapi
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

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


SET_UP, DEVELOP, BUILD = blocks("frontends.md", "sh")
CONFIG, HOOK = blocks("frontends.md", "ts")
RUN, ONE_RUN, LIST = blocks("frontends.md", "tsx")


async def finished(process: asyncio.subprocess.Process) -> str:
    """Return what a process prints, which must succeed."""
    output, errors = await process.communicate()
    assert process.returncode == 0, (output + (errors or b"")).decode()
    return output.decode()


async def shell(script: str, folder: Path) -> asyncio.subprocess.Process:
    """Start the commands of a block; `python` is the one that runs these tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return await asyncio.create_subprocess_exec(
        *("bash", "-ec", script),
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )


@fixture(scope="session", loop_scope="session")
async def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the app, with the page for React as somebody makes it who reads."""
    folder = tmp_path_factory.mktemp("project")
    await finished(await shell(SET_UP, folder))
    assert (folder / "web" / "src" / "App.tsx").exists()
    # oxlint leaves out what a repository ignores, such as the one around nox's directory.
    await finished(await shell("git init -q web", folder))
    (folder / "web" / "src" / "useRun.ts").write_text(HOOK)
    (folder / "web" / "src" / "Run.tsx").write_text(RUN)
    return folder


async def write_page(project: Path, page: str, app: str) -> None:
    """Save a page, and the configuration for an app on a free port; both must have no flaw."""
    (project / "web" / "src" / "App.tsx").write_text(page)
    config = project / "web" / "vite.config.ts"
    config.write_text(CONFIG.replace("http://127.0.0.1:8000", app))


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
            *("--timeout-graceful-shutdown", "1"),
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

    async def stop(self) -> None:
        """Stop it as Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)
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
def run_node(tmp_path: Path) -> Callable[..., Awaitable[str]]:
    """Return a function that runs a program for Node.js, and returns what it prints."""
    (tmp_path / "node_modules").symlink_to(NODE_MODULES, target_is_directory=True)

    async def run(program: str, *arguments: str) -> str:
        (tmp_path / "program.mjs").write_text(program)
        node = shutil.which("node") or "node"
        process = await asyncio.create_subprocess_exec(
            *(node, "program.mjs", *arguments),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        return await finished(process)

    return run


@fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Return Debian's Chromium, headless."""
    async with async_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        await browser.close()


STRICT = (
    *("--strict", "--target", "es2023", "--module", "es2022", "--moduleResolution", "bundler"),
    *("--lib", "es2023,dom,dom.iterable"),
)


async def test_the_declarations_are_those_of_the_module(tmp_path: Path) -> None:
    """TypeScript makes them from the comments of the module."""
    (tmp_path / "client.js").write_bytes(MODULE.read_bytes())
    emit = "--allowJs --checkJs --declaration --emitDeclarationOnly"
    tsc = NODE_MODULES / ".bin" / "tsc"
    await finished(await shell(f"{tsc} {' '.join(STRICT)} {emit} client.js", tmp_path))
    made = (tmp_path / "client.d.ts").read_text()
    assert MODULE.with_suffix(".d.ts").read_text() == made


@asynccontextmanager
async def served(mode: str, project: Path, page: str, app: str) -> AsyncIterator[str]:
    """Yield the address of a page, built for the app or served by Vite, as the docs tell."""
    await write_page(project, page, app)
    web = project / "web"
    if mode == "build":
        # With the types checked, and without a warning.
        built = await finished(await shell(f"{BUILD.strip()}\nnpm run lint", web))
        assert "warning" not in built.lower().replace("found 0 warnings", ""), built
        yield f"{app}/web/"
        return

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = f"-- --host 127.0.0.1 --port {port} --strictPort"
    vite = await shell(f"{DEVELOP.strip()} {options}", web)
    try:
        found = await until(vite, r"(http://127\.0\.0\.1:\d+)/")
        yield found[1]
    finally:
        os.killpg(vite.pid, signal.SIGTERM)  # npm starts it in a process of its own
        await vite.communicate()


@asynccontextmanager
async def window(browser: Browser, **settings: Any) -> AsyncIterator[BrowserContext]:
    """Yield a window of somebody who knows the password; no page of it may have an error."""
    credentials = {"username": "me", "password": "secret"}
    context = await browser.new_context(http_credentials=credentials, **settings)
    errors: list[str] = []
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield context
    await context.close()
    assert errors == []


MODES = pytest.mark.parametrize("mode", ["build", "development"])


@MODES
async def test_a_button_in_react_starts_a_run_and_shows_its_nodes_and_its_output(
    sim: Simulator, app: str, project: Path, browser: Browser, mode: str
) -> None:
    """All that its reader types is what the page says. A double click pays once."""
    async with served(mode, project, ONE_RUN, app) as address, window(browser) as context:
        page = await context.new_page()
        await page.goto(address)
        sim.inject(Fault.delay(1.0), path="/run")
        await page.get_by_role("button", name="Write a report").dblclick()
        await expect(page.get_by_role("button", name="Starting…")).to_be_disabled()
        for _ in range(2):
            await expect(page.locator("h2")).to_have_text("Succeeded", timeout=20_000)
            nodes = page.locator("li")
            await expect(nodes).to_have_text(["Plan: SUCCESS", "Report: SUCCESS"])
            await expect(page.locator("p")).to_have_text("Otters are fine.")
            await expect(page.get_by_role("button")).to_have_count(0)
            await page.reload()
        assert len(sim.runs) == 1


async def expect_all(rows: list[Locator], text: str, count: int, *, within: float) -> None:
    """Wait until each of some lists has so many rows with a text, `within` milliseconds each."""
    for shown in rows:
        await expect(shown.filter(has_text=text)).to_have_count(count, timeout=within)


@MODES
async def test_lists_in_react_have_one_connection_each(
    sim: Simulator, server: App, project: Path, browser: Browser, mode: str
) -> None:
    """Twenty runs in three tabs in StrictMode, live within 4 s; a restart loses no row."""
    streams: list[str] = []
    async with (
        served(mode, project, LIST, server.url) as address,
        window(browser, extra_http_headers=AUTHORIZATION) as context,
    ):
        context.on("request", lambda it: "/events?" in it.url and streams.append(it.url))
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

        # After a kill, Vite's proxy keeps the streams open, and the page notices after 45 s.
        await (server.kill() if mode == "build" else server.stop())
        for run in sim.runs[:10]:
            sim.finish(run.execution_id, "Report")
        await server.start()
        await expect_all(rows, "Succeeded", 10, within=20_000)
        for run in sim.runs[10:]:
            sim.finish(run.execution_id, "Report")
        await expect_all(rows, "Succeeded", 20, within=10_000)

        # The restarted app has forgotten its list.
        await tabs[0].get_by_role("button", name="Write three reports").dblclick()
        await expect(rows[0]).to_have_count(3, timeout=10_000)
        await expect(rows[0].filter(has_text="otters: Succeeded")).to_have_count(1)
        assert len(sim.runs) == 23
        await tabs[0].get_by_role("link", name="otters").click()
        await expect(tabs[0].locator("h2")).to_have_text("Succeeded", timeout=10_000)
        await expect(tabs[0].locator("p")).to_have_text("Otters are fine.")


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
    imported, called = blocks("frontends.md", "js")[0].splitlines()
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


async def test_the_page_names_the_versions_that_are_tested(project: Path) -> None:
    """They are those that npm has installed."""
    text = " ".join((DOCS / "frontends.md").read_text(encoding="utf-8").split())
    (sentence,) = re.findall(r"real packages from npm: (.*?)\. ", text)
    versions = re.findall(r"`([@\w/-]+)`(?: and `[\w-]+`)? ([\d.]+)", sentence)
    assert len(versions) == 5
    for name, version in versions:
        found = [
            folder / name / "package.json"
            for folder in (project / "web" / "node_modules", NODE_MODULES)
        ]
        installed = json.loads(next(filter(Path.exists, found)).read_text())["version"]
        assert f"{installed}.".startswith(f"{version}."), name
