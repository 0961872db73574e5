"""What commands print: safe text, durations, and warnings of the library."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any

from promptlayer_exec import NodeTimes
from promptlayer_exec._integration import duration, printable

_PREVIEW = 200  # characters of a value


def shorten(text: str, limit: int = _PREVIEW) -> str:
    """Return the first characters of a text, with an ellipsis if it has more."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def quoted(text: str, limit: int = 100) -> str:
    """Return the first characters of a text, printable and in quotes."""
    return f"'{shorten(printable(text), limit)}'"


def preview(value: Any) -> str:
    """Return a value as one line of JSON, shortened at the same cost for values of any size."""
    if isinstance(value, str):
        value = value[: _PREVIEW + 1]

    text = ""
    for part in json.JSONEncoder(ensure_ascii=False).iterencode(value):
        text += part
        if len(text) > _PREVIEW:
            break

    return shorten(printable(text))


def utc_time(at: datetime) -> str:
    """Return a moment in UTC as text, to the second."""
    return f"{at:%Y-%m-%d %H:%M:%S}Z"


def running_time(times: NodeTimes, now: float) -> str:
    """Return how long a node ran, or has run until `now`, empty if no poll saw it running."""
    if times.running is None:
        return ""
    end = now if times.final is None else times.final
    return duration(end - times.running)


# The modules that log when an outage is over.
_OUTAGES = ("retry", "_breaker")


def prepare_streams() -> None:
    """Make the standard streams accept any text, escaping characters that an encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def out(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def out_lines(text: str, *, hanging: str = "") -> None:
    """Write a text of the command, not a value. On a terminal, it wraps lines between words.

    `hanging` is as in `wrapped`.
    """
    if sys.stdout.isatty():
        text = wrapped(text, shutil.get_terminal_size().columns, hanging=hanging)
    out(text)


def out_record(text: str, command: str) -> None:
    """Write one thing of a list, and the command to run next.

    On a terminal the command has its own line, so that it is easy to copy.
    """
    out_lines(f"{text}\n  {command}" if sys.stdout.isatty() else f"{text}  {command}")


def err(text: str) -> None:
    """Write to standard error. On a terminal, it wraps lines between words."""
    if sys.stderr.isatty():
        text = wrapped(text, shutil.get_terminal_size().columns)
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def wrapped(text: str, width: int, *, hanging: str = "") -> str:
    """Return the text with its lines wrapped, except for what people copy.

    An indented line, such as a command, stays whole, and so does a command in backticks. With a
    `hanging` indent of what is wrapped, an indented line is wrapped, too.
    """
    lines = []
    for line in text.split("\n"):
        if line.startswith(" ") and not hanging:
            lines.append(line)
            continue

        glued = re.sub("`[^`]+`", lambda command: command[0].replace(" ", "\0"), line)
        parts = textwrap.wrap(
            glued,
            width,
            break_long_words=False,
            break_on_hyphens=False,
            subsequent_indent=hanging,
        )
        lines += [part.replace("\0", " ") for part in parts] or [""]
    return "\n".join(lines)


def show_warnings(
    write: Callable[[str], None], *, of: Collection[str] = (), outages: bool = False
) -> None:
    """Write the library's warnings, or those `of` some modules, to the very end of the process.

    Some come when a session closes, such as the id of a run that nobody got. With `outages`, it
    also writes when an outage is over, which is no warning.
    """
    logger = logging.getLogger("promptlayer_exec")
    if outages:
        logger.setLevel(logging.INFO)
    for earlier in logger.handlers[:]:
        logger.removeHandler(earlier)
    logger.addHandler(_Warnings(write, of, outages=outages))


class _Warnings(logging.Handler):
    def __init__(self, write: Callable[[str], None], of: Collection[str], *, outages: bool) -> None:
        super().__init__(logging.INFO if outages else logging.WARNING)
        self._write, self._of = write, of

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and record.module not in _OUTAGES:
            return
        if not self._of or record.module in self._of:
            self._write(printable(record.getMessage()))
