"""Tasks, foreign cancellations, and the limits of a call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from promptlayer_exec._errors import RequestTimeout, SessionClosed
from promptlayer_exec._lifetime import DeadlinePassed, Lifetime
from promptlayer_exec._policies import Deadline
from promptlayer_exec._tasks import Tasks, clock, is_cancelled

FOREVER = Deadline.after(None, now=0.0)


async def forever() -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()


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
    tasks.start(asyncio.sleep(0), name="short")
    tasks.start(forever(), name="long")
    await asyncio.sleep(0.001)
    tasks.cancel()
    await tasks.ended()
    assert {task.get_name() for task in asyncio.all_tasks()}.isdisjoint({"short", "long"})


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

    task = asyncio.create_task(call(lifetime, work, Deadline.after(0.0, now=clock())))
    await asyncio.sleep(0)
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
