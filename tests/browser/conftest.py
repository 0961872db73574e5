"""Fixtures: a browser, and a viewer on a real socket that shows executions of a simulator."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, BrowserContext, Locator, Page, async_playwright, expect
from pytest_asyncio import fixture

from promptlayer_exec import PollPolicy, RetryPolicy, Session
from promptlayer_exec.simulator import Simulator
from promptlayer_exec.viewer import Address, Board, History, listen, serve

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 360, "height": 740}


@fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Return Debian's Chromium, headless."""
    expect.set_options(timeout=10_000)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@fixture(loop_scope="session")
async def sim() -> AsyncIterator[Simulator]:
    """Return a simulator."""
    async with Simulator() as simulator:
        yield simulator


class Viewer:
    """A viewer that can be stopped, and started again on the same port."""

    def __init__(self, sim: Simulator, directory: Path, poll: float) -> None:
        self.poll = poll
        self.history = directory / "history.sqlite"
        self.token = "a-token-of-the-tests"
        self.port = 0
        self.board: Board
        self._sim = sim
        self._stack = AsyncExitStack()

    @property
    def url(self) -> str:
        """The URL with the token, as the command prints it."""
        return f"{self.origin}/#token={self.token}"

    @property
    def origin(self) -> str:
        """The origin of the page."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start to serve an empty board."""
        session = Session(
            self._sim.api_key,
            base_url=self._sim.base_url,
            poll=PollPolicy.fixed(self.poll),
            retry=RetryPolicy(outage=1.0, watch_outage=0.2, base=0.01),
            rate=None,
            observers=[lambda event: self.board.observe(event)],  # noqa: PLW0108 - made below
        )
        await self._stack.enter_async_context(session)
        history = History(self.history, server="of the tests")
        self.board = await self._stack.enter_async_context(Board(session, history=history))
        listener = listen("127.0.0.1", self.port)
        self.port = listener.getsockname()[1]
        address = Address("127.0.0.1", self.port)
        serving = asyncio.create_task(serve(self.board, listener, address, self.token))

        async def end() -> None:
            serving.cancel()
            await asyncio.wait([serving])

        self._stack.push_async_callback(end)

    async def stop(self) -> None:
        """Stop, as by Ctrl-C."""
        await self._stack.aclose()


@pytest.fixture
def poll() -> float:
    """Return the seconds between polls."""
    return 0.02


@fixture(loop_scope="session")
async def viewer(sim: Simulator, tmp_path: Path, poll: float) -> AsyncIterator[Viewer]:
    """Return a running viewer."""
    viewer = Viewer(sim, tmp_path, poll)
    await viewer.start()
    yield viewer
    await viewer.stop()


class BrowserErrors:
    """The errors and warnings of a browser; a test fails if there is one that it did not expect."""

    def __init__(self) -> None:
        self.recorded: list[str] = []
        self.expected: tuple[str, ...] = ()

    def listen_to(self, page: Page, origin: str) -> None:
        """Record console messages, uncaught errors, failed and foreign requests of a page."""
        page.on("console", self._record_console)
        page.on("pageerror", lambda error: self.recorded.append(f"error: {error}"))
        page.on("requestfailed", self._record_failure)
        page.on("request", lambda request: self._record_request(request.url, origin))

    def _record_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.recorded.append(f"console: {message.text}")

    def _record_failure(self, request: Any) -> None:
        path = urlsplit(request.url).path
        if request.failure != "net::ERR_ABORTED":  # the page was closed
            self.recorded.append(f"failed: {path}: {request.failure}")

    def _record_request(self, url: str, origin: str) -> None:
        if not url.startswith(f"{origin}/"):
            self.recorded.append(f"foreign: {url}")

    @property
    def unexpected(self) -> list[str]:
        """The recorded errors that the test did not expect."""
        return [one for one in self.recorded if not any(word in one for word in self.expected)]


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """Let the commands receive SIGINT even if the tests run in the background of a script."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def browser_errors() -> Iterator[BrowserErrors]:
    """Return the errors of the test's pages."""
    errors = BrowserErrors()
    yield errors
    assert errors.unexpected == []


class Ui:
    """What is on the page of an execution, and how it is reached."""

    def __init__(self, page: Page, viewer: Viewer) -> None:
        self.page = page
        self.viewer = viewer
        self.run = page.locator(".run")
        self.selected = page.locator(".node-view")

    async def open(self, address: str) -> None:
        """Go to an address of the page."""
        await self.page.evaluate("(address) => { location.hash = address }", address)

    async def open_run(self, execution_id: int, query: str = "") -> None:
        """Go to the page of an execution."""
        await self.open(f"#/executions/{execution_id}{query}")
        await expect(self.part("crumb")).to_have_text(f"Execution {execution_id}")

    def part(self, name: str) -> Locator:
        """Return a part of the page of an execution."""
        return self.run.locator(f'[data-part="{name}"]').first

    def row(self, name: str) -> Locator:
        """Return the row of a node."""
        exactly = re.compile(f"^{re.escape(name)}$")
        has = self.page.locator('[data-part="name"]', has_text=exactly)
        return self.run.locator(".node").filter(has=has)

    async def select(self, name: str) -> None:
        """Select a node by its row."""
        await self.row(name).locator(".row").click()
        await expect(self.selected.locator("h3")).to_have_text(name)

    def drawn(self, name: str) -> Locator:
        """Return the node of the graph."""
        return self.page.locator(f"[data-node={json.dumps(name)}]")

    def edge(self, source: str, target: str) -> Locator:
        """Return the edge of the graph between two nodes."""
        return self.page.locator(f'.gedge[data-source="{source}"][data-target="{target}"]')

    async def names(self) -> list[str]:
        """Return the names in the rows, in their order."""
        return await self.run.locator('.node [data-part="name"]').all_text_contents()

    @asynccontextmanager
    async def tasks(self) -> AsyncIterator[list[float]]:
        """Fill a list with the milliseconds of every task of the page, once this ends.

        A task is what the page's thread does in one go: an event, a tick of its clock, a frame. It
        is measured in the time of the thread, so that other programs of the machine do not count.
        """
        cdp = await self.page.context.new_cdp_session(self.page)
        events: list[dict[str, Any]] = []
        complete = asyncio.get_running_loop().create_future()
        cdp.on("Tracing.dataCollected", lambda data: events.extend(data["value"]))
        cdp.on("Tracing.tracingComplete", lambda _: complete.set_result(None))
        await cdp.send("Tracing.start", {"traceConfig": {"includedCategories": ["toplevel"]}})
        tasks: list[float] = []
        yield tasks
        await cdp.send("Tracing.end")
        await complete
        main = [
            (event["pid"], event["tid"])
            for event in events
            if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
        ]
        tasks += [
            event["tdur"] / 1000
            for event in events
            if event["name"] == "ThreadControllerImpl::RunTask"
            and (event["pid"], event["tid"]) in main
            and "tdur" in event
        ]

    async def check(self, name: str) -> None:
        """Check that a view fits the screen, and that axe finds nothing, in both themes."""
        sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        needed, there = await self.page.evaluate(sizes)
        assert needed <= there, name
        for theme in ("light", "dark"):
            await self.page.emulate_media(color_scheme=theme, reduced_motion="reduce")
            # Themes differ in colours alone. What passes needs no list of its elements.
            options: dict[str, Any] = {"resultTypes": ["violations"], "preload": False}
            if theme == "dark":
                options["runOnly"] = ["color-contrast"]
            results = await Axe().run(self.page, options=options)
            found = [
                (one["id"], [node["html"][:200] for node in one["nodes"]])
                for one in results.response["violations"]
            ]
            assert found == [], (name, theme)
            assert "color-contrast" in {one["id"] for one in results.response["passes"]}

    async def copied(self) -> str:
        """Return what was copied last."""
        return await self.page.evaluate("navigator.clipboard.readText()")


@pytest.fixture
def ui(page: Page, viewer: Viewer) -> Ui:
    """Return the page of executions."""
    return Ui(page, viewer)


def _new_context(browser: Browser) -> Awaitable[BrowserContext]:
    return browser.new_context(viewport=WIDE, permissions=["clipboard-read", "clipboard-write"])


@fixture(scope="session", loop_scope="session")
async def shared_context(browser: Browser) -> AsyncIterator[BrowserContext]:
    """Return the browser context of all tests that need nothing special."""
    context = await _new_context(browser)
    yield context
    await context.close()


@fixture(loop_scope="session")
async def context(
    request: pytest.FixtureRequest,
    browser: Browser,
    shared_context: BrowserContext,
    browser_errors: BrowserErrors,
    viewer: Viewer,
) -> AsyncIterator[BrowserContext]:
    """Return a browser context that may use the clipboard: a new one for a test that asks for it.

    What a page stores is for its origin, and each viewer has another one. Pages are closed before
    the viewer stops, lest a request that one still sends is refused.
    """
    if "context" in inspect.signature(request.function).parameters:
        context = await _new_context(browser)
        yield context
        await context.close()
        return

    yield shared_context
    for page in shared_context.pages:
        await page.close()


@fixture(loop_scope="session")
async def page(context: BrowserContext, viewer: Viewer, browser_errors: BrowserErrors) -> Page:
    """Return the page, opened and connected."""
    page = await context.new_page()
    browser_errors.listen_to(page, viewer.origin)
    await page.goto(viewer.url)
    await expect(page.locator("#connection")).to_have_text("Connected")
    return page
