"""A simulator that answers every EVERYth request with the next of many faults.

Usage: server.py EXECUTIONS EVERY

It prints its base URL and the ids of its executions as a line of JSON. For each line of standard
input, it prints the runs that were started, as pairs of input and id. When standard input ends, as
it does with the parent process, it prints what it did as another line, and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from promptlayer_exec.simulator import Fault, Scenario, SimNode, SimRequest, Simulator

LONGEST = 900.0
TOO_LARGE = 256 * 1024
# A 429 slows all requests, so many of them would only make the test long.
COMMON, RARE = 3, 1
KINDS = {
    "500": (COMMON, Fault.status(500)),
    "503": (COMMON, Fault.status(503)),
    "503 with Retry-After": (COMMON, Fault.status(503, retry_after=0.02)),
    "disconnect": (COMMON, Fault.disconnect()),
    "truncate": (COMMON, Fault.truncate()),
    "malformed": (COMMON, Fault.malformed()),
    "stall": (COMMON, Fault.stall()),
    "trickle": (COMMON, Fault.trickle(0.05)),
    "delay": (COMMON, Fault.delay(0.05)),
    "oversize": (COMMON, Fault.oversize(TOO_LARGE)),
    "another shape": (COMMON, Fault.status(200, body=b'{"Answer": {"status": null}}')),
    "429": (RARE, Fault.status(429)),
    "429 with Retry-After": (RARE, Fault.status(429, retry_after=0.02)),
}
RUNNING = Fault.status(
    202,
    body=json.dumps(
        {
            "Plan": {"status": "SUCCESS", "value": ["think", "answer"], "is_output_node": False},
            "Answer": {"status": "RUNNING", "value": None, "is_output_node": True},
        }
    ).encode(),
)


def scenario(value: Any, duration: float = 0.0) -> Scenario:
    """Return an execution whose main output is `value`."""
    answer = SimNode("Answer", value, duration, after=("Plan",), is_output_node=True)
    return Scenario([SimNode("Plan", ["think", "answer"]), answer])


def kinds() -> Iterator[str]:
    """Yield all kinds of faults for ever, the rare ones in each 20th round only."""
    for round_ in itertools.count():
        for kind, (often, _) in KINDS.items():
            if often == COMMON or round_ % 20 == 0:
                yield kind


class FaultyServer:
    """A simulator that decides on each request whether it fails.

    Many items follow the same execution of a pool, so that the simulator need not keep one for
    each: of the polls that succeed, every other one shows the execution as running.

    Args:
        executions: how many executions are in the pool.
        every: one of this many GETs fails, and one of this many POSTs.
    """

    def __init__(self, executions: int, every: int) -> None:
        self.simulator = Simulator(log_requests=False, on_request=self._decide)
        self.simulator.add_workflow("echo", lambda inputs: scenario(inputs["n"], 0.01))
        self.pool = [self.simulator.add_execution(scenario(i)) for i in range(executions)]
        self._running = dict.fromkeys(map(str, self.pool), True)
        self._every = every
        self._count: Counter[str] = Counter()
        self._kinds = {"GET": kinds(), "POST": kinds()}
        self.faults: list[tuple[str, str, int]] = []

    def _decide(self, request: SimRequest) -> None:
        if not request.path.endswith(("/run", "/workflow-version-execution-results")):
            return  # how push is set up
        self._count[request.method] += 1
        if self._count[request.method] % self._every == 0:
            kind = next(self._kinds[request.method])
            self.simulator.inject(KINDS[kind][1])
            self.faults.append((request.method, kind, _subject(request)))
            return
        polled = request.query.get("workflow_version_execution_id", "")
        if polled in self._running:
            running, self._running[polled] = self._running[polled], not self._running[polled]
            if running:
                self.simulator.inject(RUNNING)

    def report(self) -> dict[str, Any]:
        """Return the number of requests by method, and every fault."""
        return {"requests": self._count, "faults": self.faults}


def _subject(request: SimRequest) -> int:
    """Return the id of the polled execution, or the input of the run to start."""
    if request.method == "GET":
        return int(request.query["workflow_version_execution_id"])
    return int(json.loads(request.body)["input_variables"]["n"])


def _print(message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def main(executions: str, every: str) -> None:
    """Serve until standard input ends."""
    server = FaultyServer(int(executions), int(every))
    stdin = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    async with server.simulator as simulator:
        _print({"base_url": simulator.base_url, "key": simulator.api_key, "pool": server.pool})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONGEST):
                while await stdin.readline():
                    _print([(run.inputs["n"], run.execution_id) for run in simulator.runs])
    _print(server.report())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
