"""The simulator: what a test calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, Self

import attrs
from aiohttp import web
from anyio.from_thread import start_blocking_portal
from yarl import URL

from promptlayer_exec.simulator._backend import Backend, SimRun
from promptlayer_exec.simulator._faults import Fault, FaultQueue
from promptlayer_exec.simulator._log import Log, SimRequest
from promptlayer_exec.simulator._notifications import Notifications, SimPost
from promptlayer_exec.simulator._operations import Operations, TokenBucket
from promptlayer_exec.simulator._push_server import PushServer
from promptlayer_exec.simulator._scenario import Scenario
from promptlayer_exec.simulator._workflow_bodies import ScenarioSource


class Simulator:
    """A PromptLayer server on a real socket.

    `async with` serves in the running loop, `with` in a thread of its own. Every method may be
    called from any thread, also before the simulator is entered. It may be entered again after it
    was exited: it then still has its workflows and executions, and listens on a new port unless
    `port` is given.

    The completion of a run is pushed, to the channel of its `channel_name_suffix` or else to that
    of its id, and posted to its `callback_url`; with a `webhook_url`, that of every run is posted
    there, signed. Executions of `add_execution` are not: they are like those that were started on
    PromptLayer's dashboard. Nothing is posted after the simulator is exited. With a `clock` other
    than the machine's, that happens once `state`, `finish` or a request for the results shows the
    completion, or after as many seconds as remained by `clock`.

    Args:
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        api_key: the key that requests must have in `X-API-KEY`.
        clock: returns the time in seconds, and never runs backwards; all node durations and the
            rate limit follow it.
        log_requests: whether `requests` keeps every request; `request_count` always counts.
        on_request: called with each request before it is answered, in the thread that serves.
        push_limit_bytes: the size in bytes of the longest completion message that is pushed with
            its output; a longer one says `EXCEEDS_SIZE_LIMIT`. The limit of PromptLayer's own
            server is unknown.
        webhook_url: where to post a webhook when a run is complete; None: nowhere.
        webhook_secret: signs the webhooks.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str = "simulator-key",
        clock: Callable[[], float] = time.monotonic,
        log_requests: bool = True,
        on_request: Callable[[SimRequest], None] | None = None,
        push_limit_bytes: int = 64 * 1024,
        webhook_url: str | None = None,
        webhook_secret: str = "simulator-secret",  # noqa: S107 - of a simulator
    ) -> None:
        self.api_key = api_key
        self.webhook_secret = webhook_secret
        self._host = host
        self._port = port

        self._log = Log("requests", log_requests, on_request)
        self._faults = FaultQueue()
        self._backend = Backend(clock)
        push_server = PushServer()

        self._notifications = Notifications(
            self._backend, push_server, self._faults, push_limit_bytes, webhook_url, webhook_secret
        )
        self._operations = Operations(
            api_key, clock, self._backend, self._log, push_server, self._notifications, self._faults
        )

        self._running: tuple[asyncio.Server, web.Server] | None = None
        self._thread = ExitStack()

    @property
    def base_url(self) -> str:
        """The URL of the server, without a trailing slash.

        Raises:
            RuntimeError: the simulator is not running.
        """
        if self._running is None:
            raise RuntimeError("the simulator is not running: enter it with `with` or `async with`")
        port = self._running[0].sockets[0].getsockname()[1]
        return str(URL.build(scheme="http", host=self._host, port=port))

    @property
    def requests(self) -> list[SimRequest]:
        """Every request so far, the oldest first; also those that a fault affected."""
        return list(self._log.entries)

    @property
    def request_count(self) -> int:
        """The number of requests so far."""
        return self._log.count

    @property
    def webhook_url(self) -> str | None:
        """Where to post a webhook when a run is complete; setting it concerns later runs."""
        return self._notifications.webhook_url

    @webhook_url.setter
    def webhook_url(self, url: str | None) -> None:
        self._notifications.webhook_url = url

    @property
    def posts(self) -> list[SimPost]:
        """The webhooks and callbacks that were posted and answered, or failed; oldest first."""
        return list(self._notifications.posts.entries)

    @property
    def executions(self) -> list[int]:
        """The ids of all executions, the oldest first."""
        return list(self._backend.executions)

    @property
    def runs(self) -> list[SimRun]:
        """The executions that were started over HTTP, the oldest first."""
        return list(self._backend.runs)

    def add_execution(self, scenario: Scenario, *, execution_id: int | None = None) -> int:
        """Start an execution now.

        Args:
            scenario: what the execution does.
            execution_id: its id; by default the next free one from 1001 on.

        Returns:
            The execution's id.

        Raises:
            ValueError: the id is taken, or not between 1 and 2**63-1.
        """
        return self._backend.add_execution(scenario, execution_id)

    def add_workflow(
        self,
        name: str,
        scenario: ScenarioSource,
        *,
        warning: str | None = None,
        inputs: Mapping[str, str] | None = None,
        labels: Iterable[str] = (),
        definition: Scenario | None = None,
        external_ids: Mapping[str, str] | None = None,
    ) -> int:
        """Add a workflow; each `POST /workflows/{name}/run` starts an execution of it.

        It can be listed and described over HTTP, too: the nodes of its scenario are those of the
        workflow, and `after` makes its edges. As long as it has one version and no labels, every
        label and version selects that one.

        Args:
            name: its name; any characters.
            scenario: what each execution does, or a function of the input variables that returns
                it.
            warning: the warning in the answer to each start; by default, it names the declared
                inputs that are missing.
            inputs: the declared input variables: their types by name, such as
                `{"topic": "string"}`.
            labels: the release labels of its first version.
            definition: the scenario that describes the workflow; by default `scenario`, or no nodes
                if that is a function.
            external_ids: ids in other systems by source, for filtering the list.

        Returns:
            The id of the workflow, which can be used in place of its name.

        Raises:
            ValueError: the name is taken.
            TypeError: `labels` is a string.
        """
        return self._backend.add_workflow(
            name,
            labels,
            external_ids or {},
            source=scenario,
            definition=definition,
            inputs=inputs,
            warning=warning,
        )

    def add_version(
        self,
        workflow: str | int,
        scenario: ScenarioSource,
        *,
        warning: str | None = None,
        inputs: Mapping[str, str] | None = None,
        labels: Iterable[str] = (),
        definition: Scenario | None = None,
    ) -> int:
        """Add another version to a workflow; it is the latest from now on.

        Args:
            workflow: the workflow's name or id.
            scenario: as for `add_workflow`.
            warning: as for `add_workflow`.
            inputs: as for `add_workflow`.
            labels: the release labels that now belong to this version.
            definition: as for `add_workflow`.

        Returns:
            The number of the version; the first one is 1.

        Raises:
            LookupError: there is no such workflow.
            TypeError: `labels` is a string.
        """
        return self._backend.add_version(
            workflow, labels, source=scenario, definition=definition, inputs=inputs, warning=warning
        )

    def finish(
        self,
        execution_id: int,
        node: str,
        *,
        value: Any = ...,
        status: str = "SUCCESS",
        error_message: str | None = None,
        raw_error_message: Any = None,
    ) -> None:
        """End a node that is held RUNNING (`duration=None`); a QUEUED one ends when it starts.

        After a status that is not final, the node has that status and can be finished again.

        Args:
            execution_id: the execution.
            node: the name of the node.
            value: its value if it succeeded; by default the scenario's.
            status: the status it ends with.
            error_message: sent if it failed; by default the scenario's.
            raw_error_message: sent if it failed, any JSON value; by default the scenario's.

        Raises:
            LookupError: there is no such execution or node.
            ValueError: the node is already final, or ends by itself.
            TypeError: the value is not JSON.
        """
        ending: dict[str, Any] = {}
        if value is not ...:
            ending["value"] = value
        if error_message is not None:
            ending["error_message"] = error_message
        if raw_error_message is not None:
            ending["raw_error_message"] = raw_error_message

        self._backend.finish(execution_id, node, status=status, **ending)

    def state(self, execution_id: int) -> dict[str, str]:
        """Return the current status of every node by name.

        Raises:
            LookupError: there is no such execution.
        """
        states = self._backend.results(execution_id).states
        return {name: state.status for name, state in states.items()}

    def inject(self, fault: Fault, *, path: str = "") -> None:
        """Let a fault affect the next requests or posts that it concerns, after earlier faults.

        Args:
            fault: what goes wrong.
            path: what the path of a request must end in, such as `/run` for starts: a start may be
                preceded by requests of its workflow's definition.
        """
        self._faults.add(attrs.evolve(fault, path=path))

    def clear_faults(self) -> None:
        """Remove the faults that have not affected a request or post yet."""
        self._faults.clear()

    def rate_limit(
        self, requests: float | None, per: float = 1.0, burst: int | None = None
    ) -> None:
        """Answer 429 to authenticated requests beyond a rate, by a token bucket that starts full.

        A 429 has a Retry-After, in seconds and fractions, for when the next request is allowed.

        Args:
            requests: how many requests are allowed in `per` seconds; None removes the limit.
            per: seconds.
            burst: how many are allowed at once; by default `requests`, at least 1.

        Raises:
            ValueError: a number is not positive, or `burst` is below 1.
        """
        if requests is None:
            self._operations.bucket = None
            return

        if burst is None:
            burst = max(1, int(requests))
        if not (requests > 0 and per > 0 and burst >= 1):
            raise ValueError("requests and per must be positive, and burst at least 1")

        self._operations.bucket = TokenBucket(requests / per, burst)

    async def wait_for_requests(self, count: int, timeout: float = 10.0) -> None:
        """Wait until there were `count` requests in total.

        It works in any event loop; without one, `asyncio.run` does it.

        Args:
            count: the number of requests.
            timeout: seconds.

        Raises:
            TimeoutError: there were fewer requests in that time.
        """
        await self._log.wait(count, timeout)

    async def wait_for_posts(self, count: int, timeout: float = 10.0) -> None:
        """Wait until `count` webhooks and callbacks in total were posted and answered, or failed.

        Args:
            count: the number of webhooks and callbacks, repeated ones included.
            timeout: seconds.

        Raises:
            TimeoutError: there were fewer in that time.
        """
        await self._notifications.posts.wait(count, timeout)

    async def __aenter__(self) -> Self:
        if self._running is not None:
            raise RuntimeError("the simulator is already running")
        loop = asyncio.get_running_loop()
        # Cancelling the handler of a client that disconnects is what ends a stalled answer.
        server = web.Server(self._operations.handle, handler_cancellation=True, access_log=None)
        self._running = await loop.create_server(server, self._host, self._port), server
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._running is not None:
            await _stop(*self._running)
            await self._notifications.stop()
            self._running = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(portal.wrap_async_context_manager(self))
            self._thread = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.close()


async def _stop(listener: asyncio.Server, server: web.Server) -> None:
    """Stop listening, and abort every connection."""
    # asyncio must first hand over accepted connections, which `close` would leak.
    for listening in listener.sockets:
        with suppress(NotImplementedError):  # on Windows
            asyncio.get_running_loop().remove_reader(listening.fileno())
    for _ in range(3):
        await asyncio.sleep(0)
    listener.close()

    while connections := server.connections:
        for connection in connections:
            if connection.transport is not None:
                connection.transport.abort()
        await asyncio.sleep(0)
