"""Batches whose workers, server or database are stopped; `nox -s kill` runs these tests."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from promptlayer_exec.simulator import Simulator


@pytest.mark.timeout(180)
def test_a_worker_can_be_killed_and_started_again_at_any_time(sqlite_scene: Any) -> None:
    """On SQLite, every item ends once and is started once at most, after 20 kills."""
    scene = sqlite_scene
    scene.add(1000)
    for _ in range(20):
        worker = scene.worker()
        time.sleep(scene.random.uniform(0.1, 2.0))
        worker.kill()
    scene.worker().end()
    scene.outcomes()


@pytest.mark.timeout(180)
def test_workers_can_be_killed_and_join_while_others_work(postgres_scene: Any) -> None:
    """On PostgreSQL, two of three workers are killed and one joins late: every item ends once."""
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
def test_the_items_of_a_silent_worker_move_within_30_s(postgres_scene: Any) -> None:
    """When the silent worker goes on, it does not start any of them again."""
    scene = postgres_scene
    scene.add(200, seconds=3.0)
    silent = scene.worker(in_flight=30)
    scene.wait_for(20)
    silent.suspend()
    held = scene.executors()
    assert len(held) == 1
    others = scene.worker(in_flight=30)
    scene.wait_until(lambda: not held & scene.executors(), seconds=30.0)
    silent.resume()
    others.end()
    silent.end()
    scene.outcomes()


@pytest.mark.timeout(180)
def test_no_item_fails_when_the_database_restarts(postgres_scene: Any, postgres: Any) -> None:
    """Two workers wait until PostgreSQL is back."""
    scene = postgres_scene
    scene.add(800)
    workers = [scene.worker(in_flight=40) for _ in range(2)]
    # One that has not opened the database yet would not wait for it.
    scene.wait_until(lambda: len(scene.executors()) == 2)
    postgres.stop()
    time.sleep(3.0)
    postgres.start()
    for worker in workers:
        worker.end()
    outcomes = scene.outcomes()
    assert all(outcome.succeeded for outcome in outcomes.values())


@pytest.mark.timeout(180)
def test_no_item_fails_when_the_server_is_down_for_20_s(sqlite_scene: Any) -> None:
    """Items whose start was being sent at that moment are unknown; there are few of them."""
    scene = sqlite_scene
    scene.add(400)
    worker = scene.worker(in_flight=40)
    scene.wait_for(50)
    scene.interrupt_server(20.0)
    worker.end()
    outcomes = scene.outcomes()
    assert sum(outcome.kind == "unknown" for outcome in outcomes.values()) <= 16


@pytest.mark.timeout(180)
def test_three_workers_share_one_rate(postgres_scene: Any, sim: Simulator) -> None:
    """They use at least 85 % of the server's rate limit, and get 429 less than 2 % of the time."""
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
def test_another_process_gets_all_outcomes(sqlite_scene: Any) -> None:
    """While one process works, another one yields each outcome, and then reads the status."""
    scene = sqlite_scene
    scene.add(40, seconds=0.1)
    worker = scene.worker()
    assert len(scene.outcomes()) == 40
    worker.end()
    assert asyncio.run(scene.batch.status()).succeeded == 40
