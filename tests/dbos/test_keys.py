"""What a key stands for, and how items are added."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import sqlalchemy as sa

from promptlayer_exec import KeyConflict, StartRequest
from promptlayer_exec._database import threads
from promptlayer_exec._database.database import Database
from promptlayer_exec._database.location import check_url
from promptlayer_exec.dbos import Batch
from promptlayer_exec.dbos import _intents as intents
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.simulator import Simulator

REQUEST = StartRequest("echo", {"n": 1, "deep": {"x": 1}}, metadata={"job": "7"}, key="a")


DIFFERENT = [
    (attrs.evolve(REQUEST, workflow=7), "workflow"),
    (attrs.evolve(REQUEST, inputs={"n": True, "deep": {"x": 1}}), "inputs.n"),
    (attrs.evolve(REQUEST, inputs={"n": 1, "deep": {"y": 1}}), "inputs.deep.x, inputs.deep.y"),
    (attrs.evolve(REQUEST, inputs={"n": 1, "deep": None}), "inputs.deep"),
    (attrs.evolve(REQUEST, label="prod"), "label"),
    (attrs.evolve(REQUEST, version=2), "version"),
    (attrs.evolve(REQUEST, metadata={}), "metadata.job"),
]


@pytest.mark.parametrize(("request_", "names"), DIFFERENT, ids=[names for _, names in DIFFERENT])
async def test_a_key_stands_for_one_request(
    batch: Batch, request_: StartRequest, names: str
) -> None:
    """Another request is refused with what differs, and nothing of the call is added."""
    assert await batch.add([REQUEST]) == 1
    items = [StartRequest("echo", key=f"{n}") for n in range(600)]
    with pytest.raises(KeyConflict, match="nothing was added") as caught:
        await batch.add([*items, request_])
    assert caught.value.key == "a"
    assert str(caught.value) == (
        f"the key 'a' of batch 'nightly' belongs to another request, which differs in {names},"
        " so nothing was added. Use another key, or another batch."
    )
    assert (await batch.status()).total == 1


@pytest.mark.parametrize("between", [0, 1000], ids=["next to each other", "far apart"])
async def test_two_requests_of_one_call_with_one_key_are_refused(
    batch: Batch, between: int
) -> None:
    """Nothing of the call is added, also to a batch that is new."""
    others = [StartRequest("echo", key=f"{n}") for n in range(between)]
    with pytest.raises(ValueError, match=r"another request, which differs in label"):
        await batch.add([REQUEST, *others, attrs.evolve(REQUEST, label="prod")])
    assert (await batch.status()).total == 0
    assert await batch.add([REQUEST, *others, REQUEST]) == 1 + between


async def test_many_differences_are_counted(batch: Batch) -> None:
    """Five of them are named."""
    await batch.add([StartRequest("echo", {f"n{n}": 1 for n in range(9)}, key="a")])
    with pytest.raises(ValueError, match=r"inputs\.n0, .*, inputs\.n4 and 4 more, so"):
        await batch.add([StartRequest("echo", {f"n{n}": 2 for n in range(9)}, key="a")])


async def test_where_to_report_is_not_what_to_run(batch: Batch) -> None:
    """The same request with another callback URL, or its inputs in another order, is known."""
    assert await batch.add([REQUEST]) == 1
    same = attrs.evolve(
        REQUEST, inputs={"deep": {"x": 1}, "n": 1}, callback_url="https://example.com/7"
    )
    assert await batch.add([same, same]) == 0


async def test_what_comes_asynchronously_is_added_as_it_comes(batch: Batch) -> None:
    """A refused request ends the call; the items of earlier chunks are added."""

    async def requests() -> AsyncIterator[StartRequest]:
        for n in range(1000):
            yield StartRequest("echo", {"n": n}, key=f"{n}")
        yield StartRequest("echo", {"n": 0}, key="0", label="prod")

    with pytest.raises(ValueError, match="differs in label"):
        await batch.add(requests())
    assert (await batch.status()).total == 1000


async def test_each_start_carries_its_batch_and_key(batch: Batch, sim: Simulator) -> None:
    """In its metadata, beside the user's own, so that the run can be found in PromptLayer."""
    await batch.add([REQUEST])
    await batch.work()
    (start,) = [request for request in sim.requests if request.method == "POST"]
    assert json.loads(start.body)["metadata"] == {
        "job": "7",
        "promptlayer_exec.batch": "nightly",
        "promptlayer_exec.key": "a",
    }


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
async def test_a_clock_that_jumps_stalls_nothing(
    batch: Batch, url: str, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """The next slot of the shared rate is a time on the database's clock."""
    await batch.add([REQUEST])
    now = 1_000_000.0
    monkeypatch.setattr(Database, "now", property(lambda _: sa.literal(now)))
    with closing(Store(check_url(url))) as store:
        waits = [await asyncio.to_thread(store.reserve, "nightly", 10, 10.0) for _ in range(2)]
        now += jump
        waits += [await asyncio.to_thread(store.reserve, "nightly", 10, 10.0) for _ in range(2)]
    assert waits == pytest.approx([0.0, 1.0, 2.0, 3.0] if jump < 0 else [0.0, 1.0, 0.0, 1.0])


async def test_the_id_of_a_run_does_not_wait_for_others(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rows gather for a moment, but the run is paid for: a killed worker would lose it."""
    waits: dict[str, list[float]] = {"write": [], "write_started": []}
    latest = threading.local()  # each group has its own thread

    def sleep(seconds: float) -> None:
        latest.wait = seconds

    def recorded(name: str) -> Callable[..., Any]:
        function = getattr(intents, name)

        def call(*arguments: Any) -> Any:
            waits[name].append(latest.wait)
            return function(*arguments)

        return call

    clock = SimpleNamespace(sleep=sleep, perf_counter=time.perf_counter)
    monkeypatch.setattr(threads, "time", clock)
    for name in waits:
        monkeypatch.setattr(intents, name, recorded(name))
    await batch.add([REQUEST])
    assert (await batch.work()).succeeded == 1
    assert waits["write"] == [0.02]
    assert waits["write_started"] == [0.0]
