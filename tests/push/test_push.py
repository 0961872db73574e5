"""Push against a server of the tests' own, over real sockets, and what may go wrong with it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import web

from promptlayer_exec import (
    Execution,
    ExecutionTimeout,
    PollPolicy,
    Session,
    SessionClosed,
    StartRequest,
    StartUnknown,
    Throttled,
    WatchStarted,
    WatchWoken,
)
from promptlayer_exec._integration import wake
from promptlayer_exec._push import centrifugo, channels
from promptlayer_exec._push.fallback import FallbackPolicy

NEVER = PollPolicy.fixed(3600.0)
OFTEN = PollPolicy.fixed(0.02)
NODES = {"Answer": {"status": "SUCCESS", "value": "42", "is_output_node": True}}
RUNNING = {"Answer": {"status": "RUNNING", "value": None, "is_output_node": True}}


def completion(execution_id: Any, **fields: Any) -> dict[str, Any]:
    """Return the message of a completion, as PromptLayer publishes it."""
    text = {"workflow_version_execution_id": execution_id, "final_output": {}, **fields}
    return {"message_name": "SET_WORKFLOW_COMPLETE", "data": json.dumps(text)}


class Server:
    """As much of PromptLayer as push needs; shares no code with the simulator.

    Attributes:
        log: the method and path of each request.
        hold: paths, and commands on the WebSocket, that are not answered until it is emptied.
        statuses: statuses to answer instead, by path.
        redirects: statuses and locations to answer instead, by path.
        ttl: the lifetime of tokens in seconds that the server announces; None: for ever.
        replies: replies to give instead, by the name of the command, or path.
        bodies: the bodies of the starts.
        complete: the executions that are complete.
        sockets: the open WebSockets, and the channel that each is subscribed to.
        retry_after: the header of that name in answers for incomplete executions.
        tokens: the tokens that clients sent.
        handshakes: the requests that opened WebSockets.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.hold: set[str] = set()
        self.statuses: dict[str, int] = {}
        self.redirects: dict[str, tuple[int, str]] = {}
        self.ttl: float | None = None
        self.replies: dict[str, Any] = {}
        self.bodies: list[dict[str, Any]] = []
        self.complete: set[int] = set()
        self.sockets: dict[web.WebSocketResponse, str] = {}
        self.retry_after: str | None = None
        self.tokens: list[str] = []
        self.handshakes: list[web.BaseRequest] = []
        self.before_start_is_answered: Callable[[int], Awaitable[None]] | None = None
        self._ids = itertools.count(1)
        self._changed = asyncio.Condition()
        self._tokens = itertools.count(1)
        self.base_url = ""
        self.port = 0
        self._runner: web.ServerRunner

    async def start(self, context: ssl.SSLContext | None = None) -> None:
        """Listen, on the port of the last time if there was one."""
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=context)
        await site.start()
        self.port = self._runner.addresses[0][1]
        scheme = "http" if context is None else "https"
        self.base_url = f"{scheme}://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """Stop listening, and close every connection."""
        await self.release()
        await self._runner.cleanup()

    async def release(self) -> None:
        """Answer what was held."""
        self.hold.clear()
        async with self._changed:
            self._changed.notify_all()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds, which is checked after each request and each subscription."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(holds)

    def count(self, path: str) -> int:
        """Return the number of requests for a path so far."""
        return [one for _, one in self.log].count(path)

    @property
    def polls(self) -> int:
        """The number of polls so far."""
        return self.count(RESULTS)

    async def subscribed(self, number: int = 1) -> None:
        """Wait until so many connections are subscribed."""
        await self.until(lambda: len([one for one in self.sockets.values() if one]) >= number)

    async def frame(self, frame: str | bytes) -> None:
        """Send a frame to every subscriber."""
        for socket in list(self.sockets):
            await (socket.send_str if isinstance(frame, str) else socket.send_bytes)(frame)

    async def publish(self, data: Any, times: int = 1) -> None:
        """Publish data to every subscriber."""
        for socket, channel in list(self.sockets.items()):
            text = json.dumps({"push": {"channel": channel, "pub": {"data": data}}})
            for _ in range(times):
                await socket.send_str(text)

    async def finish(self, execution_id: int) -> None:
        """Complete an execution, and announce it."""
        self.complete.add(execution_id)
        await self.publish(completion(execution_id))

    async def drop(self, code: int = 1011) -> None:
        """Close every WebSocket."""
        for socket in list(self.sockets):
            await socket.close(code=code)

    def cut(self) -> None:
        """Abort every connection of a WebSocket."""
        for handshake in self.handshakes:
            if handshake.transport is not None:
                handshake.transport.abort()

    async def _note(self, name: str) -> None:
        async with self._changed:
            self._changed.notify_all()
            await self._changed.wait_for(lambda: name not in self.hold)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:  # noqa: PLR0911
        path = request.path
        self.log.append((request.method, path))
        body = await request.read()
        await self._note(path)
        if path in self.statuses or path in self.redirects:
            return self._misbehave(path)
        match request.method, path.split("/")[1:]:
            case "GET", ["workflows", _]:
                number = 8 if path.endswith("/other") else 7
                return web.json_response({"success": True, "workflow": {"id": number, "name": "w"}})
            case "POST", ["workflows", _, "run"]:
                self.bodies.append(json.loads(body))
                execution_id = next(self._ids)
                if self.before_start_is_answered is not None:
                    await self.before_start_is_answered(execution_id)
                return web.json_response(
                    {"workflow_version_execution_id": execution_id}, status=201
                )
            case "POST", ["ws-token-request-library"] if TOKEN in self.replies:
                return web.json_response(self.replies[TOKEN], status=201)
            case "POST", ["ws-token-request-library"]:
                token = f"token-{next(self._tokens)} {request.query['capability']}"
                return web.json_response({"token_details": {"token": token}}, status=201)
            case "GET", ["workflow-version-execution-results"]:
                done = int(request.query["workflow_version_execution_id"]) in self.complete
                return self._results(done=done)
            case "GET", ["connection", "websocket"]:
                return await self._serve(request)
        return web.json_response({"success": False}, status=404)

    def _misbehave(self, path: str) -> web.Response:
        if path in self.redirects:
            status, location = self.redirects[path]
            return web.Response(status=status, headers={"Location": location})
        if self.statuses[path] == 200:
            return web.Response(text="<p>The page of a gateway</p>", content_type="text/html")
        return web.json_response({"success": False}, status=self.statuses[path])

    def _results(self, *, done: bool) -> web.Response:
        if done:
            return web.json_response(NODES)
        headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
        return web.json_response(RUNNING, status=202, headers=headers)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        self.handshakes.append(request)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[socket] = ""
        try:
            async for message in socket:
                for line in message.data.split("\n"):
                    await self._execute(socket, json.loads(line))
        finally:
            del self.sockets[socket]
            await self._note("")
        return socket

    async def _execute(self, socket: web.WebSocketResponse, command: dict[str, Any]) -> None:
        name = next((key for key in command if key != "id"), "pong")
        self.log.append(("command", name))
        if name == "subscribe":
            allowed = f" {command['subscribe']['channel']}"
            assert any(token.endswith(allowed) for token in self.tokens), "not allowed"
        if name in ("connect", "refresh"):
            self.tokens.append(command[name]["token"])
        await self._note(name)
        expiry = {} if self.ttl is None else {"expires": True, "ttl": self.ttl}
        reply = self.replies.get(
            name,
            {
                "connect": {"connect": {"client": "c", "ping": 25, "pong": True, **expiry}},
                "refresh": {"refresh": {"client": "c", **expiry}},
                "subscribe": {"subscribe": {}},
            }.get(name),
        )
        if reply is not None and not socket.closed:
            await socket.send_str(json.dumps({"id": command["id"], **reply}))
            if name == "subscribe" and name in reply:
                self.sockets[socket] = command["subscribe"]["channel"]
                await self._note("")


TOKEN, WEBSOCKET = "/ws-token-request-library", "/connection/websocket"
RUN, WORKFLOW, RESULTS = "/workflows/w/run", "/workflows/w", "/workflow-version-execution-results"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """Return a server that is stopped at the end."""
    server = Server()
    await server.start()
    yield server
    await server.stop()


class Log(logging.Handler):
    """What the library logs, and whatever other loggers warn of."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._emitted = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record."""
        self.records.append(record)
        self._emitted.set()

    @property
    def warnings(self) -> list[str]:
        """The warnings and errors."""
        return [one.getMessage() for one in self.records if one.levelno >= logging.WARNING]

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The level and the text of each line on push."""
        given_up = [one for one in self.records if "push unavailable" in str(one.msg)]
        return [(one.levelname, one.getMessage()) for one in given_up]

    async def given_up(self, times: int = 1) -> None:
        """Wait until push was given up so many times."""
        async with asyncio.timeout(10):
            while sum("push unavailable" in str(one.msg) for one in self.records) < times:
                self._emitted.clear()
                await self._emitted.wait()


@pytest.fixture
async def log() -> AsyncIterator[Log]:
    """Return what is logged during the test."""
    log = Log()
    logging.getLogger().addHandler(log)
    level = logging.getLogger("promptlayer_exec").level
    logging.getLogger("promptlayer_exec").setLevel(logging.INFO)
    yield log
    logging.getLogger("promptlayer_exec").setLevel(level)
    logging.getLogger().removeHandler(log)


@pytest.fixture(autouse=True)
def _polls_do_not_rescue_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    never = FallbackPolicy(first=3600.0, longest=3600.0, subscribing=3600.0)
    monkeypatch.setattr(channels, "_FALLBACK", never)


@pytest.fixture
def short_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fallback poll every 20 ms."""
    often = FallbackPolicy(first=0.02, longest=0.02, subscribing=3600.0)
    monkeypatch.setattr(channels, "_FALLBACK", often)


@pytest.fixture
async def open_pushed(
    server: Server, recorder: Any, our_tasks: Callable[[], list[str]]
) -> AsyncIterator[Callable[..., Session]]:
    """Return a function that makes sessions with push; after closing, nothing may be left."""
    async with contextlib.AsyncExitStack() as stack:

        def make(**overrides: Any) -> Session:
            settings: dict[str, Any] = {
                "api_key": "a-key",
                "base_url": server.base_url,
                "poll": NEVER,
                "push": True,
                "check_inputs": False,
                "rate": None,
                "observers": [recorder],
            }
            session = Session(**{**settings, **overrides})
            stack.push_async_callback(session.aclose)
            return session

        yield make
    assert our_tasks() == []


@pytest.fixture
def session(open_pushed: Callable[..., Session]) -> Session:
    """Return a session that polls often, where it does not leave it to push."""
    return open_pushed(poll=OFTEN)


@pytest.fixture
async def execution(session: Session, server: Server) -> Execution:
    """Return a run in `session` whose subscription stands."""
    execution = await session.start("w")
    await server.subscribed()
    return execution


@pytest.fixture
async def pushed(open_pushed: Callable[..., Session], server: Server) -> Session:
    """Return a session whose subscription stands, and that polls only when it is woken."""
    session = open_pushed()
    execution = await session.start("w")
    await server.subscribed()
    await server.finish(execution.id)
    await execution.output()
    server.log.clear()
    return session


class BrokenLimiter:
    """A limiter that raises an error, once there is one."""

    error: Exception | None = None

    async def acquire(self) -> None:
        """Raise the error."""
        if self.error is not None:
            raise self.error


class TestWhenItPays:
    """By default, a workflow is subscribed to as soon as that saves requests."""

    async def test_a_run_that_is_complete_at_once_costs_nothing(
        self, open_pushed: Callable[..., Session], server: Server
    ) -> None:
        """Its only poll shows that there is nothing to wait for."""
        session = open_pushed(push=None)
        server.before_start_is_answered = server.finish
        assert await session.run("w") == "42"
        assert server.log == [("POST", RUN), ("GET", RESULTS)]
        assert "channel_name_suffix" in server.bodies[0]

    async def test_a_run_that_goes_on_is_subscribed_to(
        self, open_pushed: Callable[..., Session], server: Server
    ) -> None:
        """Its first poll says so, and the message brings the result."""
        execution = await open_pushed(push=None).start("w")
        waiting = asyncio.create_task(execution.output())
        await server.subscribed()
        await server.finish(execution.id)
        assert await waiting == "42"
        paths = [path for _, path in server.log if path.startswith("/")]
        assert paths == [RUN, RESULTS, WORKFLOW, TOKEN, WEBSOCKET, RESULTS]

    async def test_the_second_start_of_a_workflow_subscribes(
        self, open_pushed: Callable[..., Session], server: Server
    ) -> None:
        """More runs will follow; another workflow does not count."""
        session = open_pushed(push=None)
        for workflow in ("other", "w"):
            await session.start(workflow)
        await session.start("w")
        await server.subscribed()
        assert (server.count(WORKFLOW), server.count("/workflows/other")) == (1, 0)

    async def test_one_definition_serves_the_check_and_the_channel(
        self, open_pushed: Callable[..., Session], server: Server
    ) -> None:
        """The workflow's id is asked for once."""
        session = open_pushed(push=None, check_inputs=True)
        await asyncio.gather(*(session.start("w") for _ in range(3)))
        await server.subscribed()
        assert server.count(WORKFLOW) == 1

    @pytest.mark.parametrize("by", ["argument", "environment"])
    async def test_push_can_be_turned_off(
        self,
        open_pushed: Callable[..., Session],
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        by: str,
    ) -> None:
        """Then no start asks for messages, and nothing is subscribed to."""
        if by == "environment":
            monkeypatch.setenv("PROMPTLAYER_EXEC_PUSH", "0")
        session = open_pushed(push=False if by == "argument" else None, poll=OFTEN)
        await session.start("w")
        await polled_to_the_end(server, await session.start("w"))
        assert not [body for body in server.bodies if "channel_name_suffix" in body]
        assert (server.count(TOKEN), server.count(WEBSOCKET)) == (0, 0)

    @pytest.mark.parametrize(("push", "levels"), [(None, ["INFO"]), (True, ["WARNING", "INFO"])])
    async def test_one_line_says_that_there_is_no_push(
        self,
        open_pushed: Callable[..., Session],
        server: Server,
        log: Log,
        push: Any,
        levels: list[str],
    ) -> None:
        """A session that asked for push warns; by default, there is a line at INFO."""
        server.statuses[TOKEN] = 404
        session = open_pushed(push=push, poll=OFTEN)
        for workflow in ("w", "other"):
            await polled_to_the_end(server, await session.start(workflow))
        await server.until(lambda: server.count(TOKEN) == 2)
        await session.aclose()
        assert [level for level, _ in log.lines] == levels
        assert "push unavailable for workflow 'w' (" in log.lines[0][1]

    async def test_a_subscription_that_nobody_needs_is_dropped(
        self,
        open_pushed: Callable[..., Session],
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        log: Log,
    ) -> None:
        """A watched run needs it for any time; the next run that goes on subscribes anew."""
        monkeypatch.setattr(channels, "_POLICY", channels.ChannelPolicy(idle=0.05))
        session = open_pushed(push=None, poll=OFTEN)
        for number in (1, 2):
            execution = await session.start("w")
            waiting = asyncio.create_task(execution.output())
            await server.subscribed()
            assert (await asyncio.wait([waiting], timeout=0.1))[1]
            assert len(server.sockets) == 1
            await server.finish(execution.id)
            assert await waiting == "42"
            await server.until(lambda: not server.sockets)
            assert server.count(WEBSOCKET) == number
        assert log.lines == []


class TestDelivery:
    """Push as it should be."""

    async def test_the_key_is_not_in_the_handshake(self, pushed: Session, server: Server) -> None:
        """The WebSocket has the channel's token; the key goes with requests alone."""
        (handshake,) = server.handshakes
        assert not [value for value in handshake.headers.values() if "a-key" in value]
        assert handshake.headers["User-Agent"].startswith("promptlayer-exec/")

    async def test_lines_are_separated_by_newlines_alone(
        self, pushed: Session, server: Server
    ) -> None:
        """JSON may have other line separators in its strings, and a frame several lines."""
        execution = await pushed.start("w")
        waiting = asyncio.create_task(execution.output())
        server.complete.add(execution.id)
        channel = next(iter(server.sockets.values()))
        data = completion(execution.id) | {"more": "a\u2028b\x85c\x0bd"}
        message = {"push": {"channel": channel, "pub": {"data": data}}}
        await server.frame("{}\n" + json.dumps(message, ensure_ascii=False) + "\n{}")
        assert await waiting == "42"
        await server.until(lambda: server.log.count(("command", "pong")) == 2)

    async def test_a_server_without_pings_is_not_trusted(
        self, open_pushed: Callable[..., Session], server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A connection that is frozen is replaced, and what it did not announce is polled."""
        policy = centrifugo.SubscriptionPolicy(ping_delay=0.01)
        monkeypatch.setattr(centrifugo, "_POLICY", policy)
        server.replies["connect"] = {"connect": {"client": "c", "ping": 0.05, "pong": True}}
        execution = await open_pushed(poll=OFTEN).start("w")
        await server.subscribed()
        server.replies.clear()
        waiting = asyncio.create_task(execution.output())
        server.complete.add(execution.id)
        await server.until(lambda: server.count(WEBSOCKET) == 2)
        assert await waiting == "42"

    async def test_a_message_brings_the_result(
        self, pushed: Session, server: Server, recorder: Any
    ) -> None:
        """A run costs two requests: the start, and the poll that the message leads to."""
        execution = await pushed.start("w")
        waiting = asyncio.create_task(execution.output())
        await recorder.next(WatchStarted)
        await server.finish(execution.id)
        assert await waiting == "42"
        assert server.log == [("POST", RUN), ("GET", RESULTS)]
        assert recorder.of(WatchWoken)[-1] == WatchWoken(execution.id, "push")

    async def test_all_runs_of_a_workflow_share_one_subscription(
        self, open_pushed: Callable[..., Session], server: Server
    ) -> None:
        """One suffix, one id, one token, one WebSocket."""
        session = open_pushed()
        await asyncio.gather(*(session.start("w") for _ in range(3)))
        await server.subscribed()
        executions = [await session.start("w") for _ in range(3)]
        waiting = [asyncio.create_task(execution.output()) for execution in executions]
        for execution in executions:
            await server.finish(execution.id)
        assert await asyncio.gather(*waiting) == ["42"] * 3
        assert [server.count(path) for path in (WORKFLOW, TOKEN, WEBSOCKET)] == [1, 1, 1]
        assert len({body["channel_name_suffix"] for body in server.bodies}) == 1

    @pytest.mark.parametrize(
        ("limit", "sockets"), [(None, 20), (0, 20), (100, 20), (8, 2), (4, 1), (3, 0)]
    )
    async def test_web_sockets_are_few(
        self, open_pushed: Callable[..., Session], server: Server, limit: int | None, sockets: int
    ) -> None:
        """At most 20, and of a borrowed limit at most a quarter: the other runs are polled."""
        async with contextlib.AsyncExitStack() as stack:
            http = None
            if limit is not None:
                connector = aiohttp.TCPConnector(limit=limit)
                http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
            session = open_pushed(poll=OFTEN, http=http)
            executions = [await session.start(workflow) for workflow in range(1, 23)]
            await server.subscribed(sockets)
            await polled_to_the_end(server, executions[-1])
            assert len(server.sockets) == server.count(TOKEN) == sockets
            await session.aclose()

    async def test_a_run_that_began_before_the_subscription_is_polled_once(
        self, open_pushed: Callable[..., Session], server: Server
    ) -> None:
        """The first run of a session costs one poll more, and then it is pushed."""
        server.hold = {"subscribe"}
        session = open_pushed()
        execution = await session.start("w")
        waiting = asyncio.create_task(execution.output())
        await server.until(lambda: ("command", "subscribe") in server.log)
        assert server.polls == 0
        await server.release()
        await server.until(lambda: server.polls == 1)
        await server.finish(execution.id)
        assert await waiting == "42"
        assert server.polls == 2

    async def test_a_run_that_ended_before_the_subscription_is_polled_once(
        self, open_pushed: Callable[..., Session], server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No message can come, and the policy would let an hour pass."""
        soon = FallbackPolicy(first=0.0, longest=3600.0, subscribing=3600.0)
        monkeypatch.setattr(channels, "_FALLBACK", soon)
        server.hold = {"subscribe"}
        execution = await open_pushed(push=None).start("w")
        waiting = asyncio.create_task(execution.output())
        await server.until(lambda: ("command", "subscribe") in server.log)
        server.complete.add(execution.id)
        await server.release()
        assert await waiting == "42"
        assert server.polls == 2

    async def test_a_message_before_the_start_s_answer_is_not_lost(
        self, pushed: Session, server: Server, monkeypatch: pytest.MonkeyPatch, log: Log
    ) -> None:
        """The run may be complete before its id is known here, and is no silence of push."""
        monkeypatch.setattr(channels, "_POLICY", channels.ChannelPolicy(silence=0.0))
        server.before_start_is_answered = server.finish
        for polls in (1, 2, 3):
            execution = await pushed.start("w")
            assert await execution.output(timeout=10) == "42"
            assert server.polls == polls
        await asyncio.sleep(0.02)
        assert log.lines == []

    async def test_streams_are_polled_as_without_push(
        self, execution: Execution, server: Server, recorder: Any
    ) -> None:
        """Only polls show progress; the message brings the end."""
        waiting = asyncio.create_task(execution.wait())
        async with aclosing(execution.stream()) as snapshots:
            for poll in range(1, 5):
                assert (await anext(snapshots)).poll == poll
            await server.finish(execution.id)
            assert [snapshot.complete async for snapshot in snapshots][-1]
        assert await waiting

    async def test_a_stream_that_joins_a_pushed_wait_polls_at_once(
        self, pushed: Session, server: Server
    ) -> None:
        """And when it has left, polls are seldom again."""
        execution = await pushed.start("w")
        waiting = asyncio.create_task(execution.wait())
        async with aclosing(execution.stream()) as snapshots:
            assert not (await anext(snapshots)).complete
        await server.finish(execution.id)
        assert (await waiting).poll == 2

    async def test_an_error_at_the_deadline_has_a_snapshot(
        self, pushed: Session, server: Server, recorder: Any
    ) -> None:
        """Shortly before a deadline there is a poll, though nothing was pushed."""
        execution = await pushed.start("w")
        first = asyncio.create_task(execution.wait(timeout=60))
        await recorder.next(WatchStarted)
        await asyncio.sleep(0)  # it sleeps until shortly before the first deadline
        with pytest.raises(ExecutionTimeout, match="0 of 1 nodes done"):
            await execution.wait(timeout=0.5)
        assert server.polls == 1
        await server.finish(execution.id)
        assert (await first).complete

    async def test_a_deadline_waits_for_the_time_that_the_server_asked_for(
        self, pushed: Session, server: Server
    ) -> None:
        """The poll shortly before a deadline is left out if it would come during Retry-After."""
        server.retry_after = "3600"
        execution = await pushed.start("w")
        waits = [asyncio.create_task(execution.wait(timeout=seconds)) for seconds in (0.2, 0.6)]
        for wait in waits:
            with pytest.raises(ExecutionTimeout):
                await wait
        assert server.polls == 1

    async def test_a_fan_out_is_pushed(self, pushed: Session, server: Server) -> None:
        """Forty runs cost eighty requests."""
        running = asyncio.create_task(pushed.collect([StartRequest("w")] * 40))
        await server.until(lambda: server.count(RUN) == 40)
        for execution_id in range(2, 42):
            await server.finish(execution_id)
        assert all(outcome.ok for outcome in await running)
        assert server.log == [("POST", RUN)] * 40 + [("GET", RESULTS)] * 40

    async def test_a_session_can_be_opened_again(self, pushed: Session, server: Server) -> None:
        """It subscribes again, with the suffix of before."""
        await pushed.aclose()
        async with pushed:
            execution = await pushed.start("w")
            await server.subscribed()
            waiting = asyncio.create_task(execution.output(timeout=10))
            await server.finish(execution.id)
            assert await waiting == "42"
        assert len({body["channel_name_suffix"] for body in server.bodies}) == 1


NO_TOKEN = "$.token_details.token: expected a token"
REFUSED = {"error": {"code": 103, "message": "a-secret-key may not subscribe"}}


class TestFaults:
    """Whatever push does, the result is right and comes no later than by polling."""

    @pytest.mark.parametrize(
        ("said", "statuses", "replies"),
        [
            *[("403", {path: 403}, {}) for path in (TOKEN, WEBSOCKET)],
            *[("404", {path: 404}, {}) for path in (TOKEN, WEBSOCKET)],
            ("404", {WORKFLOW: 404, "/workflows/other": 404}, {}),
            *[(NO_TOKEN, {}, {TOKEN: body}) for body in ([], {}, {"token_details": 7})],
            (NO_TOKEN, {}, {TOKEN: {"token_details": {"token": 7}}}),
            ("refused to subscribe: *** may not subscribe (103)", {}, {"subscribe": REFUSED}),
        ],
    )
    async def test_a_server_without_push_is_polled(
        self,
        open_pushed: Callable[..., Session],
        server: Server,
        log: Log,
        *,
        said: str,
        statuses: dict[str, int],
        replies: dict[str, Any],
    ) -> None:
        """One warning says what was seen, without the key, however many workflows there are."""
        server.statuses, server.replies = statuses, replies
        session = open_pushed(api_key="a-secret-key", poll=OFTEN)
        await polled_to_the_end(server, await session.start("w"))
        await log.given_up()
        await polled_to_the_end(server, await session.start("other"))
        await log.given_up(2)
        (record,) = log.warnings
        assert record.startswith("push unavailable for workflow 'w' (")
        assert said in record
        assert server.count(RUN) == 1

    @pytest.mark.parametrize("path", [WORKFLOW, TOKEN])
    async def test_an_error_of_the_user_s_own_code_is_given_up(
        self,
        open_pushed: Callable[..., Session],
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        log: Log,
        path: str,
    ) -> None:
        """A limiter that raises does not end the session; its text may be secret."""
        monkeypatch.setattr(channels, "_POLICY", channels.ChannelPolicy(retry=0.01))
        server.statuses[path] = 503
        limiter = BrokenLimiter()
        execution = await open_pushed(poll=OFTEN, limiter=limiter).start("w")
        await server.until(lambda: server.count(path) >= 1)
        limiter.error = KeyError("secret")
        await log.given_up()
        assert "workflow 'w' (KeyError): " in log.warnings[0]
        limiter.error = None
        await polled_to_the_end(server, execution)

    @pytest.mark.parametrize("held", [WORKFLOW, TOKEN, WEBSOCKET, "connect", "subscribe"])
    async def test_a_handshake_that_hangs_delays_nothing(
        self,
        open_pushed: Callable[..., Session],
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        log: Log,
        held: str,
    ) -> None:
        """Neither the start nor the result waits for it, and in the end it is given up."""
        server.hold = {held}
        monkeypatch.setattr(channels, "_POLICY", channels.ChannelPolicy(handshake=0.2))
        session = open_pushed(poll=OFTEN, request_timeout=0.5)
        execution = await session.start("w")
        await polled_to_the_end(server, execution)
        await log.given_up()
        assert server.count(RUN) == 1

    @pytest.mark.parametrize(("limit", "max_connections"), [(None, 1), (None, 8), (4, 100)])
    @pytest.mark.parametrize("held", [WORKFLOW, TOKEN])
    async def test_handshakes_that_hang_hold_up_nothing(
        self,
        open_pushed: Callable[..., Session],
        server: Server,
        held: str,
        limit: int | None,
        max_connections: int,
    ) -> None:
        """Requests of push have connections of their own, however few there are."""
        server.hold = {held}
        connector = aiohttp.TCPConnector(limit=limit or 0)
        async with asyncio.timeout(5), aiohttp.ClientSession(connector=connector) as http:
            settings = {} if limit is None else {"http": http}
            session = open_pushed(poll=OFTEN, max_connections=max_connections, **settings)
            execution = await session.start("w")
            await server.until(lambda: server.count(held) == 1)
            for workflow in ("w", 8, 9):
                await polled_to_the_end(server, execution)
                execution = await session.start(workflow)
            await session.aclose()

    async def test_a_refused_handshake_slows_the_session_down(
        self, open_pushed: Callable[..., Session], server: Server, recorder: Any
    ) -> None:
        """A 429 means all requests, whichever was refused."""
        server.statuses[WEBSOCKET] = 429
        await open_pushed(poll=OFTEN).start("w")
        assert (await recorder.next(Throttled)).delay > 0

    @pytest.mark.usefixtures("short_gaps")
    async def test_silence_is_noticed(
        self,
        execution: Execution,
        session: Session,
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        log: Log,
    ) -> None:
        """Three completions in a row that no message announced, and push is given up."""
        monkeypatch.setattr(channels, "_POLICY", channels.ChannelPolicy(silence=0.01))
        for silent in [execution, await session.start("w"), await session.start("w")]:
            assert log.warnings == []
            await polled_to_the_end(server, silent)
        await log.given_up()
        assert "no message for the last 3 completions" in log.warnings[0]

    async def test_many_open_runs_are_no_silence(
        self,
        open_pushed: Callable[..., Session],
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        log: Log,
    ) -> None:
        """A session that starts thousands forgets runs, but none that somebody waits for."""
        policy = channels.ChannelPolicy(silence=0.0, most_unwatched=1)
        monkeypatch.setattr(channels, "_POLICY", policy)
        session = open_pushed(poll=OFTEN)
        await session.start("w")
        await server.subscribed()

        waiting = []
        for _ in range(5):
            run = await session.start("w")
            waiting.append((run.id, asyncio.create_task(run.output())))
            await asyncio.sleep(0)  # it is watched before the next one starts
        for execution_id, output in waiting:
            await server.finish(execution_id)
            await output
        await asyncio.sleep(0.02)
        assert log.warnings == []

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_a_redirect_of_the_handshake_is_not_followed(
        self,
        open_pushed: Callable[..., Session],
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        log: Log,
        status: int,
    ) -> None:
        """The token goes to the server of `base_url` only."""
        monkeypatch.setattr(channels, "_POLICY", channels.ChannelPolicy(handshake=0.5))
        other = Server()
        await other.start()
        server.redirects["/connection/websocket"] = status, f"ws://localhost:{other.port}/"
        execution = await open_pushed(poll=OFTEN).start("w")
        await polled_to_the_end(server, execution)
        await log.given_up()
        await other.stop()
        assert other.log == []
        assert f"the server returned {status}" in log.warnings[0]
        await server.until(lambda: not server.sockets)

    async def test_a_borrowed_session_takes_no_token_to_another_host(
        self, open_pushed: Callable[..., Session], server: Server, log: Log
    ) -> None:
        """It follows redirects, but the certificate must be that of `base_url`."""
        authority, other = trustme.CA(), Server()
        await server.stop()
        await server.start(server_context(authority))
        await other.start(server_context(authority, "localhost"))
        server.redirects[WEBSOCKET] = 302, f"https://localhost:{other.port}{WEBSOCKET}"
        context = ssl.create_default_context()
        authority.configure_trust(context)
        connector = aiohttp.TCPConnector(ssl=context)
        async with aiohttp.ClientSession(connector=connector) as http:
            session = open_pushed(http=http, base_url=server.base_url, poll=OFTEN)
            execution = await session.start("w")
            await log.given_up()
            await polled_to_the_end(server, execution)
            await session.aclose()
        await other.stop()
        assert (other.log, other.tokens) == ([], [])
        assert "certificate is not valid" in log.warnings[0]

    async def test_a_message_that_is_late_is_not_silence(
        self,
        execution: Execution,
        session: Session,
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        log: Log,
    ) -> None:
        """A stream is often faster than the message; that alone says nothing against push."""
        monkeypatch.setattr(channels, "_POLICY", channels.ChannelPolicy(silence=0.05))
        for _ in range(4):
            server.complete.add(execution.id)
            async with aclosing(execution.stream()) as snapshots:
                assert [one.complete async for one in snapshots][-1]
            await server.publish(completion(execution.id))
            execution = await session.start("w")
        await asyncio.sleep(0.1)  # none of the four is counted
        assert log.warnings == []
        assert len(server.sockets) == 1

    @pytest.mark.usefixtures("execution", "short_gaps")
    async def test_one_message_that_came_true_outweighs_silence(
        self, session: Session, server: Server, monkeypatch: pytest.MonkeyPatch, log: Log
    ) -> None:
        """Only completions in a row count."""
        monkeypatch.setattr(channels, "_POLICY", channels.ChannelPolicy(silence=0.0))
        for is_announced in (False, False, True, False, False):
            execution = await session.start("w")
            if is_announced:
                await server.finish(execution.id)
                await execution.output()
            else:
                await polled_to_the_end(server, execution)
        await asyncio.sleep(0.02)
        assert log.warnings == []
        await polled_to_the_end(server, await session.start("w"))
        await log.given_up()

    async def test_first_polls_wait_for_no_subscription_that_will_not_come(
        self, open_pushed: Callable[..., Session], server: Server, log: Log
    ) -> None:
        """They come at once if push was given up, and if its connection was lost."""
        session = open_pushed()
        server.statuses[TOKEN] = 403
        await session.start("w")
        await log.given_up()
        server.statuses.clear()
        await session.start("other")
        await server.subscribed()
        server.hold = {"connect"}
        await server.drop()
        await server.until(lambda: server.log.count(("command", "connect")) == 2)
        for workflow in ("w", "other"):
            execution = await session.start(workflow)
            server.complete.add(execution.id)
            assert await execution.output(timeout=5) == "42"

    @pytest.mark.parametrize("is_cut", [False, True])
    async def test_a_completion_in_a_gap_is_found(
        self, pushed: Session, server: Server, recorder: Any, *, is_cut: bool
    ) -> None:
        """When the connection stands again, one poll covers what was missed."""
        execution = await pushed.start("w")
        waiting = asyncio.create_task(execution.output(timeout=30))
        await recorder.next(WatchStarted)
        server.hold = {"connect"}
        server.cut() if is_cut else await server.drop()
        server.complete.add(execution.id)
        await server.until(lambda: ("command", "connect") in server.log)
        await server.release()
        assert await waiting == "42"

    async def test_in_a_gap_the_schedule_is_the_ordinary_one(
        self, execution: Execution, server: Server
    ) -> None:
        """While there is no connection, watches poll as if there were no push."""
        waiting = asyncio.create_task(execution.output())
        await server.until(lambda: server.polls == 1)
        server.hold = {"connect"}
        await server.drop()
        await server.until(lambda: server.polls >= 5)
        server.complete.add(execution.id)
        assert await waiting == "42"

    @pytest.mark.parametrize("source", ["push", "webhook", "callback", "caller"])
    async def test_a_lying_wake_up_costs_one_poll_and_puts_the_run_on_the_schedule(
        self, execution: Execution, session: Session, server: Server, source: Any
    ) -> None:
        """Its GET says that the run is not complete: push's own message may have been lost."""
        waiting = asyncio.create_task(execution.output())
        await server.until(lambda: server.polls == 1)
        if source == "push":
            await server.publish(completion(execution.id))
        else:
            assert wake(session, execution.id, source)
        await server.until(lambda: server.polls >= 5)
        server.complete.add(execution.id)
        assert await waiting == "42"

    @pytest.mark.parametrize(
        "sent",
        [
            "no JSON",
            b"{}",
            "",
            "[]",
            '{"push": 7}',
            '{"push": {"channel": "another", "pub": {"data": {}}}}',
            '{"id": 999, "connect": {}}',
            None,
            [],
            {},
            {"message_name": "SOMETHING_ELSE", "data": "{}"},
            {"message_name": "SET_WORKFLOW_COMPLETE"},
            {"message_name": "SET_WORKFLOW_COMPLETE", "data": {"a": 1}},
            {"message_name": "SET_WORKFLOW_COMPLETE", "data": "["},
            {"message_name": "SET_WORKFLOW_COMPLETE", "data": "{}"},
            completion("seven"),
            completion(True),
            completion(2**63),
        ],
        ids=range(18),
    )
    async def test_a_frame_or_message_that_cannot_be_read_is_ignored(
        self, pushed: Session, server: Server, sent: Any, log: Log
    ) -> None:
        """It wakes nobody, the subscription stands, and the next message arrives."""
        execution = await pushed.start("w")
        waiting = asyncio.create_task(execution.output())
        await (server.frame if isinstance(sent, str | bytes) else server.publish)(sent)
        await server.finish(execution.id)
        assert await waiting == "42"
        assert (server.count(WEBSOCKET), server.polls) == (0, 1)
        assert log.warnings == []

    async def test_an_expired_token_is_renewed(
        self, open_pushed: Callable[..., Session], server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The session asks for another one, and the subscription stands all the while."""
        policy = centrifugo.SubscriptionPolicy(shortest=0.0)
        monkeypatch.setattr(centrifugo, "_POLICY", policy)
        server.ttl = 0.05
        session = open_pushed()
        execution = await session.start("w")
        await server.subscribed()
        waiting = asyncio.create_task(execution.output())
        await server.until(lambda: ("command", "refresh") in server.log)
        await server.finish(execution.id)
        assert await waiting == "42"
        assert [token.split()[0] for token in server.tokens[:2]] == ["token-1", "token-2"]
        assert server.count(WEBSOCKET) == 1

    async def test_a_token_that_is_expired_already_is_renewed(
        self, session: Session, server: Server
    ) -> None:
        """As after a night asleep: the server answers 109, and gets a new one."""
        server.replies["connect"] = {"error": {"code": 109, "message": "token expired"}}
        execution = await session.start("w")
        await server.until(lambda: ("command", "connect") in server.log)
        server.replies.clear()
        await server.subscribed()
        assert server.count(TOKEN) == 2
        await server.finish(execution.id)
        assert await execution.output() == "42"

    @pytest.mark.parametrize("code", [3500, 3501])
    async def test_a_connection_that_the_server_ends_for_good_is_given_up(
        self, execution: Execution, server: Server, log: Log, code: int
    ) -> None:
        """Centrifugo says with such a code that the client must not come back."""
        await server.drop(code)
        await log.given_up()
        assert "the server closed the connection: " in log.warnings[0]
        assert str(code) in log.warnings[0]
        await polled_to_the_end(server, execution)

    @pytest.mark.parametrize(
        ("path", "status"),
        [(TOKEN, 503), (WEBSOCKET, 503), (WORKFLOW, 503), (TOKEN, 200), (WORKFLOW, 200)],
    )
    async def test_an_outage_passes(
        self,
        session: Session,
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        log: Log,
        *,
        path: str,
        status: int,
    ) -> None:
        """A 503, or the page of a gateway, is no reason to give up push: it is asked for again."""
        monkeypatch.setattr(channels, "_POLICY", channels.ChannelPolicy(retry=0.01))
        server.statuses[path] = status
        execution = await session.start("w")
        await server.until(lambda: server.count(path) >= 1)
        server.statuses.clear()
        await server.subscribed()
        await server.finish(execution.id)
        assert await execution.output() == "42"
        assert log.warnings == []

    async def test_an_outage_that_lasts_is_given_up_and_tried_again(
        self, session: Session, server: Server, monkeypatch: pytest.MonkeyPatch, log: Log
    ) -> None:
        """Later attempts are logged below WARNING; when one succeeds, runs are pushed again."""
        policy = channels.ChannelPolicy(handshake=0.2, retry=0.01, pauses=(0.01, 0.02))
        monkeypatch.setattr(channels, "_POLICY", policy)
        server.statuses[WORKFLOW] = 503
        execution = await session.start("w")
        waiting = asyncio.create_task(execution.output(timeout=10))  # each poll asks for push
        await log.given_up(2)
        assert len(log.warnings) == 1
        server.statuses = {TOKEN: 500}
        await log.given_up(3)
        assert "last failure: the server returned 500" in log.records[-1].getMessage()
        server.statuses.clear()
        await server.subscribed()
        await server.finish(execution.id)
        assert await waiting == "42"

    async def test_a_lost_connection_that_does_not_come_back_is_given_up(
        self, execution: Execution, server: Server, monkeypatch: pytest.MonkeyPatch, log: Log
    ) -> None:
        """After a minute; until then the session tries to connect."""
        monkeypatch.setattr(channels, "_POLICY", channels.ChannelPolicy(reconnect=0.3))
        server.statuses[WEBSOCKET] = 500
        await server.drop()
        await log.given_up()
        assert "no subscription within 0.3 s, last failure: " in log.warnings[0]
        await polled_to_the_end(server, execution)


STAGES = [WORKFLOW, TOKEN, WEBSOCKET, "connect", "subscribe", "refresh", RUN, RESULTS]


class TestClosing:
    """A session closes at once, wherever push is."""

    @pytest.mark.parametrize("stage", STAGES)
    async def test_a_session_closes_at_every_await(
        self, open_pushed: Callable[..., Session], server: Server, stage: str
    ) -> None:
        """Nothing is left, and the wait ends with `SessionClosed`."""
        server.ttl = 0.05 if stage == "refresh" else None
        server.hold = {stage}
        session = open_pushed(poll=OFTEN, request_timeout=0.5 if stage == RUN else 30.0)
        waiting = asyncio.create_task(session.run("w"))
        await server.until(lambda: stage in [name for _, name in server.log])
        async with asyncio.timeout(8.0):
            await session.aclose()
        # The answer to a start on the wire is waited for, at most until the request times out.
        with pytest.raises(StartUnknown if stage == RUN else SessionClosed):
            await waiting

    async def test_a_session_closes_although_the_server_does_not_answer(
        self, pushed: Session, server: Server
    ) -> None:
        """It waits a tenth of a second for the end of the WebSocket, at most."""
        server.hold = {"pong"}
        await server.frame("{}")
        await server.until(lambda: ("command", "pong") in server.log)
        async with asyncio.timeout(8.0):
            await pushed.aclose()

    @pytest.mark.parametrize("stage", STAGES)
    async def test_a_caller_is_cancelled_at_every_await(
        self, session: Session, server: Server, stage: str
    ) -> None:
        """The cancellation is prompt, and the session goes on."""
        server.ttl = 0.05 if stage == "refresh" else None
        server.hold = {stage}
        waiting = asyncio.create_task(session.run("w"))
        await server.until(lambda: stage in [name for _, name in server.log])
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await server.release()
        execution = await session.start("w")
        await server.subscribed()
        waiting = asyncio.create_task(execution.output(timeout=10))
        await server.finish(execution.id)
        assert await waiting == "42"


def server_context(authority: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    """Return a server's context, with a certificate of the authority's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


async def polled_to_the_end(server: Server, execution: Any) -> None:
    """Complete an execution that nobody announces, and wait for its result."""
    waiting = asyncio.create_task(execution.output(timeout=10))
    polls = server.polls
    await server.until(lambda: server.polls > polls)
    server.complete.add(execution.id)
    assert await waiting == "42"
