"""The events of executions, for one client: of a list of them, or of a list of one.

A browser opens at most six HTTP/1.1 connections to a host, so a page with many runs cannot have a
stream for each.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from typing import Any
from zlib import crc32

import attrs
from sse_starlette import ServerSentEvent
from starlette.responses import Response

from promptlayer_exec import Execution, NotFound, Session, SessionClosed, Snapshot
from promptlayer_exec._integration import News, Waiting, follow, session_of
from promptlayer_exec.fastapi._admission import Refusal
from promptlayer_exec.fastapi._responses import describe_and_log, describe_retry
from promptlayer_exec.fastapi._sse import (
    EventStream,
    event,
    reconnect_event,
    reconnect_later,
    retry_delay,
)
from promptlayer_exec.fastapi._visible_fields import (
    DEFAULT_FIELDS,
    hidden_fields,
    shown_node,
    shown_snapshot,
)

# Seconds until a client gets the reason why there is nothing new.
_PATIENCE = 2.0


async def execution_events(
    execution: Execution,
    *,
    last_event_id: str | None = None,
    heartbeat: float = 15.0,
    fields: Collection[str] = DEFAULT_FIELDS,
) -> Response:
    """Return a response that sends an execution's progress as Server-Sent Events.

    It waits up to 2 s for the first snapshot, and raises any error until then. Later errors arrive
    as `failure` events. While the session retries a poll, `waiting` events contain the reason, and
    `resumed` follows the next good poll. If the session closes, the stream stops without an event,
    so that the client reconnects to another process.

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
    runs = RunList([execution.id], last_event_id)
    if not runs.remaining():
        return Response(status_code=204)

    news = follow(session_of(execution), [execution], patience=_PATIENCE)
    events = RunEvents(runs, hidden, always_snapshot=True)
    try:
        opening = await _first_events(events, news)
    except BaseException as error:
        await news.aclose()
        if isinstance(error, SessionClosed):
            return reconnect_later()
        raise

    return EventStream(events.stream(news, opening), news.aclose, heartbeat)


async def _first_events(
    events: RunEvents, news: AsyncGenerator[News, None]
) -> list[ServerSentEvent]:
    """Return the events for the first news, which comes in 2 s, or raise if it is an error."""
    execution, first = await anext(news)
    if isinstance(first, Exception):
        raise first
    new = events.of(execution.id, first)
    new[0].retry = retry_delay()
    return new


def list_events(
    session: Session,
    runs: RunList,
    refused: Iterable[tuple[int, Refusal]],
    hidden: Collection[str],
) -> Response:
    """Return a response that sends the progress of a list of executions.

    Unlike `execution_events`, it waits for nothing, and no error ends it for all.
    """
    events = RunEvents(runs, hidden)
    # Proxies and browsers open the stream at its first bytes.
    opening = [ServerSentEvent(comment="", retry=retry_delay(), sep="\n")]
    opening += [events.refusal(execution_id, refusal) for execution_id, refusal in refused]

    executions = [session.execution(execution_id) for execution_id in runs.remaining()]
    news = follow(session, executions, patience=_PATIENCE)
    return EventStream(events.stream(news, opening), news.aclose)


class RunList:
    """The executions of one stream, and which of them are over.

    The `id:` of an event is a checksum of the list, and a bit for each execution that is over. A
    browser sends it when it reconnects, so no process needs to remember what the browser has seen.
    """

    def __init__(self, execution_ids: Sequence[int], last_event_id: str | None) -> None:
        self._positions = {execution_id: n for n, execution_id in enumerate(execution_ids)}
        # For another list, the bits would mean other executions.
        self._checksum = f"{crc32(repr(list(self._positions)).encode()):08x}"
        self._ended = 0

        seen = re.fullmatch(rf"{self._checksum}\.([0-9a-f]{{1,25}})", last_event_id or "")
        if seen is not None:
            self._ended = int(seen[1], 16)

    @property
    def event_id(self) -> str:
        """The `id:` of the next event."""
        return f"{self._checksum}.{self._ended:x}"

    def remaining(self) -> list[int]:
        """Return the executions whose last event the client has not seen."""
        return [one for one, position in self._positions.items() if not self._ended >> position & 1]

    def end(self, execution_id: int) -> None:
        """Record that the next event is the last one of an execution."""
        self._ended |= 1 << self._positions[execution_id]


@attrs.define(eq=False)
class RunEvents:
    """Turns the news of executions into events, for one client.

    Each execution has a `snapshot` first, unless it is complete at once. With `always_snapshot`, it
    has one even then.
    """

    _runs: RunList
    _hidden: Collection[str]
    _always_snapshot: bool = attrs.field(default=False, kw_only=True)
    # By the executions that are not over: the last snapshot, and the reason of the last `waiting`.
    _sent: dict[int, Snapshot] = attrs.field(init=False, factory=dict)
    _reasons: dict[int, dict[str, str]] = attrs.field(init=False, factory=dict)

    async def stream(
        self, news: AsyncGenerator[News, None], opening: Iterable[ServerSentEvent]
    ) -> AsyncGenerator[ServerSentEvent, None]:
        """Yield the events until every execution is over, or the session closes."""
        for new in opening:
            yield new

        has_news = bool(self._sent or self._reasons)
        try:
            # A slow client makes this wait at a `yield`, and then gets all that it missed at once.
            async for execution, result in news:
                has_news = True
                for new in self.of(execution.id, result):
                    yield new
                # Sending may not suspend, and a hundred snapshots in one turn would delay others.
                await asyncio.sleep(0)
        except SessionClosed:
            if not has_news:
                yield reconnect_event()
        except Exception as error:  # noqa: BLE001 - the status is already sent, so it must be events
            for execution_id in self._runs.remaining():
                yield self._failure(execution_id, error)

    def of(
        self, execution_id: int, result: Snapshot | Waiting | Exception
    ) -> list[ServerSentEvent]:
        """Return the events for some news of an execution.

        Raises:
            SessionClosed: this is the news.
        """
        if isinstance(result, Snapshot):
            return self._progress(execution_id, result)
        if isinstance(result, Waiting):
            return self._waiting(execution_id, result.failure)
        if isinstance(result, SessionClosed):
            raise result
        return [self._failure(execution_id, result)]

    def refusal(self, execution_id: int, refusal: Refusal) -> ServerSentEvent:
        """Return the event for an execution that the client may not read."""
        self._runs.end(execution_id)
        return self._event("failure", refusal.data(execution_id))

    def _progress(self, execution_id: int, snapshot: Snapshot) -> list[ServerSentEvent]:
        sent = self._sent.get(execution_id)
        self._sent[execution_id] = snapshot
        was_waiting = self._reasons.pop(execution_id, None) is not None
        new = []

        if sent is None:
            if self._always_snapshot or not snapshot.complete:
                new.append(self._event("snapshot", shown_snapshot(snapshot, self._hidden)))
        else:
            if was_waiting:
                new.append(event("resumed", {"execution_id": str(execution_id)}))
            for change in snapshot.diff(sent):
                shown = shown_node(snapshot, change.node.name, self._hidden)
                new.append(self._event("node", shown))

        if snapshot.complete:
            self._runs.end(execution_id)
            del self._sent[execution_id]
            new.append(self._event("complete", shown_snapshot(snapshot, self._hidden)))
        return new

    def _waiting(self, execution_id: int, failure: Exception | None) -> list[ServerSentEvent]:
        reason = _reason(execution_id, failure)
        if reason == self._reasons.get(execution_id):
            return []
        self._reasons[execution_id] = reason
        return [event("waiting", reason)]

    def _failure(self, execution_id: int, error: Exception) -> ServerSentEvent:
        self._runs.end(execution_id)
        self._reasons.pop(execution_id, None)
        sent = self._sent.pop(execution_id, None)

        status, kind, message = describe_and_log(error)
        last = getattr(error, "last_snapshot", None) or sent
        data = {
            "execution_id": str(execution_id),
            "type": kind,
            "message": message,
            "status": status,
            "last": None if last is None else shown_snapshot(last, self._hidden),
        }
        return self._event("failure", data)

    def _event(self, kind: str, data: Any) -> ServerSentEvent:
        return event(kind, data, self._runs.event_id)


def _reason(execution_id: int, failure: Exception | None) -> dict[str, str]:
    """Return the data of the event `waiting`: why there is nothing new."""
    kind, message = "NoAnswer", "PromptLayer has not responded yet."
    if failure is not None:
        kind, message = describe_retry(failure)
        if isinstance(failure, NotFound):
            message = "PromptLayer has no results of this new run yet. Trying again."
    return {"execution_id": str(execution_id), "type": kind, "message": message}
