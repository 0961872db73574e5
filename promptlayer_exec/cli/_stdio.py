"""Standard output and standard error, written line by line."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Literal, TextIO

_PATIENCE = 1.0  # seconds that a stream which blocks has at the end


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


class Writer:
    """Writes to a standard stream in a thread, so that the event loop goes on while that blocks.

    A pipe that nobody reads, or a terminal that Ctrl-S has stopped, blocks for any time.
    """

    def __init__(self, stream: Literal["stdout", "stderr"]) -> None:
        self._stream = stream
        self._calls: SimpleQueue[tuple[Future[None], Callable[..., None], Any] | None]
        self._calls = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"writes to {stream}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while call := self._calls.get():
            done, write, arguments = call
            try:
                write(*arguments)
            except Exception as error:  # noqa: BLE001 - the caller gets it
                done.set_exception(error)
            else:
                done.set_result(None)

    def start(self, write: Callable[..., None], *arguments: Any) -> Future[None]:
        """Call a function that writes, after all earlier ones; do not wait for it."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()
        self._calls.put((done, write, arguments))
        return done

    async def call(self, write: Callable[..., None], *arguments: Any) -> None:
        """Call a function that writes, and wait for it; if cancelled, it goes on in the thread."""
        await asyncio.wrap_future(self.start(write, *arguments))

    def close(self) -> None:
        """End the thread; if it blocks, let it, and let what is written from now on disappear."""
        self._calls.put(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():  # whose lock the interpreter would wait for when it exits
            setattr(sys, self._stream, _guarded(None, _Output))
