"""A watch in any weather: snapshots go forward, are its own, and end in time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import aclosing
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from promptlayer_exec import (
    ExecutionFailed,
    ExecutionTimeout,
    Forbidden,
    NotFound,
    SessionClosed,
)
from promptlayer_exec.simulator import Scenario, SimNode

RANKS = {"QUEUED": 0, "RUNNING": 1, "SUCCESS": 2, "FAILED": 2, "SKIPPED": 2}
PASSING = [
    *["fair", "429", "429 for 3 s", "503", "503 for 3 s", "a page", "cut", "cut before the answer"],
    *["cut in the answer", "stall", "slow", "late", "too late"],
]
WEATHER = [*PASSING, *PASSING, "403", "404"]
KINDS = ["stream", "finished_nodes", "wait", "output"]
HELD = ["Draft", "Answer"]
GRACE = 10.0
LITTLE = 1e-6
OWNERS = ["mine", "theirs"]
SECONDS = st.sampled_from([0.0, 1.0, 4.0, 20.0])


def scenario(owner: str) -> Scenario:
    """Return a run of which the machine ends two nodes, with values that name their owner."""
    return Scenario(
        [
            SimNode("Plan", f"{owner} Plan", 4.0),
            SimNode("Draft", f"{owner} Draft", None),
            SimNode("Answer", f"{owner} Answer", None, after=["Draft"], is_output_node=True),
        ]
    )


async def read(execution: Any, kind: str, timeout: float | None, seen: list[Any]) -> Any:
    """Read all that a call returns or yields."""
    call = getattr(execution, kind)(timeout=timeout)
    if kind in {"wait", "output"}:
        return await call
    async with aclosing(call) as items:
        async for item in items:
            seen.append(item)  # noqa: PERF401 - at once
    return seen


class Watching(RuleBasedStateMachine):
    """Follows two runs: one that the session has started, and one of somebody else's."""

    def __init__(self, world: Any) -> None:
        super().__init__()
        self.world, self.sim = world, world.sim
        self.sim.add_workflow("flow", scenario("mine"))
        self.session = world.open_session()
        mine = world.run(self.session.start("flow")).id
        self.ids = {"mine": mine, "theirs": self.sim.add_execution(scenario("theirs"))}
        self.grace_ends = {"mine": world.now() + GRACE, "theirs": 0.0}
        self.unfinished = [(owner, node) for owner in OWNERS for node in HELD]

    @rule(
        kind=st.sampled_from(KINDS),
        owner=st.sampled_from(OWNERS),
        timeout=st.sampled_from([None, None, 0.0, 3.0, 20.0]),
        weather=st.lists(st.sampled_from(WEATHER), max_size=4),
        seconds=SECONDS,
    )
    def follow(self, kind: str, owner: str, timeout: Any, weather: Any, seconds: float) -> None:
        """Begin to follow a run, with faults of the next polls."""
        self.world.coming["GET"] += weather
        seen: list[Any] = []
        reading = read(self.session.execution(self.ids[owner]), kind, timeout, seen)
        deadline = self.world.now() + (math.inf if timeout is None else timeout)
        about = {"kind": kind, "owner": owner, "deadline": deadline, "seen": seen}
        self.world.begin(reading, seconds, **about)

    @precondition(lambda self: self.world.running())
    @rule(seconds=st.sampled_from([0.1, 2.0, 15.0]))
    def begin_outage(self, seconds: float) -> None:
        """Refuse connections for a while."""
        self.world.begin_outage(seconds)

    @rule(owner=st.sampled_from(OWNERS), seconds=SECONDS)
    def wake(self, owner: str, seconds: float) -> None:
        """Wake the watch, as a callback does: in time, too early, or for nothing."""

        async def wake() -> None:
            self.session.wake(self.ids[owner])
            await asyncio.sleep(seconds)

        self.world.run(wake())

    @precondition(lambda self: self.unfinished and self.world.calls)
    @rule(data=st.data(), status=st.sampled_from(["SUCCESS", "SUCCESS", "FAILED"]), seconds=SECONDS)
    def finish(self, data: st.DataObject, status: str, seconds: float) -> None:
        """End a node at the server."""
        owner, node = data.draw(st.sampled_from(self.unfinished))
        self.unfinished.remove((owner, node))
        if self.sim.state(self.ids[owner])[node] != "SKIPPED":
            self.sim.finish(self.ids[owner], node, status=status)
        self.world.run(asyncio.sleep(seconds))

    @precondition(lambda self: self.world.running())
    @rule(data=st.data(), seconds=SECONDS)
    def cancel(self, data: st.DataObject, seconds: float) -> None:
        """Cancel a call after a while."""
        number = data.draw(st.sampled_from(self.world.running()))
        self.world.run(asyncio.sleep(seconds))
        self.world.cancel(number)

    @precondition(lambda self: len(self.world.calls) % 4 == 3)
    @rule()
    def close(self) -> None:
        """Close the session, and go on with another one, which has not started the run."""
        self.world.close(self.session, within=0.0)
        self.session, self.grace_ends["mine"] = self.world.open_session(), 0.0

    @invariant()
    def check(self) -> None:
        """Check all that is promised of each call at any time."""
        for call in self.world.calls:
            self.world.check_time(call, call.deadline)
            known = self.sim.state(self.ids[call.owner])
            if call.kind == "stream":
                self.check_snapshots(call, known)
            if call.task.done():
                self.check_end(call, known)

    def check_snapshots(self, call: Any, known: dict[str, str]) -> None:
        """Check that snapshots are of the run itself, and only go forward."""
        for snapshot in call.seen:
            assert snapshot.execution_id == self.ids[call.owner]
            assert is_final(known) or not snapshot.complete
            for name, node in snapshot.nodes.items():
                assert RANKS[node.status] <= RANKS[known[name]]
                assert node.value in (None, f"{call.owner} {name}")
        for earlier, later in pairwise(call.seen):
            assert not earlier.complete
            assert later.poll == earlier.poll + 1
            for name, node in later.nodes.items():
                before = earlier.nodes[name].status
                assert before == node.status or RANKS[before] < RANKS[node.status]

    def check_end(self, call: Any, known: dict[str, str]) -> None:
        """Check that a call ended for a reason that there was."""
        execution_id = self.ids[call.owner]
        served = [
            (at, name)
            for at, request, name in self.world.served
            if request.query.get("workflow_version_execution_id") == str(execution_id)
        ]
        match call.error:
            case None if call.task.cancelled():
                assert call.is_cancelled
            case None:
                assert is_final(known)
                self.check_result(call, known)
            case ExecutionFailed():
                assert call.kind == "output"
                assert is_final(known)
                assert known["Answer"] != "SUCCESS"
            case ExecutionTimeout():
                assert call.ended >= call.deadline - LITTLE
            case SessionClosed():
                assert call.is_closed
            case Forbidden():
                assert "403" in {name for _, name in served}
            case NotFound():
                grace_ends = self.grace_ends[call.owner]
                assert any(name == "404" and at >= grace_ends for at, name in served)
            case error:
                raise AssertionError(f"there was no reason for {error!r}")
        if call.error is not None:
            assert call.error.execution_id == execution_id
            if call.kind == "stream" and call.seen:
                assert call.error.last_snapshot.poll >= call.seen[-1].poll

    def check_result(self, call: Any, known: dict[str, str]) -> None:
        """Check what came of a call that succeeded."""
        result = call.task.result()
        if call.kind == "stream":
            assert call.seen[-1].complete
        elif call.kind == "wait":
            assert (result.complete, result.execution_id) == (True, self.ids[call.owner])
        elif call.kind == "output":
            assert result == f"{call.owner} Answer"
        else:
            assert sorted((node.name, node.status) for node in call.seen) == sorted(known.items())

    def teardown(self) -> None:
        """End the session."""
        self.world.end(self.check_at_the_end, self.session)

    def check_at_the_end(self) -> None:
        """Check that every call ends soon once the weather is fair and the runs are complete."""
        for kind in KINDS:
            for owner in OWNERS:
                self.follow(kind, owner, None, [], 1.0)
        for owner, node in self.unfinished:
            if self.sim.state(self.ids[owner])[node] != "SKIPPED":
                self.sim.finish(self.ids[owner], node)
            self.world.run(asyncio.sleep(20.0))
            self.check()
        self.world.run(asyncio.sleep(20.0))
        self.check()
        assert self.world.running() == []


def is_final(states: dict[str, str]) -> bool:
    """Return True if all nodes are final."""
    return all(RANKS[status] == 2 for status in states.values())


def test_a_watch_in_any_weather(make_world: Any, run_machine: Callable[..., None]) -> None:
    """Snapshots never go backward, the last one is the complete one, and no deadline is passed."""
    run_machine(lambda: Watching(make_world()), 12, 30)
