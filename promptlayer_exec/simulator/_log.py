"""What the simulator was asked, and waiting for it."""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping

from attrs import define, field, frozen

_LOGGER = logging.getLogger(__package__)


@frozen
class SimRequest:
    """One request as the simulator saw it.

    Attributes:
        method: The HTTP method.
        path: The path as it was sent: percent-encoded, without the query.
        query: The decoded query parameters; a `multidict`, so `getall` finds repeated ones.
        headers: The headers, found in any case.
        body: The body.
        at: Seconds since the simulator was made.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    at: float


def _resolve(reached: "asyncio.Future[None]") -> None:
    if not reached.done():
        reached.set_result(None)


@define(eq=False)
class RequestLog:
    """Counts requests, keeps them if `keep` says so, and wakes whoever waits for a number of them.

    Each is also passed to `on_request`, whose errors are logged.

    Recorded in one thread, read in any.
    """

    keep: bool
    _on_request: Callable[[SimRequest], None] | None = None
    count: int = field(default=0, init=False)
    _requests: list[SimRequest] = field(factory=list, init=False)
    _waiters: "dict[asyncio.Future[None], int]" = field(factory=dict, init=False)
    _recorded: threading.Condition = field(factory=threading.Condition, init=False)

    @property
    def requests(self) -> list[SimRequest]:
        with self._recorded:
            return list(self._requests)

    def record(self, request: SimRequest) -> None:
        with self._recorded:
            self.count += 1
            if self.keep:
                self._requests.append(request)
            for reached, count in self._waiters.items():
                if count <= self.count:
                    reached.get_loop().call_soon_threadsafe(_resolve, reached)
            self._recorded.notify_all()
        if self._on_request is not None:
            try:
                self._on_request(request)
            except Exception:
                _LOGGER.exception("on_request failed")

    async def wait(self, count: int, timeout: float) -> None:
        reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._recorded:
            if count <= self.count:
                return
            self._waiters[reached] = count
        try:
            async with asyncio.timeout(timeout):
                await reached
        except TimeoutError:
            raise self._too_late(count, timeout) from None
        finally:
            with self._recorded:
                del self._waiters[reached]

    def block(self, count: int, timeout: float) -> None:
        with self._recorded:
            if not self._recorded.wait_for(lambda: count <= self.count, timeout):
                raise self._too_late(count, timeout)

    def _too_late(self, count: int, timeout: float) -> TimeoutError:
        return TimeoutError(f"saw {self.count} of {count} requests in {timeout} s")
