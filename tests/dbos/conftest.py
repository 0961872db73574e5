"""Durable batches, with workers in this process; tests/kill has workers in other processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from promptlayer_exec.dbos import StoredError, StoredOutcome
from promptlayer_exec.dbos import _batch as batches
from promptlayer_exec.dbos import _breaker as breakers
from promptlayer_exec.dbos import _database as databases
from promptlayer_exec.dbos import _items as items
from promptlayer_exec.dbos import _store as stores
from promptlayer_exec.dbos import _worker as workers
from promptlayer_exec.dbos._location import check_url
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._values import Ending


@pytest.fixture
def url(batches_file: Path) -> str:
    """Return the URL of a SQLite database without batches."""
    return f"sqlite:///{batches_file}"


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, interval in (
        (stores, "_QUEUE_INTERVAL", 0.02),
        (workers, "_CHECK_INTERVAL", 0.02),
        (workers, "_IDLE", 0.3),
        (items, "_FIRST_DELAY", 0.05),
        (breakers, "_FIRST_PAUSE", 0.1),
        (batches, "_POLL_INTERVAL", 0.02),
        (databases, "_RETRY_INTERVAL", 0.02),
    ):
        monkeypatch.setattr(module, name, interval)


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    # The threads of an event loop end with the loop.
    new = {
        thread
        for thread in set(threading.enumerate()) - before
        if not thread.name.startswith("asyncio")
    }
    for thread in new:  # one of DBOS may be about to try again
        thread.join(10.0)
    assert [thread.name for thread in new if thread.is_alive()] == []


@pytest.fixture
def end(url: str) -> Callable[[str, int | None, str], None]:
    """Return a function that stores an outcome with an error, as another worker would."""

    def end(key: str, execution_id: int | None, error: str) -> None:
        now = datetime.now(UTC)
        outcome = StoredOutcome(key, execution_id, False, None, StoredError(error, "-"), now, now)
        with closing(Store(check_url(url))) as store:
            store.finish("b", [Ending.of(1, outcome)])

    return end
