"""When a request may leave: one pace for everything that a session does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import anyio


class Limiter(Protocol):
    """A limit of the user's own, such as one that several processes share."""

    async def acquire(self) -> None:
        """Return when one more HTTP attempt may be made; called by one attempt at a time."""


# After a 429 that is the second in a while, or names no Retry-After: the share of the measured rate
# of good answers to go on with, and how fast to grow again, per second. Fast at first, as a burst
# says little about the limit; slowly once a second 429 has shown where it lies; fast again when
# none came for a while.
_BACK_OFF = 0.9
_RAMP = math.log(4.0)
_PROBE = math.log(1.05)
_GREATEST_STEP = 0.08
_SETTLED = 10.0
# An idle session has measured nothing: with every such 429 its rate is halved, from at most this.
_UNMEASURED = 20.0
# A timer that fires late may be made up for by at most this many seconds.
_CATCH_UP = 0.1


class Pace:
    """Admits one HTTP attempt after the other: first `rate`, then `limiter`.

    Nothing is reserved ahead: whoever waited longest waits for the next departure, and goes.
    A 429 stops all departures for as long as the server asked, and slows those that follow.

    Args:
        rate: departures per second; None: unlimited.
        limiter: acquired once per attempt, after `rate`.
        clock: the time, in seconds.
    """

    def __init__(
        self,
        rate: float | None,
        limiter: Limiter | None = None,
        *,
        clock: Callable[[], float] = anyio.current_time,
    ) -> None:
        self._rate = math.inf if rate is None else rate
        self._limiter = limiter
        self._clock = clock
        self._turn = anyio.Lock(fast_acquire=True)
        self._next = -math.inf
        self._good = _Rate()
        self._throttle = math.inf
        self._refused_at = -math.inf
        self._grown_at = -math.inf
        self._growth = _RAMP

    async def acquire(self) -> None:
        """Wait for the next departure."""
        queued = self._turn.locked()
        async with self._turn:
            queued = await self._pause() or queued
            if self._limiter is not None:
                await self._limiter.acquire()
                await self._pause()  # a 429 may have come meanwhile
            now = self._clock()
            due = max(self._next, now - _CATCH_UP) if queued else now
            self._next = due + 1.0 / self._speed(now)

    async def _pause(self) -> bool:
        """Wait until a request may leave; return whether there was need to."""
        waited = False
        while (wait := self._next - self._clock()) > 0:
            waited = True
            await anyio.sleep(wait)
        return waited

    def answered(self) -> None:
        """Take note of an answer other than 429."""
        self._good.count(self._clock())

    def refused(self, sent_at: float, announced: float) -> float:
        """Take note of a 429, and return the seconds in which no request leaves.

        Args:
            sent_at: when the request left; one that left before the last slow-down tells nothing
                new about the rate.
            announced: the seconds that the server asked to wait; 0 where it did not.
        """
        now = self._clock()
        if sent_at >= self._refused_at:
            repeated = now - self._refused_at < _SETTLED
            if repeated or not announced:
                half = min(self._throttle, self._rate, _UNMEASURED) / 2
                known = max(_BACK_OFF * self._good.at(now), half)
                self._throttle = min(known, _BACK_OFF * self._rate)
                self._growth = _PROBE if repeated else _RAMP
            self._refused_at = self._grown_at = now
        pause = announced or 1.0 / min(self._throttle, self._rate)
        self._good.pause(now + pause - max(self._next, now))
        self._next = max(self._next, now + pause)
        return self._next - now

    def _speed(self, now: float) -> float:
        if self._throttle < self._rate:
            if now - self._refused_at > _SETTLED:
                self._growth = _RAMP
            # Little by little with each departure: seconds in which none left prove nothing.
            growth = min(self._growth * max(now - self._grown_at, 0.0), _GREATEST_STEP)
            self._throttle *= math.exp(growth)
            self._grown_at = now
            if self._throttle > 1e6:
                self._throttle = math.inf
        return min(self._throttle, self._rate)


class _Rate:
    """Events per second: an average that forgets within about a second."""

    def __init__(self) -> None:
        self._value = 0.0
        self._last = -math.inf

    def count(self, now: float) -> None:
        self._value = self.at(now) + 1.0
        self._last = now

    def at(self, now: float) -> float:
        return self._value * math.exp(min(self._last - now, 0.0))

    def pause(self, seconds: float) -> None:
        """Leave `seconds` to come, in which nothing can be counted, out of the average."""
        self._last += max(seconds, 0.0)
