"""Every view on wide and narrow screens, in both themes, for everybody."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, expect

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")

WORD = "incomprehensibilities" * 12
ERROR = {"status": "FAILED", "error_message": f"HTTP 503 {WORD}", "raw_error_message": WORD * 3}


def essay(inputs: Any) -> Scenario:
    """Return a run with long words, a tree, a failed node, and a branch that was skipped."""
    tree = {"topic": inputs.get("topic"), WORD: [{"n": n} for n in range(40)]}
    nodes = [
        SimNode("plan", tree, 0.05),
        SimNode(WORD, WORD, 0.1, after=["plan"], when=lambda _: True),
        SimNode("fetch", after=["plan"], **ERROR),
        SimNode("never", after=["fetch"]),
        SimNode("answer", WORD, after=[WORD], is_output_node=True),
    ]
    return Scenario(nodes)


async def check(page: Page, name: str) -> None:
    """Check that a view fits the screen, and that axe finds nothing, in both themes."""
    sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    needed, there = await page.evaluate(sizes)
    assert needed <= there, name
    for theme in ("light", "dark"):
        await page.emulate_media(color_scheme=theme, reduced_motion="reduce")
        results = await Axe().run(page)
        found = [
            (one["id"], [node["html"][:200] for node in one["nodes"]])
            for one in results.response["violations"]
        ]
        assert found == [], (name, theme)
        assert "color-contrast" in {one["id"] for one in results.response["passes"]}


@pytest.mark.parametrize("width", [1280, 360])
async def test_every_view_fits_and_axe_finds_nothing(
    sim: Simulator, ui: Any, page: Page, browser_errors: Any, width: int
) -> None:
    """With long words everywhere, and with every error that can be shown."""
    browser_errors.expected = ("422 (", "502 (", "404 (")
    await page.set_viewport_size({"width": width, "height": 740})
    sim.add_workflow(WORD, essay, inputs={"topic": "string", WORD: "number"}, definition=essay({}))
    ids = []
    for topic in ("otters", WORD):
        execution = await ui.viewer.board.start(WORD, {"topic": topic, WORD: 1})
        ids.append(execution.id)
        await ui.open_run(execution.id)
        await expect(ui.run).to_have_attribute("data-state", "succeeded")
    await expect(ui.selected.locator('[data-part="trace"]')).to_be_visible()
    await expect(ui.drawn("plan")).to_be_visible()
    await check(page, "run")
    await ui.select("plan")
    await expect(ui.selected.locator(".tree")).to_be_visible()
    await check(page, "node")
    await page.keyboard.press("Escape")
    await page.get_by_role("button", name="Compare", exact=True).first.click()
    await ui.run.locator(".snippet summary").nth(1).click()
    await check(page, "overview")
    await page.get_by_role("button", name="Run again").click()
    await check(page, "dialog")
    await page.keyboard.press("Escape")
    await ui.open(f"#/compare/{ids[0]}/{ids[1]}?open=plan&open=")
    await expect(page.locator(".pair .diff.changed").first).to_be_visible()
    await check(page, "compare")
    await ui.open(f"#/start?again={ids[1]}")
    await expect(page.get_by_label("topic")).to_have_value(WORD)
    await page.get_by_label("topic").fill("")
    await page.get_by_role("button", name="Start", exact=True).click()
    await expect(page.locator("#field-0-error")).not_to_be_empty()
    await check(page, "start")
    await ui.open(f"#/start?workflow={WORD}")
    await page.get_by_label("topic").fill("x")
    await page.get_by_label(f"{WORD} (number, as JSON)").fill("1")
    sim.inject(Fault.disconnect(), path="/run")
    await page.get_by_role("button", name="Start", exact=True).click()
    await expect(page.locator("#unknown-start")).to_be_visible()
    await check(page, "unknown start")
    await ui.open("#/history")
    await expect(page.locator(".entry")).to_have_count(3)
    await expect(page.locator(".trend")).to_be_visible()
    await check(page, "history")


async def test_the_views_are_linked_and_named(ui: Any, page: Page) -> None:
    """The link of the present view says so, and its heading has the focus."""
    for name, heading in (("History", "#history-title"), ("Start a run", "#start-title")):
        await page.get_by_role("link", name=name).click()
        await expect(page.locator(heading)).to_be_focused()
        await expect(page.get_by_role("link", name=name)).to_have_attribute("aria-current", "page")
    await page.get_by_role("link", name="Live").click()
    await expect(page.locator("#empty")).to_contain_text("no execution on this page yet")
    await ui.open("#/nowhere/at%all")
    await expect(page.locator("#empty")).to_be_visible()
