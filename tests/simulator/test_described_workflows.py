"""`sim.add_workflow(Workflow(...), scenario)`: a simulated workflow as the program knows it."""

# ruff: noqa: D101 - the classes are what users would write

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NotRequired, TypedDict

import attrs
import pytest
from pydantic import BaseModel

from promptlayer_exec import Session, StartUnknown, Workflow, strict_converter
from promptlayer_exec.simulator import Scenario, SimNode, Simulator


@attrs.frozen
class Report:
    title: str


@attrs.frozen
class Topic:
    topic: str
    count: int
    share: float
    tags: list[str] | None
    deep: bool
    extra: dict[str, int]
    mood: Literal["good", "bad"]
    report: Report
    length: int = 3
    sections: list[str] = attrs.field(factory=list)


class Row(TypedDict):
    topic: str
    length: NotRequired[int]


@dataclasses.dataclass
class Order:
    topic: str
    length: int = 3
    tags: list[str] = dataclasses.field(default_factory=list)


class Model(BaseModel):
    topic: str
    length: int = 3


TITLE = {"title": "Otters"}


def scenario(*values: Any, **settings: Any) -> Scenario:
    """Return output nodes with values."""
    return Scenario(
        [SimNode(f"node {i}", it, is_output_node=True, **settings) for i, it in enumerate(values)]
    )


async def test_a_described_workflow_has_its_label(sim: Simulator, session: Session) -> None:
    """Other labels can be added. Its name stays in use."""
    workflow = Workflow("report", inputs=Row, output=Report, label="prod")
    sim.add_workflow(workflow, scenario(TITLE), labels=["canary"])
    assert await session.run(workflow, Row(topic="x")) == Report("Otters")
    definition = await session.definition(workflow)
    assert (definition.name, definition.labels) == ("report", ("prod", "canary"))
    with pytest.raises(ValueError, match="already exists"):
        sim.add_workflow("report", scenario())
    with pytest.raises(TypeError, match="labels"):
        sim.add_workflow(Workflow("b", label="a"), scenario(), labels="prod")


@pytest.mark.parametrize(
    ("form", "declared"),
    [
        (
            Topic,
            {
                "topic": "string",
                "count": "number",
                "share": "number",
                "tags": "array",
                "deep": "boolean",
                "extra": "object",
                "mood": "Literal",
                "report": "Report",
            },
        ),
        (Row, {"topic": "string"}),
        (Order, {"topic": "string"}),
        (Model, {"topic": "string"}),
        (dict[str, str], {}),
        (Any, None),
    ],
)
async def test_the_inputs_of_the_type_are_declared(
    sim: Simulator, session: Session, form: Any, declared: dict[str, str] | None
) -> None:
    """Without those that have a default, which PromptLayer does not require."""
    workflow: Workflow = Workflow("report", inputs=form)
    sim.add_workflow(workflow, scenario())
    assert (await session.definition(workflow)).required_inputs == declared
    sim.add_workflow(attrs.evolve(workflow, name="other"), scenario(), inputs={"a": "string"})
    assert (await session.definition("other")).required_inputs == {"a": "string"}


REPORT = Workflow("report", output=Report)


@pytest.mark.parametrize(
    "fitting",
    [
        scenario(TITLE),
        scenario('{"title": "Otters"}'),
        scenario(5, TITLE),
        scenario(5, status="FAILED"),
        scenario(5, duration=None),
        scenario(lambda values: 5),
        Scenario([SimNode("a", 5)]),
        scenario(),
    ],
)
def test_a_scenario_whose_output_may_fit_is_accepted(sim: Simulator, fitting: Scenario) -> None:
    """One of several may be the main output; a held or failing node has none yet."""
    sim.add_workflow(REPORT, fitting)


@pytest.mark.parametrize(
    ("misfit", "reason"),
    [
        (scenario({"titel": 1}), r"at \$\.title: is missing"),
        (scenario(5, 6), r"at \$: expected an object, got an integer"),
    ],
)
def test_a_scenario_whose_output_does_not_fit_is_refused(
    sim: Simulator, misfit: Scenario, reason: str
) -> None:
    """When it is added, so that no test passes with an output that PromptLayer never sends."""
    with pytest.raises(ValueError, match=f"no output of the scenario matches .*{reason}"):
        sim.add_workflow(REPORT, misfit)


async def test_a_function_is_checked_when_it_is_called(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """The start request fails as with every error in it."""
    sim.add_workflow(REPORT, lambda inputs: scenario(inputs["output"]))
    assert await session.run(REPORT, {"output": TITLE}) == Report("Otters")
    with pytest.raises(StartUnknown, match="500"):
        await session.run(REPORT, {"output": 5})
    assert "no output of the scenario matches workflow 'report'" in caplog.text
    assert len(sim.runs) == 1


def test_the_converter_of_the_sessions_decides_what_fits(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """Its hooks may accept what the strict rules do not."""
    converter = strict_converter()
    converter.register_structure_hook(Report, lambda value, _: Report(str(value)))
    with pytest.raises(ValueError, match="no output"):
        sim.add_workflow(REPORT, scenario(5))
    sim.add_workflow(REPORT, scenario(5), converter=converter)
