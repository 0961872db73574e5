"""What an open session expects of a backplane, which shares its watches with other processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from promptlayer_exec._api.executions import NodeMap
from promptlayer_exec._api.messages import Response
from promptlayer_exec._engine.watch import Fetch
from promptlayer_exec._events import WakeSource

if TYPE_CHECKING:
    from promptlayer_exec._engine.client import Client


class Link(Protocol):
    """The connection of an open session to its backplane. No method waits for the network."""

    def share(self, execution_id: int, fetch: Fetch, read: Callable[[Response], NodeMap]) -> Fetch:
        """Return a fetch that takes the answers of other sessions, or polls and shares its own."""

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


class Backplane(Protocol):
    """What `Session(backplane=...)` takes: a `promptlayer_exec.redis.RedisBackplane`.

    The types of its method are internal, and may change in any release.
    """

    def connect(self, client: Client, namespace: str) -> Link:
        """Connect an open session to all others of the same namespace."""
