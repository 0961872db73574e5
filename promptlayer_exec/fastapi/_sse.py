"""Server-Sent Events as a response.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from random import randint
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from promptlayer_exec.fastapi._responses import dump_json, logger

_SEND_TIMEOUT = 30.0


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


def event(kind: str, data: Any, event_id: str | None = None) -> ServerSentEvent:
    """Return an event. After one without an id, a browser keeps the id of an earlier one."""
    return ServerSentEvent(dump_json(data), event=kind, id=event_id, sep="\n")


def reconnect_event() -> ServerSentEvent:
    """Return an event that makes a browser reconnect later, and shows nothing."""
    return ServerSentEvent(retry=randint(10_000, 20_000), sep="\n")


def retry_delay() -> int:
    """Return how many milliseconds a browser waits before it reconnects.

    They are random, so that browsers do not all reconnect together.
    """
    return randint(1_000, 4_000)


def reconnect_later() -> Response:
    """Return a response after which an `EventSource` reconnects. After others it gives up."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Response(reconnect_event().encode(), headers=headers, media_type="text/event-stream")
