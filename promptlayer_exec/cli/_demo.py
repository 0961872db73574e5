"""What `demo`, `simulate` and `view --demo` run, and what they print about it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import attrs

from promptlayer_exec import Execution
from promptlayer_exec._integration import printable
from promptlayer_exec._ways_out import PROGRAM
from promptlayer_exec.cli._exit import Misuse, listening
from promptlayer_exec.cli._options import demo_session
from promptlayer_exec.cli._printing import out
from promptlayer_exec.simulator import Scenario, SimRequest, Simulator, examples

if TYPE_CHECKING:
    from promptlayer_exec.viewer import Board, History

NOTE = "This is a demonstration on a simulated PromptLayer: nothing is billed."


@asynccontextmanager
async def watched_agent(warn: Callable[[str], None]) -> AsyncIterator[Execution]:
    """Simulate a run of the support agent, and yield its handle."""
    async with Simulator() as simulator, demo_session(simulator, warn) as session:
        execution_id = simulator.add_execution(examples.support_agent(), execution_id=787)
        yield session.execution(execution_id)


def program(execution_id: int) -> str:
    """Return a program that shows an execution as `demo` does."""
    return f"""\
import asyncio
from contextlib import aclosing

from promptlayer_exec import Session


async def main() -> None:
    async with Session() as session:  # its key: $PROMPTLAYER_API_KEY
        execution = session.execution({execution_id})
        async with aclosing(execution.finished_nodes()) as nodes:
            async for node in nodes:
                print(node.name, node.status)
        print(await execution.output())


asyncio.run(main())"""


def simulator_with_workflows() -> Simulator:
    """Return a simulator with the example workflows."""
    simulator = Simulator(log_requests=False)
    examples.add_workflows(simulator)
    return simulator


def add_past_runs(simulator: Simulator, history: History, now: float) -> None:
    """Add 36 runs from the days before `now` to a simulator and to the viewer's history."""
    for number in range(36):
        run = examples.past_run(number)
        times = examples.node_times(run.scenario, slowness=1 + 0.2 * math.sin(number * 1.7))
        ended = Scenario([attrs.evolve(node, duration=0.0) for node in run.scenario.nodes])
        began = now - (36 - number) * 5 * 3600

        history.record(
            execution_id=simulator.add_execution(ended),
            workflow=run.workflow,
            inputs=json.dumps(run.inputs, indent=2),
            outcome="succeeded" if run.problem is None else "failed",
            problem=run.problem,
            failed_node=None if run.problem is None else run.problem.partition(": ")[0],
            began=began,
            is_started=True,
            duration=max(end for _, end in times.values()),
            origin=began,
            times=json.dumps(times),
            nodes=len(run.scenario.nodes),
        )


async def start_runs(board: Board) -> None:
    """Start runs of three workflows once somebody has opened the page of the board."""
    await board.opened.wait()
    for workflow in ("support-agent", "research-report", "invoice-check"):
        await board.start(workflow, examples.WORKFLOWS[workflow].inputs)


async def serve(host: str, port: int, webhook_url: str | None, recording: Path | None) -> None:
    """Serve the simulator of `simulate`, and print each request."""
    requests: asyncio.Queue[SimRequest] = asyncio.Queue()
    simulator = Simulator(
        host=host,
        port=port,
        log_requests=False,
        on_request=requests.put_nowait,
        webhook_url=webhook_url,
    )
    for execution_id, example in examples.EXECUTIONS.items():
        simulator.add_execution(example.scenario, execution_id=execution_id)
    examples.add_workflows(simulator)
    recorded = []
    if recording is not None:
        recorded = _replay(simulator, recording)

    async with AsyncExitStack() as stack:
        with listening(host, port):
            await stack.enter_async_context(simulator)
        out(_introduction(simulator, recorded))
        with suppress(asyncio.CancelledError):
            await _print_requests(simulator, requests)


def _replay(simulator: Simulator, recording: Path) -> list[int]:
    """Replay a recording, and return the ids of its executions."""
    try:
        return simulator.replay(recording)
    except OSError as error:
        raise Misuse(f"could not read {printable(str(recording))}: {error.strerror}") from error
    except ValueError as error:
        raise Misuse(printable(str(error))) from error


def _introduction(simulator: Simulator, recorded: list[int]) -> str:
    commands = "\n".join(
        [f"  {PROGRAM} watch {execution_id}   # as recorded" for execution_id in recorded]
        + [
            f"  {PROGRAM} watch {execution_id}   # {example.description}"
            for execution_id, example in examples.EXECUTIONS.items()
            if execution_id not in recorded
        ]
    )
    workflows = "\n".join(
        f"  {name} ({', '.join(example.inputs)})" for name, example in examples.WORKFLOWS.items()
    )
    webhook = ""
    if url := simulator.webhook_url:
        secret = simulator.webhook_secret
        webhook = f"\nIt posts webhooks to {url}, signed with the secret {secret}\n"

    return f"""\
A simulated PromptLayer listens at {simulator.base_url} (Ctrl-C stops it).

In another terminal:

  {_set_variable("PROMPTLAYER_BASE_URL", simulator.base_url)}
  {_set_variable("PROMPTLAYER_API_KEY", simulator.api_key)}
{commands}

Each execution begins when it is first requested. To start another one:

  {PROGRAM} run support-agent -i letter="Where is my refund?"

You can run these workflows, with their inputs:
{workflows}
{webhook}
Requests:"""


def _set_variable(name: str, value: str) -> str:
    """Return a line that sets an environment variable in the platform's usual shell."""
    if os.name == "nt":
        return f'$env:{name} = "{value}"'
    return f"export {name}={value}"


async def _print_requests(simulator: Simulator, requests: asyncio.Queue[SimRequest]) -> NoReturn:
    # Each execution begins when it is first requested.
    waiting = {str(execution_id): execution_id for execution_id in examples.EXECUTIONS}

    while True:
        request = await requests.get()
        query = "&".join(f"{name}={value}" for name, value in request.query.items())
        path = f"{request.path}?{query}" if query else request.path
        out(printable(f"{time.strftime('%H:%M:%S')} {request.method} {path}"))

        requested = request.query.get("workflow_version_execution_id", "")
        if (execution_id := waiting.pop(requested, None)) is not None:
            simulator.finish(execution_id, examples.FIRST_NODE)
