"""The command `simulate`: a simulated PromptLayer in the foreground."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from typing import NoReturn

import typer

from promptlayer_exec.cli._arguments import Host, Port, listen_failure
from promptlayer_exec.cli._exit import PROGRAM, ExitCode, Misuse, Subject, run_command
from promptlayer_exec.cli._stdio import out
from promptlayer_exec.cli._text import printable
from promptlayer_exec.cli._workflows import support_agent
from promptlayer_exec.simulator import Scenario, SimNode, SimRequest, Simulator

_HELD = "read letter"
_WORKFLOW = "support-agent"


def _incomplete(node: SimNode) -> Scenario:
    first = SimNode(_HELD, "Dear all, ...", None)
    return Scenario([first, node, SimNode("final reply", after=[node.name], is_output_node=True)])


_EXECUTIONS = {
    1: ("ten nodes, succeeds after seven seconds", support_agent(reading=None)),
    2: ("a node fails, so there is no reply", support_agent(reading=None, failing=True)),
    3: (
        "a node gets an unknown status: never complete",
        _incomplete(SimNode("approve", None, 1.0, after=[_HELD], status="AWAITING_APPROVAL")),
    ),
    4: (
        "a node never ends: try --timeout 5, or Ctrl-C",
        _incomplete(SimNode("think", None, None, after=[_HELD])),
    ),
}


def simulate(port: Port = 8787, host: Host = "127.0.0.1") -> None:
    """Serve a simulated PromptLayer.

    Use it to try `run`, `watch`, `results` and your own code. It prints its base URL, its key and
    the ids of some executions, and then every request, until Ctrl-C, with exit code 0.
    """
    raise typer.Exit(run_command(_serve(host, port), Subject()))


async def _serve(host: str, port: int) -> ExitCode:
    requests: asyncio.Queue[SimRequest] = asyncio.Queue()
    simulator = Simulator(host=host, port=port, log_requests=False, on_request=requests.put_nowait)
    for execution_id, (_, scenario) in _EXECUTIONS.items():
        simulator.add_execution(scenario, execution_id=execution_id)
    simulator.add_workflow(_WORKFLOW, support_agent)
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(simulator)
        except (OSError, UnicodeError) as error:
            raise Misuse(listen_failure(host, port, error)) from None
        out(_introduction(simulator))
        with suppress(asyncio.CancelledError):
            await _print_requests(simulator, requests)
    return ExitCode.SUCCEEDED


def _introduction(simulator: Simulator) -> str:
    watch = "\n".join(
        f"  {PROGRAM} watch {execution_id}   # {description}"
        for execution_id, (description, _) in _EXECUTIONS.items()
    )
    return f"""\
A simulated PromptLayer listens at {simulator.base_url} (Ctrl-C ends it).

In another terminal:

  export PROMPTLAYER_BASE_URL={simulator.base_url}
  export PROMPTLAYER_API_KEY={simulator.api_key}
{watch}

Each execution begins at its first request. To start another one like the first:

  {PROGRAM} run {_WORKFLOW} -i letter="Where is my refund?"

Requests:"""


async def _print_requests(simulator: Simulator, requests: asyncio.Queue[SimRequest]) -> NoReturn:
    """Print every request, and let an execution begin at its first one."""
    waiting = {str(execution_id): execution_id for execution_id in _EXECUTIONS}
    while True:
        request = await requests.get()
        query = "&".join(f"{name}={value}" for name, value in request.query.items())
        path = f"{request.path}?{query}" if query else request.path
        out(printable(f"{time.strftime('%H:%M:%S')} {request.method} {path}"))
        requested = request.query.get("workflow_version_execution_id", "")
        if (execution_id := waiting.pop(requested, None)) is not None:
            simulator.finish(execution_id, _HELD)
