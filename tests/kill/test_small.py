"""A short version of `test_kill.py` for every run of the checks: `nox -s kill_small`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import time
from contextlib import closing
from subprocess import PIPE
from typing import Any

import attrs
import psycopg
import pytest
import sqlalchemy as sa

from promptlayer_exec import ConfigurationError, Session, StartRequest
from promptlayer_exec._database import database
from promptlayer_exec._database.location import check_url
from promptlayer_exec.dbos import Batch
from promptlayer_exec.dbos._requests import Row
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import batches
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

ENDLESS = """
import asyncio, sys
from promptlayer_exec import Session
from promptlayer_exec.dbos import Batch

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
@pytest.mark.parametrize("trouble", ["stopped", "locked"])
def test_a_worker_without_its_database_can_be_interrupted(
    postgres_scene: Any, postgres: Any, sim: Simulator, trouble: str
) -> None:
    """Its process ends within 30 seconds, and no thread keeps it.

    Every id that was answered is in the database, or on standard error with its key.
    """
    scene = postgres_scene
    scene.add(500, seconds=3.0)
    process = scene.start(ENDLESS, stdout=PIPE, stderr=PIPE, text=True)
    scene.wait_until(lambda: len(sim.runs) >= 40)
    with contextlib.ExitStack() as stack:
        if trouble == "stopped":
            postgres.stop()
            stack.callback(postgres.start)
        else:
            other = stack.enter_context(psycopg.connect(scene.url))
            other.execute("LOCK TABLE promptlayer_item IN ACCESS EXCLUSIVE MODE")
        time.sleep(2.0)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert out == "KeyboardInterrupt\n"
    assert "never retrieved" not in err
    check_ids(scene, sim, err)


@pytest.mark.timeout(120)
def test_a_worker_that_stands_still_in_a_transaction_keeps_no_other_waiting(
    postgres_scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends its transaction; the worker notices when it goes on."""
    monkeypatch.setattr(database, "LIMITS", attrs.evolve(database.LIMITS, idle_in_transaction=1.0))
    scene = postgres_scene
    scene.add(20)
    with closing(Store(check_url(scene.url))) as store:
        still = store.engine.connect()  # as a worker that is frozen
        still.execute(sa.select(batches).with_for_update())
        scene.worker().end()
        with pytest.raises(sa.exc.DBAPIError) as error, still:
            still.execute(sa.select(1))
        assert error.value.connection_invalidated
    scene.outcomes()


def check_ids(scene: Any, sim: Simulator, err: str) -> None:
    """Check that each id is in the database, or on standard error with its key."""
    stored = scene.recorded_ids()
    for run in sim.runs:
        key, execution_id = run.inputs["key"], run.execution_id
        line = f"execution {execution_id} started for item {key!r} of batch 'nightly'"
        assert stored.get(key) == execution_id or line in err, key


@pytest.mark.timeout(120)
def test_the_encoding_of_the_database_does_not_matter_if_it_has_the_keys(
    postgres: Any, sim: Simulator
) -> None:
    """The client's is always UTF-8; a database that lacks a character is an error that says so."""
    request = StartRequest("job", {}, key="ключ")
    session = Session(sim.api_key, base_url=sim.base_url)
    with psycopg.connect(postgres.url.replace("/batches", "/postgres"), autocommit=True) as server:
        for encoding in ("SQL_ASCII", "LATIN1"):
            options = f"TEMPLATE template0 LOCALE 'C' ENCODING '{encoding}'"
            server.execute(f"CREATE DATABASE {encoding.lower()} {options}".encode())
        server.execute("ALTER ROLE tester SET client_encoding = 'LATIN1'")
    ascii_batch, utf8_batch, latin_batch = (
        Batch("b", database_url=postgres.url.replace("/batches", f"/{name}"), session=session)
        for name in ("sql_ascii", "batches", "latin1")
    )
    for batch in (ascii_batch, utf8_batch):
        assert asyncio.run(batch.add([request])) == 1
        assert asyncio.run(batch.kinds([request.key])) == {request.key: None}
    with pytest.raises(
        ConfigurationError, match=r"in encoding .LATIN1.*\. Its encoding must be UTF8"
    ):
        asyncio.run(latin_batch.add([request]))


def test_whether_every_item_has_an_outcome_is_seen_in_an_index(postgres_scene: Any) -> None:
    """Also if PostgreSQL still thinks that hardly any item has one: there may be millions."""
    plans: list[str] = []
    with closing(Store(check_url(postgres_scene.url))) as store:
        store.prepare()
        store.add("b", [Row(f"{number}", "{}", "") for number in range(5000)])
        with store.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").execute(sa.text("ANALYZE"))

        @sa.event.listens_for(store.engine, "before_cursor_execute")
        def explain(_connection: Any, cursor: Any, statement: str, values: Any, *_: Any) -> None:
            if statement.startswith("SELECT"):
                cursor.execute(f"EXPLAIN {statement}", values)
                plans.extend(row[0] for row in cursor.fetchall())

        assert not store.is_finished("b")
    assert "promptlayer_item_kind" in plans[1]


CALLED_BACK = """
import asyncio, sys
from promptlayer_exec import PollPolicy, Session
from promptlayer_exec.dbos import Batch
from promptlayer_exec.webhooks import Callbacks

def session():
    callbacks = Callbacks("http://127.0.0.1:9/callbacks", secret="of the workers")
    bare = {"push": False, "check_inputs": False}
    return Session(poll=PollPolicy.fixed(0.1), callbacks=callbacks, **bare)

asyncio.run(Batch(sys.argv[2], database_url=sys.argv[1], session=session).work())
"""


@pytest.mark.timeout(120)
def test_what_a_killed_worker_started_is_found_by_its_callbacks(
    postgres_scene: Any, sim: Simulator
) -> None:
    """It was killed between request and answer. What stays unknown never reached the server."""
    scene = postgres_scene
    processes: list[subprocess.Popen[bytes]] = []

    def kill_at_the_tenth(inputs: Any) -> Scenario:
        if len(sim.runs) == 9:
            processes[0].kill()
        return Scenario([SimNode("Answer", inputs["key"], is_output_node=True)])

    def work() -> int:
        processes.append(scene.start(CALLED_BACK))
        return processes[-1].wait(60)

    def call_back() -> None:
        async def resolve() -> None:
            for run in sim.runs:
                token = run.body["callback_url"].rpartition("/")[2]
                await scene.batch.resolve(token, run.execution_id)

        asyncio.run(resolve())

    sim.add_workflow("killed", kill_at_the_tenth)
    scene.add(20, workflow="killed")
    assert work() == -signal.SIGKILL
    assert work() == 0
    assert asyncio.run(scene.batch.status()).unknown > 20 - len(sim.runs)
    call_back()
    assert work() == 0
    status = asyncio.run(scene.batch.status())
    assert (status.succeeded, status.unknown) == (len(sim.runs), 20 - len(sim.runs))
    assert sim.runs[9].inputs["key"] in scene.outcomes()
