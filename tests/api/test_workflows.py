"""Workflows: every shape in which the server describes them, their layers and required inputs."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import attrs
import pytest

from promptlayer_exec import (
    ExecutionTimeout,
    InvalidResponse,
    NotFound,
    Session,
    SessionClosed,
    WorkflowDefinition,
    WorkflowEdge,
    WorkflowNode,
    WorkflowSummary,
)
from promptlayer_exec._api.catalog import (
    WorkflowsPage,
    read_workflow,
    workflow_request,
    workflows_filter,
    workflows_request,
)
from promptlayer_exec._api.messages import Request, Response
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

DOCUMENTED: dict[str, Any] = {
    "success": True,
    "workflow_id": 123,
    "workflow_name": "a/b",
    "version": 3,
    "workflow_version_id": 456,
    "commit_message": None,
    "required_input_variables": {"topic": "string", "count": "no type known yet"},
    "release_labels": ["production", "staging"],
    "created_at": "2026-08-21T00:00:00Z",
    "nodes": [
        {
            "name": "plan",
            "node_type": "PROMPT_TEMPLATE",
            "is_output_node": False,
            "dependencies": ["topic"],
        },
        {
            "name": "write",
            "node_type": "CODE_EXECUTION",
            "is_output_node": True,
            "dependencies": ["plan", "no node", "plan"],
        },
        {
            "name": "check",
            "node_type": "CODE_EXECUTION",
            "is_output_node": False,
            "dependencies": [],
        },
    ],
    "edges": [
        {
            "id": "e1",
            "source_node_name": "plan",
            "target_node_name": "check",
            "is_and": True,
            "conditionals": [{"operator": "=="}],
        },
        {"id": "e2", "source_node_name": "check", "target_node_name": "write", "is_and": True},
        {"id": "e3", "source_node_name": "check", "target_node_name": "gone", "is_and": True},
    ],
}
# The example in the vendor's document.
EXAMPLE: dict[str, Any] = {
    "success": True,
    "workflow_id": 123,
    "workflow_name": "my-workflow",
    "version_number": 3,
    "release_labels": ["production"],
    "nodes": [
        {
            "name": "greeting",
            "node_type": "VARIABLE",
            "is_output_node": True,
            "configuration": {"value": {"type": "string", "value": "Hello"}},
            "dependencies": [],
        }
    ],
    "edges": [],
}
# Recorded from a development server.
RECORDED = (
    b'{"success":true,"workflow":{"id":3,"workspace_id":1,"user_id":null,"name":"analyze_1",'
    b'"is_draft":false,"is_deleted":false}}\n'
)


def read(body: Any) -> WorkflowDefinition:
    """Read a workflow in a 200."""
    return read_workflow(Response(200, json.dumps(body).encode()))


def chain(*names: str, **dependencies: tuple[str, ...]) -> WorkflowDefinition:
    """Return a workflow of nodes without edges."""
    return WorkflowDefinition(
        1, "w", nodes={it: WorkflowNode(it, dependencies=dependencies.get(it, ())) for it in names}
    )


def test_the_documented_shape() -> None:
    """Dependencies are those of the node and those of the edges, without names of no node."""
    workflow = read(DOCUMENTED)
    assert (workflow.id, workflow.name, workflow.version) == (123, "a/b", 3)
    assert workflow.labels == ("production", "staging")
    assert workflow.required_inputs == {"topic": "string", "count": "no type known yet"}
    assert list(workflow.nodes.values()) == [
        WorkflowNode("plan", "PROMPT_TEMPLATE"),
        WorkflowNode("write", "CODE_EXECUTION", True, ("plan", "check")),
        WorkflowNode("check", "CODE_EXECUTION", False, ("plan",)),
    ]
    assert workflow.edges == (
        WorkflowEdge("plan", "check", True),
        WorkflowEdge("check", "write", False),
        WorkflowEdge("check", "gone", False),
    )
    assert workflow.raw == DOCUMENTED
    assert workflow.layers() == (("plan",), ("check",), ("write",))


def test_the_shape_of_the_documented_example() -> None:
    """It has `version_number`, and neither `version` nor required inputs."""
    workflow = read(EXAMPLE)
    assert (workflow.id, workflow.version, workflow.labels) == (123, 3, ("production",))
    assert workflow.required_inputs is None
    assert list(workflow.nodes) == ["greeting"]


def test_the_shape_of_a_development_server() -> None:
    """What lacks nodes has none."""
    workflow = read_workflow(Response(200, RECORDED))
    assert (workflow.id, workflow.name, workflow.version) == (3, "analyze_1", None)
    assert (workflow.labels, workflow.nodes, workflow.edges) == ((), {}, ())
    assert workflow.layers() == ()


def test_of_both_shapes_the_documented_fields_win() -> None:
    """Each field does, and what only `workflow` has is taken from it."""
    inner = json.loads(RECORDED)["workflow"]
    both = read({**DOCUMENTED, "version_number": 9, "workflow": inner})
    assert (both.id, both.name, both.version) == (123, "a/b", 3)
    assert read({"workflow_id": 123, "workflow": inner}).name == "analyze_1"
    assert read({"workflow_name": "a", "workflow": inner}).id == 3
    assert read({**EXAMPLE, "workflow": "a field that nobody needs"}).name == "my-workflow"


def test_null_is_the_same_as_missing() -> None:
    """Whether a field is null or missing, it has no value."""
    required = {"workflow_id", "workflow_name"}
    nulls = {name: None for name in DOCUMENTED if name not in required}
    bare = read({name: DOCUMENTED[name] for name in required})
    assert attrs.evolve(read({**DOCUMENTED, **nulls}), raw=None) == attrs.evolve(bare, raw=None)
    node = {"name": "a", "node_type": None, "is_output_node": None, "dependencies": None}
    assert read({**EXAMPLE, "nodes": [node]}).nodes == {"a": WorkflowNode("a")}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"workflow_id": "3"}, "$.workflow_id"),
        ({"workflow_id": True}, "$.workflow_id"),
        ({"workflow_id": None}, "$.workflow_id"),
        ({"workflow_name": None}, "$.workflow_name"),
        ({"workflow_id": None, "workflow": []}, "$.workflow"),
        ({"workflow_id": None, "workflow": {"id": 1.0}}, "$.workflow.id"),
        ({"workflow_name": None, "workflow": {"id": 1}}, "$.workflow.name"),
        ({"version": "3"}, "$.version"),
        ({"version": None, "version_number": "3"}, "$.version_number"),
        ({"release_labels": "prod"}, "$.release_labels"),
        ({"release_labels": ["prod", 1]}, "$.release_labels[1]"),
        ({"required_input_variables": ["topic"]}, "$.required_input_variables"),
        ({"required_input_variables": {"t": {}}}, "$.required_input_variables.t"),
        ({"nodes": {}}, "$.nodes"),
        ({"nodes": [1]}, "$.nodes[0]"),
        ({"nodes": [{}]}, "$.nodes[0].name"),
        ({"nodes": [{"name": "a", "node_type": 1}]}, "$.nodes[0].node_type"),
        ({"nodes": [{"name": "a", "is_output_node": "no"}]}, "$.nodes[0].is_output_node"),
        ({"nodes": [{"name": "a", "dependencies": "b"}]}, "$.nodes[0].dependencies"),
        ({"nodes": [{"name": "a", "dependencies": [None]}]}, "$.nodes[0].dependencies[0]"),
        ({"edges": [{"target_node_name": "a"}]}, "$.edges[0].source_node_name"),
        ({"edges": [{"source_node_name": "a"}]}, "$.edges[0].target_node_name"),
        (
            {"edges": [{"source_node_name": "a", "target_node_name": "b", "conditionals": 1}]},
            "$.edges[0].conditionals",
        ),
    ],
    ids=str,
)
def test_a_part_of_the_wrong_kind_is_an_invalid_response(
    changes: dict[str, Any], path: str
) -> None:
    """The error says which part it is."""
    with pytest.raises(InvalidResponse) as caught:
        read({**DOCUMENTED, **changes})
    assert caught.value.path == path


@pytest.mark.parametrize("body", [b"[]", b'"a"', b"null"])
def test_a_body_that_is_no_object_is_an_invalid_response(body: bytes) -> None:
    """Neither a workflow nor a list of them can be read from it."""
    for reader in (read_workflow, lambda response: WorkflowsPage(response, 1)):
        with pytest.raises(InvalidResponse) as caught:
            reader(Response(200, body))
        assert caught.value.path == "$"


@pytest.mark.parametrize(
    ("workflow", "label", "version", "target"),
    [
        ("a/b?c#d é", None, None, "/workflows/a%2Fb%3Fc%23d%20%C3%A9"),
        (7, None, 3, "/workflows/7?version=3"),
        ("..", "a&b /", None, "/workflows/%2E%2E?label=a%26b%20%2F"),
    ],
)
def test_the_request_for_a_workflow(
    workflow: Any, label: str | None, version: int | None, target: str
) -> None:
    """Name and label are percent-encoded whole."""
    assert workflow_request(workflow, label, version) == Request("GET", target)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("", None, None), ValueError, "must not be empty"),
        ((True, None, None), TypeError, "a name or an int id"),
        (("w", "prod", 1), ValueError, "either label or version"),
        (("w", 1, None), TypeError, "label must be a str"),
        (("w", "\ud800", None), ValueError, "surrogates not allowed"),
        (("w", None, 0), ValueError, "version must be between"),
    ],
)
def test_an_unusable_argument_is_refused(
    arguments: tuple[Any, Any, Any], error: type[Exception], message: str
) -> None:
    """This is before any I/O."""
    with pytest.raises(error, match=message):
        workflow_request(*arguments)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"sort_by": "size"}, ValueError, "sort_by must be one of created_at, updated_at"),
        ({"sort_order": "up"}, ValueError, "sort_order must be one of asc, desc"),
        ({"external_source": "crm"}, ValueError, "together"),
        ({"external_id": "1"}, ValueError, "together"),
        ({"external_source": "crm", "external_id": 1}, TypeError, "external_id must be a str"),
    ],
)
def test_an_unusable_filter_is_refused(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The parameters of the list are checked as well."""
    filters = dict.fromkeys(("sort_by", "sort_order", "external_source", "external_id"))
    with pytest.raises(error, match=message):
        workflows_filter(**{**filters, **given})


def test_the_request_for_a_page() -> None:
    """It asks for as many as the server allows, and leaves out what was not given."""
    assert workflows_request(2, {"sort_by": "name", "external_id": None}) == Request(
        "GET", "/workflows?page=2&per_page=100&sort_by=name"
    )


def page(number: int, body: Any) -> WorkflowsPage:
    """Read one page of the list."""
    return WorkflowsPage(Response(200, json.dumps(body).encode()), number)


def test_a_page_of_the_list() -> None:
    """Summaries have what the list says; unknown fields are ignored."""
    item = {
        "id": 1,
        "workspace_id": 1,
        "name": "a",
        "is_deleted": True,
        "latest_version_number": 4,
        "release_labels": ["prod"],
        "external_ids": [],
    }
    read = page(1, {"items": [item, {"id": 2, "name": "b"}], "page": 1, "has_next": True})
    assert read.summaries == [
        WorkflowSummary(1, "a", ("prod",), 4, True),
        WorkflowSummary(2, "b", (), None, False),
    ]
    assert read.following == 2


@pytest.mark.parametrize(
    ("number", "more", "following"),
    [(1, {"has_next": False, "pages": 9}, None), (1, {"pages": 2}, 2), (2, {"pages": 2}, None)],
)
def test_the_next_page(number: int, more: dict[str, Any], following: int | None) -> None:
    """`has_next` decides, and where it is missing, `pages`."""
    assert page(number, {"items": [], **more}).following == following
    assert page(number, {"items": []}).following is None


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "$.items"),
        ({"items": {}}, "$.items"),
        ({"items": [{"name": "a"}]}, "$.items[0].id"),
        ({"items": [{"id": 1}]}, "$.items[0].name"),
        ({"items": [], "has_next": "no"}, "$.has_next"),
    ],
)
def test_a_list_of_the_wrong_shape_is_an_invalid_response(body: Any, path: str) -> None:
    """The error says which part it is."""
    with pytest.raises(InvalidResponse) as caught:
        page(1, body)
    assert caught.value.path == path


def test_layers_follow_dependencies_and_edges() -> None:
    """Each node comes after all that it depends on; within a layer, in the server's order."""
    workflow = attrs.evolve(
        chain("d", "b", "a", "c", c=("a", "no node"), d=("b", "c")),
        edges=(WorkflowEdge("b", "a"), WorkflowEdge("gone", "b"), WorkflowEdge("b", "gone")),
    )
    assert workflow.layers() == (("b",), ("a",), ("c",), ("d",))
    assert chain("b", "a").layers() == (("b", "a"),)


def test_a_cycle_is_one_last_layer() -> None:
    """So is what comes after it; every node is in exactly one layer."""
    workflow = chain("end", "a", "b", "start", a=("b", "start"), b=("a",), end=("b",))
    assert workflow.layers() == (("start",), ("end", "a", "b"))
    assert chain("a", a=("a",)).layers() == (("a",),)


def requires(**required: str) -> WorkflowDefinition:
    """Return a workflow with required inputs."""
    return WorkflowDefinition(1, "analyze", required_inputs=required)


@attrs.frozen
class Inputs:
    """Inputs as a class."""

    topic: str


def test_missing_inputs_are_named_with_near_misses() -> None:
    """All of them are, whether or not the given ones resemble one."""
    with pytest.raises(ValueError, match="analyze") as caught:
        requires(topic="string", language="string", n="int").check_inputs(
            {"topik": 1, "LANGUAGE": 2, "other": 3}
        )
    assert caught.value.problem == (
        "missing inputs for workflow 'analyze': 'topic' (string), 'language' (string), 'n' (int)."
        " It has no required inputs 'LANGUAGE' (did you mean 'language'?), 'topik' (did you mean"
        " 'topic'?), 'other'."
    )
    with pytest.raises(
        ValueError, match=r"missing input for workflow 'analyze': 'a\\nb' \(x\\x1b\)\."
    ):
        requires(**{"a\nb": "x\x1b"}).check_inputs(None)
    with pytest.raises(
        ValueError, match=r"no required inputs 'o00', 'o01', .*, 'o19' and 5 more\."
    ):
        requires(topic="string").check_inputs({f"o{n:02}": n for n in range(25)})


@pytest.mark.parametrize("inputs", [{"topic": None, "more": 1}, Inputs("x")], ids=repr)
def test_inputs_with_all_that_is_required_pass(inputs: Any) -> None:
    """Others are let through, and an input may be null."""
    requires(topic="string").check_inputs(inputs)


def test_without_required_inputs_nothing_is_checked() -> None:
    """They may be unknown, or none."""
    WorkflowDefinition(1, "a").check_inputs({"x": 1})
    requires().check_inputs(None)


def test_inputs_that_are_no_mapping_are_refused() -> None:
    """They are what `start` would refuse."""
    with pytest.raises(TypeError, match="expected a mapping"):
        requires(topic="string").check_inputs(["topic"])
    with pytest.raises(ValueError, match="'topic'"):
        requires(topic="string").check_inputs({1: 2})


def test_a_workflow_is_a_value() -> None:
    """It pickles and copies, its mappings are read-only, and its repr is short."""
    workflow = read(DOCUMENTED)
    assert pickle.loads(pickle.dumps(workflow)) == copy.deepcopy(workflow) == workflow
    for mapping in (workflow.nodes, workflow.required_inputs):
        with pytest.raises(TypeError):
            mapping["x"] = 1  # type: ignore[index]
    assert repr(workflow) == "<WorkflowDefinition 123 'a/b' version 3, 3 nodes>"
    assert len(repr(WorkflowDefinition(1, "x" * 1000))) < 200


PLAN = Scenario([SimNode("plan"), SimNode("write", after=["plan"], is_output_node=True)])


async def test_a_session_describes_a_workflow(sim: Simulator, session: Session) -> None:
    """By its name or id; a label or number selects the version."""
    workflow_id = sim.add_workflow("a/b", PLAN, inputs={"topic": "string"}, labels=["prod"])
    sim.add_version("a/b", Scenario([]), labels=["staging"])
    for options in ({"label": "prod"}, {"version": 1}):
        workflow = await session.definition("a/b", **options)  # type: ignore[arg-type]
        assert (workflow.id, workflow.name, workflow.version) == (workflow_id, "a/b", 1)
        assert workflow.layers() == (("plan",), ("write",))
        assert workflow.required_inputs == {"topic": "string"}
    latest = await session.definition(workflow_id)
    assert (latest.version, latest.labels, latest.required_inputs) == (2, ("staging",), None)


async def test_the_errors_of_a_description(
    sim: Simulator, session: Session, open_session: Callable[..., Session]
) -> None:
    """They are retried and raised like those of any single call."""
    sim.add_workflow("w", PLAN)
    sim.inject(Fault.status(503))
    assert (await session.definition("w")).name == "w"
    with pytest.raises(
        NotFound, match=r"^workflow 'x': the server returned 404 Not Found: Workflow not found"
    ):
        await session.definition("x")
    with pytest.raises(TypeError, match="unexpected argument workflow_version=: it is version="):
        await session.definition("w", workflow_version=1)  # type: ignore[arg-type]
    sim.inject(Fault.stall())
    with pytest.raises(ExecutionTimeout, match=r"^no response within 0\.05 s") as caught:
        await open_session(wait_timeout=0.05).definition("w")
    assert caught.value.execution_id is None
    await session.aclose()
    with pytest.raises(SessionClosed):
        await session.definition("w")


async def test_a_session_lists_all_workflows(sim: Simulator, session: Session) -> None:
    """A page is requested when it is needed, and sorting and filters are sent."""
    for number in range(205):
        sim.add_workflow(f"w{number:03}", PLAN, labels=["prod"], external_ids={"crm": "1"})
    async with aclosing(session.workflows(sort_by="name", sort_order="asc")) as workflows:
        first = await anext(workflows)
        assert first == WorkflowSummary(1, "w000", ("prod",), 1, False)
        assert sim.request_count == 1
        names = [it.name async for it in workflows]
    assert names == [f"w{number:03}" for number in range(1, 205)]
    assert sim.request_count == 3
    found = [it async for it in session.workflows(external_source="crm", external_id="2")]
    assert found == []


async def test_a_workflow_is_listed_once(sim: Simulator, session: Session) -> None:
    """One that is added between two pages moves others to the next page."""
    for number in range(101):
        sim.add_workflow(f"w{number}", PLAN)
    async with aclosing(session.workflows(sort_by="id")) as workflows:
        names = [(await anext(workflows)).name]
        sim.add_workflow("new", PLAN)
        names += [it.name async for it in workflows]
    assert names == [f"w{number}" for number in range(100, -1, -1)]


async def test_a_list_without_an_end_ends(sim: Simulator, session: Session) -> None:
    """A server that ignores the page cannot keep a client busy for ever."""
    body = {"items": [{"id": 1, "name": "a"}], "has_next": True}
    sim.inject(Fault.status(200, times=None, body=json.dumps(body).encode()))
    assert [it.name async for it in session.workflows()] == ["a"]
    assert sim.request_count == 2


async def test_unusable_arguments_of_a_list_are_refused_at_the_call(session: Session) -> None:
    """They are, not at the first `anext`."""
    with pytest.raises(ValueError, match="sort_by must be one of"):
        session.workflows(sort_by="size")  # type: ignore[arg-type]


async def test_closing_ends_a_list(sim: Simulator, session: Session) -> None:
    """The next page is refused."""
    for number in range(101):
        sim.add_workflow(f"w{number}", PLAN)
    async with aclosing(session.workflows()) as workflows:
        for _ in range(100):
            await anext(workflows)
        await session.aclose()
        with pytest.raises(SessionClosed):
            await anext(workflows)
