"""A store of starts on PostgreSQL: all tests of tests/starts, and what only a server can do."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import psycopg
import pytest

from promptlayer_exec import ConfigurationError, Session, StoreUnavailable
from promptlayer_exec.dbos import Batch, batch_names
from promptlayer_exec.simulator import Simulator
from promptlayer_exec.starts import SQLStartStore

_spec = spec_from_file_location(
    "starts_on_sqlite", Path(__file__).parents[1] / "starts/test_store.py"
)
assert _spec is not None
assert _spec.loader is not None
on_sqlite = module_from_spec(_spec)
_spec.loader.exec_module(on_sqlite)
names = ("store_of", "store", "replaced")
globals().update(
    {name: it for name, it in vars(on_sqlite).items() if name.startswith("test_") or name in names}
)


@pytest.fixture
def url(postgres_of_module: Any) -> str:
    """Return the URL of a new database."""
    name = f"starts{time.monotonic_ns()}"
    maintenance = postgres_of_module.url.replace("/batches", "/postgres")
    with psycopg.connect(maintenance, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return str(postgres_of_module.url.replace("/batches", f"/{name}"))


async def test_a_server_that_is_away_is_waited_for(
    store: SQLStartStore, postgres_of_module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A call whose patience is shorter says why it failed, and that it was not for nothing."""
    await store.claim(on_sqlite.CLAIM)
    postgres_of_module.stop()
    try:
        with pytest.raises(StoreUnavailable, match=r"cannot use the database .*connection"):
            await store.find("order", patience=1.5)
    finally:
        postgres_of_module.start()
    assert await store.record("order", "first", 7)
    assert "trying again" in caplog.text
    assert "works again" in caplog.text


async def test_the_isolation_of_the_server_does_not_matter(
    store_of: Callable[..., SQLStartStore], url: str
) -> None:
    """With the snapshots of another one, what was created meanwhile would not be seen."""
    with on_sqlite.connected(url) as connection:
        name = url.partition("?")[0].rpartition("/")[2]
        setting = "default_transaction_isolation = 'serializable'"
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET {setting}")
    await on_sqlite.test_one_of_many_claims_wins(store_of)


async def test_a_refused_password_leads_to_the_url(url: str, postgres_of_module: Any) -> None:
    """The driver reports it as it reports a server that is away."""
    rules = postgres_of_module.data / "pg_hba.conf"
    rules.write_text(f"local all somebody scram-sha-256\n{rules.read_text()}")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE ROLE somebody LOGIN PASSWORD 'right'")
        connection.execute("SELECT pg_reload_conf()")

    async with SQLStartStore(url.replace("tester@", "somebody:wrong@")) as store:
        with pytest.raises(StoreUnavailable, match="Check the user and the password in its URL"):
            await store.find("order", patience=0.2)


async def test_reading_does_not_create_a_database(postgres_of_module: Any, sim: Simulator) -> None:
    """A mistake in its name is not a database without batches. Adding to a batch creates one."""
    url = postgres_of_module.url.replace("/batches", "/mistyped")
    batch = Batch("nightly", database_url=url, session=Session(sim.api_key, base_url=sim.base_url))
    for read in (batch_names(url), batch.status()):
        with pytest.raises(ConfigurationError, match='"mistyped" does not exist'):
            await read
    await batch.add([])
    assert await batch_names(url) == ["nightly"]
