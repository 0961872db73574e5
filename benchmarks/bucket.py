"""Start and follow 2,000 executions against a token bucket, and fail if a target is missed.

Usage: python benchmarks/bucket.py

It needs nothing but this package, and takes half a minute.
"""

from __future__ import annotations

import asyncio
import sys
import time

from promptlayer_exec import Event, Session, StartRequest, Throttled
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

EXECUTIONS = 2_000
PER_SECOND = 200.0
BURST = 20
LEAST_USED = 0.75  # of a run of some 20 s, with the time until the rate is found
MOST_REFUSED = 0.02


async def run() -> tuple[float, float]:
    """Return the share of the bucket that was used, and of requests refused after one second."""
    scenario = Scenario([SimNode("Answer", 42, duration=0.3, is_output_node=True)])
    refused_at: list[float] = []

    def observe(event: Event) -> None:
        if isinstance(event, Throttled):
            refused_at.append(time.monotonic())

    with Simulator(log_requests=False) as sim:
        sim.add_workflow("answer", scenario)
        sim.rate_limit(PER_SECOND, burst=BURST)
        requests = (StartRequest("answer", {"n": n}) for n in range(EXECUTIONS))
        async with Session(
            sim.api_key, base_url=sim.base_url, rate=None, observers=[observe]
        ) as session:
            began = time.monotonic()
            outcomes = await session.collect(requests, max_in_flight=300)
            seconds = time.monotonic() - began
        if not all(outcome.output == 42 for outcome in outcomes):
            raise AssertionError("an execution has the wrong output")
        later = sum(at > began + 1.0 for at in refused_at)
        used = (sim.request_count - len(refused_at)) / (PER_SECOND * seconds)
        return used, later / sim.request_count


def main() -> int:
    """Print the table, and return 1 if a target is missed."""
    used, refused = asyncio.run(run())
    sys.stdout.write(
        "| | of the bucket used | refused after the first second |\n"
        "|---|---|---|\n"
        f"| measured | {used:.1%} | {refused:.2%} |\n"
        f"| target | ≥ {LEAST_USED:.0%} | ≤ {MOST_REFUSED:.0%} |\n"
    )
    return int(used < LEAST_USED or refused > MOST_REFUSED)


if __name__ == "__main__":
    sys.exit(main())
