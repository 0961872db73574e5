"""Bounded reprs: a value of any size makes a short text, in little time."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptlayer_exec import Execution, MainOutput, Node, Outcome, Snapshot, StartRequest
from promptlayer_exec._display import short_repr
from promptlayer_exec.dbos import StoredOutcome

HUGE: list[Any] = [
    "x" * 10**6,
    ["y" * 1000] * 1000,
    {"k" * 1000: {"v": ["z" * 1000]}} | {f"key {n}": n for n in range(1000)},
    [[[[[["deep"]]]]]],
    10**4000,
    b"bytes" * 1000,
]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: type(value).__name__)
def test_values_of_any_size_have_short_reprs(value: Any) -> None:
    """At most 80 characters of a value or a message are shown, and under 1,000 in all."""
    text = str(value) if type(value) is not int else "x" * 5000
    node = Node(text, text, value, text, value, True)
    snapshot = Snapshot(787, True, {text + str(n): node for n in range(100)}, raw=value)
    execution = Execution(None, 787, text)
    outcome = Outcome(
        0, StartRequest(text, {"a": value}), execution, snapshot, value, ValueError(text)
    )
    now = datetime.now(UTC)
    stored = StoredOutcome(text, 787, True, value, None, now, now)
    request = StartRequest(text, value, text, None, {"a": text}, text, value)
    for shown in (node, snapshot, outcome, stored, request, MainOutput(787, True, value)):
        assert 20 < len(repr(shown)) < 1000
    assert len(short_repr(value)) <= 80


@given(st.recursive(st.none() | st.integers() | st.text() | st.floats(), st.lists, max_leaves=5))
def test_small_values_are_shown_whole(value: Any) -> None:
    """What is short is not changed."""
    if len(repr(value)) <= 20:
        assert short_repr(value) == repr(value)
    assert len(short_repr(value)) <= 80


def test_the_start_and_the_end_of_a_value_are_shown() -> None:
    """What was left out shows, and dicts keep their order."""
    assert short_repr("a" * 50 + "b" * 50) == "'" + "a" * 37 + "..." + "b" * 38 + "'"
    assert short_repr({"b": 1, "a": {}, "c": [{"d": {"e": {"f": 1}}}]}) == (
        "{'b': 1, 'a': {}, 'c': [{'d': {...}}]}"
    )
    assert short_repr(dict.fromkeys("edcba", 0)) == "{'e': 0, 'd': 0, 'c': 0, 'b': 0, ...}"


def test_a_large_dict_is_not_read_whole() -> None:
    """The time does not grow with the size."""
    large = {f"key {n}": n for n in range(200_000)}
    started = time.perf_counter()
    for _ in range(20):
        short_repr(large)
    assert time.perf_counter() - started < 0.5


def test_a_snapshot_shows_its_counts_and_no_values() -> None:
    """Of many statuses, the first are shown."""
    nodes = {str(n): Node(str(n), "SUCCESS" if n else "FAILED", "secret") for n in range(3)}
    assert repr(Snapshot(787, False, nodes, poll=4, elapsed=1.23456)) == (
        "Snapshot(execution_id=787, complete=False, nodes=<1 FAILED, 2 SUCCESS>, poll=4,"
        " elapsed=1.235)"
    )
    assert "nodes=<no nodes>" in repr(Snapshot(787, True, {}))
    strange = {str(n): Node(str(n), f"STATUS {n}") for n in range(9)}
    assert "1 STATUS 7, ...>" in repr(Snapshot(787, False, strange))
