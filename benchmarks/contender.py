"""Poll with one client over 50 connections, and print what that cost as JSON.

Usage: contender.py NAME BASE_URL --polls NUMBER
       contender.py NAME BASE_URL --seconds NUMBER

With a number of seconds, it prints `ready` when its connections are open, and measures that long
once it has read a line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

CONNECTIONS = 50
KEY = "benchmark"

Poll = Callable[[], Awaitable[object]]
Open = Callable[[str], AbstractAsyncContextManager[Poll]]
PATH = "/workflow-version-execution-results"
QUERY = {"workflow_version_execution_id": "7", "return_all_outputs": "true"}


@asynccontextmanager
async def bare(base_url: str) -> AsyncIterator[Poll]:
    """Poll with aiohttp alone."""
    import aiohttp

    async with aiohttp.ClientSession(base_url, headers={"X-API-KEY": KEY}) as http:

        async def poll() -> object:
            async with http.get(PATH, params=QUERY) as answer:
                return json.loads(await answer.read())

        yield poll


@asynccontextmanager
async def ours(base_url: str) -> AsyncIterator[Poll]:
    """Poll with a session of this package."""
    from promptlayer_exec import Session

    connections = 2 * CONNECTIONS  # a quarter of them are for starts only
    async with Session(KEY, base_url=base_url, max_connections=connections, rate=None) as session:
        yield lambda: session.get_results(7, return_all_outputs=True)


@asynccontextmanager
async def httpx(base_url: str) -> AsyncIterator[Poll]:
    """Poll with one shared httpx client."""
    from httpx import AsyncClient, Limits

    limits = Limits(max_connections=CONNECTIONS)
    headers = {"X-API-KEY": KEY}
    async with AsyncClient(base_url=base_url, headers=headers, limits=limits) as http:

        async def poll() -> object:
            return (await http.get(PATH, params=QUERY)).json()

        yield poll


@asynccontextmanager
async def vendor(base_url: str) -> AsyncIterator[Poll]:
    """Poll as the vendor's SDK does."""
    from promptlayer.utils import _get_final_output

    yield lambda: _get_final_output(base_url, 7, True, headers={"X-API-KEY": KEY})


class Meter:
    """Counts polls, and measures what those cost that come within the given limit."""

    def __init__(self, polls: int | None, seconds: float | None) -> None:
        self._polls = polls
        self._seconds = seconds
        self._begun = self._count = 0
        self._goal = 2 * CONNECTIONS
        self._reached = asyncio.Event()

    def begin(self) -> bool:
        """Return True if there is to be another poll; with a number of polls, there are as many."""
        self._begun += 1
        return self._polls is None or self._begun <= 2 * CONNECTIONS + self._polls

    def count(self) -> None:
        """Count a poll."""
        self._count += 1
        if self._count == self._goal:
            self._reached.set()

    @property
    def counted(self) -> int:
        """How many polls there were in all."""
        return self._count

    async def measure(self) -> dict[str, float]:
        """Return CPU seconds per poll, and the peak memory in bytes, of what others poll now."""
        await self._reached.wait()
        if self._polls is not None:
            self._goal = 2 * CONNECTIONS + self._polls
            self._reached.clear()
        else:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            await asyncio.to_thread(sys.stdin.readline)
        before, cpu = self._count, time.process_time()
        if self._seconds is None:
            await self._reached.wait()
        else:
            await asyncio.sleep(self._seconds)
        cpu, polls = time.process_time() - cpu, self._count - before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"cpu": cpu / polls, "peak": peak}


async def poll_repeatedly(open_: Open, base_url: str, meter: Meter) -> dict[str, float]:
    """Measure polls that are made by all connections at once, without delay."""
    async with open_(base_url) as poll, asyncio.TaskGroup() as tasks:

        async def repeat() -> None:
            while meter.begin():
                await poll()
                meter.count()

        pollers = [tasks.create_task(repeat()) for _ in range(CONNECTIONS)]
        measured = await meter.measure()
        for poller in pollers:
            poller.cancel()
    return measured


async def watched(base_url: str, meter: Meter) -> dict[str, float]:
    """Measure the polls, without delay, of 50 watched executions that never complete."""
    from promptlayer_exec import Event, Polled, PollPolicy, Session

    def observe(event: Event) -> None:
        if isinstance(event, Polled):
            meter.count()

    async with (
        Session(
            KEY,
            base_url=base_url,
            max_connections=2 * CONNECTIONS,
            rate=None,
            poll=PollPolicy.fixed(1e-9),
            observers=[observe],
        ) as session,
        asyncio.TaskGroup() as tasks,
    ):
        waits = [tasks.create_task(session.execution(i + 1).wait()) for i in range(CONNECTIONS)]
        measured = await meter.measure()
        for wait in waits:
            assert not wait.done()
            wait.cancel()
    return measured


CONTENDERS: dict[str, Open] = {"bare": bare, "ours": ours, "httpx": httpx, "vendor": vendor}


async def run(name: str, base_url: str, polls: int | None, seconds: float | None) -> None:
    """Measure one client, and print the result."""
    meter = Meter(polls, seconds)
    if name == "watched":
        measured = await watched(base_url, meter)
    else:
        measured = await poll_repeatedly(CONTENDERS[name], base_url, meter)
    sys.stdout.write(json.dumps(measured | {"counted": meter.counted}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*CONTENDERS, "watched"])
    parser.add_argument("base_url")
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument("--polls", type=int)
    limit.add_argument("--seconds", type=float)
    asyncio.run(run(**vars(parser.parse_args())))
