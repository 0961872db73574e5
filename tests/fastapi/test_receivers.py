"""Receiving webhooks and callbacks in a FastAPI app, over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from fastapi import APIRouter, Depends, FastAPI

from promptlayer_exec import (
    ConfigurationError,
    Execution,
    PollPolicy,
    Session,
    StartUnknown,
    WatchWoken,
)
from promptlayer_exec.fastapi import (
    _receivers,
    create_callback_router,
    create_router,
    create_webhook_router,
)
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.webhooks import Callbacks

SECRET = "whsec_5f4d"
CALLBACKS = Callbacks("http://127.0.0.1:9/callbacks", secret="s3cret")
HELD = Scenario([SimNode("Report", "done", None, is_output_node=True)])
Serve = Callable[..., Awaitable[str]]


class App:
    """Routers that are served by uvicorn, and a client that posts to them."""

    def __init__(self, serve: Serve, http: aiohttp.ClientSession) -> None:
        self._serve = serve
        self._http = http
        self.url = ""

    async def serve(self, *routers: APIRouter) -> None:
        """Serve some routers."""
        app = FastAPI()
        for router in routers:
            app.include_router(router)
        self.url = await self._serve(app)

    async def post(
        self, path: str, payload: Any = None, *, method: str = "POST", **options: Any
    ) -> tuple[int, Any]:
        """Return the status and the decoded body of the response, None if it is empty."""
        if payload is not None:
            options["json"] = payload
        async with self._http.request(method, self.url + path, **options) as response:
            text = await response.text()
            is_json = response.content_type.endswith("json")
            return response.status, json.loads(text) if is_json else text or None


@pytest.fixture
async def app(serve: Serve) -> AsyncIterator[App]:
    """Return an app without routers."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=10)) as http:
        yield App(serve, http)


@asynccontextmanager
async def following(sim: Simulator, execution: Execution) -> AsyncIterator[asyncio.Task[Any]]:
    """Follow an execution that has been polled once, and will be again in an hour."""
    waiting = asyncio.create_task(execution.output())
    await sim.wait_for_requests(sim.request_count + 1)
    yield waiting
    waiting.cancel()
    await asyncio.wait([waiting])


@pytest.fixture
def slow(open_session: Callable[..., Session]) -> Session:
    """Return a session that polls once an hour, unless it is woken."""
    return open_session(poll=PollPolicy.fixed(3600.0))


def webhook(execution_id: int, **changes: Any) -> dict[str, Any]:
    """Return the payload of a webhook."""
    details = {"agent_name": "report", "agent_id": 1, "agent_execution_id": execution_id}
    return {"event_type": "agent_run_finished", "details": details, "workspace_id": 1, **changes}


def signed(payload: Any, secret: str = SECRET) -> dict[str, str]:
    """Return the header with a payload's signature."""
    text = json.dumps(payload, sort_keys=True)
    digest = hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()
    return {"X-PromptLayer-Signature": digest}


def callback(execution_id: int = 1001) -> dict[str, Any]:
    """Return the body of a callback."""
    return {"workflow_version_execution_id": execution_id, "final_output": {}}


async def test_a_webhook_wakes_the_watch_of_its_execution(
    sim: Simulator, slow: Session, recorder: Any, app: App
) -> None:
    """The simulator's own webhook does so: the result is there an hour before the next poll."""
    await app.serve(create_webhook_router(slow, secret=sim.webhook_secret))
    sim.webhook_url = f"{app.url}/webhook"
    sim.add_workflow("report", HELD)
    execution = await slow.start("report")
    async with following(sim, execution) as output:
        sim.finish(execution.id, "Report")
        assert await output == "done"
    await sim.wait_for_posts(1)
    assert [post.status for post in sim.posts] == [204]
    assert [(it.execution_id, it.source) for it in recorder.of(WatchWoken)] == [
        (execution.id, "webhook")
    ]
    assert sim.request_count == 3  # the start, and two polls


@pytest.mark.parametrize("kind", ["webhook", "callback"])
async def test_the_answer_is_sent_before_any_request_to_promptlayer(
    sim: Simulator, slow: Session, held: int, kind: str
) -> None:
    """However long it takes to send: until then, the watch sleeps."""
    app = FastAPI()
    app.include_router(create_webhook_router(slow, secret=SECRET))
    app.include_router(create_callback_router(slow, callbacks=CALLBACKS))
    payload = webhook(held) if kind == "webhook" else callback(held)
    path = "/webhook" if kind == "webhook" else f"/callbacks/{CALLBACKS.new_token()}"
    statuses: list[int] = []

    async def send(message: Any) -> None:
        if "status" in message:
            statuses.append(message["status"])
            with pytest.raises(TimeoutError):
                await sim.wait_for_requests(2, timeout=0.05)

    async with following(sim, slow.execution(held)):
        await app(http_scope(path, signed(payload)), body_of(payload), send)
        await sim.wait_for_requests(2)
    assert statuses == [204]


def http_scope(path: str, headers: dict[str, str]) -> dict[str, Any]:
    """Return the ASGI scope of a POST."""
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "root_path": "",
        "headers": raw,
    }


def body_of(payload: Any) -> Any:
    """Return an ASGI `receive` with a body, after which the client waits."""
    messages = [{"type": "http.request", "body": json.dumps(payload).encode()}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await asyncio.get_running_loop().create_future()

    return receive


async def test_a_forged_webhook_is_refused(
    sim: Simulator, slow: Session, held: int, app: App
) -> None:
    """It is 401 with a problem, and wakes nobody."""
    await app.serve(create_webhook_router(slow, secret=SECRET))
    payload = webhook(held)
    async with following(sim, slow.execution(held)):
        for forged in ({}, {"X-PromptLayer-Signature": "0" * 64}, signed(payload, "other")):
            status, problem = await app.post("/webhook", payload, headers=forged)
            assert (status, problem["type"]) == (401, "urn:promptlayer-exec:InvalidSignature")
            assert SECRET not in json.dumps(problem)
    assert sim.request_count == 1


async def test_other_events_and_unknown_executions_do_no_harm(
    sim: Simulator, slow: Session, app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """They are 204, even if the session is closed; nothing is asked of PromptLayer."""
    await app.serve(create_webhook_router(slow, secret=SECRET))
    for payload in ({"event_type": "report_finished"}, webhook(77), webhook(77)):
        assert await app.post("/webhook", payload, headers=signed(payload)) == (204, None)
    await slow.aclose()
    assert await app.post("/webhook", payload, headers=signed(payload)) == (204, None)
    assert sim.request_count == 0
    assert not [line for line in caplog.records if line.levelno > logging.INFO]


async def test_a_genuine_webhook_of_the_wrong_shape_is_422(session: Session, app: App) -> None:
    """The problem says where."""
    await app.serve(create_webhook_router(session, secret=SECRET))
    payload = webhook(77, details=None)
    status, problem = await app.post("/webhook", payload, headers=signed(payload))
    assert status == 422
    assert problem["detail"].endswith("$.details: expected an object, got null")


async def chunks(size: int) -> AsyncIterator[bytes]:
    """Yield a body whose size is not announced."""
    for _ in range(size // 2**16):
        yield b" " * 2**16
    yield b" " * (size % 2**16)


async def test_a_body_that_is_too_large_is_413(
    open_session: Callable[..., Session], app: App
) -> None:
    """Webhooks over 1 MiB, callbacks over the session's limit, whether announced or not."""
    session = open_session(max_response_bytes=1000)
    await app.serve(
        create_webhook_router(session, secret=SECRET),
        create_callback_router(session, callbacks=CALLBACKS),
    )
    path = f"/callbacks/{CALLBACKS.new_token()}"
    for where, size, expected in (
        ("/webhook", 2**20, 401),
        ("/webhook", 2**20 + 1, 413),
        (path, 1000, 422),
        (path, 1001, 413),
    ):
        for data in (io.BytesIO(b" " * size), chunks(size)):
            assert (await app.post(where, data=data))[0] == expected, (where, size, data)


async def test_a_callback_of_too_many_values_is_413(
    open_session: Callable[..., Session], app: App
) -> None:
    """Decoded, it would take much more memory than its bytes."""
    session = open_session(max_response_bytes=1_000_000)
    await app.serve(create_callback_router(session, callbacks=CALLBACKS))
    body = b"[" + b"[]," * 200_000 + b"[]]"
    status, problem = await app.post(f"/callbacks/{CALLBACKS.new_token()}", data=io.BytesIO(body))
    assert (status, "values" in problem["detail"]) == (413, True)


async def test_a_body_that_does_not_arrive_is_408(
    session: Session, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nobody holds a request open for ever."""
    assert _receivers._BODY_TIMEOUT == 30.0
    monkeypatch.setattr(_receivers, "_BODY_TIMEOUT", 0.05)
    await app.serve(create_webhook_router(session, secret=SECRET))

    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.get_running_loop().create_future()

    status, problem = await app.post("/webhook", data=never())
    assert (status, problem["detail"]) == (408, "The body did not arrive in 0.05 s.")


async def test_a_client_that_goes_away_is_no_error_of_the_server(session: Session) -> None:
    """There is no exception for a server to log; only its log of requests may show the 499."""
    app = FastAPI()
    app.include_router(create_webhook_router(session, secret=SECRET))
    statuses: list[int] = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    await app(http_scope("/webhook", {}), receive, send)
    assert statuses == [499]


async def test_a_lost_start_is_found_again(
    sim: Simulator, open_session: Callable[..., Session], app: App
) -> None:
    """End to end: start, lost answer, callback of the simulator, handle; one POST in all."""
    opened: list[Session] = []
    await app.serve(create_callback_router(lambda: opened[0], callbacks=CALLBACKS))
    session = open_session(callbacks=Callbacks(f"{app.url}/callbacks", secret="s3cret"))
    opened.append(session)
    sim.add_workflow("report", HELD)
    sim.inject(Fault.disconnect())
    with pytest.raises(StartUnknown) as caught:
        await session.start("report")
    recovering = asyncio.create_task(session.recover(caught.value, timeout=10))
    sim.finish(sim.runs[0].execution_id, "Report")
    assert await (await recovering).output() == "done"
    assert [request.method for request in sim.requests] == ["POST", "GET"]
    await sim.wait_for_posts(1)
    assert [(post.kind, post.status) for post in sim.posts] == [("callback", 204)]


@pytest.mark.parametrize(
    "posted",
    [
        {"final_output": {"Report": {"status": "SUCCESS", "value": "done"}}},
        {"final_output": "done"},
        {"final_output": None},
        {},
    ],
    ids=["node map", "main output", "null", "none"],
)
async def test_a_lost_start_is_found_again_whatever_output_its_callback_has(
    sim: Simulator, open_session: Callable[..., Session], app: App, posted: dict[str, Any]
) -> None:
    """With its token, the id is all that counts."""
    session = open_session(callbacks=CALLBACKS)
    await app.serve(create_callback_router(session, callbacks=CALLBACKS))
    sim.add_workflow("report", HELD)
    sim.inject(Fault.disconnect())
    with pytest.raises(StartUnknown) as caught:
        await session.start("report")
    (run,) = sim.runs
    body = {"workflow_version_execution_id": run.execution_id, **posted}
    assert await app.post(f"/callbacks/{caught.value.callback_token}", body) == (204, None)
    assert (await session.recover(caught.value, timeout=0)).id == run.execution_id


async def test_a_callback_without_an_id_is_422(session: Session, app: App) -> None:
    """The problem says where, and quotes no output."""
    await app.serve(create_callback_router(session, callbacks=CALLBACKS))
    for body in ([], {"final_output": "private"}, {"workflow_version_execution_id": "787"}):
        status, problem = await app.post(f"/callbacks/{CALLBACKS.new_token()}", body)
        assert (status, "expected an" in problem["detail"]) == (422, True)
        assert "private" not in problem["detail"]


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_callback_wakes_its_execution_and_is_handed_on(
    sim: Simulator, slow: Session, held: int, app: App, is_async: bool
) -> None:
    """To a function or a coroutine function, before the answer, each time that it comes."""
    received: list[tuple[str, int]] = []

    async def on_callback(token: str, execution_id: int) -> None:
        await asyncio.sleep(0)
        received.append((token, execution_id))

    def on_callback_sync(token: str, execution_id: int) -> None:
        received.append((token, execution_id))

    hand_on = on_callback if is_async else on_callback_sync
    await app.serve(create_callback_router(slow, callbacks=CALLBACKS, on_callback=hand_on))
    token = CALLBACKS.new_token()
    async with following(sim, slow.execution(held)) as output:
        sim.finish(held, "Answer")
        for count in (1, 2):
            assert await app.post(f"/callbacks/{token}", callback(held)) == (204, None)
            assert received == [(token, held)] * count
        assert await output == "42"


async def test_a_callback_that_cannot_be_handed_on_is_not_accepted(
    session: Session, app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """It is 500, so that the sender may send it again; this process has recorded it."""

    def on_callback(token: str, execution_id: int) -> None:
        raise OSError("the database is gone")

    await app.serve(create_callback_router(session, callbacks=CALLBACKS, on_callback=on_callback))
    token = CALLBACKS.new_token()
    assert (await app.post(f"/callbacks/{token}", callback()))[0] == 500
    error = StartUnknown("x", workflow="report", reason="lost", callback_token=token)
    assert (await session.recover(error)).id == 1001
    assert "the database is gone" in caplog.text
    assert token not in caplog.text


async def test_an_unknown_token_is_404(session: Session, app: App) -> None:
    """Before its body is read."""
    await app.serve(create_callback_router(session, callbacks=CALLBACKS))
    for token in ("x", "A" * 43, "..%2F..%2Fetc", "%00", "é"):
        assert (await app.post(f"/callbacks/{token}", data=b"not JSON"))[0] == 404, token


async def test_no_log_shows_a_token_or_a_secret(
    session: Session, app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """Except the server's own log of requests, which shows paths."""
    caplog.set_level(logging.DEBUG)
    await app.serve(
        create_callback_router(session, callbacks=CALLBACKS),
        create_webhook_router(session, secret=SECRET),
    )
    token = CALLBACKS.new_token()
    for body in (callback(), {}, []):
        await app.post(f"/callbacks/{token}", body)
    await app.post("/webhook", webhook(1), headers=signed(webhook(1)))
    lines = "".join(it.getMessage() for it in caplog.records if it.name != "uvicorn.access")
    assert not any(secret in lines for secret in (token, SECRET, "s3cret"))


async def test_the_session_may_be_a_dependency(
    sim: Simulator, slow: Session, held: int, app: App
) -> None:
    """With dependencies of its own, as in any app."""

    async def get_state() -> Session:
        return slow

    async def get_session(session: Session = Depends(get_state)) -> Session:  # noqa: B008
        return session

    await app.serve(create_webhook_router(get_session, secret=SECRET))
    async with following(sim, slow.execution(held)) as output:
        sim.finish(held, "Answer")
        payload = webhook(held)
        assert await app.post("/webhook", payload, headers=signed(payload)) == (204, None)
        assert await output == "42"


def test_mistakes_are_named_when_the_routers_are_made() -> None:
    """Not when the first webhook comes."""
    session = Session("pl_test")
    with pytest.raises(ConfigurationError, match="secret must not be empty"):
        create_webhook_router(session, secret="")
    with pytest.raises(TypeError, match="secret must be a str"):
        create_webhook_router(session, secret=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="session must be a Session or a dependency, got 5"):
        create_webhook_router(5, secret=SECRET)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="session must be a Session or a dependency, got 5"):
        create_router(5, authorize=lambda: None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"callbacks must be a .*Callbacks, got 'http://x'"):
        create_callback_router(session, callbacks="http://x")  # type: ignore[arg-type]
