"""Poll with one client over 50 connections, and print what that cost as JSON.

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


async def poll_repeatedly(open_: Open, base_url: str, polls: int) -> dict[str, float]:
    """Measure that many polls in all, made by all connections at once after they are open."""
    async with open_(base_url) as poll:

        async def repeat(times: int) -> None:
            for _ in range(times):
                await poll()

        await asyncio.gather(*(repeat(2) for _ in range(CONNECTIONS)))
        each = max(polls // CONNECTIONS, 1)
        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(repeat(each) for _ in range(CONNECTIONS)))
        cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
    return per_poll(each * CONNECTIONS, cpu, seconds)


async def unchanged(base_url: str, polls: int) -> dict[str, float]:
    """Measure that many polls, without delay, of 50 watched executions that never change."""
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
        began, cpu = time.perf_counter(), time.process_time()
        await reached.wait()
        cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
        measured = per_poll(count - before, cpu, seconds)
        for wait in waits:
            assert not wait.done()
            wait.cancel()
        await asyncio.wait(waits)
    return measured


def per_poll(polls: int, cpu: float, seconds: float) -> dict[str, float]:
    """Return polls per second, CPU seconds per poll, and the peak memory in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rate": polls / seconds, "cpu": cpu / polls, "peak": peak}


CONTENDERS: dict[str, Open] = {"bare": bare, "ours": ours, "httpx": httpx, "vendor": vendor}


def main(name: str, base_url: str, polls: str) -> None:
    """Measure one client, and print the result."""
    if name == "unchanged":
        measured = asyncio.run(unchanged(base_url, int(polls)))
    else:
        measured = asyncio.run(poll_repeatedly(CONTENDERS[name], base_url, int(polls)))
    sys.stdout.write(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
