"""The open client: the watches, single calls and starts of an open session."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import random
from types import EllipsisType
from typing import Any, TypeVar

import anyio
import attrs

from promptlayer_exec._errors import PromptLayerExecError
from promptlayer_exec._events import Emit, WakeSource
from promptlayer_exec._lifetime import DeadlinePassed, Lifetime
from promptlayer_exec._models import MainOutput, Snapshot, StartRequest
from promptlayer_exec._output import check_type, main_output, typed_output
from promptlayer_exec._policies import Deadline
from promptlayer_exec._retry import RecentStarts, RetryState
from promptlayer_exec._settings import Settings
from promptlayer_exec._start import BeforeSend, Start
from promptlayer_exec._tasks import clock
from promptlayer_exec._transport import Transport
from promptlayer_exec._wakeups import EarlyWakeUps
from promptlayer_exec._watch import Watch, take_snapshot, timed_out
from promptlayer_exec._wire import (
    NodeMap,
    NodeMapReader,
    Reply,
    Request,
    Response,
    Started,
    read_main_output,
    read_started,
    results_request,
)

T = TypeVar("T")


@attrs.define(eq=False, kw_only=True)
class Client:
    """The connections and tasks of an open session; closing the session ends it."""

    _settings: Settings
    lifetime: Lifetime
    transport: Transport
    _recent_starts: RecentStarts
    _node_maps: NodeMapReader
    _early_wake_ups: EarlyWakeUps
    _emit: Emit
    _watches: dict[int, Watch] = attrs.field(init=False, factory=dict)

    def deadline(self, timeout: float | EllipsisType | None = ...) -> Deadline:
        """Return the deadline of a wait that begins now; `...` means the default timeout."""
        timeout = self._settings.wait_timeout if timeout is ... else timeout
        return Deadline.after(timeout, now=clock())

    def follow(self, execution_id: int) -> Watch:
        """Add a follower to the execution's watch, and return the watch; the first starts it."""
        watch = self._watches.get(execution_id)
        if watch is not None:
            watch.add_follower()
            return watch
        request = self.transport.with_url(results_request(execution_id, return_all_outputs=True))
        node_map: NodeMap | None = None

        def read(response: Response) -> NodeMap:
            nonlocal node_map
            node_map = self._node_maps.read(response, execution_id, node_map)
            return node_map

        watch = self._watches[execution_id] = Watch(
            execution_id,
            partial(self.transport.call, request, read),
            poll=self._settings.poll,
            retry=self._settings.retry,
            emit=self._emit,
            on_end=self._forget,
        )
        watch.add_follower()
        if (source := self._early_wake_ups.take(execution_id)) is not None:
            watch.wake(source)
        self.lifetime.spawn_watch(watch.run)
        return watch

    def wake(self, execution_id: int, source: WakeSource) -> bool:
        """Wake the execution's watch, and return True; without one, remember the wake-up."""
        watch = self._watches.get(execution_id)
        if watch is None:
            self._early_wake_ups.add(execution_id, source)
            return False
        watch.wake(source)
        return True

    def _forget(self, watch: Watch) -> None:
        if self._watches.get(watch.execution_id) is watch:
            del self._watches[watch.execution_id]

    async def completed(
        self,
        execution_id: int,
        deadline: Deadline,
        see: Callable[[Snapshot], None] = lambda _: None,
    ) -> Snapshot:
        """Wait for the complete snapshot; `see` gets the last snapshot, even after an error."""
        watch = self.follow(execution_id)
        try:
            return await watch.completed(deadline)
        finally:
            if watch.latest is not None:
                see(watch.latest)
            watch.remove_follower()

    async def output(
        self,
        execution_id: int,
        deadline: Deadline,
        into: Any = None,
        see: Callable[[Snapshot], None] = lambda _: None,
    ) -> Any:
        """Wait for the main output; `see` gets the last snapshot, even after an error."""
        if into is not None:
            check_type(into, self._settings.converter)
        snapshot = await self.completed(execution_id, deadline, see)
        value = await main_output(snapshot, lambda: self._ask_main_output(snapshot, deadline))
        if into is None:
            return value
        return typed_output(value, into, self._settings.converter, snapshot)

    async def _ask_main_output(self, snapshot: Snapshot, deadline: Deadline) -> Any:
        """Request the main output of a complete execution until the server has it."""
        request = results_request(snapshot.execution_id, return_all_outputs=False)
        read = partial(read_main_output, execution_id=snapshot.execution_id)
        due = started = clock()
        while True:
            reply = await self._call(request, read, deadline, due=due, seen=snapshot)
            if reply.value.complete:
                return reply.value.value
            now = clock()
            due = now + self._settings.poll.delay(
                elapsed=now - started,
                final=len(snapshot.nodes),
                nodes=len(snapshot.nodes),
                unchanged=now - started,
                chance=random(),
                retry_after=self._settings.retry.announced(reply.retry_after),
            )

    async def snapshot(self, execution_id: int, deadline: Deadline) -> Snapshot:
        request = results_request(execution_id, return_all_outputs=True)
        read = partial(self._node_maps.read, execution_id=execution_id)
        reply = await self._call(request, read, deadline, due=clock())
        return take_snapshot(execution_id, reply, elapsed=reply.duration)

    async def main_output(self, execution_id: int, deadline: Deadline) -> MainOutput:
        request = results_request(execution_id, return_all_outputs=False)
        read = partial(read_main_output, execution_id=execution_id)
        return (await self._call(request, read, deadline, due=clock())).value

    async def _call(
        self,
        request: Request,
        read: Callable[[Response], T],
        deadline: Deadline,
        *,
        due: float,
        seen: Snapshot | None = None,
    ) -> Reply[T]:
        """Send a request outside of a watch at `due`; errors carry the snapshot `seen`."""
        state = RetryState(self._settings.retry, self._settings.retry.outage)

        async def call() -> Reply[T]:
            if (wait := due - clock()) > 0:
                await anyio.sleep(wait)
            return await self.transport.call(request, read, state, due=due)

        try:
            return await self.lifetime.call(call, deadline)
        except PromptLayerExecError as error:
            error.execution_id = request.execution_id
            error.last_snapshot = seen
            raise
        except DeadlinePassed:
            raise timed_out(request.execution_id, deadline, seen, state.error) from state.error

    async def start(
        self,
        request: StartRequest,
        http_request: Request,
        deadline: Deadline,
        before_send: BeforeSend | None = None,
    ) -> Started:
        """Start a run; its request must be sent before the deadline."""
        now = clock()

        async def post(state: RetryState, once: Start) -> Started:
            reply = await self.transport.call(http_request, read_started, state, due=now, once=once)
            self._recent_starts.add(reply.value.execution_id, now=clock())
            return reply.value

        start = Start(
            request,
            post,
            RetryState(self._settings.retry, self._settings.retry.outage),
            emit=self._emit,
            is_closing=self.lifetime.is_closing,
            before_send=before_send,
        )
        self.lifetime.spawn(start.run)
        return await start.result(deadline)
