"""A fan-out against a server that often fails: every item has one outcome, and nothing leaks.

`nox -s soak` runs it with 50,000 items and keys on PostgreSQL, the suite with 250 on SQLite.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
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
    InvalidResponse,
    Outcome,
    PollPolicy,
    RequestRetried,
    RetryPolicy,
    Session,
    Snapshot,
    StartRequest,
    StartUnknown,
    WatchEnded,
    WatchStarted,
    WatchWoken,
)
from promptlayer_exec.starts import SQLStartStore

SERVER = Path(__file__).with_name("server.py")
DESCRIPTORS = Path("/proc/self/fd")
SMAPS = Path("/proc/self/smaps_rollup")

ITEMS = int(os.environ.get("PROMPTLAYER_EXEC_SOAK_ITEMS", "250"))
DATABASE = os.environ.get("PROMPTLAYER_EXEC_SOAK_DATABASE")  # its URL
LONG = ITEMS >= 10_000
MAX_IN_FLIGHT = 500 if LONG else 50
FAULTY_EVERY = 100 if LONG else 20
STARTED_EVERY = 10 if LONG else 2
REQUEST_TIMEOUT = 3.0 if LONG else 1.0
# After any other fault it is unknown whether a start started a run.
SURVIVED_BY_STARTS = {"429", "429 with Retry-After", "delay"}
# Nobody can read these responses, and waiting does not help.
UNREADABLE = {"oversize", "another shape"}
# Memory is measured after every so many items, when none is in flight.
INTERVAL = 5_000
# The most that an item may add: Python objects, and bytes of memory. Bytes are less exact, because
# the allocator takes and returns some megabytes at once.
MOST_OBJECTS = 0.5
MOST_BYTES = 64


class Server:
    """A simulator in another process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        ready = self._read()
        self.base_url: str = ready["base_url"]
        self.key: str = ready["key"]
        self.pool: list[int] = ready["pool"]

    def runs(self) -> dict[int, list[int]]:
        """Return the ids of the runs that each input has started."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"runs\n")
        self._process.stdin.flush()
        runs: dict[int, list[int]] = {}
        for n, execution_id in self._read():
            runs.setdefault(n, []).append(execution_id)
        return runs

    def stop(self) -> dict[str, Any]:
        """Stop the server, and return what it did."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        report: dict[str, Any] = self._read()
        return report

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def server(executions: int) -> Iterator[Server]:
    """Run a server, which stops with this process at the latest."""
    command = [sys.executable, str(SERVER), str(executions), str(FAULTY_EVERY)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Server(process)


class Size(NamedTuple):
    """The size of this process after a garbage collection."""

    objects: int
    bytes: int

    @classmethod
    def now(cls) -> Self:
        """Return the current size; bytes are those that no other process shares, 0 if unknown."""
        gc.collect()
        lines = SMAPS.read_text().splitlines() if SMAPS.exists() else []
        private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        return cls(sys.getallocatedblocks(), 1024 * private)


class Ledger:
    """Hands out the items, and checks the outcome of each."""

    def __init__(self, pool: list[int], started_every: int, *, keyed: bool = False) -> None:
        self._value = {execution_id: value for value, execution_id in enumerate(pool)}
        self._every = started_every
        self._keyed = keyed
        # Two items with one execution at once would share its faults.
        self._free = deque(pool)
        self._outcomes = bytearray(ITEMS)  # how many each item has
        self._completed = 0
        self._all_completed = asyncio.Event()
        self.sizes: list[Size] = []
        self.errors = Counter[str]()
        self.lost: list[int] = []
        self.unreadable: list[int] = []

    async def items(self) -> AsyncIterator[int | StartRequest]:
        """Yield the items, most of them ids; at times wait until none is in flight, and measure."""
        for i in range(ITEMS):
            if i and i % INTERVAL == 0:
                await self._wait_for(i)
                self.sizes.append(Size.now())
            yield self._free.popleft() if i % self._every else self.request(i)

    def request(self, i: int) -> StartRequest:
        """Return the request that starts an item."""
        return StartRequest("echo", {"n": i}, key=f"item-{i}" if self._keyed else None)

    async def _wait_for(self, completed: int) -> None:
        self._all_completed.clear()
        if self._completed < completed:
            await self._all_completed.wait()

    def check(self, outcome: Outcome[int | StartRequest, Any]) -> None:
        """Check that an item has its own output, or an error that a fault explains."""
        self._outcomes[outcome.index] += 1
        self._completed += 1
        if self._completed % INTERVAL == 0:
            self._all_completed.set()
        item = outcome.item
        if isinstance(item, StartRequest):
            subject = expected = item.inputs["n"]
            assert subject == outcome.index
        else:
            self._free.append(item)
            subject, expected = item, self._value[item]
        self.errors[type(outcome.error).__name__] += 1
        if isinstance(outcome.error, StartUnknown):
            self.lost.append(subject)
        elif isinstance(outcome.error, InvalidResponse):
            assert outcome.execution is not None
            self.unreadable.append(outcome.execution.id)
        else:
            assert outcome.result() == expected

    def check_all(self) -> None:
        """Check that every item has exactly one outcome."""
        assert self._outcomes == b"\1" * ITEMS


class EventCounter:
    """An observer that counts events by type."""

    def __init__(self) -> None:
        self.counts = Counter[type[Event]]()

    def __call__(self, event: Event) -> None:
        """Count an event."""
        self.counts[type(event)] += 1


def kept() -> int:
    """Return how many snapshots and outcomes are in memory."""
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
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return sum(link.startswith("socket:") for link in links)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("push", [False, True], ids=["polled", "pushed"])
async def test_each_item_has_exactly_one_outcome_and_nothing_leaks(
    our_tasks: Callable[[], list[str]], caplog: pytest.LogCaptureFixture, *, push: bool
) -> None:
    """Each item has its own output, or the error that belongs to its fault."""
    # pytest keeps every record of a log, which would count as growth.
    caplog.set_level(logging.CRITICAL, logger="promptlayer_exec")
    counter = EventCounter()
    kept_before = kept()
    began = time.monotonic()
    with server(2 * MAX_IN_FLIGHT) as soak_server:
        sockets_before = sockets()
        ledger = Ledger(soak_server.pool, started_every=1 if push else STARTED_EVERY)
        async with session_of(soak_server, push=push, observers=[counter]) as session:
            async for outcome in session.as_completed(ledger.items(), max_in_flight=MAX_IN_FLIGHT):
                ledger.check(outcome)
        assert our_tasks() == []
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert sockets() == sockets_before
        report = soak_server.stop()
    seconds = time.monotonic() - began

    ledger.check_all()
    faults = [(method, kind, subject) for method, kind, subject in report["faults"]]
    lost = [n for method, kind, n in faults if method == "POST" and kind not in SURVIVED_BY_STARTS]
    unreadable = [i for method, kind, i in faults if method == "GET" and kind in UNREADABLE]
    retried = [
        kind
        for method, kind, _ in faults
        if kind != "delay"
        and (kind in SURVIVED_BY_STARTS if method == "POST" else kind not in UNREADABLE)
    ]
    assert sorted(ledger.lost) == sorted(lost)
    assert sorted(ledger.unreadable) == sorted(unreadable)
    assert counter.counts[RequestRetried] == len(retried)
    assert counter.counts[WatchStarted] == counter.counts[WatchEnded] == ITEMS - len(lost)

    del outcome
    assert kept() <= kept_before  # other tests may have kept some
    assert counter.counts[WatchWoken] > (ITEMS / 2 if push else -1)
    if LONG:
        show(seconds, report, ledger)
        check_growth(ledger.sizes)


@pytest.mark.timeout(900)
async def test_each_key_leads_to_one_run_with_its_own_output(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The store lists exactly the keys whose start was lost, and adopting or forgetting ends it."""
    caplog.set_level(logging.CRITICAL, logger="promptlayer_exec")
    url = DATABASE or f"sqlite:///{tmp_path / 'starts.sqlite'}"
    began = time.monotonic()
    with server(2 * MAX_IN_FLIGHT) as soak_server:
        ledger = Ledger(soak_server.pool, started_every=1, keyed=True)
        store = SQLStartStore(url)
        async with session_of(soak_server, push=True, starts=store) as session:
            async for outcome in session.as_completed(ledger.items(), max_in_flight=MAX_IN_FLIGHT):
                ledger.check(outcome)

            ledger.check_all()
            lost = ledger.lost
            while unknown := [stored.key async for stored in store.unknown()]:
                assert sorted(unknown) == sorted(f"item-{n}" for n in lost)
                await settle(store, lost, soak_server.runs())
                lost = []
                requests = [ledger.request(int(key.removeprefix("item-"))) for key in unknown]
                async for again in session.as_completed(requests):
                    n = again.item.inputs["n"]
                    if isinstance(again.error, StartUnknown):
                        lost.append(n)
                    elif not isinstance(again.error, InvalidResponse):
                        assert again.result() == n
        runs = soak_server.runs()
        report = soak_server.stop()

    assert sorted(runs) == list(range(ITEMS))
    assert all(len(ids) == 1 for ids in runs.values())
    if LONG:
        show(time.monotonic() - began, report, ledger)
        check_growth(ledger.sizes)


def session_of(soak_server: Server, **settings: Any) -> Session:
    """Return a session that polls and retries without long pauses."""
    return Session(
        soak_server.key,
        base_url=soak_server.base_url,
        poll=PollPolicy.fixed(0.05),
        retry=RetryPolicy(base=0.01, ceiling=0.1),
        request_timeout=REQUEST_TIMEOUT,
        max_response_bytes=64 * 1024,
        rate=None,
        check_inputs=False,
        **settings,  # push is used for the runs that the session starts
    )


async def settle(store: SQLStartStore, lost: list[int], runs: dict[int, list[int]]) -> None:
    """Do what a person does after a look at PromptLayer: adopt the runs, forget the other keys."""
    for n in lost:
        if n in runs:
            assert await store.adopt(f"item-{n}", *runs[n])
        else:
            assert await store.forget(f"item-{n}")


def check_growth(sizes: list[Size]) -> None:
    """Check that an item leaves next to nothing in memory."""
    assert growth([size.objects for size in sizes]) <= MOST_OBJECTS
    assert growth([size.bytes for size in sizes]) <= MOST_BYTES


def growth(sizes: list[int]) -> float:
    """Return the growth per item, as the median slope of all pairs: single steps do not count."""
    pairs = combinations(enumerate(sizes), 2)
    return median((later - size) / (j - i) / INTERVAL for (i, size), (j, later) in pairs)


def show(seconds: float, report: dict[str, Any], ledger: Ledger) -> None:
    """Print what happened."""
    kinds = Counter(f"{method} {kind}" for method, kind, _ in report["faults"])
    lines = [
        f"{ITEMS:,} items in {seconds:.0f} s, {report['requests']}",
        f"faults: {sum(kinds.values())}, {dict(sorted(kinds.items()))}",
        f"ended with: {dict(ledger.errors)}",
        f"objects after each {INTERVAL:,}: {[size.objects for size in ledger.sizes]}",
        f"MiB after each {INTERVAL:,}: {[round(size.bytes / 2**20, 1) for size in ledger.sizes]}",
    ]
    sys.stdout.write("\n".join(["", *lines, ""]))
