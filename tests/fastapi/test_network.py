"""Events over real sockets: many clients, slow clients, and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from promptlayer_exec import Event, ExecutionStarted, RetryPolicy, Session, WatchEnded
from promptlayer_exec.fastapi import _sse, create_router, execution_events
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

Serve = Callable[[ASGIApp], Awaitable[str]]
# The scope of a request that starts a run.
START = {
    "type": "http",
    "method": "POST",
    "path": "/executions",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
}


class Watched:
    """An app that counts its active requests, and the bytes sent to each client."""

    def __init__(self, app: ASGIApp) -> None:
        self.active = 0
        self.sent: dict[str, int] = {}
        self._app = app
        self._ended = asyncio.Condition()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        client = scope["query_string"].decode()

        async def counted(message: Message) -> None:
            await send(message)
            self.sent[client] = self.sent.get(client, 0) + len(message.get("body", b""))

        self.active += 1
        try:
            await self._app(scope, receive, counted)
        finally:
            self.active -= 1
            async with self._ended:
                self._ended.notify_all()

    async def until_active(self, count: int) -> None:
        """Wait until at most `count` requests are active, for at most ten seconds."""
        async with asyncio.timeout(10), self._ended:
            await self._ended.wait_for(lambda: self.active <= count)


async def allow() -> None:
    """Authorize every request."""


def make_app(session: Session, **options: Any) -> Watched:
    """Return an app with all routes."""

    async def get_session() -> Session:
        return session

    app = FastAPI()
    app.include_router(create_router(get_session, authorize=allow, workflows=["report"], **options))
    return Watched(app)


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    """Yield the kind and the data of each event as it arrives."""
    kind = ""
    while line := (await response.content.readline()).decode():
        name, _, text = line.rstrip("\n").partition(": ")
        if name == "event":
            kind = text
        elif name == "data":
            yield kind, json.loads(text)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Return a client without a connection limit that can read lines of up to 2 MiB."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=2**21) as client:
        yield client


async def test_two_hundred_clients_need_the_requests_of_one(
    sim: Simulator, session: Session, held: int, serve: Serve, http: aiohttp.ClientSession
) -> None:
    """Every client gets every event, and the last one has the total number of polls."""
    url = await serve(make_app(session))
    ready = asyncio.Semaphore(0)

    async def follow() -> tuple[list[str], Any]:
        seen = []
        async with http.get(f"{url}/executions/{held}/events") as response:
            async for event in events(response):
                seen.append(event)
                ready.release()
        return [kind for kind, _ in seen], seen[-1][1]

    followers = [asyncio.create_task(follow()) for _ in range(200)]
    for _ in followers:
        await ready.acquire()
    sim.finish(held, "Answer")
    outcomes = await asyncio.gather(*followers)
    assert all(kinds == ["snapshot", "node", "complete"] for kinds, _ in outcomes)
    assert all(data == outcomes[0][1] for _, data in outcomes)
    assert outcomes[0][1]["poll"] == sim.request_count


IMPATIENT = RetryPolicy(base=0.02, ceiling=0.05)


async def test_a_browser_that_came_too_early_waits(
    sim: Simulator,
    open_session: Callable[..., Session],
    held: int,
    serve: Serve,
    http: aiohttp.ClientSession,
) -> None:
    """The stream opens, and says what is wrong whenever that changes, until there is a snapshot."""
    sim.inject(Fault.status(503, times=None))
    url = await serve(make_app(open_session(retry=IMPATIENT)))
    async with http.get(f"{url}/executions/{held}/events") as response:
        assert response.status == 200
        lines = [(await response.content.readline()).decode() for _ in range(3)]
        assert lines[0] == "event: waiting\n"  # without an id, so that a browser keeps its own
        assert json.loads(lines[1].removeprefix("data: ")) == {
            "execution_id": str(held),
            "type": "ServerError",
            "message": "PromptLayer failed. Trying again.",
        }
        assert 1000 <= int(lines[2].removeprefix("retry: ")) <= 4000
        sim.clear_faults()
        sim.inject(Fault.status(429, times=None, retry_after=0.01))
        following = events(response)
        kind, data = await anext(following)
        assert (kind, data["type"]) == ("waiting", "RateLimited")
        sim.clear_faults()
        assert (await anext(following))[0] == "snapshot"
        sim.finish(held, "Answer")
        assert [kind async for kind, _ in following] == ["node", "complete"]


async def test_a_failure_after_waiting_is_an_event(
    sim: Simulator,
    open_session: Callable[..., Session],
    *,
    serve: Serve,
    http: aiohttp.ClientSession,
    recorder: Any,
) -> None:
    """It has no snapshot to show, if there was none; and a reader who leaves ends the polling."""
    sim.inject(Fault.stall())
    url = await serve(make_app(open_session(request_timeout=2.5, retry=IMPATIENT)))
    async with http.get(f"{url}/executions/77/events") as response:
        received = [event async for event in events(response)]
    (kind, waiting), (last, failure) = received[0], received[-1]
    assert (kind, waiting["type"]) == ("waiting", "NoAnswer")
    assert (last, failure["type"], failure["last"]) == ("failure", "NotFound", None)
    sim.inject(Fault.stall())
    ended = asyncio.create_task(recorder.next(WatchEnded))
    async with http.get(f"{url}/executions/77/events") as response:
        assert (await anext(events(response)))[0] == "waiting"
    assert (await ended).error is None


async def test_browsers_beyond_max_streams_come_back_later(
    session: Session, held: int, serve: Serve, http: aiohttp.ClientSession
) -> None:
    """They get a 200 and the time to wait, as an `EventSource` gives up after any other status."""
    app = make_app(session, max_streams=2)
    url = f"{await serve(app)}/executions/{held}/events"
    first, second = await http.get(url), await http.get(url)
    async with http.get(url) as refused:
        assert (refused.status, refused.content_type) == (200, "text/event-stream")
        retry = int((await refused.text()).removeprefix("retry: "))
    assert 10_000 <= retry <= 20_000
    first.close()
    await app.until_active(1)
    async with http.get(url) as admitted:
        assert (await anext(events(admitted)))[0] == "snapshot"
    second.close()


async def test_the_last_client_that_disconnects_stops_the_polling(
    sim: Simulator,
    session: Session,
    *,
    held: int,
    serve: Serve,
    http: aiohttp.ClientSession,
    recorder: Any,
) -> None:
    """Each request ends within a second; until then the other clients are served."""
    app = make_app(session)
    url = await serve(app)
    one = await http.get(f"{url}/executions/{held}/events")
    other = await http.get(f"{url}/executions/{held}/events")
    assert app.active == 2
    one.close()
    await app.until_active(1)
    await sim.wait_for_requests(sim.request_count + 2)
    ended = asyncio.create_task(recorder.next(WatchEnded))
    other.close()
    await app.until_active(0)
    assert (await ended).error is None


@pytest.mark.parametrize("route", ["", "/events", "/output"])
async def test_a_request_ends_when_its_client_disconnects(
    sim: Simulator,
    session: Session,
    *,
    held: int,
    serve: Serve,
    http: aiohttp.ClientSession,
    route: str,
) -> None:
    """The request is cancelled even while PromptLayer does not answer."""
    app = make_app(session)
    url = await serve(app)
    sim.inject(Fault.stall())
    request = asyncio.create_task(http.get(f"{url}/executions/{held}{route}"))
    await sim.wait_for_requests(1)
    request.cancel()
    await app.until_active(0)


async def test_a_start_whose_client_disconnects_is_reported(
    sim: Simulator,
    session: Session,
    *,
    serve: Serve,
    http: aiohttp.ClientSession,
    recorder: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The paid run is not lost: the session reports its id."""
    sim.add_workflow("report", Scenario([SimNode("Report")]))
    sim.inject(Fault.delay(0.3))
    url = await serve(make_app(session))
    request = asyncio.create_task(http.post(f"{url}/executions", json={"workflow": "report"}))
    await sim.wait_for_requests(1)
    started = asyncio.create_task(recorder.next(ExecutionStarted))
    request.cancel()
    event = await started
    assert (event.execution_id, event.abandoned) == (sim.runs[0].execution_id, True)
    assert f"execution {event.execution_id} of workflow 'report'" in caplog.text


@pytest.mark.parametrize("steps", range(12))
async def test_no_start_is_lost_in_whatever_step_its_client_disconnects(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    """Either the response is sent before the app is notified, or the log has the id."""
    sim.add_workflow("report", Scenario([SimNode("Report")]))
    body = [b'{"workflow": "report"}']
    is_notified = False
    was_notified_when_sending: list[bool] = []

    async def receive() -> dict[str, Any]:
        nonlocal is_notified
        if body:
            return {"type": "http.request", "body": body.pop()}
        while not sim.runs:  # noqa: ASYNC110 - each step counts
            await asyncio.sleep(0)
        for _ in range(steps):
            await asyncio.sleep(0)
        is_notified = True
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        was_notified_when_sending.append(is_notified)

    await make_app(session)(START.copy(), receive, send)
    await session.aclose()
    (run,) = sim.runs
    assert not was_notified_when_sending[0] or str(run.execution_id) in caplog.text


@pytest.mark.parametrize(
    ("event", "steps"), [("disconnected", 0), *(("cancelled", steps) for steps in range(6))]
)
async def test_no_start_is_lost_in_whatever_step_after_it_its_request_ends(
    sim: Simulator,
    open_session: Callable[..., Session],
    caplog: pytest.LogCaptureFixture,
    *,
    event: str,
    steps: int,
) -> None:
    """A server drops what is sent to a client that is gone, and may cancel a slow request."""
    sim.add_workflow("report", Scenario([SimNode("Report")]))
    gone = asyncio.Event()
    sent: list[bytes] = []
    bodies = [b'{"workflow": "report"}']

    def end(steps: int) -> None:
        if steps:
            asyncio.get_running_loop().call_soon(end, steps - 1)
        elif event == "cancelled":
            request.cancel()
        else:
            gone.set()

    async def receive() -> dict[str, Any]:
        if bodies:
            return {"type": "http.request", "body": bodies.pop()}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if not gone.is_set():
            sent.append(message.get("body", b""))

    def observe(event: Event) -> None:
        if isinstance(event, ExecutionStarted):
            end(steps)

    app = make_app(open_session(observers=[observe]))
    request = asyncio.create_task(app(START.copy(), receive, send))
    await asyncio.wait([request])
    (run,) = sim.runs
    assert str(run.execution_id) in caplog.text + b"".join(sent).decode()


async def test_heartbeats_are_comments(
    session: Session, held: int, serve: Serve, http: aiohttp.ClientSession
) -> None:
    """They are sent while nothing changes."""
    app = FastAPI()

    @app.get("/")
    async def follow() -> Any:
        return await execution_events(session.execution(held), heartbeat=0.01)

    response = await http.get(await serve(app))
    assert response.headers["x-accel-buffering"] == "no"
    lines = [(await response.content.readline()).decode() for _ in range(9)]
    assert [line.partition(": ")[0] for line in lines[:4]] == ["id", "event", "data", "retry"]
    assert lines[4:] == ["\n", ": \n", "\n", ": \n", "\n"]
    response.close()


class Restless:
    """A server whose one node has a new value of 256 KiB on every poll, until completed."""

    SIZE = 256 * 1024

    def __init__(self) -> None:
        self.polls = 0
        self.is_completed = False

    async def answer(self, request: web.Request) -> web.Response:
        """Answer a poll."""
        self.polls += 1
        value = f"{self.polls}".ljust(self.SIZE, ".")
        node = {"status": "SUCCESS" if self.is_completed else "RUNNING", "value": value}
        return web.json_response({"Node": node}, status=200 if self.is_completed else 202)


@pytest.fixture
async def restless() -> AsyncIterator[tuple[Restless, str]]:
    """Return such a server, and its URL."""
    upstream = Restless()
    app = web.Application()
    app.router.add_get("/workflow-version-execution-results", upstream.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield upstream, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def stop_reading(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return a connection that requested events, and reads almost none of them."""
    one_way = socket.socket()
    one_way.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one_way.setblocking(False)
    host, port = url.removeprefix("http://").split(":")
    await asyncio.get_running_loop().sock_connect(one_way, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=one_way, limit=4096)
    writer.write(b"GET /executions/1/events?stalled HTTP/1.0\r\n\r\n")
    return reader, writer


async def test_a_client_that_stops_reading_delays_no_other_and_catches_up(
    restless: tuple[Restless, str],
    open_session: Callable[..., Session],
    serve: Serve,
    http: aiohttp.ClientSession,
) -> None:
    """It has no backlog: when it reads again, it gets the latest state."""
    upstream, base_url = restless
    app = make_app(open_session(base_url=base_url))
    url = await serve(app)
    reader, writer = await stop_reading(url)
    changes = 0
    async with http.get(f"{url}/executions/1/events?reading") as response:
        async for kind, data in events(response):
            changes += kind == "node"
            upstream.is_completed = changes >= 100
            latest = data
    assert latest["complete"] is True
    assert app.sent["reading"] > 100 * Restless.SIZE
    # The capacity of the kernel's buffers on loopback, and a few events.
    assert app.sent["stalled"] < 20 * Restless.SIZE
    body = (await reader.read(-1)).decode()
    writer.close()
    received = [line for line in body.split("\n") if line.startswith("data: ")]
    assert json.loads(received[-1].removeprefix("data: ")) == latest
    assert len(received) < 25


async def test_a_client_that_never_reads_is_dropped(
    restless: tuple[Restless, str],
    open_session: Callable[..., Session],
    serve: Serve,
    recorder: Any,
    *,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Otherwise it could keep the polling going forever; the log has one line, and no traceback."""
    caplog.set_level("INFO", "promptlayer_exec")
    monkeypatch.setattr(_sse, "_SEND_TIMEOUT", 0.2)
    _, base_url = restless
    app = make_app(open_session(base_url=base_url))
    ended = asyncio.create_task(recorder.next(WatchEnded))
    _, writer = await stop_reading(await serve(app))
    await ended
    await app.until_active(0)
    writer.close()
    assert "a client did not read its events for 0.2 s" in caplog.messages
    assert not any(record.exc_info for record in caplog.records)
