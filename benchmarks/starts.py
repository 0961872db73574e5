"""Measure what a key adds to a start, on SQLite and PostgreSQL, and fail if a target is missed.

PostgreSQL is also measured behind a proxy that adds 10 ms to each round trip. What a start with a
key adds there depends on the disk, so it is compared with commits that write next to nothing.

Usage: python benchmarks/starts.py [STARTS]

It needs the extra `dbos` and PostgreSQL, and takes about a minute. With 10 starts, it takes
twenty seconds.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count

from needs import need

need(extras="dbos", debian="postgresql")
import psycopg
from network import PORT, PROXY, postgres, program

from promptlayer_exec import Session
from promptlayer_exec.starts import SQLStartStore

SIMULATOR = """
import sys
from promptlayer_exec.simulator import Scenario, Simulator

with Simulator(log_requests=False) as sim:
    sim.add_workflow("job", Scenario([]))
    print(sim.base_url, sim.api_key, flush=True)
    sys.stdin.read()
"""
DELAY = 10.0  # ms, of a round trip
MOST_ON_SQLITE = 10.0  # ms
MOST_BEYOND_COMMITS = 4.0  # ms
AT_ONCE, MOST_AT_ONCE = 200, 1.0  # starts, seconds
RATE, SECONDS, MOST_BEHIND = 100, 5, 0.25  # starts per second, seconds, seconds

numbers = count()


async def timed(work: Awaitable[object]) -> float:
    """Return how long something takes, in ms."""
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1000


async def start(session: Session, key: str | None) -> None:
    """Start a run."""
    await session.start("job", {"topic": "otters"}, key=key)


def new_key() -> str:
    """Return a key that no other start has."""
    return f"key {next(numbers)}"


def ms(milliseconds: float) -> str:
    """Return a time as text, such as 2.8 ms or 106 ms."""
    return f"{milliseconds:.{1 if milliseconds < 10 else 0}f} ms"


class Measured:
    """What was measured on one database; times in ms, unless their names say otherwise."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.plain = self.keyed = self.attached = self.behind = self.slow = self.at_once = 0.0

    @property
    def added(self) -> float:
        """What a key adds to a start."""
        return self.keyed - self.plain

    def row(self, target: str) -> str:
        """Return a line of the table."""
        return (
            f"| {self.name} | {ms(self.plain)} | {ms(self.keyed)} | {ms(self.attached)}"
            f" | {self.at_once:.1f} s | {ms(self.added)} | {target}"
            f" | {self.behind:.2f} s, {ms(self.slow)} |"
        )


async def measure(name: str, session: Session, starts: int) -> Measured:
    """Measure starts in an open session."""
    measured = Measured(name)
    for _ in range(5):  # connect, and create the table
        await start(session, new_key())

    plain, keyed, attached = [], [], []
    for _ in range(starts):
        key = new_key()
        plain.append(await timed(start(session, None)))
        keyed.append(await timed(start(session, key)))
        attached.append(await timed(start(session, key)))
    measured.plain, measured.keyed = statistics.median(plain), statistics.median(keyed)
    measured.attached = statistics.median(attached)

    many = asyncio.gather(*(start(session, new_key()) for _ in range(AT_ONCE)))
    measured.at_once = await timed(many) / 1000
    late, measured.slow = await steadily(session)
    measured.behind = max(late - measured.keyed / 1000, 0.0)
    return measured


async def steadily(session: Session) -> tuple[float, float]:
    """Start runs at a steady rate; return how late the last one ends in s, and the p95 in ms."""
    began = time.perf_counter()
    running = []
    for number in range(RATE * SECONDS):
        await asyncio.sleep(began + number / RATE - time.perf_counter())
        running.append(asyncio.create_task(timed(start(session, new_key()))))
    times = await asyncio.gather(*running)
    late = time.perf_counter() - began - SECONDS
    return late, statistics.quantiles(times, n=20)[-1]


def commits(url: str, number: int) -> float:
    """Return what two durable commits of a transaction take that writes next to nothing, in ms."""
    times = []
    with psycopg.connect(url, autocommit=True) as connection:
        for _ in range(number):
            began = time.perf_counter()
            for _ in range(2):
                connection.execute("SELECT pg_logical_emit_message(true, 'bench', '')")
            times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


@contextmanager
def behind_a_proxy(path: str) -> Iterator[str]:
    """Run a proxy that adds a delay to each round trip, and yield its port."""
    with program(PROXY, path, DELAY / 1000) as (port,):
        yield port


def main() -> int:
    """Print the table, and return 1 if a target is missed."""
    starts = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    with program(SIMULATOR) as (base_url, key):

        async def on(name: str, url: str) -> Measured:
            store = SQLStartStore(url)
            # Only starts: no look at the definition, and no limit to the rate.
            settings = {"rate": None, "push": False, "check_inputs": False}
            async with Session(key, base_url=base_url, starts=store, **settings) as session:
                return await measure(name, session, starts)

        return report(starts, lambda name, url: asyncio.run(on(name, url)))


def report(starts: int, on: Callable[[str, str], Measured]) -> int:
    """Measure on each database, and print a line; return 1 if a target is missed."""
    steady = f"{RATE} per second for {SECONDS} s: behind, p95"
    print(f"medians of {starts} starts\n")
    print(
        "| database | without a key | with a key | repeated, with the same key"
        f" | {AT_ONCE} in parallel, with keys | a key adds | target | {steady} |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        sqlite = on("SQLite", f"sqlite:///{directory}/starts.sqlite")
    print(sqlite.row(f"≤ {ms(MOST_ON_SQLITE)}"), flush=True)
    with postgres() as server:
        floor = commits(server.url, starts)
        most = floor + MOST_BEYOND_COMMITS
        direct = on("PostgreSQL on the same machine", server.url)
        print(direct.row(f"≤ {ms(most)}"), flush=True)
        with behind_a_proxy(f"{server.directory}/.s.PGSQL.{PORT}") as port:
            far = on(
                f"PostgreSQL, {DELAY:g} ms away", f"postgresql://tester@127.0.0.1:{port}/batches"
            )
    print(far.row(""))
    print(f"\ntwo empty commits on PostgreSQL take {ms(floor)}")

    misses = [f"{sqlite.added:.2f} ms added on SQLite"] * (sqlite.added > MOST_ON_SQLITE)
    misses += [f"{direct.added:.2f} ms added on PostgreSQL"] * (direct.added > most)
    for measured in (sqlite, direct, far):
        if measured.at_once > MOST_AT_ONCE:
            misses.append(f"{measured.name}: {AT_ONCE} at once in {measured.at_once:.2f} s")
        if measured.behind > MOST_BEHIND:
            misses.append(f"{measured.name}: {measured.behind:.2f} s behind")
    for miss in misses:
        print(f"missed: {miss}")
    return bool(misses)


if __name__ == "__main__":
    sys.exit(main())
