"""What somebody on call needs of the page while several runs fail."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from playwright.async_api import BrowserContext, Locator, Page, expect

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Offers:
    """Runs of the workflow `churn-offer`: each loads a customer, and chooses an offer or fails."""

    def __init__(self, sim: Simulator, viewer: Any) -> None:
        self._board = viewer.board
        self.seconds: float | None = 0.1  # of each node
        self._next = Scenario([])
        sim.add_workflow("churn-offer", lambda _: self._next)

    async def start(self, reason: str | None = None, *, seats: int = 12, **inputs: Any) -> int:
        """Start a run, which fails if it gets a reason."""
        failed = {"status": "FAILED", "error_message": reason} if reason else {}
        self._next = Scenario(
            [
                SimNode("load customer", {"seats": seats}, self.seconds),
                SimNode("choose offer", "annual", self.seconds, after=["load customer"], **failed),
            ]
        )
        execution = await self._board.start("churn-offer", inputs or {"customer": "acme"})
        return execution.id


@pytest.fixture
def offers(sim: Simulator, viewer: Any) -> Offers:
    """Return what starts runs of the workflow."""
    return Offers(sim, viewer)


def line(page: Page, execution_id: int) -> Locator:
    """Return the line of an execution."""
    return page.locator(f'.line[data-id="{execution_id}"]')


@pytest.mark.parametrize("key", ["mouse", "keyboard"])
async def test_back_returns_to_the_line(offers: Offers, ui: Any, page: Page, key: str) -> None:
    """Back scrolls to the line that was opened, and focuses its link."""
    reasons = ["overloaded", "forbidden", "empty", "malformed", "refused", "expired"] * 4
    ids = [
        await offers.start(f"{reason} by {'x' * number}") for number, reason in enumerate(reasons)
    ]
    await page.emulate_media(reduced_motion="reduce")
    await expect(page.locator('[data-count="failed"]')).to_have_text(str(len(ids)))
    await expect(page.locator('.line[data-state="failed"]')).to_have_count(len(ids))
    opened = line(page, ids[1])
    await opened.scroll_into_view_if_needed()
    before = await opened.bounding_box()
    title = opened.locator('[data-part="title"]')
    if key == "mouse":
        await opened.locator('[data-part="count"]').click()
    else:
        await title.focus()
        await page.keyboard.press("Enter")
    await expect(ui.part("state")).to_have_text("Failed")

    await page.go_back()
    await expect(title).to_be_focused()
    await expect(opened).to_be_in_viewport()
    after = await opened.bounding_box()
    assert before is not None
    assert after is not None
    assert abs(after["y"] - before["y"]) < 5


async def test_the_focused_line_has_a_ring(offers: Offers, page: Page) -> None:
    """A line that the keyboard reaches is outlined as a whole, where nothing clips the ring."""
    failed = await offers.start("overloaded")
    await expect(line(page, failed)).to_be_visible()
    await page.keyboard.press("j")
    head = line(page, failed).locator(".line-head")
    await expect(head).to_have_css("outline-style", "solid")
    await expect(head).to_have_css("outline-offset", "-2px")


async def test_the_failed_node_keeps_its_columns_on_a_wide_screen(
    offers: Offers, ui: Any, page: Page
) -> None:
    """The times of all nodes stand below each other, also of the one that is selected."""
    offers.seconds = 0.6
    failed = await offers.start("overloaded")
    await page.set_viewport_size({"width": 1920, "height": 900})
    await ui.open_run(failed, "?node=choose%20offer")
    await expect(ui.row("choose offer")).to_have_class(re.compile("selected"))
    await expect(ui.part("state")).to_have_text("Failed")
    times = ui.run.locator('.node [data-part="time"]')
    await expect(times).to_have_text([re.compile(r"\d s"), re.compile(r"\d s")])
    lefts = await times.evaluate_all("(all) => all.map((one) => one.getBoundingClientRect().left)")
    assert lefts[0] == lefts[1]


async def test_compare_opens_what_differs_first(offers: Offers, ui: Any, page: Page) -> None:
    """The first node with another value, and the one that failed; an error is no other value."""
    good = await offers.start()
    failed = await offers.start("division by zero", seats=0)
    await ui.open(f"#/compare/{good}/{failed}")
    first = page.locator('.pair[data-name="load customer"]')
    await expect(first.locator(".diff.changed")).to_have_count(2)
    symptom = page.locator('.pair[data-name="choose offer"]')
    boxes = symptom.locator("pre")
    await expect(boxes).to_have_text(["annual", "division by zero"])
    await expect(symptom.locator(".diff.changed")).to_have_count(0)
    await expect(boxes.last).to_have_attribute("aria-label", "The error of choose offer")


async def test_all_lost_runs_are_followed_again_by_one_click(
    sim: Simulator, viewer: Any, page: Page
) -> None:
    """One button follows all of them again."""
    ids = [
        sim.add_execution(Scenario([SimNode("plan", "x", None)])),
        sim.add_execution(Scenario([SimNode("plan", "x", None)])),
    ]
    sim.inject(Fault.status(401, times=None))
    for execution_id in ids:
        viewer.board.follow(execution_id)
    await expect(page.locator('.line[data-state="lost"]')).to_have_count(2)
    await expect(page.locator("#outage")).to_contain_text("Start the viewer again")

    sim.clear_faults()
    await page.get_by_role("button", name="Follow all again").click()
    await expect(page.locator('.line[data-state="running"]')).to_have_count(2)
    await expect(page.locator("#outage")).to_be_hidden()


async def test_a_key_that_works_again_needs_no_click(
    sim: Simulator, viewer: Any, page: Page, context: BrowserContext
) -> None:
    """The page tries a refused key every 15 seconds, and then follows the runs again."""
    await context.clock.install()  # for all pages of the context, which is the test's own
    await page.reload()
    sim.inject(Fault.status(401, times=None))
    viewer.board.follow(sim.add_execution(Scenario([SimNode("plan", "x", None)])))
    await expect(page.locator('.line[data-state="lost"]')).to_be_visible()
    await expect(page.locator("#outage")).to_contain_text("Start the viewer again")

    sim.clear_faults()
    await page.clock.fast_forward(15_000)
    await expect(page.locator('.line[data-state="running"]')).to_be_visible()
    await expect(page.locator("#outage")).to_be_hidden()


async def fail_together(offers: Offers, count: int) -> list[int]:
    """Start a run that succeeds, and then some that fail for one cause; return the latter."""
    await offers.start(customer="acme", plan="pro")
    return [
        await offers.start(f"no seats for {n}", seats=0, customer=f"globex {n}", plan="free")
        for n in range(count)
    ]


async def test_failures_of_one_cause_are_one_line(offers: Offers, page: Page) -> None:
    """It has their number, reason, and whom it hits, and unfolds into their lines."""
    ids = await fail_together(offers, 4)
    incident = page.locator(".incident")
    await expect(incident).to_have_count(1)
    await expect(incident).to_contain_text("4 failed")
    await expect(incident.locator('[data-part="reason"]')).to_have_text("no seats for …")
    hits = "Hits customer: globex 3, globex 2, globex 1 and 1 more. All have plan: free."
    await expect(incident.locator('[data-part="hits"]')).to_have_text(hits)
    await expect(incident).to_contain_text("all 4 runs failed for this reason. The last success")
    difference = (
        "Differs from the last success in input plan: free ← pro; load customer: seats 0 ← 12"
    )
    await expect(incident.locator('[data-part="difference"]')).to_have_text(difference)
    await expect(page.locator('[data-count="failed"]')).to_have_text("4")
    for execution_id in ids:
        await expect(line(page, execution_id)).to_be_hidden()

    fold = incident.get_by_role("button", name="The 4 runs of churn-offer")
    await fold.press("Enter")
    await expect(fold).to_be_focused()
    for execution_id in ids:
        await expect(line(page, execution_id)).to_be_visible()
    await page.get_by_label("Filter").fill("globex 2")
    await expect(incident).to_have_count(0)
    await expect(page.locator(".line:visible")).to_have_count(1)


async def test_a_group_has_the_moment_of_its_latest_run_that_is_shown(
    sim: Simulator, viewer: Any, page: Page
) -> None:
    """What the filter hides does not count."""
    sim.add_workflow("old", Scenario([SimNode("a", status="FAILED", error_message="no")]))
    sim.add_workflow("new", Scenario([SimNode("a", status="FAILED", error_message="no")]))
    old = await viewer.board.start("old", {})
    viewer.board.cards[old.id].ended = time.time() - 1020
    await viewer.board.start("new", {})
    latest = page.locator('.group[data-group="failed"] [data-part="latest"]')
    await expect(latest).to_have_text("latest just now")
    await page.get_by_label("Filter").fill("old")
    await expect(latest).to_have_text("latest 17 minutes ago")


# What is beneath the dialog takes a click.
COVER = """() => {
    const cover = document.createElement("div");
    cover.id = "cover";
    cover.style.cssText = "position: fixed; inset: 0";
    cover.addEventListener("click", () => (cover.dataset.hit = "yes"));
    document.body.append(cover);
}"""


async def test_all_runs_of_a_cause_start_again_after_a_question(
    sim: Simulator, offers: Offers, page: Page
) -> None:
    """It has their number, version and cost. Nothing runs twice, and what fails again moves."""
    await fail_together(offers, 3)
    await expect(page.locator(".incident")).to_contain_text("3 failed")
    again = page.get_by_role("button", name="Run all again: churn-offer")
    await again.click()
    dialog = page.get_by_role("dialog")
    question = (
        "This starts 3 new runs with the same inputs, with the latest version. You pay for each"
    )
    await expect(dialog).to_contain_text(question)
    await dialog.get_by_role("button", name="Cancel").click()
    assert len(sim.runs) == 4

    await again.click()
    await page.evaluate(COVER)
    await dialog.get_by_role("button", name="Start 3 new runs").dblclick()
    await expect(page.locator("#cover")).not_to_have_attribute("data-hit", "yes")
    await page.locator("#cover").evaluate("(cover) => cover.remove()")
    await expect(page.locator('[data-count="failed"]')).to_have_text("6")
    inputs = [run.inputs["customer"] for run in sim.runs[4:]]
    assert inputs == ["globex 2", "globex 1", "globex 0"]
    # The pointer and the focus are still on the line.
    await expect(page.locator(".incident")).to_contain_text("6 failed, 3 inputs")
    await expect(page.locator('.group[data-group="running"]')).to_be_hidden()
    await again.click()
    await expect(dialog).to_contain_text("Left out of the 6 that failed: 3 had the same inputs")
    await dialog.get_by_role("button", name="Cancel").click()

    await offers.start(customer="acme", plan="pro")  # all runs succeed now
    await again.click()
    await dialog.get_by_role("button", name="Start 3 new runs").click()
    await expect(page.locator('[data-count="succeeded"]')).to_have_text("5")
    await again.click()
    done = "nothing to run again. Left out of the 6 that failed: 6 ran again since (6 succeeded)"
    notice = page.locator("#notice")
    await expect(notice).to_contain_text(done)
    await expect(notice).not_to_have_class(re.compile("problem"))
    await page.get_by_label("Filter").click()
    await expect(notice).to_be_hidden()


async def test_the_question_mentions_an_outage(
    sim: Simulator, viewer: Any, offers: Offers, page: Page, browser_errors: Any
) -> None:
    """What may have started is counted as such, and is left out of the next question."""
    browser_errors.expected = ("502 (",)
    await fail_together(offers, 2)
    await expect(page.locator(".incident")).to_contain_text("2 failed")
    again = page.get_by_role("button", name="Run all again: churn-offer")
    dialog = page.get_by_role("dialog")
    notice = page.locator("#notice")
    sim.inject(Fault.status(503, retry_after=60.0, times=None))
    viewer.board.follow(sim.add_execution(Scenario([SimNode("plan", "x", None)])))
    await expect(page.locator("#outage")).to_contain_text("503")
    await again.click()
    trouble = "PromptLayer has errors: The server returned 503"
    await expect(dialog).to_contain_text(trouble)
    sim.clear_faults()
    sim.inject(Fault.disconnect(), path="/run")
    await dialog.get_by_role("button", name="Start 2 new runs").click()
    await expect(notice).to_contain_text("0 of 2 new runs started")
    await expect(notice).to_contain_text("more. One may have started.")
    await expect(notice).to_have_class(re.compile("problem"))
    await again.click()
    await expect(dialog).to_contain_text("1 may have run again")


@pytest.mark.parametrize("width", [1280, 390])
async def test_a_cause_has_a_page(offers: Offers, ui: Any, page: Page, width: int) -> None:
    """It has when it began, whom it hit and its runs. Back returns to its line."""
    await page.set_viewport_size({"width": width, "height": 844})
    ids = await fail_together(offers, 2)
    again = page.locator(".incident").get_by_role("button", name="Run all again")
    size = await again.bounding_box()
    assert size is not None
    assert size["height"] >= 24  # a finger's
    title = page.locator(".incident").get_by_role("link", name="churn-offer", exact=True)
    await title.click()
    await expect(page.locator("#cause-reason")).to_have_text("no seats for …")
    await expect(page.locator("#cause-facts")).to_contain_text("all 2 runs failed for this reason")
    await expect(page.locator("#cause-difference")).to_contain_text("seats 0 ← 12")
    await expect(page.get_by_role("img", name="At most 2 failures an hour")).to_be_visible()
    await page.get_by_role("button", name="Copy summary").click()
    await expect(page.locator("#cause-copied")).to_have_text("Copied")
    assert f"Failed executions: {ids[1]}, {ids[0]}. {page.url}" in await ui.copied()
    await ui.check("cause")
    names = page.locator("#cause-runs .name")
    await expect(names).to_have_text([f"Execution {one}" for one in reversed(ids)])
    await names.first.get_by_role("link").click()
    await expect(ui.part("state")).to_have_text("Failed")

    await page.go_back()
    await expect(names.first.get_by_role("link")).to_be_focused()
    await page.go_back()
    await expect(title).to_be_focused()
    await ui.check("board")


async def test_the_history_shows_causes_inputs_and_errors(
    offers: Offers, ui: Any, page: Page
) -> None:
    """What made runs fail today is above the list, whose lines have the inputs and the error."""
    await fail_together(offers, 2)
    await expect(page.locator('[data-count="failed"]')).to_have_text("2")
    await ui.open("#/history")
    cause = page.locator("#failing-list li")
    await expect(cause).to_contain_text(re.compile("2 . churn-offer in choose offer.*no seats for"))
    entry = page.locator('.entry[data-state="failed"]').first
    await expect(entry.locator('[data-part="preview"]')).to_have_text(
        "choose offer: no seats for 1"
    )
    await expect(entry.locator('[data-part="line-inputs"]')).to_contain_text('"globex 1"')
    await cause.get_by_role("link").click()
    await expect(page.locator("#cause-reason")).to_have_text("no seats for …")


async def test_the_sentence_leads_to_the_cause(offers: Offers, ui: Any, page: Page) -> None:
    """It counts how many runs failed for the same reason."""
    await offers.start()
    await offers.start("overloaded")
    failed = (await fail_together(offers, 2))[-1]
    await ui.open_run(failed)
    sentence = ui.part("sentence")
    await expect(sentence).to_contain_text("3 of the latest 5 runs failed, 2 for this reason.")
    await sentence.get_by_role("link", name="2 for this reason").click()
    await expect(page.locator("#cause-reason")).to_have_text("no seats for …")


async def test_slow_runs_are_a_group(
    sim: Simulator, viewer: Any, offers: Offers, page: Page
) -> None:
    """They have a chip and a count, and leave the group of running ones."""
    for number in range(3):
        viewer.board.history.record(
            execution_id=sim.add_execution(Scenario([SimNode("load customer")])),
            workflow="churn-offer",
            outcome="succeeded",
            began=1000.0 + number,
            is_started=True,
            duration=0.05,
            times="{}",
        )
    offers.seconds = None
    slow = await offers.start()
    group = page.locator('.group[data-group="slow"]')
    await expect(group.locator(f'.line[data-id="{slow}"]')).to_be_visible()
    await expect(page.locator('[data-count="slow"]')).to_have_text("1")
    await expect(page.locator('[data-count="running"]')).to_have_text("0")
    await page.get_by_label("Slow 1").check()
    await expect(page.locator(".line:visible")).to_have_count(1)
