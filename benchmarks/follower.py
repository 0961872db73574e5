"""Follow many executions in one way, and print what that cost as JSON.

Usage: follower.py KIND COUNT RATE, where RATE is polls per second over all executions.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from promptlayer_exec import Event, Polled, PollPolicy, Session

SERVER = Path(__file__).with_name("server.py")
SMAPS = Path("/proc/self/smaps_rollup")
CONNECTIONS = 100
# CPU and lateness are measured over this many polls of each execution, and at least this many
# seconds: long enough to include the rare full garbage collections.
WINDOW_POLLS = 2
WINDOW = 6.0
BARE_WINDOW = 4.0
KEY = "benchmark"


def memory() -> int:
    """Collect garbage, and return the bytes of memory that no other process shares."""
    gc.collect()
    lines = SMAPS.read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


@contextmanager
def server() -> Iterator[str]:
    """Run the server, and return its base URL."""
    command = [sys.executable, str(SERVER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        assert process.stdin is not None
        process.stdin.close()


class Meter:
    """Records the number and lateness of polls, and the longest garbage collection."""

    def __init__(self) -> None:
        self.polls = 0
        self.lateness = array("d")
        self._goal = 0
        self._reached = asyncio.Event()
        self._collecting = 0.0
        self._longest = 0.0
        gc.callbacks.append(self._collection)

    def observe(self, event: Event) -> None:
        """Record a poll, where the event is one."""
        if isinstance(event, Polled):
            self.polled(event.lateness)

    def polled(self, lateness: float) -> None:
        """Record a poll that was `lateness` seconds late."""
        self.polls += 1
        self.lateness.append(lateness)
        if self.polls == self._goal:
            self._reached.set()

    async def reach(self, polls: int) -> None:
        """Wait until that many polls were recorded."""
        self._goal = polls
        await self._reached.wait()

    async def measure(self, seconds: float) -> dict[str, float]:
        """Return what the polls of the next `seconds` cost, and how late they were."""
        del self.lateness[:]
        self._longest = 0.0
        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.sleep(seconds)
        cpu, passed = time.process_time() - cpu, time.perf_counter() - began
        late = sorted(self.lateness)
        return {
            "polls": len(late),
            "cpu": cpu / len(late),
            "busy": cpu / passed,
            "late": late[int(0.99 * len(late))],
            "collection": self._longest,
        }

    def _collection(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._collecting = time.perf_counter()
        else:
            self._longest = max(self._longest, time.perf_counter() - self._collecting)


async def ids(count: int, rate: float) -> AsyncIterator[int]:
    """Yield `rate` execution ids per second, so that their polls are spread evenly."""
    began = time.perf_counter()
    for i in range(count):
        if (wait := began + i / rate - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        yield i + 1


async def warm_up(session: Session) -> int:
    """Open every connection, and load what is imported late; return the memory after that."""
    poll = session.get_results
    await asyncio.gather(*(poll(i + 1, return_all_outputs=True) for i in range(CONNECTIONS)))
    await asyncio.sleep(0)  # until gather's results are freed
    return memory()


def session(base_url: str, period: float, meter: Meter) -> Session:
    """Return a session that polls each execution every `period` seconds."""
    return Session(
        KEY,
        base_url=base_url,
        poll=PollPolicy.fixed(period),
        rate=None,
        max_connections=CONNECTIONS,
        observers=[meter.observe],
    )


async def completed(base_url: str, count: int, rate: float) -> dict[str, float]:
    """Measure CPU, lateness and memory of following with `as_completed`."""
    meter = Meter()
    async with session(base_url, count / rate, meter) as client:
        before = await warm_up(client)

        async def consume() -> None:
            outcomes = client.as_completed(ids(count, rate), max_in_flight=count)
            async with aclosing(outcomes):
                async for outcome in outcomes:
                    raise RuntimeError(f"nothing completes here: {outcome}")

        consumer = asyncio.create_task(consume())
        await meter.reach(count + int(rate / 2))
        measured = await meter.measure(max(WINDOW_POLLS * count / rate, WINDOW))
        began = time.perf_counter()
        gc.collect()
        measured["full"] = time.perf_counter() - began
        measured["memory"] = (memory() - before) / count
        assert not consumer.done()
        consumer.cancel()
        await asyncio.wait([consumer])
    return measured


async def waited(base_url: str, count: int, rate: float) -> dict[str, float]:
    """Measure the memory of following with `wait`, in one task for each execution."""
    meter = Meter()
    async with session(base_url, count / rate / 2, meter) as client:
        before = await warm_up(client)
        tasks = [asyncio.create_task(client.execution(i + 1).wait()) for i in range(count)]
        await meter.reach(2 * count)
        measured = {"memory": (memory() - before) / count}
        for task in tasks:
            assert not task.done()
            task.cancel()
        await asyncio.wait(tasks)
    return measured


async def snapshots(base_url: str, count: int, rate: float) -> dict[str, float]:
    """Measure the memory of one snapshot of each execution, without following any."""
    del rate
    async with session(base_url, 1.0, Meter()) as client:
        before = await warm_up(client)
        poll = client.get_results
        kept: list[Any] = []
        for i in range(0, count, CONNECTIONS):
            each = range(i, min(i + CONNECTIONS, count))
            kept += await asyncio.gather(*(poll(i + 1, return_all_outputs=True) for i in each))
        await asyncio.sleep(0)
        return {"memory": (memory() - before) / len(kept)}


async def bare(base_url: str, count: int, rate: float) -> dict[str, float]:
    """Measure the same with aiohttp alone: a task per execution sleeps, polls and decodes."""
    period = count / rate
    meter = Meter()
    url = f"{base_url}/workflow-version-execution-results"
    latest: dict[int, Any] = {}

    async def follow(http: aiohttp.ClientSession, execution_id: int) -> None:
        query = {"workflow_version_execution_id": str(execution_id), "return_all_outputs": "true"}
        due = time.monotonic()
        while True:
            lateness = time.monotonic() - due
            async with http.get(url, params=query, headers={"X-API-KEY": KEY}) as answer:
                latest[execution_id] = json.loads(await answer.read())
            meter.polled(lateness)
            due = time.monotonic() + period
            await asyncio.sleep(period)

    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector) as http, asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(follow(http, i)) async for i in ids(count, rate)]
        measured = await meter.measure(BARE_WINDOW)
        for task in started:
            task.cancel()
    return measured


KINDS: dict[str, Callable[[str, int, float], Any]] = {
    "as_completed": completed,
    "wait": waited,
    "snapshots": snapshots,
    "bare": bare,
}


def main(kind: str, count: str, rate: str) -> None:
    """Measure one kind, and print the result."""
    with server() as base_url:
        measured = asyncio.run(KINDS[kind](base_url, int(count), float(rate)))
    sys.stdout.write(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
