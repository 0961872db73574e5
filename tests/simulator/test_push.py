"""The simulator's push and callbacks, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

WEBSOCKET = "/connection/websocket"
CHANNEL = "workflows:1:run:x"
HELD = Scenario([SimNode("Node 1", "AAA", None, is_output_node=True)])
NODE_MAP = {
    "Node 1": {
        "status": "SUCCESS",
        "value": "AAA",
        "error_message": None,
        "raw_error_message": None,
        "is_output_node": True,
    }
}


class Socket:
    """The client side of a WebSocket."""

    def __init__(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        self.websocket = websocket

    async def send(self, *commands: object) -> None:
        """Send commands in one text frame, each on a line of its own."""
        await self.websocket.send_str("\n".join(map(json.dumps, commands)))

    async def receive(self) -> dict[str, Any]:
        """Return the next reply or push."""
        reply: dict[str, Any] = json.loads(await self.websocket.receive_str(timeout=10))
        return reply

    async def request(self, **command: object) -> dict[str, Any]:
        """Send one command and return the reply, without its id."""
        await self.send({"id": 7, **command})
        reply = await self.receive()
        assert reply.pop("id") == 7
        return reply

    async def completion(self, channel: str = CHANNEL) -> dict[str, Any]:
        """Return the completion message in the next push."""
        push = (await self.receive())["push"]
        assert (push.keys(), push["channel"]) == ({"channel", "pub"}, channel)
        publication = push["pub"]["data"]
        assert publication["message_name"] == "SET_WORKFLOW_COMPLETE"
        message: dict[str, Any] = json.loads(publication["data"])
        return message

    async def end(self) -> tuple[int, str | None]:
        """Return the code and the reason with which the server closes the connection."""
        message = await self.websocket.receive(timeout=10)
        assert message.type is aiohttp.WSMsgType.CLOSE, message
        return message.data, message.extra


class Client:
    """A client of a simulator that runs workflows and subscribes to channels."""

    def __init__(self, sim: Simulator, http: aiohttp.ClientSession) -> None:
        self.sim = sim
        self.http = http

    async def post(self, path: str, **options: Any) -> tuple[int, Any]:
        """Send a POST and return the status and the answer."""
        async with self.http.post(f"{self.sim.base_url}{path}", **options) as response:
            return response.status, await response.json()

    async def token(self, *channels: str) -> str:
        """Return a token for some channels."""
        params = [("capability", channel) for channel in channels]
        status, answer = await self.post("/ws-token-request-library", params=params)
        assert status == 201
        token: str = answer["token_details"]["token"]
        return token

    async def open(self, **options: Any) -> Socket:
        """Open a WebSocket."""
        return Socket(await self.http.ws_connect(f"{self.sim.base_url}{WEBSOCKET}", **options))

    async def connect(self, *channels: str) -> Socket:
        """Open a WebSocket and connect with a token for some channels."""
        opened = await self.open(max_msg_size=0)
        assert "connect" in await opened.request(connect={"token": await self.token(*channels)})
        return opened

    async def subscribe(self, channel: str = CHANNEL) -> Socket:
        """Connect and subscribe to one channel."""
        connected = await self.connect(channel)
        assert await connected.request(subscribe={"channel": channel}) == {"subscribe": {}}
        return connected

    async def run(self, **body: object) -> int:
        """Start the workflow `w`, by default with the suffix of `CHANNEL`."""
        body = {"channel_name_suffix": "x"} | body
        _, answer = await self.post("/workflows/w/run", json=body)
        execution_id: int = answer["workflow_version_execution_id"]
        return execution_id


@pytest.fixture
async def open_client() -> AsyncIterator[Callable[[Simulator], Client]]:
    """Return a factory of clients; everything that they open is closed at the end."""
    async with AsyncExitStack() as stack:
        made = []

        def make(sim: Simulator) -> Client:
            made.append(aiohttp.ClientSession(headers={"X-API-KEY": sim.api_key}))
            stack.push_async_callback(made[-1].close)
            return Client(sim, made[-1])

        yield make


@pytest.fixture
async def client(sim: Simulator, open_client: Callable[[Simulator], Client]) -> Client:
    """Return a client of `sim`."""
    return open_client(sim)


def tasks_of_runs() -> list[asyncio.Task[Any]]:
    """Return the tasks that wait for runs or send their notifications."""
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("simulator run")]


class TestToken:
    """The operation that issues tokens."""

    async def test_token(self, client: Client) -> None:
        """A token is a 201 that names its channels and its lifetime of one hour."""
        status, answer = await client.post(
            "/ws-token-request-library", params={"capability": CHANNEL}
        )
        details = answer["token_details"]
        assert (status, answer["success"]) == (201, True)
        assert answer["messaging_backend"] == "centrifugo"
        assert details["capability"] == {CHANNEL: ["presence", "subscribe"]}
        assert details["expires"] - details["issued"] == 3_600_000
        assert abs(details["issued"] / 1000 - time.time()) < 60
        assert details["clientId"] == "1"

    async def test_capability_is_required(self, client: Client) -> None:
        """Without a capability it is a 422 that names it."""
        status, answer = await client.post("/ws-token-request-library")
        assert (status, answer["detail"][0]["loc"]) == (422, ["query", "capability"])


class TestConnection:
    """Centrifugo's client protocol."""

    async def test_connect(self, client: Client) -> None:
        """The reply to connect has a client id, and says neither that it ends nor that it pings."""
        opened = await client.open()
        reply = await opened.request(
            connect={"token": await client.token(CHANNEL), "name": "python"}
        )
        assert reply["connect"].pop("client")
        assert reply == {"connect": {"version": ""}}

    async def test_commands_in_one_frame(self, client: Client) -> None:
        """Several commands in one frame are answered in order, each with its id."""
        opened = await client.open()
        await opened.send(
            {"id": 1, "connect": {"token": await client.token(CHANNEL)}},
            {"id": 2, "subscribe": {"channel": CHANNEL}},
            {"id": 3, "unsubscribe": {"channel": CHANNEL}},
        )
        replies = [await opened.receive() for _ in range(3)]
        assert [reply["id"] for reply in replies] == [1, 2, 3]
        assert replies[1:] == [{"id": 2, "subscribe": {}}, {"id": 3, "unsubscribe": {}}]

    async def test_unknown_token(self, client: Client) -> None:
        """A token that was not issued closes the connection without reconnecting."""
        opened = await client.open()
        await opened.send({"id": 1, "connect": {"token": "made up"}})
        assert await opened.end() == (3500, "invalid token")

    @pytest.mark.parametrize(
        "frame",
        [
            "",
            "{",
            "[]",
            '{"connect":{"token":"?"}}',
            '{"id":1,"connect":{}}',
            f'{{"id":1,"subscribe":{{"channel":"{CHANNEL}"}}}}',
        ],
    )
    async def test_bad_request(self, client: Client, frame: str) -> None:
        """An invalid command, or one before the token, closes the connection."""
        opened = await client.open()
        await opened.websocket.send_str(frame)
        assert await opened.end() == (3501, "bad request")

    @pytest.mark.parametrize(
        "command",
        [
            {"subscribe": {"channel": "workflows:1:run:y"}},
            {"publish": {"channel": CHANNEL, "data": 1}},
            {"history": {"channel": CHANNEL}},
        ],
    )
    async def test_denied(self, client: Client, command: dict[str, Any]) -> None:
        """A token allows its own channels only, and only subscribing to them."""
        connected = await client.connect(CHANNEL)
        error = {"code": 103, "message": "permission denied"}
        assert await connected.request(**command) == {"error": error}


class TestPublication:
    """Publishing completions to subscribers."""

    async def test_frame(self, client: Client) -> None:
        """A completion is one push whose data is the recorded JSON text."""
        client.sim.add_workflow("w", HELD)
        subscribed = await client.subscribe()
        client.sim.finish(await client.run(), "Node 1")
        data = '{"workflow_version_execution_id":1001,"final_output":"AAA","result_code":"OK"}'
        publication = {"message_name": "SET_WORKFLOW_COMPLETE", "data": data}
        push = {"channel": CHANNEL, "pub": {"data": publication}}
        assert await subscribed.receive() == {"push": push}

    @pytest.mark.parametrize(
        ("all_outputs", "status", "output"),
        [
            (False, "SUCCESS", "AAA"),
            (True, "SUCCESS", NODE_MAP),
            (
                False,
                "FAILED",
                {"Node 1": NODE_MAP["Node 1"] | {"status": "FAILED", "value": None}},
            ),
        ],
    )
    async def test_output(
        self, client: Client, all_outputs: bool, status: str, output: object
    ) -> None:
        """The output is the same as the results operation returns."""
        client.sim.add_workflow("w", HELD)
        subscribed = await client.subscribe()
        execution_id = await client.run(return_all_outputs=all_outputs)
        client.sim.finish(execution_id, "Node 1", status=status)
        assert await subscribed.completion() == {
            "workflow_version_execution_id": execution_id,
            "final_output": output,
            "result_code": "OK",
        }

    async def test_nodes_that_end_by_themselves(self, client: Client) -> None:
        """A completion by time is published without any request."""
        nodes = [SimNode("a", duration=0.02), SimNode("b", 1, 0.02, ("a",), is_output_node=True)]
        client.sim.add_workflow("w", Scenario(nodes))
        subscribed = await client.subscribe()
        await client.run()
        assert (await subscribed.completion())["final_output"] == 1

    async def test_another_clock(self, open_client: Callable[[Simulator], Client]) -> None:
        """After the test has moved the clock, reading the execution publishes the completion."""
        now = 100.0
        async with Simulator(clock=lambda: now) as sim:
            sim.add_workflow("w", Scenario([SimNode("a", 1, 1000.0, is_output_node=True)]))
            client = open_client(sim)
            subscribed = await client.subscribe()
            execution_id = await client.run()
            assert sim.state(execution_id) == {"a": "RUNNING"}
            now += 1000.0
            assert sim.state(execution_id) == {"a": "SUCCESS"}
            assert (await subscribed.completion())["final_output"] == 1

    async def test_only_its_channel(self, client: Client) -> None:
        """A subscriber gets only the runs of its channel."""
        client.sim.add_workflow("w", HELD)
        subscribed = await client.subscribe()
        other, mine = await client.run(channel_name_suffix="y"), await client.run()
        for execution_id in (other, mine):
            client.sim.finish(execution_id, "Node 1")
        assert (await subscribed.completion())["workflow_version_execution_id"] == mine

    async def test_unsubscribed(self, client: Client) -> None:
        """A client that unsubscribed gets no more messages of the channel."""
        client.sim.add_workflow("w", HELD)
        subscribed = await client.subscribe()
        await subscribed.request(unsubscribe={"channel": CHANNEL})
        client.sim.finish(await client.run(), "Node 1")
        await asyncio.gather(*tasks_of_runs())
        assert await subscribed.request(subscribe={"channel": CHANNEL}) == {"subscribe": {}}

    async def test_several_subscribers(self, client: Client) -> None:
        """Every subscriber of a channel gets the message, also after another one disconnected."""
        client.sim.add_workflow("w", HELD)
        gone, *subscribed = [await client.subscribe() for _ in range(3)]
        await gone.websocket.close()
        client.sim.finish(await client.run(), "Node 1")
        for each in subscribed:
            assert (await each.completion())["final_output"] == "AAA"

    async def test_without_a_suffix(self, client: Client) -> None:
        """A run without a suffix is published on the channel of its id, for later subscribers."""
        client.sim.add_workflow("w", HELD)
        execution_id = await client.run(channel_name_suffix=None)
        channel = f"workflow_updates:{execution_id}"
        subscribed = await client.subscribe(channel)
        client.sim.finish(execution_id, "Node 1")
        assert (await subscribed.completion(channel))["final_output"] == "AAA"

    @pytest.mark.parametrize(("limit", "code"), [(78, "OK"), (77, "EXCEEDS_SIZE_LIMIT")])
    async def test_size_limit(
        self, open_client: Callable[[Simulator], Client], limit: int, code: str
    ) -> None:
        """A message over the limit has a text that says so instead of the output."""
        async with Simulator(push_limit_bytes=limit) as sim:
            sim.add_workflow("w", HELD)
            client = open_client(sim)
            subscribed = await client.subscribe()
            sim.finish(await client.run(), "Node 1")
            message = await subscribed.completion()
            assert message["result_code"] == code
            assert ("larger than 77 bytes" in message["final_output"]) == (code != "OK")
            assert message["workflow_version_execution_id"] == 1001

    async def test_broken_scenario(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        """An error in a scenario's function is logged, and no completion is published."""
        client.sim.add_workflow("w", Scenario([SimNode("a", lambda values: 1 / 0)]))
        execution_id = await client.run()
        await asyncio.gather(*tasks_of_runs())
        (record,) = caplog.records
        assert record.name == "promptlayer_exec.simulator"
        assert f"execution {execution_id}: a function of its scenario" in record.getMessage()


class TestCallback:
    """Posting completions to a callback URL."""

    @pytest.mark.parametrize(
        ("asked", "output"),
        [
            ({}, "AAA"),
            ({"return_all_outputs": False}, "AAA"),
            ({"return_all_outputs": True}, NODE_MAP),
        ],
    )
    async def test_posted(self, client: Client, asked: dict[str, bool], output: object) -> None:
        """The URL gets one unsigned POST of the outputs that were requested."""
        client.sim.add_workflow("w", HELD)
        async with Simulator() as receiver:
            execution_id = await client.run(callback_url=f"{receiver.base_url}/hook?a=1", **asked)
            client.sim.finish(execution_id, "Node 1")
            await receiver.wait_for_requests(1)
            await asyncio.gather(*tasks_of_runs())
            (request,) = receiver.requests
        assert (request.method, request.path, dict(request.query)) == ("POST", "/hook", {"a": "1"})
        assert request.headers["Content-Type"] == "application/json"
        assert "X-API-KEY" not in request.headers
        assert json.loads(request.body) == {
            "workflow_version_execution_id": execution_id,
            "final_output": output,
        }

    @pytest.mark.parametrize(
        "url",
        ["http://127.0.0.1:{port}/", "ftp://127.0.0.1/", "http://a..b/"],
    )
    async def test_dead_address(
        self, client: Client, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A callback that cannot be delivered is ignored; the push still arrives."""
        client.sim.add_workflow("w", HELD)
        subscribed = await client.subscribe()
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            port = bound.getsockname()[1]
            execution_id = await client.run(callback_url=url.format(port=port))
            client.sim.finish(execution_id, "Node 1")
            assert (await subscribed.completion())["final_output"] == "AAA"
            await asyncio.gather(*tasks_of_runs())
        assert caplog.records == []


class TestExit:
    """Stopping with open sockets and pending callbacks."""

    async def test_loop_mode(
        self, open_client: Callable[[Simulator], Client], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Exiting `async with` ends sockets, waiting runs and callbacks; no task remains."""
        with Simulator() as receiver:
            receiver.inject(Fault.stall())
            before = asyncio.all_tasks()
            async with asyncio.timeout(5), Simulator() as sim:
                client = open_client(sim)
                sockets = [await client.open(), await client.connect("a"), await client.subscribe()]
                sim.add_workflow("w", HELD)
                await client.run()
                sim.finish(await client.run(callback_url=receiver.base_url), "Node 1")
                await receiver.wait_for_requests(1)
                await sockets[-1].completion()
                assert len(tasks_of_runs()) == 2
            assert asyncio.all_tasks() <= before
            for each in sockets:
                message = await each.websocket.receive(timeout=10)
                assert message.type in {aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR}
        gc.collect()
        assert caplog.records == []
