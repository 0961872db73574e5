"""Batches behind a PgBouncer that gives each transaction another connection to the server."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from promptlayer_exec._values.start_records import fingerprint
from promptlayer_exec.simulator import Simulator
from promptlayer_exec.starts import SQLStartStore, StartClaim

# What a client finds that sets nothing. The server has its defaults for all of them.
SETTINGS = ("lock_timeout", "idle_in_transaction_session_timeout", "statement_timeout")


@pytest.fixture(params=[0, 200], ids="prepared={}".format)
def pooler(postgres: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a PgBouncer in transaction mode, and return the URL of the database behind it.

    It has fewer connections to the server than it has clients, so that they share them.
    """
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed: apt-get install pgbouncer")

    with psycopg.connect(postgres.url.replace("/batches", "/postgres"), autocommit=True) as server:
        server.execute("CREATE DATABASE batches")
    with tempfile.TemporaryDirectory(prefix="pgb") as name:
        directory = Path(name)
        config = directory / "pgbouncer.ini"
        config.write_text(
            f"""
            [databases]
            batches = host={postgres.data.parent} dbname=batches user=tester
            [pgbouncer]
            listen_addr =
            listen_port = 6432
            unix_socket_dir = {directory}
            auth_type = any
            pool_mode = transaction
            default_pool_size = 8
            max_prepared_statements = {request.param}
            """.replace("\n            ", "\n"),
            encoding="utf-8",
        )
        # PgBouncer refuses to run as root.
        user = "postgres" if os.geteuid() == 0 else None
        if user is not None:
            shutil.chown(directory, user)

        with (directory / "log").open("wb") as log:
            process = subprocess.Popen([program, config], user=user, stderr=log, cwd="/")
        try:
            wait_until_connected(url := f"postgresql://tester@/batches?host={directory}&port=6432")
            yield url
        finally:
            process.terminate()
            process.wait(30)


def wait_until_connected(url: str) -> None:
    """Wait until the pooler accepts clients."""
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        with suppress(psycopg.OperationalError), psycopg.connect(url):
            return
        time.sleep(0.05)
    raise AssertionError(url)


def settings_of_others(url: str) -> set[tuple[str, ...]]:
    """Return the settings that clients of the pooler find on all of its connections."""
    query = "SELECT " + ", ".join(f"current_setting('{name}')" for name in SETTINGS)
    found = set()
    with ExitStack() as clients:
        for _ in range(4):  # each keeps its connection, as its transaction goes on
            client = clients.enter_context(psycopg.connect(url, prepare_threshold=None))
            found.add(client.execute(query.encode()).fetchone())
    return found


@pytest.mark.timeout(240)
def test_a_batch_behind_a_pooler_succeeds_and_leaks_no_setting(
    pooler: str, sim: Simulator, scene_on: Callable[[str], Any]
) -> None:
    """Two workers share the pooler's connections with all others, also while these work."""
    with closing(scene_on(pooler)) as scene:
        before = settings_of_others(pooler)
        scene.add(300)
        workers = [scene.worker(in_flight=30) for _ in range(2)]
        scene.wait_for(50)
        assert settings_of_others(pooler) == before == {("0", "0", "0")}
        for worker in workers:
            worker.end()
        assert len(scene.outcomes()) == len(sim.runs) == 300
        assert settings_of_others(pooler) == before


async def test_a_store_of_starts_behind_a_pooler_leaks_no_setting(pooler: str) -> None:
    """Two stores share the pooler's connections with all others."""
    stores = [SQLStartStore(pooler) for _ in range(2)]
    request = fingerprint("order", workflow="write", inputs={})

    async def start(number: int) -> None:
        key, store = f"{number}", stores[number % 2]
        assert await store.find(key) is None
        assert await store.claim(StartClaim(key, key, "", request, 30.0)) is None
        assert await store.record(key, key, number + 1)

    for first in range(0, 100, 20):  # so that statements are repeated
        await asyncio.gather(*map(start, range(first, first + 20)))
    assert settings_of_others(pooler) == {("0", "0", "0")}
    for store in stores:
        await store.aclose()
