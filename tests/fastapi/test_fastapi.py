"""Executions in a FastAPI app: responses, authorization and error texts."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import re
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

import promptlayer_exec
from promptlayer_exec import (
    BadRequest,
    ConfigurationError,
    ConnectionFailed,
    ExecutionFailed,
    ExecutionTimeout,
    Forbidden,
    InvalidInputs,
    InvalidOutput,
    InvalidResponse,
    KeyConflict,
    Node,
    NodeTimes,
    NotFound,
    PromptLayerExecError,
    RateLimited,
    RequestError,
    RequestTimeout,
    ResponseTooLarge,
    ServerError,
    Session,
    SessionClosed,
    Snapshot,
    StartUnknown,
    StatusError,
    StoreUnavailable,
    Unauthorized,
    UnprocessableEntity,
    WatchEnded,
)
from promptlayer_exec.fastapi import (
    Tickets,
    add_error_handlers,
    create_router,
    execution_events,
)
from promptlayer_exec.fastapi._responses import dump_json
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

PROBLEM = "application/problem+json"
SECRET = "text from PromptLayer"


async def allow() -> None:
    """Authorize every request."""


def make_app(session: Session, **options: Any) -> FastAPI:
    """Return an app that has the router, and authorizes every request by default."""
    app = FastAPI()
    app.include_router(create_router(lambda: session, **{"authorize": allow, **options}))
    return app


def connect(app: Any) -> httpx2.AsyncClient:
    """Return a client of an app in this loop; it returns a response once it is complete."""
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://app")


def read_events(body: str) -> list[tuple[str, str, Any]]:
    """Return the id, the kind and the data of each event of a stream."""
    events = []
    for block in body.split("\n\n"):
        fields = dict(re.findall(r"^(\w+): (.*)$", block, re.MULTILINE))
        if fields:
            events.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return events


async def test_each_change_of_a_node_is_one_event(
    sim: Simulator, session: Session, held: int
) -> None:
    """The stream is a full snapshot, one event per change however many polls, and the end."""
    async with connect(make_app(session)) as client:
        reading = asyncio.create_task(client.get(f"/executions/{held}/events"))
        await sim.wait_for_requests(5)
        sim.finish(held, "Answer", value="43")
        response = await reading
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    (_, first, snapshot), (_, second, node), (_, third, complete) = read_events(response.text)
    assert (first, second, third) == ("snapshot", "node", "complete")
    (retry,) = re.findall(r"^retry: (\d+)$", response.text, re.MULTILINE)
    assert 1000 <= int(retry) <= 4000
    assert snapshot["execution_id"] == node["execution_id"] == str(held)
    assert (snapshot["complete"], snapshot["succeeded"], snapshot["progress"]) == (False, None, 0.5)
    assert (node["name"], node["status"], node["value"]) == ("Answer", "SUCCESS", "43")
    assert (node["progress"], node["running"] < node["final"]) == (1.0, True)
    assert complete["succeeded"] is True
    del node["execution_id"], node["progress"]
    assert {**snapshot["nodes"], "Answer": node} == complete["nodes"]


async def test_a_complete_execution_needs_one_request(sim: Simulator, session: Session) -> None:
    """The stream is a snapshot and the end; the nodes are in the server's order."""
    execution_id = sim.add_execution(Scenario([SimNode("b"), SimNode("a", status="FAILED")]))
    async with connect(make_app(session)) as client:
        response = await client.get(f"/executions/{execution_id}/events")
    (_, first, snapshot), (_, last, complete) = read_events(response.text)
    assert (first, last, sim.request_count) == ("snapshot", "complete", 1)
    assert snapshot == complete
    assert list(complete["nodes"]) == ["b", "a"]
    assert complete["succeeded"] is False


def end(sim: Simulator, held: int, ending: str) -> None:
    """Make the last event of an execution's streams a certain one."""
    if ending == "complete":
        sim.finish(held, "Answer")
    else:
        sim.inject(Fault.status(403))


@pytest.mark.parametrize("ending", ["complete", "failure"])
async def test_a_client_that_has_the_last_event_gets_204(
    sim: Simulator, session: Session, held: int, ending: str
) -> None:
    """The id alone says so to any process, so no request is sent to PromptLayer."""
    events = await events_after(sim, session, held, lambda: end(sim, held, ending))
    last_id, kind, _ = events[-1]
    assert kind == ending
    sent = sim.request_count
    async with connect(make_app(session)) as client:
        headers = {"Last-Event-ID": last_id}
        response = await client.get(f"/executions/{held}/events", headers=headers)
    assert (response.status_code, response.content, sim.request_count) == (204, b"", sent)


async def test_any_other_last_event_id_starts_again(sim: Simulator, session: Session) -> None:
    """The id of another execution's end, of an earlier event, and an invalid one do so."""
    execution_id, other = (sim.add_execution(Scenario([SimNode("Answer")])) for _ in range(2))
    async with connect(make_app(session)) as client:
        response = await client.get(f"/executions/{other}/events")
        foreign, _, _ = read_events(response.text)[-1]
        response = await client.get(f"/executions/{execution_id}/events")
        first, _, _ = read_events(response.text)[0]
        for last in (foreign, first, "", "\xe9"):
            headers = {b"Last-Event-ID": last.encode("latin-1")}
            response = await client.get(f"/executions/{execution_id}/events", headers=headers)
            assert read_events(response.text)[0][1] == "snapshot"


def assert_elsewhere(response: httpx2.Response) -> None:
    """Check that an `EventSource` connects again after some time: only after a 200 does it so."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    retry = re.fullmatch(r"retry: (\d+)\n\n", response.text)
    assert retry is not None
    assert 10_000 <= int(retry[1]) <= 20_000


async def events_after(
    sim: Simulator, session: Session, held: int, interfere: Callable[[], Any]
) -> list[tuple[str, str, Any]]:
    """Return the events of a stream; `interfere` is called after the first one."""
    async with connect(make_app(session)) as client:
        reading = asyncio.create_task(client.get(f"/executions/{held}/events"))
        await sim.wait_for_requests(2)
        interfere()
        return read_events((await reading).text)


async def test_an_error_after_the_first_event_is_an_event(
    sim: Simulator, session: Session, held: int
) -> None:
    """It has the last snapshot, and no text from PromptLayer."""
    body = json.dumps({"message": SECRET}).encode()
    events = await events_after(
        sim,
        session,
        held,
        lambda: sim.inject(Fault.status(403, body=body, headers={"X-S": SECRET})),
    )
    _, kind, failure = events[-1]
    assert kind == "failure"
    assert failure.pop("last")["nodes"]["Plan"]["value"] == "done"
    assert failure == {
        "type": "Forbidden",
        "message": "PromptLayer refused this server's credentials.",
        "status": 502,
        "execution_id": str(held),
    }


async def test_a_stream_ends_at_the_wait_timeout(
    open_session: Callable[..., Session], held: int
) -> None:
    """Its last event is a `failure` with the type `ExecutionTimeout`."""
    async with connect(make_app(open_session(wait_timeout=0.2))) as client:
        response = await client.get(f"/executions/{held}/events")
    assert read_events(response.text)[-1][2]["type"] == "ExecutionTimeout"


async def test_a_foreign_error_is_described_in_general_terms(
    sim: Simulator,
    open_session: Callable[..., Session],
    held: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error of a limiter, say, is logged, and the stream ends with a general text."""

    class Broken:
        async def acquire(self) -> None:
            if sim.request_count >= 2:
                raise OSError(SECRET)

    events = await events_after(sim, open_session(limiter=Broken()), held, lambda: None)
    _, _, failure = events[-1]
    assert (failure["type"], failure["message"]) == ("InternalServerError", "This server failed.")
    assert failure["last"]["nodes"]["Plan"]["value"] == "done"
    assert SECRET in caplog.text


async def test_closing_the_session_ends_the_stream_without_an_event(
    sim: Simulator, session: Session, held: int
) -> None:
    """A `failure` would stop the browser from reconnecting to the next process."""
    app = make_app(session)
    async with connect(app) as client:
        reading = asyncio.create_task(client.get(f"/executions/{held}/events"))
        await sim.wait_for_requests(2)
        await session.aclose()
        assert [kind for _, kind, _ in read_events((await reading).text)] == ["snapshot"]
        elsewhere = await client.get(f"/executions/{held}/events")
    assert_elsewhere(elsewhere)


async def test_a_response_that_is_never_sent_ends_the_watch(
    session: Session, held: int, recorder: Any
) -> None:
    """A middleware may replace the response, for example."""
    await execution_events(session.execution(held))
    await recorder.next(WatchEnded)


async def test_a_heartbeat_of_zero_sends_none(sim: Simulator, session: Session, held: int) -> None:
    """The stream has its events alone, however long it takes."""
    app = FastAPI()

    @app.get("/")
    async def follow() -> Any:
        return await execution_events(session.execution(held), heartbeat=0)

    async with connect(app) as client:
        reading = asyncio.create_task(client.get("/"))
        await sim.wait_for_requests(5)
        sim.finish(held, "Answer")
        assert ": \n" not in (await reading).text


async def test_a_negative_heartbeat_is_refused(sim: Simulator, session: Session) -> None:
    """No request is sent."""
    with pytest.raises(ValueError, match="at least 0 seconds"):
        await execution_events(session.execution(1), heartbeat=-1)
    assert sim.request_count == 0


async def test_the_nodes_as_they_are_now(sim: Simulator, session: Session, held: int) -> None:
    """The snapshot takes one request, whether the execution is complete or not."""
    async with connect(make_app(session)) as client:
        response = await client.get(f"/executions/{held}")
    assert (response.status_code, response.headers["cache-control"]) == (200, "no-store")
    assert response.json()["nodes"]["Answer"]["status"] == "RUNNING"
    assert (response.json()["execution_id"], sim.request_count) == (str(held), 1)


async def test_the_output_route_waits(sim: Simulator, session: Session, held: int) -> None:
    """It returns the main output as it is."""
    async with connect(make_app(session)) as client:
        waiting = asyncio.create_task(client.get(f"/executions/{held}/output"))
        await sim.wait_for_requests(2)
        sim.finish(held, "Answer", value=[42])
        response = await waiting
    assert (response.status_code, response.json()) == (200, [42])


async def test_a_failed_execution_has_no_output(sim: Simulator, session: Session) -> None:
    """The response is a 409 with the nodes that failed."""
    node = SimNode("Answer", status="FAILED", error_message="refused", is_output_node=True)
    execution_id = sim.add_execution(Scenario([node]))
    async with connect(make_app(session)) as client:
        response = await client.get(f"/executions/{execution_id}/output")
    assert (response.status_code, response.headers["content-type"]) == (409, PROBLEM)
    assert response.json()["failed"] == [{"name": "Answer", "error_message": "refused"}]
    assert response.json()["execution_id"] == str(execution_id)


async def test_an_early_error_is_the_response(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """Every route handles errors itself; PromptLayer's text is only in the log."""
    body = json.dumps({"message": SECRET}).encode()
    async with connect(make_app(session)) as client:
        for route in ("", "/events", "/output"):
            sim.inject(Fault.status(401, body=body))
            response = await client.get(f"/executions/7{route}")
            assert (response.status_code, response.headers["content-type"]) == (502, PROBLEM)
            assert SECRET not in response.text
            assert (await client.get(f"/executions/7{route}")).status_code == 404
    assert caplog.text.count(SECRET) == 3


async def test_no_output_reaches_the_log(
    sim: Simulator, session: Session, held: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer of the wrong shape is an error that quotes the body, but not in the log."""
    async with connect(make_app(session)) as client:
        sim.inject(Fault.status(200, body=b'["%s"]' % SECRET.encode()))
        response = await client.get(f"/executions/{held}")
    assert response.status_code == 502
    assert f"InvalidResponse: execution {held}: the 200 response has an unexpected" in caplog.text
    assert SECRET not in caplog.text + response.text


@pytest.mark.parametrize("execution_id", ["0", "-1", "x", str(2**63), "9" * 5000])
async def test_an_impossible_id_is_refused(
    sim: Simulator, session: Session, execution_id: str
) -> None:
    """The problem names the parameter; no request is sent."""
    async with connect(make_app(session)) as client:
        response = await client.get(f"/executions/{execution_id}")
    assert (response.status_code, response.headers["content-type"]) == (422, PROBLEM)
    assert response.json()["errors"][0]["loc"] == ["path", "execution_id"]
    assert sim.request_count == 0


CONTEXT: dict[str, Any] = {"execution_id": 7}
STATUS: dict[str, Any] = {**CONTEXT, "server_message": SECRET, "body": SECRET, "reason": SECRET}
ANSWERS: list[tuple[PromptLayerExecError, int]] = [
    (BadRequest(SECRET, status=400, **STATUS), 422),
    (Unauthorized(SECRET, status=401, **STATUS), 502),
    (Forbidden(SECRET, status=403, **STATUS), 502),
    (NotFound(SECRET, status=404, **STATUS), 404),
    (UnprocessableEntity(SECRET, status=422, **STATUS), 422),
    (RateLimited(SECRET, status=429, **STATUS), 503),
    (ServerError(SECRET, status=503, **STATUS), 502),
    (StatusError(SECRET, status=302, **STATUS), 502),
    (ConnectionFailed(SECRET, reason=SECRET, **CONTEXT), 502),
    (RequestTimeout(SECRET, reason=SECRET, **CONTEXT), 504),
    (InvalidResponse(SECRET, status=200, excerpt=SECRET, **CONTEXT), 502),
    (ResponseTooLarge(SECRET, limit=1, status=200, excerpt=SECRET, **CONTEXT), 502),
    (StartUnknown(SECRET, workflow=SECRET, reason=SECRET), 502),
    (ExecutionTimeout(SECRET, timeout=1.0, **CONTEXT), 504),
    (ExecutionFailed(SECRET, failed=(Node("Plan", "FAILED"),), **CONTEXT), 409),
    (InvalidOutput(SECRET, path=SECRET, value=SECRET, reason=SECRET, **CONTEXT), 502),
    (SessionClosed(SECRET, **CONTEXT), 503),
    (InvalidInputs(SECRET), 422),
    (KeyConflict(SECRET, key=SECRET), 422),
    (StoreUnavailable(SECRET), 503),
    (ConfigurationError(SECRET), 500),
]


def raising(error: Exception) -> TestClient:
    """Return a client of an app with error handlers, whose route raises an error."""
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    return TestClient(app)


@pytest.mark.parametrize(("error", "status"), ANSWERS, ids=lambda value: type(value).__name__)
def test_every_error_has_its_response(error: PromptLayerExecError, status: int) -> None:
    """It is a problem of its own type, without any text from PromptLayer."""
    response = raising(error).get("/")
    assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM)
    problem = response.json()
    assert problem["type"] == f"urn:promptlayer-exec:{type(error).__name__}"
    assert problem["status"] == status
    assert problem.get("execution_id") == (None if error.execution_id is None else "7")
    assert SECRET not in response.text + repr(response.headers)


def test_every_public_error_is_listed() -> None:
    """A new error must be added to the mapping, and to the docs."""
    public = {getattr(promptlayer_exec, name) for name in promptlayer_exec.__all__[:-1]}
    errors = {cls for cls in public if isinstance(cls, type) and issubclass(cls, Exception)}
    listed = {type(error) for error, _ in ANSWERS}
    assert errors - listed == {PromptLayerExecError, RequestError}
    docs = (Path(__file__).parents[2] / "docs" / "web-access.md").read_text(encoding="utf-8")
    for error, status in ANSWERS:
        assert re.search(rf"^\|.*`{type(error).__name__}`.*\| {status} \|$", docs, re.MULTILINE)


class Novel(PromptLayerExecError):
    """An error that the mapping does not list."""


def test_an_unlisted_error_is_an_internal_server_error() -> None:
    """The response is a 500 with a general text."""
    response = raising(Novel(SECRET)).get("/")
    assert (response.status_code, SECRET in response.text) == (500, False)
    assert response.json()["type"] == "urn:promptlayer-exec:InternalServerError"


@pytest.mark.parametrize(
    ("announced", "header"), [(None, "5"), (0.0, "1"), (1.2, "2"), (math.inf, "3600")]
)
def test_a_429_becomes_a_503_with_retry_after(announced: float | None, header: str) -> None:
    """Retry-After is in whole seconds: at least one, and at most an hour."""
    error = RateLimited(SECRET, status=429, server_message=SECRET, retry_after=announced)
    assert raising(error).get("/").headers["retry-after"] == header


def test_the_router_s_problems_keep_headers() -> None:
    """An HTTPException of `authorize` becomes a problem with the exception's headers."""

    async def challenge() -> None:
        raise HTTPException(401, "Log in.", {"WWW-Authenticate": "Basic"})

    response = TestClient(make_app(Session("key"), authorize=challenge)).get("/executions/7")
    assert (response.status_code, response.headers["content-type"]) == (401, PROBLEM)
    assert response.headers["www-authenticate"] == "Basic"
    assert response.json() == {
        "type": "about:blank",
        "title": "Unauthorized",
        "status": 401,
        "detail": "Log in.",
    }


ROUTES = [
    ("GET", "/executions/7"),
    ("GET", "/executions/7/events"),
    ("GET", "/executions/7/output"),
    ("POST", "/executions"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_is_authorized(
    sim: Simulator, session: Session, method: str, path: str
) -> None:
    """`authorize` gets the request and any id; after a refusal no request is sent."""
    seen = []

    async def authorize(request: Request, execution_id: int | None = None) -> bool:
        seen.append((request.method, execution_id))
        return False

    async with connect(make_app(session, authorize=authorize, workflows=["report"])) as client:
        response = await client.request(method, path, json={"workflow": "report"})
    assert (response.status_code, response.headers["content-type"]) == (403, PROBLEM)
    assert seen == [(method, None if method == "POST" else 7)]
    assert sim.request_count == 0


async def test_an_id_in_the_query_does_not_reach_authorize(session: Session) -> None:
    """A client that may see one execution could otherwise name it to start another."""
    seen = []

    async def authorize(execution_id: int | None = None) -> None:
        seen.append(execution_id)

    async with connect(make_app(session, authorize=authorize, workflows=["report"])) as client:
        response = await client.post("/executions?execution_id=7", json={"workflow": "report"})
    assert (response.status_code, seen) == (400, [])


async def test_authorize_is_resumed_after_its_yield_before_the_stream(
    sim: Simulator, session: Session, held: int
) -> None:
    """A database connection, say, is not held for as long as the stream is open."""
    released = asyncio.Event()

    async def authorize() -> AsyncIterator[None]:
        yield
        released.set()

    async with connect(make_app(session, authorize=authorize)) as client:
        reading = asyncio.create_task(client.get(f"/executions/{held}/events"))
        async with asyncio.timeout(20):
            await released.wait()
        sim.finish(held, "Answer")
        await reading


def test_authorize_is_required() -> None:
    """It must be given, and must not be None."""
    with pytest.raises(TypeError, match="authorize"):
        create_router(allow)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="authorize must be a dependency, got None"):
        create_router(allow, authorize=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"write \['report'\]"):
        create_router(allow, authorize=allow, workflows="report")


async def test_nothing_can_be_started_by_default(session: Session) -> None:
    """Without `workflows` there is no route that starts a run."""
    async with connect(make_app(session)) as client:
        assert (await client.post("/executions", json={"workflow": "x"})).status_code == 404


async def test_an_allowed_workflow_is_started(sim: Simulator, session: Session) -> None:
    """The response is a 201 with the id, and a Location."""
    sim.add_workflow("reports/weekly", Scenario([SimNode("Report")]))
    body = {"workflow": "reports/weekly", "inputs": {"topic": "otters"}}
    async with connect(make_app(session, workflows=["reports/weekly"])) as client:
        response = await client.post("/executions", json=body)
        assert (response.status_code, response.json()) == (201, {"execution_id": "1001"})
        seen = await client.get(
            httpx2.URL("http://app/executions").join(response.headers["location"])
        )
    assert seen.json()["complete"] is True
    assert [run.inputs for run in sim.runs] == [{"topic": "otters"}]


async def test_a_missing_input_starts_nothing(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """The problem says what is missing, and what was perhaps meant."""
    sim.add_workflow("report", Scenario([]), inputs={"topic": "string"})
    session = open_session(check_inputs=True)
    async with connect(make_app(session, workflows=["report"])) as client:
        body = {"workflow": "report", "inputs": {"topik": "otters"}}
        response = await client.post("/executions", json=body)
    assert (response.status_code, response.headers["content-type"]) == (422, PROBLEM)
    assert "'topik' (did you mean 'topic'?)" in response.json()["detail"]
    assert sim.runs == []


async def test_the_warning_of_a_start_is_passed_on(sim: Simulator, session: Session) -> None:
    """Only the server knows that an input is missing; the run was started all the same."""
    sim.add_workflow("report", Scenario([SimNode("Report")]), inputs={"topic": "string"})
    async with connect(make_app(session, workflows=["report"])) as client:
        response = await client.post("/executions", json={"workflow": "report"})
    warning = "Missing input variables: topic"
    assert response.status_code == 201
    assert response.json() == {"execution_id": "1001", "warning": warning}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"workflow": "other"}, 403),
        ({"workflow": "Report"}, 403),
        ({}, 422),
        ({"workflow": 7}, 422),
        ({"workflow": "report", "inputs": []}, 422),
        ({"workflow": "report", "callback_url": "http://evil"}, 422),
        ({"workflow": "report", "inputs": {"x": [math.nan]}}, 422),
    ],
)
async def test_an_invalid_start_is_refused(
    sim: Simulator, session: Session, body: Any, status: int
) -> None:
    """An unlisted workflow or a malformed body is a problem; no request is sent."""
    async with connect(make_app(session, workflows=["report"])) as client:
        headers = {"Content-Type": "application/json"}
        response = await client.post("/executions", content=json.dumps(body), headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM)
    assert sim.request_count == 0


async def test_a_lost_answer_says_that_the_run_may_have_started(
    sim: Simulator, session: Session
) -> None:
    """The problem has a type of its own, so that clients do not repeat the start blindly."""
    sim.add_workflow("report", Scenario([SimNode("Report")]))
    sim.inject(Fault.disconnect())
    async with connect(make_app(session, workflows=["report"])) as client:
        response = await client.post("/executions", json={"workflow": "report"})
    assert response.status_code == 502
    assert response.json()["type"] == "urn:promptlayer-exec:StartUnknown"
    assert "may have started" in response.json()["title"]
    assert len(sim.runs) == 1


def strict(text: str) -> Any:
    """Read JSON as RFC 8259 defines it."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text.encode(), parse_constant=refuse)


def cleaned(value: Any) -> Any:
    """Return what JSON turns a value into; written differently from the code under test."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in value)
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if isinstance(value, dict):
        return {cleaned(key): cleaned(item) for key, item in value.items()}
    return value


TEXTS = st.text(st.characters(exclude_categories=())) | st.sampled_from(
    ["NaN", '"NaN', '\\"-Infinity', "\u2028\r\n", "\ud83d\ude00", "a\\"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda values: st.lists(values) | st.dictionaries(TEXTS, values),
)


@given(VALUES)
def test_json_is_valid_whatever_the_value(value: Any) -> None:
    """It is one line; only `NaN`, infinities and lone surrogates are replaced."""
    text = dump_json(value)
    assert not {"\r", "\n"} & set(text)
    # Two keys may become one; dict() keeps the last, as a parser does.
    assert repr(strict(text)) == repr(cleaned(value))


def test_the_json_of_a_long_text_takes_little_memory() -> None:
    """Even if words that browsers cannot parse are in it, as in a table with empty cells."""
    text = "1,NaN\n" * 100_000
    tracemalloc.start()
    dump_json({"t": text})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * len(text)


async def test_values_that_browsers_cannot_parse_are_replaced(
    sim: Simulator, session: Session
) -> None:
    """This holds for events and for other responses."""
    value = {"x": [math.nan, -math.inf], "s": "\ud800!", "i": 2**70, "t": "NaN\u2028\n"}
    node = SimNode("Answer \udfff", value, is_output_node=True)
    execution_id = sim.add_execution(Scenario([node]))
    readable = {"x": [None, None], "s": "\ufffd!", "i": 2**70, "t": "NaN\u2028\n"}
    async with connect(make_app(session)) as client:
        output = await client.get(f"/executions/{execution_id}/output")
        events = await client.get(f"/executions/{execution_id}/events")
    assert strict(output.text) == readable
    assert read_events(events.text)[0][2]["nodes"]["Answer \ufffd"]["value"] == readable


def test_the_router_has_an_openapi_description(session: Session) -> None:
    """Every answer has a schema, which has the fields of a node that are shown, and no other."""
    app = make_app(
        session, workflows=["report"], tickets=Tickets("secret"), fields=["raw_error_message"]
    )
    schema = app.openapi()
    assert set(schema["paths"]) == {
        "/executions",
        "/executions/events",
        "/executions/{execution_id}",
        "/executions/{execution_id}/events",
    }
    for path in schema["paths"].values():
        for operation in path.values():
            assert PROBLEM in operation["responses"]["4XX"]["content"]
            for status in operation["responses"].keys() - {"204", "304"}:
                contents = operation["responses"][status]["content"].values()
                assert all(content["schema"] for content in contents)
    started = schema["paths"]["/executions"]["post"]["responses"]["201"]
    started = started["content"]["application/json"]["schema"]
    assert started["required"] == ["execution_id", "ticket"]
    events = schema["paths"]["/executions/{execution_id}/events"]["get"]["responses"]["200"]
    (kinds,) = (content["schema"]["anyOf"] for content in events["content"].values())
    assert [kind["title"] for kind in kinds] == [
        "Snapshot",
        "Changed node",
        "Waiting",
        "Resumed",
        "Failure",
    ]
    node = kinds[0]["properties"]["nodes"]["additionalProperties"]["properties"]
    assert "raw_error_message" in node
    assert {"value", "error_message"}.isdisjoint(node)


def test_every_field_of_a_node_is_described_wherever_one_looks(session: Session) -> None:
    """In OpenAPI, in the types of the browser module, and in the docstrings."""
    fields = [field.name for field in attrs.fields(Node)]
    snapshot = Snapshot(7, False, {"Plan": Node("Plan", "RUNNING")})
    shown = set(snapshot.to_dict()["nodes"]["Plan"])
    assert shown == {*fields, *(field.name for field in attrs.fields(NodeTimes))}

    optional = set(fields) - {"name", "status", "is_output_node"}
    paths = make_app(session, fields=optional).openapi()["paths"]
    response = paths["/executions/{execution_id}"]["get"]["responses"]["200"]
    (content,) = response["content"].values()
    node = content["schema"]["properties"]["nodes"]["additionalProperties"]
    assert set(node["properties"]) == set(node["required"]) == shown

    module = Path(promptlayer_exec.fastapi.__file__).with_name("client.js")
    declarations = module.with_suffix(".d.ts").read_text()
    (comment,) = re.findall(r"(?s)@typedef \{object\} Node\b(.*?)@typedef", module.read_text())
    (declared,) = re.findall(r"(?ms)^export type Node = \{$(.*?)^\};$", declarations)
    assert set(re.findall(r"@property \{.*?\} \[?(\w+)", comment)) == shown
    assert set(re.findall(r"(?m)^    (\w+)\??: ", declared)) == shown

    attributes = set(re.findall(r"(?m)^ {8}(\w+): ", inspect.getsource(Node)))
    assert attributes == set(fields)
    assert shown <= set(re.findall(r'"(\w+)"', Snapshot.to_dict.__doc__ or ""))


def test_a_test_client_needs_no_with(threaded_sim: Simulator) -> None:
    """Each request then has an event loop of its own, in which a global session opens again."""
    execution_id = threaded_sim.add_execution(Scenario([SimNode("Report", "done")]))
    session = Session(threaded_sim.api_key, base_url=threaded_sim.base_url)
    client = TestClient(make_app(session))
    for _ in range(2):
        assert client.get(f"/executions/{execution_id}").json()["complete"] is True
        assert "event: complete" in client.get(f"/executions/{execution_id}/events").text
