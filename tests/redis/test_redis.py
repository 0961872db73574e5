"""Sessions that share watches through a real Redis server."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import attrs
import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from promptlayer_exec import (
    ConfigurationError,
    ExecutionStarted,
    NotFound,
    PollPolicy,
    RetryPolicy,
    Session,
    Snapshot,
    StartUnknown,
    Unauthorized,
    WatchWoken,
)
from promptlayer_exec import redis as backplane_module
from promptlayer_exec._integration import receive_callback
from promptlayer_exec.fastapi import _run_events, execution_events
from promptlayer_exec.redis import RedisBackplane
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.webhooks import Callbacks

NEVER = PollPolicy.fixed(3600.0)
DONE = Scenario([SimNode("Answer", "done", is_output_node=True)])
HELD = Scenario([SimNode("Answer", "42", None, is_output_node=True)])
CALLBACKS = Callbacks("http://127.0.0.1:9/callbacks", secret="s3cret")
AWAY = "Redis unavailable"

PROGRAM = """
import asyncio, sys
from promptlayer_exec import PollPolicy, Session
from promptlayer_exec.redis import RedisBackplane

async def main():
    key, base_url, url, prefix, execution_id = sys.argv[1:]
    backplane = RedisBackplane(url, prefix=prefix)
    policy = PollPolicy.fixed(0.1)
    async with Session(key, base_url=base_url, poll=policy, backplane=backplane) as session:
        async for snapshot in session.execution(int(execution_id)).stream():
            print(snapshot.nodes["Answer"].value, flush=True)

asyncio.run(main())
"""


@asynccontextmanager
async def process(*arguments: object) -> AsyncIterator[Any]:
    """Run a process that follows an execution and prints what its node "Answer" has."""
    command = (sys.executable, "-c", PROGRAM, *map(str, arguments))
    child = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.communicate()


@asynccontextmanager
async def streaming(workers: list[Any], execution_id: int) -> AsyncIterator[list[Any]]:
    """Stream an execution in each worker, and yield the tasks; cancel those that are left."""
    tasks = [asyncio.create_task(worker.stream(execution_id)) for worker in workers]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def all_share(workers: list[Any]) -> None:
    """Wait until all but one take the answers of another."""
    waiting = [asyncio.create_task(worker.polled(shared=True)) for worker in workers]
    for done in itertools.islice(asyncio.as_completed(waiting), len(workers) - 1):
        await done
    for task in waiting:
        task.cancel()


async def all_listen(place: Any, count: int) -> None:
    """Wait until so many sessions receive hints."""
    url, prefix = place
    async with Redis.from_url(url) as client, asyncio.timeout(10):
        listening = 0
        while listening < count:
            channels = await client.pubsub_channels(f"{prefix}:*")
            listening = sum(number for _, number in await client.pubsub_numsub(*channels))


def warnings(caplog: pytest.LogCaptureFixture) -> int:
    """Return how many warnings say that Redis cannot be used."""
    return sum(
        AWAY in record.message and record.levelno == logging.WARNING for record in caplog.records
    )


async def test_one_session_polls_for_all(sim: Simulator, workers: Any, held: int) -> None:
    """Its answers are polls of the others, too, which follow its pace and not their own."""
    first, *others = workers
    for worker in others:
        worker.new_session(poll=NEVER)
    async with streaming([first], held) as (stream,):
        await first.polled()
        async with streaming(others, held) as streams:
            await asyncio.gather(*(worker.polled(5) for worker in others))
            sim.finish(held, "Answer")
            assert all(last.complete for last in await asyncio.gather(stream, *streams))
    assert sim.request_count == first.own_polls == len(first.polls)
    assert [worker.own_polls for worker in others] == [0, 0]


async def test_a_late_joiner_gets_the_latest_answer_at_once(
    sim: Simulator, workers: Any, held: int
) -> None:
    """So does one that comes after the end: no request is needed in either case."""
    first, second, third = workers
    first.new_session(poll=NEVER)
    async with streaming([first], held) as (stream,):
        await first.polled()
        async with streaming([second], held):
            await second.polled(shared=True, within=6.0)
        assert sim.request_count == 1
        sim.finish(held, "Answer")
        first.session.wake(held)
        await stream
    assert (await third.stream(held)).complete
    assert sim.request_count == 2


async def test_a_complete_run_behind_an_error_is_shared(sim: Simulator, workers: Any) -> None:
    """The others need no request to know that it is over, and one that comes later needs none."""
    first, second, third = workers
    nodes = [SimNode("Answer", "42", None)]
    execution_id = sim.add_execution(Scenario(nodes, no_output_status=400))
    async with streaming([first, second], execution_id) as streams:
        await second.polled(2)
        sim.finish(execution_id, "Answer")
        assert all(last.complete for last in await asyncio.gather(*streams))
    sent = sim.request_count
    assert (await third.stream(execution_id)).nodes["Answer"].value == "42"
    assert sim.request_count == sent


async def test_a_200_that_comes_too_early_is_shared_as_running(
    sim: Simulator, workers: Any, held: int
) -> None:
    """No session takes it for the end."""
    sim.inject(Fault.early_completion(2))
    seen: list[list[Snapshot]] = [[], [], []]
    pairs = zip(workers, seen, strict=True)
    tasks = [asyncio.create_task(worker.stream(held, shown)) for worker, shown in pairs]
    await asyncio.gather(*(worker.polled(4) for worker in workers))
    sim.finish(held, "Answer")
    for last in await asyncio.gather(*tasks):
        assert last.nodes["Answer"].value == "42"
    for shown in seen:
        assert [snapshot.complete for snapshot in shown] == [False] * (len(shown) - 1) + [True]


async def test_another_session_polls_when_one_leaves(workers: Any, held: int) -> None:
    """Whether its stream ends or it closes, the others see neither an error nor a pause."""
    first, second, third = workers
    async with streaming([first], held):
        await first.polled()
        async with streaming([second], held) as (stream,):
            await second.polled(3, shared=True)
            await first.session.aclose()
            await second.polled(3, shared=False, within=6.0)
            async with streaming([third], held):
                await third.polled(3, shared=True)
                stream.cancel()
                await third.polled(3, shared=False, within=6.0)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_process_that_dies_or_hangs_is_replaced(
    sim: Simulator, workers: Any, held: int, place: Any, ending: signal.Signals
) -> None:
    """Its lease runs out within 10 s; streams in other processes then go on without an error."""
    async with process(sim.api_key, sim.base_url, *place, held) as child:
        await child.stdout.readline()
        async with streaming(workers, held) as streams:
            await asyncio.gather(*(worker.polled(shared=True) for worker in workers))
            child.send_signal(ending)
            await asyncio.gather(*(worker.polled(3, within=20.0) for worker in workers))
            sim.finish(held, "Answer")
            assert all(last.complete for last in await asyncio.gather(*streams))
    assert sum(worker.own_polls > 0 for worker in workers) == 1


async def test_no_old_answer_replaces_a_newer_one(
    raw_server: Any, place: Any, workers: Any
) -> None:
    """A process that was stopped while the server answered goes on after another one has polled."""
    numbers = itertools.count(1)
    stop_at: list[Any] = []
    stopped_at = 0

    async def respond(request: Any) -> None:
        nonlocal stopped_at
        number = next(numbers)
        if number > 3 and stop_at:
            stopped_at = number
            stop_at.pop().send_signal(signal.SIGSTOP)
        node = {"status": "RUNNING", "value": number, "is_output_node": True}
        await request.answer("202 Accepted", {"Answer": node})

    raw_server.respond = respond
    seen: list[list[Snapshot]] = [[], []]
    for worker in workers[:2]:
        worker.new_session(base_url=raw_server.url, poll=PollPolicy.fixed(0.5))
    async with process("simulator-key", raw_server.url, *place, 7) as child:
        await child.stdout.readline()
        stop_at.append(child)
        tasks = [
            asyncio.create_task(worker.stream(7, snapshots))
            for worker, snapshots in zip(workers, seen, strict=False)
        ]
        await asyncio.gather(*(worker.polled(shared=True) for worker in workers[:2]))
        while not any(worker.own_polls for worker in workers):
            await workers[0].polled()
        child.send_signal(signal.SIGCONT)
        printed = [0]
        while printed[-1] <= stopped_at + 1:
            printed.append(int(await child.stdout.readline()))
        await asyncio.gather(*(worker.polled(2) for worker in workers[:2]))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    values = [[it.nodes["Answer"].value for it in snapshots] for snapshots in seen]
    for each in (*values, printed):
        assert each == sorted(each)
    assert stopped_at in printed
    assert stopped_at not in (*values[0], *values[1])


async def test_errors_are_not_shared(sim: Simulator, workers: Any, held: int) -> None:
    """Each session asks for itself, and gets its own error with its last snapshot."""
    async with streaming(workers, 12345) as streams:
        errors = await asyncio.gather(*streams, return_exceptions=True)
    assert [type(error) for error in errors] == [NotFound] * 3
    assert sim.request_count == 3
    async with streaming(workers, held) as streams:
        await asyncio.gather(*(worker.polled(2) for worker in workers))
        sim.inject(Fault.status(401, times=None))
        before = sim.request_count
        async with asyncio.timeout(10):
            errors = await asyncio.gather(*streams, return_exceptions=True)
    assert [type(error) for error in errors] == [Unauthorized] * 3
    assert all(error.last_snapshot is not None for error in errors)
    assert sim.request_count - before == 3


async def test_all_survive_an_outage(sim: Simulator, workers: Any, held: int) -> None:
    """Nobody waits for a session whose polls fail for long, and no follower gets an error."""
    for worker in workers:
        worker.new_session(retry=RetryPolicy(base=0.1, ceiling=0.4, watch_outage=30.0))
    async with streaming(workers, held) as streams:
        await asyncio.gather(*(worker.polled(2) for worker in workers))
        sim.finish(held, "Answer")
        sim.inject(Fault.status(503, times=5))
        async with asyncio.timeout(15):
            assert all(last.complete for last in await asyncio.gather(*streams))


async def test_an_outage_is_said_in_every_process(
    sim: Simulator, workers: Any, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that follows a holder says it once the lease is over and its own polls fail."""
    terms = attrs.evolve(backplane_module.TERMS, lease=1.0, renewal=0.2, recheck=0.2)
    monkeypatch.setattr(backplane_module, "TERMS", terms)
    monkeypatch.setattr(_run_events, "_PATIENCE", 1.0)
    for worker in workers:
        worker.new_session(retry=RetryPolicy(base=0.8, ceiling=2.0, watch_outage=30.0))
    has_begun, is_waiting = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def follow(worker: Any) -> list[str]:
        response: Any = await execution_events(worker.session.execution(held))
        kinds = []
        async with aclosing(response.body_iterator) as events:
            async for event in events:
                kinds.append(event.event)
                if event.event == "snapshot":
                    has_begun.release()
                if event.event == "waiting" and "snapshot" in kinds:
                    is_waiting.release()
        return kinds

    following = [asyncio.create_task(follow(worker)) for worker in workers]
    async with asyncio.timeout(20):
        for _ in workers:
            await has_begun.acquire()
        await all_share(workers)
        sim.inject(Fault.status(503, times=None))
        for _ in workers:
            await is_waiting.acquire()
        sim.finish(held, "Answer")
        sim.clear_faults()
        kinds = await asyncio.gather(*following)
    for seen in kinds:
        first = seen.index("snapshot")  # on a busy machine, the first one may be waited for
        assert seen[first:] == ["snapshot", "waiting", "resumed", "node", "complete"]


async def test_a_wake_up_reaches_the_session_that_polls(
    sim: Simulator, workers: Any, held: int
) -> None:
    """It does so from a session that follows the execution, and from one that does not."""
    for worker in workers:
        worker.new_session(poll=NEVER)
    first, second, third = workers
    await third.session.__aenter__()
    async with streaming([first], held):
        await first.polled()
        async with streaming([second], held):
            await second.polled()
            assert second.session.wake(held)
            await second.polled(shared=True, within=6.0)
            assert not third.session.wake(held)
            await asyncio.gather(first.polled(within=6.0), second.polled(within=6.0))
    assert (first.own_polls, second.own_polls) == (3, 0)
    assert [event.source for event in first.of(WatchWoken)] == ["caller", "caller"]


async def test_a_callback_reaches_the_session_that_waits_for_it(
    sim: Simulator, workers: Any, place: Any
) -> None:
    """It is reported once in each session that lost the start; Redis knows no token."""
    sim.add_workflow("report", DONE)
    first, second, third = workers
    for worker in workers:
        worker.new_session(callbacks=CALLBACKS)
        await worker.session.__aenter__()
    sim.inject(Fault.disconnect())
    with pytest.raises(StartUnknown) as caught:
        await first.session.start("report")
    error, (run,) = caught.value, sim.runs
    recovering = asyncio.create_task(second.session.recover(error, timeout=5))
    await all_listen(place, 3)  # by then, both have looked for the callback in vain
    assert error.callback_token is not None
    receive_callback(third.session, error.callback_token, run.execution_id)
    assert (await recovering).id == run.execution_id
    # A session that begins to wait afterwards finds it, too.
    second.new_session(callbacks=CALLBACKS)
    assert (await second.session.recover(error, timeout=5)).id == run.execution_id
    for worker, count in ((first, 1), (second, 2), (third, 0)):
        assert [event.recovered for event in worker.of(ExecutionStarted)] == [True] * count
    url, prefix = place
    async with Redis.from_url(url) as client:
        keys = [key async for key in client.scan_iter(f"{prefix}:*")]
    assert any(b":callback" in key for key in keys)
    assert not any(error.callback_token.encode() in key for key in keys)


async def test_a_run_is_known_as_new_to_all(sim: Simulator, workers: Any) -> None:
    """A 404 is waited out in a session that did not start the run, as in the one that did."""
    sim.add_workflow("report", DONE)
    first, second, _ = workers
    execution = await first.session.start("report")
    sim.inject(Fault.status(404, times=3, execution_id=execution.id))
    assert (await second.stream(execution.id)).complete
    assert second.own_polls == 1


async def test_push_reaches_the_session_that_polls(sim: Simulator, workers: Any) -> None:
    """All sessions share a channel, and whoever is told of a completion wakes the poller."""
    sim.add_workflow("report", HELD)
    first, second, _ = workers
    for worker in workers:
        worker.new_session(push=True, poll=NEVER)
    execution = await first.session.start("report")
    await second.session.start("report")
    assert len({run.body["channel_name_suffix"] for run in sim.runs}) == 1
    async with streaming([second], execution.id) as (stream,):
        await second.polled()
        waiting = asyncio.create_task(first.session.execution(execution.id).wait())
        await first.polled()
        sim.finish(execution.id, "Answer")
        async with asyncio.timeout(10):
            assert (await stream).complete
            await waiting
    assert first.own_polls == 0


async def test_a_stream_elsewhere_makes_the_poller_poll_as_for_a_stream(
    sim: Simulator, workers: Any
) -> None:
    """Otherwise a session that only awaits a completion that is pushed would poll each 5 s."""
    sim.add_workflow("report", HELD)
    first, second, _ = workers
    first.new_session(push=True)
    execution = await first.session.start("report")
    async with streaming([first], execution.id):
        await first.polled(2)
        waiting = asyncio.create_task(execution.wait())
        await first.polled()
    await asyncio.sleep(0)
    async with streaming([second], execution.id):
        await second.polled(10, shared=True, within=10.0)
    sim.finish(execution.id, "Answer")
    await waiting


@pytest.mark.parametrize("how", ["stop", "hang", "fill"])
async def test_without_redis_each_session_polls_for_itself(
    sim: Simulator, own_workers: Any, own_server: Any, caplog: Any, how: str
) -> None:
    """It does so soon, with one warning, until Redis can be used again."""
    held = sim.add_execution(HELD)
    async with streaming(own_workers, held) as streams:
        await asyncio.gather(*(worker.polled(2) for worker in own_workers))
        if how == "fill":
            with own_server.client() as client:
                client.config_set("maxmemory", 1)
        else:
            getattr(own_server, how)()
        polls = [worker.polled(shared=False, within=8.0) for worker in own_workers]
        await asyncio.gather(*polls)
        polls = [worker.polled(20, shared=False) for worker in own_workers]
        await asyncio.gather(*polls)
        assert warnings(caplog) == 3
        if how == "stop":
            own_server.start()
        elif how == "hang":
            own_server.go_on()
        else:
            with own_server.client() as client:
                client.config_set("maxmemory", 0)
        await all_share(own_workers)
        sim.finish(held, "Answer")
        assert all(last.complete for last in await asyncio.gather(*streams))
    assert warnings(caplog) == 3


async def test_closed_idle_connections_lose_nothing(
    sim: Simulator, open_session: Callable[..., Session], own_server: Any, prefix: str, caplog: Any
) -> None:
    """As with the server's `timeout` or a proxy: the next command uses a new connection."""
    sim.add_workflow("report", DONE)
    first, second = (
        open_session(backplane=RedisBackplane(own_server.tcp_url, prefix=prefix)) for _ in range(2)
    )
    await second.__aenter__()
    await (await first.start("report")).wait()
    with own_server.client() as client:
        for _ in range(3):
            client.client_kill_filter(_type="normal", skipme=True)
            execution = await first.start("report")
            key = f"{prefix}:*{execution.id}*:start"
            async with asyncio.timeout(5):
                while not list(client.scan_iter(key)):  # noqa: ASYNC110 - Redis has no event
                    await asyncio.sleep(0)
            client.client_kill_filter(_type="normal", skipme=True)
            sim.inject(Fault.status(404, times=2, execution_id=execution.id))
            assert (await second.execution(execution.id).wait()).complete
    assert warnings(caplog) == 0


async def test_what_others_are_to_know_is_kept_while_redis_is_away(
    sim: Simulator, own_workers: Any, own_server: Any, prefix: str
) -> None:
    """A callback, a wake-up and the announcement of a run reach the others once it is back."""
    sim.add_workflow("report", DONE)
    held = sim.add_execution(HELD)
    for worker in own_workers:
        worker.new_session(callbacks=CALLBACKS, poll=NEVER, retry=RetryPolicy(not_found_grace=60.0))
        await worker.session.__aenter__()
    first, second, third = own_workers
    sim.inject(Fault.disconnect())
    with pytest.raises(StartUnknown) as caught:
        await first.session.start("report")
    error, (run,) = caught.value, sim.runs
    recovering = asyncio.create_task(second.session.recover(error, timeout=20))

    async with streaming([second], held) as (stream,):
        await second.polled()
        own_server.stop()
        sim.finish(held, "Answer")
        assert not third.session.wake(held)
        assert error.callback_token is not None
        receive_callback(third.session, error.callback_token, run.execution_id)
        execution = await third.session.start("report")
        own_server.start()
        async with asyncio.timeout(20):
            assert (await recovering).id == run.execution_id
            assert (await stream).complete

    with own_server.client() as client:
        assert list(client.scan_iter(f"{prefix}:*{execution.id}*:start"))
    first.new_session()
    sim.inject(Fault.status(404, times=2, execution_id=execution.id))
    assert (await first.stream(execution.id)).complete


async def test_sharing_returns_after_a_failover(
    sim: Simulator, own_workers: Any, own_server: Any, second_server: Any, caplog: Any
) -> None:
    """A primary that was demoted keeps its connections, and refuses what is written over them."""
    held = sim.add_execution(HELD)
    async with streaming(own_workers, held) as streams:
        await all_share(own_workers)
        own_server.demote_for(second_server)
        await asyncio.gather(*(worker.polled(shared=False) for worker in own_workers))
        await all_share(own_workers)
        with own_server.client() as client:
            (channel,) = client.pubsub_channels("*")
            assert client.pubsub_numsub(channel) == [(channel, 3)]
        sim.finish(held, "Answer")
        assert all(last.complete for last in await asyncio.gather(*streams))
    assert warnings(caplog) == 3


class FaultyRedis(Redis):
    """A client whose commands and subscriptions raise `failure`."""

    failure: Exception | None = None

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Run a command."""
        if self.failure is not None:
            raise self.failure
        return await super().execute_command(*arguments, **options)

    def pubsub(self, **options: Any) -> PubSub:
        """Return a subscriber."""
        client, pubsub = self, super().pubsub(**options)
        get_message = pubsub.get_message

        async def get(**options: Any) -> Any:
            if client.failure is not None:
                raise client.failure
            return await get_message(**options)

        pubsub.get_message = get  # type: ignore[method-assign]
        return pubsub


async def test_an_unexpected_exception_of_the_client_is_an_outage(
    sim: Simulator, workers: Any, place: Any, held: int, caplog: Any
) -> None:
    """Sharing and hints return after it, as after any other."""
    url, prefix = place
    client = FaultyRedis.from_url(url)
    first, second, _ = workers
    first.new_session(backplane=RedisBackplane(client, prefix=prefix))
    async with streaming([first, second], held) as streams:
        await all_share([first, second])
        client.failure = KeyError("no such thing")
        await first.polled(20, shared=False)
        client.failure = None
        await all_share([first, second])
        sim.finish(held, "Answer")
        assert all(last.complete for last in await asyncio.gather(*streams))
    assert warnings(caplog) == 1
    await first.session.aclose()
    await client.aclose()


async def test_a_hint_that_cannot_be_read_is_ignored(
    workers: Any, held: int, place: Any, caplog: Any
) -> None:
    """It may come from another version."""
    url, prefix = place
    first, second, _ = workers
    async with streaming([first], held):
        await first.polled()
        async with Redis.from_url(url) as client:
            await all_listen(place, 1)
            (channel,) = await client.pubsub_channels(f"{prefix}:*")
            for hint in ("news", "news x - y", "news 1 2 3 4", b"\xff - - -"):
                await client.publish(channel, hint)
        async with streaming([second], held):
            await second.polled(5, shared=True, within=5.0)
    assert warnings(caplog) == 0


async def test_a_lease_is_kept_while_a_poll_waits_for_the_rate(
    sim: Simulator, workers: Any, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise others would take over one after the other, and poll for themselves."""
    terms = attrs.evolve(backplane_module.TERMS, lease=1.0, renewal=0.2, recheck=0.2)
    monkeypatch.setattr(backplane_module, "TERMS", terms)
    first, second, _ = workers
    first.new_session(rate=0.5)
    async with streaming([first], held) as (stream,):
        await first.polled()
        async with streaming([second], held) as (other,):
            await second.polled(3, shared=True)
            sim.finish(held, "Answer")
            await asyncio.gather(stream, other)
    assert second.own_polls == 0


async def test_redis_need_not_be_there(
    sim: Simulator, own_workers: Any, own_server: Any, held: int, caplog: Any
) -> None:
    """A session that never reached Redis works as one without a backplane."""
    own_server.stop()
    async with streaming(own_workers, held) as streams:
        await asyncio.gather(*(worker.polled(shared=False, within=8.0) for worker in own_workers))
        sim.finish(held, "Answer")
        assert all(last.complete for last in await asyncio.gather(*streams))
    assert warnings(caplog) == 3
    own_server.start()


async def test_a_session_closes_soon_although_redis_hangs(
    own_workers: Any, own_server: Any, held: int
) -> None:
    """Closing gives its leases back if it can, and does not wait for long."""
    async with streaming(own_workers, held) as streams:
        await asyncio.gather(*(worker.polled(2) for worker in own_workers))
        own_server.hang()
        began = time.monotonic()
        await asyncio.gather(*(worker.session.aclose() for worker in own_workers))
        assert time.monotonic() - began < 5.0
        await asyncio.gather(*streams, return_exceptions=True)


async def test_large_answers_are_not_shared(
    sim: Simulator, workers: Any, server: Any, prefix: str
) -> None:
    """Over 1 MiB, each session polls for itself; Redis does not hold the answer."""
    nodes = [SimNode("Data", "x" * 2**20), SimNode("Answer", "42", None, is_output_node=True)]
    execution_id = sim.add_execution(Scenario(nodes))
    async with streaming(workers, execution_id) as streams:
        await asyncio.gather(*(worker.polled(3) for worker in workers))
        sim.finish(execution_id, "Answer")
        assert all(last.complete for last in await asyncio.gather(*streams))
    assert all(worker.own_polls == len(worker.polls) for worker in workers)
    with server.client() as client:
        assert not list(client.scan_iter(f"{prefix}:*:answer"))


@pytest.mark.parametrize("decode_responses", [False, True])
async def test_a_client_can_be_lent(
    sim: Simulator, open_session: Callable[..., Session], place: Any, decode_responses: bool
) -> None:
    """It is not closed with the session, and may decode what it reads."""
    url, prefix = place
    held = sim.add_execution(HELD)
    client = Redis.from_url(url, decode_responses=decode_responses)
    backplane = RedisBackplane(client, prefix=prefix)
    first, second = (open_session(backplane=backplane) for _ in range(2))
    one, other = (session.execution(held).wait(timeout=10) for session in (first, second))
    tasks = [asyncio.create_task(one), asyncio.create_task(other)]
    await sim.wait_for_requests(3)
    sim.finish(held, "Answer")
    assert all(last.complete for last in await asyncio.gather(*tasks))
    await first.aclose()
    await second.aclose()
    assert await client.ping()
    await client.aclose()


async def test_a_closed_session_can_be_opened_again(
    sim: Simulator, workers: Any, held: int
) -> None:
    """It connects to Redis afresh."""
    first, second, _ = workers
    async with first.session:
        pass
    await first.session.__aenter__()
    async with streaming([first], held):
        await first.polled()
        async with streaming([second], held):
            await second.polled(shared=True)


@pytest.mark.parametrize("prefix", ["", "a b", "{a}"])
def test_a_prefix_must_be_usable(prefix: str) -> None:
    """It is a part of keys, and of hints that spaces separate."""
    with pytest.raises(ConfigurationError, match="prefix must be without spaces and braces"):
        RedisBackplane("redis://localhost", prefix=prefix)


@pytest.mark.parametrize("source", [5, "http://user:secret@localhost", "redis://[::1", Redis])
def test_a_backplane_needs_a_url_or_a_client(source: Any) -> None:
    """The error shows no URL, which may have a password."""
    with pytest.raises(ConfigurationError, match="needs a URL such as") as caught:
        RedisBackplane(source)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("backplane", ["redis://localhost", RedisBackplane, 5])
def test_a_session_needs_a_backplane(backplane: Any) -> None:
    """The error says what is meant."""
    with pytest.raises(ConfigurationError, match="backplane must be a"):
        Session(backplane=backplane)
