"""Fixtures that several test modules share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import pytest
from hypothesis import settings

from promptlayer_exec import Event, PollPolicy, RetryPolicy, Session
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")


def _our_tasks() -> list[str]:
    names = [task.get_name() for task in asyncio.all_tasks()]
    return sorted(name for name in names if name.startswith("promptlayer_exec"))


@pytest.fixture
def our_tasks() -> Callable[[], list[str]]:
    """Return a function that returns the names of the library's tasks in this loop."""
    return _our_tasks


class Recorder:
    """An observer that records every event, and lets a test wait for the next of a type."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._waiters: list[tuple[type[Event], asyncio.Future[Any]]] = []

    def __call__(self, event: Event) -> None:
        """Record the event, and wake the tests that wait for its type."""
        self.events.append(event)
        for kind, waiter in self._waiters:
            if isinstance(event, kind) and not waiter.done():
                waiter.set_result(event)

    def of(self, kind: type[Event]) -> list[Any]:
        """Return the events of one type."""
        return [event for event in self.events if isinstance(event, kind)]

    async def next(self, kind: type[Event]) -> Any:
        """Wait for the next event of one type, for at most 10 s."""
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiters.append((kind, waiter))
        async with asyncio.timeout(10):
            return await waiter


_SETTINGS = (
    "PROMPTLAYER_API_KEY",
    "PROMPTLAYER_BASE_URL",
    "PROMPTLAYER_EXEC_TRUST_ENV",
    "PROMPTLAYER_EXEC_PUSH",
    "NETRC",
)
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*_SETTINGS, *_PROXIES, *map(str.lower, _PROXIES)):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    """Return a simulator that runs in the test's event loop."""
    async with Simulator() as simulator:
        yield simulator


@pytest.fixture
def threaded_sim() -> Iterator[Simulator]:
    """Return a simulator that runs in its own thread."""
    with Simulator() as simulator:
        yield simulator


@pytest.fixture
def recorder() -> Recorder:
    """Return the observer of the sessions that `open_session` makes."""
    return Recorder()


@pytest.fixture
async def open_session(sim: Simulator, recorder: Recorder) -> AsyncIterator[Callable[..., Session]]:
    """Return a function that makes sessions for `sim`; after closing, no task may remain."""
    async with AsyncExitStack() as stack:

        def make(**overrides: Any) -> Session:
            settings: dict[str, Any] = {
                "api_key": sim.api_key,
                "base_url": sim.base_url,
                "poll": PollPolicy.fixed(0.01),
                "retry": RetryPolicy(outage=5.0, watch_outage=5.0, base=0.001),
                "rate": None,
                "observers": [recorder],
            }
            session = Session(**{**settings, **overrides})
            stack.push_async_callback(session.aclose)
            return session

        yield make
    assert _our_tasks() == []


@pytest.fixture
def session(open_session: Callable[..., Session]) -> Session:
    """Return a session that polls `sim` every 10 ms."""
    return open_session()


@pytest.fixture
def held(sim: Simulator) -> int:
    """Return the id of an execution whose output node runs until `sim.finish` ends it."""
    return sim.add_execution(
        Scenario([SimNode("Plan", "done"), SimNode("Answer", "42", None, is_output_node=True)])
    )


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Any], Awaitable[str]]]:
    """Return a function that serves an ASGI app with uvicorn in this loop, and returns its URL."""
    import uvicorn

    class Server(uvicorn.Server):
        def __init__(self, app: Any) -> None:
            config = uvicorn.Config(app, port=0, log_config=None, ws="none", lifespan="off")
            super().__init__(config)
            self.is_up = asyncio.Event()
            self.ending = asyncio.Event()

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # without handlers: pytest has its own

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            self.is_up.set()

        async def main_loop(self) -> None:
            await self.ending.wait()  # at once, and not at the next tenth of a second

    async with AsyncExitStack() as stack:

        async def start(app: Any) -> str:
            server = Server(app)
            task = asyncio.create_task(server.serve())

            async def stop() -> None:
                server.ending.set()
                await task

            stack.push_async_callback(stop)
            await server.is_up.wait()
            port = server.servers[0].sockets[0].getsockname()[1]
            return f"http://127.0.0.1:{port}"

        yield start
