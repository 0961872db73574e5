"""Starts in any weather: none is sent twice, and no id is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from promptlayer_exec import (
    BadRequest,
    ConnectionFailed,
    ExecutionStarted,
    ExecutionTimeout,
    RateLimited,
    RetryPolicy,
    SessionClosed,
    StartFailed,
    StartUnknown,
)
from promptlayer_exec._integration import receive_callback
from promptlayer_exec.simulator import Scenario, SimNode
from promptlayer_exec.webhooks import Callbacks

REFUSED = ["429", "429 for 3 s"]
ANSWERED = ["fair", "slow", "late"]  # within the session's `request_timeout`
WEATHER = [
    *["fair", "fair", "fair", *REFUSED, "503", "503 for 3 s", "400", "a page"],
    *["cut", "cut before the answer", "cut in the answer"],
    *["lost", "stall", "slow", "late", "too late"],
]
DONE = Scenario([SimNode("Answer", "42", is_output_node=True)])
CALLBACKS = Callbacks("http://127.0.0.1:9/callbacks", secret="s3cret")
SENT_WITHIN, REQUEST_TIMEOUT = 12.0, 5.0  # the session's settings
# A start whose time is over reads on for a moment: what has arrived may be the id of a paid run.
ANSWERED_WITHIN = REQUEST_TIMEOUT + 0.02
SECONDS = st.sampled_from([0.0, 0.0, 0.3, 3.0, 12.0])


class Starting(RuleBasedStateMachine):
    """Starts runs, each of a workflow of its own."""

    def __init__(self, world: Any) -> None:
        super().__init__()
        self.world, self.sim = world, world.sim
        self.events: list[Any] = []
        self.outage = 6.0
        self.session = self.open_session()

    def open_session(self) -> Any:
        """Return a session that gives each start a callback of its own."""
        self.outage = 66.0 - self.outage  # longer than the deadline, or shorter
        return self.world.open_session(
            callbacks=CALLBACKS,
            observers=[self.events.append],
            wait_timeout=SENT_WITHIN,
            retry=RetryPolicy(outage=self.outage),
        )

    @rule(weather=st.lists(st.sampled_from(WEATHER), max_size=2), seconds=SECONDS)
    def start(self, weather: list[str], seconds: float) -> None:
        """Begin a start, which meets faults, or leaves them to the next."""
        self.world.coming["POST"] += weather
        name = f"flow-{len(self.world.calls)}"
        self.sim.add_workflow(name, DONE)
        self.world.begin(self.session.start(name), seconds, name=name)

    @precondition(lambda self: self.world.running())
    @rule(seconds=st.sampled_from([0.1, 2.0, 40.0]))
    def begin_outage(self, seconds: float) -> None:
        """Refuse connections for a while."""
        self.world.begin_outage(seconds)

    @precondition(lambda self: self.world.running())
    @rule(data=st.data(), turns=st.integers(0, 40))
    def cancel(self, data: st.DataObject, turns: int) -> None:
        """Cancel a caller, perhaps beside an answer."""
        number = data.draw(st.sampled_from(self.world.running()))
        self.world.turn(turns)
        self.world.cancel(number)

    @precondition(lambda self: self.world.running())
    @rule(turns=st.integers(0, 40))
    def close(self, turns: int) -> None:
        """Close the session, which waits for the starts on the wire, and go on with another."""
        self.world.turn(turns)
        self.world.close(self.session, within=ANSWERED_WITHIN)
        self.session = self.open_session()

    @precondition(lambda self: self.sim.runs)
    @rule(data=st.data(), seconds=SECONDS)
    def call_back(self, data: st.DataObject, seconds: float) -> None:
        """Let the callback of a run come: before, after or instead of the answer, or again."""
        run = data.draw(st.sampled_from(self.sim.runs))
        token = str(run.body["callback_url"]).rpartition("/")[2]

        async def call_back() -> None:
            receive_callback(self.session, token, run.execution_id)
            await asyncio.sleep(seconds)

        self.world.run(call_back())

    @invariant()
    def check(self) -> None:
        """Check that each start was sent once, and in time: only a 429 proves that none runs."""
        for call in self.world.calls:
            asked = self.asked(call)
            assert [weather for _, weather in asked[:-1] if weather not in REFUSED] == []
            latest = max((at + ANSWERED_WITHIN for at, _ in asked), default=0.0)
            self.world.check_time(call, max(call.began + SENT_WITHIN, latest))

    def asked(self, call: Any) -> list[tuple[float, str]]:
        """Return when the server read the request of a start, and with which weather."""
        path = f"/workflows/{call.name}/run"
        return [(at, weather) for at, request, weather in self.world.served if request.path == path]

    def teardown(self) -> None:
        """End the session."""
        self.world.end(self.check_at_the_end, self.session)

    def check_at_the_end(self) -> None:
        """Check that every start has ended as it should."""
        self.world.run(asyncio.sleep(SENT_WITHIN + 4 * ANSWERED_WITHIN))
        self.check()
        assert self.world.running() == []
        for call in self.world.calls:
            asked = self.asked(call)
            ids = [run.execution_id for run in self.sim.runs if run.workflow == call.name]
            # A server that goes away ends connections, perhaps before it has read the request.
            latest = call.began + SENT_WITHIN + ANSWERED_WITHIN
            was_cut = any(call.began <= at <= latest for at in self.world.outages)
            may_be_lost = was_cut or (asked and asked[-1][1] not in [*REFUSED, *ANSWERED])
            self.check_end(call, ids, [weather for _, weather in asked], may_be_lost)
            self.check_report(call, ids, may_be_lost)
            if call.is_cancelled:
                assert all(at <= call.ended for at, _ in asked)

    def check_end(self, call: Any, ids: list[int], asked: list[str], may_be_lost: bool) -> None:
        """Check what a caller got."""
        match call.error:
            case None if call.task.cancelled():
                assert call.is_cancelled
            case None:
                assert ids == [call.task.result().id]
                assert call.task.result().workflow == call.name
            case StartUnknown() as error:
                assert may_be_lost
                assert (error.workflow, error.execution_id) == (call.name, None)
                self.recover(error, ids)
            case SessionClosed() as error:
                assert call.is_closed
                assert ids == [error.execution_id] * (error.execution_id is not None)
            case RateLimited() | ExecutionTimeout() | ConnectionFailed():
                assert ids == []
                assert set(asked) <= {*REFUSED}
            case BadRequest():
                assert asked[-1] == "400"
            case error:
                raise AssertionError(f"there was no reason for {error!r}")

    def check_report(self, call: Any, ids: list[int], may_be_lost: bool) -> None:
        """Check that a start was reported once, and logged if its caller does not have it."""
        is_gone = call.task.cancelled()
        log = [line for line in self.world.log if repr(call.name) in line]
        log = [line for line in log if "may have" in line or "nobody received" in line]
        (event,) = [
            event
            for event in self.events
            if isinstance(event, ExecutionStarted | StartFailed)
            and event.request.workflow == call.name
            and not getattr(event, "recovered", False)
        ]
        if isinstance(event, ExecutionStarted):
            assert ids == [event.execution_id]
            assert event.abandoned == (is_gone or isinstance(call.error, SessionClosed))
            assert [f"execution {ids[0]} " in line for line in log] == [True] * event.abandoned
        elif isinstance(event.error, StartUnknown):
            assert may_be_lost
            assert len(ids) <= 1
            assert ["may have" in line for line in log] == [True] * is_gone
        else:
            assert (ids, log) == ([], [])
        if not is_gone:
            assert event.duration == pytest.approx(call.ended - call.began)

    def recover(self, error: StartUnknown, ids: list[int]) -> None:
        """Check that a lost start is found by its callback, and by nothing else."""

        async def recover() -> list[int]:
            async with self.open_session() as session:
                for execution_id in ids:
                    receive_callback(session, error.callback_token, execution_id)
                with suppress(StartUnknown):
                    return [(await session.recover(error, timeout=1.0)).id]
            return []

        assert self.world.run(recover()) == ids


def test_starts_in_any_weather(make_world: Any, run_machine: Callable[..., None]) -> None:
    """Each is taken by the server once at most, unless the caller hears that this is not known."""
    run_machine(lambda: Starting(make_world()), 25, 30)
