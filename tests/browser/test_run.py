"""The page of one execution: its address, its rows, and what can be copied from it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import BrowserContext, Page, expect

from promptlayer_exec.simulator import Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")

HELD = Scenario(
    [
        SimNode("plan", {"parts": 3}, None),
        SimNode("answer", "Otters are fine.", None, after=["plan"], is_output_node=True),
    ]
)
ERROR = "The index is not available: HTTP 503"
TRACE = "Traceback: ...\nOSError: HTTP 503"
DEEP = {"rows": [{"n": n, "name": f"row {n}"} for n in range(250)], "big": 2**63 + 1, "no": None}


MARKDOWN = """\
## Otters &amp; &lt;newts>

They eat **all** of [this](https://otters.example/a):

- [x] fish
- mussels

| year | otters |
|------|--------|
| 2009 | 40     |

```python
x < 1
```

[no](javascript:alert(1)) <img src=x onerror=alert(1)> https://otters.example/b
"""


def sixty(failing: int = 45) -> Scenario:
    """Return sixty nodes, one of which failed, in ten layers of six."""
    nodes = []
    for index in range(60):
        after = [] if index < 6 else [f"node {index - 6}"]
        failed = {"status": "FAILED", "error_message": ERROR, "raw_error_message": TRACE}
        more: dict[str, Any] = failed if index == failing else {}
        nodes.append(SimNode(f"node {index}", index, after=after, **more))
    return Scenario(nodes)


async def test_it_has_an_address_that_survives(
    sim: Simulator, viewer: Any, ui: Any, page: Page, context: BrowserContext
) -> None:
    """Reload, back and forward show the same node, and so does another tab."""
    held = sim.add_execution(HELD)
    viewer.board.follow(held)
    await page.get_by_role("link", name=f"Execution {held}").click()
    await expect(page.get_by_role("heading", name=f"Execution {held}")).to_be_focused()
    await ui.select("plan")
    await ui.select("answer")
    address = f"{viewer.origin}/#/executions/{held}?node=answer"
    assert page.url == address
    await page.reload()
    await expect(ui.selected.locator("h3")).to_have_text("answer")
    await expect(ui.row("answer")).to_have_class(re.compile("selected"))
    await page.go_back()
    await expect(page.locator(".line")).to_be_visible()
    await page.go_forward()
    await expect(ui.selected.locator("h3")).to_have_text("answer")
    other = await context.new_page()
    await other.goto(address)
    await expect(other.locator(".run .node.selected")).to_contain_text("answer")


async def test_a_bookmark_follows_an_execution_again(
    sim: Simulator, viewer: Any, ui: Any, page: Page, browser_errors: Any
) -> None:
    """One that is not on the page is asked for; if the server has none, the page says so."""
    browser_errors.expected = ("404 (Not Found)",)
    held = sim.add_execution(HELD)
    await ui.open_run(held)
    await expect(ui.row("plan")).to_have_attribute("data-status", "running")
    assert list(viewer.board.cards) == [held]
    await ui.open_run(77)
    await expect(ui.part("problem")).to_contain_text("The server returned 404")
    sim.add_execution(HELD, execution_id=77)
    await page.get_by_role("button", name="Try again").click()
    await expect(ui.row("plan")).to_have_attribute("data-status", "running")
    await page.get_by_role("button", name="Remove").click()
    await expect(page.locator(".line")).to_have_count(1)
    assert list(viewer.board.cards) == [held]


@pytest.mark.parametrize("width", [1280, 360])
async def test_the_failed_one_of_sixty_nodes_is_in_sight(
    sim: Simulator, ui: Any, page: Page, width: int
) -> None:
    """Whatever is chosen is shown where one looks; the page stays, and so do the columns' heads."""
    await page.set_viewport_size({"width": width, "height": 800})
    failed = sim.add_execution(sixty())
    ui.viewer.board.follow(failed)
    await page.get_by_role("link", name=f"Execution {failed}").click()
    await expect(ui.part("count")).to_have_text("57 of 60 nodes succeeded, 1 failed, 2 skipped.")
    await expect(ui.part("sentence")).to_contain_text(f" in node 45: {ERROR}.")
    trace = ui.selected.locator('[data-part="trace"]')
    await expect(trace).to_have_text(TRACE)
    await expect(ui.row("node 45")).to_have_class(re.compile("selected"))
    assert page.url.endswith("?node=node+45")

    async def in_sight(locator: Any) -> None:
        box = await locator.bounding_box()
        assert box is not None
        assert 0 <= box["y"] <= 800 - min(box["height"], 40)

    await in_sight(ui.part("sentence"))
    await in_sight(trace)
    # In the middle, so that nothing covers it and the click need not scroll.
    await ui.row("node 30").evaluate("row => row.scrollIntoView({ block: 'center' })")
    places = "[scrollY, document.querySelector('.scroller').scrollTop]"
    before = await page.evaluate(places)
    assert sum(before) > 0
    await ui.select("node 30")
    assert await page.evaluate(places) == before
    await in_sight(ui.selected.locator("h3"))
    await in_sight(ui.row("node 30"))
    if width > 1000:
        await in_sight(ui.part("columns"))
    await page.evaluate("scrollTo(0, 0)")
    await ui.part("sentence").get_by_role("link", name="node 45").click()
    await page.get_by_role("button", name="Copy the error of node 45").click()
    copied = ui.selected.locator('[data-part="error-copied"]')
    await expect(copied).to_have_text("Copied")
    assert await ui.copied() == ERROR
    await copied.evaluate("(one) => { one.textContent = '' }")
    await page.get_by_role("button", name="Copy the traceback of node 45").click()
    await expect(copied).to_have_text("Copied")
    assert await ui.copied() == TRACE


async def test_updates_move_nothing(sim: Simulator, ui: Any, page: Page) -> None:
    """Neither the rows, nor the focus, nor the scroll position; the bar goes at the end."""
    nodes = [SimNode(f"node {index}", index, None) for index in range(60)]
    held = sim.add_execution(Scenario(nodes))
    await ui.open_run(held)
    await expect(ui.row("node 59")).to_have_attribute("data-status", "running")
    await ui.row("node 30").locator(".row").focus()
    scroller = ui.part("scroller")
    before = await scroller.evaluate("(one) => one.scrollTop")
    assert before > 0
    await page.evaluate(
        """() => { scrollTo(0, 200); window.shift = 0; new PerformanceObserver((list) => {
            for (const one of list.getEntries()) window.shift += one.value;
        }).observe({ type: "layout-shift" }); }"""
    )
    for index in range(59):
        sim.finish(held, f"node {index}")
    await expect(ui.part("count")).to_have_text("59 of 60 nodes succeeded, 1 running.")
    assert await page.evaluate("scrollY") == 200
    assert await scroller.evaluate("(one) => one.scrollTop") == before
    await expect(ui.row("node 30").locator(".row")).to_be_focused()
    assert await page.evaluate("window.shift") < 0.01
    await expect(ui.part("progress")).to_be_visible()
    sim.finish(held, "node 59", status="FAILED")
    await expect(ui.part("state")).to_have_text("Failed")
    await expect(ui.part("progress")).to_be_hidden()


async def test_a_success_with_failures_says_so(sim: Simulator, ui: Any) -> None:
    """An output came out, though not every node succeeded."""
    nodes = [SimNode("try", status="FAILED"), SimNode("answer", "yes", is_output_node=True)]
    await ui.open_run(sim.add_execution(Scenario(nodes)))
    await expect(ui.part("state")).to_have_text("Succeeded, 1 node failed")


async def test_a_node_that_fails_later_is_selected(sim: Simulator, ui: Any) -> None:
    """Unless somebody has chosen another one."""
    for is_chosen in (False, True):
        held = sim.add_execution(HELD)
        await ui.open_run(held)
        await expect(ui.row("plan")).to_have_attribute("data-status", "running")
        if is_chosen:
            await ui.select("answer")
        sim.finish(held, "plan", status="FAILED", error_message=ERROR)
        await expect(ui.row("plan")).to_have_attribute("data-status", "failed")
        shown = "answer" if is_chosen else "plan"
        await expect(ui.selected.locator("h3")).to_have_text(shown)


async def test_rows_are_sorted_and_filtered_by_the_address(
    sim: Simulator, ui: Any, page: Page
) -> None:
    """By start, duration and name; the filter finds names and statuses."""
    nodes = [
        SimNode("c long", "x", None),
        SimNode("b", "x", None, after=["a"]),
        SimNode("a", "x", None),
        SimNode("d skipped", when=lambda _: False),
    ]
    done = sim.add_execution(Scenario(nodes))
    await ui.open_run(done)
    for name in ("a", "b", "c long"):
        await expect(ui.row(name)).to_have_attribute("data-status", "running")
        sim.finish(done, name)
        await expect(ui.row(name)).to_have_attribute("data-status", "success")
    await expect(page.locator('.run[data-state="succeeded"]')).to_be_visible()
    assert await ui.names() == ["c long", "b", "a", "d skipped"]
    sort = page.get_by_label("Sort by")
    for order, names in (
        ("start", ["c long", "a", "b", "d skipped"]),
        ("duration", ["c long", "b", "a", "d skipped"]),
        ("name", ["a", "b", "c long", "d skipped"]),
    ):
        await sort.select_option(order)
        found = await ui.names()
        if order == "duration":  # which of the other two is longer depends on the polls
            found[1:3] = sorted(found[1:3], reverse=True)
        assert found == names
    await page.get_by_label("Filter", exact=True).locator("visible=true").fill("skip")
    await expect(ui.row("a")).to_be_hidden()
    await page.reload()
    await expect(ui.row("d skipped")).to_be_visible()
    await expect(ui.row("a")).to_be_hidden()
    assert (await ui.names())[0] == "a"
    assert page.url.endswith(f"#/executions/{done}?filter=skip&sort=name")


async def test_the_critical_path_is_marked(sim: Simulator, ui: Any) -> None:
    """It is what the execution waited for; without a definition, the times tell."""
    nodes = [
        SimNode("quick", "x", None),
        SimNode("slow", "x", None),
        SimNode("end", "x", None, after=["quick", "slow"], is_output_node=True),
    ]
    held = sim.add_execution(Scenario(nodes))
    await ui.open_run(held)
    for name in ("quick", "slow", "end"):
        await expect(ui.row(name)).to_have_attribute("data-status", "running")
        sim.finish(held, name)
        await expect(ui.row(name)).to_have_attribute("data-status", "success")
    await expect(ui.part("facts")).to_contain_text("slow → end")
    await expect(ui.part("facts")).to_contain_text("judged by the times alone")
    await expect(ui.row("slow")).to_contain_text("critical")
    await expect(ui.row("quick").locator('[data-part="critical"]')).to_be_hidden()


async def test_times_are_those_of_the_clock_too(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """A run that was started here says when it started, and how long ago."""
    sim.add_workflow("report", HELD)
    await viewer.board.start("report", {})
    (execution_id,) = viewer.board.cards
    await ui.open_run(execution_id)
    now = await page.evaluate("new Date().toLocaleTimeString('en-US')")
    hour = now.split(":")[0]
    await expect(ui.part("facts")).to_contain_text(re.compile(rf"Started ?{hour}:\d\d:\d\d"))
    await expect(ui.part("facts")).to_contain_text("(just now)")
    moment = await ui.run.locator("dl time").first.get_attribute("datetime")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", moment or "")
    sim.finish(execution_id, "plan")
    await expect(ui.row("plan")).to_have_attribute("data-status", "success")
    bar = ui.row("plan").locator('[data-part="stretch"]')
    moments = re.compile(rf"^<?\d\.\d s \({hour}:.*\) to \d\.\d s \({hour}:.*\), \d\.\d s$")
    await expect(bar).to_have_attribute("title", moments)
    await ui.select("plan")
    times = ui.selected.locator('[data-part="times"]')
    await expect(times).to_have_text(
        re.compile(rf"running at \d\.\d s \({hour}:.* and final at \d\.\d s \({hour}:.*\)\.")
    )


async def test_snippets_and_inputs_can_be_copied_and_run(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """The copied command and the copied program follow this execution; they hold no key."""
    done = Scenario([SimNode("answer", "Otters!", is_output_node=True)])
    sim.add_workflow("report", done)
    execution = await viewer.board.start("report", {"topic": "otters", "n": 2**63})
    await ui.open_run(execution.id)
    await page.get_by_role("button", name="Copy inputs").click()
    await expect(ui.part("inputs").get_by_text("Copied")).to_be_visible()
    assert json.loads(await ui.copied()) == {"topic": "otters", "n": 2**63}
    await expect(ui.part("inputs")).to_contain_text(str(2**63))
    environment = {**os.environ, "PROMPTLAYER_API_KEY": sim.api_key}
    for name, command in (("curl", ["sh", "-c"]), ("Python", [sys.executable, "-c"])):
        if name == "curl" and shutil.which("curl") is None:
            continue
        await page.get_by_role("button", name=f"Copy the {name} snippet").click()
        section = ui.run.locator(".snippet").filter(has_text=name)
        await expect(section.locator('[data-part="copied"]')).to_have_text("Copied")
        code = await ui.copied()
        assert sim.api_key not in code
        process = await asyncio.create_subprocess_exec(
            *command, code, stdout=asyncio.subprocess.PIPE, env=environment
        )
        output, _ = await process.communicate()
        assert b"Otters!" in output
        assert process.returncode == 0


async def test_the_output_is_shown_beside_the_inputs(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """Once the execution has ended; everything can be downloaded as JSON."""
    sim.add_workflow("report", HELD)
    execution = await viewer.board.start("report", {"topic": "otters"})
    await ui.open_run(execution.id)
    await expect(ui.part("inputs")).to_contain_text("otters")
    await expect(ui.part("output-panel")).to_be_hidden()
    for name in ("plan", "answer"):
        sim.finish(execution.id, name)
    await expect(ui.part("outputs")).to_contain_text("Otters are fine.")
    await page.get_by_role("button", name="Copy the value of the output answer").click()
    await expect(ui.part("outputs").locator('[data-part="copied"]')).to_have_text("Copied")
    assert await ui.copied() == "Otters are fine."
    async with page.expect_download() as started:
        await page.get_by_role("button", name="Download as JSON").click()
    download = await started.value
    assert download.suggested_filename == f"execution-{execution.id}.json"
    text = Path(await download.path()).read_text()  # noqa: ASYNC240 - nothing else runs
    content = json.loads(text)
    assert content["nodes"]["answer"]["value"] == "Otters are fine."


async def test_json_is_folded_and_searched(sim: Simulator, ui: Any, page: Page) -> None:
    """Branches are made as they are opened; Enter goes to the next result; numbers are exact."""
    await ui.open_run(sim.add_execution(Scenario([SimNode("rows", DEEP)])))
    await ui.select("rows")
    row = ui.selected
    tree = row.locator(".tree")
    await expect(tree).to_contain_text("{} 3 keys")
    await expect(tree).to_contain_text("[] 250 items")
    await expect(tree).to_contain_text(f"big: {2**63 + 1}")
    assert await tree.locator("li").count() == 4
    find = row.get_by_label("Search the value of rows")
    await find.fill("row 249")
    await expect(row.locator('[data-part="found"]')).to_have_text("1 of 1")
    await expect(tree.locator(".found")).to_have_text("row 249")
    await expect(tree.locator(".found")).to_be_in_viewport()
    await find.fill("row 24")
    await expect(row.locator('[data-part="found"]')).to_have_text("1 of 11")
    await find.press("Enter")
    await expect(row.locator('[data-part="found"]')).to_have_text("2 of 11")
    await find.press("Shift+Enter")
    await find.press("Shift+Enter")
    await expect(row.locator('[data-part="found"]')).to_have_text("11 of 11")
    await find.fill("nowhere")
    await expect(row.locator('[data-part="found"]')).to_have_text("Nothing found")
    await row.get_by_role("button", name="Raw").click()
    await expect(row.locator('[data-part="value"]')).to_have_text(json.dumps(DEEP, indent=2))


async def test_a_run_that_was_over_before_has_no_times(sim: Simulator, ui: Any) -> None:
    """No duration, no end, and no bars; its page says why."""
    await ui.open_run(sim.add_execution(Scenario([SimNode("a", "x"), SimNode("b", "y")])))
    await expect(ui.part("facts")).to_have_text(
        "Durationnot known: the run was over before this viewer saw it"
    )
    await expect(ui.part("elapsed")).to_be_empty()
    await expect(ui.row("a").locator('[data-part="stretch"]')).to_be_hidden()
    await ui.select("a")
    await expect(ui.selected.locator('[data-part="times"]')).to_contain_text(
        "was over before this viewer saw the run"
    )


async def test_markdown_is_rendered(sim: Simulator, ui: Any, page: Page) -> None:
    """As elements, with links to pages alone; the raw text is one click away."""
    await ui.open_run(sim.add_execution(Scenario([SimNode("report", MARKDOWN)])))
    await ui.select("report")
    rich = ui.selected.locator('[data-part="rich"]')
    await expect(rich.get_by_role("heading", name="Otters & <newts>")).to_be_visible()
    await expect(rich.locator("li")).to_have_text(["[x] fish", "mussels"])
    await expect(rich.locator("td")).to_have_text(["2009", "40"])
    await expect(rich.locator("strong")).to_have_text("all")
    await expect(rich.locator("pre")).to_have_text("x < 1")
    links = await rich.locator("a").evaluate_all("(all) => all.map((one) => [one.href, one.rel])")
    assert [href for href, _ in links] == ["https://otters.example/a", "https://otters.example/b"]
    assert {rel for _, rel in links} == {"noopener noreferrer"}
    await expect(rich).to_contain_text("<img src=x onerror=alert(1)>")
    assert await rich.locator("img, script").count() == 0
    raw = ui.selected.locator('[data-part="value"]')
    await expect(raw).to_be_hidden()
    await ui.selected.get_by_role("button", name="Raw").click()
    await expect(raw).to_have_text(MARKDOWN)
    await ui.selected.get_by_role("button", name="Raw").click()
    await ui.selected.get_by_label("Search the value of report").fill("FISH")
    await expect(raw.locator("mark")).to_have_text("fish")


async def test_chat_messages_and_json_in_strings_are_rendered(sim: Simulator, ui: Any) -> None:
    """A message is Markdown under its role; JSON in a string is a branch of the tree."""
    chat = [
        {"role": "system", "content": "Be **brief**."},
        {"role": "user", "content": [{"type": "text", "text": "See https://a.example/x."}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "find"}]},
    ]
    inner = {"body": json.dumps({"rows": [1, 2], "big": 2**63 + 1}), "pad": "x" * 120}
    nodes = [SimNode("chat", chat), SimNode("nested", inner), SimNode("text", json.dumps(inner))]
    await ui.open_run(sim.add_execution(Scenario(nodes)))
    await ui.select("chat")
    messages = ui.selected.locator(".message")
    await expect(messages.locator(".role")).to_have_text(["system", "user", "assistant"])
    await expect(messages.nth(0).locator("strong")).to_have_text("brief")
    await expect(messages.nth(1).get_by_role("link")).to_have_text("https://a.example/x")
    await expect(messages.nth(2)).to_contain_text("tool_calls: [] 1 item")
    for name in ("nested", "text"):
        await ui.select(name)
        tree = ui.selected.locator(".tree")
        await tree.get_by_text("JSON in a string: {} 2 keys").click()
        await expect(tree).to_contain_text(f"big: {2**63 + 1}")


async def test_a_long_list_is_shown_in_parts(sim: Simulator, ui: Any) -> None:
    """A hundred items at a time."""
    await ui.open_run(sim.add_execution(Scenario([SimNode("rows", list(range(1000)))])))
    await ui.select("rows")
    tree = ui.selected.locator(".tree")
    await expect(tree.locator(".leaf")).to_have_count(100)
    await tree.get_by_role("button", name="Show 100 of 900 more").click()
    await expect(tree.locator(".leaf")).to_have_count(200)


async def test_the_tab_tells_the_state(sim: Simulator, ui: Any, page: Page) -> None:
    """Title and icon change, on the page of an execution and on that of all."""
    icon = page.locator("#favicon")
    await expect(icon).to_have_attribute("href", "favicon.svg")
    held = sim.add_execution(HELD)
    await ui.open_run(held)
    await expect(page).to_have_title(f"0/2 Execution {held}")
    await expect(icon).to_have_attribute("href", "favicon-running.svg")
    status = ui.part("state")
    color = "(one) => getComputedStyle(one).color"
    running = await status.evaluate(color)
    sim.finish(held, "plan", status="FAILED", error_message=ERROR)
    await expect(page).to_have_title(f"✗ Execution {held}")
    await expect(icon).to_have_attribute("href", "favicon-failed.svg")
    failed = await status.evaluate(color)
    done = sim.add_execution(Scenario([SimNode("a", "b")]))
    await ui.open_run(done)
    await expect(page).to_have_title(f"✓ Execution {done}")
    await expect(icon).to_have_attribute("href", "favicon-succeeded.svg")
    assert len({running, failed, await status.evaluate(color)}) == 3
    response = await page.request.get(f"{ui.viewer.origin}/favicon-succeeded.svg")
    assert response.headers["content-type"].startswith("image/svg+xml")
    await ui.open("#/")
    await expect(page).to_have_title("1 failed · Executions")
    await expect(icon).to_have_attribute("href", "favicon-failed.svg")


async def test_the_end_of_a_run_is_notified_if_allowed(
    sim: Simulator, viewer: Any, ui: Any, page: Page, context: BrowserContext
) -> None:
    """Only after it was asked for, and only while the page is not looked at."""
    await context.grant_permissions(["notifications"])
    # A headless browser shows none; this records what would be shown.
    await page.add_init_script(
        """window.shown = [];
        window.Notification = class extends EventTarget {
            static permission = "granted";
            constructor(title, options) { super(); window.shown.push([title, options, this]); }
            close() {}
        };
        Object.defineProperty(document, "hasFocus", { value: () => window.isSeen ?? false });"""
    )
    await page.reload()
    ends = []
    for is_wanted in (False, True):
        if is_wanted:
            await page.get_by_role("button", name="Notify me").click()
        held = sim.add_execution(HELD)
        viewer.board.follow(held)
        line = page.locator(f'.line[data-id="{held}"]')
        await expect(line).to_have_attribute("data-state", "running")
        sim.finish(held, "plan", status="FAILED")
        await expect(line).to_have_attribute("data-state", "failed")
        ends.append(held)
    shown = await page.evaluate("window.shown.map(([title, options]) => [title, options.body])")
    assert [title for title, _ in shown] == [f"Execution {ends[1]}: failed"]
    assert shown[0][1].startswith("Failed in plan: ")
    await page.evaluate("window.shown[0][2].dispatchEvent(new Event('click'))")
    await expect(ui.part("crumb")).to_have_text(f"Execution {ends[1]}")


async def test_the_page_of_an_execution_survives_a_restart(
    sim: Simulator, viewer: Any, ui: Any, page: Page, browser_errors: Any
) -> None:
    """It stays on the same execution, which is followed again."""
    browser_errors.expected = ("ERR_", "Failed to load resource")
    held = sim.add_execution(HELD)
    await ui.open_run(held, "?node=plan")
    await expect(ui.row("plan")).to_have_attribute("data-status", "running")
    await viewer.stop()
    await expect(page.locator("#connection")).to_contain_text("The viewer has stopped")
    sim.finish(held, "plan")
    await viewer.start()
    await expect(ui.row("plan")).to_have_attribute("data-status", "success")
    await expect(ui.row("plan")).to_have_class(re.compile("selected"))
