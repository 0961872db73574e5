"""The page of what is remembered, with five hundred executions."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from playwright.async_api import Locator, Page, expect

from promptlayer_exec.simulator import Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")

HOSTILE = "<script>document.title='taken'</script>"
DONE = Scenario([SimNode("answer", "Otters are fine.", is_output_node=True)])


def remember(viewer: Any, count: int = 500) -> None:
    """Remember executions of three workflows: one an hour, each tenth failed."""
    now = time.time()
    for index in range(count):
        is_failed = index % 10 == 9
        viewer.board.history.record(
            execution_id=5000 + index,
            workflow=("report", "review", HOSTILE)[index % 3],
            inputs='{"topic": "otters"}' if index % 2 else None,
            outcome="failed" if is_failed else "succeeded",
            problem=f"plan: HTTP 503 of {HOSTILE}" if is_failed else None,
            began=now - 3600 * (count - index - 0.5),
            duration=2.0 + index % 7,
            is_started=index % 2 == 1,
        )


def entry(page: Page, execution_id: int) -> Locator:
    """Return the line of an execution."""
    return page.locator(f'.entry[data-id="{execution_id}"]')


def count(page: Page, outcome: str) -> Locator:
    """Return how many executions have an outcome."""
    return page.locator(f'#outcomes [data-outcome="{outcome}"]')


async def test_five_hundred_executions_are_searched_and_filtered(
    viewer: Any, ui: Any, page: Page
) -> None:
    """By text, outcome, workflow and time; the filters are in the address."""
    remember(viewer)
    await ui.open("#/history")
    await expect(count(page, "all")).to_have_text("500")
    await expect(page.locator(".entry")).to_have_count(100)
    await expect(page.locator(".entry").first).to_have_attribute("data-id", "5499")
    await page.get_by_role("button", name="Show more (400 left)").click()
    await expect(page.locator(".entry")).to_have_count(200)
    await expect(entry(page, 5399).get_by_role("link")).to_be_focused()
    await page.get_by_label("Search", exact=True).fill("otters review")
    await expect(count(page, "all")).to_have_text("84")
    await page.get_by_role("radio", name="Failed").check()
    await expect(page.locator(".entry")).to_have_count(17)
    await page.get_by_label("Time", exact=True).select_option("7")
    await expect(count(page, "failed")).to_have_text("6")
    assert page.url.endswith("#/history?search=otters+review&outcome=failed&days=7")
    await page.reload()
    await expect(page.locator(".entry")).to_have_count(6)
    await page.get_by_label("Search", exact=True).fill("nowhere at all")
    await expect(page.locator("#history-empty")).to_have_text("No remembered execution matches.")
    assert await page.title() == "History · Executions"
    assert await page.locator("script").count() == 1


async def test_each_workflow_has_its_durations_as_a_plot(viewer: Any, ui: Any, page: Page) -> None:
    """Points are colored by outcome, hollow where only a minimum is known; a click filters."""
    remember(viewer, 60)
    await ui.open("#/history")
    trend = page.locator(".trend").filter(has_text="report")
    await expect(trend).to_be_visible()
    await page.reload()
    await expect(trend).to_be_visible()
    await page.get_by_label("Search", exact=True).fill("otters")
    await expect(count(page, "all")).to_have_text("30")
    await page.get_by_label("Search", exact=True).fill("")
    await expect(count(page, "all")).to_have_text("60")
    await expect(trend).to_contain_text("20 runs, 2 did not succeed")
    await expect(trend).to_contain_text("median 5.0 s, 2.0 s to 8.0 s")
    await expect(trend.locator(".point")).to_have_count(20)
    await expect(trend.locator(".point.minimum")).to_have_count(10)
    await expect(trend.locator('.point[data-outcome="failed"]')).to_have_count(2)
    await trend.click()
    await expect(page.locator(".entry")).to_have_count(20)
    await expect(page.get_by_label("Workflow", exact=True).locator("visible=true")).to_have_value(
        "report"
    )


async def test_one_and_all_can_be_deleted(viewer: Any, ui: Any, page: Page) -> None:
    """All of them behind a question; by keyboard, the focus goes to the next line."""
    remember(viewer, 5)
    await ui.open("#/history")
    await expect(page.get_by_role("button", name="Delete: review")).to_have_count(0)
    await page.get_by_label("More: review, execution 5004").focus()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await expect(page.locator(".entry")).to_have_count(4)
    await expect(page.get_by_label("More: report, execution 5003")).to_be_focused()
    await expect(count(page, "all")).to_have_text("4")
    menu = page.get_by_label("More: report, execution 5003")
    delete = page.get_by_role("button", name="Delete: report, execution 5003")
    for close in (page.keyboard.press("Escape"), page.locator("#history-title").click()):
        await menu.click()
        await expect(delete).to_be_visible()
        await close
        await expect(delete).to_be_hidden()
    await menu.click()
    await delete.click()
    await expect(count(page, "all")).to_have_text("3")
    await page.get_by_text("More", exact=True).click()
    await page.get_by_role("button", name="Delete all").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog).to_contain_text("They stay on PromptLayer")
    await page.keyboard.press("Escape")
    await expect(page.locator(".entry")).to_have_count(3)
    await page.get_by_role("button", name="Delete all").click()
    await dialog.get_by_role("button", name="Delete all").click()
    await expect(page.locator("#history-empty")).to_contain_text("The history is empty.")


async def test_a_run_is_remembered_between_visits(
    sim: Simulator, viewer: Any, ui: Any, page: Page, browser_errors: Any
) -> None:
    """With its workflow, inputs, outcome and duration; it can be opened and run again."""
    browser_errors.expected = ("ERR_", "Failed to load resource")
    sim.add_workflow("report", DONE, inputs={"topic": "string"})
    execution = await viewer.board.start("report", {"topic": "newts", "n": 3})
    await ui.open("#/history")
    line = entry(page, execution.id)
    await expect(line).to_have_attribute("data-state", "succeeded")
    await viewer.stop()
    await expect(page.locator("#connection")).to_contain_text("The viewer has stopped")
    await viewer.start()
    await expect(page.locator("#connection")).to_have_text("Connected")
    while execution.id not in viewer.board.cards:  # the page asks to follow it again
        await viewer.board.changed.wait()
    viewer.board.remove(execution.id)
    await page.reload()
    await expect(line).to_have_attribute("data-state", "succeeded")
    await expect(line).to_contain_text('"topic": "newts"')
    await expect(line.locator('[data-part="duration"]')).to_have_text(
        re.compile(r"^(<0\.1|[1-9]\d*\.\d|0\.[1-9]) s$")
    )
    await line.get_by_role("button", name="Run again").click()
    await expect(page.get_by_label("topic")).to_have_value("newts")
    await expect(page.get_by_label("More inputs (a JSON object)")).to_have_value('{\n  "n": 3\n}')
    await page.go_back()
    await line.get_by_role("link", name="report").click()
    await expect(ui.part("inputs")).to_contain_text("newts")
    await expect(page.get_by_role("heading", name="report")).to_be_visible()


async def test_the_list_follows_what_happens(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """A run that is started elsewhere appears, and then its end and its duration."""
    held = Scenario([SimNode("answer", "Otters are fine.", None, is_output_node=True)])
    sim.add_workflow("report", held)
    await ui.open("#/history")
    await expect(page.locator("#history-empty")).to_contain_text("The history is empty.")
    execution = await viewer.board.start("report", {})
    line = entry(page, execution.id)
    await expect(line).to_have_attribute("data-state", "running")
    sim.finish(execution.id, "answer")
    await expect(line).to_have_attribute("data-state", "succeeded")
    await expect(line.locator('[data-part="duration"]')).to_have_text(re.compile(r"^\d+\.\d s$"))
    await expect(page.locator(".trend")).to_have_count(0)  # from three runs on


async def test_two_of_one_workflow_are_chosen_for_comparison(
    viewer: Any, ui: Any, page: Page, browser_errors: Any
) -> None:
    """The button is enabled for exactly two of one workflow; the older is on the left."""
    browser_errors.expected = ("404 (Not Found)",)
    remember(viewer, 6)
    await ui.open("#/history")
    button = page.get_by_role("button", name="Compare the two selected")
    await entry(page, 5005).get_by_role("checkbox").check()
    await expect(button).to_be_disabled()
    await entry(page, 5004).get_by_role("checkbox").check()
    await expect(button).to_be_disabled()
    await entry(page, 5004).get_by_role("checkbox").uncheck()
    await entry(page, 5002).get_by_role("checkbox").check()
    await button.click()
    await expect(page.locator("#compare-problem")).to_contain_text("The server returned 404")
    assert page.url.endswith("#/compare/5002/5005")


async def test_the_focused_line_is_whole_and_found_again(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """A key that moves down shows a line to its bottom edge; Back returns to where it was."""
    remember(viewer, 40)
    opened = sim.add_execution(DONE)
    viewer.board.history.record(
        execution_id=opened, outcome="succeeded", began=time.time() - 3600 * 30
    )
    await ui.open("#/history")
    await expect(page.locator(".entry")).to_have_count(41)
    for _ in range(31):
        await page.keyboard.press("j")
    await expect(entry(page, opened).get_by_role("link")).to_be_focused()
    before = await entry(page, opened).bounding_box()
    assert before is not None
    assert before["y"] + before["height"] < 901
    await page.keyboard.press("Enter")
    await expect(ui.part("state")).to_have_text("Succeeded")
    await page.go_back()
    await expect(entry(page, opened).get_by_role("link")).to_be_focused()

    top = "document.activeElement.closest('.entry').getBoundingClientRect().top"
    await page.wait_for_function(f"(before) => Math.abs({top} - before) < 2", arg=before["y"])
