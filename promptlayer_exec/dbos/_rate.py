"""A rate of requests that all workers of a batch share."""

from __future__ import annotations

import asyncio
from collections import deque

import attrs

from promptlayer_exec.dbos._store import Store


@attrs.frozen
class Reservation:
    """How a worker takes its share of the rate, in seconds.

    It reserves the slots of at most `reserved` seconds together, and uses a slot at most `late`
    seconds after its time. While it waits for one, it checks every `step` seconds whether the rate
    has changed.
    """

    reserved: float = 0.2
    late: float = 0.05
    step: float = 0.5


RESERVATION = Reservation()


@attrs.define(eq=False)
class SharedRate:
    """A limiter that admits HTTP attempts at a rate that all workers share through the database.

    Each attempt takes one slot. A busy worker reserves several slots together, to save round trips
    to the database. After missing a slot, it reserves single ones again.
    """

    _store: Store
    _batch: str
    rate: float | None  # slots per second, None: no limit
    _slots: deque[float] = attrs.field(init=False, factory=deque)
    _slots_rate: float | None = attrs.field(init=False, default=None)  # at which they were reserved
    _size: int = attrs.field(init=False, default=1)

    async def acquire(self) -> None:
        clock = asyncio.get_running_loop().time
        missed = False
        while (rate := self.rate) is not None:
            if rate != self._slots_rate:
                self._slots.clear()
                self._slots_rate = rate

            while self._slots and (wait := self._slots[0] - clock()) <= RESERVATION.step:
                self._slots.popleft()
                if wait >= -RESERVATION.late:
                    await asyncio.sleep(max(wait, 0.0))
                    return
                missed = True
            if self._slots:
                await asyncio.sleep(RESERVATION.step)
                continue

            if missed:
                self._size = 1
            else:
                self._size = min(2 * self._size, max(1, int(rate * RESERVATION.reserved)))
            size = self._size
            delay = await self._store.in_thread(self._store.reserve, self._batch, size, rate)
            first = clock() + delay
            self._slots.extend(first + index / rate for index in range(size))
