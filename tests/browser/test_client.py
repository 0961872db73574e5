"""The module for browsers, and the page in docs/fastapi.md that uses it, in the docs' app."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, Page, Route, expect
from pytest_asyncio import fixture

from promptlayer_exec import Session
from promptlayer_exec.fastapi import Tickets
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")

DOCS = (Path(__file__).parents[2] / "docs" / "fastapi.md").read_text(encoding="utf-8")
REPORT = Scenario(
    [SimNode("Plan", "three parts"), SimNode("Report", duration=None, is_output_node=True)]
)
FOLLOW = """async ({id, ticket, renewed}) => {
    const {follow} = await import("/executions/client.js");
    window.views = [];
    const renew = renewed && (async () => (window.renewals = (window.renewals ?? 0) + 1, renewed));
    window.stop = follow(id, (view) => views.push(view), {ticket, renew});
}"""

FOLLOW_ALL = """async ({ids, ticket, renewed}) => {
    const {followAll} = await import("/executions/client.js");
    window.rows ??= {};
    const renew = renewed && (async () => (window.renewals = (window.renewals ?? 0) + 1, renewed));
    window.stopAll = followAll(ids, (view, id) => rows[id] = view, {ticket, renew});
}"""
COUNT = (
    """(state) => Object.values(window.rows ?? {}).filter((row) => row.state === state).length"""
)


class Relay:
    """The only way from the app to the simulator, whose port can refuse connections."""

    def __init__(self, sim: Simulator) -> None:
        self._upstream = urlsplit(sim.base_url)
        self._server: asyncio.Server | None = None
        self._bind(0)

    @property
    def url(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self._port}"

    def _bind(self, port: int) -> None:
        self._socket = socket.socket()  # without `listen`, it refuses
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._port = self._socket.getsockname()[1]
        self._streams: list[asyncio.StreamWriter] = []

    async def open(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._serve, sock=self._socket)

    def close(self) -> None:
        """Refuse connections, and reset those that are open."""
        if self._server is not None:
            self._server.close()
        for stream in self._streams:
            stream.transport.abort()
        self._bind(self._port)

    def end(self) -> None:
        """Free the port."""
        self.close()
        self._socket.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
        self._streams += [writer, back]
        await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))

    async def _pass_on(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(2**16):
                target.write(data)
        target.close()


class App:
    """The docs' app as a process, which can be killed, and started again on the same port."""

    def __init__(self, folder: Path, sim: Simulator, base_url: str, options: str = "") -> None:
        for language, name in (("python", "app.py"), ("html", "page.html")):
            found = re.search(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
            assert found is not None
            text = found[1].replace("create_router(session, ", f"create_router(session, {options}")
            (folder / name).write_text(text)
        self.port = 0
        self._folder = folder
        self._environment = {
            **os.environ,
            "APP_PASSWORD": "secret",
            "APP_SECRET": "of the app",
            "PROMPTLAYER_API_KEY": sim.api_key,
            "PROMPTLAYER_BASE_URL": base_url,
        }
        self._process: asyncio.subprocess.Process

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        arguments = ["-m", "uvicorn", "app:app", "--port", str(self.port)]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            cwd=self._folder,
            env=self._environment,
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert self._process.stderr is not None
        log = ""
        while (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", log)) is None:
            line = (await self._process.stderr.readline()).decode()
            assert line, log
            log += line
        self.port = int(found[1])

    async def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        await self._process.communicate()


@pytest.fixture
def options() -> str:
    """Return further arguments of the app's router."""
    return ""


@fixture(loop_scope="session")
async def relay(sim: Simulator) -> AsyncIterator[Relay]:
    """Return an open relay to the simulator."""
    relay = Relay(sim)
    await relay.open()
    yield relay
    relay.end()


@fixture(loop_scope="session")
async def app(sim: Simulator, relay: Relay, tmp_path: Path, options: str) -> AsyncIterator[App]:
    """Return the running app."""
    sim.add_workflow("write-report", REPORT, inputs={"topic": "string"})
    app = App(tmp_path, sim, relay.url, options)
    await app.start()
    yield app
    await app.kill()


@fixture(loop_scope="session")
async def anonymous(browser: Browser, app: App, browser_errors: Any) -> AsyncIterator[Page]:
    """Return a page of the app's origin in a browser that knows no password."""
    context = await browser.new_context()
    page = await context.new_page()
    await page.route("**/favicon.ico", lambda route: route.fulfill(status=204))
    browser_errors.listen_to(page, app.url)
    await page.goto(f"{app.url}/executions/client.js")
    yield page
    await context.close()


@fixture(loop_scope="session")
async def page(browser: Browser, app: App, browser_errors: Any) -> AsyncIterator[Page]:
    """Return the docs' page in a browser that knows the password."""
    known = {"username": "me", "password": "secret"}
    context = await browser.new_context(http_credentials=known)
    page = await context.new_page()
    browser_errors.listen_to(page, app.url)
    # The app has no icon.
    await page.route("**/favicon.ico", lambda route: route.fulfill(status=204))
    await page.goto(app.url)
    yield page
    await context.close()


async def start(page: Page) -> None:
    """Press the page's button, and wait until the run is shown."""
    await page.get_by_role("button").click()
    await expect(page.locator("#state")).to_have_text("50 %")
    nodes = 'Plan: SUCCESS "three parts"\nReport: RUNNING \n'
    assert await page.locator("#nodes").text_content() == nodes


async def test_the_page_starts_a_run_and_follows_it(sim: Simulator, page: Page) -> None:
    """By the ticket in its address, node after node. No other run can start meanwhile."""
    await page.locator("input").fill("beavers")
    await start(page)
    await expect(page.get_by_role("button")).to_be_disabled()
    assert sim.runs[0].inputs == {"topic": "beavers"}
    assert "&ticket=" in page.url
    sim.finish(1001, "Report", value="</pre> fine")
    await expect(page.locator("#state")).to_have_text("Succeeded")
    await expect(page.get_by_role("button")).to_be_enabled()
    lines = 'Plan: SUCCESS "three parts"\nReport: SUCCESS "</pre> fine"\n'
    assert await page.locator("#nodes").text_content() == lines


async def test_a_key_travels_as_the_idempotency_key(sim: Simulator, page: Page) -> None:
    """Without a key, the header is not there."""
    program = """async (options) => {
        const {start} = await import("/executions/client.js");
        return (await start("write-report", {topic: "owls"}, options)).execution_id;
    }"""
    options: dict[str, str]
    for options in ({"key": "order-42"}, {}):
        async with page.expect_request("**/executions") as sent:
            assert await page.evaluate(program, options)
        request = await sent.value
        assert await request.header_value("idempotency-key") == options.get("key")
    assert len(sim.runs) == 2


async def test_a_run_is_shown_to_its_end_by_another_process(
    sim: Simulator, app: App, page: Page, browser_errors: Any
) -> None:
    """The browser reconnects when the app is up again."""
    browser_errors.expected = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED")
    await start(page)
    await app.kill()
    error = "no key"
    sim.finish(1001, "Report", status="FAILED", error_message=error)
    await app.start()
    await expect(page.locator("#state")).to_have_text("Failed", timeout=20_000)
    await expect(page.locator("#nodes")).to_contain_text(f"Report: FAILED {error}")


async def test_a_run_is_shown_after_a_proxy_s_error(
    sim: Simulator, page: Page, browser_errors: Any
) -> None:
    """An `EventSource` would give up for good; the page shows what is wrong, and tries again."""
    browser_errors.expected = ("502 (Bad Gateway)",)
    answers = [502, 200]

    async def proxy(route: Route) -> None:
        status = answers.pop(0)
        await (route.continue_() if status == 200 else route.fulfill(status=status, body="<html>"))

    await page.route("**/events?*", proxy, times=2)
    await page.get_by_role("button").click()
    await expect(page.locator("#state")).to_have_text("Could not reach the server. Trying again.")
    await expect(page.locator("#state")).to_have_text("50 %")
    assert answers == []


async def test_the_page_says_why_it_waits_and_fails(
    sim: Simulator, app: App, page: Page, browser_errors: Any
) -> None:
    """Its text is that of the event, or of the problem; a refused start is shown as well."""
    browser_errors.expected = ("404 (Not Found)", "422 (")
    state = page.locator("#state")
    await page.goto(f"{app.url}?id=77")
    await expect(state).to_have_text("The execution or workflow does not exist.")
    results = "/workflow-version-execution-results"
    sim.inject(Fault.status(503, times=None), path=results)
    await page.get_by_role("button").click()
    await expect(state).to_have_text("PromptLayer failed. Trying again.")
    sim.clear_faults()
    await expect(state).to_have_text("50 %", timeout=20_000)
    sim.inject(Fault.status(403), path=results)
    await expect(state).to_have_text("PromptLayer refused this server's credentials.")
    await expect(page.locator("#nodes")).to_contain_text("Report: RUNNING")
    await page.locator("input").evaluate("(input) => input.remove()")
    await page.get_by_role("button").click()
    await expect(state).to_contain_text("missing")


async def test_an_outage_in_the_middle_of_a_run_is_said(
    sim: Simulator, relay: Relay, page: Page
) -> None:
    """By the page, which keeps what it knows, and on the run's own route; then that it is over."""
    await start(page)
    nodes = await page.locator("#nodes").text_content()
    await page.evaluate(
        """() => {
            const {searchParams} = new URL(location);
            const address = `/executions/${searchParams.get("id")}/events`;
            window.events = [];
            const source = new EventSource(`${address}?ticket=${searchParams.get("ticket")}`);
            for (const kind of ["snapshot", "node", "waiting", "resumed", "complete"])
                source.addEventListener(kind, ({data}) => events.push([kind, JSON.parse(data)]));
            source.addEventListener("complete", () => source.close());
        }"""
    )
    await page.wait_for_function("() => events.length === 1")

    relay.close()
    message = "This server could not reach PromptLayer. Trying again."
    await expect(page.locator("#state")).to_have_text(message)
    assert await page.locator("#nodes").text_content() == nodes
    await page.wait_for_function("() => events.length === 2")

    await relay.open()
    await expect(page.locator("#state")).to_have_text("50 %", timeout=15_000)
    assert await page.locator("#nodes").text_content() == nodes
    sim.finish(1001, "Report")
    await expect(page.locator("#state")).to_have_text("Succeeded")
    await page.wait_for_function("() => events.at(-1)[0] === 'complete'")
    kinds = await page.evaluate("events.map(([kind]) => kind)")
    assert kinds == ["snapshot", "waiting", "resumed", "node", "complete"]
    assert (await page.evaluate("events[1][1]"))["message"] == message


async def test_a_refused_ticket_is_renewed_once(
    sim: Simulator, anonymous: Page, browser_errors: Any
) -> None:
    """With the new ticket the run is followed; if that is refused too, following ends."""
    browser_errors.expected = ("403 (Forbidden)",)

    async def refuse(route: Route) -> None:  # without the challenge, which asks for a password
        await route.fulfill(status=403, json={"title": "Forbidden"})

    await anonymous.route(re.compile("ticket=(expired|forged)$"), refuse)
    execution_id = sim.add_execution(Scenario([SimNode("Answer", "done")]))
    session = Session("key", base_url=sim.base_url)
    ticket = Tickets("of the app").issue(session.execution(execution_id))
    for renewed, state in ((ticket, "complete"), ("forged", "failed"), (None, "failed")):
        given = {"id": str(execution_id), "ticket": "expired", "renewed": renewed}
        await anonymous.evaluate(FOLLOW, given)
        await anonymous.wait_for_function(f"() => views.at(-1)?.state === '{state}'")
    assert await anonymous.evaluate("renewals") == 2
    assert await anonymous.evaluate("views.at(-1).message") == "Forbidden"


async def test_following_can_be_stopped(sim: Simulator, anonymous: Page, app: App) -> None:
    """Afterwards nothing is shown, and the server does not poll for the page."""
    execution_id = sim.add_execution(REPORT)
    session = Session("key", base_url=sim.base_url)
    ticket = Tickets("of the app").issue(session.execution(execution_id))
    await anonymous.evaluate(FOLLOW, {"id": str(execution_id), "ticket": ticket})
    await anonymous.wait_for_function("() => views.at(-1)?.progress === 0.5")
    shown = await anonymous.evaluate("(stop(), views.length)")
    sim.finish(execution_id, "Report")
    polls = sim.request_count
    by_another = f"/executions/{execution_id}?ticket={ticket}"
    assert (await anonymous.request.get(app.url + by_another)).ok
    assert await anonymous.evaluate("views.length") == shown
    assert sim.request_count <= polls + 2


class Tab:
    """A page of the app's origin that follows runs, and counts its requests for streams."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.streams: list[str] = []
        page.on("request", self._record)

    def _record(self, request: Any) -> None:
        if "/executions/events?" in request.url:
            self.streams.append(request.url)

    async def follow(self, ids: list[int], ticket: str | None, renewed: str | None = None) -> None:
        """Follow runs."""
        given = {"ids": list(map(str, ids)), "ticket": ticket, "renewed": renewed}
        await self.page.evaluate(FOLLOW_ALL, given)

    async def until(self, state: str, count: int, timeout: float = 20) -> None:
        """Wait until that many runs are in a state."""
        counted = f"() => ({COUNT})('{state}') === {count}"
        await self.page.wait_for_function(counted, timeout=timeout * 1000)


@fixture(loop_scope="session")
async def tabs(browser: Browser, app: App, browser_errors: Any) -> AsyncIterator[Any]:
    """Return a function that opens a tab of one browser."""
    context = await browser.new_context()

    async def open_tab(*, clock: bool = False) -> Tab:
        page = await context.new_page()
        await page.route("**/favicon.ico", lambda route: route.fulfill(status=204))
        browser_errors.listen_to(page, app.url)
        if clock:
            await page.clock.install()
        await page.goto(f"{app.url}/executions/client.js")
        return Tab(page)

    yield open_tab
    await context.close()


def ticket_for(sim: Simulator, ids: list[int]) -> str:
    """Return the app's ticket for runs."""
    session = Session("key", base_url=sim.base_url)
    return Tickets("of the app").issue(*map(session.execution, ids))


def add(sim: Simulator, count: int) -> list[int]:
    """Add runs."""
    return [sim.add_execution(REPORT) for _ in range(count)]


async def test_three_tabs_with_twenty_runs_need_three_connections(
    sim: Simulator, app: App, tabs: Any, browser_errors: Any
) -> None:
    """All rows live, requests are answered, and a crash and a reload lose no row."""
    browser_errors.expected = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED", "ERR_EMPTY")
    ids = add(sim, 20)
    ticket = ticket_for(sim, ids)
    opened = [await tabs() for _ in range(3)]
    began = time.monotonic()
    await asyncio.gather(*(tab.follow(ids, ticket) for tab in opened))
    await asyncio.gather(*(tab.until("running", 20) for tab in opened))
    assert time.monotonic() - began < 4
    assert [len(tab.streams) for tab in opened] == [1, 1, 1]

    # The body is read: the server is killed next, in the middle of it otherwise.
    other = f"() => fetch('/executions/{ids[0]}?ticket={ticket}').then((it) => it.text())"
    began = time.monotonic()
    assert '"Report"' in await opened[0].page.evaluate(other)
    assert time.monotonic() - began < 1

    await app.kill()
    for run in ids[:10]:
        sim.finish(run, "Report")
    await app.start()
    await opened[2].page.reload()
    await opened[2].follow(ids, ticket)
    await asyncio.gather(*(tab.until("complete", 10) for tab in opened))
    for run in ids[10:]:
        sim.finish(run, "Report")
    await asyncio.gather(*(tab.until("complete", 20) for tab in opened))


async def test_an_added_run_does_not_restart_the_others(sim: Simulator, tabs: Any) -> None:
    """The new connection opens before the old one closes, so the times of nodes do not jump."""
    ids = add(sim, 3)
    tab = await tabs()
    await tab.follow(ids[:2], ticket_for(sim, ids))
    await tab.until("running", 2)
    times = "() => Object.values(rows).map((row) => row.nodes.get('Report').running)"
    before = await tab.page.evaluate(times)
    await tab.follow(ids[1:], ticket_for(sim, ids))
    await tab.until("running", 3)
    await sim.wait_for_requests(sim.request_count + 3)
    assert (await tab.page.evaluate(times))[:2] == before
    assert len(tab.streams) == 2
    for run in ids:
        sim.finish(run, "Report")
    await tab.until("complete", 3)
    assert len(tab.streams) == 2


@pytest.mark.parametrize("options", ["max_streams=1, "])
async def test_a_run_is_added_to_a_page_that_has_the_last_place(sim: Simulator, tabs: Any) -> None:
    """The page gives up its connection for the new one; another page is told that it waits."""
    ids = add(sim, 2)
    first, second = await tabs(), await tabs()
    await first.follow(ids[:1], ticket_for(sim, ids))
    await first.until("running", 1)
    await second.follow(ids, ticket_for(sim, ids))
    await second.until("waiting", 2)
    message = await second.page.evaluate("Object.values(rows)[0].message")
    assert message == "The server cannot take another connection now. Trying again."
    await second.page.close()
    await first.follow(ids, ticket_for(sim, ids))
    await first.until("running", 2)
    for run in ids:
        sim.finish(run, "Report")
    await first.until("complete", 2)


async def test_more_than_a_hundred_runs_have_two_connections(sim: Simulator, tabs: Any) -> None:
    """Each is shown to its end."""
    ids = add(sim, 101)
    tab = await tabs()
    await tab.follow(ids, ticket_for(sim, ids))
    await tab.until("running", 101)
    assert sorted(url.count("id=") for url in tab.streams) == [1, 100]
    for run in ids:
        sim.finish(run, "Report")
    await tab.until("complete", 101)


async def test_a_run_that_is_left_for_a_moment_stays(sim: Simulator, tabs: Any) -> None:
    """A page that renders its rows anew needs no new connection, and shows what it knew."""
    ids = add(sim, 2)
    tab = await tabs(clock=True)
    await tab.follow(ids, ticket_for(sim, ids))
    await tab.until("running", 2)
    await tab.page.evaluate("(stopAll(), rows = {})")
    await tab.follow(ids, ticket_for(sim, ids))
    await tab.until("running", 2)
    await tab.page.clock.run_for(2_000)
    assert len(tab.streams) == 1
    await tab.page.evaluate("(stopAll(), rows = {})")
    ended = asyncio.Event()
    tab.page.on("requestfailed", lambda request: ended.set())
    await tab.page.clock.run_for(2_000)
    async with asyncio.timeout(5):
        await ended.wait()


HIDE = """(hidden) => {
    Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
}"""


async def test_a_hidden_page_lets_go_of_its_connection(sim: Simulator, tabs: Any) -> None:
    """After 20 seconds; it catches up when it is shown again."""
    ids = add(sim, 2)
    tab = await tabs(clock=True)
    await tab.follow(ids, ticket_for(sim, ids))
    await tab.until("running", 2)
    ended = asyncio.Event()
    tab.page.on("requestfailed", lambda request: ended.set())
    await tab.page.evaluate(HIDE, True)
    await tab.page.clock.run_for(19_000)
    assert not ended.is_set()
    await tab.page.clock.run_for(1_000)
    async with asyncio.timeout(5):
        await ended.wait()
    for run in ids:
        sim.finish(run, "Report")
    await tab.page.clock.run_for(20_000)
    assert len(tab.streams) == 1
    await tab.page.evaluate(HIDE, False)
    await tab.until("complete", 2)
    assert len(tab.streams) == 2


async def test_the_page_says_that_there_is_no_connection(sim: Simulator, tabs: Any) -> None:
    """Within three seconds, whatever the reason."""
    (run,) = add(sim, 1)
    tab = await tabs(clock=True)
    held = asyncio.Event()

    async def hold(route: Route) -> None:
        await held.wait()
        await route.continue_()

    await tab.page.route("**/executions/events?*", hold)
    await tab.follow([run], ticket_for(sim, [run]))
    await tab.page.clock.run_for(3_100)
    await tab.until("waiting", 1, timeout=2)
    message = await tab.page.evaluate("Object.values(rows)[0].message")
    assert message.startswith("Still connecting.")
    held.set()
    await tab.until("running", 1)


async def test_the_ticket_of_a_list_is_renewed_once_for_all(sim: Simulator, tabs: Any) -> None:
    """The server refuses each run; one call of `renew` is enough."""
    ids = add(sim, 20)
    tab = await tabs()
    await tab.follow(ids, "expired", ticket_for(sim, ids))
    await tab.until("running", 20)
    assert await tab.page.evaluate("renewals") == 1


async def test_an_error_of_the_page_does_not_end_the_stream(
    sim: Simulator, tabs: Any, browser_errors: Any
) -> None:
    """It goes to the console, and the other runs are shown."""
    one, two = add(sim, 2)
    tab = await tabs()
    errors: list[str] = []
    tab.page.on("pageerror", lambda error: errors.append(str(error)))
    browser_errors.expected = ("of the page",)
    await tab.page.evaluate(
        """async ({one, two, ticket}) => {
            const {follow} = await import("/executions/client.js");
            window.rows = {};
            follow(one, () => { throw new Error("of the page"); }, {ticket});
            follow(two, (view) => rows[two] = view, {ticket});
        }""",
        {"one": str(one), "two": str(two), "ticket": ticket_for(sim, [one, two])},
    )
    await tab.until("running", 1)
    sim.finish(two, "Report")
    await tab.until("complete", 1)
    assert len(tab.streams) == 1
    assert errors


async def test_native_event_sources_read_the_stream(sim: Simulator, tabs: Any, app: App) -> None:
    """After the last event, the answer to its reconnection closes it."""
    ids = add(sim, 2)
    tab = await tabs()
    query = "&".join(f"id={run}" for run in ids) + f"&ticket={ticket_for(sim, ids)}"
    await tab.page.evaluate(
        """(address) => {
            window.kinds = [];
            window.source = new EventSource(address);
            for (const kind of ["snapshot", "node", "complete"])
                source.addEventListener(kind, () => kinds.push(kind));
        }""",
        f"/executions/events?{query}",
    )
    await tab.page.wait_for_function("() => kinds.length === 2")
    for run in ids:
        sim.finish(run, "Report")
    closed = "() => source.readyState === EventSource.CLOSED"
    await tab.page.wait_for_function(closed, timeout=15_000)
    kinds = await tab.page.evaluate("kinds")
    assert sorted(kinds) == ["complete"] * 2 + ["node"] * 2 + ["snapshot"] * 2
