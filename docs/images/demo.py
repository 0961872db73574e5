"""Write demo.svg, a recording of `promptlayer-exec demo`: `python docs/images/demo.py`.

It runs the command in a terminal of its own, and keeps what that terminal shows twice a second.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path

from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.segment import Segment
from rich.terminal_theme import MONOKAI

COLUMNS = 79  # few, so that a phone can show it
LINE = 20  # pixels
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" \
viewBox="0 0 {width} {height}" role="img" \
aria-label="promptlayer-exec demo: ten nodes of an execution succeed one after the other">
<style>
text {{ font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; \
white-space: pre; fill: #d9d9d9; }}
.passing {{ visibility: hidden; }}
.moving {{ animation: {seconds:.1f}s step-end infinite; }}
@media (prefers-reduced-motion: reduce) {{ .moving {{ animation: none; }} }}
{keyframes}
</style>
<rect width="{width}" height="{height}" rx="8" fill="#1b1b1f"/>
<circle cx="20" cy="18" r="6" fill="#ff5f57"/>
<circle cx="40" cy="18" r="6" fill="#febc2e"/>
<circle cx="60" cy="18" r="6" fill="#28c840"/>
{lines}
</svg>
"""


def output() -> Iterator[tuple[float, str]]:
    """Run the demo, and yield what it writes and when, in seconds from its first output."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"}
    with subprocess.Popen(
        ["promptlayer-exec", "demo"],  # noqa: S607 - the one of this environment
        stdout=terminal,
        stderr=terminal,
        env=environment,
    ):
        os.close(terminal)
        written, began = b"", None
        while True:
            try:
                written += os.read(master, 65536)
            except OSError:  # the program has ended
                return
            if select.select([master], [], [], 0.02)[0]:
                continue  # more of the same refresh

            began = began or time.monotonic()
            yield time.monotonic() - began, written.decode()
            written = b""


def frames() -> Iterator[tuple[float, list[str]]]:
    """Yield what the terminal shows and since when, each line with its escape sequences."""
    lines, row, kept, now = ["$ promptlayer-exec demo", ""], 1, 0.0, 0.0
    yield now, list(lines)
    for now, written in output():
        for part in re.split(r"(\r|\n|\x1b\[2K|\x1b\[1A|\x1b\[\?25[lh])", written):
            match part:
                case "\n":
                    row += 1
                    if row == len(lines):
                        lines.append("")
                case "\x1b[1A":
                    row -= 1
                case "\x1b[2K":
                    lines[row] = ""
                case text if text[:1] not in {"\r", "\x1b"} or not text.endswith(("\r", "l", "h")):
                    lines[row] += text

        if now - kept >= 0.5:
            kept = now
            yield now, wrapped(lines)

    # The reply and the program that follow would push the rest of the README off the first screen.
    end = next(number for number, line in enumerate(lines) if line.startswith("The main output"))
    yield now, wrapped(lines[: end - 1])


def wrapped(lines: list[str]) -> list[str]:
    """Return lines as a terminal shows them: a long one, of plain text, continues on the next."""
    parts = []
    for line in lines:
        if "\x1b" in line or len(line) <= COLUMNS:
            parts.append(line)
        else:
            parts += [line[start : start + COLUMNS] for start in range(0, len(line), COLUMNS)]
    return parts


def spans(line: str) -> str:
    """Return what an SVG's text needs to show a line."""
    console = Console(color_system="truecolor", width=1000)
    texts = list(AnsiDecoder().decode(line))
    segments = [segment for text in texts for segment in text.render(console)]
    return "".join(map(span, segments)).rstrip()


def span(segment: Segment) -> str:
    """Return a part of a line that has one style."""
    attributes, style = "", segment.style
    if style is not None and style.color is not None:
        attributes += f' fill="{style.color.get_truecolor(MONOKAI).hex}"'
    if style is not None and style.dim:
        attributes += ' opacity=".6"'
    if style is not None and style.bold:
        attributes += ' font-weight="bold"'
    content = escape(segment.text, quote=False)
    return f"<tspan{attributes}>{content}</tspan>" if attributes else content


def main() -> None:
    """Write the picture next to this file."""
    shown = list(frames())
    end = shown[-1][0]
    seconds = end + 6.0  # the last frame stays for a while
    height = max(len(lines) for _, lines in shown)

    lines, keyframes = [], []
    for row in range(height):
        contents = [
            (since, spans(frame[row]) if row < len(frame) else "") for since, frame in shown
        ]
        changes = [contents[0]]
        changes += [it for before, it in pairwise(contents) if it[1] != before[1]]
        for number, (since, content) in enumerate(changes):
            if not content:
                continue
            is_last = number == len(changes) - 1
            until = seconds if is_last else changes[number + 1][0]
            classes = "" if is_last else "passing "
            name = f"l{row}-{number}"
            keyframes.append(keyframe(name, since / seconds, until / seconds))
            lines.append(
                f'<text class="{classes}moving" style="animation-name:{name}" x="16"'
                f' y="{row * LINE + 58}">{content}</text>'
            )

    svg = SVG.format(
        width=round(16 + COLUMNS * 8.43 + 16),
        height=height * LINE + 66,
        seconds=seconds,
        keyframes="\n".join(keyframes),
        lines="\n".join(lines),
    )
    Path(__file__).with_name("demo.svg").write_text(svg, encoding="utf-8")


def keyframe(name: str, since: float, until: float) -> str:
    """Return an animation that shows a line only for a while."""
    steps = ["0%{visibility:hidden}"] if since else []
    steps.append(f"{since:.2%}{{visibility:visible}}")
    if until < 1:
        steps.append(f"{until:.2%}{{visibility:hidden}}")
    return f"@keyframes {name}{{{''.join(steps)}}}"


if __name__ == "__main__":
    main()
