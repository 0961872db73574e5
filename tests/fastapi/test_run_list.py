"""One stream of events for many executions, and what it has in common with that of one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import attrs
import httpx2
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request

from promptlayer_exec import (
    NotFound,
    RequestRetried,
    RetryPolicy,
    Session,
    WatchEnded,
    WatchStarted,
)
from promptlayer_exec.fastapi import Tickets, _run_events, create_router
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

TICKETS = Tickets("of the app")
DONE = Scenario([SimNode("Answer", "done", is_output_node=True)])
HELD = Scenario([SimNode("Plan", "done"), SimNode("Answer", "42", None, is_output_node=True)])
IMPATIENT = RetryPolicy(base=0.02, ceiling=0.05)


async def allow() -> None:
    """Authorize every request."""


async def refuse() -> bool:
    """Refuse every request."""
    return False


def make_app(session: Session, authorize: Any = allow, **options: Any) -> FastAPI:
    """Return an app with the routes."""
    app = FastAPI()
    app.include_router(create_router(session, authorize=authorize, **options))
    return app


def connect(app: FastAPI) -> httpx2.AsyncClient:
    """Return a client of an app in this loop; it returns a response once it is complete."""
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://app")


def query(*execution_ids: int | str) -> str:
    """Return the address of the stream for some executions."""
    return "/executions/events?" + "&".join(f"id={one}" for one in execution_ids)


class Event:
    """One event of a stream.

    Attributes:
        kind: its name.
        id: its id, if it has one.
        run: the id of its execution.
        data: all data.
    """

    def __init__(self, block: str) -> None:
        fields = dict(re.findall(r"^(\w+): (.*)$", block, re.MULTILINE))
        self.kind = fields["event"]
        self.id = fields.get("id")
        self.data = json.loads(fields["data"])
        self.run = int(self.data["execution_id"])


def read(text: str) -> list[Event]:
    """Return the events of a whole stream."""
    return [Event(block) for block in text.split("\n\n") if "event: " in block]


def kinds(events: list[Event], run: int) -> list[str]:
    """Return the kinds of the events of one execution."""
    return [event.kind for event in events if event.run == run]


async def stream(response: aiohttp.ClientResponse) -> AsyncIterator[Event]:
    """Yield each event as it arrives."""
    block = ""
    while line := (await response.content.readline()).decode():
        block += line
        if line == "\n":
            if "event: " in block:
                yield Event(block)
            block = ""


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Return a client that can read long lines."""
    async with aiohttp.ClientSession(read_bufsize=2**21) as client:
        yield client


async def test_the_runs_of_a_list_share_one_stream(sim: Simulator, session: Session) -> None:
    """What is complete has one event, what fails does not end the others, then it ends."""
    done, held = sim.add_execution(DONE), sim.add_execution(HELD)
    async with connect(make_app(session)) as client:
        reading = asyncio.create_task(client.get(query(done, held, 77)))
        await sim.wait_for_requests(6)
        sim.finish(held, "Answer", value="43")
        response = await reading
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert re.match(r": \nretry: [1-4]\d{3}\n\n", response.text)
    events = read(response.text)
    assert kinds(events, done) == ["complete"]
    assert kinds(events, held) == ["snapshot", "node", "complete"]
    assert kinds(events, 77) == ["failure"]
    (failure,) = (event.data for event in events if event.run == 77)
    assert failure == {
        "execution_id": "77",
        "type": "NotFound",
        "message": "The execution or workflow does not exist.",
        "status": 404,
        "last": None,
    }
    assert events[-1].data["nodes"]["Answer"]["value"] == "43"
    assert sim.request_count == events[-1].data["poll"] + 2


async def test_what_has_ended_is_not_sent_again(sim: Simulator, session: Session) -> None:
    """The id of an event says so, to any process: it is neither asked, polled nor sent again."""
    one, two, held = sim.add_execution(DONE), sim.add_execution(DONE), sim.add_execution(HELD)
    asked: list[int | None] = []

    async def authorize(execution_id: int | None = None) -> None:
        asked.append(execution_id)

    address = query(one, held, one, 77, two)
    async with connect(make_app(session, authorize)) as client:
        reading = asyncio.create_task(client.get(address))
        await sim.wait_for_requests(8)
        await session.aclose()
        events = read((await reading).text)
    assert sorted(asked) == sorted([one, held, 77, two])
    assert kinds(events, held)[-1] != "complete"  # it ended without an event for this one
    last = events[-1].id
    assert last is not None
    assert len(last) <= 34

    async with Session(sim.api_key, base_url=sim.base_url, push=False) as another:
        asked.clear()
        sent = sim.request_count
        app = make_app(another, authorize, max_streams=1)
        async with connect(app) as client:
            sim.finish(held, "Answer")
            resumed = await client.get(address, headers={"Last-Event-ID": last})
            (event,) = read(resumed.text)
            assert (event.run, event.kind, asked) == (held, "complete", [held])
            assert sim.request_count == sent + 1
            known = {"Last-Event-ID": str(event.id)}
            ended = await client.get(address, headers=known)
            assert (ended.status_code, ended.content, asked) == (204, b"", [held])
            for other in (query(one, two), query(two, one, held, 77)):
                text = (await client.get(other, headers=known)).text
                assert {event.run for event in read(text)} >= {one, two}


async def test_a_list_has_1_to_100_different_ids(sim: Simulator, session: Session) -> None:
    """Anything else is a 422; a repeated id counts once."""
    ids = [sim.add_execution(DONE) for _ in range(101)]
    async with connect(make_app(session)) as client:
        for wrong in ("/executions/events", query(*ids), query(0), query(2**63), query("x")):
            response = await client.get(wrong)
            assert response.status_code == 422
            assert response.json()["type"] == "urn:promptlayer-exec:InvalidRequest"
        most = await client.get(query(*ids[:100], ids[0]))
        assert len(read(most.text)) == 100
        named = await client.get(query(ids[0]) + f"&execution_id={ids[1]}")
        assert named.status_code == 400


async def test_authorize_is_asked_for_each_run(sim: Simulator, session: Session) -> None:
    """With all its dependencies, overrides and its own state; a refusal is that run's failure."""
    mine, foreign, gone = (sim.add_execution(DONE) for _ in range(3))
    ended = []

    async def placeholder() -> str:
        raise AssertionError

    async def user() -> str:
        return "ada"

    async def connection(request: Request, execution_id: int) -> AsyncIterator[None]:
        request.state.run = execution_id
        await asyncio.sleep(0)
        yield
        ended.append(execution_id)

    # Annotations, which are strings here, cannot name them.
    named, connected = Depends(placeholder), Depends(connection)

    async def authorize(
        request: Request, execution_id: int, team: str, name: Any = named, _: Any = connected
    ) -> bool:
        assert (name, team, request.state.outer) == ("ada", "blue", True)
        assert request.state.run == execution_id
        if execution_id == gone:
            raise HTTPException(410, "It was deleted.")
        return execution_id == mine

    async def outer(request: Request) -> None:
        request.state.outer = True

    sub_app = FastAPI()
    sub_app.dependency_overrides[placeholder] = user
    sub_app.include_router(
        create_router(session, authorize=authorize),
        prefix="/{team}",
        dependencies=[Depends(outer)],
    )
    app = FastAPI()
    app.mount("/sub", sub_app)
    async with connect(app) as client:
        events = read((await client.get("/sub/blue" + query(mine, foreign, gone))).text)
        single = await client.get(f"/sub/blue/executions/{foreign}/events")
    assert {event.run: event.kind for event in events} == {
        foreign: "failure",
        gone: "failure",
        mine: "complete",
    }
    refused = {event.run: event.data for event in events if event.kind == "failure"}
    assert [refused[run]["type"] for run in (foreign, gone)] == ["Refused"] * 2
    assert refused[foreign]["status"] == single.status_code == 403
    assert (refused[gone]["status"], refused[gone]["message"]) == (410, "It was deleted.")
    assert sorted(ended) == sorted([mine, foreign, foreign, gone])
    assert sim.request_count == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
async def test_an_error_of_authorize_that_may_pass_is_the_answer(
    sim: Simulator, session: Session, status: int
) -> None:
    """The list would otherwise be told that a run has ended for good."""
    done, other = sim.add_execution(DONE), sim.add_execution(DONE)

    async def authorize(execution_id: int) -> None:
        if execution_id == other:
            raise HTTPException(status, "The database is away.", headers={"Retry-After": "3"})

    async with connect(make_app(session, authorize)) as client:
        response = await client.get(query(done, other))
    assert (response.status_code, response.headers["retry-after"]) == (status, "3")
    assert response.json()["detail"] == "The database is away."
    assert sim.request_count == 0


async def test_a_mistake_in_authorize_is_raised_as_elsewhere(
    sim: Simulator, session: Session
) -> None:
    """It reaches the app's own handlers and middleware as itself."""

    async def authorize(execution_id: int) -> None:
        raise LookupError(execution_id)

    async with connect(make_app(session, authorize)) as client:
        with pytest.raises(LookupError):
            await client.get(query(1, 2, 3))


async def test_an_error_of_promptlayer_in_authorize_is_a_refusal(
    sim: Simulator, session: Session
) -> None:
    """It has the status that the run's own route would have."""

    async def authorize(execution_id: int) -> None:
        raise NotFound("no", status=404, server_message="no")

    async with connect(make_app(session, authorize)) as client:
        (event,) = read((await client.get(query(7))).text)
    assert (event.data["type"], event.data["status"]) == ("Refused", 404)
    assert event.data["message"] == "The execution or workflow does not exist."


async def test_a_ticket_may_be_for_many_runs(sim: Simulator, session: Session) -> None:
    """One for all or several; `authorize` is asked about the runs that none covers."""
    ids = [sim.add_execution(DONE) for _ in range(4)]
    runs = [session.execution(one) for one in ids]
    both, third, three = (TICKETS.issue(*some) for some in (runs[:2], runs[2:3], runs[:3]))
    expired = Tickets("of the app", lifetime=1e-9).issue(runs[3])
    async with connect(make_app(session, refuse, tickets=TICKETS)) as client:
        for given in (
            {"url": f"{query(*ids)}&ticket={both}&ticket={third}&ticket=forged"},
            {
                "url": query(*ids),
                "headers": {"Authorization": f"Bearer {three}"},
            },
        ):
            events = read((await client.get(**given)).text)
            assert {event.run for event in events if event.kind == "complete"} == set(ids[:3])
        for one, status in ((0, 200), (1, 200), (2, 403)):
            response = await client.get(f"/executions/{ids[one]}?ticket={both}")
            assert response.status_code == status
    short = make_app(session, refuse, tickets=Tickets("of the app", lifetime=1e-9))
    async with connect(short) as client:
        (event,) = read((await client.get(f"{query(ids[3])}&ticket={expired}")).text)
        assert event.kind == "failure"


def test_the_address_of_a_hundred_runs_with_one_ticket_is_short(session: Session) -> None:
    """It stays below 4 KB, half of what nginx accepts."""
    runs = [session.execution(10**12 + n * 7919) for n in range(100)]
    for run in runs:
        run.workflow = "write-report"
    address = query(*(run.id for run in runs))
    assert len(f"{address}&ticket={TICKETS.issue(*runs)}") < 4096


async def test_with_its_ticket_a_list_waits_for_new_runs(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """Another process than the one that started them waits out the 404s of the first seconds."""
    sim.add_workflow("report", DONE)
    starting = open_session()
    runs = [await starting.start("report") for _ in range(2)]
    ticket = TICKETS.issue(*runs)
    sim.inject(Fault.status(404, times=4))
    async with connect(make_app(open_session(), refuse, tickets=TICKETS)) as client:
        response = await client.get(f"{query(*(run.id for run in runs))}&ticket={ticket}")
    assert [event.kind for event in read(response.text)] == ["complete"] * 2


async def test_hidden_fields_stay_hidden(sim: Simulator, session: Session) -> None:
    """In every event of a list."""
    held = sim.add_execution(HELD)
    async with connect(make_app(session, fields=["error_message"])) as client:
        reading = asyncio.create_task(client.get(query(held)))
        await sim.wait_for_requests(3)
        sim.finish(held, "Answer", value="hidden")
        response = await reading
    assert [event.kind for event in read(response.text)] == ["snapshot", "node", "complete"]
    assert '"value"' not in response.text


async def test_a_list_counts_as_one_stream(
    sim: Simulator,
    session: Session,
    serve: Callable[[Any], Awaitable[str]],
    http: aiohttp.ClientSession,
) -> None:
    """Beyond `max_streams` the answer is a 200 that asks to come back later."""
    runs = [sim.add_execution(HELD) for _ in range(5)]
    url = await serve(make_app(session, max_streams=1))
    async with http.get(url + query(*runs)) as first:
        assert (await anext(stream(first))).kind == "snapshot"
        for address in (query(runs[0]), f"/executions/{runs[0]}/events"):
            async with http.get(url + address) as refused:
                assert refused.status == 200
                assert re.fullmatch(r"retry: 1\d{4}\n\n", await refused.text())


async def test_runs_without_an_answer_say_why(
    sim: Simulator,
    open_session: Callable[..., Session],
    serve: Callable[[Any], Awaitable[str]],
    http: aiohttp.ClientSession,
) -> None:
    """The others are shown at once; `waiting` comes without an id."""
    held, stalled = sim.add_execution(HELD), sim.add_execution(HELD)
    sim.inject(Fault.status(503, times=None, execution_id=stalled))
    url = await serve(make_app(open_session(retry=IMPATIENT)))
    async with http.get(url + query(stalled, held)) as response:
        events = stream(response)
        assert (await anext(events)).run == held
        waiting = await anext(events)
        assert (waiting.kind, waiting.run, waiting.id) == ("waiting", stalled, None)
        assert waiting.data["message"] == "PromptLayer failed. Trying again."
        sim.clear_faults()
        snapshot = await anext(events)
        assert (snapshot.kind, snapshot.run) == ("snapshot", stalled)


def one(run: int) -> str:
    """Return the address of the stream for one execution."""
    return f"/executions/{run}/events"


@pytest.fixture(params=[one, query])
def address(request: pytest.FixtureRequest) -> Callable[[int], str]:
    """Return the address of one of the two streams."""
    return request.param


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every stream say after 0.6 s why there is nothing new."""
    monkeypatch.setattr(_run_events, "_PATIENCE", 0.6)


@pytest.mark.usefixtures("impatient")
async def test_an_outage_in_the_middle_of_a_run_is_said(
    sim: Simulator,
    open_session: Callable[..., Session],
    *,
    address: Callable[[int], str],
    serve: Callable[[Any], Awaitable[str]],
    http: aiohttp.ClientSession,
) -> None:
    """With its reason, whenever that changes, until a poll succeeds, even if no node changed."""
    held = sim.add_execution(HELD)
    url = await serve(make_app(open_session(retry=IMPATIENT)))
    async with http.get(url + address(held)) as response:
        events = stream(response)
        assert (await anext(events)).kind == "snapshot"

        sim.inject(Fault.status(503, times=None))
        waiting = await anext(events)
        assert (waiting.kind, waiting.run, waiting.id) == ("waiting", held, None)
        assert waiting.data["type"] == "ServerError"
        assert waiting.data["message"] == "PromptLayer failed. Trying again."

        sim.clear_faults()
        sim.inject(Fault.status(429, times=None, retry_after=0.01))
        waiting = await anext(events)
        assert (waiting.kind, waiting.data["type"]) == ("waiting", "RateLimited")

        sim.clear_faults()
        resumed = await anext(events)
        assert (resumed.kind, resumed.data) == ("resumed", {"execution_id": str(held)})
        assert resumed.id is None

        sim.inject(Fault.status(503, times=None))
        assert (await anext(events)).kind == "waiting"
        sim.finish(held, "Answer")
        sim.clear_faults()
        rest = [event.kind async for event in events]
        assert rest == ["resumed", "node", "complete"]


@pytest.mark.usefixtures("impatient")
async def test_who_connects_during_an_outage_is_told(
    sim: Simulator,
    open_session: Callable[..., Session],
    *,
    address: Callable[[int], str],
    serve: Callable[[Any], Awaitable[str]],
    http: aiohttp.ClientSession,
) -> None:
    """The reason follows the snapshot at once, and not only after one more poll has failed."""
    held = sim.add_execution(HELD)
    url = await serve(make_app(open_session(retry=RetryPolicy(base=60.0, ceiling=120.0))))
    async with http.get(url + address(held)) as early:
        assert (await anext(stream(early))).kind == "snapshot"
        sim.inject(Fault.status(503, times=None))
        assert (await anext(stream(early))).kind == "waiting"
        async with http.get(url + address(held)) as late:
            events = stream(late)
            assert [(await anext(events)).kind for _ in range(2)] == ["snapshot", "waiting"]


@pytest.mark.parametrize("fault", [Fault.status(503, times=2), Fault.delay(0.8)])
async def test_neither_a_short_outage_nor_a_slow_poll_is_said(
    sim: Simulator,
    open_session: Callable[..., Session],
    *,
    address: Callable[[int], str],
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The polls must have failed for two seconds; one that takes longer has not failed."""
    monkeypatch.setattr(_run_events, "_PATIENCE", 0.5)
    held = sim.add_execution(HELD)
    async with connect(make_app(open_session(retry=IMPATIENT))) as client:
        reading = asyncio.create_task(client.get(address(held)))
        await sim.wait_for_requests(60)  # the stream is older than that
        sim.inject(fault)
        await sim.wait_for_requests(sim.request_count + 6)
        sim.finish(held, "Answer")
        response = await reading
    assert [event.kind for event in read(response.text)] == ["snapshot", "node", "complete"]


async def test_an_outage_is_said_after_two_seconds(
    sim: Simulator,
    open_session: Callable[..., Session],
    *,
    serve: Callable[[Any], Awaitable[str]],
    http: aiohttp.ClientSession,
    recorder: Any,
) -> None:
    """They are counted from the first poll that fails."""
    clock = asyncio.get_running_loop().time
    held = sim.add_execution(HELD)
    url = await serve(make_app(open_session(retry=IMPATIENT)))
    async with http.get(url + one(held)) as response:
        events = stream(response)
        assert (await anext(events)).kind == "snapshot"
        failing = asyncio.create_task(recorder.next(RequestRetried))
        sim.inject(Fault.status(503, times=None))
        await failing
        failed_at = clock()
        assert (await anext(events)).kind == "waiting"
        assert 1.9 < clock() - failed_at < 5.0


@pytest.mark.usefixtures("impatient")
async def test_an_outage_that_is_too_long_is_the_failure(
    sim: Simulator,
    open_session: Callable[..., Session],
    *,
    address: Callable[[int], str],
) -> None:
    """It has the last snapshot, as any other."""
    held = sim.add_execution(HELD)
    retry = attrs.evolve(IMPATIENT, watch_outage=0.9)
    async with connect(make_app(open_session(retry=retry))) as client:
        reading = asyncio.create_task(client.get(address(held)))
        await sim.wait_for_requests(2)
        sim.inject(Fault.status(503, times=None))
        events = read((await reading).text)
    assert [event.kind for event in events] == ["snapshot", "waiting", "failure"]
    assert events[-1].data["last"]["nodes"]["Plan"]["value"] == "done"


async def test_a_stream_that_replaces_another_keeps_the_watches(
    sim: Simulator,
    session: Session,
    serve: Callable[[Any], Awaitable[str]],
    *,
    http: aiohttp.ClientSession,
    recorder: Any,
) -> None:
    """A page opens the new one first when a run is added; the times of nodes do not jump."""
    one, two = sim.add_execution(HELD), sim.add_execution(HELD)
    url = await serve(make_app(session))
    first = await http.get(url + query(one))
    before = await anext(stream(first))
    ended = asyncio.create_task(recorder.next(WatchEnded))
    async with http.get(url + query(one, two)) as second:
        events = stream(second)
        seen = {(event := await anext(events)).run: event for _ in range(2)}
        first.close()
        sim.finish(one, "Answer")
        while (event := await anext(events)).kind != "complete":
            pass
        await ended
        assert len(recorder.of(WatchStarted)) == 2
    times = [event.data["nodes"]["Plan"]["final"] for event in (before, seen[one])]
    assert times[0] == times[1]


async def test_a_slow_client_skips_to_the_latest_of_each_run(
    sim: Simulator, session: Session
) -> None:
    """It delays nobody, and what it missed is one diff: nothing of a run is lost."""
    runs = [sim.add_execution(HELD) for _ in range(5)]
    path, _, given = query(*runs).partition("?")
    reading, stuck = asyncio.Event(), asyncio.Event()
    body: list[bytes] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        body.append(message.get("body", b""))
        if b"".join(body).count(b"event: snapshot") == 5:
            stuck.set()
            await reading.wait()

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": given.encode(),
        "headers": [],
    }
    slow = asyncio.create_task(make_app(session)(scope, receive, send))
    await stuck.wait()
    async with contextlib.aclosing(session.stream_all(runs)) as others:
        async for execution, snapshot in others:
            if snapshot.poll == 4:
                sim.finish(execution.id, "Answer", value=str(execution.id))
    reading.set()
    await slow
    events = read(b"".join(body).decode())
    for run in runs:
        assert kinds(events, run) == ["snapshot", "node", "complete"]
        (last,) = (event.data for event in events if event.run == run and event.kind == "complete")
        assert last["nodes"]["Answer"]["value"] == str(run)


async def test_a_client_that_leaves_ends_the_watches(
    sim: Simulator,
    session: Session,
    serve: Callable[[Any], Awaitable[str]],
    *,
    http: aiohttp.ClientSession,
    our_tasks: Callable[[], list[str]],
    recorder: Any,
) -> None:
    """Also the watches of runs that it heard nothing of."""
    held, stalled = sim.add_execution(HELD), sim.add_execution(HELD)
    sim.inject(Fault.stall(times=None, execution_id=stalled))
    url = await serve(make_app(session))
    async with http.get(url + query(held, stalled)) as response:
        assert (await anext(stream(response))).kind == "snapshot"
        ended = asyncio.create_task(recorder.next(WatchEnded))
    await ended
    while any("Watch" in name for name in our_tasks()):  # noqa: ASYNC110 - within a step or two
        await asyncio.sleep(0)


async def test_a_client_that_leaves_while_authorize_is_asked_ends_the_request(
    session: Session, serve: Callable[[Any], Awaitable[str]], http: aiohttp.ClientSession
) -> None:
    """All questions are cancelled."""
    asked, cancelled = asyncio.Event(), asyncio.Semaphore(0)

    async def authorize(execution_id: int) -> None:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.release()

    url = await serve(make_app(session, authorize))
    request = asyncio.create_task(http.get(url + query(1, 2)))
    await asked.wait()
    request.cancel()
    for _ in range(2):
        await cancelled.acquire()


async def test_a_closed_session_asks_to_come_back_later(sim: Simulator, session: Session) -> None:
    """Another process may serve the browser then."""
    app = make_app(session)
    await session.aclose()
    async with connect(app) as client:
        response = await client.get(query(1, 2))
    assert response.status_code == 200
    assert read(response.text) == []
    assert re.search(r"^retry: 1\d{4}$", response.text, re.MULTILINE)


async def test_wrong_settings_are_the_failure_of_each_run(sim: Simulator) -> None:
    """The status is that of the run's own route."""
    async with connect(make_app(Session(base_url=sim.base_url))) as client:
        events = read((await client.get(query(1, 2))).text)
    assert [event.data["status"] for event in events] == [500, 500]
