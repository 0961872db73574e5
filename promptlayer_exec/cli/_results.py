"""One look at the results of an execution."""

import json
import sys
from typing import Any

from rich.console import Console

from promptlayer_exec import Execution, ExecutionFailed, RetryPolicy, Snapshot

from ._ending import ExitCode
from ._live import node_table
from ._session import open_session
from ._streams import err, out
from ._text import counted, error_of, final_of, printable, verdict
from ._views import snapshot_json


async def results(
    execution_id: int,
    *,
    base_url: str | None,
    outage: float,
    all_nodes: bool,
    as_json: bool,
    pick_up: str,
) -> ExitCode:
    """Print the main output or all nodes, and judge the execution by its nodes."""
    session = open_session(base_url, RetryPolicy(outage=outage), err)
    async with session:
        execution = session.execution(execution_id)
        snapshot = await execution.snapshot()
        if all_nodes:
            _print_nodes(snapshot, as_json=as_json)
        if not snapshot.complete:
            state = f"not complete yet, {final_of(snapshot)} nodes are final"
            err(f"execution {execution_id} is {state}; follow it with:\n  {pick_up}")
            return ExitCode.TIMED_OUT
        if not snapshot.succeeded:
            _print_failure(snapshot)
            return ExitCode.FAILED
        if all_nodes:
            return ExitCode.SUCCEEDED
        return await _print_main_output(execution, as_json=as_json)


def _print_nodes(snapshot: Snapshot, *, as_json: bool) -> None:
    if as_json or not sys.stdout.isatty():
        out(snapshot_json(snapshot))
    else:
        Console().print(node_table(snapshot))


def _print_failure(snapshot: Snapshot) -> None:
    for node in snapshot.failed_nodes:
        reason = printable(error_of(node), keep="\n\t")
        err(f"{printable(node.name)}: {reason}")
    err(f"execution {snapshot.execution_id} {verdict(snapshot)}: {counted(snapshot)}")


async def _print_main_output(execution: Execution, *, as_json: bool) -> ExitCode:
    try:
        value = await execution.output()
    except ExecutionFailed as error:
        err(f"execution {execution.id}: {printable(error.args[0])}; --all shows its nodes")
        return ExitCode.FAILED
    print_output(value, as_json=as_json)
    return ExitCode.SUCCEEDED


def print_output(value: Any, *, as_json: bool = False) -> None:
    """Print a main output: a string as it is, anything else as JSON."""
    if as_json:
        out(json.dumps(value))
    elif not sys.stdout.isatty():
        out(value if isinstance(value, str) else json.dumps(value))
    else:
        text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
        out(printable(text, keep="\n\t"))
