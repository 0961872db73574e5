"""Every view on wide and narrow screens, in both themes, for everybody."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.async_api import Page, Route, expect

from promptlayer_exec import Session, StartRequest, StartUnknown
from promptlayer_exec.dbos import Batch
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.starts import SQLStartStore

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
    await page.get_by_role("button", name="Compare with").first.click()
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
    async with page.expect_response("**/api/definition?*"):
        await ui.open(f"#/start?workflow={WORD}")
    await expect(page.locator("#definition")).to_be_empty()  # its fields replace those above
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


NIGHT = "night's run"


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of the viewer's database."""
    url = f"sqlite:///{tmp_path / 'batches.sqlite'}"
    monkeypatch.setenv("PROMPTLAYER_EXEC_DB", url)
    return url


def _order(inputs: dict[str, Any]) -> Scenario:
    if inputs["n"] == 2:
        return Scenario([SimNode("a", status="FAILED", error_message=WORD)])
    return Scenario([SimNode("a", [{"sku": n, "name": f"otter {n}"} for n in range(300)])])


async def _make_batch(sim: Simulator) -> Batch:
    """Return a batch with an item that is unknown, one that failed and one that succeeded."""
    sim.add_workflow("order", _order, definition=_order({"n": 1}))
    make = partial(Session, sim.api_key, base_url=sim.base_url, push=False)
    batch = Batch(NIGHT, session=make, max_in_flight=1)
    await batch.add([StartRequest("order", {"n": n}, key=f"order {n}") for n in (1, 2, 3)])
    sim.inject(Fault.disconnect(), path="/run")
    await batch.work()
    return batch


@pytest.mark.usefixtures("batches")
async def test_a_new_batch_waits_for_its_worker(sim: Simulator, ui: Any, page: Page) -> None:
    """In its first seconds, nothing is wrong if nobody works on it."""
    sim.add_workflow("order", _order)
    make = partial(Session, sim.api_key, base_url=sim.base_url, push=False)
    await Batch(NIGHT, session=make).add([StartRequest("order", {"n": 1}, key="one")])
    await ui.open("#/batches")
    await expect(page.locator(".batch")).to_contain_text("1 item, its worker is starting")


@pytest.mark.parametrize("width", [1280, 360])
async def test_batches_say_what_is_wrong_and_what_goes_on(
    sim: Simulator, ui: Any, page: Page, width: int, batches: str
) -> None:
    """Each state of items has its count and its command, and unknown keys have theirs."""
    await page.set_viewport_size({"width": width, "height": 740})
    batch = await _make_batch(sim)
    async with SQLStartStore() as store:
        options = {"base_url": sim.base_url, "starts": store, "push": False}
        async with Session(sim.api_key, **options) as session:
            sim.inject(Fault.disconnect(), path="/run")
            with pytest.raises(StartUnknown):
                await session.start("order", {"n": 9}, key="one")

    flags = f"--name {shlex.quote(NIGHT)} --db {batches} --base-url {sim.base_url}"
    await ui.open("#/batches")
    counts = page.locator(".batch .count")
    await expect(counts).to_have_text(["1 failed", "1 unknown", "1 succeeded"])
    keys = page.locator(".unknown-keys")
    await expect(keys).to_contain_text("1 key of single runs is unknown")
    await expect(keys.locator("code")).to_have_text(
        f"promptlayer-exec starts list --unknown --db {batches}"
    )
    await ui.check("batches")

    await page.get_by_role("link", name="night's run").click()
    await expect(counts).to_have_text(["1 failed", "1 unknown", "1 succeeded"])
    await page.get_by_text("Other commands").click()
    await expect(page.locator(".next:not(.unknown-keys) code")).to_have_text(
        [
            f"promptlayer-exec batch {verb} {flags}"
            for verb in (
                "retry --failed",
                "recheck",
                "retry KEY --again",
                "adopt KEY ID",
                "retry --unknown",
                "export",
            )
        ]
    )
    await expect(page.locator(".item .status")).to_have_text(["Failed", "Unknown", "Succeeded"])
    await expect(page.locator(".groups button").first).to_contain_text(WORD)
    await expect(page.locator(".next").first).to_contain_text("which you pay for")
    await ui.check("batch")

    await page.keyboard.press("/")
    await page.keyboard.type('n": 3')
    await expect(page.locator(".item .name")).to_have_text(["order 3"])
    await expect(page.locator(".kinds button")).to_have_text(["All 1", "Succeeded 1"])
    await expect(page.locator("#batch-filter")).to_be_focused()
    await page.keyboard.type("0")
    await expect(page.locator("#batch-items .empty")).to_have_text("No item matches.")
    await page.locator("#batch-filter").fill("")

    link = page.locator(".item[data-kind=failed] .name")
    await link.focus()
    await batch.retry(unknown=True)
    await expect(counts).to_have_text(["1 failed", "1 waiting", "1 succeeded"])
    await expect(link).to_be_focused()
    await page.get_by_role("button", name="Waiting 1").click()
    waiting = page.locator(".item[data-kind=waiting] .sentence")
    await expect(waiting).to_have_text("Joined the queue just now.")
    await expect(page.locator(".item")).to_have_count(1)


@pytest.mark.usefixtures("batches")
async def test_a_cause_leads_to_the_items_of_batches(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """Those that failed for the same reason, also if the page of the cause is loaded first."""
    await _make_batch(sim)
    for _ in range(2):
        await viewer.board.start("order", {"n": 2})
    await page.locator(".incident").get_by_role("link", name="order", exact=True).click()
    hit = page.locator("#cause-batches")
    await expect(hit).to_have_text(f"Failed for the same reason: 1 item of batch {NIGHT}")
    await ui.check("cause")
    await page.reload()
    await hit.get_by_role("link").click()
    await expect(page.locator(".item .name")).to_have_text(["order 2"])


@pytest.mark.usefixtures("batches")
async def test_a_refused_key_is_mended_before_a_batch_goes_on(
    sim: Simulator, ui: Any, page: Page
) -> None:
    """The page tries the key if nobody works on a batch, and then says so above the command."""
    sim.add_workflow("order", _order)
    make = partial(Session, sim.api_key, base_url=sim.base_url, push=False)
    await Batch(NIGHT, session=make).add([StartRequest("order", {"n": 1}, key="one")])
    sim.inject(Fault.status(401, times=None))
    later = "(() => { const now = Date.now; Date.now = () => now() + 60_000; })()"
    await page.evaluate(later)  # its worker would have started by then
    await ui.open(f"#/batches/{quote(NIGHT)}")
    await expect(page.locator("#outage")).to_contain_text("401 Unauthorized")
    await expect(page.locator(".next .mend")).to_contain_text("first mend the key")


@pytest.mark.parametrize("width", [1280, 360])
async def test_an_item_leads_to_everything_that_is_known(
    sim: Simulator, ui: Any, page: Page, width: int, batches: str
) -> None:
    """To its inputs, attempts, error and commands; its run shows them too, and leads back."""
    await page.set_viewport_size({"width": width, "height": 740})
    batch = await _make_batch(sim)
    failed = await anext(batch.items(state="failed"))
    await ui.open(f"#/batches/{quote(NIGHT)}?kind=failed")
    await page.get_by_role("link", name=failed.key).click()
    await expect(page.locator("#item-title")).to_have_text(f"Item {failed.key}")
    await expect(page.locator(".item-state")).to_contain_text("Failed since")
    await expect(page.locator(".item-error")).to_contain_text("ExecutionFailed")
    await expect(page.locator("#item-inputs")).to_contain_text("n: 2")
    await expect(page.locator(".attempts")).to_contain_text("Attempt 1: failed, added ")
    flags = f"--name {shlex.quote(NIGHT)} --db {batches} --base-url {sim.base_url}"
    first = page.locator("#item .next code").first
    await expect(first).to_have_text(f"promptlayer-exec batch retry '{failed.key}' {flags}")
    await ui.check("item")

    await ui.open(f"#/item/{quote(NIGHT)}/order%201")
    await expect(page.locator(".item-error")).to_contain_text(sim.base_url)
    await expect(page.locator(".item-error a")).to_have_count(0)  # the API is no page
    await page.go_back()

    # The board has its run already, and learns its workflow after the page asked for the graph.
    async def tell_late(route: Route) -> None:
        await expect(ui.part("graph-note")).to_contain_text("does not report which workflow")
        await route.continue_()

    ui.viewer.board.follow(failed.execution_id)
    await page.route("**/api/item/run", tell_late)
    await page.locator("#item .facts").get_by_role("link").click()
    await expect(ui.part("title")).to_have_text("order")
    await expect(ui.drawn("a")).to_have_attribute("data-status", "FAILED")
    await expect(ui.part("workflow-form")).to_be_hidden()
    await expect(ui.part("crumb")).to_have_text(f"Execution {failed.execution_id}")
    await expect(ui.part("facts")).to_contain_text("Duration")
    await expect(ui.part("facts")).not_to_contain_text("not known")
    await expect(ui.part("inputs")).to_contain_text("n: 2")
    await ui.part("rerun").click()
    dialog = page.locator("#confirm")
    await expect(dialog).to_contain_text("This is the retry of the batch.")
    await expect(dialog).to_contain_text(f"promptlayer-exec batch work {flags}")
    await dialog.get_by_role("button", name="Run the item again").click()
    await expect(page.locator(".item-state")).to_contain_text("Waiting since")
    assert (await batch.status()).waiting == 1
    await page.go_back()
    await ui.run.get_by_role("link", name=f"Item {failed.key}").click()
    await expect(page.locator("#item-title")).to_have_text(f"Item {failed.key}")


@pytest.mark.usefixtures("batches")
async def test_like_objects_are_a_table(sim: Simulator, ui: Any, page: Page) -> None:
    """With a row for each, some at a time; a search goes through all of them."""
    batch = await _make_batch(sim)
    done = await anext(batch.items(state="succeeded"))
    await ui.open(f"#/item/{quote(NIGHT)}/{quote(done.key)}")
    output = page.locator("#item-output")
    await expect(output.locator("thead")).to_have_text("skuname")
    await expect(output.locator("tbody tr")).to_have_count(100)
    await expect(output.locator("tbody tr").first).to_have_text("00otter 0")
    await output.get_by_role("searchbox").fill("otter 250")
    await expect(output.locator(".found")).to_have_text("otter 250")
    await expect(output.locator(".found")).to_be_in_viewport()
    await expect(output.locator("tbody tr")).to_have_count(100)
    await output.get_by_role("button", name="Show 100 of 200 earlier").click()
    await expect(output.locator("tbody tr").first).to_have_text("100100otter 100")
    await expect(output.get_by_role("button", name="earlier")).to_be_focused()
    await ui.check("table")


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
