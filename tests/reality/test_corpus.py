"""Whatever PromptLayer sends when a run is over, the run gets an outcome.

Each line of `runs.jsonl` is one run: the responses to a request for all nodes and for the main
output (a status and a body, or several of these in a row), where they are from, and the outcome:
`["output", value]`, or the type of an error and a part of its text. Instead of the responses, a
line may name a recording beside it (`"har": "report.har"`), of `promptlayer-exec doctor --record`
or a browser. `callbacks.jsonl` has what was posted to a callback URL.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from promptlayer_exec import PollPolicy, PromptLayerExecError, RetryPolicy, Session, StartRequest
from promptlayer_exec.dbos import Batch
from promptlayer_exec.dbos import _following as following
from promptlayer_exec.dbos._following import ReadPatience
from promptlayer_exec.fastapi import create_router
from promptlayer_exec.simulator import Simulator
from promptlayer_exec.webhooks import read_callback

HERE = Path(__file__).parent
URN = "urn:promptlayer-exec:"
SOURCES = ("recorded: ", "fixture: ", "documented: ", "client: ", "changelog: ", "invented")


def read_lines(name: str) -> list[Any]:
    """Return the lines of a file of the corpus."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def numbered(lines: list[Any]) -> dict[int, Any]:
    """Return runs by the ids of their executions. A recorded run keeps its own."""
    runs = {}
    for number, line in enumerate(lines, 1):
        if "har" in line:
            (number,) = Simulator().replay(HERE / line["har"])  # noqa: PLW2901 - its id
        assert number not in runs
        runs[number] = line
    return runs


LINES = read_lines("runs.jsonl")
CALLBACKS = read_lines("callbacks.jsonl")
RUNS = numbered(LINES)
each_run = pytest.mark.parametrize("number", RUNS, ids=[run["name"] for run in LINES])


def entries(number: int, run: Any) -> Iterator[Any]:
    """Yield the start and the results of a run as the entries of a HAR file."""
    started = {"success": True, "message": "Workflow execution created successfully"}
    started["workflow_version_execution_id"] = number
    yield entry("POST", "/workflows/w/run", 201, started)

    results = f"/workflow-version-execution-results?workflow_version_execution_id={number}"
    for field, flag in (("all", "true"), ("bare", "false")):
        responses = run.get(field, [])
        if responses and not isinstance(responses[0], list):
            responses = [responses]
        for status, body in responses:
            yield entry("GET", f"{results}&return_all_outputs={flag}", status, body)


def entry(method: str, target: str, status: int, body: Any) -> Any:
    """Return one entry of a HAR file."""
    response = {"status": status, "headers": [], "content": {"text": json.dumps(body)}}
    return {
        "request": {"method": method, "url": f"https://a.invalid{target}"},
        "response": response,
    }


@pytest.fixture
def sim(tmp_path: Path) -> Iterator[Simulator]:
    """Return a simulator that responds as in the corpus."""
    file = tmp_path / "corpus.har"
    found = [found for number, run in RUNS.items() for found in entries(number, run)]
    file.write_text(json.dumps({"log": {"entries": found}}), encoding="utf-8")

    with Simulator() as simulator:
        simulator.replay(file)
        for run in LINES:
            if "har" in run:
                simulator.replay(HERE / run["har"])
        yield simulator


def open_session(sim: Simulator) -> Session:
    """Return a session of little patience."""
    return Session(
        sim.api_key,
        base_url=sim.base_url,
        poll=PollPolicy.fixed(0.01),
        retry=RetryPolicy(outage=2.0, watch_outage=2.0, not_found_grace=0.0, base=0.01),
        rate=None,
        push=False,
        check_inputs=False,
    )


@pytest.fixture
async def session(sim: Simulator) -> AsyncIterator[Session]:
    """Return a session on the corpus."""
    async with open_session(sim) as opened:
        yield opened


def is_readable(run: Any) -> bool:
    """Return True if the nodes of a complete run can be read."""
    return run["outcome"][0] in {"output", "ExecutionFailed"}


def judge(run: Any, output: Any, error: Any = None, text: str = "") -> None:
    """Check a run's outcome: its output, or an error or the name of one."""
    kind, expected = run["outcome"]
    if kind == "output":
        assert error is None, text
        assert output == expected
        return

    if isinstance(error, Exception):
        error, text = type(error).__name__, str(error)
    assert error == kind, text
    assert expected in text


@each_run
async def test_output(session: Session, number: int) -> None:
    """A session waits for the output in vain for no run that is over."""
    output = error = None
    try:
        output = await session.execution(number).output(timeout=5.0)
    except PromptLayerExecError as caught:
        error = caught
        assert error.execution_id == number
    judge(RUNS[number], output, error)


async def test_as_completed(session: Session) -> None:
    """The odd runs disturb no other."""
    ended = {}
    async for outcome in session.as_completed(RUNS, timeout=5.0):
        ended[outcome.item] = outcome
    assert set(ended) == set(RUNS)
    for number, outcome in ended.items():
        judge(RUNS[number], outcome.output, outcome.error)


async def test_batch(sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each item has an outcome with the id of its run, and none is started twice."""
    quick = ReadPatience(refused_alone=0.3, refused=0.3, first_delay=0.05)
    monkeypatch.setattr(following, "READ_PATIENCE", quick)
    url = f"sqlite:///{tmp_path}/batch.sqlite"
    batch = Batch("b", database_url=url, session=partial(open_session, sim), attempts=1)
    await batch.add([StartRequest("w", key=str(number)) for number in RUNS])
    assert (await batch.work()).finished == len(RUNS)

    async for outcome in batch.outcomes():
        assert outcome.execution_id is not None
        error = outcome.error
        judge(
            RUNS[outcome.execution_id],
            outcome.output,
            error and error.type,
            error.message if error else "",
        )
    assert sum(request.method == "POST" for request in sim.requests) == len(RUNS)


@each_run
async def test_routes(session: Session, number: int) -> None:
    """The router's routes and events show what came, or a problem that names the error."""
    kind, expected = RUNS[number]["outcome"]
    app = FastAPI()
    app.include_router(create_router(lambda: session, authorize=lambda: None))
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://app") as client:
        get = partial(client.get, timeout=5.0)
        events = await get(f"/executions/{number}/events")
        whole = await get(f"/executions/{number}")
        output = await get(f"/executions/{number}/output")

    if not is_readable(RUNS[number]):
        assert {response.json()["type"] for response in (events, whole, output)} == {f"{URN}{kind}"}
        return
    assert re.findall(r"^event: (\w+)$", events.text, re.MULTILINE)[-1] == "complete"
    assert whole.json()["complete"] is True
    if kind == "output":
        assert output.json() == expected
    else:
        assert output.json()["type"] == f"{URN}{kind}"


@pytest.mark.parametrize("callback", CALLBACKS, ids=[line["source"] for line in CALLBACKS])
def test_callbacks(callback: Any) -> None:
    """Only the id counts."""
    body = json.dumps(callback["body"]).encode()
    if callback["id"] is None:
        with pytest.raises(ValueError, match="expected an id"):
            read_callback(body)
    else:
        assert read_callback(body).execution_id == callback["id"]


@pytest.mark.parametrize("line", [*LINES, *CALLBACKS], ids=lambda line: line["source"])
def test_each_line_has_a_source(line: Any) -> None:
    """Nobody has to guess where a body is from."""
    assert line["source"].startswith(SOURCES)


def test_each_recording_has_a_line() -> None:
    """A file alone says nothing about what is expected of it."""
    assert {path.name for path in HERE.glob("*.har")} == {
        run["har"] for run in LINES if "har" in run
    }
