"""How the database of batches is written and read: many rows at a time, and bounded in bytes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from promptlayer_exec._database import threads
from promptlayer_exec._database.location import check_url
from promptlayer_exec._database.threads import Group
from promptlayer_exec.dbos import _intents as intents
from promptlayer_exec.dbos import _reports as reports
from promptlayer_exec.dbos import _requeue as requeue
from promptlayer_exec.dbos import _store as stores
from promptlayer_exec.dbos._intents import Intent
from promptlayer_exec.dbos._records import Ending, StoredError, StoredOutcome
from promptlayer_exec.dbos._requests import Row
from promptlayer_exec.dbos._store import Store

# The values of SQLite's `PRAGMA synchronous`.
NORMAL, FULL = 1, 2


def synchronous(engine: sa.Engine) -> int:
    """Return when a new connection flushes its commits."""
    with engine.connect() as connection:
        return int(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return a new database."""
    store = Store(check_url(f"sqlite:///{tmp_path / 'batches.sqlite'}"))
    store.prepare()
    store.create("b", {})
    yield store
    store.close()


def test_many_runs_are_adopted_at_once(store: Store) -> None:
    """Whoever has the lock of the batch needs no other connection: the others wait on all of them.

    A worker that was stalled adopts the runs of all starts that were on the wire.
    """
    keys = [str(n) for n in range(16)]
    store.add("b", [Row(key, json.dumps({"workflow": "w"}), "") for key in keys])
    intents.write(store, "b", [Intent(key, 1, f"token {key}") for key in keys])
    unknown, now = StoredError("StartUnknown", "-"), datetime.now(UTC)
    outcomes = [StoredOutcome(key, None, False, None, unknown, None, now) for key in keys]
    store.finish("b", [Ending.of(1, outcome) for outcome in outcomes])

    def adopt(key: str) -> bool:
        return requeue.record_callback(store, "b", f"token {key}", 787)

    began = time.monotonic()
    with ThreadPoolExecutor(len(keys)) as threads:
        assert all(threads.map(adopt, keys))
    assert time.monotonic() - began < 20.0
    assert reports.kinds(store, "b", keys) == dict.fromkeys(keys)


def test_outcomes_are_read_a_few_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call ends with the outcome that reaches the limit, however long that one is."""
    monkeypatch.setattr(stores, "SIZES", stores.Sizes(outcome_length=100))
    sizes = [10, 50, 50, 200, 1]
    store.add("b", [Row(str(n), "{}", "") for n in range(len(sizes))])
    store.finish("b", [Ending(str(n), 1, "succeeded", "x" * size) for n, size in enumerate(sizes)])
    read, last = [], 0
    while rows := store.outcomes("b", last):
        read.append([len(row.outcome) for row in rows])
        last = rows[-1].seq
    assert read == [[10, 50, 50], [200], [1]]


def test_slots_are_as_long_as_the_stored_rate_says(store: Store) -> None:
    """A worker that does not know yet that the rate was raised reserves no minutes."""
    store.store_settings("b", {"rate": 1000.0})
    for _ in range(2):
        assert store.reserve("b", 1, rate=0.01) < 1.0


def test_an_item_that_ends_twice_in_one_call_is_counted_once(store: Store) -> None:
    """As the ending that is stored."""
    store.add("b", [Row("1", "{}", "")])
    store.finish("b", [Ending("1", 1, kind, "{}") for kind in ("unknown", "failed")])
    ended = reports.kinds(store, "b", ["1"])["1"]
    status = store.status("b")
    counts = {"unknown": status.unknown, "failed": status.failed}
    assert counts == dict.fromkeys(counts, 0) | {ended: 1}


def test_an_intent_is_not_replaced(store: Store) -> None:
    """Whether or not its callback has come: the start of the other worker may have been sent."""
    store.add("b", [Row(key, "{}", "") for key in ("called back", "unknown")])
    mine = [Intent(key, 1, f"mine {key}") for key in ("called back", "unknown")]
    assert intents.write(store, "b", mine) == [True, True]
    requeue.record_callback(store, "b", "mine called back", 787)
    theirs = [Intent(each.key, 1, f"theirs {each.key}") for each in mine]
    assert intents.write(store, "b", theirs) == [False, False]
    assert intents.write(store, "b", mine) == [True, True]
    (state,) = intents.read(store, "b", [("called back", 1)])
    assert (state.intent, state.called_back) == ("mine called back", 787)


async def test_what_is_added_meanwhile_is_written_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many rows and bytes at once; the last row may exceed the bytes."""
    monkeypatch.setattr(threads, "_MOST_ROWS", 3)
    monkeypatch.setattr(threads, "_MOST_BYTES", 100)
    written: list[list[int]] = []

    def write(rows: list[int]) -> list[int]:
        written.append(rows)
        return [2 * row for row in rows]

    group = Group(write, lambda size: size)
    sizes = (1, 2, 3, 4, 60, 60, 5)
    assert await asyncio.gather(*map(group.add, sizes)) == [2 * size for size in sizes]
    assert written == [[1, 2, 3], [4, 60, 60], [5]]


async def test_one_callback_of_the_loop_wakes_all_whose_rows_were_written_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the loop and the thread would take turns for each row."""
    loop = asyncio.get_running_loop()
    are_waiting, are_written = threading.Event(), threading.Event()

    def write(rows: list[int]) -> list[int]:
        assert are_waiting.wait(10.0)
        return rows

    group = Group(write, gather=0.0)
    futures = [group.submit(number) for number in range(20)]
    waiting = [asyncio.create_task(threads.finished(future)) for future in futures]
    await asyncio.sleep(0)
    futures[-1].add_done_callback(lambda _: are_written.set())

    calls: list[Callable[..., Any]] = []
    call_soon = loop.call_soon_threadsafe

    def record(callback: Callable[..., Any]) -> None:
        calls.append(callback)
        call_soon(callback)

    monkeypatch.setattr(loop, "call_soon_threadsafe", record)
    are_waiting.set()
    assert are_written.wait(10.0)  # the loop stands still meanwhile
    assert len(calls) == 1
    assert await asyncio.gather(*waiting) == [*range(20)]


def test_only_dbos_may_flush_later(store: Store) -> None:
    """A power cut must lose nothing that says what was sent: that we write, and flush at once."""
    assert synchronous(store.engine) == FULL
    assert synchronous(store.engine_of_dbos) == NORMAL


def test_nobody_flushes_later_without_a_write_ahead_log(tmp_path: Path) -> None:
    """In another journal mode, a power cut might damage the file."""
    with closing(Store(check_url(f"sqlite:///{tmp_path / 'old.sqlite'}"))) as store:
        assert synchronous(store.engine_of_dbos) == FULL


async def test_an_error_of_a_write_is_raised_for_each_of_its_rows() -> None:
    """The rows of the next write are not touched by it."""
    failures = [LookupError("away")]

    def write(rows: list[int]) -> list[int]:
        if failures:
            raise failures.pop()
        return rows

    group = Group(write)
    first = asyncio.create_task(group.add(1))
    await asyncio.sleep(0)
    assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], LookupError)
    await group.add(2)


async def test_the_row_of_a_cancelled_caller_is_written() -> None:
    """Its cancellation does not reach the other rows."""
    written: list[list[int]] = []

    def write(rows: list[int]) -> list[int]:
        written.append(rows)
        return rows

    group = Group(write)
    callers = [asyncio.create_task(group.add(number)) for number in (1, 2)]
    await asyncio.sleep(0)
    callers[0].cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert callers[0].cancelled()
    assert written == [[1, 2]]
