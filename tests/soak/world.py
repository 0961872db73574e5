"""A simulator in a process of its own, in which every so many answers go wrong, each in its turn.

Usage: world.py EXECUTIONS EVERY. It prints where it serves and the ids of its executions, and when
standard input ends, as it does with its owner, what it did; then it stops.
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

LONGEST = 600.0
TOO_LARGE = 256 * 1024
# A 429 slows everything, as it should, so that a soak full of them would only be long.
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
    """Return an execution whose main output is that value."""
    answer = SimNode("Answer", value, duration, after=("Plan",), is_output_node=True)
    return Scenario([SimNode("Plan", ["think", "answer"]), answer])


def in_turn() -> Iterator[str]:
    """Yield every kind, and then again those that are common."""
    for round_ in itertools.count():
        for kind, (often, _) in KINDS.items():
            if often == COMMON or round_ % 20 == 0:
                yield kind


class World:
    """Decides on every request what becomes of it.

    An execution of the pool can be followed again and again, so that the simulator needs not keep
    one for each item: the first look of every two shows it running, whatever it is.

    Args:
        executions: how many there are in the pool.
        every: how many requests there are to each that goes wrong, of GETs and of POSTs.
    """

    def __init__(self, executions: int, every: int) -> None:
        self.simulator = Simulator(log_requests=False, on_request=self._decide)
        self.simulator.add_workflow("echo", lambda inputs: scenario(inputs["n"], 0.01))
        self.pool = [self.simulator.add_execution(scenario(i)) for i in range(executions)]
        self._running = dict.fromkeys(map(str, self.pool), True)
        self._every = every
        self._count: Counter[str] = Counter()
        self._kinds = {"GET": in_turn(), "POST": in_turn()}
        self.happened: list[tuple[str, str, int]] = []

    def _decide(self, request: SimRequest) -> None:
        self._count[request.method] += 1
        if self._count[request.method] % self._every == 0:
            kind = next(self._kinds[request.method])
            self.simulator.inject(KINDS[kind][1])
            self.happened.append((request.method, kind, _subject(request)))
            return
        looked_at = request.query.get("workflow_version_execution_id", "")
        if looked_at in self._running:
            runs, self._running[looked_at] = self._running[looked_at], not self._running[looked_at]
            if runs:
                self.simulator.inject(RUNNING)

    def report(self) -> dict[str, Any]:
        """Return what it did."""
        return {"requests": self._count, "happened": self.happened}


def _subject(request: SimRequest) -> int:
    """Return the execution that was asked for, or the input of the run that was."""
    if request.method == "GET":
        return int(request.query["workflow_version_execution_id"])
    return int(json.loads(request.body)["input_variables"]["n"])


def _say(message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def main(executions: str, every: str) -> None:
    """Serve until standard input ends."""
    world = World(int(executions), int(every))
    owner = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(owner), sys.stdin)
    async with world.simulator as simulator:
        _say({"base_url": simulator.base_url, "key": simulator.api_key, "pool": world.pool})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONGEST):
                await owner.read()
    _say(world.report())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
