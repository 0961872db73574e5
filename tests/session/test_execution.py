"""The handle: what it remembers of its execution between calls."""

from __future__ import annotations

import asyncio
import json
import pickle
from contextlib import aclosing
from typing import Any

import pytest
from aiohttp import web

from promptlayer_exec import ExecutionFailed, ExecutionTimeout, NotFound, Session, SessionClosed
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

ONE = Scenario([SimNode("Plan", "p"), SimNode("Answer", "42", is_output_node=True)])
TWO = Scenario([SimNode("A", 1, is_output_node=True), SimNode("B", 2, is_output_node=True)])
FAILED = Scenario([SimNode("Answer", status="FAILED", is_output_node=True)])


@pytest.mark.parametrize("first", ["wait", "output", "snapshot", "stream", "finished_nodes"])
async def test_a_complete_snapshot_answers_every_later_call(
    sim: Simulator, session: Session, first: str
) -> None:
    """No call sends a request any more, whichever call saw the snapshot; nor after closing."""
    execution = session.execution(sim.add_execution(ONE))
    call: Any = getattr(execution, first)()
    if first in ("stream", "finished_nodes"):
        async with aclosing(call):
            async for _ in call:
                pass
    else:
        await call
    sent = sim.request_count
    await session.aclose()
    snapshot = await execution.snapshot()
    assert snapshot.complete
    assert await execution.wait(timeout=0) is snapshot
    assert await execution.output(timeout=0, into=str) == "42"
    assert [it async for it in execution.stream(timeout=0)] == [snapshot]
    assert [it.name async for it in execution.finished_nodes(timeout=0)] == ["Plan", "Answer"]
    assert sim.request_count == sent


async def test_the_server_decides_once_which_output_it_is(sim: Simulator, session: Session) -> None:
    """The second call of `output` has the answer already."""
    execution = session.execution(sim.add_execution(TWO))
    await execution.wait()
    outputs = [await execution.output()]
    sent = sim.request_count
    outputs.append(await execution.output())
    assert outputs == [1, 1]
    assert sim.request_count == sent


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("marked", [(), ("A", "B")])
async def test_an_error_with_all_nodes_is_no_main_output(
    sim: Simulator, session: Session, status: int, marked: tuple[str, ...]
) -> None:
    """It has none, even if its nodes differ from those of the snapshot."""
    nodes = [SimNode(name, name, is_output_node=name in marked) for name in "AB"]
    execution = session.execution(sim.add_execution(Scenario(nodes)))
    await execution.wait()
    body = json.dumps({"message": "No output node", "output": {"A": {"status": "SUCCESS"}}})
    sim.inject(Fault.status(status, body=body.encode()))
    for _ in range(2):
        with pytest.raises(ExecutionFailed, match="completed without a main output"):
            await execution.output()
    assert sim.request_count == 2


async def test_a_complete_failure_is_raised_from_memory(sim: Simulator, session: Session) -> None:
    """The error has the snapshot."""
    execution = session.execution(sim.add_execution(FAILED))
    snapshot = await execution.wait()
    sent = sim.request_count
    with pytest.raises(ExecutionFailed) as caught:
        await execution.output()
    assert caught.value.last_snapshot is snapshot
    assert sim.request_count == sent


async def test_only_the_handle_that_saw_the_snapshot_answers(
    sim: Simulator, session: Session
) -> None:
    """Another handle of the execution asks the server, and so does an unpickled one."""
    execution = session.execution(sim.add_execution(ONE))
    await execution.wait()
    sent = sim.request_count
    assert (await session.execution(execution.id).wait()).complete
    assert sim.request_count == sent + 1
    with pytest.raises(RuntimeError, match="unpickled"):
        await pickle.loads(pickle.dumps(execution)).wait()


async def test_a_fan_out_takes_the_complete_snapshot_of_a_handle(
    sim: Simulator, session: Session
) -> None:
    """An item that is such a handle needs no request."""
    execution = session.execution(sim.add_execution(ONE))
    snapshot = await execution.wait()
    sent = sim.request_count
    (outcome,) = await session.collect([execution])
    assert (outcome.output, outcome.snapshot) == ("42", snapshot)
    assert sim.request_count == sent


@pytest.mark.parametrize("call", ["wait", "output", "snapshot", "stream", "finished_nodes"])
async def test_an_error_has_the_snapshot_of_an_earlier_call(
    sim: Simulator, session: Session, held: int, call: str
) -> None:
    """What the handle has seen is not lost because a later call saw nothing."""
    execution = session.execution(held)
    snapshot = await execution.snapshot()
    sim.inject(Fault.status(404, times=None))
    calling: Any = getattr(execution, call)()
    with pytest.raises(NotFound) as caught:
        await (anext(calling) if call in ("stream", "finished_nodes") else calling)
    assert caught.value.last_snapshot is snapshot


async def test_a_timeout_and_a_closed_session_have_it_too(
    sim: Simulator, session: Session, held: int
) -> None:
    """The snapshot of a stream is that of a later wait's error."""
    execution = session.execution(held)
    async with aclosing(execution.stream()) as stream:
        snapshot = await anext(stream)
    sim.inject(Fault.stall(times=None))
    with pytest.raises(ExecutionTimeout) as timeout:
        await execution.wait(timeout=0.01)
    assert timeout.value.last_snapshot is snapshot
    await session.aclose()
    for call in (execution.wait(), execution.output(), anext(execution.stream())):
        with pytest.raises(SessionClosed) as closed:
            await call
        assert closed.value.last_snapshot is snapshot


async def test_a_newer_snapshot_of_the_error_itself_is_kept(
    sim: Simulator, session: Session, held: int
) -> None:
    """An error has the last snapshot that there was, not the first."""
    execution = session.execution(held)
    first = await execution.snapshot()
    waiting = asyncio.create_task(execution.wait())
    await sim.wait_for_requests(4)
    sim.inject(Fault.status(404, times=None))
    with pytest.raises(NotFound) as caught:
        await waiting
    assert caught.value.last_snapshot is not None
    assert caught.value.last_snapshot is not first


async def test_what_is_complete_stays_so(sim: Simulator, session: Session, held: int) -> None:
    """An answer from before that comes late is replaced by the complete snapshot."""
    execution = session.execution(held)
    running = json.dumps({"Answer": {"status": "RUNNING"}}).encode()
    arrives = asyncio.Event()

    async def old_answer(*_: Any) -> Any:
        await arrives.wait()
        return web.Response(status=202, body=running)

    sim.inject(Fault(old_answer))
    late = asyncio.create_task(execution.snapshot())
    await sim.wait_for_requests(1)
    sim.finish(held, "Answer")
    complete = await execution.wait()
    arrives.set()
    assert await late is complete
    assert await execution.snapshot() is complete
