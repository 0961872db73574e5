"""A batch ends by itself, whatever becomes of its runs, and although a worker is killed."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from subprocess import PIPE
from typing import Any

import pytest
from aiohttp import web

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

# Refused requests end an item after seconds instead of minutes, and no run may take half a minute.
WORKER = """
import asyncio, sys
import attrs
from promptlayer_exec import PollPolicy, Session
from promptlayer_exec.dbos import Batch, _following as following

following.READ_PATIENCE = attrs.evolve(following.READ_PATIENCE, refused_alone=3.0, refused=6.0)

def session():
    bare = {"push": False, "check_inputs": False, "rate": None}
    return Session(poll=PollPolicy(floor=0.1, ceiling=1.0), max_response_bytes=1_000_000, **bare)

url, name = sys.argv[1:]
batch = Batch(name, database_url=url, session=session, max_in_flight=250, give_up_after=25.0)
asyncio.run(batch.work())
"""
NODE = '{"status": "SUCCESS", "value": 1, "is_output_node": true}'
# Ten ways to respond for a run that is over.
ODD: Mapping[str, tuple[int, str]] = {
    "item 0": (400, '{"error": "the run is odd"}'),
    "item 1": (403, '{"error": "not for this key"}'),
    "item 2": (404, '{"error": "no such run"}'),
    "item 3": (410, "gone"),
    "item 4": (422, '{"detail": "no"}'),
    "item 5": (200, '{"Answer": {"status": null}}'),
    "item 6": (200, '{"Answer": "a text"}'),
    "item 7": (200, "[]"),
    "item 8": (200, '"a text"'),
    "item 9": (200, f'{{"Answer": {NODE}, "Large": "{"x" * 1_100_000}"}}'),
}
ENDLESS = ("item 10", "item 11")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_two_hundred_items_end_although_twelve_are_odd(
    request: pytest.FixtureRequest, sim: Simulator, scene_on: Callable[[str], Any], database: str
) -> None:
    """Each has an outcome with its id, and was started once. Mended, the server tells all."""
    if database == "sqlite":
        url = f"sqlite:///{request.getfixturevalue('batches_file')}"
    else:
        url = request.getfixturevalue("postgres").url

    with closing(scene_on(url)) as scene:
        sim.add_workflow("odd", lambda inputs: scenario(inputs["key"]))
        sim.clear_faults()  # the first one that matches a request counts
        sim.inject(Fault(respond_oddly(sim), times=None))
        scene.add(200, workflow="odd")
        workers = [scene.start(WORKER, stderr=PIPE, text=True) for _ in range(2)]
        scene.wait_until(lambda: len(scene.recorded_ids()) == 200)
        workers[0].kill()
        _, errors = workers[1].communicate(timeout=300)
        assert workers[1].returncode == 0, errors

        status = asyncio.run(scene.batch.status())
        assert (status.succeeded, status.failed, status.total) == (188, 12, 200)
        ids = {run.inputs["key"]: run.execution_id for run in sim.runs}
        ended = asyncio.run(failures(scene.batch))
        assert {key: outcome.execution_id for key, outcome in ended.items()} == {
            key: ids[key] for key in (*ODD, *ENDLESS)
        }
        assert {ended[key].error.type for key in ENDLESS} == {"ExecutionTimeout"}
        assert len(sim.runs) == 200

        sim.clear_faults()
        for key in ENDLESS:
            sim.finish(ids[key], "Answer", value=key)
        hints = command(scene, "promptlayer-exec batch status")
        (recheck,) = (line for line in hints.splitlines() if "batch recheck" in line)
        command(scene, recheck)
        assert scene.start(WORKER).wait(120) == 0
        assert set(scene.outcomes()) == set(ids)
        assert Counter(run.inputs["key"] for run in sim.runs) == Counter(list(ids))


def scenario(key: str) -> Scenario:
    """Return a run of two seconds, or one that does not end."""
    return Scenario([SimNode("Answer", key, None if key in ENDLESS else 2.0, is_output_node=True)])


def respond_oddly(sim: Simulator) -> Callable[..., Any]:
    """Return what responds for the odd runs, once they are complete."""

    async def effect(request: web.BaseRequest, answer: Callable[[], Any]) -> Any:
        named = request.query.get("workflow_version_execution_id")
        for run in sim.runs:
            if f"{run.execution_id}" == named and run.inputs["key"] in ODD:
                status, body = ODD[run.inputs["key"]]
                return web.Response(status=status, text=body, content_type="application/json")
        return None

    return effect


async def failures(batch: Any) -> dict[str, Any]:
    """Return the outcomes without an output, by key."""
    return {outcome.key: outcome async for outcome in batch.outcomes() if not outcome.succeeded}


def command(scene: Any, line: str) -> str:
    """Run a command that the program has printed, on the scene's database, and return its text."""
    arguments = shlex.split(line)[1:]
    if "--db" not in arguments:
        arguments += ["--db", scene.url]
    ended = subprocess.run(
        [sys.executable, "-m", "promptlayer_exec", *arguments],
        env=scene.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return ended.stdout + ended.stderr
