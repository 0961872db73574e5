"""Measure what durability costs: a batch on SQLite, compared with `as_completed`.

Usage: python benchmarks/durable.py [ITEMS]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from network import program

from promptlayer_exec import PollPolicy, Session, StartRequest
from promptlayer_exec.dbos import Batch

SIMULATOR = """
import sys
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

def scenario(inputs):
    return Scenario([SimNode("Answer", "x" * 200, 1.0, is_output_node=True)])

with Simulator(log_requests=False) as sim:
    sim.add_workflow("job", scenario)
    print(sim.base_url, sim.api_key, flush=True)
    sys.stdin.read()
"""
IN_FLIGHT = 200


def resident() -> float:
    """Return the resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


class Meter:
    """Measures CPU, time, and memory after a quarter of the items and after all of them.

    Args:
        items: how many items there are.
    """

    def __init__(self, items: int) -> None:
        self._items = items
        self._done = 0
        self._memory: list[float] = []
        self._cpu, self._began = time.process_time(), time.monotonic()

    def count(self) -> None:
        """Count an outcome."""
        self._done += 1
        if self._done in (self._items // 4, self._items):
            self._memory.append(resident())

    def row(self, name: str) -> str:
        """Return a line of the table."""
        cpu = (time.process_time() - self._cpu) / self._items * 1000
        seconds = time.monotonic() - self._began
        first, last = self._memory
        return (
            f"| {name} | {cpu:.1f} ms | {self._items / seconds:.0f} | {first:.0f} MiB"
            f" | {last:.0f} MiB |"
        )


def requests(items: int) -> list[StartRequest]:
    """Return the requests of the items."""
    return [StartRequest("job", {"n": n}, key=f"item {n}") for n in range(items)]


async def fan_out(session: Callable[[], Session], items: int) -> str:
    """Run the items with `as_completed`, and return a line of the table."""
    meter = Meter(items)
    async with session() as opened:
        async for outcome in opened.as_completed(requests(items), max_in_flight=IN_FLIGHT):
            assert outcome.ok
            meter.count()
    return meter.row("`as_completed`")


async def durable(session: Callable[[], Session], items: int) -> str:
    """Run the items as a batch, and return a line of the table."""
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{directory}/batches.sqlite"
        batch = Batch("bench", database_url=url, session=session, max_in_flight=IN_FLIGHT)
        meter = Meter(items)
        await batch.add(requests(items))
        working = asyncio.create_task(batch.work())
        async for outcome in batch.outcomes():
            assert outcome.succeeded
            meter.count()
        await working
        return meter.row("batch, SQLite")


def main() -> None:
    """Print the table."""
    items = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    say = partial(print, flush=True)
    say(f"{items:,} executions of a second each, {IN_FLIGHT} in flight")
    say("| | CPU per item | items per second | after a quarter | at the end |")
    say("|---|---|---|---|---|")
    with program(SIMULATOR) as (base_url, key):

        def session() -> Session:
            return Session(key, base_url=base_url, poll=PollPolicy.fixed(1.0), rate=None)

        for work in (fan_out, durable):
            say(asyncio.run(work(session, items)))


if __name__ == "__main__":
    main()
