"""The throttle: decides when a session may send its next request."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import nullcontext

import anyio

from promptlayer_exec._errors import PromptLayerExecError
from promptlayer_exec._policies import Limiter, or_infinity

# What a 429 leaves of the rate. With less, a lone session uses less of the server's limit; with
# more, sessions that share the limit get unequal parts for longer, and more is refused.
_DECREASE = 0.7
# The rate grows by this part of itself each second. A higher value means more 429s.
_GROWTH = 0.02
# It grows by at least so many requests per second each second: slower sessions catch up, and one
# that is refused everything still asks every few seconds.
_MIN_GROWTH = 0.06
# After so many seconds without a 429 it grows twice as fast, then three times.
_ACCELERATION = 15.0
# More than one process can send: a session without `rate` slows down from this rate.
_UNLIMITED = 1000.0
# After a timer that fired late, at most this many unused seconds are made up for.
_CATCH_UP = 0.1


class Rate:
    """Requests per second, slowed down by 429s; the time is an argument.

    The rate adapts as TCP's does, by additive increase and multiplicative decrease.
    """

    def __init__(self, most: float) -> None:
        self._most = self._now = most
        self._refused_at = self._grown_at = -math.inf
        self._growing = 0.0  # seconds since the last decrease, less those without requests
        self._before = 0.0  # after the first of the 429s since the last good answer; 0: none

    def at(self, now: float) -> float:
        """Return the rate for a request that is sent now."""
        if self._now < self._most:
            # Time without requests says nothing about the server, so the rate does not grow in it.
            passed = min(now - self._grown_at, 2.0 / self._now)
            self._grown_at = now
            self._growing += passed
            speed = 1.0 + self._growing / _ACCELERATION
            self._now += max(_GROWTH * self._now, _MIN_GROWTH) * speed * passed
            if self._now > min(self._most, _UNLIMITED):
                self._now = self._most
        return self._now

    def accepted(self) -> None:
        """Record an answer other than 429."""
        # Several 429s in a row were an outage or the rest of a fixed window, not a lower limit.
        if self._now < self._before:
            self._now = math.sqrt(self._now * self._before)
        self._before = 0.0

    def refused(self, sent_at: float, now: float) -> float:
        """Record a 429, and return the rate after it."""
        # A request that was sent before the last 429 arrived says nothing new about the rate.
        if sent_at > self._refused_at:
            self._now = _DECREASE * min(self._now, _UNLIMITED)
            self._before = self._before or self._now
            self._refused_at = self._grown_at = now
            self._growing = 0.0
        return self._now


class Throttle:
    """Lets HTTP attempts go one after the other, by rate and then by limiters.

    Attempts go in order of arrival, except for those with priority: the polls of watches that were
    woken, the requests of push, and those for definitions. A 429 stops all attempts for as long as
    the server asked. The sequence of limiters may change.
    """

    def __init__(self, rate: float | None, limiters: Sequence[Limiter] = ()) -> None:
        self._clock = asyncio.get_running_loop().time
        self.rate = Rate(or_infinity(rate))
        self._limiters = limiters
        self._queue = asyncio.Lock()
        self._lock = asyncio.Lock()
        # The lock alone does not say so: it is free for a moment between two waiting attempts.
        self._waiting = 0
        self._next_at = -math.inf

    async def acquire(self, *, priority: bool = False) -> float:
        """Wait until an attempt may be made, and return the time.

        A request with `priority` waits for at most one other, and for others with priority.
        """
        now = self._clock()
        waits = self._waiting > 0 or self._next_at > now
        if not waits and not self._limiters:
            self._take(now, waited=False)
            return now
        self._waiting += 1
        try:
            # Of those without priority, only one at a time waits for the lock.
            async with nullcontext() if priority else self._queue, self._lock:
                await self._wait()
                for limiter in self._limiters:
                    try:
                        await limiter.acquire()
                    except PromptLayerExecError as error:  # it would be taken for the server's
                        raise RuntimeError(f"the limiter raised {error!r:.200}") from error
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
        # Only a request that had to wait makes up for lost time: an idle session has lost none.
        at = max(self._next_at, now - _CATCH_UP) if waited else now
        self._next_at = at + 1.0 / self.rate.at(now)

    def refused(self, sent_at: float, announced: float) -> float:
        """Record a 429, and return the seconds until the next request may be sent.

        `announced` is the seconds that the server asked to wait; 0 if it named none.
        """
        now = self._clock()
        rate = self.rate.refused(sent_at, now)
        self._next_at = max(self._next_at, now + (announced or 1.0 / rate))
        return self._next_at - now
