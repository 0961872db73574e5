"""The viewer's server over real sockets; the tests of its page are in tests/browser."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import aiohttp
import attrs
import pytest
import typer
import uvicorn
from aiohttp import web

import promptlayer_exec.viewer
from promptlayer_exec import Node, NodeStatus, Session, Snapshot
from promptlayer_exec._install import install_hint
from promptlayer_exec._values.statuses import STATUS_TABLE, UNKNOWN_STATUS, status_entry
from promptlayer_exec.cli._server_commands import TOKEN, _print_url, view
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.viewer import Address, Board, History, listen, serve
from promptlayer_exec.viewer._board import Card
from promptlayer_exec.viewer._live_stream import _HEARTBEAT, board_events, value_text

PAGE = Path(promptlayer_exec.viewer.__file__).parent / "page"
BEARER = "Bearer secret"
ROUTES = ["/", "/viewer.css", "/viewer.js", "/statuses.js", "/api/events", "/nowhere"]


async def until(events: AsyncIterator[tuple[str, Any]], wanted: str, **members: Any) -> Any:
    """Return the data of the next event of a kind that has these members."""
    async with asyncio.timeout(20):
        async for kind, data in events:
            if kind == wanted and members.items() <= data.items():
                return data
    raise AssertionError(f"the events ended without {wanted}")


async def test_a_foreign_host_is_refused(viewer: Any) -> None:
    """DNS rebinding, which gives another name this machine's address, fails even with the token."""
    right = str(viewer.port)
    foreign = ["a.b", f"a.b:{right}", "127.0.0.1", "127.0.0.1:1", f"127.0.0.1.a.b:{right}", ""]
    for path in ROUTES:
        for host in foreign:
            assert (await viewer.request(f"GET {path}", Host=host))[0] == 403
    # Without a Host it is not HTTP/1.1, and the server itself refuses it.
    assert (await viewer.request("GET /", Host=None))[0] == 400


async def test_only_its_own_origin_is_allowed(viewer: Any) -> None:
    """This holds for every route; its own origin is that of the Host in the request."""
    for origin in ("http://a.b", "null", f"https://127.0.0.1:{viewer.port}", "http://127.0.0.1:1"):
        for head in ("GET /", "GET /api/events", "POST /api/runs", "OPTIONS /api/runs"):
            assert (await viewer.request(head, Origin=origin))[0] == 403
    for name in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
        host = f"{name}:{viewer.port}"
        own = {"Host": host, "Origin": f"http://{host}", "Sec_Fetch_Site": "same-origin"}
        assert (await viewer.request("GET /api/events", **own))[0] == 200


async def test_one_response_has_the_styles_of_every_file(viewer: Any) -> None:
    """A file that is missing from the list would leave its view without styles."""
    status, styles = await viewer.request("GET /styles.css")
    assert status == 200
    for path in PAGE.glob("*.css"):
        assert path.read_text() in styles, path.name


async def test_another_site_may_only_link_to_the_page(viewer: Any) -> None:
    """It may not embed the page in a frame, load its script, or send other requests."""
    link = {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    frame = {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"}
    for site in ("cross-site", "same-site"):  # another port is the same site
        assert (await viewer.request("GET /", Sec_Fetch_Site=site, **link))[0] == 200
        assert (await viewer.request("GET /", Sec_Fetch_Site=site, **frame))[0] == 403
        assert (await viewer.request("GET /viewer.js", Sec_Fetch_Site=site, **link))[0] == 403
        assert (await viewer.request("GET /api/events", Sec_Fetch_Site=site))[0] == 403


async def test_every_api_request_needs_the_token(viewer: Any) -> None:
    """Without it even a path that does not exist is a 401."""
    for credentials in (None, "", "Bearer", "Bearer wrong", "Bearer secre\u00e9", "secret"):
        for head in ("GET /api/events", "POST /api/runs", "DELETE /api/executions/1", "GET /api/"):
            status, answer = await viewer.request(head, Authorization=credentials)
            assert status == 401
            assert "open the URL that promptlayer-exec view printed" in answer


async def test_every_response_has_the_security_headers(viewer: Any) -> None:
    """At every status, they forbid inline scripts, frames, caches and other origins."""
    given: list[dict[str, str | None]] = [{}, {"Host": "evil.example"}, {"Authorization": None}]
    for path in ROUTES:
        for headers in given:
            _, answer = await viewer.request(f"GET {path}", **headers)
            head = answer.partition("\r\n\r\n")[0].lower()
            assert "\r\ncontent-security-policy: default-src 'none'; script-src 'self'; " in head
            assert "frame-ancestors 'none'" in head
            assert "unsafe" not in head
            assert "\r\nx-content-type-options: nosniff" in head
            assert "\r\nreferrer-policy: no-referrer" in head
            assert "\r\ncache-control: no-store" in head
            assert "access-control" not in head


def test_the_page_has_no_inline_code_and_no_external_resources() -> None:
    """Its scripts write values as text only, and no file of it names another host."""
    files = {path.name: path.read_text() for path in PAGE.iterdir() if path.is_file()}
    page = files["index.html"]
    assert re.findall(r"<script[^>]*>", page) == ['<script type="module" src="viewer.js">']
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    namespace, vendor = "http://www.w3.org/2000/svg", "https://api.promptlayer.com"
    for name, text in files.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        rest = text.replace(namespace, "").replace(vendor, "")  # the latter is only ever shown
        assert not re.search(r"https?:|\burl\(|@import|//\w+\.", rest), name


def test_vendored_code_is_as_it_was_published() -> None:
    """Each file has its digest, and each library its licence."""
    vendor = PAGE / "vendor"
    sums = dict(reversed(one.split()) for one in (vendor / "SHA256SUMS").read_text().splitlines())
    assert {one.relative_to(vendor).as_posix() for one in vendor.rglob("*.js")} == sums.keys()
    for name, digest in sums.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest
    licences = (vendor / "LICENSES.txt").read_text()
    assert "MarkedJS" in licences
    assert "Kevin Decker" in licences


async def test_the_page_gets_the_client_s_table_of_statuses(viewer: Any) -> None:
    """The module statuses.js, which needs no token, equals the table that the client reads."""
    status, answer = await viewer.request("GET /statuses.js", Authorization=None)
    head, _, script = answer.partition("\r\n\r\n")
    assert status == 200
    assert "content-type: text/javascript" in head.lower()
    known, unknown = re.findall(
        r"^export const \w+ = (?:new Map\()?(.*?)\)?;$", script, re.MULTILINE
    )
    assert dict(json.loads(known)) == {
        name: attrs.asdict(entry) for name, entry in STATUS_TABLE.items()
    }
    assert json.loads(unknown) == attrs.asdict(UNKNOWN_STATUS)


def test_the_page_has_an_icon_and_no_mark_of_its_own_for_each_status() -> None:
    """Icons are named after statuses; marks are nowhere but in the client's table."""
    icons = re.findall(r'<symbol id="icon-(\w+)"', (PAGE / "index.html").read_text())
    assert {*icons} == {*(status.lower() for status in NodeStatus), "unknown", "lost"}
    scripts = "".join(path.read_text() for path in PAGE.glob("*.js"))
    for status in NodeStatus:
        assert status_entry(status).mark not in scripts


@pytest.mark.parametrize(
    ("address", "url", "is_loopback", "own", "foreign"),
    [
        (Address("127.0.0.1", 80), "http://127.0.0.1:80", True, "localhost", "localhost:81"),
        (Address("::1", 81), "http://[::1]:81", True, "[::1]:81", "[::2]:81"),
        (Address("127.0.0.2", 81), "http://127.0.0.2:81", True, "127.0.0.2:81", "127.0.0.3:81"),
        (Address("MyBox", 81), "http://mybox:81", False, "mybox:81", "192.0.2.1:81"),
        (Address("0.0.0.0", 81), "http://127.0.0.1:81", False, "192.0.2.1:81", "mybox:81"),
        (Address("::", 81), "http://127.0.0.1:81", False, "[2001:db8::1]:81", "evil.example:81"),
    ],
)
def test_the_names_of_an_address(
    address: Address, url: str, is_loopback: bool, own: str, foreign: str
) -> None:
    """If it listens on all addresses, any IP address is allowed: DNS rebinding needs a name."""
    assert address.base_url == url
    assert address.is_loopback is is_loopback
    assert address.is_meant(own)
    assert not address.is_meant(foreign)


async def test_a_page_gets_everything_and_then_the_changes(
    sim: Simulator, viewer: Any, held: int
) -> None:
    """A page that is opened later gets the same state, with the same times."""
    viewer.board.follow(held)
    events = viewer.events()
    board = await until(events, "board")
    assert (board["note"], board["executions"]) == ("of a test", [str(held)])
    first = await until(events, "nodes")
    assert first["all"]
    assert [node["name"] for node in first["nodes"]] == ["Plan", "Answer"]
    running = await until(events, "execution", state="running")
    assert (running["final"], running["total"]) == (1, 2)
    sim.finish(held, "Answer")
    (answer,) = (await until(events, "nodes", all=False))["nodes"]
    assert (answer["index"], answer["value"], answer["is_output_node"]) == (1, "42", True)
    assert 0 < answer["running"] + 0.001 <= answer["final"] + 0.001
    done = await until(events, "execution", state="succeeded")
    requests = sim.request_count
    late = viewer.events()
    assert (await until(late, "nodes"))["nodes"][1] == answer
    assert await until(late, "execution") == done
    assert sim.request_count == requests
    viewer.board.remove(held)
    for page in (events, late):
        assert (await until(page, "board", executions=[]))["instance"] == board["instance"]
    viewer.board.close()
    for page in (events, late):
        await until(page, "end")
        async with asyncio.timeout(20):
            assert [event async for event in page] == []


async def test_a_page_gets_all_nodes_if_some_were_added_or_removed(session: Session) -> None:
    """It requests full values by the node's index, which is then another."""
    board = Board(session)
    board.cards[1] = card = Card(session.execution(1))
    events = board_events(board)

    async def show(*names: str) -> tuple[bool, list[str]]:
        card.snapshot = Snapshot(1, False, {name: Node(name, "SUCCESS", name) for name in names})
        board._notify()
        async for event in events:
            if event.startswith(b"event: nodes\ndata: "):
                data = json.loads(event.partition(b"data: ")[2])
                return data["all"], [node["name"] for node in data["nodes"]]
        raise AssertionError

    async with asyncio.timeout(20), aclosing(events):
        assert await show("b", "c") == (True, ["b", "c"])
        assert await show("a", "b", "c") == (True, ["a", "b", "c"])
        assert await show("c") == (True, ["c"])


async def test_an_idle_page_gets_heartbeats(viewer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides can then detect a dead connection."""
    assert _HEARTBEAT == 15
    monkeypatch.setattr("promptlayer_exec.viewer._live_stream._HEARTBEAT", 0.01)
    url = f"http://127.0.0.1:{viewer.port}/api/events"
    async with (
        aiohttp.ClientSession(headers={"Authorization": BEARER}) as http,
        http.get(url) as response,
    ):
        async with asyncio.timeout(20):
            while await response.content.readline() != b": \n":
                pass


async def test_values_come_through_exactly(sim: Simulator, viewer: Any) -> None:
    """They are sent as text, as JavaScript would round numbers; long ones in full on demand."""
    values = [2**63 + 1, [math.nan, -math.inf], "half \ud800", None, False, "", "a" * 10_001]
    nodes = [SimNode(str(index), value) for index, value in enumerate(values)]
    execution_id = sim.add_execution(Scenario([*nodes, SimNode("lone \udfff")]))
    viewer.board.follow(execution_id)
    shown = (await until(viewer.events(), "nodes"))["nodes"]
    assert [node["value"] for node in shown[:6]] == [
        "9223372036854775809",
        "[\n  NaN,\n  -Infinity\n]",
        "half \ud800",
        "null",
        "false",
        "",
    ]
    assert (len(shown[6]["value"]), shown[6]["length"]) == (10_000, 10_001)
    assert shown[7]["name"] == "lone \udfff"
    path = f"executions/{execution_id}/nodes"
    assert await viewer.send("GET", f"{path}/6") == (200, "a" * 10_001)
    assert await viewer.send("GET", f"{path}/2") == (200, "half \\ud800")
    assert (await viewer.send("GET", f"{path}/8"))[0] == 404
    assert (await viewer.send("GET", "executions/5/nodes/0"))[0] == 404
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert value_text(deep) == "(nested too deeply to be shown)"


def test_a_very_long_value_is_shown_on_one_line() -> None:
    """To indent it takes seconds."""
    long = [1] * 400_000
    assert value_text(long) == json.dumps(long)
    assert value_text([[0]]) == json.dumps([[0]], indent=2)


async def test_a_failed_node_always_has_a_message(sim: Simulator, viewer: Any) -> None:
    """It is the error message, or the last line of the details, or a text that there is none."""
    cases: list[tuple[Any, ...]] = [
        ("why", {"raw": "Traceback\nwhy"}, "why", "Traceback\nwhy"),
        ("why", "why", "why", None),
        (None, "Traceback\nwhy", "why", "Traceback\nwhy"),
        (None, {"code": 7}, '{"code": 7}', None),
        (None, None, "The server gave no reason.", None),
    ]
    nodes = [
        SimNode(str(index), status="FAILED", error_message=message, raw_error_message=raw)
        for index, (message, raw, *_) in enumerate(cases)
    ]
    viewer.board.follow(sim.add_execution(Scenario(nodes)))
    shown = (await until(viewer.events(), "nodes"))["nodes"]
    texts = [(node["error_message"], node["raw_error_message"]) for node in shown]
    assert texts == [case[2:] for case in cases]
    assert {node["value"] for node in shown} == {None}


async def test_an_execution_is_added_once_and_can_be_removed(
    sim: Simulator, viewer: Any, held: int
) -> None:
    """The latest addition is first on the page; a removed execution is no longer polled."""
    other = sim.add_execution(Scenario([SimNode("a", None, None)]))
    viewer.board.follow(other)
    content = {"execution_id": f" {held} "}
    answers = await asyncio.gather(*(viewer.send("POST", "executions", content) for _ in range(5)))
    assert answers == [(201, {"execution_id": str(held)})] * 5
    assert list(viewer.board.cards) == [held, other]
    watching = [task.get_name() for task in asyncio.all_tasks() if "viewer " in task.get_name()]
    assert sorted(watching) == [f"viewer {held}", f"viewer {other}"]
    assert (await viewer.send("POST", "executions", content))[0] == 201
    for execution_id in (held, other, held):
        assert (await viewer.send("DELETE", f"executions/{execution_id}"))[0] == 204
    assert viewer.board.cards == {}
    assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("viewer ")]


async def test_an_invalid_or_unknown_id_is_refused_with_a_reason(
    sim: Simulator, viewer: Any
) -> None:
    """The error names the field, and no card is added."""
    for wrong in ("", "x", "0", "-1", "1.5", "\u0661", str(2**63), "9" * 5000):
        status, answer = await viewer.send("POST", "executions", {"execution_id": wrong})
        assert (status, answer["field"]) == (422, "execution_id")
    status, answer = await viewer.send("POST", "executions", {"execution_id": "77"})
    assert status == 404
    assert "The server returned 404 Not Found" in answer["message"]
    sim.inject(Fault.status(401))
    status, answer = await viewer.send("POST", "executions", {"execution_id": "77"})
    assert status == 502
    assert "Check PROMPTLAYER_API_KEY" in answer["message"]
    assert viewer.board.cards == {}


async def test_a_watch_that_failed_keeps_its_last_snapshot(
    sim: Simulator, viewer: Any, held: int
) -> None:
    """It has the error; adding the execution again follows it again, at the same position."""
    other = sim.add_execution(Scenario([SimNode("a", "b")]))
    viewer.board.follow(held)
    events = viewer.events()
    await until(events, "execution", execution_id=str(held), state="running")
    viewer.board.follow(other)
    await until(events, "execution", execution_id=str(other), state="succeeded")
    sim.inject(Fault.status(403))  # for the first one: the other is not polled any more
    lost = await until(events, "execution", state="lost")
    problem = lost["problem"]
    assert problem["kind"] == "refused"
    assert "The server returned 403 Forbidden. Check that the API key" in problem["text"]
    assert problem["since"] == pytest.approx(time.time(), abs=5)
    assert (lost["final"], lost["total"]) == (1, 2)
    assert (await viewer.send("POST", "executions", {"execution_id": str(held)}))[0] == 201
    assert (await until(events, "nodes", execution_id=str(held)))["all"]
    again = await until(events, "execution", execution_id=str(held), state="running")
    assert again["problem"] is None
    assert list(viewer.board.cards) == [held, other]


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (Fault.disconnect(), ("unreachable", "No usable response from http")),
        (Fault.status(503), ("failing", "The server returned 503 Service Unavailable.")),
        (Fault.status(429, retry_after=0.2), ("waiting", "The server returned 429 Too Many")),
        (Fault.truncate(), ("unreadable", "Could not read the 202 response")),
    ],
)
async def test_a_poll_that_is_tried_again_says_why(
    sim: Simulator, viewer: Any, held: int, fault: Fault, problem: tuple[str, str]
) -> None:
    """What is wrong, since when, and when PromptLayer is asked again; it passes with an answer."""
    viewer.board.follow(held)
    events = viewer.events()
    assert (await until(events, "execution", state="running"))["problem"] is None
    sim.inject(fault)
    kind, text = problem
    async with asyncio.timeout(20):
        while (shown := (await until(events, "execution"))["problem"]) is None:
            pass
        assert (shown["kind"], shown["text"][: len(text)]) == (kind, text)
        assert shown["since"] <= shown["until"] + 0.1  # the clock is read for each
        while (await until(events, "execution"))["problem"] is not None:
            pass


async def test_another_kind_of_problem_is_a_new_one(sim: Simulator, viewer: Any, held: int) -> None:
    """A key that is refused in an outage is refused since then, after one attempt."""
    viewer.board.follow(held)
    events = viewer.events()
    await until(events, "execution", state="running")
    sim.inject(Fault.status(503, times=3))
    sim.inject(Fault.status(401))
    shown = []
    async with asyncio.timeout(20):
        while not shown or shown[-1]["kind"] != "refused":
            problem = (await until(events, "execution"))["problem"]
            shown += [] if problem is None else [problem]
    outage = [problem for problem in shown if problem["kind"] == "failing"]
    assert len({problem["since"] for problem in outage}) == 1
    assert shown[-1]["since"] > outage[-1]["since"]
    assert "401 Unauthorized." in shown[-1]["text"]
    assert outage[-1]["attempts"] == 3
    assert "503 Service Unavailable (3 attempts)." in outage[-1]["text"]


async def test_an_error_of_any_kind_ends_a_watch_visibly(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """The execution does not show as running for ever."""

    class Broken:
        async def acquire(self) -> None:
            if sim.request_count >= 2:
                raise OSError("the limiter is gone")

    async with open_session(limiter=Broken()) as session, Board(session) as board:
        board.follow(held)
        async with asyncio.timeout(20):
            while board.cards[held].state != "lost":
                await board.changed.wait()
        assert board.cards[held].problem.text == "the limiter is gone"


async def test_a_run_is_started_and_followed(sim: Simulator, viewer: Any) -> None:
    """It is followed even if the page was closed; errors name the field of the form."""
    sim.add_workflow("a/b", Scenario([SimNode("n", "v")]), warning="no tone")
    for workflow, inputs, status, field in [
        (" ", "{}", 422, "workflow"),
        ("none", "{}", 404, "workflow"),
        ("a/b", "{", 422, "inputs"),
        ("a/b", "7", 422, "inputs"),
        ("a/b", '{"n": NaN}', 422, "inputs"),
    ]:
        answer = await viewer.send("POST", "runs", {"workflow": workflow, "inputs": inputs})
        assert (answer[0], answer[1]["field"]) == (status, field)
    sim.inject(Fault.disconnect(), path="/run")
    status, answer = await viewer.send("POST", "runs", {"workflow": "a/b", "inputs": ""})
    assert (status, answer["field"], answer["is_unknown"]) == (502, None, True)
    assert "may have started" in answer["message"]
    before = len(sim.runs)
    sim.inject(Fault.delay(0.05), path="/run")
    start = asyncio.create_task(viewer.send("POST", "runs", {"workflow": "a/b", "inputs": ""}))
    await sim.wait_for_requests(sim.request_count + 1)
    start.cancel()
    done = await until(viewer.events(), "execution", state="succeeded")
    assert (done["workflow"], done["warning"]) == ("a/b", "no tone")
    assert [str(run.execution_id) for run in sim.runs[before:]] == [done["execution_id"]]


def test_usage_errors_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing key, a weak token, a taken port and a missing package are usage errors."""

    def error_of(port: int = 0, *, is_demo: bool = True, host: str = "127.0.0.1") -> str:
        with pytest.raises(typer.Exit) as end:
            view(host=host, port=port, is_demo=is_demo)
        assert end.value.exit_code == 2
        return capsys.readouterr().err

    assert "PROMPTLAYER_API_KEY" in error_of(is_demo=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        in_use = error_of(taken.getsockname()[1])
    assert re.match(r"cannot listen on .* in use\. .*--port 0", in_use)
    assert error_of(host="192.0.2.1").startswith("cannot listen on 192.0.2.1, port 0: ")
    monkeypatch.setenv(TOKEN, "guess me")
    assert error_of().startswith(f"{TOKEN} is too weak")
    ours = ("promptlayer_exec.viewer", "promptlayer_exec._uvicorn")
    modules = [name for name in sys.modules if name.startswith(ours)]
    for module in modules:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert install_hint("viewer") in error_of()


def test_an_address_that_is_not_loopback_prints_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Standard output has only the URL, so a program can read it."""
    _print_url("http://a.b/#token=t", is_loopback=False)
    printed = capsys.readouterr()
    assert printed.out == "http://a.b/#token=t\n"
    assert printed.err.startswith("warning: other machines can reach this page")


async def _post(port: int, content: Any) -> None:
    url = f"http://127.0.0.1:{port}/api/runs"
    async with (
        aiohttp.ClientSession(headers={"Authorization": BEARER}) as http,
        http.post(url, json=content),
    ):
        pass


async def test_stopping_aborts_open_requests_without_log_messages(
    sim: Simulator,
    open_session: Callable[..., Session],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The requests are a page that does not read, and a start whose check has no answer."""
    monkeypatch.setattr("promptlayer_exec.viewer._serving._GRACE", 0.1)
    long = [SimNode(f"node {index}", "x" * 10_000) for index in range(1000)]
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    slow = open_session(request_timeout=30, check_inputs=True)
    async with slow as session, Board(session) as board:
        await board.add(sim.add_execution(Scenario(long)))
        address = Address("127.0.0.1", port)
        serving = asyncio.create_task(serve(board, listener, address, "secret"))
        while board.cards[1001].state != "succeeded":
            await board.changed.wait()
        sim.inject(Fault.stall())
        before = sim.request_count
        with socket.socket() as page:
            page.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            page.connect(("127.0.0.1", port))
            head = f"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            page.sendall(f"{head}Authorization: {BEARER}\r\n\r\n".encode())
            start = {"workflow": "any", "inputs": ""}
            starting = asyncio.create_task(_post(port, start))
            async with asyncio.timeout(20):
                await board.opened.wait()
                await sim.wait_for_requests(before + 1)
                serving.cancel()
                await asyncio.wait([serving])
                assert "viewer" not in [task.get_name() for task in asyncio.all_tasks()]
            page.settimeout(5)  # its connection is gone, too: it ends behind what was sent
            with suppress(ConnectionResetError):
                while page.recv(1 << 20):
                    pass
        with pytest.raises(aiohttp.ClientError):
            await starting
    assert [one.getMessage() for one in caplog.records if one.name.startswith("uvicorn")] == []


async def test_serving_leaves_the_signal_handlers_alone(viewer: Any) -> None:
    """The program has its own; uvicorn's, of a public name, are left out."""
    assert callable(uvicorn.Server.capture_signals)
    await viewer.request("GET /")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    owners = [getattr(handler, "__self__", None) for handler in handlers]
    assert not any(isinstance(owner, uvicorn.Server) for owner in owners)


async def test_sigterm_stops_the_command_with_a_page_open(
    sim: Simulator, held: int, tmp_path: Path
) -> None:
    """It exits soon, with code 0 and no message; the token is from the environment.

    With `--no-history`, it writes no file.
    """
    token = "t" * 22
    environment = {
        **os.environ,
        "PROMPTLAYER_API_KEY": sim.api_key,
        "PROMPTLAYER_BASE_URL": sim.base_url,
        "XDG_STATE_HOME": str(tmp_path),
        TOKEN: token,
    }
    view = ("-m", "promptlayer_exec", "view", "--no-history", str(held))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", *view),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        found = re.fullmatch(rf"http://127\.0\.0\.1:(\d+)/#token={token}", url)
        assert found is not None
        headers = {"Authorization": f"Bearer {token}"}
        async with (
            aiohttp.ClientSession(headers=headers) as http,
            http.get(f"http://127.0.0.1:{found[1]}/api/events") as response,
        ):
            assert await response.content.readline() == b"event: board\n"
            board = await response.content.readline()
            assert f'["{held}"]'.encode() in board
            assert b'"has_history":false' in board
            process.send_signal(signal.SIGTERM)
            rest = await response.content.read()
            async with asyncio.timeout(30):
                _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert rest.endswith(b"event: end\ndata: {}\n\n")
    assert process.returncode == 0
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - in one call, as nothing else runs
    assert errors == b"Open this page, and keep its URL to yourself (Ctrl-C stops the server):\n"


async def test_a_start_that_is_answered_after_the_end_is_reported(
    sim: Simulator, tmp_path: Path
) -> None:
    """The command waits for the answer; the id is on standard error, the inputs in the history."""
    sim.add_workflow("w", Scenario([SimNode("n")]))
    gate = threading.Event()

    async def wait(_request: web.BaseRequest, answer: Callable[[], Any]) -> Any:
        assert await asyncio.to_thread(gate.wait, 10)
        return answer()

    sim.inject(Fault.delay(0.0))  # for the request of the definition
    sim.inject(Fault(wait))
    token = "t" * 22
    environment = {
        **os.environ,
        "PROMPTLAYER_API_KEY": sim.api_key,
        "PROMPTLAYER_BASE_URL": sim.base_url,
        "XDG_STATE_HOME": str(tmp_path),
        TOKEN: token,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "promptlayer_exec", "view"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().partition("/#")[0]
        headers = {"Authorization": f"Bearer {token}"}
        start = {"workflow": "w", "inputs": '{"letter": "of Maria"}'}
        async with aiohttp.ClientSession(headers=headers) as http:
            starting = asyncio.create_task(http.post(f"{url}/api/runs", json=start))
            await sim.wait_for_requests(2)
            assert sim.requests[-1].method == "POST"
            process.send_signal(signal.SIGINT)
            with pytest.raises(aiohttp.ClientError):
                await starting
            gate.set()
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    assert b"execution 1001 of workflow 'w' started, but nobody received its outcome" in errors
    history = History(tmp_path / "promptlayer-exec" / "history.sqlite", server=sim.base_url)
    (entry,) = (await history.search("Maria"))["entries"]
    await history.aclose()
    assert entry["outcome"] == "unknown"


async def test_a_start_that_is_answered_as_the_pages_are_closed_is_logged(
    sim: Simulator, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """Perhaps no page gets the answer, and there may be no history."""
    sim.add_workflow("w", Scenario([SimNode("n", duration=None)]))
    async with Board(session) as board:
        await board.start("w", {})
        assert caplog.messages == []
        board.close()
        execution = await board.start("w", {})
    assert f"execution {execution.id} of workflow 'w' started" in caplog.messages
