"""The state of retries, recent starts, and what the log says of outages and of watches' ends."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptlayer_exec import (
    ConnectionFailed,
    ExecutionTimeout,
    NotFound,
    RequestRetried,
    RetryPolicy,
    Session,
    SessionClosed,
    WatchEnded,
    WatchStarted,
)
from promptlayer_exec._engine.retry import RecentRuns, RetryState
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "promptlayer_exec")


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """Return what was logged at one level."""
    ours = [record for record in caplog.records if record.name == "promptlayer_exec"]
    return [record.getMessage() for record in ours if record.levelno == level]


@pytest.fixture
def dead() -> str:
    """Return the address of a port on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


async def test_the_end_of_a_watch_is_one_line(
    caplog: pytest.LogCaptureFixture, session: Session, recorder: Any, held: int
) -> None:
    """It says whether the watch completed, stopped or failed; good polls are not logged."""
    waiting = asyncio.create_task(session.execution(held).wait())
    await recorder.next(WatchStarted)
    with pytest.raises(ExecutionTimeout):
        await session.execution(held).wait(timeout=0.03)
    waiting.cancel()
    ended = await recorder.next(WatchEnded)
    assert ended.error is None
    sim_404 = session.execution(7)
    with pytest.raises(NotFound):
        await sim_404.wait()
    said = [re.sub(r"polls? in \d+\.\d s", "polls", line) for line in lines(caplog, logging.INFO)]
    assert said == [
        f"execution {held}: no longer followed ({ended.polls} polls)",
        "execution 7: the watch failed with NotFound (0 polls)",
    ]
    assert len(caplog.records) == 2


async def test_an_outage_is_two_lines_however_many_requests_fail(
    caplog: pytest.LogCaptureFixture, session: Session, sim: Simulator
) -> None:
    """The first has the error and the limit; the second, that PromptLayer is reachable again."""
    ids = [sim.add_execution(Scenario([SimNode("Out")])) for _ in range(200)]
    sim.inject(Fault.status(503, times=500))
    await session.collect(ids)
    (line,) = lines(caplog, logging.WARNING)
    assert line.startswith("execution ")
    assert "the server returned 503 Service Unavailable" in line
    assert line.endswith(". Trying again for up to 5 s")
    said = lines(caplog, logging.INFO)
    assert said.count("PromptLayer is reachable again") == 1
    assert len([line for line in said if ": complete (1 poll in " in line]) == 200


async def test_a_second_outage_is_logged_again(
    caplog: pytest.LogCaptureFixture, session: Session, sim: Simulator, held: int
) -> None:
    """An outage ends with the first good answer to a request that had failed."""
    for _ in range(2):
        sim.inject(Fault.status(503, times=2))
        await session.execution(held).snapshot()
    assert len(lines(caplog, logging.WARNING)) == 2
    assert lines(caplog, logging.INFO) == ["PromptLayer is reachable again"] * 2


async def test_an_abandoned_outage_is_not_logged_as_ended(
    caplog: pytest.LogCaptureFixture, open_session: Callable[..., Session], dead: str
) -> None:
    """This holds if it was too long or if nobody waits; the next failure is logged again."""
    retry = RetryPolicy(outage=0.02, watch_outage=None, base=0.001)
    session = open_session(base_url=dead, retry=retry)
    with pytest.raises(ConnectionFailed):
        await session.execution(5).snapshot()
    with pytest.raises(ExecutionTimeout):
        await session.execution(6).wait(timeout=0.5)
    await session.aclose()
    why = f"could not reach {dead}: Connection refused. Trying again"
    single, watched = lines(caplog, logging.WARNING)
    assert single == f"execution 5: {why} for up to 0.02 s"
    assert re.fullmatch(re.escape(f"execution 6: {why} for up to ") + r"0\.\d* s", watched)
    assert "PromptLayer is reachable again" not in lines(caplog, logging.INFO)


async def test_a_start_is_named_as_a_start(
    caplog: pytest.LogCaptureFixture, open_session: Callable[..., Session], recorder: Any, dead: str
) -> None:
    """A start has no id yet, and the log has neither its inputs nor the key."""
    session = open_session(api_key="pl-very-secret", base_url=dead, retry=RetryPolicy())
    starting = asyncio.create_task(session.start("w", {"topic": "otters"}))
    await recorder.next(RequestRetried)
    await session.aclose()
    with pytest.raises(SessionClosed):
        await starting
    assert caplog.messages == [
        f"starting a run: could not reach {dead}: Connection refused. Trying again for up to 60 s"
    ]


async def test_a_timeout_shorter_than_the_retries_is_the_limit(
    caplog: pytest.LogCaptureFixture, open_session: Callable[..., Session], recorder: Any, dead: str
) -> None:
    """The log names it. Without a connection, the advice is to check the network."""
    session = open_session(base_url=dead, retry=RetryPolicy())
    for call in (session.run("w", timeout=8), session.execution(787).output(timeout=8)):
        running = asyncio.create_task(call)
        await recorder.next(RequestRetried)
        running.cancel()
        await asyncio.wait([running])
    limits = [line.rsplit(". ", 1)[1] for line in lines(caplog, logging.WARNING)]
    assert limits == ["Trying again for up to 8 s"] * 2

    session = open_session(base_url=dead, wait_timeout=0.3)
    for call in (session.start("w"), anext(session.workflows())):
        with pytest.raises(ExecutionTimeout) as caught:
            await call
        why = f". Last failure: could not reach {dead}: Connection refused. Check the network"
        assert why in str(caught.value)


async def test_a_request_for_a_workflow_is_not_named_as_a_start(
    caplog: pytest.LogCaptureFixture, session: Session, sim: Simulator
) -> None:
    """It has no execution id either, but nobody should look for a run."""
    sim.add_workflow("w", Scenario([]))
    sim.inject(Fault.status(503))
    await session.definition("w")
    (line,) = lines(caplog, logging.WARNING)
    assert line.startswith("a request: the server returned 503")


async def test_no_answer_is_quoted(
    caplog: pytest.LogCaptureFixture, session: Session, sim: Simulator, held: int
) -> None:
    """The error shows how the body begins, but the log does not; its text is printable."""
    sim.inject(Fault.malformed(body=b'{"value": "confidential"'))
    sim.inject(Fault.status(503, body=rb'{"message": "down \u001b[2J"}'))
    await session.execution(held).snapshot()
    sim.inject(Fault.status(503, body=rb'{"message": "down \u001b[2J"}'))
    await session.execution(held).snapshot()
    first, second = lines(caplog, logging.WARNING)
    assert "the 200 response is not JSON" in first
    assert "confidential" not in caplog.text
    assert "503 Service Unavailable: down \\x1b[2J. Trying again" in second


# Retry states and recent starts: arithmetic, with time and chance as arguments

seconds = st.floats(0.0, 1e6)
chances = st.floats(0.0, 1.0, exclude_max=True)
retry_policies = st.builds(
    RetryPolicy,
    base=st.floats(0.0, 100.0),
    ceiling=st.floats(0.0, 100.0),
    retry_after_ceiling=st.floats(0.0, 200.0),
)
ERROR = ConnectionError("reset")


@given(retry_policies, st.floats(0.001, 1e4), st.lists(st.none() | st.floats(0, 300)), st.data())
def test_retry_state_in_virtual_time(
    policy: Any, limit: Any, announcements: Any, data: Any
) -> None:
    """Delays follow the policy and Retry-After; those not announced stay within the limit."""
    state = RetryState(policy, limit)
    now = start = data.draw(seconds)
    unannounced = 0.0
    for failures, retry_after in enumerate(announcements, 1):
        chance = data.draw(chances)
        delay = state.delay(ERROR, now=now, chance=chance, retry_after=retry_after)
        if delay is None:
            assert unannounced == pytest.approx(limit, abs=1e-6)
            break
        own = policy.delay(failures, chance)
        announced = policy.announced(retry_after)
        assert announced <= delay <= max(announced, own)
        unannounced += delay - announced
        assert unannounced <= limit + 1e-6
        now += delay
    assert now - start <= limit + sum(policy.announced(a) for a in announcements) + 1e-3


def test_retry_state_by_hand() -> None:
    """The clock starts with the first failure; the last sleep ends with the limit."""
    state = RetryState(RetryPolicy(base=1.0, ceiling=100.0), 10.0)
    assert state.delay(ERROR, now=100.0, chance=0.0) == 1.0
    assert state.delay(ERROR, now=101.0, chance=0.0) == 2.0
    assert state.delay(ERROR, now=103.0, chance=0.0) == 4.0
    assert state.delay(ERROR, now=107.0, chance=0.0) == 3.0
    assert state.delay(ERROR, now=110.0, chance=0.0) is None


def test_retry_state_counts_attempts_that_hang() -> None:
    """Time spent in attempts counts against the limit, like time spent asleep."""
    state = RetryState(RetryPolicy(base=1.0), 10.0)
    assert state.delay(ERROR, now=0.0, chance=0.0) == 1.0
    assert state.delay(ERROR, now=9.75, chance=0.0) == 0.25
    assert state.delay(ERROR, now=40.0, chance=0.0) is None


@pytest.mark.parametrize("retry_after", [None, 5.0], ids=["unannounced", "announced"])
def test_retry_state_of_zero(retry_after: Any) -> None:
    """A limit of 0 ends the retries at the first failure."""
    state = RetryState(RetryPolicy(), 0.0)
    assert state.delay(ERROR, now=5.0, chance=0.9, retry_after=retry_after) is None


def test_retry_state_without_limit() -> None:
    """Without a limit, the retries never end, and the delay stays within the ceiling."""
    state = RetryState(RetryPolicy(), None)
    for hour in range(1000):
        assert state.delay(ERROR, now=3600.0 * hour, chance=0.5) <= 10.0


def test_announced_waits_do_not_count() -> None:
    """However often the server asks to wait, that time does not count."""
    state = RetryState(RetryPolicy(), 60.0)
    now = 0.0
    for _ in range(100):
        assert state.delay(ERROR, now=now, chance=0.5, retry_after=30.0) == 30.0
        now += 30.0
    assert state.delay(ERROR, now=now + 59.0, chance=0.0) == 1.0
    assert state.delay(ERROR, now=now + 60.0, chance=0.0) is None


def test_excused_waits_do_not_count() -> None:
    """Waiting that is not the server's fault does not count."""
    state = RetryState(RetryPolicy(base=1.0), 10.0)
    state.excuse(1000.0)  # nothing has failed yet
    state.delay(ERROR, now=0.0, chance=0.0)
    state.excuse(100.0)
    assert state.delay(ERROR, now=109.5, chance=0.0) == 0.5
    assert state.delay(ERROR, now=110.0, chance=0.0) is None


def test_recent_starts_are_covered_for_the_grace() -> None:
    """A start is recent until the grace has passed; other executions never are."""
    recent_runs = RecentRuns(10.0)
    recent_runs.add(787, "report", now=100.0)
    assert recent_runs.covers(787, now=100.0)
    assert recent_runs.covers(787, now=109.9)
    assert not recent_runs.covers(787, now=110.0)
    assert not recent_runs.covers(788, now=100.0)
    assert not recent_runs.covers(None, now=100.0)


def test_the_first_failure_of_an_outage_is_shown_without_a_logging_setup(dead: str) -> None:
    """A warning about the server appears without a logging setup; INFO lines do not."""
    program = (
        "import asyncio, sys\n"
        "from promptlayer_exec import RetryPolicy, Session\n"
        "async def main():\n"
        "    retry = RetryPolicy(outage=0.05, base=0.01)\n"
        "    async with Session('a-key', base_url=sys.argv[1], retry=retry) as session:\n"
        "        await session.get_results(787)\n"
        "try:\n"
        "    asyncio.run(main())\n"
        "except ConnectionError:\n"
        "    pass\n"
    )
    command = [sys.executable, "-c", program, dead]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stderr == (
        f"execution 787: could not reach {dead}: Connection refused."
        " Trying again for up to 0.05 s\n"
    )
