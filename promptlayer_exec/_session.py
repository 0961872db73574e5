"""The session: its settings, and how its parts are wired together."""

from __future__ import annotations

import threading
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, TypeVar, overload

import cattrs

from promptlayer_exec._client import Client
from promptlayer_exec._connections import Pools
from promptlayer_exec._errors import ConfigurationError, PromptLayerExecError, SessionClosed
from promptlayer_exec._events import Observer, WakeSource, broadcast
from promptlayer_exec._execution import Execution
from promptlayer_exec._fanout import Outcome, RunningItem, Spawn, fan_out, report_abandoned
from promptlayer_exec._lifetime import Lifetime
from promptlayer_exec._models import MainOutput, Snapshot, StartRequest, naming_arguments
from promptlayer_exec._output import check_type
from promptlayer_exec._policies import Deadline, PollPolicy, RetryPolicy, check_timeout
from promptlayer_exec._retry import RecentStarts
from promptlayer_exec._settings import (
    Settings,
    check_count,
    find_api_key,
    find_base_url,
    sends_in_the_clear,
)
from promptlayer_exec._start import BeforeSend
from promptlayer_exec._throttle import Limiter, Throttle
from promptlayer_exec._transport import Transport
from promptlayer_exec._wakeups import EarlyWakeUps
from promptlayer_exec._wire import NodeMapReader, Request, check_execution_id, run_request

if TYPE_CHECKING:
    import aiohttp
    from typing_extensions import TypeForm

ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")


class Session:
    """Follows the executions of one PromptLayer workspace over one pool of connections.

    Use it with `async with`, or close it with `await session.aclose()`; the first use opens it.
    Creating a session does no I/O and needs no running event loop. It may be entered in one task
    and closed in another. A closed session can be entered again, even in another event loop.

    Args:
        api_key: the workspace's key; else `$PROMPTLAYER_API_KEY`, read again at first use.
        base_url: the server; else `$PROMPTLAYER_BASE_URL`, else https://api.promptlayer.com. A
            path prefix is kept.
        poll: when to poll an execution again.
        retry: which failures to survive, and for how long.
        wait_timeout: the default deadline of every wait, in seconds; None: no limit.
        request_timeout: seconds for one HTTP attempt, from connecting to the last byte. Waiting
            for a free connection or for the rate does not count.
        max_connections: how many requests may be in flight at once. A quarter of them, at least
            one, is reserved for starts.
        max_response_bytes: the largest response body, in bytes after decompression.
        rate: HTTP attempts per second, for the whole session; None: unlimited.
        limiter: an additional limit, acquired once per HTTP attempt.
        http: a client session to borrow, with its proxy, TLS and headers; not closed at the end.
        converter: hooks for inputs and for structuring outputs; never used for the node map.
        observers: called with every event.
        trust_env: whether to use HTTP_PROXY, HTTPS_PROXY, NO_PROXY and .netrc, as aiohttp reads
            them; also with `$PROMPTLAYER_EXEC_TRUST_ENV=1`. A borrowed `http` has its own setting.

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
        trust_env: bool = False,
    ) -> None:
        self._settings = Settings(
            api_key=api_key,
            base_url=base_url,
            poll=poll,
            retry=retry,
            wait_timeout=wait_timeout,
            request_timeout=request_timeout,
            max_connections=max_connections,
            max_response_bytes=max_response_bytes,
            rate=rate,
            limiter=limiter,
            http=http,
            converter=converter,
            observers=observers,
            trust_env=trust_env,
        )
        self._warned = False
        self._warn_of_plain_http(find_base_url(self._settings.base_url), stacklevel=3)
        self._limiters = [] if limiter is None else [limiter]
        self._node_maps = NodeMapReader()
        self._recent_starts = RecentStarts(retry.not_found_grace)
        self._early_wake_ups = EarlyWakeUps()
        self._emit = broadcast(observers)
        self._client: Client | None = None
        self._opening = threading.Lock()
        self._closed = False

    async def __aenter__(self) -> Self:
        """Open the session, or reopen it if it was closed."""
        if self._client is not None and self._client.lifetime.is_closing():
            await self._wait_closed(self._client)
        self._closed = False
        is_new = self._client is None
        try:
            await self._open()
        except BaseException:
            # A task that is cancelled here never calls `__aexit__`.
            if is_new and self._client is not None:
                self._client.lifetime.close()
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
            RuntimeError: the session is open in another event loop that is still running.
        """
        if self._client is not None:
            self._client.lifetime.close()
        self._closed = True
        if self._client is not None:
            await self._wait_closed(self._client)

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
        """Return an execution's results as they are now, with one GET.

        https://docs.promptlayer.com/reference/get-workflow-version-execution-results

        Args:
            execution_id: 1 ... 2**63-1.
            return_all_outputs: True returns every node, False only the main output.

        Raises:
            TypeError: `execution_id` is not an int.
            ValueError: `execution_id` is out of range.
            RequestError: the server refused, or could not be reached.
            ExecutionTimeout: the session's `wait_timeout` passed.
            SessionClosed: the session was closed.
        """
        execution_id = check_execution_id(execution_id)
        client = await self._open(execution_id)
        if return_all_outputs:
            return await client.snapshot(execution_id, client.deadline())
        return await client.main_output(execution_id, client.deadline())

    @naming_arguments
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
        429. Once it may have been sent, cancelling this call does not stop it: the session still
        reads the answer, emits `ExecutionStarted(abandoned=True)` and logs a warning with the id.

        https://docs.promptlayer.com/reference/run-workflow

        Args:
            workflow: its name or id.
            inputs: its input variables: a mapping, or an attrs, dataclass or pydantic instance.
            label: the label of the version to run; not allowed with `version`.
            version: the number of the version to run; not allowed with `label`.
            metadata: strings to store with the run.
            callback_url: where the server posts the final output.

        Raises:
            TypeError: an argument or a value in the inputs has an unsupported type.
            ValueError: an argument or a value in the inputs cannot be sent.
            StartUnknown: the answer was lost, so the run may have started; it is never repeated.
            StatusError: the server refused.
            ConnectionFailed: the server could not be reached.
            ExecutionTimeout: the request could not be sent within the session's `wait_timeout`.
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
        return await self._start(request)

    async def _start(
        self,
        request: StartRequest,
        deadline: Deadline | None = None,
        before_send: BeforeSend | None = None,
    ) -> Execution:
        _, http_request = self._prepare(request)
        client = await self._open()
        deadline = deadline or client.deadline()
        started = await client.start(request, http_request, deadline, before_send)
        return Execution(self, started.execution_id, request.workflow, started.warning)

    def _prepare(self, request: StartRequest) -> tuple[dict[str, Any], Request]:
        """Return a start's inputs in JSON form, and the request that would be sent."""
        # Imported on first use: it doubles the cost of importing the package.
        from promptlayer_exec._structuring import encode_inputs  # noqa: PLC0415

        inputs = encode_inputs(request.inputs, self._settings.converter)
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
        """Follow many executions, start those that are requests, and yield outcomes as they arrive.

        One item's failure is the `error` of its outcome, and affects no other item. Wrap the
        generator in `contextlib.aclosing` to stop early: this session then stops following the
        items in flight, and their executions continue on the server.

        Args:
            items: ids, `Execution` handles and `StartRequest`s, as an iterable or async iterable.
                The next item is taken when a slot is free. An async generator is closed at the
                end.
            max_in_flight: how many items may be in flight or waiting to be yielded.
            timeout: seconds for each item, from when it is taken; `...` means the session's
                `wait_timeout`, None no limit. If a start has been sent by then, its answer is
                still read.
            into: the type of the outputs, as for `Execution.output`.

        Raises:
            Unauthorized: the server refused the key, so no later item could succeed. The items in
                flight are cancelled, and each is yielded with that error before it is raised.
            SessionClosed: the session was closed; the items in flight are yielded with it first.
            Exception: `items` raised it; the outcomes of the items in flight are yielded first.
        """
        if not isinstance(items, Iterable | AsyncIterable):
            raise TypeError(f"items must be an iterable or async iterable, not {items!r:.100}")
        if into is not None:
            check_type(into, self._settings.converter)
        timeout = check_timeout(timeout)

        async def open_client() -> Spawn:
            return (await self._open()).lifetime.spawn

        async def run_item(running: RunningItem[ItemT]) -> Any:
            if isinstance(running.item, StartRequest):
                deadline = (await self._open()).deadline(timeout)
                execution = running.execution = await self._start(running.item, deadline)
                client = await self._open(execution.id)
            else:
                execution = running.execution = self._handle(running.item)
                client = await self._open(execution.id)
                deadline = client.deadline(timeout)
            return await client.output(execution.id, deadline, into, running.see)

        return fan_out(
            items,
            run_item,
            max_in_flight=check_count("max_in_flight", max_in_flight),
            open_client=open_client,
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
        """Run `as_completed` to its end, and return all outcomes in the order of the items.

        Arguments and errors are those of `as_completed`. If it raises, no outcome is returned: use
        `as_completed` if you need those that arrived before the error.
        """
        outcomes = []
        completed: AsyncGenerator[Outcome[ItemT, Any], None] = self.as_completed(
            items, max_in_flight=max_in_flight, timeout=timeout, into=into
        )
        try:
            async with aclosing(completed):
                async for outcome in completed:
                    outcomes.append(outcome)  # noqa: PERF401 - not inside of aclosing
        except BaseException:
            for outcome in outcomes:
                report_abandoned(outcome)
            raise
        return sorted(outcomes, key=lambda outcome: outcome.index)

    def _handle(self, item: Any) -> Execution:
        """Return the handle of an item that is not a `StartRequest`."""
        if not isinstance(item, Execution):
            try:
                return self.execution(item)
            except TypeError:
                raise TypeError(
                    "an item must be an execution id, an Execution or a StartRequest,"
                    f" not {item!r:.100}"
                ) from None
        if item._session is None:  # it was unpickled
            return Execution(self, item.id, item.workflow, item.warning)
        if item._session is not self:
            raise ValueError(f"execution {item.id} belongs to another session: pass its id instead")
        return item

    def execution(self, execution_id: int) -> Execution:
        """Return the handle of an execution, without any I/O.

        Raises:
            TypeError: `execution_id` is not an int.
            ValueError: `execution_id` is out of range.
        """
        return Execution(self, check_execution_id(execution_id))

    def wake(self, execution_id: int) -> bool:
        """Poll an execution now: something else, such as a message of yours, says it has changed.

        If nobody follows it yet, the wake-up is remembered for 10 minutes. Any number of them
        causes at most two polls a second by default. Call it in the session's event loop.

        Returns:
            True if somebody follows the execution in this session.

        Raises:
            PromptLayerExecError: the session was closed.
        """
        return self._wake(check_execution_id(execution_id), "caller")

    def _wake(self, execution_id: int, source: WakeSource) -> bool:
        if self._closed:
            raise SessionClosed(execution_id=execution_id)
        if self._client is not None and self._client.lifetime.is_ready():
            return self._client.wake(execution_id, source)
        self._early_wake_ups.add(execution_id, source)
        return False

    def __repr__(self) -> str:
        if self._client is not None and not self._client.lifetime.is_closing():
            return f"<Session {self._client.transport.base_url}, open>"
        try:
            base_url = find_base_url(self._settings.base_url)
        except ConfigurationError:
            base_url = "with a malformed base URL"  # the environment has changed
        return f"<Session {base_url}, not open>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Session holds a key and connections, and cannot be pickled or copied")

    async def _open(self, execution_id: int | None = None) -> Client:
        """Return the open client; the first use opens it. Errors carry the execution's id."""
        try:
            if self._closed:
                raise SessionClosed
            with self._opening:  # two threads, each with its own loop, may get here at once
                if self._client is None:
                    self._client = self._create_client()
            if not self._client.lifetime.is_ready():
                await self._client.lifetime.ready()
        except PromptLayerExecError as error:
            error.execution_id = execution_id
            raise
        return self._client

    def _create_client(self) -> Client:
        api_key = find_api_key(self._settings.api_key)
        if api_key is None:
            raise ConfigurationError(
                "there is no API key: set PROMPTLAYER_API_KEY or pass api_key= to Session"
            )
        base_url = find_base_url(self._settings.base_url)
        self._warn_of_plain_http(base_url)
        resources = AsyncExitStack()
        transport = Transport(
            settings=self._settings,
            pools=Pools.open(self._settings, api_key, resources),
            base_url=base_url,
            api_key=api_key,
            throttle=Throttle(self._settings.rate, self._limiters),
            recent_starts=self._recent_starts,
            emit=self._emit,
        )
        return Client(
            settings=self._settings,
            lifetime=Lifetime(resources),
            transport=transport,
            recent_starts=self._recent_starts,
            node_maps=self._node_maps,
            early_wake_ups=self._early_wake_ups,
            emit=self._emit,
        )

    def _warn_of_plain_http(self, base_url: str, *, stacklevel: int = 2) -> None:
        if not self._warned and sends_in_the_clear(base_url):
            self._warned = True
            warnings.warn(
                f"{base_url} is plain http: anyone on the network path can read the API key and"
                " every output; use https, or a loopback address",
                stacklevel=stacklevel,
            )

    async def _wait_closed(self, client: Client) -> None:
        await client.lifetime.wait_closed()
        if self._client is client:
            self._client = None
