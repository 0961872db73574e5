"""When a request may leave: one throttle for everything that a session does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import anyio

from promptlayer_exec._tasks import clock


class Limiter(Protocol):
    """A limit of the user's own, such as one that several processes share."""

    async def acquire(self) -> None:
        """Return when one more HTTP attempt may be made; called by one attempt at a time."""


# After a 429 the session goes on a little under the measured rate of good answers, and finds its
# way back along a cubic curve, as CUBIC (RFC 9438) does in TCP: quickly to where it was, slowly
# past it, then faster and faster. So a rate that was measured too low corrects itself.
_BACK_OFF = 0.9
# Seconds until it is back at the measured rate. The longer the server makes everybody wait, or the
# longer requests are under way, the more a further 429 costs, and the longer it is put off.
_RETURN = 1.0
_RETURN_PER_SECOND = 3.0
_LONGEST_RETURN = 8.0
_RETURN_DEPARTURES = 5
# Announced by the server, a single 429 is no reason to slow down; a second within this time is.
_SETTLED = 10.0
# An idle session has measured nothing: with every such 429 its rate is halved, from at most this.
_UNMEASURED = 20.0
# What came within fewer seconds is a burst rather than a rate.
_SHORTEST_MEASURE = 0.25
# More requests per second than one process sends.
_UNLIMITED = 2000.0
# A timer that fires late may be made up for by at most this many seconds.
_CATCH_UP = 0.1


class Throttle:
    """Admits one HTTP attempt after the other: first `rate`, then the `limiters`.

    Nothing is reserved ahead: whoever waited longest waits for the next departure, and goes.
    A 429 stops all departures for as long as the server asked, and slows those that follow.

    Args:
        rate: departures per second; None: unlimited.
        limiters: each acquired once per attempt, after `rate`; they may become more, or fewer.
        clock: the time, in seconds.
    """

    def __init__(
        self,
        rate: float | None,
        limiters: Sequence[Limiter] = (),
        *,
        clock: Callable[[], float] = clock,
    ) -> None:
        self._rate = math.inf if rate is None else rate
        self._limiters = limiters
        self._clock = clock
        self._turn = anyio.Lock(fast_acquire=True)
        self._next = -math.inf
        self._good = _Rate()
        self._throttle = math.inf
        self._known = math.inf
        self._refused_at = -math.inf
        self._return = _RETURN
        self._tested = 0.0
        self._tested_at = -math.inf

    async def acquire(self) -> None:
        """Wait for the next departure."""
        queued = self._turn.locked()
        if not queued and not self._limiters and self._next <= (now := self._clock()):
            self._next = now + 1.0 / self._speed(now)
            return
        async with self._turn:
            queued = await self._pause() or queued
            for limiter in self._limiters:
                await limiter.acquire()
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
            if not announced or now - self._refused_at < _SETTLED:
                half = min(self._throttle, self._rate, _UNMEASURED) / 2
                self._known = min(max(self._good.at(now), half / _BACK_OFF), self._rate)
                self._throttle = _BACK_OFF * self._known
                cost = max(announced, now - sent_at)
                self._return = min(_RETURN + _RETURN_PER_SECOND * cost, _LONGEST_RETURN)
                self._return = max(self._return, _RETURN_DEPARTURES / self._throttle)
                self._tested = 0.0
                self._tested_at = now
            self._refused_at = now
        pause = announced or 1.0 / min(self._throttle, self._rate)
        self._good.pause(now + pause - max(self._next, now))
        self._next = max(self._next, now + pause)
        return self._next - now

    def _speed(self, now: float) -> float:
        if self._throttle < self._rate:
            # Seconds in which none left prove nothing.
            self._tested += min(max(now - self._tested_at, 0.0), 2.0 / self._throttle)
            self._tested_at = now
            beyond = self._tested / self._return - 1.0
            self._throttle = self._known * (1.0 + (1.0 - _BACK_OFF) * beyond**3)
            if self._throttle > _UNLIMITED:
                self._throttle = math.inf
        return min(self._throttle, self._rate)


class _Rate:
    """Events per second: an average that forgets within about a second."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._since = -math.inf
        self._last = -math.inf

    def count(self, now: float) -> None:
        passed = now - self._last
        if passed > 1.0:
            self._since = now
        if passed > 0.0:  # not where answers still come after a 429
            self._weight *= math.exp(-passed)
            self._last = now
        self._weight += 1.0

    def at(self, now: float) -> float:
        # What began lately has not its full weight yet.
        share = 1.0 - math.exp(min(self._since - now, -_SHORTEST_MEASURE))
        return self._weight_at(now) / share

    def pause(self, seconds: float) -> None:
        """Leave `seconds` to come, in which nothing can be counted, out of the average."""
        self._last += max(seconds, 0.0)
        self._since += max(seconds, 0.0)

    def _weight_at(self, now: float) -> float:
        return self._weight * math.exp(min(self._last - now, 0.0))
