"""Measure what following thousands of executions costs, and fail if a target is missed.

Usage: python benchmarks [--rate POLLS_PER_SECOND] [--runs N]

It needs nothing but this package, and takes six minutes. `--runs 1` takes two.
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
from pathlib import Path
from typing import NamedTuple

FOLLOWER = Path(__file__).with_name("follower.py")
KINDS = ("as_completed", "wait", "snapshots", "bare")
COUNTS = FEW, MANY = 1_000, 10_000
RUNS = 3
LONGEST_RUN = 100.0

MOST_MEMORY = 10 * 1024
MOST_GROWTH = 1.2
MOST_LATENESS = 0.1
# Lateness on a core that is busier than this says nothing about the client.
MOST_BUSY = 0.7

Measured = dict[str, float]


class Row(NamedTuple):
    """A line of the table: its name, a cell for each count, the target, and what missed it."""

    name: str
    cells: list[str]
    target: str = ""
    misses: tuple[str, ...] = ()


def measure(kind: str, count: int, rate: float) -> Measured:
    """Return what one run measured, in its own process."""
    command = [sys.executable, str(FOLLOWER), kind, str(count), str(rate)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, timeout=LONGEST_RUN, check=True)
    measured: Measured = json.loads(finished.stdout)
    return measured


def medians(rate: float, rounds: int) -> dict[tuple[str, int], Measured]:
    """Return the medians over all runs, also of the ratios within each run."""
    runs = []
    for number in range(rounds):
        run = {}
        for count in COUNTS:
            for kind in KINDS:
                sys.stderr.write(f"run {number + 1} of {rounds}: {count:,}, {kind}\n")
                run[kind, count] = measure(kind, count, rate)
        for count in COUNTS:
            ours, bare = run["as_completed", count], run["bare", count]
            snapshot = run["snapshots", count]["memory"]
            ours["beyond"] = ours["memory"] - snapshot
            ours["ratio"] = ours["cpu"] / bare["cpu"]
            run["wait", count]["beyond"] = run["wait", count]["memory"] - snapshot
        for kind in ("as_completed", "bare"):
            run[kind, MANY]["growth"] = run[kind, MANY]["cpu"] / run[kind, FEW]["cpu"]
        runs.append(run)
    return {
        key: {name: statistics.median(run[key][name] for run in runs) for name in measured}
        for key, measured in runs[0].items()
    }


def rows(measured: dict[tuple[str, int], Measured]) -> Iterator[Row]:
    """Yield the lines of the table."""
    ours = [measured["as_completed", count] for count in COUNTS]
    bare = [measured["bare", count] for count in COUNTS]
    growth = ours[1]["growth"]
    grown = (f"{growth:.2f} times the CPU per poll at {MANY:,}",) if growth > MOST_GROWTH else ()
    for kind in ("as_completed", "wait"):
        beyond = [measured[kind, count]["beyond"] for count in COUNTS]
        yield Row(
            f"memory per execution, `{kind}`",
            [kib(size) for size in beyond],
            f"≤ {kib(MOST_MEMORY)}",
            tuple(f"{kib(b)} per execution, `{kind}`" for b in beyond if b > MOST_MEMORY),
        )
    snapshots = [measured["snapshots", count]["memory"] for count in COUNTS]
    yield Row("its snapshot's data, not counted above", [kib(size) for size in snapshots])
    yield Row("CPU per poll", [f"{m['cpu'] * 1e6:.0f} µs" for m in ours])
    yield Row("… against 1,000", ["1.00", f"{growth:.2f}"], f"≤ {MOST_GROWTH:.2f}", grown)
    yield Row("… against aiohttp alone", [f"{m['ratio']:.2f}" for m in ours])
    yield Row(
        "lateness of polls, p99",
        [ms(m["late"]) for m in ours],
        f"< {ms(MOST_LATENESS)}",
        tuple(f"polls {ms(m['late'])} late" for m in ours if m["late"] >= MOST_LATENESS),
    )
    yield Row("… aiohttp alone", [ms(m["late"]) for m in bare])
    yield Row("longest garbage collection meanwhile", [ms(m["collection"]) for m in ours])
    yield Row("… and what a full one takes", [ms(m["full"]) for m in ours])
    yield Row(
        "how busy the core is",
        [f"{m['busy']:.0%}" for m in ours],
        f"< {MOST_BUSY:.0%}",
        tuple(f"{m['busy']:.0%} busy: try --rate" for m in ours if m["busy"] >= MOST_BUSY),
    )


def kib(size: float) -> str:
    """Return a size in bytes as text in KiB."""
    return f"{size / 1024:.1f} KiB"


def ms(seconds: float) -> str:
    """Return a time in seconds as text in milliseconds."""
    return f"{seconds * 1e3:.0f} ms"


def main() -> int:
    """Print the table, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=1000.0, help="polls per second in all")
    parser.add_argument("--runs", type=int, default=RUNS, help="show the medians of so many")
    given = parser.parse_args()
    rate = given.rate
    table = list(rows(medians(rate, given.runs)))
    machine = f"Python {platform.python_version()}, {os.cpu_count()} cores"
    lines = [
        f"{machine}, {rate:g} polls per second, medians of {given.runs} runs",
        "",
        f"| | {FEW:,} executions | {MANY:,} executions | target |",
        "|---|---|---|---|",
        *(f"| {row.name} | {' | '.join(row.cells)} | {row.target} |" for row in table),
    ]
    misses = [miss for row in table for miss in row.misses]
    if misses:
        lines += ["", *(f"missed: {miss}" for miss in misses)]
    sys.stdout.write("\n".join(lines) + "\n")
    return bool(misses)


if __name__ == "__main__":
    sys.exit(main())
