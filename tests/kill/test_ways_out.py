"""A gateway that fails while orders come in: afterwards each order has exactly one run."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import AsyncExitStack, aclosing
from http import HTTPStatus
from itertools import count
from typing import Any

from aiohttp import web

from promptlayer_exec import Session, StartUnknown
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.starts import SQLStartStore

DONE = Scenario([SimNode("Report", "done", is_output_node=True)])
KEY = "promptlayer_exec.key"
# By hand: PROMPTLAYER_EXEC_OUTAGE=120 with 200 orders.
OUTAGE = float(os.environ.get("PROMPTLAYER_EXEC_OUTAGE", "0"))


def break_gateway(sim: Simulator) -> None:
    """Respond with 503 to each start. Every second one reaches the server all the same."""
    numbers = count()

    async def fail(_: Any, answer: Any) -> web.StreamResponse:
        if next(numbers) % 2:
            answer()
        return web.Response(status=HTTPStatus.SERVICE_UNAVAILABLE)

    sim.clear_faults()
    sim.inject(Fault(fail, times=None), path="/run")


async def place(session: Session, order: str) -> bool:
    """Start the run of an order, and return whether it is known."""
    try:
        await session.start("report", {"order": order}, key=order)
    except StartUnknown:
        return False
    return True


async def place_all(sim: Simulator, url: str, orders: list[str]) -> list[bool]:
    """Let each order come to both of two workers, with databases of their own connections."""
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(
                Session(sim.api_key, base_url=sim.base_url, starts=SQLStartStore(url))
            )
            for _ in range(2)
        ]

        async def come(number: int, order: str) -> list[bool]:
            await asyncio.sleep(OUTAGE * number / len(orders))
            return [await place(workers[(number + twice) % 2], order) for twice in range(2)]

        known = await asyncio.gather(*(come(number, order) for number, order in enumerate(orders)))
    return [all(of_order) for of_order in known]


def found_on_the_dashboard(sim: Simulator, key: str) -> list[int]:
    """Return the ids of the runs with the metadata that the texts tell to search for."""
    return [run.execution_id for run in sim.runs if run.body["metadata"][KEY] == key]


async def assert_each_has_one_run(sim: Simulator, url: str, orders: list[str]) -> None:
    """Repeat all orders, and count the runs by the server's log."""
    sim.clear_faults()
    assert all(await place_all(sim, url, orders))
    assert Counter(run.body["metadata"][KEY] for run in sim.runs) == dict.fromkeys(orders, 1)


async def test_a_program_brings_each_order_to_one_run(
    sim: Simulator, postgres_of_module: Any
) -> None:
    """It adopts what ran, and forgets what did not."""
    url = postgres_of_module.url.replace("/batches", "/postgres")
    sim.add_workflow("report", DONE)
    orders = [f"order {number}" for number in range(200)]
    break_gateway(sim)
    assert not any(await place_all(sim, url, orders))
    assert len(sim.runs) == 100

    settled: Counter[str] = Counter()
    async with SQLStartStore(url) as store:
        async with aclosing(store.unknown()) as records:
            unknown = [record async for record in records]
        assert [record.key for record in unknown] == sorted(orders)
        for record in unknown:
            found = found_on_the_dashboard(sim, record.key)
            if found:
                settled["adopted"] += await store.adopt(record.key, found[0])
            else:
                settled["forgotten"] += await store.forget(record.key, only_unknown=True)
    assert settled == {"adopted": 100, "forgotten": 100}
    await assert_each_has_one_run(sim, url, orders)


async def test_a_terminal_brings_each_order_to_one_run(
    sim: Simulator, postgres_of_module: Any
) -> None:
    """By the commands that the list prints for each key, and the one below it."""
    url = postgres_of_module.url.replace("/batches", "/template1")
    sim.add_workflow("report", DONE)
    orders = [f"line {number}" for number in range(4)]
    environment = {
        **os.environ,
        "PROMPTLAYER_API_KEY": sim.api_key,
        "PROMPTLAYER_BASE_URL": sim.base_url,
        "PROMPTLAYER_EXEC_DB": url,
    }

    async def command(line: str) -> str:
        program, _, rest = line.partition(" ")
        assert program == "promptlayer-exec"
        process = await asyncio.create_subprocess_shell(
            f"{sys.executable} -m promptlayer_exec {rest}",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        written, _ = await process.communicate()
        assert process.returncode == 0
        return written.decode()

    break_gateway(sim)
    await place_all(sim, url, orders)
    listed = await command("promptlayer-exec starts list --unknown --json")
    records = [json.loads(line) for line in listed.splitlines()]
    assert sorted(record["key"] for record in records) == orders
    sim.clear_faults()
    for record in records:
        (name,) = record["metadata"].values()
        found = found_on_the_dashboard(sim, name)
        if found:
            await command(record["command"].replace(" ID", f" {found[0]}"))
        else:
            await command(f"promptlayer-exec starts forget '{name}' --yes")
    assert await command("promptlayer-exec starts list --unknown") == ""
    await assert_each_has_one_run(sim, url, orders)
