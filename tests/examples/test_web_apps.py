"""The docs' pages on FastAPI, production and once per order: their apps and commands are run."""

from __future__ import annotations

import hmac
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import attrs
import pytest
from fastapi.testclient import TestClient

from promptlayer_exec import Session, Workflow
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator, examples
from promptlayer_exec.starts import SQLStartStore

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "fastapi.md").read_text(encoding="utf-8")
ACCESS = (DOCS / "web-access.md").read_text(encoding="utf-8")
PRODUCTION = (DOCS / "production.md").read_text(encoding="utf-8")
ONCE = (DOCS / "once.md").read_text(encoding="utf-8")
PROBLEM = "application/problem+json"
AUTHORIZATION = {"Authorization": "Basic bWU6c2VjcmV0"}  # me:secret


def blocks(language: str, page: str = PAGE) -> list[str]:
    """Return a page's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


(APP,) = blocks("python")
DESCRIBED, OWNERS, RENEW = blocks("python", ACCESS)
(HTML,) = blocks("html")
SERVE, START, FOLLOW = blocks("sh")


def app_in_production() -> str:
    """Return the app with the changes that the page on production makes."""
    app = APP
    (diff,) = blocks("diff", PRODUCTION)
    for change in diff.split("\n\n"):
        lines = [(line[0], f"{line[1:]}\n") for line in change.splitlines()]
        before = "".join(line for mark, line in lines if mark != "+")
        assert app.count(before) == 1
        app = app.replace(before, "".join(line for mark, line in lines if mark != "-"))
    return app


class Process:
    """The docs' app, served by the docs' command."""

    def __init__(
        self, folder: Path, sim: Simulator, *arguments: str, app: str = APP + RENEW
    ) -> None:
        (folder / "app.py").write_text(app)
        (folder / "page.html").write_text(HTML)
        command = shlex.split(SERVE.splitlines()[1])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", *command, "--port", "0", *arguments],
            cwd=folder,
            env={
                **os.environ,
                "APP_PASSWORD": "secret",
                "APP_SECRET": "of the app",
                "PROMPTLAYER_API_KEY": sim.api_key,
                "PROMPTLAYER_BASE_URL": sim.base_url,
                "REDIS_URL": "redis://127.0.0.1:9",  # where nobody listens
                "WEBHOOK_SECRET": "of the webhook",
            },
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.log = ""
        self._port: int | None = None

    @property
    def port(self) -> int:
        """The port; it waits until the app serves."""
        while self._port is None:
            line = self.process.stderr.readline()  # type: ignore[union-attr]
            assert line, self.log
            self.log += line
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                self._port = int(found[1])
        return self._port

    @contextmanager
    def events(self, execution_id: int, last_event_id: str = "") -> Iterator[HTTPResponse]:
        """Yield a response of events whose headers have been received."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            headers = {**AUTHORIZATION, "Last-Event-ID": last_event_id}
            connection.request("GET", f"/executions/{execution_id}/events", headers=headers)
            yield connection.getresponse()

    def run(self, command: str) -> str:
        """Run a command of the docs against this process, and return its output."""
        return subprocess.run(self.argv(command), capture_output=True, text=True, check=True).stdout

    def argv(self, command: str) -> list[str]:
        """Return a curl command of the docs as arguments to execute."""
        one_line = command.replace("\\\n", "")
        argv = shlex.split(one_line.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}"))
        return [*argv, "--silent", "--show-error", "--max-time", "10"]

    def end(self) -> str:
        """Kill the process, and return its log."""
        self.process.kill()
        self.log += self.process.communicate()[1]
        return self.log


@pytest.fixture
def spawn(tmp_path: Path, threaded_sim: Simulator) -> Iterator[Callable[..., Process]]:
    """Return a function that starts a process with the docs' app."""
    with ExitStack() as stack:

        def start(*arguments: str, **options: str) -> Process:
            process = Process(tmp_path, threaded_sim, *arguments, **options)
            stack.enter_context(process.process)
            stack.callback(process.process.kill)
            return process

        yield start


def report(value: Any = None, **options: Any) -> Scenario:
    """Return the scenario of the docs' workflow; its report is held."""
    node = SimNode("Report", value, duration=None, is_output_node=True, **options)
    return Scenario([SimNode("Plan", "three parts"), node])


def example_report(**durations: float | None) -> Scenario:
    """Return the report on otters of `simulate`; each node takes no time, unless one is given."""
    scenario = examples.WORKFLOWS["write-report"].scenario({"topic": "otters"})
    return Scenario(
        [attrs.evolve(node, duration=durations.get(node.name, 0.0)) for node in scenario.nodes]
    )


def fields(response: HTTPResponse, count: int = -1) -> list[dict[str, str]]:
    """Return the next events of a stream as dicts of their fields."""
    events: list[dict[str, str]] = []
    event: dict[str, str] = {}
    while len(events) != count and (line := response.readline().decode()):
        if line == "\n":
            events.extend([event] if "event" in event else [])
            event = {}
        else:
            name, _, event[name] = line.rstrip("\n").partition(": ")
    return events


def timeless(text: str) -> str:
    """Remove what differs between runs: times, the number of polls, and what is random."""
    varying = r'("(?:elapsed|running|final|poll)":|"ticket":"W3s|^retry: )[\w.-]+'
    return re.sub(varying, r"\1", text, flags=re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the docs' commands use curl")
def test_the_commands_print_what_the_docs_say(
    threaded_sim: Simulator, spawn: Callable[[], Process]
) -> None:
    """A run is started and followed with curl, from the docs' own app."""
    sim = threaded_sim
    otters = example_report(Search=None, Report=None)
    sim.add_workflow("write-report", otters)
    app = spawn()
    (created,) = blocks("json")
    (problem,) = blocks("json", ACCESS)
    answer = app.run(START)
    assert timeless(answer) == timeless(created.strip())
    assert sim.runs[0].inputs == {"topic": "otters"}
    with subprocess.Popen(app.argv(FOLLOW), stdout=subprocess.PIPE, text=True) as curl:
        printed = [curl.stdout.readline() for _ in range(5)]  # type: ignore[union-attr]
        sim.finish(1001, "Search")
        printed += [curl.stdout.readline() for _ in range(8)]  # type: ignore[union-attr]
        sim.finish(1001, "Report")
        printed.extend(curl.stdout)  # type: ignore[arg-type]
    assert timeless("".join(printed)) == timeless(blocks("text")[0])
    assert app.run(FOLLOW.replace("1001", "77")) == problem.strip()
    refused = json.loads(app.run(FOLLOW.replace("secret", "wrong")))
    assert (refused["status"], refused["title"]) == (401, "Unauthorized")
    renewed = app.run("curl -u me:secret -X POST http://127.0.0.1:8000/executions/1001/ticket")
    for ticket in (json.loads(answer)["ticket"], json.loads(renewed)):
        by_ticket = f"curl http://127.0.0.1:8000/executions/1001/output?ticket={ticket}"
        assert json.loads(app.run(by_ticket)) == otters.nodes[-1].value
    last = re.findall(r"^id: (.*)$", blocks("text")[0], re.MULTILINE)[-1]
    seen = f"-H 'Last-Event-ID: {last}' -w '%{{http_code}}'"
    assert app.run(f"{FOLLOW.strip()} {seen}") == "204"


def folded(events: list[dict[str, str]]) -> dict[str, Any]:
    """Return the node values that a client has after some events."""
    nodes: dict[str, Any] = {}
    for event in events:
        data = json.loads(event["data"])
        if event["event"] == "node":
            nodes[data["name"]] = data["value"]
        else:
            nodes = {name: node["value"] for name, node in data["nodes"].items()}
    return nodes


def test_another_process_takes_over_after_one_was_killed(
    threaded_sim: Simulator, spawn: Callable[[], Process]
) -> None:
    """The client then has exactly the final nodes."""
    first, second = spawn(), spawn()
    execution_id = threaded_sim.add_execution(report())
    with first.events(execution_id) as response:
        events = fields(response, 1)
        first.process.kill()
        events += fields(response)
    assert folded(events) == {"Plan": "three parts", "Report": None}
    with second.events(execution_id, last_event_id=events[-1]["id"]) as response:
        events += fields(response, 1)
        threaded_sim.finish(execution_id, "Report", value="done")
        events += fields(response)
    assert [event["event"] for event in events[-3:]] == ["snapshot", "node", "complete"]
    assert folded(events) == {"Plan": "three parts", "Report": "done"}
    with second.events(execution_id, last_event_id=events[-1]["id"]) as response:
        assert response.status == 204


def test_browsers_that_come_too_early_get_the_end_from_every_worker(
    threaded_sim: Simulator, spawn: Callable[..., Process]
) -> None:
    """While PromptLayer does not know the run, the ticket tells each worker that it is new."""
    threaded_sim.add_workflow("write-report", Scenario([SimNode("Report", "done")]))
    app = spawn("--workers", "2")
    with ExitStack() as stack:
        stack.callback(app.process.wait, 10)
        stack.callback(app.process.terminate)  # a killed one would leave its workers
        threaded_sim.inject(
            Fault.status(404, times=None), path="/workflow-version-execution-results"
        )
        port = app.port
        while app.log.count("Application startup complete") < 2:
            app.log += app.process.stderr.readline()  # type: ignore[union-attr]
        ticket = json.loads(app.run(START))["ticket"]
        browsers = [HTTPConnection("127.0.0.1", port, timeout=10) for _ in range(20)]
        for browser in browsers:
            stack.enter_context(closing(browser))
            browser.request("GET", f"/executions/1001/events?ticket={ticket}")
        responses = [browser.getresponse() for browser in browsers]
        assert [response.readline() for response in responses] == [b"event: waiting\n"] * 20
        threaded_sim.clear_faults()
        ends = [fields(response)[-1] for response in responses]
    assert {end["event"] for end in ends} == {"complete"}


def test_sigterm_ends_idle_streams_soon(
    threaded_sim: Simulator, spawn: Callable[[], Process]
) -> None:
    """They end properly, with or without a snapshot, so the log has no error."""
    app = spawn()
    idle = threaded_sim.add_execution(report())
    threaded_sim.inject(Fault.stall(execution_id=77))
    with ExitStack() as stack:
        streams = [stack.enter_context(app.events(each)) for each in (77, idle, idle)]
        kinds = [fields(stream, 1)[0]["event"] for stream in streams]
        assert kinds == ["waiting", "snapshot", "snapshot"]
        signalled = time.monotonic()
        app.process.send_signal(signal.SIGTERM)
        app.process.wait(timeout=10)
        assert time.monotonic() - signalled < 6
        assert [fields(stream) for stream in streams] == [[], [], []]
    log = app.end()
    assert "Application shutdown complete" in log
    assert "ERROR" not in log


@pytest.fixture
def _settings(monkeypatch: pytest.MonkeyPatch, threaded_sim: Simulator) -> None:
    monkeypatch.setenv("APP_PASSWORD", "secret")
    monkeypatch.setenv("APP_SECRET", "of the app")
    monkeypatch.setenv("PROMPTLAYER_API_KEY", threaded_sim.api_key)
    monkeypatch.setenv("PROMPTLAYER_BASE_URL", threaded_sim.base_url)


@pytest.mark.usefixtures("_settings")
def test_the_docs_app_starts_twice_in_one_process(threaded_sim: Simulator, tmp_path: Path) -> None:
    """Each lifespan opens its one session, and the app serves its page."""
    (tmp_path / "page.html").write_text(HTML)
    namespace: dict[str, Any] = {"__name__": "app", "__file__": str(tmp_path / "app.py")}
    exec(compile(APP, "app.py", "exec"), namespace)
    execution_id = threaded_sim.add_execution(Scenario([SimNode("Plan")]))
    for _ in range(2):
        with TestClient(namespace["app"], headers=AUTHORIZATION) as client:
            assert client.get(f"/executions/{execution_id}").json()["complete"] is True
            assert client.get("/").text == HTML
            assert client.get("/", headers={"Authorization": ""}).status_code == 401


@pytest.mark.usefixtures("_settings")
def test_people_see_their_own_executions(threaded_sim: Simulator) -> None:
    """The docs' second app records the owner of each execution."""
    sim = threaded_sim
    sim.add_workflow("write-report", Scenario([SimNode("Report", "done", is_output_node=True)]))
    foreign = sim.add_execution(Scenario([SimNode("Report")]), execution_id=5)
    namespace: dict[str, Any] = {"__name__": "app"}
    exec(compile(APP.partition("async def authorize")[0] + OWNERS, "app.py", "exec"), namespace)
    with TestClient(namespace["app"], cookies={"user": "ada"}) as client:
        execution_id = client.post("/reports?topic=otters").json()["execution_id"]
        assert client.get(f"/executions/{execution_id}/output").json() == "done"
        assert "event: complete" in client.get(f"/executions/{execution_id}/events").text
        assert client.get(f"/executions/{foreign}").status_code == 403
        anonymous = {"Cookie": "user="}
        assert client.get(f"/executions/{execution_id}", headers=anonymous).status_code == 401
        sim.inject(Fault.status(401))
        refused = client.post("/reports?topic=newts")
        assert (refused.status_code, refused.headers["content-type"]) == (502, PROBLEM)


def test_clients_send_what_the_described_workflow_takes(
    threaded_sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The problem is the one that the page shows, and the app's own route reads the output."""
    sim = threaded_sim
    for name, value in (
        ("APP_SECRET", "of the app"),
        ("APP_PASSWORD", "secret"),
        ("PROMPTLAYER_API_KEY", sim.api_key),
        ("PROMPTLAYER_BASE_URL", sim.base_url),
    ):
        monkeypatch.setenv(name, value)
    sim.add_workflow("write-report", Scenario([SimNode("Report", "a\nb", is_output_node=True)]))
    before, _, after = APP.partition("app.include_router(")
    app = before + DESCRIBED + after.partition("\n)\n")[2]
    namespace: dict[str, Any] = {"__name__": "app"}
    exec(compile(app, "app.py", "exec"), namespace)
    with TestClient(namespace["app"], headers=AUTHORIZATION) as client:
        body: dict[str, Any] = {"workflow": "write-report", "inputs": {"topic": "otters"}}
        execution_id = client.post("/executions", json=body).json()["execution_id"]
        assert client.get(f"/reports/{execution_id}").json() == "a"
        body["inputs"]["length"] = "3"
        refused = client.post("/executions", json=body)
    assert refused.status_code == 422
    assert refused.json()["detail"].rstrip(".") in " ".join(ACCESS.split())
    (run,) = sim.runs
    assert run.inputs == {"topic": "otters", "length": 3}
    assert run.body["workflow_label_name"] == "prod"


def test_the_files_in_production_fit_together() -> None:
    """The app reads the settings that the page names, and is served as on the page on FastAPI."""
    (settings,) = blocks("ini", PRODUCTION)
    names = set(re.findall(r"^(\w+)=", settings, re.MULTILINE))
    read = set(re.findall(r'os\.environ\["(\w+)"\]', app_in_production()))
    assert names == {"PROMPTLAYER_API_KEY", *read}
    command = re.search(r"command: (uvicorn .*)", blocks("yaml", PRODUCTION)[0])
    assert command is not None
    assert set(shlex.split(SERVE.splitlines()[1])) <= set(shlex.split(command[1]))


@pytest.mark.skipif(shutil.which("curl") is None, reason="the docs' commands use curl")
def test_the_app_in_production_starts_follows_and_receives_webhooks(
    threaded_sim: Simulator, spawn: Callable[..., Process]
) -> None:
    """Even while Redis is away."""
    threaded_sim.add_workflow("write-report", Scenario([SimNode("Report", "done")]))
    app = spawn(app=app_in_production())
    assert app.port
    ticket = json.loads(app.run(START))["ticket"]
    events = f"curl http://127.0.0.1:8000/executions/1001/events?ticket={ticket}"
    assert "event: complete" in app.run(events)
    body = '{"details": {"agent_execution_id": 1001}, "event_type": "agent_run_finished"}'
    signature = hmac.new(b"of the webhook", body.encode(), "sha256").hexdigest()
    post = f"curl http://127.0.0.1:8000/webhook -w %{{http_code}} -d '{body}'"
    assert app.run(f"{post} -H 'X-PromptLayer-Signature: {signature}'") == "204"
    assert "Redis unavailable" in app.end()


ORDERS, SETTLE, SWEEP_UP, START_OVER, RESTARTING = blocks("python", ONCE)


class Orders:
    """The app of the page on once per order, served by its command with two workers."""

    def __init__(self, folder: Path, sim: Simulator, database: str) -> None:
        (folder / "app.py").write_text(ORDERS)
        with socket.socket() as bound:  # PromptLayer calls this port back
            bound.bind(("127.0.0.1", 0))
            self.port: int = bound.getsockname()[1]
        self._folder = folder
        self._environment = {
            **os.environ,
            "APP_SECRET": "of the app",
            "APP_URL": f"http://127.0.0.1:{self.port}",
            "DATABASE_URL": database,
            "PROMPTLAYER_API_KEY": sim.api_key,
            "PROMPTLAYER_BASE_URL": sim.base_url,
        }
        self.start()

    def start(self) -> None:
        """Start the app, and wait until it listens."""
        (script,) = blocks("sh", ONCE)
        command = shlex.split(script.splitlines()[-1])
        with (self._folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", *command, "--port", str(self.port)],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while not self.is_listening():
            if self.process.poll() is not None:
                raise RuntimeError((self._folder / "log").read_text())

    def kill(self) -> None:
        """Kill the app and its workers, and wait until nobody listens any more."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while self.is_listening():  # the workers may die a little later than their parent
            pass

    def is_listening(self) -> bool:
        """Return True if somebody accepts connections."""
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        return False

    def post(self, order: int, topic: str = "otters") -> tuple[int, Any]:
        """Order a report, and return the status and the body of the response."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("POST", f"/orders/{order}/report?topic={topic}")
            response = connection.getresponse()
            return response.status, json.loads(response.read())


def running_postgres() -> Any:
    """Return a context manager that runs a PostgreSQL server; it is one of the tests with kills."""
    spec = spec_from_file_location("kill_conftest", DOCS.parent / "tests/kill/conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.running_postgres()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'orders.sqlite'}"
    else:
        with running_postgres() as server:
            yield server.url.replace("/batches", "/postgres")


@pytest.fixture
async def store(database: str) -> AsyncIterator[SQLStartStore]:
    """Return the record of starts in that database."""
    async with SQLStartStore(database) as store:
        yield store


@pytest.fixture
def orders(database: str, threaded_sim: Simulator, tmp_path: Path) -> Iterator[Orders]:
    """Return the app, which runs."""
    served = Orders(tmp_path, threaded_sim, database)
    yield served
    served.kill()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Return threads that send requests at the same time."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


async def started(store: SQLStartStore, key: str) -> None:
    """Wait until the id of a key's run is recorded."""
    while (stored := await store.find(key)) is None or stored.state != "started":
        pass


async def test_an_order_is_one_run_for_two_workers_even_if_they_are_killed(
    threaded_sim: Simulator, orders: Orders, pool: ThreadPoolExecutor, store: SQLStartStore
) -> None:
    """Eight requests at once, a kill during the run, eight more, and another; then start over."""
    sim = threaded_sim
    sim.add_workflow("write-report", report())
    first = [pool.submit(orders.post, 42) for _ in range(8)]
    await started(store, "report/42")
    orders.kill()
    assert all(isinstance(request.exception(), OSError) for request in first)

    orders.start()
    repeated = [pool.submit(orders.post, 42) for _ in range(8)]
    sim.finish(1001, "Report", value="done")
    assert {request.result() for request in repeated} == {(200, "done")}
    assert orders.post(42) == (200, "done")
    _, problem = orders.post(42, "newts")
    assert problem["type"] == "urn:promptlayer-exec:KeyConflict"
    assert len(sim.runs) == 1

    page: dict[str, Any] = {}
    exec(compile(START_OVER, "page.py", "exec"), page)
    assert not await page["start_over"](store, "43")
    assert await page["start_over"](store, "42")
    again = pool.submit(orders.post, 42)
    await started(store, "report/42")
    sim.finish(1002, "Report", value="anew")
    assert again.result() == (200, "anew")
    assert await page["clean_up"](orders._environment["DATABASE_URL"]) == 0


async def test_a_callback_to_any_worker_settles_a_lost_start(
    threaded_sim: Simulator, orders: Orders
) -> None:
    """Until it comes, each request says that the run may have started, and starts nothing."""
    sim = threaded_sim
    sim.add_workflow("write-report", report())
    sim.inject(Fault.disconnect(), path="/run")
    for _ in range(4):
        status, problem = orders.post(7)
        assert (status, problem["type"]) == (502, "urn:promptlayer-exec:StartUnknown")

    sim.finish(1001, "Report", value="done")
    while (answer := orders.post(7))[0] == 502:
        pass
    assert answer == (200, "done")
    assert len(sim.runs) == 1


async def test_rows_without_an_id_and_unknown_keys_are_settled(
    threaded_sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs of the page find the one run of each order."""
    sim = threaded_sim
    sim.add_workflow("write-report", report())
    page: dict[str, Any] = {}
    exec(compile(SWEEP_UP, "page.py", "exec"), page)
    exec(compile(SETTLE, "page.py", "exec"), page)
    unknown = SQLStartStore.unknown
    monkeypatch.setattr(SQLStartStore, "unknown", lambda self, older_than: unknown(self))

    async def find(key: str) -> int | None:
        return 1001 if key == "report/1" else None

    async with SQLStartStore(f"sqlite:///{tmp_path / 'orders.sqlite'}") as store:
        here = {"api_key": sim.api_key, "base_url": sim.base_url}
        async with Session(starts=store, push=False, **here) as session:
            ordered = Workflow("write-report"), [("1", "otters"), ("2", "newts")]
            sim.inject(Fault.disconnect(), path="/run")
            assert await page["sweep_up"](session, *ordered) == {"2": 1002}
            assert await page["sweep_up"](session, *ordered) == {"2": 1002}
            never_ran = Workflow("write-report"), [("3", "eels")]
            sim.inject(Fault.status(503), path="/run")
            assert await page["sweep_up"](session, *never_ran) == {}
            await page["settle"](store, find)
            assert await page["sweep_up"](session, *ordered) == {"1": 1001, "2": 1002}
            assert await page["sweep_up"](session, *never_ran) == {"3": 1003}
    assert len(sim.runs) == 3


def test_the_store_that_restarts_unknown_starts_can_be_made() -> None:
    """Its arguments are those of the page."""
    exec(compile(RESTARTING, "page.py", "exec"), {})
