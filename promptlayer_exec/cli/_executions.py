"""The commands on one execution: `run`, `watch`, `results` and `demo`."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import aclosing
from typing import Annotated, Any

import typer
from rich.console import Console

from promptlayer_exec import (
    ConfigurationError,
    Event,
    Execution,
    ExecutionFailed,
    ExecutionStarted,
    ExecutionTimeout,
    RequestError,
    Session,
    Snapshot,
    StartFailed,
    StartRequest,
    StartUnknown,
)
from promptlayer_exec._integration import encode_inputs, indented, printable
from promptlayer_exec.cli._arguments import (
    BaseUrl,
    ExecutionId,
    JsonLines,
    Label,
    NoPush,
    Outage,
    Version,
    WorkflowName,
    needs,
    read_inputs,
    read_metadata,
    refuse_arguments,
    seconds,
)
from promptlayer_exec.cli._display import Display, choose_display
from promptlayer_exec.cli._exit import (
    NO_RUN,
    ExitCode,
    Misuse,
    Subject,
    command,
    describe,
    run_command,
)
from promptlayer_exec.cli._session import demo_session, open_session, retry_policy
from promptlayer_exec.cli._text import err, failure_reason, final_count, out, result_line, shorten

_DEMO_ID = 787
# Enough to cancel a start that was not sent yet, and short enough to wait without a message.
_CANCEL_TIME = 0.3
_MAY_HAVE_STARTED = "the run may have started; waiting for its id (interrupt again to stop waiting)"
_START_ERRORS = (RequestError, StartUnknown, ExecutionTimeout)  # which say if there is a run

_DEMO_PROGRAM = f"""\
import asyncio
from contextlib import aclosing

from promptlayer_exec import Session


async def main() -> None:
    async with Session() as session:  # its key: $PROMPTLAYER_API_KEY
        execution = session.execution({_DEMO_ID})
        previous = None
        async with aclosing(execution.stream()) as snapshots:
            async for snapshot in snapshots:
                for change in snapshot.diff(previous):
                    print(change.node.name, change.node.status)
                previous = snapshot
        print(await execution.output())


asyncio.run(main())"""


def run(
    context: typer.Context,
    workflow: WorkflowName,
    *,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input", "-i", metavar="KEY=VALUE", help="Input, as described above; repeatable."
        ),
    ] = [],  # noqa: B006 - Typer's way to declare a list
    label: Label = None,
    version: Version = None,
    metadata: Annotated[
        list[str],
        typer.Option(metavar="KEY=TEXT", help="Text to keep with the run; repeatable."),
    ] = [],  # noqa: B006 - Typer's way to declare a list
    watched: Annotated[
        bool,
        typer.Option(
            "--watch/--no-watch",
            help="Watch the run, or only print its id once it has started, with exit code 0.",
        ),
    ] = True,
    timeout: Annotated[
        float, seconds("Maximum time to wait for the start, and then for the execution.")
    ] = 3600,
    no_push: NoPush = False,
    as_json: JsonLines = False,
    base_url: BaseUrl = None,
    outage: Outage = None,
) -> None:
    """Start a run of a workflow, and watch it until it is complete.

    WORKFLOW is the name or the id of a workflow; `workflow` shows what it needs. Its inputs are
    given with -i in one of these forms, where FILE can be - for standard input:

    \b
      -i KEY=VALUE  JSON, or text if it is not valid JSON: -i n=3
                    -i 'rows=[1, 2]' -i name=Maria. Write text that would be
                    valid JSON as a JSON string: -i 'zip="12345"'
      -i KEY@FILE   the text of FILE, never parsed as JSON, so that scripts can
                    pass any text: -i letter@letter.txt
      -i @FILE      a JSON object of inputs: -i @inputs.json

    A key ends at the first = or @. If a key is given more than once, the last one wins:
    -i @defaults.json -i n=4 changes one input.

    Before the start, the inputs are compared with those that the version requires: if one is
    missing, nothing is started. If the server does not say within 5 seconds what is required, the
    run is started all the same.

    Once the run has started, its execution id and the warnings of the server are written to
    standard error, and the command continues like `watch`, also with --json. The error of a run
    that did not start has an "execution_id" of null.

    A start is never repeated once it may have reached the server: if the answer is lost, the error
    says that the run may have started. If the command is interrupted before the answer, it waits
    for the answer to report the id; a second interrupt ends it at once. The run itself goes on: the
    server cannot cancel it.
    """  # noqa: D301 - \b is Typer's mark for preformatted text
    refuse_arguments(context.args)
    variables = read_inputs(inputs)
    texts = read_metadata(metadata) or None
    display = choose_display(as_json=as_json)
    subject = Subject(base_url=base_url, resumable=True, note=NO_RUN)

    request = StartRequest(workflow, variables, label=label, version=version, metadata=texts)

    def observe(event: Event) -> None:
        # Also when the command was interrupted meanwhile, and only the session reads the answer.
        if isinstance(event, ExecutionStarted):
            subject.execution_id = event.execution_id
        elif isinstance(event, StartFailed) and isinstance(event.error, _START_ERRORS):
            subject.note = describe(event.error)

    async def work() -> ExitCode:
        async with open_session(
            base_url,
            retry_policy(outage),
            display.warn,
            wait_timeout=timeout,
            no_push=no_push,
            observer=observe,
        ) as session:
            execution = await _start(session, request, display, base_url)
            if execution.warning:
                err(f"warning: {printable(execution.warning)}")
            if not watched:
                fields = {"execution_id": str(execution.id)}
                try:
                    out(json.dumps(fields) if as_json else fields["execution_id"])
                except OSError:
                    err(f"execution {execution.id} started")
                    raise
                return ExitCode.SUCCEEDED
            err(f"execution {execution.id} started")
            snapshot = await _follow(execution, display, timeout)
        if not snapshot.succeeded:
            return ExitCode.FAILED
        err(f"print its main output with:\n  {subject.command('results')}")
        return ExitCode.SUCCEEDED

    raise typer.Exit(run_command(work(), subject, as_json=as_json))


async def _start(
    session: Session, request: StartRequest, display: Display, base_url: str | None
) -> Execution:
    try:
        encode_inputs(session, request)
    except (TypeError, ValueError) as error:
        raise Misuse(str(error)) from error
    try:
        with display.waiting(f"workflow {shorten(printable(str(request.workflow)), 40)}: starting"):
            return await session.start(
                request.workflow,
                request.inputs,
                label=request.label,
                version=request.version,
                metadata=request.metadata,
            )
    except ConfigurationError:
        raise
    except ValueError as error:
        raise Misuse(needs(error, request.workflow, base_url)) from error
    except (asyncio.CancelledError, OSError):  # the latter if the display cannot end
        asyncio.get_running_loop().call_later(_CANCEL_TIME, err, _MAY_HAVE_STARTED)
        raise


def watch(
    execution_id: ExecutionId,
    timeout: Annotated[float, seconds("Maximum time to wait.")] = 3600,
    as_json: JsonLines = False,
    base_url: BaseUrl = None,
    outage: Outage = None,
) -> None:
    """Watch an execution until it is complete.

    On a terminal, a table of its nodes is kept up to date. Otherwise each change of a node is
    written at once as one line, and the end of the execution as another. Values are shortened;
    `results` prints them in full.

    With --json, each poll that saw a change is written as one line of ASCII JSON:

    \b
      {"execution_id": "787", "poll": 1, "elapsed": 0.012, "complete": false,
       "succeeded": null, "progress": 0.0, "nodes": {"Node 1": {"name": "Node 1",
       "status": "RUNNING", "value": null, "error_message": null,
       "raw_error_message": null, "is_output_node": true, "running": 0.012,
       "final": null}}}

    Times are in seconds since the first poll; "running" and "final" are when the node was first
    seen in that state. The last line has "complete": true, and "succeeded" is true or false. If the
    watch itself ends early, the last line is {"error": {"type": ..., "message": ...,
    "execution_id": "787"}}. NaN and Infinity in a value are written as Python's json module writes
    them.

    Warnings and errors are written to standard error.
    """  # noqa: D301 - \b is Typer's mark for preformatted text
    display = choose_display(as_json=as_json)
    subject = Subject(execution_id, base_url, resumable=True)

    async def work() -> ExitCode:
        async with open_session(base_url, retry_policy(outage), display.warn) as session:
            snapshot = await _follow(session.execution(execution_id), display, timeout)
        return ExitCode.SUCCEEDED if snapshot.succeeded else ExitCode.FAILED

    raise typer.Exit(run_command(work(), subject, as_json=as_json))


async def _follow(execution: Execution, display: Display, timeout: float | None) -> Snapshot:
    # Only the watch is displayed: closing the session can take longer.
    with display.waiting(f"execution {execution.id}: waiting for the first answer"):
        async with aclosing(execution.stream(timeout=timeout)) as snapshots:
            async for snapshot in snapshots:
                display.show(snapshot)
    return snapshot


def results(
    execution_id: ExecutionId,
    all_nodes: Annotated[bool, typer.Option("--all", help="Print every node.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one line of JSON, even for a string.")
    ] = False,
    base_url: BaseUrl = None,
    outage: Outage = None,
) -> None:
    """Print the results of an execution as they are now.

    The main output is printed: a string as it is, and any other value as JSON. The nodes decide
    whether the execution succeeded; if it did not, standard output stays empty, and standard error
    says why. While the execution is not complete, the exit code is 3.

    With --all, every node is printed: as a table on a terminal, otherwise as one line of JSON like
    that of `watch --json`.
    """
    subject = Subject(execution_id, base_url)

    async def work() -> ExitCode:
        async with open_session(base_url, retry_policy(outage), err) as session:
            execution = session.execution(execution_id)
            snapshot = await execution.snapshot()
            if all_nodes and (as_json or not sys.stdout.isatty()):
                out(json.dumps(snapshot.to_dict()))
            elif all_nodes:
                from promptlayer_exec.cli._live import node_table  # noqa: PLC0415 - slow to import

                Console().print(node_table(snapshot))
            if not snapshot.complete:
                state = f"not complete yet, {final_count(snapshot)} nodes are final"
                command = subject.command("watch")
                err(f"execution {execution_id} is {state}; follow it with:\n  {command}")
                return ExitCode.TIMED_OUT
            if not snapshot.succeeded:
                for node in snapshot.failed_nodes:
                    reason = printable(failure_reason(node), keep="\n\t")
                    err(f"{printable(node.name)}: {reason}")
                err(result_line(snapshot, timed=False))
                return ExitCode.FAILED
            if not all_nodes:
                try:
                    _print_output(await execution.output(), as_json=as_json)
                except ExecutionFailed as error:
                    why = printable(error.args[0])
                    err(f"execution {execution_id}: {why}; --all shows its nodes")
                    return ExitCode.FAILED
            return ExitCode.SUCCEEDED

    raise typer.Exit(run_command(work(), subject, as_json=as_json and all_nodes))


def _print_output(value: Any, *, as_json: bool = False) -> None:
    """Print a string as it is, and any other value as JSON."""
    is_text = isinstance(value, str) and not as_json
    if as_json or not sys.stdout.isatty():
        out(value if is_text else json.dumps(value))
    else:
        text = value if is_text else indented(value)
        out(printable(text, keep="\n\t"))


@command
async def demo(
    as_json: Annotated[
        bool, typer.Option("--json", help="Write only what `watch --json` would write.")
    ] = False,
) -> None:
    """Show a simulated execution.

    It takes eight seconds, and needs no key and no network.
    """
    display = choose_display(as_json=as_json)
    from promptlayer_exec.cli._demo import support_agent  # noqa: PLC0415 - slow to import
    from promptlayer_exec.simulator import Simulator  # noqa: PLC0415

    if not as_json:
        out("A support agent with ten nodes answers a letter, on a simulated PromptLayer.\n")
    async with Simulator() as simulator, demo_session(simulator, display.warn) as session:
        simulator.add_execution(support_agent(), execution_id=_DEMO_ID)
        execution = session.execution(_DEMO_ID)
        await _follow(execution, display, timeout=None)
        output = await execution.output()
    if not as_json:
        out("\nThe main output, from execution.output():\n")
        _print_output(output)
        out("\nThis program does the same for an execution of yours, given its id:\n")
        out(_DEMO_PROGRAM)
