"""Decides when a session may send its next request."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

import anyio
import attrs

from promptlayer_exec._api.attempt import Priority
from promptlayer_exec._values.policies import Limiter, or_infinity


@attrs.frozen
class RatePolicy:
    """The dials of a rate that follows the server's limit, which PromptLayer does not publish.

    The rate adapts as in TCP: each 429 cuts it, and it grows steadily in between.

    Args:
        decrease: the factor for each 429. A smaller one makes a lone session waste the limit. With
            a larger one, there are more 429s, and sessions that share the limit get unequal parts
            for longer.
        growth: the fraction by which the rate grows each second. More means more 429s.
        least_growth: the least growth each second, in requests per second. Slow sessions catch up,
            and if every request gets a 429, a session still tries every few seconds.
        acceleration: seconds without a 429 until growth doubles. After twice as many, it triples.
        unlimited: the rate from which a session without `rate` slows down, in requests per second.
            One process cannot send as many.
    """

    decrease: float = 0.7
    growth: float = 0.02
    least_growth: float = 0.06
    acceleration: float = 15.0
    unlimited: float = 1000.0


class Rate:
    """Requests per second, which 429s slow down. The time is an argument."""

    _policy = RatePolicy()

    def __init__(self, most: float) -> None:
        self._most = self._now = most
        self._refused_at = self._grown_at = -math.inf
        self._growing = 0.0  # seconds since the last decrease, without idle ones
        self._before = 0.0  # the rate after the first 429 since the last good response, 0: none

    def at(self, now: float) -> float:
        """Return the rate for a request at this moment."""
        if self._now >= self._most:
            return self._now

        # Idle time proves nothing about the server, so the rate does not grow meanwhile.
        passed = min(now - self._grown_at, 2.0 / self._now)
        self._grown_at = now
        self._growing += passed

        policy = self._policy
        speed = 1.0 + self._growing / policy.acceleration
        self._now += max(policy.growth * self._now, policy.least_growth) * speed * passed
        if self._now > min(self._most, policy.unlimited):
            self._now = self._most
        return self._now

    def accepted(self) -> None:
        """Record a response other than 429."""
        # Several 429s in a row mean an outage or the rest of a fixed window, not a lower limit.
        if self._now < self._before:
            self._now = math.sqrt(self._now * self._before)
        self._before = 0.0

    def refused(self, sent_at: float, now: float) -> float:
        """Record a 429, and return the rate after it."""
        # A request sent before the last 429 arrived proves nothing new about the rate.
        if sent_at > self._refused_at:
            self._now = self._policy.decrease * min(self._now, self._policy.unlimited)
            self._before = self._before or self._now
            self._refused_at = self._grown_at = now
            self._growing = 0.0
        return self._now


class Queues:
    """The lines in which requests wait before the lock or semaphore that admits them in order.

    Urgent requests skip the lines. First and repeated requests each have one, and only the head of
    a line waits at the lock. An urgent request is thus behind two others at most, a first one does
    not wait for all repeated ones, and the two kinds take turns while many of both wait.
    """

    def __init__(self) -> None:
        self._lines = {Priority.FIRST: asyncio.Lock(), Priority.REPEATED: asyncio.Lock()}

    def line(self, priority: Priority) -> AbstractAsyncContextManager[None]:
        """Return the lock that a request holds while it waits for admission."""
        return self._lines.get(priority) or nullcontext()


class Throttle:
    """Admits HTTP attempts one after the other, by rate and then by limiters.

    Attempts of the same priority go in order of arrival. A 429 stops all attempts for as long as
    the server asked. The list of limiters may change.
    """

    def __init__(self, rate: float | None, limiters: Sequence[Limiter] = ()) -> None:
        self._clock = asyncio.get_running_loop().time
        self.rate = Rate(or_infinity(rate))
        self._limiters = limiters
        self._queues = Queues()
        self._lock = asyncio.Lock()
        # The lock does not show it, because it is briefly free between two waiting attempts.
        self._waiting = 0
        self._next_at = -math.inf

    async def acquire(self, priority: Priority = Priority.FIRST) -> float:
        """Wait until an attempt may go, and return the time."""
        now = self._clock()
        waits = self._waiting > 0 or self._next_at > now
        if not waits and not self._limiters:
            self._take(now, waited=False)
            return now

        self._waiting += 1
        try:
            async with self._queues.line(priority), self._lock:
                await self._wait()
                for limiter in self._limiters:
                    await limiter.acquire()
                    await self._wait()  # a 429 may have arrived meanwhile

                now = self._clock()
                self._take(now, waited=waits)
        finally:
            self._waiting -= 1
        return now

    async def _wait(self) -> None:
        while (wait := self._next_at - self._clock()) > 0:  # noqa: ASYNC110 - a 429 may move it
            await anyio.sleep(wait)

    def _take(self, now: float, *, waited: bool) -> None:
        at = now
        if waited:
            # If the timer fired late, make up for it, by a tenth of a second at most. An idle
            # session has nothing to make up for.
            at = max(self._next_at, now - 0.1)
        self._next_at = at + 1.0 / self.rate.at(now)

    def refused(self, sent_at: float, announced: float) -> float:
        """Record a 429, and return the seconds until the next request may go.

        Args:
            sent_at: when the session sent that request, on the event loop's clock.
            announced: the seconds that the server asked to wait, or 0 if it did not ask.
        """
        now = self._clock()
        rate = self.rate.refused(sent_at, now)
        self._next_at = max(self._next_at, now + (announced or 1.0 / rate))
        return self._next_at - now
