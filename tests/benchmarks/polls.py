"""Measure what a poll costs beside aiohttp, httpx and the vendor's SDK; fail on a missed target.

Usage: python tests/benchmarks/polls.py [--rounds N] [--speed PYTHON] [--vendor PYTHON]

The first is run by a Python that has this package and httpx; the two others that are named have
this package with msgspec, and the vendor's SDK.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
LONGEST_RUN = 100.0
ROUNDS = 5
CLIENT_CORE, SERVER_CORE = 1, 0
# The same for all. Otherwise a body of 100 KB lies at the size from which the allocator asks the
# kernel for fresh pages each time, and the luck of the heap decides what a poll costs.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "268435456", "MALLOC_TRIM_THRESHOLD_": "268435456"}


class Body(NamedTuple):
    """What is polled, and how often in one run."""

    name: str
    nodes: int
    size: int
    polls: int


class Contender(NamedTuple):
    """Who polls, by which program and Python; the most CPU, of the floor's, for each body."""

    name: str
    program: str
    python: str
    targets: tuple[float, float, float] | None = None


BODIES = (
    Body("10 nodes of 100 B", 10, 100, 5_000),
    Body("50 nodes of 2 KB", 50, 2_000, 2_000),
    Body("200 nodes of 20 KB", 200, 20_000, 400),
)
LEAST_VENDOR = 40.0
# One that makes a TLS context and a connection for each poll would take minutes otherwise.
SLOW_POLLS = 100

Measured = dict[str, float]


@contextmanager
def server(status: int, body: Body) -> Iterator[str]:
    """Start the server on its core, and return its base URL."""
    command = [sys.executable, str(HERE / "server.py"), *map(str, (status, body.nodes, body.size))]
    with subprocess.Popen(
        pinned(SERVER_CORE, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        assert process.stdin is not None
        process.stdin.close()


def pinned(core: int, command: list[str]) -> list[str]:
    """Return the command that runs a command on one core."""
    return ["taskset", "--cpu-list", str(core), *command]


def measure(contender: Contender, body: Body) -> Measured:
    """Return what one run measured, in a process of its own."""
    program = contender.program
    polls = min(body.polls, SLOW_POLLS) if program == "vendor" else body.polls
    command = [contender.python, str(HERE / "contender.py"), program]
    # A watch goes on while the answer is 202; the vendor's SDK knows 200 alone.
    with server(202 if program == "unchanged" else 200, body) as base_url:
        finished = subprocess.run(
            pinned(CLIENT_CORE, [*command, base_url, str(polls)]),
            stdout=subprocess.PIPE,
            env=os.environ | MALLOC,
            timeout=LONGEST_RUN,
            check=True,
        )
    measured: Measured = json.loads(finished.stdout)
    return measured


def medians(contenders: list[Contender], body: Body, rounds: int) -> dict[str, Measured]:
    """Return each contender's medians over rounds; a ratio is taken within its round."""
    runs = []
    for _ in range(rounds):
        found = {contender.name: measure(contender, body) for contender in contenders}
        for measured in found.values():
            measured["ratio"] = measured["cpu"] / found["floor"]["cpu"]
        runs.append(found)
    return {
        name: {key: statistics.median(run[name][key] for run in runs) for key in measured}
        for name, measured in runs[0].items()
    }


def table(contenders: list[Contender], rounds: int) -> tuple[list[str], list[str]]:
    """Return the lines of the tables, and what misses its target."""
    lines, misses = [], []
    for place, body in enumerate(BODIES):
        found = medians(contenders, body, rounds)
        lines += [
            "",
            f"| {body.name} | polls/s | CPU per poll | of the floor | target | peak memory |",
            "|---|---|---|---|---|---|",
        ]
        for contender in contenders:
            measured = found[contender.name]
            most = contender.targets[place] if contender.targets else None
            lines.append(
                f"| {contender.name} | {measured['rate']:,.0f} | {measured['cpu'] * 1e6:,.0f} µs"
                f" | {measured['ratio']:.2f} | {f'≤ {most:.2f}' if most else ''}"
                f" | {measured['peak'] / 2**20:.0f} MiB |"
            )
            if most is not None and measured["ratio"] > most:
                misses.append(
                    f"{contender.name}, {body.name}: {measured['ratio']:.2f} > {most:.2f}"
                )
        if not place and "vendor" in found:
            times = found["vendor"]["cpu"] / found["ours"]["cpu"]
            lines += [
                "",
                f"The vendor's takes {times:.0f} times the CPU of ours, standard library.",
            ]
            if times < LEAST_VENDOR:
                misses.append(f"the vendor's takes only {times:.0f} times the CPU of ours")
    return lines, misses


def main() -> int:
    """Print the tables; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--speed", metavar="PYTHON", help="has this package with msgspec")
    parser.add_argument("--vendor", metavar="PYTHON", help="has the vendor's SDK")
    given = parser.parse_args()
    plain = sys.executable
    contenders = [
        Contender("floor", "floor", plain),
        Contender("ours", "ours", plain, (1.30, 1.25, 0.95)),
        Contender("ours, unchanged", "unchanged", plain, (0.95, 0.55, 0.45)),
        Contender("httpx", "httpx", plain),
    ]
    if given.speed:
        contenders.insert(2, Contender("ours, `speed`", "ours", given.speed, (1.15, 0.95, 0.70)))
    if given.vendor:
        contenders.append(Contender("vendor", "vendor", given.vendor))
    lines, misses = table(contenders, given.rounds)
    sys.stdout.write(
        f"Python {platform.python_version()}, medians of {given.rounds} rounds, "
        + " ".join(f"{name}={value}" for name, value in MALLOC.items())
        + "\n"
        + "\n".join([*lines, "", *(f"missed: {miss}" for miss in misses)])
        + "\n"
    )
    return bool(misses)


if __name__ == "__main__":
    sys.exit(main())
