"""The interface of `_engine` and `_http`: one attempt to send a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import attrs

from promptlayer_exec._api.messages import Reply, Request, Response

if TYPE_CHECKING:
    from promptlayer_exec._engine.start import Start

T = TypeVar("T")


@attrs.define
class Attempt:
    """One try to send a request."""

    due: float  # on the event loop's clock
    first: bool = False  # before ordinary requests, as a poll after a wake-up
    once: Start | None = None  # which must not be sent twice
    # A request of push or for a definition, which goes first, too, over connections of its own:
    # while it is not answered, nothing else waits for it.
    apart: bool = False
    # The seconds for which it waited for a connection or the rate; set as it is sent.
    lateness: float = 0.0


class Call(Protocol):
    """A function that sends a request once, before ordinary requests, within the rate."""

    async def __call__(self, request: Request, read: Callable[[Response], T]) -> T:
        """Return what `read` reads from the answer, or raise a `RequestError`."""


class Send(Protocol):
    """A function that makes one attempt to send a request."""

    async def __call__(
        self, request: Request, read: Callable[[Response], T], attempt: Attempt
    ) -> Reply[T]:
        """Return what `read` reads from the response, or raise a `RequestError`."""
