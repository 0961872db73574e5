"""One run, polled until it is complete, and every response, for the checks that judge them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import attrs
from aiohttp import web

from promptlayer_exec._api.json import loads
from promptlayer_exec._api.runs import as_documented, results_request
from promptlayer_exec._doctor.exchanges import Exchange, NoResponse, Wire
from promptlayer_exec._doctor.listener import Listener
from promptlayer_exec._values.models import Node, contradicts_completion
from promptlayer_exec._values.policies import RetryPolicy


@attrs.frozen
class ObservationPolicy:
    """How a run is observed, and what counts as late. Times in seconds.

    Args:
        gap: the shortest pause between two polls. It grows as the run gets older.
        longest_gap: the longest pause.
        grace: how long sessions wait out the 404s of a run that they started.
        patience: how long polls may fail in a row, by 404s as well.
        most_bare: how many polls of a running execution ask for the main output alone.
        late: how late a pushed message may be. Sessions count later ones as missing.
        silence: how long to wait for a message once a poll has found the completion.
        callback: how long to wait for the callback then.
    """

    gap: float = 0.5
    longest_gap: float = 2.0
    grace: float = RetryPolicy().not_found_grace
    patience: float = 30.0
    most_bare: int = 3
    late: float = 2.0
    silence: float = 5.0
    callback: float = 10.0


@attrs.frozen
class Posted:
    """A request to the callback URL. `at` is on the event loop's clock."""

    at: float
    body: bytes


@attrs.define(eq=False)
class ObservedRun:
    """What was seen of a run.

    Args:
        execution_id: its id.
        start: the request that started it.
        policy: how it is observed.

    Attributes:
        polls: the polls for all nodes that got a response, of any status.
        failures: why polls got no response.
        bare: the polls for the main output alone while the run was running.
        output: the poll for the main output once the run was complete.
        listener: listens to the run's own push channel since before the request, if it can.
        other_listener: listens to the channel that only the execution's id names, if it can.
        posted: what came to the callback URL.
    """

    execution_id: int
    start: Exchange
    policy: ObservationPolicy
    polls: list[Exchange] = attrs.field(init=False, factory=list)
    failures: list[str] = attrs.field(init=False, factory=list)
    bare: list[Exchange] = attrs.field(init=False, factory=list)
    output: Exchange | None = attrs.field(init=False, default=None)
    listener: Listener | None = None
    other_listener: Listener | None = attrs.field(init=False, default=None)
    posted: Posted | None = attrs.field(init=False, default=None)

    @property
    def started_at(self) -> float:
        return self.start.sent_at + self.start.duration

    @property
    def completed_at(self) -> float | None:
        """When a poll had found the run complete, or None if none has."""
        if not self.polls or not is_completion(self.polls[-1]):
            return None
        return self.polls[-1].sent_at + self.polls[-1].duration

    @property
    def good_polls(self) -> list[Exchange]:
        """The polls that have nodes."""
        return [poll for poll in self.polls if poll.status == 202 or is_completion(poll)]

    def last_nodes(self) -> dict[str, Any]:
        """Return the decoded nodes of the last poll, none if it has no node map."""
        if not self.good_polls:
            return {}
        return nodes_in(self.good_polls[-1]) or {}

    async def poll_until_complete(self, wire: Wire, timeout: float) -> None:
        """Poll until the run is complete or takes too long, or PromptLayer refuses the poll."""
        loop = asyncio.get_running_loop()
        failing_since: float | None = None

        while loop.time() < self.started_at + timeout:
            poll = await self._poll(wire, return_all_outputs=True)
            status = 0
            if poll is not None:
                status = poll.status
                self._keep(poll)

            if poll is not None and is_completion(poll) and self._is_believed(poll):
                self.output = await self._poll(wire, return_all_outputs=False)
                return
            if status in (200, 202):
                failing_since = None
                if status == 202 and len(self.bare) < self.policy.most_bare:
                    await self._poll_bare(wire)
            elif status in {0, 404, *RetryPolicy().statuses}:
                failing_since = failing_since or loop.time()
                if loop.time() - failing_since > self.policy.patience:
                    return
            else:
                return

            age = loop.time() - self.started_at
            await asyncio.sleep(min(max(self.policy.gap, age / 30), self.policy.longest_gap))

    def _is_believed(self, poll: Exchange) -> bool:
        """Return whether a session takes the run for complete, as it does the third time."""
        return not contradicts_itself(poll) or sum(map(contradicts_itself, self.polls)) > 2

    def _keep(self, poll: Exchange) -> None:
        """Keep a poll. All that got the same body share it, since there may be hundreds."""
        if self.polls and self.polls[-1].body == poll.body:
            poll = attrs.evolve(poll, body=self.polls[-1].body)
        self.polls.append(poll)

    async def _poll_bare(self, wire: Wire) -> None:
        bare = await self._poll(wire, return_all_outputs=False)
        if bare is not None and bare.status == 202:
            self.bare.append(bare)

    async def _poll(self, wire: Wire, *, return_all_outputs: bool) -> Exchange | None:
        request = results_request(self.execution_id, return_all_outputs=return_all_outputs)
        try:
            return await wire.ask("GET", request.target)
        except NoResponse as error:
            self.failures.append(str(error))
            return None

    async def wait_for_message(self) -> None:
        """Wait for the completion's message, on whichever channel, as long as one may come."""
        listeners = [it for it in (self.listener, self.other_listener) if it and not it.lost]
        waits = [asyncio.create_task(it.wait_for(self.execution_id)) for it in listeners]
        if not waits:
            return
        await asyncio.wait(waits, timeout=self.policy.silence, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


class CallbackReceiver:
    """Waits on a port of this machine for a request to the callback URL."""

    def __init__(self) -> None:
        self._posted: asyncio.Future[Posted] = asyncio.get_running_loop().create_future()
        self._stop: Callable[[], Awaitable[None]] | None = None

    async def listen(self, port: int) -> None:
        """Begin to accept requests from this machine. Raises `OSError`."""
        server = web.Server(self._handle, access_log=None)
        runner = web.ServerRunner(server)
        await runner.setup()
        self._stop = runner.cleanup
        await web.TCPSite(runner, "127.0.0.1", port).start()

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        body = await request.content.read()  # `read` has a limit, which a node map may exceed
        if request.method == "POST" and not self._posted.done():
            self._posted.set_result(Posted(asyncio.get_running_loop().time(), body))
        return web.Response(status=204)

    async def posted(self, patience: float) -> Posted | None:
        """Return what was posted first, or None if nothing comes in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                return await asyncio.shield(self._posted)
        return None

    async def aclose(self) -> None:
        self._posted.cancel()
        if self._stop is not None:
            await self._stop()


def is_completion(poll: Exchange) -> bool:
    """Return whether a poll found the run complete."""
    return as_documented(poll.response).status == 200


def contradicts_itself(poll: Exchange) -> bool:
    """Return whether a 200 has nodes that contradict it."""
    nodes = (poll.status == 200 and node_map(poll.body)) or {}
    return contradicts_completion(
        Node(name, node["status"], is_output_node=node.get("is_output_node") is True)
        for name, node in nodes.items()
    )


def nodes_in(poll: Exchange) -> dict[str, Any] | None:
    """Return the nodes in the response to a poll, decoded, or None if it has none."""
    return node_map(as_documented(poll.response).body)


def node_map(body: bytes) -> dict[str, Any] | None:
    """Return the nodes in a body, decoded, or None if it is not a map of nodes."""
    try:
        value = loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    for node in value.values():
        if not isinstance(node, dict) or not isinstance(node.get("status"), str):
            return None
    return value
