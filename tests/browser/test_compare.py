"""Two executions side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
from playwright.async_api import Locator, Page, expect

from promptlayer_exec.simulator import Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")

HOSTILE = "<img src=x onerror=\"document.title='taken'\">"


def essay(inputs: Mapping[str, Any]) -> Scenario:
    """Return a run whose second node depends on the inputs."""
    lines = [f"line {index}" for index in range(40)]
    lines[20] = str(inputs["topic"])
    is_odd = inputs["topic"] == HOSTILE
    failed: dict[str, Any] = {"status": "FAILED", "error_message": "too odd"} if is_odd else {}
    nodes = [
        SimNode("same", {"a": 1}),
        SimNode("essay", "\n".join(lines)),
        SimNode("slow", "x", duration=None),
        SimNode("review", "fine", after=["essay"], is_output_node=True, **failed),
    ]
    if is_odd:
        nodes.append(SimNode("extra", 1))
    return Scenario(nodes)


def pair(page: Page, name: str) -> Locator:
    """Return the line of a node."""
    return page.locator(f'.pair[data-name="{name}"]')


async def finish_slow_node(sim: Simulator, board: Any, execution_id: int, least: float) -> float:
    """Finish the node once polls have seen it run for `least` seconds, and return for how long."""
    card = board.cards[execution_id]

    def running() -> float | None:
        times = card.snapshot and card.snapshot.times.get("slow")
        return times.running if times else None

    while (began := running()) is None or card.snapshot.elapsed < began + least:
        await board.changed.wait()

    sim.finish(execution_id, "slow")
    while not card.snapshot.complete:
        await board.changed.wait()
    return float(card.snapshot.times["slow"].final - began)


async def compare(sim: Simulator, viewer: Any, ui: Any) -> tuple[int, int]:
    """Start two runs, and go to their comparison."""
    sim.add_workflow("essay", essay)
    ids = [
        (await viewer.board.start("essay", {"topic": topic}, metadata={"release": release})).id
        for topic, release in (("otters", "41"), (HOSTILE, "42"))
    ]
    usual = await finish_slow_node(sim, viewer.board, ids[0], 0.0)
    await finish_slow_node(sim, viewer.board, ids[1], 0.5 + 2 * usual)
    await ui.open(f"#/compare/{ids[0]}/{ids[1]}")
    return ids[0], ids[1]


async def test_differences_are_marked(sim: Simulator, viewer: Any, ui: Any, page: Page) -> None:
    """Statuses, durations and values; nodes that only one has; lines that differ."""
    await compare(sim, viewer, ui)
    await expect(page.locator("#compare-summary")).to_have_text(
        "The release, the inputs, and 3 of 5 nodes differ."
    )
    await expect(page.locator(".pair-head .side")).to_contain_text(["release: 41", "release: 42"])
    await expect(pair(page, "essay").locator("details")).to_have_attribute("open", "")
    await page.get_by_label("Compare durations").check()
    await expect(page.locator("#compare-summary")).to_have_text(
        "The release, the inputs, and 4 of 5 nodes differ."
    )
    await expect(pair(page, "same").locator(".tag")).to_have_count(0)
    for name, tags in (
        ("essay", ["value"]),
        ("slow", ["duration"]),
        ("review", ["status", "value", "error"]),
        ("extra", ["only right"]),
    ):
        assert await pair(page, name).locator(".tag").all_text_contents() == tags
    await expect(pair(page, "extra")).to_contain_text("Not in this execution")
    await expect(pair(page, "review").locator(".status")).to_have_text(["Success", "Failed"])
    changed = pair(page, "essay").locator(".diff.changed")
    await expect(changed).to_have_text(["otters", HOSTILE])
    await expect(pair(page, "essay").locator(".gap").first).to_have_text("… 12 equal lines")
    await expect(pair(page, "same")).to_be_hidden()
    await page.get_by_text("1 node is equal").click()
    await pair(page, "same").locator("summary").click()
    await expect(pair(page, "same")).to_contain_text("Both are the same:")
    await expect(page.locator(".pair.inputs .tag")).to_have_text("differ")
    await expect(page.locator(".pair.inputs .diff.changed mark").first).to_have_text("otters")
    assert await page.locator("img").count() == 0
    assert re.search(r"open=&open=essay&open=review&open=same&equal=1&durations=1$", page.url)
    await page.reload()
    await expect(changed).to_have_text(["otters", HOSTILE])
    await expect(pair(page, "same")).to_be_visible()


async def test_the_other_one_is_chosen_on_a_page(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """Other runs of its workflow are offered; any id can be entered; sides can be swapped."""
    left, right = await compare(sim, viewer, ui)
    await ui.open_run(right)
    button = page.get_by_role("button", name="Compare with …").first
    await button.click()
    await expect(button).to_have_attribute("aria-expanded", "true")
    choice = page.get_by_label("Compare with")
    await expect(choice.locator("option")).to_have_count(2)
    await expect(choice).to_have_value(str(left))  # the last success
    await page.keyboard.press("Tab")
    await page.keyboard.type("nonsense")
    await page.keyboard.press("Enter")
    await expect(ui.part("compare-error")).to_contain_text("enter its id")
    await page.get_by_label("or another id").fill("")
    await choice.select_option(str(left))
    await page.locator(".compare-form").get_by_role("button", name="Compare").click()
    await expect(page.locator("#compare-summary")).to_contain_text("differ")
    assert f"#/compare/{left}/{right}" in page.url
    await page.get_by_role("button", name="Swap sides").click()
    await expect(pair(page, "extra").locator(".tag")).to_have_text("only left")
    other = sim.add_execution(Scenario([SimNode("same", {"a": 1})]))
    await ui.open(f"#/compare/{left}/{other}")  # one that is not followed yet
    await expect(page.locator("#compare-summary")).to_have_text("3 of 4 nodes differ.")
