"""The events that observers of a session receive."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import attrs

if TYPE_CHECKING:
    from promptlayer_exec._values.models import Snapshot, StartRequest


# It has no NullHandler: without a logging configuration, Python prints warnings to standard error,
# so users still see outages.
logger = logging.getLogger("promptlayer_exec")


@attrs.frozen
class Event:
    """The base class of all events.

    Attributes:
        execution_id: the id of the execution, if the event is about one.
    """

    execution_id: int | None


@attrs.frozen
class WatchStarted(Event):
    """The first waiter of an execution started its poller.

    Attributes:
        workflow: the name or id of its workflow, if the run is among the last 10,000 that this
            session started.
        base_url: the server's URL.
    """

    workflow: str | int | None = None
    base_url: str = ""


@attrs.frozen
class Polled(Event):
    """A poll succeeded.

    Attributes:
        snapshot: the snapshot that it returned.
        duration: seconds from sending the request to the last byte of the response.
        lateness: seconds between the scheduled time and sending the request, which waited for a
            connection or the rate.
        body_bytes: the size of the body in bytes, after decompression.
        shared: whether another process sent the request, and the `backplane` passed its response
            on. Duration and lateness are then 0.
    """

    snapshot: Snapshot
    duration: float
    lateness: float
    body_bytes: int
    shared: bool = False


@attrs.frozen
class RequestRetried(Event):
    """An attempt failed with `error`. The next one follows after `delay` seconds."""

    error: Exception
    delay: float


@attrs.frozen
class Throttled(Event):
    """The server returned 429: the session pauses for `delay` seconds, then sends more slowly."""

    delay: float


@attrs.frozen
class WatchEnded(Event):
    """A poller stopped: the execution is complete, nobody follows it any more, or a poll failed.

    Attributes:
        polls: the number of polls that succeeded.
        elapsed: seconds since the first poll.
        error: the error that stopped the poller, if a poll failed.
        succeeded: whether the execution succeeded, or None if no poll found it complete.
        workflow: as for `WatchStarted`.
    """

    polls: int
    elapsed: float
    error: Exception | None
    succeeded: bool | None = None
    workflow: str | int | None = None


@attrs.frozen
class CallStarted(Event):
    """`Session.run` was called, or a fan-out took a `StartRequest`. `CallEnded` follows.

    Attributes:
        workflow: the workflow's name or id.
        key: the key of the call or request, if it has one.
        base_url: the server's URL.
    """

    workflow: str | int
    key: Any = None
    base_url: str = ""


@attrs.frozen
class CallEnded(Event):
    """The caller of a run got its output, or an error. Its task is that of `CallStarted`.

    Attributes:
        workflow: as for `CallStarted`.
        key: as for `CallStarted`.
        elapsed: seconds since the call.
        error: what the caller got instead of an output, such as `ExecutionTimeout` or
            `InvalidOutput`.
    """

    workflow: str | int
    key: Any
    elapsed: float
    error: BaseException | None = None


WakeSource: TypeAlias = Literal["push", "webhook", "callback", "caller"]  # of `Session.wake`


@attrs.frozen
class WatchWoken(Event):
    """A watch is about to poll earlier than scheduled, because `source` woke it."""

    source: WakeSource


@attrs.frozen
class ExecutionStarted(Event):
    """The server started a run.

    Attributes:
        request: the request that the session sent.
        abandoned: whether the caller was cancelled before the response arrived.
        duration: seconds from the call to the response, or to the callback if `recovered`.
        recovered: whether the response was lost (`StartUnknown`), but a callback to the run's own
            URL proved that it started. `request` then has no inputs.
        base_url: the server's URL.
    """

    execution_id: int
    request: StartRequest
    abandoned: bool
    duration: float = 0.0
    recovered: bool = False
    base_url: str = ""


@attrs.frozen
class StartFailed(Event):
    """`Session.start` raised an error, whether or not its caller was still waiting.

    Each request for a run emits either this or `ExecutionStarted`, once. If a callback later proves
    that the run did start, an `ExecutionStarted` with `recovered` follows.

    Attributes:
        request: the run that was to start.
        error: the error. It is a `CancelledError` if the caller was cancelled and no run was
            started.
        duration: seconds from the call to the error.
        base_url: the server's URL, or an empty string if the session could not prepare the request
            or open.
    """

    request: StartRequest
    error: BaseException
    duration: float = 0.0
    base_url: str = ""


class Observer(Protocol):
    """A callable that receives the events of a session.

    The session calls it in its event loop, so it must not block. All events of a watch come from
    the watch's task, in the `contextvars` context of the call that started it. The events of
    `Session.start` come from a separate task, in the caller's context. Only `ExecutionStarted`
    comes from the caller's task if that is still waiting.
    """

    def __call__(self, event: Event, /) -> None:
        """Handle one event. The session logs an exception raised here, and continues."""


Emit = Callable[[Event], None]


def broadcast(observers: Iterable[Observer]) -> Emit:
    """Return a function that passes an event to every observer."""
    observers = tuple(observers)

    def emit(event: Event) -> None:
        for observer in observers:
            try:
                observer(event)
            except Exception:
                logger.exception("observer %r failed on %s", observer, type(event).__name__)

    return emit
