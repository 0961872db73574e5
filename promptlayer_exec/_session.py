"""The session: how the rooms are wired together."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Literal, NoReturn, Self, TypeVar, overload

import anyio

from promptlayer_exec._errors import ConfigurationError, PromptLayerExecError, SessionClosed
from promptlayer_exec._events import Observer, broadcast
from promptlayer_exec._execution import Execution
from promptlayer_exec._lifetime import DeadlinePassed, Lifetime
from promptlayer_exec._models import MainOutput, Node, Snapshot
from promptlayer_exec._pace import Limiter, Pace
from promptlayer_exec._policies import (
    Deadline,
    Outage,
    PollPolicy,
    RetryPolicy,
    check_seconds,
    check_timeout,
)
from promptlayer_exec._settings import check_count, find_api_key, find_base_url
from promptlayer_exec._transport import Transport, open_http
from promptlayer_exec._watch import Watch, finished_nodes, follow, take_snapshot, timed_out
from promptlayer_exec._wire import (
    NodeMap,
    NodeMapReader,
    Reply,
    Request,
    Response,
    check_execution_id,
    read_main_output,
    results_request,
)

if TYPE_CHECKING:
    import aiohttp
    import cattrs

T = TypeVar("T")


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
            for a connection to be free, or for the pace, does not count.
        max_connections: how many requests may be under way at once.
        max_response_bytes: how large a response may be, after decompression.
        rate: HTTP attempts per second, over everything the session does; None: unlimited.
        limiter: a further limit, acquired once per HTTP attempt.
        http: a client session to borrow, with its proxy, TLS and headers; it is not closed.
        converter: hooks for structuring outputs; never used for the node map.
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
        find_base_url(base_url)
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
        self._limiter = limiter
        self._http = http
        self._converter = converter
        self._node_maps = NodeMapReader()
        self._emit = broadcast(observers)
        self._opening: _Opening | None = None
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
        if not return_all_outputs:
            return (await self._call(request, read_main_output)).value
        reply = await self._call(request, self._node_maps.read)
        return take_snapshot(execution_id, reply, elapsed=reply.duration)

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

    async def _call(self, request: Request, read: Callable[[Response, int], T]) -> Reply[T]:
        now = anyio.current_time()
        deadline = Deadline.after(self._wait_timeout, now=now)
        outage = Outage(self._retry, self._retry.outage)
        opening = await self._open(request.execution_id)
        try:
            return await opening.lifetime.call(
                lambda: opening.transport.call(request, read, outage, due=now), deadline
            )
        except SessionClosed as error:
            error.execution_id = request.execution_id
            raise
        except DeadlinePassed:
            raise timed_out(request.execution_id, deadline, None, outage.error) from outage.error

    def _follow(
        self, execution_id: int, timeout: float | EllipsisType | None
    ) -> AsyncGenerator[Snapshot, None]:
        return follow(*self._terms(execution_id, timeout))

    def _finished_nodes(
        self, execution_id: int, timeout: float | EllipsisType | None
    ) -> AsyncGenerator[Node, None]:
        return finished_nodes(*self._terms(execution_id, timeout))

    def _terms(
        self, execution_id: int, timeout: float | EllipsisType | None
    ) -> tuple[Callable[[], Awaitable[Watch]], float | None]:
        async def join() -> Watch:
            return (await self._open(execution_id)).join(execution_id)

        return join, self._wait_timeout if timeout is ... else check_timeout(timeout)

    async def _open(self, execution_id: int | None = None) -> _Opening:
        try:
            if self._closed:
                raise SessionClosed
            if self._opening is None:
                self._opening = self._begin()
            await self._opening.lifetime.ready()
        except PromptLayerExecError as error:
            error.execution_id = execution_id
            raise
        return self._opening

    def _begin(self) -> _Opening:
        api_key = find_api_key(self._api_key)
        if api_key is None:
            raise ConfigurationError(
                "there is no API key: set PROMPTLAYER_API_KEY or pass api_key= to Session"
            )
        resources = AsyncExitStack()
        http = self._http
        if http is None:
            http = open_http(self._max_connections)
            resources.push_async_callback(http.close)
        transport = Transport(
            http,
            base_url=find_base_url(self._base_url),
            api_key=api_key,
            pace=Pace(self._rate, self._limiter),
            retry=self._retry,
            request_timeout=self._request_timeout,
            max_connections=self._max_connections,
            max_response_bytes=self._max_response_bytes,
            emit=self._emit,
        )

        async def fetch(execution_id: int, outage: Outage, *, due: float) -> Reply[NodeMap]:
            request = results_request(execution_id, return_all_outputs=True)
            return await transport.call(request, self._node_maps.read, outage, due=due)

        def make_watch(execution_id: int, on_end: Callable[[Watch], None]) -> Watch:
            return Watch(
                execution_id,
                fetch,
                poll=self._poll,
                retry=self._retry,
                emit=self._emit,
                on_end=on_end,
            )

        return _Opening(Lifetime(resources), transport, make_watch)

    async def _settle(self, opening: _Opening) -> None:
        await opening.lifetime.wait_closed()
        if self._opening is opening:
            self._opening = None


class _Opening:
    """What a session has while it is open."""

    def __init__(
        self,
        lifetime: Lifetime,
        transport: Transport,
        make_watch: Callable[[int, Callable[[Watch], None]], Watch],
    ) -> None:
        self.lifetime = lifetime
        self.transport = transport
        self._make_watch = make_watch
        self._watches: dict[int, Watch] = {}

    def join(self, execution_id: int) -> Watch:
        """Return the execution's one watch, this follower counted; the first starts it."""
        watch = self._watches.get(execution_id)
        if watch is None:
            watch = self._watches[execution_id] = self._make_watch(execution_id, self._forget)
            self.lifetime.spawn(watch.run)
        watch.join()
        return watch

    def _forget(self, watch: Watch) -> None:
        if self._watches.get(watch.execution_id) is watch:
            del self._watches[watch.execution_id]
