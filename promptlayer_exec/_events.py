"""Facts for those who observe a session, and how they are told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    from promptlayer_exec._models import Snapshot, StartRequest

logger = logging.getLogger("promptlayer_exec")
logger.addHandler(logging.NullHandler())


@attrs.frozen
class Event:
    """Something that happened.

    Attributes:
        execution_id: the execution concerned, if there is one.
    """

    execution_id: int | None


@attrs.frozen
class WatchStarted(Event):
    """A poller for an execution was started by its first follower."""


@attrs.frozen
class Polled(Event):
    """A poller got a good answer.

    Attributes:
        snapshot: what it saw.
        duration: seconds from sending the request to the last byte of the answer.
        lateness: seconds by which it was sent after its time, waiting for a connection or the rate.
        body_bytes: the size of the body, after decompression.
    """

    snapshot: Snapshot
    duration: float
    lateness: float
    body_bytes: int


@attrs.frozen
class RequestRetried(Event):
    """An attempt failed and will be repeated.

    Attributes:
        error: what went wrong.
        delay: the seconds before the next attempt.
    """

    error: Exception
    delay: float


@attrs.frozen
class Throttled(Event):
    """The server answered 429, and the whole session slows down.

    Attributes:
        delay: the seconds in which no request leaves.
    """

    delay: float


@attrs.frozen
class WatchEnded(Event):
    """A poller stopped: the execution is complete, the last follower left, or it failed.

    Attributes:
        polls: how many good answers it got.
        elapsed: seconds since its first poll.
        error: what ended it, if it failed.
    """

    polls: int
    elapsed: float
    error: Exception | None


@attrs.frozen
class ExecutionStarted(Event):
    """The server started a run.

    Attributes:
        request: what was asked for.
        abandoned: whether the caller had gone before the answer came.
        duration: seconds from the call to the answer.
    """

    request: StartRequest
    abandoned: bool
    duration: float = 0.0


class Observer(Protocol):
    """What a session reports to: called in the event loop, so it must not block.

    All events of one watch come in one task, its own, and in the context (as of `contextvars`) of
    whoever began the watch. So it is with a start, and the context of its caller.
    """

    def __call__(self, event: Event, /) -> None:
        """Take note of an event; what it raises is logged and ignored."""


Emit = Callable[[Event], None]


def broadcast(observers: Iterable[Observer]) -> Emit:
    """Return a function that tells every observer of an event."""
    observers = tuple(observers)

    def emit(event: Event) -> None:
        for observer in observers:
            try:
                observer(event)
            except Exception:
                logger.exception("observer %r failed on %s", observer, type(event).__name__)

    return emit
