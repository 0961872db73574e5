"""`into=` in code as users write it; it is type-checked, never run."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, assert_type

import attrs

from promptlayer_exec import Execution, Session

if TYPE_CHECKING:
    from typing_extensions import TypeForm

T = TypeVar("T")


@attrs.frozen
class Report:
    """An attrs class."""

    title: str


@dataclasses.dataclass
class Summary:
    """A dataclass."""

    title: str


class Row(TypedDict):
    """A TypedDict."""

    title: str


class Mood(enum.StrEnum):
    """An enum."""

    GOOD = "good"


async def collect(execution: Execution) -> None:
    """Use every kind of type."""
    assert_type(await execution.output(), Any)
    assert_type(await execution.output(into=None), Any)
    assert_type((await execution.wait()).output(), Any)
    assert_type((await execution.wait()).output(into=Report | None), Report | None)
    assert_type(await execution.output(timeout=None, into=Report), Report)
    assert_type(await execution.output(timeout=1.5, into=Summary), Summary)
    assert_type(await execution.output(timeout=..., into=Row), Row)
    assert_type(await execution.output(into=Mood), Mood)
    assert_type(await execution.output(into=int), int)
    assert_type(await execution.output(into=list[Report]), list[Report])
    assert_type(await execution.output(into=dict[str, Report]), dict[str, Report])
    assert_type(await execution.output(into=Report | None), Report | None)
    assert_type(await execution.output(into=int | str), int | str)
    assert_type(
        await execution.output(into=Report | list[Report] | None), Report | list[Report] | None
    )
    assert_type(await execution.output(into=Literal["yes", "no"]), Literal["yes", "no"])


async def forward(execution: Execution, into: TypeForm[T]) -> T:
    """Pass a type on, as a helper function of a user does."""
    return await execution.output(into=into)


async def misuse(execution: Execution) -> None:
    """Pass invalid arguments; mypy and ty must refuse each: they report unused ignores."""
    await execution.output(into=Report("a"))  # type: ignore[call-overload]  # ty: ignore[invalid-type-form]
    await execution.output(into=5)  # type: ignore[call-overload]  # ty: ignore[invalid-type-form]
    await execution.output(timeout="5", into=Report)  # type: ignore[call-overload]  # ty: ignore[no-matching-overload]


async def run(session: Session) -> None:
    """Start and wait in one call."""
    assert_type(await session.run("name"), Any)
    assert_type(await session.run("name", {"a": 1}, label="prod", into=list[Report]), list[Report])
