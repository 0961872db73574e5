"""What the viewer knows of runs that fail for one cause, and of runs that are slow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from promptlayer_exec.simulator import Scenario, SimNode, Simulator
from promptlayer_exec.viewer import History
from promptlayer_exec.viewer._brief import brief_inputs

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


async def _start(viewer: Any, **inputs: Any) -> int:
    execution = await viewer.board.start("churn-offer", inputs)
    card = viewer.board.cards[execution.id]
    while card.state not in ("succeeded", "failed"):
        await viewer.board.changed.wait()
    return execution.id


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
    cause = {"failed_node": "choose offer", "cause": CAUSE, "count": 2, "first": page["first"]}
    assert (usual["causes"], usual["failed"]) == ([cause], 2)


async def test_a_single_failure_is_no_cause(sim: Simulator, viewer: Any) -> None:
    """Only two or more are; an unknown one has no runs."""
    _add_workflow(sim)
    await _start(viewer, fails=1)
    assert await viewer.send("GET", "causes") == (200, [])
    status, page = await viewer.send("GET", "cause?workflow=churn-offer&cause=another")
    assert (status, page["runs"], page["first"]) == (200, [], None)


async def test_the_first_difference_is_deep_in_a_value(sim: Simulator, viewer: Any) -> None:
    """It is the first node of the workflow whose value is another one, and only that part of it."""
    _add_workflow(sim)
    good, failed = await _start(viewer), await _start(viewer, fails=1)
    viewer.board.remove(good)  # it is read again
    difference = await viewer.send("GET", f"executions/{failed}/difference/{good}")
    expected = {"node": "load customer", "path": "plan.seats", "now": "0", "before": "12"}
    assert difference == (200, expected)
    assert await viewer.send("GET", f"executions/{failed}/difference/{failed}") == (200, None)
    assert (await viewer.send("GET", f"executions/{failed}/difference/999"))[0] == 502


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
