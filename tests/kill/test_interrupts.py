"""Ctrl-C in synchronous code: ten interpreters for each call, interrupted at random moments."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from subprocess import PIPE
from typing import Any

import pytest

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

INTERPRETERS = 10
PROGRAM = """
import sys
import threading
from promptlayer_exec import StartRequest
from promptlayer_exec.sync import Session

if sys.argv[2] == "logging":
    import logging
    logging.basicConfig(level=logging.INFO)
inputs = {"interpreter": int(sys.argv[1])}
session = Session()
print("begins", flush=True)
"""
CALLS = {
    "run": 'session.run("held", inputs)',
    "stream": 'for snapshot in session.start("held", inputs).stream(): pass',
    "the body of a stream": """
for snapshot in session.start("held", inputs).stream():
    threading.Event().wait()
""",
    "collect": 'session.collect([StartRequest("held", inputs)] * 4)',
    "as_completed": """
for outcome in session.as_completed([StartRequest("held", inputs)] * 8, max_in_flight=3): pass
""",
}


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """Return a simulator whose runs never end, and whose responses to starts are slow."""
    with Simulator() as sim:
        monkeypatch.setenv("PROMPTLAYER_API_KEY", sim.api_key)
        monkeypatch.setenv("PROMPTLAYER_BASE_URL", sim.base_url)
        sim.add_workflow("held", Scenario([SimNode("Answer", 1, None, is_output_node=True)]))
        sim.inject(Fault.delay_response(0.2, times=None), path="/run")
        yield sim


def interrupt(processes: list[subprocess.Popen[str]], sim: Simulator) -> list[str]:
    """Interrupt each at a random moment, and return what they print.

    The first moment is that of the first run. So some are interrupted before their own.
    """
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    while not sim.runs:
        time.sleep(0.01)
    moments = sorted((random.uniform(0.0, 2.0), number) for number in range(len(processes)))
    began = time.monotonic()
    for moment, number in moments:
        time.sleep(max(began + moment - time.monotonic(), 0.0))
        processes[number].send_signal(signal.SIGINT)
    return [process.communicate(timeout=60)[1] for process in processes]


@pytest.mark.parametrize("logging", ["logging", "no logging"])
@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_at_any_moment_prints_the_id_of_each_run(
    sim: Simulator, call: str, logging: str
) -> None:
    """In ten of ten interpreters, with and without logging configured."""

    def start(number: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM + CALLS[call], str(number), logging]
        return subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True)

    printed = interrupt([start(number) for number in range(INTERPRETERS)], sim)
    started: list[set[str]] = [set() for _ in printed]
    for run in sim.runs:
        inputs: Any = run.inputs
        started[inputs["interpreter"]].add(str(run.execution_id))

    found = [set(re.findall(r"\b\d+\b", text)) for text in printed]
    missing = [ids - seen for ids, seen in zip(started, found, strict=True) if ids - seen]
    assert all("KeyboardInterrupt" in text for text in printed)
    assert missing == []
    sys.stdout.write(f"{len(sim.runs)} runs of {sum(map(bool, started))} interpreters\n")
