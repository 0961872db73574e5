"""The session: its settings, how it opens and closes, and how it wires its parts together."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import threading
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, Never, NoReturn, Self, TypeVar, cast, overload
from uuid import uuid4

import attrs
import cattrs
from yarl import URL

from promptlayer_exec import _structuring
from promptlayer_exec._api.catalog import workflow_request, workflows_filter
from promptlayer_exec._api.redaction import Redactor
from promptlayer_exec._api.runs import run_request
from promptlayer_exec._engine.abandoned import AbandonedRuns
from promptlayer_exec._engine.callbacks import recoverable_token, with_callback_url
from promptlayer_exec._engine.client import Client, list_workflows
from promptlayer_exec._engine.memory import Memory
from promptlayer_exec._engine.network import Network
from promptlayer_exec._engine.recorded_sends import RecordedSends, with_key
from promptlayer_exec._engine.send import AlreadyClaimed, PreparedSend, SendHooks
from promptlayer_exec._engine.settings import (
    Settings,
    find_api_key,
    find_base_url,
    find_proxy,
    sends_in_the_clear,
)
from promptlayer_exec._engine.tasks import clock
from promptlayer_exec._http.throttle import Throttle
from promptlayer_exec._install import install_hint
from promptlayer_exec._session.combined_stream import snapshots_of
from promptlayer_exec._session.execution import Execution
from promptlayer_exec._session.fanout import Outcome, fan_out
from promptlayer_exec._values.arguments import (
    check_execution_id,
    hiding_unknown,
    unexpected_argument,
)
from promptlayer_exec._values.errors import (
    ConfigurationError,
    SessionClosed,
    StartUnknown,
)
from promptlayer_exec._values.events import (
    CallEnded,
    CallStarted,
    Emit,
    Observer,
    StartFailed,
    WakeSource,
    broadcast,
)
from promptlayer_exec._values.models import MainOutput, Snapshot, StartRequest
from promptlayer_exec._values.policies import (
    Deadline,
    Limiter,
    PollPolicy,
    RetryPolicy,
    check_timeout,
)
from promptlayer_exec._values.start_records import StartStore, StoredStart, check_key
from promptlayer_exec._values.workflow import InputsT, OutputT, Workflow, name_of
from promptlayer_exec._values.workflow_definition import WorkflowDefinition, WorkflowSummary

if TYPE_CHECKING:
    import aiohttp
    from typing_extensions import TypeForm

    from promptlayer_exec._engine.backplane import Backplane
    from promptlayer_exec.webhooks import Callbacks

T = TypeVar("T")
ItemT = TypeVar("ItemT")


def _digest(api_key: str, what: str) -> str:
    """Return a name that only processes with the key can compute, and that does not reveal it."""
    return hmac.digest(api_key.encode(), what.encode(), "sha256").hex()[:32]


@attrs.frozen
class _Reporting:
    """Emits `StartFailed` for an error before `SendOnce`, which emits its own."""

    _request: StartRequest
    _emit: Emit

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception | asyncio.CancelledError):
            self._emit(StartFailed(None, self._request, error))


class CalledRun:
    """The run of a call, once it has started."""

    execution: Execution[Any] | None = None


class Session:
    """Starts and follows the executions of one PromptLayer workspace.

    Share one session, because all its calls use the same connections, rate and pollers::

        async with Session() as session:  # the key is in $PROMPTLAYER_API_KEY
            print(await session.run("write-report", {"topic": "otters"}))

    Use it with `async with`. You can also let its first call open it, and close it with
    `await session.aclose()`.

    Creating a session does no I/O and needs no running event loop. You may enter it in one task and
    close it in another, and enter a closed one again, even in another event loop. If its event loop
    stops first, the session closes with it, and opens again in the next one.

    Args:
        api_key: the workspace's key. By default `$PROMPTLAYER_API_KEY`, which the session reads
            again when it opens.
        base_url: the server's URL, with an optional path prefix. By default
            `$PROMPTLAYER_BASE_URL`, or else https://api.promptlayer.com.
        poll: when to poll an execution again.
        retry: which failures to retry, and for how long.
        wait_timeout: the default timeout of every wait, in seconds, or None for no limit.
        request_timeout: seconds for one HTTP attempt, from connecting to the last byte. Waiting for
            the rate or for a connection does not count.
        max_connections: the most requests in flight. A quarter of them, at least one, is reserved
            for start requests, and an eighth, from one to four, for push and definitions.
        max_response_bytes: the largest response body, in bytes after decompression.
        rate: HTTP attempts per second, for the whole session, or None for no limit.
        limiter: an additional limit, which the session acquires once per HTTP attempt.
        http: an `aiohttp.ClientSession` to borrow, with its proxy, TLS and headers. You close it.
        converter: the cattrs converter for inputs and outputs, instead of a strict one from
            `promptlayer_exec.strict_converter`. Node maps never go through it.
        observers: functions that the session calls with every event.
        push: whether PromptLayer's push channel wakes the watches of runs that this session
            started. None: once a run of the workflow outlasts its first poll, or a second one
            starts. True: from the first run on, with a warning if push is unavailable. False:
            never. `$PROMPTLAYER_EXEC_PUSH` sets the default, 1 or 0. The value 0 also overrides
            True.
        check_inputs: whether `start` raises `InvalidInputs` if required inputs are missing.
        trust_env: whether to use HTTP_PROXY, HTTPS_PROXY and NO_PROXY, read when the session opens.
            A borrowed `http` has its own setting.
        callbacks: a `promptlayer_exec.webhooks.Callbacks`, which gives each run its own callback
            URL, so that `recover` can find the run.
        backplane: a `promptlayer_exec.redis.RedisBackplane`, through which sessions of other
            processes share watches, new runs, wake-ups and callbacks.
        starts: a `promptlayer_exec.starts.SQLStartStore`, which records the run of each key, so
            that each key starts only one run.

    Raises:
        ConfigurationError: a setting is malformed. A missing key raises it in the first call.
    """

    @hiding_unknown
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
        **_unknown: Never,
    ) -> None:
        if _unknown:
            raise unexpected_argument("Session", _unknown)

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
        self._opening = threading.Lock()  # two threads, each with its own loop, may open it
        self._closed = False
        self._has_warned = False

        # These outlive a client:
        self._emit = broadcast(observers)
        self._memory = Memory.empty(retry, self._emit)

        # PromptLayer pushes the completions of this session's runs to the first channel. The
        # session shares the second one with the other workers of a batch.
        self._own_suffix = secrets.token_hex(16)
        self._shared_suffix: str | None = None

        self._warn_of_plain_http(find_base_url(base_url), stacklevel=3)

    def __enter__(self) -> NoReturn:
        raise TypeError("a Session is asynchronous: use `async with`, not `with`")

    def __exit__(self, *exc_info: object) -> None:
        """Never runs, but without it `with` would not reach the error in `__enter__`."""

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
        """Close the session: every wait and call in it raises `SessionClosed`.

        Raises:
            RuntimeError: the session is open in another event loop.
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
        """Return the open client, or open one. Errors carry the execution's id."""
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
        """Open the network, and make a client of it in the running event loop. No I/O."""
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

        open_push = None
        suffix = self._push_suffix()
        if suffix is not None:
            open_push = partial(
                Push,
                suffix=suffix,
                is_eager=settings.push is True,
                free_sockets=transport.pools.sockets,
                connect=partial(transport.open_websocket, "/connection/websocket"),
                redact=transport.redactor.redact,
            )

        network = Network(
            base_url=base_url,
            namespace=_digest(api_key, f"backplane {base_url}"),
            redactor=transport.redactor,
            send=transport.send,
            open_push=open_push,
            resources=resources,
        )
        return Client(settings, network, self._memory, self._emit)

    def _api_key(self) -> str:
        api_key = find_api_key(self._settings.api_key)
        if api_key is None:
            raise ConfigurationError(
                "there is no API key",
                advice="Create one in PromptLayer's settings, then set PROMPTLAYER_API_KEY or pass"
                " api_key= to Session.",
                setting="api_key",
            )
        return api_key

    def _push_suffix(self) -> str | None:
        """Return the channel suffix to send, so that PromptLayer pushes to this session."""
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
        """Return an execution's current results, with one GET.

        https://docs.promptlayer.com/reference/get-workflow-version-execution-results

        Args:
            execution_id: an int from 1 to 2**63-1, or a string of its digits.
            return_all_outputs: True returns every node, False only the main output.

        Raises:
            TypeError: `execution_id` is neither an int nor a string of digits.
            ValueError: `execution_id` is out of range.
            RequestError: the server refused the request, or was unreachable.
            ExecutionTimeout: the session's `wait_timeout` passed.
            SessionClosed: the session was closed.
        """
        execution_id = check_execution_id(execution_id)
        client = self._open(execution_id)
        if return_all_outputs:
            return await client.snapshot(execution_id, client.deadline())
        return await client.main_output(execution_id, client.deadline())

    @hiding_unknown
    async def start(
        self,
        workflow: str | int | Workflow[OutputT, InputsT],
        inputs: InputsT | None = None,
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
        key: str | None = None,
        timeout: float | EllipsisType | None = ...,
        **_unknown: Never,
    ) -> Execution[OutputT]:
        """Start a run, and return its handle.

        Save the handle's `id`: any process can pick up the run with it::

            execution = await session.start("write-report", {"topic": "otters"})
            print(execution.id)
            report = await execution.output()

        The session resends the request only if PromptLayer certainly did not start a run: the
        request never reached it, or it returned 429. If you cancel the call after the session has
        sent the request, it still reads the response, emits `ExecutionStarted(abandoned=True)` and
        logs a warning with the id.

        https://docs.promptlayer.com/reference/run-workflow

        Args:
            workflow: its name, its id, or a `Workflow`, which also has the type of its output.
            inputs: its input variables, as a mapping or an attrs, dataclass or pydantic instance.
            label: the label of the version to run, not allowed with `version`.
            version: the number of the version to run, not allowed with `label`.
            metadata: strings to store with the run, added to those of a `Workflow`.
            callback_url: the URL to which the server posts the final output.
            key: a key that starts only one run. If any process has already used it, you get the
                handle of that run, and the session sends nothing. Needs `Session(starts=...)`.
            timeout: seconds for everything before the session sends the request. With a key, also
                for the response: the request then continues, and the same call picks up its run.
                Without one, the session waits for the response, because its id would be lost. `...`
                means the session's `wait_timeout`, and None no limit.

        Raises:
            TypeError: an argument or a value in the inputs has an unsupported type, or the inputs
                are an instance of another class than the `Workflow` takes.
            ValueError: an argument is out of range, or JSON cannot represent a value in the inputs.
            InvalidInputs: required inputs are missing.
            KeyConflict: the key belongs to a different request.
            StoreUnavailable: the database of `starts` is unavailable, so no run was started.
            StartUnknown: the response was lost, so the run may have started. The session never
                resends it.
            StatusError: the server refused the request.
            ConnectionFailed: the session could not reach the server.
            ExecutionTimeout: the session could not send the request in time, so no run was started.
                With a key: or no response arrived in time.
            SessionClosed: the session was closed. If the run started, the error has its id.
        """
        if _unknown:
            raise unexpected_argument("Session.start", _unknown)

        timeout = check_timeout(timeout)
        self._check_keys_are_kept(key)
        request = StartRequest(workflow, inputs, label, version, metadata, callback_url, key)
        return await self._start(request, self._settings.deadline(timeout, now=clock()))

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
        workflow: Workflow[OutputT, InputsT],
        inputs: InputsT | None = None,
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
        key: str | None = None,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> OutputT: ...

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

    @hiding_unknown
    async def run(
        self,
        workflow: str | int | Workflow[Any, Any],
        inputs: Any = None,
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
        key: str | None = None,
        timeout: float | EllipsisType | None = ...,
        into: Any = None,
        **_unknown: Never,
    ) -> Any:
        """Start a run, wait until it is complete, and return its main output.

        With `into`, the output arrives as that type::

            @attrs.define
            class Report:
                title: str
                score: float

            report = await session.run("write-report", {"topic": "otters"}, into=Report)

        This is `start` and `Execution.output` in one call, with their arguments and errors. Once
        the run has started, errors carry its id. If you cancel the call, a warning in the log has
        the id.

        Args:
            workflow: its name, its id, or a `Workflow`.
            inputs: its input variables.
            label: the label of the version to run.
            version: the number of the version to run.
            metadata: strings to store with the run.
            callback_url: the URL to which the server posts the final output.
            key: a key that starts only one run.
            timeout: seconds for both together. `...` means the session's `wait_timeout`, and None
                no limit.
            into: the type of the output, as for `Execution.output`. A `Workflow` has its own.

        Raises:
            PromptLayerExecError: as for `start` and `Execution.output`.
            TypeError: as for `start`, or `into` is not a type that values can be structured into.
            ValueError: as for `start`, or `timeout` is negative.
        """
        if _unknown:
            raise unexpected_argument("Session.run", _unknown)

        timeout = check_timeout(timeout)
        self._check_keys_are_kept(key)
        request: StartRequest[Any, Any] = StartRequest(
            *(workflow, inputs, label, version, metadata, callback_url, key),
            into=Any if into is None else into,
        )

        deadline = self._settings.deadline(timeout, now=clock())
        with self._calling(request) as call:
            call.execution = await self._start(request, deadline)
            return await call.execution._deliver(deadline)

    @hiding_unknown
    async def definition(
        self,
        workflow: str | int | Workflow[Any, Any],
        *,
        label: str | None = None,
        version: int | None = None,
        **_unknown: Never,
    ) -> WorkflowDefinition:
        """Return one version of a workflow: its required inputs, nodes and edges.

        https://docs.promptlayer.com/reference/get-workflow

        Args:
            workflow: its name, its id, or a `Workflow`, whose version you then get.
            label: the label of the version, not allowed with `version`.
            version: the number of the version, not allowed with `label`. Without either, you get
                the latest version.

        Raises:
            PromptLayerExecError: as for `get_results`.
            TypeError: an argument has another type.
            ValueError: an argument is out of range.
        """
        if _unknown:
            raise unexpected_argument("Session.definition", _unknown)

        wanted: StartRequest[Any, Any] = StartRequest(workflow, None, label, version)
        request = workflow_request(wanted.workflow, wanted.label, wanted.version)
        client = self._open()
        return await client.read_definition(wanted.workflow, request, client.deadline())

    def workflows(
        self,
        *,
        sort_by: Literal["created_at", "updated_at", "name", "id"] | None = None,
        sort_order: Literal["asc", "desc"] | None = None,
        external_source: str | None = None,
        external_id: str | None = None,
    ) -> AsyncGenerator[WorkflowSummary, None]:
        """Yield every workflow of the workspace, with one request for each page of 100.

        https://docs.promptlayer.com/reference/list-workflows

        Args:
            sort_by: the field to sort by, or None for the server's default.
            sort_order: the direction, or None for `desc`.
            external_source: only workflows with an id from this source. Needs `external_id`.
            external_id: only workflows with this id in `external_source`.

        Raises:
            PromptLayerExecError: as for `get_results`, for each page.
        """
        parameters = workflows_filter(sort_by, sort_order, external_source, external_id)
        return list_workflows(self._open, parameters)

    async def _start(
        self,
        request: StartRequest[OutputT, Any],
        deadline: Deadline | None = None,
        *,
        hooks: SendHooks | None = None,
        token: str | None = None,
        abandoned: AbandonedRuns | None = None,
    ) -> Execution[OutputT]:
        """Start a run, or return the handle of the run that its key has already started.

        With `hooks`, the caller records the run instead of the start store. `abandoned` gathers the
        run for the log if the call is interrupted.
        """
        has_key = request.key is not None and self._settings.starts is not None
        is_recorded = has_key and hooks is None

        with _Reporting(request, self._emit):
            if is_recorded:
                check_key(request.key)
            prepared = self._prepare(request, token, is_recorded=is_recorded)
            client = self._open()
            deadline = deadline or client.deadline()

        send = partial(self._send, client, prepared, deadline, abandoned)
        if not is_recorded:
            return await send(hooks, is_recorded=False)

        sends = cast(RecordedSends, client.recorded_sends)
        claim = sends.claim(prepared)
        while True:
            with _Reporting(request, self._emit):
                record = await sends.settled(claim.key, deadline, claim)
            if record is not None:
                return self._repeated(request, record)

            # If another process is quicker, look at its record.
            with suppress(AlreadyClaimed), sends.sending(claim) as recording:
                return await send(recording, is_recorded=True)

    def _prepare(
        self, request: StartRequest, token: str | None, *, is_recorded: bool
    ) -> PreparedSend:
        """Check a request, and encode it once for everything that needs it."""
        self._check_type(request.into)
        posted, secret = with_callback_url(request, self._settings.callbacks, token)
        if is_recorded:
            posted = with_key(posted)
        inputs = self._encode_inputs(request)
        http_request = run_request(posted, inputs, self._push_suffix())
        return PreparedSend(request, inputs, http_request, secret)

    async def _send(
        self,
        client: Client,
        prepared: PreparedSend,
        deadline: Deadline,
        abandoned: AbandonedRuns | None,
        hooks: SendHooks | None,
        *,
        is_recorded: bool,
    ) -> Execution[Any]:
        """Check the inputs against the definition, and send the request."""
        request = prepared.request
        if self._settings.check_inputs:
            with _Reporting(request, self._emit):
                await client.check_inputs(request, prepared.inputs, deadline)

        run = await client.send(
            *(prepared, deadline, hooks), is_recorded=is_recorded, abandoned=abandoned
        )
        return Execution(
            *(self, run.execution_id, request.workflow),
            warning=run.warning,
            is_new=True,
            key=request.key,
            into=request.into,
        )

    def _repeated(self, request: StartRequest, record: StoredStart) -> Execution:
        """Return the handle of the run that a key has already started."""
        execution_id = cast(int, record.execution_id)
        # The server may still return 404 for it.
        self._memory.recent_runs.add(execution_id, request.workflow, now=clock() - record.age)

        return Execution(self, execution_id, request.workflow, key=request.key, into=request.into)

    def _check_keys_are_kept(self, key: str | None) -> None:
        if key is not None and self._settings.starts is None:
            raise ConfigurationError(
                "key= needs a store",
                advice="Pass starts=promptlayer_exec.starts.SQLStartStore() to Session. That needs"
                f" {install_hint('starts')}.",
                setting="starts",
            )

    def _new_token(self) -> str:
        """Return a unique token for a run's callback URL."""
        callbacks = self._settings.callbacks
        return uuid4().hex if callbacks is None else callbacks.new_token()

    async def find(self, key: str) -> Execution | None:
        """Return the handle of the run that a key has started, or None if nobody has used the key.

        It starts nothing. While another call is sending the request, it waits for the response, for
        the session's `wait_timeout` at most.

        Args:
            key: the key of an earlier `start`.

        Raises:
            StartUnknown: the key may have started a run, but its response was lost.
            KeyConflict: the key belongs to a run on another server.
            StoreUnavailable: the database of `starts` is unavailable.
            ExecutionTimeout: the response did not come in time.
            ConfigurationError: the session has no `starts=`.
            TypeError, ValueError: the key is malformed.
        """
        self._check_keys_are_kept(check_key(key))
        client = self._open()
        record = await cast(RecordedSends, client.recorded_sends).settled(key, client.deadline())
        if record is None:
            return None
        return self._repeated(StartRequest(record.workflow, key=key), record)

    async def recover(
        self, error: StartUnknown, *, timeout: float | EllipsisType | None = ...
    ) -> Execution:
        """After a `StartUnknown`, wait for the callback of the run, and return its handle.

        It never starts the run again. The callback must reach this session through
        `promptlayer_exec.fastapi`, before or during the call. The error may come from another
        session with the same `Callbacks(url, secret=...)`. If the start had a key, its store knows
        the run when this returns, or is unavailable: then the session keeps trying to tell it.

        Args:
            error: what `start` raised, or an unpickled copy of it.
            timeout: seconds. `...` means the session's `wait_timeout`, and None no limit.

        Raises:
            StartUnknown: no callback came in time, but the run may still exist.
            ValueError: the run has no callback URL of this package, or one signed with another
                secret.
            SessionClosed: the session was closed.
        """
        token = recoverable_token(error, self._settings.callbacks)
        timeout = check_timeout(timeout)
        client = self._open()
        execution_id = await client.recover(error, token, client.deadline(timeout))
        return Execution(self, execution_id, error.workflow, key=error.key)

    @contextmanager
    def _calling(self, request: StartRequest[Any, Any]) -> Iterator[CalledRun]:
        """Tell observers of a run as its caller sees it, from the call to its output or error."""
        call = CalledRun()
        if not self._settings.observers:
            yield call
            return

        base_url = ""
        with suppress(ConfigurationError):  # the call itself raises it
            base_url = find_base_url(self._settings.base_url)
        called_at = clock()
        self._emit(CallStarted(None, request.workflow, request.key, base_url))

        error: BaseException | None = None
        try:
            yield call
        except BaseException as raised:
            error = raised
            raise
        finally:
            execution_id = None if call.execution is None else call.execution.id
            elapsed = clock() - called_at
            self._emit(CallEnded(execution_id, request.workflow, request.key, elapsed, error))

    def _check_type(self, into: Any) -> None:
        """Check that outputs can be structured into a type, before there is one."""
        if into is not Any:
            _structuring.check_type(into, self._settings.converter)

    def _encode_inputs(self, request: StartRequest) -> dict[str, Any]:
        """Return the inputs of a request in JSON form."""
        return _structuring.encode_inputs(request.inputs, self._settings.converter)

    @overload
    def as_completed(
        self,
        items: Iterable[StartRequest[OutputT, InputsT]]
        | AsyncIterable[StartRequest[OutputT, InputsT]],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> AsyncGenerator[Outcome[StartRequest[OutputT, InputsT], OutputT], None]: ...

    @overload
    def as_completed(
        self,
        items: Iterable[Execution[OutputT]] | AsyncIterable[Execution[OutputT]],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> AsyncGenerator[Outcome[Execution[OutputT], OutputT], None]: ...

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
        """Run or follow many executions in parallel, and yield each outcome as it arrives.

        A `StartRequest` starts a run, and an id or a handle follows one::

            topics = ["otters", "beavers", "seals"]
            requests = (StartRequest("write-report", {"topic": topic}) for topic in topics)
            async for outcome in session.as_completed(requests, max_in_flight=50):
                print(outcome.item.inputs["topic"], outcome.output if outcome.ok else outcome.error)

        If an item fails, its outcome carries the `error`, and the others continue. To stop early,
        wrap the generator in `contextlib.aclosing`. Executions that have started keep running on
        PromptLayer.

        Before it raises, it yields an outcome for every item in flight. The items that it had to
        cancel carry the same error.

        Args:
            items: ids, `Execution` handles and `StartRequest`s, as an iterable or async iterable.
                The session takes the next item when a slot is free.
            max_in_flight: how many items may be in flight or waiting for you to take them.
            timeout: seconds for each item, from when the session takes it. `...` means the
                session's `wait_timeout`, and None no limit. If the session has already sent the
                request for a run, it still reads the response.
            into: the type of the outputs, as for `Execution.output`, of items that have none of
                their own from a `Workflow`.

        Raises:
            Unauthorized: the server refused the key, so no later item could succeed.
            SessionClosed: the session was closed.
            Exception: `items` raised it.
        """
        running = fan_out(self, items, max_in_flight=max_in_flight, timeout=timeout, into=into)
        return running.outcomes()

    @overload
    async def collect(
        self,
        items: Iterable[StartRequest[OutputT, InputsT]]
        | AsyncIterable[StartRequest[OutputT, InputsT]],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> list[Outcome[StartRequest[OutputT, InputsT], OutputT]]: ...

    @overload
    async def collect(
        self,
        items: Iterable[Execution[OutputT]] | AsyncIterable[Execution[OutputT]],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> list[Outcome[Execution[OutputT], OutputT]]: ...

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
        """Return the outcomes of all items, in the order of the items.

        Start two runs, and wait for both::

            requests = [StartRequest("write-report", {"topic": it}) for it in ("otters", "seals")]
            for outcome in await session.collect(requests):
                print(outcome.result())

        The arguments and errors are those of `as_completed`. If it raises, you get no outcomes, but
        a line of the log leads to every run that it started: by its key if the session has a store,
        or else by its id.
        """
        running = fan_out(self, items, max_in_flight=max_in_flight, timeout=timeout, into=into)
        return await running.collect()

    def stream_all(
        self,
        items: Iterable[int | str | Execution],
        *,
        timeout: float | EllipsisType | None = ...,
    ) -> AsyncGenerator[tuple[Execution, Snapshot], None]:
        """Follow many executions in one loop, and yield each with its snapshot on every poll.

        Each execution yields the same snapshots as `Execution.stream`, the complete one last, and
        the loop finishes when all are complete. If following one execution fails, the others
        continue, and the error comes after them. To stop early, wrap the generator in
        `contextlib.aclosing`.

        Args:
            items: ids and `Execution` handles. Duplicates count once.
            timeout: seconds for all together, from the first `anext`. `...` means the session's
                `wait_timeout`, and None no limit.

        Raises:
            ExecutionTimeout: an execution was not complete in time. It continues on PromptLayer.
            RequestError: following an execution failed. If there are several errors, you get the
                first, with the others as notes.
            Unauthorized: the server refused the key. Raised immediately.
            SessionClosed: the session was closed. Raised immediately.
        """
        return snapshots_of(self, items, timeout)

    def execution(
        self, execution_id: int | str, workflow: str | int | Workflow[OutputT, Any] | None = None
    ) -> Execution[OutputT]:
        """Return the handle of an execution, without any I/O.

        Args:
            execution_id: an int from 1 to 2**63-1, or a string of its digits.
            workflow: the workflow that it is a run of. With a `Workflow`, `output` returns its type
                of output.

        Raises:
            TypeError: `execution_id` is neither an int nor a string of digits.
            ValueError: `execution_id` is out of range.
        """
        into: Any = workflow.output if isinstance(workflow, Workflow) else Any
        name = None if workflow is None else name_of(workflow)
        return Execution(self, check_execution_id(execution_id), name, into=into)

    def wake(self, execution_id: int | str) -> bool:
        """Poll an execution now, and return True if somebody follows it in this session.

        If nobody follows it yet, the session remembers the wake-up for 10 minutes. By default,
        wake-ups cause at most two polls a second. Call it in the session's event loop.

        Args:
            execution_id: as for `get_results`.

        Raises:
            SessionClosed: the session was closed.
            RuntimeError: the session is open in another event loop.
        """
        return self._wake(check_execution_id(execution_id), "caller")

    def _wake(self, execution_id: int, source: WakeSource) -> bool:
        if self._closed:
            raise SessionClosed(execution_id=execution_id)
        if (client := self._current_client()) is not None:
            client.lifetime.check_loop()
            return client.wake(execution_id, source)
        self._memory.early_wake_ups.add(execution_id, source)
        return False

    def __repr__(self) -> str:
        if (client := self._client) is not None and not client.lifetime.is_closing():
            return f"<Session {client.base_url}, open>"
        return "<Session, not open>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "cannot pickle or copy a Session, because it has an API key and connections"
        )
