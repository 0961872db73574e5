"""One contender, in a process of its own: poll with 50 connections, and print what it took.

Usage: contender.py NAME BASE_URL POLLS
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

CONNECTIONS = 50
KEY = "benchmark"

Look = Callable[[], Awaitable[object]]
Open = Callable[[str], AbstractAsyncContextManager[Look]]
PATH = "/workflow-version-execution-results"
QUERY = {"workflow_version_execution_id": "7", "return_all_outputs": "true"}


@asynccontextmanager
async def floor(base_url: str) -> AsyncIterator[Look]:
    """Poll with aiohttp, and nothing around it."""
    import aiohttp

    async with aiohttp.ClientSession(base_url, headers={"X-API-KEY": KEY}) as http:

        async def look() -> object:
            async with http.get(PATH, params=QUERY) as answer:
                return json.loads(await answer.read())

        yield look


@asynccontextmanager
async def ours(base_url: str) -> AsyncIterator[Look]:
    """Poll with a session of ours."""
    from promptlayer_exec import Session

    connections = 2 * CONNECTIONS  # a quarter is for starts
    async with Session(KEY, base_url=base_url, max_connections=connections, rate=None) as session:
        yield lambda: session.get_results(7, return_all_outputs=True)


@asynccontextmanager
async def httpx(base_url: str) -> AsyncIterator[Look]:
    """Poll with one shared client of httpx."""
    from httpx import AsyncClient, Limits

    limits = Limits(max_connections=CONNECTIONS)
    headers = {"X-API-KEY": KEY}
    async with AsyncClient(base_url=base_url, headers=headers, limits=limits) as http:

        async def look() -> object:
            return (await http.get(PATH, params=QUERY)).json()

        yield look


@asynccontextmanager
async def vendor(base_url: str) -> AsyncIterator[Look]:
    """Poll as the vendor's SDK does."""
    from promptlayer.utils import _get_final_output

    yield lambda: _get_final_output(base_url, 7, True, headers={"X-API-KEY": KEY})


async def take_turns(
    open_: Callable[[str], AbstractAsyncContextManager[Look]], url: str, polls: int
) -> dict[str, float]:
    """Poll so many times, over all connections at once, after each was used."""
    async with open_(url) as look:

        async def repeat(times: int) -> None:
            for _ in range(times):
                await look()

        await asyncio.gather(*(repeat(2) for _ in range(CONNECTIONS)))
        each = max(polls // CONNECTIONS, 1)
        began, used = time.perf_counter(), time.process_time()
        await asyncio.gather(*(repeat(each) for _ in range(CONNECTIONS)))
        used, took = time.process_time() - used, time.perf_counter() - began
    return measured(each * CONNECTIONS, used, took)


async def unchanged(base_url: str, polls: int) -> dict[str, float]:
    """Watch 50 executions that never change, without delay, for so many polls."""
    from promptlayer_exec import Event, Polled, PollPolicy, Session

    count, goal = 0, 2 * CONNECTIONS
    reached = asyncio.Event()

    def observe(event: Event) -> None:
        nonlocal count
        if isinstance(event, Polled):
            count += 1
            if count == goal:
                reached.set()

    async with Session(
        KEY,
        base_url=base_url,
        max_connections=2 * CONNECTIONS,
        rate=None,
        poll=PollPolicy.fixed(1e-9),
        observers=[observe],
    ) as session:
        waits = [asyncio.create_task(session.execution(i + 1).wait()) for i in range(CONNECTIONS)]
        await reached.wait()
        goal, before = count + polls, count
        reached.clear()
        began, used = time.perf_counter(), time.process_time()
        await reached.wait()
        used, took = time.process_time() - used, time.perf_counter() - began
        found = measured(count - before, used, took)
        for wait in waits:
            assert not wait.done()
            wait.cancel()
        await asyncio.wait(waits)
    return found


def measured(polls: int, used: float, took: float) -> dict[str, float]:
    """Return what is to be printed."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rate": polls / took, "cpu": used / polls, "peak": peak, "busy": used / took}


CONTENDERS: dict[str, Open] = {"floor": floor, "ours": ours, "httpx": httpx, "vendor": vendor}


def main(name: str, base_url: str, polls: str) -> None:
    """Measure, and print it as JSON."""
    if name == "unchanged":
        found = asyncio.run(unchanged(base_url, int(polls)))
    else:
        found = asyncio.run(take_turns(CONTENDERS[name], base_url, int(polls)))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
