"""Code that describes its workflows once. Type checkers must infer every type, without a cast."""

# ruff: noqa: D101, D103 - as users write it

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, TypeVar, assert_type

import attrs

from promptlayer_exec import Execution, Outcome, Session, StartRequest, Workflow, WorkflowDefinition
from promptlayer_exec.dbos import Batch, StoredOutcome
from promptlayer_exec.webhooks import Callbacks

if TYPE_CHECKING:
    from typing_extensions import TypeForm

T = TypeVar("T")


@attrs.frozen
class Topic:
    topic: str


@attrs.frozen
class Report:
    title: str


class Row(TypedDict):
    title: str


Nodes = TypedDict("Nodes", {"add links": str, "metadata agent": NotRequired[Report]})

write_report = Workflow("write-report", inputs=Topic, output=Report, label="prod", description="…")
rows = Workflow("rows", output=list[Row])
maybe = Workflow(787, output=Report | None)
mood = Workflow("mood", output=Literal["good", "bad"])
bare = Workflow("bare", label="prod")


async def one(session: Session) -> None:
    assert_type(write_report, Workflow[Report, Topic])
    assert_type(attrs.evolve(write_report, label="canary"), Workflow[Report, Topic])
    assert_type(bare, Workflow)
    assert_type(await session.run(write_report, Topic("otters")), Report)
    assert_type(await session.run(write_report, Topic("otters"), key="a", timeout=5), Report)
    assert_type(await session.run(rows, {"topic": "otters"}), list[Row])
    assert_type(await session.run(rows), list[Row])
    assert_type(await session.run(maybe, {"topic": "otters"}), Report | None)
    assert_type(await session.run(mood, {"topic": "otters"}), Literal["good", "bad"])
    assert_type(await session.run(bare, {"topic": "otters"}), Any)
    assert_type(await session.definition(write_report), WorkflowDefinition)

    # Names
    assert_type(await session.run("a"), Any)
    assert_type(await session.run("a", {"x": 1}), Any)
    assert_type(await session.run("a", {"x": 1}, into=Report), Report)
    assert_type(await session.run("a", {"x": 1}, into=Report | None), Report | None)
    assert_type(await session.run("a", Topic("x"), into=list[Report]), list[Report])
    assert_type(await session.run("a", into=Literal["a", "b"]), Literal["a", "b"])
    assert_type(await session.run(17, into=dict[str, Report]), dict[str, Report])


async def two(session: Session) -> None:
    execution = await session.start(write_report, Topic("otters"), timeout=5)
    assert_type(execution, Execution[Report])
    assert_type(await execution.output(), Report)
    assert_type(await execution.output(timeout=5), Report)
    assert_type(await execution.output(into=Row), Row)
    assert_type(await execution.outputs(), dict[str, Any])
    assert_type(await execution.outputs(into=Nodes), Nodes)
    assert_type((await execution.outputs(into=Nodes))["add links"], str)
    assert_type(await execution.outputs(into=dict[str, Report]), dict[str, Report])

    assert_type(await session.start("a", {"x": 1}), Execution)
    assert_type(await (await session.start("a", {"x": 1})).output(), Any)
    assert_type(await (await session.start("a")).output(into=Report), Report)
    assert_type(session.execution(1234, write_report), Execution[Report])
    assert_type(session.execution(1234, "name"), Execution)
    assert_type(session.execution(1234), Execution)
    assert_type(await session.execution("1234", maybe).output(), Report | None)

    snapshot = await execution.wait()
    assert_type(snapshot.output(), Any)
    assert_type(snapshot.output(into=Report), Report)
    assert_type(snapshot.outputs(), dict[str, Any])
    assert_type(snapshot.outputs(into=Nodes), Nodes)


async def many(session: Session, ids: list[int], handles: list[Execution[Report]]) -> None:
    requests = (StartRequest(write_report, Topic(topic), key=topic) for topic in "ab")
    async with aclosing(session.as_completed(requests)) as outcomes:
        async for outcome in outcomes:
            assert_type(outcome, Outcome[StartRequest[Report, Topic], Report])
            assert_type(outcome.result(), Report)
            assert_type(outcome.item.inputs.topic, str)
            if outcome.error is not None:
                assert_type(outcome.error, Exception)

    typed = [session.execution(execution_id, write_report) for execution_id in ids]
    assert_type(await session.collect(typed), list[Outcome[Execution[Report], Report]])
    assert_type(await session.collect(handles), list[Outcome[Execution[Report], Report]])

    plain = [StartRequest("a", {"x": topic}) for topic in "ab"]
    assert_type((await session.collect(plain))[0].result(), Any)
    assert_type((await session.collect(plain, into=Report))[0].result(), Report)
    assert_type((await session.collect(ids, into=Report | None))[0].result(), Report | None)
    either = await session.collect([1, handles[0], plain[0]], into=Report)
    assert_type(either[0].result(), Report)
    assert_type((await session.collect(ids))[0].result(), Any)


async def night(batch: Batch) -> None:
    await batch.add(StartRequest(write_report, Topic(topic), key=topic) for topic in "ab")
    async with aclosing(batch.outcomes(into=Report)) as outcomes:
        async for outcome in outcomes:
            assert_type(outcome, StoredOutcome[Report])
            assert_type(outcome.output, Report)
    async for stored in batch.outcomes():
        assert_type(stored.output, Any)


async def forward(session: Session, execution: Execution, into: TypeForm[T]) -> T:
    return await execution.output(into=into)


async def forward_workflow(session: Session, workflow: Workflow[T], inputs: Mapping[str, str]) -> T:
    return await session.run(workflow, inputs)


def callbacks() -> Callbacks:
    return Callbacks("https://app.example.com/callbacks", secret="x" * 32)


async def misuse(session: Session) -> None:
    """Hand over wrong values; mypy and ty must refuse each: they report unused ignores."""
    await session.run(write_report, {"topic": "x"})  # type: ignore[misc]  # ty: ignore[no-matching-overload]
    await session.run(write_report, Report("x"))  # type: ignore[misc]  # ty: ignore[no-matching-overload]
    await session.run(write_report, Topic("x"), into=Row)  # type: ignore[call-overload]  # ty: ignore[no-matching-overload]
    await session.start(write_report, Report("x"))  # type: ignore[misc]  # ty: ignore[invalid-argument-type]
    StartRequest(write_report, Report("x"))  # type: ignore[misc]  # ty: ignore[invalid-argument-type]
    Workflow("a", output=Report("x"))  # type: ignore[arg-type]  # ty: ignore[invalid-type-form]
    row: Row = await session.run(write_report, Topic("x"))  # type: ignore[arg-type]  # ty: ignore[invalid-assignment]
    topic: Execution[Topic] = await session.start(write_report, Topic("x"))  # type: ignore[arg-type]  # ty: ignore[invalid-assignment]
    await session.collect([row, topic])
