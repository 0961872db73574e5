"""Measure what durability costs: batches on SQLite and PostgreSQL, compared with `as_completed`.

Usage: python benchmarks/durable.py [--items N] [--seconds SECONDS] [--in-flight N]

It needs the extra `dbos` and PostgreSQL, and takes about four minutes. `--items 200` takes ten
seconds; only its memory says nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from needs import need

need(extras="dbos", debian="postgresql")
from network import postgres, program

from promptlayer_exec import PollPolicy, Session, StartRequest
from promptlayer_exec.dbos import Batch

SIMULATOR = """
import sys
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

def scenario(inputs):
    seconds = float(sys.argv[1])
    return Scenario([SimNode("Answer", "x" * 200, seconds, is_output_node=True)])

with Simulator(log_requests=False) as sim:
    sim.add_workflow("job", scenario)
    print(sim.base_url, sim.api_key, flush=True)
    sys.stdin.read()
"""


def resident() -> float:
    """Return the resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


def switches() -> int:
    """Return how often a thread of this process gave way to another one."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_nvcsw + usage.ru_nivcsw


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
        self._switches = switches()

    def count(self) -> None:
        """Count an outcome."""
        self._done += 1
        if self._done in (self._items // 4, self._items):
            self._memory.append(resident())

    def row(self, name: str) -> str:
        """Return a line of the table."""
        cpu = (time.process_time() - self._cpu) / self._items * 1000
        seconds = time.monotonic() - self._began
        switched = (switches() - self._switches) / self._items
        first, last = self._memory
        return (
            f"| {name} | {cpu:.1f} ms | {self._items / seconds:.0f}"
            f" | {first:.0f} MiB | {last:.0f} MiB | {switched:.0f} |"
        )


def requests(items: int) -> list[StartRequest]:
    """Return the requests of the items."""
    return [StartRequest("job", {"n": n}, key=f"item {n}") for n in range(items)]


async def fan_out(session: Callable[[], Session], items: int, in_flight: int) -> str:
    """Run the items with `as_completed`, and return a line of the table."""
    meter = Meter(items)
    async with session() as opened:
        async for outcome in opened.as_completed(requests(items), max_in_flight=in_flight):
            assert outcome.ok
            meter.count()
    return meter.row("`as_completed`")


async def durable(
    session: Callable[[], Session], items: int, in_flight: int, *, url: str, name: str
) -> str:
    """Run the items as a batch, and return a line of the table."""
    batch = Batch("bench", database_url=url, session=session, max_in_flight=in_flight)
    meter = Meter(items)
    await batch.add(requests(items))
    working = asyncio.create_task(batch.work())
    async for outcome in batch.outcomes():
        assert outcome.succeeded
        meter.count()
    await working
    return meter.row(f"batch, {name}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=10_000, help="how many there are")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each runs")
    parser.add_argument("--in-flight", type=int, default=200, help="how many run in parallel")
    options = parser.parse_args()
    items, in_flight = options.items, options.in_flight
    say = partial(print, flush=True)
    load = f"{items:,} executions of {options.seconds:g} s each, {in_flight} in flight"
    say(
        f"| {load} | CPU per item | items per second | memory after a quarter | after all"
        " | switches of threads per item |"
    )
    say("|---|---|---|---|---|---|")
    with (
        program(SIMULATOR, options.seconds) as (base_url, key),
        tempfile.TemporaryDirectory() as directory,
        postgres() as server,
    ):

        def session() -> Session:
            return Session(key, base_url=base_url, poll=PollPolicy.fixed(1.0), rate=None)

        say(asyncio.run(fan_out(session, items, in_flight)))
        file = f"sqlite:///{directory}/batches.sqlite"
        for name, url in (("SQLite", file), ("PostgreSQL", server.url)):
            say(asyncio.run(durable(session, items, in_flight, url=url, name=name)))


if __name__ == "__main__":
    main()
