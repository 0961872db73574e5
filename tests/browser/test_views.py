"""Every view on wide and narrow screens, in both themes, for everybody."""

from __future__ import annotations

import re
from typing import Any

import pytest
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


@pytest.mark.parametrize("width", [1920, 1100, 360])
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
    await ui.check("run")
    await ui.select("plan")
    await expect(ui.selected.locator(".tree")).to_be_visible()
    await ui.check("node")
    await page.keyboard.press("Escape")
    await page.get_by_role("button", name="Compare", exact=True).first.click()
    await ui.run.locator(".snippet summary").nth(1).click()
    await ui.check("overview")
    await page.get_by_role("button", name="Run again").click()
    await ui.check("dialog")
    await page.keyboard.press("Escape")
    await ui.open(f"#/compare/{ids[0]}/{ids[1]}?open=plan&open=")
    await expect(page.locator(".pair .diff.changed").first).to_be_visible()
    await ui.check("compare")
    await ui.open(f"#/start?again={ids[1]}")
    await expect(page.get_by_label("topic")).to_have_value(WORD)
    await page.get_by_label("topic").fill("")
    await page.get_by_role("button", name="Start", exact=True).click()
    await expect(page.locator("#field-0-error")).not_to_be_empty()
    await ui.check("start")
    await ui.open(f"#/start?workflow={WORD}")
    await page.get_by_label("topic").fill("x")
    await page.get_by_label(f"{WORD} (number)").fill("1")
    sim.inject(Fault.disconnect(), path="/run")
    await page.get_by_role("button", name="Start", exact=True).click()
    await expect(page.locator("#unknown-start")).to_be_visible()
    await ui.check("unknown start")
    await ui.open("#/history")
    await expect(page.locator(".entry")).to_have_count(3)
    await ui.check("history")
    await ui.open_run(sim.add_execution(essay({})))
    await expect(ui.part("accept")).to_be_visible()
    await ui.check("an id from elsewhere")


BATCH = {
    "name": "night's run",
    "waiting": 2,
    "running": 1,
    "succeeded": 40,
    "failed": 1,
    "unknown": 1,
    "total": 45,
    "workers": 0,
    "created": 0.5,
    "latest": 1.0,
}


def item(kind: str, execution_id: int | None, error: str | None) -> dict[str, Any]:
    """Return an item as the viewer's server describes it."""
    id_ = None if execution_id is None else str(execution_id)
    reason = "" if error is None else error.partition(": ")[2]
    return {
        "key": kind,
        "kind": kind,
        "execution_id": id_,
        "error": error,
        "node": "a" if kind == "failed" else None,
        "reason": reason,
        "finished": 1.0,
    }


@pytest.mark.parametrize("width", [1280, 360])
async def test_batches_say_what_is_wrong_and_what_goes_on(
    sim: Simulator, ui: Any, page: Page, width: int
) -> None:
    """Failed and unknown items come first, with the commands that go on, and links to runs."""
    await page.set_viewport_size({"width": width, "height": 740})
    run = sim.add_execution(Scenario([SimNode("a", status="FAILED")]))
    items = [
        item("failed", run, f"ExecutionFailed: {WORD}"),
        item("unknown", None, "StartUnknown: no answer"),
        item("succeeded", run, None),
    ]
    groups = [{"text": f"a: {WORD}", "count": 11}, {"text": "no answer", "count": 1}]
    one = BATCH | {"items": items, "is_whole": True, "problem": None, "groups": groups}
    one |= {"matching": 3, "rate": 0.5}
    all_ = {"database": "sqlite:///batches.sqlite", "batches": [BATCH]}
    await page.route("**/api/batches", lambda route: route.fulfill(json=all_))
    await page.route("**/api/batch?*", lambda route: route.fulfill(json=one))
    await ui.open("#/batches")
    await expect(page.locator(".batch")).to_contain_text("45 items, nobody works on it")
    await ui.check("batches")
    await page.get_by_role("link", name="night's run").click()
    shown = page.locator(".command code")
    await expect(shown).to_have_text("promptlayer-exec batch work --name 'night'\\''s run'")
    one |= {"waiting": 0, "running": 0}
    await page.get_by_text("Other commands").click()
    await expect(shown).to_have_text(
        [
            f"promptlayer-exec batch {verb} --name 'night'\\''s run'"
            for verb in ("retry --failed", "recheck", "retry --unknown")
        ]
    )
    await expect(page.locator(".item .name")).to_have_text(["failed", "unknown", "succeeded"])
    sentence = page.locator(".item .sentence")
    await expect(sentence.first).to_have_text(re.compile(f"^Failed .* days ago in a: {WORD}"[:60]))
    await expect(page.locator(".groups button").first).to_contain_text(f" a: {WORD}")
    await ui.check("batch")
    link = page.get_by_role("link", name=f"Execution {run}").first
    await link.focus()
    one["succeeded"] += 1
    async with page.expect_response("**/api/batch?*"):
        pass
    await expect(page.locator(".kinds")).to_contain_text("Succeeded 41")
    await expect(link).to_be_focused()
    await page.get_by_role("link", name=f"Execution {run}").first.click()
    await expect(ui.part("state")).to_have_text("Failed")


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
