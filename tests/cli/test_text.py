"""The texts that commands write: retries, values, errors and durations."""

from __future__ import annotations

import io
import sys
import tracemalloc
from typing import Any

import pytest

from promptlayer_exec import (
    ConnectionFailed,
    Event,
    InvalidResponse,
    Node,
    NodeTimes,
    Polled,
    RateLimited,
    RequestRetried,
    Snapshot,
)
from promptlayer_exec.cli._session import report_retries
from promptlayer_exec.cli._text import (
    duration,
    err,
    node_detail,
    preview,
    result_line,
    running_time,
)


class TestRetries:
    """The line for a request that will be retried."""

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (ConnectionFailed("no answer"), "no answer; retrying in 2.3 s"),
            (
                RateLimited("429: slow\ndown", status=429, server_message="slow\ndown"),
                "429: slow\\ndown; retrying in 2.3 s",
            ),
            (InvalidResponse("x" * 200, status=200), f"{'x' * 159}…; retrying in 2.3 s"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
    )
    def test_a_retry_is_one_line(self, error: Exception, line: str) -> None:
        """It has the start of what failed, without advice, and the delay."""
        lines: list[str] = []
        report_retries(lines.append)(RequestRetried(5, error, 2.34))
        assert lines == [line]

    def test_other_events_are_ignored(self) -> None:
        """A successful poll writes nothing."""
        lines: list[str] = []
        snapshot = Snapshot(5, False, {})
        event: Event = Polled(5, snapshot, duration=0.1, lateness=0.0, body_bytes=2)
        report_retries(lines.append)(event)
        assert lines == []


class TestText:
    """Texts that are safe to print."""

    def test_preview_of_large_values(self) -> None:
        """The preview of a large or deep value is one short line, made without the rest of it."""
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        values = ("x" * 10**7, list(range(10**6)), deep)
        tracemalloc.start()
        previews = [preview(value) for value in values]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10**6
        assert [len(text) for text in previews] == [200, 200, 200]
        assert [text[:3] + text[-1] for text in previews] == ['"xx…', "[0,…", "[[[…"]

    @pytest.mark.parametrize(
        ("node", "text"),
        [
            (Node("n", "QUEUED"), ""),
            (Node("n", "SUCCESS"), "null"),
            (Node("n", "RUNNING", "part"), '"part"'),
            (Node("n", "FAILURE", "left over", "why"), "why"),
            (Node("n", "FAILED"), "the server gave no reason"),
        ],
    )
    def test_node_detail(self, node: Node, text: str) -> None:
        """The detail is the value of a node that has one, or the error of one that failed."""
        assert node_detail(node) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (3600, "1 h 00 min")],
    )
    def test_duration(self, seconds: float, text: str) -> None:
        """Durations are written in seconds, minutes or hours."""
        assert duration(seconds) == text

    def test_running_time(self) -> None:
        """The time counts from when the node was first seen running to when it was final."""
        assert running_time(NodeTimes(), 9.0) == ""
        assert running_time(NodeTimes(2.0, None), 9.0) == "7.0 s"
        assert running_time(NodeTimes(2.0, 5.0), 9.0) == "3.0 s"

    def test_result_line(self) -> None:
        """An execution without an output failed even if no node did."""
        skipped = Node("n", "SKIPPED", is_output_node=True)
        line = "execution 5 failed (no output node succeeded): 1 SKIPPED"
        assert result_line(Snapshot(5, True, {"n": skipped}), timed=False) == line
        assert result_line(Snapshot(5, True, {})).endswith(": no nodes")


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def test_errors_break_between_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL or a command to copy stays whole; in a pipe each error is one line."""
    monkeypatch.setenv("COLUMNS", "40")
    long = "no usable answer from http://example.org/a-very-long-path/of-a-server: refused"
    command = "  promptlayer-exec watch 787 --base-url http://example.org/a-path"
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        err(long)
        err(command)
        lines = stream.getvalue().splitlines()
        assert lines[-1] == command
        if stream.isatty():
            assert lines[:-1] == [
                "no usable answer from",
                "http://example.org/a-very-long-path/of-a-server:",
                "refused",
            ]
        else:
            assert lines[:-1] == [long]
