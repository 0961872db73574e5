"""The Protocols between a session and its backplane, which shares watches between processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from promptlayer_exec._api.messages import Reply, Response
from promptlayer_exec._api.runs import NodeMap
from promptlayer_exec._values.events import WakeSource

T = TypeVar("T")


class Poll(Protocol):
    """A function that requests an execution's node map, with retries."""

    async def __call__(
        self, *, due: float, on_sending: Callable[[bool], object] | None = None
    ) -> Reply[NodeMap]:
        """Return the response to a request due at `due`, on the loop's clock.

        `on_sending` is the same as for an `Attempt`.
        """


class SharedPolls(Protocol):
    """The polls of one watch, shared with other sessions that watch the same execution."""

    async def next_answer(
        self, poll: Poll, *, due: float, streams: Callable[[], bool]
    ) -> Reply[NodeMap]:
        """Return a response from another session, or poll and share the response."""

    def end(self) -> None:
        """Stop sharing: the watch has finished."""


class BackplaneConnection(Protocol):
    """The connection of an open session to its backplane. No method waits for the network."""

    def share(self, execution_id: int, read: Callable[[Response], NodeMap]) -> SharedPolls:
        """Return the polls of a new watch. `read` reads the responses from other sessions."""

    def wake(self, execution_id: int, source: WakeSource) -> None:
        """Forward a wake-up to the session that polls the execution."""

    def started(self, execution_id: int, grace: float) -> None:
        """Announce a new run, for which the server may return 404 for `grace` seconds."""

    def called_back(self, token: str, execution_id: int) -> None:
        """Pass a callback on to other sessions."""

    def find_callbacks(self) -> None:
        """Look for callbacks that came to other sessions, for requests whose response was lost."""

    async def aclose(self) -> None:
        """Hand the polling over to other sessions, and disconnect."""


class OpenSession(Protocol):
    """An open session, as its backplane sees it."""

    def is_closing(self) -> bool:
        """Return True if closing has begun."""

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Run a task until it finishes or the session closes."""

    def wake_here(self, execution_id: int, source: WakeSource) -> bool:
        """Wake an execution's watch, or remember the wake-up if it has none."""

    def stream_elsewhere(self, execution_id: int) -> None:
        """Record that another session streams an execution."""

    def started_elsewhere(self, execution_id: int, left: float) -> None:
        """Record that for `left` seconds, the server may return 404 for another session's run."""

    def called_back_elsewhere(self, token: str, execution_id: int) -> None:
        """Record a callback that another session received."""

    def lost_tokens(self) -> list[str]:
        """Return the tokens of lost responses whose callback has not arrived."""


class Backplane(Protocol):
    """What `Session(backplane=...)` takes: a `promptlayer_exec.redis.RedisBackplane`.

    The types in its method are internal and may change in any release.
    """

    def connect(self, client: OpenSession, namespace: str) -> BackplaneConnection:
        """Connect an open session to all others of the same namespace."""
