"""The texts that commands write: retries, values, errors and durations."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from promptlayer_exec import (
    Node,
    NodeTimes,
    Snapshot,
)
from promptlayer_exec.cli._text import (
    duration,
    node_detail,
    preview,
    result_line,
    running_time,
)


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
