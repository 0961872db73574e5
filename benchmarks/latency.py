"""Compare how soon results arrive, by default, by polling and with the vendor's SDK.

Usage: python benchmarks/latency.py [--only TABLE] [--rounds N] [--vendor PYTHON]
           [--chart FILE.svg]

It needs two cores and Linux's `taskset`; `--chart` needs matplotlib, too. It fails if a target is
missed. The targets that compare with the vendor's SDK need `--vendor`, a Python that has it.

All tables take eleven minutes. `--only warm --rounds 1` takes one, and `--only single` two and a
half, because its longest run takes a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from needs import need, need_in

from promptlayer_exec.simulator import Scenario, SimNode, Simulator

CLIENT = Path(__file__).with_name("latency_client.py")
CLIENT_CORE, SERVER_CORE = 1, 0
LONGEST_RUN = 600.0
ROUNDS = 3
BUCKET = 100.0
# Targets.
MOST_BEHIND_VENDOR = 0.015
MOST_REQUESTS = 2.2
# The first runs of a session are polled once when the subscription stands.
MOST_REQUESTS_COLD = 3.5
# By the seconds of a single run, the first one of a session.
MOST_REQUESTS_SINGLE = {1.0: 7, 7.0: 8, 60.0: 18}
MOST_CPU_OF_VENDOR = 0.2
MOST_WALL_OF_POLLING = 0.75


class Load(NamedTuple):
    """How many runs there are, how many at once, and how long each takes, in seconds.

    Attributes:
        table: what `--only` calls it.
        name: what its table calls it.
    """

    table: str
    name: str
    runs: int
    in_flight: int
    shortest: float
    longest: float
    cold: bool = False
    bucket: bool = False
    rounds: int = 1

    @property
    def is_limited_by_the_rate(self) -> bool:
        """Whether the session's own rate, and not the server's limit, is what bounds it."""
        return self.in_flight > 100 and not self.bucket


def loads(rounds: int) -> tuple[Load, ...]:
    """Return the loads, the first of them the one of the chart."""
    return (
        Load("warm", "60 runs of 1 to 5 s, 20 in parallel", 60, 20, 1.0, 5.0, rounds=rounds),
        Load("cold", "60 runs of 1 to 5 s, 20 in parallel, cold", 60, 20, 1.0, 5.0, cold=True),
        *(
            Load("single", f"one run of {seconds:g} s", 1, 1, seconds, seconds, cold=True)
            for seconds in MOST_REQUESTS_SINGLE
        ),
        Load("many", "800 runs of 6 to 8 s, 400 in parallel", 800, 400, 6.0, 8.0),
        Load(
            "limited",
            "800 runs of 6 to 8 s, 400 in parallel, 429 beyond 100 requests/s",
            800,
            400,
            6.0,
            8.0,
            bucket=True,
        ),
    )


class Measured(NamedTuple):
    """What a contender took: seconds, requests and seconds of CPU per run, and seconds in all."""

    p50: float
    p95: float
    requests: float
    cpu: float
    wall: float
    failed: float


def median(rounds: list[Measured]) -> Measured:
    """Return the median of each figure."""
    return Measured(*map(statistics.median, zip(*rounds, strict=True)))


def scenario(load: Load, inputs: Mapping[str, Any]) -> Scenario:
    """Return a run of three nodes, whose output is the time at which it will be complete."""
    random = Random(inputs["n"])
    seconds = random.uniform(load.shortest, load.longest)
    parts = [random.uniform(0.5, 1.5) for _ in range(3)]
    plan, draft, answer = (seconds * part / sum(parts) for part in parts)
    return Scenario(
        [
            SimNode("plan", "a plan", plan),
            SimNode("draft", "a draft", draft, after=["plan"]),
            SimNode(
                "answer",
                time.monotonic() + seconds,
                answer,
                after=["draft"],
                is_output_node=True,
            ),
        ]
    )


def measure(name: str, python: str, load: Load) -> Measured:
    """Return what one contender took, in a process of its own on its own core."""
    with Simulator(log_requests=False) as sim:
        sim.add_workflow("benchmark", lambda inputs: scenario(load, inputs))
        if load.bucket:
            sim.rate_limit(BUCKET)
        command = ["taskset", "--cpu-list", str(CLIENT_CORE), python, str(CLIENT), name]
        command += [sim.base_url, sim.api_key, str(load.runs), str(load.in_flight)]
        with subprocess.Popen(
            [*command, *(["cold"] if load.cold else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the vendor's SDK writes a traceback for each failed run
            text=True,
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n"
            before = sim.request_count
            try:
                result, _ = client.communicate("go\n", timeout=LONGEST_RUN)
            except subprocess.TimeoutExpired:
                client.kill()
                raise
        requests = sim.request_count - before
    found = json.loads(result)
    lags = sorted(found["lags"])
    return Measured(
        statistics.median(lags),
        lags[int(len(lags) * 0.95)],
        requests / load.runs,
        found["cpu"],
        found["wall"],
        found["failed"],
    )


def table(load: Load, results: Mapping[str, Measured]) -> list[str]:
    """Return the lines of a load's table."""
    columns = (load.name, *COLUMNS)
    lines = ["", f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|"]
    for name, one in results.items():
        failed = f", {one.failed:.0f} runs failed" if one.failed else ""
        lines.append(
            f"| {NAMES[name]} | {one.p50 * 1e3:,.0f} ms | {one.p95 * 1e3:,.0f} ms"
            f" | {one.requests:.2f} | {one.cpu * 1e3:.1f} ms | {one.wall:.1f} s{failed} |"
        )
    return lines


COLUMNS = ("delay of the result, p50", "p95", "requests per run", "CPU per run", "in all")
NAMES = {
    "vendor": "PromptLayer's SDK",
    "polling": "ours, `push=False`",
    "unlimited": "ours, `push=False, rate=None`",
    "default": "ours",
}


def misses(load: Load, results: Mapping[str, Measured]) -> list[str]:
    """Return a line for each missed target."""
    ours, polling, vendor = results["default"], results["polling"], results.get("vendor")
    limits = []
    if load.runs == 1:
        limits.append(("requests", ours.requests, MOST_REQUESTS_SINGLE[load.longest]))
    elif load.cold:
        limits.append(("requests per run", ours.requests, MOST_REQUESTS_COLD))
    elif load.in_flight == 20:
        limits.append(("requests per run", ours.requests, MOST_REQUESTS))
        if vendor is not None:
            limits.append(("p50 behind the SDK, s", ours.p50 - vendor.p50, MOST_BEHIND_VENDOR))
            limits.append(("CPU ÷ the SDK's", ours.cpu / vendor.cpu, MOST_CPU_OF_VENDOR))
    elif load.bucket:
        limits.append(("wall time ÷ polling's", ours.wall / polling.wall, MOST_WALL_OF_POLLING))
    limits.append(("failed runs", ours.failed + polling.failed, 0.0))
    return [
        f"missed: {load.name}: {what}: {value:.3f} > {most}"
        for what, value, most in limits
        if value > most
    ]


def draw(file: str, results: Mapping[str, Measured]) -> None:
    """Draw lag, requests and CPU of the first load as bars."""
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "latency", "font.size": 9}
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 1.9), layout="constrained")
    names = [NAMES[name].replace("`", "") for name in results]
    colors = ["#9aa0a6", "#8ab4f8", "#1a73e8"][-len(names) :]
    columns = list(zip(*results.values(), strict=True))
    for axis, title, values, text in (
        (axes[0], "delay of the result", [p50 * 1e3 for p50 in columns[0]], "{:,.0f} ms"),
        (axes[1], "requests per run", columns[2], "{:.1f}"),
        (axes[2], "CPU per run", [cpu * 1e3 for cpu in columns[3]], "{:.1f} ms"),
    ):
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, [text.format(value) for value in values], padding=3)
        axis.set_title(title, loc="left")
        axis.set_xlim(0, max(values) * 1.3)
        axis.invert_yaxis()
        axis.set_xticks([])
        axis.spines[:].set_visible(False)
        axis.tick_params(left=False)
    for axis in axes[1:]:
        axis.set_yticks([])
    figure.savefig(file, metadata={"Date": None})


def main() -> int:
    """Print the tables, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the first table")
    tables = dict.fromkeys(load.table for load in loads(1))
    parser.add_argument("--only", metavar="TABLE", choices=tables, help=", ".join(tables))
    parser.add_argument("--vendor", metavar="PYTHON", help="a Python with the vendor's SDK")
    parser.add_argument("--chart", metavar="FILE", help="draw the first load")
    given = parser.parse_args()
    need(debian="util-linux", packages="matplotlib" if given.chart else "")
    need_in(given.vendor, "promptlayer")
    os.sched_setaffinity(0, {SERVER_CORE})
    pythons = {"vendor": given.vendor} if given.vendor else {}
    pythons |= dict.fromkeys(("polling", "unlimited", "default"), sys.executable)
    sys.stdout.write(
        f"Python {platform.python_version()}, one core for the client and one for the server,"
        f" the first table medians of {given.rounds} rounds\n"
    )
    sys.stdout.flush()
    missed = []
    for number, load in enumerate(loads(given.rounds)):
        if given.only not in (None, load.table):
            continue
        rounds = [
            {
                name: measure(name, python, load)
                for name, python in pythons.items()
                if name != "unlimited" or load.is_limited_by_the_rate
            }
            for _ in range(load.rounds)
        ]
        results = {name: median([one[name] for one in rounds]) for name in rounds[0]}
        sys.stdout.write("\n".join(table(load, results)) + "\n")
        sys.stdout.flush()
        missed += misses(load, results)
        if given.chart and number == 0:
            draw(given.chart, results)
    sys.stdout.write("\n" + "\n".join(missed) + "\n" if missed else "")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
