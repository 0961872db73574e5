"""The progress of an execution as Server-Sent Events.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from promptlayer_exec import Execution, SessionClosed, Snapshot
from promptlayer_exec._integration import node_dict
from promptlayer_exec.fastapi._json import dump_json
from promptlayer_exec.fastapi._problems import describe, logger

_RETRY = 2000  # milliseconds, as the field `retry` takes them
_SEND_TIMEOUT = 30.0
_END_TIMEOUT = 0.1
_LAST_EVENTS = ("complete", "failure")


async def execution_events(
    execution: Execution, *, last_event_id: str | None = None, heartbeat: float = 15.0
) -> Response:
    """Return a response that sends an execution's progress as Server-Sent Events.

    It awaits the first snapshot and raises any error until then; a later error is a `failure`
    event. If the session is closed, the stream ends without one, so that the client reconnects, to
    whichever process then serves it.

    Args:
        execution: the execution to follow; all responses for it share the session's one poller.
        last_event_id: the request's `Last-Event-ID`. If it is that of the last event, the response
            is a 204, which stops the client from reconnecting.
        heartbeat: seconds between the comments that keep an idle connection open; 0 sends none.

    Raises:
        ValueError: `heartbeat` is negative.
        PromptLayerExecError: there is no first snapshot.
    """
    if heartbeat < 0:
        raise ValueError(f"heartbeat must be at least 0 seconds, got {heartbeat}")
    if last_event_id in [_event_id(execution.id, kind) for kind in _LAST_EVENTS]:
        return Response(status_code=204)
    snapshots = execution.stream()
    first = await anext(snapshots)
    return _EventStream(first, snapshots, heartbeat)


class _EventStream(EventSourceResponse):
    """The events for one client; the watch is unsubscribed from however the response ends."""

    def __init__(
        self, first: Snapshot, snapshots: AsyncGenerator[Snapshot, None], heartbeat: float
    ) -> None:
        self._snapshots = snapshots
        super().__init__(
            _events(first, snapshots),
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
        except SendTimeoutError:
            logger.info("a client did not read its events for %g s", _SEND_TIMEOUT)
        else:
            if unfinished:  # the server is shutting down, or the client has disconnected
                await self._finish(send)
        finally:
            await self._snapshots.aclose()

    async def _finish(self, send: Send) -> None:
        # Servers log an error for every response that does not end.
        with anyio.move_on_after(_END_TIMEOUT), suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(
    first: Snapshot, snapshots: AsyncGenerator[Snapshot, None]
) -> AsyncGenerator[ServerSentEvent, None]:
    execution_id = first.execution_id
    sent = first
    try:
        yield _event("snapshot", execution_id, first.poll, first.to_dict(), _RETRY)
        # A slow client makes this wait at a `yield`; everything it missed is then one diff.
        async for latest in snapshots:
            for change in latest.diff(sent):
                data = {
                    "execution_id": str(execution_id),
                    "progress": latest.progress,
                    **node_dict(latest, change.node.name),
                }
                yield _event("node", execution_id, latest.poll, data)
            sent = latest
        yield _event("complete", execution_id, "complete", sent.to_dict())
    except SessionClosed:
        return
    except Exception as error:  # noqa: BLE001 - the status is already sent, so it must be an event
        yield _event("failure", execution_id, "failure", _failure(error, sent))


def _failure(error: Exception, sent: Snapshot) -> dict[str, Any]:
    last = getattr(error, "last_snapshot", None) or sent
    kind, message = describe(error)
    return {
        "type": kind,
        "message": message,
        "execution_id": str(sent.execution_id),
        "last": last.to_dict(),
    }


def _event_id(execution_id: int, position: int | str) -> str:
    # It must be meaningful to any process, so it refers to no state of this one.
    return f"{execution_id}:{position}"


def _event(
    kind: str, execution_id: int, position: int | str, data: Any, retry: int | None = None
) -> ServerSentEvent:
    event_id = _event_id(execution_id, position)
    return ServerSentEvent(dump_json(data), event=kind, id=event_id, retry=retry, sep="\n")
