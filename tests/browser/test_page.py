"""The viewer's page in a real browser; nodes are held until they are told to end."""

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

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, BrowserContext, Locator, Page, expect

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")  # one loop, and so one browser

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
LONG = "word " * 5_000 + "the end"
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
            error_message="The index is not there: HTTP 503",
            raw_error_message={"raw": "Traceback: ...\nOSError: HTTP 503"},
        ),
        SimNode("answer", after=["fetch"], is_output_node=True),
    ]
)


def card(page: Page, execution_id: int | str) -> Locator:
    """Return the card of an execution."""
    return page.locator(f'.card[data-id="{execution_id}"]')


def node(page: Page, execution_id: int, name: str) -> Locator:
    """Return the row of a node."""
    exactly = re.compile(f"^{re.escape(name)}$")
    row = card(page, execution_id).locator(".node")
    return row.filter(has=page.locator('[data-part="name"]', has_text=exactly))


def state(page: Page, execution_id: int) -> Locator:
    """Return the words for how an execution is."""
    return card(page, execution_id).locator('[data-part="state"]')


def status(page: Page, execution_id: int, name: str) -> Locator:
    """Return the words for how a node is."""
    return node(page, execution_id, name).locator('[data-part="status"]')


def time_of(page: Page, execution_id: int, name: str) -> Locator:
    """Return how long a node ran."""
    return node(page, execution_id, name).locator('[data-part="time"]')


async def add(page: Page, execution_id: Any) -> None:
    """Add an execution by its id."""
    await page.get_by_label("Add an execution").fill(str(execution_id))
    await page.get_by_role("button", name="Add").click()


async def test_progress_appears_node_by_node(sim: Simulator, page: Page) -> None:
    """Each node as it ends, then the whole; with counts that are the nodes', and times."""
    held = sim.add_execution(HELD)
    await add(page, held)
    progress = card(page, held).get_by_role("progressbar")
    count = card(page, held).locator('[data-part="count"]')
    await expect(status(page, held, "plan")).to_have_text("Running")
    await expect(status(page, held, "answer")).to_have_text("Queued")
    await expect(count).to_have_text("0 of 2 nodes")
    sim.finish(held, "plan")
    await expect(status(page, held, "plan")).to_have_text("Success")
    await expect(node(page, held, "plan").locator('[data-part="preview"]')).to_have_text(
        '{ "parts": 3 }'
    )
    await expect(status(page, held, "answer")).to_have_text("Running")
    await expect(count).to_have_text("1 of 2 nodes")
    assert await progress.evaluate("(one) => one.value / one.max") == 0.5
    await expect(state(page, held)).to_have_text("Running")
    sim.finish(held, "answer")
    await expect(state(page, held)).to_have_text("Succeeded")
    await expect(count).to_have_text("2 of 2 nodes")
    await expect(page.locator("#announcer")).to_have_text(
        f"Execution {held}, execution {held}: Succeeded."
    )


async def test_the_clock_goes_on_between_polls_and_a_silence_is_told(
    sim: Simulator, page: Page
) -> None:
    """Of a server that does not answer, so that nobody takes what was seen last for the present."""
    await page.clock.install()
    await page.reload()
    held = sim.add_execution(HELD)
    await add(page, held)
    await expect(status(page, held, "plan")).to_have_text("Running")
    sim.inject(Fault.stall())
    await sim.wait_for_requests(sim.request_count + 1)
    running = time_of(page, held, "plan")
    before = await running.text_content()
    await expect(running).not_to_have_text(before or "")
    trouble = card(page, held).locator('[data-part="trouble"]')
    await expect(trouble).to_be_hidden()
    await page.clock.fast_forward(20_000)
    await expect(trouble).to_contain_text("PromptLayer has not answered for 2")
    await expect(running).to_have_text(re.compile(r"^2\d\.\d s$"))


async def test_the_time_line_shows_when_each_node_ran(sim: Simulator, page: Page) -> None:
    """The second node's bar begins where the first one's ends; a reload changes nothing of it."""
    held = sim.add_execution(HELD)
    await add(page, held)
    await expect(status(page, held, "plan")).to_have_text("Running")
    await expect(time_of(page, held, "plan")).to_have_text(re.compile(r"0\.[2-9] s"))
    sim.finish(held, "plan")
    await expect(status(page, held, "answer")).to_have_text("Running")
    await expect(time_of(page, held, "answer")).to_have_text(re.compile(r"0\.[2-9] s"))
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
    await expect(state(page, held)).to_have_text("Succeeded")
    assert [await ends("plan"), await ends("answer")] == before
    assert sim.request_count == requests


async def test_a_failed_node_shows_its_error(sim: Simulator, page: Page) -> None:
    """The message at once, and the traceback when it is opened; in words, not only in red."""
    failing = sim.add_execution(FAILING)
    await add(page, failing)
    await expect(state(page, failing)).to_have_text("Failed")
    row = node(page, failing, "fetch")
    await expect(row.locator('[data-part="status"]')).to_have_text("Failed")
    await expect(row.locator('[data-part="preview"]')).to_have_text(
        "The index is not there: HTTP 503"
    )
    await row.locator("summary").click()
    await expect(row.locator('[data-part="trace"]')).to_have_text(
        "Traceback: ...\nOSError: HTTP 503"
    )
    await expect(status(page, failing, "answer")).to_have_text("Skipped")


async def test_an_unknown_status_is_shown_as_it_is(sim: Simulator, page: Page) -> None:
    """And counts as not final."""
    odd = sim.add_execution(Scenario([SimNode("approve", status="AWAITING_APPROVAL")]))
    await add(page, odd)
    await expect(status(page, odd, "approve")).to_have_text("AWAITING_APPROVAL")
    await expect(state(page, odd)).to_have_text("Running")


async def test_a_value_is_text_whatever_it_holds(sim: Simulator, page: Page) -> None:
    """Markup is shown, and copied, letter by letter; so are names, and numbers of any size."""
    nodes = [SimNode(HOSTILE, HOSTILE), SimNode("number", {"n": 2**63 + 1}, is_output_node=True)]
    hostile = sim.add_execution(Scenario(nodes))
    await add(page, hostile)
    row = node(page, hostile, HOSTILE)
    await row.locator("summary").click()
    await expect(row.locator('[data-part="value"]')).to_have_text(HOSTILE)
    await row.get_by_role("button", name="Copy").click()
    await expect(row.locator('[data-part="copied"]')).to_have_text("Copied")
    assert await page.evaluate("navigator.clipboard.readText()") == HOSTILE
    assert await page.locator("script, img").count() == 1
    assert await page.title() == "Executions"
    await expect(node(page, hostile, "number").locator('[data-part="value"]')).to_have_text(
        json.dumps({"n": 2**63 + 1}, indent=2)
    )


async def test_a_long_value_is_there_as_a_whole(sim: Simulator, page: Page) -> None:
    """Its start is shown first; all of it on demand, and all of it is copied."""
    long = sim.add_execution(Scenario([SimNode("essay", LONG, is_output_node=True)]))
    await add(page, long)
    row = node(page, long, "essay")
    await row.locator("summary").click()
    value = row.locator('[data-part="value"]')
    assert await value.evaluate("(one) => one.textContent.length") == 10_000
    await row.get_by_role("button", name="Copy").click()
    await expect(row.locator('[data-part="copied"]')).to_have_text("Copied")
    assert await page.evaluate("navigator.clipboard.readText()") == LONG
    await row.get_by_role("button", name=f"Show all {len(LONG):,} characters").click()
    await expect(value).to_be_focused()
    assert await value.evaluate("(one) => one.textContent") == LONG


async def test_it_comes_back_when_the_viewer_was_started_again(
    sim: Simulator, viewer: Any, page: Page, complaints: Any
) -> None:
    """It says what it waits for, and takes up what it showed, in the same order."""
    complaints.expected = ("ERR_", "Failed to load resource")
    first, second = sim.add_execution(HELD), sim.add_execution(HELD)
    await add(page, first)
    await expect(card(page, first)).to_be_visible()
    await add(page, second)
    await expect(status(page, second, "plan")).to_have_text("Running")
    await viewer.stop()
    await expect(page.locator("#connection")).to_contain_text("The viewer has ended")
    time = time_of(page, second, "plan")
    frozen = await time.text_content()
    sim.finish(first, "plan")
    await viewer.start()
    assert await time.text_content() == frozen
    await expect(page.locator("#connection")).to_have_text("Live")
    await expect(status(page, first, "answer")).to_have_text("Running")
    await expect(status(page, second, "plan")).to_have_text("Running")
    shown = await page.locator(".card").evaluate_all("(all) => all.map((one) => one.dataset.id)")
    assert shown == [str(second), str(first)]


async def test_a_new_token_is_asked_for(viewer: Any, page: Page, complaints: Any) -> None:
    """Where it was started again with another token, the page says so and stops trying."""
    complaints.expected = ("ERR_", "Failed to load resource")
    await viewer.stop()
    viewer.token = "quite-another-token"
    await viewer.start()
    await expect(page.get_by_role("heading", name="This page needs its token")).to_be_focused()
    await expect(page.locator("#refused-reason")).to_contain_text("has a new token")
    await page.goto(viewer.url)
    await expect(page.locator("#connection")).to_have_text("Live")
    await expect(page.locator("#refused")).to_be_hidden()


async def test_the_token_leaves_the_address_and_lasts_for_the_tab(viewer: Any, page: Page) -> None:
    """No cookie holds it, where other ports of the machine would get it."""
    assert page.url == f"{viewer.origin}/"
    await page.reload()
    await expect(page.locator("#connection")).to_have_text("Live")
    assert await page.context.cookies() == []


@pytest.mark.parametrize("fragment", ["", "#token=wrong"])
async def test_a_page_without_its_token_says_where_it_is(
    context: BrowserContext, viewer: Any, complaints: Any, fragment: str
) -> None:
    """It shows nothing else."""
    complaints.expected = ("401 (Unauthorized)",)
    page = await context.new_page()
    complaints.listen_to(page, viewer.origin)
    await page.goto(f"{viewer.origin}/{fragment}")
    await expect(page.locator("#refused")).to_contain_text("promptlayer-exec view")
    await expect(page.locator("#viewer")).to_be_hidden()


async def test_an_execution_that_is_not_there_is_told_of_at_the_field(
    page: Page, complaints: Any
) -> None:
    """So is what is no id; the field keeps the focus."""
    complaints.expected = ("404 (Not Found)", "422 (")
    field = page.get_by_label("Add an execution")
    error = page.locator("#execution-id-error")
    for wrong, reason in [("77", "the server answered 404 Not Found"), ("x", "a whole number")]:
        await add(page, wrong)
        await expect(error).to_contain_text(reason)
        await expect(field).to_be_focused()
        await expect(field).to_have_attribute("aria-invalid", "true")
    await expect(page.locator(".card")).to_have_count(0)


async def test_a_watch_that_ends_early_says_why_and_can_be_taken_up(
    sim: Simulator, page: Page
) -> None:
    """What was seen stays."""
    held = sim.add_execution(HELD)
    await add(page, held)
    await expect(status(page, held, "plan")).to_have_text("Running")
    sim.inject(Fault.status(403))
    await expect(state(page, held)).to_have_text("Not followed any more")
    await expect(card(page, held).locator('[data-part="trouble"]')).to_contain_text("403 Forbidden")
    await expect(status(page, held, "plan")).to_have_text("Running")
    await card(page, held).get_by_role("button", name="Follow again").click()
    await expect(state(page, held)).to_have_text("Running")
    await expect(card(page, held).locator('[data-part="trouble"]')).to_be_hidden()


async def test_a_run_is_started_by_name_and_inputs(
    sim: Simulator, page: Page, complaints: Any
) -> None:
    """Mistakes are told where they are made; the run is a card, with the server's warning."""
    complaints.expected = ("404 (Not Found)", "422 (")
    sim.add_workflow("write/report", HELD, warning="missing input variables: tone")
    await page.get_by_text("Start a run", exact=True).click()
    workflow, inputs = page.get_by_label("Workflow, by name"), page.get_by_label("Inputs, a JSON")
    start = page.get_by_role("button", name="Start", exact=True)
    await start.click()
    await expect(page.locator("#workflow-error")).to_contain_text("Give the name")
    await workflow.fill("nothing")
    await start.click()
    await expect(page.locator("#workflow-error")).to_contain_text("404 Not Found")
    await expect(workflow).to_be_focused()
    await workflow.fill("write/report")
    for wrong, reason in [
        ('{"topic": otters}', "This is no JSON: Expecting value at line 1, column 11."),
        ("[1]", "The inputs are a JSON object"),
        ('{"a": NaN}', "inputs.a"),
    ]:
        await inputs.fill(wrong)
        await start.click()
        await expect(page.locator("#inputs-error")).to_contain_text(reason)
        await expect(inputs).to_be_focused()
    assert sim.runs == []
    await inputs.fill('{"topic": "otters", "n": 9007199254740993}')
    await start.click()
    await expect(page.locator(".card h2")).to_have_text("write/report")
    (run,) = sim.runs
    assert run.inputs == {"topic": "otters", "n": 9007199254740993}
    await expect(page.locator("#inputs-error")).to_be_empty()
    await expect(card(page, run.execution_id)).to_contain_text("missing input variables: tone")


async def test_a_start_whose_answer_is_lost_is_told_of_wholly(
    sim: Simulator, page: Page, complaints: Any
) -> None:
    """The run may have started: that is said, with what to do."""
    complaints.expected = ("502 (Bad Gateway)",)
    sim.add_workflow("report", HELD)
    await page.get_by_text("Start a run", exact=True).click()
    await page.get_by_label("Workflow, by name").fill("report")
    sim.inject(Fault.disconnect())
    await page.get_by_role("button", name="Start", exact=True).click()
    await expect(page.locator("#start-error")).to_contain_text("may have started and be billed")


async def test_the_filter_finds_names_ids_and_statuses(sim: Simulator, page: Page) -> None:
    """A card as a whole, or some of its nodes; and the chips take one state of them."""
    held, failing = sim.add_execution(HELD), sim.add_execution(FAILING)
    await add(page, held)
    await expect(card(page, held)).to_be_visible()
    await add(page, failing)
    await expect(state(page, failing)).to_have_text("Failed")
    find = page.get_by_label("Filter")
    await find.fill("plan")
    await expect(card(page, failing)).to_be_hidden()
    await expect(node(page, held, "plan")).to_be_visible()
    await expect(node(page, held, "answer")).to_be_hidden()
    await find.fill(str(failing))
    await expect(card(page, held)).to_be_hidden()
    await expect(node(page, failing, "fetch")).to_be_visible()
    await find.fill("skipped")
    await expect(node(page, failing, "answer")).to_be_visible()
    await expect(node(page, failing, "fetch")).to_be_hidden()
    await find.fill("nowhere")
    await expect(page.locator("#empty")).to_have_text("No execution matches the filter.")
    await find.fill("")
    await page.get_by_role("radio", name="Running 1").check()
    await expect(card(page, held)).to_be_visible()
    await expect(card(page, failing)).to_be_hidden()


async def test_a_card_is_removed_and_the_focus_goes_on(sim: Simulator, page: Page) -> None:
    """To the next card, and from the last one to the field; the execution is followed no more."""
    first, second = sim.add_execution(HELD), sim.add_execution(HELD)
    await add(page, first)
    await expect(card(page, first)).to_be_visible()
    await add(page, second)
    await page.get_by_role("button", name=f"Remove execution {second}").click()
    await expect(card(page, second)).to_have_count(0)
    await expect(card(page, first).get_by_role("heading")).to_be_focused()
    await page.get_by_role("button", name=f"Remove execution {first}").click()
    await expect(page.get_by_label("Add an execution")).to_be_focused()
    await expect(page.locator("#empty")).to_contain_text("no execution on this page yet")


async def test_more_executions_than_a_browser_opens_connections(
    sim: Simulator, viewer: Any, page: Page
) -> None:
    """Ten at once are all live, on one connection, and the page still gets an answer."""
    ids = [sim.add_execution(HELD) for _ in range(10)]
    for execution_id in ids:
        viewer.board.follow(execution_id)
    for execution_id in ids:
        await expect(status(page, execution_id, "plan")).to_have_text("Running")
    await add(page, sim.add_execution(FAILING))
    await expect(page.locator(".card")).to_have_count(11)


async def test_what_is_out_of_sight_is_not_drawn(sim: Simulator, viewer: Any, page: Page) -> None:
    """Neither cards nor nodes: hundreds of them, each with news all the time, stop a browser."""
    many = sim.add_execution(Scenario([SimNode(f"node {index}") for index in range(100)]))
    for execution_id in (many, sim.add_execution(FAILING)):
        viewer.board.follow(execution_id)
        await expect(card(page, execution_id).locator(".node").last).to_be_attached()
    ends_are_drawn = """([selector, ...wanted]) => {
        const all = [...document.querySelectorAll(selector)];
        return [all.at(0), all.at(-1)].every((one, index) => wanted[index] === null
            || wanted[index] === one.checkVisibility({ contentVisibilityAuto: true }));
    }"""
    for selector in (".card > header", ".card:first-child .node > details"):
        await page.evaluate("scrollTo(0, 0)")
        await page.wait_for_function(ends_are_drawn, arg=[selector, True, False], timeout=5000)
        await page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        await page.wait_for_function(ends_are_drawn, arg=[selector, None, True], timeout=5000)


async def focused(page: Page) -> str:
    """Return what has the focus, if it can be seen to have it."""
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


async def test_everything_is_reached_and_done_by_keyboard(sim: Simulator, page: Page) -> None:
    """In the order of the page, and with a ring around what has the focus."""
    execution_id = sim.add_execution(Scenario([SimNode("essay", "text", is_output_node=True)]))
    await page.locator("#filter").focus()
    await page.keyboard.press("Tab")
    await page.keyboard.type(str(execution_id))
    await page.keyboard.press("Enter")
    await expect(state(page, execution_id)).to_have_text("Succeeded")
    await expect(page.locator("#execution-id")).to_be_empty()
    order = []
    for _ in range(5):
        await page.keyboard.press("Tab")
        order.append(await focused(page))
    assert order[0] == "BUTTON Add"
    assert order[1] == "SUMMARY Start"
    assert order[2].startswith("INPUT")
    assert order[3:] == ["remove", "SUMMARY Success"]
    details = node(page, execution_id, "essay").locator("details")
    await page.keyboard.press("Enter")
    await expect(details).to_have_attribute("open", "")
    await page.keyboard.press("Space")
    await expect(details).not_to_have_attribute("open", "")
    await page.keyboard.press("Space")
    await expect(details).to_have_attribute("open", "")
    for expected in ("value", "copy"):
        await page.keyboard.press("Tab")
        assert await focused(page) == expected
    await page.keyboard.press("Enter")
    await expect(page.locator('[data-part="copied"]')).to_have_text("Copied")
    await page.locator("#start summary").focus()
    await page.keyboard.press("Enter")
    for expected in ("workflow", "inputs", "BUTTON Start"):
        await page.keyboard.press("Tab")
        assert await focused(page) == expected


async def fill(sim: Simulator, viewer: Any, page: Page) -> None:
    """Show something of everything: all states, long words, open details, errors of forms."""
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
    await expect(state(page, 77)).to_have_text("Not followed any more")
    await expect(status(page, lost, "plan")).to_have_text("Running")
    await expect(state(page, failing)).to_have_text("Failed")
    await node(page, held, word).locator("summary").click()
    await node(page, failing, "fetch").locator("summary").click()
    await add(page, "x" + word)
    await page.get_by_text("Start a run", exact=True).click()
    await page.get_by_label("Inputs, a JSON").fill("{")
    await page.get_by_label("Workflow, by name").fill(word)
    await page.get_by_role("button", name="Start", exact=True).click()
    await expect(page.locator("#inputs-error")).not_to_be_empty()
    await expect(page.locator("#execution-id-error")).not_to_be_empty()


@pytest.mark.parametrize("width", [1280, 700, 360])
async def test_it_fits_and_axe_finds_nothing(
    sim: Simulator, viewer: Any, page: Page, complaints: Any, width: int
) -> None:
    """No scrolling sideways, and no violation, contrast included, in the light and in the dark."""
    complaints.expected = ("422 (",)
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


async def test_axe_finds_nothing_where_the_token_is_missing(
    context: BrowserContext, viewer: Any, complaints: Any
) -> None:
    """That page is a page, too."""
    page = await context.new_page()
    complaints.listen_to(page, viewer.origin)
    await page.goto(viewer.origin)
    await expect(page.locator("#refused")).to_be_visible()
    assert (await Axe().run(page)).response["violations"] == []


async def test_another_site_gets_nothing(
    context: BrowserContext, sim: Simulator, viewer: Any
) -> None:
    """Neither an answer that it can read, nor a frame, nor a run, even with the token."""
    sim.add_workflow("report", HELD)
    page = await context.new_page()
    await page.goto(sim.base_url)  # any other origin
    read = await page.evaluate(
        """async ([url, token]) => {
            const headers = { Authorization: `Bearer ${token}` };
            const body = JSON.stringify({ workflow: "report", inputs: "{}" });
            const plain = { method: "POST", mode: "no-cors", body };
            await fetch(`${url}/api/runs`, plain).catch(() => null);
            const asked = (path, init) =>
                fetch(url + path, init).then((answer) => answer.status, () => "refused");
            const start = { method: "POST", headers, body };
            return [await asked("/viewer.js", {}), await asked("/api/runs", start)];
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


async def test_the_demonstration_runs_and_ends_with_a_page_open(
    browser: Browser, complaints: Any
) -> None:
    """It needs no key; one agent of it fails, and Ctrl-C ends it within seconds, with code 0."""
    complaints.expected = ("ERR_", "Failed to load resource")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PROMPTLAYER")}
    command = [sys.executable, "-W", "error", "-m", "promptlayer_exec", "view", "--demo"]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        page = await browser.new_page()
        complaints.listen_to(page, url.partition("/#")[0])
        await page.goto(url)
        failed = page.locator('.card[data-state="failed"]')
        await expect(failed.get_by_role("heading")).to_have_text("invoice-check")
        await expect(page.locator('.card[data-state="running"]').first).to_be_visible()
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(5):
            _, errors = await process.communicate()
        assert process.returncode == 0
        assert errors == b"Open this page, which is for you alone (Ctrl-C ends it):\n"
        await expect(page.locator("#connection")).to_contain_text("The viewer has ended")
        await page.close()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
