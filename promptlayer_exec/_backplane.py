"""What a session and its backplane, which shares watches between processes, ask of each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from promptlayer_exec._api.messages import Reply, Response
from promptlayer_exec._api.runs import NodeMap
from promptlayer_exec._events import WakeSource

T = TypeVar("T")


class Poll(Protocol):
    """A function that requests an execution's node map, with retries."""

    async def __call__(
        self, *, due: float, on_sending: Callable[[bool], object] | None = None
    ) -> Reply[NodeMap]:
        """Return the answer to a request that is due at `due`, on the loop's clock.

        `on_sending` is that of an `Attempt`.
        """


class SharedPolls(Protocol):
    """The polls of one watch, and what other sessions poll of the same execution."""

    async def next_answer(
        self, poll: Poll, *, due: float, streams: Callable[[], bool]
    ) -> Reply[NodeMap]:
        """Return an answer of another session, or poll and share the answer."""

    def end(self) -> None:
        """Handle that the watch has ended."""


class BackplaneConnection(Protocol):
    """The connection of an open session to its backplane. No method waits for the network."""

    def share(self, execution_id: int, read: Callable[[Response], NodeMap]) -> SharedPolls:
        """Return the polls of a new watch; `read` reads the answers of other sessions."""

    def wake(self, execution_id: int, source: WakeSource) -> None:
        """Forward a wake-up to the session that polls the execution."""

    def started(self, execution_id: int, grace: float) -> None:
        """Announce a run, which the server may not know for `grace` seconds."""

    def called_back(self, token: str, execution_id: int) -> None:
        """Hand on a callback."""

    def find_callbacks(self) -> None:
        """Look for callbacks of lost starts that came to other sessions."""

    async def aclose(self) -> None:
        """Let others poll what this session polls, and disconnect."""


class OpenSession(Protocol):
    """An open session, as its backplane sees it."""

    def is_closing(self) -> bool:
        """Return True if closing has begun."""

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Run a task until it ends by itself or the session is closed."""

    def wake_here(self, execution_id: int, source: WakeSource) -> bool:
        """Wake the watch of an execution; without one, remember the wake-up."""

    def stream_elsewhere(self, execution_id: int) -> None:
        """Record that an execution is streamed in another session."""

    def started_elsewhere(self, execution_id: int, left: float) -> None:
        """Record that the server may not know a run of another session for `left` seconds."""

    def called_back_elsewhere(self, token: str, execution_id: int) -> None:
        """Record a callback that came to another session."""

    def lost_tokens(self) -> list[str]:
        """Return the tokens of the lost starts whose callbacks have not come."""


class Backplane(Protocol):
    """What `Session(backplane=...)` takes: a `promptlayer_exec.redis.RedisBackplane`.

    The types of its method are internal, and may change in any release.
    """

    def connect(self, client: OpenSession, namespace: str) -> BackplaneConnection:
        """Connect an open session to all others of the same namespace."""
