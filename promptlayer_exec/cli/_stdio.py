"""Standard output and standard error, written line by line."""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
from contextlib import suppress
from typing import TextIO


class OutputFailed(Exception):
    """Standard output could not be written, for this reason; `__cause__` is the `OSError`.

    It is not an `OSError` itself: Typer and Rich handle a broken pipe in their own ways.
    """


class _Output(io.TextIOWrapper):
    """Standard output."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OutputFailed(error.strerror or error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputFailed(error.strerror or error) from error


class _Errors(io.TextIOWrapper):
    """Standard error. Failures are ignored: they cannot be reported, and the exit code remains."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def guard_streams() -> None:
    """Make the standard streams accept any text, and fail as their classes say.

    Characters that a stream's encoding lacks are escaped. A closed stream discards all text.
    """
    sys.stdout = _guarded(sys.stdout, _Output)
    sys.stderr = _guarded(sys.stderr, _Errors)


def _guarded(stream: TextIO | None, kind: type[_Output | _Errors]) -> TextIO:
    if stream is None:
        # Never closed: the interpreter flushes it when it exits.
        devnull = os.open(os.devnull, os.O_WRONLY)
        return kind(open(devnull, "wb", closefd=False), "utf-8")
    if not isinstance(stream, io.TextIOWrapper):  # replaced by the caller
        return stream
    encoding = stream.encoding
    return kind(stream.detach(), encoding, "backslashreplace", line_buffering=True)


def out(text: str) -> None:
    """Write a line to standard output and flush it."""
    print(text, flush=True)  # noqa: T201


def err(text: str) -> None:
    """Write lines to standard error and flush it; a terminal breaks them between words."""
    for line in text.split("\n"):
        shown = line
        if sys.stderr.isatty() and not line.startswith(" "):  # which is a command to copy
            width = shutil.get_terminal_size().columns
            shown = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        print(shown, file=sys.stderr, flush=True)  # noqa: T201
