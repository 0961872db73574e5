"""Tasks, foreign cancellations, and the limits of a call."""

from __future__ import annotations

import asyncio
import selectors
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

import pytest

from promptlayer_exec._engine.lifetime import DeadlinePassed, Lifetime
from promptlayer_exec._engine.tasks import PatientTimeout, Tasks, TaskTimeout, clock, is_cancelled
from promptlayer_exec._errors import RequestTimeout, SessionClosed
from promptlayer_exec._policies import Deadline

FOREVER = Deadline.after(None, now=0.0)


async def forever() -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()


async def until_cancelled() -> None:
    """Wait until cancelled, and then return."""
    with suppress(asyncio.CancelledError):
        await forever()


async def call(lifetime: Lifetime, work: Callable[[], Awaitable[None]], deadline: Deadline) -> None:
    """Do some work within the timeout of a call."""
    async with lifetime.timeout(deadline):
        await work()


@pytest.fixture
async def lifetime() -> AsyncIterator[Lifetime]:
    """Return a lifetime that is ready; it is closed at the end."""
    lifetime = Lifetime(AsyncExitStack())
    await lifetime.ready()
    yield lifetime
    lifetime.close()
    await lifetime.wait_closed()


async def test_tasks_are_cancelled_together_and_awaited() -> None:
    """Tasks that have already ended are allowed among them."""
    tasks = Tasks()
    tasks.start(partial(asyncio.sleep, 0), name="short")
    tasks.start(until_cancelled, name="long")
    await asyncio.sleep(0.001)
    tasks.cancel()
    await tasks.ended()
    assert {task.get_name() for task in asyncio.all_tasks()}.isdisjoint({"short", "long"})


@pytest.mark.parametrize("times", [1, 3])
async def test_a_task_that_is_cancelled_before_its_first_step_begins(times: int) -> None:
    """Otherwise nothing of it would run, and what waits for its end would wait for ever."""
    seen: list[str] = []

    async def run() -> None:
        seen.append("began")
        with suppress(asyncio.CancelledError):
            await forever()
        seen.append("cancelled")

    tasks = Tasks()
    tasks.start(run, name="late")
    for _ in range(times):
        tasks.cancel()
    await tasks.ended()
    assert seen == ["began", "cancelled"]


async def test_a_cancellation_that_a_task_suppresses_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `asyncio.wait_for` of Python 3.11 does at times, in a limiter for example."""
    monkeypatch.setattr("promptlayer_exec._engine.tasks.AGAIN", 0.01)
    tasks = Tasks()
    suppressed = []

    async def run() -> None:
        for _ in range(2):
            with suppress(asyncio.CancelledError):
                await forever()
            suppressed.append(is_cancelled())

    tasks.start(run, name="stubborn")
    await asyncio.sleep(0)
    tasks.cancel()
    await tasks.ended_by_cancellation()
    assert suppressed == [True, True]


async def test_a_task_of_our_own_that_was_cancelled_enters_no_timeout() -> None:
    """Whatever suppressed the cancellation, the task makes no other attempt."""
    entered = []

    async def run() -> None:
        with suppress(asyncio.CancelledError):
            await forever()
        async with TaskTimeout():
            entered.append(True)

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert not entered


async def test_a_task_that_handles_its_cancellation_at_a_timeout_has_not_been_cancelled() -> None:
    """In a task group, a child that ends as cancelled would end the whole group."""

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with suppress(asyncio.CancelledError):
            async with TaskTimeout():
                pass

    task = asyncio.create_task(run())
    await asyncio.wait([task])
    assert not task.cancelled()


async def test_a_task_that_begins_cancelled_and_awaits_nothing_runs_once() -> None:
    """At its end, asyncio counts it as cancelled, as if it had never begun."""
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1

    tasks = Tasks()
    tasks.start(run, name="short")
    tasks.cancel()
    await tasks.ended()
    assert runs == 1


async def test_a_task_of_a_session_that_is_cancelled_before_its_first_step_begins() -> None:
    """This holds for every task, and the supervisor itself, if all are cancelled at once."""
    for steps in range(4):
        seen: list[str] = []

        async def run(seen: list[str] = seen) -> None:
            try:
                seen.append("began")
                await forever()
            finally:
                seen.append("ended")

        lifetime = Lifetime(AsyncExitStack())
        if steps:
            await lifetime.ready()
            lifetime.spawn(run)
        for _ in range(steps - 1):
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await lifetime.wait_closed()
        assert seen == (["began", "ended"] if steps else [])


async def test_only_the_cancelled_task_is_cancelled() -> None:
    """A task that awaits something cancelled is not cancelled itself."""
    seen: list[bool] = []

    async def wait_for(future: asyncio.Future[None]) -> None:
        try:
            await future
        except asyncio.CancelledError:
            seen.append(is_cancelled())

    loop = asyncio.get_running_loop()
    for cancel_task in (True, False):
        future = loop.create_future()
        task = asyncio.create_task(wait_for(future))
        await asyncio.sleep(0)
        (task if cancel_task else future).cancel()
        await asyncio.wait([task])
    assert seen == [True, False]


async def test_a_call_ends_at_its_deadline(lifetime: Lifetime) -> None:
    """This holds even if the deadline has already passed; no cancellation stays pending."""
    for timeout in (0.001, -1.0):
        with pytest.raises(DeadlinePassed):
            await call(lifetime, forever, Deadline.after(timeout, now=clock()))
    assert not is_cancelled()


async def test_no_part_of_a_call_begins_after_its_deadline(lifetime: Lifetime) -> None:
    """A timer that fires late is patient; parts that are short would all be granted that."""
    with pytest.raises(DeadlinePassed):
        await call(lifetime, partial(asyncio.sleep, 0.0), Deadline.after(-0.1, now=clock()))


async def test_a_timeout_within_the_call_is_its_own(lifetime: Lifetime) -> None:
    """Only the call's own deadline becomes `DeadlinePassed`."""

    async def fail() -> None:
        raise RequestTimeout("no answer")

    with pytest.raises(RequestTimeout):
        await call(lifetime, fail, FOREVER)


async def test_a_timeout_in_the_step_of_the_deadline_is_the_deadline(lifetime: Lifetime) -> None:
    """Both pass in the same step, and the deadline counts."""

    async def fail() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise RequestTimeout("no answer") from None

    with pytest.raises(DeadlinePassed):
        await call(lifetime, fail, Deadline.after(0.001, now=clock()))


async def test_a_cancelled_call_is_cancelled_even_at_its_deadline(lifetime: Lifetime) -> None:
    """Both happen in the same step, and the cancellation counts."""
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        await forever()

    task = asyncio.create_task(call(lifetime, work, Deadline.after(0.01, now=clock())))
    await asyncio.sleep(0)
    time.sleep(0.01)  # noqa: ASYNC251 - so that the deadline passes in this step
    task.cancel()
    await asyncio.wait([task])
    assert started.is_set()
    assert task.cancelled()


async def test_closing_ends_a_call(lifetime: Lifetime) -> None:
    """The call raises `SessionClosed`, and closing waits for the call's clean-up."""
    steps: list[str] = []

    async def work() -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(0.001)
            steps.append("cleaned up")

    task = asyncio.create_task(call(lifetime, work, FOREVER))
    await asyncio.sleep(0)
    lifetime.close()
    await lifetime.wait_closed()
    steps.append("closed")
    with pytest.raises(SessionClosed):
        await task
    assert steps == ["cleaned up", "closed"]


async def test_a_task_that_fails_ends_no_other(lifetime: Lifetime) -> None:
    """Its error goes to the event loop's exception handler."""
    contexts: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))

    async def fail() -> None:
        raise ZeroDivisionError

    going_on = asyncio.Event()

    async def go_on() -> None:
        await asyncio.sleep(0)
        going_on.set()
        await forever()

    lifetime.spawn(go_on)
    lifetime.spawn(fail)
    await going_on.wait()
    (context,) = contexts
    assert isinstance(context["exception"], ZeroDivisionError)
    assert lifetime.is_ready()


async def test_no_call_begins_once_the_end_has_begun(lifetime: Lifetime) -> None:
    """Nothing would end such a call."""
    called = False

    async def work() -> None:
        nonlocal called
        called = True

    lifetime.close()
    with pytest.raises(SessionClosed):
        await call(lifetime, work, FOREVER)
    assert not called


class InterruptedSelector(selectors.DefaultSelector):
    """Returns no events after a signal that comes late, such as that which continues a process."""

    def __init__(self) -> None:
        super().__init__()
        self.interrupted_for = 0.0

    def select(self, timeout: float | None = None) -> Any:
        """Return the events that are ready."""
        if self.interrupted_for:
            time.sleep(self.interrupted_for)
            self.interrupted_for = 0.0
            return []
        return super().select(timeout)


@pytest.mark.parametrize("late", [0.005, 0.02, 0.1])
def test_what_has_arrived_is_read_although_the_process_was_stopped(late: float) -> None:
    """The timer fires before the loop looks at the socket, however little late it is."""
    selector = InterruptedSelector()

    async def main() -> bytes:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            receiving = asyncio.ensure_future(receive(ours))
            await asyncio.sleep(0.0)
            theirs.send(b"answer")
            selector.interrupted_for = 0.01 + late
            return await receiving

    async def receive(ours: socket.socket) -> bytes:
        async with PatientTimeout(clock() + 0.01):
            return await asyncio.get_running_loop().sock_recv(ours, 100)

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        assert runner.run(main()) == b"answer"


class LateLoop(asyncio.SelectorEventLoop):
    """An event loop that, like uvloop, has no timer for a time that has passed."""

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        """Call it in the next step, if it is late."""
        if when <= self.time():
            return self.call_soon(callback, *args, context=context)
        return super().call_at(when, callback, *args, context=context)


def test_a_timeout_that_looked_too_early_may_be_reduced_on_uvloop() -> None:
    """Its handles of late timers have no `when`."""

    async def main() -> None:
        async with PatientTimeout(clock() + 60.0, soonest=clock() - 1.0) as limit:
            limit.end_by(clock() + 0.01)
            await forever()

    with (
        asyncio.Runner(loop_factory=LateLoop) as runner,
        pytest.raises(TimeoutError),
    ):
        runner.run(asyncio.wait_for(main(), 5.0))


async def test_a_timeout_that_looked_too_early_may_still_be_reduced() -> None:
    """A request may wait for its turn for longer than `request_timeout`."""

    async def attempt() -> None:
        async with PatientTimeout(clock() + 60.0, soonest=clock() + 0.01) as limit:
            await asyncio.sleep(0.02)
            limit.end_by(clock() + 0.01)
            await forever()

    began = clock()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(attempt(), 5.0)
    assert clock() - began < 4.0


async def test_a_suppressed_timeout_is_repeated_even_if_it_was_just_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit of an attempt may be set in the same step in which its call expires."""
    monkeypatch.setattr("promptlayer_exec._engine.tasks.AGAIN", 0.01)

    async def expire() -> None:
        async with PatientTimeout() as limit:
            limit.expire()
            limit.expire()  # as closing does after the deadline
            assert limit.expired()
            with pytest.raises(TimeoutError):
                limit.check()
            limit.end_by(clock() + 0.005)
            await until_cancelled()
            await forever()

    with pytest.raises(TimeoutError):
        await expire()
    assert not is_cancelled()
