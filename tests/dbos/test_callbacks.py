"""Batches whose starts have callback URLs: unknown items are found again."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from promptlayer_exec import StartRequest
from promptlayer_exec.dbos import Batch, BatchStatus
from promptlayer_exec.dbos import _requeue as requeue
from promptlayer_exec.dbos._tables import callbacks
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.webhooks import Callbacks

SECRET = "of the workers"


class World:
    """A simulator, and a batch whose workers have callbacks."""

    def __init__(self, sim: Simulator, path: Path, batch_of: Callable[..., Batch]) -> None:
        self.sim = sim
        self.path = path
        self.url = "http://127.0.0.1:9/callbacks"
        self._batch_of = batch_of

    @property
    def callbacks(self) -> Callbacks:
        """Those of all workers and servers."""
        return Callbacks(self.url, secret=SECRET)

    def batch(self, **settings: Any) -> Batch:
        """Return the batch, as a worker or a server opens it."""
        return self._batch_of(callbacks=self.callbacks, outage=0.2, **settings)

    def tokens(self) -> list[str]:
        """Return the tokens in the callback URLs of all starts."""
        return [run.body["callback_url"].rpartition("/")[2] for run in self.sim.runs]

    def row(self) -> Any:
        """Return the attempt, the kind and the intent of the only item."""
        with closing(sqlite3.connect(self.path)) as database:
            return database.execute("SELECT attempt, kind, intent FROM promptlayer_item").fetchone()


@pytest.fixture
def world(sim: Simulator, batches_file: Path, batch_of: Callable[..., Batch]) -> World:
    """Return a simulator and a batch."""
    return World(sim, batches_file, batch_of)


async def lose_one(world: World) -> None:
    """Work on a batch of one item, whose start is lost."""
    await world.batch().add([StartRequest("echo", {"n": "done"}, key="a")])
    world.sim.inject(Fault.disconnect())
    assert (await world.batch().work()).unknown == 1


async def test_a_callback_makes_an_unknown_item_one_that_is_followed(world: World) -> None:
    """The token is stored with the intent; there is one POST in all, whoever calls back when."""
    await lose_one(world)
    (token,) = world.tokens()
    assert world.row() == (1, "unknown", token)
    server = world.batch(session=lambda: 1 / 0)  # a server that receives callbacks starts nothing
    assert await server.resolve(world.callbacks.new_token(), 77) is False
    assert await server.resolve(token, 1001) is True
    assert await server.resolve(token, 1001) is False  # repeats are harmless
    assert await world.batch().status() == BatchStatus(1, 0, 0, 0, 0, 1)
    assert await world.batch().work() == BatchStatus(0, 0, 1, 0, 0, 1)
    (outcome,) = [outcome async for outcome in world.batch().outcomes()]
    assert (outcome.execution_id, outcome.output, outcome.key) == (1001, "done", "a")
    assert outcome.started is not None
    assert [request.method for request in world.sim.requests].count("POST") == 1
    assert await server.resolve(token, 1001) is False


async def test_a_callback_that_comes_as_its_item_is_started_again_is_followed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be stored while another process has the lock that `retry` waits for."""
    await lose_one(world)
    (token,) = world.tokens()
    real = requeue.lock_batch
    batch = world.batch()

    def lock_late(connection: Any, name: str) -> None:
        real(connection, name)
        row = {"batch": name, "token": token, "execution_id": 1001}
        connection.execute(sa.insert(callbacks).values(row))

    monkeypatch.setattr(requeue, "lock_batch", lock_late)
    assert await batch.retry(unknown=True) == 1
    assert await batch.work() == BatchStatus(0, 0, 1, 0, 0, 1)
    (outcome,) = [outcome async for outcome in batch.outcomes()]
    assert outcome.execution_id == 1001
    assert len(world.sim.runs) == 1


async def test_the_server_in_docs_webhooks_resolves_items_of_a_batch(
    world: World, serve: Callable[[Any], Awaitable[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end: the simulator calls back, and the next worker follows the lost item."""
    page = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n([^`]*batch\.resolve[^`]*)^```$", page, re.MULTILINE)
    for name, value in {
        "APP_URL": "http://127.0.0.1:9",
        "APP_SECRET": SECRET,
        "PROMPTLAYER_EXEC_DB": f"sqlite:///{world.path}",
    }.items():
        monkeypatch.setenv(name, value)
    namespace: dict[str, Any] = {}
    exec(compile(code, "server.py", "exec"), namespace)
    world.url = f"{await serve(namespace['app'])}/callbacks"
    await world.batch().add(StartRequest("echo", key=key) for key in "abc")
    world.sim.inject(Fault.delay_post("callback", 0.1))
    world.sim.inject(Fault.disconnect())
    await world.batch().work()
    await world.sim.wait_for_posts(3)
    assert [post.status for post in world.sim.posts] == [204] * 3
    assert await world.batch().work() == BatchStatus(0, 0, 3, 0, 0, 3)
    assert len(world.sim.runs) == 3


async def test_a_callback_may_come_before_its_item_is_unknown(world: World) -> None:
    """As when a worker died: the same `work` that finds the item unknown then follows it."""
    await world.batch().add([StartRequest("echo", key="a")])
    world.sim.inject(Fault.stall())
    working = asyncio.create_task(world.batch(request_timeout=1.5).work())
    await world.sim.wait_for_requests(1)
    execution_id = world.sim.add_execution(Scenario([SimNode("A", "found", is_output_node=True)]))
    token = world.row()[2]
    assert world.callbacks.is_genuine(token)
    assert await world.batch().resolve(token, execution_id) is False
    assert (await working).succeeded == 1
    (outcome,) = [outcome async for outcome in world.batch().outcomes()]
    assert (outcome.output, outcome.execution_id) == ("found", execution_id)


async def test_the_run_of_a_callback_is_not_adopted_by_another_item(world: World) -> None:
    """It belongs to the item whose token it brought, although nobody follows it yet."""
    await lose_one(world)
    await world.batch().add([StartRequest("echo", key="b")])
    world.sim.inject(Fault.stall())
    asked = world.sim.request_count
    working = asyncio.create_task(world.batch(request_timeout=1.5).work())
    await world.sim.wait_for_requests(asked + 1)
    with closing(sqlite3.connect(world.path)) as database:
        query = "SELECT intent FROM promptlayer_item WHERE key = 'b'"
        (token,) = database.execute(query).fetchone()
    found = world.sim.add_execution(Scenario([SimNode("A", "found", is_output_node=True)]))
    assert await world.batch().resolve(token, found) is False

    with pytest.raises(ValueError, match=f"execution {found} is the run of item 'b'"):
        await world.batch().adopt("a", found)
    assert (await working).succeeded == 1


@pytest.mark.parametrize("is_retried", [False, True])
async def test_what_a_dead_worker_left_is_resolved_before_it_is_restarted(
    world: World, monkeypatch: pytest.MonkeyPatch, *, is_retried: bool
) -> None:
    """Even where the process died between the two steps; a restart would be paid for twice."""
    await lose_one(world)
    monkeypatch.setattr(requeue, "requeue", lambda *_, **__: 0)
    assert await world.batch().resolve(world.tokens()[0], 1001) is False
    monkeypatch.undo()
    if is_retried:
        assert await world.batch().retry(unknown=True) == 0
    assert (await world.batch().work()).succeeded == 1
    assert len(world.sim.runs) == 1


async def test_deleting_a_batch_deletes_its_callbacks(world: World) -> None:
    """Those that came for items that were never unknown, too."""
    await lose_one(world)
    await world.batch().resolve(world.callbacks.new_token(), 5)
    assert await world.batch().delete() == 1
    with closing(sqlite3.connect(world.path)) as database:
        assert database.execute("SELECT count(*) FROM promptlayer_callback").fetchone() == (0,)


async def test_an_item_with_a_callback_url_of_its_own_keeps_it(world: World) -> None:
    """Its start has no token that PromptLayer knows."""
    await world.batch().add([StartRequest("echo", key="a", callback_url="http://127.0.0.1:9/me")])
    assert (await world.batch().work()).succeeded == 1
    assert world.sim.runs[0].body["callback_url"] == "http://127.0.0.1:9/me"


async def test_unusable_arguments_are_named(world: World) -> None:
    """Before the database is opened."""
    world.path.unlink()
    with pytest.raises(TypeError, match="token must be a str, got None"):
        await world.batch().resolve(None, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="execution id must be between"):
        await world.batch().resolve("x", 0)
    assert not world.path.exists()
