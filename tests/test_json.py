from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptlayer_exec import _json

DIGITS = st.text("0123456789", min_size=1, max_size=400)
NUMBERS = st.builds("{}{}{}".format, st.sampled_from(["", "-"]), DIGITS, st.just("")) | st.builds(
    "{}.{}e{}".format, DIGITS, DIGITS, st.integers(-400, 400)
)
WORDS = r"""NaN Infinity -Infinity -0 -0.0 01 1. .5 +1 1e400 nul [1,] "\ud800" "\udc00\ud800" "\x"
    "\ud83d\ude00" "\u0000" {"a":1,"b":2,"a":{"c":NaN}} [[[[[[[[[[1]]]]]]]]]]"""
ODD = st.sampled_from([*WORDS.split(), '"\x01"', '"\t"', "\ufeff1", "\x0b1", "\xa01", "1 2", ""])
STRINGS = st.text(max_size=20).map(json.dumps) | st.text(max_size=20).map('"{}"'.format)
SCALARS = NUMBERS | ODD | STRINGS | st.sampled_from(["true", "false", "null"])
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


def what_comes(loads, body):
    """Return the value, type by type, or the error."""
    try:
        return repr(loads(body))
    except (ValueError, RecursionError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("quick", [_json._decode, msgspec.json.decode])
@given(BODIES)
def test_the_quick_way_reads_what_the_standard_library_reads(
    quick: Callable[[bytes], Any], body: bytes
) -> None:
    """Each value is the same, to the last digit and type, and so is each refusal."""
    with patch.object(_json, "_quick_loads", quick):
        assert what_comes(_json.loads, body) == what_comes(json.loads, body)


@pytest.mark.parametrize(
    "text",
    ["1" * 4301, "123456789012345678901234567890", "9007199254740993", "5e-324", "1e999", "-0"],
)
def test_numbers_lose_nothing(text: str) -> None:
    """Integers stay exact, and what the standard library refuses to read is refused as well."""
    assert what_comes(_json.loads, text.encode()) == what_comes(json.loads, text.encode())


def test_msgspec_does_the_work_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library is asked only for what msgspec refuses."""
    monkeypatch.setattr(json, "loads", lambda body: "asked")
    assert _json.loads(b'{"a": [1]}') == {"a": [1]}
    assert _json.loads(b"NaN") == "asked"


def test_without_msgspec_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is one: without it the standard library reads everything."""
    monkeypatch.setitem(sys.modules, "msgspec", None)
    try:
        plain = importlib.reload(_json)
        assert math.isnan(plain.loads(b'{"a": NaN}')["a"])
        assert plain.loads(b"[1, 2.5]") == [1, 2.5]
        assert plain.loads(b"[1]\n") == [1]
        with pytest.raises(json.JSONDecodeError, match="Extra data"):
            plain.loads(b"[1] 2")
        monkeypatch.setattr(json, "loads", lambda body: "asked")
        assert plain.loads(b'{"a": [1]} \r\n') == {"a": [1]}
        assert plain.loads(b" 1") == "asked"
    finally:
        monkeypatch.undo()
        importlib.reload(_json)
