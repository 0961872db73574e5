"""The command `doctor`."""

from __future__ import annotations

import os
import sys
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from promptlayer_exec._integration import printable
from promptlayer_exec.cli import _options as options
from promptlayer_exec.cli._exit import ExitCode, Misuse, Subject, run_command
from promptlayer_exec.cli._printing import err, out, quoted

if TYPE_CHECKING:
    from promptlayer_exec._doctor.examination import Examination, Scope
    from promptlayer_exec._doctor.report import Finding, Secrets

_STYLES = {"ok": "green", "differs": "yellow", "failed": "bold red", "skipped": "dim"}
_NAME_WIDTH = len("name resolution")


def doctor(
    *,
    workflow: Annotated[
        str | None,
        typer.Option(metavar="WORKFLOW", help="Also run this workflow once, which you pay for."),
    ] = None,
    inputs: Annotated[
        list[str],
        typer.Option("--input", "-i", metavar="KEY=VALUE", help="Input of that run, as for `run`."),
    ] = [],  # noqa: B006 - Typer's way to declare a list
    is_confirmed: Annotated[
        bool, typer.Option("--yes", help="Skip the confirmation prompt before that run.")
    ] = False,
    callback_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Let PromptLayer post that run's callback to this URL."),
    ] = None,
    callback_port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            min=1,
            max=65535,
            help="Wait for the callback on this port of this machine, behind your tunnel or proxy.",
        ),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            "--db",
            metavar="URL",
            envvar="PROMPTLAYER_EXEC_DB",
            help="Also check this database of batches and starts.",
        ),
    ] = None,
    redis: Annotated[
        str | None, typer.Option(metavar="URL", help="Also check this Redis server.")
    ] = None,
    timeout: Annotated[
        float, options.seconds("Maximum time to wait for that run to complete.")
    ] = 600,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a report to paste into an issue.")
    ] = False,
    recording: Annotated[
        Path | None,
        typer.Option(
            "--record",
            metavar="FILE",
            help="Record each response, without what is private, for `simulate --replay`.",
        ),
    ] = None,
    base_url: options.BaseUrl = None,
) -> None:
    """Check your setup, and that the server works as expected.

    doctor reads only, and costs nothing: what is installed, the connection to the server, the API
    key, the workflows, push, and the databases that you name.

    With --workflow, it also runs that workflow once, and compares each response with what this
    package expects. You pay for this run, so doctor asks first.

    Each line of the report is a check:

    \b
      ok       as expected
      differs  it works differently than expected: what was expected, what came
      failed   it does not work: what to do
      skipped  not checked, and why

    With --json, the report is one JSON object. No report contains your key, an input, an output, or
    the name of a node or a workflow; the JSON names no host either.

    --record writes what the server sent to an HTTP Archive (HAR). Instead of texts, it contains
    their lengths, and instead of names, aliases. Read the file before you share it.

    The exit code is 0 if nothing failed or differs, and 1 otherwise.
    """  # noqa: D301 - \b is Typer's mark for preformatted text
    if workflow == "":
        raise typer.BadParameter("--workflow must not be empty")
    if workflow is None and (inputs or callback_url is not None):
        raise typer.BadParameter("--input and --callback-url need --workflow")
    if callback_port is not None and callback_url is None:
        raise typer.BadParameter("--callback-port needs --callback-url")
    read = options.read_inputs(inputs)
    if recording is not None and (recording.is_dir() or not os.access(recording.parent, os.W_OK)):
        raise typer.BadParameter(f"--record: cannot write to {printable(str(recording))}")

    if workflow is not None and not is_confirmed:
        _ask(workflow)

    from promptlayer_exec._doctor.examination import Scope  # noqa: PLC0415 - slow to import

    scope = Scope(
        base_url=base_url,
        database=database,
        redis=redis,
        workflow=workflow,
        inputs=read,
        callback_url=callback_url,
        callback_port=callback_port,
        timeout=timeout,
    )
    subject = Subject(base_url=base_url, resumable=True)
    raise typer.Exit(run_command(_examine(scope, subject, recording, as_json=as_json), subject))


def _ask(workflow: str) -> None:
    """Ask whether to pay for a run.

    Do not call it within `run_command`, which would let Ctrl-C wait for the user's reply.
    """
    if not sys.stdin.isatty():

        async def refuse() -> None:
            raise Misuse("--workflow starts a run that you pay for: confirm that with --yes")

        raise typer.Exit(run_command(refuse(), Subject()))

    try:
        question = f"This starts one run of {quoted(workflow)}, which you pay for. Continue?"
        is_confirmed = typer.confirm(question, err=True)
    except typer.Abort:
        err("\ninterrupted: no run was started")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if not is_confirmed:
        err("no run was started. Without --workflow, doctor starts none")
        raise typer.Exit(ExitCode.FAILED)


async def _examine(
    scope: Scope, subject: Subject, recording: Path | None, *, as_json: bool
) -> ExitCode:
    from promptlayer_exec._doctor.checkup import all_checks  # noqa: PLC0415 - slow to import
    from promptlayer_exec._doctor.examination import Examination, examine  # noqa: PLC0415
    from promptlayer_exec._doctor.recorder import Recorder  # noqa: PLC0415
    from promptlayer_exec._doctor.report import (  # noqa: PLC0415
        count_verdicts,
        is_healthy,
        issue_report,
    )

    def started(execution_id: int) -> None:
        subject.execution_id = execution_id
        err(f"execution {execution_id} started")

    findings: list[Finding] = []
    async with AsyncExitStack() as resources:
        recorder = None
        if recording is not None:
            recorder = Recorder()
        examination = Examination(scope, resources, started, recorder)
        if recording is not None:
            # Also after Ctrl-C, once the connections are closed.
            resources.callback(_save, examination, recording)
        checks = all_checks(has_run=scope.workflow is not None)
        async with aclosing(examine(examination, checks)) as examined:
            async for finding in examined:
                if not as_json:
                    is_new = not findings or findings[-1].group != finding.group
                    _print(finding, examination.report_secrets(), with_heading=is_new)
                findings.append(finding)

    if as_json:
        out(issue_report(findings, examination.report_secrets()))
    else:
        counts = count_verdicts(findings).items()
        out("\n" + ", ".join(f"{count} {verdict}" for verdict, count in counts))
    return ExitCode.SUCCEEDED if is_healthy(findings) else ExitCode.FAILED


def _save(examination: Examination, recording: Path) -> None:
    """Write the recording. If that fails, the checks are still of use."""
    shown = printable(str(recording))
    try:
        count = examination.save_recording(recording)
    except OSError as error:
        err(f"could not write {shown}: {error.strerror}")
    else:
        err(f"recorded {count} requests in {shown}: read it before you share it")


def _print(finding: Finding, secrets: Secrets, *, with_heading: bool) -> None:
    """Print a finding as one line, which a terminal wraps in its column."""
    text = secrets.removed(finding.text)
    place = secrets.removed(f" ({finding.place})") if finding.place else ""
    advice = secrets.removed(f". {finding.advice}") if finding.advice else ""

    if not sys.stdout.isatty():
        if with_heading:
            out(finding.group)
        out(f"  {finding.verdict:<8} {finding.name:<{_NAME_WIDTH}}  {text}{place}{advice}")
        return

    console = Console(highlight=False)
    if with_heading:
        console.print(finding.group, style="bold")
    line = Table.grid(padding=(0, 1))
    line.add_column(width=10)
    line.add_column(width=_NAME_WIDTH)
    line.add_column(overflow="fold")
    verdict = Text(f"  {finding.verdict}", _STYLES[finding.verdict])
    line.add_row(verdict, finding.name, Text.assemble(text, (place, "dim"), advice))
    console.print(line)
