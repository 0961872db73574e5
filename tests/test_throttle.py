"""The throttle of a session, in virtual time: nothing here sleeps."""

import asyncio
import heapq
import itertools
import math

import anyio
import pytest

from promptlayer_exec._throttle import Throttle


class World:
    """A clock that sleeping moves, and a list of what happens meanwhile.

    Attributes:
        now: the time.
        late: how much too late each timer fires.
        slept: the length of each sleep.
    """

    def __init__(self):
        self.now = 1000.0
        self.late = 0.0
        self.slept = []
        self._coming = []
        self._count = itertools.count()

    def clock(self):
        """Return the time."""
        return self.now

    async def sleep(self, delay):
        """Let time pass, and let other tasks run."""
        assert delay > 0
        self.slept.append(delay)
        self.advance(delay + self.late)
        await asyncio.sleep(0)

    def at(self, when, happens):
        """Have something happen when time comes to `when`."""
        heapq.heappush(self._coming, (when, next(self._count), happens))

    def advance(self, seconds):
        """Let time pass."""
        end = self.now + seconds
        while self._coming and self._coming[0][0] <= end:
            self.now, _, happens = heapq.heappop(self._coming)
            happens()
        self.now = end


@pytest.fixture
def world(monkeypatch):
    """A world whose sleeps are those of anyio."""
    world = World()
    monkeypatch.setattr(anyio, "sleep", world.sleep)
    return world


async def departures(throttle, world, count):
    """Return when each of `count` requests leaves, one asking after the other."""
    times = []
    for _ in range(count):
        await throttle.acquire()
        times.append(world.now)
    return times


def gaps(times):
    """Return the distances between times."""
    return [later - earlier for earlier, later in itertools.pairwise(times)]


class Counter:
    """A limiter that notes when it is asked."""

    def __init__(self, world):
        self.world = world
        self.asked = []

    async def acquire(self):
        """Note the time."""
        self.asked.append(self.world.now)


@pytest.mark.parametrize("rate", [0.2, 1.0, 10.0, 100.0])
async def test_spacing(world, rate):
    """The first request leaves at once, and the others follow at the rate."""
    times = await departures(Throttle(rate, clock=world.clock), world, 20)
    assert times[0] == 1000.0
    assert gaps(times) == pytest.approx([1 / rate] * 19)


async def test_unlimited(world):
    """Without a rate nothing ever waits."""
    await departures(Throttle(None, clock=world.clock), world, 1000)
    assert world.slept == []


@pytest.mark.parametrize("idle", [0.05, 0.3, 1000.0])
async def test_no_burst_after_idling(world, idle):
    """Time in which nothing left is lost: what follows keeps its distance."""
    throttle = Throttle(10.0, clock=world.clock)
    await departures(throttle, world, 3)
    world.advance(idle)
    assert gaps(await departures(throttle, world, 5)) == pytest.approx([0.1] * 4)


async def test_no_burst_of_many_tasks_after_idling(world):
    """That holds for many tasks that ask at once, too."""
    throttle = Throttle(10.0, clock=world.clock)
    await departures(throttle, world, 3)
    world.advance(60.0)
    times = [time for _, time in await race(throttle, world, 5)]
    assert gaps(times) == pytest.approx([0.1] * 4)


async def race(throttle, world, count):
    """Have `count` tasks ask at once, and return (task, time) in the order of departure."""
    left = []

    async def ask(number):
        await throttle.acquire()
        left.append((number, world.now))

    await asyncio.gather(*(ask(number) for number in range(count)))
    return left


async def test_first_come_first_served(world):
    """Whoever asked first leaves first."""
    left = await race(Throttle(10.0, clock=world.clock), world, 30)
    assert [number for number, _ in left] == list(range(30))
    assert gaps([time for _, time in left]) == pytest.approx([0.1] * 29)


async def test_cancelled_waiters_use_no_departure(world):
    """Whoever is cancelled while waiting leaves its place to the next."""
    throttle = Throttle(10.0, clock=world.clock)
    await throttle.acquire()
    tasks = [asyncio.create_task(throttle.acquire()) for _ in range(5)]
    for task in tasks[:4]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task.cancelled() for task in tasks] == [True] * 4 + [False]
    assert world.now == pytest.approx(1000.1)


async def test_limiter_comes_after_the_rate(world):
    """The limiter is asked once per request, when the rate lets it go."""
    limiter = Counter(world)
    times = await departures(Throttle(10.0, [limiter], clock=world.clock), world, 10)
    assert limiter.asked == times
    assert gaps(times) == pytest.approx([0.1] * 9)


async def test_limiter_without_a_rate(world):
    """The limiter is asked where there is no rate, too."""
    limiter = Counter(world)
    await departures(Throttle(None, [limiter], clock=world.clock), world, 7)
    assert len(limiter.asked) == 7


async def test_the_rate_holds_behind_a_limiter_that_waits(world):
    """Requests come to the limiter one at a time, and leave no faster when it lets them go."""
    go = asyncio.Event()
    asked = []

    class Held:
        async def acquire(self):
            asked.append(None)
            await go.wait()

    left = []

    async def request():
        await throttle.acquire()
        left.append(world.now)

    throttle = Throttle(10.0, [Held()], clock=world.clock)
    tasks = [asyncio.create_task(request()) for _ in range(4)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(asked) == 1
    world.advance(60.0)
    go.set()
    await asyncio.gather(*tasks)
    assert gaps(left) == pytest.approx([0.1] * 3)


async def test_a_429_holds_back_a_request_that_was_at_the_limiter(world):
    """It does not leave in the seconds that the server asked for."""

    class Slow:
        async def acquire(self):
            throttle.refused(world.now, 5.0)

    throttle = Throttle(None, [Slow()], clock=world.clock)
    start = world.now
    await throttle.acquire()
    assert world.now - start == pytest.approx(5.0)


async def test_limiter_error_is_the_callers(world):
    """What the limiter raises reaches the caller, and the throttle goes on."""

    class Broken:
        async def acquire(self):
            raise KeyError("oops")

    throttle = Throttle(10.0, [Broken()], clock=world.clock)
    for _ in range(2):
        with pytest.raises(KeyError):
            await throttle.acquire()


async def steady(throttle, world, seconds):
    """Send for some time, every request being answered well at once; return the departures."""
    times = []
    end = world.now + seconds
    while world.now < end:
        await throttle.acquire()
        times.append(world.now)
        throttle.answered()
    return times


async def test_announced_429_stops_all(world):
    """A 429 with Retry-After stops every departure exactly that long."""
    throttle = Throttle(50.0, clock=world.clock)
    await steady(throttle, world, 3.0)
    at = world.now
    assert throttle.refused(at, 5.0) == 5.0
    times = [time for _, time in await race(throttle, world, 3)]
    assert times[0] == pytest.approx(at + 5.0)
    assert min(gaps(times)) > 0.019


async def test_announced_429_stops_those_that_wait_already(world):
    """A request that waits for its departure already waits on, too."""
    throttle = Throttle(10.0, clock=world.clock)
    await throttle.acquire()
    world.at(1000.05, lambda: throttle.refused(1000.0, 5.0))
    await throttle.acquire()
    assert world.now == pytest.approx(1005.05)


async def test_the_longer_announcement_counts(world):
    """Of several announcements, the one that ends last holds."""
    throttle = Throttle(50.0, clock=world.clock)
    await throttle.acquire()
    at = world.now
    throttle.refused(at, 5.0)
    assert throttle.refused(at, 2.0) == 5.0
    world.advance(1.0)
    assert throttle.refused(at, 9.0) == pytest.approx(9.0)
    await throttle.acquire()
    assert world.now == pytest.approx(at + 10.0)


async def test_announced_429_without_a_rate(world):
    """A session without a rate of its own stops, too."""
    throttle = Throttle(None, clock=world.clock)
    await throttle.acquire()
    throttle.refused(world.now, 2.0)
    await throttle.acquire()
    assert world.now == 1002.0


async def test_unannounced_429_slows_to_the_good_rate(world):
    """Without Retry-After the rate falls to a little under that of good answers."""
    throttle = Throttle(100.0, clock=world.clock)
    for index in range(500):
        await throttle.acquire()
        if index % 2:
            throttle.answered()  # 50 good ones per second
    wait = throttle.refused(world.now, 0.0)
    assert 1 / 50 <= wait <= 1 / 35
    times = await departures(throttle, world, 2)
    assert 1 / 50 <= gaps(times)[0] <= 1 / 35


@pytest.mark.parametrize(("rate", "first"), [(None, 0.1), (100.0, 0.1), (2.0, 1.0)])
async def test_429_before_any_good_answer(world, rate, first):
    """Where nothing was measured, each 429 halves the rate: from 20 per second at most."""
    throttle = Throttle(rate, clock=world.clock)
    for pause in (first, first * 2, first * 4):
        await throttle.acquire()
        world.advance(0.001)
        assert throttle.refused(world.now, 0.0) == pytest.approx(pause, rel=0.2)


@pytest.mark.parametrize("rate", [0.2, 1.0])
async def test_429_slows_a_slow_session(world, rate):
    """Any 429 slows every request of the session: of one with a low rate as well."""
    throttle = Throttle(rate, clock=world.clock)
    for _ in range(20):
        await throttle.acquire()
        throttle.answered()
    throttle.refused(world.now, 0.0)
    times = await departures(throttle, world, 3)
    assert max(gaps([world.now, *times])[1:]) > 1 / rate * 1.01


async def test_old_429s_do_not_slow_further(world):
    """429s of requests that left before the last slow-down tell nothing new."""
    throttle = Throttle(100.0, clock=world.clock)
    times = await steady(throttle, world, 5.0)
    world.advance(0.001)
    first = throttle.refused(times[-1], 0.0)
    slowed = throttle._throttle
    for sent_at in times[-20:]:
        assert throttle.refused(sent_at, 0.0) == first
    assert throttle._throttle == slowed
    assert 80.0 < slowed < 95.0


async def test_seconds_in_which_nothing_may_leave_are_not_measured(world):
    """After a long announced stop, the next 429 still knows the rate from before it."""
    throttle = Throttle(100.0, clock=world.clock)
    await steady(throttle, world, 5.0)
    throttle.refused(world.now, 20.0)
    await steady(throttle, world, 0.1)
    throttle.refused(world.now, 0.1)
    await steady(throttle, world, 0.1)
    throttle.refused(world.now, 0.1)
    assert 75.0 < throttle._throttle < 95.0


async def test_new_429s_slow_further(world):
    """429s of requests that left after the slow-down do slow further."""
    throttle = Throttle(100.0, clock=world.clock)
    await steady(throttle, world, 5.0)
    throttle.refused(world.now, 0.0)
    before = throttle._throttle
    for _ in range(50):
        await throttle.acquire()
    throttle.refused(world.now, 0.0)
    assert throttle._throttle < before


@pytest.mark.parametrize("announced", [0.0, 3.0], ids=["unannounced", "announced"])
@pytest.mark.parametrize("rate", [100.0, None], ids=["rate", "unlimited"])
async def test_recovery(world, rate, announced):
    """Once no 429 comes any more, the session is back at full speed within half a minute."""
    throttle = Throttle(rate, clock=world.clock)
    await throttle.acquire()
    throttle.refused(world.now, announced)
    for _ in range(3000):
        await throttle.acquire()
        throttle.answered()
        if rate is None:
            world.advance(0.01)
    assert world.now < 1000.0 + 45.0
    world.slept.clear()
    times = await departures(throttle, world, 50)
    if rate is None:
        assert max(gaps(times)) < 0.002  # not noticed by who sends 100 per second
    else:
        assert gaps(times) == pytest.approx([1 / rate] * 49)


async def test_recovery_after_a_second_429(world):
    """After a second 429 the rate is back where it was in a second, and then at full speed."""
    throttle = Throttle(100.0, clock=world.clock)
    await steady(throttle, world, 3.0)
    throttle.refused(world.now, 0.0)
    world.advance(0.5)
    await throttle.acquire()
    throttle.refused(world.now, 0.0)
    second = world.now
    slow = throttle._throttle
    await steady(throttle, world, 1.0)
    assert slow < throttle._throttle < slow * 1.15
    times = await steady(throttle, world, 5.0)
    assert times[-1] - second < 10.0
    assert gaps(times[-50:]) == pytest.approx([0.01] * 49)


async def test_an_unlimited_session_is_unlimited_again(world):
    """Once it has come to a rate that no process reaches."""
    throttle = Throttle(None, clock=world.clock)
    await throttle.acquire()
    throttle.refused(world.now, 0.0)
    while math.isfinite(throttle._throttle):
        await throttle.acquire()
    assert world.now < 1000.0 + 60.0
    world.slept.clear()
    await departures(throttle, world, 100)
    assert world.slept == []


async def test_idle_time_is_no_growth(world):
    """An hour without a request proves nothing: the rate grows as after any other gap."""
    throttle = Throttle(100.0, clock=world.clock)
    await throttle.acquire()
    throttle.refused(world.now, 0.0)
    world.advance(3600.0)
    times = await departures(throttle, world, 3)
    assert gaps(times) == pytest.approx([0.1, 0.1], rel=0.1)
    assert gaps(times)[0] > gaps(times)[1]


async def test_late_timers_are_made_up_for(world):
    """Timers that fire a little late cost no throughput."""
    throttle = Throttle(100.0, clock=world.clock)
    await throttle.acquire()
    world.late = 0.004
    await race(throttle, world, 1000)
    assert world.now - 1000.0 == pytest.approx(10.0, abs=0.02)


async def test_late_timers_are_made_up_for_a_tenth_of_a_second(world):
    """A timer that fires very late is made up for by a tenth of a second's worth at most."""
    throttle = Throttle(100.0, clock=world.clock)
    await throttle.acquire()
    world.late = 5.0
    world.at(1001.0, lambda: setattr(world, "late", 0.0))
    times = [time for _, time in await race(throttle, world, 200)]
    woke = times[0]
    assert woke == pytest.approx(1005.01)
    assert 9 <= sum(time < woke + 0.005 for time in times) <= 12
    assert world.now - woke == pytest.approx(1.89, abs=0.03)


async def test_default_clock():
    """Without a clock of its own a throttle uses the event loop's."""
    await Throttle(None).acquire()


class Bucket:
    """A server's token bucket."""

    def __init__(self, per_second, burst, now):
        self.per_second = per_second
        self.burst = self.tokens = burst
        self.seen_at = now

    def take(self, now):
        """Return 0.0 if a token is there, else the seconds until there is one."""
        grown = self.tokens + (now - self.seen_at) * self.per_second
        self.tokens, self.seen_at = min(grown, self.burst), now
        if self.tokens >= 1.0:
            self.tokens -= 1.0
            return 0.0
        return (1.0 - self.tokens) / self.per_second


def never(wait):
    """Announce nothing."""
    return 0.0


def exactly(wait):
    """Announce the time until there is a token."""
    return wait


def whole_seconds(wait):
    """Announce whole seconds, as the header's standard has it."""
    return float(math.ceil(wait))


async def simulate(world, announce, *, seconds=30.0, latency=0.05, per_second=200.0, rate=1000.0):
    """Send as fast as the throttle lets us; return (sent at, was good) for each request."""
    throttle = Throttle(rate, clock=world.clock)
    bucket = Bucket(per_second, 20, world.now)
    seen = []

    def arrive(sent_at):
        wait = bucket.take(world.now)
        seen.append((sent_at, not wait))
        report = (
            throttle.answered if not wait else lambda: throttle.refused(sent_at, announce(wait))
        )
        world.at(world.now + latency / 2, report)

    end = world.now + seconds
    while world.now < end:
        await throttle.acquire()
        sent_at = world.now
        world.at(sent_at + latency / 2, lambda sent_at=sent_at: arrive(sent_at))
    return seen


@pytest.mark.parametrize("latency", [0.02, 0.05, 0.3])
@pytest.mark.parametrize(
    ("announce", "used", "refused"),
    [(never, 0.9, 0.02), (exactly, 0.9, 0.02), (whole_seconds, 0.65, 0.07)],
    ids=["never", "exactly", "whole seconds"],
)
async def test_token_bucket(world, announce, used, refused, latency):
    """Against a bucket of 200 per second, 30 s use 90 % of it, and under 2 % are refused later.

    Where a server can announce whole seconds only, each 429 costs one of them.
    """
    seen = await simulate(world, announce, latency=latency)
    good = sum(was_good for _, was_good in seen)
    later = [was_good for sent_at, was_good in seen if sent_at > 1001.0]
    assert good >= used * 200.0 * 30.0
    assert later.count(False) <= refused * len(later)


async def test_answers_that_still_come_in_a_pause_do_not_spoil_the_measure(world):
    """They left before it."""
    throttle = Throttle(100.0, clock=world.clock)
    await steady(throttle, world, 5.0)
    throttle.refused(world.now, 5.0)
    world.advance(0.05)
    throttle.answered()
    await steady(throttle, world, 0.1)
    throttle.refused(world.now, 0.1)
    assert 80.0 < throttle._throttle < 95.0
