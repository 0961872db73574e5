"""Starting a run, and watching it until it is complete."""

import asyncio
import json

from promptlayer_exec import (
    Execution,
    PromptLayerExecError,
    RetryPolicy,
    Session,
    SessionClosed,
    StartRequest,
    StartUnknown,
)

from ._ending import ExitCode, Misuse, Subject
from ._hints import command
from ._session import open_session
from ._streams import OutputFailed, err, out
from ._text import printable, shorten
from ._views import View
from ._watch import follow

# Long enough for a start that has not left to be called off, and short enough to wait in silence.
_MOMENT = 0.3


async def run(
    request: StartRequest,
    view: View,
    subject: Subject,
    *,
    watched: bool,
    as_json: bool,
    base_url: str | None,
    timeout: float,
    outage: float,
) -> ExitCode:
    """Start a run, and show it until it is complete, or print its id.

    Args:
        request: what to start.
        view: shows the execution.
        subject: learns what becomes of the start.
        watched: whether to show it.
        as_json: whether the id is printed as JSON.
        base_url: the server, if not the one from the environment.
        timeout: seconds that the start may take, and then the execution.
        outage: seconds for which a server in trouble is asked again.
    """
    retry = RetryPolicy(outage=outage, watch_outage=outage)
    session = open_session(base_url, retry, view.warn, wait_timeout=timeout)
    async with session:
        execution = await _start(session, request, view, subject)
        if not watched:
            _print_id(execution, as_json=as_json)
            return ExitCode.SUCCEEDED
        _tell(execution)
        snapshot = await follow(execution, view, timeout)
    if not snapshot.succeeded:
        return ExitCode.FAILED
    err(f"print its main output with:\n  {command('results', execution.id, base_url=base_url)}")
    return ExitCode.SUCCEEDED


def _print_id(execution: Execution, *, as_json: bool) -> None:
    try:
        out(json.dumps({"execution_id": str(execution.id)}) if as_json else str(execution.id))
    except OutputFailed:
        _tell(execution)
        raise


def _tell(execution: Execution) -> None:
    err(f"execution {execution.id} started")


async def _start(
    session: Session, request: StartRequest, view: View, subject: Subject
) -> Execution:
    starting = asyncio.create_task(
        session.start(
            request.workflow,
            request.inputs,
            label=request.label,
            version=request.version,
            metadata=request.metadata,
        )
    )
    try:
        with view.awaiting(f"workflow {shorten(printable(str(request.workflow)), 40)}: starting"):
            await asyncio.wait([starting])
    except asyncio.CancelledError:
        await _learn(session, starting, subject)
        raise
    try:
        execution = starting.result()
    except PromptLayerExecError:
        raise
    except (TypeError, ValueError) as error:
        raise Misuse(str(error)) from error
    subject.execution_id = execution.id
    if execution.warning:
        err(f"warning: {printable(execution.warning)}")
    return execution


async def _learn(session: Session, starting: asyncio.Task[Execution], subject: Subject) -> None:
    """Learn what becomes of a start when its command is interrupted.

    Closing the session calls it off if its request has not left; else it waits for the answer.
    """
    closing = asyncio.create_task(session.aclose())
    await asyncio.wait([starting], timeout=_MOMENT)
    if not starting.done():
        err("the run may have started: waiting for its id (interrupt again to give it up)")
    await closing
    try:
        subject.execution_id = (await starting).id
    except SessionClosed as closed:
        subject.execution_id = closed.execution_id
    except StartUnknown as error:
        subject.remark = str(error)
    except (PromptLayerExecError, TypeError, ValueError):
        pass  # it was refused, or never left
