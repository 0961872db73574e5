"""Compare the cost of a poll with aiohttp, httpx and the vendor's SDK; fail on a missed target.

Usage: python benchmarks/polls.py [--instructions] [--rounds N] [--speed PYTHON]
           [--vendor PYTHON]

It needs httpx and Linux's `taskset`, and takes ten minutes. The Python of `--speed` has this
package with msgspec, and that of `--vendor` has the vendor's SDK. `--rounds 1` takes three
minutes.

A processor that is shared changes its speed from one second to the next. So each contender runs
beside bare aiohttp, on the same core at the same time, and the ratios are the medians of what they
needed there. With `--instructions`, valgrind counts what the processor executes, which does not
depend on its speed at all. It is slow, so only those contenders run that have targets. Each table
appears as soon as it is measured.
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
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from needs import need, need_in

HERE = Path(__file__).parent
LONGEST_RUN = 600.0
SECONDS = 3.0
ROUNDS = 4
CLIENT_CORE, SERVER_CORE = 1, 0
# For all contenders. By default the allocator asks the kernel for new pages for allocations of
# about 100 KB and more, the size of some bodies here, which makes the cost of a poll erratic.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "268435456", "MALLOC_TRIM_THRESHOLD_": "268435456"}


class Body(NamedTuple):
    """A body with `nodes` values of `size` bytes each; how many polls of it valgrind counts."""

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
    variants: int = 1  # of the body; they differ in one node


BODIES = (
    Body("10 nodes of 100 B", 10, 100, 500),
    Body("50 nodes of 2 KB", 50, 2_000, 200),
    Body("200 nodes of 20 KB", 200, 20_000, 50),
)
# A prime number, so that successive polls of one execution get different bodies.
VARIANTS = 7
# The vendor's CPU per poll ÷ ours, for the smallest body.
LEAST_VENDOR = 50.0

Measured = dict[str, float]
Columns = dict[str, Callable[[Measured], str]]
TIME: Columns = {
    "CPU per poll": lambda it: f"{it['cpu'] * 1e6:,.0f} µs",
    "peak memory": lambda it: f"{it['peak'] / 2**20:.0f} MiB",
}
INSTRUCTIONS: Columns = {"instructions per poll": lambda it: f"{it['cpu']:,.0f}"}


@contextmanager
def server(status: int, body: Body, variants: int) -> Iterator[str]:
    """Run the server on its own core, and return its base URL."""
    arguments = map(str, (status, body.nodes, body.size, variants))
    command = [sys.executable, str(HERE / "server.py"), *arguments]
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


@contextmanager
def running(
    contender: Contender, body: Body, *limit: str, wrapper: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Run a contender in its own process, with its own server."""
    program = contender.program
    # A watch continues while the answer is 202; the vendor's SDK accepts only 200.
    status = 202 if program == "watched" else 200
    with server(status, body, contender.variants) as base_url:
        command = [*wrapper, contender.python, str(HERE / "contender.py"), program, base_url]
        with subprocess.Popen(
            pinned(CLIENT_CORE, [*command, *limit]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | MALLOC | {"PYTHONHASHSEED": "0"},
        ) as process:
            timer = threading.Timer(LONGEST_RUN, process.kill)
            timer.start()
            try:
                yield process
            except BaseException:
                process.kill()
                raise
            finally:
                timer.cancel()


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Return the standard output and error of a process that ends by itself."""
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors)
    return output, errors


def measure(contenders: Sequence[Contender], body: Body) -> list[Measured]:
    """Return what each of some contenders needs beside the others."""
    with ExitStack() as stack:
        limit = ("--seconds", str(SECONDS * len(contenders)))
        processes = [stack.enter_context(running(it, body, *limit)) for it in contenders]
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"a contender did not begin: {finish(process)[1]}")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(finish(process)[0]) for process in processes]


def count_instructions(contender: Contender, body: Body) -> Measured:
    """Return the instructions per poll: those of a longer run that a shorter one does not have."""
    valgrind = (
        "valgrind",
        "--tool=cachegrind",
        "--cache-sim=no",
        "--cachegrind-out-file=/dev/null",
    )
    # A watch does not end after so many polls: more of them, because the last ones are cancelled.
    least = 5 * body.polls if contender.program == "watched" else body.polls
    # If this package was just installed, Python compiles it, which the shorter run must not do.
    with running(contender, body, "--polls", str(least)) as process:
        finish(process)

    executed, counted = [], []
    for polls in (least, 2 * least):
        with running(contender, body, "--polls", str(polls), wrapper=valgrind) as process:
            output, errors = finish(process)
        count = re.search(r"I\s+refs:\s+([\d,]+)", errors)
        assert count is not None, errors
        executed.append(int(count[1].replace(",", "")))
        counted.append(json.loads(output)["counted"])
    return {"cpu": (executed[1] - executed[0]) / (counted[1] - counted[0])}


Results = dict[str, Measured]


def side_by_side(contenders: list[Contender], body: Body, rounds: int) -> Results:
    """Return the medians over rounds for each contender, each beside the first."""
    first, *others = contenders
    runs: dict[str, list[Measured]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in others:
            base, measured = measure([first, contender], body)
            runs[first.name].append(base | {"ratio": 1.0})
            runs[contender.name].append(measured | {"ratio": measured["cpu"] / base["cpu"]})
    return {
        name: {key: statistics.median(run[key] for run in of_one) for key in of_one[0]}
        for name, of_one in runs.items()
    }


def instructions(contenders: list[Contender], body: Body) -> Results:
    """Return the instructions per poll of each contender."""
    results = {contender.name: count_instructions(contender, body) for contender in contenders}
    for measured in results.values():
        measured["ratio"] = measured["cpu"] / results[contenders[0].name]["cpu"]
    return results


def table(
    contenders: list[Contender],
    results_for: Callable[[list[Contender], Body], Results],
    columns: Columns,
) -> list[str]:
    """Print the tables, and return a line for each missed target."""
    misses = []
    for number, body in enumerate(BODIES):
        results = results_for(contenders, body)
        lines = [
            "",
            f"| {body.name} | {' | '.join(columns)} | ÷ bare aiohttp | target |",
            "|---" * (len(columns) + 3) + "|",
        ]
        for contender in contenders:
            measured = results[contender.name]
            ratio = measured["ratio"]
            most = contender.targets[number] if contender.targets else None
            cells = [contender.name, *(show(measured) for show in columns.values())]
            target = f"≤ {most:.2f}" if most else ""
            lines.append(f"| {' | '.join(cells)} | {ratio:.2f} | {target} |")
            if most is not None and ratio > most:
                misses.append(f"{contender.name}, {body.name}: {ratio:.3f} > {most:.2f}")
        if number == 0 and "vendor" in results:
            ratio = results["vendor"]["ratio"] / results["ours"]["ratio"]
            lines += ["", f"The vendor's SDK takes {ratio:.0f} times the CPU of ours."]
            if ratio < LEAST_VENDOR:
                misses.append(f"vendor ÷ ours: {ratio:.0f} < {LEAST_VENDOR:.0f}")
        print("\n".join(lines), flush=True)
    return misses


def main() -> int:
    """Print the tables, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--instructions", action="store_true", help="count them, with valgrind")
    parser.add_argument("--speed", metavar="PYTHON", help="a Python with this package and msgspec")
    parser.add_argument("--vendor", metavar="PYTHON", help="a Python with the vendor's SDK")
    given = parser.parse_args()
    need(
        packages="" if given.instructions else "httpx",
        debian="util-linux valgrind" if given.instructions else "util-linux",
    )
    need_in(given.speed, "promptlayer_exec msgspec")
    need_in(given.vendor, "promptlayer")
    own = sys.executable
    contenders = [
        Contender("bare aiohttp", "bare", own),
        Contender("ours", "ours", own, (2.00, 1.75, 1.20)),
        Contender("ours, unchanged", "watched", own, (1.15, 0.50, 0.35)),
        Contender("ours, one node changed", "watched", own, variants=VARIANTS),
    ]
    if given.speed:
        contenders.insert(2, Contender("ours, `speed`", "ours", given.speed, (1.80, 1.25, 0.60)))
    what = f"medians of {given.rounds} rounds"
    if given.instructions:
        what = "instructions counted by valgrind"
    settings = " ".join(f"{name}={value}" for name, value in MALLOC.items())
    print(f"Python {platform.python_version()}, {what}, {settings}", flush=True)

    if given.instructions:
        misses = table(contenders, instructions, INSTRUCTIONS)
    else:
        contenders.append(Contender("httpx", "httpx", own))
        if given.vendor:
            contenders.append(Contender("vendor", "vendor", given.vendor))
        misses = table(contenders, partial(side_by_side, rounds=given.rounds), TIME)
    for miss in misses:
        print(f"missed: {miss}")
    return bool(misses)


if __name__ == "__main__":
    sys.exit(main())
