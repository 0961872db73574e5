"""Measure what the viewer's page costs a browser.

Usage: python benchmarks/page_cost.py [--seconds N] [--minutes N]

It needs the extra `viewer`, playwright and Chromium. It measures each page for a minute, and the
memory for ten. `--seconds 10 --minutes 0` takes less than a minute, and leaves out the memory.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import shutil
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from needs import need

need(extras="viewer", packages="playwright")
from playwright.async_api import Browser, CDPSession, Page, async_playwright

from promptlayer_exec import PollPolicy, RetryPolicy, Session
from promptlayer_exec.simulator import Scenario, SimNode, Simulator
from promptlayer_exec.viewer import Address, Board, History, listen, serve

TOKEN = "t" * 22
RUNS = 60
WARMUP = 5.0  # seconds until the page is at rest
LOADS = 5


def chain(status: str | None = None) -> Scenario:
    """Return four nodes. Without a status, the last three are held."""
    failed: dict[str, Any] = {}
    if status == "FAILED":
        failed = {"status": status, "error_message": "rate limit: try again in 12 s"}
    held = None if status is None else 0.01
    nodes = [
        SimNode("load customer", {"seats": 12}, 0.01),
        SimNode("search", "found", held, after=["load customer"]),
        SimNode("choose offer", "annual", held, after=["search"], **failed),
        SimNode("answer", "Fine.", held, after=["choose offer"], is_output_node=True),
    ]
    return Scenario(nodes)


def wide() -> Scenario:
    """Return 150 nodes that all run at the same time, in ten workflows' worth of names."""
    return Scenario([SimNode(f"group {n // 15} part {n % 15}", n, None) for n in range(150)])


class Measurement:
    """A browser that shows one page, and what its processes cost."""

    def __init__(self, browser: Browser, control: CDPSession, url: str) -> None:
        self._browser = browser
        self._control = control
        self._url = url

    async def open(self, address: str = "") -> Page:
        """Open the page at an address, in a new context."""
        page = await self._browser.new_page(viewport={"width": 1280, "height": 900})
        await page.goto(self._url)
        await page.locator(".line").first.wait_for(state="attached")
        await page.evaluate("(address) => { location.hash = address }", address)
        await asyncio.sleep(WARMUP)
        return page

    async def cpu(self) -> float:
        """Return the CPU seconds that all renderers and the compositor have used."""
        found = await self._control.send("SystemInfo.getProcessInfo")
        kinds = ("renderer", "GPU")
        return sum(one["cpuTime"] for one in found["processInfo"] if one["type"] in kinds)

    async def share(self, seconds: float) -> float:
        """Return which share of a core the open page uses."""
        before, began = await self.cpu(), time.monotonic()
        await asyncio.sleep(seconds)
        return (await self.cpu() - before) / (time.monotonic() - began)

    async def first_line(self) -> float:
        """Return the milliseconds from opening the page to the first line of the board."""
        page = await self._browser.new_page(viewport={"width": 1280, "height": 900})
        await page.add_init_script(
            "new MutationObserver((_, observer) => {"
            " if (document.querySelector('#board .line') === null) return;"
            " window.firstLine = performance.now(); observer.disconnect();"
            "}).observe(document, { childList: true, subtree: true });"
        )
        await page.goto(self._url)
        await page.wait_for_function("() => window.firstLine !== undefined")
        milliseconds: float = await page.evaluate("window.firstLine")
        await page.close()
        return milliseconds


async def heap(page: Page) -> float:
    """Return the megabytes of the page's objects that are in use."""
    cdp = await page.context.new_cdp_session(page)
    await cdp.send("HeapProfiler.collectGarbage")
    await cdp.send("Performance.enable")
    metrics = (await cdp.send("Performance.getMetrics"))["metrics"]
    await cdp.detach()
    return next(one["value"] for one in metrics if one["name"] == "JSHeapUsedSize") / 1e6


async def finish_nodes(sim: Simulator, ids: list[int]) -> None:
    """Finish a node each second, one run after the other: a board on which something happens."""
    for name, execution_id in itertools.product(("search", "choose offer"), ids):
        await asyncio.sleep(1.0)
        sim.finish(execution_id, name)


async def main(seconds: float, minutes: float) -> None:
    """Measure a board of 60 runs, and a page of 150 running nodes."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        sim = await stack.enter_async_context(Simulator(log_requests=False))
        session = Session(
            sim.api_key,
            base_url=sim.base_url,
            poll=PollPolicy.fixed(1.0),
            retry=RetryPolicy(watch_outage=600),
            rate=None,
        )
        await stack.enter_async_context(session)
        history = History(directory / "history.sqlite", server=sim.base_url)
        board = await stack.enter_async_context(Board(session, history=history))
        sim.add_workflow("wide", wide())
        large = await board.start("wide", {})
        states = ["FAILED"] * 15 + ["SUCCESS"] * 15 + [None] * 30
        scenarios = [chain(status) for status in states]
        sim.add_workflow("churn-offer", lambda inputs: scenarios[inputs["number"]])
        ids = [(await board.start("churn-offer", {"number": n})).id for n in range(RUNS)]
        listener = listen("127.0.0.1", 0)
        address = Address("127.0.0.1", listener.getsockname()[1])
        serving = asyncio.create_task(serve(board, listener, address, TOKEN))

        playwright = await stack.enter_async_context(async_playwright())
        flags = ["--headless", "--no-sandbox", "--disable-gpu"]
        chromium = shutil.which("chromium")
        browser = await playwright.chromium.launch(executable_path=chromium, args=flags)
        control = await browser.new_browser_cdp_session()
        measurement = Measurement(browser, control, f"{address.base_url}/#token={TOKEN}")

        loads = [await measurement.first_line() for _ in range(LOADS)]
        print(f"first line of the board: {statistics.median(loads):.0f} ms")

        page = await measurement.open(f"#/executions/{large.id}")
        share = await measurement.share(seconds)
        print(f"page of 150 running nodes: {100 * share:.1f} % of a core")
        await page.close()

        page = await measurement.open()
        share = await measurement.share(seconds)
        print(f"board of {RUNS} runs, {states.count(None)} running: {100 * share:.1f} % of a core")
        changing = asyncio.create_task(finish_nodes(sim, ids[30:]))
        share = await measurement.share(seconds)
        print(f"the same, with a change each second: {100 * share:.1f} % of a core")
        if minutes > 0:
            sizes = [await heap(page)]
            for _ in range(5):
                await asyncio.sleep(12 * minutes)
                sizes.append(await heap(page))
            shown = " → ".join(f"{size:.2f}" for size in sizes)
            print(f"memory of the board during {minutes:g} minutes: {shown} MB")
        changing.cancel()

        await browser.close()
        serving.cancel()
        await asyncio.wait([serving, changing])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement of CPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the measurement of memory")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.seconds, arguments.minutes))
