"""What the throttle of a session promises, in virtual time: no test here waits."""

from __future__ import annotations

import asyncio
import functools
import math
import random
import selectors
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptlayer_exec._api.attempt import Priority
from promptlayer_exec._http.throttle import Throttle


class VirtualTimeSelector(selectors.DefaultSelector):
    """Moves the time of its loop forward where another selector would block."""

    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> Any:
        """Return the events that are ready."""
        assert timeout is not None, "every task waits, and no timer is set"
        if timeout > 0.0:
            self.loop.now += timeout + self.loop.lateness
        return super().select(0.0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time moves to the next timer, `lateness` past it, once all tasks wait."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lateness = 0.0
        selector = VirtualTimeSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """Return the time in seconds."""
        return self.now


def in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test on a `VirtualTimeLoop`."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(test(**arguments))  # type: ignore[arg-type]

    return run


def now() -> float:
    """Return the virtual time in seconds."""
    return asyncio.get_running_loop().time()


async def send(throttle: Throttle, count: int) -> list[float]:
    """Have `count` tasks send one request each, and return when each was sent."""

    async def request() -> float:
        await throttle.acquire()
        return now()

    return await asyncio.gather(*(request() for _ in range(count)))


async def send_accepted(throttle: Throttle, count: int) -> list[float]:
    """Send requests one after the other, each of which is accepted at once; return when."""
    times = []
    for _ in range(count):
        times += await send(throttle, 1)
        throttle.rate.accepted()
    return times


def gaps(times: list[float]) -> list[float]:
    """Return the seconds between times."""
    return [later - earlier for earlier, later in pairwise(times)]


@pytest.mark.parametrize(("rate", "seconds"), [(0.2, 5.0), (100.0, 0.01), (None, 0.0)])
@in_virtual_time
async def test_the_rate_is_fully_used_and_never_exceeded(
    rate: float | None, seconds: float
) -> None:
    """The first request is sent at once, and each later one exactly 1/rate after the last."""
    times = await send(Throttle(rate), 50)
    assert times[0] == 1000.0
    assert gaps(times) == pytest.approx([seconds] * 49)


@in_virtual_time
async def test_an_urgent_request_waits_for_two_others_at_most() -> None:
    """It also waits for earlier urgent ones; those of the same priority keep their order."""
    throttle = Throttle(100.0)
    await throttle.acquire()
    order: list[str] = []

    async def acquire(name: str, priority: Priority) -> None:
        await throttle.acquire(priority)
        order.append(name)

    repeated = [acquire(name, Priority.REPEATED) for name in ("r1", "r2", "r3")]
    first = [acquire(name, Priority.FIRST) for name in ("f1", "f2")]
    urgent = [acquire(name, Priority.URGENT) for name in ("u1", "u2")]
    await asyncio.gather(*repeated, *first, *urgent)
    assert order == ["r1", "f1", "u1", "u2", "r2", "f2", "r3"]


@in_virtual_time
async def test_a_first_request_does_not_wait_for_all_repeated_ones() -> None:
    """Beside 2,000 watches that are polled as often as the rate allows, it is sent at once."""
    throttle = Throttle(100.0)

    async def watch() -> None:
        while True:
            await throttle.acquire(Priority.REPEATED)

    watches = [asyncio.create_task(watch()) for _ in range(2_000)]
    await asyncio.sleep(1.0)
    started = now()
    await throttle.acquire(Priority.FIRST)
    assert now() - started < 0.03
    for task in watches:
        task.cancel()
    await asyncio.wait(watches)


@pytest.mark.parametrize(
    ("flood", "waits", "seconds"),
    [
        (Priority.URGENT, Priority.FIRST, 0.11),
        (Priority.URGENT, Priority.REPEATED, 0.11),
        (Priority.FIRST, Priority.REPEATED, 0.02),
        (Priority.REPEATED, Priority.FIRST, 0.02),
    ],
)
@in_virtual_time
async def test_priority_starves_nobody(flood: Priority, waits: Priority, seconds: float) -> None:
    """Ten senders of urgent requests get one slot each before another; others take turns."""
    throttle = Throttle(100.0)

    async def send_all() -> None:
        while True:
            await throttle.acquire(flood)

    floods = [asyncio.create_task(send_all()) for _ in range(10)]
    await asyncio.sleep(1.0)
    started = now()
    await throttle.acquire(waits)
    assert now() - started == pytest.approx(seconds, abs=0.011)
    for task in floods:
        task.cancel()
    await asyncio.wait(floods)


@in_virtual_time
async def test_a_cancelled_waiter_uses_no_slot() -> None:
    """The next request gets it."""
    throttle = Throttle(10.0)
    tasks = [asyncio.create_task(send(throttle, 1)) for _ in range(5)]
    await asyncio.sleep(0.05)
    for task in tasks[1:4]:
        task.cancel()
    assert await tasks[4] == pytest.approx([1000.1])


class RecordingLimiter:
    """A limiter that takes `seconds`, and records when it was acquired."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.acquired: list[float] = []

    async def acquire(self) -> None:
        """Record the time, and wait."""
        self.acquired.append(now())
        await asyncio.sleep(self.seconds)


@pytest.mark.parametrize("rate", [10.0, None])
@in_virtual_time
async def test_limiters_are_acquired_once_per_attempt_after_the_rate(rate: float | None) -> None:
    """One attempt at a time acquires each of them, in order, when its slot has come.

    The slots are no further apart for it, unless the limiters take longer than that.
    """
    limiters = [RecordingLimiter(0.01), RecordingLimiter(0.02)]
    times = await send(Throttle(rate, limiters), 5)
    first, second = (limiter.acquired for limiter in limiters)
    assert times == pytest.approx([time + 0.03 for time in first])
    assert second == pytest.approx([time + 0.01 for time in first])
    period = 0.03 if rate is None else 1 / rate
    assert gaps(times)[1:] == pytest.approx([period] * 3)


@pytest.mark.parametrize("rate", [100.0, None])
@in_virtual_time
async def test_every_request_waits_as_long_as_the_server_asked(rate: float | None) -> None:
    """One that waits at a limiter, those behind it, and those that arrive during the pause."""
    throttle = Throttle(rate, [RecordingLimiter(0.05)])
    waiting = asyncio.create_task(send(throttle, 3))
    await asyncio.sleep(0.02)
    assert throttle.refused(1000.0, 5.0) == pytest.approx(5.0)
    assert throttle.refused(1000.0, 2.0) == pytest.approx(5.0), "a shorter pause ends none"
    await asyncio.sleep(2.0)
    later = await send(throttle, 3)
    times = await waiting + later
    assert times == sorted(times)
    assert times[0] == pytest.approx(1005.02)
    assert times[-1] < 1005.5


STEP = st.one_of(
    st.tuples(st.just("send"), st.integers(1, 5)),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("sleep"), st.floats(0.001, 3.0)),
    st.tuples(st.just("answer"), st.just(1)),
    st.tuples(st.just("refuse"), st.sampled_from([0.0, 0.01, 0.5, 4.0])),
)


@given(st.sampled_from([0.5, 10.0, 200.0]), st.lists(STEP, max_size=40))
def test_no_history_exceeds_the_rate_or_breaks_a_pause(
    rate: float, steps: list[tuple[str, Any]]
) -> None:
    """Whatever is sent, cancelled, answered and refused; and every request is sent in the end."""

    async def follow() -> None:
        throttle = Throttle(rate)
        tasks: list[asyncio.Task[list[float]]] = []
        pauses = []
        for step, number in steps:
            if step == "send":
                tasks += [asyncio.create_task(send(throttle, 1)) for _ in range(number)]
            elif step == "cancel" and number < len(tasks):
                tasks[number].cancel()
            elif step == "answer":
                throttle.rate.accepted()
            elif step == "refuse":
                throttle.refused(now(), number)
                pauses.append((now(), now() + number))
            elif step == "sleep":
                await asyncio.sleep(number)
            await asyncio.sleep(0)
        if tasks:
            await asyncio.wait(tasks)
        times = [time for task in tasks if not task.cancelled() for time in task.result()]
        assert times == sorted(times)
        assert all(gap > 1 / rate - 1e-6 for gap in gaps(times))
        assert not [time for time in times if any(a < time < b - 1e-6 for a, b in pauses)]

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(follow())


async def refuse(throttle: Throttle, announced: float = 0.0) -> float:
    """Send a request that is refused 1 ms later, and return when it was sent."""
    sent_at = await throttle.acquire()
    await asyncio.sleep(0.001)
    throttle.refused(sent_at, announced)
    return sent_at


async def refuse_for(throttle: Throttle, seconds: float) -> list[float]:
    """Send requests for so long, all of which are refused, and return when each was sent."""
    times = [now()]
    while times[-1] < times[0] + seconds:
        times.append(await refuse(throttle))
    return times


async def gap(throttle: Throttle) -> float:
    """Return the seconds between two requests that are sent now."""
    return gaps(await send(throttle, 2))[0]


@pytest.mark.parametrize("announced", [0.0, 0.5])
@pytest.mark.parametrize(("rate", "slowed"), [(100.0, 100.0), (None, 1000.0)])
@in_virtual_time
async def test_each_429_slows_the_session(
    rate: float | None, slowed: float, announced: float
) -> None:
    """Requests are then at least 1.3 and at most 1.5 times as far apart."""
    throttle = Throttle(rate)
    spacing = [1 / slowed]
    for _ in range(4):
        await refuse(throttle, announced)
        spacing.append(await gap(throttle))
    assert all(1.3 < after / before < 1.5 for before, after in pairwise(spacing))


@in_virtual_time
async def test_429s_of_requests_sent_before_the_slow_down_count_once() -> None:
    """Twenty answers 429 that arrive together slow the session no more than one does."""
    after = []
    for refusals in (1, 20):
        throttle = Throttle(100.0)
        times = await send(throttle, 20)
        await asyncio.sleep(0.001)
        refused_at = now()
        for sent_at in times[:refusals]:
            throttle.refused(sent_at, 0.0)
        after.append([time - refused_at for time in await send(throttle, 50)])
    assert after[0] == pytest.approx(after[1])


@pytest.mark.parametrize("rate", [1.0, 100.0, None])
@in_virtual_time
async def test_a_session_notices_within_seconds_that_refusals_end(rate: float | None) -> None:
    """Even after an hour of them it sends a request every two to four seconds."""
    times = await refuse_for(Throttle(rate), 3600.0)
    assert all(2.0 < seconds < 4.0 for seconds in gaps(times)[-100:])


async def recover(throttle: Throttle, gap: float) -> float:
    """Send requests, all accepted, until they are so far apart; return how many seconds it took."""
    began = now()
    while gaps(await send_accepted(throttle, 20)) != pytest.approx([gap] * 19):
        assert now() < began + 600.0, "the rate does not find its way back"
    return now() - began


@pytest.mark.parametrize(("rate", "seconds"), [(5.0, 45.0), (100.0, 90.0), (None, 120.0)])
@in_virtual_time
async def test_the_rate_finds_its_way_back_after_half_a_minute_of_429s(
    rate: float | None, seconds: float
) -> None:
    """In 45 s to 5 per second, in 90 s to 100, and in two minutes to no limit at all."""
    throttle = Throttle(rate)
    await refuse_for(throttle, 30.0)
    assert await recover(throttle, 0.0 if rate is None else 1 / rate) < seconds


class TokenBucket:
    """A server that accepts so many requests per second, and answers 429 to the others.

    Its `announce` returns the Retry-After for the seconds until there is a token; 0 for none.
    """

    def __init__(
        self, per_second: float, burst: int, latency: float, announce: Callable[[float], float]
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._latency = latency
        self._announce = announce
        self._tokens = float(burst)
        self._updated_at = now()
        self.accepted: Counter[Throttle] = Counter()
        self.refused = 0

    @property
    def refused_part(self) -> float:
        """The part of all requests that was refused."""
        return self.refused / (self.accepted.total() + self.refused)

    def receive(self, throttle: Throttle) -> None:
        """Receive a request that is sent now, and answer it in time."""
        asyncio.get_running_loop().call_later(self._latency / 2, self._decide, throttle, now())

    def _refill(self) -> None:
        grown = self._tokens + (now() - self._updated_at) * self._per_second
        self._tokens, self._updated_at = min(grown, self._burst), now()

    def _decide(self, throttle: Throttle, sent_at: float) -> None:
        self._refill()
        answer: Callable[[], object] = throttle.rate.accepted
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            self.accepted[throttle] += 1
        else:
            announced = self._announce((1.0 - self._tokens) / self._per_second)
            self.refused += 1
            answer = functools.partial(throttle.refused, sent_at, announced)
        asyncio.get_running_loop().call_later(self._latency / 2, answer)


async def saturate(server: TokenBucket, throttle: Throttle, seconds: float) -> None:
    """Send for so long, and each time as soon as the throttle allows."""
    end = now() + seconds
    while now() < end:
        await throttle.acquire()
        server.receive(throttle)


def nothing(seconds: float) -> float:
    """Send no Retry-After."""
    return 0.0


@pytest.mark.parametrize(
    ("announce", "used"),
    [(nothing, 0.8), (float, 0.8), (math.ceil, 0.75)],
    ids=["not announced", "announced", "announced in whole seconds"],
)
@pytest.mark.parametrize(
    "server", [(5.0, 5, 0.05), (20.0, 5, 0.05), (20.0, 5, 0.3), (50.0, 20, 0.05), (200.0, 20, 0.05)]
)
@in_virtual_time
async def test_a_lone_session_uses_four_fifths_of_a_token_bucket(
    server: tuple[float, int, float], announce: Callable[[float], float], used: float
) -> None:
    """In its first minute, when at most a fifth of its requests is refused.

    It uses three quarters where each 429 asks for whole seconds, much more than is needed.
    """
    per_second, burst, _ = server
    bucket = TokenBucket(*server, announce)
    await saturate(bucket, Throttle(100.0 if per_second < 100.0 else 1000.0), 60.0)
    assert bucket.accepted.total() >= used * (60.0 * per_second + burst)
    assert bucket.refused_part <= 0.2


@in_virtual_time
async def test_the_rate_finds_its_way_back_once_a_limit_is_gone() -> None:
    """From 40 per second to 100 in 30 s, but not in less than 5."""
    throttle = Throttle(100.0)
    await saturate(TokenBucket(40.0, 20, 0.05, nothing), throttle, 60.0)
    assert 5.0 < await recover(throttle, 0.01) < 30.0


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize(
    ("sessions", "per_second", "burst"), [(3, 5.0, 5), (8, 20.0, 20), (30, 60.0, 20)]
)
@in_virtual_time
async def test_none_of_the_sessions_that_share_a_limit_starves(
    sessions: int, per_second: float, burst: int, seed: int
) -> None:
    """They know nothing of each other, and the server names no time to wait.

    Over two minutes each gets at least 0.4 of a fair part. At least 80 % of the limit is used, and
    at most a fifth of the requests is refused.
    """
    bucket = TokenBucket(per_second, burst, 0.05, nothing)
    chance = random.Random(seed)

    async def use_it_after(delay: float) -> None:
        await asyncio.sleep(delay)
        await saturate(bucket, Throttle(100.0), 120.0 - delay)

    await asyncio.gather(*(use_it_after(chance.uniform(0.0, 2.0)) for _ in range(sessions)))
    assert len(bucket.accepted) == sessions
    assert min(bucket.accepted.values()) >= 0.4 * 120.0 * per_second / sessions
    assert bucket.accepted.total() >= 0.8 * 120.0 * per_second
    assert bucket.refused_part <= 0.2
