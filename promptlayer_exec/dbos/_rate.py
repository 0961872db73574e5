"""One rate over all workers."""

from __future__ import annotations

import asyncio
from collections import deque

from promptlayer_exec.dbos._store import Store

# The longest stretch of time that one worker reserves at once, in seconds.
_STRETCH = 0.2
# How late a departure may still be used, in seconds.
_LATE = 0.05


class SharedRate:
    """Admits one HTTP attempt after the other, at a rate that all workers share.

    A busy worker reserves several departures at once; one that let some pass reserves fewer.

    Args:
        store: where departures are reserved.
        batch: whose workers share the rate.
        rate: departures per second.
    """

    def __init__(self, store: Store, batch: str, rate: float) -> None:
        self._store = store
        self._batch = batch
        self._rate = rate
        self._departures: deque[float] = deque()
        self._size = 1

    async def acquire(self) -> None:
        """Return when one more HTTP attempt may be made."""
        clock = asyncio.get_running_loop().time
        missed = False
        while True:
            while self._departures:
                wait = self._departures.popleft() - clock()
                if wait >= -_LATE:
                    await asyncio.sleep(max(wait, 0.0))
                    return
                missed = True
            most = max(1, int(self._rate * _STRETCH))
            self._size = 1 if missed else min(2 * self._size, most)
            size = self._size
            delay = await asyncio.to_thread(self._store.reserve, self._batch, size, self._rate)
            first = clock() + delay
            self._departures.extend(first + index / self._rate for index in range(size))
