"""The simulator against the OpenAPI documents of the results operation and of workflows.

`nox -s vendor` installs Schemathesis and runs these tests.
"""

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
PAYLOADS = Path(__file__).parent / "payloads"
DOCUMENT = yaml.safe_load((PAYLOADS / "openapi.strict.yaml").read_text(encoding="utf-8"))
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


def results_document(*known_ids: int) -> dict[str, Any]:
    """Return the document of the results operation, with some existing ids as examples."""
    document: dict[str, Any] = json.loads(json.dumps(DOCUMENT))
    execution_id, _ = document["paths"][RESULTS]["get"]["parameters"]
    execution_id["examples"] = {str(i): {"value": i} for i in known_ids}
    return document


def workflows_document(*known: str) -> dict[str, Any]:
    """Return the document of the operations on workflows, with existing ones as examples."""
    text = (PAYLOADS / "openapi.workflows.yaml").read_text(encoding="utf-8")
    document: dict[str, Any] = stated_strictly(yaml.safe_load(text))
    # What the simulator does without: a list of labels, and filters by times and by people.
    del document["paths"]["/workflows/{workflow_id_or_name}/labels"]
    listed = document["paths"]["/workflows"]["get"]
    left_out = ("created_", "updated_")
    listed["parameters"] = [
        it for it in listed["parameters"] if not it["name"].startswith(left_out)
    ]
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation["parameters"]:
                parameter.pop("example", None)  # those of label and version exclude each other
                if parameter["in"] == "path":
                    parameter["examples"] = {name: {"value": name} for name in known}
    return document


def stated_strictly(part: Any) -> Any:
    """Return a part of the vendor's document, mended like `openapi.strict.yaml`.

    Where the document was cut, `{}` stands for any value, which is no schema for some keywords.
    """
    if isinstance(part, list):
        return [stated_strictly(item) for item in part]
    if not isinstance(part, dict):
        return part
    cut = ("default", "description", "title", "type", "value")
    mended = {k: stated_strictly(v) for k, v in part.items() if v != {} or k not in cut}
    if mended.pop("nullable", False):
        mended["type"] = [mended["type"], "null"]
    if "oneOf" in mended:
        mended["anyOf"] = mended.pop("oneOf")
    return mended


def schemathesis(
    sim: Simulator, directory: Path, phases: str, document: dict[str, Any], **more: str
) -> subprocess.CompletedProcess[str]:
    """Run Schemathesis with all of its checks."""
    location = directory / "openapi.json"
    location.write_text(json.dumps(document), encoding="utf-8")
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(location)]
    options = {
        "--url": sim.base_url,
        "--header": f"X-API-KEY: {sim.api_key}",
        "--checks": "all",
        "--phases": phases,
        "--max-examples": "30",
        "--warnings": "off",
        **{f"--{name.replace('_', '-')}": value for name, value in more.items()},
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
        run = schemathesis(sim, tmp_path, "examples,coverage,fuzzing", results_document(done, held))
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
        run = schemathesis(sim, tmp_path, "examples", results_document(1))
    assert run.returncode == 1, run.stdout + run.stderr
    assert finding in run.stdout


def add_workflows(sim: Simulator) -> None:
    """Add a workflow `a/b` with all that can be described, and others."""
    nodes = [
        # It is held, so that no completion is posted to a generated URL.
        SimNode("plan", duration=None),
        SimNode("write", after=["plan"], when=lambda _: True, is_output_node=True),
    ]
    scenario = Scenario(nodes)
    inputs = {"topic": "string"}
    sim.add_workflow("a/b", scenario, inputs=inputs, labels=["prod"], external_ids={"crm": "1"})
    sim.add_version("a/b", scenario, labels=["staging"])
    sim.add_workflow("c", scenario)


def test_schemathesis_finds_nothing_in_the_operations_on_workflows(tmp_path: Path) -> None:
    """Lists, descriptions and starts are as the document says."""
    with Simulator() as sim:
        add_workflows(sim)
        run = schemathesis(
            sim,
            tmp_path,
            "examples,coverage,fuzzing",
            workflows_document("a/b", "2"),
            max_examples="10",
            # The document says in words alone which parameters exclude or need each other.
            exclude_checks="positive_data_acceptance",
        )
        requested = {request.path for request in sim.requests}
    assert run.returncode == 0, run.stdout + run.stderr
    assert {
        f"/workflows{path}" for path in ("", "/a%2Fb", "/a%2Fb/run", "/2", "/2/run")
    } <= requested
