"""The log: what a session says of its watches' ends, and of outages."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest

from promptlayer_exec import (
    ConnectionFailed,
    ExecutionTimeout,
    NotFound,
    RequestRetried,
    RetryPolicy,
    ServerError,
    Session,
    SessionClosed,
    WatchEnded,
)
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
    """Return the address of a port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


async def test_the_end_of_a_watch_is_one_line(
    caplog: pytest.LogCaptureFixture, session: Session, recorder: Any, held: int
) -> None:
    """Whether it is complete, given up or in error; nothing else is said of polls that go well."""
    patient = asyncio.create_task(session.execution(held).wait())
    with pytest.raises(ExecutionTimeout):
        await session.execution(held).wait(timeout=0.03)
    patient.cancel()
    ended = await recorder.next(WatchEnded)
    sim_404 = session.execution(7)
    with pytest.raises(NotFound):
        await sim_404.wait()
    assert lines(caplog, logging.INFO) == [
        f"execution {held}: nobody follows it any more ({ended.polls} polls in 0.0 s)",
        "execution 7: the watch ended in NotFound (0 polls in 0.0 s)",
    ]
    assert len(caplog.records) == 2


async def test_an_outage_is_two_lines_however_many_requests_fail(
    caplog: pytest.LogCaptureFixture, session: Session, sim: Simulator
) -> None:
    """One when it begins, with the error and how long it is survived; one when it is over."""
    ids = [sim.add_execution(Scenario([SimNode("Out")])) for _ in range(200)]
    sim.inject(Fault.status(503, times=500))
    await session.collect(ids)
    (line,) = lines(caplog, logging.WARNING)
    assert line.startswith("execution ")
    assert "the server answered 503 Service Unavailable" in line
    assert line.endswith("; trying again for up to 5 s")
    said = lines(caplog, logging.INFO)
    assert said.count("the server answers again") == 1
    assert len([line for line in said if ": complete (1 polls in " in line]) == 200


async def test_a_second_outage_is_told_again(
    caplog: pytest.LogCaptureFixture, session: Session, sim: Simulator, held: int
) -> None:
    """It is another one once a request that failed was answered well."""
    for _ in range(2):
        sim.inject(Fault.status(503, times=2))
        await session.execution(held).snapshot()
    assert len(lines(caplog, logging.WARNING)) == 2
    assert lines(caplog, logging.INFO) == ["the server answers again"] * 2


async def test_what_an_earlier_outage_came_to_is_forgotten(
    caplog: pytest.LogCaptureFixture,
    open_session: Callable[..., Session],
    sim: Simulator,
    held: int,
) -> None:
    """One that was over does not make the next one, which was not, be called so."""
    session = open_session(retry=RetryPolicy(outage=0.02, base=0.001))
    sim.inject(Fault.status(503))
    await session.execution(held).snapshot()
    sim.inject(Fault.status(503, times=None))
    with pytest.raises(ServerError):
        await session.execution(held).snapshot()
    assert len(lines(caplog, logging.WARNING)) == 2
    assert lines(caplog, logging.INFO) == ["the server answers again"]


async def test_an_outage_that_nobody_waits_for_any_more_is_not_called_over(
    caplog: pytest.LogCaptureFixture, open_session: Callable[..., Session], dead: str
) -> None:
    """Neither if it was too long, nor if all have gone; the next failure is told again."""
    retry = RetryPolicy(outage=0.02, watch_outage=None, base=0.001)
    session = open_session(base_url=dead, retry=retry)
    with pytest.raises(ConnectionFailed):
        await session.execution(5).snapshot()
    with pytest.raises(ExecutionTimeout):
        await session.execution(6).wait(timeout=0.05)
    await session.aclose()
    why = f"no usable answer from {dead}: Connection refused; trying again"
    assert lines(caplog, logging.WARNING) == [
        f"execution 5: {why} for up to 0.02 s",
        f"execution 6: {why}",
    ]
    assert "the server answers again" not in lines(caplog, logging.INFO)


async def test_one_that_gives_up_does_not_end_the_outage_of_others(
    caplog: pytest.LogCaptureFixture,
    open_session: Callable[..., Session],
    sim: Simulator,
    held: int,
) -> None:
    """It goes on, without a further line, for those who still try."""
    session = open_session(retry=RetryPolicy(base=0.02, ceiling=0.04))
    sim.inject(Fault.status(503, times=None))
    waits = [asyncio.create_task(session.execution(held).snapshot()) for _ in range(3)]
    await sim.wait_for_requests(6)
    waits[0].cancel()
    await asyncio.wait(waits[:1])
    await sim.wait_for_requests(sim.request_count + 4)
    sim.clear_faults()
    await asyncio.gather(*waits[1:])
    assert len(lines(caplog, logging.WARNING)) == 1
    assert lines(caplog, logging.INFO) == ["the server answers again"]


async def test_a_start_is_named_as_one(
    caplog: pytest.LogCaptureFixture,
    open_session: Callable[..., Session],
    recorder: Any,
    dead: str,
) -> None:
    """It has no id yet; and neither inputs nor key are told."""
    session = open_session(api_key="pl-very-secret", base_url=dead, retry=RetryPolicy())
    starting = asyncio.create_task(session.start("w", {"topic": "otters"}))
    await recorder.next(RequestRetried)
    await session.aclose()
    with pytest.raises(SessionClosed):
        await starting
    assert caplog.messages == [
        f"a start: no usable answer from {dead}: Connection refused; trying again for up to 60 s"
    ]


async def test_no_answer_is_quoted(
    caplog: pytest.LogCaptureFixture, session: Session, sim: Simulator, held: int
) -> None:
    """The error shows how its body begins; the log does not. Its words can be printed."""
    sim.inject(Fault.malformed(body=b'{"value": "confidential"'))
    sim.inject(Fault.status(503, body=rb'{"message": "down \udcff"}'))
    await session.execution(held).snapshot()
    sim.inject(Fault.status(503, body=rb'{"message": "down \udcff"}'))
    await session.execution(held).snapshot()
    first, second = lines(caplog, logging.WARNING)
    assert "the 200 response is not JSON" in first
    assert "confidential" not in caplog.text
    assert "503 Service Unavailable: down \\udcff; trying again" in second
