"""A demonstration that needs no key, no network and no settings."""

from promptlayer_exec import PollPolicy, Session
from promptlayer_exec.simulator import Simulator

from ._agent import support_agent
from ._ending import ExitCode
from ._results import print_output
from ._session import report_retries
from ._streams import out
from ._views import View
from ._watch import follow

EXECUTION_ID = 787

_INTRODUCTION = """\
A support agent of ten nodes answers a letter, in a simulated PromptLayer.
"""
_PROGRAM = f"""\
import asyncio
from contextlib import aclosing

from promptlayer_exec import Session


async def main() -> None:
    async with Session() as session:  # its key: $PROMPTLAYER_API_KEY
        execution = session.execution({EXECUTION_ID})
        previous = None
        async with aclosing(execution.stream()) as snapshots:
            async for snapshot in snapshots:
                for change in snapshot.diff(previous):
                    print(change.node.name, change.node.status)
                previous = snapshot
        print(await execution.output())


asyncio.run(main())"""


async def demo(view: View, *, as_json: bool) -> ExitCode:
    """Show a simulated execution, its main output, and the program that does the same."""
    if not as_json:
        out(_INTRODUCTION)
    # Often, so that its short nodes are seen running.
    poll = PollPolicy(floor=0.2, ceiling=0.4)
    async with Simulator() as simulator:
        simulator.add_execution(support_agent(), execution_id=EXECUTION_ID)
        async with Session(
            simulator.api_key,
            base_url=simulator.base_url,
            poll=poll,
            observers=[report_retries(view.warn)],
        ) as session:
            await follow(session.execution(EXECUTION_ID), view, timeout=None)
            output = await session.execution(EXECUTION_ID).output()
    if not as_json:
        out("\nThe main output, from execution.output():\n")
        print_output(output)
        out(f"\nThis Python does the same for an execution of yours, given its id:\n\n{_PROGRAM}")
    return ExitCode.SUCCEEDED
