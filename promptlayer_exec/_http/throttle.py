"""The throttle: decides when a session may send its next request."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import nullcontext

import anyio
import attrs

from promptlayer_exec._errors import PromptLayerExecError
from promptlayer_exec._policies import Limiter, or_infinity

# A congestion event takes this many requests per second off the rate, as a multiplicative decrease
# factor beta between these two; the smaller one while the session has not found a rate yet. The
# more each session gives up, the sooner those that share a server's limit have equal parts of it,
# but the less of it is used by one that is alone. RFC 9438 takes 0.7.
_DECREASE = 4.0
_MIN_BETA = 0.65
_MAX_BETA = 0.9
# K in seconds: this much, and more for each second that the congestion event cost (the announced
# pause, or the time that a request takes). A server whose 429s are dear is probed less often.
_K = 1.0
_K_PER_SECOND_LOST = 3.0
_MAX_K = 8.0
# K in requests: after a first congestion event the session needs a few good answers to measure, and
# at its slowest it must not grow for as long as it has none.
_FIRST_K_SLOTS = 5
_MIN_K_SLOTS = 2
# K is at least this many seconds times the rate, so that slow sessions grow by the same amount each
# second: the slower ones catch up. It need not be more than the second number, nor, for the sake of
# fast sessions, more than the third divided by the root of the rate.
_K_SLOW = 7.0
_MAX_K_SLOW = 14.0
_K_FAST = 20.0
# In the convex region K is at most this: what was not refused until then can soon be more.
_MAX_K_CONVEX = 3.0
# The first 429 with Retry-After only pauses the session: it may be due to a burst. Another within
# this many seconds after the pause is a congestion event.
_SETTLED = 10.0
# The seconds over which good answers are measured. In the shorter time, fewer than so many per
# second say nothing about a rate.
_SHORT_MEMORY = 1.0
_LONG_MEMORY = 10.0
_MIN_MEASURED_RATE = 10.0
# The first congestion event halves the rate, to at most this, unless more was measured.
_FIRST_RATE = 10.0
# However long the server refuses: a session must notice when it does not any more.
_MIN_RATE = 0.1
# Good answers within a shorter time than this, in seconds, say nothing about a rate.
_MIN_MEASURED = 0.25
# A rate above this many requests per second, more than one process sends, is no limit.
_NO_LIMIT = 2000.0
# Unused slots of at most this many seconds are made up for, after a timer that fired late.
_CATCH_UP = 0.1


class Throttle:
    """Gives each HTTP attempt a slot, first by rate, then by limiters.

    They are served in the order in which they come, except for those that go first: the polls of
    watches that were woken. Each of them most likely brings a result and frees a place. Those of
    push go last: however many there are, a start waits for one of them at most.

    A 429 stops all requests for as long as the server asked for, and then slows them down. The
    rate recovers as a congestion window does in CUBIC (RFC 9438), TCP's congestion control:

    - A 429 to a request that was sent after the last one is a *congestion event*. W_max is the
      rate of good answers measured up to it, and the rate falls to beta * W_max. A slow session
      that has not held a rate for a while yet has measured nothing: W_max is its present rate.
    - Then the rate follows the *cubic function* W_max * (1 + (1 - beta) * (t / K - 1)**3) of the
      time t since the event. In its *concave region* the rate is back at W_max after K seconds,
      approaching it ever more slowly. In the *convex region* beyond, it grows ever faster.
    - A good answer after several congestion events ends an outage, or the rest of a fixed window
      of time. The rate goes back to beta * W_max, with the W_max measured before them,
      but to no more than a new session begins with.

    So the rate stays near the one that the server accepted, which keeps both 429s and unused
    capacity rare, and a W_max that was measured too low soon corrects itself. RFC 9438 derives K
    from a constant C; here beta and K are chosen: K is longer where a 429 costs more, and both let
    sessions that share a limit each find a fair part of it.

    Args:
        rate: slots per second; None means unlimited.
        limiters: each is acquired once per attempt, after `rate`. The sequence may change.
    """

    def __init__(self, rate: float | None, limiters: Sequence[Limiter] = ()) -> None:
        self._clock = asyncio.get_running_loop().time
        self._max_rate = or_infinity(rate)
        self._limiters = limiters
        self._queue = asyncio.Lock()
        self._last = asyncio.Lock()
        self._lock = asyncio.Lock()
        # The lock alone does not say so: between two of those that wait, it is free for a moment.
        self._waiting = 0
        self._next_slot = -math.inf
        self._good_answers = _MeasuredRate(_SHORT_MEMORY)
        self._good_answers_for_long = _MeasuredRate(_LONG_MEMORY)
        self._refused_at = -math.inf
        self._paused_until = -math.inf
        # The rate that corresponds to CUBIC's congestion window, and its last congestion event.
        self._rate = math.inf
        self._w_max = math.inf
        self._beta = _MAX_BETA
        self._k = _K
        self._unused_at = -math.inf  # when a slot was last free before it was wanted
        self._has_held = False  # whether a rate has held for half of a K
        self._rate_before_429s = 0.0  # what was measured, if no good answer came since; else 0
        self._t = 0.0
        self._t_updated_at = -math.inf

    async def acquire(self, *, first: bool = False, last: bool = False) -> float:
        """Wait for the next slot, take it, and return the time.

        A request that goes `first` waits for one other at most, and for those that also go first.
        Of those that go `last`, one at a time waits with the others.
        """
        now = self._clock()
        waits = self._waiting > 0 or self._next_slot > now
        if not waits and not self._limiters:
            self._take_slot(now, waited=False)
            return now
        self._waiting += 1
        try:
            # Of those that do not go first, only one at a time waits for the lock.
            async with (
                self._last if last else nullcontext(),
                nullcontext() if first else self._queue,
                self._lock,
            ):
                await self._wait_for_slot()
                for limiter in self._limiters:
                    try:
                        await limiter.acquire()
                    except PromptLayerExecError as error:  # it would be taken for the server's
                        raise RuntimeError(f"the limiter raised {error!r:.200}") from error
                    await self._wait_for_slot()  # a 429 may have arrived meanwhile
                now = self._clock()
                self._take_slot(now, waited=waits)
        finally:
            self._waiting -= 1
        return now

    def _take_slot(self, now: float, *, waited: bool) -> None:
        if not waited or now - self._next_slot > _CATCH_UP:  # or only a limiter made it wait
            self._unused_at = now
        # Only a request that had to wait makes up for lost slots: an idle session wants none.
        slot = max(self._next_slot, now - _CATCH_UP) if waited else now
        self._next_slot = slot + 1.0 / self._current_rate(now)

    async def _wait_for_slot(self) -> None:
        while (wait := self._next_slot - self._clock()) > 0:  # noqa: ASYNC110 - a 429 may move the slot
            await anyio.sleep(wait)

    def answered(self) -> None:
        """Record an answer other than 429."""
        now = self._clock()
        self._good_answers.count(now)
        self._good_answers_for_long.count(now)
        if self._rate_before_429s:
            self._recover(now)

    def refused(self, sent_at: float, announced: float) -> float:
        """Record a 429, and return the seconds until the next request may be sent.

        `announced` is the seconds that the server asked to wait; 0 if it named none.
        """
        now = self._clock()
        # A request that was sent before the last 429 arrived says nothing new about the rate.
        if sent_at >= self._refused_at:
            if not announced or now - self._paused_until < _SETTLED:
                self._reduce_rate(now, lost=max(announced, now - sent_at))
            self._refused_at = now
        pause = announced or 1.0 / min(self._rate, self._max_rate)
        idle = now + pause - max(self._next_slot, now)
        self._good_answers.pause(idle)
        self._good_answers_for_long.pause(idle)
        self._unused_at += max(idle, 0.0)
        self._next_slot = self._paused_until = max(self._next_slot, now + pause)
        return self._next_slot - now

    def _reduce_rate(self, now: float, lost: float) -> None:
        """Handle a congestion event, which costs `lost` seconds."""
        w_max = self._good_answers.per_second(now)
        k = min(_K + _K_PER_SECOND_LOST * lost, _MAX_K)
        if self._rate >= self._max_rate:  # the first
            w_max = max(w_max, min(self._max_rate / 2.0, _FIRST_RATE) / _MAX_BETA)
            self._begin_epoch(now, w_max, _MAX_BETA, max(k, _FIRST_K_SLOTS / (_MAX_BETA * w_max)))
            return
        known = self._good_answers_for_long.per_second(now) if self._has_held else 0.0
        if not self._rate_before_429s:
            self._rate_before_429s = min(known, self._rate)
        if w_max < _MIN_MEASURED_RATE:
            w_max = self._rate
            # What a session got says something about the server only if it wanted more. Not less
            # than a quarter: a few refusals in a row may be chance.
            if known and now - self._unused_at > _LONG_MEMORY:
                w_max = max(min(known, w_max), w_max / 4.0)
        w_max = min(w_max, self._rate)
        most = _MAX_BETA if self._has_held else _MIN_BETA
        beta = min(max(1.0 - _DECREASE / w_max, _MIN_BETA), most)
        self._begin_epoch(now, w_max, beta, max(k, _least_k(w_max, beta)))

    def _recover(self, now: float) -> None:
        """Go back to the rate before a series of 429s, if the server refused everything since.

        That was an outage, or the rest of a fixed window of time. The fastest of those that share
        the next window must not use it up, so no session goes back to more than a new one has.
        """
        w_max, self._rate_before_429s = min(self._rate_before_429s, _FIRST_RATE), 0.0
        if self._rate < _MIN_BETA * w_max:
            self._begin_epoch(now, w_max, _MIN_BETA, max(_K, _least_k(w_max, _MIN_BETA)))

    def _begin_epoch(self, now: float, w_max: float, beta: float, k: float) -> None:
        """Move along another cubic function from now on."""
        self._beta, self._k = beta, k
        self._w_max = max(min(w_max, self._max_rate), _MIN_RATE / beta)
        self._rate = beta * self._w_max
        self._t, self._t_updated_at = 0.0, now

    def _current_rate(self, now: float) -> float:
        """Return the slots per second, after moving along the cubic function."""
        if self._rate < self._max_rate:
            # Time without requests proves nothing, so t does not count it (RFC 9438, 4.2 and 5.8).
            self._t += min(max(now - self._t_updated_at, 0.0), 2.0 / self._rate)
            self._t_updated_at = now
            x = self._t / self._k - 1.0
            self._has_held = self._has_held or x > -0.5
            if x > 1.0:
                x = 1.0 + (self._t - 2.0 * self._k) / min(self._k, _MAX_K_CONVEX)
            self._rate = self._w_max * (1.0 + (1.0 - self._beta) * x**3)
            if self._rate > _NO_LIMIT:
                self._rate = math.inf
        return min(self._rate, self._max_rate)


def _least_k(w_max: float, beta: float) -> float:
    """Return the least K in seconds for a W_max in slots per second."""
    slots = max(_K_SLOW * w_max, _MIN_K_SLOTS / (beta * w_max))
    return min(slots, _MAX_K_SLOW, _K_FAST / math.sqrt(w_max))


@attrs.define(eq=False)
class _MeasuredRate:
    """Answers per second: an average that decays within about as many seconds as its memory."""

    _memory: float
    _weight: float = 0.0
    _since: float = -math.inf
    _last: float = -math.inf

    def count(self, now: float) -> None:
        """Count an answer."""
        passed = now - self._last
        if passed > self._memory:
            self._since = now
        if passed > 0.0:  # not during a pause, when answers to earlier requests still arrive
            self._weight *= math.exp(-passed / self._memory)
            self._last = now
        self._weight += 1.0

    def per_second(self, now: float) -> float:
        """Return the rate at `now`."""
        weight = self._weight * math.exp(min(self._last - now, 0.0) / self._memory)
        # An average over less than its memory has not reached its full weight.
        covered = 1.0 - math.exp(min(self._since - now, -_MIN_MEASURED) / self._memory)
        return weight / (self._memory * covered)

    def pause(self, seconds: float) -> None:
        """Exclude the next `seconds`, in which no request is sent, from the average."""
        self._last += max(seconds, 0.0)
        self._since += max(seconds, 0.0)
