"""How the database of batches is written and read: many rows at a time, and bounded in bytes."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from promptlayer_exec import ConfigurationError
from promptlayer_exec.dbos import Durations, StoredError, StoredOutcome
from promptlayer_exec.dbos import _again as again
from promptlayer_exec.dbos import _callbacks as callbacks
from promptlayer_exec.dbos import _groups as groups
from promptlayer_exec.dbos import _intents as intents
from promptlayer_exec.dbos import _reports as reports
from promptlayer_exec.dbos._groups import Group
from promptlayer_exec.dbos._intents import Intent, State
from promptlayer_exec.dbos._liveness import check_of
from promptlayer_exec.dbos._location import check_url
from promptlayer_exec.dbos._requests import Row
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import Ending, items


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return a new database."""
    store = Store(check_url(f"sqlite:///{tmp_path / 'batches.sqlite'}"))
    store.prepare()
    yield store
    store.close()


def test_outcomes_are_read_a_few_bytes_at_a_time(store: Store) -> None:
    """A call ends with the outcome that reaches the limit, however long that one is."""
    sizes = [10, 50, 50, 200, 1]
    store.add("b", [Row(str(n), "{}", "") for n in range(len(sizes))])
    store.finish("b", [Ending(str(n), 1, "succeeded", "x" * size) for n, size in enumerate(sizes)])
    read, last = [], 0
    while rows := store.outcomes("b", last, limit=1000, size=100):
        read.append([len(outcome) for _, outcome in rows])
        last = rows[-1][0]
    assert read == [[10, 50, 50], [200], [1]]
    assert [len(outcome) for _, outcome in store.outcomes("b", 0, limit=2, size=100)] == [10, 50]


def test_durations_are_missing_while_items_are_put_back(store: Store) -> None:
    """They are read one after another, and another worker may begin an item again meanwhile."""
    store.add("b", [Row("1", "{}", "")])
    store.finish("b", [Ending("1", 1, "succeeded", "{}", 2.0)])
    assert reports.durations(store, "b") == Durations(2.0, 2.0, 2.0)
    read = store.rows

    def rows(query: Any) -> Any:
        found = read(query)
        store.transact(lambda connection: connection.execute(sa.delete(items)))
        return found

    store.rows = rows  # type: ignore[method-assign, assignment]
    assert reports.durations(store, "b") is None


def test_the_settings_of_a_new_batch_are_stored_with_its_first_items(store: Store) -> None:
    """So that a worker which names none takes them, however early it begins."""
    store.add("b", [Row("1", "{}", "")], {"rate": 300.0})
    store.add("b", [Row("2", "{}", "")], {"rate": 7.0})
    assert reports.settings(store, "b").rate == 300.0
    assert store.store_settings("b", {"rate": 50.0, "max_in_flight": 3}) == {"rate": 300.0}
    assert reports.settings(store, "b").max_in_flight == 3


def test_a_connection_that_is_returned_after_the_end_is_closed(store: Store) -> None:
    """A thread of DBOS may outlast `DBOS.destroy`; nobody would use the pool that it returns to."""
    connection = store.engine.connect()
    raw = connection.connection.dbapi_connection
    assert raw is not None
    store.close()
    connection.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        raw.cursor()


def test_many_runs_are_adopted_at_once(store: Store) -> None:
    """Whoever has the lock of the batch needs no other connection: the others wait on all of them.

    A worker that was stalled adopts the runs of all starts that were on the wire.
    """
    keys = [str(n) for n in range(16)]
    store.add("b", [Row(key, json.dumps({"workflow": "w"}), "") for key in keys])
    intents.write(store, "b", [Intent(key, 1, f"token {key}", None, False) for key in keys])

    def adopt(key: str) -> bool:
        started = {"execution_id": int(key), "at": "2026-01-01", "error": None}
        return again.adopt(store, "b", key=key, attempt=1, token=f"token {key}", started=started)

    began = time.monotonic()
    with ThreadPoolExecutor(len(keys)) as threads:
        assert all(threads.map(adopt, keys))
    assert time.monotonic() - began < 20.0
    assert reports.kinds(store, "b", keys) == dict.fromkeys(keys)


@pytest.mark.parametrize(
    ("kind", "intent", "started", "ends"),
    [
        ("unknown", "another", None, True),
        ("unknown", None, None, False),
        ("unknown", "a third", None, False),
        ("unknown", "another", "{}", False),
        ("failed", "another", None, True),
        ("failed", "another", "{}", False),
    ],
)
def test_an_ending_because_of_another_start_needs_that_start(
    store: Store, kind: str, intent: str | None, started: str | None, ends: bool
) -> None:
    """It may have been taken back meanwhile, replaced, or recorded."""
    store.add("b", [Row("1", "{}", "")])
    with store.engine.begin() as connection:
        connection.execute(sa.update(items).values(intent=intent, started=started))
    ending = Ending("1", 1, kind, "{}", of_another="another")
    assert store.finish("b", [ending]) == ({("1", 1)} if ends else set())


def test_an_item_that_ends_twice_in_one_call_is_counted_once(store: Store) -> None:
    """As the ending that is stored."""
    store.add("b", [Row("1", "{}", "")])
    store.finish("b", [Ending("1", 1, kind, "{}") for kind in ("unknown", "failed")])
    ended = reports.kinds(store, "b", ["1"])["1"]
    status = store.status("b")
    counts = {"unknown": status.unknown, "failed": status.failed}
    assert counts == dict.fromkeys(counts, 0) | {ended: 1}


def test_items_that_are_added_while_their_batch_is_deleted_are_deleted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise they would be in no batch, and nobody would count them."""
    rows = Store.rows
    store.add("b", [Row("1", "{}", "")])

    def add_at_the_end(self: Store, query: sa.Select[Any], **options: Any) -> Any:
        found = rows(self, query, **options)
        if not found:
            monkeypatch.setattr(Store, "rows", rows)
            store.add("b", [Row("2", "{}", "")])
        return found

    monkeypatch.setattr(Store, "rows", add_at_the_end)
    assert store.delete("b") == 2
    assert reports.kinds(store, "b", ["1", "2"]) == {}
    assert store.add("b", [Row("2", "{}", "")]) == 1
    assert store.status("b").total == 1


def test_items_that_are_started_again_while_their_batch_is_deleted_are_deleted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the workflows of their new attempts, which a batch of that name would meet."""
    error = StoredError("UnprocessableRequest", "no")
    outcome = StoredOutcome("1", None, False, None, error, None, datetime.now(UTC))
    store.add("b", [Row("1", "{}", "")])
    store.finish("b", [Ending.of(1, outcome)])
    real = store.transact
    restarted = []

    def restart_first(work: Any, **options: Any) -> Any:
        if not restarted:
            restarted.append(0)
            restarted.append(again.retry(store, "b", ["failed"]))
        return real(work, **options)

    with monkeypatch.context() as patch:
        requests = store.stored_requests("b", {"1": 1})
        patch.setattr(store, "stored_requests", lambda *_: requests)
        patch.setattr(store, "transact", restart_first)
        assert store.delete("b") == 1
    assert restarted == [0, 1]
    assert store.workflows("b", "1", 2) == []


def test_an_intent_whose_callback_has_come_is_not_replaced(store: Store) -> None:
    """It came after another worker had read the row, and says that there is a run already."""
    store.add("b", [Row(key, "{}", "") for key in ("called back", "unknown")])
    mine = [Intent(key, 1, f"mine {key}", None, False) for key in ("called back", "unknown")]
    assert intents.write(store, "b", mine) == [True, True]
    callbacks.record(store, "b", "mine called back", 787)
    theirs = [Intent(each.key, 1, f"theirs {each.key}", each.token, False) for each in mine]
    assert intents.write(store, "b", theirs) == [False, True]
    assert intents.write(store, "b", mine) == [True, False]
    (state,) = intents.read(store, "b", [("called back", 1)])
    assert (state.intent, state.called_back) == ("mine called back", 787)


def test_an_intent_that_is_refused_leaves_none_of_an_earlier_try(store: Store) -> None:
    """Its commit was not seen, and another worker has the item now: nothing was or is sent."""
    store.add("b", [Row("1", "{}", "")])
    intent = Intent("1", 1, "token", None, False)
    assert intents.write(store, "b", [intent]) == [True]
    assert intents.write(store, "b", [intent], "a worker that has lost it") == [False]
    assert intents.read(store, "b", [("1", 1)]) == [State(True, digest="")]


def test_a_batch_that_is_deleted_before_its_worker_begins_is_missed(store: Store) -> None:
    """It was deleted between two calls, and the error is the same as later."""
    store.precondition = check_of(store, "b")
    with pytest.raises(ConfigurationError, match="'b' was deleted meanwhile"):
        store.finish("b", [Ending("1", 1, "failed", "{}")])


def test_a_batch_that_is_added_again_before_the_first_write_is_missed_too(store: Store) -> None:
    """SQLite begins a transaction only then, and a worker may stand still before it."""
    rows = [Row("1", "{}", "")]
    store.add("b", rows)
    store.precondition = check_of(store, "b")

    def work(connection: sa.Connection) -> None:
        store.precondition = None
        store.delete("b")
        store.add("b", rows)
        connection.execute(sa.update(items).values(kind="failed"))

    with pytest.raises(ConfigurationError, match="'b' was deleted meanwhile"):
        store.transact(work)
    assert reports.kinds(store, "b", ["1"]) == {"1": None}


async def test_what_is_added_meanwhile_is_written_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many rows and bytes at once; the last row may exceed the bytes."""
    monkeypatch.setattr(groups, "_MOST_ROWS", 3)
    monkeypatch.setattr(groups, "_MOST_BYTES", 100)
    written: list[list[int]] = []

    def write(rows: list[int]) -> list[int]:
        written.append(rows)
        return [2 * row for row in rows]

    group = Group(write, lambda size: size)
    sizes = (1, 2, 3, 4, 60, 60, 5)
    assert await asyncio.gather(*map(group.add, sizes)) == [2 * size for size in sizes]
    assert written == [[1, 2, 3], [4, 60, 60], [5]]


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
