"""Text that is safe to print, and the standard streams that it is written to, line by line."""

from __future__ import annotations

import asyncio
import io
import json
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
from unicodedata import category

from promptlayer_exec import Node, NodeStatus, NodeTimes, Snapshot

_PATIENCE = 1.0  # seconds that a stream which blocks has at the end
_PREVIEW = 200
# What messages of the library tell a program to do, and what to say at a command line instead.
_WORDS = {
    "Check PROMPTLAYER_API_KEY or api_key=.": "Check PROMPTLAYER_API_KEY.",
    "Check the network and base_url;": "Check the network and --base-url;",
    "Check base_url and the arguments.": "Check --base-url and the arguments.",
    "Check that base_url is": "Check that --base-url is",
    "Check the id or name, base_url, and": "Check the id or name, --base-url, and",
    "base_url must": "--base-url must",
    "database_url is": "--db is",
    "database_url must": "--db must",
    " last_snapshot has every node.": "",
    "choose another name for a new batch": "choose another --name for a new batch",
    "pass same_server=True": "give --same-server",
    "add it to another batch; it was not added": "add it to another batch with --name NEW; nothing"
    " was added",
}
_encoder = json.JSONEncoder(ensure_ascii=False)


def printable(text: str, *, keep: str = "") -> str:
    """Return any text with its unprintable characters escaped, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in keep or category(char) == "Zs"
        else json.dumps(char)[1:-1]
        for char in text
    )


def in_options(text: str) -> str:
    """Return a message of the library with the options of the command line in it."""
    for words, options in _WORDS.items():
        text = text.replace(words, options)
    return text


def shorten(text: str, limit: int = _PREVIEW) -> str:
    """Return the start of a text, with an ellipsis if characters were cut off."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def preview(value: Any) -> str:
    """Return the start of a value as one line of JSON, at the same cost for values of any size."""
    if isinstance(value, str):
        value = value[: _PREVIEW + 1]
    text = ""
    for part in _encoder.iterencode(value):
        text += part
        if len(text) > _PREVIEW:
            break
    return shorten(printable(text))


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, such as `1 min 05 s`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def running_time(times: NodeTimes, now: float) -> str:
    """Return how long a node ran, or has run until `now`; empty if it was never seen running."""
    if times.running is None:
        return ""
    return duration((now if times.final is None else times.final) - times.running)


def node_detail(node: Node) -> str:
    """Return a node's value, or its error if it failed; empty if it has neither yet."""
    if node.status == NodeStatus.FAILED:
        return printable(failure_reason(node))
    if node.value is None and not node.succeeded:
        return ""
    return preview(node.value)


def failure_reason(node: Node) -> str:
    """Return why a node failed, according to the server."""
    if node.error_message:
        return node.error_message
    raw = node.raw_error_message
    if isinstance(raw, dict):
        raw = raw.get("raw", raw)
    if isinstance(raw, str) and raw:
        return raw
    return "the server gave no reason" if raw in (None, "") else preview(raw)


def result_line(snapshot: Snapshot, *, timed: bool = True) -> str:
    """Return how a complete execution ended, after which time, and how its nodes did."""
    verdict = "succeeded" if snapshot.succeeded else "failed"
    if not (snapshot.succeeded or snapshot.failed_nodes):
        verdict = "failed (no output node succeeded)"
    time = f" after {duration(snapshot.elapsed)}" if timed else ""
    counts = [f"{count} {printable(status)}" for status, count in snapshot.counts.items()]
    nodes = ", ".join(counts) or "no nodes"
    return f"execution {snapshot.execution_id} {verdict}{time}: {nodes}"


def final_count(snapshot: Snapshot) -> str:
    """Return how many of the nodes are final, such as `2/3`."""
    return f"{sum(node.final for node in snapshot.nodes.values())}/{len(snapshot.nodes)}"


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
