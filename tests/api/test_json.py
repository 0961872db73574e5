"""Decoding gives what the standard library gives, and each kind of JSON value has one name."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import importlib
import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptlayer_exec._api import json as _json
from promptlayer_exec._display import json_kind

DIGITS = st.text("0123456789", min_size=1, max_size=400)
NUMBERS = st.builds("{}{}{}".format, st.sampled_from(["", "-"]), DIGITS, st.just("")) | st.builds(
    "{}.{}e{}".format, DIGITS, DIGITS, st.integers(-400, 400)
)
WORDS = r"""NaN Infinity -Infinity -0 -0.0 01 1. .5 +1 1e400 nul [1,] "\ud800" "\udc00\ud800" "\x"
    "\ud83d\ude00" "\u0000" {"a":1,"b":2,"a":{"c":NaN}} [[[[[[[[[[1]]]]]]]]]]"""
UNUSUAL = st.sampled_from(
    [*WORDS.split(), '"\x01"', '"\t"', "\ufeff1", "\x0b1", "\xa01", "1 2", ""]
)
STRINGS = st.text(max_size=20).map(json.dumps) | st.text(max_size=20).map('"{}"'.format)
SCALARS = NUMBERS | UNUSUAL | STRINGS | st.sampled_from(["true", "false", "null"])
TEXTS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda parts: f"[{','.join(parts)}]")
        | st.lists(
            st.tuples(st.sampled_from(["a", "b", "\ufeff"]) | st.text(max_size=3), inner),
            max_size=4,
        ).map(
            lambda pairs: (
                "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in pairs) + "}"
            )
        )
    ),
    max_leaves=8,
)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
BODIES = st.binary(max_size=20) | st.builds(
    lambda text, encoding: text.encode(encoding, "surrogatepass"), TEXTS, ENCODINGS
)


def result(loads, body):
    """Return the repr of the value, which shows every type, or the error."""
    try:
        return repr(loads(body))
    except (ValueError, RecursionError) as error:
        return type(error), str(error)


@given(BODIES)
def test_msgspec_and_the_standard_library_give_the_same_result(body: bytes) -> None:
    """Each value is the same, to the last digit and type, and so is each error."""
    assert result(_json.loads, body) == result(json.loads, body)


@pytest.mark.parametrize(
    "text",
    ["1" * 4301, "123456789012345678901234567890", "9007199254740993", "5e-324", "1e999", "-0"],
)
def test_numbers_keep_every_digit(text: str) -> None:
    """Integers stay exact, and a number that the standard library refuses is refused as well."""
    assert result(_json.loads, text.encode()) == result(json.loads, text.encode())


def test_msgspec_decodes_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library decodes only what msgspec refuses."""
    monkeypatch.setattr(json, "loads", lambda body: "standard library")
    assert _json.loads(b'{"a": [1]}') == {"a": [1]}
    assert _json.loads(b"NaN") == "standard library"


def test_without_msgspec_the_standard_library_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Msgspec is an optional extra; without it `loads` is `json.loads` itself."""
    monkeypatch.setitem(sys.modules, "msgspec", None)
    try:
        assert importlib.reload(_json).loads is json.loads
    finally:
        monkeypatch.undo()
        importlib.reload(_json)


class Level(enum.IntEnum):
    """A subclass of int."""

    LOW = 1


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (0, "an integer"),
        (2**70, "an integer"),
        (1.0, "a number"),
        (float("nan"), "a number"),
        ("", "a string"),
        ([], "an array"),
        ({}, "an object"),
    ],
)
def test_kind_of_a_json_value(value: Any, kind: str) -> None:
    """Each kind of JSON value has its name."""
    assert json_kind(value) == kind


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ((), "a tuple"),
        (b"", "a bytes"),
        (dt.datetime(2026, 1, 31), "a datetime"),
        (collections.OrderedDict(), "an OrderedDict"),
        (Level.LOW, "a Level"),
        (Level, "the class Level"),
    ],
)
def test_kind_of_another_value(value: Any, kind: str) -> None:
    """A value that JSON does not have is named by its type, subclasses of JSON's types included."""
    assert json_kind(value) == kind
