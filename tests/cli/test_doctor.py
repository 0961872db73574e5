"""`doctor` on the simulator: all is well, and each planted deviation is told apart by its name.

Deviations are planted between the simulator and its client, and in the environment.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import math
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import attrs
import pytest
import trustme
from aiohttp import web
from anyio.from_thread import start_blocking_portal

from promptlayer_exec._doctor import run_checks
from promptlayer_exec._doctor.exchanges import Exchange
from promptlayer_exec._doctor.observed_run import ObservationPolicy, ObservedRun
from promptlayer_exec._doctor.report import Secrets, failed, issue_report, ok
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator, examples

Examine = Callable[..., "Report"]
Change = Callable[[web.BaseRequest, web.Response], web.Response | None]

# Unique texts, none of which may be in a report.
KEY = "key-of-a-test-3141592653"
WORKFLOW = "workflow-name-2718281828"
INPUT = "input-name-1414213562"
INPUT_VALUE = "input-value-1732050807"
NODE = "node-name-1618033988"
OUTPUT = "output-value-0577215664"
PASSWORD = "password-0915965594"
PRIVATE = (KEY, WORKFLOW, INPUT, INPUT_VALUE, NODE, OUTPUT, PASSWORD)

RUN = ("--workflow", WORKFLOW, "-i", f"{INPUT}={INPUT_VALUE}", "--yes")
CLOSED = "127.0.0.1:9"
TOKENS = "/ws-token-request-library"
RESULTS = "/workflow-version-execution-results"
WEBSOCKET = "/connection/websocket"
SCENARIO = Scenario(
    [SimNode("Plan", "a plan", 0.2), SimNode(NODE, OUTPUT, 0.2, ["Plan"], is_output_node=True)]
)


class Report(NamedTuple):
    """A report of `doctor --json`: how the command ended, the whole text, and each check."""

    code: int
    text: str
    checks: dict[str, dict[str, str]]

    @property
    def deviations(self) -> dict[str, str]:
        """What differs or failed, by the name of the check: `differs: found`."""
        return {
            name: f"{check['verdict']}: {check['found']}"
            for name, check in self.checks.items()
            if check["verdict"] in ("differs", "failed")
        }


@pytest.fixture(scope="module")
def sim() -> Iterator[Simulator]:
    """Serve from a thread."""
    with Simulator(api_key=KEY) as simulator:
        simulator.add_workflow(WORKFLOW, SCENARIO, inputs={INPUT: "string"})
        yield simulator


@pytest.fixture(autouse=True)
def _quick(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Watch runs with short pauses, and remove all faults afterwards."""
    policy = ObservationPolicy(gap=0.02, silence=0.3, callback=0.3)
    monkeypatch.setattr(run_checks, "_POLICY", policy)
    yield
    sim.clear_faults()


@pytest.fixture
def examine(call: Callable[..., Any]) -> Examine:
    """Return a function that runs `doctor --json`, and checks that its report is not indiscreet."""

    def examine(*arguments: object, **env: str) -> Report:
        code, out, _ = call("doctor", *arguments, "--json", **env)
        assert not [text for text in PRIVATE if text in out]
        checks = {check["check"]: check for check in json.loads(out)["checks"]}
        return Report(code, out, checks)

    return examine


def altered(change: Change, times: int | None = None) -> Fault:
    """Return a fault that changes complete responses."""

    async def respond(request: web.BaseRequest, answer: Callable[[], web.Response]) -> web.Response:
        response = answer()
        return change(request, response) or response

    return Fault(respond, times)


def json_response(status: int, body: bytes) -> web.Response:
    """Return a response with another body, or status."""
    return web.Response(status=status, body=body, content_type="application/json")


def is_bare(request: web.BaseRequest) -> bool:
    """Return whether a poll asks for the main output alone."""
    return request.query["return_all_outputs"] == "false"


def push_server(announces: str, run_id: Callable[[str], Awaitable[int]] | None = None) -> Fault:
    """Return a push server that accepts everything, and announces on channels of one kind alone.

    What it announces is the completion of the run that `run_id` returns for a channel.
    """

    async def named(channel: str) -> int:
        return int(channel.rpartition(":")[2])

    async def serve(request: web.BaseRequest, _: Any) -> web.StreamResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        async for message in websocket:
            command: dict[str, Any] = json.loads(message.data)
            number = command.pop("id")
            ((name, fields),) = command.items()
            await websocket.send_str(json.dumps({"id": number, name: {}}))
            channel = fields.get("channel", "")
            if channel.startswith(announces):
                execution_id = await (run_id or named)(channel)
                completion = json.dumps({"workflow_version_execution_id": execution_id})
                data = {"message_name": "SET_WORKFLOW_COMPLETE", "data": completion}
                push = {"push": {"channel": channel, "pub": {"data": data}}}
                await websocket.send_str(json.dumps(push))
        return websocket

    return Fault(serve, None)


class TestHealthy:
    """Nothing deviates."""

    def test_the_report_in_the_docs_is_what_is_printed(self, call: Callable[..., Any]) -> None:
        """Only numbers differ, what is installed, and whether push or a poll was first."""
        page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
        (_, command, *_), (shown,) = (
            re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
            for language in ("sh", "text")
        )
        with Simulator() as simulator:
            examples.add_workflows(simulator)
            server = {"PROMPTLAYER_BASE_URL": simulator.base_url}
            server["PROMPTLAYER_API_KEY"] = simulator.api_key
            code, out, _ = call(*command.split()[1:], **server)

        def lasting(text: str) -> list[str]:
            return re.sub(r"(under )?[\d.]+( m?s\b)?|before|after", "N", text).splitlines()

        assert code == 0
        assert lasting(out)[4:] == lasting(shown)[4:]
        names = [line[:26] for line in shown.splitlines()[:4]]
        assert [line[:26] for line in out.splitlines()[:4]] == names

    def test_without_a_run(self, sim: Simulator, examine: Examine) -> None:
        """Everything is ok or skipped, nothing is started, and the exit code is 0."""
        runs, requests = len(sim.runs), sim.request_count
        code, _, checks = examine()
        assert code == 0
        assert sim.request_count == requests + 7
        skipped = {name for name, check in checks.items() if check["verdict"] == "skipped"}
        assert skipped == {"TLS", "database", "Redis", "start"}
        assert {check["verdict"] for check in checks.values()} == {"ok", "skipped"}
        assert checks["definition"]["found"] == "documented shape: 1 input (string), 2 nodes"
        assert len(sim.runs) == runs

    def test_with_a_run(self, sim: Simulator, examine: Examine) -> None:
        """One run is started, with the given input, and all of it is as expected."""
        runs = len(sim.runs)
        code, _, checks = examine(*RUN)
        assert code == 0
        assert [run.inputs for run in sim.runs[runs:]] == [{INPUT: INPUT_VALUE}]
        found = {name: check["found"] for name, check in checks.items()}
        assert found["start"].startswith("201 Created with an id, after ")
        assert found["completion"].startswith("complete after ")
        assert found["first polls"] == "no 404: the first poll got 202 Accepted"
        assert found["node map"].startswith("2 nodes in the documented shape (")
        assert found["statuses"] == "2 SUCCESS in the last poll"
        assert found["running output"] == "the node map with 202 (3 polls)"
        assert found["main output"] == "the value of the output node"
        assert found["pushed message"].startswith("on the run's own channel, ")
        assert checks["callback"]["verdict"] == "skipped"

    def test_the_text_has_a_line_for_each_check(self, call: Callable[..., Any]) -> None:
        """They stand under the headings of their groups; private texts are in none of them."""
        code, out, err = call("doctor", *RUN)
        assert code == 0
        lines = out.splitlines()
        assert [line for line in lines if line and not line.startswith(" ")] == [
            *("Setup", "Connection", "API", "Push", "Databases", "Run"),
            "22 ok, 0 differs, 0 failed, 4 skipped",
        ]
        assert "  ok       API key          accepted" in lines
        assert "  skipped  database         no --db" in lines
        assert err.startswith("execution 1")
        assert not [text for text in PRIVATE if text in out + err]

    def test_a_terminal_gets_the_same(self, call: Callable[..., Any]) -> None:
        """Its lines are wrapped in their columns."""
        code, out, _ = call("doctor", on_screen=True)
        assert code == 0
        assert "API key         accepted" in out

    def test_the_json_names_no_host(self, sim: Simulator, examine: Examine) -> None:
        """The text does, for whoever set it up."""
        assert "127.0.0.1" not in examine("--redis", f"redis://{CLOSED}").text

    def test_a_failed_run_is_as_expected(self, sim: Simulator, examine: Examine) -> None:
        """Whether a workflow succeeds is not what is checked; then the node map is the output."""
        node = SimNode(NODE, status="FAILED", error_message=OUTPUT, is_output_node=True)
        name = f"failing-{WORKFLOW}"
        sim.add_workflow(name, Scenario([SimNode("Plan", "", 0.1), node]), inputs={})
        code, _, checks = examine("--workflow", name, "--yes")
        assert code == 0
        assert checks["statuses"]["found"] == "1 SUCCESS, 1 FAILED in the last poll"
        found = "the node map, because no output node succeeded"
        assert checks["main output"]["found"] == found


class TestSetup:
    """The environment, the connection and the key."""

    def test_a_wrong_key(self, examine: Examine) -> None:
        """It is refused, and what needs it is skipped."""
        code, _, checks = report = examine(*RUN, PROMPTLAYER_API_KEY="another-key")
        assert code == 1
        assert report.deviations == {"API key": "failed: PromptLayer refused it: 401 Unauthorized"}
        assert "Check PROMPTLAYER_API_KEY" in checks["API key"]["advice"]
        assert checks["workflows"]["found"] == "the check 'API key' did not pass"
        assert checks["start"]["found"] == "the check 'API key' did not pass"

    @pytest.mark.parametrize(
        ("key", "found"),
        [("", "there is no API key"), ("two words", "PROMPTLAYER_API_KEY must be a non-empty")],
    )
    def test_no_usable_key(self, examine: Examine, key: str, found: str) -> None:
        """The connection to the server is still checked."""
        report = examine(PROMPTLAYER_API_KEY=key)
        assert report.deviations["API key"].startswith(f"failed: {found}")
        assert report.checks["response"]["verdict"] == "ok"

    def test_a_key_that_may_not_list(self, sim: Simulator, examine: Examine) -> None:
        """A 403 is told apart from a 401."""
        respond = altered(lambda request, response: json_response(response.status + 203, b"{}"))
        sim.inject(altered(lambda *_: None, times=3), path="/workflows")
        sim.inject(respond, path="/workflows")
        report = examine()
        assert report.checks["API key"]["found"] == "not refused: 403 Forbidden"
        assert report.deviations["workflows"].endswith("refused to list workflows: 403 Forbidden")

    @pytest.mark.parametrize("status", [403, 404])
    def test_a_run_needs_no_list_and_no_definition(
        self, sim: Simulator, examine: Examine, status: int
    ) -> None:
        """It is examined whenever the key is accepted."""
        sim.inject(altered(lambda *_: None, times=3), path="/workflows")
        for path in ("/workflows", f"/{WORKFLOW}"):
            sim.inject(Fault.status(status, times=None), path=path)
        report = examine(*RUN)
        assert set(report.deviations) == {"workflows", "definition"}
        assert report.checks["main output"]["verdict"] == "ok"

    def test_an_unreachable_server(self, examine: Examine) -> None:
        """Its reason is named, and the rest is skipped."""
        report = examine("--base-url", f"http://{CLOSED}")
        found = "failed: could not reach the server: Connection refused"
        assert report.deviations == {"response": found}

    def test_an_unknown_host(self, examine: Examine) -> None:
        """The name cannot be resolved."""
        report = examine("--base-url", "https://promptlayer.invalid")
        assert list(report.deviations) == ["name resolution"]
        assert "promptlayer.invalid" not in report.text

    def test_a_server_that_is_another_one(self, sim: Simulator, examine: Examine) -> None:
        """A list of another shape is not PromptLayer's."""
        sim.inject(Fault.malformed(None), path="/workflows")
        found = "failed: the list of workflows has an unknown shape: not JSON"
        assert examine().deviations == {"workflows": found}

    def test_a_server_that_redirects(self, sim: Simulator, examine: Examine) -> None:
        """A session would not follow it, so the key stays here."""
        sim.inject(Fault.status(301, times=None), path="/workflows")
        found = "failed: the server redirects: 301 Moved Permanently"
        assert examine().deviations == {"response": found}

    def test_malformed_settings(self, examine: Examine) -> None:
        """Each is named by the check that is about it; a URL with a password is not shown."""
        url = f"https://jane:{PASSWORD}@host.example"
        report = examine(PROMPTLAYER_BASE_URL=url, PROMPTLAYER_EXEC_PUSH="perhaps")
        assert report.deviations == {
            "environment": "failed: PROMPTLAYER_EXEC_PUSH must be 1 or 0",
            "base URL": "failed: PROMPTLAYER_BASE_URL must not contain a user name or password",
        }

    def test_plain_http(self, examine: Examine) -> None:
        """A key would be readable on its way to another machine."""
        report = examine("--base-url", "http://promptlayer.invalid")
        assert report.deviations["base URL"].startswith("differs: http: anyone on the network")


class TestProxies:
    """The proxy of the environment."""

    URL = ("--base-url", "https://promptlayer.test")

    def test_one_that_is_away(self, examine: Examine) -> None:
        """It is told apart from a server that is away, without its password."""
        report = examine(*self.URL, HTTPS_PROXY=f"http://jane:{PASSWORD}@{CLOSED}")
        found = "failed: could not reach the proxy: Connection refused"
        assert report.deviations == {"proxy": found}

    def test_one_that_refuses(self, examine: Examine) -> None:
        """Its status is in the report."""

        def refuse(connection: socket.socket) -> None:
            if connection.recv(65536):
                status = b"407 Proxy Authentication Required"
                connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")

        with accepting(refuse) as port:
            proxy = f"http://jane:{PASSWORD}@127.0.0.1:{port}"
            report = examine(*self.URL, HTTPS_PROXY=proxy)
        assert report.deviations == {
            "response": "failed: could not reach the server: the proxy refused the connection: 407"
            " Proxy Authentication Required"
        }
        assert report.checks["proxy"]["found"] == "in use and reachable"

    def test_one_that_refuses_plain_http(self, sim: Simulator, examine: Examine) -> None:
        """There the refusal looks like the server's own response, except for its status."""
        sim.inject(Fault.status(407, times=None), path="/workflows")
        url = ("--base-url", "http://promptlayer.test")
        found = "failed: the proxy refused the request: 407 Proxy Authentication Required"
        assert examine(*url, HTTP_PROXY=sim.base_url).deviations["response"] == found


@contextmanager
def accepting(handle: Callable[[socket.socket], None]) -> Iterator[int]:
    """Handle connections one by one in a thread, and yield the port."""

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    handle(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def tls_in_front_of(sim: Simulator, context: ssl.SSLContext) -> Iterator[str]:
    """Serve the simulator by TLS from a thread, and yield the URL."""
    upstream = int(sim.base_url.rpartition(":")[2])

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def relay(down: asyncio.StreamReader, up: asyncio.StreamWriter) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", upstream)
        await asyncio.gather(copy(down, writer), copy(reader, up))

    with start_blocking_portal() as portal:
        server = portal.call(lambda: asyncio.start_server(relay, "127.0.0.1", 0, ssl=context))
        yield f"https://localhost:{server.sockets[0].getsockname()[1]}"
        portal.call(server.close)


class TestTLS:
    """Certificates, in another process: it has to trust the authority when it starts."""

    PROGRAM = """
import sys
from promptlayer_exec.cli import main
for url in sys.argv[1:]:
    sys.argv = ["promptlayer-exec", "doctor", "--json", "--base-url", url]
    try:
        main()
    except SystemExit as exit:
        print(exit.code)
"""

    def test_certificates(self, sim: Simulator, start: Callable[..., Any], tmp_path: Path) -> None:
        """Expired, about to expire, another host's, and a good one: each is named."""
        authority = trustme.CA()
        authority.cert_pem.write_to_path(tmp_path / "authority.pem")
        now = dt.datetime.now(dt.UTC)
        certificates = [
            ("localhost", dt.datetime(2020, 1, 1, tzinfo=dt.UTC)),
            ("localhost", now + dt.timedelta(days=3.5)),
            ("other.example", None),
            ("localhost", now + dt.timedelta(days=60.5)),
        ]
        with ExitStack() as stack:
            urls = []
            for name, until in certificates:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                authority.issue_cert(name, not_after=until).configure_cert(context)
                urls.append(stack.enter_context(tls_in_front_of(sim, context)))
            program = [sys.executable, "-c", self.PROGRAM]
            trusted = str(tmp_path / "authority.pem")
            _, out, _ = start(*urls, program=program, SSL_CERT_FILE=trusted).end()

        reports = re.findall(r"^{.*?^}\n(\d)$", out, re.MULTILINE | re.DOTALL)
        assert reports == ["1", "1", "1", "0"]
        texts = re.findall(r"^{.*?^}$", out, re.MULTILINE | re.DOTALL)
        expired, expiring, foreign, good = (
            next(check for check in json.loads(text)["checks"] if check["check"] == "TLS")
            for text in texts
        )
        prefix = "no TLS connection: the server's certificate is not valid: "
        assert expired["found"] == f"{prefix}certificate has expired"
        assert "clock" in expired["advice"]
        assert expiring["found"] == "one that expires in 3 days"
        assert foreign["found"].startswith(f"{prefix}Hostname mismatch")
        assert "another host" in foreign["advice"]
        assert good["found"] == "TLSv1.3, the certificate is valid for another 60 days"


class TestDefinitions:
    """Shapes of a definition."""

    DOCUMENTED: ClassVar[dict[str, Any]] = {
        "success": True,
        "workflow_id": 1,
        "workflow_name": WORKFLOW,
        "version": 3,
        "required_input_variables": {INPUT: "string"},
        "nodes": [{"name": NODE, "node_type": "CODE", "is_output_node": True}],
        "edges": [],
    }

    @pytest.mark.parametrize(
        ("body", "found"),
        [
            (
                {"workflow_id": ..., "workflow_name": ..., "workflow": {"id": 1, "name": "x"}},
                "only the object 'workflow', as from a development server",
            ),
            (
                {"version": ..., "version_number": 3},
                "'version_number', as in an example of the documentation",
            ),
            ({"nodes": ...}, "none"),
            ({"nodes": {NODE: {}}}, "an unknown shape (in 'nodes')"),
            ({"workflow_id": ...}, "an unknown shape (in 'workflow_id')"),
        ],
        ids=str,
    )
    def test_another_shape(
        self, sim: Simulator, examine: Examine, body: dict[str, Any], found: str
    ) -> None:
        """It differs, in words that tell it apart."""
        self.inject(sim, body)
        assert examine().deviations == {"definition": f"differs: {found}"}

    @pytest.mark.parametrize(
        ("body", "found"),
        [
            ({"required_input_variables": None}, "names no inputs, 1 node"),
            ({"required_input_variables": ...}, "names no inputs, 1 node"),
            ({"required_input_variables": {}}, "names no inputs, 1 node"),
            ({"nodes": []}, "1 input (string), 0 nodes"),
        ],
        ids=str,
    )
    def test_without_inputs_or_nodes(
        self, sim: Simulator, examine: Examine, body: dict[str, Any], found: str
    ) -> None:
        """A workflow need not have any."""
        self.inject(sim, body)
        report = examine()
        assert report.checks["definition"]["found"] == f"documented shape: {found}"
        assert report.deviations == {}

    def inject(self, sim: Simulator, body: dict[str, Any]) -> None:
        """Let all definitions be the documented one with other fields."""
        fields = {k: v for k, v in (self.DOCUMENTED | body).items() if v is not ...}
        for path in ("/1", "/2"):
            sim.inject(Fault.status(200, times=None, body=json.dumps(fields).encode()), path=path)

    def test_none(self, sim: Simulator, examine: Examine) -> None:
        """Push is still checked, because the list contains the id."""
        for path in ("/1", "/2"):
            sim.inject(Fault.status(404, times=None), path=path)
        report = examine()
        found = "failed: could not read it: 404 Not Found"
        assert report.deviations == {"definition": found}
        assert report.checks["subscription"]["verdict"] == "ok"

    def test_an_unknown_workflow(self, examine: Examine) -> None:
        """A misspelt --workflow is not taken for a deviation of the server."""
        report = examine("--workflow", "no-such-workflow", "--yes")
        assert report.deviations == {
            "definition": "failed: there is no workflow of this name: 404 Not Found",
            "start": "failed: PromptLayer refused to start a run: 404 Not Found",
        }


class TestPush:
    """The push channel."""

    @pytest.mark.parametrize("status", [404, 403])
    def test_none(self, sim: Simulator, examine: Examine, status: int) -> None:
        """The status is named, and the run is still checked."""
        sim.inject(Fault.status(status, times=None), path=TOKENS)
        report = examine(*RUN)
        name = {404: "404 Not Found", 403: "403 Forbidden"}[status]
        assert report.deviations == {"token": f"failed: push unavailable ({name})"}
        assert "Sessions poll instead" in report.checks["token"]["advice"]
        assert report.checks["pushed message"]["found"] == "the check 'subscription' did not pass"

    def test_no_websocket(self, sim: Simulator, examine: Examine) -> None:
        """A proxy that knows no WebSockets refuses the handshake."""
        sim.inject(Fault.status(403, times=None), path=WEBSOCKET)
        found = "failed: push unavailable: could not open the WebSocket: 403 Forbidden"
        assert examine().deviations == {"WebSocket": found}

    def test_no_connection(self, sim: Simulator, examine: Examine) -> None:
        """A token that the server does not know is refused."""
        details = {"token_details": {"token": "unknown"}, "messaging_backend": "centrifugo"}
        sim.inject(Fault.status(201, times=None, body=json.dumps(details).encode()), path=TOKENS)
        assert examine().deviations == {
            "subscription": "failed: push unavailable: could not subscribe: the"
            " server closed the connection (3500)"
        }

    def test_no_subscription(self, sim: Simulator, examine: Examine) -> None:
        """The code of the refusal is named, and the server's own words are not repeated."""

        async def refuse(request: web.BaseRequest, _: Any) -> web.StreamResponse:
            websocket = web.WebSocketResponse()
            await websocket.prepare(request)
            async for message in websocket:
                number = json.loads(message.data)["id"]
                error = {"code": 103, "message": f"{KEY} may not read {WORKFLOW}"}
                await websocket.send_str(json.dumps({"id": number, "error": error}))
            return websocket

        sim.inject(Fault(refuse, None), path=WEBSOCKET)
        assert examine().deviations == {
            "subscription": "failed: push unavailable: could not subscribe: the"
            " server refused to connect (103)"
        }

    def test_another_backend(self, sim: Simulator, examine: Examine) -> None:
        """The token says which one it is for."""

        def change(_: Any, response: web.Response) -> web.Response:
            text = (response.text or "").replace("centrifugo", "carrier-pigeon")
            return json_response(201, text.encode())

        sim.inject(altered(change), path=TOKENS)
        assert examine().deviations == {"token": "differs: another one"}

    def test_silence(self, sim: Simulator, examine: Examine) -> None:
        """It connects and accepts the subscription, and no message ever comes."""
        sim.inject(push_server(announces="nothing"), path=WEBSOCKET)
        report = examine(*RUN)
        assert report.deviations == {"pushed message": "differs: no message"}
        assert "a message within 0.3 s" in report.checks["pushed message"]["expected"]

    def test_the_other_channel(self, sim: Simulator, examine: Examine) -> None:
        """The message comes on the channel that the vendor's JavaScript SDK listens to."""
        sim.inject(push_server(announces="workflow_updates:"), path=WEBSOCKET)
        found = "differs: the completion on workflow_updates:{execution id}"
        assert examine(*RUN).deviations == {"pushed message": found}

    def test_a_message_before_the_completion(self, sim: Simulator, examine: Examine) -> None:
        """Polls still find the run running."""
        runs = len(sim.runs)

        async def new_run(_: str) -> int:
            while len(sim.runs) == runs:
                await sim.wait_for_requests(sim.request_count + 1)
            return sim.runs[-1].execution_id

        sim.inject(push_server("workflows:", new_run), path=WEBSOCKET)
        found = "differs: 202 after the message"
        assert examine(*RUN).deviations == {"pushed message": found}

    def test_turned_off(self, examine: Examine) -> None:
        """The variable skips what it turns off."""
        report = examine(PROMPTLAYER_EXEC_PUSH="0")
        assert report.code == 0
        assert report.checks["token"]["found"] == "PROMPTLAYER_EXEC_PUSH turns push off"


class TestRun:
    """What one run shows."""

    def test_a_start_that_answers_202(self, sim: Simulator, examine: Examine) -> None:
        """That is the status of a start with a callback URL."""
        change = altered(lambda _, response: json_response(202, response.body))  # type: ignore[arg-type]
        sim.inject(change, path="/run")
        report = examine(*RUN)
        assert report.deviations == {"start": "differs: 202 Accepted"}
        assert report.checks["start"]["expected"] == "201 Created"

    def test_a_start_with_another_body(self, sim: Simulator, examine: Examine) -> None:
        """The id is enough to go on."""

        def change(_: Any, response: web.Response) -> web.Response:
            body = json.loads(response.text or "")
            del body["message"]
            return json_response(201, json.dumps(body).encode())

        sim.inject(altered(change), path="/run")
        assert examine(*RUN).deviations == {"start": "differs: none or another kind of message"}

    @pytest.mark.parametrize(
        ("fault", "found"),
        [
            (Fault.disconnect(None), "the response was lost, but the run may have started"),
            (
                Fault.status(201, times=None, body=b'{"success": true}'),
                "201 Created without a usable workflow_version_execution_id, but the run may",
            ),
            (Fault.status(422, times=None), "PromptLayer refused to start a run: 422"),
        ],
        ids=["lost", "no id", "refused"],
    )
    def test_no_start(self, sim: Simulator, examine: Examine, fault: Fault, found: str) -> None:
        """The run is started at most once, and whether it may run is said."""
        runs = len(sim.runs)
        sim.inject(fault, path="/run")
        report = examine(*RUN)
        assert report.deviations["start"].startswith(f"failed: {found}")
        assert report.checks["completion"]["found"] == "the check 'start' did not pass"
        assert len(sim.runs) <= runs + 1

    def test_a_missing_input(self, sim: Simulator, examine: Examine) -> None:
        """Nothing is paid for, and the input is not named."""
        runs = len(sim.runs)
        report = examine("--workflow", WORKFLOW, "--yes")
        found = "failed: missing: 1 required input, so no run was started"
        assert report.deviations == {"start": found}
        assert len(sim.runs) == runs

    def test_a_bare_body_while_running(self, sim: Simulator, examine: Examine) -> None:
        """The kind of the body is named, and never its content."""

        def change(request: web.BaseRequest, response: web.Response) -> web.Response | None:
            if response.status == 202 and is_bare(request):
                return json_response(202, json.dumps(OUTPUT).encode())
            return None

        sim.inject(altered(change), path=RESULTS)
        found = "differs: a bare value, a string, with 202"
        assert examine(*RUN).deviations == {"running output": found}

    def test_a_bare_body_in_place_of_the_nodes(self, sim: Simulator, examine: Examine) -> None:
        """That is not the same as a bare body where it was asked for."""

        def change(request: web.BaseRequest, response: web.Response) -> web.Response | None:
            if response.status == 202 and not is_bare(request):
                return json_response(202, b"true\n")
            return None

        sim.inject(altered(change), path=RESULTS)
        found = "differs: a bare value, true or false, with 202 Accepted"
        assert examine(*RUN).deviations == {"node map": found}

    def test_the_node_map_in_place_of_the_output(self, sim: Simulator, examine: Examine) -> None:
        """An output node succeeded, but all nodes are what comes."""
        nodes = b""

        def change(request: web.BaseRequest, response: web.Response) -> web.Response | None:
            nonlocal nodes
            if not is_bare(request):
                nodes = response.body  # type: ignore[assignment]
            elif response.status == 200:
                return json_response(200, nodes)
            return None

        sim.inject(altered(change), path=RESULTS)
        found = "differs: the node map in its place"
        assert examine(*RUN).deviations == {"main output": found}

    @pytest.mark.parametrize(
        "value", [False, None, 0, "", [], {}, math.nan, 2**70, "x", {"a": {"status": "SUCCESS"}}]
    )
    def test_each_value_is_an_output(self, value: Any) -> None:
        """Of the node that is marked, of one of two, or of any if none is marked."""
        plan = {"status": "SUCCESS", "value": "a plan", "is_output_node": False}
        output = {"status": "SUCCESS", "value": value, "is_output_node": True}
        skipped = {"status": "SKIPPED", "value": None, "is_output_node": True}
        unmarked = output | {"is_output_node": None}
        for nodes, found in (
            ({"a": plan, "b": output}, "the value of the output node"),
            ({"a": output, "b": skipped}, "the value of one of the output nodes"),
            ({"a": plan, "b": unmarked}, "the value of a node, because none is marked as output"),
        ):
            assert run_checks.judge_output(value, nodes) == ok(found)
            assert run_checks.judge_output("another one", nodes).verdict == "differs"
        assert run_checks.judge_output(value, {"a": plan, "b": skipped}).verdict == "differs"

    def test_an_unknown_status(self, sim: Simulator, examine: Examine) -> None:
        """The status is named, the node is not."""

        def change(_: Any, response: web.Response) -> web.Response:
            text = (response.text or "").replace("RUNNING", "PAUSED")
            return json_response(response.status, text.encode())

        sim.inject(altered(change), path=RESULTS)
        assert examine(*RUN).deviations == {"statuses": "differs: 'PAUSED'"}

    def test_a_status_that_does_not_fit_the_nodes(self, sim: Simulator, examine: Examine) -> None:
        """200 says that the run is complete, but a node is running."""
        sim.inject(
            altered(lambda _, response: json_response(200, response.body)),  # type: ignore[arg-type]
            path=RESULTS,
        )
        found = "differs: 200 OK while a node was not final, 3 times"
        assert examine(*RUN).deviations["node map"] == found

    def test_a_200_that_comes_too_early(self, sim: Simulator, examine: Examine) -> None:
        """The run is polled until it is complete, as a session does."""
        sim.inject(Fault.early_completion(2))
        report = examine(*RUN)
        found = "differs: 200 OK while a node was not final, 2 times"
        assert report.deviations == {"node map": found}
        assert report.checks["main output"]["verdict"] == "ok"

    @pytest.mark.parametrize("status", [400, 500])
    def test_an_error_with_all_nodes(self, sim: Simulator, examine: Examine, status: int) -> None:
        """The run is complete all the same."""
        name = f"{WORKFLOW}-{status}"
        sim.add_workflow(name, Scenario([SimNode(NODE, OUTPUT)], no_output_status=status))
        report = examine("--workflow", name, "--yes")
        deviations = report.deviations
        assert set(deviations) == {"completion", "main output"}
        assert deviations["completion"].startswith(f"differs: {status} ")
        assert deviations["completion"].endswith(" with all nodes")
        assert report.checks["node map"]["verdict"] == "ok"

    @pytest.mark.parametrize(
        ("given", "warns", "found"),
        [
            ((), False, "ok: none, and the workflow uses every input"),
            (("-i", "more=1"), True, "ok: a warning, which is not shown here, with 1 unused input"),
            (("-i", "more=1"), False, "differs: none"),
        ],
    )
    def test_a_warning_about_unused_inputs(
        self, sim: Simulator, examine: Examine, given: tuple[str, ...], *, warns: bool, found: str
    ) -> None:
        """PromptLayer documents one."""

        def change(_: Any, response: web.Response) -> web.Response:
            body = json.loads(response.text or "") | {"warning": None}
            return json_response(response.status, json.dumps(body).encode())

        if not warns:
            sim.inject(altered(change), path="/run")
        check = examine(*RUN, *given).checks["warning"]
        assert f"{check['verdict']}: {check['found']}" == found

    @pytest.mark.parametrize(
        ("scenario", "options"),
        [
            (Scenario([]), {}),
            (Scenario([]), {"inputs": {}}),
            (lambda _: Scenario([SimNode("A", 1, is_output_node=True)]), {}),
            (Scenario([SimNode("A", 1), SimNode("B", {}, 0.1, ["A"])]), {"warning": "Careful."}),
            (Scenario([SimNode("A", 1)], no_output_status=200), {"labels": ["prod"]}),
            (Scenario([SimNode("A", 1, is_output_node=None)]), {}),
            (
                Scenario([SimNode("A", status="FAILED"), SimNode("B", None, 0, ["A"])]),
                {"external_ids": {"crm": "7"}},
            ),
            (
                Scenario(
                    [
                        SimNode("A", [], 0.1, is_output_node=True),
                        SimNode("B", 2, is_output_node=True, when=lambda _: False),
                        SimNode(
                            "C",
                            status="FAILURE",
                            error_message={"raw": "no"},
                            raw_error_message=[5],
                            is_output_node=True,
                        ),
                    ]
                ),
                {"inputs": {"more": "image"}},
            ),
        ],
    )
    def test_any_workflow_of_the_simulator(
        self, examine: Examine, scenario: Any, options: dict[str, Any]
    ) -> None:
        """Nothing deviates, whatever a user has added, and with an input that it may not use."""
        with Simulator(api_key=KEY) as simulator:
            simulator.add_workflow("any/workflow", scenario, **options)
            arguments = ("--base-url", simulator.base_url, "--workflow", "any/workflow", "--yes")
            assert examine(*arguments, "-i", "more=1").deviations == {}

    def test_404_for_a_while(
        self, sim: Simulator, examine: Examine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run that is found only after the grace of sessions differs; on a scale of 1 to 20."""
        policy = attrs.evolve(run_checks._POLICY, grace=0.5)
        monkeypatch.setattr(run_checks, "_POLICY", policy)
        began = None

        def change(_: Any, __: Any) -> web.Response | None:
            nonlocal began
            began = began or time.monotonic()
            if time.monotonic() < began + 0.6:
                return json_response(404, b'{"success": false, "message": "not found"}')
            return None

        sim.inject(altered(change), path=RESULTS)
        report = examine(*RUN)
        (found,) = report.deviations.values()
        assert found.startswith("differs: 404 for 0.")
        assert report.checks["first polls"]["expected"].startswith("404 for less than 0.5 s")

    @pytest.mark.parametrize(
        ("seconds", "verdict"), [(0.0, "ok"), (3.0, "ok"), (9.9, "ok"), (12.0, "differs")]
    )
    def test_404_for_seconds(self, seconds: float, verdict: str) -> None:
        """Ten seconds are what sessions wait out."""

        def exchange(at: float, status: int) -> Exchange:
            return Exchange("GET", RESULTS, status, b"{}", at, 0.0)

        run = ObservedRun(1, exchange(0.0, 201), ObservationPolicy())
        run.polls.append(exchange(seconds, 404))
        run.polls.append(exchange(seconds + 0.5, 202))
        finding = run_checks.judge_first_polls(run)
        assert (finding.verdict, finding.found[:12]) == (verdict, f"404 for {seconds} "[:12])

    def test_404_later(self, sim: Simulator, examine: Examine) -> None:
        """A run that was found is not lost again."""
        sim.inject(altered(lambda *_: None, times=2), path=RESULTS)
        sim.inject(Fault.status(404), path=RESULTS)
        found = "differs: 404 after the run had been found"
        assert examine(*RUN).deviations == {"first polls": found}

    def test_not_complete_in_time(self, sim: Simulator, examine: Examine) -> None:
        """What was seen until then is still judged."""
        report = examine(*RUN, "--timeout", 0.1)
        assert report.deviations == {"completion": "failed: not complete within 0.1 s"}
        assert report.checks["running output"]["verdict"] == "ok"
        assert report.checks["main output"]["verdict"] == "skipped"

    def test_outages_are_counted(self, sim: Simulator, examine: Examine) -> None:
        """Sessions retry them, so they are no deviation."""
        sim.inject(Fault.status(503, times=2), path=RESULTS)
        code, _, checks = examine(*RUN)
        assert code == 0
        assert checks["completion"]["found"].endswith("; 2 got 503 Service Unavailable")


class TestCallback:
    """`--callback-url`."""

    def test_it_arrives(self, examine: Examine) -> None:
        """On a port of this machine, it is looked at."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        url = ("--callback-url", f"http://127.0.0.1:{port}/{OUTPUT}", "--callback-port", port)
        code, _, checks = examine(*RUN, *url)
        assert code == 0
        assert checks["start"]["found"].startswith("202 Accepted with an id")
        assert checks["callback"]["found"].startswith("arrived with the id and the node map")

    def test_it_does_not_arrive(self, examine: Examine) -> None:
        """The URL leads somewhere else."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        url = ("--callback-url", f"http://{CLOSED}/", "--callback-port", port)
        assert examine(*RUN, *url).deviations == {"callback": "differs: none"}

    def test_it_cannot_be_seen(self, examine: Examine) -> None:
        """Then the report says so."""
        report = examine(*RUN, "--callback-url", f"http://{CLOSED}/")
        assert report.code == 0
        assert "cannot see whether the callback arrives" in report.checks["callback"]["found"]

    def test_the_port_is_taken(self, sim: Simulator, examine: Examine) -> None:
        """Nothing is paid for."""
        runs = len(sim.runs)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            url = ("--callback-url", "http://127.0.0.1", "--callback-port", port)
            found = examine(*RUN, *url).deviations["start"]
        assert found.startswith(f"failed: cannot listen on port {port}: ")
        assert len(sim.runs) == runs


class TestDatabases:
    """`--db` and `--redis`."""

    def test_away(self, examine: Examine) -> None:
        """Neither password is in the report, nor a user, a database or a host."""
        database = f"postgresql://jane:{PASSWORD}@{CLOSED}/private"
        report = examine("--db", database, "--redis", f"redis://:{PASSWORD}@{CLOSED}")
        assert report.deviations == {
            "database": "failed: could not use it: Connection refused",
            "Redis": "failed: could not use it: Connection refused",
        }
        assert not [text for text in ("jane", "private", "127.0.0.1") if text in report.text]

    def test_a_host_that_is_not_known(self, examine: Examine) -> None:
        """What psycopg quotes is left out."""
        (found,) = examine("--db", "postgresql://jane@private.invalid/x").deviations.values()
        assert found.startswith("failed: could not use it: ")
        assert "private.invalid" not in found

    def test_the_text_shows_where_they_are(self, call: Callable[..., Any]) -> None:
        """Without the password."""
        out = call("doctor", "--db", f"postgresql://jane:{PASSWORD}@{CLOSED}/batches").out
        assert f"(postgresql://jane:***@{CLOSED}/batches)" in out
        assert PASSWORD not in out

    def test_sqlite(self, examine: Examine, batches_file: Path, tmp_path: Path) -> None:
        """The tables are named; a file that is missing is not created."""
        checks = examine("--db", f"sqlite:///{batches_file}").checks
        assert checks["database"]["found"].startswith("SQLite 3.")
        assert checks["database"]["found"].endswith(", with the tables of batches")
        missing = tmp_path / "missing.sqlite"
        report = examine(PROMPTLAYER_EXEC_DB=f"sqlite:///{missing}")
        assert report.code == 0
        assert "no file yet" in report.checks["database"]["found"]
        assert not missing.exists()

    def test_files_that_cannot_be_used(self, examine: Examine, tmp_path: Path) -> None:
        """One is no database, and the other has no directory."""
        other = tmp_path / "other.txt"
        other.write_text("no database" * 100)
        report = examine("--db", f"sqlite:///{other}")
        found = "failed: could not use it: file is not a database"
        assert report.deviations == {"database": found}
        report = examine("--db", f"sqlite:///{tmp_path}/missing/batches.sqlite")
        assert report.deviations["database"].endswith("its directory is not writable")

    def test_unusable_urls(self, examine: Examine) -> None:
        """They are not shown."""
        report = examine("--db", f"mysql://{PASSWORD}", "--redis", f"http://{PASSWORD}")
        assert report.deviations == {
            "database": "failed: database_url must be sqlite or postgresql",
            "Redis": "failed: not a Redis URL",
        }

    def test_a_broken_rule_is_one_sentence(self, examine: Examine) -> None:
        """The advice beside it is doctor's own; the error's is for programs."""
        proxied = {"HTTPS_PROXY": "socks5://h:1", "NO_PROXY": ""}
        report = examine("--base-url", "https://promptlayer.test", "--db", "nonsense", **proxied)
        proxy = "HTTPS_PROXY must be a URL like http://user:password@host:port"
        assert report.deviations["proxy"] == f"failed: {proxy}"
        assert report.deviations["database"] == "failed: database_url is not a URL"
        report = examine(PROMPTLAYER_API_KEY="two words")
        assert report.deviations["API key"].endswith("string of visible ASCII characters")

    def test_redis(self, examine: Examine) -> None:
        """A running server is named with its version; a wrong password is told apart."""
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("there is no Redis server: apt-get install redis-server")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [binary, "--port", str(port), "--save", "", "--requirepass", "right"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if b"eady to accept connections" in line:
                    break
            try:
                good = examine("--redis", f"redis://:right@127.0.0.1:{port}")
                bad = examine("--redis", f"redis://:{PASSWORD}@127.0.0.1:{port}")
            finally:
                process.kill()
        assert good.checks["Redis"]["found"].startswith(("Redis ", "Valkey "))
        found = "failed: could not use it: it refused the user or the password"
        assert bad.deviations == {"Redis": found}


def test_secrets_are_removed_wherever_they_are() -> None:
    """Should a text have one after all, it has no key or password, and in an issue no host."""
    secrets = Secrets((KEY, PASSWORD), ("proxy.example",))
    found = f"{KEY} and {PASSWORD} at http://proxy.example:3128, not at my-proxy.example"
    text = "*** and *** at http://proxy.example:3128, not at my-proxy.example"
    assert secrets.removed(found) == text
    finding = attrs.evolve(failed(found, found), group="Setup", name="versions")
    (check,) = json.loads(issue_report([finding], secrets))["checks"]
    assert check["found"] == check["advice"] == text.replace("//proxy.example", "//HOST")


class TestCommand:
    """How the command is used."""

    def test_a_run_has_to_be_confirmed(self, sim: Simulator, call: Callable[..., Any]) -> None:
        """Without a terminal, --yes is the only way, and nothing at all is asked for before."""
        requests = sim.request_count
        code, out, err = call("doctor", "--workflow", WORKFLOW)
        assert (code, out) == (2, "")
        assert err == "--workflow starts a run that you pay for: confirm that with --yes\n"
        assert sim.request_count == requests

    @pytest.mark.parametrize(("key", "code"), [("n", 1), ("y", 0)])
    def test_a_terminal_is_asked(self, terminal: Callable[..., Any], key: str, code: int) -> None:
        """Only a yes starts the run."""
        opened = terminal("doctor", *RUN[:-1], columns=200)
        opened.read_until("you pay for. Continue? [y/N]:")
        os.write(opened._master, f"{key}\n".encode())
        ended, text = opened.end()
        assert ended == code
        assert ("no run was started" in text) is (key == "n")

    @pytest.mark.parametrize(
        "arguments",
        [
            ("-i", "a=1"),
            ("--callback-url", "http://x"),
            ("--callback-port", 80),
            ("--workflow", ""),
        ],
    )
    def test_usage(self, call: Callable[..., Any], arguments: tuple[object, ...]) -> None:
        """Options of a run need one."""
        assert call("doctor", *arguments).code == 2

    def test_an_interrupt_names_the_run(self, sim: Simulator, start: Callable[..., Any]) -> None:
        """What was paid for can be picked up."""
        name = f"held-{WORKFLOW}"
        sim.add_workflow(name, Scenario([SimNode(NODE, OUTPUT, None)]), inputs={})
        command = start("doctor", "--workflow", name, "--yes")
        started = command.error_line()
        command.process.send_signal(signal.SIGINT)
        code, _, err = command.end()
        assert code == 130
        assert f"promptlayer-exec watch {started.split()[1]}\n" in err

    def test_a_check_that_breaks_stops_no_other(
        self, examine: Examine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its error is named by its type and place, since its text may be secret."""

        def break_down(_: str) -> str:
            raise LookupError(KEY)

        monkeypatch.setattr("importlib.metadata.version", break_down)
        report = examine()
        assert list(report.deviations) == ["versions", "extras"]
        found = report.deviations["versions"]
        assert found.startswith("failed: bug in doctor: LookupError in test_doctor.py")
        assert report.checks["subscription"]["verdict"] == "ok"
