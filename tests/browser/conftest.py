"""A viewer on a real socket, a simulator behind it, and a browser before it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect
from pytest_asyncio import fixture

from promptlayer_exec import PollPolicy, RetryPolicy, Session
from promptlayer_exec.simulator import Simulator
from promptlayer_exec.viewer import Address, Board, listen, serve

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
    """A viewer that can be stopped, and started again where it was."""

    def __init__(self, sim: Simulator) -> None:
        self.token = "a-token-of-the-tests-own"
        self.port = 0
        self.board: Board
        self._sim = sim
        self._stack = AsyncExitStack()

    @property
    def url(self) -> str:
        """The URL that the command would print."""
        return f"{self.origin}/#token={self.token}"

    @property
    def origin(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Serve, with an empty board."""
        session = Session(
            self._sim.api_key,
            base_url=self._sim.base_url,
            poll=PollPolicy.fixed(0.02),
            retry=RetryPolicy(outage=1.0, watch_outage=0.2, base=0.01),
            rate=None,
        )
        await self._stack.enter_async_context(session)
        self.board = await self._stack.enter_async_context(Board(session))
        listener = listen("127.0.0.1", self.port)
        self.port = listener.getsockname()[1]
        address = Address("127.0.0.1", self.port)
        serving = asyncio.create_task(serve(self.board, listener, address, self.token))

        async def end() -> None:
            serving.cancel()
            await asyncio.wait([serving])

        self._stack.push_async_callback(end)

    async def stop(self) -> None:
        """End, as at Ctrl-C."""
        await self._stack.aclose()


@fixture(loop_scope="session")
async def viewer(sim: Simulator) -> AsyncIterator[Viewer]:
    """Return a running viewer."""
    viewer = Viewer(sim)
    await viewer.start()
    yield viewer
    await viewer.stop()


class Complaints:
    """What a browser complains of; a test fails by all of it that it did not expect."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.expected: tuple[str, ...] = ()

    def listen_to(self, page: Page, origin: str) -> None:
        """Hear the console, uncaught errors, failed requests, and requests to other hosts."""
        page.on("console", self._hear_console)
        page.on("pageerror", lambda error: self.heard.append(f"error: {error}"))
        page.on("requestfailed", self._hear_failure)
        page.on("request", lambda request: self._hear_request(request.url, origin))

    def _hear_console(self, said: Any) -> None:
        if said.type in ("error", "warning"):
            self.heard.append(f"console: {said.text}")

    def _hear_failure(self, request: Any) -> None:
        path = urlsplit(request.url).path
        if request.failure != "net::ERR_ABORTED":  # the page was left
            self.heard.append(f"failed: {path}: {request.failure}")

    def _hear_request(self, url: str, origin: str) -> None:
        if not url.startswith(f"{origin}/"):
            self.heard.append(f"foreign: {url}")

    @property
    def unexpected(self) -> list[str]:
        """What nobody expected."""
        return [one for one in self.heard if not any(word in one for word in self.expected)]


@pytest.fixture
def complaints() -> Iterator[Complaints]:
    """Return the complaints of the test's pages."""
    complaints = Complaints()
    yield complaints
    assert complaints.unexpected == []


@fixture(loop_scope="session")
async def context(browser: Browser, complaints: Complaints) -> AsyncIterator[BrowserContext]:
    """Return a fresh profile that may use the clipboard."""
    context = await browser.new_context(
        viewport=WIDE, permissions=["clipboard-read", "clipboard-write"]
    )
    yield context
    await context.close()


@fixture(loop_scope="session")
async def page(context: BrowserContext, viewer: Viewer, complaints: Complaints) -> Page:
    """Return the page, opened by its URL, and live."""
    page = await context.new_page()
    complaints.listen_to(page, viewer.origin)
    await page.goto(viewer.url)
    await expect(page.locator("#connection")).to_have_text("Live")
    return page
