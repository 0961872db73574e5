"""Many executions through a server that fails: each back once, and nothing left behind.

`nox -s soak` runs the same with 50,000 items; the suite with a few.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self

import pytest

from promptlayer_exec import (
    Event,
    Outcome,
    PollPolicy,
    RequestRetried,
    ResponseTooLarge,
    RetryPolicy,
    Session,
    Snapshot,
    StartRequest,
    StartUnknown,
    WatchEnded,
    WatchStarted,
)

WORLD = Path(__file__).with_name("world.py")
DESCRIPTORS = Path("/proc/self/fd")
SMAPS = Path("/proc/self/smaps_rollup")

ITEMS = int(os.environ.get("PROMPTLAYER_EXEC_SOAK_ITEMS", "500"))
LONG = ITEMS >= 10_000
MAX_IN_FLIGHT = 500 if LONG else 50
FAULTY_EVERY = 100 if LONG else 20
STARTED_EVERY = 10 if LONG else 2
REQUEST_TIMEOUT = 3.0 if LONG else 1.0
# The kinds of a fault after which nobody can tell whether a run was started.
SURVIVED_BY_STARTS = {"429", "429 with Retry-After", "delay"}
SETTLED = 5_000
# What the process may keep of each item after that: objects of Python's, and bytes of memory, which
# are less exact, as the allocator gives back and takes again as much as some megabytes at once.
MOST_OBJECTS = 0.5
MOST_BYTES = 64


class World:
    """A simulator in another process, and what it reports at the end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        hello = self._read()
        self.base_url: str = hello["base_url"]
        self.key: str = hello["key"]
        self.pool: list[int] = hello["pool"]

    def end(self) -> dict[str, Any]:
        """Stop it, and return its report."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        report: dict[str, Any] = self._read()
        return report

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def world(executions: int) -> Iterator[World]:
    """Start a world, which ends with this process at the latest."""
    command = [sys.executable, str(WORLD), str(executions), str(FAULTY_EVERY)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield World(process)


class Size(NamedTuple):
    """How large this process is, once the garbage is gone."""

    objects: int
    bytes: int

    @classmethod
    def now(cls) -> Self:
        """Measure it; the bytes are those that no other process shares, 0 where it is unknown."""
        gc.collect()
        lines = SMAPS.read_text().splitlines() if SMAPS.exists() else []
        private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        return cls(sys.getallocatedblocks(), 1024 * private)


class Ledger:
    """What was handed out, and what came back for it."""

    def __init__(self, pool: list[int]) -> None:
        self._value = {execution_id: value for value, execution_id in enumerate(pool)}
        # No two followers of one execution at once: they would share its faults.
        self._free = deque(pool)
        self._times = bytearray(ITEMS)
        self.back = 0
        self._all_are_back = asyncio.Event()
        self.sizes: list[Size] = []
        self.ended = Counter[str]()
        self.lost: list[int] = []
        self.too_large: list[int] = []

    async def items(self) -> AsyncIterator[int | StartRequest]:
        """Yield the items, most of them ids; now and then wait until none is out, and measure."""
        for i in range(ITEMS):
            if i and i % SETTLED == 0:
                await self._wait_for(i)
                self.sizes.append(Size.now())
            yield self._free.popleft() if i % STARTED_EVERY else StartRequest("echo", {"n": i})

    async def _wait_for(self, back: int) -> None:
        self._all_are_back.clear()
        if self.back < back:
            await self._all_are_back.wait()

    def check(self, outcome: Outcome[int | StartRequest, Any]) -> None:
        """Take an item back: it had to be out, and the output has to be its own."""
        self._times[outcome.index] += 1
        self.back += 1
        if self.back % SETTLED == 0:
            self._all_are_back.set()
        item = outcome.item
        if isinstance(item, StartRequest):
            subject = expected = item.inputs["n"]
            assert subject == outcome.index
        else:
            self._free.append(item)
            subject, expected = item, self._value[item]
        self.ended[type(outcome.error).__name__] += 1
        if isinstance(outcome.error, StartUnknown):
            self.lost.append(subject)
        elif isinstance(outcome.error, ResponseTooLarge):
            assert outcome.execution is not None
            self.too_large.append(outcome.execution.id)
        else:
            assert outcome.result() == expected

    def settle(self) -> None:
        """Everything came back, exactly once."""
        assert self._times == b"\1" * ITEMS


class Tally:
    """Counts events."""

    def __init__(self) -> None:
        self.events = Counter[type[Event]]()

    def __call__(self, event: Event) -> None:
        """Count an event."""
        self.events[type(event)] += 1


def kept() -> int:
    """Return how many snapshots and outcomes this process keeps."""
    gc.collect()
    return sum(isinstance(thing, Snapshot | Outcome) for thing in gc.get_objects())


def sockets() -> int:
    """Return how many sockets this process has open."""
    if not DESCRIPTORS.exists():
        return 0
    links = []
    for descriptor in DESCRIPTORS.iterdir():
        try:
            links.append(str(descriptor.readlink()))
        except FileNotFoundError:  # the listing's own
            continue
    return sum(link.startswith("socket:") for link in links)


@pytest.mark.timeout(300)
async def test_each_item_comes_back_exactly_once_and_nothing_is_left(
    our_tasks: Callable[[], list[str]],
) -> None:
    """Whatever goes wrong with answers: with its output, or the error that belongs to its fault."""
    tally = Tally()
    kept_before = kept()
    began = time.monotonic()
    with world(2 * MAX_IN_FLIGHT) as server:
        sockets_before = sockets()
        ledger = Ledger(server.pool)
        async with Session(
            server.key,
            base_url=server.base_url,
            poll=PollPolicy.fixed(0.05),
            retry=RetryPolicy(base=0.01, ceiling=0.1),
            request_timeout=REQUEST_TIMEOUT,
            max_response_bytes=64 * 1024,
            rate=None,
            observers=[tally],
        ) as session:
            async for outcome in session.as_completed(ledger.items(), max_in_flight=MAX_IN_FLIGHT):
                ledger.check(outcome)
        assert our_tasks() == []
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert sockets() == sockets_before
        report = server.end()
    took = time.monotonic() - began

    ledger.settle()
    faults = [(method, kind, subject) for method, kind, subject in report["happened"]]
    lost = [n for method, kind, n in faults if method == "POST" and kind not in SURVIVED_BY_STARTS]
    too_large = [i for method, kind, i in faults if (method, kind) == ("GET", "oversize")]
    survived = [
        kind
        for method, kind, _ in faults
        if kind != "delay"
        and (kind in SURVIVED_BY_STARTS if method == "POST" else kind != "oversize")
    ]
    assert sorted(ledger.lost) == sorted(lost)
    assert sorted(ledger.too_large) == sorted(too_large)
    assert tally.events[RequestRetried] == len(survived)
    assert tally.events[WatchStarted] == tally.events[WatchEnded] == ITEMS - len(lost)

    del outcome
    assert kept() <= kept_before  # other tests may keep some
    kinds = Counter(f"{method} {kind}" for method, kind, _ in faults)
    if LONG:
        show(took, report["requests"], kinds, ledger)
        assert growth([size.objects for size in ledger.sizes]) <= MOST_OBJECTS
        assert growth([size.bytes for size in ledger.sizes]) <= MOST_BYTES


def growth(sizes: list[int]) -> float:
    """Return by how much each item makes a size grow: the median of all slopes, blind to steps."""
    pairs = combinations(enumerate(sizes), 2)
    return median((later - size) / (j - i) / SETTLED for (i, size), (j, later) in pairs)


def show(
    took: float,
    requests: dict[str, int],
    kinds: Counter[str],
    ledger: Ledger,
) -> None:
    """Print what happened."""
    lines = [
        f"{ITEMS:,} items in {took:.0f} s, {requests}",
        f"faults: {sum(kinds.values())}, {dict(sorted(kinds.items()))}",
        f"ended with: {dict(ledger.ended)}",
        f"objects after each {SETTLED:,}: {[size.objects for size in ledger.sizes]}",
        f"MiB after each {SETTLED:,}: {[round(size.bytes / 2**20, 1) for size in ledger.sizes]}",
    ]
    sys.stdout.write("\n".join(["", *lines, ""]))
