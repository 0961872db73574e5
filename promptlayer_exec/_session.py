"""The session: its settings, and how its parts are wired together."""

from __future__ import annotations

import math
import warnings
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, aclosing
from functools import partial
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, TypeVar, overload

from promptlayer_exec._errors import ConfigurationError, PromptLayerExecError, SessionClosed
from promptlayer_exec._events import Observer, broadcast
from promptlayer_exec._execution import Execution
from promptlayer_exec._fanout import Flight, Spawn, fan_out
from promptlayer_exec._lifetime import Lifetime
from promptlayer_exec._models import MainOutput, Node, Outcome, Snapshot, StartRequest
from promptlayer_exec._opening import Opening
from promptlayer_exec._output import check_type, main_output, typed_output
from promptlayer_exec._policies import (
    Deadline,
    Newborns,
    PollPolicy,
    RetryPolicy,
    check_seconds,
    check_timeout,
)
from promptlayer_exec._settings import (
    check_count,
    find_api_key,
    find_base_url,
    sends_in_the_clear,
)
from promptlayer_exec._start import Clearance
from promptlayer_exec._tasks import Timers, clock
from promptlayer_exec._throttle import Limiter, Throttle
from promptlayer_exec._transport import Pools, Transport
from promptlayer_exec._watch import Watch, finished_nodes, follow, take_snapshot
from promptlayer_exec._wire import (
    NodeMapReader,
    Request,
    check_execution_id,
    read_main_output,
    results_request,
    run_request,
)

if TYPE_CHECKING:
    import aiohttp
    import cattrs
    from typing_extensions import TypeForm

ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")


class Session:
    """Follows the executions of one PromptLayer workspace, over one pool of connections.

    Use it with `async with`, or use it and `await session.aclose()`; the first use opens it.
    Making one does no I/O and needs no running event loop. It may be entered in one task and
    closed in another, and entered again, in another event loop too, once it is closed.

    Args:
        api_key: the workspace's key; else `$PROMPTLAYER_API_KEY`, looked up again at first use.
        base_url: the server; else `$PROMPTLAYER_BASE_URL`, else https://api.promptlayer.com. A
            path prefix is kept.
        poll: when to look at an execution again.
        retry: what to survive, and for how long.
        wait_timeout: the default deadline of every wait, in seconds; None waits for ever.
        request_timeout: seconds for one HTTP attempt, from connecting to the last byte; waiting
            for a connection to be free, or for the throttle, does not count.
        max_connections: how many requests may be under way at once; a quarter of them, and at least
            one, is kept for starts.
        max_response_bytes: how large a response may be, after decompression.
        rate: HTTP attempts per second, over everything the session does; None: unlimited.
        limiter: a further limit, acquired once per HTTP attempt.
        http: a client session to borrow, with its proxy, TLS and headers; it is not closed.
        converter: hooks for inputs, and for structuring outputs; never used for the node map.
        observers: called with every event.

    Raises:
        ConfigurationError: a setting is malformed. A missing key is reported at first use.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        base_url: str | None = None,
        poll: PollPolicy = PollPolicy(),  # noqa: B008 - frozen
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        wait_timeout: float | None = 3600.0,
        request_timeout: float = 30.0,
        max_connections: int = 100,
        max_response_bytes: int = 64 * 1024 * 1024,
        rate: float | None = 100.0,
        limiter: Limiter | None = None,
        http: aiohttp.ClientSession | None = None,
        converter: cattrs.Converter | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        # Looked up for the sake of the errors, and again on opening: the environment may be filled
        # after a session at module level was made.
        find_api_key(api_key)
        self._warned = False
        self._warn_of_plain_http(find_base_url(base_url), stacklevel=3)
        self._api_key = api_key
        self._base_url = base_url
        self._poll = poll
        self._retry = retry
        if wait_timeout == math.inf:
            wait_timeout = None
        if wait_timeout is not None:
            wait_timeout = check_seconds("wait_timeout", wait_timeout)
        self._wait_timeout = wait_timeout
        self._request_timeout = check_seconds("request_timeout", request_timeout, zero=False)
        self._max_connections = check_count("max_connections", max_connections)
        self._max_response_bytes = check_count("max_response_bytes", max_response_bytes)
        if rate is not None:
            rate = check_seconds("rate", rate, zero=False)
        self._rate = rate
        self._limiters = [] if limiter is None else [limiter]
        self._http = http
        self._converter = converter
        self._node_maps = NodeMapReader()
        self._newborns = Newborns(retry.not_found_grace)
        self._emit = broadcast(observers)
        self._opening: Opening | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        """Open the session, afresh if it was closed."""
        if self._opening is not None and self._opening.lifetime.closing:
            await self._settle(self._opening)
        self._closed = False
        is_new = self._opening is None
        try:
            await self._open()
        except BaseException:
            # Whoever is cancelled in here never comes to `__aexit__`.
            if is_new and self._opening is not None:
                self._opening.lifetime.close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the session."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close the session: every wait and call in it ends with `SessionClosed`.

        Raises:
            RuntimeError: it is open in another event loop, which still runs.
        """
        if self._opening is not None:
            self._opening.lifetime.close()
        self._closed = True
        if self._opening is not None:
            await self._settle(self._opening)

    @overload
    async def get_results(
        self, execution_id: int, *, return_all_outputs: Literal[False] = False
    ) -> MainOutput: ...

    @overload
    async def get_results(
        self, execution_id: int, *, return_all_outputs: Literal[True]
    ) -> Snapshot: ...

    @overload
    async def get_results(
        self, execution_id: int, *, return_all_outputs: bool
    ) -> MainOutput | Snapshot: ...

    async def get_results(
        self, execution_id: int, *, return_all_outputs: bool = False
    ) -> MainOutput | Snapshot:
        """Return an execution's results as they are now: one GET, retried as the policy says.

        https://docs.promptlayer.com/reference/get-workflow-version-execution-results

        Args:
            execution_id: 1 ... 2**63-1.
            return_all_outputs: whether to return every node, or the main output alone.

        Raises:
            TypeError: `execution_id` is no int.
            ValueError: `execution_id` is out of range.
            RequestError: the server refused, or could not be reached.
            ExecutionTimeout: the session's `wait_timeout` passed.
            SessionClosed: the session was closed.
        """
        execution_id = check_execution_id(execution_id)
        request = results_request(execution_id, return_all_outputs=return_all_outputs)
        opening = await self._open(execution_id)
        deadline = Deadline.after(self._wait_timeout, now=opening.clock())
        if not return_all_outputs:
            read_output = partial(read_main_output, execution_id=execution_id)
            return (await opening.call(request, read_output, deadline)).value
        read_nodes = partial(self._node_maps.read, execution_id=execution_id)
        reply = await opening.call(request, read_nodes, deadline)
        return take_snapshot(execution_id, reply, elapsed=reply.duration)

    async def start(
        self,
        workflow: str | int,
        inputs: Any = None,
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
    ) -> Execution:
        """Start a run, and return its handle.

        The request is sent again only if it provably never reached the server, or was refused with
        429. Once it may have left, cancelling the call does not call it off: the session reads the
        answer, and reports the execution with `ExecutionStarted(abandoned=True)` and a warning in
        the log.

        https://docs.promptlayer.com/reference/run-workflow

        Args:
            workflow: its name or id.
            inputs: its input variables: a mapping, or an attrs, dataclass or pydantic instance.
            label: the label of the version to run; excludes `version`.
            version: the number of the version to run; excludes `label`.
            metadata: strings to keep with the run.
            callback_url: where the server posts the final output.

        Raises:
            TypeError: an argument, or a value in the inputs, is of an unusable type.
            ValueError: an argument, or a value in the inputs, cannot be sent.
            StartUnknown: the answer was lost, so the run may have started; it is never repeated.
            StatusError: the server refused.
            ConnectionFailed: the server could not be reached.
            ExecutionTimeout: the request could not leave within the session's `wait_timeout`.
            SessionClosed: the session was closed; with the execution's id if it had started.
        """
        request = StartRequest(
            workflow,
            {} if inputs is None else inputs,
            label=label,
            version=version,
            metadata=metadata,
            callback_url=callback_url,
        )
        return await self._start(request, self._deadline(...))

    async def _start(
        self, request: StartRequest, deadline: Deadline, clearance: Clearance | None = None
    ) -> Execution:
        _, http_request = self._prepare(request)
        opening = await self._open()
        started = await opening.start(request, http_request, deadline, clearance)
        return Execution(self, started.execution_id, request.workflow, started.warning)

    def _prepare(self, request: StartRequest) -> tuple[dict[str, Any], Request]:
        """Return a start's inputs as JSON carries them, and what would be sent."""
        # Not imported before it is needed, as much else that not everybody uses.
        from promptlayer_exec._structuring import encode_inputs  # noqa: PLC0415

        inputs = encode_inputs(request.inputs, self._converter)
        return inputs, run_request(request, inputs)

    @overload
    def as_completed(
        self,
        items: Iterable[ItemT] | AsyncIterable[ItemT],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> AsyncGenerator[Outcome[ItemT, Any], None]: ...

    @overload
    def as_completed(
        self,
        items: Iterable[ItemT] | AsyncIterable[ItemT],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: TypeForm[OutputT],
    ) -> AsyncGenerator[Outcome[ItemT, OutputT], None]: ...

    def as_completed(
        self,
        items: Iterable[ItemT] | AsyncIterable[ItemT],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: Any = None,
    ) -> AsyncGenerator[Outcome[ItemT, Any], None]:
        """Follow, or start and follow, many executions; yield each one's outcome as it comes.

        One item's failure is its outcome's `error`, and touches no other. Leave early through
        `contextlib.aclosing`: what is under way is then given up here, and goes on at the server.

        Args:
            items: ids, `Execution` handles and `StartRequest`s, as an iterable or async iterable;
                the next one is taken when there is a place for it. An async generator is closed at
                the end.
            max_in_flight: how many may be under way, or have ended without being yielded yet.
            timeout: seconds for each item, from when it was taken; `...` means the session's
                `wait_timeout`, None no limit. A start that is on the wire by then is read to its
                end.
            into: the type of the outputs, as for `Execution.output`.

        Raises:
            Unauthorized: an item met it, so no later one could succeed. Those under way are given
                up, and each is yielded with that error before it is raised. So it is with:
            SessionClosed: the session was closed.
            Exception: one of `items` itself, after the outcomes of those under way.
        """
        if not isinstance(items, Iterable | AsyncIterable):
            raise TypeError(f"items is an iterable or async iterable, not {items!r:.100}")
        if into is not None:
            check_type(into, self._converter)
        limit = self._limit(timeout)

        async def join() -> Spawn:
            return (await self._open()).lifetime.spawn

        async def carry_out(flight: Flight[ItemT]) -> Any:
            deadline = self._deadline(limit)
            flight.execution = await self._take_up(flight.item, deadline)
            return await self._output(flight.execution.id, deadline, into, flight.see)

        return fan_out(
            items,
            carry_out,
            max_in_flight=check_count("max_in_flight", max_in_flight),
            join=join,
        )

    @overload
    async def collect(
        self,
        items: Iterable[ItemT] | AsyncIterable[ItemT],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> list[Outcome[ItemT, Any]]: ...

    @overload
    async def collect(
        self,
        items: Iterable[ItemT] | AsyncIterable[ItemT],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: TypeForm[OutputT],
    ) -> list[Outcome[ItemT, OutputT]]: ...

    async def collect(
        self,
        items: Iterable[ItemT] | AsyncIterable[ItemT],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: Any = None,
    ) -> list[Outcome[ItemT, Any]]:
        """Do what `as_completed` does, and return all outcomes, in the order of the items.

        Args and errors are those of `as_completed`. An error leaves no outcomes behind: where they
        are needed though the key may be refused half way, take them as they come.
        """
        outcomes = []
        completed: AsyncGenerator[Outcome[ItemT, Any], None] = self.as_completed(
            items, max_in_flight=max_in_flight, timeout=timeout, into=into
        )
        async with aclosing(completed):
            async for outcome in completed:
                outcomes.append(outcome)  # noqa: PERF401 - not inside of aclosing
        return sorted(outcomes, key=lambda outcome: outcome.index)

    async def _take_up(self, item: Any, deadline: Deadline) -> Execution:
        if isinstance(item, StartRequest):
            return await self._start(item, deadline)
        if not isinstance(item, Execution):
            try:
                return self.execution(item)
            except TypeError:
                raise TypeError(
                    f"an item is an execution id, an Execution or a StartRequest, not {item!r:.100}"
                ) from None
        if item._session is None:  # it was pickled
            return Execution(self, item.id, item.workflow, item.warning)
        if item._session is not self:
            raise ValueError(f"execution {item.id} belongs to another session: pass its id instead")
        return item

    def execution(self, execution_id: int) -> Execution:
        """Return the handle of an execution, without any I/O.

        Raises:
            TypeError: `execution_id` is no int.
            ValueError: `execution_id` is out of range.
        """
        return Execution(self, check_execution_id(execution_id))

    def __repr__(self) -> str:
        if self._opening is not None and not self._opening.lifetime.closing:
            return f"<Session {self._opening.transport.base_url}, open>"
        try:
            base_url = find_base_url(self._base_url)
        except ConfigurationError:
            base_url = "with a malformed base URL"  # the environment's, as of now
        return f"<Session {base_url}, not open>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Session holds a key and connections, and cannot be pickled or copied")

    async def _output(
        self,
        execution_id: int,
        deadline: Deadline,
        into: Any,
        see: Callable[[Snapshot], None] = lambda _: None,
    ) -> Any:
        """Wait for the main output; `see` gets the last snapshot there was, whatever the end."""
        opening = await self._open(execution_id)
        snapshot = await opening.completed(execution_id, deadline, see)
        value = await main_output(snapshot, lambda: opening.main_output(snapshot, deadline))
        return value if into is None else typed_output(value, into, self._converter, snapshot)

    def _follow(
        self, execution_id: int, timeout: float | EllipsisType | None
    ) -> AsyncGenerator[Snapshot, None]:
        return follow(self._joining(execution_id), self._limit(timeout))

    def _finished_nodes(
        self, execution_id: int, timeout: float | EllipsisType | None
    ) -> AsyncGenerator[Node, None]:
        return finished_nodes(self._joining(execution_id), self._limit(timeout))

    def _joining(self, execution_id: int) -> Callable[[], Awaitable[Watch]]:
        async def join() -> Watch:
            return (await self._open(execution_id)).join(execution_id)

        return join

    def _limit(self, timeout: float | EllipsisType | None) -> float | None:
        return self._wait_timeout if timeout is ... else check_timeout(timeout)

    def _deadline(self, timeout: float | EllipsisType | None) -> Deadline:
        return Deadline.after(self._limit(timeout), now=clock())

    async def _open(self, execution_id: int | None = None) -> Opening:
        try:
            if self._closed:
                raise SessionClosed
            if self._opening is None:
                self._opening = self._begin()
            if not self._opening.lifetime.is_ready():
                await self._opening.lifetime.ready()
        except PromptLayerExecError as error:
            error.execution_id = execution_id
            raise
        return self._opening

    def _begin(self) -> Opening:
        api_key = find_api_key(self._api_key)
        if api_key is None:
            raise ConfigurationError(
                "there is no API key: set PROMPTLAYER_API_KEY or pass api_key= to Session"
            )
        base_url = find_base_url(self._base_url)
        self._warn_of_plain_http(base_url)
        resources = AsyncExitStack()
        timers = Timers()
        resources.callback(timers.close)
        if self._http is None:
            pools = Pools.open(self._max_connections, api_key, resources)
        else:
            pools = Pools.borrow(self._http, self._max_connections, api_key)
        transport = Transport(
            pools,
            base_url=base_url,
            api_key=api_key,
            throttle=Throttle(self._rate, self._limiters, clock=timers.loop.time),
            retry=self._retry,
            newborns=self._newborns,
            request_timeout=self._request_timeout,
            max_response_bytes=self._max_response_bytes,
            emit=self._emit,
            timers=timers,
        )
        return Opening(
            Lifetime(resources, timers),
            transport,
            timers,
            poll=self._poll,
            retry=self._retry,
            newborns=self._newborns,
            node_maps=self._node_maps,
            emit=self._emit,
        )

    def _warn_of_plain_http(self, base_url: str, *, stacklevel: int = 2) -> None:
        if not self._warned and sends_in_the_clear(base_url):
            self._warned = True
            warnings.warn(
                f"{base_url} is plain http: whoever is on the way can read the API key and every"
                " output; use https, or a loopback address",
                stacklevel=stacklevel,
            )

    async def _settle(self, opening: Opening) -> None:
        await opening.lifetime.wait_closed()
        if self._opening is opening:
            self._opening = None
