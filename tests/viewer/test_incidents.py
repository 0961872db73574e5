"""What the viewer knows of runs that fail for one cause, and of runs that are slow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from promptlayer_exec.simulator import Scenario, SimNode, Simulator
from promptlayer_exec.viewer import History
from promptlayer_exec.viewer._brief import brief_inputs
from promptlayer_exec.viewer._incident_runs import find_incidents

DAY = 86_400.0
CAUSE = "no seats for …: division by zero"


def offer(seats: Any, reason: str | None = None) -> Scenario:
    """Return a run that loads a customer, and chooses an offer or fails there."""
    failed: dict[str, Any] = {"status": "FAILED", "error_message": reason} if reason else {}
    return Scenario(
        [
            SimNode("load customer", {"name": "x", "plan": {"seats": seats}}),
            SimNode("choose offer", "annual", after=["load customer"], **failed),
        ]
    )


async def _start(viewer: Any, *, version: int | None = None, **inputs: Any) -> int:
    execution = await viewer.board.start("churn-offer", inputs, version=version)
    execution_id: int = execution.id
    while viewer.board.cards[execution_id].state not in ("succeeded", "failed"):
        await viewer.board.changed.wait()
    return execution_id


def _add_workflow(sim: Simulator) -> None:
    def run(inputs: Any) -> Scenario:
        number = inputs.get("fails")
        reason = None if number is None else f"no seats for {number}: division by zero"
        return offer(0 if reason else 12, reason)

    sim.add_workflow("churn-offer", run)


async def test_failures_of_one_cause_are_one(sim: Simulator, viewer: Any) -> None:
    """Numbers differ, the cause does not. It has its runs, with their inputs in short."""
    _add_workflow(sim)
    ids = [await _start(viewer, customer=f"globex {n}", fails=n) for n in (31, 32)]
    status, (found,) = await viewer.send("GET", "causes")
    assert status == 200
    assert found["count"] == 2
    named = {name: found[name] for name in ("workflow", "failed_node", "cause")}
    assert named == {"workflow": "churn-offer", "failed_node": "choose offer", "cause": CAUSE}

    _, page = await viewer.send("GET", f"cause?{urlencode(named)}")
    assert [run["execution_id"] for run in page["runs"]] == [str(one) for one in reversed(ids)]
    assert page["runs"][0]["inputs"] == {"customer": "globex 32", "fails": "32"}
    assert page["problem"] == "choose offer: no seats for 32: division by zero"
    assert sum(count for _, count in page["hours"]) == 2
    assert page["first"] <= page["latest"] <= time.time()

    usual = await viewer.board.history.usual("churn-offer")
    (cause,) = usual["causes"]
    incident = {"first": page["first"], "count": 2, "total": 2, "is_open": True}
    assert cause == {
        "failed_node": "choose offer",
        "cause": CAUSE,
        "count": 2,
        "incident": incident,
    }
    assert usual["failed"] == 2


async def test_a_single_failure_is_no_cause(sim: Simulator, viewer: Any) -> None:
    """Only two or more are; an unknown one has no runs."""
    _add_workflow(sim)
    await _start(viewer, fails=1)
    assert await viewer.send("GET", "causes") == (200, [])
    status, page = await viewer.send("GET", "cause?workflow=churn-offer&cause=another")
    assert (status, page["runs"], page["first"]) == (200, [], None)


async def _plan(viewer: Any, *ids: int) -> Any:
    status, plan = await viewer.send("POST", "reruns", {"execution_ids": [str(one) for one in ids]})
    assert status == 200
    return plan


@pytest.mark.parametrize("has_history", [True, False])
async def test_nothing_runs_again_twice(
    sim: Simulator, viewer: Any, monkeypatch: pytest.MonkeyPatch, has_history: bool
) -> None:
    """One run for each version and inputs, unless a later one runs or has succeeded."""
    if not has_history:
        monkeypatch.setattr(viewer.board, "history", None)
    _add_workflow(sim)
    twice = [await _start(viewer, fails=1) for _ in range(2)]
    other = await _start(viewer, fails=2)
    plan = await _plan(viewer, *twice, other, 999)
    assert [json.loads(run["inputs"]) for run in plan["runs"]] == [{"fails": 2}, {"fails": 1}]
    assert (plan["equal"], plan["since"], plan["without_inputs"]) == (1, {}, 1)

    sim.add_version("churn-offer", lambda _: Scenario([SimNode("load customer", "x", None)]))
    held = await viewer.board.start("churn-offer", {"fails": 1})
    plan = await _plan(viewer, *twice, other)
    assert [json.loads(run["inputs"]) for run in plan["runs"]] == [{"fails": 2}]
    (state,) = plan["since"]
    assert state in ("waiting", "running")
    assert plan["since"][state] == 2

    sim.finish(held.id, "load customer")
    while viewer.board.cards[held.id].state != "succeeded":
        await viewer.board.changed.wait()
    await viewer.board.start("churn-offer", {"fails": 2}, version=1)  # is another run
    plan = await _plan(viewer, *twice, other)
    assert [run["version"] for run in plan["runs"]] == [None]
    assert plan["since"] == {"succeeded": 2}


def _runs(*known: tuple[float, str]) -> list[dict[str, Any]]:
    """Return finished runs of a workflow, from when they began, in hours, and how they ended."""
    reason = {"workflow": "w", "failed_node": "n", "problem": "n: overloaded"}
    return [{**reason, "began": 3600 * hours, "outcome": outcome} for hours, outcome in known]


@pytest.mark.parametrize(
    ("known", "first", "count", "total"),
    [
        # Some successes among many failures do not end it.
        ([(9.9, "failed"), (9.8, "succeeded"), (9.0, "failed"), (8.9, "succeeded")], 9.0, 2, 3),
        # A quiet hour with a success does.
        ([(9.9, "failed"), (9.8, "failed"), (9.7, "succeeded"), (8.0, "failed")], 9.8, 2, 2),
        # Nights in which every run failed are one.
        ([(90.0, "failed"), (66.0, "failed"), (42.0, "failed"), (18.0, "succeeded")], 42.0, 3, 3),
        # What came before it belongs to no later one.
        (
            [(90.0, "failed"), (80.0, "succeeded"), (42.0, "failed"), (41.5, "failed")],
            90.0,
            1,
            1,
        ),
    ],
)
def test_a_quiet_hour_with_a_success_ends_an_incident(
    known: list[tuple[float, str]], first: float, count: int, total: int
) -> None:
    """It begins with the first failure after that."""
    (incident,) = find_incidents(_runs(*known)).values()
    assert incident.first == first * 3600
    assert (incident.count, incident.total) == (count, total)


async def test_earlier_failures_are_counted_apart(sim: Simulator, viewer: Any) -> None:
    """The page of a cause counts like its line, and has the moments of those before."""
    _add_workflow(sim)
    for began, outcome in ((1000.0, "failed"), (2000.0, "succeeded")):
        viewer.board.history.record(
            execution_id=int(began),
            workflow="churn-offer",
            outcome=outcome,
            began=began,
            failed_node="choose offer",
            problem="choose offer: no seats for 7: division by zero",
        )
    failed = await _start(viewer, fails=31)
    again = await _start(viewer, fails=31)
    named = {"workflow": "churn-offer", "failed_node": "choose offer", "cause": CAUSE}
    _, page = await viewer.send("GET", f"cause?{urlencode(named)}")
    assert (page["count"], page["total"], page["earlier"]) == (2, 2, [1000.0])
    assert page["execution_ids"] == [str(again), str(failed)]
    rerun = {"execution_id": str(again), "outcome": "failed"}
    assert [run["again"] for run in page["runs"]] == [None, rerun, None]


async def _differences(viewer: Any, failed: list[int], success: int) -> Any:
    others = "&".join(f"others={one}" for one in failed[1:])
    path = f"executions/{failed[0]}/differences/{success}?{others}"
    status, found = await viewer.send("GET", path)
    return found if status == 200 else status


def _difference(where: str, now: str, before: str | None) -> dict[str, Any]:
    return {"where": where, "now": now, "before": before}


async def test_the_first_difference_is_deep_in_a_value(sim: Simulator, viewer: Any) -> None:
    """It is the first node of the workflow whose value is another one, and only that part of it."""
    _add_workflow(sim)
    good, failed = await _start(viewer), await _start(viewer, fails=1)
    viewer.board.remove(good)  # it is read again
    assert await _differences(viewer, [failed], good) == [
        _difference("input fails:", "1", None),
        _difference("load customer: plan.seats", "0", "12"),
    ]
    assert await _differences(viewer, [failed], failed) == []
    assert await _differences(viewer, [failed], 999) == 502


async def test_differences_are_what_all_failed_runs_share(sim: Simulator, viewer: Any) -> None:
    """Versions and inputs come first. A value that hands an input on is left out."""

    def run(inputs: Any) -> Scenario:
        failed: Any = {"status": "FAILED", "error_message": "no"} if inputs["plan"] else {}
        customer = {**inputs, "seats": 0 if failed else 12}
        chosen = SimNode("choose offer", "annual", after=["load customer"], **failed)
        return Scenario([SimNode("load customer", customer), chosen])

    sim.add_workflow("churn-offer", run)
    sim.add_version("churn-offer", run)
    good = await _start(viewer, version=1, customer="acme", plan="")
    failed = [
        await _start(viewer, version=2, customer=customer, plan="free")
        for customer in ("globex", "initech")
    ]
    assert await _differences(viewer, failed, good) == [
        _difference("version", "2", "1"),
        _difference("input plan:", "free", ""),
        _difference("load customer: seats", "0", "12"),
    ]


async def _record(history: History, began: float, duration: float) -> None:
    history.record(
        execution_id=int(began * 10),
        workflow="w",
        outcome="succeeded",
        began=began,
        duration=duration,
        times=f'{{"n": [0.0, {duration}]}}',
    )


@pytest.mark.parametrize(("ago", "expected"), [(0.0, 7.0), (2 * DAY, 600.0)])
async def test_what_is_usual_does_not_follow_an_incident(
    tmp_path: Path, ago: float, expected: float
) -> None:
    """Many slow runs in a row are not usual until they have lasted for a day."""
    history = History(tmp_path / "history.sqlite", server="of a test")
    now = time.time() - ago
    for number in range(5):
        await _record(history, now - 5000 + number, 7.0)
    for number in range(12):
        await _record(history, now - 1000 + number, 600.0)
    usual = await history.usual("w")
    assert usual["duration"] == expected
    assert usual["nodes"]["n"] == expected
    await history.aclose()


def test_inputs_in_short_have_one_line_each() -> None:
    """Texts have no quotes, and long ones are cut; what is no object has none."""
    text = '{"letter": "Dear\\nsir", "n": 3, "tags": ["a"], "long": "' + "x" * 200 + '"}'
    shown = brief_inputs(text)
    assert shown is not None
    assert shown["long"] == "x" * 80 + "…"
    del shown["long"]
    assert shown == {"letter": "Dear sir", "n": "3", "tags": '["a"]'}
    assert brief_inputs(None) is None
    assert brief_inputs("[1]") is None
