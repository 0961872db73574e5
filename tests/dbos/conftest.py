"""Durable batches, with workers in this process; tests/kill has workers in other processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest

from promptlayer_exec import PollPolicy, RetryPolicy, Session
from promptlayer_exec._database import database
from promptlayer_exec._database.location import check_url
from promptlayer_exec.dbos import Batch, StoredError, StoredOutcome
from promptlayer_exec.dbos import _items as items
from promptlayer_exec.dbos import _requeue as requeue
from promptlayer_exec.dbos._records import Ending
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

_SETTINGS = (
    *("database_url", "session", "max_in_flight", "rate", "attempts", "give_up_after"),
    "same_server",
)


@pytest.fixture
def url(batches_file: Path) -> str:
    """Return the URL of a SQLite database without batches."""
    return f"sqlite:///{batches_file}"


def _answering(inputs: Any, *, seconds: float | None) -> Scenario:
    status = "FAILED" if inputs.get("n") == "bad" else "SUCCESS"
    node = SimNode("Answer", inputs.get("n"), seconds, status=status, is_output_node=True)
    return Scenario([node])


@pytest.fixture
def batch_of(sim: Simulator, url: str) -> Callable[..., Batch]:
    """Return a function that makes the batch `nightly`, or another one, on this database.

    It takes the settings of the batch, the patience of its session, and other settings of that.
    The workflow `echo` returns its input `n`, or fails if that is "bad"; `held` does so when
    `sim.finish` is called.
    """
    sim.add_workflow("echo", partial(_answering, seconds=0.0))
    sim.add_workflow("held", partial(_answering, seconds=None))
    bare = {"poll": PollPolicy.fixed(0.01), "rate": None, "push": False, "check_inputs": False}
    here = {"api_key": sim.api_key, "base_url": sim.base_url}

    def make(
        name: str = "nightly", *, outage: float = 30.0, watch_outage: float = 30.0, **settings: Any
    ) -> Batch:
        patience = {"outage": outage, "watch_outage": watch_outage, "not_found_grace": 0.0}
        retry = RetryPolicy(**patience, base=0.001, ceiling=0.2)
        of_batch = {key: settings.pop(key) for key in _SETTINGS if key in settings}
        session = partial(Session, **{**bare, **here, "retry": retry, **settings})
        return Batch(name, **{"database_url": url, "session": session, **of_batch})

    return make


@pytest.fixture
def batch(batch_of: Callable[..., Batch]) -> Batch:
    """Return the batch `nightly`."""
    return batch_of()


@pytest.fixture(autouse=True)
def _short_pauses(quick_batches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (items, "PATIENCE", items.Patience(restart_delay=0.05)),
        (requeue, "RESTART_PAUSES", requeue.RestartPauses(first=0.01)),
        (database, "LIMITS", attrs.evolve(database.LIMITS, retry_interval=0.02)),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def adjust(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that changes some dials of a mechanism, given its module and their name."""

    def adjust(module: Any, name: str, **dials: Any) -> None:
        monkeypatch.setattr(module, name, attrs.evolve(getattr(module, name), **dials))

    return adjust


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
            store.finish("nightly", [Ending.of(1, outcome)])

    return end
