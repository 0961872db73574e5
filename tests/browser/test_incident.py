"""What somebody on call needs of the page while several runs fail."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.async_api import Locator, Page, expect

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Offers:
    """Runs of the workflow `churn-offer`: each loads a customer, and chooses an offer or fails."""

    def __init__(self, sim: Simulator, viewer: Any) -> None:
        self._board = viewer.board
        self._next = Scenario([])
        sim.add_workflow("churn-offer", lambda _: self._next)

    async def start(self, reason: str | None = None, *, seats: int = 12, **inputs: Any) -> int:
        """Start a run, which fails if it gets a reason."""
        failed = {"status": "FAILED", "error_message": reason} if reason else {}
        self._next = Scenario(
            [
                SimNode("load customer", {"seats": seats}, 0.1),
                SimNode("choose offer", "annual", 0.1, after=["load customer"], **failed),
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
    opened = line(page, ids[1])
    await opened.scroll_into_view_if_needed()
    before = await opened.bounding_box()
    title = opened.locator('[data-part="title"]')
    if key == "mouse":
        await opened.locator('[data-part="when"]').click()
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
    """The first node with another value is open. An error is not compared with a value."""
    good = await offers.start()
    failed = await offers.start("division by zero", seats=0)
    await ui.open(f"#/compare/{good}/{failed}")
    first = page.locator('.pair[data-name="load customer"]')
    await expect(first.locator(".diff.changed")).to_have_count(2)
    symptom = page.locator('.pair[data-name="choose offer"]')
    await expect(symptom.locator("details")).not_to_have_attribute("open", "")

    await symptom.locator("summary").click()
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
