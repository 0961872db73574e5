"""Machines: random programs against a server that fails at random; what they print replays.

Their settings are those of the suite, so that each run tries the same programs.
PROMPTLAYER_EXEC_MACHINES multiplies the number of programs, and makes them depend on
`--hypothesis-seed`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import selectors
import socket
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from promptlayer_exec import RetryPolicy, Session
from promptlayer_exec.simulator import Fault, Simulator

FACTOR = int(os.environ.get("PROMPTLAYER_EXEC_MACHINES", "0"))
REQUEST_TIMEOUT = 5.0
LITTLE = 1e-6


class VirtualTimeSelector(selectors.DefaultSelector):
    """Moves the time of its loop forward where another selector would block."""

    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> Any:
        """Return the events that are ready; bytes on their way to a socket are waited for."""
        if (events := super().select(0.0)) or timeout == 0.0:
            return events
        if events := super().select(5.0 if timeout is None else 0.001):
            return events
        assert timeout is not None, "every task waits, and no timer is set"
        self.loop.now += timeout
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop with sockets, whose time moves to the next timer once all tasks wait."""

    def __init__(self) -> None:
        self.now = 1000.0
        selector = VirtualTimeSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """Return the time in seconds."""
        return self.now


def weather(*, done: bool, wait: float = 0.0, then: Fault | None = None) -> Any:
    """Do what was asked at once, or not; answer later, and perhaps with a fault."""

    async def effect(request: web.BaseRequest, answer: Any) -> web.StreamResponse | None:
        response: web.Response = answer() if done else web.Response()
        await asyncio.sleep(wait)
        return response if then is None else await then.effect(request, lambda: response)

    return effect


WEATHER: dict[str, Any] = {
    "fair": weather(done=True),
    "429": Fault.status(429).effect,
    "429 for 3 s": Fault.status(429, retry_after=3).effect,
    "503": Fault.status(503).effect,
    "503 for 3 s": Fault.status(503, retry_after=3).effect,
    "400": Fault.status(400).effect,
    "403": Fault.status(403).effect,
    "404": Fault.status(404).effect,
    "a page": Fault.malformed().effect,
    "cut": weather(done=False, then=Fault.disconnect()),
    "cut before the answer": Fault.disconnect().effect,
    "cut in the answer": Fault.truncate().effect,
    "lost": weather(done=True, then=Fault.status(502)),
    "stall": Fault.stall().effect,
    "slow": Fault.delay(2.0).effect,
    "late": weather(done=True, wait=2.0),  # it may be old by then
    "too late": weather(done=True, wait=REQUEST_TIMEOUT + 1.0),
}


class Call:
    """A task of a machine: when it began and ended, and whether the machine ended it.

    A machine adds what the call is about.
    """

    task: asyncio.Task[Any]
    ended = 0.0
    is_cancelled = False
    is_closed = False

    def __init__(self, began: float, **about: Any) -> None:
        self.began = began
        self.__dict__.update(about)

    @property
    def error(self) -> BaseException | None:
        """The error with which it ended, unless it was cancelled."""
        return None if self.task.cancelled() else self.task.exception()


class World:
    """A server with weather, calls of a session, and the log, on a loop that the machine turns."""

    def __init__(self, *, is_virtual: bool = True) -> None:
        self.runner = asyncio.Runner(loop_factory=VirtualTimeLoop if is_virtual else None)
        self.run = self.runner.run
        self.now = self.runner.get_loop().time
        self._socket = socket.socket()  # without `listen` it refuses connections
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.sim = Simulator(port=self._socket.getsockname()[1], clock=self.now)
        self.weather = WEATHER.copy()
        # The weather of the next requests; then it is fair.
        self.coming: dict[str, deque[str]] = {"GET": deque(), "POST": deque()}
        # When the server read a request, and with which weather.
        self.served: list[tuple[float, Any, str]] = []
        self.is_cut_off = False  # the server reads no request
        self.outages: list[float] = []
        self.calls: list[Any] = []
        self.log: list[str] = []
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self.log.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("promptlayer_exec").addHandler(self._handler)
        self.sim.inject(Fault(self._affect, times=None))
        self.run(self.sim.__aenter__())
        self._back = asyncio.Event()
        self._back.set()

    async def _affect(self, request: web.BaseRequest, answer: Any) -> web.StreamResponse | None:
        if self.is_cut_off:
            return await self.weather["cut"](request, answer)
        coming = self.coming[request.method]
        name = coming.popleft() if coming else "fair"
        self.served.append((self.now(), self.sim.requests[-1], name))
        return await self.weather[name](request, answer)

    def open_session(self, **overrides: Any) -> Session:
        """Return a session that asks for nothing but starts and polls."""
        settings: dict[str, Any] = {
            "retry": RetryPolicy(watch_outage=None),
            "request_timeout": REQUEST_TIMEOUT,
            "push": False,
            "check_inputs": False,
        }
        url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        return Session(self.sim.api_key, base_url=url, **{**settings, **overrides})

    def begin(self, work: Coroutine[Any, Any, Any], seconds: float, **about: Any) -> None:
        """Begin a call, and let time pass."""
        call = Call(self.now(), **about)
        self.calls.append(call)

        def ended(task: asyncio.Task[Any]) -> None:
            call.ended = self.now()
            task.cancelled() or task.exception()

        async def spawn() -> None:
            call.task = asyncio.create_task(work)
            call.task.add_done_callback(ended)
            await asyncio.sleep(seconds)

        self.run(spawn())

    def running(self) -> list[int]:
        """Return the numbers of the calls that have not ended."""
        return [number for number, call in enumerate(self.calls) if not call.task.done()]

    def cancel(self, number: int) -> None:
        """Cancel a call, which must then end at once."""
        call = self.calls[number]
        call.is_cancelled = not call.task.done()
        call.task.cancel()
        self.run(asyncio.wait([call.task], timeout=LITTLE))
        assert call.task.done()

    def close(self, session: Session, *, within: float) -> None:
        """Close the session, which ends all calls."""
        for number in self.running():
            self.calls[number].is_closed = True
        began = self.now()
        self.run(session.aclose())
        assert self.now() <= began + within + LITTLE

    def check_time(self, call: Call, latest: float) -> None:
        """Check that a call has not gone on for too long."""
        assert (call.ended if call.task.done() else self.now()) <= latest + LITTLE

    def turn(self, turns: int) -> None:
        """Let the loop turn a few times."""

        async def turn() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(turn())

    def begin_outage(self, seconds: float) -> None:
        """Refuse connections, and end the open ones, for some seconds."""
        if self._back.is_set():
            self._back.clear()
            self.outages.append(self.now())
            self.run(self.sim.__aexit__())
            self.runner.get_loop().call_later(seconds, asyncio.ensure_future, self._end_outage())

    async def _end_outage(self) -> None:
        await self.sim.__aenter__()
        self._back.set()

    def calm(self) -> None:
        """Let the weather be fair from now on."""
        for coming in self.coming.values():
            coming.clear()
        self.run(self._back.wait())

    def end(self, check: Callable[[], None], session: Session) -> None:
        """Make the last check, unless one has failed; end all, and check that no task is left."""
        try:
            if sys.exc_info()[0] is None:
                self.calm()
                check()
        finally:
            self.run(session.aclose())
            left = {task.get_name() for task in asyncio.all_tasks(self.runner.get_loop())}
            self.calm()
            self.run(self.sim.__aexit__())
            self.runner.close()
            self._socket.close()
            logging.getLogger("promptlayer_exec").removeHandler(self._handler)
            assert not [name for name in left if name.startswith("promptlayer_exec")]


@pytest.fixture
def make_world() -> type[World]:
    """Return the class of worlds."""
    return World


@pytest.fixture
def run_machine() -> Callable[[Callable[[], RuleBasedStateMachine], int, int], None]:
    """Return a function that tries a number of programs of a number of steps on a machine."""

    def run(make: Callable[[], RuleBasedStateMachine], examples: int, steps: int) -> None:
        run_state_machine_as_test(
            make,
            settings=settings(
                max_examples=examples * (FACTOR or 1),
                stateful_step_count=steps,
                derandomize=not FACTOR,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )

    return run
