"""What a start asks for, in a form that can be stored and compared."""

from __future__ import annotations

from typing import Any

import pytest

from promptlayer_exec._values.start_records import differences, fingerprint, workflow_of

INPUTS = {"topic": "otters", "options": {"b": 1, "a": [True, None]}}


def of(key: str = "order", **changes: Any) -> str:
    """Return the fingerprint of a request that differs by some arguments."""
    return fingerprint(key, **{"workflow": "write", "inputs": INPUTS, **changes})


def test_equal_requests_have_equal_fingerprints() -> None:
    """The order of names does not matter, at any depth."""
    other = {"options": {"a": [True, None], "b": 1}, "topic": "otters"}
    assert of() == of(inputs=other, metadata={}, label=None)
    assert differences(of(), of(inputs=other)) == []
    assert workflow_of(of(workflow=7)) == 7


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"workflow": 7}, ["workflow"]),
        ({"label": "prod", "version": 2}, ["label", "version"]),
        ({"inputs": {**INPUTS, "topic": "seals"}}, ["inputs.topic"]),
        ({"inputs": {"topic": "otters"}}, ["inputs.options"]),
        ({"inputs": {**INPUTS, "options": {"b": 2}}}, ["inputs.options"]),
        ({"inputs": {**INPUTS, "x" * 100: 1}}, [f"inputs.{'x' * 40}"]),
        ({"metadata": {"user": "me"}}, ["metadata.user"]),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], names: list[str]) -> None:
    """No value is."""
    assert differences(of(), of(**changes)) == names
    assert differences(of(**changes), of()) == names


def test_digests_are_salted_with_the_key() -> None:
    """Equal inputs of two orders cannot be told by their rows."""
    assert of("order") != of("another order")


@pytest.mark.parametrize("value", [float("nan"), "\ud800", "\0", 10**30])
def test_every_input_has_a_digest(value: Any) -> None:
    """Whatever the JSON of inputs may contain, it can be stored."""
    text = of(inputs={"\ud800\0": value})
    assert text.isascii()
    assert "\0" not in text
