"""The progress of an execution as Server-Sent Events.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import suppress
from random import randint
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from promptlayer_exec import Execution, NotFound, SessionClosed, Snapshot
from promptlayer_exec._integration import last_failure
from promptlayer_exec.fastapi._responses import describe, describe_and_log, dump_json, logger
from promptlayer_exec.fastapi._visible_fields import (
    DEFAULT_FIELDS,
    hidden_fields,
    shown_node,
    shown_snapshot,
)

_SEND_TIMEOUT = 30.0

_First = asyncio.Future[Snapshot]


async def execution_events(
    execution: Execution,
    *,
    last_event_id: str | None = None,
    heartbeat: float = 15.0,
    fields: Collection[str] = DEFAULT_FIELDS,
) -> Response:
    """Return a response that sends an execution's progress as Server-Sent Events.

    It waits up to 2 s for the first snapshot, and raises any error until then. Later errors arrive
    as `failure` events. While the session retries the first poll, `waiting` events contain the
    reason. If the session closes, the stream stops without an event, so that the client reconnects
    to another process.

    Args:
        execution: the execution to follow. All responses for it share the session's one poller.
        last_event_id: the request's `Last-Event-ID`. If the client already has the last event, the
            response is 204, which stops it from reconnecting.
        heartbeat: seconds between the comments that keep an idle connection open. 0 sends none.
        fields: the fields of a node that clients see, besides its name, status, times and
            `is_output_node`: any of `value`, `error_message` and `raw_error_message` (tracebacks).

    Raises:
        PromptLayerExecError: the first poll failed.
        TypeError: `fields` is a single string.
        ValueError: `heartbeat` is negative, or a field is unknown.
    """
    if heartbeat < 0:
        raise ValueError(f"heartbeat must be at least 0 seconds, got {heartbeat}")
    hidden = hidden_fields(fields)
    if last_event_id in (f"{execution.id}:complete", f"{execution.id}:failure"):
        return Response(status_code=204)

    snapshots = execution.stream()
    first = asyncio.ensure_future(anext(snapshots))
    first.add_done_callback(lambda _: first.cancelled() or first.exception())  # not to be logged

    try:
        await asyncio.wait([first], timeout=2.0)
        if first.done():
            first.result()
    except SessionClosed:
        return reconnect_later()
    except BaseException:
        first.cancel()
        raise

    async def close() -> None:
        if first.done():
            await snapshots.aclose()
        else:
            first.cancel()  # it runs the generator, so this closes it

    return EventStream(_events(execution, first, snapshots, hidden), close, heartbeat)


def reconnect_later() -> Response:
    """Return a response after which an `EventSource` reconnects. After others it gives up."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Response(reconnect_event().encode(), headers=headers, media_type="text/event-stream")


class EventStream(EventSourceResponse):
    """Events for one client. It calls `close` when the response is over, for whatever reason."""

    def __init__(
        self,
        events: AsyncGenerator[ServerSentEvent, None],
        close: Callable[[], Awaitable[None]],
        heartbeat: float = 15.0,
    ) -> None:
        self._close = close
        super().__init__(
            events,
            ping=heartbeat,
            ping_message_factory=lambda: ServerSentEvent(comment="", sep="\n"),
            send_timeout=_SEND_TIMEOUT,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unfinished = True

        async def observed(message: Message) -> None:
            nonlocal unfinished
            unfinished = message.get("more_body", True)
            await send(message)

        try:
            await super().__call__(scope, receive, observed)
        except TimeoutError:  # of `send_timeout`
            logger.info("a client did not read its events for %g s", _SEND_TIMEOUT)
        else:
            if unfinished:  # the server is shutting down, or the client has disconnected
                # Servers log an error for every unfinished response.
                with anyio.move_on_after(0.1), suppress(OSError):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._close()


async def _events(
    execution: Execution,
    first: _First,
    snapshots: AsyncGenerator[Snapshot, None],
    hidden: Collection[str],
) -> AsyncGenerator[ServerSentEvent, None]:
    execution_id = str(execution.id)

    sent: Snapshot | None = None
    reason: dict[str, str] = {}
    try:
        while not first.done():
            if (latest_reason := waiting_reason(execution)) != reason:
                reason = latest_reason
                yield event("waiting", None, reason, retry=True)
            await asyncio.wait([first], timeout=1.0)  # by then, the reason may have changed

        sent = first.result()
        # Any process must understand the ids, so they refer to no state of this one.
        shown = shown_snapshot(sent, hidden)
        yield event("snapshot", f"{execution_id}:{sent.poll}", shown, retry=True)

        # A slow client makes this wait at a `yield`, and then gets all that it missed as one diff.
        async for latest in snapshots:
            for change in latest.diff(sent):
                shown = shown_node(latest, change.node.name, hidden)
                yield event("node", f"{execution_id}:{latest.poll}", shown)
            sent = latest

        yield event("complete", f"{execution_id}:complete", shown_snapshot(sent, hidden))
    except SessionClosed:
        return

    except Exception as error:  # noqa: BLE001 - the status is already sent, so it must be an event
        description = describe_and_log(error)
        data = failure_data(execution, error, description, sent, hidden)
        yield event("failure", f"{execution_id}:failure", data)


def failure_data(
    execution: Execution,
    error: Exception,
    description: tuple[int, str, str],
    sent: Snapshot | None,
    hidden: Collection[str],
) -> dict[str, Any]:
    """Return the data of the event `failure`, with the last known snapshot."""
    status, kind, message = description
    last = getattr(error, "last_snapshot", None) or sent
    return {
        "execution_id": str(execution.id),
        "type": kind,
        "message": message,
        "status": status,
        "last": None if last is None else shown_snapshot(last, hidden),
    }


def waiting_reason(execution: Execution) -> dict[str, str]:
    """Return the data of the event `waiting`: why there is no snapshot yet."""
    kind, message = "NoAnswer", "PromptLayer has not responded yet."
    if (failure := last_failure(execution)) is not None:
        _, kind, title = describe(failure)
        message = f"{title.partition('.')[0]}. Trying again."
        if isinstance(failure, NotFound):
            message = "PromptLayer has no results of this new run yet. Trying again."
    return {"execution_id": str(execution.id), "type": kind, "message": message}


def event(kind: str, event_id: str | None, data: Any, *, retry: bool = False) -> ServerSentEvent:
    """Return an event. With `retry`, it sets the browser's pause before it reconnects."""
    delay = retry_delay() if retry else None
    return ServerSentEvent(dump_json(data), event=kind, id=event_id, retry=delay, sep="\n")


def reconnect_event() -> ServerSentEvent:
    """Return an event that makes a browser reconnect later, and shows nothing."""
    return ServerSentEvent(retry=randint(10_000, 20_000), sep="\n")


def retry_delay() -> int:
    """Return random milliseconds, so that browsers do not all reconnect together."""
    return randint(1_000, 4_000)
