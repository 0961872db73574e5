"""One rate, shared by all workers of a batch."""

from __future__ import annotations

import asyncio
from collections import deque

from promptlayer_exec.dbos._store import Store

# A worker reserves slots for at most this many seconds at once.
_MAX_RESERVED = 0.2
# A slot can be used for this many seconds after its time.
_MAX_LATE = 0.05


class SharedRate:
    """A limiter that admits HTTP attempts at a rate that all workers share through the database.

    Each attempt takes one slot. A busy worker reserves several slots at once, to save round trips
    to the database; one that missed a slot goes back to reserving one.

    Args:
        store: where the slots are reserved.
        batch: the batch whose workers share the rate.
        rate: slots per second.
    """

    def __init__(self, store: Store, batch: str, rate: float) -> None:
        self._store = store
        self._batch = batch
        self._rate = rate
        self._slots: deque[float] = deque()
        self._size = 1

    async def acquire(self) -> None:
        """Return when one more HTTP attempt may be made."""
        clock = asyncio.get_running_loop().time
        missed = False
        while True:
            while self._slots:
                wait = self._slots.popleft() - clock()
                if wait >= -_MAX_LATE:
                    await asyncio.sleep(max(wait, 0.0))
                    return
                missed = True
            most = max(1, int(self._rate * _MAX_RESERVED))
            self._size = 1 if missed else min(2 * self._size, most)
            size = self._size
            delay = await asyncio.to_thread(self._store.reserve, self._batch, size, self._rate)
            first = clock() + delay
            self._slots.extend(first + index / self._rate for index in range(size))
