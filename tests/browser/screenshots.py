"""Write docs/images/viewer-*.png, from the demonstration: `nox -s browser -- --screenshots`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import CHROMIUM, FLAGS, NARROW, WIDE  # type: ignore[import-not-found]
from playwright.sync_api import Page, ViewportSize, sync_playwright

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main() -> None:
    """Take the screenshots of each view, in both themes and on a narrow screen."""
    command = [sys.executable, "-m", "promptlayer_exec", "view", "--demo"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport=WIDE)
            page.goto(url)
            _live(page)
            _run(page)
            _start(page)
            _compare(page)
            _history(page)
            browser.close()
    finally:
        process.terminate()
        process.wait(10)


def _take(page: Page, name: str, *sizes: ViewportSize) -> None:
    for size in sizes or (WIDE,):
        page.set_viewport_size(size)
        if size is NARROW:  # the graph is drawn for the width that it finds
            page.reload()
            page.locator(".gnode").first.wait_for()
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        suffix = "-narrow" if size is NARROW else ""
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            page.screenshot(path=IMAGES / f"viewer-{name}-{theme}{suffix}.png")
    page.set_viewport_size(WIDE)


def _live(page: Page) -> None:
    page.locator('.card[data-state="succeeded"]').wait_for()
    page.locator('.node[data-status="failed"] summary').click()
    _take(page, "live")


def _run(page: Page) -> None:
    page.get_by_role("link", name="invoice-check").click()
    page.locator(".gnode").first.wait_for()
    _take(page, "run", WIDE, NARROW)
    page.get_by_role("link", name="Live").click()
    page.get_by_role("link", name="support-agent").first.click()
    page.locator(".gnode").first.wait_for()
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.locator('[data-part="graph-panel"]').screenshot(
            path=IMAGES / f"viewer-graph-{theme}.png"
        )


def _start(page: Page) -> None:
    page.get_by_role("button", name="Run again").click()
    page.get_by_role("button", name="Edit the inputs first").click()
    page.get_by_label("letter").fill("My invoice of October is missing. Could you send it again?")
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_role("button", name="Start a new run").click()
    page.locator('.run[data-state="succeeded"]').wait_for()


def _compare(page: Page) -> None:
    page.get_by_role("button", name="Compare", exact=True).first.click()
    page.get_by_label("Compare with").select_option(index=1)
    page.locator(".compare-form").get_by_role("button", name="Compare").click()
    page.locator('.pair[data-name="read letter"] summary').click()
    page.locator(".diff.changed").first.wait_for()
    _take(page, "compare")


def _history(page: Page) -> None:
    page.get_by_role("link", name="History").click()
    page.locator(".trend").first.wait_for()
    _take(page, "history")


if __name__ == "__main__":
    main()
