"""Write the images of pages in docs/images: `nox -s browser -- --screenshots`."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conftest import CHROMIUM, FLAGS, WIDE  # type: ignore[import-not-found]
from playwright.async_api import Browser, Page, async_playwright, expect
from test_client import App  # type: ignore[import-not-found]

from promptlayer_exec import Observer, PollPolicy, RetryPolicy, Session, StartRequest
from promptlayer_exec.cli import _demo as demo
from promptlayer_exec.dbos import Batch
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator, examples
from promptlayer_exec.viewer import Address, Board, History, listen, serve

IMAGES = Path(__file__).parents[2] / "docs" / "images"
TOKEN = "t" * 22


async def main() -> None:
    """Take the screenshots of each view."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        os.environ["PROMPTLAYER_EXEC_DB"] = f"sqlite:///{directory / 'batches.sqlite'}"
        sim = await stack.enter_async_context(Simulator(log_requests=False))
        examples.add_workflows(sim)
        session = _session(sim, lambda event: board.observe(event))  # noqa: PLW0108 - made below
        await stack.enter_async_context(session)
        history = History(directory / "history.sqlite", server=sim.base_url)
        demo.add_past_runs(sim, history, time.time())
        board = await stack.enter_async_context(Board(session, history=history))
        listener = listen("127.0.0.1", 0)
        address = Address("127.0.0.1", listener.getsockname()[1])
        serving = asyncio.create_task(serve(board, listener, address, TOKEN))
        playwright = await stack.enter_async_context(async_playwright())
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = await browser.new_page(viewport=WIDE)
        await page.goto(f"{address.base_url}/#token={TOKEN}")
        await demo.start_runs(board)
        await _runs(page)
        await _start(page)
        await _history(page)
        await _incident(sim, board, page)
        await _batch(sim, page)
        await board.start("research-report", {"topic": "storks"})
        await asyncio.sleep(4)
        sim.inject(Fault.disconnect(times=None))
        await page.goto(f"{address.base_url}/#/")
        await expect(page.locator("#connection")).to_contain_text("is unreachable")
        await asyncio.sleep(2)
        await _take(page, "unreachable")
        await _web_app(browser, directory)
        await browser.close()
        serving.cancel()
        await asyncio.wait([serving])


def _session(sim: Simulator, *observers: Observer) -> Session:
    poll, retry = PollPolicy(floor=0.2, ceiling=0.4), RetryPolicy(watch_outage=600)
    return Session(sim.api_key, base_url=sim.base_url, poll=poll, retry=retry, observers=observers)


async def _take(page: Page, name: str) -> None:
    await page.mouse.move(0, 0)
    await page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    await asyncio.sleep(0.5)
    await page.screenshot(path=IMAGES / f"viewer-{name}-light.png")


async def _open(page: Page, name: str) -> None:
    await page.get_by_role("link", name="Live").click()
    await page.get_by_role("link", name=name, exact=True).first.click()
    await page.locator(".gnode").first.wait_for()


async def _runs(page: Page) -> None:
    await page.locator('.line[data-state="succeeded"]').wait_for()
    await page.get_by_role("button", name="Nodes of execution").first.click()
    await _take(page, "board")
    await _open(page, "research-report")
    await _take(page, "running")
    await _open(page, "invoice-check")
    await _take(page, "run")
    await _open(page, "support-agent")
    await _take(page, "succeeded")


async def _start(page: Page) -> None:
    await page.get_by_role("button", name="Run again").click()
    await page.get_by_role("button", name="Edit the inputs first").click()
    await page.locator("#field-0").fill(
        "My invoice of October is missing. Could you send it again?"
    )
    await _take(page, "start")
    await page.get_by_role("button", name="Start", exact=True).click()
    await page.get_by_role("button", name="Start a new run").click()
    await page.locator('.run[data-state="succeeded"]').wait_for()
    await page.get_by_role("button", name="Compare with …").first.click()
    await page.get_by_label("Compare with").select_option(index=1)
    await page.locator(".compare-form").get_by_role("button", name="Compare").click()
    await page.locator('.pair[data-name="read letter"] summary').click()
    await page.locator(".diff.changed").first.wait_for()
    await _take(page, "compare")


async def _history(page: Page) -> None:
    await page.get_by_role("link", name="History").click()
    await page.locator(".trend").first.wait_for()
    await _take(page, "history")


async def _incident(sim: Simulator, board: Board, page: Page) -> None:
    def offer(inputs: Any) -> Scenario:
        seats = 0 if inputs["plan"] == "free" else 12
        reason = f"rate limit of '{inputs['customer']}': retry in {len(inputs['customer'])} s"
        failed: dict[str, Any] = {"status": "FAILED", "error_message": reason}
        return Scenario(
            [
                SimNode("load customer", {"seats": seats, "plan": inputs["plan"]}, 0.3),
                SimNode("choose offer", "annual", 0.3, after=["load customer"])
                if seats
                else SimNode("choose offer", duration=0.3, after=["load customer"], **failed),
            ]
        )

    sim.add_workflow("churn-offer", offer)
    for customer in ("acme", "hooli"):
        await board.start("churn-offer", {"customer": customer, "plan": "pro"})
    for customer in ("globex", "initech", "umbrella", "stark", "wayne", "wonka"):
        await board.start("churn-offer", {"customer": customer, "plan": "free"})
    await page.get_by_role("link", name="Live").click()
    await page.locator(".incident", has_text="6 failed").wait_for()
    await page.locator(".incident [data-part=difference]").wait_for()
    await _take(page, "incident")


async def _batch(sim: Simulator, page: Page) -> None:
    def grade(inputs: Any) -> Scenario:
        failed = {"status": "FAILED", "error_message": "The answer has no text: 422"}
        more: dict[str, Any] = failed if inputs["n"] % 9 == 4 else {}
        return Scenario([SimNode("grade", inputs["n"], is_output_node=True, **more)])

    sim.add_workflow("grades", grade)
    batch = Batch("grades-of-november", session=lambda: _session(sim))
    await batch.add([StartRequest("grades", {"n": n}, key=f"answer-{n:03}") for n in range(30)])
    sim.inject(Fault.disconnect(times=2), path="/run")
    await batch.work()
    await page.get_by_role("link", name="Batches").click()
    await page.get_by_role("link", name="grades-of-november").click()
    await page.locator(".item").first.wait_for()
    await _take(page, "batches")


async def _web_app(browser: Browser, directory: Path) -> None:
    """Take the page of docs/fastapi.md while its run is on the way."""
    async with Simulator(log_requests=False) as sim:
        examples.add_workflows(sim)
        app = App(directory, sim, sim.base_url)
        await app.start()
        page = await browser.new_page(
            viewport={"width": 560, "height": 220},
            http_credentials={"username": "me", "password": "secret"},
        )
        await page.goto(app.url)
        await page.get_by_role("button").click()
        await expect(page.locator("#state")).to_have_text("33 %")
        await page.screenshot(path=IMAGES / "web-app.png")
        await page.close()
        await app.kill()


if __name__ == "__main__":
    asyncio.run(main())
