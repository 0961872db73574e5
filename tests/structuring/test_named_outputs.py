"""The outputs of an execution by the names of their nodes."""

# ruff: noqa: D101 - the classes are what users would write

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

import attrs
import cattrs
import pytest
from cattrs.gen import make_dict_structure_fn, override
from pydantic import BaseModel, ConfigDict, Field

from promptlayer_exec import (
    ExecutionFailed,
    InvalidOutput,
    Node,
    Session,
    Snapshot,
    strict_converter,
)
from promptlayer_exec._structuring import structure_outputs
from promptlayer_exec.simulator import Scenario, SimNode, Simulator


@attrs.frozen
class Metadata:
    title: str
    score: float = 0.0


Nodes = TypedDict("Nodes", {"add links": str, "metadata agent": Metadata})


class Partial(TypedDict):
    links: str
    metadata: NotRequired[Metadata]


def complete(*nodes: Node) -> Snapshot:
    """Return a complete snapshot of nodes."""
    return Snapshot(787, True, {node.name: node for node in nodes})


def output(name: str, value: Any, status: str = "SUCCESS") -> Node:
    """Return an output node."""
    return Node(name, status, value, is_output_node=True)


FENCED = (
    "expected an object, got a string. The text has a fenced block among other text, or one that"
    " is not JSON"
)
AGENT = Node("metadata agent", "SUCCESS", {"title": "t"}, is_output_node=False)
LINKS = output("add links", "l")
ARTICLE = complete(Node("plan", "SUCCESS", 1), AGENT, LINKS, output("draft", None, "SKIPPED"))


def test_outputs_are_the_values_of_the_output_nodes_that_succeeded() -> None:
    """By name, in the server's order, unchanged."""
    snapshot = complete(Node("a", "SUCCESS", 0), output("c", "1"), output("b", {}), AGENT)
    assert list(snapshot.outputs().items()) == [("c", "1"), ("b", {})]
    assert complete(Node("a", "SUCCESS", 0)).outputs() == {}


def test_outputs_have_one_type() -> None:
    """Each value follows the rule of a whole output: a text that does not fit is parsed once."""
    values = [output("a", {"title": "t"}), output("b", '{"title": "u", "score": 1}')]
    expected = {"a": Metadata("t"), "b": Metadata("u", 1.0)}
    assert complete(*values).outputs(into=dict[str, Metadata]) == expected
    fenced = output("b", '```json\n{"title": "u", "score": 1}\n```')
    assert complete(values[0], fenced).outputs(into=dict[str, Metadata]) == expected


def test_a_typed_dict_takes_the_nodes_that_its_fields_name() -> None:
    """Output node or not, whatever the characters of the names."""
    nodes = ARTICLE.outputs(into=Nodes)
    assert nodes == {"add links": "l", "metadata agent": Metadata("t")}


@attrs.frozen
class AsAttrs:
    draft: str
    score: float
    count: int = 7


@dataclasses.dataclass(frozen=True)
class AsDataclass:
    draft: str
    score: float
    count: int = 7


class AsModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    draft: str
    score: float
    count: int = Field(7, alias="number")


@pytest.mark.parametrize("into", [AsAttrs, AsDataclass, AsModel])
def test_every_class_with_fields_takes_the_nodes_that_they_name(into: Any) -> None:
    """A node that did not succeed is missing, and a default takes its place."""
    snapshot = complete(
        Node("draft", "SUCCESS", "123"),
        output("score", "0.5"),
        output("count", "x", "FAILED"),
        output("other", 1),
    )
    found = snapshot.outputs(into=into)
    assert (found.draft, found.score, found.count) == ("123", 0.5, 7)


def test_a_field_may_have_another_name_than_its_node() -> None:
    """By an alias of pydantic, or by cattrs' overrides."""
    snapshot = complete(output("draft", "d"), output("score", 1), Node("number", "SUCCESS", "3"))
    assert snapshot.outputs(into=AsModel).count == 3


@pytest.mark.parametrize(
    ("nodes", "path", "reason"),
    [
        ([LINKS], '$["metadata agent"]', "is missing"),
        ([LINKS, attrs.evolve(AGENT, status="FAILED")], '$["metadata agent"]', "is missing"),
        (
            [LINKS, attrs.evolve(AGENT, value={"title": 1})],
            '$["metadata agent"].title',
            "expected a string, got an integer",
        ),
        (
            [LINKS, attrs.evolve(AGENT, value='{"title": 1}')],
            '$["metadata agent"].title',
            "expected a string, got an integer",
        ),
        (
            [LINKS, attrs.evolve(AGENT, value="5")],
            '$["metadata agent"]',
            "expected an object, got a string",
        ),
        (
            [LINKS, attrs.evolve(AGENT, value='Yes:\n```json\n{"title": "t"}\n```')],
            '$["metadata agent"]',
            FENCED,
        ),
    ],
)
def test_the_error_names_the_node(nodes: list[Node], path: str, reason: str) -> None:
    """The path starts with its name. The error has all values, and the snapshot."""
    snapshot = complete(*nodes)
    with pytest.raises(InvalidOutput) as caught:
        snapshot.outputs(into=Nodes)
    assert (caught.value.path, caught.value.reason) == (path, reason)
    assert caught.value.value["add links"] == "l"
    assert caught.value.last_snapshot is snapshot
    assert str(caught.value).startswith(f"execution 787: the output does not match into= at {path}")


def test_a_branch_that_did_not_run_may_be_missing() -> None:
    """`NotRequired` stands for it, and a text inside a value is not parsed."""
    nodes = [output("links", "l"), Node("metadata", "SKIPPED")]
    assert complete(*nodes).outputs(into=Partial) == {"links": "l"}
    nodes[1] = Node("metadata", "SUCCESS", {"title": "t", "score": "0.5"})
    with pytest.raises(InvalidOutput, match=r"\$\.metadata\.score: expected a number"):
        complete(*nodes).outputs(into=Partial)


def test_many_texts_are_parsed_in_one_pass() -> None:
    """A run with many nodes does not stop the event loop."""
    calls = 0

    def structure(value: Any, _: Any) -> Metadata:
        nonlocal calls
        calls += 1
        return Metadata(**value)

    converter = cattrs.Converter()
    converter.register_structure_hook(Metadata, structure)
    nodes = {str(i): output(str(i), '{"title": "t"}') for i in range(50)}
    snapshot = Snapshot(787, True, nodes)
    assert len(structure_outputs(snapshot, dict[str, Metadata], converter)) == 50
    assert calls == 100


def test_a_run_without_an_output_has_no_outputs() -> None:
    """The errors are those of `output`."""
    with pytest.raises(ExecutionFailed, match="787"):
        complete(output("a", None, "FAILED"), AGENT).outputs(into=Nodes)
    with pytest.raises(ValueError, match="execution 787 is still running"):
        Snapshot(787, False, {"add links": LINKS}).outputs()
    with pytest.raises(TypeError, match="into must be a type"):
        ARTICLE.outputs(into="Nodes")


async def test_an_execution_has_outputs_without_a_further_request(
    sim: Simulator, session: Session
) -> None:
    """They come from the complete snapshot, and a wrong type costs no wait."""
    nodes = [
        SimNode("metadata agent", '{"title": "t"}'),
        SimNode("add links", "l", is_output_node=True),
    ]
    execution = session.execution(sim.add_execution(Scenario(nodes)))
    with pytest.raises(TypeError, match="into must be a type"):
        await execution.outputs(into="Nodes")
    assert sim.request_count == 0
    assert await execution.outputs() == {"add links": "l"}
    assert (await execution.outputs(into=Nodes))["metadata agent"] == Metadata("t")
    assert sim.request_count == 1


async def test_an_execution_uses_the_converter_of_its_session(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """Its overrides name the nodes of the fields."""
    converter = strict_converter()
    rename = make_dict_structure_fn(Metadata, converter, title=override(rename="the title"))
    converter.register_structure_hook(Metadata, rename)
    session = open_session(converter=converter)
    nodes = [SimNode("the title", "t"), SimNode("score", "2", is_output_node=True)]
    execution = session.execution(sim.add_execution(Scenario(nodes)))
    assert await execution.outputs(into=Metadata) == Metadata("t", 2.0)


async def test_a_converter_without_detailed_errors_follows_the_same_rule(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """Its errors do not name the node whose text is to be parsed."""
    session = open_session(converter=strict_converter().copy(detailed_validation=False))
    nodes = [SimNode("title", "t"), SimNode("score", "2", is_output_node=True)]
    execution = session.execution(sim.add_execution(Scenario(nodes)))
    assert await execution.outputs(into=Metadata) == Metadata("t", 2.0)
