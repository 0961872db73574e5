"""The commands on one execution: `run`, `watch`, `results` and `demo`."""

from __future__ import annotations

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
    ExecutionStarted,
    ExecutionTimeout,
    KeyConflict,
    RequestError,
    Session,
    Snapshot,
    StartFailed,
    StartRequest,
    StartUnknown,
)
from promptlayer_exec._integration import (
    encode_inputs,
    indented,
    is_repeated,
    printable,
)
from promptlayer_exec.cli import _options as options
from promptlayer_exec.cli._exit import (
    THIS_SUBJECT,
    ExitCode,
    Misuse,
    Subject,
    command,
    describe,
    run_command,
    suggest,
)
from promptlayer_exec.cli._printing import (
    err,
    failure_reason,
    final_count,
    out,
    quoted,
    result_line,
    shorten,
)
from promptlayer_exec.cli._watch_display import Display, choose_display

_MAY_HAVE_STARTED = "the run may have started; waiting for its id (interrupt again to stop waiting)"
# Their own texts say whether a run was started.
_START_ERRORS = (RequestError, StartUnknown, ExecutionTimeout, KeyConflict)
_UNKNOWN = (
    "this --key starts nothing now: if PromptLayer has the run, follow it by its id with"
    " `promptlayer-exec watch`, else use another --key"
)


def run(
    context: typer.Context,
    workflow: options.WorkflowName,
    *,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input", "-i", metavar="KEY=VALUE", help="Input, as described above; repeatable."
        ),
    ] = [],  # noqa: B006 - Typer's way to declare a list
    label: options.Label = None,
    version: options.Version = None,
    metadata: Annotated[
        list[str], typer.Option(metavar="KEY=TEXT", help="Text to keep with the run; repeatable.")
    ] = [],  # noqa: B006 - Typer's way to declare a list
    key: options.StartKey = None,
    database: options.Database = None,
    watched: Annotated[
        bool,
        typer.Option(
            "--watch/--no-watch",
            help="Watch the run, or only print its id once it has started, with exit code 0.",
        ),
    ] = True,
    timeout: Annotated[
        float, options.seconds("Maximum time to wait for the start, and then for the execution.")
    ] = 3600,
    no_push: options.NoPush = False,
    as_json: options.JsonLines = False,
    base_url: options.BaseUrl = None,
    outage: options.Outage = None,
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

    With --key, the run happens once: a command that is repeated with the same key, on any machine
    with the same database (--db), starts nothing, and continues with the run that exists. If
    another one is just starting it, the command waits for its id. A key stands for one workflow,
    version, inputs and metadata; with others it is refused. Needs the extra `starts`.

    A start is never repeated once it may have reached the server: if the answer is lost, the error
    says that the run may have started. If the command is interrupted before the answer, it waits
    for the answer to report the id; a second interrupt ends it at once. The run itself goes on: the
    server cannot cancel it.
    """  # noqa: D301 - \b is Typer's mark for preformatted text
    if context.args:
        given = quoted(context.args[0])
        raise typer.BadParameter(f"{given} is not expected; inputs are given with -i: -i {given}")

    request = StartRequest(
        workflow,
        options.read_inputs(inputs),
        label=label,
        version=version,
        metadata=options.read_metadata(metadata) or None,
        key=key,
    )
    display = choose_display(as_json=as_json)
    subject = Subject(
        base_url=base_url, resumable=True, note="this command started no run", as_json=as_json
    )

    def observe(event: Event) -> None:
        # Also when the command was interrupted meanwhile, and only the session reads the answer.
        if isinstance(event, ExecutionStarted):
            subject.execution_id = event.execution_id
        elif isinstance(event, StartFailed) and isinstance(event.error, _START_ERRORS):
            subject.note = _note(event.error)

    async def work() -> ExitCode:
        async with options.open_session(
            base_url,
            outage,
            display.warn,
            wait_timeout=timeout,
            no_push=no_push,
            observer=observe,
            starts=options.start_store(database, "--key") if key is not None else None,
        ) as session:
            subject.stopping = _MAY_HAVE_STARTED
            execution = await _start(session, request, display, base_url)
            subject.stopping = ""
            subject.execution_id = execution.id

            _say_started(execution)
            if not watched:
                execution_id = str(execution.id)
                if as_json:
                    execution_id = json.dumps({"execution_id": execution_id})
                out(execution_id)
                return ExitCode.SUCCEEDED

            snapshot = await _follow(execution, display)
        if not snapshot.succeeded:
            return ExitCode.FAILED
        err(f"print its main output with:\n  {suggest(f'results {execution.id}', base_url)}")
        return ExitCode.SUCCEEDED

    raise typer.Exit(run_command(work(), subject))


def _note(error: Exception) -> str:
    """Return what is said in addition to the error of a start."""
    if isinstance(error, StartUnknown) and error.key is not None:
        return _UNKNOWN
    return describe(error)  # which has been said then


def _say_started(execution: Execution) -> None:
    if execution.warning:
        err(f"warning: {printable(execution.warning)}")
    if is_repeated(execution):
        err(f"execution {execution.id} was started by an earlier command with this key")
    else:
        err(f"execution {execution.id} started")


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
                key=request.key,
            )
    except (ConfigurationError, KeyConflict):
        raise
    except ValueError as error:
        raise Misuse(options.needs(error, request.workflow, base_url)) from error


@command
async def watch(
    execution_id: options.ExecutionId,
    timeout: Annotated[float, options.seconds("Maximum time to wait.")] = 3600,
    as_json: options.JsonLines = False,
    base_url: options.BaseUrl = None,
    outage: options.Outage = None,
) -> ExitCode:
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
    subject = THIS_SUBJECT.get()
    subject.execution_id, subject.base_url, subject.resumable = execution_id, base_url, True

    display = choose_display(as_json=as_json)
    async with options.open_session(
        base_url, outage, display.warn, wait_timeout=timeout
    ) as session:
        snapshot = await _follow(session.execution(execution_id), display)

    return ExitCode.SUCCEEDED if snapshot.succeeded else ExitCode.FAILED


async def _follow(execution: Execution, display: Display) -> Snapshot:
    # Only the watch is displayed: closing the session can take longer.
    with display.waiting(f"execution {execution.id}: waiting for the first answer"):
        async with aclosing(execution.stream()) as snapshots:
            async for snapshot in snapshots:
                display.show(snapshot)
    return snapshot


@command
async def results(
    execution_id: options.ExecutionId,
    all_nodes: Annotated[bool, typer.Option("--all", help="Print every node.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one line of JSON, even for a string.")
    ] = False,
    base_url: options.BaseUrl = None,
    outage: options.Outage = None,
) -> ExitCode:
    """Print the results of an execution as they are now.

    The main output is printed: a string as it is, and any other value as JSON. The nodes decide
    whether the execution succeeded; if it did not, standard output stays empty, and standard error
    says why. While the execution is not complete, the exit code is 3.

    With --all, every node is printed: as a table on a terminal, otherwise as one line of JSON like
    that of `watch --json`.
    """
    subject = THIS_SUBJECT.get()
    subject.execution_id, subject.base_url = execution_id, base_url
    subject.as_json = as_json and all_nodes

    async with options.open_session(base_url, outage, err) as session:
        execution = session.execution(execution_id)
        snapshot = await execution.snapshot()
        if all_nodes and (as_json or not sys.stdout.isatty()):
            out(json.dumps(snapshot.to_dict()))
        elif all_nodes:
            from promptlayer_exec.cli._live import node_table  # noqa: PLC0415 - slow to import

            Console().print(node_table(snapshot))

        if not snapshot.complete:
            state = f"not complete yet, {final_count(snapshot)} nodes are final"
            follow = suggest(f"watch {execution_id}", base_url)
            err(f"execution {execution_id} is {state}; follow it with:\n  {follow}")
            return ExitCode.TIMED_OUT

        if not snapshot.succeeded:
            for node in snapshot.failed_nodes:
                reason = printable(failure_reason(node), keep="\n\t")
                err(f"{printable(node.name)}: {reason}")
            err(result_line(snapshot, timed=False))
            return ExitCode.FAILED

        if not all_nodes:
            _print_output(await execution.output(), as_json=as_json)
    return ExitCode.SUCCEEDED


def _print_output(value: Any, *, as_json: bool = False) -> None:
    """Print a string as it is, and any other value as JSON."""
    is_text = isinstance(value, str)
    if not as_json and sys.stdout.isatty():
        out(printable(value if is_text else indented(value), keep="\n\t"))
    elif is_text and not as_json:
        out(value)
    else:
        out(json.dumps(value))


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
    from promptlayer_exec.cli import _demo  # noqa: PLC0415 - slow to import

    if not as_json:
        out("A support agent with ten nodes answers a letter, on a simulated PromptLayer.\n")
    async with _demo.watched_agent(display.warn) as execution:
        await _follow(execution, display)
        output = await execution.output()

    if not as_json:
        out("\nThe main output, from execution.output():\n")
        _print_output(output)
        out("\nThis program does the same for an execution of yours, given its id:\n")
        out(_demo.program(execution.id))
