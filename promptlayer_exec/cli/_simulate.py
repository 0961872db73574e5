"""A simulated PromptLayer in the foreground, to try the other commands and one's own code on."""

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from typing import NoReturn

from promptlayer_exec.simulator import Scenario, SimNode, SimRequest, Simulator

from ._agent import LETTER, support_agent
from ._ending import ExitCode
from ._streams import err, out
from ._text import printable

_HELD = "read letter"
_WORKFLOW = "support-agent"
_FIRST = SimNode(_HELD, "Dear all, ...", None)
_EXECUTIONS = {
    1: ("ten nodes, succeeds after seven seconds", support_agent(reading=None)),
    2: ("a node fails, so there is no reply", support_agent(reading=None, failing=True)),
    3: (
        "a node takes an unknown status: never complete",
        Scenario(
            [
                _FIRST,
                SimNode("approve", None, 1.0, after=[_HELD], status="AWAITING_APPROVAL"),
                SimNode("final reply", after=["approve"], is_output_node=True),
            ]
        ),
    ),
    4: (
        "a node never ends: try --timeout 5, or Ctrl-C",
        Scenario(
            [
                _FIRST,
                SimNode("think", None, None, after=[_HELD]),
                SimNode("final reply", after=["think"], is_output_node=True),
            ]
        ),
    ),
}


async def simulate(host: str, port: int) -> ExitCode:
    """Serve until cancelled, which is its ordinary end."""
    requests: asyncio.Queue[SimRequest] = asyncio.Queue()
    simulator = Simulator(host=host, port=port, log_requests=False, on_request=requests.put_nowait)
    for execution_id, (_, scenario) in _EXECUTIONS.items():
        simulator.add_execution(scenario, execution_id=execution_id)
    simulator.add_workflow(_WORKFLOW, lambda inputs: support_agent(inputs.get("letter", LETTER)))
    async with AsyncExitStack() as serving:
        try:
            await serving.enter_async_context(simulator)
        except (OSError, UnicodeError) as error:  # the latter for a malformed name
            reason = error.strerror if isinstance(error, OSError) else None
            err(f"cannot listen on {host}, port {port}: {reason or error}")
            return ExitCode.USAGE
        out(_invitation(simulator))
        with suppress(asyncio.CancelledError):
            await _attend(simulator, requests)
    return ExitCode.SUCCEEDED


def _invitation(simulator: Simulator) -> str:
    watch = "\n".join(
        f"  promptlayer-exec watch {execution_id}   # {what}"
        for execution_id, (what, _) in _EXECUTIONS.items()
    )
    return f"""\
A simulated PromptLayer listens at {simulator.base_url} (Ctrl-C ends it).

In another terminal:

  export PROMPTLAYER_BASE_URL={simulator.base_url}
  export PROMPTLAYER_API_KEY={simulator.api_key}
{watch}

Each begins when it is first asked for. To start another one like the first:

  promptlayer-exec run {_WORKFLOW} -i letter="Where is my refund?"

Requests:"""


async def _attend(simulator: Simulator, requests: asyncio.Queue[SimRequest]) -> NoReturn:
    """Tell of every request, and let an execution begin when it is asked for first."""
    waiting = {str(execution_id): execution_id for execution_id in _EXECUTIONS}
    while True:
        request = await requests.get()
        out(f"{time.strftime('%H:%M:%S')} {_line(request)}")
        asked = waiting.pop(request.query.get("workflow_version_execution_id", ""), None)
        if asked is not None:
            simulator.finish(asked, _HELD)


def _line(request: SimRequest) -> str:
    query = "&".join(f"{name}={value}" for name, value in request.query.items())
    return printable(f"{request.method} {request.path}{'?' if query else ''}{query}")
