"""The simulator, as tests use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs
from aiohttp import web
from anyio.from_thread import start_blocking_portal
from yarl import URL

from promptlayer_exec.simulator._backend import Backend, SimRun
from promptlayer_exec.simulator._described import checked, required_inputs
from promptlayer_exec.simulator._faults import Fault, FaultQueue
from promptlayer_exec.simulator._log import Log, SimRequest
from promptlayer_exec.simulator._notifications import Notifications, SimPost
from promptlayer_exec.simulator._operations import Operations, TokenBucket
from promptlayer_exec.simulator._push_server import PushServer
from promptlayer_exec.simulator._scenario import Scenario
from promptlayer_exec.simulator._workflow_bodies import ScenarioSource

if TYPE_CHECKING:
    import cattrs

    from promptlayer_exec import Workflow


class Simulator:
    """A PromptLayer server on a real socket.

    `async with` serves in the running loop, `with` in a separate thread. You can call every method
    from any thread, even before you enter the simulator. After exiting, you can enter it again: its
    workflows and executions are still there. Unless you give a `port`, it then has a new one.

    Example:
        Test your code without PromptLayer::

            async with Simulator() as simulator:
                report = Scenario([SimNode("Report", "Otters are fine.", is_output_node=True)])
                simulator.add_workflow("write-report", report)
                async with Session(simulator.api_key, base_url=simulator.base_url) as session:
                    assert await session.run("write-report") == "Otters are fine."

    When a run completes, the simulator pushes a message to the channel of its
    `channel_name_suffix`, or else of its id. It also posts to the run's `callback_url` and, signed,
    to `webhook_url`, until you exit it. It does none of this for executions of `add_execution`,
    which behave like those started on PromptLayer's dashboard. With another `clock` than the
    machine's, it happens as soon as `state`, `finish` or a request for the results shows that the
    run is complete. It also happens after as many real seconds as `clock` had left.

    Args:
        host: the address to listen on.
        port: the port to listen on. 0 picks a free one.
        api_key: the key that requests must have in `X-API-KEY`.
        clock: returns the time in seconds, and never runs backwards. The durations of nodes and the
            rate limit follow it.
        log_requests: whether `requests` keeps every request. `request_count` always counts.
        on_request: a function that the serving thread calls with each request before it responds.
        push_limit_bytes: the size in bytes up to which a pushed message contains the output. A
            longer one contains `EXCEEDS_SIZE_LIMIT`. The limit of PromptLayer's own server is
            unknown.
        webhook_url: where to post a webhook when a run is complete. None: nowhere.
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
        """Every request so far, the oldest first, including those that a fault affected."""
        return list(self._log.entries)

    @property
    def request_count(self) -> int:
        """The number of requests so far."""
        return self._log.count

    @property
    def webhook_url(self) -> str | None:
        """Where to post a webhook when a run is complete. Setting it affects later runs."""
        return self._notifications.webhook_url

    @webhook_url.setter
    def webhook_url(self, url: str | None) -> None:
        self._notifications.webhook_url = url

    @property
    def posts(self) -> list[SimPost]:
        """The webhooks and callbacks that got a response or failed, the oldest first."""
        return list(self._notifications.posts.entries)

    @property
    def executions(self) -> list[int]:
        """The ids of all executions, the oldest first."""
        return list(self._backend.executions)

    @property
    def runs(self) -> list[SimRun]:
        """The executions that clients started over HTTP, the oldest first."""
        return list(self._backend.runs)

    def add_execution(self, scenario: Scenario, *, execution_id: int | None = None) -> int:
        """Start an execution now.

        Args:
            scenario: what the execution does.
            execution_id: its id. By default the next free one from 1001 on.

        Returns:
            The execution's id.

        Raises:
            ValueError: the id is in use, or not between 1 and 2**63-1.
        """
        return self._backend.add_execution(scenario, execution_id)

    def add_workflow(
        self,
        name: str | Workflow[Any, Any],
        scenario: ScenarioSource,
        *,
        warning: str | None = None,
        inputs: Mapping[str, str] | None = None,
        labels: Iterable[str] = (),
        definition: Scenario | None = None,
        external_ids: Mapping[str, str] | None = None,
        converter: cattrs.Converter | None = None,
    ) -> int:
        """Add a workflow. Each `POST /workflows/{name}/run` starts an execution of it.

        Clients can also list and describe it: its nodes are those of the scenario, and `after`
        makes its edges. As long as it has one version and no labels, every label and version
        selects that version.

        Args:
            name: its name, with any characters, or the `Workflow` of the program under test. It
                then has that label, declares the inputs that the `Workflow` requires, and refuses
                a scenario whose output does not match. If a function returns scenarios, it
                refuses them in the start request. It does not check a value that a node computes,
                or that you pass to `finish`.
            scenario: what each execution does, or a function of the input variables that returns
                it.
            warning: the warning in the response to each start request. By default, it lists the
                declared inputs that are missing, and the given ones that are not declared.
            inputs: the types of the declared input variables by name, such as
                `{"topic": "string"}`.
            labels: the release labels of its first version.
            definition: the scenario that describes the workflow. By default `scenario`, or no nodes
                if that is a function.
            external_ids: ids in other systems by source, for filtering the list.
            converter: the converter of the sessions that use the `Workflow`, if they have one.

        Returns:
            The id of the workflow, which you can use instead of its name.

        Raises:
            ValueError: the name is in use, or the output does not match the `Workflow`.
            TypeError: `labels` is a string.
        """
        if not isinstance(name, str):
            workflow, name = name, str(name.name)
            scenario = checked(workflow, scenario, converter)
            inputs = required_inputs(workflow) if inputs is None else inputs
            if workflow.label is not None and not isinstance(labels, str):
                labels = dict.fromkeys([workflow.label, *labels])
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
        """Add another version to a workflow. It becomes the latest.

        Args:
            workflow: the workflow's name or id.
            scenario: as for `add_workflow`.
            warning: as for `add_workflow`.
            inputs: as for `add_workflow`.
            labels: the release labels that now belong to this version.
            definition: as for `add_workflow`.

        Returns:
            The number of the version. The first one is 1.

        Raises:
            LookupError: the workflow does not exist.
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
        error_message: Any = None,
        raw_error_message: Any = None,
    ) -> None:
        """Finish a node that stays RUNNING (`duration=None`), or a QUEUED one when it starts.

        If `status` is not final, the node gets that status, and you can finish it again.

        Args:
            execution_id: the execution.
            node: the name of the node.
            value: its value if it succeeds. By default the scenario's.
            status: its status.
            error_message: its error message if it fails. By default the scenario's.
            raw_error_message: its raw error if it fails, any JSON value. By default the scenario's.

        Raises:
            LookupError: the execution or the node does not exist.
            ValueError: the node is already final, or finishes by itself.
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
            LookupError: the execution does not exist.
        """
        states = self._backend.results(execution_id).states
        return {name: state.status for name, state in states.items()}

    def inject(self, fault: Fault, *, path: str = "") -> None:
        """Inject a fault into the next requests or posts that match it, after earlier faults.

        Args:
            fault: what goes wrong.
            path: the last part of the path of a matching request, such as `/run` for start
                requests. A client may request the definition of the workflow first.
        """
        self._faults.add(attrs.evolve(fault, path=path or fault.path))

    def replay(self, path: str | Path) -> list[int]:
        """Respond to requests as in a recording, such as one of the command `doctor --record`.

        The responses to the same operation come in the recorded order, and the last one is
        repeated. A request for results gets the responses for the same execution. The name of the
        workflow makes no difference. A recorded start request starts no run, so nothing is pushed
        or posted. Requests without a recorded response get the usual one, and so do those without
        the API key.

        Args:
            path: an HTTP Archive (HAR 1.2). Browsers and proxies also write them.

        Returns:
            The ids of the recorded executions.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not an HTTP Archive.
        """
        return self._operations.replay.load(path)

    def clear_faults(self) -> None:
        """Remove all faults that have not affected a request or post yet."""
        self._faults.clear()

    def rate_limit(
        self, requests: float | None, per: float = 1.0, burst: int | None = None
    ) -> None:
        """Respond 429 to authenticated requests beyond a rate, with a token bucket.

        The bucket is full at first. The `Retry-After` of a 429 is the time until the next allowed
        request, with fractions of seconds.

        Args:
            requests: how many requests are allowed in `per` seconds. None removes the limit.
            per: seconds.
            burst: how many are allowed together. By default `requests`, at least 1.

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

        It works in any event loop. Without one, use `asyncio.run`.

        Args:
            count: the number of requests.
            timeout: seconds.

        Raises:
            TimeoutError: there were fewer requests in that time.
        """
        await self._log.wait(count, timeout)

    async def wait_for_posts(self, count: int, timeout: float = 10.0) -> None:
        """Wait until `count` webhooks and callbacks in total got a response, or failed.

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
        # A stalled response stops when its client disconnects, because that cancels its handler.
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
