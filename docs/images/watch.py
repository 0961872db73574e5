"""Write watch.svg, a terminal halfway through the demo: `python docs/images/watch.py`."""

from __future__ import annotations

import asyncio
import io
from contextlib import aclosing
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from promptlayer_exec import PollPolicy, Session, Snapshot
from promptlayer_exec.cli._live import LiveDisplay
from promptlayer_exec.simulator import Simulator
from promptlayer_exec.simulator.examples import support_agent

# rich's own format without the font, which would be loaded from the network.
FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-family: sans-serif; font-size: 18px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


async def halfway() -> Snapshot:
    """Return a snapshot of the demo's agent with half of the nodes final and two running."""
    async with (
        Simulator() as sim,
        Session(sim.api_key, base_url=sim.base_url, poll=PollPolicy.fixed(0.1)) as session,
    ):
        execution = session.execution(sim.add_execution(support_agent(), execution_id=787))
        async with aclosing(execution.stream(timeout=30)) as snapshots:
            async for snapshot in snapshots:
                running = [node for node in snapshot.nodes.values() if node.status == "RUNNING"]
                if len(running) == 2 and snapshot.progress >= 0.5:
                    break
    return snapshot


def main() -> None:
    """Write the picture next to this file."""
    console = Console(file=io.StringIO(), record=True, force_terminal=True, width=100)
    display = LiveDisplay(console)
    display.show(asyncio.run(halfway()))
    console.print(display._render(), "")  # without an empty line, the last line is cut off
    console.save_svg(
        str(Path(__file__).with_name("watch.svg")),
        title="promptlayer-exec demo",
        theme=MONOKAI,
        code_format=FORMAT,
        unique_id="watch",
    )


if __name__ == "__main__":
    main()
