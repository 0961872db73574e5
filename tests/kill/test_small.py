"""A short version of `test_kill.py` for every run of the checks: `nox -s kill_small`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from promptlayer_exec.simulator import Simulator

NAME = "nightly"  # of the scene's batch
ENDLESS = """
import asyncio, sys
from promptlayer_exec import Session
from promptlayer_exec.dbos import Batch, _store

_store._RETRY_FOR = float(sys.argv[3])
batch = Batch(sys.argv[2], database_url=sys.argv[1], session=Session, max_in_flight=40)
try:
    asyncio.run(batch.work())
except BaseException as error:
    print(type(error).__name__)
"""


@pytest.mark.timeout(120)
def test_one_of_three_workers_can_be_killed(postgres_scene: Any) -> None:
    """On PostgreSQL, every item ends once and is started once at most."""
    scene = postgres_scene
    scene.add(150)
    first, *others = (scene.worker(in_flight=30) for _ in range(3))
    scene.wait_for(30)
    first.kill()
    for worker in others:
        worker.end()
    scene.outcomes()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("patience", "ends_with"), [(4.0, "ConfigurationError"), (90.0, "KeyboardInterrupt")]
)
def test_a_worker_without_its_database_ends(
    postgres_scene: Any, postgres: Any, sim: Simulator, patience: float, ends_with: str
) -> None:
    """After its patience, and soon after an interruption; no thread keeps the process.

    Every id that was answered is in the database, or on standard error with its key.
    """
    scene = postgres_scene
    scene.add(500, seconds=3.0)
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, scene.url, NAME, str(patience)],
        env={
            **os.environ,
            "PROMPTLAYER_API_KEY": sim.api_key,
            "PROMPTLAYER_BASE_URL": sim.base_url,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        scene.wait_until(lambda: len(sim.runs) >= 40)
        postgres.stop()
        if patience > 60:
            time.sleep(2.0)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
        postgres.start()
    assert out == f"{ends_with}\n"
    assert "never retrieved" not in err
    stored = scene.recorded_ids()
    for run in sim.runs:
        key, execution_id = run.inputs["key"], run.execution_id
        line = f"execution {execution_id} was started for item {key!r} of batch '{NAME}'"
        assert stored.get(key) == execution_id or line in err, key
