"""Write docs/images/viewer-*.png, from the demonstration: `nox -s browser -- --screenshots`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import CHROMIUM, FLAGS, NARROW, WIDE  # type: ignore[import-not-found]
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main() -> None:
    """Take the screenshots when one agent has succeeded, one has failed, and one is running."""
    command = [sys.executable, "-m", "promptlayer_exec", "view", "--demo"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport=WIDE)
            page.goto(url)
            page.locator('.card[data-state="succeeded"]').wait_for()
            page.locator('.node[data-status="failed"] summary').click()
            page.mouse.move(0, 0)
            for suffix, size in (("", WIDE), ("-narrow", NARROW)):
                page.set_viewport_size(size)
                for theme in ("light", "dark"):
                    page.emulate_media(color_scheme=theme)
                    page.screenshot(path=IMAGES / f"viewer-{theme}{suffix}.png")
            browser.close()
    finally:
        process.terminate()
        process.wait(10)


if __name__ == "__main__":
    main()
