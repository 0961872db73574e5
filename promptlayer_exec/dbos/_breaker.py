"""When a worker may send a start request: a few in parallel, one by one while the server fails.

`Breaker` judges by the responses to start requests, and `Probes` by how the runs end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs

from promptlayer_exec._integration import printable

logger = logging.getLogger("promptlayer_exec")


@attrs.frozen
class Caution:
    """How carefully a worker sends start requests.

    The window is how many requests may wait for their responses at the same time: that many items
    become unknown if the worker is killed or an outage begins. It doubles with each good response.
    After a few failures in a row, the worker sends nothing for a while. These pauses double with
    each probe that fails.

    If the worker sent a request long after the last pause, its failure is the first of a new row.

    While no run ends readably, the worker starts one item at a time. After `probes` of these in a
    row that nobody can read either, it stops the work.
    """

    first_window: int = 4
    largest_window: int = 16
    failures: int = 3
    first_pause: float = 1.0
    longest_pause: float = 30.0
    same_outage_within: float = 60.0
    probes: int = 3


CAUTION = Caution()


@attrs.define(eq=False, repr=False)
class Breaker:
    """Lets starts through in the order in which they come, in the session's event loop.

    It records each failure and each good response. After failures that are not the item's fault
    (5xx, a lost response, 403, a gateway's page) it pauses, and then lets a single start through as
    a probe.
    """

    _patience: float  # seconds of failures before it calls `_give_up`
    _give_up: Callable[[Exception], None]
    _clock: Callable[[], float] = attrs.field(factory=lambda: asyncio.get_running_loop().time)
    _turn: asyncio.Lock = attrs.field(init=False, factory=asyncio.Lock)
    _is_freed: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _window: int = attrs.field(init=False, factory=lambda: CAUTION.first_window)
    _in_flight: int = attrs.field(init=False, default=0)
    _failures: int = attrs.field(init=False, default=0)
    _failing_since: float = attrs.field(init=False, default=0.0)
    _paused_until: float = attrs.field(init=False, default=0.0)
    _pause: float = attrs.field(init=False, default=0.0)
    _paused_at: float = attrs.field(init=False, default=0.0)
    # When the last failure was recorded, or when the pause after it is over.
    _failing_until: float = attrs.field(init=False, default=0.0)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[float]:
        """Wait until one more request may go, and yield the time, for `failed`."""
        async with self._turn:
            while self._in_flight >= self._window:
                self._is_freed.clear()
                await self._is_freed.wait()

            # During a pause, the window is 1, so nothing else is being sent.
            await asyncio.sleep(max(self._paused_until - self._clock(), 0.0))
            self._in_flight += 1

        try:
            yield self._clock()
        finally:
            self._in_flight -= 1
            self._is_freed.set()

    def succeeded(self) -> None:
        """Record that the server responded as it should, whatever that means for the item."""
        if self._pause:
            logger.info("start requests work again")
        self._forget_failures()
        self._window = min(2 * self._window, CAUTION.largest_window)
        self._is_freed.set()

    def _forget_failures(self) -> None:
        self._failures = 0
        self._pause = self._paused_until = 0.0

    def failed(self, error: Exception, *, since: float) -> None:
        """Record a failure that other requests would also meet. The request was sent at `since`."""
        now = self._clock()
        if since - self._failing_until > CAUTION.same_outage_within:
            self._forget_failures()
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        self._window = 1
        self._failing_until = max(now, self._paused_until)

        if self._failures < CAUTION.failures:
            return
        if self._pause and since < self._paused_at:
            return  # it was sent before the pause, so it is no news

        left = self._failing_since + self._patience - now
        if left <= 0.0:
            self._give_up(error)
            return

        if not self._pause:
            text = "start requests fail (%s): pausing, and trying a single one every %g to %g s"
            pauses = (CAUTION.first_pause, CAUTION.longest_pause)
            logger.warning(text, printable(str(error.args[0])), *pauses)
        self._pause = min(2 * self._pause or CAUTION.first_pause, CAUTION.longest_pause)
        self._paused_at = now
        self._paused_until = self._failing_until = now + min(self._pause, left)


@attrs.define(eq=False, repr=False)
class Probes:
    """Lets a worker start one item at a time while no run ends readably.

    A server may have changed the shape of its responses. Then each run costs money, and brings
    nothing that the worker can read. A probe is an item that the worker started alone.
    """

    _stop: Callable[[Exception], None]  # stops the work with an error
    _is_unreadable: bool = attrs.field(init=False, default=False)
    _probe: str | None = attrs.field(init=False, default=None)
    _refused: int = attrs.field(init=False, default=0)  # probes in a row
    _is_changed: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)

    async def turn(self, item: str) -> None:
        """Wait until an item may start."""
        while self._is_unreadable and self._probe not in (None, item):
            self._is_changed.clear()
            await self._is_changed.wait()
        if self._is_unreadable:
            self._probe = item

    def allows(self, item: str) -> bool:
        """Return False if an item has had its turn, but must wait for another one."""
        return not self._is_unreadable or self._probe == item

    def read(self) -> None:
        """Record that a run ended with an output, or failed."""
        self._is_unreadable = False
        self._probe = None
        self._refused = 0
        self._is_changed.set()

    def refused(self, item: str, error: Exception) -> None:
        """Record that nobody can read how the run of an item ended."""
        if self._probe == item:
            self._refused += 1
        self._is_unreadable = True
        if self._refused >= CAUTION.probes:
            text = "starting no more runs, because nobody can read how the last %d of them ended"
            logger.warning(text, self._refused)
            self._stop(error)

    def leave(self, item: str) -> None:
        """Let the next item start, because this one has ended, or did not start."""
        if self._probe == item:
            self._probe = None
            self._is_changed.set()
