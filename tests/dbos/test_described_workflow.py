"""A batch of a `Workflow`, and outcomes of a type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest

from promptlayer_exec import StartRequest, Workflow, strict_converter
from promptlayer_exec.dbos import Batch, StoredOutcome
from promptlayer_exec.simulator import Scenario, SimNode, Simulator


@attrs.frozen
class Row:
    """The inputs of a workflow."""

    n: Any


@attrs.frozen
class Report:
    """The output of a workflow."""

    title: str


ECHO = Workflow("typed", inputs=Row, output=Report, label="prod", metadata={"app": "a"})


@pytest.fixture(autouse=True)
def _workflow(sim: Simulator) -> None:
    def echo(inputs: Any) -> Scenario:
        return Scenario([SimNode("Answer", inputs["n"], is_output_node=True)])

    sim.add_workflow("typed", echo, labels=["prod"])


async def test_a_batch_stores_what_a_workflow_says(sim: Simulator, batch: Batch) -> None:
    """Its name, label and metadata. Adding the same again adds nothing."""
    requests = [StartRequest(ECHO, Row({"title": "a"}), key="a")]
    assert await batch.add(requests) == 1
    assert await batch.add(requests) == 0
    await batch.work()
    (run,) = sim.runs
    assert run.body["workflow_label_name"] == "prod"
    assert run.body["metadata"]["app"] == "a"
    assert run.inputs == {"n": {"title": "a"}}


async def test_outcomes_have_the_type_of_into(sim: Simulator, batch: Batch) -> None:
    """A misfit is an outcome with an error, and changes nothing that is stored."""
    values = {"a": {"title": "x"}, "b": '```json\n{"title": "y"}\n```', "c": {"titel": "z"}}
    await batch.add(StartRequest(ECHO, Row(value), key=key) for key, value in values.items())
    await batch.work()
    outcomes = {outcome.key: outcome async for outcome in batch.outcomes(into=Report)}
    assert (outcomes["a"].output, outcomes["b"].output) == (Report("x"), Report("y"))
    misfit: StoredOutcome[Any] = outcomes["c"]
    assert (misfit.succeeded, misfit.kind) == (False, "failed")
    assert misfit.output is None
    assert misfit.execution_id in sim.executions
    assert misfit.error is not None
    assert misfit.error.type == "InvalidOutput"
    assert misfit.error.data["path"] == "$.title"
    assert f"execution {misfit.execution_id}: " in misfit.error.message

    stored = {outcome.key: outcome.output async for outcome in batch.outcomes()}
    assert stored == values
    assert (await batch.status()).succeeded == 3
    assert await batch.retry(failed=True) == 0
    assert len(sim.runs) == 3


async def test_outcomes_use_the_converter_of_the_session(
    batch_of: Callable[..., Batch],
) -> None:
    """As `Execution.output` does."""
    converter = strict_converter()
    converter.register_structure_hook(Report, lambda value, _: Report(str(value)))
    batch = batch_of(converter=converter)
    await batch.add([StartRequest(ECHO, Row(5), key="a")])
    await batch.work()
    assert [outcome.output async for outcome in batch.outcomes(into=Report)] == [Report("5")]


async def test_an_unusable_type_of_outcomes_is_refused(batch: Batch) -> None:
    """Before anything is read."""
    with pytest.raises(TypeError, match="cannot structure into 5"):
        await anext(batch.outcomes(into=5))  # type: ignore[call-overload]
