"""Compare the poll schedule with fixed intervals in virtual time, and fail if it is worse.

Usage: python benchmarks/schedule.py [--chart FILE.svg]

It needs nothing but this package; `--chart` needs matplotlib. All tables take three minutes; the
first comes first.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from random import Random
from typing import Any, NamedTuple

import attrs
from needs import need

from promptlayer_exec import PollPolicy

EXECUTIONS = 2_000
FIXED = (0.5, 1.0, 2.5, 5.0)
WORST = 1.3
RATE = 100.0  # the default of a session


def total(random: Random) -> float:
    """Return how long an execution takes in seconds: log-normal with a median of 20."""
    return random.lognormvariate(math.log(20.0), 0.8)


def scaled(lengths: list[float], seconds: float) -> list[float]:
    """Return `lengths` scaled to a sum of `seconds`."""
    return [length * seconds / sum(lengths) for length in lengths]


def short_ones(random: Random) -> list[float]:
    """Return the lengths of nine short nodes in seconds."""
    return [random.uniform(0.5, 1.5) for _ in range(9)]


# The lengths of nodes, which run one after the other.
SHAPES: dict[str, Callable[[Random], list[float]]] = {
    "ten of random length": lambda r: scaled([r.expovariate(1) for _ in range(10)], total(r)),
    "six of heavy-tailed length": lambda r: scaled(
        [r.paretovariate(1.1) for _ in range(6)], total(r)
    ),
    "nine short, then a long one": lambda r: scaled([*short_ones(r), 51.0], total(r)),
    "a long one, then nine short": lambda r: scaled([51.0, *short_ones(r)], total(r)),
    "a single node": lambda r: [total(r)],
}


class Cost(NamedTuple):
    """Seconds from the end of an execution, or of a node, to its detection; and requests."""

    lag: float
    node_lag: float
    gets: float


def follow(ends: list[float], policy: PollPolicy, random: Random) -> Cost:
    """Poll an execution whose nodes end at `ends`, as a watch does."""
    now = changed = 0.0
    seen, gets, node_lag = 0, 1, 0.0
    while seen < len(ends):
        now += policy.delay(
            elapsed=now,
            final=seen,
            nodes=len(ends),
            unchanged=now - changed,
            chance=random.random(),
        )
        gets += 1
        ended = bisect_right(ends, now)
        if ended > seen:
            node_lag += sum(now - end for end in ends[seen:ended])
            seen, changed = ended, now
    return Cost(now - ends[-1], node_lag / len(ends), gets)


def judge(shape: str, policy: PollPolicy) -> Cost:
    """Return the mean cost over executions of one shape, the same ones for each policy."""
    random = Random(shape)
    runs = [
        follow(list(accumulate(SHAPES[shape](random))), policy, random) for _ in range(EXECUTIONS)
    ]
    return Cost(*(statistics.fmean(values) for values in zip(*runs, strict=True)))


def lag_of_fixed(shape: str, gets: float) -> float:
    """Return the lag of the fixed interval that makes as many requests."""
    low, high = 0.01, 60.0
    for _ in range(20):
        middle = math.sqrt(low * high)
        if judge(shape, PollPolicy.fixed(middle)).gets > gets:
            low = middle
        else:
            high = middle
    return judge(shape, PollPolicy.fixed(math.sqrt(low * high))).lag


class Seen(NamedTuple):
    """What a policy knows about an execution; times are in seconds."""

    elapsed: float
    final: int
    nodes: int
    unchanged: float

    @property
    def remaining(self) -> float:
        """How long the other nodes take if each takes as long as the final ones did on average."""
        return (self.nodes - self.final) * self.elapsed / self.final if self.final else self.elapsed


def growing(seconds: float) -> float:
    """Return the longest delay of the default while several nodes are not final."""
    return PollPolicy()._growing(seconds)


# Other formulas for the delay, within the same bounds.
FORMULAS: dict[str, Callable[[Seen], float]] = {
    "a tenth of the age": lambda seen: seen.elapsed / 10,
    "a tenth of the time without a change": lambda seen: seen.unchanged / 10,
    "a tenth of the time that seems left": lambda seen: seen.remaining / 10,
    "growing with the age, as its fourth root": lambda seen: growing(seen.elapsed),
    "the same, but 0.5 s for a second after a change": lambda seen: (
        0.5 if seen.unchanged < 1.0 else growing(seen.elapsed)
    ),
    "the same, but a sixth of what seems left": lambda seen: min(
        seen.remaining / 6, growing(seen.elapsed)
    ),
}


@attrs.frozen
class Other(PollPolicy):
    """A policy with another formula."""

    formula: Callable[[Seen], float] = attrs.field(kw_only=True)

    def delay(self, *, chance: float, retry_after: float = 0.0, **seen: Any) -> float:
        """Return the seconds until the next poll."""
        delay = min(max(self.formula(Seen(**seen)), self.floor), self.ceiling)
        return delay + self.jitter * min(delay, 1.0) * chance


def lags(policy: PollPolicy, shape: str) -> tuple[float, float]:
    """Return the lag of a policy, and that of the fixed interval with as many requests."""
    cost = judge(shape, policy)
    return cost.lag, lag_of_fixed(shape, cost.gets)


def compare(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return lag ÷ lag of the fixed interval, for all shapes together and for the worst."""
    ours, fixed = zip(*pairs, strict=True)
    return sum(ours) / sum(fixed), max(our / other for our, other in pairs)


def pace(age: float, final: int, nodes: int) -> float:
    """Return the mean seconds between two polls of a run whose nodes finish at a steady pace."""
    policy = PollPolicy()
    seen = {"elapsed": age, "final": final, "nodes": nodes, "unchanged": age / (final + 1)}
    return statistics.fmean(policy.delay(**seen, chance=part / 100) for part in range(100))


def draw(file: str) -> None:
    """Draw lag against requests: a curve for fixed intervals, and a point for the default."""
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "schedule", "font.size": 9}
    figure, axes = pyplot.subplots(1, len(SHAPES), figsize=(13, 2.9), layout="constrained")
    intervals = [0.4 * 1.25**step for step in range(14)]
    for axis, shape in zip(axes, SHAPES, strict=True):
        fixed = [judge(shape, PollPolicy.fixed(seconds)) for seconds in intervals]
        axis.plot([f.gets for f in fixed], [f.lag for f in fixed], label="fixed intervals")
        ours = judge(shape, PollPolicy())
        axis.plot([ours.gets], [ours.lag], "o", label="the default")
        axis.set(title=shape, xlabel="requests", xscale="log", ylim=(0, 2.5))
        axis.set_xticks([10, 20, 50], labels=["10", "20", "50"])
        axis.minorticks_off()
    axes[0].set_ylabel("seconds from the end to its detection")
    axes[0].legend()
    figure.savefig(file, metadata={"Date": None})


def main() -> int:
    """Print the tables, draw the chart if asked to, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chart", metavar="FILE", help="draw a chart; needs matplotlib")
    chart = parser.parse_args().chart
    need(packages="matplotlib" if chart else "")
    policies = {"default": PollPolicy()} | {f"{s:g} s": PollPolicy.fixed(s) for s in FIXED}
    write = partial(print, end="", flush=True)
    write(f"Lag / node lag (seconds) / requests, means of {EXECUTIONS:,} executions\n\n")
    write(f"| nodes | {' | '.join(policies)} | lag ÷ that of fixed, same requests |\n")
    write(f"|---|{'---|' * (len(policies) + 1)}\n")
    pairs = []
    for shape in SHAPES:
        costs = [judge(shape, policy) for policy in policies.values()]
        cells = " | ".join(f"{c.lag:.2f} / {c.node_lag:.2f} / {c.gets:.1f}" for c in costs)
        pairs.append(lags(policies["default"], shape))
        lag, fixed = pairs[-1]
        write(f"| {shape} | {cells} | {lag / fixed:.2f} |\n")
    together, worst = compare(pairs)
    write(
        f"\nAll shapes together: {together:.2f} (target < 1), worst {worst:.2f} (≤ {WORST})\n"
        "\n| tried instead | all shapes together | worst |\n|---|---|---|\n"
    )
    for name, formula in FORMULAS.items():
        other = compare([lags(Other(formula=formula), shape) for shape in SHAPES])
        write(f"| {name} | {other[0]:.2f} | {other[1]:.2f} |\n")
    write(
        f"\nSeconds between two polls, and how many such runs {RATE:g} polls per second follow\n\n"
        "| age of the run | no node finished | 5 of 10 finished | 9 of 10 finished |\n"
        "|---|---|---|---|\n"
    )
    for age in (2.0, 10.0, 60.0, 600.0):
        delays = [pace(age, final, 10) for final in (0, 5, 9)]
        cells = " | ".join(f"{delay:.1f} s, {RATE * delay:.0f} runs" for delay in delays)
        write(f"| {age:g} s | {cells} |\n")
    if chart:
        draw(chart)
    return int(together >= 1.0 or worst > WORST)


if __name__ == "__main__":
    sys.exit(main())
