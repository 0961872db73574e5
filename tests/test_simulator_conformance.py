"""The simulator against the OpenAPI document of the results operation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

RESULTS = "/workflow-version-execution-results"
DOCUMENT = yaml.safe_load(
    (Path(__file__).parent / "payloads" / "openapi.strict.yaml").read_text(encoding="utf-8")
)
NODE_MAP = jsonschema.Draft202012Validator(
    {"$ref": "#/components/schemas/NodeMap", "components": DOCUMENT["components"]}
)
SCENARIOS = {
    "empty": Scenario([]),
    "chain": Scenario(
        [
            SimNode("a/b", {"x": [1, None]}, duration=1.0),
            SimNode("c", lambda values: values["a/b"], duration=2.0, after=("a/b",)),
            SimNode("d", 10**30, duration=0.5, after=("c",), is_output_node=True),
        ]
    ),
    "failure": Scenario(
        [
            SimNode("ok", math.nan, duration=2.0, is_output_node=None),
            SimNode("fails", 1, 1.0, status="FAILED", error_message="no", raw_error_message="why"),
            SimNode("raw", status="FAILED", raw_error_message={"raw": "Traceback"}),
            SimNode("after", duration=1.0, after=("fails",), is_output_node=True),
        ]
    ),
    "branches": Scenario(
        [
            SimNode("choose", "left", duration=1.0),
            SimNode("left", "\ud800", 1.0, after=("choose",), when=lambda v: v["choose"] == "left"),
            SimNode("right", after=("choose",), when=lambda v: v["choose"] == "right"),
            SimNode("join", False, 1.0, after=("left", "right"), is_output_node=True),
        ]
    ),
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
async def test_every_node_map_validates(scenario: Scenario) -> None:
    """At every stage the full answer is a NodeMap, and 200 exactly when all nodes are final."""
    now = 0.0
    statuses: list[int] = []
    async with (
        Simulator(clock=lambda: now) as sim,
        aiohttp.ClientSession(sim.base_url, headers={"X-API-KEY": sim.api_key}) as http,
    ):
        query = {
            "workflow_version_execution_id": str(sim.add_execution(scenario)),
            "return_all_outputs": "true",
        }
        while not statuses or statuses[-1] == 202:
            async with http.get(RESULTS, params=query) as response:
                nodes = json.loads(await response.read())
            NODE_MAP.validate(nodes)
            final = all(n["status"] in {"SUCCESS", "FAILED", "SKIPPED"} for n in nodes.values())
            assert response.status == (200 if final else 202)
            statuses.append(response.status)
            now += 0.5
    assert statuses[-1] == 200


async def test_the_schema_can_refuse() -> None:
    """The NodeMap schema refuses a status that the document does not list."""
    node = {"value": 1, "error_message": None, "raw_error_message": None, "is_output_node": None}
    assert not NODE_MAP.is_valid({"a": node | {"status": "PAUSED"}})


def schemathesis(
    sim: Simulator, directory: Path, phases: str, *known_ids: int
) -> subprocess.CompletedProcess[str]:
    """Run Schemathesis with all of its checks, and with some existing ids as examples."""
    document: dict[str, Any] = json.loads(json.dumps(DOCUMENT))
    execution_id, _ = document["paths"][RESULTS]["get"]["parameters"]
    execution_id["examples"] = {str(i): {"value": i} for i in known_ids}
    location = directory / "openapi.json"
    location.write_text(json.dumps(document), encoding="utf-8")
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(location)]
    options = {
        "--url": sim.base_url,
        "--header": f"X-API-KEY: {sim.api_key}",
        "--checks": "all",
        "--phases": phases,
        "--max-examples": "60",
        "--warnings": "off",
    }
    command += [f"{name}={value}" for name, value in options.items()]
    command += ["--generation-deterministic", "--no-color"]
    return subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """Every request that Schemathesis generates is answered as the document says."""
    with Simulator() as sim:
        done = sim.add_execution(Scenario([SimNode("a", 1)]))
        held = sim.add_execution(Scenario([SimNode("a", duration=None)]))
        run = schemathesis(sim, tmp_path, "examples,coverage,fuzzing", done, held)
        requested = {r.query.get("workflow_version_execution_id") for r in sim.requests}
    assert run.returncode == 0, run.stdout + run.stderr
    assert {str(done), str(held)} <= requested


@pytest.mark.parametrize(
    ("planted", "finding"),
    [
        (Fault.status(418, times=None), "Undocumented status code"),
        (Fault.status(404, times=None, body=b'{"success":true}'), "Response violates schema"),
        (Fault.malformed(times=None), "Undocumented Content-Type"),
    ],
    ids=["status", "schema", "content type"],
)
def test_schemathesis_finds_planted_deviations(
    tmp_path: Path, planted: Fault, finding: str
) -> None:
    """The check above can fail: a planted deviation from the document is found."""
    with Simulator() as sim:
        sim.inject(planted)
        run = schemathesis(sim, tmp_path, "examples", 1)
    assert run.returncode == 1, run.stdout + run.stderr
    assert finding in run.stdout
