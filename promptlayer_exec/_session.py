"""The session: its settings, its opening and closing, and how its parts are wired together."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import threading
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, TypeVar, cast, overload
from uuid import uuid4

import cattrs
from yarl import URL

from promptlayer_exec import _structuring
from promptlayer_exec._api.attempt import Attempt
from promptlayer_exec._api.catalog import workflow_request, workflows_filter
from promptlayer_exec._api.messages import Request, Response
from promptlayer_exec._api.redaction import Redactor
from promptlayer_exec._api.runs import NodeMapReader, run_request
from promptlayer_exec._arguments import check_execution_id, naming_arguments
from promptlayer_exec._combined_stream import snapshots_of
from promptlayer_exec._engine.callbacks import CallbackLog, recoverable_token, with_callback_url
from promptlayer_exec._engine.client import Client, list_workflows
from promptlayer_exec._engine.definitions import Definitions
from promptlayer_exec._engine.keyed_starts import KeyedStarts
from promptlayer_exec._engine.lifetime import Lifetime
from promptlayer_exec._engine.retry import RecentStarts, Retrying
from promptlayer_exec._engine.start import SendHooks
from promptlayer_exec._engine.tasks import clock
from promptlayer_exec._errors import (
    ConfigurationError,
    SessionClosed,
    StartUnknown,
)
from promptlayer_exec._events import Observer, StartFailed, WakeSource, broadcast
from promptlayer_exec._execution import Execution
from promptlayer_exec._expiring import ExpiringDict
from promptlayer_exec._fanout import Outcome, collected, outcomes_of
from promptlayer_exec._http.throttle import Throttle
from promptlayer_exec._install import install_hint
from promptlayer_exec._models import MainOutput, Snapshot, StartRequest
from promptlayer_exec._policies import Deadline, Limiter, PollPolicy, RetryPolicy, check_timeout
from promptlayer_exec._settings import (
    Settings,
    find_api_key,
    find_base_url,
    find_proxy,
    sends_in_the_clear,
)
from promptlayer_exec._start_records import StartStore, check_key, fingerprint
from promptlayer_exec._workflows import Workflow, WorkflowSummary

if TYPE_CHECKING:
    import aiohttp
    from typing_extensions import TypeForm

    from promptlayer_exec._backplane import Backplane
    from promptlayer_exec.webhooks import Callbacks

T = TypeVar("T")
ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")


def _digest(api_key: str, what: str) -> str:
    """Return what only processes with the key can know, and what does not reveal the key."""
    return hmac.digest(api_key.encode(), what.encode(), "sha256").hex()[:32]


class Session:
    """Follows the executions of one PromptLayer workspace over one pool of connections.

    Use it with `async with`, or close it with `await session.aclose()`; the first use opens it.
    Creating a session does no I/O and needs no running event loop. It may be entered in one task
    and closed in another. A closed session can be entered again, even in another event loop. One
    that is still open when its event loop ends is closed with it, and opens again in the next.

    Args:
        api_key: the workspace's key; else `$PROMPTLAYER_API_KEY`, read again at first use.
        base_url: the server; else `$PROMPTLAYER_BASE_URL`, else https://api.promptlayer.com. A
            path prefix is kept.
        poll: when to poll an execution again.
        retry: which failures to retry, and for how long.
        wait_timeout: the default deadline of every wait, in seconds; None: no limit.
        request_timeout: seconds for one HTTP attempt, from connecting to the last byte; not for
            waiting for the rate or a connection.
        max_connections: how many requests may be in flight at once. A quarter of them, at least
            one, is reserved for starts; an eighth, from one to four, for push and definitions.
        max_response_bytes: the largest response body, in bytes after decompression.
        rate: HTTP attempts per second, for the whole session; None: unlimited.
        limiter: an additional limit, acquired once per HTTP attempt.
        http: a client session to borrow, with its proxy, TLS and headers; not closed at the end.
        converter: for inputs and outputs, in place of the strict one that
            `promptlayer_exec.strict_converter` returns; never used for the node map.
        observers: called with every event.
        push: whether PromptLayer's push channel wakes the watches of runs started here: None, once
            a workflow's run is not complete at its first poll, or a second one is started; True,
            at once, with a warning where push cannot be used; False, never.
            `$PROMPTLAYER_EXEC_PUSH` has the default, 1 or 0; 0 wins.
        check_inputs: whether a start raises `InvalidInputs` if required inputs are missing.
        trust_env: whether to use HTTP_PROXY, HTTPS_PROXY and NO_PROXY, read when the session opens.
            A borrowed `http` has its own setting.
        callbacks: gives each start a callback URL of its own, so that `recover` can find it.
        backplane: shares watches, starts, wake-ups and callbacks with the sessions of other
            processes: a `promptlayer_exec.redis.RedisBackplane`.
        starts: remembers which key started which run, so that a start with a key happens once: a
            `promptlayer_exec.starts.SQLStartStore`.

    Raises:
        ConfigurationError: a setting is malformed. A missing key is reported at first use.
    """

    @naming_arguments
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
        push: bool | None = None,
        check_inputs: bool = True,
        trust_env: bool = True,
        callbacks: Callbacks | None = None,
        backplane: Backplane | None = None,
        starts: StartStore | None = None,
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
            push=push,
            check_inputs=check_inputs,
            trust_env=trust_env,
            callbacks=callbacks,
            backplane=backplane,
            starts=starts,
        )
        self._limiters = [] if limiter is None else [limiter]

        self._client: Client | None = None
        self._opening = threading.Lock()  # two threads, each with its own loop, may use it at once
        self._closed = False
        self._has_warned = False

        # What outlives a client:
        self._node_maps = NodeMapReader()
        self._recent_starts = RecentStarts(retry.not_found_grace)
        # Wake-ups for executions that nobody follows yet, kept for ten minutes.
        self._early_wake_ups: ExpiringDict[int, WakeSource] = ExpiringDict(600.0)
        self._emit = broadcast(observers)
        self._callbacks = CallbackLog(self._emit, self._recent_starts)

        # The channel to which PromptLayer pushes the completions of this session's starts, and the
        # one that it shares with the other workers of a batch.
        self._own_suffix = secrets.token_hex(16)
        self._shared_suffix: str | None = None

        self._warn_of_plain_http(find_base_url(base_url), stacklevel=4)

    def __enter__(self) -> NoReturn:
        raise TypeError("a Session is asynchronous: use `async with`, not `with`")

    def __exit__(self, *exc_info: object) -> None:
        """Never called: it lets `with` reach the error of `__enter__`."""

    async def __aenter__(self) -> Self:
        """Open the session, or reopen it if it was closed."""
        if (client := self._client) is not None and client.lifetime.is_closing():
            await self._wait_closed(client)
        self._closed = False
        self._open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the session."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close the session: every wait and call in it ends with `SessionClosed`.

        Raises a `RuntimeError` if the session is open in another event loop.
        """
        client = self._client
        if client is not None:
            client.lifetime.close()
        self._closed = True
        if client is not None:
            await self._wait_closed(client)

    async def _wait_closed(self, client: Client) -> None:
        await client.lifetime.wait_closed()
        if self._client is client:
            self._client = None

    def _open(self, execution_id: int | None = None) -> Client:
        """Return the open client; the first use opens it. Errors carry the execution's id."""
        if self._closed:
            raise SessionClosed(execution_id=execution_id)
        try:
            with self._opening:
                client = self._client = self._current_client() or self._connect()
            client.lifetime.check_open()
        except (ConfigurationError, SessionClosed) as error:
            error.execution_id = execution_id
            raise
        return client

    def _current_client(self) -> Client | None:
        """Return the open client, unless its event loop is closed: then another one may open it."""
        client = self._client
        if client is None or client.lifetime.has_lost_loop():
            return None
        return client

    def _warn_of_plain_http(self, base_url: str, *, stacklevel: int) -> None:
        if not self._has_warned and sends_in_the_clear(base_url):
            self._has_warned = True
            warnings.warn(
                f"{base_url} is plain http: anyone on the network path can read the API key and"
                " every output. Use https, or a loopback address",
                stacklevel=stacklevel,
            )

    def _connect(self) -> Client:
        """Make the parts of an open session, in the running event loop. No I/O."""
        from promptlayer_exec._http.connections import Pools  # noqa: PLC0415 - aiohttp is slow
        from promptlayer_exec._http.transport import Transport  # noqa: PLC0415
        from promptlayer_exec._push.channels import Push  # noqa: PLC0415

        settings = self._settings
        api_key = self._api_key()
        base_url = find_base_url(settings.base_url)
        self._warn_of_plain_http(base_url, stacklevel=2)  # the environment may have changed

        proxy = None if settings.http is not None else find_proxy(settings, base_url)
        password = None if proxy is None else URL(proxy).password
        resources = AsyncExitStack()
        transport = Transport(
            settings=settings,
            pools=Pools.open(settings, api_key, proxy, resources),
            base_url=base_url,
            redactor=Redactor((api_key,)).also(password),
            throttle=Throttle(settings.rate, self._limiters),
            emit=self._emit,
        )
        lifetime = Lifetime(resources)

        async def send_control_request(request: Request, read: Callable[[Response], T]) -> T:
            return (await transport.send(request, read, Attempt(clock(), is_control=True))).value

        definitions = Definitions(
            send_control_request, partial(lifetime.spawn, name="promptlayer_exec.Definition")
        )
        client = Client(
            settings=settings,
            lifetime=lifetime,
            base_url=base_url,
            redactor=transport.redactor,
            retrying=Retrying(transport.send, settings.retry, self._recent_starts, self._emit),
            recent_starts=self._recent_starts,
            node_maps=self._node_maps,
            early_wake_ups=self._early_wake_ups,
            callbacks=self._callbacks,
            definitions=definitions,
            emit=self._emit,
        )

        if settings.backplane is not None:
            namespace = _digest(api_key, f"backplane {base_url}")
            client.backplane = settings.backplane.connect(client, namespace)
            resources.push_async_callback(client.backplane.aclose)
            self._callbacks.share = client.backplane.called_back
        if settings.starts is not None:
            client.keyed_starts = self._keyed_starts(settings.starts, lifetime, base_url, resources)

        suffix = self._push_suffix()
        if suffix is not None:
            client.push = Push(
                suffix=suffix,
                is_eager=settings.push is True,
                free_sockets=transport.pools.sockets,
                call=send_control_request,
                connect=partial(transport.open_websocket, "/connection/websocket"),
                find_id=definitions.find_id,
                wake=partial(client.wake, source="push"),
                early_wake_ups=self._early_wake_ups,
                redact=transport.redactor.redact,
                spawn=partial(lifetime.spawn, name="promptlayer_exec.Push"),
            )
        return client

    def _keyed_starts(
        self, store: StartStore, lifetime: Lifetime, base_url: str, resources: AsyncExitStack
    ) -> KeyedStarts:
        close = getattr(store, "aclose", None)  # the store of an app may have nothing to close
        if close is not None:
            resources.push_async_callback(close)

        callbacks = self._settings.callbacks
        return KeyedStarts(
            store=store,
            server=base_url,
            request_timeout=self._settings.request_timeout,
            is_recoverable=lambda token: callbacks is not None and callbacks.is_genuine(token),
            lifetime=lifetime,
            emit=self._emit,
        )

    def _api_key(self) -> str:
        api_key = find_api_key(self._settings.api_key)
        if api_key is None:
            raise ConfigurationError(
                "there is no API key. Create one in PromptLayer's settings, then set"
                " PROMPTLAYER_API_KEY or pass api_key= to Session"
            )
        return api_key

    def _push_suffix(self) -> str | None:
        """Return what each start carries, so that its completion is pushed to this session."""
        if self._settings.push is False:
            return None
        if self._shared_suffix is not None:
            return self._shared_suffix
        if self._settings.backplane is None:
            return self._own_suffix
        # The same in all processes that share the backplane.
        return _digest(self._api_key(), f"push {find_base_url(self._settings.base_url)}")

    @overload
    async def get_results(
        self, execution_id: int | str, *, return_all_outputs: Literal[False] = False
    ) -> MainOutput: ...

    @overload
    async def get_results(
        self, execution_id: int | str, *, return_all_outputs: Literal[True]
    ) -> Snapshot: ...

    @overload
    async def get_results(
        self, execution_id: int | str, *, return_all_outputs: bool
    ) -> MainOutput | Snapshot: ...

    async def get_results(
        self, execution_id: int | str, *, return_all_outputs: bool = False
    ) -> MainOutput | Snapshot:
        """Return an execution's results as they are now, with one GET.

        https://docs.promptlayer.com/reference/get-workflow-version-execution-results

        Args:
            execution_id: an int from 1 to 2**63-1, or a string of its digits.
            return_all_outputs: True returns every node, False only the main output.

        Raises:
            TypeError: `execution_id` is neither an int nor a string of digits.
            ValueError: `execution_id` is out of range.
            RequestError: the server refused, or could not be reached.
            ExecutionTimeout: the session's `wait_timeout` passed.
            SessionClosed: the session was closed.
        """
        execution_id = check_execution_id(execution_id)
        client = self._open(execution_id)
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
        key: str | None = None,
    ) -> Execution:
        """Start a run, and return its handle.

        The request is sent again only if it provably never reached the server, or was refused with
        429. If this call is cancelled later than that, the session still reads the answer, emits
        `ExecutionStarted(abandoned=True)` and logs a warning with the id.

        https://docs.promptlayer.com/reference/run-workflow

        Args:
            workflow: its name or id.
            inputs: its input variables: a mapping, or an attrs, dataclass or pydantic instance.
            label: the label of the version to run; not allowed with `version`.
            version: the number of the version to run; not allowed with `label`.
            metadata: strings to store with the run.
            callback_url: where the server posts the final output.
            key: happens once: if a start with this key has been sent, in whatever process, you get
                the handle of its run, and nothing is sent. Needs `Session(starts=...)`.

        Raises:
            TypeError: an argument or a value in the inputs has an unsupported type.
            ValueError: an argument or a value in the inputs cannot be sent.
            InvalidInputs: inputs that the workflow requires are missing.
            KeyConflict: the key belongs to another request.
            ConfigurationError: the database of `starts` cannot be used; no run was started.
            StartUnknown: the answer was lost, so the run may have started; it is never repeated.
            StatusError: the server refused.
            ConnectionFailed: the server could not be reached.
            ExecutionTimeout: the request could not be sent within the session's `wait_timeout`.
            SessionClosed: the session was closed; with the execution's id if it had started.
        """
        inputs = {} if inputs is None else inputs
        self._check_keys_are_kept(key)
        return await self._start(
            StartRequest(workflow, inputs, label, version, metadata, callback_url, key)
        )

    @overload
    async def run(
        self,
        workflow: str | int,
        inputs: Any = None,
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
        key: str | None = None,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> Any: ...

    @overload
    async def run(
        self,
        workflow: str | int,
        inputs: Any = None,
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
        key: str | None = None,
        timeout: float | EllipsisType | None = ...,
        into: TypeForm[OutputT],
    ) -> OutputT: ...

    @naming_arguments
    async def run(
        self,
        workflow: str | int,
        inputs: Any = None,
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
        key: str | None = None,
        timeout: float | EllipsisType | None = ...,
        into: Any = None,
    ) -> Any:
        """Start a run, wait until it is complete, and return its main output.

        `start` and `Execution.output` in one, with their arguments and errors; `timeout` is for
        both together. Once the run has started, errors carry its id, and cancelling this call logs
        a warning with the id.
        """
        if into is not None:
            _structuring.check_type(into, self._settings.converter)
        timeout = check_timeout(timeout)

        inputs = {} if inputs is None else inputs
        self._check_keys_are_kept(key)
        request = StartRequest(workflow, inputs, label, version, metadata, callback_url, key)
        deadline = self._settings.deadline(timeout, now=clock())
        execution = await self._start(request, deadline)
        return await execution._deliver(deadline, into)

    @naming_arguments
    async def workflow(
        self, workflow: str | int, *, label: str | None = None, version: int | None = None
    ) -> Workflow:
        """Return one version of a workflow: its required inputs, nodes and edges.

        https://docs.promptlayer.com/reference/get-workflow

        The arguments are those of `start`; without a label and a version, it is the latest one. The
        errors are those of `get_results`.
        """
        request = workflow_request(workflow, label, version)
        client = self._open()
        return await client.workflow(workflow, request, client.deadline())

    def workflows(
        self,
        *,
        sort_by: Literal["created_at", "updated_at", "name", "id"] | None = None,
        sort_order: Literal["asc", "desc"] | None = None,
        external_source: str | None = None,
        external_id: str | None = None,
    ) -> AsyncGenerator[WorkflowSummary, None]:
        """Yield every workflow of the workspace, requesting a page of 100 when it is needed.

        https://docs.promptlayer.com/reference/list-workflows

        Args:
            sort_by: the field to sort by; None: the server's default.
            sort_order: the direction; None: `desc`.
            external_source: only workflows with an id of this source; needs `external_id`.
            external_id: only workflows with this id in `external_source`.

        Raises:
            PromptLayerExecError: as for `get_results`, for each page.
        """
        parameters = workflows_filter(sort_by, sort_order, external_source, external_id)
        return list_workflows(self._open, parameters)

    async def _start(
        self,
        request: StartRequest,
        deadline: Deadline | None = None,
        hooks: SendHooks | None = None,
        token: str | None = None,
    ) -> Execution:
        """Start a run; with `hooks`, its caller records itself what happens to the start."""
        if request.key is not None and hooks is None and self._settings.starts is not None:
            return await self._start_once(request, deadline)

        try:
            posted, token = with_callback_url(request, self._settings.callbacks, token)
            inputs = self._encode_inputs(posted)
            http_request = run_request(posted, inputs, self._push_suffix())
            client = self._open()
            deadline = deadline or client.deadline()
            if self._settings.check_inputs:
                await client.check_inputs(request, inputs, deadline)
        except (Exception, asyncio.CancelledError) as error:
            self._emit(StartFailed(None, request, error))
            raise

        response = await client.start(request, http_request, deadline, token=token, hooks=hooks)
        return Execution(
            self, response.execution_id, request.workflow, response.warning, request.key
        )

    async def _start_once(self, request: StartRequest, deadline: Deadline | None) -> Execution:
        """Start a run with a key, or return the handle of the run that the key stands for."""
        try:
            key = check_key(request.key)
            inputs = self._encode_inputs(request)
            run_request(request, {})  # checks all the rest
            client = self._open()
        except Exception as error:
            self._emit(StartFailed(None, request, error))
            raise

        deadline = deadline or client.deadline()
        asked_for = fingerprint(
            key,
            workflow=request.workflow,
            inputs=inputs,
            label=request.label,
            version=request.version,
            metadata=request.metadata,
        )

        async def send(hooks: SendHooks, token: str) -> Execution:
            return await self._start(request, deadline, hooks, token)

        keyed_starts = cast(KeyedStarts, client.keyed_starts)
        # No callback comes for a start with a callback URL of the caller's own.
        token = self._new_token() if request.callback_url is None else uuid4().hex
        found = await keyed_starts.start(request, asked_for, token, send, deadline)
        if isinstance(found, Execution):
            return found

        # The server may still answer 404 for it.
        execution_id = cast(int, found.execution_id)
        self._recent_starts.add(execution_id, request.workflow, now=clock() - found.age)
        execution = Execution(self, execution_id, request.workflow, key=key)
        execution._is_repeated = True
        return execution

    def _check_keys_are_kept(self, key: str | None) -> None:
        if key is not None and self._settings.starts is None:
            raise ConfigurationError(
                "key= needs a record of starts. Pass"
                " starts=promptlayer_exec.starts.SQLStartStore() to Session. That needs"
                f" {install_hint('starts')}"
            )

    def _new_token(self) -> str:
        """Return a unique token for a start's callback URL."""
        callbacks = self._settings.callbacks
        return uuid4().hex if callbacks is None else callbacks.new_token()

    async def recover(
        self, error: StartUnknown, *, timeout: float | EllipsisType | None = ...
    ) -> Execution:
        """Wait for the callback of a start whose answer was lost; it is never started again.

        This session must receive the callback with `promptlayer_exec.fastapi`, now or earlier.
        The error may come from another session with the same `Callbacks(url, secret=...)`.

        Args:
            error: what `start` raised, or an unpickled copy of it.
            timeout: seconds; `...` means the session's `wait_timeout`, None no limit.

        Raises:
            StartUnknown: no callback came in time; the run may still exist.
            ValueError: the start had no callback URL of its own, or one with another secret.
            SessionClosed: the session was closed.
        """
        token = recoverable_token(error, self._settings.callbacks)
        timeout = check_timeout(timeout)
        client = self._open()
        execution_id = await client.recover(error, token, client.deadline(timeout))
        return Execution(self, execution_id, error.workflow, key=error.key)

    def _encode_inputs(self, request: StartRequest) -> dict[str, Any]:
        """Return a start's inputs in JSON form."""
        return _structuring.encode_inputs(request.inputs, self._settings.converter)

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
        generator in `contextlib.aclosing` to stop early; executions go on at the server. Where it
        raises, the items in flight are yielded first, with that error if they are cancelled.

        Args:
            items: ids, `Execution` handles and `StartRequest`s, as an iterable or async iterable.
                The next item is taken when a slot is free.
            max_in_flight: how many items may be in flight or waiting to be yielded.
            timeout: seconds for each item, from when it is taken; `...` means the session's
                `wait_timeout`, None no limit. The answer to a start that was sent is still read.
            into: the type of the outputs, as for `Execution.output`.

        Raises:
            Unauthorized: the server refused the key, so no later item could succeed.
            SessionClosed: the session was closed.
            Exception: `items` raised it.
        """
        return outcomes_of(self, items, max_in_flight=max_in_flight, timeout=timeout, into=into)

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

        Arguments and errors are those of `as_completed`; after an error, no outcome is returned.
        """
        return await collected(
            outcomes_of(self, items, max_in_flight=max_in_flight, timeout=timeout, into=into)
        )

    def stream_all(
        self,
        items: Iterable[int | str | Execution],
        *,
        timeout: float | EllipsisType | None = ...,
    ) -> AsyncGenerator[tuple[Execution, Snapshot], None]:
        """Follow many executions in one loop: yield each with its snapshot on every poll.

        Each execution's snapshots are those of `Execution.stream`, the complete one last. The
        generator ends when all are complete. An execution that cannot be followed does not end the
        others: its error is raised after them. Wrap the generator in `contextlib.aclosing` to stop
        early.

        Args:
            items: ids and `Execution` handles; repeated ones count once.
            timeout: seconds from the first `anext`, for all together; `...` means the session's
                `wait_timeout`, None no limit.

        Raises:
            ExecutionTimeout: an execution was not complete in time; it continues on the server.
            RequestError: an execution could not be followed. Of several errors, the first is
                raised, with the others as notes.
            Unauthorized: the server refused the key; raised immediately.
            SessionClosed: the session was closed; raised immediately.
        """
        return snapshots_of(self, items, timeout)

    def execution(self, execution_id: int | str) -> Execution:
        """Return the handle of an execution, without any I/O; its id is as for `get_results`."""
        return Execution(self, check_execution_id(execution_id))

    def wake(self, execution_id: int | str) -> bool:
        """Poll an execution now; return True if somebody follows it in this session.

        If nobody follows it yet, the wake-up is remembered for 10 minutes. Wake-ups cause at most
        two polls a second by default. Call it in the session's event loop. After closing, it raises
        `SessionClosed`.
        """
        return self._wake(check_execution_id(execution_id), "caller")

    def _wake(self, execution_id: int, source: WakeSource) -> bool:
        if self._closed:
            raise SessionClosed(execution_id=execution_id)
        if (client := self._current_client()) is not None:
            client.lifetime.check_loop()
            return client.wake(execution_id, source)
        self._early_wake_ups.add(execution_id, source)
        return False

    def __repr__(self) -> str:
        if (client := self._client) is not None and not client.lifetime.is_closing():
            return f"<Session {client.base_url}, open>"
        return "<Session, not open>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Session has an API key and connections, so it cannot be pickled or copied"
        )
