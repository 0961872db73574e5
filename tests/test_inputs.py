"""What inputs are encoded as, and how what JSON cannot carry is named."""

# ruff: noqa: D101 - the classes are what users would write

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import cattrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, field_serializer

from promptlayer_exec._structuring import encode_inputs


class Color(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Plain(enum.Enum):
    DAY = dt.date(2026, 1, 31)
    ONE = 1


class Shout(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "lies"


class Count(int):
    def __int__(self) -> int:
        return 0

    def __str__(self) -> str:
        return "lies"


class Share(float):
    def __float__(self) -> float:
        return 0.0


class Point(NamedTuple):
    x: int
    y: Any


@attrs.frozen
class Row:
    when: Any


@dataclasses.dataclass
class Link:
    next: Any = None


@dataclasses.dataclass
class Table:
    rows: list[Row]


class Model(BaseModel):
    at: dt.datetime
    row: Any = None


class Broken(BaseModel):
    x: int = 0

    @field_serializer("x")
    def _serialize(self, value: int) -> int:
        raise OSError("x" * 1000)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=3))
def test_plain_json_is_copied(inputs: dict[str, Any]) -> None:
    """What is plain JSON already is encoded as an equal, independent copy."""
    before = copy.deepcopy(inputs)
    encoded = encode_inputs(inputs)
    assert json.dumps(encoded) == json.dumps(before)
    for value in inputs.values():
        if isinstance(value, (list, dict)):
            value.clear()
    inputs.clear()
    assert json.dumps(encoded) == json.dumps(before)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2,)), [1, [2]]),
        (Point(1, [Color.RED]), [1, ["red"]]),
        (collections.OrderedDict(a=(1,)), {"a": [1]}),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (collections.deque([1]), [1]),
        (Color.RED, "red"),
        (Level.LOW, 1),
        (Plain.ONE, 1),
        (Shout("truth"), "truth"),
        (Count(3), 3),
        (Share(0.5), 0.5),
        (Path("a/b"), "a/b"),
        ({Shout("key"): 1}, {"key": 1}),
        (Row([Row(1)]), {"when": [{"when": 1}]}),
        (Table([Row(None)]), {"rows": [{"when": None}]}),
        (
            Model(at=dt.datetime(2026, 1, 31, tzinfo=dt.UTC)),
            {"at": "2026-01-31T00:00:00Z", "row": None},
        ),
        (
            Row(Model(at=dt.datetime(2026, 1, 31))),
            {"when": {"at": "2026-01-31T00:00:00", "row": None}},
        ),
        ("\ud800", "\ud800"),
        (10**4000, 10**4000),
    ],
)  # fmt: skip
def test_what_has_an_obvious_form_is_encoded(value: Any, expected: Any) -> None:
    """Subclasses, enums, paths and instances are encoded as exact JSON values, wherever nested."""
    encoded = encode_inputs({"nested": [value, {"deeper": value}]})
    assert encoded == {"nested": [expected, {"deeper": expected}]}
    assert _exact(encoded)
    json.dumps(encoded)


def _exact(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) is str and _exact(item) for key, item in value.items())
    if type(value) is list:
        return all(map(_exact, value))
    return type(value) in (str, int, float, bool, type(None))


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (Table([Row(1)]), {"rows": [{"when": 1}]}),
        (Row(1), {"when": 1}),
        (Model(at=dt.datetime(2026, 1, 31)), {"at": "2026-01-31T00:00:00", "row": None}),
        (types.MappingProxyType({}), {}),
    ],
)
def test_inputs_may_be_an_instance(inputs: Any, expected: Any) -> None:
    """The inputs themselves are a mapping, or an instance with named fields."""
    assert encode_inputs(inputs) == expected


def _loop() -> dict[str, Any]:
    inputs: dict[str, Any] = {"a": [1]}
    inputs["a"].append({"b": inputs})
    return inputs


def _deep() -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for _ in range(100_000):
        inputs = {"a": inputs}
    return inputs


_CONVERT = "convert it, or give Session a converter= with an unstructure hook for it"
_EXPECTED = "expected a mapping, or an attrs, dataclass or pydantic instance, got"


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        (
            {"rows": [0, 1, 2, {"when": dt.datetime.now()}]},
            TypeError,
            f"inputs.rows[3].when: a datetime is no JSON value; {_CONVERT}",
        ),
        (
            Table([Row(1), Row({1})]),
            TypeError,
            f"inputs.rows[1].when: a set is no JSON value; {_CONVERT}",
        ),
        (
            {"a b": (b"",)},
            TypeError,
            f'inputs["a b"][0]: a bytes is no JSON value; {_CONVERT}',
        ),
        ({"a": object()}, TypeError, f"inputs.a: an object is no JSON value; {_CONVERT}"),
        ({"a": Plain.DAY}, TypeError, f"inputs.a: a date is no JSON value; {_CONVERT}"),
        ({"a": Row}, TypeError, f"inputs.a: the class Row is no JSON value; {_CONVERT}"),
        ({"a": Model}, TypeError, f"inputs.a: the class Model is no JSON value; {_CONVERT}"),
        ({"a": {1: 2}}, TypeError, "inputs.a: the key 1 is no string"),
        ([1], TypeError, f"inputs: {_EXPECTED} a list"),
        ("a", TypeError, f"inputs: {_EXPECTED} a str"),
        (Point(1, 2), TypeError, f"inputs: {_EXPECTED} a Point"),
        ({"a": [float("nan")]}, ValueError, "inputs.a[0]: nan is no JSON value"),
        ({"a": Share("-inf")}, ValueError, "inputs.a: -inf is no JSON value"),
        ({"a": -(10**5000)}, ValueError, "inputs.a: the integer is too long to be printed"),
        (_loop(), ValueError, "inputs.a[1].b: contains itself"),
        (_deep(), ValueError, "inputs: contains itself, or is nested too deeply"),
        (
            {"a": Broken()},
            TypeError,
            "inputs.a: a Broken cannot be converted (PydanticSerializationError: ",
        ),
        ({"a": Table(5)}, TypeError, "inputs.a: a Table cannot be converted (TypeError: 'int'"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_json_cannot_carry_is_named(inputs: Any, kind: type[Exception], message: str) -> None:
    """The error names the place, what is there, and what to do about it, in a readable length."""
    with pytest.raises(kind) as caught:
        encode_inputs(inputs)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300
    assert type(caught.value) is kind


def test_causes_are_kept() -> None:
    """What a class of the user's raised is the cause; where nothing was raised there is none."""
    with pytest.raises(TypeError) as caught:
        encode_inputs({"a": Broken()})
    assert caught.value.__cause__ is not None
    with pytest.raises(TypeError) as caught:
        encode_inputs({"a": object()})
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_instance_that_contains_itself() -> None:
    """An instance that contains itself is refused like a mapping that does."""
    row = Row([])
    row.when.append({"row": (row,)})
    with pytest.raises(ValueError, match=r"^inputs\.row: contains itself"):
        encode_inputs({"row": row})


def test_dataclass_instance_that_contains_itself() -> None:
    """So is a dataclass instance."""
    link = Link()
    link.next = link
    with pytest.raises(ValueError, match=r"^inputs\.a\[0\]: contains itself"):
        encode_inputs({"a": [link]})


def test_recursion_of_a_hook_is_nesting_too_deep() -> None:
    """Whoever meets the limit."""

    def recurse(value: Any) -> Any:
        return recurse(value)

    with pytest.raises(ValueError, match=r"^inputs: contains itself, or is nested too deeply"):
        encode_inputs({"row": Row(1)}, _converter(Row, recurse))


def test_the_same_value_may_occur_twice() -> None:
    """A value that occurs in two places does not contain itself."""
    shared = [1]
    encoded = encode_inputs({"a": shared, "b": {"c": shared}})
    assert encoded == {"a": [1], "b": {"c": [1]}}
    assert encoded["a"] is not encoded["b"]["c"]


def _converter(kind: Any, hook: Callable[[Any], Any]) -> cattrs.Converter:
    converter = cattrs.Converter()
    converter.register_unstructure_hook(kind, hook)
    return converter


def test_hooks_of_the_user_are_used() -> None:
    """The session's converter is used for what is no plain JSON, and its results are checked."""
    converter = _converter(dt.datetime, lambda value: value.isoformat())
    converter.register_unstructure_hook(decimal.Decimal, lambda value: {"decimal": (str(value),)})
    converter.register_unstructure_hook(Model, lambda value: value.at)
    converter.register_unstructure_hook(set, sorted)
    converter.register_unstructure_hook(str, lambda value: 1 / 0)
    at = dt.datetime(2026, 1, 31)
    inputs = {
        "at": [at],
        "row": Row(at),
        "price": decimal.Decimal(1),
        "m": Model(at=at),
        "s": {2, 1},
    }
    assert encode_inputs(inputs, converter) == {
        "at": ["2026-01-31T00:00:00"],
        "row": {"when": "2026-01-31T00:00:00"},
        "price": {"decimal": ["1"]},
        "m": "2026-01-31T00:00:00",
        "s": [1, 2],
    }
    with pytest.raises(TypeError, match=r"inputs\.at: a datetime is no JSON value"):
        encode_inputs({"at": at})


@pytest.mark.parametrize(
    ("hook", "kind", "message"),
    [
        (lambda value: 1 / 0, TypeError, r"inputs\.a\[0\]: an object cannot be converted \(Zero"),
        (lambda value: {"b": b""}, TypeError, r"inputs\.a\[0\]\.b: a bytes is no JSON value"),
        (lambda value: object(), TypeError, r"inputs\.a\[0\]: an object is no JSON value"),
        (lambda value: [object()], ValueError, "contains itself, or is nested too deeply"),
    ],
)
def test_hooks_that_do_not_help(hook: Any, kind: type[Exception], message: str) -> None:
    """A hook that raises, or returns what is no JSON either, is named by its path."""
    converter = cattrs.Converter()
    converter.register_unstructure_hook_func(lambda cls: cls is object, hook)
    with pytest.raises(kind, match=message):
        encode_inputs({"a": [object()]}, converter)


def test_plain_json_never_goes_to_the_converter() -> None:
    """No hook is asked for what is plain JSON already."""
    converter = cattrs.Converter()
    converter.register_unstructure_hook_func(lambda cls: True, lambda value: 1 / 0)
    converter.register_unstructure_hook(str, lambda value: 1 / 0)
    inputs = {"rows": [{"a": [1, "b", 1.5, None, True]}]}
    assert encode_inputs(inputs, converter) == inputs
