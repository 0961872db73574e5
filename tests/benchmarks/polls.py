"""Compare the cost of a poll with aiohttp, httpx and the vendor's SDK; fail on a missed target.

Usage: python tests/benchmarks/polls.py [--instructions] [--rounds N] [--speed PYTHON]
           [--vendor PYTHON]

Run it with a Python that has this package and httpx installed. The Python of `--speed` has this
package with msgspec, and that of `--vendor` has the vendor's SDK. With `--instructions`, valgrind
counts what the processor executes: unlike its time, that does not depend on what else the machine
does. It is slow, so only those contenders run that have targets.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from contender import CONNECTIONS

HERE = Path(__file__).parent
LONGEST_RUN = 600.0
ROUNDS = 5
BARE = "bare aiohttp"
CLIENT_CORE, SERVER_CORE = 1, 0
# For all contenders. By default the allocator asks the kernel for new pages for allocations of
# about 100 KB and more, the size of some bodies here, which makes the cost of a poll erratic.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "268435456", "MALLOC_TRIM_THRESHOLD_": "268435456"}


class Body(NamedTuple):
    """A body with `nodes` values of `size` bytes each, and how often a run polls it."""

    name: str
    nodes: int
    size: int
    polls: int


class Contender(NamedTuple):
    """A client to measure; its targets are CPU per poll ÷ that of bare aiohttp, for each body."""

    name: str
    program: str
    python: str
    targets: tuple[float, float, float] | None = None


BODIES = (
    Body("10 nodes of 100 B", 10, 100, 5_000),
    Body("50 nodes of 2 KB", 50, 2_000, 2_000),
    Body("200 nodes of 20 KB", 200, 20_000, 400),
)
# The vendor's CPU per poll ÷ ours, for the smallest body.
LEAST_VENDOR = 50.0
# The vendor's SDK makes a TLS context and a connection for each poll, so it is given fewer.
SLOW_POLLS = 100

Measured = dict[str, float]
Columns = dict[str, Callable[[Measured], str]]
TIME: Columns = {
    "polls/s": lambda it: f"{it['rate']:,.0f}",
    "CPU per poll": lambda it: f"{it['cpu'] * 1e6:,.0f} µs",
    "peak memory": lambda it: f"{it['peak'] / 2**20:.0f} MiB",
}
INSTRUCTIONS: Columns = {"instructions per poll": lambda it: f"{it['cpu']:,.0f}"}


@contextmanager
def server(status: int, body: Body) -> Iterator[str]:
    """Run the server on its own core, and return its base URL."""
    command = [sys.executable, str(HERE / "server.py"), *map(str, (status, body.nodes, body.size))]
    with subprocess.Popen(
        pinned(SERVER_CORE, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        assert process.stdin is not None
        process.stdin.close()


def pinned(core: int, command: list[str]) -> list[str]:
    """Return a command that runs `command` on one core."""
    return ["taskset", "--cpu-list", str(core), *command]


def run(contender: Contender, body: Body, polls: int, *wrapper: str) -> tuple[str, str]:
    """Run a contender in its own process, and return its standard output and error."""
    program = contender.program
    # A watch continues while the answer is 202; the vendor's SDK accepts only 200.
    with server(202 if program == "unchanged" else 200, body) as base_url:
        command = [*wrapper, contender.python, str(HERE / "contender.py"), program, base_url]
        finished = subprocess.run(
            pinned(CLIENT_CORE, [*command, str(polls)]),
            capture_output=True,
            text=True,
            env=os.environ | MALLOC | {"PYTHONHASHSEED": "0"},
            timeout=LONGEST_RUN,
            check=True,
        )
    return finished.stdout, finished.stderr


def measure(contender: Contender, body: Body) -> Measured:
    """Return what one run measured."""
    is_slow = contender.program == "vendor"
    output, _ = run(contender, body, min(body.polls, SLOW_POLLS) if is_slow else body.polls)
    measured: Measured = json.loads(output)
    return measured


def count_instructions(contender: Contender, body: Body) -> Measured:
    """Return the instructions per poll: those of a longer run that a shorter one does not have."""
    valgrind = (
        "valgrind",
        "--tool=cachegrind",
        "--cache-sim=no",
        "--cachegrind-out-file=/dev/null",
    )
    polls = max(body.polls // 10 // CONNECTIONS, 1) * CONNECTIONS
    counts = []
    for each in (polls, 2 * polls):
        _, errors = run(contender, body, each, *valgrind)
        count = re.search(r"I\s+refs:\s+([\d,]+)", errors)
        assert count is not None, errors
        counts.append(int(count[1].replace(",", "")))
    return {"cpu": (counts[1] - counts[0]) / polls}


Results = dict[str, Measured]


def ratios(contenders: list[Contender], body: Body, measure: Callable[..., Measured]) -> Results:
    """Return what each contender needs, also ÷ what bare aiohttp needs."""
    results = {contender.name: measure(contender, body) for contender in contenders}
    for measured in results.values():
        measured["ratio"] = measured["cpu"] / results[BARE]["cpu"]
    return results


def medians(contenders: list[Contender], body: Body, rounds: int) -> Results:
    """Return the medians over rounds for each contender, also of the ratios within each round."""
    runs = [ratios(contenders, body, measure) for _ in range(rounds)]
    return {
        name: {key: statistics.median(run[name][key] for run in runs) for key in measured}
        for name, measured in runs[0].items()
    }


def table(
    contenders: list[Contender],
    results_for: Callable[[list[Contender], Body], Results],
    columns: Columns,
) -> tuple[list[str], list[str]]:
    """Return the lines of the tables, and of each missed target."""
    lines, misses = [], []
    for number, body in enumerate(BODIES):
        results = results_for(contenders, body)
        lines += [
            "",
            f"| {body.name} | {' | '.join(columns)} | ÷ bare aiohttp | target |",
            "|---" * (len(columns) + 3) + "|",
        ]
        for contender in contenders:
            measured = results[contender.name]
            most = contender.targets[number] if contender.targets else None
            cells = [contender.name, *(show(measured) for show in columns.values())]
            target = f"≤ {most:.2f}" if most else ""
            lines.append(f"| {' | '.join(cells)} | {measured['ratio']:.2f} | {target} |")
            if most is not None and measured["ratio"] > most:
                misses.append(
                    f"{contender.name}, {body.name}: {measured['ratio']:.2f} > {most:.2f}"
                )
        if number == 0 and "vendor" in results:
            ratio = results["vendor"]["cpu"] / results["ours"]["cpu"]
            lines += ["", f"The vendor's SDK takes {ratio:.0f} times the CPU of ours."]
            if ratio < LEAST_VENDOR:
                misses.append(f"vendor ÷ ours: {ratio:.0f} < {LEAST_VENDOR:.0f}")
    return lines, misses


def main() -> int:
    """Print the tables, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--instructions", action="store_true", help="count them, with valgrind")
    parser.add_argument("--speed", metavar="PYTHON", help="a Python with this package and msgspec")
    parser.add_argument("--vendor", metavar="PYTHON", help="a Python with the vendor's SDK")
    given = parser.parse_args()
    own = sys.executable
    contenders = [
        Contender(BARE, "bare", own),
        Contender("ours", "ours", own, (1.50, 1.40, 1.10)),
        Contender("ours, unchanged", "unchanged", own, (1.15, 0.50, 0.35)),
    ]
    if given.speed:
        contenders.insert(2, Contender("ours, `speed`", "ours", given.speed, (1.45, 0.90, 0.50)))
    if given.instructions:
        what = "instructions counted by valgrind"
        count = partial(ratios, measure=count_instructions)
        lines, misses = table(contenders, count, INSTRUCTIONS)
    else:
        what = f"medians of {given.rounds} rounds"
        contenders.append(Contender("httpx", "httpx", own))
        if given.vendor:
            contenders.append(Contender("vendor", "vendor", given.vendor))
        lines, misses = table(contenders, partial(medians, rounds=given.rounds), TIME)
    sys.stdout.write(
        f"Python {platform.python_version()}, {what}, "
        + " ".join(f"{name}={value}" for name, value in MALLOC.items())
        + "\n"
        + "\n".join([*lines, "", *(f"missed: {miss}" for miss in misses)])
        + "\n"
    )
    return bool(misses)


if __name__ == "__main__":
    sys.exit(main())
