"""Encoding inputs: the JSON that they become, and the errors for values that JSON does not have."""

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

from promptlayer_exec import strict_converter
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
    def __str__(self) -> str:
        return "lies"


class Share(float):
    def __repr__(self) -> str:
        return "lies"


class Point(NamedTuple):
    x: int
    y: Any


@attrs.frozen
class Row:
    when: Any


@dataclasses.dataclass
class Segment:
    start: Point
    others: list[Point]


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
    """Plain JSON is encoded as an equal, independent copy."""
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
def test_other_types_are_encoded_at_any_depth(value: Any, expected: Any) -> None:
    """Subclasses, enums, paths and instances become exact JSON values."""
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
    """The inputs themselves may be a mapping, or an instance with fields."""
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


_CONVERT = "Convert it, or give Session a converter= with an unstructure hook for it"
_EXPECTED = "expected a mapping, or an attrs, dataclass or pydantic instance, got"


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        (
            {"rows": [0, 1, 2, {"when": dt.datetime.now()}]},
            TypeError,
            f"inputs.rows[3].when: a datetime is not a JSON value. {_CONVERT}",
        ),
        (
            Table([Row(1), Row({1})]),
            TypeError,
            f"inputs.rows[1].when: a set is not a JSON value. {_CONVERT}",
        ),
        (
            {"a b": (b"",)},
            TypeError,
            f'inputs["a b"][0]: a bytes is not a JSON value. {_CONVERT}',
        ),
        ({"a": object()}, TypeError, f"inputs.a: an object is not a JSON value. {_CONVERT}"),
        ({"a": Plain.DAY}, TypeError, f"inputs.a: a date is not a JSON value. {_CONVERT}"),
        ({"a": Row}, TypeError, f"inputs.a: the class Row is not a JSON value. {_CONVERT}"),
        ({"a": Model}, TypeError, f"inputs.a: the class Model is not a JSON value. {_CONVERT}"),
        ({"a": {1: 2}}, TypeError, "inputs.a: the key 1 is not a string"),
        ([1], TypeError, f"inputs: {_EXPECTED} an array"),
        ("a", TypeError, f"inputs: {_EXPECTED} a string"),
        (Point(1, 2), TypeError, f"inputs: {_EXPECTED} a Point"),
        ({"a": [float("nan")]}, ValueError, "inputs.a[0]: nan is not a JSON value"),
        ({"a": Share("-inf")}, ValueError, "inputs.a: -inf is not a JSON value"),
        ({"a": -(10**5000)}, ValueError, "inputs.a: the integer has too many digits"),
        (_loop(), ValueError, "inputs: contains itself, or is nested too deeply"),
        (_deep(), ValueError, "inputs: contains itself, or is nested too deeply"),
        (
            {"a": Broken()},
            TypeError,
            "inputs.a: could not convert a Broken (PydanticSerializationError: ",
        ),
        ({"a": Table(5)}, TypeError, "inputs.a: could not convert a Table (TypeError: 'int'"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_a_value_that_json_does_not_have_is_refused(
    inputs: Any, kind: type[Exception], message: str
) -> None:
    """The message has the path, the kind of the value, and what to do, and is short."""
    with pytest.raises(kind) as caught:
        encode_inputs(inputs)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300
    assert type(caught.value) is kind


def test_an_instance_that_contains_itself_is_refused() -> None:
    """Like a mapping that contains itself."""
    row = Row([])
    row.when.append({"row": (row,)})
    with pytest.raises(ValueError, match=r"^inputs\.row: contains itself"):
        encode_inputs({"row": row})


def test_the_same_value_may_occur_twice() -> None:
    """A value in two places is encoded twice."""
    shared = [1]
    encoded = encode_inputs({"a": shared, "b": {"c": shared}})
    assert encoded == {"a": [1], "b": {"c": [1]}}
    assert encoded["a"] is not encoded["b"]["c"]


def _converter(kind: Any, hook: Callable[[Any], Any]) -> cattrs.Converter:
    converter = cattrs.Converter()
    converter.register_unstructure_hook(kind, hook)
    return converter


def test_hooks_of_the_user_are_used() -> None:
    """The converter is used for values that are not plain JSON, and its results are checked."""
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
    with pytest.raises(TypeError, match=r"inputs\.at: a datetime is not a JSON value"):
        encode_inputs({"at": at})


@pytest.mark.parametrize("converter", [None, strict_converter(), strict_converter().copy()])
def test_a_field_may_be_a_named_tuple(converter: cattrs.Converter | None) -> None:
    """It is encoded as a tuple, also where its annotations are strings that nobody evaluates."""
    segment = Segment(Point(1, Color.RED), [Point(2, Row(3))])
    assert encode_inputs(segment, converter) == {
        "start": [1, "red"],
        "others": [[2, {"when": 3}]],
    }


def test_any_converter_takes_named_tuples() -> None:
    """Its hook for one is used; without a hook, its items are encoded, by its other hooks."""
    day = dt.date(2026, 1, 31)
    converter = _converter(dt.date, lambda value: value.isoformat())
    assert encode_inputs({"a": Point(1, day)}, converter) == {"a": [1, "2026-01-31"]}
    converter = _converter(Point, lambda value: {"x": value.x})
    assert encode_inputs({"a": [Point(1, day)]}, converter) == {"a": [{"x": 1}]}


@pytest.mark.parametrize(
    ("hook", "kind", "message"),
    [
        (
            lambda value: 1 / 0,
            TypeError,
            r"inputs\.a\[0\]: could not convert an object \(Zero",
        ),
        (lambda value: {"b": b""}, TypeError, r"inputs\.a\[0\]\.b: a bytes is not a JSON value"),
        (lambda value: object(), TypeError, r"inputs\.a\[0\]: an object is not a JSON value"),
        (lambda value: [object()], ValueError, "contains itself, or is nested too deeply"),
    ],
)
def test_a_hook_that_fails_is_reported(hook: Any, kind: type[Exception], message: str) -> None:
    """The error for a hook that raises, or returns no JSON either, has the path."""
    converter = cattrs.Converter()
    converter.register_unstructure_hook_func(lambda cls: cls is object, hook)
    with pytest.raises(kind, match=message):
        encode_inputs({"a": [object()]}, converter)
