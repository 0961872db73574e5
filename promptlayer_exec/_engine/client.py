"""The open client: the watches, single calls and starts of an open session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from functools import partial
from types import EllipsisType
from typing import Any, TypeVar, cast
from weakref import WeakSet

import attrs

from promptlayer_exec._api.attempt import AtMostOnce, Attempt, Priority
from promptlayer_exec._api.catalog import WorkflowsPage, read_workflow, workflows_request
from promptlayer_exec._api.messages import Reply, Request, Response
from promptlayer_exec._api.runs import (
    NewRun,
    NodeMap,
    NodeMapReader,
    as_documented,
    read_main_output,
    read_new_run,
    results_request,
)
from promptlayer_exec._engine.abandoned import AbandonedRuns
from promptlayer_exec._engine.backplane import BackplaneConnection
from promptlayer_exec._engine.definitions import Definitions
from promptlayer_exec._engine.lifetime import DeadlinePassed, Lifetime
from promptlayer_exec._engine.memory import Memory
from promptlayer_exec._engine.network import Network
from promptlayer_exec._engine.recorded_sends import RecordedSends
from promptlayer_exec._engine.retry import Retrying, RetryState
from promptlayer_exec._engine.send import PreparedSend, SendHooks, SendOnce, start_unknown
from promptlayer_exec._engine.settings import Settings
from promptlayer_exec._engine.snapshots import take_snapshot
from promptlayer_exec._engine.tasks import clock
from promptlayer_exec._engine.waiter import timed_out
from promptlayer_exec._engine.watch import Watch
from promptlayer_exec._values.errors import (
    ExecutionTimeout,
    PromptLayerExecError,
    RequestError,
    StartUnknown,
)
from promptlayer_exec._values.events import Emit, WakeSource
from promptlayer_exec._values.models import MainOutput, Snapshot, StartRequest
from promptlayer_exec._values.policies import Deadline
from promptlayer_exec._values.workflow_definition import WorkflowDefinition, WorkflowSummary

T = TypeVar("T")


@attrs.define(eq=False)
class _Fetch:
    """Requests the node map of one execution, and reuses the objects of unchanged nodes."""

    _retrying: Retrying
    _request: Request
    _node_maps: NodeMapReader
    _latest: NodeMap | None = None
    _early: int = 0  # how many responses in a row were complete too early

    async def __call__(
        self,
        retries: RetryState,
        *,
        due: float,
        priority: Priority,
        on_sending: Callable[[bool], object] | None = None,
    ) -> Reply[NodeMap]:
        return await self._retrying.call(
            self._request,
            self.read,
            retries,
            due=due,
            priority=priority,
            on_sending=on_sending,
        )

    def read(self, response: Response) -> NodeMap:
        execution_id = cast(int, self._request.execution_id)
        latest = self._node_maps.read(response, execution_id, self._latest)

        # The server may report a run as complete too early. Believe it the third time in a row.
        if not latest.is_early:
            self._early = 0
        elif latest.source is not None and self._early < 2:
            self._early += 1
            latest = attrs.evolve(latest, complete=False, source=(202, latest.source[1]))

        self._latest = latest
        return latest


class Client:
    """The watches, calls and starts of an open session. They stop when it closes.

    Attributes:
        lifetime: everything that runs in it.
        base_url: the URL of the server.
        push: the push channels, None if the session does not use them.
        backplane: the connection to other processes, None without `Session(backplane=...)`.
        recorded_sends: the starts with a key, None without `Session(starts=...)`.
    """

    def __init__(self, settings: Settings, network: Network, memory: Memory, emit: Emit) -> None:
        self._settings = settings
        self._network = network
        self._memory = memory
        self._emit = emit
        self._watches: dict[int, Watch] = {}
        self._sends: WeakSet[SendOnce] = WeakSet()

        self.base_url = network.base_url
        self.lifetime = Lifetime(network.resources)
        self._retrying = Retrying(network.send, settings.retry, memory.recent_runs, emit)
        self._definitions = Definitions(
            self._send_control_request,
            partial(self.lifetime.spawn, name="promptlayer_exec.Definition"),
        )

        self.backplane = self._connect_backplane()
        self.recorded_sends = self._open_store()
        self.push = None
        if network.open_push is not None:
            self.push = network.open_push(
                call=self._send_control_request,
                find_id=self._definitions.find_id,
                wake=partial(self.wake, source="push"),
                early_wake_ups=memory.early_wake_ups,
                spawn=partial(self.lifetime.spawn, name="promptlayer_exec.Push"),
            )

    def _connect_backplane(self) -> BackplaneConnection | None:
        if self._settings.backplane is None:
            return None
        backplane = self._settings.backplane.connect(self, self._network.namespace)
        self._network.resources.push_async_callback(backplane.aclose)
        self._memory.callbacks.share = backplane.called_back
        return backplane

    def _open_store(self) -> RecordedSends | None:
        store, callbacks = self._settings.starts, self._settings.callbacks
        if store is None:
            return None

        close = getattr(store, "aclose", None)  # an app's own store may have nothing to close
        if close is not None:
            self._network.resources.push_async_callback(close)

        return RecordedSends(
            store=store,
            server=self.base_url,
            request_timeout=self._settings.request_timeout,
            is_recoverable=lambda token: callbacks is not None and callbacks.is_genuine(token),
            called_back=self._memory.callbacks.execution_id,
            lifetime=self.lifetime,
        )

    async def _send_control_request(self, request: Request, read: Callable[[Response], T]) -> T:
        attempt = Attempt(clock(), is_control=True)
        return (await self._network.send(request, read, attempt)).value

    def deadline(self, timeout: float | EllipsisType | None = ...) -> Deadline:
        return self._settings.deadline(timeout, now=clock())

    def watch(self, execution_id: int) -> Watch:
        """Return the watch of an execution. The caller must join it without awaiting anything."""
        watch = self._watches.get(execution_id)
        if watch is not None:
            return watch

        request = results_request(execution_id, return_all_outputs=True)
        fetch = _Fetch(self._retrying, request, self._memory.node_maps)
        pushed, shared = None, None
        if self.push is not None:
            pushed = self.push.runs.get(execution_id)
        if self.backplane is not None:
            shared = self.backplane.share(execution_id, fetch.read)

        watch = self._watches[execution_id] = Watch(
            execution_id,
            fetch,
            lifetime=self.lifetime,
            poll=self._settings.poll,
            retry=self._settings.retry,
            pushed=pushed,
            shared=shared,
            emit=self._emit,
            on_end=self._forget,
            workflow=self._memory.recent_runs.workflow(execution_id),
            base_url=self.base_url,
        )
        if (source := self._memory.early_wake_ups.pop(execution_id)) is not None:
            watch.wake(source)
        return watch

    def is_closing(self) -> bool:
        return self.lifetime.is_closing()

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        return self.lifetime.spawn(work, name=name)

    def lost_tokens(self) -> list[str]:
        return self._memory.callbacks.lost_tokens()

    def called_back_elsewhere(self, token: str, execution_id: int) -> None:
        self._memory.callbacks.receive(token, execution_id, shared=True)
        if self.recorded_sends is not None:
            self.recorded_sends.learn(token, execution_id)

    def started_elsewhere(self, execution_id: int, left: float) -> None:
        """Record that for `left` seconds, the server may return 404 for another session's run."""
        since = clock() + left - self._settings.retry.not_found_grace
        workflow = self._memory.recent_runs.workflow(execution_id)
        self._memory.recent_runs.add(execution_id, workflow, now=since)

    def stream_elsewhere(self, execution_id: int) -> None:
        """Record that another session streams an execution."""
        if (watch := self._watches.get(execution_id)) is not None:
            watch.stream_elsewhere()

    def wake(self, execution_id: int, source: WakeSource) -> bool:
        """Wake an execution's watch in all sessions that share the backplane."""
        if self.backplane is not None:
            self.backplane.wake(execution_id, source)
        return self.wake_here(execution_id, source)

    def wake_here(self, execution_id: int, source: WakeSource) -> bool:
        """Wake the execution's watch and return True, or remember the wake-up if it has none."""
        watch = self._watches.get(execution_id)
        if watch is None:
            self._memory.early_wake_ups.add(execution_id, source)
            return False
        watch.wake(source)
        return True

    def _forget(self, watch: Watch) -> None:
        if self._watches.get(watch.execution_id) is watch:
            del self._watches[watch.execution_id]

    async def ask_main_output(self, snapshot: Snapshot, deadline: Deadline) -> tuple[Any, ...]:
        """Request the main output of a complete execution until the server returns it.

        Returns:
            A tuple of it, or an empty tuple if the server finds none.
        """
        request = results_request(snapshot.execution_id, return_all_outputs=False)

        def read(response: Response) -> MainOutput | None:
            if as_documented(response) is not response:
                return None
            return read_main_output(response, snapshot.execution_id)

        due = clock()
        while True:
            reply = await self._call(request, read, deadline, due=due, seen=snapshot)
            if reply.value is None:
                return ()
            if reply.value.complete:
                return (reply.value.value,)
            announced = self._settings.retry.announced(reply.retry_after)
            due = clock() + max(self._settings.poll.floor, announced)

    async def snapshot(self, execution_id: int, deadline: Deadline) -> Snapshot:
        request = results_request(execution_id, return_all_outputs=True)
        read = partial(self._memory.node_maps.read, execution_id=execution_id)
        reply = await self._call(request, read, deadline)
        return take_snapshot(execution_id, reply, elapsed=reply.duration)

    async def main_output(self, execution_id: int, deadline: Deadline) -> MainOutput:
        request = results_request(execution_id, return_all_outputs=False)
        read = partial(read_main_output, execution_id=execution_id)
        return (await self._call(request, read, deadline)).value

    async def read_definition(
        self, name: str | int, request: Request, deadline: Deadline
    ) -> WorkflowDefinition:
        try:
            return (await self._call(request, read_workflow, deadline)).value
        except RequestError as error:
            error._add_context(f"workflow {name!r:.100}")
            raise

    async def definition(
        self, workflow: str | int, label: str | None, version: int | None, *, fresh: bool
    ) -> WorkflowDefinition:
        """Return a definition, from the cache that all parts of the session share."""
        try:
            async with self.lifetime.call(self.deadline(None)):
                return await self._definitions.get(workflow, label, version, fresh=fresh)
        except RequestError as error:
            error._add_context(f"workflow {workflow!r:.100}")
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
        """Send a request outside a watch, now or at `due`. Errors carry the snapshot `seen`."""
        retry = self._settings.retry
        state = RetryState(retry, retry.outage, deadline=lambda: deadline.at)
        now = clock()
        due = now if due is None else due

        try:
            async with self.lifetime.call(deadline):
                if due > now:
                    await asyncio.sleep(due - now)
                return await self._retrying.call(request, read, state, due=due)
        except PromptLayerExecError as error:
            error.execution_id = request.execution_id
            error.last_snapshot = seen
            raise
        except DeadlinePassed:
            raise timed_out(request.execution_id, deadline, seen, state.error) from state.error

    async def check_inputs(
        self, request: StartRequest, inputs: Mapping[str, Any], deadline: Deadline
    ) -> None:
        """Raise `InvalidInputs` if a request lacks inputs that its workflow requires."""
        try:
            async with self.lifetime.call(deadline):
                await self._definitions.check(request, inputs)
        except DeadlinePassed:
            timeout = deadline.timeout or 0.0
            raise ExecutionTimeout(
                f"could not send the start request within {timeout:g} s, so no run was started:"
                f" the definition of workflow {request.workflow!r:.100} did not arrive in time",
                timeout=timeout,
            ) from None

    async def send(
        self,
        prepared: PreparedSend,
        deadline: Deadline,
        hooks: SendHooks | None,
        *,
        is_recorded: bool,
        abandoned: AbandonedRuns | None,
    ) -> NewRun:
        """Send a start request before the deadline, and return its run.

        If a store records the run, the deadline holds for the response as well.
        """
        retry = self._settings.retry
        send = SendOnce(
            request=prepared.request,
            send=partial(self._send_start, prepared),
            retries=RetryState(retry, retry.outage, deadline=lambda: deadline.at),
            lifetime=self.lifetime,
            emit=self._emit,
            base_url=self.base_url,
            secret=prepared.secret,
            hooks=hooks,
            is_recorded=is_recorded,
            on_lost=self._lost,
            abandoned=abandoned,
        )
        self._sends.add(send)
        return await send.run(deadline)

    def delaying_closing(self) -> list[SendOnce]:
        """Return the start requests whose responses closing waits for."""
        return [send for send in self._sends if send.delays_closing]

    async def _send_start(
        self, prepared: PreparedSend, send: AtMostOnce, retries: RetryState
    ) -> NewRun:
        """Send a start request, and remember its run."""
        reply = await self._retrying.call(
            prepared.http_request, read_new_run, retries, due=clock(), start=send
        )
        execution_id, warning = reply.value.execution_id, reply.value.warning

        workflow = prepared.request.workflow
        self._memory.recent_runs.add(execution_id, workflow, now=clock())
        if self.backplane is not None:
            self.backplane.started(execution_id, self._settings.retry.not_found_grace)
        if self.push is not None:
            self.push.started(workflow, execution_id, sent_at=reply.sent_at, waited=reply.lateness)

        if warning is not None:  # it may go to the log
            warning = self._network.redactor.also(prepared.secret).redact(warning)
        return NewRun(execution_id, warning)

    def _lost(self, token: str, request: StartRequest, elapsed: float = 0.0) -> None:
        self._memory.callbacks.lose(token, request, self.base_url, elapsed)
        if self.backplane is not None:
            self.backplane.find_callbacks()

    async def recover(self, error: StartUnknown, token: str, deadline: Deadline) -> int:
        """Wait for the callback after a lost response, and return the execution's id."""
        self._lost(token, StartRequest(error.workflow))

        try:
            async with self.lifetime.call(deadline):
                execution_id = await self._callback_of(error, token)
        except DeadlinePassed:
            since = f", and no callback came within {deadline.timeout or 0.0:g} s"
            if self._settings.callbacks is None:
                since += " (this session has no callbacks=)"
            unknown = start_unknown(error.workflow, error.reason, token, since, key=error.key)
            unknown.is_key_stored = error.is_key_stored
            raise unknown from error

        self._memory.recent_runs.add(execution_id, error.workflow, now=clock())
        if self.recorded_sends is not None and error.key is not None:
            await self.recorded_sends.learn_now(token, execution_id, error.key, deadline)
        return execution_id

    async def _callback_of(self, error: StartUnknown, token: str) -> int:
        """Return the execution id in a lost start's callback, whichever process received it."""
        if self.recorded_sends is None or error.key is None:
            return await self._memory.callbacks.wait(token)

        looking = self.spawn(
            self.recorded_sends.wait_for_callback(
                error.key, token, partial(self._memory.callbacks.receive, shared=True)
            ),
            name="promptlayer_exec.RecordLookup",
        )
        try:
            return await self._memory.callbacks.wait(token)
        finally:
            looking.cancel()


async def list_workflows(
    open_client: Callable[[], Client], parameters: Mapping[str, str | None]
) -> AsyncGenerator[WorkflowSummary, None]:
    """Yield each workflow once, page by page."""
    seen: set[int] = set()
    following: int | None = 1
    while following is not None:
        page = await open_client().workflows_page(following, parameters)
        # A workflow that was added meanwhile pushes others to the next page.
        new = [summary for summary in page.summaries if summary.id not in seen]
        seen.update(summary.id for summary in new)
        for summary in new:
            yield summary

        # Stop at a page without new workflows, even if the server claims that there are more.
        following = page.following if new else None
