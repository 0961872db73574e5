"""The simulator's workflows: how it lists and describes them, and which version a start runs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from yarl import URL

from promptlayer_exec.simulator import Scenario, SimNode, Simulator

PLAN = Scenario(
    [
        SimNode("plan", "p", node_type="CODE_EXECUTION"),
        SimNode("write", "w", after=["plan"], when=lambda _: True, is_output_node=True),
        SimNode("check", after=["plan", "write"], is_output_node=None),
    ]
)
OTHER = Scenario([SimNode("other", "o", is_output_node=True)])


class Client:
    """A plain HTTP client of one simulator."""

    def __init__(self, sim: Simulator, http: aiohttp.ClientSession) -> None:
        self._sim = sim
        self._http = http

    async def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send a request with the right key, and return the status and the decoded body."""
        url = URL(f"{self._sim.base_url}{path}", encoded=True)
        headers = {"X-API-KEY": self._sim.api_key}
        async with self._http.request(method, url, headers=headers, json=body) as response:
            return response.status, json.loads(await response.read())

    async def get(self, path: str) -> Any:
        """Request something that there is."""
        status, body = await self.send("GET", path)
        assert status == 200, body
        return body

    async def names(self, query: str) -> list[str]:
        """Return the names in one page of the list of workflows."""
        return [item["name"] for item in (await self.get(f"/workflows?{query}"))["items"]]

    async def run(self, **body: Any) -> tuple[int, Any]:
        """Start a run of the workflow `w`."""
        return await self.send("POST", "/workflows/w/run", body)


@pytest.fixture
async def client(sim: Simulator) -> AsyncIterator[Client]:
    """Return a client of `sim`."""
    async with aiohttp.ClientSession() as http:
        yield Client(sim, http)


async def test_a_scenario_becomes_nodes_and_edges(sim: Simulator, client: Client) -> None:
    """`after` becomes dependencies and edges, and `when` conditionals of those."""
    sim.add_workflow("w", PLAN, inputs={"topic": "string"}, labels=["prod", "eu"])
    found = await client.get("/workflows/w")
    assert found["success"] is True
    assert (found["workflow_id"], found["workflow_name"], found["version"]) == (1, "w", 1)
    assert found["required_input_variables"] == {"topic": "string"}
    assert found["release_labels"] == ["prod", "eu"]
    assert [
        (node["name"], node["node_type"], node["is_output_node"], node["dependencies"])
        for node in found["nodes"]
    ] == [
        ("plan", "CODE_EXECUTION", False, []),
        ("write", "PROMPT_TEMPLATE", True, ["plan"]),
        ("check", "PROMPT_TEMPLATE", False, ["plan", "write"]),
    ]
    assert [
        (edge["source_node_name"], edge["target_node_name"], bool(edge["conditionals"]))
        for edge in found["edges"]
    ] == [("plan", "write", True), ("plan", "check", False), ("write", "check", False)]
    ids = [it["id"] for it in (*found["nodes"], *found["edges"])]
    assert len(set(ids)) == len(ids)
    assert found["workflow"] == {
        "id": 1,
        "workspace_id": 1,
        "user_id": None,
        "name": "w",
        "is_draft": False,
        "is_deleted": False,
    }


async def test_a_function_is_described_by_a_definition(sim: Simulator, client: Client) -> None:
    """Without one, the description has no nodes; without declared inputs, it names none."""
    sim.add_workflow("w", lambda _: PLAN)
    found = await client.get("/workflows/w")
    assert (found["nodes"], found["edges"]) == ([], [])
    assert "required_input_variables" not in found
    sim.add_version("w", lambda _: PLAN, definition=PLAN)
    assert len((await client.get("/workflows/w"))["nodes"]) == 3


async def test_labels_and_numbers_select_versions(sim: Simulator, client: Client) -> None:
    """A start runs the version that is described; without a label or number, the latest."""
    workflow_id = sim.add_workflow("w", PLAN, labels=["prod", "old"])
    assert sim.add_version(workflow_id, OTHER, labels=["prod"]) == 2
    for query, body, number in (
        ("", {}, 2),
        ("?version=1", {"workflow_version_number": 1}, 1),
        ("?label=prod", {"workflow_label_name": "prod"}, 2),
        ("?label=old", {"workflow_label_name": "old"}, 1),
    ):
        found = await client.get(f"/workflows/w{query}")
        assert found["version"] == number
        status, started = await client.run(**body)
        assert status == 201
        state = sim.state(started["workflow_version_execution_id"])
        assert list(state) == [node["name"] for node in found["nodes"]]


async def test_an_unknown_version_or_label_is_a_404(sim: Simulator, client: Client) -> None:
    """So is an unknown workflow."""
    sim.add_workflow("w", PLAN, labels=["prod"])
    for path in ("w?version=2", "w?label=eu", "x"):
        status, body = await client.send("GET", f"/workflows/{path}")
        assert (status, body["success"]) == (404, False)
    assert (await client.run(workflow_label_name="eu"))[0] == 404
    assert (await client.run(workflow_version_number=2))[0] == 404
    assert sim.runs == []


async def test_a_workflow_without_declared_versions_takes_any(
    sim: Simulator, client: Client
) -> None:
    """A test of a start with a label needs no label in the simulator."""
    sim.add_workflow("w", PLAN)
    assert (await client.get("/workflows/w?label=prod"))["version"] == 1
    assert (await client.run(workflow_version_number=7))[0] == 201


async def test_the_warning_names_missing_inputs(sim: Simulator, client: Client) -> None:
    """A warning of the workflow's own takes its place."""
    sim.add_workflow("w", PLAN, inputs={"topic": "string", "n": "string"})
    _, started = await client.run(input_variables={"n": 1})
    assert started["warning"] == "Missing input variables: topic"
    _, started = await client.run(input_variables={"n": 1, "topic": 2})
    assert started["warning"] is None
    sim.add_version("w", PLAN, inputs={"topic": "string"}, warning="mine")
    assert (await client.run())[1]["warning"] == "mine"


async def test_pages(sim: Simulator, client: Client) -> None:
    """The list is in pages of 30, the newest workflow first."""
    for number in range(65):
        sim.add_workflow(f"w{number}", OTHER)
    first = await client.get("/workflows")
    assert [item["name"] for item in first["items"]] == [f"w{n}" for n in range(64, 34, -1)]
    assert first["items"][0]["latest_version_number"] == 1
    del first["items"]
    assert first == {
        "page": 1,
        "per_page": 30,
        "total": 65,
        "pages": 3,
        "has_next": True,
        "has_prev": False,
        "next_num": 2,
        "prev_num": None,
    }
    last = await client.get("/workflows?page=3&per_page=30")
    assert [item["name"] for item in last["items"]] == ["w4", "w3", "w2", "w1", "w0"]
    assert (last["has_next"], last["next_num"]) == (False, None)
    assert (last["has_prev"], last["prev_num"]) == (True, 2)
    assert (await client.get("/workflows?page=9"))["items"] == []


async def test_sorting(sim: Simulator, client: Client) -> None:
    """By name, id, or the times of creation and of the latest version."""
    for name in ("b", "a", "c"):
        sim.add_workflow(name, OTHER)
    sim.add_version("b", OTHER)
    assert await client.names("sort_by=name&sort_order=asc") == ["a", "b", "c"]
    assert await client.names("sort_by=id") == ["c", "a", "b"]
    assert await client.names("sort_by=created_at&sort_order=asc") == ["b", "a", "c"]
    assert await client.names("sort_by=updated_at") == ["b", "c", "a"]


async def test_filters(sim: Simulator, client: Client) -> None:
    """By an external id."""
    sim.add_workflow("a", OTHER, labels=["prod"], external_ids={"crm": "7"})
    sim.add_workflow("b", OTHER, external_ids={"crm": "8"})
    page = await client.get("/workflows?external_source=crm&external_id=7")
    assert [(it["name"], it["release_labels"]) for it in page["items"]] == [("a", ["prod"])]
    assert await client.names("external_source=erp&external_id=7") == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("?page=0", "page"),
        ("?page=one", "page"),
        ("?per_page=101", "per_page"),
        ("?sort_by=size", "sort_by"),
        ("?sort_order=up", "sort_order"),
        ("?external_id=1", "external_source"),
        ("?external_source=crm", "external_id"),
        ("/w?version=0", "version"),
        ("/w?version=1&label=prod", "label"),
    ],
)
async def test_unusable_parameters(sim: Simulator, client: Client, path: str, name: str) -> None:
    """Each is a 422 that names the parameter."""
    sim.add_workflow("w", OTHER)
    status, body = await client.send("GET", f"/workflows{path}")
    assert status == 422
    assert body["detail"][0]["loc"] == ["query", name]


async def test_mistakes_of_the_test_are_errors(sim: Simulator) -> None:
    """Labels are a list, and a version needs a workflow."""
    with pytest.raises(TypeError, match=r"write labels=\['prod'\]"):
        sim.add_workflow("w", OTHER, labels="prod")
    with pytest.raises(LookupError, match="no workflow 'w'"):
        sim.add_version("w", OTHER)
