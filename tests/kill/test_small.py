"""A short version of `test_kill.py` for every run of the checks: `nox -s kill_small`."""

from __future__ import annotations

from typing import Any

import pytest


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
