"""The viewer's page in a real browser; nodes are held until the test finishes them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, BrowserContext, Locator, Page, expect

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")  # one loop, as there is one browser

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
LONG = "word " * 400_000 + "the end"
HELD = Scenario(
    [
        SimNode("plan", {"parts": 3}, None),
        SimNode("answer", "Otters are fine.", None, after=["plan"], is_output_node=True),
    ]
)
FAILING = Scenario(
    [
        SimNode(
            "fetch",
            status="FAILED",
            error_message="The index is not available: HTTP 503",
            raw_error_message={"raw": "Traceback: ...\nOSError: HTTP 503"},
        ),
        SimNode("answer", after=["fetch"], is_output_node=True),
    ]
)


def line(page: Page, execution_id: int | str) -> Locator:
    """Return the line of an execution."""
    return page.locator(f'.line[data-id="{execution_id}"]')


def node(page: Page, execution_id: int, name: str) -> Locator:
    """Return the row of a node."""
    exactly = re.compile(f"^{re.escape(name)}$")
    row = line(page, execution_id).locator(".node")
    return row.filter(has=page.locator('[data-part="name"]', has_text=exactly))


def state(page: Page, execution_id: int) -> Locator:
    """Return the text of an execution's state."""
    return line(page, execution_id).locator('[data-part="state"]')


def status(page: Page, execution_id: int, name: str) -> Locator:
    """Return the text of a node's status."""
    return node(page, execution_id, name).locator('[data-part="status"]')


def time_of(page: Page, execution_id: int, name: str) -> Locator:
    """Return the text of how long a node ran."""
    return node(page, execution_id, name).locator('[data-part="time"]')


async def add(page: Page, execution_id: Any) -> None:
    """Add an execution by its id."""
    await page.get_by_label("Add an execution").fill(str(execution_id))
    await page.get_by_role("button", name="Add").click()


async def add_open(page: Page, execution_id: int) -> None:
    """Add an execution, and show its nodes below its line."""
    await add(page, execution_id)
    button = page.get_by_role("button", name=f"Nodes of execution {execution_id}")
    # A line that goes to another group at that moment may lose the click.
    while await button.get_attribute("aria-expanded") != "true":
        await button.click()


async def test_the_whole_line_leads_to_the_run(sim: Simulator, page: Page) -> None:
    """What is no button, too; the keyboard has the name, which is a link."""
    held = sim.add_execution(HELD)
    await add(page, held)
    await line(page, held).locator('[data-part="count"]').click()
    await expect(page).to_have_url(re.compile(rf"#/executions/{held}$"))


async def test_progress_appears_node_by_node(sim: Simulator, page: Page) -> None:
    """Nodes are updated as they end, with the count of final nodes, and then the execution."""
    held = sim.add_execution(HELD)
    await add_open(page, held)
    progress = line(page, held).get_by_role("progressbar")
    count = line(page, held).locator('[data-part="count"]')
    await expect(status(page, held, "plan")).to_have_text("Running")
    await expect(status(page, held, "answer")).to_have_text("Queued")
    await expect(count).to_have_text("0/2")
    sim.finish(held, "plan")
    await expect(status(page, held, "plan")).to_have_text("Success")
    await expect(node(page, held, "plan").locator('[data-part="preview"]')).to_have_text(
        '{ "parts": 3 }'
    )
    await expect(status(page, held, "answer")).to_have_text("Running")
    await expect(count).to_have_text("1/2")
    assert await progress.evaluate("(one) => one.ariaValueNow / one.ariaValueMax") == 0.5
    await expect(state(page, held)).to_have_text("Running")
    sim.finish(held, "answer")
    await expect(state(page, held)).to_have_text("Succeeded")
    await expect(count).to_have_text("2/2")
    await expect(page.locator("#announcer")).to_have_text(
        f"Execution {held}, execution {held}: Succeeded."
    )


async def test_times_advance_between_polls_and_a_silent_server_is_shown(
    sim: Simulator, page: Page, context: BrowserContext
) -> None:
    """A message says that PromptLayer does not respond, as the page may be out of date."""
    await context.clock.install()  # for all pages of the context, which is the test's own
    await page.reload()
    held = sim.add_execution(HELD)
    await add_open(page, held)
    await expect(status(page, held, "plan")).to_have_text("Running")
    sim.inject(Fault.stall())
    await sim.wait_for_requests(sim.request_count + 1)
    running = time_of(page, held, "plan")
    before = await running.text_content()
    await expect(running).not_to_have_text(before or "")
    problem = page.locator("#outage")
    await expect(problem).to_be_hidden()
    await page.clock.fast_forward(20_000)
    await expect(problem).to_contain_text("PromptLayer has not responded. Since ")
    await expect(state(page, held)).to_have_text("Last seen running")
    await expect(page.locator("#connection")).to_have_text("PromptLayer does not respond")
    await expect(running).to_have_text(re.compile(r"^2\d s$"))


async def test_what_is_wrong_at_promptlayer_is_said_where_the_run_is(
    sim: Simulator, ui: Any, page: Page
) -> None:
    """The reason, since when, and when it is asked again; a run that is given up is not failed."""
    held, other = sim.add_execution(HELD), sim.add_execution(HELD)
    await add_open(page, held)
    await expect(status(page, held, "plan")).to_have_text("Running")
    sim.inject(Fault.status(503, retry_after=60.0))
    problem = page.locator("#outage")
    await expect(problem).to_have_text(
        re.compile(r"The server returned 503 .* Since .*\. The next attempt is at \d+:")
    )
    await expect(state(page, held)).to_have_text("Last seen running")
    await expect(page.locator("#connection")).to_have_text("PromptLayer has errors")
    await ui.open_run(held)
    await expect(problem).to_contain_text("The server returned 503")
    await ui.open("#/")
    await line(page, held).get_by_role("button", name="Remove").click()
    await expect(page.locator("#connection")).to_have_text("Connected")
    await add_open(page, other)
    await expect(status(page, other, "plan")).to_have_text("Running")
    sim.inject(Fault.status(401))
    await expect(state(page, other)).to_have_text("No longer followed")
    await expect(page.locator("#connection")).to_have_text("PromptLayer refuses the key")
    await expect(line(page, other).locator('[data-part="sentence"]')).to_contain_text(
        "Check PROMPTLAYER_API_KEY."
    )
    await expect(page.get_by_role("radio", name="Failed 0")).to_be_attached()
    await expect(page.get_by_role("radio", name="No longer followed 1")).to_be_attached()


async def test_the_time_line_shows_when_each_node_ran(sim: Simulator, page: Page) -> None:
    """The second node's bar starts where the first one's ends; a reload changes nothing."""
    long_enough = re.compile(r"0\.[2-9] s|[1-9]")
    held = sim.add_execution(HELD)
    await add_open(page, held)
    await expect(status(page, held, "plan")).to_have_text("Running")
    await expect(time_of(page, held, "plan")).to_have_text(long_enough)
    sim.finish(held, "plan")
    await expect(status(page, held, "answer")).to_have_text("Running")
    await expect(time_of(page, held, "answer")).to_have_text(long_enough)
    sim.finish(held, "answer")
    await expect(state(page, held)).to_have_text("Succeeded")

    async def ends(name: str) -> tuple[float, float]:
        bar = node(page, held, name).locator('[data-part="stretch"]')
        box = await bar.bounding_box()
        assert box is not None
        return box["x"], box["x"] + box["width"]

    before = [await ends("plan"), await ends("answer")]
    assert before[0][1] - before[0][0] > 20
    assert before[1][0] == pytest.approx(before[0][1], abs=30)
    assert before[1][1] > before[1][0] + 20
    requests = sim.request_count
    await page.reload()
    await page.get_by_role("button", name=f"Nodes of execution {held}").click()
    await expect(state(page, held)).to_have_text("Succeeded")
    assert [await ends("plan"), await ends("answer")] == before
    assert sim.request_count == requests


async def test_a_line_says_why_and_leads_to_the_failed_node(
    sim: Simulator, ui: Any, page: Page
) -> None:
    """The first error is in the line, and at its node below; the link of a node selects it."""
    failing = sim.add_execution(FAILING)
    await add_open(page, failing)
    await expect(state(page, failing)).to_have_text("Failed")
    await expect(line(page, failing).locator(".sentence")).to_have_text(
        re.compile(r"^Failed.* in fetch: The index is not available: HTTP 503\.$")
    )
    await expect(node(page, failing, "fetch").locator('[data-part="preview"]')).to_have_text(
        "The index is not available: HTTP 503"
    )
    await expect(status(page, failing, "answer")).to_have_text("Skipped")
    await node(page, failing, "answer").locator(".row").click()
    await expect(ui.selected.locator("h3")).to_have_text("answer")
    assert page.url.endswith(f"#/executions/{failing}?node=answer")


async def test_an_unknown_status_is_shown_as_it_is(sim: Simulator, page: Page) -> None:
    """It counts as not final."""
    odd = sim.add_execution(Scenario([SimNode("approve", status="AWAITING_APPROVAL")]))
    await add_open(page, odd)
    await expect(status(page, odd, "approve")).to_have_text("AWAITING_APPROVAL")
    await expect(state(page, odd)).to_have_text("Running")


async def test_a_value_is_always_text(sim: Simulator, ui: Any, page: Page) -> None:
    """Markup in values and names is shown and copied literally, and numbers exactly."""
    nodes = [SimNode(HOSTILE, HOSTILE), SimNode("number", {"n": 2**63 + 1}, is_output_node=True)]
    await ui.open_run(sim.add_execution(Scenario(nodes)))
    await ui.select(HOSTILE)
    await expect(ui.selected.locator('[data-part="value"]')).to_have_text(HOSTILE)
    await ui.selected.get_by_role("button", name="Copy").click()
    await expect(ui.selected.locator('[data-part="copied"]')).to_have_text("Copied")
    assert await ui.copied() == HOSTILE
    assert await page.locator("script, img").count() == 1
    assert "taken" not in await page.title()
    await ui.select("number")
    await expect(ui.selected.locator('[data-part="value"]')).to_have_text(
        json.dumps({"n": 2**63 + 1}, indent=2)
    )


async def test_a_large_value_is_fetched_on_demand(sim: Simulator, ui: Any) -> None:
    """Of a value over two million characters, only the start is shown; the copy is complete."""
    await ui.open_run(sim.add_execution(Scenario([SimNode("essay", LONG)])))
    await ui.select("essay")
    value = ui.selected.locator('[data-part="value"]')
    assert await value.evaluate("(one) => one.textContent.length") == 10_000
    await ui.selected.get_by_role("button", name="Copy").click()
    await expect(ui.selected.locator('[data-part="copied"]')).to_have_text("Copied")
    assert await ui.copied() == LONG
    await ui.selected.get_by_role("button", name=f"Show all {len(LONG):,} characters").click()
    await expect(value).to_be_focused()
    where = ui.selected.locator('[data-part="where"]')
    await expect(where).to_have_text(f"Characters 1 to 100,000 of {len(LONG):,}")
    await ui.selected.get_by_role("button", name="Later").click()
    await expect(where).to_have_text(f"Characters 100,001 to 200,000 of {len(LONG):,}")
    assert await value.evaluate("(one) => one.textContent") == LONG[100_000:200_000]


async def test_the_page_reconnects_to_a_restarted_viewer(
    sim: Simulator, viewer: Any, page: Page, browser_errors: Any
) -> None:
    """It says that the viewer has stopped, and then shows the same executions in order."""
    browser_errors.expected = ("ERR_", "Failed to load resource")
    first, second = sim.add_execution(HELD), sim.add_execution(HELD)
    await add_open(page, first)
    await expect(line(page, first)).to_be_visible()
    await add_open(page, second)
    await expect(status(page, second, "plan")).to_have_text("Running")
    await viewer.stop()
    await expect(page.locator("#connection")).to_contain_text("The viewer has stopped")
    await expect(page.locator("#gone")).to_contain_text("The viewer has not responded since")
    time = time_of(page, second, "plan")
    frozen = await time.text_content()
    sim.finish(first, "plan")
    await viewer.start()
    assert await time.text_content() == frozen
    await expect(page.locator("#connection")).to_have_text("Connected")
    await expect(page.locator("#gone")).to_be_hidden()
    await expect(status(page, first, "answer")).to_have_text("Running")
    await expect(status(page, second, "plan")).to_have_text("Running")
    shown = await page.locator(".line").evaluate_all("(all) => all.map((one) => one.dataset.id)")
    assert shown == [str(second), str(first)]


async def test_a_new_token_is_required(viewer: Any, page: Page, browser_errors: Any) -> None:
    """After a restart with another token, the page says so and stops reconnecting."""
    browser_errors.expected = ("ERR_", "Failed to load resource")
    await viewer.stop()
    viewer.token = "quite-another-token"
    await viewer.start()
    await expect(page.get_by_role("heading", name="This page needs its token")).to_be_focused()
    await expect(page.locator("#refused-reason")).to_contain_text("has a new token")
    await page.goto(viewer.url)
    await expect(page.locator("#connection")).to_have_text("Connected")
    await expect(page.locator("#refused")).to_be_hidden()


async def test_the_token_is_kept_for_the_tab(viewer: Any, page: Page) -> None:
    """It is removed from the address bar, and is in no cookie, which other ports would get."""
    assert page.url == f"{viewer.origin}/"
    await page.reload()
    await expect(page.locator("#connection")).to_have_text("Connected")
    assert await page.context.cookies() == []


async def test_all_tabs_share_one_connection(
    sim: Simulator, viewer: Any, page: Page, context: BrowserContext, browser_errors: Any
) -> None:
    """A link opens a run in a new tab, which needs no token, and goes on without the first one."""
    browser_errors.expected = ("ERR_", "Failed to load resource")
    held = sim.add_execution(HELD)
    await add(page, held)
    await expect(state(page, held)).to_have_text("Running")
    async with context.expect_page() as opening:
        await line(page, held).get_by_role("link").first.click(modifiers=["ControlOrMeta"])
    other = await opening.value
    requests: list[str] = []
    other.on("request", lambda request: requests.append(urlsplit(request.url).path))
    plan = other.locator(".run .node").first
    await expect(plan).to_have_attribute("data-status", "running")
    await expect(other.locator("#connection")).to_have_text("Connected")
    sim.finish(held, "plan")
    await expect(plan).to_have_attribute("data-status", "success")
    await expect(line(page, held).locator('[data-part="count"]')).to_have_text("1/2")
    assert "/api/events" not in requests
    await page.close()
    sim.finish(held, "answer")
    await expect(other.locator(".run")).to_have_attribute("data-state", "succeeded")
    assert requests.count("/api/events") == 1
    third = await context.new_page()
    await third.goto(f"{viewer.origin}/#token=wrong")
    await expect(third.locator(".line")).to_have_count(1)
    await expect(other.locator("#connection")).to_have_text("Connected")
    await viewer.stop()
    viewer.token = "quite-another-token"
    await viewer.start()
    for tab in (other, third):
        await expect(tab.locator("#refused")).to_be_visible()
    await third.goto(viewer.url)
    for tab in (other, third):
        await expect(tab.locator("#connection")).to_have_text("Connected")


async def test_eight_tabs_without_locks_are_all_served(
    sim: Simulator, viewer: Any, context: BrowserContext, browser_errors: Any
) -> None:
    """Over plain http from another machine there are no Web Locks; one tab serves the others."""
    hide = "Object.defineProperty(Navigator.prototype, 'locks', { get: () => undefined });"
    await context.add_init_script(hide)
    held = sim.add_execution(HELD)
    viewer.board.follow(held)
    tabs = [await context.new_page() for _ in range(8)]
    for tab in tabs:
        browser_errors.listen_to(tab, viewer.origin)
        await tab.goto(viewer.url)
    for tab in tabs:
        await expect(tab.locator("#connection")).to_have_text("Connected")
        await expect(tab.locator(".line")).to_have_attribute("data-state", "running")
    assert await tabs[-1].evaluate("fetch('favicon.svg').then((one) => one.status)") == 200
    await tabs[0].close()
    for name in HELD.nodes:
        sim.finish(held, name.name)
    for tab in tabs[1:]:
        await expect(tab.locator(".line")).to_have_attribute("data-state", "succeeded")


@pytest.mark.parametrize("fragment", ["", "#token=wrong"])
async def test_a_page_without_its_token_says_where_to_find_it(
    context: BrowserContext, viewer: Any, browser_errors: Any, fragment: str
) -> None:
    """It shows nothing else, and is accessible, too."""
    browser_errors.expected = ("401 (Unauthorized)",)
    page = await context.new_page()
    browser_errors.listen_to(page, viewer.origin)
    await page.goto(f"{viewer.origin}/{fragment}")
    await expect(page.locator("#refused")).to_contain_text("promptlayer-exec view")
    await expect(page.locator("#viewer")).to_be_hidden()
    assert (await Axe().run(page)).response["violations"] == []


async def test_an_unknown_or_invalid_id_is_an_error_at_the_field(
    page: Page, browser_errors: Any
) -> None:
    """The field keeps the focus."""
    browser_errors.expected = ("404 (Not Found)", "422 (")
    field = page.get_by_label("Add an execution")
    error = page.locator("#execution-id-error")
    for wrong, reason in [("77", "The server returned 404"), ("x", "a whole number")]:
        await add(page, wrong)
        await expect(error).to_contain_text(reason)
        await expect(field).to_be_focused()
        await expect(field).to_have_attribute("aria-invalid", "true")
    await expect(page.locator(".line")).to_have_count(0)


async def test_a_failed_watch_shows_its_error_and_can_be_restarted(
    sim: Simulator, page: Page
) -> None:
    """The last snapshot stays visible."""
    held = sim.add_execution(HELD)
    await add_open(page, held)
    await expect(status(page, held, "plan")).to_have_text("Running")
    sim.inject(Fault.status(403))
    await expect(state(page, held)).to_have_text("No longer followed")
    await expect(line(page, held).locator('[data-part="sentence"]')).to_contain_text(
        "403 Forbidden"
    )
    await expect(status(page, held, "plan")).to_have_text("Running")
    await line(page, held).get_by_role("button", name="Follow again").click()
    await expect(state(page, held)).to_have_text("Running")
    await expect(line(page, held).locator('[data-part="problem"]')).to_be_empty()


async def test_the_filter_finds_names_ids_and_statuses(sim: Simulator, page: Page) -> None:
    """It matches cards or some of their nodes; the radio buttons select one state."""
    held, failing = sim.add_execution(HELD), sim.add_execution(FAILING)
    await add_open(page, held)
    await expect(line(page, held)).to_be_visible()
    await add_open(page, failing)
    await expect(state(page, failing)).to_have_text("Failed")
    find = page.get_by_label("Filter")
    await find.fill("plan")
    await expect(line(page, failing)).to_be_hidden()
    await expect(node(page, held, "plan")).to_be_visible()
    await expect(node(page, held, "answer")).to_be_hidden()
    await find.fill(str(failing))
    await expect(line(page, held)).to_be_hidden()
    await expect(node(page, failing, "fetch")).to_be_visible()
    await find.fill("skipped")
    await expect(node(page, failing, "answer")).to_be_visible()
    await expect(node(page, failing, "fetch")).to_be_hidden()
    await find.fill("index is not")
    await expect(line(page, failing)).to_be_visible()
    await expect(line(page, held)).to_be_hidden()
    await find.fill("nowhere")
    await expect(page.locator("#empty")).to_have_text("No execution matches the filter.")
    await find.fill("")
    await page.get_by_role("radio", name="Running 1").check()
    await expect(line(page, held)).to_be_visible()
    await expect(line(page, failing)).to_be_hidden()


async def test_removing_a_line_moves_the_focus(sim: Simulator, page: Page) -> None:
    """The focus moves to the next line, and from the last line to the field."""
    first, second = sim.add_execution(HELD), sim.add_execution(HELD)
    await add(page, first)
    await expect(line(page, first)).to_be_visible()
    await add(page, second)
    await page.get_by_role("button", name=f"Remove execution {second}").click()
    await expect(line(page, second)).to_have_count(0)
    await expect(line(page, first).get_by_role("link").first).to_be_focused()
    await page.get_by_role("button", name=f"Remove execution {first}").click()
    await expect(page.get_by_label("Add an execution")).to_be_focused()
    await expect(page.locator("#empty")).to_contain_text("no execution on this page yet")


async def test_five_hundred_runs_are_a_short_page(sim: Simulator, viewer: Any, page: Page) -> None:
    """The failed ones come first, what succeeded is folded away, and only what is seen is drawn."""
    for index in range(500):
        scenario = FAILING if index % 100 == 7 else Scenario([SimNode("a", "b")])
        viewer.board.follow(sim.add_execution(scenario))
    await expect(page.locator("[data-count=failed]")).to_have_text("5", timeout=30_000)
    await expect(page.locator("[data-count=succeeded]")).to_have_text("495", timeout=30_000)
    await expect(page.locator(".line:visible")).to_have_count(10)
    states = await page.locator(".line:visible").evaluate_all(
        "(all) => all.map((one) => one.dataset.state)"
    )
    assert states == ["failed"] * 5 + ["succeeded"] * 5
    await page.get_by_role("button", name="Show 490 more that succeeded").click()
    await expect(page.locator(".line:visible")).to_have_count(500)
    assert await page.evaluate("document.documentElement.scrollHeight") < 20_000
    ends_are_rendered = """(wanted) => {
        const all = [...document.querySelectorAll(".line .line-head")];
        return [all.at(0), all.at(-1)].every((one, index) => wanted[index] === null
            || wanted[index] === one.checkVisibility({ contentVisibilityAuto: true }));
    }"""
    await page.wait_for_function(ends_are_rendered, arg=[True, False], timeout=5000)
    await page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    await page.wait_for_function(ends_are_rendered, arg=[None, True], timeout=5000)


async def test_a_run_that_was_only_looked_at_does_not_join_the_board(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """Unless it still runs, or somebody adds it by its id; the title tells failures first."""
    old, failing, held = (sim.add_execution(it) for it in (FAILING, FAILING, HELD))
    await ui.open_run(old)
    await expect(ui.part("state")).to_have_text("Failed")
    await expect(ui.part("remove")).to_be_hidden()
    await ui.open_run(held)
    await expect(ui.part("state")).to_have_text("Running")
    await ui.open("#/")
    await expect(page.locator(".line")).to_have_count(1)
    await expect(page).to_have_title("1 running · Executions")
    await add(page, failing)
    await expect(page).to_have_title("1 failed, 1 running · Executions")
    await add(page, old)
    await expect(page).to_have_title("2 failed, 1 running · Executions")
    shown = await page.locator(".line").evaluate_all("(all) => all.map((one) => one.dataset.id)")
    assert shown == [str(old), str(failing), str(held)]


@pytest.mark.parametrize("poll", [0.25])  # sixty executions, in the process of the tests
async def test_a_line_waits_while_somebody_points_at_it(
    sim: Simulator, viewer: Any, page: Page
) -> None:
    """It then moves to its group without a jump of the page, and keeps the focus."""
    ids = [sim.add_execution(HELD) for _ in range(60)]
    for execution_id in ids:
        viewer.board.follow(execution_id)
    await expect(page.locator('.line[data-state="running"]')).to_have_count(60)
    await page.evaluate(
        """() => { window.shift = 0; new PerformanceObserver((list) => {
            for (const one of list.getEntries()) window.shift += one.value;
        }).observe({ type: "layout-shift" }); }"""
    )
    await line(page, ids[9]).hover()
    await line(page, ids[9]).get_by_role("link").first.focus()
    for execution_id in ids[5:15]:
        sim.finish(execution_id, "plan", status="FAILED")
        await expect(state(page, execution_id)).to_have_text("Failed")
        await line(page, ids[9]).dispatch_event("pointermove")  # a pointer at rest is no use
    group = page.locator(".group:visible h2")
    await expect(group).to_have_text(["Running"])
    await expect(line(page, ids[9]).get_by_role("link").first).to_be_focused()
    await page.locator("#filter").focus()
    await page.mouse.move(0, 0)
    await expect(group).to_have_text([re.compile("^Failed"), "Running"])
    await page.evaluate("scrollTo(0, 400)")
    for execution_id in ids[30:40]:
        sim.finish(execution_id, "plan")
        await expect(line(page, execution_id).locator('[data-part="count"]')).to_have_text("1/2")
    assert await page.evaluate("scrollY") == 400
    await page.evaluate("new Promise((done) => setTimeout(done, 300))")
    assert await page.evaluate("window.shift") < 0.01


async def focused(page: Page) -> str:
    """Return the element that has the focus, or "unseen" if no outline shows it."""
    return await page.evaluate(
        """() => {
            const one = document.activeElement;
            const ring = one.type === "radio" ? one.nextElementSibling : one;
            const style = getComputedStyle(ring);
            const isSeen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
            if (!isSeen) return "unseen";
            const [word] = one.textContent.trim().split(/\\s+/);
            return one.dataset.part ?? (one.id || `${one.tagName} ${word}`);
        }"""
    )


async def test_everything_works_by_keyboard(sim: Simulator, ui: Any, page: Page) -> None:
    """The tab order is that of the page, and an outline shows the focus."""
    execution_id = sim.add_execution(Scenario([SimNode("essay", "text", is_output_node=True)]))
    await page.locator("#filter").focus()
    await page.keyboard.press("Tab")
    await page.keyboard.type(str(execution_id))
    await page.keyboard.press("Enter")
    await expect(state(page, execution_id)).to_have_text("Succeeded")
    await expect(page.locator("#execution-id")).to_be_empty()
    await expect(page.locator("#add-form button")).to_be_enabled()
    order = []
    for _ in range(5):
        await page.keyboard.press("Tab")
        order.append(await focused(page))
    assert order[0] == "BUTTON Add"
    assert order[1].startswith("INPUT")
    assert order[2:] == ["fold", "title", "remove"]
    await page.locator(".fold").focus()
    await page.keyboard.press("Space")
    await expect(node(page, execution_id, "essay")).to_be_visible()
    for expected in ("title", "remove", "row"):
        await page.keyboard.press("Tab")
        assert await focused(page) == expected
    await page.keyboard.press("Enter")
    await expect(page.locator("#run-title")).to_be_focused()
    await ui.row("essay").locator(".row").focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#node-title")).to_be_focused()
    for expected in ("close", "value", "copy"):
        await page.keyboard.press("Tab")
        assert await focused(page) == expected
    await page.keyboard.press("Enter")
    await expect(ui.selected.locator('[data-part="copied"]')).to_have_text("Copied")
    await page.keyboard.press("Escape")
    await expect(ui.row("essay").locator(".row")).to_be_focused()
    await page.get_by_role("link", name="Start a run").focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#start-title")).to_be_focused()
    for expected in ("workflow", "inputs", "metadata", "BUTTON Start"):
        await page.keyboard.press("Tab")
        assert await focused(page) == expected


async def test_keys_go_through_the_lines(sim: Simulator, ui: Any, page: Page) -> None:
    """In every list j and k do so, n goes to what failed, / to the filter; all can be off."""
    nodes = [SimNode("a"), SimNode("b", status="FAILED"), SimNode("c"), SimNode("d")]
    failing, done = sim.add_execution(Scenario(nodes)), sim.add_execution(Scenario([SimNode("x")]))
    for execution_id in (done, failing):
        ui.viewer.board.follow(execution_id)
    await expect(page.locator(".group:visible h2")).to_have_text(["Failed", "Succeeded"])
    for key, expected in (("j", failing), ("j", done), ("j", done), ("k", failing), ("n", failing)):
        await page.keyboard.press(key)
        await expect(line(page, expected).get_by_role("link").first).to_be_focused()
    for is_open in (True, False):
        await page.keyboard.press("o")
        await expect(node(page, failing, "b")).to_be_visible(visible=is_open)
    await page.keyboard.press("/")
    await expect(page.locator("#filter")).to_be_focused()
    await page.keyboard.type("jk/n")
    await expect(page.locator("#filter")).to_have_value("jk/n")
    await page.locator("#filter").fill("")
    await ui.open_run(failing)
    await expect(ui.selected.locator("h3")).to_have_text("b")
    for key, name in (("j", "c"), ("k", "b"), ("k", "a"), ("n", "b")):
        await page.keyboard.press(key)
        await expect(ui.selected.locator("h3")).to_have_text(name)
        await expect(ui.row(name).locator(".row")).to_be_focused()
    await page.get_by_role("button", name="Keys").click()
    await page.get_by_label("Use the keys").uncheck()
    await page.keyboard.press("Escape")
    await page.keyboard.press("j")
    await expect(ui.selected.locator("h3")).to_have_text("b")


async def fill(sim: Simulator, viewer: Any, page: Page) -> None:
    """Show all states, long words, open details and form errors."""
    word = "incomprehensibilities" * 12
    nodes = [
        SimNode(word, {"key": word, "rows": list(range(400))}),
        SimNode("think", None, None),
        SimNode("approve", status="AWAITING_APPROVAL"),
    ]
    held = sim.add_execution(Scenario(nodes))
    failing = sim.add_execution(FAILING)
    done = sim.add_execution(Scenario([SimNode("answer", "yes", is_output_node=True)]))
    lost = sim.add_execution(HELD)
    sim.add_workflow(word, HELD, warning=f"missing: {word}")
    await viewer.board.start(word, {})
    for execution_id in (held, failing, done, lost, 77):
        viewer.board.follow(execution_id)
    await expect(state(page, 77)).to_have_text("No longer followed")
    await expect(state(page, lost)).to_have_text("Running")
    await expect(state(page, failing)).to_have_text("Failed")
    for execution_id in (held, failing):
        await page.get_by_role("button", name=f"Nodes of execution {execution_id}").click()
    await add(page, "x" + word)
    await expect(page.locator("#execution-id-error")).not_to_be_empty()


@pytest.mark.parametrize("width", [1280, 700, 360])
async def test_the_page_fits_and_axe_finds_nothing(
    sim: Simulator, viewer: Any, page: Page, browser_errors: Any, width: int
) -> None:
    """There is no horizontal scrolling and no violation, in light and dark, contrast included."""
    browser_errors.expected = ("422 (",)
    await page.set_viewport_size({"width": width, "height": 740})
    await fill(sim, viewer, page)
    sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    needed, there = await page.evaluate(sizes)
    assert needed <= there
    for theme in ("light", "dark"):
        await page.emulate_media(color_scheme=theme, reduced_motion="reduce")
        results = await Axe().run(page)
        found = [
            (one["id"], [node["html"] for node in one["nodes"]])
            for one in results.response["violations"]
        ]
        assert found == []
        assert "color-contrast" in {one["id"] for one in results.response["passes"]}


async def test_another_site_gets_nothing(
    context: BrowserContext, sim: Simulator, viewer: Any
) -> None:
    """It can read no response, embed no frame, and start no run, even with the token."""
    sim.add_workflow("report", HELD)
    page = await context.new_page()
    await page.goto(sim.base_url)  # another origin
    read = await page.evaluate(
        """async ([url, token]) => {
            const headers = { Authorization: `Bearer ${token}` };
            const body = JSON.stringify({ workflow: "report", inputs: "{}" });
            const plain = { method: "POST", mode: "no-cors", body };
            await fetch(`${url}/api/runs`, plain).catch(() => null);
            const request = (path, init) =>
                fetch(url + path, init).then((answer) => answer.status, () => "refused");
            const start = { method: "POST", headers, body };
            return [await request("/viewer.js", {}), await request("/api/runs", start)];
        }""",
        [viewer.origin, viewer.token],
    )
    assert read == ["refused", "refused"]
    assert sim.runs == []
    await page.evaluate(
        "(url) => { document.body.innerHTML = `<iframe src='${url}'></iframe>` }", viewer.url
    )
    frame = await (await page.wait_for_selector("iframe")).content_frame()
    assert frame is not None
    await frame.wait_for_load_state()
    assert await frame.locator("#viewer").count() == 0


async def test_the_demonstration_runs_and_stops_with_a_page_open(
    browser: Browser, browser_errors: Any
) -> None:
    """It needs no key; one of its agents fails, and Ctrl-C stops it within seconds, code 0."""
    browser_errors.expected = ("ERR_", "Failed to load resource")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PROMPTLAYER")}
    command = [sys.executable, "-W", "error", "-m", "promptlayer_exec", "view", "--demo"]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        page = await browser.new_page()
        browser_errors.listen_to(page, url.partition("/#")[0])
        await page.goto(url)
        failed = page.locator('.line[data-state="failed"]')
        await expect(failed.get_by_role("link").first).to_have_text("invoice-check")
        await expect(page.locator('.line[data-state="running"]').first).to_be_visible()
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(5):
            _, errors = await process.communicate()
        assert process.returncode == 0
        assert (
            errors == b"Open this page, and keep its URL to yourself (Ctrl-C stops the server):\n"
        )
        await expect(page.locator("#connection")).to_contain_text("The viewer has stopped")
        await page.close()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
