"""The sentence of a run: which node, why, since when, whether that is normal, and what next."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from playwright.async_api import BrowserContext, Locator, Page, expect
from pytest_asyncio import fixture

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Not for how long: nobody knows that.
LAST_SEEN = re.compile(r"Last seen running in call the model( and \d+ other nodes?)?\.$")
LIMIT = "rate limit reached (429)"
TRACE = "Traceback (most recent call last):\n" + "".join(
    f'  File "step_{number}.py", line {number}, in call\n    raise_for_status()\n'
    for number in range(60)
)
SIZES = [{"width": 1280, "height": 900}, {"width": 390, "height": 844}]
LOOKS = {
    f"{name}-{scheme}": (size, scheme)
    for name, size in zip(("wide", "narrow"), SIZES, strict=True)
    for scheme in ("light", "dark")
}


@fixture(loop_scope="session", params=LOOKS)
async def look(request: pytest.FixtureRequest, page: Page) -> str:
    """Give the page a size and a colour scheme; return their names."""
    size, scheme = LOOKS[request.param]
    await page.set_viewport_size(size)
    await page.emulate_media(color_scheme=scheme)
    return str(request.param)


def forty(*, failing: bool = False) -> Scenario:
    """Return forty nodes one after the other, of which the 25th is held, or fails."""
    nodes = [SimNode("node 0")]
    nodes += [SimNode(f"node {number}", after=[f"node {number - 1}"]) for number in range(1, 40)]
    nodes[24] = SimNode("call the model", None, None, after=["node 23"])
    if failing:
        nodes[24] = SimNode(
            "call the model",
            status="FAILED",
            error_message=LIMIT,
            raw_error_message={"raw": f"{TRACE}RateLimitError: {LIMIT}"},
            after=["node 23"],
        )
    nodes[25] = SimNode("node 25", after=["call the model"])
    return Scenario(nodes)


def remember(sim: Simulator, viewer: Any, workflow: str, seconds: float) -> int:
    """Record three runs that succeeded; return the id of the last one, of 20 minutes ago."""
    execution_id = 0
    for number in range(3):
        execution_id = sim.add_execution(Scenario([SimNode("call the model", "fine")]))
        began = time.time() - 1200 - 3600 * (2 - number) - seconds
        viewer.board.history.record(
            execution_id=execution_id,
            workflow=workflow,
            outcome="succeeded",
            began=began,
            is_started=True,
            duration=seconds,
            origin=began,
            times=json.dumps({"call the model": [1.0, 1.0 + seconds / 2]}),
            nodes=40,
        )
    return execution_id


async def in_sight(place: Locator) -> None:
    """Assert that all of an element is in the viewport, and none of its text is clipped."""
    await expect(place).to_be_visible()
    found = await place.evaluate(
        """(element) => {
            const { top, bottom, left, right } = element.getBoundingClientRect();
            return {
                isInside: top >= 0 && bottom <= innerHeight && left >= 0 && right <= innerWidth,
                isClipped: element.scrollWidth > element.clientWidth + 1
                    && getComputedStyle(element).display !== "inline",
            };
        }"""
    )
    assert found == {"isInside": True, "isClipped": False}


async def start(sim: Simulator, viewer: Any, scenario: Scenario) -> int:
    """Start a run of the workflow `tickets`."""
    sim.add_workflow("tickets", scenario)
    execution = await viewer.board.start("tickets", {"topic": "otters"})
    return execution.id


@pytest.mark.usefixtures("look")
async def test_a_failed_run_is_one_sentence(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """Its line, and its page, name the node, the reason, the moment and the next actions."""
    success = remember(sim, viewer, "tickets", seconds=8)
    failed = await start(sim, viewer, forty(failing=True))
    words = re.compile(
        rf"^Failed just now in call the model: {re.escape(LIMIT)}\."
        r" 1 of the latest 4 runs failed\."
        r" The last success was 20 minutes ago: Compare · Run again\.$"
    )
    sentence = page.locator(f'.line[data-id="{failed}"] [data-part="sentence"]')
    await expect(sentence).to_have_text(words)
    await in_sight(sentence)
    await expect(page.locator("#group-failed")).to_contain_text("latest just now")
    assert str(time.localtime().tm_year) in (await sentence.get_attribute("title") or "")
    await sentence.get_by_role("link", name="call the model").click()
    await expect(page).to_have_url(re.compile(r"node=call"))
    about = ui.part("sentence")
    await expect(about).to_have_text(re.compile(r"20 minutes ago: Compare\.$"))
    await in_sight(about)
    await ui.part("sentence").get_by_role("link", name="Compare").click()
    await expect(page).to_have_url(re.compile(f"#/compare/{success}/{failed}"))


@pytest.mark.usefixtures("look")
async def test_a_failed_run_opens_at_its_cause(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """Inputs and the traceback's last line are in sight, and differences from the last success."""
    sim.add_workflow(
        "flow",
        lambda inputs: forty(failing=inputs["topic"] == "newts"),
        definition=forty(),
    )
    success = await viewer.board.start("flow", {"topic": "otters"})
    sim.finish(success.id, "call the model")
    await expect(page.locator('.line[data-state="succeeded"]')).to_be_visible()
    failed = await viewer.board.start("flow", {"topic": "newts"})
    await expect(page.locator('.line[data-state="failed"]')).to_be_visible()
    await ui.open_run(failed.id)
    trace = ui.selected.locator('[data-part="trace"]')
    await expect(trace).to_contain_text(f"RateLimitError: {LIMIT}")
    await in_sight(trace)
    at_the_end = "(one) => one.scrollTop + one.clientHeight >= one.scrollHeight - 2"
    assert await trace.evaluate(at_the_end)
    assert await trace.evaluate("(one) => one.scrollHeight > one.clientHeight")
    await in_sight(page.get_by_role("button", name="Copy the traceback of call the model"))
    await in_sight(ui.part("inputs").locator(".leaf", has_text='"newts"'))
    shown = ui.selected.get_by_text(LIMIT).filter(visible=True)
    await expect(shown).to_have_count(1)  # and once above, as the reason
    await ui.part("sentence").get_by_role("link", name="Compare").click()
    await expect(page.locator("#compare-summary")).to_have_text(
        "The inputs and 16 of 40 nodes differ."
    )
    await expect(page.locator("#compare .pair").first).to_have_class(re.compile("differs|inputs"))
    await expect(page.locator('.pair[data-name="node 3"]')).to_be_hidden()
    await page.get_by_text("24 nodes are equal").click()
    await expect(page.locator('.pair[data-name="node 3"]')).to_be_visible()


@pytest.mark.usefixtures("look")
async def test_a_running_run_names_its_node_and_what_is_usual(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """Beyond three times the usual time it turns amber; the graph shows the node."""
    remember(sim, viewer, "tickets", seconds=0.2)
    held = await start(sim, viewer, forty())
    sentence = page.locator(f'.line[data-id="{held}"] [data-part="sentence"]')
    words = re.compile(
        r"^Running in call the model for [\d.]+ s \(usually 0\.1 s\)\."
        r" The last success was 20 minutes ago: Compare\.$"
    )
    await expect(sentence).to_have_text(words)
    await in_sight(sentence)
    await expect(page.locator(".line.slow")).to_have_count(1)
    await ui.open_run(held)
    await expect(ui.part("sentence")).to_have_text(words)
    await expect(ui.part("usual")).to_have_text("usually 0.2 s")
    await in_sight(ui.part("sentence"))
    await in_sight(ui.run.get_by_text('"otters"').filter(visible=True).first)
    drawn = ui.drawn("call the model")
    await expect(drawn).to_be_visible()
    assert await drawn.evaluate(
        """(node) => {
            const box = node.getBoundingClientRect();
            const frame = node.closest(".graph").getBoundingClientRect();
            return box.left >= frame.left && box.right <= frame.right
                && box.top >= frame.top && box.bottom <= frame.bottom;
        }"""
    )
    await ui.part("sentence").get_by_role("link", name="call the model").click()
    await expect(ui.selected.locator("h3")).to_have_text("call the model")


async def test_a_notification_has_the_sentence(
    sim: Simulator, viewer: Any, page: Page, context: BrowserContext
) -> None:
    """It names the node and the reason."""
    await context.grant_permissions(["notifications"])
    await page.evaluate(
        """() => {
            localStorage.setItem("notify", "1");
            window.told = [];
            window.Notification = class {
                static permission = "granted";
                constructor(title, { body }) { window.told.push(`${title} | ${body}`); }
                addEventListener() {}
            };
            document.hasFocus = () => false;
        }"""
    )
    sim.add_workflow(
        "tickets",
        lambda _: Scenario([SimNode("call the model", None, None, is_output_node=True)]),
    )
    execution = await viewer.board.start("tickets", {})
    await expect(page.locator(".line")).to_have_attribute("data-state", "running")
    sim.finish(execution.id, "call the model", status="FAILED", error_message=LIMIT)
    await page.wait_for_function("() => window.told.length > 0")
    await page.wait_for_function("() => window.told.length > 0")
    assert await page.evaluate("window.told") == [
        f"tickets {execution.id}: failed | Failed in call the model: {LIMIT}."
    ]


@pytest.mark.usefixtures("look")
async def test_an_outage_is_one_banner(sim: Simulator, viewer: Any, ui: Any, page: Page) -> None:
    """It is complete: the reason, since when, the next attempt, what to do; lines stay as seen."""
    held = [(await start(sim, viewer, forty()))]
    held += [(await viewer.board.start("tickets", {})).id for _ in range(2)]
    sentence = page.locator('.line [data-part="sentence"]')
    await expect(sentence).to_contain_text(["Running in call the model"] * 3)
    sim.inject(Fault.status(503, retry_after=60.0, times=None))
    banner = page.locator("#outage")
    await expect(banner).to_have_text(
        re.compile(
            r"^The server returned 503 .* Since .*\. The next attempt is at \d"
            r".* wait\. Runs "
        )
    )
    await in_sight(banner)
    await expect(page.get_by_text("The server returned 503").filter(visible=True)).to_have_count(1)
    await expect(sentence).to_have_text([LAST_SEEN] * 3)
    await in_sight(sentence.first)
    await ui.open_run(held[0])
    await in_sight(banner)
    await expect(ui.part("sentence")).to_have_text(LAST_SEEN)
    await in_sight(ui.part("sentence"))
    await in_sight(ui.run.get_by_text('"otters"').filter(visible=True).first)
    assert await page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.usefixtures("look")
async def test_a_wrong_key_shows_on_the_empty_board(
    sim: Simulator, viewer: Any, page: Page, browser_errors: Any
) -> None:
    """Before anything is followed, the banner says what to do."""
    browser_errors.expected = ("ERR_CONNECTION_REFUSED",)
    sim.inject(Fault.status(401, times=None))
    await viewer.stop()
    await viewer.start()
    await page.goto("about:blank")
    await page.goto(viewer.url)
    banner = page.locator("#outage")
    await expect(banner).to_contain_text("Check PROMPTLAYER_API_KEY.")
    await in_sight(banner)
    await expect(page.locator("#connection")).to_have_text("PromptLayer refuses the key")


@pytest.mark.usefixtures("look")
async def test_the_first_screen_leads_on(sim: Simulator, viewer: Any, ui: Any, page: Page) -> None:
    """An empty board offers a start and the last executions; `?` shows the keys."""
    remember(sim, viewer, "tickets", seconds=8)
    await page.reload()
    await expect(page.locator(".recent li")).to_have_count(3)
    await in_sight(page.locator(".recent li").last)
    await in_sight(page.locator("#first").get_by_role("link", name="Start a run"))
    await page.keyboard.press("?")
    await expect(page.get_by_role("dialog")).to_contain_text("the next line")
    await page.keyboard.press("Escape")
    await ui.open("#/history")
    await in_sight(page.locator(".entry .name").first)


@pytest.mark.parametrize("size", SIZES, ids=["wide", "narrow"])
async def test_an_id_from_an_alert_has_no_empty_tracks(
    sim: Simulator, ui: Any, page: Page, size: Any
) -> None:
    """Of a run that was over before, values stand where the times would be; one click names it."""
    await page.set_viewport_size(size)
    failing = SimNode("b", status="FAILED", error_message=LIMIT)
    sim.add_workflow("tickets", Scenario([SimNode("a"), SimNode("b"), SimNode("new")]))
    await ui.open_run(sim.add_execution(Scenario([SimNode("a", "a value"), failing])))
    await expect(ui.part("sentence")).to_have_text(f"Failed in b: {LIMIT}.")
    await expect(ui.row("a").locator(".track")).to_be_hidden()
    preview = ui.row("a").locator('[data-part="preview"]')
    await expect(preview).to_be_visible()
    name, status = (ui.row("a").locator(one) for one in (".name", ".status"))
    boxes = [await one.bounding_box() for one in (name, status, preview)]
    assert max(box["height"] for box in boxes if box is not None) < 30  # a line each
    likely = "Probably tickets: 2 of the 2 nodes have the same names."
    await expect(ui.part("suggestion")).to_contain_text(likely)
    await page.get_by_role("button", name="Use tickets").click()
    await expect(ui.part("title")).to_have_text("tickets")
    await expect(ui.drawn("b")).to_have_attribute("data-status", "FAILED")


@pytest.mark.usefixtures("look")
async def test_a_batch_says_why_items_failed_and_what_is_next(ui: Any, page: Page) -> None:
    """The counted reasons, the command that goes on, and the first failed item are in sight."""
    counts = {"waiting": 0, "sending": 0, "following": 0}
    counts |= {"succeeded": 18, "failed": 11, "unknown": 1}
    times = {"created": time.time() - 7200, "latest": time.time() - 180}
    batch = {"name": "night", "counts": counts, "workers": 0, **times}
    items = [
        {
            "key": f"answer-{number}",
            "kind": "failed",
            "execution_id": str(1000 + number),
            "error": f"ExecutionFailed: {LIMIT}",
            "node": "grade",
            "reason": LIMIT,
            "finished": times["latest"],
        }
        for number in range(11)
    ]
    groups = [{"text": f"grade: {LIMIT}", "count": 11}, {"text": "connection lost", "count": 1}]
    more = {"items": items, "groups": groups, "matching": 30, "rate": 0.5, "left": None}
    retry = "promptlayer-exec batch retry --failed --name night"
    ways = [{"what": "start failed items again, which you pay for, with", "command": retry}]
    more["states"] = [{"state": "failed", "ways": ways}]
    keys = {"unknown_keys": 0, "unknown_keys_command": ""}
    one = {**batch, **more, **keys, "is_whole": True, "problem": None}
    all_ = {"database": "sqlite:///batches.sqlite", "batches": [batch], **keys}
    await page.route("**/api/batches", lambda route: route.fulfill(json=all_))
    await page.route("**/api/batch?*", lambda route: route.fulfill(json=one))
    await ui.open("#/batches")
    dates = page.locator(".dates")
    await expect(dates).to_have_text("Began 2 hours ago, the latest item finished 3 minutes ago")
    year = str(time.localtime().tm_year)
    for moment in await dates.locator("time").all():
        assert year in (await moment.get_attribute("title") or "")
    await in_sight(dates)
    await page.get_by_role("link", name="night").click()
    await in_sight(page.get_by_role("button", name=re.compile(f"^11 . grade: {re.escape(LIMIT)}$")))
    await in_sight(page.get_by_text(retry))
    sentence = page.locator(".item .sentence").first
    await expect(sentence).to_have_text(f"Failed 3 minutes ago in grade: {LIMIT}.")
    await in_sight(sentence)
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


IN_FRAME = """(element, frame) => {
    const box = element.getBoundingClientRect();
    const { left, right, top, bottom } = element.closest(frame).getBoundingClientRect();
    return box.left >= left && box.right <= right && box.top >= top && box.bottom <= bottom;
}"""


@pytest.mark.parametrize("failing", [False, True], ids=["running", "failed"])
@pytest.mark.parametrize("size", SIZES, ids=["wide", "narrow"])
async def test_graph_and_list_open_at_the_action(
    sim: Simulator, viewer: Any, ui: Any, *, size: Any, failing: bool
) -> None:
    """Both show the node that runs, or that failed, until somebody scrolls the list."""
    page = ui.page
    await page.set_viewport_size(size)
    run = await start(sim, viewer, forty(failing=failing))
    await expect(page.locator(f'.line[data-id="{run}"]')).to_contain_text("call the model")
    await ui.open_run(run)
    await expect(ui.drawn("call the model")).to_be_visible()
    assert await ui.drawn("call the model").evaluate(IN_FRAME, ".graph")
    row = ui.row("call the model")
    await expect(row).to_be_visible()
    is_in_list = f"(row) => ({IN_FRAME})(row, '.scroller')"  # once rows have their heights
    await page.wait_for_function(is_in_list, arg=await row.element_handle())
    assert await row.evaluate("(one) => one.closest('.scroller').scrollTop > 100")
    assert await page.evaluate("scrollY") == 0
