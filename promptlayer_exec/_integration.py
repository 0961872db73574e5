"""Functions that the package's own integrations need beyond the public API.

Internal: names here may change in any release. An integration, such as `fastapi` or `starts`,
imports the public API and, if that is not enough, this module. It imports nothing else of the core.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from promptlayer_exec import _structuring
from promptlayer_exec._api.messages import Reply, Response, oversize_reason
from promptlayer_exec._api.runs import NewRun, NodeMap, run_request
from promptlayer_exec._engine.abandoned import AbandonedRuns, warn_of_run
from promptlayer_exec._engine.backplane import OpenSession, Poll
from promptlayer_exec._engine.expiring import ExpiringDict
from promptlayer_exec._engine.recorded_sends import ask_store
from promptlayer_exec._engine.send import (
    AlreadyClaimed,
    SendHooks,
    SendOnce,
    SendOutcome,
    report_unrecorded,
)
from promptlayer_exec._engine.settings import Settings, find_api_key, find_base_url
from promptlayer_exec._engine.tasks import clock, wait_even_if_cancelled
from promptlayer_exec._install import install_hint
from promptlayer_exec._session.combined_stream import News, Waiting, follow
from promptlayer_exec._session.execution import Execution
from promptlayer_exec._session.fanout import each, report_abandoned
from promptlayer_exec._session.session import Session
from promptlayer_exec._values.arguments import (
    MAX_ID,
    check_count,
    check_execution_id,
    hiding_unknown,
)
from promptlayer_exec._values.display import error_details, error_text
from promptlayer_exec._values.errors import (
    ConfigurationError,
    InvalidOutput,
    PromptLayerExecError,
    SessionClosed,
    StoreUnavailable,
    problem_of,
    stored_data,
    what_happened,
)
from promptlayer_exec._values.events import WakeSource
from promptlayer_exec._values.models import (
    Snapshot,
    StartRequest,
    contradicts_completion,
    node_dict,
)
from promptlayer_exec._values.policies import (
    Limiter,
    check_seconds,
    is_from_gateway,
    is_transient,
    or_infinity,
)
from promptlayer_exec._values.start_records import (
    KEY_METADATA,
    StartClaim,
    StartStore,
    StoredStart,
    check_key,
    workflow_of,
)
from promptlayer_exec._values.statuses import UNKNOWN_STATUS, status_entry
from promptlayer_exec._values.text import duration, indented, printable, short_repr
from promptlayer_exec._values.workflow import InputsT, OutputT, Workflow
from promptlayer_exec._values.workflow_definition import WorkflowDefinition, near

if TYPE_CHECKING:
    import cattrs

# These come from other modules. The functions below are part of the interface as well.
__all__ = [
    "KEY_METADATA",
    "MAX_ID",
    "UNKNOWN_STATUS",
    "AlreadyClaimed",
    "ExpiringDict",
    "InputsT",
    "NewRun",
    "News",
    "NodeMap",
    "OpenSession",
    "OutputT",
    "Poll",
    "Reply",
    "Response",
    "SendOutcome",
    "StartClaim",
    "StartStore",
    "StoredStart",
    "Waiting",
    "WakeSource",
    "check_count",
    "check_execution_id",
    "check_key",
    "check_seconds",
    "contradicts_completion",
    "duration",
    "each",
    "error_details",
    "error_text",
    "follow",
    "hiding_unknown",
    "indented",
    "install_hint",
    "is_from_gateway",
    "is_transient",
    "near",
    "node_dict",
    "or_infinity",
    "oversize_reason",
    "printable",
    "problem_of",
    "report_abandoned",
    "report_unrecorded",
    "sends_delaying_closing",
    "short_repr",
    "status_entry",
    "stored_data",
    "wait_even_if_cancelled",
    "warn_of_run",
    "what_happened",
    "workflow_of",
]


# Seconds without a finished item after which a batch's speed and remaining time mean nothing.
STALLED_AFTER = 60.0


def time_left(remaining: int, speed: float | None, *, idle: float) -> float | None:
    """Return the seconds until a batch is done, or None if nobody can tell.

    Args:
        remaining: the items that have not finished.
        speed: how many finish in a second, or None if it is unknown.
        idle: the seconds since the latest item finished.
    """
    if not speed or not remaining or idle >= STALLED_AFTER:
        return None
    left = remaining / speed
    return left if left >= idle else None  # else time has disproved it


def report_undelivered(execution: Execution) -> None:
    """Log the id of a started run whose caller is gone."""
    execution._report_undelivered()


def report_all_undelivered(executions: Iterable[Execution]) -> None:
    """Log, in one line, the started runs whose outcomes nobody received."""
    abandoned = AbandonedRuns()
    with abandoned.gathering():
        for execution in executions:
            abandoned.add(execution._abandoned())


def log_text(error: BaseException) -> str:
    """Return an error's text for the log, without inputs, outputs or quoted bodies."""
    kind = type(error).__name__
    if not isinstance(error, PromptLayerExecError):
        return kind
    what = str(error.args[0])
    if isinstance(error, InvalidOutput):
        what = f"the output does not match at {error.path}"  # the reason may quote it
    return f"{kind}: {error._subject()}{printable(what)}"


def sends_delaying_closing(session: Session) -> list[SendOnce]:
    """Return the start requests whose responses an open session waits for when it closes."""
    client = session._client
    return [] if client is None else client.delaying_closing()


def session_of(execution: Execution) -> Session:
    """Return the session of a handle. An unpickled one has none, and raises `RuntimeError`."""
    return execution._require_session()


def note_start(session: Session, workflow: str | int, execution_id: int, *, age: float) -> None:
    """Make a session retry 404s for a run that another process started `age` seconds ago."""
    session._memory.recent_runs.add(execution_id, workflow, now=clock() - age)


def base_url(session: Session) -> str:
    """Return the URL of a session's server, without a trailing slash."""
    return find_base_url(session._settings.base_url)


def encode_inputs(session: Session, request: StartRequest) -> dict[str, Any]:
    """Check a request as `Session.start` does, and return its inputs in JSON form."""
    inputs = session._encode_inputs(request)
    run_request(request, inputs)
    return inputs


def workflows_by_name(
    workflows: Iterable[str | Workflow[Any, Any]],
) -> dict[str, Workflow[Any, Any]]:
    """Return the workflows that clients may start, by the name or id that they pass.

    Raises:
        TypeError: one of them is neither a name nor a `Workflow`, or all are a single string.
        ValueError: a name is empty, or two workflows share one.
    """
    if isinstance(workflows, str):
        raise TypeError(f"workflows takes several: write [{workflows!r:.100}]")

    found: dict[str, Workflow[Any, Any]] = {}
    for given in workflows:
        if not isinstance(given, str | Workflow):
            raise TypeError(f"workflows takes names and Workflows, got {given!r:.100}")
        workflow = given if isinstance(given, Workflow) else Workflow(given)
        name = str(workflow.name)
        if not name:
            raise ValueError("workflow name must not be empty")
        if found.setdefault(name, workflow) != workflow:
            raise ValueError(f"workflows has {name!r:.100} twice, and clients know only its name")
    return found


def structure_inputs(session: Session, workflow: Workflow[Any, Any], inputs: dict[str, Any]) -> Any:
    """Return inputs that a client sent as JSON as the type that a workflow takes.

    Raises:
        InvalidInputs: they do not match it.
    """
    return _structuring.structure_inputs(inputs, workflow, session._settings.converter)


def required_inputs(workflow: Workflow[Any, Any]) -> dict[str, str] | None:
    """Return the kind of each input that a workflow's type requires, or None without a type."""
    return None if workflow.inputs is Any else _structuring.kinds_of(workflow.inputs)


def check_output(
    workflow: Workflow[Any, Any], value: Any, converter: cattrs.Converter | None
) -> None:
    """Raise `InvalidOutput` if a value is no output of a workflow."""
    if workflow.output is not Any:
        snapshot = Snapshot(0, True, {})
        _structuring.structure_output(value, workflow.output, converter, snapshot)


def check_type(session: Session, into: Any) -> None:
    """Raise `TypeError` if a session cannot structure outputs into a type."""
    session._check_type(into)


def structure_output(session: Session, execution_id: int | None, value: Any, into: Any) -> Any:
    """Return a main output that was stored, as a type.

    Raises:
        InvalidOutput: it does not match it.
    """
    if into is Any:
        return value
    snapshot = Snapshot(execution_id or 0, True, {})
    return _structuring.structure_output(value, into, session._settings.converter, snapshot)


def is_open(session: Session) -> bool:
    """Return True if a session is open in any event loop."""
    return session._current_client() is not None


def server_of(session: Session) -> tuple[str, str | None]:
    """Return the URL of a session's server, and its API key, if it has one."""
    return base_url(session), find_api_key(session._settings.api_key)


async def check_inputs(session: Session, request: StartRequest, inputs: dict[str, Any]) -> None:
    """Raise `InvalidInputs` as `Session.start` does. `inputs` are the request's in JSON form."""
    client = session._open()
    await client.check_inputs(
        request, inputs, client.deadline(10.0)
    )  # a definition takes at most 5 s


async def definition(
    session: Session,
    workflow: str | int,
    *,
    label: str | None = None,
    version: int | None = None,
    fresh: bool = False,
) -> WorkflowDefinition:
    """Return a workflow's definition, at most five minutes old, without `raw`.

    `Session.start` checks inputs with the same one. All parts of the session share one GET for each
    workflow, label and version: a single attempt of at most 5 s. `fresh` reads it again now.

    Raises:
        PromptLayerExecError: it did not arrive. `RequestTimeout` if not in time.
        TypeError, ValueError: an argument is malformed.
    """
    return await session._open().definition(workflow, label, version, fresh=fresh)


def share_channel(session: Session, suffix: str | None) -> None:
    """Make a session that is not yet open share the push channel of other processes."""
    if suffix and session._current_client() is None:
        session._shared_suffix = suffix


def expect(session: Session, workflow: str | int, execution_id: int) -> None:
    """Make push wake the session for a run that another process started."""
    push = session._open().push
    if push is not None and push.runs.get(execution_id) is None:
        push.started(workflow, execution_id, sent_at=-math.inf, waited=0.0)


def start_token(session: Session) -> str:
    """Return a unique token for a run's callback URL."""
    return session._new_token()


async def start(
    session: Session, request: StartRequest, *, hooks: SendHooks, token: str | None = None
) -> Execution:
    """Start a run as `Session.start` does, with hooks around sending.

    Each attempt awaits `hooks.before_send` after connecting and before it sends anything. Until
    then, cancelling the call sends nothing. The call awaits `hooks.not_sent` after an attempt that
    started nothing and that it will repeat. Before it returns or raises, even if cancelled, it
    awaits `hooks.ended`.
    """
    return await session._start(request, hooks=hooks, token=token)


def wake(session: Session, execution_id: int, source: WakeSource) -> bool:
    """Poll an execution now, as `Session.wake` does. Observers see `source`."""
    return session._wake(execution_id, source)


async def resolve_start(session: Session, token: str, execution_id: int) -> None:
    """Record the run that a callback named in the session's start store, if it has one.

    If the store is unavailable, the session keeps trying in the background until it closes, because
    PromptLayer may not repeat the callback. `token` must be genuine. The session need not be open.

    Raises:
        StoreUnavailable: the store is unavailable, and has recorded nothing yet.
        ConfigurationError: the store can never record it.
    """
    store = session._settings.starts
    if store is None:
        return
    try:
        await ask_store(store.resolve(token, execution_id))
    except StoreUnavailable:
        with suppress(ConfigurationError, SessionClosed):  # then it cannot open
            sends = session._open().recorded_sends
            if sends is not None:
                sends.learn(token, execution_id)
        raise


def receive_callback(session: Session, token: str, execution_id: int) -> None:
    """Record a callback to a run's own URL. `Session.recover` may be waiting for it.

    `token` must be genuine. The session need not be open.
    """
    session._memory.callbacks.receive(token, execution_id)


def settings(session: Session) -> Settings:
    """Return the checked settings of a session."""
    return session._settings


@contextmanager
def limited(session: Session, limiter: Limiter) -> Iterator[None]:
    """Make every HTTP attempt of a session acquire one more limiter, whether it is open or not."""
    session._limiters.append(limiter)
    try:
        yield
    finally:
        session._limiters.remove(limiter)
