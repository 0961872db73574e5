"""The progress of an execution as Server-Sent Events.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from promptlayer_exec import Execution, SessionClosed, Snapshot
from promptlayer_exec._integration import node_dict
from promptlayer_exec.fastapi._responses import describe, dump_json, logger

_RETRY = 2000  # milliseconds, as the field `retry` takes them
_SEND_TIMEOUT = 30.0
_END_TIMEOUT = 0.1


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
    if last_event_id in (f"{execution.id}:complete", f"{execution.id}:failure"):
        return Response(status_code=204)
    snapshots = execution.stream()
    return _EventStream(await anext(snapshots), snapshots, heartbeat)


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
        except TimeoutError:  # of `send_timeout`
            logger.info("a client did not read its events for %g s", _SEND_TIMEOUT)
        else:
            if unfinished:  # the server is shutting down, or the client has disconnected
                # Servers log an error for every response that does not end.
                with anyio.move_on_after(_END_TIMEOUT), suppress(OSError):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._snapshots.aclose()


async def _events(
    first: Snapshot, snapshots: AsyncGenerator[Snapshot, None]
) -> AsyncGenerator[ServerSentEvent, None]:
    sent = first
    execution_id = str(first.execution_id)
    try:
        # The ids must be meaningful to any process, so they refer to no state of this one.
        yield _event("snapshot", f"{execution_id}:{first.poll}", first.to_dict(), _RETRY)
        # A slow client makes this wait at a `yield`; everything it missed is then one diff.
        async for latest in snapshots:
            for change in latest.diff(sent):
                node = node_dict(latest, change.node.name)
                data = {"execution_id": execution_id, "progress": latest.progress, **node}
                yield _event("node", f"{execution_id}:{latest.poll}", data)
            sent = latest
        yield _event("complete", f"{execution_id}:complete", sent.to_dict())
    except SessionClosed:
        return
    except Exception as error:  # noqa: BLE001 - the status is already sent, so it must be an event
        _, kind, message = describe(error)
        last = (getattr(error, "last_snapshot", None) or sent).to_dict()
        data = {"type": kind, "message": message, "execution_id": execution_id}
        try:
            failure = _event("failure", f"{execution_id}:failure", data | {"last": last})
        except RecursionError:  # it may be what is nested too deeply
            failure = _event("failure", f"{execution_id}:failure", data)
        yield failure


def _event(kind: str, event_id: str, data: Any, retry: int | None = None) -> ServerSentEvent:
    return ServerSentEvent(dump_json(data), event=kind, id=event_id, retry=retry, sep="\n")
