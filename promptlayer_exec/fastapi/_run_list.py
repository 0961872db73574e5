"""One stream of events for a list of executions.

A browser opens at most six HTTP/1.1 connections to a host, so a page with many runs cannot have a
stream for each.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any
from zlib import crc32

import attrs
from sse_starlette import ServerSentEvent

from promptlayer_exec import Execution, Session, SessionClosed, Snapshot
from promptlayer_exec._integration import CombinedStream
from promptlayer_exec.fastapi._admission import Refusal
from promptlayer_exec.fastapi._responses import describe_and_log
from promptlayer_exec.fastapi._sse import (
    event,
    failure_data,
    reconnect_event,
    retry_delay,
    waiting_reason,
)
from promptlayer_exec.fastapi._visible_fields import shown_node, shown_snapshot


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
class RunListEvents:
    """The events of a list of executions, for one client."""

    _session: Session
    _runs: RunList
    _refused: Mapping[int, Refusal]
    _hidden: Collection[str]
    # The last snapshot sent of each execution that is not over, and why there is none yet.
    _sent: dict[Execution, Snapshot | None] = attrs.field(init=False, factory=dict)
    _reasons: dict[Execution, dict[str, str]] = attrs.field(init=False, factory=dict)

    async def events(self) -> AsyncGenerator[ServerSentEvent, None]:
        """Yield the events until every execution is over, or the session closes."""
        # Proxies and browsers open the stream at its first bytes.
        yield ServerSentEvent(comment="", retry=retry_delay(), sep="\n")
        for execution_id, refusal in self._refused.items():
            self._runs.end(execution_id)
            yield self._event("failure", refusal.data(execution_id))

        executions = [self._session.execution(one) for one in self._runs.remaining()]
        self._sent = dict.fromkeys(executions)
        self._reasons = {execution: {} for execution in executions}
        try:
            stream = CombinedStream(self._session, executions)
        except SessionClosed:
            yield reconnect_event()
            return
        except Exception as error:  # noqa: BLE001 - the status is already sent
            for execution in executions:
                yield self._failure(execution, error)
            return

        try:
            async for new in self._follow(stream):
                yield new
        except SessionClosed:
            return
        finally:
            stream.close()

    async def _follow(self, stream: CombinedStream) -> AsyncGenerator[ServerSentEvent, None]:
        clock = asyncio.get_running_loop().time
        # Most first polls are done before that.
        explain_at = clock() + 2.0

        while not stream.has_ended:
            until = math.inf
            if self._reasons:
                until = explain_at
            if (news := await stream.next(until=until)) is not None:
                for new in self._events_of(*news):
                    yield new

            if self._reasons and clock() >= explain_at:
                explain_at = clock() + 1.0  # by then, the reasons may have changed
                for new in self._changed_reasons():
                    yield new

            # Sending may not suspend, and a hundred snapshots in one turn would delay all others.
            await asyncio.sleep(0)

    def _events_of(
        self, execution: Execution, result: Snapshot | Exception
    ) -> list[ServerSentEvent]:
        if isinstance(result, SessionClosed):
            raise result
        if isinstance(result, Exception):
            return [self._failure(execution, result)]

        self._reasons.pop(execution, None)
        sent, self._sent[execution] = self._sent[execution], result
        if sent is None and not result.complete:
            return [self._event("snapshot", shown_snapshot(result, self._hidden))]

        # A slow client gets all that it missed as one diff.
        new = []
        if sent is not None:
            for change in result.diff(sent):
                shown = shown_node(result, change.node.name, self._hidden)
                new.append(self._event("node", shown))

        if result.complete:
            self._runs.end(execution.id)
            del self._sent[execution]
            new.append(self._event("complete", shown_snapshot(result, self._hidden)))
        return new

    def _changed_reasons(self) -> list[ServerSentEvent]:
        new = []
        for execution, known in self._reasons.items():
            if (reason := waiting_reason(execution)) != known:
                self._reasons[execution] = reason
                new.append(event("waiting", None, reason))
        return new

    def _failure(self, execution: Execution, error: Exception) -> ServerSentEvent:
        self._runs.end(execution.id)
        self._reasons.pop(execution, None)
        sent = self._sent.pop(execution)
        description = describe_and_log(error)
        return self._event(
            "failure", failure_data(execution, error, description, sent, self._hidden)
        )

    def _event(self, kind: str, data: Any) -> ServerSentEvent:
        return event(kind, self._runs.event_id, data)
