"""Structuring outputs into types: what fits, what is refused, and how a mismatch is reported."""

# ruff: noqa: D101 - the classes are what users would write

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime as dt
import enum
import math
import subprocess
import sys
import time
import typing
from collections.abc import Mapping, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from decimal import Decimal
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Required,
    TypedDict,
    TypeVar,
)
from uuid import UUID

import attrs
import cattrs
import pytest
from cattrs.gen import make_dict_structure_fn, override
from cattrs.preconf.json import make_converter
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from promptlayer_exec import InvalidOutput, Node, Snapshot, strict_converter
from promptlayer_exec._structuring import check_type, structure_output

T = TypeVar("T")
OrderId = NewType("OrderId", int)


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Color(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Mixed(enum.Enum):
    ONE = 1
    HALF = 0.5
    FULL = 2.0


class Folded(enum.Enum):
    YES = "yes"

    @classmethod
    def _missing_(cls, value: object) -> Folded | None:
        return cls.YES if value == "YES" else None


class Rights(enum.IntFlag):
    READ = 1
    WRITE = 2


@attrs.frozen
class Item:
    name: str
    price: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))


@attrs.frozen
class Report:
    title: str
    items: list[Item] = attrs.field(factory=list)
    previous: Report | None = None
    labels: dict[str, Item] = attrs.field(factory=dict)


@dataclasses.dataclass
class Summary:
    text: str
    final: bool = False


class Row(TypedDict):
    name: str
    count: NotRequired[int]


class Tree(TypedDict, total=False):
    value: Required[int]
    children: list[Tree]


class Pair(TypedDict, Generic[T]):
    first: T


class Point(NamedTuple):
    x: int


class Both(NamedTuple, Generic[T]):
    first: T


@attrs.frozen
class Box(Generic[T]):
    content: T


class Model(BaseModel):
    number: int
    at: dt.datetime | None = None
    color: Color | None = None
    inner: Model | None = None


@attrs.frozen
class Holder:
    model: Model
    models: list[Model] = attrs.field(factory=list)


def structure(value: Any, into: Any, converter: cattrs.Converter | None = None) -> Any:
    """Return the output of a snapshot, structured into a type."""
    snapshot = Snapshot(787, True, {"a": Node("a", "SUCCESS", value, is_output_node=True)})
    if converter is None:
        return snapshot.output(into=into)
    return structure_output(value, into, converter, snapshot)


def error_of(value: Any, into: Any, converter: cattrs.Converter | None = None) -> InvalidOutput:
    """Return the error that structuring a value raises."""
    with pytest.raises(InvalidOutput) as caught:
        structure(value, into, converter)
    return caught.value


def typed(value: Any) -> Any:
    """Return a value with its types, because 1 == 1.0 == True."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [typed(item) for item in value]
    return type(value), repr(value)


@pytest.mark.parametrize(
    ("value", "into", "expected"),
    [
        ("a", str, "a"),
        (1, int, 1),
        (1, float, 1.0),
        (True, bool, True),
        (None, None, None),
        (None, type(None), None),
        ({"a": [1]}, Any, {"a": [1]}),
        (1, OrderId, 1),
        (1, Annotated[int, "unit"], 1),
        ([1, "a"], list, [1, "a"]),
        ([1], list[float], [1.0]),
        ([1], Sequence[int], (1,)),
        ([1, 1], set[int], {1}),
        ([1], frozenset[int], frozenset({1})),
        ([1], AbstractSet[int], frozenset({1})),
        ([1, "a"], tuple, (1, "a")),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([], tuple[()], ()),
        ([1, "a"], typing.Tuple, (1, "a")),  # noqa: UP006
        ({"a": 1}, dict, {"a": 1}),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": 1}, Mapping[str, int], {"a": 1}),
        ({"a": 1}, MutableMapping[str, int], {"a": 1}),
        ({"red": 1}, dict[Color, int], {Color.RED: 1}),
        ("red", Color, Color.RED),
        (1, Level, Level.LOW),
        (2, Mixed, Mixed.FULL),
        ("YES", Folded, Folded.YES),
        (3, Rights, Rights.READ | Rights.WRITE),
        ("a", Literal["a", 1], "a"),
        ("red", Literal[Color.RED], Color.RED),
        ("b", Literal["a", "b"], "b"),
        ("2026-01-31T10:00:00Z", dt.datetime, dt.datetime(2026, 1, 31, 10, tzinfo=dt.UTC)),
        ("2026-01-31", dt.date, dt.date(2026, 1, 31)),
        ("10:00", dt.time, dt.time(10)),
        ("0.1", Decimal, Decimal("0.1")),
        (0.1, Decimal, Decimal("0.1")),
        (3, Decimal, Decimal(3)),
        ("12345678123456781234567812345678", UUID, UUID("12345678123456781234567812345678")),
        ("a/b", Path, Path("a/b")),
        ({"title": "t", "extra": 1}, Report, Report("t")),
        (
            {"title": "t", "items": [{"name": "n", "price": 1}], "previous": {"title": "p"}},
            Report,
            Report("t", [Item("n", 1.0)], Report("p")),
        ),
        ([{"title": "t"}], list[Report], [Report("t")]),
        ({"text": "t", "final": True}, Summary, Summary("t", final=True)),
        ({"name": "n"}, Row, {"name": "n"}),
        ({"value": 1, "children": [{"value": 2}]}, Tree, {"value": 1, "children": [{"value": 2}]}),
        ({"first": 1}, Pair[int], {"first": 1}),
        ({"model": {"number": 1}}, Holder, Holder(Model(number=1))),
    ],
)
def test_fits(value: Any, into: Any, expected: Any) -> None:
    """A value that fits becomes an instance of the type."""
    result = structure(value, into)
    assert result == expected
    assert type(result) is type(expected)


_VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 0.0, 1.0, 0.5, "", "a", "red", "é", [], [1], ["a"], [True],
    [[1]], {}, {"a": 1}, {"title": "t"}, {"text": "t"}, {"name": "n"}, {"x": 1}, {"number": 1},
]  # fmt: skip

_ORACLE: dict[Any, Any] = {
    str: lambda value: type(value) is str,
    int: lambda value: type(value) is int,
    float: lambda value: type(value) in (int, float),
    bool: lambda value: type(value) is bool,
    type(None): lambda value: value is None,
    Level: lambda value: type(value) is int and value in (1, 2),
    Color: lambda value: value == "red",
    Mixed: lambda value: type(value) in (int, float) and typed(value) in map(typed, (1, 2, 0.5)),
    Literal[1]: lambda value: type(value) is int and value == 1,
    Literal[True]: lambda value: value is True,
    Literal["a"]: lambda value: value == "a",
    int | str: lambda value: type(value) in (int, str),
    bool | int: lambda value: type(value) in (bool, int),
    float | int: lambda value: type(value) in (float, int),
    list[int]: lambda value: type(value) is list and all(type(item) is int for item in value),
    tuple[int]: lambda value: typed(value) == typed([1]),
    set[bool]: lambda value: type(value) is list and all(type(item) is bool for item in value),
    dict[str, int]: lambda value: (
        type(value) is dict and all(type(item) is int for item in value.values())
    ),
    Report: lambda value: type(value) is dict and "title" in value,
    Summary: lambda value: type(value) is dict and "text" in value,
    Row: lambda value: type(value) is dict and "name" in value,
    Model: lambda value: typed(value) == typed({"number": 1}),
    dt.datetime: lambda value: False,
    Decimal: lambda value: type(value) in (int, float),
    UUID: lambda value: False,
    Path: lambda value: type(value) is str,
}  # fmt: skip


@pytest.mark.parametrize("into", _ORACLE, ids=str)
def test_never_coerces(into: Any) -> None:
    """A type takes only values of its own JSON kind."""
    for value in _VALUES:
        try:
            result = structure(value, into)
        except InvalidOutput:
            assert not _ORACLE[into](value), value
        else:
            assert _ORACLE[into](value), value
            if type(value) not in (list, dict) and into not in (float, Decimal):
                assert result == value or getattr(result, "value", result) == value or into is Path


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
Json = dict[str, Any] | list[Any] | str | int | float | bool | None


@given(json_values)
def test_union_of_every_kind_changes_nothing(value: Any) -> None:
    """A union of all JSON kinds returns every value unchanged, types included."""
    assert typed(structure(value, Json)) == typed(value)


def unhashable() -> str:
    """Return what this version of Python says of a dict in a set."""
    with pytest.raises(TypeError) as caught:
        set(iter([{}]))
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "into", "path", "reason"),
    [
        ("x", int, "$", "expected an integer, got a string"),
        (True, int, "$", "expected an integer, got true"),
        (None, str, "$", "expected a string, got null"),
        (b"x", str, "$", "expected a string, got a bytes"),
        ({}, Report, "$.title", "is missing"),
        ({"title": "t", "items": [{"name": "n"}, {}]}, Report, "$.items[1].name", "is missing"),
        ({"title": "t", "items": "n"}, Report, "$.items", "expected an array, got a string"),
        (
            {"title": "t", "labels": {"a b": {"name": 1}}},
            Report,
            '$.labels["a b"].name',
            "expected a string, got an integer",
        ),
        (
            {"title": "t", "items": [{"name": "n", "price": -1}]},
            Report,
            "$.items[0]",
            "'price' must be >= 0: -1.0",
        ),
        ({"1": 2}, dict[int, int], '$["1"]', "expected an integer, got a string"),
        (10**400, float, "$", "OverflowError: int too large to convert to float"),
        ("green", Color, "$", "expected one of ['red', 'blue'], got 'green'"),
        (True, Level, "$", "expected one of [1, 2], got True"),
        (1.0, Rights, "$", "expected one of [1, 2], got 1.0"),
        (True, Literal[1], "$", "expected one of [1], got True"),
        ("2026-01-31", dt.datetime, "$", "expected a datetime, got '2026-01-31'"),
        ("x", Decimal, "$", "expected a Decimal, got 'x'"),
        (True, Decimal, "$", "expected a string, got true"),
        ([1], tuple[int, str], "$", "expected an array of 2, got one of 1"),
        ([1, 2], tuple[int, str], "$[1]", "expected a string, got an integer"),
        ([{}], set[Any], "$", unhashable()),
        ([], Row, "$", "expected an object, got an array"),
        ({"value": 1, "children": [{}]}, Tree, "$.children[0].value", "is missing"),
        (5, Report | None, "$", "expected Report | None, got an integer"),
        ({"title": 1}, Report | None, "$.title", "expected a string, got an integer"),
        ({"number": "1"}, Model, "$.number", "Input should be a valid integer"),
        ({}, Model, "$.number", "is missing"),
        ({"number": 1, "inner": {}}, Model, "$.inner.number", "is missing"),
        ([], Model, "$", "Input should be an object"),
        ({"model": {"number": 1}, "models": [{}]}, Holder, "$.models[0].number", "is missing"),
    ],
)
def test_the_error_names_path_and_reason(value: Any, into: Any, path: str, reason: str) -> None:
    """The error has the path and reason of the first mismatch, and the original error as cause."""
    error = error_of(value, into)
    assert (error.path, error.reason) == (path, reason)
    assert error.args[0].endswith(f" at {path}: {reason}")
    assert isinstance(error.__cause__, Exception)


@pytest.mark.parametrize(
    ("text", "into", "expected"),
    [
        ('"abc"', str, '"abc"'),
        ("42", int | str, "42"),
        ("42", int, 42),
        ("null", Report | None, None),
        ('"red"', Color, Color.RED),
        ('{"title": "t"}', Report, Report("t")),
        ('{"number": 1}', Model, Model(number=1)),
        ('{"title": "t"}', Report | str, '{"title": "t"}'),
        ("1" * 500, int, int("1" * 500)),
        ("[NaN]", list[float], [math.nan]),
    ],
)
def test_a_string_is_parsed_as_json_only_if_it_does_not_fit(
    text: str, into: Any, expected: Any
) -> None:
    """A string is tried as it is, and then parsed as JSON."""
    assert typed(structure(text, into)) == typed(expected)


@pytest.mark.parametrize(
    ("text", "path", "reason"),
    [
        ('{"title": 1}', "$.title", "expected a string, got an integer"),
        ("42", "$", "expected an object, got a string"),
        ("{", "$", "expected an object, got a string"),
        ("1" * 5000, "$", "expected an object, got a string"),
        ("[" * 100_000, "$", "expected an object, got a string"),
    ],
)
def test_the_error_is_about_an_object_in_the_string(text: str, path: str, reason: str) -> None:
    """If both attempts fail and the string has an object or array, the error is about that."""
    error = error_of(text, Report)
    assert (error.path, error.reason) == (path, reason)


REPORT = '{"title": "t"}'


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{REPORT}\n```",
        f"```\n{REPORT}\n```",
        f"~~~ JSON \r\n{REPORT}\r\n  ~~~~\n",
        f" \n````json\n\n{REPORT}\n\n````\n\n",
    ],
)
def test_a_text_that_is_one_fenced_block_is_what_it_holds(text: str) -> None:
    """Models write JSON as a block of Markdown. If the text itself fits, it stays."""
    assert structure(text, Report) == Report("t")
    assert structure(text, Report | str) == text
    assert structure("```json\n0.5\n```", float) == 0.5


@pytest.mark.parametrize(
    "text",
    [
        f"Here it is:\n```json\n{REPORT}\n```",
        f"```json\n{REPORT}\n```\nDone.",
        f"```json\n{REPORT}\n```\n```json\n{REPORT}\n```",
        f"```json\n{REPORT}",
        f"```json\n{REPORT}```",
        f"````json\n{REPORT}\n```",
        f"```json\n{REPORT}\n~~~",
        f"```python\n{REPORT}\n```",
        f"```json {REPORT}\n```",
        "```json\n{title}\n```",
        "```\n```",
    ],
)
def test_no_json_is_searched_in_a_text(text: str) -> None:
    """The reason points at the block, which a person would take for the output."""
    error = error_of(text, Report)
    assert error.path == "$"
    assert error.reason.startswith("expected an object, got a string. The text has a fenced block")
    assert error.value == text


def test_a_mismatch_within_a_fenced_block_has_its_path() -> None:
    """The reason is about the object, and says nothing of the block."""
    error = error_of('```json\n{"title": 1}\n```', Report)
    assert (error.path, error.reason) == ("$.title", "expected a string, got an integer")


@pytest.mark.parametrize("text", ["```json\n" * 100_000, "```\n" + " \n" * 300_000, "`" * 300_000])
def test_reading_a_fenced_block_takes_linear_time(text: str) -> None:
    """A long text of fences does not stop the event loop."""
    began = time.process_time()
    error_of(text, Report)
    assert time.process_time() - began < 2.0


def test_a_nested_string_is_not_parsed() -> None:
    """Only the value itself is parsed as JSON, not a string within it."""
    assert error_of(["1"], list[int]).path == "$[0]"


@attrs.frozen
class Cat:
    name: str
    lives: int


@attrs.frozen
class Dog:
    name: str
    tricks: list[str]


@attrs.frozen
class Puppy:
    name: str
    months: int = 0


@attrs.frozen
class Added:
    kind: Literal["added"]
    value: int


@attrs.frozen
class Removed:
    kind: Literal["removed"]
    value: int


@pytest.mark.parametrize(
    ("value", "into", "expected"),
    [
        ("red", str | Color, Color.RED),
        ("green", str | Color, "green"),
        ("2026-01-31T10:00", dt.datetime | str, "2026-01-31T10:00"),
        ("2026-01-31", dt.datetime | dt.date, dt.date(2026, 1, 31)),
        ({"name": "n", "lives": 9}, Cat | Dog, Cat("n", 9)),
        ({"name": "n", "tricks": []}, Cat | Dog | None, Dog("n", [])),
        ({"name": "n"}, Puppy | Item, Puppy("n")),
        ({"name": "n"}, dict[str, Any] | Puppy, Puppy("n")),
        ({"other": 1}, dict[str, Any] | Puppy, {"other": 1}),
        ({"kind": "removed", "value": 1}, Added | Removed, Removed("removed", 1)),
        ([{"title": "t"}], Report | list[Report] | str | None, [Report("t")]),
        ("t", Report | list[Report] | str | None, "t"),
        (None, Report | None, None),
        ({"number": 1}, Model | None, Model(number=1)),
    ],
)
def test_union_takes_the_closest_member(value: Any, into: Any, expected: Any) -> None:
    """Enums are tried first, then the value's own type, then the rest; cattrs picks a class."""
    assert typed(structure(value, into)) == typed(expected)


@pytest.mark.parametrize("value", [1, 1.0, "a", "red", True, None, {"a": 1}, {"name": "n"}])
@pytest.mark.parametrize(
    "members", [(int, float), (str, Color), (bool, int), (dict[str, Any], Puppy), (Level, int)]
)
def test_order_of_a_union_does_not_matter(value: Any, members: tuple[Any, Any]) -> None:
    """`int | str` equals `str | int`, so Python may pass either for the other."""
    first, second = members

    def outcome(into: Any) -> Any:
        try:
            return typed(structure(value, into, strict_converter()))
        except InvalidOutput as error:
            return error.path

    assert outcome(first | second) == outcome(second | first)


@pytest.mark.parametrize(
    ("value", "into", "path", "reason"),
    [
        ({"name": "n", "lives": "9"}, Cat | Dog, "$.lives", "expected an integer, got a string"),
        (
            {"kind": "renamed", "value": 1},
            Added | Removed,
            "$",
            (
                "fits none of Added | Removed"
                " (Added.kind: expected one of ['added'], got 'renamed';"
                " Removed.kind: expected one of ['removed'], got 'renamed')"
            ),
        ),
        ([{"name": 1}], list[Cat] | Cat, "$[0].name", "expected a string, got an integer"),
        (5, list[int] | str | None, "$", "expected list[int] | str | None, got an integer"),
    ],
)
def test_union_names_the_closest_error(value: Any, into: Any, path: str, reason: str) -> None:
    """If one member takes the value's kind, its error is raised; if several do, all are listed."""
    error = error_of(value, into)
    assert (error.path, error.reason) == (path, reason)


def test_generic_classes() -> None:
    """A generic attrs class checks its type argument."""
    assert structure({"content": [1]}, Box[list[int]]) == Box([1])
    assert error_of({"content": ["1"]}, Box[list[int]]).path == "$.content[0]"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="`type` statements are new in 3.12")
def test_type_aliases() -> None:
    """A `type` alias can be recursive."""
    scope: dict[str, Any] = {}
    exec("type Nested = int | list[Nested]", scope)
    assert structure([1, [2, [3]]], scope["Nested"]) == [1, [2, [3]]]
    assert error_of([1, [2, ["3"]]], scope["Nested"]).path == "$[1][1][0]"


@attrs.frozen
class Checked:
    low: int = attrs.field()
    high: int = attrs.field(alias="top", default=9)
    _redaction: int = 0

    @low.validator
    def _check_low(self, attribute: attrs.Attribute[int], value: int) -> None:
        if value < 0:
            raise ValueError("is negative")

    def __attrs_post_init__(self) -> None:
        if self.low > self.high:
            raise RuntimeError("low is above high")
        if self.low == 5:
            raise KeyError("five")
        if self.low == 4:
            error = ValueError("four")
            error.add_note("a note of the user's own")
            raise error
        if self.low == 6:
            raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("value", "path", "reason"),
    [
        ({"low": -1}, "$", "is negative"),
        ({"low": 10}, "$", "RuntimeError: low is above high"),
        ({"low": 5}, "$", "KeyError: five"),
        ({"low": 4}, "$", "four"),
        ({"low": 1, "high": "2"}, "$.high", "expected an integer, got a string"),
        ({"low": 1, "_redaction": "2"}, "$._redaction", "expected an integer, got a string"),
    ],
)
def test_errors_of_the_user_s_classes_are_structure_errors(
    value: Any, path: str, reason: str
) -> None:
    """An exception of a validator or `__attrs_post_init__` is a structure error at its instance."""
    error = error_of(value, Checked)
    assert (error.path, error.reason) == (path, reason)


def test_a_value_that_is_nested_too_deeply_is_a_structure_error() -> None:
    """Its cause is the RecursionError."""
    value: dict[str, Any] = {"title": "t"}
    for _ in range(sys.getrecursionlimit()):
        value = {"title": "t", "previous": value}
    error = error_of(value, Report)
    assert (error.path, error.reason) == ("$", "is nested too deeply")
    assert isinstance(error.__cause__, RecursionError)


class Opaque:
    """A class that there is no hook for."""


@attrs.frozen
class Unresolved:
    field: Missing  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    "into", [Opaque, list[Opaque], Opaque | None, Box[Opaque], Box, Unresolved, 5, "Report", [int]],
    ids=str,
)  # fmt: skip
def test_unusable_type_is_a_type_error(into: Any) -> None:
    """A type that is none, or has a part without a hook, is refused for any value."""
    with pytest.raises(TypeError, match=r"cannot structure into|into must be a type"):
        structure(None, into)
    with pytest.raises(TypeError, match=r"cannot structure into|into must be a type"):
        check_type(into)


def test_a_usable_type_passes_the_check() -> None:
    """A type without a rule passes if the converter has a hook for it."""
    converter = strict_converter()
    converter.register_structure_hook(Opaque, lambda value, _: Opaque())
    check_type(list[Opaque] | None, converter)
    check_type(Report | Model | None)
    converter = strict_converter()
    converter.register_structure_hook(Opaque | None, lambda value, _: Opaque())
    check_type(Opaque | None, converter)


def test_bytes_need_a_hook() -> None:
    """JSON has no bytes, and there are several ways to encode them."""
    with pytest.raises(TypeError, match=r"execution 787 at \$\[0\]: there is no rule for bytes"):
        structure(["x"], list[bytes])
    converter = strict_converter()
    converter.register_structure_hook(bytes, lambda value, _: bytes.fromhex(value))
    assert structure(["00"], list[bytes], converter) == [b"\0"]


@pytest.mark.parametrize(
    "into", [collections.deque[str], collections.Counter[str], Point, Both[int]], ids=str
)
def test_other_collections_need_a_hook(into: Any) -> None:
    """The hooks of cattrs for them take a string for an array of characters."""
    with pytest.raises(TypeError, match="there is no rule for"):
        check_type(into)
    converter = strict_converter()
    converter.register_structure_hook_func(lambda kind: kind == into, lambda value, _: "hook")
    assert structure("abc", into, converter) == "hook"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int = 0


class Lenient(BaseModel):
    model_config = ConfigDict(strict=False)
    number: int


class Former:
    """A class whose `model_validate` has neither a JSON variant nor a strict mode."""

    @classmethod
    def model_validate(cls, value: Any) -> Any:
        """Accept any value."""
        return "former", value


def test_models_validate_themselves_strictly() -> None:
    """A model reads the JSON form of its types, keeps its own rules, and validates strictly."""
    value = {"number": 1, "at": "2026-01-31T10:00:00Z", "color": "red", "inner": {"number": 2}}
    assert structure(value, Model) == Model(
        number=1,
        at=dt.datetime(2026, 1, 31, 10, tzinfo=dt.UTC),
        color=Color.RED,
        inner=Model(number=2),
    )
    assert error_of({"number": "1"}, Lenient).path == "$.number"
    assert error_of({"number": 1, "other": 2}, Strict).path == "$.other"
    assert structure([1], Former) == ("former", [1])


@attrs.frozen
class Money:
    cents: int
    final: bool = False


def _money(value: Any, _: Any) -> Money:
    amount, _, currency = value.partition(" ")
    if currency != "EUR":
        raise ValueError("is no amount in EUR")
    return Money(round(float(amount) * 100))


def test_a_strict_converter_takes_hooks() -> None:
    """They take precedence over the strict rules, which apply to all other types."""
    converter = strict_converter()
    converter.register_structure_hook(Money, _money)
    converter.register_structure_hook(
        dt.datetime, lambda value, _: dt.datetime.fromtimestamp(value, dt.UTC)
    )
    converter.register_structure_hook(Cat | str, lambda value, _: "a cat or a string")
    converter.register_structure_hook_func(lambda kind: kind is Mixed, lambda value, _: Mixed.ONE)
    converter.register_structure_hook_func(
        lambda kind: kind == list[str], lambda value, _: value.split(",")
    )
    assert structure(["1.50 EUR"], list[Money], converter) == [Money(150)]
    assert structure("1.50 EUR", Money | None, converter) == Money(150)
    error = error_of(["1.50 USD"], list[Money], converter)
    assert (error.path, error.reason) == ("$[0]", "is no amount in EUR")
    assert structure(0, dt.datetime, converter).year == 1970
    assert structure("a,b", list[str], converter) == ["a", "b"]
    assert structure(0, Cat | str, converter) == "a cat or a string"
    assert structure(0, Mixed, converter) is Mixed.ONE
    assert error_of({"title": 1}, Report, converter).path == "$.title"


def test_each_strict_converter_is_new() -> None:
    """A hook on one changes neither the next nor the default rules."""
    strict_converter().register_structure_hook(Money, _money)
    assert error_of("1.50 EUR", Money).reason == "expected an object, got a string"
    assert error_of("1.50 EUR", Money, strict_converter()).path == "$"


def test_hook_for_int_does_not_apply_to_bool() -> None:
    """A lenient hook for int leaves bool strict, although bool is a subclass of int."""
    converter = strict_converter()
    converter.register_structure_hook(int, lambda value, _: int(value))
    assert structure({"cents": "1"}, Money, converter) == Money(1)
    assert error_of({"cents": "1", "final": 1}, Money, converter).path == "$.final"


def test_a_plain_converter_coerces() -> None:
    """A converter of cattrs structures as it does for itself."""
    converter = cattrs.Converter()
    assert structure({"cents": "1", "final": 1}, Money, converter) == Money(1, final=True)
    assert structure(1, str, converter) == "1"
    assert structure("2026-01-31", dt.datetime, make_converter()) == dt.datetime(2026, 1, 31)
    assert structure({"cents": "1"}, Money | str | None, make_converter()) == Money(1)
    with pytest.raises(TypeError, match="cannot structure into"):
        check_type(Model, converter)


def test_a_mismatch_of_a_plain_converter_is_an_invalid_output() -> None:
    """With path, value and reason, like one of the strict rules."""
    value = [{"name": "n"}, {"name": "n", "price": "high"}]
    error = error_of(value, list[Item], cattrs.Converter())
    assert (error.path, error.value) == ("$[1].price", value)
    assert error.reason == "could not convert string to float: 'high'"
    assert error_of([{}], list[Item], cattrs.Converter()).reason == "is missing"


def test_path_has_the_key_and_not_the_attribute() -> None:
    """If an attribute is renamed, the path has the JSON key."""
    converter = strict_converter()
    converter.register_structure_hook_factory(
        lambda kind: kind is Money,
        lambda kind, converter: make_dict_structure_fn(
            kind, converter, cents=override(rename="Cents")
        ),
    )
    assert error_of({"Cents": "1"}, Money, converter).path == "$.Cents"
    assert error_of({}, Money, converter).path == "$.Cents"


def test_the_rules_are_imported_at_the_first_use() -> None:
    """Importing the package does not import them."""
    program = (
        "import sys, promptlayer_exec\n"
        "rules = 'promptlayer_exec._structuring.rules'\n"
        "assert rules not in sys.modules\n"
        "promptlayer_exec.strict_converter()\n"
        "assert rules in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
