"""Responses to `GET /executions/{id}`: concurrent callers share one request to PromptLayer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection
from typing import Any

import attrs

from promptlayer_exec import Session
from promptlayer_exec._integration import contradicts_completion
from promptlayer_exec.fastapi._responses import dump_json
from promptlayer_exec.fastapi._visible_fields import shown_snapshot

_Key = tuple[Session, int]
_Body = tuple[bytes, str | None]  # JSON, and the tag that all complete ones have


@attrs.define(eq=False)
class KeptResponses:
    """Reads executions, and keeps the latest complete responses, which never change."""

    _hidden: Collection[str]
    _kept: dict[_Key, _Body] = attrs.field(init=False, factory=dict)  # the oldest first
    _kept_bytes: int = attrs.field(init=False, default=0)
    _readings: dict[_Key, asyncio.Task[_Body]] = attrs.field(init=False, factory=dict)

    async def get(self, session: Session, execution_id: int) -> _Body:
        """Return the nodes of an execution as they are now, and a tag if it is complete."""
        key = (session, execution_id)
        if (kept := self._kept.get(key)) is not None:
            return kept

        reading = self._readings.get(key)
        if reading is None:
            reading = asyncio.create_task(self._read(key), name="promptlayer_exec.Response")
            self._readings[key] = reading
            reading.add_done_callback(lambda _: self._readings.pop(key))
            # Mark an error as seen, or asyncio logs it after all callers have left.
            reading.add_done_callback(lambda done: done.cancelled() or done.exception())

        await asyncio.wait([reading])  # unlike `await`, it does not pass on a cancellation
        return reading.result()

    async def _read(self, key: _Key) -> _Body:
        session, execution_id = key
        snapshot = await session.execution(execution_id).snapshot()
        shown = shown_snapshot(snapshot, self._hidden)
        body = dump_json(shown).encode()
        if not snapshot.complete or contradicts_completion(snapshot.nodes.values()):
            return body, None  # the next response may differ

        tagged = body, _tag(shown)
        if len(body) <= 2**20:  # a larger one would displace many
            self._keep(key, tagged)
        return tagged

    def _keep(self, key: _Key, body: _Body) -> None:
        """Keep a response, in at most 32 MiB and 1,000 entries."""
        self._kept[key] = body
        self._kept_bytes += len(body[0])
        while self._kept_bytes > 32 * 2**20 or len(self._kept) > 1_000:
            oldest, _ = self._kept.pop(next(iter(self._kept)))
            self._kept_bytes -= len(oldest)


def _tag(shown: dict[str, Any]) -> str:
    """Return a tag that is the same in all processes, although their times differ."""
    timed = {"running": None, "final": None}
    nodes = [node | timed for node in shown["nodes"].values()]
    text = dump_json([shown["execution_id"], shown["succeeded"], nodes])
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'
