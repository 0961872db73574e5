"""The simulator over real sockets: operations, faults, rate limit, log and lifetime."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

from promptlayer_exec.simulator import Fault, Scenario, SimNode, SimRequest, SimRun, Simulator

RESULTS = "/workflow-version-execution-results"
ID = "workflow_version_execution_id"
DONE = Scenario([SimNode("Node 1", "AAA", is_output_node=True)])
HELD = Scenario([SimNode("Node 1", "AAA", is_output_node=True, duration=None)])
DONE_MAP = (
    b'{"Node 1":{"status":"SUCCESS","value":"AAA","error_message":null,'
    b'"raw_error_message":null,"is_output_node":true}}\n'
)


class Clock:
    """A clock that stands still until the test sets it."""

    now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class Client:
    """A plain HTTP client of one simulator."""

    def __init__(self, sim: Simulator, http: aiohttp.ClientSession) -> None:
        self.sim = sim
        self.http = http

    async def send(
        self, method: str, path: str, **options: Any
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Send a request, with the right key unless headers are given."""
        options.setdefault("headers", {"X-API-KEY": self.sim.api_key})
        async with self.http.request(method, path, **options) as response:
            return response.status, await response.read(), response.headers

    async def results(self, execution_id: object, **query: str) -> tuple[int, bytes]:
        """Request the results of an execution."""
        params = {"workflow_version_execution_id": str(execution_id)} | query
        status, body, _ = await self.send("GET", RESULTS, params=params)
        return status, body

    async def all_results(self, execution_id: int) -> tuple[int, bytes]:
        """Request the results of an execution with all outputs."""
        return await self.results(execution_id, return_all_outputs="true")


@pytest.fixture
def clock() -> Clock:
    """Return a clock that the test controls."""
    return Clock()


@pytest.fixture
async def sim(clock: Clock) -> AsyncIterator[Simulator]:
    """Return a simulator that serves in the test's loop."""
    async with Simulator(clock=clock) as sim:
        yield sim


@pytest.fixture
async def client(sim: Simulator) -> AsyncIterator[Client]:
    """Return a client of that simulator."""
    async with aiohttp.ClientSession(sim.base_url) as http:
        yield Client(sim, http)


def get(url: str, key: str) -> tuple[int, bytes]:
    """Send one blocking request on a new connection."""
    request = urllib.request.Request(url, headers={"X-API-KEY": key})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.status, response.read()


class TestResults:
    """The results operation."""

    @pytest.mark.parametrize("status", [400, 500])
    async def test_error_without_output_node(
        self, sim: Simulator, client: Client, status: int
    ) -> None:
        """If the scenario asks for it, an execution that has none is an error once complete."""
        nodes = [SimNode("A", 1), SimNode("B", 2, duration=None)]
        execution_id = sim.add_execution(Scenario(nodes, no_output_status=status))
        assert (await client.all_results(execution_id))[0] == 202
        sim.finish(execution_id, "B")
        sent, body = await client.all_results(execution_id)
        assert await client.results(execution_id) == (sent, body)
        error = json.loads(body)
        assert (sent, error["success"]) == (status, False)
        assert [node["status"] for node in error["output"].values()] == ["SUCCESS", "SUCCESS"]

    @pytest.mark.parametrize("status", [400, 500])
    async def test_no_error_with_an_output_node(
        self, sim: Simulator, client: Client, status: int
    ) -> None:
        """An execution that has one is complete as usual."""
        nodes = [SimNode("Node 1", "AAA", is_output_node=True)]
        execution_id = sim.add_execution(Scenario(nodes, no_output_status=status))
        assert await client.all_results(execution_id) == (200, DONE_MAP)

    async def test_map_without_output_node(self, sim: Simulator, client: Client) -> None:
        """With the documented status, the main output is the map of all nodes."""
        execution_id = sim.add_execution(Scenario([SimNode("A", 1)], no_output_status=200))
        both = [await client.results(execution_id), await client.all_results(execution_id)]
        assert both[0] == both[1]
        assert both[0][0] == 200

    async def test_complete_map(self, sim: Simulator, client: Client) -> None:
        """A complete execution is a 200 with exactly the recorded body."""
        assert await client.all_results(sim.add_execution(DONE)) == (200, DONE_MAP)

    async def test_complete_main_output(self, sim: Simulator, client: Client) -> None:
        """By default the body for a complete execution is the main output alone and a newline."""
        assert await client.results(sim.add_execution(DONE)) == (200, b'"AAA"\n')

    @pytest.mark.parametrize("query", [{}, {"return_all_outputs": "true"}])
    async def test_running_is_202_with_the_map(
        self, sim: Simulator, client: Client, query: dict[str, str]
    ) -> None:
        """A running execution is a 202 with the node map, even after an output node succeeded."""
        half = Scenario([SimNode("a", 1, is_output_node=True), SimNode("b", duration=None)])
        status, body = await client.results(sim.add_execution(half), **query)
        assert status == 202
        assert [node["status"] for node in json.loads(body).values()] == ["SUCCESS", "RUNNING"]

    async def test_no_successful_output_falls_back_to_the_map(
        self, sim: Simulator, client: Client
    ) -> None:
        """Without a successful output node the default answer is the node map."""
        failed = Scenario([SimNode("a", is_output_node=True, status="FAILED")])
        execution_id = sim.add_execution(failed)
        assert await client.results(execution_id) == await client.all_results(execution_id)

    async def test_durations_follow_the_clock(
        self, sim: Simulator, client: Client, clock: Clock
    ) -> None:
        """Nodes progress by the simulator's clock, from the time when the execution was added."""
        execution_id = sim.add_execution(Scenario([SimNode("a", duration=5.0)]))
        clock.now += 4.9
        assert (await client.results(execution_id))[0] == 202
        clock.now += 0.1
        assert (await client.results(execution_id))[0] == 200

    async def test_finish(self, sim: Simulator, client: Client) -> None:
        """`finish` completes a held execution with the given value."""
        execution_id = sim.add_execution(HELD)
        sim.finish(execution_id, "Node 1", value=[1])
        assert await client.results(execution_id) == (200, b"[1]\n")
        assert sim.state(execution_id) == {"Node 1": "SUCCESS"}

    @pytest.mark.parametrize(
        ("query", "name", "kind"),
        [
            ("", ID, "missing"),
            (f"{ID}=", ID, "int_parsing"),
            (f"{ID}=1.0", ID, "int_parsing"),
            (f"{ID}=%D9%A3", ID, "int_parsing"),
            (f"{ID}={2**63}", ID, "int_parsing"),
            (f"{ID}={'9' * 5000}", ID, "int_parsing"),
            (f"{ID}=1&return_all_outputs=maybe", "return_all_outputs", "bool_parsing"),
            (f"{ID}=1&return_all_outputs=", "return_all_outputs", "bool_parsing"),
        ],
    )
    async def test_bad_parameters(self, client: Client, query: str, name: str, kind: str) -> None:
        """Missing, malformed and out-of-range parameters are a 422 in FastAPI's format."""
        status, body, _ = await client.send("GET", f"{RESULTS}?{query}")
        (detail,) = json.loads(body)["detail"]
        assert status == 422
        assert (detail["loc"], detail["type"]) == (["query", name], kind)
        assert detail["msg"]

    @pytest.mark.parametrize("execution_id", [0, -1, 5, -(2**63), 2**63 - 1])
    async def test_unknown_id(self, client: Client, execution_id: int) -> None:
        """An unknown execution id is a 404."""
        status, body = await client.results(execution_id)
        assert (status, json.loads(body)["success"]) == (404, False)

    @pytest.mark.parametrize("headers", [{}, {"X-API-KEY": "wrong"}, {"X-API-KEY": ""}])
    async def test_wrong_key(self, client: Client, headers: dict[str, str]) -> None:
        """A wrong or missing key is a 401, even if the parameters are wrong as well."""
        status, body, _ = await client.send("GET", RESULTS, headers=headers)
        assert status == 401
        assert json.loads(body) == {"success": False, "message": "Invalid or missing API key"}

    @pytest.mark.parametrize("path", ["/", "/nothing", f"{RESULTS}/", "/workflows/a/b"])
    async def test_unknown_path(self, client: Client, path: str) -> None:
        """An unknown path is a JSON 404."""
        status, body, headers = await client.send("GET", path)
        assert (status, headers["Content-Type"]) == (404, "application/json")
        assert json.loads(body)["success"] is False

    async def test_chosen_id(self, sim: Simulator, client: Client) -> None:
        """An execution can have any positive int64 id that is not taken."""
        assert sim.add_execution(DONE, execution_id=2**63 - 1) == 2**63 - 1
        assert (await client.results(2**63 - 1))[0] == 200
        with pytest.raises(ValueError, match="already exists"):
            sim.add_execution(DONE, execution_id=2**63 - 1)
        with pytest.raises(ValueError, match=r"between 1 and 2\*\*63-1, got 0"):
            sim.add_execution(DONE, execution_id=0)

    async def test_unknown_execution_is_an_error(self, sim: Simulator) -> None:
        """The errors of `finish` and `state` name the execution that does not exist."""
        with pytest.raises(LookupError, match="no execution 5"):
            sim.finish(5, "a")
        with pytest.raises(LookupError, match="no execution 5"):
            sim.state(5)


class TestWorkflows:
    """The operations that describe and run workflows."""

    async def test_run(self, sim: Simulator, client: Client) -> None:
        """A run is a 201 with the recorded body; `runs` has the execution and its inputs."""
        sim.add_workflow("w", DONE)
        body = {"input_variables": {"q": 1}, "workflow_label_name": "prod", "unknown": 1}
        status, answer, _ = await client.send("POST", "/workflows/w/run", json=body)
        assert (status, answer) == (
            201,
            (
                b'{"success":true,"message":"Workflow execution created successfully",'
                b'"warning":null,"workflow_version_execution_id":1001}\n'
            ),
        )
        assert sim.runs == [SimRun(1001, "w", {"q": 1}, body)]
        assert (await client.all_results(1001)) == (200, DONE_MAP)

    async def test_each_run_is_its_own_execution(self, sim: Simulator, client: Client) -> None:
        """Two runs of one workflow progress independently."""
        sim.add_workflow("w", HELD)
        for _ in range(2):
            await client.send("POST", "/workflows/w/run", json={})
        sim.finish(1002, "Node 1")
        assert [sim.state(i)["Node 1"] for i in sim.executions] == ["RUNNING", "SUCCESS"]

    async def test_warning_and_callback(self, sim: Simulator, client: Client) -> None:
        """The answer to a start has the workflow's warning; with a callback URL it is a 202."""
        sim.add_workflow("w", DONE, warning="missing input: q")
        status, answer, _ = await client.send(
            "POST", "/workflows/w/run", json={"callback_url": "http://127.0.0.1/"}
        )
        assert (status, json.loads(answer)["warning"]) == (202, "missing input: q")

    async def test_scenario_from_inputs(self, sim: Simulator, client: Client) -> None:
        """A scenario can be a function of the input variables."""
        sim.add_workflow("w", lambda v: Scenario([SimNode("a", v["q"], is_output_node=True)]))
        await client.send("POST", "/workflows/w/run", json={"input_variables": {"q": "?"}})
        assert await client.results(1001) == (200, b'"?"\n')

    @pytest.mark.parametrize("name", ["a/b?c#d", "with space", "..", "é%2F", "12"])
    async def test_any_name(self, sim: Simulator, client: Client, name: str) -> None:
        """A percent-encoded name is one path segment, whatever it contains."""
        workflow_id = sim.add_workflow(name, DONE)
        path = f"/workflows/{quote(name, safe='').replace('.', '%2E')}"
        url = URL(f"{sim.base_url}{path}", encoded=True)
        async with client.http.get(url, headers={"X-API-KEY": sim.api_key}) as response:
            workflow = (await response.json())["workflow"]
        assert (workflow["id"], workflow["name"]) == (workflow_id, name)
        assert sim.requests[-1].path == path

    async def test_by_id(self, sim: Simulator, client: Client) -> None:
        """A workflow can be described and run by its id, too."""
        workflow_id = sim.add_workflow("w", DONE)
        status, body, _ = await client.send("GET", f"/workflows/{workflow_id}")
        assert (status, json.loads(body)["workflow_id"]) == (200, workflow_id)
        status, _, _ = await client.send("POST", f"/workflows/{workflow_id}/run", json={})
        assert status == 201

    async def test_a_taken_name_is_refused(self, sim: Simulator) -> None:
        """Two workflows cannot share a name."""
        sim.add_workflow("w", DONE)
        with pytest.raises(ValueError, match="'w' already exists"):
            sim.add_workflow("w", DONE)

    @pytest.mark.parametrize(
        ("body", "location", "kind"),
        [
            (b"", ["body"], "missing"),
            (b"{", ["body"], "json_invalid"),
            (b"[]", ["body"], "dictionary_type"),
            (b'{"input_variables":null}', ["body", "input_variables"], "dictionary_type"),
            (b'{"metadata":{"a":1}}', ["body", "metadata"], "dictionary_type"),
            (b'{"metadata":[]}', ["body", "metadata"], "dictionary_type"),
            (b'{"callback_url":"here"}', ["body", "callback_url"], "URL_type"),
            (b'{"workflow_label_name":1}', ["body", "workflow_label_name"], "string_type"),
            (
                b'{"workflow_version_number":true}',
                ["body", "workflow_version_number"],
                "integer_type",
            ),
            (b'{"return_all_outputs":"no"}', ["body", "return_all_outputs"], "boolean_type"),
        ],
    )
    async def test_bad_body(
        self, sim: Simulator, client: Client, body: bytes, location: list[str], kind: str
    ) -> None:
        """A body that is not a run request is a 422 and starts nothing."""
        sim.add_workflow("w", DONE)
        status, answer, _ = await client.send("POST", "/workflows/w/run", data=body)
        (detail,) = json.loads(answer)["detail"]
        assert (status, detail["loc"], detail["type"]) == (422, location, kind)
        assert sim.executions == []

    async def test_label_and_version(self, sim: Simulator, client: Client) -> None:
        """A label together with a version is a 400 and starts nothing."""
        sim.add_workflow("w", DONE)
        body = {"workflow_label_name": "prod", "workflow_version_number": 1}
        status, _, _ = await client.send("POST", "/workflows/w/run", json=body)
        assert (status, sim.runs) == (400, [])


class TestFaults:
    """Deliberate faults."""

    async def test_status(self, sim: Simulator, client: Client) -> None:
        """A status affects `times` requests, with Retry-After; then the answer is normal."""
        execution_id = sim.add_execution(DONE)
        sim.inject(Fault.status(503, times=2, retry_after=1.5))
        for _ in range(2):
            status, body, headers = await client.send("GET", RESULTS)
            assert (status, headers["Retry-After"]) == (503, "1.5")
            assert json.loads(body) == {"success": False, "message": "Service Unavailable"}
        assert (await client.results(execution_id))[0] == 200
        assert sim.request_count == 3

    async def test_status_with_everything(self, sim: Simulator, client: Client) -> None:
        """A status can have an exact body, any header and any Retry-After."""
        sim.inject(
            Fault.status(
                599, retry_after="soon", body=b"<", headers={"Content-Type": "text/html", "X": "y"}
            )
        )
        status, body, headers = await client.send("GET", RESULTS)
        assert (status, body) == (599, b"<")
        assert (headers["Retry-After"], headers["X"]) == ("soon", "y")
        assert headers["Content-Type"] == "text/html"

    async def test_limited_to_an_execution(self, sim: Simulator, client: Client) -> None:
        """A fault for one execution affects neither requests for others nor the faults after it."""
        first, second = sim.add_execution(DONE), sim.add_execution(DONE)
        sim.inject(Fault.status(200, body=b"raw", times=None, execution_id=first))
        sim.inject(Fault.status(500))
        assert [(await client.results(i))[0] for i in (first, second, second)] == [200, 500, 200]
        assert [(await client.results(first))[1] for _ in range(3)] == [b"raw"] * 3

    async def test_in_order_of_injection(self, sim: Simulator, client: Client) -> None:
        """Faults happen in the order of injection, and can be cleared."""
        execution_id = sim.add_execution(DONE)
        for code in (500, 502, 503):
            sim.inject(Fault.status(code))
        assert [(await client.results(execution_id))[0] for _ in range(2)] == [500, 502]
        sim.clear_faults()
        assert (await client.results(execution_id))[0] == 200

    async def test_disconnect(self, sim: Simulator, client: Client) -> None:
        """A disconnect performs the operation and closes the connection without an answer."""
        sim.add_workflow("w", DONE)
        sim.inject(Fault.disconnect())
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await client.send("POST", "/workflows/w/run", json={})
        assert [run.execution_id for run in sim.runs] == [1001]

    async def test_truncate(self, sim: Simulator) -> None:
        """A truncated answer announces its full length; the connection closes within the body."""
        whole = b'"AAA"\n'
        execution_id = sim.add_execution(DONE)
        sim.inject(Fault.truncate())
        head, _, body = (await raw_get(sim, execution_id)).partition(b"\r\n\r\n")
        assert f"content-length: {len(whole)}".encode() in head.lower()
        assert body == whole[:3]

    async def test_malformed(self, sim: Simulator, client: Client) -> None:
        """A malformed answer is a 200 that is not JSON; by default it is HTML."""
        sim.inject(Fault.malformed())
        sim.inject(Fault.malformed(body=b'{"a":'))
        status, body, headers = await client.send("GET", RESULTS)
        assert (status, headers["Content-Type"]) == (200, "text/html")
        assert body.startswith(b"<html>")
        assert (await client.send("GET", RESULTS))[1] == b'{"a":'

    async def test_stall(self, sim: Simulator, client: Client) -> None:
        """A stalled request is recorded but never answered; others are served in the meantime."""
        execution_id = sim.add_execution(DONE)
        sim.inject(Fault.stall())
        stalled = asyncio.create_task(client.results(execution_id))
        await sim.wait_for_requests(1)
        assert (await client.results(execution_id))[0] == 200
        assert not stalled.done()
        stalled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stalled

    async def test_trickle(self, sim: Simulator, client: Client) -> None:
        """A trickling answer is a 200 whose bytes are sent one by one and never end."""
        sim.inject(Fault.trickle(0.001))
        async with client.http.get(RESULTS) as response:
            received = [await response.content.read(1) for _ in range(5)]
            assert response.status == 200
            assert b"".join(received) == b'"aaaa'
            assert not response.content.at_eof()

    async def test_delay(self, sim: Simulator, client: Client) -> None:
        """A delayed answer is the normal one of the moment it is sent."""
        execution_id = sim.add_execution(HELD)
        sim.inject(Fault.delay(0.05))
        delayed = asyncio.create_task(client.results(execution_id))
        await sim.wait_for_requests(1)
        sim.finish(execution_id, "Node 1")
        assert await delayed == (200, b'"AAA"\n')

    async def test_delay_response(self, sim: Simulator, client: Client) -> None:
        """The operation happens at once, and a start request starts its run."""
        sim.add_workflow("write-report", HELD)
        sim.inject(Fault.delay_response(1000.0))
        starting = asyncio.create_task(
            client.send("POST", "/workflows/write-report/run", data=b"{}")
        )
        await sim.wait_for_requests(1)
        assert len(sim.runs) == 1
        assert not starting.done()
        starting.cancel()

    async def test_the_delayed_response_is_that_of_its_operation(
        self, sim: Simulator, client: Client
    ) -> None:
        """What happens meanwhile does not change it."""
        execution_id = sim.add_execution(HELD)
        sim.inject(Fault.delay_response(0.05))
        delayed = asyncio.create_task(client.results(execution_id))
        await sim.wait_for_requests(1)
        sim.finish(execution_id, "Node 1")
        assert (await delayed)[0] == 202

    async def test_early_completion(self, sim: Simulator, client: Client) -> None:
        """Of all requests, it affects one for results, which gets a 200 with a running node."""
        sim.inject(Fault.early_completion())
        execution_id = sim.add_execution(HELD)
        assert (await client.send("GET", "/workflows"))[0] == 200
        status, body = await client.all_results(execution_id)
        assert (status, json.loads(body)["Node 1"]["status"]) == (200, "RUNNING")
        assert (await client.all_results(execution_id))[0] == 202

    @pytest.mark.parametrize("size", [111, 1_000_000])
    async def test_oversize(self, sim: Simulator, client: Client, size: int) -> None:
        """An oversized answer is a node map of exactly that many bytes, without Content-Length."""
        sim.inject(Fault.oversize(size))
        status, body, headers = await client.send("GET", RESULTS)
        assert (status, len(body)) == (200, size)
        assert list(json.loads(body)) == ["Node 1"]
        assert "Content-Length" not in headers

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Fault.status(199),
            lambda: Fault.status(600),
            lambda: Fault.status(500, times=0),
            lambda: Fault.oversize(10),
        ],
    )
    def test_impossible(self, make: Any) -> None:
        """Impossible faults are refused when they are created."""
        with pytest.raises(ValueError, match=r"status|at least"):
            make()


async def raw_get(sim: Simulator, execution_id: int) -> bytes:
    """Send a request over a plain socket and return everything that is received."""
    url = URL(sim.base_url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(
        f"GET {RESULTS}?workflow_version_execution_id={execution_id} HTTP/1.1\r\n"
        f"Host: sim\r\nX-API-KEY: {sim.api_key}\r\n\r\n".encode()
    )
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


class TestRateLimit:
    """The token bucket over HTTP."""

    async def test_bucket(self, sim: Simulator, client: Client, clock: Clock) -> None:
        """Beyond the burst the answer is 429, with a Retry-After that is long enough."""
        execution_id = sim.add_execution(DONE)
        sim.rate_limit(requests=6, per=2.0, burst=2)
        assert [(await client.results(execution_id))[0] for _ in range(2)] == [200, 200]
        params = {"workflow_version_execution_id": str(execution_id)}
        status, body, headers = await client.send("GET", RESULTS, params=params)
        assert (status, headers["Retry-After"]) == (429, "0.334")
        assert json.loads(body) == {"success": False, "message": "Too Many Requests"}
        clock.now += 0.334
        assert [(await client.results(execution_id))[0] for _ in range(2)] == [200, 429]

    async def test_wrong_keys_take_no_token(self, sim: Simulator, client: Client) -> None:
        """The key is checked before the bucket, so a 401 takes no token."""
        sim.rate_limit(1)
        for _ in range(3):
            assert (await client.send("GET", RESULTS, headers={}))[0] == 401
        assert (await client.results(5))[0] == 404

    async def test_removed(self, sim: Simulator, client: Client) -> None:
        """A limit can be removed."""
        sim.rate_limit(0.5)
        assert [(await client.results(5))[0] for _ in range(2)] == [404, 429]
        sim.rate_limit(None)
        assert [(await client.results(5))[0] for _ in range(2)] == [404, 404]

    @pytest.mark.parametrize("limit", [(0, 1.0, 1), (1, 0.0, 1), (1, 1.0, 0)])
    async def test_impossible(self, sim: Simulator, limit: tuple[int, float, int]) -> None:
        """A limit that would allow nothing is refused."""
        with pytest.raises(ValueError, match="must be positive"):
            sim.rate_limit(*limit)


class TestLog:
    """The log of requests, and waiting for requests."""

    async def test_records(self, sim: Simulator, client: Client, clock: Clock) -> None:
        """Every request is recorded as it was sent, whatever the answer."""
        clock.now += 2.5
        await client.send("POST", "/a%2Fb?x=1&x=2&y=%20", data=b"\xff", headers={"X-Thing": "z"})
        (request,) = sim.requests
        assert isinstance(request, SimRequest)
        assert (request.method, request.path, request.body) == ("POST", "/a%2Fb", b"\xff")
        assert list(request.query.items()) == [("x", "1"), ("x", "2"), ("y", " ")]
        assert request.headers["x-thing"] == "z"
        assert request.at == 2.5

    async def test_on_request(self) -> None:
        """`on_request` is called before each request is answered, whether or not it is kept."""
        seen: list[SimRequest] = []
        async with (
            Simulator(log_requests=False, on_request=seen.append) as sim,
            aiohttp.ClientSession(sim.base_url) as http,
        ):
            for path in ("/a", "/b"):
                await Client(sim, http).send("GET", path)
            assert [request.path for request in seen] == ["/a", "/b"]
            assert (sim.request_count, sim.requests) == (2, [])

    async def test_waiting(self, sim: Simulator, client: Client) -> None:
        """A waiter wakes at its number of requests, not before, and at once if it is reached."""
        waiting = asyncio.create_task(sim.wait_for_requests(2))
        await client.send("GET", "/")
        assert not waiting.done()
        await client.send("GET", "/")
        await waiting
        await sim.wait_for_requests(1)

    async def test_waiting_times_out(self, sim: Simulator, client: Client) -> None:
        """The TimeoutError says how many requests there were."""
        await client.send("GET", "/")
        with pytest.raises(TimeoutError, match=r"saw 1 of 2 requests in 0\.01 s"):
            await sim.wait_for_requests(2, timeout=0.01)


class TestLoopMode:
    """`async with`."""

    async def test_stops_with_open_requests(self) -> None:
        """Exiting ends stalled, trickling, delayed and idle connections; no task remains."""
        before = asyncio.all_tasks()
        async with aiohttp.ClientSession() as http:
            async with asyncio.timeout(5), Simulator() as sim:
                sim.inject(Fault.stall())
                sim.inject(Fault.trickle(0.001))
                sim.inject(Fault.delay(1000.0))
                sim.inject(Fault.oversize(1_000_000_000))
                requests = [asyncio.ensure_future(http.get(sim.base_url)) for _ in range(5)]
                await sim.wait_for_requests(5)
            ends = await asyncio.gather(*requests, return_exceptions=True)
            assert len(ends) == 5
        assert asyncio.all_tasks() <= before
        gc.collect()

    async def test_entered_again(self) -> None:
        """A simulator can be entered again after it was exited, and keeps its executions."""
        sim = Simulator()
        execution_id = sim.add_execution(DONE)
        for _ in range(2):
            async with sim, aiohttp.ClientSession(sim.base_url) as http:
                assert await Client(sim, http).results(execution_id) == (200, b'"AAA"\n')
            with pytest.raises(RuntimeError, match="not running"):
                assert sim.base_url

    async def test_entered_twice(self, sim: Simulator) -> None:
        """Entering a running simulator is a clear error in both modes."""
        with pytest.raises(RuntimeError, match="already running"):
            await sim.__aenter__()
        with pytest.raises(RuntimeError, match="already running"):
            sim.__enter__()


class TestThreadMode:
    """`with`."""

    def test_serves(self) -> None:
        """`with` needs no loop in the caller's thread, where all methods can be called."""
        with Simulator() as sim:
            execution_id = sim.add_execution(HELD)
            url = f"{sim.base_url}{RESULTS}?workflow_version_execution_id={execution_id}"
            assert get(url, sim.api_key)[0] == 202
            sim.finish(execution_id, "Node 1")
            assert get(url, sim.api_key) == (200, b'"AAA"\n')
            asyncio.run(sim.wait_for_requests(2))
            sim.inject(Fault.status(500))
            with pytest.raises(urllib.error.HTTPError) as caught:
                get(url, sim.api_key)
            caught.value.close()
            assert [request.method for request in sim.requests] == ["GET"] * 3

    def test_stops_with_open_requests(self) -> None:
        """Exiting ends the thread at once, even with a stalled client connected."""
        before = set(threading.enumerate())
        with socket.socket() as connection:
            with Simulator() as sim:
                sim.inject(Fault.stall())
                url = URL(sim.base_url)
                connection.connect((url.host, url.port))
                connection.sendall(b"GET / HTTP/1.1\r\nHost: sim\r\n\r\n")
                asyncio.run(sim.wait_for_requests(1))
            connection.settimeout(5)
            assert connection.recv(1) == b""
        assert set(threading.enumerate()) == before
        gc.collect()

    def test_start_error_reaches_the_caller(self) -> None:
        """An error that prevents the start is raised by `with`, and no thread remains."""
        before = set(threading.enumerate())
        with Simulator() as sim:
            taken = URL(sim.base_url).port
            assert taken is not None
            with pytest.raises(OSError, match="address already in use"):
                Simulator(port=taken).__enter__()
        assert set(threading.enumerate()) == before

    async def test_waited_for_in_another_loop(self) -> None:
        """A threaded simulator wakes a waiter in the test's loop in a thread-safe way."""
        asyncio.get_running_loop().set_debug(True)
        with Simulator() as sim:
            async with aiohttp.ClientSession() as http:
                waiting = asyncio.create_task(sim.wait_for_requests(1))
                async with http.get(sim.base_url):
                    await waiting
