"""Serving a recording again, over real sockets."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

RESULTS = "/workflow-version-execution-results?workflow_version_execution_id="
Sent = tuple[int, str]


def entry(target: str, text: str, status: int = 200, *, method: str = "GET", **content: Any) -> Any:
    """Return one entry of a HAR file, with a prefix in its URL."""
    headers = [{"name": "Retry-After", "value": "2"}, {"name": "Connection", "value": "close"}]
    return {
        "request": {"method": method, "url": f"https://example.com/prefix{target}"},
        "response": {
            "status": status,
            "headers": headers,
            "content": {"text": text, **content},
        },
    }


def write(path: Path, *entries: Any) -> Path:
    """Write a HAR file."""
    path.write_text(json.dumps({"log": {"version": "1.2", "entries": entries}}), encoding="utf-8")
    return path


@pytest.fixture
def har(tmp_path: Path) -> Path:
    """Return the path of a file that does not exist yet."""
    return tmp_path / "recording.har"


class Client:
    """A plain HTTP client of the simulator."""

    def __init__(self, sim: Simulator, http: aiohttp.ClientSession) -> None:
        self._headers = {"X-API-KEY": sim.api_key}
        self._http = http

    async def send(self, target: str, method: str = "GET", **options: Any) -> Sent:
        """Send a request, and return the status and the body."""
        options.setdefault("headers", self._headers)
        async with self._http.request(method, target, **options) as response:
            return response.status, await response.text()


@pytest.fixture
async def client(sim: Simulator) -> AsyncIterator[Client]:
    """Return a client of the simulator."""
    async with aiohttp.ClientSession(sim.base_url) as http:
        yield Client(sim, http)


async def test_the_responses_come_in_the_recorded_order(
    sim: Simulator, client: Client, har: Path
) -> None:
    """Those to one operation; the last one is repeated, and other executions are as usual."""
    seven, eight = f"{RESULTS}7&return_all_outputs=true", f"{RESULTS}8"
    entries = [entry(seven, "a", 202), entry(eight, "x"), entry(seven, "b")]
    assert sim.replay(write(har, *entries)) == [7, 8]
    assert await client.send(seven) == (202, "a")
    assert await client.send(f"{RESULTS}8&return_all_outputs=false") == (200, "x")
    assert [await client.send(seven) for _ in range(2)] == [(200, "b")] * 2
    assert (await client.send(f"{RESULTS}7"))[0] == 404
    added = sim.add_execution(Scenario([SimNode("A", 1)]))
    assert await client.send(f"{RESULTS}{added}") == (200, "1\n")


async def test_the_workflow_s_name_makes_no_difference(
    sim: Simulator, client: Client, har: Path
) -> None:
    """A start request gets the recorded response, and starts nothing."""
    run = entry("/workflows/name-1/run", "{}", 201, method="POST")
    sim.replay(write(har, run, entry("/workflows/name-1", "d"), entry("/workflows?page=1", "l")))
    assert await client.send("/workflows/write-report/run", "POST", data=b"{}") == (201, "{}")
    assert await client.send("/workflows/write-report") == (200, "d")
    assert await client.send("/workflows?page=2") == (200, "l")
    assert sim.runs == []


async def test_what_is_no_response_of_promptlayer_is_left_out(
    sim: Simulator, client: Client, har: Path
) -> None:
    """A 401 is up to the key here, and browsers record much else."""
    others = [
        entry("/workflows", "no", 401),
        entry("/workflows", "", 0),
        entry("/connection/websocket", "", 101),
        entry("/index.html", "<html>"),
        entry(f"{RESULTS}x", "no"),
        entry("/workflows/a/labels", "no"),
    ]
    assert sim.replay(write(har, *others, entry("/workflows", "yes"))) == []
    assert await client.send("/workflows") == (200, "yes")
    assert (await client.send("/workflows", headers={}))[0] == 401
    assert (await client.send(f"{RESULTS}x"))[0] == 422


async def test_headers_and_encoded_bodies(sim: Simulator, client: Client, har: Path) -> None:
    """Only headers that concern the content are sent again; a body may be in Base64, or missing."""
    encoded = base64.b64encode(b"\xe9").decode()
    binary = entry("/workflows", encoded, encoding="base64", mimeType="text/plain")
    missing = entry("/workflows/a", "")
    del missing["response"]["content"]["text"]
    sim.replay(write(har, binary, missing))
    async with client._http.get("/workflows", headers=client._headers) as response:
        assert await response.read() == b"\xe9"
        assert response.headers["Retry-After"] == "2"
        assert "Connection" not in response.headers
    assert await client.send("/workflows/a") == (200, "")


async def test_faults_apply_to_recorded_responses(
    sim: Simulator, client: Client, har: Path
) -> None:
    """As to any other."""
    sim.replay(write(har, entry(f"{RESULTS}7", "running", 202), entry(f"{RESULTS}7", "done")))
    sim.inject(Fault.status(503))
    sim.inject(Fault.early_completion())
    assert (await client.send(f"{RESULTS}7"))[0] == 503
    assert [await client.send(f"{RESULTS}7") for _ in range(2)] == [(200, "running"), (200, "done")]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"log": {"entries": [{}]}}', '{"log": {"entries": 5}}', "\x00"]
)
def test_another_file_is_refused(har: Path, text: str) -> None:
    """The error names the file, and nothing of it is replayed."""
    har.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"recording\.har is not an HTTP Archive"):
        Simulator().replay(har)


def test_a_missing_file_is_an_os_error(har: Path) -> None:
    """As everywhere in Python."""
    with pytest.raises(FileNotFoundError):
        Simulator().replay(har)
