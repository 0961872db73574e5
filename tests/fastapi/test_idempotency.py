"""`Idempotency-Key` of `POST /executions`, and callbacks that reach another worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx2
import pytest
from fastapi import FastAPI, Header

from promptlayer_exec import Session, StartUnknown, StoreUnavailable
from promptlayer_exec.fastapi import Tickets, create_callback_router, create_router
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.starts import SQLStartStore
from promptlayer_exec.webhooks import Callbacks

CALLBACKS = Callbacks("http://127.0.0.1:9/callbacks", secret="s3cret")
ORDER = {"workflow": "report", "inputs": {"topic": "otters"}}


class StoreThatIsAway:
    """A record of starts whose database cannot be reached."""

    async def _fail(self, *_: Any, **__: Any) -> NoReturn:
        raise StoreUnavailable("cannot use the database db.internal")

    find = claim = record = release = resolve = _fail


async def user_of(request_user: Annotated[str | None, Header(alias="User")] = None) -> str | None:
    """Authorize every request; return the user, if there is one."""
    return request_user


@pytest.fixture
def url(sim: Simulator, tmp_path: Path) -> str:
    """Return the URL of a database; the workflow of the tests exists."""
    sim.add_workflow("report", Scenario([SimNode("Report", "done", None, is_output_node=True)]))
    return f"sqlite:///{tmp_path / 'starts.sqlite'}"


Connect = Callable[..., httpx2.AsyncClient]


@pytest.fixture
async def connect(open_session: Callable[..., Session], url: str) -> AsyncIterator[Connect]:
    """Return a function that returns a client of a new worker, all with the same database."""
    clients = []

    def make(**settings: Any) -> httpx2.AsyncClient:
        session = open_session(**{"starts": SQLStartStore(url), "callbacks": CALLBACKS, **settings})
        app = FastAPI()
        options: dict[str, Any] = {"tickets": Tickets("secret"), "workflows": ["report"]}
        app.include_router(create_router(session, authorize=user_of, **options))
        app.include_router(create_callback_router(session, callbacks=CALLBACKS))
        client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://app")
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.aclose()


def post(
    client: httpx2.AsyncClient, key: str | None, body: Any = ORDER, **headers: str
) -> Coroutine[Any, Any, httpx2.Response]:
    """Ask for a start."""
    if key is not None:
        headers["Idempotency-Key"] = key
    return client.post("/executions", json=body, headers=headers)


async def test_a_repetition_gets_the_execution_that_exists(
    sim: Simulator, connect: Connect
) -> None:
    """From any worker; the first response is 201, and the others are 200."""
    first, second = connect(), connect()
    responses = [
        await post(client, key)
        for client, key in ((first, "order-42"), (first, '"order-42"'), (second, "order-42"))
    ]
    assert [response.status_code for response in responses] == [201, 200, 200]
    assert {response.json()["execution_id"] for response in responses} == {"1001"}
    assert {response.headers["location"] for response in responses} == {"executions/1001"}
    assert all(response.json()["ticket"] for response in responses)
    assert len(sim.runs) == 1


async def test_a_repetition_waits_for_the_start_in_flight(sim: Simulator, connect: Connect) -> None:
    """Eight simultaneous requests over two workers are one start."""
    sim.inject(Fault.delay(0.2))
    workers = [connect(), connect()]
    asking = [post(worker, "order-42") for worker in workers * 4]
    responses = await asyncio.gather(*asking)
    assert sorted(response.status_code for response in responses) == [*[200] * 7, 201]
    assert {response.json()["execution_id"] for response in responses} == {"1001"}
    assert len(sim.runs) == 1


async def test_another_body_under_the_key_is_refused(sim: Simulator, connect: Connect) -> None:
    """It is a problem of its own type, and shows no key, digest or server."""
    client = connect()
    await post(client, "order-42", User="ada")
    other = {"workflow": "report", "inputs": {"topic": "voles"}}
    response = await post(client, "order-42", other, User="ada")
    assert response.status_code == 422
    assert response.json() == {
        "type": "urn:promptlayer-exec:KeyConflict",
        "title": "The key belongs to another request. Use another key.",
        "status": 422,
    }
    assert len(sim.runs) == 1


async def test_keys_of_different_users_never_meet(
    sim: Simulator, connect: Connect, url: str
) -> None:
    """Nor do they meet those of clients without a user, or the keys of code."""
    client = connect()
    for headers in ({"User": "ada"}, {"User": "bob"}, {}):
        assert (await post(client, "order-42", **headers)).status_code == 201
        assert (await post(client, "order-42", **headers)).status_code == 200
    assert len(sim.runs) == 3
    async with SQLStartStore(url) as store:
        assert await store.find("order-42") is None
        assert await store.find("http::order-42") is not None


@pytest.mark.parametrize("key", ["", '""', " ", "x" * 256, f'"{"x" * 256}"'])
async def test_a_key_that_is_none_is_refused(sim: Simulator, connect: Connect, key: str) -> None:
    """It is a 400; no request is sent."""
    response = await post(connect(), key)
    assert (response.status_code, sim.request_count) == (400, 0)
    assert "1 to 255 characters" in response.json()["detail"]


async def test_the_longest_key_is_accepted(sim: Simulator, connect: Connect) -> None:
    """Also with a user, and with characters that are escaped."""
    client = connect()
    assert (await post(client, "x" * 255, User="ada")).status_code == 201
    assert (await post(client, r'"a\"b\\c"')).status_code == 201
    assert (await post(client, r'a"b\c')).status_code == 200


async def test_without_a_record_of_starts_the_header_is_ignored(
    sim: Simulator, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request starts a run, as without the header; the log says so."""
    client = connect(starts=None)
    for _ in range(2):
        assert (await post(client, "order-42")).status_code == 201
    assert len(sim.runs) == 2
    assert "ignored an Idempotency-Key: pass starts=" in caplog.text


async def test_a_record_that_is_away_starts_nothing(
    sim: Simulator, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a 503, which says so and when to come again; the log says why."""
    client = connect(starts=StoreThatIsAway())
    response = await post(client, "order-42")
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    problem = response.json()
    assert problem["type"] == "urn:promptlayer-exec:StoreUnavailable"
    assert problem["title"] == "This server's database is unavailable. Try again later."
    assert "db.internal" not in response.text
    assert "db.internal" in caplog.text
    assert sim.runs == []
    assert (await post(client, None)).status_code == 201


async def test_a_missing_api_key_is_an_error_of_the_server(connect: Connect) -> None:
    """It does not pass by waiting, so it is a 500 with a key, too."""
    assert (await post(connect(api_key=None), "order-42")).status_code == 500


async def test_a_callback_to_any_worker_ends_the_uncertainty(
    sim: Simulator, connect: Connect, url: str
) -> None:
    """The response was lost, and the worker that gets the callback never knew of the start."""
    sim.inject(Fault.disconnect())
    first, second = connect(), connect()
    assert (await post(first, "order-42")).status_code == 502
    assert (await post(first, "order-42")).json()["type"].endswith("StartUnknown")

    async with SQLStartStore(url) as store:
        stored = await store.find("http::order-42")
    assert stored is not None
    body = {"workflow_version_execution_id": sim.runs[0].execution_id}
    assert (await second.post(f"/callbacks/{stored.token}", json=body)).status_code == 204

    response = await post(first, "order-42")
    assert (response.status_code, response.json()["execution_id"]) == (200, "1001")
    assert len(sim.runs) == 1


async def test_a_callback_is_kept_while_the_database_is_away(
    sim: Simulator, open_session: Callable[..., Session], url: str
) -> None:
    """It is a 503, the other receivers get it all the same, and the store does once it is back."""

    class Away(SQLStartStore):
        is_away = False

        async def resolve(self, *arguments: Any, **options: Any) -> bool:
            if self.is_away:
                raise StoreUnavailable("cannot use the database db.internal")
            return await super().resolve(*arguments, **options)

    store = Away(url)
    session = open_session(starts=store, callbacks=CALLBACKS)
    sim.inject(Fault.disconnect())
    with pytest.raises(StartUnknown) as lost:
        await session.start("report", {"topic": "otters"}, key="order-42")
    received: list[Any] = []
    app = FastAPI()
    on_callback = lambda *callback: received.append(callback)  # noqa: E731
    app.include_router(
        create_callback_router(session, callbacks=CALLBACKS, on_callback=on_callback)
    )
    store.is_away = True
    execution_id = sim.runs[0].execution_id
    body = {"workflow_version_execution_id": execution_id}
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://app") as client:
        path = f"/callbacks/{lost.value.callback_token}"
        assert (await client.post(path, json=body)).status_code == 503
    assert received == [(lost.value.callback_token, execution_id)]

    store.is_away = False
    await session.aclose()  # which tries once more
    async with SQLStartStore(url) as other:
        record = await other.find("order-42")
    assert record is not None
    assert record.execution_id == execution_id


async def test_a_callback_that_cannot_be_kept_is_not_acknowledged(
    sim: Simulator, open_session: Callable[..., Session]
) -> None:
    """It is a 503, so that it is sent again; this process knows of it all the same."""
    session = open_session(starts=StoreThatIsAway(), callbacks=CALLBACKS)
    app = FastAPI()
    app.include_router(create_callback_router(session, callbacks=CALLBACKS))
    token = CALLBACKS.new_token()
    body = {"workflow_version_execution_id": 1001}
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://app") as client:
        response = await client.post(f"/callbacks/{token}", json=body)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    error = StartUnknown("x", workflow="report", reason="lost", callback_token=token)
    assert (await session.recover(error)).id == 1001


async def allow() -> None:
    """Authorize every request."""


def test_the_openapi_description_names_the_header() -> None:
    """With both statuses, whose bodies are the same."""
    app = FastAPI()
    app.include_router(create_router(Session("key"), authorize=allow, workflows=["report"]))
    start = app.openapi()["paths"]["/executions"]["post"]
    (header,) = start["parameters"]
    assert (header["name"], header["in"]) == ("Idempotency-Key", "header")
    assert header["required"] is False
    contents = [start["responses"][status]["content"] for status in ("200", "201")]
    assert contents[0] == contents[1]
