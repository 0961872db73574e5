"""Compare one stream of a hundred runs with a hundred streams of one, in uvicorn.

Usage: python benchmarks/streams.py [--rounds N] [--seconds SECONDS]

Each figure is the median of the rounds, each of which has a new process. It fails if a target is
missed. It needs the extra `fastapi` and uvicorn, and takes two and a half minutes. `--rounds 1`
takes one.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from needs import need

need(extras="fastapi", packages="uvicorn")
import aiohttp

RUNS = range(1001, 1101)
# Twenty nodes, one of which changes with every poll.
SERVER = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import server
answers = [server.answer(server.outputs(20, 100, variant)) for variant in range(97)]
asyncio.run(server.serve(answers, awake=False))
"""
# Targets, of one stream: the CPU that opening it adds, compared with what a hundred add; its memory
# and polls, compared with what the app needs to follow the runs without any stream.
MOST_OPENING_CPU = 0.6
MOST_MEMORY = 1.05
MOST_POLLS = 1.01
LONGEST_LAG = 0.1  # seconds, of the event loop; the first polls alone may take longer

APP = """
import asyncio, resource, sys, time
from contextlib import asynccontextmanager
import uvicorn
from fastapi import FastAPI
from promptlayer_exec import Polled, PollPolicy, Session
from promptlayer_exec.fastapi import create_router

polls, lag = 0, 0.0

def count(event):
    global polls
    polls += isinstance(event, Polled)

session = Session("key", base_url=sys.argv[1], poll=PollPolicy.fixed(2.0), rate=None, push=False,
                  observers=[count])

@asynccontextmanager
async def lifespan(app):
    async with session:
        yield

app = FastAPI(lifespan=lifespan)
tasks = []

async def allow():
    pass

async def measure():
    global lag
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.005)
        lag = max(lag, time.perf_counter() - began - 0.005)

async def follow_all():
    async for _ in session.stream_all(range(1001, 1101)):
        pass

@app.get("/stats")
async def stats(follow: bool = False):
    global polls, lag
    if not tasks:
        tasks.append(asyncio.create_task(measure()))
    if follow:
        tasks.append(asyncio.create_task(follow_all()))
    with open("/proc/self/statm") as file:
        memory = int(file.read().split()[1]) * resource.getpagesize()
    result = {"cpu": time.process_time(), "polls": polls, "lag": lag, "memory": memory}
    lag = 0.0
    return result

app.include_router(create_router(session, authorize=allow))
uvicorn.run(app, port=0, access_log=False)
"""


class Figures(NamedTuple):
    """What one process needed.

    Attributes:
        opening_cpu: seconds of CPU until each run had an event.
        opening_lag: the longest that the event loop was busy meanwhile, in seconds.
        opening: seconds until each run had an event.
        cpu: the part of a CPU that it needed afterwards.
        lag: as `opening_lag`, afterwards.
        polls: how many there were afterwards.
        memory: bytes at the end.
    """

    opening_cpu: float
    opening_lag: float
    opening: float
    cpu: float
    lag: float
    polls: float
    memory: float

    def __str__(self) -> str:
        """Return three cells of a table."""
        opening = f"{self.opening_cpu:.2f} s, {self.opening_lag * 1e3:.0f} ms, {self.opening:.2f} s"
        then = f"{self.cpu:.1%}, {self.lag * 1e3:.0f} ms, {self.polls:.0f}"
        return f"{opening} | {then} | {self.memory / 1e6:.0f} MB"


@contextmanager
def process(*arguments: str, pattern: str) -> Iterator[str]:
    """Run a Python program, and yield what the pattern finds in its output."""
    running = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.PIPE,  # whose end stops the server
        text=True,
    )
    assert running.stdout is not None
    try:
        for line in running.stdout:
            if found := re.search(pattern, line):
                yield found[1]
                break
    finally:
        running.kill()
        running.communicate()


async def measure(url: str, lists: list[list[int]], seconds: float) -> Figures:
    """Open a stream for each list, and measure the app at this URL."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def stats(query: str = "") -> dict[str, float]:
            async with http.get(f"{url}/stats{query}") as response:
                return dict(await response.json())

        opened = asyncio.Semaphore(0)

        async def read(ids: list[int]) -> None:
            query = "&".join(f"id={run}" for run in ids)
            address = f"/executions/events?{query}" if len(lists) == 1 else ""
            address = address or f"/executions/{ids[0]}/events"
            seen = set()
            async with http.get(url + address) as response:
                async for line in response.content:
                    if (found := re.search(rb'"execution_id":"(\d+)"', line)) is None:
                        continue
                    if found[1] not in seen:
                        seen.add(found[1])
                        opened.release()

        await stats()
        before, began = await stats("" if lists else "?follow=true"), time.perf_counter()
        reading = [asyncio.create_task(read(ids)) for ids in lists]
        if lists:
            for _ in RUNS:
                await opened.acquire()
        opening = time.perf_counter() - began
        if not lists:
            await asyncio.sleep(1.0)
        first = await stats()
        await asyncio.sleep(seconds)
        last = await stats()
        for task in reading:
            task.cancel()
    return Figures(
        opening_cpu=first["cpu"] - before["cpu"],
        opening_lag=first["lag"],
        opening=opening,
        cpu=(last["cpu"] - first["cpu"]) / seconds,
        lag=last["lag"],
        polls=last["polls"] - first["polls"],
        memory=last["memory"],
    )


def run(lists: list[list[int]], seconds: float) -> Figures:
    """Measure one new process."""
    with (
        process("-c", SERVER, pattern=r"(\d+)") as port,
        process(
            "-c", APP, f"http://127.0.0.1:{port}", pattern=r"running on (http://[\d.:]+)"
        ) as url,
    ):
        return asyncio.run(measure(url, lists, seconds))


def main() -> int:
    """Measure, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()

    shapes = {
        "no stream": [],
        "one stream of 100": [list(RUNS)],
        "100 streams of one": [[run] for run in RUNS],
    }
    medians = {}
    head = "| | opening: CPU, lag, all | then: CPU, lag, polls | memory |\n|---|---|---|---|"
    print(head)
    for name, lists in shapes.items():
        rounds = [run(lists, arguments.seconds) for _ in range(arguments.rounds)]
        it = medians[name] = Figures(*map(statistics.median, zip(*rounds, strict=True)))
        print(f"| {name} | {it} |", flush=True)

    none, one, many = medians.values()
    targets = {
        f"opening adds at most {MOST_OPENING_CPU:.0%} of the CPU that 100 streams add": (
            one.opening_cpu - none.opening_cpu
            <= MOST_OPENING_CPU * (many.opening_cpu - none.opening_cpu)
        ),
        "no more memory than without a stream": one.memory <= MOST_MEMORY * none.memory,
        "not one poll more": one.polls <= MOST_POLLS * none.polls,
        "nobody else waits for more than 100 ms, or than without a stream": (
            max(one.lag, one.opening_lag) <= max(LONGEST_LAG, none.opening_lag)
        ),
    }
    for target, is_met in targets.items():
        print(f"{'ok' if is_met else 'MISSED'}: {target}")
    return 0 if all(targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
