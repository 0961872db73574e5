"""A store of starts, alone: what it records, and what may come late, twice or never."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import sqlalchemy as sa

from promptlayer_exec import ConfigurationError, StoreUnavailable
from promptlayer_exec._database import threads
from promptlayer_exec._database.location import check_url
from promptlayer_exec._values.start_records import fingerprint
from promptlayer_exec.starts import SQLStartStore, StartClaim

REQUEST = fingerprint("order", workflow="write", inputs={"topic": "otters"})
CLAIM = StartClaim("order", "first", "http://server", REQUEST, 30.0)
AGAIN = attrs.evolve(CLAIM, token="second")


@pytest.fixture
async def store_of(url: str) -> AsyncIterator[Callable[..., SQLStartStore]]:
    """Return a function that makes a store, which is closed after the test."""
    async with AsyncExitStack() as stores:

        def make(**settings: Any) -> SQLStartStore:
            store = SQLStartStore(url, **settings)
            stores.push_async_exit(store)
            return store

        yield make


@pytest.fixture
def store(store_of: Callable[..., SQLStartStore]) -> SQLStartStore:
    """Return a store that restarts nothing."""
    return store_of()


@contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    """Yield a connection to the database, as another program has."""
    engine = sa.create_engine(check_url(url))
    with engine.begin() as connection:
        yield connection
    engine.dispose()


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Keep all others from writing."""
    with connected(url) as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.exec_driver_sql("LOCK TABLE promptlayer_exec_starts")
        yield


def age(url: str, seconds: float) -> None:
    """Let everything that is recorded be older by some seconds."""
    moved = ", ".join(f"{name} = {name} - {seconds}" for name in ("created", "updated", "until"))
    with connected(url) as connection:
        connection.exec_driver_sql(f"UPDATE promptlayer_exec_starts SET {moved}")


async def lose(store: SQLStartStore) -> None:
    """Claim the key, and lose the response."""
    assert await store.claim(CLAIM) is None
    assert await store.record("order", "first", None)


async def found(store: SQLStartStore) -> tuple[Any, ...] | None:
    """Return the state, the id and the number of attempts of the key."""
    start = await store.find("order")
    return None if start is None else (start.state, start.execution_id, start.attempts)


async def test_a_start_is_recorded_step_by_step(store: SQLStartStore) -> None:
    """First the claim, and then the id."""
    assert await store.find("order") is None
    assert await store.claim(CLAIM) is None
    assert await found(store) == ("sending", None, 1)
    assert await store.record("order", "first", 7)
    start = await store.find("order")
    assert start is not None
    assert (start.key, start.state, start.execution_id) == ("order", "started", 7)
    assert (start.workflow, start.server, start.token) == ("write", "http://server", "first")
    assert not start.replaceable
    now = datetime.now(UTC)
    assert now - timedelta(seconds=60) < start.created <= start.updated <= now


async def test_one_of_many_claims_wins(store_of: Callable[..., SQLStartStore]) -> None:
    """In whichever stores they are made, the others get the record of the winner."""
    stores = [store_of(), store_of(restart_unknown_after=1.0)]
    claims = [attrs.evolve(CLAIM, token=f"{n}") for n in range(40)]
    in_the_way = await asyncio.gather(
        *(stores[n % 2].claim(claim) for n, claim in enumerate(claims))
    )
    assert in_the_way.count(None) == 1
    winner = claims[in_the_way.index(None)].token
    assert {start.token for start in in_the_way if start is not None} == {winner}


async def test_keys_in_any_order_are_claimed_at_once(
    store_of: Callable[..., SQLStartStore],
) -> None:
    """Two transactions with the same keys do not lock each other out."""
    stores = [store_of(), store_of()]
    keys = [f"{n}" for n in range(50)]
    claims = [
        stores[number].claim(attrs.evolve(CLAIM, key=key, token=f"{number} {key}"))
        for number, ordered in enumerate((keys, keys[::-1]))
        for key in ordered
    ]
    assert (await asyncio.gather(*claims)).count(None) == 50


async def test_a_claim_can_be_repeated(store: SQLStartStore) -> None:
    """The connection may break when it has been committed: then it finds itself."""
    assert await store.claim(CLAIM) is None
    assert await store.claim(CLAIM) is None
    in_the_way = await store.claim(AGAIN)
    assert in_the_way is not None
    assert in_the_way.token == "first"
    assert await found(store) == ("sending", None, 1)


async def test_a_record_can_be_repeated(store: SQLStartStore) -> None:
    """A second one with another id changes nothing."""
    await store.claim(CLAIM)
    for _ in range(2):
        assert await store.record("order", "first", 7)
    assert not await store.record("order", "first", 8)
    assert not await store.record("order", "first", None)
    assert not await store.record("order", "second", 7)
    assert await found(store) == ("started", 7, 1)


async def test_a_silent_sender_is_dead_after_a_while(store: SQLStartStore, url: str) -> None:
    """It is a few seconds after its own time-out; nobody has to record that."""
    await store.claim(CLAIM)
    age(url, 32.0)
    assert await found(store) == ("sending", None, 1)
    age(url, 2.0)
    assert await found(store) == ("unknown", None, 1)
    in_the_way = await store.claim(AGAIN)
    assert in_the_way is not None
    assert in_the_way.state == "unknown"


async def test_a_sender_that_was_thought_dead_records_its_id(
    store: SQLStartStore, url: str
) -> None:
    """A laptop may have slept."""
    await store.claim(CLAIM)
    age(url, 100.0)
    assert await store.record("order", "first", 7)
    assert await found(store) == ("started", 7, 1)


async def test_a_callback_resolves_a_start_in_any_process(
    store: SQLStartStore, store_of: Callable[..., SQLStartStore]
) -> None:
    """One that never knew of the start has the token alone; it may come twice."""
    await lose(store)
    assert await found(store) == ("unknown", None, 1)
    elsewhere = store_of()
    assert not await elsewhere.resolve("of another", 7)
    for _ in range(2):
        assert await elsewhere.resolve("first", 7)
    assert not await elsewhere.resolve("first", 8)
    assert await found(store) == ("started", 7, 1)


async def test_a_callback_may_come_before_the_response(store: SQLStartStore) -> None:
    """The sender then records what is already there."""
    await store.claim(CLAIM)
    assert await store.resolve("first", 7)
    assert not await store.record("order", "first", None)
    assert await store.record("order", "first", 7)
    await store.release("order", "first")
    assert await found(store) == ("started", 7, 1)


async def test_an_unknown_start_is_replaced_after_a_while(
    store_of: Callable[..., SQLStartStore], url: str
) -> None:
    """Not before; and only by the same request to the same server."""
    store = store_of(restart_unknown_after=20.0)
    await lose(store)
    assert await store.claim(AGAIN) is not None
    age(url, 21.0)
    start = await store.find("order")
    assert start is not None
    assert start.replaceable
    for change in ({"server": "http://another"}, {"request": "{}"}):
        assert await store.claim(attrs.evolve(AGAIN, **change)) is not None
    assert await store_of().claim(AGAIN) is not None
    assert await store.claim(AGAIN) is None
    assert await found(store) == ("sending", None, 2)


async def test_of_several_that_replace_a_start_one_wins(
    store_of: Callable[..., SQLStartStore], url: str
) -> None:
    """The others find its claim."""
    stores = [store_of(restart_unknown_after=20.0) for _ in range(2)]
    await lose(stores[0])
    age(url, 21.0)
    claims = [stores[n % 2].claim(attrs.evolve(CLAIM, token=f"{n}")) for n in range(20)]
    assert (await asyncio.gather(*claims)).count(None) == 1
    assert await found(stores[0]) == ("sending", None, 2)


@pytest.fixture
async def replaced(store_of: Callable[..., SQLStartStore], url: str) -> SQLStartStore:
    """Return a store in which a second attempt is in flight."""
    store = store_of(restart_unknown_after=20.0)
    await lose(store)
    age(url, 21.0)
    assert await store.claim(AGAIN) is None
    return store


@pytest.mark.parametrize("call", ["resolve", "record"])
async def test_the_first_attempt_still_counts(replaced: SQLStartStore, call: str) -> None:
    """Its callback, or its sender, which slept, may come while the second one is in flight."""
    if call == "resolve":
        assert await replaced.resolve("first", 7)
    else:
        assert await replaced.record("order", "first", 7)
    assert await found(replaced) == ("started", 7, 2)
    assert not await replaced.record("order", "second", 8)
    assert await found(replaced) == ("started", 7, 2)


async def test_a_second_attempt_that_is_refused_leaves_the_first_unknown(
    replaced: SQLStartStore,
) -> None:
    """Its callback still counts; and the next attempt need not wait again, as after a 429."""
    for _ in range(2):
        await replaced.release("order", "second")
    assert await found(replaced) == ("unknown", None, 1)
    assert await replaced.claim(attrs.evolve(CLAIM, token="third")) is None
    assert await found(replaced) == ("sending", None, 2)
    await replaced.release("order", "third")
    assert await replaced.resolve("first", 7)


async def test_a_second_attempt_that_is_lost_waits_again(replaced: SQLStartStore, url: str) -> None:
    """Either of the two callbacks counts."""
    assert await replaced.record("order", "second", None)
    assert await replaced.claim(attrs.evolve(CLAIM, token="third")) is not None
    age(url, 21.0)
    assert await replaced.claim(attrs.evolve(CLAIM, token="third")) is None
    assert await replaced.resolve("second", 7)
    assert await found(replaced) == ("started", 7, 3)


async def test_what_started_nothing_leaves_no_record(store: SQLStartStore) -> None:
    """The next claim is the first one again."""
    await store.claim(CLAIM)
    await store.release("order", "of another")
    assert await found(store) == ("sending", None, 1)
    for _ in range(2):
        await store.release("order", "first")
    assert await store.find("order") is None
    assert not await store.record("order", "first", 7)


async def test_a_key_can_be_forgotten(store: SQLStartStore) -> None:
    """Whatever its state is."""
    await store.claim(CLAIM)
    assert await store.forget("order")
    assert not await store.forget("order")
    assert await store.claim(AGAIN) is None


async def test_what_is_old_is_pruned_unless_it_is_in_flight(store: SQLStartStore, url: str) -> None:
    """Its age counts from the last change."""
    long = attrs.evolve(CLAIM, key="in flight", token="long", request_timeout=1000.0)
    for claim in (CLAIM, long):
        await store.claim(claim)
    age(url, 100.0)
    await store.claim(attrs.evolve(CLAIM, key="new", token="new"))
    assert await store.prune(older_than=50.0) == 1
    assert await store.find("order") is None
    assert await store.find("in flight") is not None
    assert await store.find("new") is not None


async def test_calls_that_wait_are_one_statement(store: SQLStartStore) -> None:
    """While one is executed, the others gather."""
    await store.find("order")
    go_on = threading.Event()
    statements: list[str] = []

    def execute(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)
        assert go_on.wait(30)

    claims = [attrs.evolve(CLAIM, key=f"{n}", token=f"{n}") for n in range(200)]
    sa.event.listen(sa.Engine, "before_cursor_execute", execute)
    try:
        claiming = asyncio.gather(*map(store.claim, claims))
        await asyncio.sleep(0)
        go_on.set()
        assert await claiming == [None] * 200
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", execute)
    assert len([text for text in statements if text.startswith("INSERT")]) <= 2


async def test_the_event_loop_s_own_threads_are_left_alone(store: SQLStartStore, url: str) -> None:
    """The program needs them, also for name resolution, while the database is away."""

    class Untouched(ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("it belongs to the program")

    asyncio.get_running_loop().set_default_executor(Untouched())
    await store.claim(CLAIM)
    with locked(url), pytest.raises(StoreUnavailable):
        await store.record("order", "first", 7, patience=0.05)


async def test_a_call_gives_up_in_time(store: SQLStartStore, url: str) -> None:
    """It may have to wait for less than a single try takes."""
    await store.find("order")
    with locked(url):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"cannot use .*: no response within"):
            await store.claim(CLAIM, patience=0.1)
        assert time.monotonic() - began < 0.9


@pytest.mark.parametrize("how", ["late", "cancelled"])
async def test_a_claim_that_is_given_up_leaves_no_record(
    store: SQLStartStore, url: str, how: str
) -> None:
    """Although its thread may write it once the database can be used."""
    await store.find("order")
    with locked(url):
        claiming = [
            asyncio.create_task(store.claim(claim, patience=0.1 if how == "late" else 10.0))
            for claim in (CLAIM, attrs.evolve(CLAIM, key="second", token="second"))
        ]
        if how == "cancelled":
            await asyncio.sleep(0)
            for task in claiming:
                task.cancel()
        await asyncio.gather(*claiming, return_exceptions=True)
    await store.aclose()
    assert await store.find("order") is None
    assert await store.find("second") is None


async def test_an_unusable_database_is_an_error_that_says_why() -> None:
    """No raw error comes out, and none is the same object for two callers."""
    store = SQLStartStore("sqlite:////dev/null/starts.sqlite")
    calls = [store.find("order", patience=0.1) for _ in range(2)]
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert errors[0] is not errors[1]
    for error in errors:
        assert isinstance(error, ConfigurationError)
        assert ": unable to open database file. It must be a file" in str(error)
    await store.aclose()


async def test_a_closed_store_can_be_used_again(store: SQLStartStore) -> None:
    """A session that closes it takes nothing from another one."""
    finding = asyncio.create_task(store.find("order"))
    await asyncio.sleep(0)
    await store.aclose()
    assert await finding is None
    assert await store.claim(CLAIM) is None


def test_several_event_loops_may_use_a_store(url: str) -> None:
    """At the same time, each in a thread of its own; and one after the other."""
    store = SQLStartStore(url)

    async def claim(number: int) -> int:
        claims = [attrs.evolve(CLAIM, key=f"{n}", token=f"{number} {n}") for n in range(20)]
        return (await asyncio.gather(*map(store.claim, claims))).count(None)

    with ThreadPoolExecutor(2) as threads:
        assert sum(threads.map(lambda number: asyncio.run(claim(number)), range(2))) == 20
    asyncio.run(store.aclose())


FORKED = """
import asyncio, os, sys
from promptlayer_exec.starts import SQLStartStore, StartClaim

store = SQLStartStore(sys.argv[1])
request = '{"workflow": "write"}'
asyncio.run(store.claim(StartClaim("parent", "1", "", request, 30.0)))
child = os.fork()
if not child:
    asyncio.run(store.claim(StartClaim("child", "2", "", request, 30.0)))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert asyncio.run(store.record("child", "2", 7))
print(asyncio.run(store.find("child")).execution_id)
asyncio.run(store.aclose())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_has_connections_of_its_own(url: str) -> None:
    """A server that forks its workers may have used the store before."""
    ignore = "ignore:This process:DeprecationWarning"  # `-W` takes it literally
    program = [sys.executable, "-W", ignore, "-c", FORKED, url]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")


async def test_the_values_of_inputs_are_not_stored(store: SQLStartStore, url: str) -> None:
    """Nor are those of metadata; their names are."""
    request = fingerprint(
        "order", workflow="write", inputs={"topic": "otters"}, metadata={"user": "me@example.org"}
    )
    await store.claim(attrs.evolve(CLAIM, request=request))
    with connected(url) as connection:
        (row,) = connection.exec_driver_sql("SELECT * FROM promptlayer_exec_starts").all()
    stored = " ".join(map(str, row))
    assert "topic" in stored
    assert "otters" not in stored
    assert "example.org" not in stored


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), "20", True])
def test_a_malformed_setting_is_refused(seconds: Any) -> None:
    """When the store is made, before any I/O."""
    with pytest.raises(ConfigurationError, match="restart_unknown_after"):
        SQLStartStore("sqlite:///starts.sqlite", restart_unknown_after=seconds)


async def test_a_key_that_no_database_stores_is_refused(store: SQLStartStore) -> None:
    """One of them would fail all that are asked for with it."""
    for key in ("", "a\0b", "\ud800", "x" * 501):
        with pytest.raises(ValueError, match="key must be 1 to 500 characters"):
            await store.find(key)
    with pytest.raises(TypeError, match="key must be a str, got 7"):
        await store.forget(7)  # type: ignore[arg-type]
    assert await store.find("x" * 500) is None


async def test_the_callback_of_another_attempt_is_logged(
    store_of: Callable[..., SQLStartStore], url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Both attempts ran, and the key belongs to one of them: the other id must not get lost."""
    store = store_of(restart_unknown_after=20.0)
    await lose(store)
    age(url, 21.0)
    assert await store.claim(AGAIN) is None
    assert await store.record("order", "second", 8)
    assert not await store.resolve("first", 7)
    assert "execution 7 also started for the key 'order'" in caplog.text


async def test_nothing_waits_long_for_others(
    store: SQLStartStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request of a web app must not take longer so that its row can join others."""
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, perf_counter=time.perf_counter)
    monkeypatch.setattr(threads, "time", clock)
    await store.claim(CLAIM)
    await store.record("order", "first", 787)
    await store.find("order")
    assert len(waits) >= 3
    assert max(waits) <= 0.005
