"""The graph of an execution's page: what it draws, and how it is used."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from playwright.async_api import Page, expect

from promptlayer_exec.simulator import Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")

HOSTILE = "<img src=x onerror=\"document.title='taken'\"> '\"] & very long indeed"
PAIR = Scenario([SimNode("plan", "p"), SimNode("answer", "a", after=["plan"])])
BRANCHES = Scenario(
    [
        SimNode("plan", {"ok": True}, None),
        SimNode("accept", "yes", None, after=["plan"], when=lambda values: values["plan"]["ok"]),
        SimNode("reject", "no", after=["plan"], when=lambda values: not values["plan"]["ok"]),
        SimNode("answer", "Fine.", after=["accept", "reject"], is_output_node=True),
    ]
)


def sixty() -> Scenario:
    """Return sixty nodes in twelve layers of five, with edges across; one node failed."""
    nodes = [SimNode("start", 0)]
    for index in range(1, 59):
        before = [f"node {index - 5}" if index > 5 else "start"]
        if index % 4 == 0 and index > 12:
            before.append(f"node {index - 11}")
        failed: dict[str, Any] = {"status": "FAILED"} if index == 33 else {}
        nodes.append(SimNode(f"node {index}", index, after=before, **failed))
    nodes.append(SimNode("end", 1, after=["node 58"], is_output_node=True))
    return Scenario(nodes)


async def start(sim: Simulator, viewer: Any, ui: Any, scenario: Scenario) -> int:
    """Start a run of a workflow that is described, and go to its page."""
    sim.add_workflow("flow", scenario)
    execution = await viewer.board.start("flow", {})
    await ui.open_run(execution.id)
    await expect(ui.drawn(scenario.nodes[0].name)).to_be_visible()
    return execution.id


async def test_nodes_are_in_layers_with_live_statuses(sim: Simulator, viewer: Any, ui: Any) -> None:
    """The edge that was taken and the branch that was skipped differ; conditions are marked."""
    more = [SimNode("slow", "s", None), SimNode("both", "b", after=["plan", "slow"])]
    held = await start(sim, viewer, ui, Scenario([*BRANCHES.nodes, *more]))
    for name, status in (("plan", "RUNNING"), ("accept", "QUEUED"), ("answer", "QUEUED")):
        await expect(ui.drawn(name)).to_have_attribute("data-status", status)
    boxes = {
        name: await ui.drawn(name).bounding_box() for name in ("plan", "accept", "reject", "answer")
    }
    assert boxes["plan"]["x"] < boxes["accept"]["x"] == boxes["reject"]["x"] < boxes["answer"]["x"]
    await expect(ui.edge("plan", "accept")).to_have_attribute("data-edge", "pending")
    sim.finish(held, "plan")
    await expect(ui.drawn("accept")).to_have_attribute("data-status", "RUNNING")
    await expect(ui.drawn("reject")).to_have_attribute("data-status", "SKIPPED")
    await expect(ui.edge("plan", "accept")).to_have_attribute("data-edge", "taken")
    await expect(ui.edge("plan", "reject")).to_have_attribute("data-edge", "skipped")
    await expect(ui.edge("reject", "answer")).to_have_attribute("data-edge", "skipped")
    await expect(ui.edge("plan", "both")).to_have_attribute("data-edge", "pending")
    sim.finish(held, "slow")
    await expect(ui.edge("plan", "both")).to_have_attribute("data-edge", "taken")
    sim.finish(held, "accept")
    await expect(ui.drawn("answer")).to_have_attribute("data-status", "SUCCESS")
    await expect(ui.edge("accept", "answer")).to_have_attribute("data-edge", "taken")
    for source, target, conditional in (
        ("plan", "accept", True),
        ("plan", "reject", True),
        ("accept", "answer", False),
    ):
        assert await ui.edge(source, target).locator(".diamond").count() == conditional
    label = await ui.drawn("answer").get_attribute("aria-label")
    assert re.fullmatch(r"answer: Success.*", label or "")
    await expect(ui.part("graph-note")).to_have_text("flow, version 1")
    await expect(ui.drawn("plan")).to_have_class(re.compile("critical"))
    await expect(ui.drawn("reject")).not_to_have_class(re.compile("critical"))


async def test_a_click_selects_everywhere(sim: Simulator, viewer: Any, ui: Any, page: Page) -> None:
    """In graph, table and time line alike, whichever of them is clicked."""
    held = await start(sim, viewer, ui, BRANCHES)
    await ui.drawn("accept").click()
    await expect(ui.row("accept")).to_have_class(re.compile("selected"))
    await expect(ui.selected.locator("h3")).to_have_text("accept")
    await expect(ui.drawn("accept")).to_have_attribute("aria-pressed", "true")
    assert page.url.endswith(f"#/executions/{held}?node=accept")
    # What it received is not known, but what it depends on is.
    sources = page.get_by_role("region", name="What it depends on")
    await expect(sources.get_by_role("listitem")).to_contain_text(["plan"])
    await sources.get_by_role("link", name="plan").click()
    await expect(sources).to_be_hidden()
    await expect(ui.drawn("plan")).to_have_class(re.compile("selected"))
    await expect(ui.drawn("accept")).to_have_attribute("aria-pressed", "false")
    assert page.url.endswith("?node=plan")
    await page.reload()
    await expect(ui.drawn("plan")).to_have_class(re.compile("selected"))


async def test_a_skipped_node_says_why(sim: Simulator, viewer: Any, ui: Any) -> None:
    """It names the failed nodes that it depends on, through others that were skipped."""
    scenario = Scenario(
        [
            SimNode("fetch", status="FAILED"),
            SimNode("read", after=["fetch"]),
            SimNode("answer", after=["read"], is_output_node=True),
            SimNode("never", when=lambda _: False),
        ]
    )
    await start(sim, viewer, ui, scenario)
    await expect(ui.run).to_have_attribute("data-state", "failed")
    for name, reason in (
        ("answer", "Skipped, because it depends on fetch, which failed."),
        ("never", "Skipped: no way led to it."),
    ):
        await ui.select(name)
        await expect(ui.selected.locator('[data-part="times"]')).to_have_text(reason)


async def test_the_arrow_keys_follow_the_edges(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """One node takes part in the tab order; Enter selects, + and - zoom, 0 fits."""
    await start(sim, viewer, ui, BRANCHES)
    assert await page.locator('.gnode[tabindex="0"]').count() == 1
    await page.get_by_role("button", name="Fit").focus()
    await page.keyboard.press("Tab")
    focused = "document.activeElement.dataset.node ?? document.activeElement.dataset.part"
    if await page.evaluate(focused) == "graph":  # a container that scrolls may take the focus
        await page.keyboard.press("Tab")
    assert await page.evaluate(focused) == "plan"
    outline = "getComputedStyle(document.activeElement.querySelector('rect')).outlineWidth"
    assert await page.evaluate(outline) == "2px"
    for key, name in (
        ("ArrowRight", "accept"),
        ("ArrowDown", "reject"),
        ("ArrowDown", "reject"),
        ("ArrowRight", "answer"),
        ("ArrowLeft", "accept"),
        ("Home", "plan"),
        ("End", "answer"),
    ):
        await page.keyboard.press(key)
        assert await page.evaluate(focused) == name
    await page.keyboard.press("Enter")
    await expect(ui.row("answer")).to_have_class(re.compile("selected"))
    before = await ui.drawn("plan").bounding_box()
    await page.keyboard.press("+")
    larger = await ui.drawn("plan").bounding_box()
    assert larger["width"] > 1.2 * before["width"]
    await page.keyboard.press("0")
    assert await ui.drawn("plan").bounding_box() == before


async def test_it_is_panned_and_zoomed(sim: Simulator, viewer: Any, ui: Any, page: Page) -> None:
    """By dragging, by the wheel with Ctrl, and by buttons; a drag selects nothing."""
    await start(sim, viewer, ui, sixty())
    graph = ui.part("graph")
    await graph.evaluate("(one) => one.scrollTo(0, 0)")
    await graph.scroll_into_view_if_needed()
    at = await ui.drawn("start").bounding_box()
    await page.mouse.move(at["x"] + 120, at["y"] + 10)
    await page.mouse.down()
    await page.mouse.move(at["x"] + 20, at["y"] + 10, steps=4)
    await page.mouse.up()  # over the node on which it began
    assert await graph.evaluate("(one) => one.scrollLeft") == 100
    await expect(ui.drawn("start")).not_to_have_class(re.compile("selected"))
    box = await graph.bounding_box()
    await page.mouse.move(box["x"] + 300, box["y"] + 100)
    width = (await ui.drawn("node 7").bounding_box())["width"]
    await page.keyboard.down("Control")
    await page.mouse.wheel(0, 100)
    await page.keyboard.up("Control")
    assert (await ui.drawn("node 7").bounding_box())["width"] < width
    sizes = "(one) => [one.scrollWidth - one.clientWidth, one.scrollHeight - one.clientHeight]"
    assert max(await graph.evaluate(sizes)) > 0
    await page.get_by_role("button", name="Fit").click()
    assert max(await graph.evaluate(sizes)) <= 0
    await page.get_by_role("button", name="Zoom in").click()
    assert (await ui.drawn("node 7").bounding_box())["width"] < width


async def test_it_is_drawn_again_for_another_width(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """From left to right on a wide screen, downwards on a narrow one; the selection stays."""
    await start(sim, viewer, ui, BRANCHES)
    await ui.drawn("accept").click()

    async def is_drawn_along(axis: str) -> bool:
        boxes = [await ui.drawn(name).bounding_box() for name in ("plan", "answer")]
        # There is none while the graph is being drawn.
        return all(boxes) and boxes[1][axis] >= boxes[0][axis] + 100

    for width, axis in ((1280, "x"), (360, "y"), (1280, "x")):
        await page.set_viewport_size({"width": width, "height": 900})
        async with asyncio.timeout(5):
            while not await is_drawn_along(axis):
                pass
        await expect(ui.drawn("accept")).to_have_class(re.compile("selected"))
        await expect(ui.drawn("accept")).to_have_attribute("data-status", "QUEUED")


async def test_it_shows_how_long_a_node_has_been_running(
    sim: Simulator, viewer: Any, ui: Any
) -> None:
    """And the type of each node."""
    await start(sim, viewer, ui, BRANCHES)
    await expect(ui.drawn("plan")).to_contain_text(re.compile(r"Running · (0\.[3-9] s|[1-9])"))
    await expect(ui.drawn("plan")).to_contain_text("prompt template")


async def test_sixty_nodes_stay_readable(sim: Simulator, viewer: Any, ui: Any, page: Page) -> None:
    """No two overlap, the text is large enough, and the failed one is in sight."""
    await start(sim, viewer, ui, sixty())
    await expect(ui.drawn("node 33")).to_have_attribute("data-status", "FAILED")
    await expect(ui.drawn("node 33")).to_have_class(re.compile("selected"))
    boxes = await page.locator(".gnode rect").evaluate_all(
        """(all) => all.map((one) => one.getBoundingClientRect())
            .map(({ left, right, top, bottom }) => [left, right, top, bottom])"""
    )
    assert len(boxes) == 60
    for index, (left, right, top, bottom) in enumerate(boxes):
        for other in boxes[index + 1 :]:
            apart = other[0] >= right or other[1] <= left or other[2] >= bottom or other[3] <= top
            assert apart
    height = await page.locator(".gname").first.evaluate(
        "(one) => one.getBoundingClientRect().height"
    )
    assert height >= 10
    inside = """(one) => {
        const [node, graph] = [one, one.closest(".graph")].map((it) => it.getBoundingClientRect());
        return node.left >= graph.left && node.right <= graph.right
            && node.top >= graph.top && node.bottom <= graph.bottom;
    }"""
    assert await ui.drawn("node 33").evaluate(inside)


async def test_the_workflow_of_an_id_is_asked_once(sim: Simulator, ui: Any, page: Page) -> None:
    """Everything but the graph works without the answer, which is remembered with the execution."""
    for name in ("first", "second"):
        sim.add_workflow(name, PAIR)
    await ui.open_run(sim.add_execution(PAIR))
    await expect(ui.part("graph-note")).to_contain_text("does not report which workflow")
    await expect(ui.part("graph")).to_be_hidden()
    await expect(ui.part("rerun")).to_be_hidden()  # nobody knows what would run
    field = page.get_by_label("Which workflow is this a run of?")
    await field.focus()
    await expect(page.locator("#workflows option")).to_have_count(2)
    await field.fill("second")
    await page.get_by_role("button", name="Remember").click()
    await expect(ui.drawn("plan")).to_be_visible()
    await expect(page.get_by_role("heading", name="second")).to_be_visible()
    await page.reload()
    await expect(ui.drawn("plan")).to_be_visible()
    await expect(ui.part("graph-note")).to_have_text("second, version 1")
    await expect(field).to_be_hidden()


async def test_names_are_text(sim: Simulator, viewer: Any, ui: Any, page: Page) -> None:
    """A name that is too long is shortened; the whole is in its title and its label."""
    scenario = Scenario([SimNode(HOSTILE, 1, None), SimNode("end", after=[HOSTILE])])
    held = await start(sim, viewer, ui, scenario)
    drawn = ui.drawn(HOSTILE)
    await expect(drawn).to_have_attribute("data-status", "RUNNING")
    await expect(drawn.locator("title")).to_have_text(re.compile(re.escape(HOSTILE)))
    await expect(drawn.locator(".gname")).to_have_text(re.compile(r"^<img.*….*indeed$"))
    await drawn.click()
    await expect(ui.row(HOSTILE)).to_have_class(re.compile("selected"))
    await page.reload()
    await expect(ui.row(HOSTILE)).to_have_class(re.compile("selected"))
    sim.finish(held, HOSTILE)
    assert await page.locator("img").count() == 0


async def test_on_a_narrow_screen_layers_are_below_each_other(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """The arrow keys turn with them."""
    await page.set_viewport_size({"width": 360, "height": 740})
    await start(sim, viewer, ui, BRANCHES)
    plan, accept = [await ui.drawn(name).bounding_box() for name in ("plan", "accept")]
    assert plan["y"] + plan["height"] < accept["y"]
    await ui.drawn("plan").focus()
    await page.keyboard.press("ArrowDown")
    assert await page.evaluate("document.activeElement.dataset.node") == "accept"


async def test_a_status_beside_a_long_name_is_one_line(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """On a phone, the name of a node that the selected one depends on leaves room for it."""
    long = "extract customer records stage 1 shard 9"
    await page.set_viewport_size({"width": 390, "height": 844})
    held = await start(
        sim, viewer, ui, Scenario([SimNode(long, 1), SimNode("last", 1, after=[long])])
    )
    await page.evaluate(f"location.hash = '#/executions/{held}?node=last'")
    source = page.get_by_role("region", name="What it depends on").get_by_role("listitem")
    status = source.get_by_text("Success", exact=True)
    await expect(status).to_be_visible()
    box = await status.bounding_box()
    assert box is not None
    assert box["height"] < 30
    assert box["x"] + box["width"] <= 390


def shards(stages: int, count: int) -> Scenario:
    """Return stages of shards, each after its shard of the stage before; one shard failed."""
    nodes = []
    for stage in range(stages):
        for shard in range(count):
            after = [f"enrich texts stage {stage - 1} shard {shard}"] if stage else []
            failed: dict[str, Any] = {"status": "FAILED"} if (stage, shard) == (5, 8) else {}
            name = f"enrich texts stage {stage} shard {shard}"
            nodes.append(SimNode(name, shard, after=after, **failed))
    nodes.append(SimNode("end", 1, after=["enrich texts stage 1 shard 0"], is_output_node=True))
    return Scenario(nodes)


async def test_like_nodes_of_a_large_graph_are_one_box(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """A box counts its nodes and those that failed, and unfolds to the failed one."""
    sim.add_workflow("flow", shards(10, 15))
    execution = await viewer.board.start("flow", {})
    await ui.open_run(execution.id)
    boxes = page.locator(".gnode.folded")
    await expect(boxes).to_have_count(10)
    failed = page.locator('.gnode.folded[data-look="failed"]')
    await expect(failed).to_have_class(re.compile("selected"))
    await expect(failed).to_be_in_viewport()
    texts = await failed.locator("text").all_text_contents()
    assert re.fullmatch(r"enri.*…5 shard …", texts[0])
    assert texts[1] == "15 nodes, 1 failed"
    assert re.fullmatch(r"enri.*… ?5 shard 8", texts[2])

    await page.get_by_role("button", name="Fit").click()
    await expect(page.locator(".graph > svg")).to_have_class("small")
    await expect(failed.locator("text").first).to_be_hidden()

    await failed.focus()
    await page.keyboard.press("Enter")
    node = ui.drawn("enrich texts stage 5 shard 8")
    await expect(node).to_be_focused()
    await expect(page.locator(".gnode")).to_have_count(9 + 15 + 1)
    await expect(node).to_have_attribute("data-status", "FAILED")
    await page.get_by_role("button", name="Unfold all").click()
    await expect(page.locator(".gnode")).to_have_count(151)
    await page.get_by_role("button", name="Fold", exact=True).click()
    await expect(page.locator(".gnode")).to_have_count(11)
    await ui.check("a graph of 151 nodes")
