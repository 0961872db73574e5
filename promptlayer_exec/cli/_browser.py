"""Opens a page in the user's browser, and keeps its token out of the list of processes."""

from __future__ import annotations

import asyncio
import html
import os
import tempfile
import webbrowser
from pathlib import Path

import anyio.to_thread

from promptlayer_exec.cli._stdio import err

_PAGE = """\
<!doctype html>
<meta charset="utf-8">
<meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0;url={url}">
<title>Executions</title>
<a href="{url}">Open the page</a>
"""


async def open_in_browser(url: str, opened: asyncio.Event) -> None:
    """Open a URL with the user's browser.

    A browser gets what it opens as an argument, which every user of the machine can read. So it
    gets the name of a file that only this user can read, and that leads to the URL; the file is
    deleted once the page is open.

    Args:
        url: the URL with its token.
        opened: set once a page is open.
    """
    with tempfile.TemporaryDirectory(prefix="promptlayer-exec-") as directory:
        path = Path(directory) / "open.html"
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(_PAGE.format(url=html.escape(url)))
        is_open = await anyio.to_thread.run_sync(
            webbrowser.open, path.as_uri(), abandon_on_cancel=True
        )
        if not is_open:
            err("there is no browser that could be opened here: open the page yourself")
            return
        await opened.wait()
