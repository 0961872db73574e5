"""The commands on one execution: `run`, `watch`, `results` and `demo`."""

from __future__ import annotations

import json
import shlex
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
    NotFound,
    RequestError,
    Session,
    Snapshot,
    StartFailed,
    StartRequest,
    StartUnknown,
    StoreUnavailable,
)
from promptlayer_exec._advice import explain
from promptlayer_exec._integration import (
    encode_inputs,
    indented,
    printable,
)
from promptlayer_exec._ways_out import suggest
from promptlayer_exec.cli import _options as options
from promptlayer_exec.cli._exit import (
    THIS_SUBJECT,
    ExitCode,
    Misuse,
    Subject,
    command,
    hint,
    run_command,
)
from promptlayer_exec.cli._printing import err, out, quoted, shorten
from promptlayer_exec.cli._sentences import (
    final_count,
    result_line,
    traceback_end,
    whole_error,
)
from promptlayer_exec.cli._watch_display import Display, choose_display

_MAY_HAVE_STARTED = "the run may have started: waiting for its id (Ctrl-C again stops waiting)"
# These already include whether a run was started.
_START_ERRORS = (RequestError, StartUnknown, ExecutionTimeout, KeyConflict, StoreUnavailable)


def run(
    context: typer.Context,
    workflow: options.WorkflowName,
    *,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input", "-i", metavar="KEY=VALUE", help="Input of the workflow. Repeatable."
        ),
    ] = [],  # noqa: B006 - Typer's way to declare a list
    label: options.Label = None,
    version: options.Version = None,
    metadata: Annotated[
        list[str],
        typer.Option(metavar="KEY=TEXT", help="Text to store with the run. Repeatable."),
    ] = [],  # noqa: B006 - Typer's way to declare a list
    key: options.KeyOption = None,
    database: options.Database = None,
    watched: Annotated[
        bool,
        typer.Option(
            "--watch/--no-watch",
            help="Watch the run, or print its id and exit.",
            show_default="watch",
        ),
    ] = True,
    timeout: Annotated[
        float, options.seconds("How long to wait for the run to start, and then to finish.")
    ] = 3600,
    no_push: options.NoPush = False,
    as_json: options.JsonLines = False,
    base_url: options.BaseUrl = None,
    outage: options.Outage = None,
) -> None:
    """Start a run of a workflow and watch it until it finishes.

    Give each input as -i KEY=VALUE (JSON, or else text), -i KEY@FILE (the text of a file) or
    -i @FILE (a JSON object of inputs); see `help inputs`. If a required input is missing, nothing
    is started. `workflow` shows what a workflow needs.

    The execution id goes to standard error. The rest is as in `watch`.

    A start that may have reached PromptLayer is never repeated, because you would pay twice.
    Ctrl-C stops the command, but not the run: PromptLayer cannot cancel one. While a run is
    starting, the command first waits for its id.

    With --key, you can repeat the command on any machine that uses the same database: the first
    one starts a run, and the others watch it. A key belongs to one workflow, version, inputs and
    metadata. This needs the extra `starts`.
    """
    if context.args:
        given = quoted(context.args[0])
        raise typer.BadParameter(f"give inputs with -i: -i {given}")

    request = StartRequest(
        workflow,
        options.read_inputs(inputs),
        label=label,
        version=version,
        metadata=options.read_metadata(metadata) or None,
        key=key,
    )
    display = choose_display(as_json=as_json)
    note = "This command started no run."
    subject = Subject(
        base_url=base_url,
        resumable=True,
        note=note,
        refusal=ExitCode.UNAVAILABLE,
        as_json=as_json,
    )

    def observe(event: Event) -> None:
        # The response may also come after Ctrl-C, when only the session still reads it.
        if isinstance(event, ExecutionStarted):
            subject.execution_id = event.execution_id
        elif isinstance(event, StartFailed) and isinstance(event.error, _START_ERRORS):
            subject.failure = event.error

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
            execution = await _start(session, request, display, subject)
            subject.stopping = ""
            subject.execution_id = execution.id

            _report_start(execution)
            if not watched:
                execution_id = str(execution.id)
                if as_json:
                    execution_id = json.dumps({"execution_id": execution_id})
                out(execution_id)
                return ExitCode.SUCCEEDED

            snapshot = await _follow(execution, display, subject)
        if not snapshot.succeeded:
            return _failed(snapshot, subject)
        err(hint("print its main output with:", suggest(f"results {execution.id}", base_url)))
        return ExitCode.SUCCEEDED

    raise typer.Exit(run_command(work(), subject))


def _report_start(execution: Execution) -> None:
    if execution.warning:
        err(f"warning: {printable(execution.warning)}")
    if not execution.is_new:
        err(f"an earlier command with this key started execution {execution.id}")
    else:
        err(f"execution {execution.id} started")


async def _start(
    session: Session, request: StartRequest, display: Display, subject: Subject
) -> Execution:
    try:
        encode_inputs(session, request)
    except (TypeError, ValueError) as error:
        raise Misuse(explain(error)) from error

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
    except NotFound:
        if name := await options.near_workflow(session, request.workflow):
            shown = suggest(f"workflow {shlex.quote(name)}", subject.base_url)
            subject.hint = hint(f"did you mean {quoted(name)}? See its inputs with:", shown)
        raise
    except ValueError as error:
        shown = suggest(f"workflow {shlex.quote(str(request.workflow))}", subject.base_url)
        raise Misuse(explain(error), hint=hint("see its inputs with:", shown)) from error


def _failed(snapshot: Snapshot, subject: Subject) -> ExitCode:
    """Print the last lines of the traceback, and how to read the rest, and return the exit code."""
    if not subject.as_json:
        for node in snapshot.failed_nodes[:1]:
            for line in traceback_end(node):
                err(line)
        shown = suggest(f"results {snapshot.execution_id}", subject.base_url)
        err(hint("print the whole error with:", shown))
    return ExitCode.FAILED


@command
async def watch(
    execution_id: options.ExecutionId,
    timeout: Annotated[float, options.seconds("How long to wait for the run to finish.")] = 3600,
    as_json: options.JsonLines = False,
    base_url: options.BaseUrl = None,
    outage: options.Outage = None,
) -> ExitCode:
    """Watch an execution until it finishes.

    On a terminal, you get a live table of its nodes. In a pipe, each change of a node is one line,
    and the result is the last one. Values are shortened; `results` prints them in full.

    With --json, each change is a line of JSON, described in `help json`. Warnings and errors go to
    standard error.
    """
    subject = THIS_SUBJECT.get()
    subject.execution_id, subject.base_url, subject.resumable = execution_id, base_url, True
    subject.refusal = ExitCode.UNAVAILABLE

    display = choose_display(as_json=as_json)
    async with options.open_session(
        base_url, outage, display.warn, wait_timeout=timeout
    ) as session:
        snapshot = await _follow(session.execution(execution_id), display, subject)

    return ExitCode.SUCCEEDED if snapshot.succeeded else _failed(snapshot, subject)


async def _follow(execution: Execution, display: Display, subject: Subject) -> Snapshot:
    # The display closes before the session, which can take longer.
    with display.waiting(f"execution {execution.id}: waiting for the first response"):
        async with aclosing(execution.stream()) as snapshots:
            async for snapshot in snapshots:
                subject.snapshot = snapshot
                display.show(snapshot)
    return snapshot


@command
async def results(
    execution_id: options.ExecutionId,
    all_nodes: Annotated[bool, typer.Option("--all", help="Print every node.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON, even for a string.")
    ] = False,
    base_url: options.BaseUrl = None,
    outage: options.Outage = None,
) -> ExitCode:
    """Print the output of an execution, or its errors.

    A string is printed as it is, any other output as JSON. If the execution failed, standard output
    stays empty, and you get the whole error of each failed node on standard error. If it is still
    running, the exit code is 3.

    With --all, you get every node: a table on a terminal, else one line of JSON (`help json`).
    """
    subject = THIS_SUBJECT.get()
    subject.execution_id, subject.base_url = execution_id, base_url
    subject.as_json = as_json and all_nodes
    subject.refusal = ExitCode.UNAVAILABLE

    async with options.open_session(base_url, outage, err) as session:
        execution = session.execution(execution_id)
        snapshot = await execution.snapshot()
        if all_nodes and (as_json or not sys.stdout.isatty()):
            out(json.dumps(snapshot.to_dict()))
        elif all_nodes:
            from promptlayer_exec.cli._live import node_table  # noqa: PLC0415 - slow to import

            Console().print(node_table(snapshot))

        if not snapshot.complete:
            state = f"execution {execution_id} is still running, {final_count(snapshot)} nodes done"
            err(hint(f"{state}. Follow it with:", suggest(f"watch {execution_id}", base_url)))
            return ExitCode.TIMED_OUT

        if not snapshot.succeeded:
            for node in snapshot.failed_nodes:
                err(f"{printable(node.name)}: {whole_error(node)}\n")
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
        bool, typer.Option("--json", help="Print only what `watch --json` prints.")
    ] = False,
) -> None:
    """Watch a simulated run; it needs no key and no network.

    It takes eight seconds. Then you get the output, and a program that does the same.
    """
    display = choose_display(as_json=as_json)
    from promptlayer_exec.cli import _demo  # noqa: PLC0415 - slow to import

    if not as_json:
        out("A support agent with ten nodes replies to a letter, on a simulated PromptLayer.\n")
    async with _demo.watched_agent(display.warn) as execution:
        await _follow(execution, display, THIS_SUBJECT.get())
        output = await execution.output()

    if not as_json:
        out("\nThe main output, from execution.output():\n")
        _print_output(output)
        out("\nThis program does the same for one of your own executions:\n")
        out(_demo.program(execution.id))
