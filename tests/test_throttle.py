"""What the throttle of a session promises, in virtual time: no test here waits."""

from __future__ import annotations

import asyncio
import functools
import math
import random
import selectors
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    """An event loop whose time moves, to the next timer, once every task waits.

    Attributes:
        now: the time in seconds.
        lateness: how many seconds late each timer fires.
    """

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


def virtual_loop() -> VirtualTimeLoop:
    """Return the running loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop


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
        throttle.answered()
    return times


def gaps(times: list[float]) -> list[float]:
    """Return the seconds between times."""
    return [later - earlier for earlier, later in pairwise(times)]


class RecordingLimiter:
    """A limiter that takes `seconds`, and records when it was acquired."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.acquired: list[float] = []

    async def acquire(self) -> None:
        """Record the time, and wait."""
        self.acquired.append(now())
        await asyncio.sleep(self.seconds)


@pytest.mark.parametrize("rate", [0.2, 100.0])
@in_virtual_time
async def test_the_rate_is_fully_used_and_never_exceeded(rate: float) -> None:
    """The first request is sent at once, and each later one exactly 1/rate after the last."""
    times = await send(Throttle(rate), 50)
    assert times[0] == 1000.0
    assert gaps(times) == pytest.approx([1 / rate] * 49)


@in_virtual_time
async def test_an_unlimited_session_never_waits() -> None:
    """Without a rate a thousand requests are sent at the same moment."""
    assert set(await send(Throttle(None), 1000)) == {1000.0}


@pytest.mark.parametrize("idle", [0.25, 60.0])
@in_virtual_time
async def test_no_burst_follows_an_idle_time(idle: float) -> None:
    """Slots that nobody wanted are lost, also where many tasks ask at once afterwards."""
    throttle = Throttle(10.0)
    await send(throttle, 3)
    await asyncio.sleep(idle)
    assert gaps(await send(throttle, 5)) == pytest.approx([0.1] * 4)


@in_virtual_time
async def test_requests_are_sent_first_come_first_served() -> None:
    """A request does not overtake those that waited before it."""
    throttle = Throttle(10.0)
    arrived: list[int] = []
    sent: list[int] = []

    async def request(number: int) -> None:
        await asyncio.sleep(0.11 * (number // 5))
        arrived.append(number)
        await throttle.acquire()
        sent.append(number)

    await asyncio.gather(*(request(number) for number in range(30)))
    assert sent == arrived


@in_virtual_time
async def test_a_cancelled_waiter_uses_no_slot() -> None:
    """The next request gets the slot, whether its predecessor was first in line or not."""
    throttle = Throttle(10.0)
    tasks = [asyncio.create_task(send(throttle, 1)) for _ in range(10)]
    await asyncio.sleep(0.05)
    for task in tasks[1:8]:
        task.cancel()
    await asyncio.wait(tasks)
    assert [task.cancelled() for task in tasks] == [False] + [True] * 7 + [False] * 2
    assert tasks[8].result() + tasks[9].result() == pytest.approx([1000.1, 1000.2])


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


@in_virtual_time
async def test_the_rate_holds_after_a_limiter_that_waited() -> None:
    """Requests that a limiter held up for long are not sent in a burst."""
    limiter = RecordingLimiter(60.0)
    throttle = Throttle(10.0, [limiter])
    first = asyncio.create_task(send(throttle, 4))
    await asyncio.sleep(30.0)
    assert len(limiter.acquired) == 1
    limiter.seconds = 0.0
    assert gaps(await first) == pytest.approx([0.1] * 3)


@in_virtual_time
async def test_what_a_limiter_raises_reaches_the_caller() -> None:
    """The next request acquires it again."""

    class Broken:
        async def acquire(self) -> None:
            raise KeyError("oops")

    throttle = Throttle(10.0, [Broken()])
    for _ in range(2):
        with pytest.raises(KeyError):
            await throttle.acquire()


@pytest.mark.parametrize("rate", [100.0, None])
@in_virtual_time
async def test_every_request_waits_exactly_as_long_as_the_server_asked(rate: float | None) -> None:
    """One that waits at a limiter, those behind it, and those that arrive during the pause."""
    limiter = RecordingLimiter()
    throttle = Throttle(rate, [limiter])
    await send_accepted(throttle, 300)
    limiter.seconds = 0.05
    waiting = asyncio.create_task(send(throttle, 3))
    await asyncio.sleep(0.02)
    limiter.seconds = 0.0
    end = now() + 5.0
    assert throttle.refused(now(), 5.0) == pytest.approx(5.0)
    await asyncio.sleep(2.0)
    later = await send(throttle, 3)
    times = await waiting + later
    assert times[0] == pytest.approx(end)
    assert times == sorted(times)
    assert times[-1] < end + 0.1


@in_virtual_time
async def test_a_request_that_waits_for_its_slot_waits_as_long_as_the_server_asked() -> None:
    """Its slot is put off."""
    throttle = Throttle(10.0)
    sending = asyncio.create_task(send(throttle, 2))
    await asyncio.sleep(0.05)
    throttle.refused(1000.0, 5.0)
    assert await sending == pytest.approx([1000.0, 1005.05])


@in_virtual_time
async def test_the_announcement_that_ends_last_counts() -> None:
    """A shorter one does not cut a longer one short, whichever comes first."""
    throttle = Throttle(50.0)
    await throttle.acquire()
    sent_at = now()
    assert throttle.refused(sent_at, 5.0) == pytest.approx(5.0)
    assert throttle.refused(sent_at, 2.0) == pytest.approx(5.0)
    await asyncio.sleep(1.0)
    assert throttle.refused(sent_at, 9.0) == pytest.approx(9.0)
    assert await send(throttle, 1) == pytest.approx([sent_at + 10.0])


def refuse(throttle: Throttle, *, announced: bool) -> None:
    """Refuse a request that was just sent, without Retry-After or with one of 0.5 s."""
    throttle.refused(now(), 0.5 if announced else 0.0)


@pytest.mark.parametrize("announced", [False, True], ids=["unannounced", "announced"])
@pytest.mark.parametrize("rate", [1.0, 100.0])
@in_virtual_time
async def test_a_429_slows_the_whole_session(rate: float, announced: bool) -> None:
    """Requests of all tasks are then at least 3 % and at most 25 % further apart.

    A first 429 with Retry-After only pauses the session; a second one within seconds slows it.
    """
    throttle = Throttle(rate)
    await send_accepted(throttle, math.ceil(5 * rate))
    refuse(throttle, announced=announced)
    if announced:
        await send_accepted(throttle, 1)
        refuse(throttle, announced=announced)
    slow = gaps(await send(throttle, 4))
    assert 1.03 / rate < slow[0] < 1.25 / rate


@in_virtual_time
async def test_a_429_slows_the_session_to_the_rate_of_good_answers() -> None:
    """Where every second request fails, to between 70 and 100 % of half its rate."""
    throttle = Throttle(100.0)
    for number in range(500):
        await throttle.acquire()
        if number % 2:
            throttle.answered()
    refuse(throttle, announced=False)
    assert 1 / 50 <= gaps(await send(throttle, 2))[0] <= 1 / 35


@pytest.mark.parametrize(("rate", "slots"), [(None, 20.0), (2.0, 2.0)])
@in_virtual_time
async def test_429s_slow_a_session_without_good_answers_step_by_step(
    rate: float | None, slots: float
) -> None:
    """The first halves the rate, from 20 per second at most; later ones leave a sixth, or 0.1."""
    throttle = Throttle(rate)
    spacing = [1 / slots]
    for _ in range(10):
        await throttle.acquire()
        refused_at = now()
        refuse(throttle, announced=False)
        (time,) = await send(throttle, 1)
        spacing.append(time - refused_at)
    assert spacing[1] == pytest.approx(2 / slots, rel=0.2)
    assert all(1.0 <= after / before < 6.2 for before, after in pairwise(spacing[1:]))
    assert spacing[2] > spacing[1]
    assert spacing[-1] <= 10.0


@pytest.mark.parametrize("announced", [False, True], ids=["unannounced", "announced"])
@pytest.mark.parametrize("minutes", [1, 5, 30])
@in_virtual_time
async def test_a_server_that_refused_for_long_is_soon_used_again(
    minutes: int, announced: bool
) -> None:
    """Two minutes after it recovers, the session sends at least ten requests per second."""
    throttle = Throttle(100.0)
    began = now()
    while now() < began + 60.0 * minutes:
        await throttle.acquire()
        throttle.refused(now(), 1.0 if announced else 0.0)
    recovered = now()
    while now() < recovered + 120.0:
        await send_accepted(throttle, 1)
    assert gaps(await send_accepted(throttle, 2))[0] <= 0.1


@in_virtual_time
async def test_429s_of_requests_sent_before_the_slow_down_count_once() -> None:
    """Twenty answers 429 that arrive together slow the session no more than one does."""
    after = []
    for refusals in (1, 20):
        throttle = Throttle(100.0)
        times = await send_accepted(throttle, 500)
        await asyncio.sleep(0.001)
        refused_at = now()
        for sent_at in reversed(times[-refusals:]):
            throttle.refused(sent_at, 0.0)
        after.append([time - refused_at for time in await send(throttle, 50)])
    assert after[0] == pytest.approx(after[1])


@in_virtual_time
async def test_429s_of_requests_sent_after_the_slow_down_slow_further() -> None:
    """Each shows that the session is still too fast."""
    throttle = Throttle(100.0)
    await send_accepted(throttle, 500)
    spacing = [0.01]
    for _ in range(4):
        refuse(throttle, announced=False)
        times = await send(throttle, 20)
        spacing.append(times[1] - times[0])
    assert min(gaps(spacing)) > 0.0005


@in_virtual_time
async def test_the_measured_rate_outlasts_a_pause() -> None:
    """After announced pauses, and late good answers within the first, it is known as before."""
    throttle = Throttle(100.0)
    await send_accepted(throttle, 500)
    throttle.refused(now(), 20.0)
    await asyncio.sleep(0.05)
    throttle.answered()
    await send_accepted(throttle, 10)
    throttle.refused(now(), 20.0)
    first, second = await send(throttle, 2)
    assert 1 / 95 < second - first < 1 / 75


@in_virtual_time
async def test_one_429_costs_a_busy_session_little() -> None:
    """In the ten seconds after it, at least 98 % of the configured rate is used."""
    throttle = Throttle(100.0)
    await send_accepted(throttle, 500)
    refuse(throttle, announced=False)
    began = now()
    assert (await send_accepted(throttle, 980))[-1] < began + 10.0


@pytest.mark.parametrize("announced", [False, True], ids=["unannounced", "announced"])
@pytest.mark.parametrize(("rate", "seconds"), [(100.0, 40.0), (None, 70.0)])
@in_virtual_time
async def test_a_session_finds_its_way_back_to_full_speed(
    rate: float | None, seconds: float, announced: bool
) -> None:
    """Three 429s before any good answer slow it to under ten requests per second.

    Then it takes at least 5 s to full speed, and at most 40 s where that is 100 requests per
    second, or 70 s where it is unlimited.
    """
    throttle = Throttle(rate)
    for _ in range(3):
        await throttle.acquire()
        refuse(throttle, announced=announced)
    assert gaps(await send(throttle, 2))[0] > 1 / 10
    began = now()
    full_speed = pytest.approx([0.0 if rate is None else 1 / rate] * 19)
    while gaps(await send_accepted(throttle, 20)) != full_speed:
        assert now() < began + seconds
    assert now() > began + 5.0


@in_virtual_time
async def test_idle_time_is_no_recovery() -> None:
    """After an hour without a request a slowed session is nearly as slow as before it."""
    throttle = Throttle(100.0)
    await throttle.acquire()
    refuse(throttle, announced=False)
    await asyncio.sleep(3600.0)
    spacing = gaps(await send(throttle, 3))
    assert spacing == pytest.approx([0.1, 0.1], rel=0.1)
    assert spacing[0] > spacing[1]


@in_virtual_time
async def test_a_late_timer_is_made_up_for() -> None:
    """Timers that fire 4 ms late, nearly half a slot, cost no throughput."""
    throttle = Throttle(100.0)
    await throttle.acquire()
    virtual_loop().lateness = 0.004
    times = await send(throttle, 1000)
    assert times[-1] - 1000.0 == pytest.approx(10.0, abs=0.02)


@in_virtual_time
async def test_nobody_overtakes_those_that_wait_after_a_late_timer() -> None:
    """Not even a request that comes between the end of one wait and that of the next."""
    throttle = Throttle(100.0)
    await throttle.acquire()
    order: list[str] = []

    async def acquire(*names: str) -> None:
        for name in names:
            await throttle.acquire()
            order.append(name)

    virtual_loop().lateness = 0.05
    await asyncio.gather(acquire("first", "last"), acquire("second"), acquire("third"))
    assert order == ["first", "second", "third", "last"]


@in_virtual_time
async def test_what_goes_first_waits_for_one_other_at_most() -> None:
    """And for what came before it and goes first, too; the others keep their order."""
    throttle = Throttle(100.0)
    await throttle.acquire()
    order: list[str] = []

    async def acquire(name: str, *, first: bool = False) -> None:
        await throttle.acquire(first=first)
        order.append(name)

    others = [acquire(name) for name in ("one", "two", "three")]
    await asyncio.gather(*others, acquire("a", first=True), acquire("b", first=True))
    assert order == ["one", "a", "b", "two", "three"]


@in_virtual_time
async def test_what_goes_last_keeps_others_waiting_for_one_slot_at_most() -> None:
    """However many there are."""
    throttle = Throttle(100.0)
    await throttle.acquire()
    order: list[str] = []

    async def acquire(name: str, *, last: bool = False) -> None:
        await throttle.acquire(last=last)
        order.append(name)

    last = [acquire(name, last=True) for name in ("one", "two", "three")]
    await asyncio.gather(*last, acquire("a"), acquire("b"))
    assert order == ["one", "a", "b", "two", "three"]


@in_virtual_time
async def test_what_goes_first_starves_nobody() -> None:
    """Of ten that always go first, each gets one slot before one that does not."""
    throttle = Throttle(100.0)

    async def flood() -> None:
        while True:
            await throttle.acquire(first=True)

    floods = [asyncio.create_task(flood()) for _ in range(10)]
    await asyncio.sleep(1.0)
    started = now()
    await throttle.acquire()
    assert now() - started == pytest.approx(0.11, abs=0.011)
    for task in floods:
        task.cancel()
    await asyncio.wait(floods)


@in_virtual_time
async def test_a_very_late_timer_is_made_up_for_within_bounds() -> None:
    """After the event loop was blocked for 5 s, the unused slots of 0.1 s are used at once."""
    throttle = Throttle(100.0)
    loop = virtual_loop()

    def block() -> None:
        loop.now += 5.0

    loop.call_later(0.995, block)
    times = await send(throttle, 300)
    at_once = [time for time in times if 1005.9 < time < 1006.0]
    assert 9 <= len(at_once) <= 12
    after = [time for time in times if time > 1006.0]
    assert gaps(after) == pytest.approx([0.01] * (len(after) - 1))


STEP = st.one_of(
    st.tuples(st.just("send"), st.integers(1, 5)),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("sleep"), st.floats(0.001, 3.0)),
    st.tuples(st.just("answer"), st.integers(1, 20)),
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
                for _ in range(number):
                    throttle.answered()
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


class TokenBucket:
    """A server that accepts so many requests per second, and answers 429 to the others.

    Args:
        per_second: tokens that are added per second.
        burst: tokens that the bucket holds.
        latency: seconds between a request and its answer.
        announce: returns the Retry-After for the seconds until there is a token; 0 for none.
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
        self.accepted: list[float] = []
        self.refused: list[float] = []

    def stop(self) -> None:
        """Add no more tokens."""
        self._tokens = self._per_second = 1e-9

    def receive(self, throttle: Throttle, on_accepted: Callable[[], None] = lambda: None) -> None:
        """Receive a request that is sent now, and answer it in time."""
        loop = asyncio.get_running_loop()
        loop.call_later(self._latency / 2, self._decide, throttle, now(), on_accepted)

    def _refill(self) -> None:
        grown = self._tokens + (now() - self._updated_at) * self._per_second
        self._tokens, self._updated_at = min(grown, self._burst), now()

    def _decide(self, throttle: Throttle, sent_at: float, on_accepted: Callable[[], None]) -> None:
        self._refill()
        answer: Callable[[], object] = throttle.answered
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            self.accepted.append(sent_at)
            on_accepted()
        else:
            announced = self._announce((1.0 - self._tokens) / self._per_second)
            self.refused.append(sent_at)
            answer = functools.partial(throttle.refused, sent_at, announced)
        asyncio.get_running_loop().call_later(self._latency / 2, answer)


class FixedWindows(TokenBucket):
    """A server that accepts `burst` requests in each time of `burst / per_second` seconds."""

    def _refill(self) -> None:
        window = self._burst / self._per_second
        if now() // window > self._updated_at // window:
            self._tokens = self._burst
        self._updated_at = now()


async def saturate(server: TokenBucket, throttle: Throttle, seconds: float) -> None:
    """Send for so long, and each time as soon as the throttle allows."""
    end = now() + seconds
    while now() < end:
        await throttle.acquire()
        server.receive(throttle)


def nothing(seconds: float) -> float:
    """Send no Retry-After."""
    return 0.0


def exactly(seconds: float) -> float:
    """Send the time until there is a token."""
    return seconds


def whole_seconds(seconds: float) -> float:
    """Send whole seconds, which is all that the header's standard allows."""
    return float(math.ceil(seconds))


@pytest.mark.parametrize(
    ("server", "used", "refused"),
    [
        ((5.0, 5, 0.05, nothing), 0.95, 0.1),
        ((20.0, 5, 0.3, nothing), 0.95, 0.03),
        ((20.0, 5, 0.05, exactly), 0.95, 0.03),
        ((200.0, 20, 0.02, nothing), 0.92, 0.01),
        ((200.0, 20, 0.3, nothing), 0.9, 0.02),
        ((200.0, 20, 0.3, exactly), 0.95, 0.02),
        ((200.0, 20, 0.05, whole_seconds), 0.65, 0.01),
    ],
    ids=[
        "5/s",
        "20/s",
        "20/s announced",
        "200/s near",
        "200/s",
        "200/s announced",
        "200/s seconds",
    ],
)
@in_virtual_time
async def test_a_token_bucket_is_used_well_with_few_refusals(
    server: tuple[float, int, float, Callable[[float], float]], used: float, refused: float
) -> None:
    """A session that has more to send than the server accepts soon learns how much that is.

    In a minute it uses at least 90 % of the bucket, or 65 % where each 429 announces a whole
    second. After the first two seconds at most 10 % of the requests are refused where the bucket
    accepts 5 per second, 3 % at 20 per second, 2 % at 200, and 1 % at 200 with a short latency.
    """
    throttle = Throttle(1000.0)
    bucket = TokenBucket(*server)
    began = now()
    await saturate(bucket, throttle, 60.0)
    accepted = [time for time in bucket.accepted if time > began + 2.0]
    late_refusals = [time for time in bucket.refused if time > began + 2.0]
    assert len(bucket.accepted) >= used * (60.0 * server[0] + server[1])
    assert len(late_refusals) <= refused * (len(accepted) + len(late_refusals))


@pytest.mark.parametrize(
    ("per_second", "window"), [(5.0, 2.0), (5.0, 5.0), (2.0, 10.0), (40.0, 10.0), (10.0, 60.0)]
)
@in_virtual_time
async def test_fixed_windows_are_used_well(per_second: float, window: float) -> None:
    """A server that refuses everything until its next window names no time to wait.

    In four minutes, a session uses at least 90 % of what the windows after the first minute allow;
    60 % if that is much more than the ten per second with which a new session begins.
    """
    throttle = Throttle(100.0)
    server = FixedWindows(per_second, round(per_second * window), 0.05, nothing)
    began = now()
    await saturate(server, throttle, 240.0)
    used = 0.6 if per_second > 10.0 else 0.9
    assert sum(time >= began + 60.0 for time in server.accepted) >= used * 180.0 * per_second


@pytest.mark.parametrize("announced", [1.0, 12.0, 60.0])
@in_virtual_time
async def test_429s_that_announce_a_long_pause_slow_the_session_too(announced: float) -> None:
    """After a minute at most 10 % of the requests were refused."""
    throttle = Throttle(100.0)
    bucket = TokenBucket(20.0, 5, 0.05, lambda _: announced)
    await saturate(bucket, throttle, 60.0 + 10.0 * announced)
    assert len(bucket.refused) <= 0.1 * (len(bucket.refused) + len(bucket.accepted))


@in_virtual_time
async def test_a_session_recovers_soon_from_an_outage_full_of_429s() -> None:
    """A session that was refused for half a minute sends 250 requests within 20 s after it."""
    throttle = Throttle(100.0)
    bucket = TokenBucket(50.0, 20, 0.05, nothing)
    began = now()
    await saturate(bucket, throttle, 60.0)
    while now() < began + 90.0:
        await throttle.acquire()
        await asyncio.sleep(0.05)
        throttle.refused(now() - 0.05, 0.0)
    await send_accepted(throttle, 1)
    began = now()
    assert (await send_accepted(throttle, 250))[-1] < began + 20.0


@in_virtual_time
async def test_good_answers_that_come_together_do_not_let_a_429_raise_the_rate() -> None:
    """As after a server that stood still: they say nothing about how many it accepts."""
    throttle = Throttle(100.0)
    for _ in range(6):
        await throttle.acquire()
        refuse(throttle, announced=False)
    times = await send(throttle, 5)
    for _ in times:
        throttle.answered()
    refuse(throttle, announced=False)
    assert gaps(await send(throttle, 2))[0] > gaps(times)[-1]


@in_virtual_time
async def test_a_server_that_accepts_nothing_any_more_is_asked_ever_less_often() -> None:
    """What was measured before says nothing about the limit now, and no 429 raises the rate."""
    throttle = Throttle(100.0)
    bucket = TokenBucket(50.0, 20, 0.05, nothing)
    began = now()
    await saturate(bucket, throttle, 60.0)
    bucket.stop()
    await saturate(bucket, throttle, 30.0)
    late = [time for time in bucket.refused if time > began + 60.0]
    assert len(late) < 80
    assert sum(time > began + 75.0 for time in late) < 10


async def recover_to_full_speed(throttle: Throttle) -> float:
    """Send to a bucket of 40 per second for a minute, and return the last gap in seconds."""
    bucket = TokenBucket(40.0, 20, 0.05, nothing)
    began, times = now(), []
    while now() < began + 60.0:
        await throttle.acquire()
        times.append(now())
        bucket.receive(throttle)
    return gaps(times)[-1]


@pytest.mark.parametrize("quiet", [5, 30, 300])
@in_virtual_time
async def test_one_429_after_a_quiet_time_costs_a_tenth_of_the_rate(quiet: int) -> None:
    """How few requests there were says nothing about the limit."""
    throttle = Throttle(1000.0)
    before = await recover_to_full_speed(throttle)
    for _ in range(quiet // 2):
        await asyncio.sleep(2.0)
        await send_accepted(throttle, 1)
    refuse(throttle, announced=False)
    await send_accepted(throttle, 1)
    assert gaps(await send_accepted(throttle, 3))[-1] < 1.2 * before


@in_virtual_time
async def test_time_that_the_server_asked_to_wait_is_no_busy_time() -> None:
    """Three 429s of a quiet session, which announce 9 s each, cost a quarter of its rate."""
    throttle = Throttle(1000.0)
    before = await recover_to_full_speed(throttle)
    for _ in range(20):
        await asyncio.sleep(2.0)
        await send_accepted(throttle, 1)
    for _ in range(3):
        await throttle.acquire()
        throttle.refused(now(), 9.0)
    await send_accepted(throttle, 1)
    assert gaps(await send_accepted(throttle, 3))[-1] < 1.5 * before


@in_virtual_time
async def test_time_that_a_limiter_waits_is_no_busy_time() -> None:
    """One 429 costs a session that its own limiter holds at 3 per second a tenth of its rate."""
    limiters: list[RecordingLimiter] = []
    throttle = Throttle(1000.0, limiters)
    before = await recover_to_full_speed(throttle)
    limiters.append(RecordingLimiter(1 / 3))
    await asyncio.gather(*(send_accepted(throttle, 1) for _ in range(60)))
    refuse(throttle, announced=False)
    limiters.clear()
    await send_accepted(throttle, 1)
    assert gaps(await send_accepted(throttle, 3))[-1] < 1.2 * before


async def share(server: TokenBucket, sessions: int, *, seed: int, seconds: float) -> list[int]:
    """Let sessions use a server for so long, and return how many requests it accepted of each."""
    chance = random.Random(seed)
    shares = [0] * sessions
    began = now()

    async def use(number: int) -> None:
        throttle = Throttle(100.0)
        await asyncio.sleep(chance.uniform(0.0, 2.0))
        while now() < began + seconds:
            await throttle.acquire()
            server.receive(throttle, lambda: count(number))

    def count(number: int) -> None:
        shares[number] += 1

    async with asyncio.TaskGroup() as tasks:
        for number in range(sessions):
            tasks.create_task(use(number))
    return shares


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize(
    ("sessions", "per_second", "burst"), [(3, 5.0, 5), (8, 20.0, 20), (30, 60.0, 20)]
)
@in_virtual_time
async def test_sessions_that_share_a_bucket_each_find_a_fair_part(
    sessions: int, per_second: float, burst: int, seed: int
) -> None:
    """They know nothing of each other, and the server names no time to wait.

    Over two minutes none gets less than half of its fair share, at least 85 % of the bucket is
    used, and less than 10 % is refused. Chance decides: of 48 crowds, one missed one of these.
    """
    bucket = TokenBucket(per_second, burst, 0.05, nothing)
    shares = await share(bucket, sessions, seed=seed, seconds=120.0)
    refused, accepted = bucket.refused, bucket.accepted
    assert min(shares) >= 0.5 * 120.0 * per_second / sessions
    assert len(accepted) >= 0.85 * (120.0 * per_second + burst)
    assert len(refused) < 0.1 * (len(refused) + len(accepted))
