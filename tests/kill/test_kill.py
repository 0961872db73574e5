"""Batches whose workers, server or database are killed: `nox -s kill` runs these."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from promptlayer_exec.simulator import Simulator


@pytest.mark.timeout(180)
def test_a_process_killed_at_random_moments_and_started_again(sqlite_scene: Any) -> None:
    """Every item ends once and is started once, on SQLite, wherever the process was killed."""
    scene = sqlite_scene
    scene.add(1000)
    for _ in range(20):
        worker = scene.worker()
        time.sleep(scene.random.uniform(0.1, 2.0))
        worker.kill()
    scene.worker().end()
    scene.outcomes()


@pytest.mark.timeout(180)
def test_workers_killed_beside_others(postgres_scene: Any) -> None:
    """On PostgreSQL, of three workers two are killed and one joins late: every item ends once."""
    scene = postgres_scene
    scene.add(1500)
    first, second, _ = (scene.worker(in_flight=60) for _ in range(3))
    scene.wait_for(scene.random.randint(50, 200))
    first.kill()
    scene.wait_for(scene.random.randint(300, 500))
    late = scene.worker(in_flight=60)
    second.kill()
    late.end()
    scene.outcomes()


@pytest.mark.timeout(180)
def test_items_of_a_worker_that_falls_silent_move(postgres_scene: Any) -> None:
    """Of a worker that hangs, within 30 s; when it wakes, it starts none of them again."""
    scene = postgres_scene
    scene.add(200, seconds=3.0)
    silent = scene.worker(in_flight=30)
    scene.wait_for(20)
    silent.stop()
    held = scene.executors()
    assert len(held) == 1
    others = scene.worker(in_flight=30)
    scene.wait_until(lambda: not held & scene.executors(), seconds=30.0)
    silent.go_on()
    others.end()
    silent.end()
    scene.outcomes()


@pytest.mark.timeout(180)
def test_a_database_that_restarts(postgres_scene: Any, postgres: Any) -> None:
    """PostgreSQL restarted underneath two workers costs nothing but time."""
    scene = postgres_scene
    scene.add(800)
    workers = [scene.worker(in_flight=40) for _ in range(2)]
    scene.wait_for(100)
    postgres.stop()
    time.sleep(3.0)
    postgres.start()
    for worker in workers:
        worker.end()
    outcomes = scene.outcomes()
    assert all(outcome.succeeded for outcome in outcomes.values())


@pytest.mark.timeout(180)
def test_a_server_that_is_away_for_20_seconds(sqlite_scene: Any, sim: Simulator) -> None:
    """Nothing fails of it: an item whose start was on the wire just then is unknown."""
    scene = sqlite_scene
    scene.add(400)
    worker = scene.worker(in_flight=40)
    scene.wait_for(50)
    scene.be_away(20.0)
    worker.end()
    outcomes = scene.outcomes()
    assert sum(outcome.kind == "unknown" for outcome in outcomes.values()) <= 16


@pytest.mark.timeout(180)
def test_three_workers_share_one_rate(postgres_scene: Any, sim: Simulator) -> None:
    """They get at least 85 % of the server's token bucket, and less than 2 % of 429s."""
    scene = postgres_scene
    rate = 60.0
    scene.add(500, seconds=3.0)
    sim.rate_limit(requests=rate, burst=20)
    workers = [scene.worker(in_flight=60, rate=rate) for _ in range(3)]
    scene.wait_for(20)
    began, before = time.monotonic(), sim.request_count
    time.sleep(15.0)
    used = (sim.request_count - before) / (time.monotonic() - began) / rate
    refused = sum(worker.end() for worker in workers) / sim.request_count
    assert used >= 0.85, f"{used:.0%}"
    assert refused < 0.02, f"{refused:.1%}"
    scene.outcomes()


@pytest.mark.timeout(120)
def test_what_is_stored_is_seen_by_others(sqlite_scene: Any) -> None:
    """While one process works, another gets each outcome, and its status is the truth."""
    scene = sqlite_scene
    scene.add(40, seconds=0.1)
    worker = scene.worker()
    assert len(scene.outcomes()) == 40
    worker.end()
    assert asyncio.run(scene.batch.status()).succeeded == 40
