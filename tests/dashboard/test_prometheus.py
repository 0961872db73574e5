"""The dashboard in docs/ with a real Prometheus, which scrapes a session by the page's code."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from promptlayer_exec import ExecutionFailed, NotFound, Session
from promptlayer_exec.opentelemetry import OpenTelemetryObserver
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

DOCS = Path(__file__).parents[2] / "docs"
PANELS = json.loads((DOCS / "grafana-dashboard.json").read_text(encoding="utf-8"))["panels"]
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in PANELS
    for target in panel["targets"]
}
# What stands in for the values that Grafana fills in.
VARIABLES = {"$workflow": ".*", "$__rate_interval": "10s"}


def documented(language: str, part: str) -> str:
    """Return the block of the page on observing that contains a text."""
    page = (DOCS / "observing.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if part in block)
    return str(block)


@pytest.fixture
def observed() -> Iterator[tuple[OpenTelemetryObserver, int]]:
    """Return the observer of the page, and the port at which its metrics are served."""
    page: dict[str, Any] = {}
    exec(documented("python", "def serve_metrics"), page)
    meters, server = page["serve_metrics"](0)
    yield OpenTelemetryObserver(meter_provider=meters), server.server_port
    meters.shutdown()
    server.shutdown()
    server.server_close()


@pytest.fixture
def prometheus(
    observed: tuple[OpenTelemetryObserver, int], tmp_path: Path, unused_tcp_port: int
) -> Iterator[str]:
    """Return the URL of a Prometheus with the page's settings, except for port and interval."""
    settings = documented("yaml", "scrape_configs").replace("9464", str(observed[1]))
    (tmp_path / "prometheus.yml").write_text(settings.replace("15s", "200ms"), encoding="utf-8")
    arguments = (
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{unused_tcp_port}",
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *arguments], stdout=log, stderr=log)
        yield f"http://127.0.0.1:{unused_tcp_port}"
        process.terminate()
        process.wait(10)


def ask(url: str, query: str) -> list[float]:
    """Return the values that Prometheus has for a query now."""
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    parameters = urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{parameters}", timeout=5) as response:
            results = json.load(response)["data"]["result"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(error.read().decode()) from error
    except OSError:  # it is still starting
        return []
    return [float(result["value"][1]) for result in results]


async def test_every_figure_of_the_dashboard_has_a_value(
    observed: tuple[OpenTelemetryObserver, int], prometheus: str
) -> None:
    """A session that succeeds, fails, is throttled and is woken leaves no panel empty."""
    missing = dict(QUERIES)
    async with Simulator() as sim:
        sim.add_workflow("good", Scenario([SimNode("Out")]))
        sim.add_workflow("bad", Scenario([SimNode("Out", status="FAILED")]))
        waiting = sim.add_execution(Scenario([SimNode("Out", duration=None)]))
        observers = [observed[0]]
        async with Session(sim.api_key, base_url=sim.base_url, observers=observers) as session:
            give_up = asyncio.get_running_loop().time() + 45
            watch = asyncio.create_task(session.execution(waiting).wait(timeout=None))
            while missing:
                assert asyncio.get_running_loop().time() < give_up, f"no value: {[*missing]}"
                sim.inject(Fault.status(429, retry_after=0.01))
                for name in ("good", "bad"):
                    execution = await session.start(name)
                    session.wake(execution.id)
                    await execution.wait()
                    with contextlib.suppress(ExecutionFailed):
                        await session.run(name)
                with pytest.raises(NotFound):
                    await session.start("unknown")
                for panel, query in list(missing.items()):
                    if any(value > 0 for value in await asyncio.to_thread(ask, prometheus, query)):
                        del missing[panel]
            watch.cancel()
