"""The vendor's own SDK against the simulator; only its key and its base URL are set.

`nox -s vendor` installs the SDK and runs these tests.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from promptlayer import AsyncPromptLayer, PromptLayer
from promptlayer.exceptions import PromptLayerAPIError

from promptlayer_exec.simulator import Scenario, SimNode, Simulator

KEY = "simulator-key"
WEBSOCKET = "/connection/websocket"
RESULTS = "/workflow-version-execution-results"
# It completes by time, after the start was answered and without a request for results.
TIMED = Scenario(
    [SimNode("Plan", [1], 0.05), SimNode("Answer", "AAA", 0.05, ("Plan",), is_output_node=True)]
)
NODE_MAP = {
    "Plan": {
        "status": "SUCCESS",
        "value": [1],
        "error_message": None,
        "raw_error_message": None,
        "is_output_node": False,
    },
    "Answer": {
        "status": "SUCCESS",
        "value": "AAA",
        "error_message": None,
        "raw_error_message": None,
        "is_output_node": True,
    },
}
FAILING = Scenario([SimNode("a", 1, status="FAILED", error_message="no", is_output_node=True)])

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _only_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPTLAYER_API_KEY", raising=False)
    monkeypatch.setenv("PROMPTLAYER_BASE_URL", "http://127.0.0.1:1")


@pytest.fixture
def sim() -> Iterator[Simulator]:
    """Return a simulator in a thread of its own that knows the workflow `w`."""
    with Simulator() as simulator:
        simulator.add_workflow("w", TIMED)
        yield simulator


def run_sync(sim: Simulator, *arguments: Any, key: str = KEY, **options: Any) -> Any:
    """Run a workflow with the synchronous client."""
    client = PromptLayer(api_key=key, base_url=sim.base_url)
    return client.run_workflow(*arguments, timeout=20, **options)


def run_async(sim: Simulator, *arguments: Any, key: str = KEY, **options: Any) -> Any:
    """Run a workflow with the asynchronous client."""

    async def run() -> Any:
        client = AsyncPromptLayer(api_key=key, base_url=sim.base_url)
        return await client.run_workflow(*arguments, timeout=20, **options)

    return asyncio.run(run())


@pytest.fixture(params=[run_sync, run_async])
def run(request: pytest.FixtureRequest) -> Run:
    """Return a function that runs a workflow, with either client."""
    runner: Run = request.param
    return runner


def paths(sim: Simulator) -> list[tuple[str, str]]:
    """Return the method and path of each request."""
    return [(request.method, request.path) for request in sim.requests]


def test_main_output(sim: Simulator, run: Run) -> None:
    """A run by name returns the main output, which it got by push alone."""
    assert run(sim, "w", input_variables={"q": "?"}) == "AAA"
    assert paths(sim) == [
        ("GET", "/workflows/w"),
        ("POST", "/ws-token-request-library"),
        ("GET", WEBSOCKET),
        ("POST", "/workflows/1/run"),
    ]
    assert [run.inputs for run in sim.runs] == [{"q": "?"}]


def test_by_id(sim: Simulator, run: Run) -> None:
    """A run by id does not look up a name."""
    assert run(sim, 1) == "AAA"
    assert paths(sim)[0] == ("POST", "/ws-token-request-library")


def test_all_outputs(sim: Simulator, run: Run) -> None:
    """`return_all_outputs` returns the node map."""
    assert run(sim, "w", return_all_outputs=True) == NODE_MAP


def test_label_and_metadata(sim: Simulator, run: Run) -> None:
    """The metadata and the label of a run are accepted and recorded."""
    run(sim, "w", metadata={"a": "b"}, workflow_label_name="prod")
    (body,) = [run.body for run in sim.runs]
    assert (body["metadata"], body["workflow_label_name"]) == ({"a": "b"}, "prod")


@pytest.mark.parametrize(("all_outputs", "output"), [(False, "AAA"), (True, NODE_MAP)])
def test_exceeds_size_limit(run: Run, all_outputs: bool, output: object) -> None:
    """After a push without the output, the SDK requests the results."""
    with Simulator(push_limit_bytes=10) as sim:
        sim.add_workflow("w", TIMED)
        assert run(sim, "w", return_all_outputs=all_outputs) == output
        assert paths(sim)[-1] == ("GET", RESULTS)


def test_large_output(sim: Simulator, run: Run) -> None:
    """An output of megabytes is too large for a push, and still arrives."""
    sim.add_workflow("large", Scenario([SimNode("a", "a" * 3_000_000, is_output_node=True)]))
    assert len(run(sim, "large")) == 3_000_000


def test_failed_workflow_in_the_sync_client(sim: Simulator) -> None:
    """The synchronous client raises an error: no output node succeeded."""
    sim.add_workflow("failing", FAILING)
    with pytest.raises(PromptLayerAPIError, match="None of the output nodes have succeeded"):
        run_sync(sim, "failing")


def test_failed_workflow_in_the_async_client(sim: Simulator) -> None:
    """The asynchronous client returns the node map in place of the output."""
    sim.add_workflow("failing", FAILING)
    assert run_async(sim, "failing")["a"]["error_message"] == "no"


@pytest.mark.parametrize("name", ["with space", "naïve", "a+b", "12"])
def test_names(sim: Simulator, run: Run, name: str) -> None:
    """Names that the SDK can put into a path work."""
    sim.add_workflow(name, TIMED)
    assert run(sim, name) == "AAA"


def test_wrong_key(sim: Simulator, run: Run) -> None:
    """A wrong key is an error with the server's message, both by name and by id."""
    for workflow in ("w", 1):
        with pytest.raises(PromptLayerAPIError, match="Invalid or missing API key"):
            run(sim, workflow, key="wrong")
    assert sim.runs == []


def test_unknown_workflow(sim: Simulator, run: Run) -> None:
    """An unknown workflow is an error with the server's message."""
    with pytest.raises(PromptLayerAPIError, match="Workflow not found"):
        run(sim, "unknown")


def test_held(sim: Simulator, run: Run) -> None:
    """A run completes when the test finishes its held node."""
    sim.add_workflow("held", Scenario([SimNode("a", None, None, is_output_node=True)]))
    outputs: list[Any] = []
    thread = threading.Thread(target=lambda: outputs.append(run(sim, "held")))
    thread.start()
    asyncio.run(sim.wait_for_requests(4))
    sim.finish(sim.runs[0].execution_id, "a", value="given")
    thread.join(20)
    assert outputs == ["given"]


def test_at_once(sim: Simulator, run: Run) -> None:
    """A run that is complete when it starts is never missed."""
    sim.add_workflow("instant", Scenario([SimNode("a", 1, is_output_node=True)]))
    assert [run(sim, "instant") for _ in range(20)] == [1] * 20


def test_many_at_once(sim: Simulator) -> None:
    """Concurrent runs each get their own output."""
    sim.add_workflow("echo", lambda v: Scenario([SimNode("a", v["n"], 0.1, is_output_node=True)]))

    async def run_all() -> list[Any]:
        client = AsyncPromptLayer(api_key=KEY, base_url=sim.base_url)
        runs = [client.run_workflow("echo", {"n": n}, timeout=20) for n in range(20)]
        return await asyncio.gather(*runs)

    assert asyncio.run(run_all()) == list(range(20))
