"""Reading executions by FastAPI: tickets, hidden fields, and answers that several callers share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from fastapi import Depends, FastAPI, HTTPException

from promptlayer_exec import ConfigurationError, RetryPolicy, Session
from promptlayer_exec.fastapi import Tickets, create_router
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

TICKETS = Tickets("of the app")
SECRETS = {"value": "hunter2", "error_message": "no key", "raw_error_message": "File app.py"}
OF_A_FAILURE = {name: text for name, text in SECRETS.items() if name != "value"}


async def allow() -> None:
    """Authorize every request."""


async def refuse() -> bool:
    """Refuse every request."""
    return False


def connect(session: Session, authorize: Any = allow, **options: Any) -> httpx2.AsyncClient:
    """Return a client of an app with the routes."""
    app = FastAPI()
    app.include_router(create_router(session, authorize=authorize, **options))
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://app")


ROUTES = ["", "/events", "/output"]


@pytest.mark.parametrize("route", ROUTES)
async def test_a_ticket_reads_one_execution_in_place_of_authorize(
    sim: Simulator, session: Session, route: str
) -> None:
    """It is in the query or a bearer token; without a valid one, `authorize` decides."""
    one, other = (sim.add_execution(Scenario([SimNode("A", is_output_node=True)])) for _ in "12")
    ticket = TICKETS.issue(session.execution(one))
    valid = [{"params": {"ticket": ticket}}, {"headers": {"Authorization": f"bearer {ticket}"}}]
    foreign = Tickets("of another app").issue(session.execution(one))
    expired = Tickets("of the app", lifetime=1e-9).issue(session.execution(one))
    async with connect(session, refuse, tickets=TICKETS) as client:
        for given in valid:
            assert (await client.get(f"/executions/{one}{route}", **given)).status_code == 200
            assert (await client.get(f"/executions/{other}{route}", **given)).status_code == 403
        for invalid in (foreign, ticket[:-1], "", "é"):
            refused = await client.get(f"/executions/{one}{route}", params={"ticket": invalid})
            assert refused.status_code == 403
    short = Tickets("of the app", lifetime=1e-9)
    async with connect(session, refuse, tickets=short) as client:
        refused = await client.get(f"/executions/{one}{route}", params={"ticket": expired})
        assert refused.status_code == 403
    async with connect(session, tickets=TICKETS) as client:
        assert (await client.get(f"/executions/{one}{route}")).status_code == 200


async def test_a_ticket_never_starts_a_run(sim: Simulator, session: Session) -> None:
    """`POST /executions` asks `authorize` alone."""
    sim.add_workflow("report", Scenario([]))
    ticket = TICKETS.issue(session.execution(7))
    options = {"tickets": TICKETS, "workflows": ["report"]}
    async with connect(session, refuse, **options) as client:
        for given in ({"params": {"ticket": ticket}}, {"headers": {"Authorization": ticket}}):
            start = await client.post("/executions", json={"workflow": "report"}, **given)
            assert start.status_code == 403
        also = {"ticket": ticket, "execution_id": "7"}
        named = await client.post("/executions", json={"workflow": "report"}, params=also)
        assert named.status_code == 400
    assert sim.runs == []


async def test_the_dependencies_of_the_app_hold_for_tickets_too(session: Session) -> None:
    """A ticket replaces `authorize`, and nothing else that the app has added."""

    async def maintenance() -> None:
        raise HTTPException(418)

    app = FastAPI()
    router = create_router(session, authorize=allow, tickets=TICKETS)
    app.include_router(router, prefix="/api", dependencies=[Depends(maintenance)])
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://app") as client:
        ticket = TICKETS.issue(session.execution(7))
        assert (await client.get(f"/api/executions/7?ticket={ticket}")).status_code == 418


@pytest.mark.parametrize("route", ROUTES)
async def test_with_its_ticket_every_process_waits_for_a_new_run(
    sim: Simulator, open_session: Callable[..., Session], route: str
) -> None:
    """Another process than the one that started it waits out the 404s of the first seconds."""
    sim.add_workflow("report", Scenario([SimNode("Report", "done", is_output_node=True)]))
    options = {"tickets": TICKETS, "workflows": ["report"]}
    async with connect(open_session(), **options) as client:
        started = (await client.post("/executions", json={"workflow": "report"})).json()
    execution_id, ticket = started.pop("execution_id"), started.pop("ticket")
    assert started == {}
    async with connect(open_session(), **options) as client:
        sim.inject(Fault.status(404))
        assert (await client.get(f"/executions/{execution_id}{route}")).status_code == 404
        sim.inject(Fault.status(404, times=3))
        by_ticket = await client.get(f"/executions/{execution_id}{route}?ticket={ticket}")
    assert by_ticket.status_code == 200
    assert "done" in by_ticket.text
    grace = RetryPolicy(not_found_grace=0.0)
    async with connect(open_session(retry=grace), **options) as client:
        sim.inject(Fault.status(404))
        late = await client.get(f"/executions/{execution_id}{route}?ticket={ticket}")
    assert late.status_code == 404


def test_tickets_need_a_secret_and_a_lifetime() -> None:
    """Neither the secret is shown, nor anything accepted in place of `Tickets`."""
    with pytest.raises(ConfigurationError, match="secret must not be empty"):
        Tickets("")
    with pytest.raises(ConfigurationError, match="lifetime"):
        Tickets("secret", lifetime=0)
    assert "of the app" not in repr(TICKETS)
    with pytest.raises(TypeError, match=r"tickets must be Tickets\(secret\), got 'secret'"):
        create_router(allow, authorize=allow, tickets="secret")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [[], ["value"], ["error_message"], ["value", "raw_error_message"], None]
)
async def test_only_the_named_fields_leave_the_server(
    sim: Simulator, session: Session, fields: list[str] | None
) -> None:
    """This holds for every route, event and problem; by default tracebacks stay."""
    failed = SimNode("Failed", status="FAILED", is_output_node=True, **OF_A_FAILURE)
    execution_id = sim.add_execution(Scenario([SimNode("Done", SECRETS["value"]), failed]))
    shown = {} if fields is None else {"fields": fields}
    named = {"value", "error_message"} if fields is None else set(fields)
    async with connect(session, **shown) as client:
        texts = [(await client.get(f"/executions/{execution_id}{route}")).text for route in ROUTES]
    nodes = json.loads(texts[0])["nodes"].values()
    keys = {"name", "status", "is_output_node", "running", "final"} | named
    assert all(set(node) == keys for node in nodes)
    seen = {field for field, secret in SECRETS.items() if secret in "".join(texts)}
    assert seen == named
    assert ("ExecutionFailed" in texts[2]) == ("value" in named)  # else there is no such route
    assert ("no key" in texts[2]) == ({"value", "error_message"} <= named)


async def test_a_node_event_and_a_failure_have_the_named_fields_alone(
    sim: Simulator, session: Session, held: int
) -> None:
    """The last snapshot in a `failure` is filtered as well."""
    async with connect(session, fields=()) as client:
        reading = asyncio.create_task(client.get(f"/executions/{held}/events"))
        await sim.wait_for_requests(3)
        sim.finish(held, "Answer", value="hidden")
        assert {"hidden", "done"}.isdisjoint((await reading).text.split('"'))
        other = sim.add_execution(Scenario([SimNode("A", "done"), SimNode("B", duration=None)]))
        reading = asyncio.create_task(client.get(f"/executions/{other}/events"))
        await sim.wait_for_requests(sim.request_count + 3)
        sim.inject(Fault.status(403))
        text = (await reading).text
    assert '"last":{' in text
    assert '"value"' not in text


def test_unknown_fields_are_refused() -> None:
    """The error has the known ones."""
    with pytest.raises(ValueError, match="'raw_error_message', got 'traceback'"):
        create_router(allow, authorize=allow, fields=["traceback"])
    with pytest.raises(TypeError, match=r"write \['value'\]"):
        create_router(allow, authorize=allow, fields="value")
    with pytest.raises(ConfigurationError, match="max_streams"):
        create_router(allow, authorize=allow, max_streams=0)


async def test_callers_of_one_moment_share_a_request(
    sim: Simulator, session: Session, held: int
) -> None:
    """A caller that leaves does not take it from the others; the next caller asks again."""
    path = f"/executions/{held}"
    sim.inject(Fault.delay(0.2))
    async with connect(session) as client:
        callers = [asyncio.create_task(client.get(path)) for _ in range(20)]
        await sim.wait_for_requests(1)
        callers.pop(0).cancel()
        answers = await asyncio.gather(*callers)
        assert {answer.text for answer in answers} == {answers[0].text}
        assert (answers[0].status_code, sim.request_count) == (200, 1)
        assert answers[0].headers["cache-control"] == "no-store"
        assert "etag" not in answers[0].headers
        assert (await client.get(path)).json()["complete"] is False
    assert sim.request_count == 2


async def test_an_error_is_shared_and_not_kept(sim: Simulator, session: Session, held: int) -> None:
    """Callers that come after it ask again."""
    sim.inject(Fault.delay(0.1))
    async with connect(session) as client:
        missing = [asyncio.create_task(client.get("/executions/77")) for _ in range(3)]
        assert [answer.status_code for answer in await asyncio.gather(*missing)] == [404] * 3
        assert sim.request_count == 1
        assert (await client.get("/executions/77")).status_code == 404
    assert sim.request_count == 2


async def test_a_complete_answer_is_kept_and_has_a_tag(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """Every process has the same tag for it; a browser that has it gets a 304, if authorized."""
    execution_id = sim.add_execution(Scenario([SimNode("Answer", "done")]))
    path = f"/executions/{execution_id}"
    async with connect(open_session()) as client:
        first = await client.get(path)
        assert (await client.get(path)).text == first.text
        assert sim.request_count == 1
    assert first.headers["cache-control"] == "private, no-cache"
    known = {"If-None-Match": f'"x", {first.headers["etag"]}'}
    async with connect(open_session()) as client:
        assert (await client.get(path)).headers["etag"] == first.headers["etag"]
        same = await client.get(path, headers=known)
        assert (same.status_code, same.content) == (304, b"")
        assert same.headers["etag"] == first.headers["etag"]
        assert (await client.get(path, headers={"If-None-Match": '"x"'})).status_code == 200
    async with connect(open_session(), refuse) as client:
        assert (await client.get(path, headers=known)).status_code == 403


async def test_an_answer_that_contradicts_its_nodes_is_not_kept(
    sim: Simulator, session: Session, held: int
) -> None:
    """The next one may show how the run finished, so a browser must ask for it."""
    path = f"/executions/{held}"
    sim.inject(Fault.early_completion())
    async with connect(session) as client:
        early = await client.get(path)
        assert early.json()["complete"]
        assert "etag" not in early.headers
        sim.finish(held, "Answer")
        assert (await client.get(path)).json() != early.json()


async def test_complete_answers_are_kept_in_bounded_memory(
    sim: Simulator, session: Session
) -> None:
    """Those of the latest 32 MiB: the oldest one is read again, the latest ones are not."""
    scenario = Scenario([SimNode("Answer", "x" * 1_000_000)])
    paths = [f"/executions/{sim.add_execution(scenario)}" for _ in range(34)]
    async with connect(session) as client:
        for path in paths:
            await client.get(path)
        before = sim.request_count
        for path in paths[-30:]:
            await client.get(path)
        assert sim.request_count == before
        await client.get(paths[0])
        assert sim.request_count == before + 1


async def test_a_large_answer_is_not_kept(sim: Simulator, session: Session) -> None:
    """An answer of over 1 MiB is read again for each caller, and has a tag all the same."""
    execution_id = sim.add_execution(Scenario([SimNode("Answer", "x" * 2**20)]))
    async with connect(session) as client:
        answers = [await client.get(f"/executions/{execution_id}") for _ in range(2)]
    assert sim.request_count == 2
    assert answers[0].headers["etag"] == answers[1].headers["etag"]


async def test_the_browser_s_module_is_for_everybody(session: Session) -> None:
    """It is an ES module, and a browser that has it gets a 304."""
    async with connect(session, refuse) as client:
        module = await client.get("/executions/client.js")
        assert (module.status_code, module.text.count("export function follow(")) == (200, 1)
        assert module.headers["content-type"].startswith("text/javascript")
        known = {"If-None-Match": module.headers["etag"]}
        same = await client.get("/executions/client.js", headers=known)
    assert same.status_code == 304
