"""The docs' page on FastAPI: its app, its HTML page and its commands are executed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import dukpy
import pytest
from fastapi.testclient import TestClient

from promptlayer_exec import Session
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

PAGE = (Path(__file__).parents[2] / "docs" / "fastapi.md").read_text(encoding="utf-8")
AUTHORIZATION = {"Authorization": "Basic bWU6c2VjcmV0"}  # me:secret


def blocks(language: str) -> list[str]:
    """Return the docs' code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


APP, OWNERS = blocks("python")
(HTML,) = blocks("html")
_, SERVE, START, FOLLOW = blocks("sh")


class Process:
    """The docs' app, served by the docs' command."""

    def __init__(self, folder: Path, sim: Simulator) -> None:
        (folder / "app.py").write_text(APP)
        (folder / "page.html").write_text(HTML)
        command = shlex.split(SERVE.splitlines()[1])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", *command, "--port", "0"],
            cwd=folder,
            env={
                **os.environ,
                "APP_PASSWORD": "secret",
                "PROMPTLAYER_API_KEY": sim.api_key,
                "PROMPTLAYER_BASE_URL": sim.base_url,
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
def spawn(tmp_path: Path, threaded_sim: Simulator) -> Iterator[Callable[[], Process]]:
    """Return a function that starts a process with the docs' app."""
    with ExitStack() as stack:

        def start() -> Process:
            process = Process(tmp_path, threaded_sim)
            stack.enter_context(process.process)
            stack.callback(process.process.kill)
            return process

        yield start


def report(value: Any = None, **options: Any) -> Scenario:
    """Return the scenario of the docs' workflow; its report is held."""
    node = SimNode("Report", value, duration=None, is_output_node=True, **options)
    return Scenario([SimNode("Plan", "three parts"), node])


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
    """Remove what differs between runs: times, and the number of polls."""
    return re.sub(
        r'("(?:elapsed|running|final|poll)":|^id: 1001:)[\d.]+', r"\1", text, flags=re.MULTILINE
    )


def test_the_examples_are_short() -> None:
    """The app has fewer than 40 lines, and the HTML page 25."""
    assert len(APP.splitlines()) < 40
    assert len(HTML.splitlines()) < 25


@pytest.mark.skipif(shutil.which("curl") is None, reason="the docs' commands use curl")
def test_the_commands_print_what_the_docs_say(
    threaded_sim: Simulator, spawn: Callable[[], Process]
) -> None:
    """A run is started and followed with curl, from the docs' own app."""
    sim = threaded_sim
    sim.add_workflow("write-report", report())
    app = spawn()
    created, problem = blocks("json")
    assert app.run(START) == created.strip()
    assert sim.runs[0].inputs == {"topic": "otters"}
    with subprocess.Popen(app.argv(FOLLOW), stdout=subprocess.PIPE, text=True) as curl:
        printed = [curl.stdout.readline() for _ in range(5)]  # type: ignore[union-attr]
        sim.finish(1001, "Report", value="Otters are fine.")
        printed.extend(curl.stdout)  # type: ignore[arg-type]
    assert timeless("".join(printed)) == timeless(blocks("text")[0])
    assert app.run(FOLLOW.replace("1001", "77")) == problem.strip()
    refused = json.loads(app.run(FOLLOW.replace("secret", "wrong")))
    assert (refused["status"], refused["title"]) == (401, "Unauthorized")
    seen = "-H 'Last-Event-ID: 1001:complete' -w '%{http_code}'"
    assert app.run(f"{FOLLOW.strip()} {seen}") == "204"


DOM = """
const shown = {}, listeners = {}, location = {search: "?id=1001"};
const fetch = async (url) => ({json: async () => (shown.fetched = url, dukpy.problem)});
const document = {getElementById: (id) => (shown[id] ??= {})};
class URLSearchParams { get(name) { return "1001"; } }
class EventSource {
  constructor(url) { globalThis.opened = this, shown.url = url; }
  addEventListener(kind, listener) { listeners[kind] = listener; }
  close() { shown.closed = true; }
}
EventSource.CLOSED = 2;
"""
PLAY = """
for (const {event, data} of dukpy.events) {
  if (shown.closed) throw new Error("closed too early");
  listeners[event]({data});
  (shown.states ??= []).push(shown.state.textContent);
}
JSON.stringify(shown)
"""


def script() -> str:
    """Return the page's script."""
    found = re.search(r"<script>\n(.*)</script>", HTML, re.DOTALL)
    assert found is not None
    return found[1]


def play(events: list[dict[str, str]]) -> Any:
    """Run the page's script with some events, and return what it shows."""
    return json.loads(dukpy.evaljs([DOM, script(), PLAY], events=events))


def test_the_page_shows_node_after_node(
    threaded_sim: Simulator, spawn: Callable[[], Process]
) -> None:
    """Its script gets real events of the app."""
    app = spawn()
    execution_id = threaded_sim.add_execution(report(), execution_id=1001)
    with app.events(execution_id) as response:
        events = fields(response, 1)
        threaded_sim.finish(execution_id, "Report", value="</script>")
        events += fields(response)
    shown = play(events)
    assert shown["url"] == "executions/1001/events"
    assert shown["states"] == ["50 %", "100 %", "Succeeded"]
    lines = ['Plan: SUCCESS "three parts"', 'Report: SUCCESS "</script>"', ""]
    assert shown["nodes"]["textContent"].split("\n") == lines
    assert shown["closed"] is True


def test_the_page_shows_what_is_wrong_with_an_id(spawn: Callable[[], Process]) -> None:
    """A refused request closes the source, and the page shows the title of the response."""
    app = spawn()
    with app.events(77) as response:
        assert response.status == 404
        problem = json.load(response)
    for ready_state, state in ((0, None), (2, "There is no such execution or workflow.")):
        interpreter = dukpy.JSInterpreter()
        fail = f"opened.readyState = {ready_state}; opened.onerror(); 0"
        interpreter.evaljs([DOM, script(), fail], problem=problem)
        shown = json.loads(interpreter.evaljs("JSON.stringify(shown)"))
        assert shown.get("state", {}).get("textContent") == state
    assert shown["fetched"] == shown["url"]


def test_the_page_shows_why_a_node_failed(
    threaded_sim: Simulator, spawn: Callable[[], Process]
) -> None:
    """Its line has the error message in place of the value."""
    app = spawn()
    failing = Scenario([SimNode("Plan", status="FAILED", error_message="no key")])
    with app.events(threaded_sim.add_execution(failing)) as response:
        shown = play(fields(response))
    assert shown["state"]["textContent"] == "Failed"
    assert shown["nodes"]["textContent"] == "Plan: FAILED no key\n"


def test_the_page_shows_a_failure() -> None:
    """It shows the message, and the last nodes."""
    node = {"name": "Plan", "status": "RUNNING", "value": None}
    failure = {"message": "This server failed.", "last": {"nodes": {"Plan": node}}}
    shown = play([{"event": "failure", "data": json.dumps(failure)}])
    assert shown["state"]["textContent"] == "This server failed."
    assert shown["nodes"]["textContent"] == "Plan: RUNNING null\n"


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


def test_sigterm_ends_idle_streams_within_two_seconds(
    threaded_sim: Simulator, spawn: Callable[[], Process]
) -> None:
    """They end properly, so the log has no error."""
    app = spawn()
    idle = threaded_sim.add_execution(report())
    with ExitStack() as stack:
        streams = [stack.enter_context(app.events(idle)) for _ in range(3)]
        assert [fields(stream, 1)[0]["event"] for stream in streams] == ["snapshot"] * 3
        signalled = time.monotonic()
        app.process.send_signal(signal.SIGTERM)
        app.process.wait(timeout=10)
        assert time.monotonic() - signalled < 2
        assert [fields(stream) for stream in streams] == [[], [], []]
    log = app.end()
    assert "Application shutdown complete" in log
    assert "ERROR" not in log


@pytest.fixture
def _settings(monkeypatch: pytest.MonkeyPatch, threaded_sim: Simulator) -> None:
    monkeypatch.setenv("APP_PASSWORD", "secret")
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


def test_people_see_their_own_executions(threaded_sim: Simulator) -> None:
    """The docs' second app records the owner of each execution."""
    sim = threaded_sim
    sim.add_workflow("write-report", Scenario([SimNode("Report", "done", is_output_node=True)]))
    foreign = sim.add_execution(Scenario([SimNode("Report")]), execution_id=5)
    namespace: dict[str, Any] = {"__name__": "app"}
    exec(compile(OWNERS, "app.py", "exec"), namespace)
    app = namespace["make_app"](Session(sim.api_key, base_url=sim.base_url))
    with TestClient(app, cookies={"user": "ada"}) as client:
        assert client.get("/latest-report/events").status_code == 404
        execution_id = client.post("/reports?topic=otters").json()["execution_id"]
        assert client.get(f"/executions/{execution_id}/output").json() == "done"
        assert "event: complete" in client.get("/latest-report/events").text
        assert client.get(f"/executions/{foreign}").status_code == 403
        sim.inject(Fault.status(401))
        refused = client.get("/latest-report/events")
        assert (refused.status_code, refused.json()["execution_id"]) == (502, execution_id)
