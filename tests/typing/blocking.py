"""Synchronous code. Type checkers must infer the same types as for the asynchronous session."""

# ruff: noqa: D101, D103 - as users write it

from __future__ import annotations

from typing import Any, assert_type

import attrs

from promptlayer_exec import (
    MainOutput,
    Node,
    Outcome,
    PollPolicy,
    Snapshot,
    StartRequest,
    StartUnknown,
    Workflow,
    WorkflowDefinition,
    WorkflowSummary,
)
from promptlayer_exec.sync import Execution, Session


@attrs.frozen
class Topic:
    topic: str


@attrs.frozen
class Report:
    title: str


write_report = Workflow("write-report", inputs=Topic, output=Report, label="prod")


def settings() -> Session:
    return Session("pl_key", base_url="http://localhost:1", rate=None, poll=PollPolicy())


def one(session: Session) -> None:
    with session as opened:
        assert_type(opened, Session)
    assert_type(session.run(write_report, Topic("otters")), Report)
    assert_type(session.run(write_report, Topic("otters"), key="a", timeout=5), Report)
    assert_type(session.run("a"), Any)
    assert_type(session.run("a", {"x": 1}), Any)
    assert_type(session.run("a", {"x": 1}, into=Report | None), Report | None)
    assert_type(session.definition(write_report), WorkflowDefinition)
    for summary in session.workflows(sort_by="name"):
        assert_type(summary, WorkflowSummary)
    assert_type(session.get_results(1), MainOutput)
    assert_type(session.get_results(1, return_all_outputs=True), Snapshot)
    session.close()


def two(session: Session, error: StartUnknown) -> None:
    execution = session.start(write_report, Topic("otters"), timeout=5)
    assert_type(execution, Execution[Report])
    assert_type(execution.id, int)
    assert_type(execution.output(), Report)
    assert_type(execution.output(into=list[Report]), list[Report])
    assert_type(execution.outputs(), dict[str, Any])
    assert_type(execution.outputs(into=dict[str, Report]), dict[str, Report])
    assert_type(execution.wait(timeout=None), Snapshot)
    assert_type(execution.snapshot(), Snapshot)
    for snapshot in execution.stream(timeout=5):
        assert_type(snapshot, Snapshot)
    for node in execution.finished_nodes():
        assert_type(node, Node)

    assert_type(session.start("a", {"x": 1}), Execution)
    assert_type(session.start("a").output(), Any)
    assert_type(session.execution(1234, write_report), Execution[Report])
    assert_type(session.execution("1234"), Execution)
    assert_type(session.find("a"), Execution | None)
    assert_type(session.recover(error, timeout=5), Execution)
    for followed, seen in session.stream_all([1, "2", execution]):
        assert_type(followed, Execution)
        assert_type(seen, Snapshot)


def many(session: Session, executions: list[Execution[Report]]) -> None:
    requests = [StartRequest(write_report, Topic("otters"))]
    for outcome in session.as_completed(requests, max_in_flight=5):
        assert_type(outcome, Outcome[StartRequest[Report, Topic], Report, Execution])
        assert_type(outcome.output, Report)
        assert_type(outcome.item.inputs, Topic)
        assert_type(outcome.execution, Execution | None)
    for collected in session.collect(requests):
        assert_type(collected.result(), Report)

    for followed in session.as_completed(executions):
        assert_type(followed.output, Report)
        assert_type(followed.item, Execution[Report])
    for by_id in session.collect([1, 2]):
        assert_type(by_id, Outcome[int, Any, Execution])
    for typed in session.as_completed([1, 2], into=Report):
        assert_type(typed.output, Report)
