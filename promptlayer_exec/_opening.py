"""What a session has and does while it is open: watches, single calls and starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import random
from typing import Any, TypeVar

import anyio

from promptlayer_exec._errors import PromptLayerExecError
from promptlayer_exec._events import Emit
from promptlayer_exec._lifetime import DeadlinePassed, Lifetime
from promptlayer_exec._models import Snapshot, StartRequest
from promptlayer_exec._policies import Deadline, Newborns, Outage, PollPolicy, RetryPolicy
from promptlayer_exec._start import Clearance, Start
from promptlayer_exec._tasks import Timers
from promptlayer_exec._transport import Transport
from promptlayer_exec._watch import Watch, timed_out
from promptlayer_exec._wire import (
    NodeMapReader,
    RepeatReader,
    Reply,
    Request,
    Response,
    Started,
    read_main_output,
    read_started,
    results_request,
)

T = TypeVar("T")


class Opening:
    """One opening of a session.

    Args:
        lifetime: runs its tasks, and ends them.
        transport: sends its requests.
        timers: wake its watches and their followers.
        poll: when to look at an execution again.
        retry: what to survive.
        newborns: told of every execution that is started.
        node_maps: reads them.
        emit: told of what happens.
    """

    def __init__(
        self,
        lifetime: Lifetime,
        transport: Transport,
        timers: Timers,
        *,
        poll: PollPolicy,
        retry: RetryPolicy,
        newborns: Newborns,
        node_maps: NodeMapReader,
        emit: Emit,
    ) -> None:
        self.lifetime = lifetime
        self.transport = transport
        self._timers = timers
        self.clock = timers.loop.time
        self._poll = poll
        self._retry = retry
        self._newborns = newborns
        self._node_maps = node_maps
        self._emit = emit
        self._watches: dict[int, Watch] = {}

    def join(self, execution_id: int) -> Watch:
        """Return the execution's one watch, this follower counted; the first starts it."""
        watch = self._watches.get(execution_id)
        if watch is not None:
            watch.join()
            return watch
        request = self.transport.addressed(results_request(execution_id, return_all_outputs=True))
        reader = RepeatReader(self._node_maps, execution_id)
        watch = self._watches[execution_id] = Watch(
            execution_id,
            partial(self.transport.call, request, reader.read),
            self._timers,
            poll=self._poll,
            retry=self._retry,
            emit=self._emit,
            on_end=self._forget,
        )
        watch.join()
        self.lifetime.spawn_watch(watch.run)
        return watch

    def _forget(self, watch: Watch) -> None:
        if self._watches.get(watch.execution_id) is watch:
            del self._watches[watch.execution_id]

    async def completed(
        self,
        execution_id: int,
        deadline: Deadline,
        see: Callable[[Snapshot], None] = lambda _: None,
    ) -> Snapshot:
        """Wait for the complete snapshot; `see` gets the last there was, whatever the end."""
        watch = self.join(execution_id)
        try:
            return await watch.completed(deadline)
        finally:
            if watch.latest is not None:
                see(watch.latest)
            watch.leave()

    async def call(
        self,
        request: Request,
        read: Callable[[Response], T],
        deadline: Deadline,
        *,
        due: float = 0.0,
        seen: Snapshot | None = None,
    ) -> Reply[T]:
        """Send a request that is no watch's, not before `due`; errors carry what was `seen`."""
        now = self.clock()
        due = max(due, now)
        outage = Outage(self._retry, self._retry.outage)

        try:
            with self.lifetime.call(deadline):
                if due > now:
                    await anyio.sleep_until(due)
                return await self.transport.call(request, read, outage, due=due)
        except PromptLayerExecError as error:
            error.execution_id = request.execution_id
            error.last_snapshot = seen
            raise
        except DeadlinePassed:
            raise timed_out(request.execution_id, deadline, seen, outage.error) from outage.error

    async def main_output(self, snapshot: Snapshot, deadline: Deadline) -> Any:
        """Ask for the main output of a complete execution until the server has it."""
        request = results_request(snapshot.execution_id, return_all_outputs=False)
        read = partial(read_main_output, execution_id=snapshot.execution_id)
        due = started = self.clock()
        while True:
            reply = await self.call(request, read, deadline, due=due, seen=snapshot)
            if reply.value.complete:
                return reply.value.value
            now = self.clock()
            due = now + self._poll.delay(
                elapsed=now - started,
                final=len(snapshot.nodes),
                nodes=len(snapshot.nodes),
                unchanged=now - started,
                chance=random(),
                retry_after=self._retry.announced(reply.retry_after),
            )

    async def start(
        self,
        request: StartRequest,
        http_request: Request,
        deadline: Deadline,
        clearance: Clearance | None = None,
    ) -> Started:
        """Send a start, whose request must leave before the deadline."""
        now = self.clock()

        async def post(outage: Outage, departure: Start) -> Started:
            reply = await self.transport.call(
                http_request, read_started, outage, due=now, departure=departure
            )
            self._newborns.add(reply.value.execution_id, now=self.clock())
            return reply.value

        start = Start(
            request,
            post,
            Outage(self._retry, self._retry.outage),
            emit=self._emit,
            is_closing=lambda: self.lifetime.closing,
            clearance=clearance,
        )
        self.lifetime.spawn(start.run)
        return await start.result(deadline)
