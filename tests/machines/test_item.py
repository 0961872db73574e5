"""Items of a batch in any weather, with deaths, and every way out: none is paid for twice."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
from aiohttp import web
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from promptlayer_exec import PollPolicy, RequestError, RetryPolicy, StartRequest
from promptlayer_exec.dbos import Batch, StoredOutcome
from promptlayer_exec.dbos import _breaker as breakers
from promptlayer_exec.dbos import _following as following
from promptlayer_exec.dbos import _items as items
from promptlayer_exec.dbos import _liveness as liveness
from promptlayer_exec.dbos import _store as stores
from promptlayer_exec.dbos import _worker as workers
from promptlayer_exec.simulator import Scenario, SimNode
from promptlayer_exec.webhooks import Callbacks

REFUSED = ["429", "400"]  # these prove that nothing was started
POSTS = [
    *["fair", "fair", "fair", *REFUSED, "503", "cut", "cut before the answer", "lost"],
    *["cut in the answer", "a page", "die before", "die after"],
]
GETS = [
    *["fair", "429", "503", "cut", "cut before the answer", "cut in the answer", "a page"],
    *["404", "die before", "die after"],
]
LOSSES = ["lost", "die after", "cut before the answer", "cut in the answer"]  # of a run
KEYS = [str(number) for number in range(20)]
BAD = {"4", "7", "13"}  # the runs of these fail
CALLBACKS = Callbacks("http://127.0.0.1:9/callbacks", secret="s3cret")
SOME_LOSSES = st.lists(st.sampled_from(LOSSES), min_size=1, max_size=3)


class Working(RuleBasedStateMachine):
    """Works on a batch, in worker after worker: a death leaves what the database has then."""

    def __init__(self, world: Any, prepared: Path, folder: Path) -> None:
        super().__init__()
        self.world, self.sim, self.folder = world, world.sim, folder
        self.files = 0
        self.url = self.next_file()
        shutil.copy(prepared, self.path)
        self.added: set[str] = set()
        self.retried: Counter[str] = Counter()
        self.called_back: set[str] = set()
        self.given_up: set[str] = set()
        self.held: list[Any] = []  # runs that do not end
        self.is_done = True
        self.is_held = False  # the runs that start do not end
        self.died = asyncio.Event()
        self.deaths: list[tuple[float, float]] = []  # when workers began that died, and ended
        world.weather |= {"die before": self.die_before, "die after": self.die_after}
        self.sim.add_workflow("echo", self.scenario)
        self.session = world.open_session(
            poll=PollPolicy.fixed(0.01),
            retry=RetryPolicy(outage=0.2, watch_outage=0.2, base=0.001),
            rate=None,
            callbacks=CALLBACKS,
        )

    def scenario(self, inputs: Any) -> Scenario:
        """Return a run that ends at once, unless runs are held."""
        status = "FAILED" if inputs["n"] in BAD else "SUCCESS"
        value = f"output of {inputs['n']}"
        duration = None if self.is_held else 0.0
        return Scenario([SimNode("Answer", value, duration, status=status, is_output_node=True)])

    def next_file(self) -> str:
        """Return the URL of a new database."""
        self.files += 1
        self.path = self.folder / f"{id(self)}-{self.files}.sqlite"
        return f"sqlite:///{self.path}"

    @property
    def batch(self) -> Batch:
        """The batch, as a new process finds it."""
        return Batch("nightly", database_url=self.url, session=self.session, max_in_flight=3)

    async def die_before(self, request: web.BaseRequest, answer: Any) -> web.StreamResponse:
        """Let the worker die, and the server not do what was asked."""
        with closing(sqlite3.connect(self.path)) as now:
            self.url = self.next_file()
            with closing(sqlite3.connect(self.path)) as left:
                now.backup(left)
        self.world.is_cut_off = True
        self.died.set()
        return await self.world.weather["cut"](request, answer)  # type: ignore[no-any-return]

    async def die_after(self, request: web.BaseRequest, answer: Any) -> web.StreamResponse:
        """Let the worker die once the server has done what was asked."""
        answer()
        return await self.die_before(request, answer)

    # What a worker gets done depends on real time, which hypothesis must not see: no preconditions.
    @rule(
        keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=8),
        posts=st.lists(st.sampled_from(POSTS), max_size=5),
        gets=st.lists(st.sampled_from(GETS), max_size=5),
        requests=st.sampled_from([None, None, 1, 2, 5]),
    )
    def work(
        self, keys: list[str], posts: list[str], gets: list[str], requests: int | None
    ) -> None:
        """Add items, perhaps again; work until all is done, or a death or a cancellation."""
        if self.is_done and len(self.added) == len(KEYS):
            return
        self.add(keys)
        self.world.coming["POST"].extend(posts)
        self.world.coming["GET"].extend(gets)
        self.world.run(self.work_on(requests))
        self.world.calm()

    def add(self, keys: list[str]) -> None:
        """Add items, perhaps again."""
        added = self.batch.add(StartRequest("echo", {"n": key}, key=key) for key in keys)
        assert self.world.run(added) == len({*keys} - self.added)
        self.added |= {*keys}

    async def work_on(self, requests: int | None) -> None:
        """Work in one worker."""
        self.died = asyncio.Event()
        waits = [asyncio.create_task(self.died.wait())]
        if requests is not None:
            count = self.sim.request_count + requests
            waits.append(asyncio.create_task(self.sim.wait_for_requests(count)))
        self.is_done = False
        began = self.world.now()
        working = asyncio.create_task(self.batch.work())
        async with asyncio.timeout(30):
            await asyncio.wait([working, *waits], return_when=asyncio.FIRST_COMPLETED)
            for task in (working, *waits):
                task.cancel()
            await asyncio.wait([working, *waits])
        self.world.is_cut_off = False
        if self.died.is_set():
            self.deaths.append((began, self.world.now()))
        with suppress(RequestError, asyncio.CancelledError):  # an outage concerns all items
            status = await working
            self.is_done = status.finished == status.total

    @rule()
    def retry(self) -> None:
        """Start the unknown items again, knowingly."""
        if not (self.added and self.is_done):
            return
        unknown = [key for key, it in self.outcomes().items() if it.kind == "unknown"]
        assert self.world.run(self.batch.retry(unknown=True)) == len(unknown)
        self.retried.update(unknown)
        self.is_done = not unknown

    # What leads out of a state. Each first brings items there, so that it has something to do.

    @initialize(
        way_out=st.sampled_from(["adopt", "call_back", "give_up", "recheck"]), losses=SOME_LOSSES
    )
    def begin(self, way_out: str, losses: list[str]) -> None:
        """Take one of them at the beginning of each program."""
        if way_out in ("adopt", "call_back"):
            getattr(self, way_out)(4, losses)
            return
        self.give_up(4, is_working=len(losses) > 1)
        if way_out == "recheck":
            self.recheck()

    def new_keys(self, count: int) -> list[str]:
        """Return keys that were not added yet, as far as there are any left."""
        return [key for key in KEYS if key not in self.added][:count]

    def lose(self, count: int, losses: list[str]) -> list[str]:
        """Lose the responses to some starts, and return the unknown items that have a run."""
        self.add(self.new_keys(count))
        self.world.coming["POST"].extend(losses)
        for _ in range(3):  # each death needs another worker
            self.world.run(self.work_on(None))
            if self.is_done:
                break
        self.world.calm()
        unknown = [key for key, it in self.outcomes().items() if it.kind == "unknown"]
        return [key for key in unknown if self.runs_of(key)]

    @rule(count=st.integers(1, 4), losses=SOME_LOSSES)
    def adopt(self, count: int, losses: list[str]) -> None:
        """Let somebody find the runs of unknown items on the dashboard, and another item's."""
        for key in self.lose(count, losses):
            for other in self.added - {key}:
                known = self.outcomes().get(other)
                if known is not None and known.execution_id is not None:
                    with pytest.raises(ValueError, match=f"is the run of item '{other}'"):
                        self.world.run(self.batch.adopt(key, known.execution_id))
                    break
            execution_id = self.runs_of(key)[-1]
            assert self.world.run(self.batch.adopt(key, execution_id))
            assert not self.world.run(self.batch.adopt(key, execution_id + 1000))
            self.is_done = False

    @rule(count=st.integers(1, 4), losses=SOME_LOSSES)
    def call_back(self, count: int, losses: list[str]) -> None:
        """Let the callbacks of unknown items arrive."""
        for key in self.lose(count, losses):
            is_followed = self.receive_callback(key)
            if len(self.asked(key)) == 1:  # else it may be that of an earlier attempt
                assert is_followed
            if is_followed:
                self.is_done = False

    @rule(count=st.integers(1, 4), losses=SOME_LOSSES)
    def call_back_early(self, count: int, losses: list[str]) -> None:
        """Let the callbacks of all runs arrive while some items wait for another worker."""
        self.add(self.new_keys(count))
        self.world.coming["POST"].extend(losses)
        self.world.run(self.work_on(2))
        self.world.calm()
        for key in self.added:
            if self.runs_of(key):
                self.is_done &= not self.receive_callback(key)

    def receive_callback(self, key: str) -> bool:
        """Receive the callback of an item's last run. Return whether the item is followed now."""
        run = [run for run in self.sim.runs if run.inputs["n"] == key][-1]
        token = run.body["callback_url"].rpartition("/")[2]
        self.called_back.add(key)
        return bool(self.world.run(self.batch.resolve(token, run.execution_id)))

    @rule(count=st.integers(1, 4), is_working=st.booleans())
    def give_up(self, count: int, *, is_working: bool) -> None:
        """Give up runs that do not end, while a worker follows them or once it is gone."""
        self.add(self.new_keys(count))
        self.is_held = True
        before = len(self.sim.runs)
        self.world.run(self.give_up_held(is_working=is_working))
        self.is_held = False

        held = self.sim.runs[before:]
        self.held += held
        # Among them may be an item that an earlier worker left behind.
        self.given_up = {key for key, it in self.outcomes().items() if is_given_up(it)}
        assert self.given_up >= {run.inputs["n"] for run in held}

    async def give_up_held(self, *, is_working: bool) -> None:
        """Work until a run is followed that does not end, and give it up."""
        working = asyncio.create_task(self.batch.work())
        count = self.sim.request_count
        polling = asyncio.create_task(self.sim.wait_for_requests(count + 2))
        self.is_done = False
        async with asyncio.timeout(30):
            await asyncio.wait([working, polling], return_when=asyncio.FIRST_COMPLETED)
            polling.cancel()
            if is_working:  # it starts the next ones
                while not working.done():
                    await self.batch.give_up()
                    await asyncio.wait([working], timeout=0.02)
                self.is_done = (await working).finished == len(self.added)
                assert self.is_done
                return
            working.cancel()
            await asyncio.wait([working, polling])

        following = [item.key async for item in self.batch.items(state="following")]
        assert await self.batch.give_up() == len(following)
        assert await self.batch.give_up(following) == 0

    @rule()
    def recheck(self) -> None:
        """Let the runs end that were given up, and follow them again."""
        while self.held:
            self.end_run(self.held.pop())
        again = [
            key
            for key, it in self.outcomes().items()
            if it.kind == "failed" and it.execution_id is not None
        ]
        assert self.world.run(self.batch.recheck()) == len(again)
        assert self.given_up <= {*again}
        self.given_up.clear()
        self.is_done &= not again

    def end_run(self, run: Any) -> None:
        """Let a run end that was held."""
        key = run.inputs["n"]
        self.sim.finish(
            run.execution_id,
            "Answer",
            value=f"output of {key}",
            status="FAILED" if key in BAD else "SUCCESS",
        )

    def outcomes(self) -> dict[str, StoredOutcome]:
        """Return the last outcome of each item."""

        async def read() -> dict[str, StoredOutcome]:
            return {it.key: it async for it in self.batch.outcomes(until_done=False)}

        found: dict[str, StoredOutcome] = self.world.run(read())
        return found

    @invariant()
    def check(self) -> None:
        """Check that no item was started twice, unless its answer was lost and it was retried."""
        for key in KEYS:
            asked = [weather for _, weather in self.asked(key) if weather not in REFUSED]
            most = (key in self.added) + self.retried[key]
            assert len(self.runs_of(key)) <= len(asked) <= most

    def asked(self, key: str) -> list[tuple[float, str]]:
        """Return when the server read the starts of an item, and with which weather."""
        return [
            (at, weather)
            for at, request, weather in self.world.served
            if request.method == "POST" and json.loads(request.body)["input_variables"]["n"] == key
        ]

    def runs_of(self, key: str) -> list[int]:
        """Return the ids of the runs that the server has started for an item."""
        return [run.execution_id for run in self.sim.runs if run.inputs["n"] == key]

    def teardown(self) -> None:
        """End the session."""
        self.world.end(self.check_at_the_end, self.session)

    def check_at_the_end(self) -> None:
        """Check that the batch is done by a last worker, and that each outcome is true."""
        status = self.world.run(asyncio.wait_for(self.batch.work(), 30))
        self.check()
        outcomes = self.outcomes()
        assert outcomes.keys() == self.added
        kinds = Counter(outcome.kind for outcome in outcomes.values())
        assert (status.total, status.finished) == (len(self.added), len(self.added))
        assert kinds == +Counter(
            succeeded=status.succeeded, failed=status.failed, unknown=status.unknown
        )
        for key, outcome in outcomes.items():
            ids = self.runs_of(key)
            if key in self.called_back and len(self.asked(key)) == 1:
                assert outcome.execution_id == ids[-1]
            assert is_given_up(outcome) == (key in self.given_up)
            if is_given_up(outcome):
                assert outcome.execution_id == ids[-1]
            elif outcome.kind == "unknown":
                assert outcome.execution_id is None
                sent = self.asked(key)
                died = any(not sent or began < sent[-1][0] < end for began, end in self.deaths)
                assert died or sent[-1][1] != "fair"
            elif outcome.execution_id is None:
                assert outcome.error is not None
                assert outcome.error.type == "BadRequest"
                assert len(ids) <= self.retried[key]
            else:
                assert outcome.execution_id == ids[-1]
                assert outcome.succeeded == (key not in BAD)
                assert outcome.output == (f"output of {key}" if outcome.succeeded else None)


def is_given_up(outcome: StoredOutcome) -> bool:
    """Return True if an item was given up."""
    return outcome.error is not None and outcome.error.type == "ExecutionTimeout"


# DBOS is ended at once here, so its threads drop their coroutines.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_items_in_any_weather(
    make_world: Any,
    run_machine: Callable[..., None],
    batches_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each runs once, and its output is its own, whichever worker dies and at which step."""
    for module, name, value in (
        (stores, "QUEUE_INTERVAL", 0.01),
        (workers, "TIMES", attrs.evolve(workers.TIMES, check_interval=0.01, ending=0.1)),
        (time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05))),
        (items, "PATIENCE", items.Patience(restart_delay=0.02)),
        (following, "READ_PATIENCE", following.ReadPatience(first_delay=0.02)),
        (breakers, "CAUTION", breakers.Caution(first_pause=0.02)),
        (liveness, "PULSE", liveness.Pulse(interval=0.05)),
        (liveness, "_is_gone", lambda process: True),  # each worker but the one that looks
    ):
        monkeypatch.setattr(module, name, value)
    run_machine(lambda: Working(make_world(is_virtual=False), batches_file, tmp_path), 3, 3)
