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

    It awaits the first snapshot for up to 2 s, and raises an error that occurs until then; a later
    error is a `failure` event. While the first poll is retried after that, `waiting` events say
    why. If the session is closed, the stream ends without an event, so that the client reconnects,
    to whichever process then serves it.

    Args:
        execution: the execution to follow; all responses for it share the session's one poller.
        last_event_id: the request's `Last-Event-ID`. If it is that of the last event, the response
            is a 204, which stops the client from reconnecting.
        heartbeat: seconds between the comments that keep an idle connection open; 0 sends none.
        fields: what clients see of a node, besides its name, status, times and `is_output_node`:
            any of `value`, `error_message` and `raw_error_message` (tracebacks).

    Raises:
        PromptLayerExecError: there is no first snapshot.
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
            first.cancel()  # it is what runs the generator, and closes it

    return EventStream(_events(execution, first, snapshots, hidden), close, heartbeat)


def reconnect_later() -> Response:
    """Return a response after which an `EventSource` reconnects; at any other it would give up."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Response(reconnect_event().encode(), headers=headers, media_type="text/event-stream")


class EventStream(EventSourceResponse):
    """Events for one client; `close` is called however the response ends."""

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
                # Servers log an error for every response that does not end.
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
            await asyncio.wait([first], timeout=1.0)  # then there may be another reason

        sent = first.result()
        # The ids must be meaningful to any process, so they refer to no state of this one.
        shown = shown_snapshot(sent, hidden)
        yield event("snapshot", f"{execution_id}:{sent.poll}", shown, retry=True)

        # A slow client makes this wait at a `yield`; everything it missed is then one diff.
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
    """Return the data of the event `failure`, with the last of what was seen."""
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
    kind, message = "NoAnswer", "PromptLayer has not answered yet."
    if (failure := last_failure(execution)) is not None:
        _, kind, title = describe(failure)
        message = f"{title.partition('.')[0]}; trying again."
        if isinstance(failure, NotFound):
            message = "PromptLayer does not know this new run yet; trying again."
    return {"execution_id": str(execution.id), "type": kind, "message": message}


def event(kind: str, event_id: str | None, data: Any, *, retry: bool = False) -> ServerSentEvent:
    """Return an event, which may say when to reconnect after an error."""
    delay = retry_delay() if retry else None
    return ServerSentEvent(dump_json(data), event=kind, id=event_id, retry=delay, sep="\n")


def reconnect_event() -> ServerSentEvent:
    """Return what asks a browser to come back later; it shows nothing."""
    return ServerSentEvent(retry=randint(10_000, 20_000), sep="\n")


def retry_delay() -> int:
    """Return milliseconds, at random, so that browsers do not return together."""
    return randint(1_000, 4_000)
