"""Write the pictures of docs/notebooks.md: `python docs/images/notebooks.py`, with Chromium.

They show what a notebook displays for a workflow and for a snapshot, the HTML of `_repr_html_`.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
from contextlib import aclosing
from pathlib import Path

from promptlayer_exec import PollPolicy, Session, Snapshot, WorkflowDefinition
from promptlayer_exec.simulator import Simulator, examples

PAGE = """\
<!doctype html><meta charset="utf-8"><style>
body { font: 14px system-ui, "DejaVu Sans", sans-serif; margin: 16px; background: #fff; }
table { border-collapse: collapse; }
th, td { padding: 4px 10px; }
tr:nth-child(even) { background: #f5f5f5; }
</style>"""


async def shown() -> tuple[WorkflowDefinition, Snapshot]:
    """Return the workflow of that page, and a snapshot of a run whose last node is running."""
    async with (
        Simulator() as sim,
        Session(sim.api_key, base_url=sim.base_url, poll=PollPolicy.fixed(0.1)) as session,
    ):
        examples.add_workflows(sim)
        workflow = await session.definition("write-report")
        execution = await session.start("write-report", {"topic": "otters"})
        async with aclosing(execution.stream(timeout=30)) as snapshots:
            async for snapshot in snapshots:
                if snapshot.nodes["Report"].status == "RUNNING":
                    break
    return workflow, snapshot


def photograph(html: str, name: str, width: int, height: int) -> None:
    """Write a picture of a piece of HTML next to this file."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(PAGE + html, encoding="utf-8")
        subprocess.run(  # noqa: S603 - all of it is ours
            [  # noqa: S607 - a maintainer's Chromium
                "chromium",
                "--headless",
                "--no-sandbox",
                "--hide-scrollbars",
                "--force-device-scale-factor=2",
                f"--window-size={width},{height}",
                f"--screenshot={Path(__file__).with_name(name)}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
        )


def main() -> None:
    """Write both pictures."""
    workflow, snapshot = asyncio.run(shown())
    photograph(workflow._repr_html_(), "notebook-workflow.png", 584, 112)
    photograph(snapshot._repr_html_(), "notebook-snapshot.png", 580, 128)


if __name__ == "__main__":
    main()
