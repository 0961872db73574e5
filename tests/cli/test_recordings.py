"""`doctor --record` writes what the server sent without what is private, to replay it."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from promptlayer_exec import PollPolicy, Session, Snapshot
from promptlayer_exec._doctor import run_checks
from promptlayer_exec._doctor.anonymizer import Anonymizer
from promptlayer_exec._doctor.observed_run import ObservationPolicy
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

Call = Callable[..., Any]

KEY = "key-of-a-recording-3141592653"
WORKFLOW = "workflow/name 2718281828"
INPUT, INPUT_VALUE = "onlyotters", "input-value-1732050807"
FIRST, SECOND, OUTPUT_NODE = "firstwhisker", "message", "output-node-0339"
OUTPUT = "otters eat sixty crabs before breakfast"
PRIVATE = (
    *(KEY, "2718281828", INPUT, INPUT_VALUE, FIRST, OUTPUT_NODE, OUTPUT, "sixty", "crabs"),
    *("furrylabel", "source-1442", "external-6931", "field-4669", "inner-2502", "trace-7642"),
    *("diagnostic-9159", "looks-like-a-node-8346", "page-3358", "header-1234", "reason-5678"),
    *("127.0.0.1", "87654321", "12345.75", "whispering", "lookingfor"),
)
RUN = ("--workflow", WORKFLOW, "-i", f"{INPUT}={INPUT_VALUE}", "--yes")
RESULTS = "/workflow-version-execution-results"
NODES = [
    SimNode(FIRST, {"field-4669": ["inner-2502", 87654321, 12345.75, True, None]}, 0.1),
    SimNode(SECOND, {"looks-like-a-node-8346": {"status": "SUCCESS", "value": OUTPUT}}, 0.1),
    SimNode(
        "bad",
        status="FAILED",
        error_message={"raw": "diagnostic-9159"},
        raw_error_message=[{"traceback": "trace-7642"}],
    ),
    SimNode(OUTPUT_NODE, OUTPUT, 0.2, [FIRST], is_output_node=True),
]


@pytest.fixture
def sim() -> Iterator[Simulator]:
    """Serve a workflow that is full of private texts."""
    with Simulator(api_key=KEY) as simulator:
        simulator.add_workflow(
            WORKFLOW,
            Scenario(NODES),
            inputs={INPUT: "string", "more": "furrylabel"},
            labels=["furrylabel"],
            external_ids={"source-1442": "external-6931"},
            warning="Unused input variables: lookingfor",
        )
        yield simulator


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ObservationPolicy(gap=0.02, silence=0.3, callback=0.3)
    monkeypatch.setattr(run_checks, "_POLICY", policy)


@pytest.fixture
def har(tmp_path: Path) -> Path:
    """Return the path of the recording."""
    return tmp_path / "recording.har"


def record(call: Call, har: Path, *arguments: str) -> tuple[str, list[Any]]:
    """Run `doctor --record`, and return the file's text and entries."""
    _, _, err = call("doctor", *RUN, "-i", "more=1", *arguments, "--record", har)
    assert str(har) in err
    text = har.read_text(encoding="ascii")
    return text, json.loads(text)["log"]["entries"]


def bodies(entries: list[Any], path: str) -> list[str]:
    """Return the recorded bodies of the responses to a path."""
    return [it["response"]["content"]["text"] for it in entries if path in it["request"]["url"]]


def test_nothing_private_is_in_a_recording(sim: Simulator, call: Call, har: Path) -> None:
    """Not in names, inputs, outputs, diagnostics, messages, pages, headers or URLs."""
    prose = [
        f"Workflow {WORKFLOW} is busy",
        f"Cannot use {INPUT}",
        f"Input was {INPUT_VALUE}!",
        f"Node {OUTPUT_NODE} said nothing",
        "It replied that OTTERS EAT SIXTY cakes",
        "Refused: 'reason-5678'",
    ]
    for message in prose:
        body = json.dumps({"success": False, "message": message, "output": {"x": "inner-2502"}})
        sim.inject(Fault.status(503, body=body.encode()), path=RESULTS)
    sim.inject(Fault.status(502, body=b"<html>page-3358</html>"), path=RESULTS)
    secret = {"X-Request": "header-1234", "Location": "https://header-1234.example/"}
    sim.inject(Fault.status(500, body=b'"page-3358"', headers=secret), path=RESULTS)

    text, entries = record(call, har)
    assert [private for private in PRIVATE if private.casefold() in text.casefold()] == []
    assert len(bodies(entries, RESULTS)) > len(prose) + 2
    assert '"X-Request"' in text


def test_a_main_output_that_looks_like_nodes_is_private(
    sim: Simulator, call: Call, har: Path
) -> None:
    """Only the names of the run's nodes make a body a node map."""
    looks = {"looks-like-a-node-8346": {"status": "whispering", "value": OUTPUT}}
    sim.add_workflow("odd", Scenario([SimNode(FIRST, looks, is_output_node=True)]))
    text, entries = record(call, har, "--workflow", "odd")
    assert [private for private in PRIVATE if private in text] == []
    (node,) = json.loads(bodies(entries, "return_all_outputs=false")[-1]).values()
    assert list(node.values()) == ["<text 10>", f"<text {len(OUTPUT)}>"]


def test_what_the_evidence_is_stays(sim: Simulator, call: Call, har: Path) -> None:
    """Statuses, documented fields, words, ids, flags and the server's own messages."""
    unmarked = Scenario([SimNode(FIRST, OUTPUT), SimNode("b", status="FAILED")])
    sim.add_workflow("odd", Scenario(unmarked.nodes, no_output_status=400))
    text, entries = record(call, har, "--workflow", "odd")
    last = json.loads(bodies(entries, RESULTS)[-1])
    assert last["message"] == "No output node found for this workflow"
    assert [node["status"] for node in last["output"].values()] == ["SUCCESS", "FAILED"]
    assert json.loads(bodies(entries, "/run")[0]) == {
        "success": True,
        "message": "Workflow execution created successfully",
        "warning": None,
        "workflow_version_execution_id": sim.runs[0].execution_id,
    }
    assert '"application/json"' in text
    assert "PROMPT_TEMPLATE" in text


def test_a_recording_is_a_har_file(sim: Simulator, call: Call, har: Path) -> None:
    """It has all fields that HAR 1.2 requires."""
    text, entries = record(call, har)
    log = json.loads(text)["log"]
    assert (log["version"], set(log["creator"])) == ("1.2", {"name", "version"})
    message = {"httpVersion", "cookies", "headers", "headersSize", "bodySize"}
    for entry in entries:
        assert set(entry) == {
            *("startedDateTime", "time", "request", "response", "cache", "timings"),
        }
        assert set(entry["request"]) == {"method", "url", "queryString", *message}
        assert set(entry["response"]) == {
            *("status", "statusText", "content", "redirectURL"),
            *message,
        }
        assert set(entry["response"]["content"]) == {"size", "mimeType", "text"}
        assert set(entry["timings"]) == {"send", "wait", "receive"}


def test_a_replayed_run_has_the_same_snapshots(sim: Simulator, call: Call, har: Path) -> None:
    """The statuses of all polls, and outputs of the same kind and length."""
    _, entries = record(call, har)
    (run,) = sim.runs

    async def watch(simulator: Simulator) -> list[Snapshot]:
        async with Session(
            simulator.api_key,
            base_url=simulator.base_url,
            poll=PollPolicy.fixed(0.001),
            check_inputs=False,
        ) as session:
            execution = session.execution(run.execution_id)
            if simulator is not sim:
                assert execution == await session.start("any name")
            snapshots = [snapshot async for snapshot in execution.stream()]
            shown = OUTPUT if simulator is sim else f"<text {len(OUTPUT)}>"
            assert await execution.output() == shown
            return snapshots

    original = asyncio.run(watch(sim))[-1]
    with Simulator() as replayed:
        assert replayed.replay(har) == [run.execution_id]
        snapshots = asyncio.run(watch(replayed))

    assert snapshots[-1].complete
    pairs = zip(snapshots[-1].nodes.values(), original.nodes.values(), strict=True)
    for node, before in pairs:
        assert (node.status, node.is_output_node) == (before.status, before.is_output_node)
        assert (node.error_message is None) == (before.error_message is None)
        assert type(node.value) is type(before.value)

    polls = [json.loads(body) for body in bodies(entries, "return_all_outputs=true")]
    recorded = [[node["status"] for node in nodes.values()] for nodes in polls]
    seen = [[str(node.status) for node in snapshot.nodes.values()] for snapshot in snapshots]
    assert seen == recorded
    assert len(seen) > 2


def test_a_refused_input_is_private(sim: Simulator, call: Call, har: Path) -> None:
    """FastAPI's location of an error leads to it."""
    detail = {"loc": ["body", "input_variables", INPUT], "msg": f"{INPUT}?", "type": "missing"}
    body = json.dumps({"detail": [detail]}).encode()
    sim.inject(Fault.status(422, body=body), path="/run")
    text, entries = record(call, har)
    assert INPUT not in text
    (shown,) = json.loads(bodies(entries, "/run")[0])["detail"]
    assert shown["loc"][:2] == ["body", "input_variables"]
    assert (shown["msg"], shown["type"]) == ("<text 11>", "missing")


def test_a_refused_run_is_recorded(sim: Simulator, call: Call, har: Path) -> None:
    """What came is the evidence."""
    sim.inject(Fault.status(422, times=None, body=b'{"detail":[{"loc":["body"],"msg":"No"}]}'))
    _, entries = record(call, har)
    assert {entry["response"]["status"] for entry in entries} == {422}
    assert json.loads(bodies(entries, "/workflows")[0])["detail"] == [
        {"loc": ["body"], "msg": "No"}
    ]


def test_requests_without_a_response_are_recorded(sim: Simulator, call: Call, har: Path) -> None:
    """With the status 0, as browsers do."""
    sim.inject(Fault.disconnect(2), path=RESULTS)
    sim.inject(Fault.truncate(1), path=RESULTS)
    _, entries = record(call, har)
    statuses = [it["response"]["status"] for it in entries if RESULTS in it["request"]["url"]]
    assert 0 in statuses
    assert statuses[-1] == 200


def test_an_interrupted_run_is_recorded(
    sim: Simulator, start: Callable[..., Any], har: Path
) -> None:
    """All that came until then."""
    sim.add_workflow("held", Scenario([SimNode(FIRST, OUTPUT, None)]), inputs={})
    command = start("doctor", "--workflow", "held", "--yes", "--record", har)
    command.error_line()
    command.process.send_signal(signal.SIGINT)
    code, _, err = command.end()
    assert code == 130
    assert "recorded" in err
    assert bodies(json.loads(har.read_text())["log"]["entries"], "/run")
    assert FIRST not in har.read_text()


def test_an_unwritable_file_is_refused_before_anything_is_paid_for(
    sim: Simulator, call: Call, tmp_path: Path
) -> None:
    """Not at the end."""
    for path in (tmp_path, tmp_path / "missing" / "x.har"):
        code, _, err = call("doctor", *RUN, "--record", path)
        assert code == 2
        assert "cannot write" in err
    assert sim.requests == []


def test_a_file_that_cannot_be_written_later_spoils_no_report(
    sim: Simulator, call: Call, har: Path
) -> None:
    """One line names the reason."""

    async def take_away(_request: Any, answer: Callable[[], web.Response]) -> web.Response:
        await asyncio.to_thread(har.mkdir)
        return answer()

    sim.inject(Fault(take_away))
    code, out, err = call("doctor", "--record", har)
    assert (code, f"could not write {har}: Is a directory" in err) == (0, True)
    assert "0 failed" in out


def test_simulate_replays_a_recording(
    sim: Simulator, call: Call, start: Callable[..., Any], har: Path
) -> None:
    """It names the recorded executions, which other commands can watch."""
    record(call, har)
    server = start("simulate", "--port", "0", "--replay", har)
    url = server.line_with("PROMPTLAYER_BASE_URL=").split("=")[1].strip()
    key = server.line().split("=")[1].strip()
    assert server.line_with("as recorded").split()[2] == str(sim.runs[0].execution_id)
    environment = {"PROMPTLAYER_BASE_URL": url, "PROMPTLAYER_API_KEY": key}
    code, out, _ = call("watch", sim.runs[0].execution_id, "--json", **environment)
    assert code == 0
    assert f"<text {len(OUTPUT)}>" in out
    server.process.send_signal(signal.SIGINT)
    server.end()


@pytest.mark.parametrize("content", [None, "no HAR"])
def test_simulate_refuses_another_file(call: Call, har: Path, content: str | None) -> None:
    """In one line."""
    if content is not None:
        har.write_text(content)
    code, out, err = call("simulate", "--port", "0", "--replay", har)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert har.name in err


# No word of a server contains this character.
SECRETS = st.text("§ab", min_size=1, max_size=6).map(lambda text: f"§{text}")
FIELDS = st.sampled_from(
    ["status", "value", "message", "output", "detail", "nodes", "name", "raw", "error_message"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(7_000, 8_000) | SECRETS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(SECRETS | FIELDS, inner, max_size=4)
    ),
    max_leaves=12,
)
PATHS = st.sampled_from(
    [RESULTS, "/workflows", "/workflows/name-1", "/workflows/name-1/run", "/", "/ws-token"]
)


@given(JSON, PATHS, st.sampled_from(["true", "false"]), st.sampled_from([200, 202, 400, 500]))
def test_no_text_of_a_user_stays_in_any_body(body: Any, path: str, flag: str, status: int) -> None:
    """Whatever its shape is: only messages may stay, where the server documents them."""
    anonymizer = Anonymizer([])
    sent = json.dumps(body, ensure_ascii=False).encode()
    shown = anonymizer.body(sent, path, {"return_all_outputs": flag}, status)
    for value in texts(json.loads(shown)):
        assert "§" not in value or is_message(body, value)


@pytest.mark.parametrize(
    "body",
    [
        {"nodes": [{"name": "a", "message": "§"}]},
        {"workflow": {"error": "§", "detail": ["§"]}},
        [{"message": "§"}],
        {"success": True, "output": {"message": "§", "status": "whispering"}},
        {"success": False, "detail": {"message": "§"}},
        {"a": {"status": "SUCCESS", "message": "§", "detail": "§"}},
    ],
)
@pytest.mark.parametrize("path", [RESULTS, "/workflows/name-1"])
def test_only_the_messages_of_a_body_itself_are_the_server_s(path: str, body: Any) -> None:
    """A deeper one may be the user's."""
    for status in (200, 400):
        shown = Anonymizer([]).body(
            json.dumps(body).encode(), path, {"return_all_outputs": "true"}, status
        )
        assert "§" not in json.dumps(json.loads(shown), ensure_ascii=False)
        assert "whispering" not in shown


def texts(value: Any) -> Iterator[str]:
    """Yield all texts and keys in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


def is_message(body: Any, text: str) -> bool:
    """Return True if a text is a message of the server in an error."""
    if not isinstance(body, dict):
        return False
    return text in texts([body.get("message"), body.get("detail")])


def test_the_environment_is_not_in_the_file(sim: Simulator, call: Call, har: Path) -> None:
    """It names neither this machine nor its user."""
    text, _ = record(call, har)
    assert str(Path.home()) not in text
    assert str(har.parent) not in text
