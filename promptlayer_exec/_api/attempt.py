"""The interface between `_engine` and `_http`: one attempt to send a request."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol, TypeVar

import attrs

from promptlayer_exec._api.messages import Reply, Request, Response

T = TypeVar("T")


class AtMostOnce(Protocol):
    """A request that must not reach the server twice, and what has happened to it so far."""

    @property
    def secret(self) -> str | None:
        """The part of its body that errors and log lines must not show."""

    @property
    def sent(self) -> bool:
        """Whether it may have reached the server."""

    @property
    def cancelled(self) -> bool:
        """Whether it must no longer be sent."""

    async def before_send(self) -> None:
        """Wait for permission to send, once connected and once the rate allows the request."""

    async def not_sent(self) -> None:
        """Handle an attempt that started nothing, before the next one."""

    def mark_sent(self) -> None:
        """Record that it is about to be sent, or raise an `OSError` if it must not be."""

    def mark_rejected(self) -> None:
        """Record that the server refused the request or the TLS handshake, and started nothing."""


class Priority(enum.Enum):
    """Which requests go first when the session cannot send all of them now."""

    URGENT = enum.auto()  # before all others: control requests, and polls after a wake-up
    FIRST = enum.auto()  # their callers have nothing yet: first polls, single reads, starts
    REPEATED = enum.auto()  # the polls that follow


@attrs.frozen
class Attempt:
    """One try to send a request."""

    due: float  # on the event loop's clock
    priority: Priority = Priority.FIRST
    start: AtMostOnce | None = None  # which must not be sent twice
    # Called with False when it starts to wait for a connection and the rate, True when it is sent.
    on_sending: Callable[[bool], object] | None = None
    # Whether it is a request of push or for a definition. Those are urgent and have their own
    # connections, so that no other request waits while their responses are late.
    is_control: bool = False


class SendControlRequest(Protocol):
    """A function that sends a control request: once, before ordinary requests, within the rate."""

    async def __call__(self, request: Request, read: Callable[[Response], T]) -> T:
        """Return what `read` reads from the response, or raise a `RequestError`."""


class Send(Protocol):
    """A function that makes one attempt to send a request."""

    async def __call__(
        self, request: Request, read: Callable[[Response], T], attempt: Attempt
    ) -> Reply[T]:
        """Return what `read` reads from the response, or raise a `RequestError`."""
