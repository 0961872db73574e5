"""Start runs and wait for their results with one client, and print what that took as JSON.

Usage: latency_client.py NAME BASE_URL KEY RUNS IN_FLIGHT

It starts one run to warm up, prints a line, and waits for one; with `cold` after the name it does
not warm up. The result of each run is the time at which it was complete.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

# Each contender yields the time at which each run was complete, or None for one that failed, as
# soon as it knows it.
Contender = Callable[[str, str, range, int], AsyncIterator[float | None]]

WORKFLOW = "benchmark"
LONGEST_WAIT = 120


async def vendor(
    base_url: str, key: str, runs: range, in_flight: int
) -> AsyncIterator[float | None]:
    """Run them with the vendor's SDK, which is one coroutine for each run."""
    from promptlayer import AsyncPromptLayer

    client = AsyncPromptLayer(api_key=key, base_url=base_url)
    slots = asyncio.Semaphore(in_flight)
    ended: asyncio.Queue[float | None] = asyncio.Queue()

    async def run(n: int) -> None:
        completed = None
        async with slots:
            try:
                completed = await client.run_workflow(WORKFLOW, {"n": n}, timeout=LONGEST_WAIT)
            except Exception as error:  # noqa: BLE001 - it is counted
                sys.stderr.write(f"run {n}: {error!r:.200}\n")
            ended.put_nowait(completed)

    tasks = [asyncio.create_task(run(n)) for n in runs]
    for _ in tasks:
        yield await ended.get()
    await asyncio.gather(*tasks)


def ours(name: str) -> Contender:
    """Return a contender that runs them with one session."""
    from promptlayer_exec import Session, StartRequest

    sessions: list[Session] = []
    settings: dict[str, Any] = {
        "default": {},
        "polling": {"push": False},
        "unlimited": {"push": False, "rate": None},
    }[name]

    async def run(
        base_url: str, key: str, runs: range, in_flight: int
    ) -> AsyncIterator[float | None]:
        if not sessions:
            sessions.append(Session(key, base_url=base_url, **settings))
        requests = (StartRequest(WORKFLOW, {"n": n}) for n in runs)
        outcomes = sessions[0].as_completed(requests, max_in_flight=in_flight)
        async with aclosing(outcomes):
            async for outcome in outcomes:
                yield outcome.output
        if len(runs) > 1:
            await sessions[0].aclose()

    return run


async def measure(
    contender: Contender, base_url: str, key: str, runs: int, in_flight: int, *, cold: bool
) -> dict[str, object]:
    """Return the lags of the runs in seconds, and what all of them took."""
    if not cold:
        async for completed in contender(base_url, key, range(1), 1):
            assert completed is not None
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    lags, failed = [], 0
    began, cpu = time.monotonic(), time.process_time()
    async for completed in contender(base_url, key, range(1, runs + 1), in_flight):
        if completed is None:
            failed += 1
        else:
            lags.append(time.monotonic() - completed)
    return {
        "lags": lags,
        "failed": failed,
        "wall": time.monotonic() - began,
        "cpu": (time.process_time() - cpu) / runs,
    }


def main() -> None:
    """Measure one contender."""
    name, base_url, key, runs, in_flight, *cold = sys.argv[1:]
    contender = vendor if name == "vendor" else ours(name)
    measured = measure(contender, base_url, key, int(runs), int(in_flight), cold=bool(cold))
    sys.stdout.write(json.dumps(asyncio.run(measured)) + "\n")


if __name__ == "__main__":
    main()
