"""Starts with keys, of several sessions and one record, in any weather: each key starts one run."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from promptlayer_exec import (
    BadRequest,
    ConnectionFailed,
    Execution,
    ExecutionStarted,
    ExecutionTimeout,
    KeyConflict,
    RateLimited,
    SessionClosed,
    StartUnknown,
    StoreUnavailable,
)
from promptlayer_exec._database.database import Database
from promptlayer_exec._integration import receive_callback, resolve_start
from promptlayer_exec.simulator import Fault, Scenario, SimNode
from promptlayer_exec.starts import (
    StartClaim,
    StoredStart,
    _Adopted,
    _Forgotten,
    _Recorded,
    _RecordTable,
    _Released,
    _Resolved,
    _tables,
)
from promptlayer_exec.webhooks import Callbacks

WEATHER = [
    *["fair", "fair", "fair", "429", "429 for 3 s", "503", "400", "slow", "late"],
    *["cut", "cut before the answer", "cut in the answer", "lost", "stall", "too late"],
]
DONE = Scenario([SimNode("Answer", "42", is_output_node=True)])
CALLBACKS = Callbacks("http://127.0.0.1:9/callbacks", secret="s3cret")
KEYS = ["a", "b"]
SESSIONS = 3
RESTART_AFTER = 60.0
# The sessions' settings; and for how long a start waits for a record that is away.
SENT_WITHIN, REQUEST_TIMEOUT, RECORDED_WITHIN = 12.0, 5.0, 5.0
SECONDS = st.sampled_from([0.0, 0.0, 0.3, 3.0, 9.0, 70.0])


class VirtualDatabase(Database):
    """A SQLite file whose clock is a function."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        super().__init__(sa.make_url(f"sqlite:///{path}"))
        self._clock = clock
        sa.event.listen(self.engine, "connect", self._hurry)

    @staticmethod
    def _hurry(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    @property
    def now(self) -> sa.ColumnElement[float]:
        """The time on that clock."""
        return sa.bindparam("the_now", callable_=self._clock, type_=sa.Double)


class Records:
    """The database of all sessions, without threads: each call takes a few turns of the loop.

    Attributes:
        is_away: whether it cannot be used.
        has_been_away: whether it could not be used for a while.
        forgotten: how many times a key has been forgotten.
        claims: the number of the session, the key and what `forgotten` was, by the claim's token.
    """

    def __init__(self, clock: Callable[[], float], restart_after: float | None) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.database = VirtualDatabase(Path(self._directory.name, "starts.sqlite"), clock)
        self.table = _RecordTable(self.database, restart_after)
        _tables.create_all(self.database.engine)
        self.is_away = self.has_been_away = False
        self.forgotten = dict.fromkeys(KEYS, 0)
        self.claims: dict[str, tuple[int, str, int]] = {}

    def call(self, what: str, argument: Any) -> Any:
        """Call a method of the table."""
        with self.database.engine.begin() as connection:
            return getattr(self.table, what)(connection, [argument])[0]

    def row(self, key: str) -> StoredStart | None:
        """Return what is recorded for a key."""
        return cast("StoredStart | None", self.call("find", key))

    def close(self) -> None:
        """Remove the file."""
        self.database.close()
        self._directory.cleanup()


class Process:
    """The store of one session, which may be killed: nothing that it does has an effect then."""

    def __init__(self, records: Records, number: int) -> None:
        self.records = records
        self.number = number
        self.is_killed = False
        self.buried = asyncio.Event()

    async def _call(self, what: str, argument: Any, patience: float) -> Any:
        await asyncio.sleep(0)
        if self.is_killed:
            await self.buried.wait()
            raise StoreUnavailable("it was killed")
        if self.records.is_away:
            await asyncio.sleep(patience)
            raise StoreUnavailable("the database is away")
        result = self.records.call(what, argument)
        if what == "claim" and result is None:
            key = argument.key
            claimed = (self.number, key, self.records.forgotten[key])
            # A start that was refused claims again, and its key may have been forgotten meanwhile.
            self.records.claims.pop(argument.token, None)
            self.records.claims[argument.token] = claimed
        await asyncio.sleep(0)
        return result

    async def find(self, key: str, *, patience: float = 5.0) -> Any:
        """Look at a row."""
        return await self._call("find", key, patience)

    async def claim(self, claim: StartClaim, *, patience: float = 5.0) -> Any:
        """Claim a key."""
        return await self._call("claim", claim, patience)

    async def record(
        self, key: str, token: str, execution_id: int | None, *, patience: float = 5.0
    ) -> Any:
        """Record how a start has ended."""
        return await self._call("record", _Recorded(key, token, execution_id), patience)

    async def release(self, key: str, token: str, *, patience: float = 5.0) -> Any:
        """Release a key."""
        return await self._call("release", _Released(key, token), patience)

    async def resolve(self, token: str, execution_id: int, *, patience: float = 5.0) -> Any:
        """Record what a callback says."""
        return await self._call("resolve", _Resolved(token, execution_id), patience)


class Keyed(RuleBasedStateMachine):
    """Starts a few keys in several sessions, again and again."""

    restart_after: float | None = None

    def __init__(self, world: Any) -> None:
        super().__init__()
        self.world, self.sim = world, world.sim
        self.is_stormy = False
        self.events: list[Any] = []
        self.records = Records(world.now, self.restart_after)
        self.processes: list[Process] = []
        self.sessions: list[Any] = []
        for number in range(SESSIONS):
            self.open_session(number)
        self.buried: list[tuple[Process, Any]] = []
        self.sim.add_workflow("write", DONE)
        self.sim.clear_faults()
        self.sim.inject(Fault(self.affect, times=None))

    def open_session(self, number: int) -> None:
        """Open a session in a process of its own."""
        process = Process(self.records, len(self.processes))
        session = self.world.open_session(
            starts=process,
            callbacks=CALLBACKS,
            observers=[self.events.append],
            wait_timeout=SENT_WITHIN,
        )
        self.processes.append(process)
        self.sessions[number:] = [session, *self.sessions[number + 1 :]]

    def process_of(self, number: int) -> Process:
        """Return the process of a session."""
        return cast(Process, self.sessions[number]._settings.starts)

    async def affect(self, request: Any, answer: Any) -> Any:
        """Let nothing of a killed process reach the server."""
        process, *_ = self.records.claims[self.token_in(self.sim.requests[-1].body)]
        if self.processes[process].is_killed:
            return await self.world.weather["cut"](request, answer)
        return await self.world._affect(request, answer)

    @staticmethod
    def token_in(body: bytes | dict[str, Any]) -> str:
        """Return the token of a start, given its request."""
        values = body if isinstance(body, dict) else json.loads(body)
        return str(values["callback_url"]).rpartition("/")[2]

    # What happens.

    @initialize(is_stormy=st.booleans())
    def begin(self, *, is_stormy: bool) -> None:
        """Choose whether the database may be lost."""
        self.is_stormy = is_stormy

    @rule(
        numbers=st.lists(st.integers(0, SESSIONS - 1), min_size=1, max_size=4),
        key=st.sampled_from(KEYS),
        weather=st.sampled_from(WEATHER),
        seconds=SECONDS,
    )
    def start(self, numbers: list[int], key: str, weather: str, seconds: float) -> None:
        """Begin a start, and repeat it in other sessions."""
        self.world.coming["POST"].append(weather)
        for number in numbers:
            self.begin_call(number, key, "otters", seconds)

    @rule(number=st.integers(0, SESSIONS - 1), key=st.sampled_from(KEYS), seconds=SECONDS)
    def start_another(self, number: int, key: str, seconds: float) -> None:
        """Use the key for another request."""
        self.begin_call(number, key, "seals", seconds)

    def begin_call(self, number: int, key: str, topic: str, seconds: float) -> None:
        """Begin a call, and let time pass."""
        call = self.sessions[number].start("write", {"topic": topic}, key=key)
        about = {"key": key, "topic": topic, "is_checked": False}
        epoch, process = self.records.forgotten[key], self.process_of(number)
        self.world.begin(call, seconds, epoch=epoch, process=process, **about)

    @rule(number=st.integers(0, SESSIONS - 1), turns=st.integers(0, 40))
    def kill(self, number: int, turns: int) -> None:
        """Let a session vanish, and open another."""
        self.world.turn(turns)
        process = self.process_of(number)
        process.is_killed = True
        self.buried.append((process, self.sessions[number]))
        self.world.calls[:] = [call for call in self.world.calls if not self.is_lost(call)]
        self.open_session(number)

    @staticmethod
    def is_lost(call: Any) -> bool:
        """Return True if nobody knows how a call ends, because its process was killed."""
        return call.process.is_killed and not call.task.done()

    @precondition(lambda self: self.world.running())
    @rule(data=st.data(), turns=st.integers(0, 40))
    def cancel(self, data: st.DataObject, turns: int) -> None:
        """Cancel a caller."""
        number = data.draw(st.sampled_from(self.world.running()))
        self.world.turn(turns)
        self.world.cancel(number)

    @rule(number=st.integers(0, SESSIONS - 1), turns=st.integers(0, 40))
    def close(self, number: int, turns: int) -> None:
        """Close a session, and open another."""
        self.world.turn(turns)
        process = self.process_of(number)
        for call in self.world.calls:
            if call.process is process and not call.task.done():
                call.is_closed = True
        self.world.run(self.sessions[number].aclose())
        self.open_session(number)

    @precondition(lambda self: self.sim.runs)
    @rule(data=st.data(), seconds=SECONDS)
    def call_back(self, data: st.DataObject, seconds: float) -> None:
        """Let the callback of a run come to any process: early, late or again."""
        run = data.draw(st.sampled_from(self.sim.runs))
        token = self.token_in(run.body)
        _, key, forgotten = self.records.claims[token]
        before = self.records.row(key)
        is_news = before is not None and before.execution_id is None
        is_news = is_news and forgotten == self.records.forgotten[key]

        is_recorded = self.records.call("resolve", _Resolved(token, run.execution_id))
        # Those of the latest two attempts count.
        if is_news and token in self.tokens(key)[-2:]:
            assert is_recorded
        self.world.run(asyncio.sleep(seconds))

    def tokens(self, key: str) -> list[str]:
        """Return the tokens of the attempts to start a key since it was forgotten."""
        now = (key, self.records.forgotten[key])
        return [token for token, (_, *about) in self.records.claims.items() if tuple(about) == now]

    @rule(key=st.sampled_from(KEYS))
    def forget(self, key: str) -> None:
        """Forget a key: the next start with it is another one."""
        self.records.call("forget", _Forgotten(key, only_unknown=False))
        self.records.forgotten[key] += 1

    @rule(key=st.sampled_from(KEYS))
    def forget_if_unknown(self, key: str) -> None:
        """Forget a key as somebody does who has seen that its run is not known."""
        before = self.records.row(key)
        is_forgotten = self.records.call("forget", _Forgotten(key, only_unknown=True))
        assert is_forgotten == (before is not None and before.state == "unknown")
        self.records.forgotten[key] += is_forgotten

    @precondition(lambda self: self.sim.runs)
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def adopt(self, data: st.DataObject, key: str) -> None:
        """Let somebody record a run that the dashboard shows for a key, or another key's."""
        run = data.draw(st.sampled_from(self.sim.runs))
        token = self.token_in(run.body)
        before = self.records.row(key)
        others = [self.records.row(other) for other in KEYS if other != key]
        is_another_s = any(row and row.execution_id == run.execution_id for row in others)
        if not (self.is_of(token, key) or is_another_s):
            return  # nobody would take it for the key's

        done = self.records.call("adopt", _Adopted(key, run.execution_id))
        assert isinstance(done, ValueError) == (is_another_s and before is not None)
        if isinstance(done, ValueError):
            assert self.records.row(key) == before
        elif done:
            assert before is not None
            assert before.state == "unknown" or before.execution_id == run.execution_id
            assert cast(StoredStart, self.records.row(key)).execution_id == run.execution_id
        elif self.is_of(token, key):
            assert before is None or before.state != "unknown"

    def is_of(self, token: str, key: str) -> bool:
        """Return True if a token is that of a start of a key since it was forgotten."""
        return token in self.tokens(key)

    @rule(number=st.integers(0, SESSIONS - 1), key=st.sampled_from(KEYS), seconds=SECONDS)
    def find(self, number: int, key: str, seconds: float) -> None:
        """Begin to look for the run of a key."""
        about = {"key": key, "topic": None, "is_checked": False}
        epoch, process = self.records.forgotten[key], self.process_of(number)
        call = self.sessions[number].find(key)
        self.world.begin(call, seconds, epoch=epoch, process=process, **about)

    @precondition(lambda self: self.sim.runs)
    @rule(data=st.data(), number=st.integers(0, SESSIONS - 1), is_away=st.booleans())
    def learn(self, data: st.DataObject, number: int, *, is_away: bool) -> None:
        """Let the router of a process receive a callback, perhaps while the database is away."""
        run = data.draw(st.sampled_from(self.sim.runs))
        token = self.token_in(run.body)
        _, key, _ = self.records.claims[token]
        before = self.records.row(key)
        is_news = before is not None and token in self.tokens(key)[-2:]

        session = self.sessions[number]
        self.records.is_away = is_away
        self.records.has_been_away |= is_away
        receive_callback(session, token, run.execution_id)
        (outcome,) = self.world.run(settled(resolve_start(session, token, run.execution_id)))
        assert isinstance(outcome, StoreUnavailable) == is_away
        self.records.is_away = False
        self.world.run(asyncio.sleep(6.0))
        if is_news:
            assert cast(StoredStart, self.records.row(key)).execution_id is not None

    @precondition(lambda self: self.is_stormy and self.world.running())
    @rule(seconds=st.sampled_from([0.5, 4.0, 12.0]))
    def lose_the_database(self, seconds: float) -> None:
        """Let no process use the database for a while."""
        self.records.is_away = self.records.has_been_away = True
        self.world.run(asyncio.sleep(seconds))
        self.records.is_away = False

    # What must be true.

    @invariant()
    def check(self) -> None:
        """Check that each key has started one run, and that no id is lost."""
        for key in KEYS:
            self.check_row(self.records.row(key))
        for runs in self.runs_by_claim().values():
            self.check_runs(runs)
        for call in self.world.calls:
            latest = call.began + SENT_WITHIN + REQUEST_TIMEOUT + 2 * RECORDED_WITHIN
            self.world.check_time(call, latest)
            if call.task.done() and not call.is_checked:
                call.is_checked = True
                self.check_end(call)
        started = [event for event in self.events if isinstance(event, ExecutionStarted)]
        ids = [event.execution_id for event in started if not event.recovered]
        assert len(ids) == len(set(ids)), "a run was reported twice"

    def runs_by_claim(self) -> dict[tuple[str, int], list[Any]]:
        """Return the runs of each key, for each time that it had been forgotten."""
        found: dict[tuple[str, int], list[Any]] = {}
        for run in self.sim.runs:
            _, key, forgotten = self.records.claims[self.token_in(run.body)]
            found.setdefault((key, forgotten), []).append(run)
        return found

    def started_at(self, run: Any) -> float:
        """Return when the server received the request of a run."""
        (at,) = [
            at
            for at, request, _ in self.world.served
            if request.method == "POST"
            and self.token_in(request.body) == self.token_in(run.body)
            and json.loads(request.body) == run.body
        ][-1:]
        return float(at)

    def check_row(self, row: StoredStart | None) -> None:
        """Check that a row says what has happened."""
        if row is None:
            return
        assert (row.state == "started") == (row.execution_id is not None)
        ids = {run.execution_id: self.token_in(run.body) for run in self.sim.runs}
        if row.execution_id is not None:
            assert self.records.claims[ids[row.execution_id]][1] == row.key

    def check_runs(self, runs: list[Any]) -> None:
        """Check that one start of a key has become one run, or another after long enough."""
        if self.restart_after is None:
            assert len(runs) == 1, "it was started twice"
        times = [self.started_at(run) for run in runs]
        for earlier, later in pairwise(times):
            assert later - earlier >= cast(float, self.restart_after), "it was started too early"

    def check_end(self, call: Any) -> None:
        """Check what a caller got."""
        if call.task.cancelled():
            assert call.is_cancelled
            return
        match call.error:
            case None if call.task.result() is not None:
                self.check_handle(call, call.task.result())
            case None:
                assert call.topic is None, "only a look-up finds nothing"
            case StartUnknown() as error:
                assert error.key == call.key
                assert self.may_be_lost(call.key, {call.epoch, self.records.forgotten[call.key]})
            case KeyConflict() as error:
                assert error.key == call.key
                assert "inputs.topic" in str(error)
            case SessionClosed():
                assert call.is_closed
            case StoreUnavailable() as error:
                assert "started nothing" in str(error)
            case RateLimited() | ExecutionTimeout() | ConnectionFailed() | BadRequest():
                pass
            case error:
                raise AssertionError(f"there was no reason for {error!r}")

    def may_be_lost(self, key: str, epochs: set[int]) -> bool:
        """Return True if something has happened that can make a start of a key unknown."""
        claims = self.records.claims
        tokens = {
            token
            for token, (_, claimed, epoch) in claims.items()
            if claimed == key and epoch in epochs
        }
        was_killed = any(self.processes[claims[token][0]].is_killed for token in tokens)
        weather = {
            name
            for _, request, name in self.world.served
            if request.method == "POST" and self.token_in(request.body) in tokens
        }
        is_lost = not weather <= {"fair", "slow", "late", "429", "429 for 3 s", "400"}
        return is_lost or was_killed or self.records.has_been_away

    def check_handle(self, call: Any, handle: Execution) -> None:
        """Check that a handle is that of a run with the call's key and inputs."""
        (run,) = [run for run in self.sim.runs if run.execution_id == handle.id]
        assert call.topic is None or run.inputs == {"topic": call.topic}
        assert self.records.claims[self.token_in(run.body)][1] == call.key

    def teardown(self) -> None:
        """End all sessions."""
        try:
            self.world.end(self.check_at_the_end, _All(self))
        finally:
            self.records.close()

    def check_at_the_end(self) -> None:
        """Check what becomes of each key when all is well again."""
        self.world.run(asyncio.sleep(SENT_WITHIN + REQUEST_TIMEOUT + 20.0))
        self.check()
        assert self.world.running() == []
        self.check_ids()
        for key in KEYS:
            self.check_repetition(key)

    def check_ids(self) -> None:
        """Check that each run is in the table, in the log, or in the hands of a caller."""
        rows = {row.execution_id for key in KEYS if (row := self.records.row(key)) is not None}
        handles = {call.task.result().id for call in self.world.calls if has_handle(call)}
        log = "\n".join(self.world.log)
        for run in self.sim.runs:
            process, key, _ = self.records.claims[self.token_in(run.body)]
            is_known = run.execution_id in rows | handles or f"execution {run.execution_id} " in log
            is_unknown = f"with the key {key!r} may have started" in log or any(
                isinstance(call.error, StartUnknown) and call.key == key
                for call in self.world.calls
                if call.task.done() and not call.task.cancelled()
            )
            assert is_known or is_unknown or self.processes[process].is_killed

    def check_repetition(self, key: str) -> None:
        """Check that the next call attaches, starts what nobody has sent, or says why not."""
        row = self.records.row(key)
        count = len(self.sim.runs)
        for number in range(SESSIONS):
            call = self.sessions[number].start("write", {"topic": "otters"}, key=key)
            (outcome,) = self.world.run(settled(call))
            (found,) = self.world.run(settled(self.sessions[number].find(key)))
            if isinstance(outcome, Execution):
                assert found == outcome
                assert row is None or row.execution_id in {None, outcome.id}
                row = self.records.row(key)
                assert row is not None
                assert row.execution_id == outcome.id
            else:
                assert row is not None
                is_unknown = isinstance(outcome, StartUnknown) and row.state == "unknown"
                assert is_unknown or isinstance(outcome, KeyConflict), outcome
        assert len(self.sim.runs) <= count + 1
        self.check()


class _All:
    """All sessions of a machine, also those of the killed processes."""

    def __init__(self, machine: Keyed) -> None:
        self._machine = machine

    async def aclose(self) -> None:
        """Close them."""
        for process, _ in self._machine.buried:
            process.buried.set()
        for _, session in self._machine.buried:
            await session.aclose()
        for session in self._machine.sessions:
            await session.aclose()


class Restarting(Keyed):
    """The same with a record that lets unknown starts be repeated."""

    restart_after = RESTART_AFTER


async def settled(call: Any) -> list[Any]:
    """Return the result or the error of a call."""
    return await asyncio.gather(call, return_exceptions=True)


def has_handle(call: Any) -> bool:
    """Return True if a call has returned a handle."""
    if not call.task.done() or call.task.cancelled() or call.error is not None:
        return False
    return call.task.result() is not None


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", [Keyed, Restarting])
def test_each_key_starts_one_run(run_machine: Any, make_world: Any, machine: Any) -> None:
    """Whoever repeats it, whatever gets lost, and whichever process is killed."""
    run_machine(lambda: machine(make_world()), 10, 40)
