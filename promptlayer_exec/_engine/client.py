"""The open client: the watches, single calls and starts of an open session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from functools import partial
from random import random
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import attrs

from promptlayer_exec._api.executions import (
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
from promptlayer_exec._api.workflows import WorkflowsPage, read_workflow, workflows_request
from promptlayer_exec._engine.callbacks import CallbackLog
from promptlayer_exec._engine.lifetime import DeadlinePassed, Lifetime
from promptlayer_exec._engine.retry import RecentStarts, RetryState
from promptlayer_exec._engine.start import SendHooks, Start, start_unknown
from promptlayer_exec._engine.watch import Watch, take_snapshot, timed_out
from promptlayer_exec._errors import PromptLayerExecError, RequestError, StartUnknown
from promptlayer_exec._events import Emit, WakeSource
from promptlayer_exec._http.transport import Transport
from promptlayer_exec._models import MainOutput, Snapshot, StartRequest
from promptlayer_exec._policies import Deadline
from promptlayer_exec._push.wakeups import EarlyWakeUps
from promptlayer_exec._settings import Settings
from promptlayer_exec._workflows import Workflow, WorkflowSummary

if TYPE_CHECKING:
    from promptlayer_exec._push.channels import Push

T = TypeVar("T")


@attrs.define(eq=False)
class _Fetch:
    """Requests the node map of one execution; unchanged nodes are those of the last one."""

    _transport: Transport
    _request: Request
    _node_maps: NodeMapReader
    _latest: NodeMap | None = None

    def __call__(
        self, state: RetryState, *, due: float, first: bool
    ) -> Coroutine[Any, Any, Reply[NodeMap]]:
        return self._transport.call(self._request, self._read, state, due=due, first=first)

    def _read(self, response: Response) -> NodeMap:
        execution_id = cast(int, self._request.execution_id)
        self._latest = self._node_maps.read(response, execution_id, self._latest)
        self._request.expected = response.body
        return self._latest


@attrs.define(eq=False, kw_only=True)
class Client:
    """The connections and tasks of an open session; closing the session ends it."""

    _settings: Settings
    lifetime: Lifetime
    transport: Transport
    _recent_starts: RecentStarts
    _node_maps: NodeMapReader
    _early_wake_ups: EarlyWakeUps
    _callbacks: CallbackLog
    _emit: Emit
    push: Push | None = attrs.field(init=False, default=None)
    _watches: dict[int, Watch] = attrs.field(init=False, factory=dict)

    def deadline(self, timeout: float | EllipsisType | None = ...) -> Deadline:
        return self._settings.deadline(timeout, now=self.transport.clock())

    def follow(self, execution_id: int, *, streams: bool = False) -> Watch:
        """Add a follower to the execution's watch, and return the watch; the first starts it.

        A follower that `streams` wants every snapshot, not only the complete one.
        """
        watch = self._watches.get(execution_id)
        if watch is not None:
            watch.add_follower(streams=streams)
            return watch
        request = self.transport.with_url(results_request(execution_id, return_all_outputs=True))
        watch = self._watches[execution_id] = Watch(
            execution_id,
            _Fetch(self.transport, request, self._node_maps),
            poll=self._settings.poll,
            retry=self._settings.retry,
            emit=self._emit,
            on_end=self._forget,
            net=None if self.push is None else self.push.net(execution_id),
            workflow=self._recent_starts.workflow(execution_id),
            base_url=self.transport.base_url,
        )
        watch.add_follower(streams=streams)
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

    async def ask_main_output(self, snapshot: Snapshot, deadline: Deadline) -> Any:
        """Request the main output of a complete execution until the server has it."""
        request = results_request(snapshot.execution_id, return_all_outputs=False)
        read = partial(read_main_output, execution_id=snapshot.execution_id)
        due = started = self.transport.clock()
        while True:
            reply = await self._call(request, read, deadline, due=due, seen=snapshot)
            if reply.value.complete:
                return reply.value.value
            now = self.transport.clock()
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
        reply = await self._call(request, read, deadline)
        return take_snapshot(execution_id, reply, elapsed=reply.duration)

    async def main_output(self, execution_id: int, deadline: Deadline) -> MainOutput:
        request = results_request(execution_id, return_all_outputs=False)
        read = partial(read_main_output, execution_id=execution_id)
        return (await self._call(request, read, deadline)).value

    async def workflow(self, name: str | int, request: Request, deadline: Deadline) -> Workflow:
        try:
            return (await self._call(request, read_workflow, deadline)).value
        except RequestError as error:
            error.args = (f"workflow {name!r:.100}: {error.args[0]}",)
            raise

    async def workflows_page(
        self, page: int, parameters: Mapping[str, str | None]
    ) -> WorkflowsPage:
        request = workflows_request(page, parameters)
        read = partial(WorkflowsPage, page=page)
        return (await self._call(request, read, self.deadline())).value

    async def _call(
        self,
        request: Request,
        read: Callable[[Response], T],
        deadline: Deadline,
        *,
        due: float | None = None,
        seen: Snapshot | None = None,
    ) -> Reply[T]:
        """Send a request outside of a watch, now or at `due`; errors carry the snapshot `seen`."""
        state = RetryState(self._settings.retry, self._settings.retry.outage)

        try:
            now = self.transport.clock()
            if due is None:
                due = now
            elif (wait := due - now) > 0:
                async with self.lifetime.timeout(deadline):
                    await asyncio.sleep(wait)
            timeout = partial(self.lifetime.timeout, deadline)
            return await self.transport.call(request, read, state, due=due, timeout=timeout)
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
        deadline: Deadline | None,
        *,
        hooks: SendHooks | None,
        token: str | None,
        began: Callable[[Start], None],
    ) -> Started:
        """Start a run; its request must be sent before the deadline, by default the session's.

        `token` is the one in the start's own callback URL, if it has one. `began` gets the start.
        """
        now = self.transport.clock()
        if token is not None:
            self._callbacks.begin(token)
        http_request = attrs.evolve(http_request, secret=token)

        def called_back() -> Started | None:
            execution_id = None if token is None else self._callbacks.execution_id(token)
            if execution_id is None:
                return None
            self._recent_starts.add(execution_id, request.workflow, now=self.transport.clock())
            return Started(execution_id, warning=None)

        async def post(state: RetryState, once: Start) -> Started:
            reply = await self.transport.call(http_request, read_started, state, due=now, once=once)
            self._recent_starts.add(
                reply.value.execution_id, request.workflow, now=self.transport.clock()
            )
            if self.push is not None:
                self.push.started(
                    request.workflow,
                    reply.value.execution_id,
                    sent_at=reply.sent_at,
                    waited=reply.lateness,
                )
            if (warning := reply.value.warning) is not None:  # it goes to the log
                warning = self.transport.redactor.also(token).redact(warning)
            return Started(reply.value.execution_id, warning)

        start = Start(
            request,
            post,
            RetryState(self._settings.retry, self._settings.retry.outage),
            emit=self._emit,
            is_closing=self.lifetime.is_closing,
            hooks=hooks,
            token=token,
            on_end=None if token is None else partial(self._start_ended, token, request),
            called_back=called_back,
            base_url=self.transport.base_url,
        )
        began(start)
        self.lifetime.spawn(start.run)
        if self.push is not None:
            self.push.subscribe(request.workflow)
        return await start.result(deadline or self.deadline())

    def _start_ended(
        self, token: str, request: StartRequest, outcome: Started | BaseException, elapsed: float
    ) -> None:
        log, base_url = self._callbacks, self.transport.base_url
        if isinstance(outcome, StartUnknown):
            log.lose(token, request, base_url, elapsed)
        else:
            execution_id = outcome.execution_id if isinstance(outcome, Started) else None
            log.settle(token, request, base_url, execution_id, elapsed)

    async def recover(self, error: StartUnknown, token: str, deadline: Deadline) -> int:
        """Wait for the callback of a start whose answer was lost, and return the execution's id."""
        self._callbacks.lose(token, StartRequest(error.workflow), self.transport.base_url)
        try:
            if (execution_id := self._callbacks.execution_id(token)) is None:
                async with self.lifetime.timeout(deadline):
                    execution_id = await self._callbacks.wait(token)
        except DeadlinePassed:
            since = f"; no callback came within {deadline.timeout or 0.0:g} s"
            if self._settings.callbacks is None:
                since += " to this session, which has no callbacks="
            since += "; the run may still be running, so call Session.recover again"
            raise start_unknown(error.workflow, error.reason, token, since) from error
        self._recent_starts.add(execution_id, error.workflow, now=self.transport.clock())
        return execution_id


async def list_workflows(
    open_client: Callable[[], Awaitable[Client]], parameters: Mapping[str, str | None]
) -> AsyncGenerator[WorkflowSummary, None]:
    """Yield each workflow once, page by page."""
    seen: set[int] = set()
    following: int | None = 1
    while following is not None:
        page = await (await open_client()).workflows_page(following, parameters)
        # Workflows that are added meanwhile move others to the next page.
        new = [summary for summary in page.summaries if summary.id not in seen]
        seen.update(summary.id for summary in new)
        for summary in new:
            yield summary
        # A page without news ends a list that claims to have no end.
        following = page.following if new else None
