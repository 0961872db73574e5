"""`create_router(workflows=[Workflow(...)])`: what it is for, and what clients may send."""

# ruff: noqa: D101 - the classes are what users would write

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

import attrs
import httpx2
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field

from promptlayer_exec import Session, Workflow, strict_converter
from promptlayer_exec.fastapi import create_router
from promptlayer_exec.simulator import Scenario, SimNode, Simulator


@attrs.frozen
class Topic:
    topic: str
    length: int = 3
    tags: tuple[str, ...] = ()


class Row(TypedDict):
    topic: str
    length: NotRequired[int]


class Model(BaseModel):
    topic: str = Field(alias="about")
    length: int = 3


REPORT = Workflow("report", inputs=Topic, label="prod", metadata={"app": "site"})


def allow() -> None:
    """Authorize every request."""


@pytest.fixture(autouse=True)
def _workflow(sim: Simulator) -> None:
    sim.add_workflow("report", Scenario([SimNode("Report")]), inputs={"topic": "string"})


async def post(
    session: Session, workflow: str | Workflow[Any, Any], inputs: Any, **more: Any
) -> httpx2.Response:
    """Start a run through a router that allows one workflow."""
    app = FastAPI()
    app.include_router(create_router(session, authorize=allow, workflows=[workflow]))
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://app") as client:
        name = str(workflow.name) if isinstance(workflow, Workflow) else workflow
        return await client.post("/executions", json={"workflow": name, "inputs": inputs, **more})


async def test_a_client_s_run_has_the_label_and_the_metadata(
    sim: Simulator, session: Session
) -> None:
    """A client cannot choose them, and its inputs become those of the type, with its defaults."""
    response = await post(session, REPORT, {"topic": "otters", "injected": 1})
    assert response.status_code == 201
    (run,) = sim.runs
    assert run.body["workflow_label_name"] == "prod"
    assert run.body["metadata"] == {"app": "site"}
    assert run.inputs == {"topic": "otters", "length": 3, "tags": []}
    choices: list[dict[str, Any]] = [{"label": "canary"}, {"version": 1}, {"metadata": {}}]
    for chosen in choices:
        assert (await post(session, REPORT, {"topic": "x"}, **chosen)).status_code == 422
    assert len(sim.runs) == 1


@pytest.mark.parametrize(
    ("inputs", "detail"),
    [
        ({"topic": "x", "length": "3"}, "$.length: expected an integer, got a string"),
        ({"topic": "x", "tags": ["a", 1]}, "$.tags[1]: expected a string, got an integer"),
        (
            {"topik": "x"},
            "'topic' (string). It has no required input 'topik' (did you mean 'topic'?)",
        ),
    ],
)
async def test_inputs_of_another_type_are_refused_before_they_cost_anything(
    sim: Simulator, open_session: Callable[..., Session], inputs: Any, detail: str
) -> None:
    """The problem has the path, and PromptLayer is not asked."""
    response = await post(open_session(check_inputs=True), REPORT, inputs)
    assert response.status_code == 422
    assert "workflow 'report'" in response.json()["detail"]
    assert response.json()["detail"].endswith(f"{detail}.")
    assert sim.request_count == 0


@pytest.mark.parametrize(
    ("form", "inputs", "sent"),
    [
        (Row, {"topic": "x"}, {"topic": "x"}),
        (dict[str, str], {"topic": "x"}, {"topic": "x"}),
        (Model, {"about": "x"}, {"topic": "x", "length": 3}),
        (Any, {"topic": 1}, {"topic": 1}),
    ],
)
async def test_every_kind_of_type_describes_inputs(
    sim: Simulator, session: Session, form: Any, inputs: Any, sent: Any
) -> None:
    """A model's aliases are what clients send."""
    assert (await post(session, Workflow("report", inputs=form), inputs)).status_code == 201
    assert sim.runs[0].inputs == sent
    if form is not Any:
        wrong = await post(session, Workflow("report", inputs=form), {"topic": 1, "about": 1})
        assert wrong.status_code == 422
        assert "at $." in wrong.json()["detail"]


async def test_the_converter_of_the_session_structures_inputs(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """As it structures outputs."""
    converter = strict_converter()
    converter.register_structure_hook(int, lambda value, _: int(value))
    response = await post(open_session(converter=converter), REPORT, {"topic": "x", "length": "3"})
    assert response.status_code == 201
    assert sim.runs[0].inputs["length"] == 3


async def test_a_workflow_may_be_given_by_its_id(sim: Simulator, session: Session) -> None:
    """Clients pass it as text."""
    assert (await post(session, Workflow(1), {})).status_code == 201
    assert [run.workflow for run in sim.runs] == ["report"]


@pytest.mark.parametrize(
    ("workflows", "error", "message"),
    [
        ("report", TypeError, r"write \['report'\]"),
        ([7], TypeError, "names and Workflows, got 7"),
        ([""], ValueError, "must not be empty"),
        ([REPORT, "report"], ValueError, "'report' twice"),
        ([REPORT, attrs.evolve(REPORT, label="canary")], ValueError, "'report' twice"),
    ],
)
def test_unusable_workflows_are_refused(
    workflows: Any, error: type[Exception], message: str
) -> None:
    """Two of one name could not be told apart."""
    with pytest.raises(error, match=message):
        create_router(allow, authorize=allow, workflows=workflows)
    create_router(allow, authorize=allow, workflows=[REPORT, REPORT, "other"])
