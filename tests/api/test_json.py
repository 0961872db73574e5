"""Decoding gives what the standard library gives, and each kind of JSON value has one name."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptlayer_exec._api import json as _json

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
