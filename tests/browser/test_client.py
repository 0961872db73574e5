"""The module for browsers, and the page in docs/fastapi.md that uses it, in the docs' app."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

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


class App:
    """The docs' app as a process, which can be killed, and started again on the same port."""

    def __init__(self, folder: Path, sim: Simulator) -> None:
        for language, name in (("python", "app.py"), ("html", "page.html")):
            found = re.search(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
            assert found is not None
            (folder / name).write_text(found[1])
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


@fixture(loop_scope="session")
async def app(sim: Simulator, tmp_path: Path) -> AsyncIterator[App]:
    """Return the running app."""
    sim.add_workflow("write-report", REPORT, inputs={"topic": "string"})
    app = App(tmp_path, sim)
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


async def test_the_page_starts_a_run_and_follows_it(sim: Simulator, page: Page) -> None:
    """It follows by the ticket, which is in its address, and shows node after node."""
    await page.locator("input").fill("beavers")
    await start(page)
    assert sim.runs[0].inputs == {"topic": "beavers"}
    assert "&ticket=" in page.url
    sim.finish(1001, "Report", value="</pre> fine")
    await expect(page.locator("#state")).to_have_text("Succeeded")
    lines = 'Plan: SUCCESS "three parts"\nReport: SUCCESS "</pre> fine"\n'
    assert await page.locator("#nodes").text_content() == lines


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
    await expect(page.locator("#state")).to_have_text("The server could not be reached.")
    await expect(page.locator("#state")).to_have_text("50 %")
    assert answers == []


async def test_the_page_says_why_it_waits_and_fails(
    sim: Simulator, app: App, page: Page, browser_errors: Any
) -> None:
    """Its text is that of the event, or of the problem; a refused start is shown as well."""
    browser_errors.expected = ("404 (Not Found)", "422 (")
    state = page.locator("#state")
    await page.goto(f"{app.url}?id=77")
    await expect(state).to_have_text("There is no such execution or workflow.")
    results = "/workflow-version-execution-results"
    sim.inject(Fault.status(503, times=None), path=results)
    await page.get_by_role("button").click()
    await expect(state).to_have_text("PromptLayer failed; trying again.")
    sim.clear_faults()
    await expect(state).to_have_text("50 %", timeout=20_000)
    sim.inject(Fault.status(403), path=results)
    await expect(state).to_have_text("PromptLayer refused this server's credentials.")
    await expect(page.locator("#nodes")).to_contain_text("Report: RUNNING")
    await page.locator("input").evaluate("(input) => input.remove()")
    await page.get_by_role("button").click()
    await expect(state).to_contain_text("missing")


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
