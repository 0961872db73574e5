"""Routes that read, follow and start executions, for the clients that the app authorizes."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from promptlayer_exec import (
    Execution,
    InvalidInputs,
    PromptLayerExecError,
    Session,
    Workflow,
)
from promptlayer_exec._integration import (
    MAX_ID,
    check_count,
    check_key,
    note_start,
    report_undelivered,
    settings,
    structure_inputs,
    workflows_by_name,
)
from promptlayer_exec.fastapi._admission import Admission, RequestRefused
from promptlayer_exec.fastapi._kept_responses import KeptResponses
from promptlayer_exec.fastapi._responses import (
    ProblemRoute,
    json_response,
    logger,
    tagged_response,
)
from promptlayer_exec.fastapi._run_events import RunList, execution_events, list_events
from promptlayer_exec.fastapi._sse import reconnect_later
from promptlayer_exec.fastapi._tickets import Tickets
from promptlayer_exec.fastapi._visible_fields import (
    DEFAULT_FIELDS,
    PROBLEMS,
    described,
    event_schema,
    hidden_fields,
    snapshot_schema,
    started_schema,
)

T = TypeVar("T")

_ExecutionId = Annotated[int, Path(ge=1, le=MAX_ID)]


def _distinct(ids: list[int]) -> list[int]:
    distinct = list(dict.fromkeys(ids))
    if not 1 <= len(distinct) <= 100:
        raise ValueError("there must be 1 to 100 ids")
    return distinct


_ExecutionIds = Annotated[
    list[Annotated[int, Field(ge=1, le=MAX_ID)]],
    Query(alias="id", description="Up to 100 ids. Repeated ones count once."),
    AfterValidator(_distinct),
]
_SAME = {"description": "The client already has this complete response (`If-None-Match`)"}
_SEEN = {"description": "The client already has the last event (`Last-Event-ID`)"}
_OUTPUT = described("The main output: any JSON", {})


_IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Identifies the run: 1 to 255 characters, bare or in double quotes. However"
        " often you repeat the request with it, only one run starts. A server without a store of"
        " keys ignores it.",
    ),
]


class _NewExecution(BaseModel):
    """A run to start."""

    model_config = ConfigDict(extra="forbid", title="Start")

    workflow: str
    inputs: dict[str, Any] = {}


def session_dependency(session: Session | Callable[..., Any]) -> Any:
    """Return the dependency for a session, or for a function that returns it."""
    if not isinstance(session, Session):
        if not callable(session):
            raise TypeError(f"session must be a Session or a dependency, got {session!r:.100}")
        return Depends(session)

    async def get_session() -> Session:
        return session

    return Depends(get_session)


def create_router(
    session: Session | Callable[..., Any],
    *,
    authorize: Callable[..., Any],
    tickets: Tickets | None = None,
    workflows: Collection[str | Workflow[Any, Any]] = (),
    fields: Collection[str] = DEFAULT_FIELDS,
    max_streams: int | None = None,
) -> APIRouter:
    """Return routes with which clients read, follow and start executions.

    The routes are:

    - `GET /executions/{execution_id}`, `.../events` and `.../output`
    - `GET /executions/events?id=1&id=2`, which follows up to 100 executions over one connection
    - `POST /executions`, if there are `workflows`
    - `GET /executions/client.js`, an ES module for browsers, which needs no authorization

    Errors are problem+json (RFC 9457). With `Session(starts=...)`, `POST /executions` honours
    `Idempotency-Key`: the first request with a key gets a 201, and each repetition a 200 with the
    same execution. A key that belongs to another body gets a 422. While the start store is
    unavailable, the response is 503.

    Example:
        Let logged-in users start and follow runs of one workflow::

            def authorize(user: Annotated[User, Depends(current_user)]) -> str:
                return user.id

            router = create_router(get_session, authorize=authorize, workflows=["write-report"])
            app.include_router(router)

    Args:
        session: the open `Session`, or a dependency that returns it.
        authorize: a dependency that raises an `HTTPException` or returns False to refuse a request.
            It may declare the request, and `execution_id: int | None = None`. The code after a
            `yield` in it runs before the first event. For a list of executions, it runs once for
            each that no ticket covers. If it returns a str, such as the id of the user, idempotency
            keys of different users never meet. Otherwise all clients share their keys: a client
            that sends the same key and body as another one gets the other client's run.
        tickets: lets clients read executions with a ticket, as `?ticket=` or as a bearer token,
            instead of `authorize`. A ticket never allows starting a run. The response to
            `POST /executions` then has a ticket.
        workflows: the workflows that clients may start, as names or `Workflow`s. A `Workflow` runs
            with its own label or version, and with its metadata. Inputs that do not match its type
            get a 422 with the path, and start nothing.
        fields: the fields of a node that clients see, besides its name, status, times and
            `is_output_node`: any of `value`, `error_message` and `raw_error_message` (tracebacks).
            Without `value`, there is no `.../output`.
        max_streams: how many connections may follow executions at the same time in this process,
            each one execution or many. Other clients reconnect after 10 to 20 s. None: no limit.

    Raises:
        ConfigurationError: `max_streams` is not an int of at least 1.
        TypeError: an argument has the wrong type.
        ValueError: a field is unknown, or two workflows share a name.
    """
    if not callable(authorize):
        raise TypeError(f"authorize must be a dependency, got {authorize!r:.100}")
    if not isinstance(tickets, Tickets | None):
        raise TypeError(f"tickets must be Tickets(secret), got {tickets!r:.100}")
    if max_streams is not None:
        check_count("max_streams", max_streams)
    startable = workflows_by_name(workflows)
    hidden_names = hidden_fields(fields)
    opened = session_dependency(session)
    # Not in an annotation: these are strings here, and cannot name a local dependency.
    authorized = Depends(authorize, scope="function")

    async def admit(verdict: Any = authorized) -> Any:
        if verdict is False:
            raise HTTPException(403)
        return verdict

    admitted = Depends(admit)

    class Route(ProblemRoute):
        hidden = hidden_names

    router = APIRouter(route_class=Route, responses=PROBLEMS, tags=["executions"])
    _add_client(router)
    checked = [Depends(_refuse_id_in_query)]
    counted = _stream_counter(max_streams)

    # Before the route of one execution, for which "events" would be an id.
    of_lists = APIRouter(route_class=Route, dependencies=checked)
    admission = Admission(Route, [Depends(admit)])
    _add_run_lists(
        of_lists, opened, admission, tickets=tickets, hidden=hidden_names, counted=counted
    )
    router.include_router(of_lists)

    add_reads = _reads(opened, tickets, fields, counted)
    if tickets is not None:
        by_ticket = APIRouter(route_class=_ticket_route(Route, tickets), dependencies=checked)
        add_reads(by_ticket)
        router.include_router(by_ticket, include_in_schema=False)
    by_authorize = APIRouter(route_class=Route, dependencies=[*checked, admitted])
    add_reads(by_authorize)
    if startable:
        _add_start(by_authorize, opened, admitted, startable, tickets)
    router.include_router(by_authorize)
    return router


def _ticket_route(route_class: type[APIRoute], tickets: Tickets) -> type[APIRoute]:
    class TicketRoute(route_class):  # type: ignore[misc, valid-type]
        """A route that exists only for requests with a valid ticket."""

        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            match, child_scope = super().matches(scope)
            if match is not Match.NONE:
                execution_id = child_scope["path_params"]["execution_id"]
                if tickets.read(HTTPConnection(scope), execution_id) is None:
                    return Match.NONE, {}
            return match, child_scope

    return TicketRoute


async def _refuse_id_in_query(request: Request) -> None:
    # On routes without an id in the path, FastAPI would pass the one in the query to `authorize`: a
    # client that may read that execution could then start others.
    if "execution_id" in request.query_params:
        raise HTTPException(400, "execution_id is not a query parameter.")


def _add_client(router: APIRouter) -> None:
    client = files(__package__).joinpath("client.js").read_bytes()
    tag = f'"{hashlib.sha256(client).hexdigest()[:32]}"'

    @router.get("/executions/client.js", include_in_schema=False)
    async def get_client(if_none_match: Annotated[str, Header()] = "") -> Response:
        return tagged_response(client, tag, if_none_match, "text/javascript")


def _stream_counter(max_streams: int | None) -> Any:
    """Return a dependency that is True if one more client may follow an execution."""
    streams = 0

    async def count() -> AsyncGenerator[bool, None]:
        nonlocal streams
        streams += 1
        try:  # FastAPI continues after this when the response is complete
            yield max_streams is None or streams <= max_streams
        finally:
            streams -= 1

    return Depends(count)


def _execution_finder(opened: Any, tickets: Tickets | None) -> Any:
    """Return a dependency for the execution in the path."""

    async def find(
        request: Request, execution_id: _ExecutionId, session: Session = opened
    ) -> Execution:
        if tickets is not None and (ticket := tickets.read(request, execution_id)):
            workflow, age = ticket
            if workflow is not None:
                note_start(session, workflow, execution_id, age=age)
        return session.execution(execution_id)

    return Depends(find)


def _reads(
    opened: Any, tickets: Tickets | None, fields: Collection[str], counted: Any
) -> Callable[[APIRouter], None]:
    """Return a function that adds the routes that read executions to a router."""
    hidden = hidden_fields(fields)
    responses = KeptResponses(hidden)
    found = _execution_finder(opened, tickets)
    shown = described("The nodes as they are now", snapshot_schema(hidden))
    events = described("The data of the events", event_schema(hidden), "text/event-stream")

    def add_to(router: APIRouter) -> None:
        @router.get("/executions/{execution_id}", responses={200: shown, 304: _SAME})
        async def get_execution(
            request: Request,
            if_none_match: Annotated[str, Header()] = "",
            execution: Execution = found,
            session: Session = opened,
        ) -> Response:
            """Return all nodes of an execution as they are now."""
            reading = responses.get(session, execution.id)
            return tagged_response(*await _unless_disconnected(request, reading), if_none_match)

        @router.get(
            "/executions/{execution_id}/events",
            response_class=Response,  # without a media type
            responses={200: events, 204: _SEEN},
        )
        async def get_events(
            request: Request,
            last_event_id: Annotated[str | None, Header()] = None,
            execution: Execution = found,
            has_capacity: bool = counted,
        ) -> Response:
            """Follow an execution.

            The events are `snapshot`, `node`, `waiting`, `resumed`, `complete` and `failure`.
            """
            if not has_capacity:
                return reconnect_later()
            events = execution_events(execution, last_event_id=last_event_id, fields=fields)
            return await _unless_disconnected(request, events)

        if "value" in hidden:
            return

        @router.get("/executions/{execution_id}/output", responses={200: _OUTPUT})
        async def get_output(request: Request, execution: Execution = found) -> Response:
            """Wait until an execution is complete, and return its main output."""
            return json_response(await _unless_disconnected(request, execution.output()))

    return add_to


def _add_run_lists(
    router: APIRouter,
    opened: Any,
    admission: Admission,
    *,
    tickets: Tickets | None,
    hidden: Collection[str],
    counted: Any,
) -> None:
    events = described("The data of the events", event_schema(hidden), "text/event-stream")

    @router.get(
        "/executions/events",
        response_class=Response,  # without a media type
        responses={200: events, 204: _SEEN},
    )
    async def get_list_events(
        request: Request,
        ids: _ExecutionIds,
        last_event_id: Annotated[str | None, Header()] = None,
        session: Session = opened,
        has_capacity: bool = counted,
    ) -> Response:
        """Follow up to 100 executions over one connection.

        The events are those of `/executions/{execution_id}/events`, each with an `execution_id`.
        """
        runs = RunList(ids, last_event_id)
        if not (remaining := runs.remaining()):
            return Response(status_code=204)
        if not has_capacity:
            return reconnect_later()

        covered = {} if tickets is None else tickets.read_all(request)
        for execution_id in remaining:
            workflow, age = covered.get(str(execution_id), (None, 0.0))
            if workflow is not None:
                note_start(session, workflow, execution_id, age=age)

        unknown = [number for number in remaining if str(number) not in covered]
        try:
            asking = admission.refusals(request, unknown)
            refused = await _unless_disconnected(request, asking)
        except RequestRefused as error:
            return error.response

        return list_events(session, runs, refused.items(), hidden)


def _add_start(
    router: APIRouter,
    opened: Any,
    admitted: Any,
    workflows: Mapping[str, Workflow[Any, Any]],
    tickets: Tickets | None,
) -> None:
    schema = started_schema(has_ticket=tickets is not None)
    started_run = described("The run has started", schema)
    known_run = described("The run that this idempotency key has already started", schema)

    @router.post("/executions", status_code=201, responses={200: known_run, 201: started_run})
    async def start_execution(
        request: Request,
        body: _NewExecution,
        idempotency_key: _IdempotencyKey = None,
        client: Any = admitted,
        session: Session = opened,
    ) -> Response:
        """Start an execution of a workflow. `Location` is the URL to read it.

        If PromptLayer warns of something, such as a missing input, the response has a `warning`.
        """
        workflow = workflows.get(body.workflow)
        if workflow is None:
            raise HTTPException(403, "This server does not start this workflow.")
        try:
            inputs = structure_inputs(session, workflow, body.inputs)
        except InvalidInputs as error:
            raise HTTPException(422, error.problem) from error

        key = None
        if idempotency_key is not None:
            if settings(session).starts is None:
                logger.warning("ignored an Idempotency-Key: pass starts= to Session to honour it")
            else:
                key = _stored_key(idempotency_key, client)

        start = session.start(workflow, inputs, key=key)
        started = await _started(request, start)
        content = {"execution_id": str(started.id)}
        if tickets is not None:
            content["ticket"] = tickets.issue(started)
        if started.warning is not None:
            content["warning"] = started.warning
        # Relative, so that it works behind a proxy that removes a prefix.
        location = f"executions/{started.id}"
        status = 201 if started.is_new else 200
        return json_response(content, status, {"Location": location})


async def _started(request: Request, start: Awaitable[Execution]) -> Execution:
    try:
        return await _unless_disconnected(request, start)
    except InvalidInputs as error:
        raise HTTPException(422, error.problem) from error
    except PromptLayerExecError:
        raise
    except (TypeError, ValueError) as error:  # an input is not JSON, such as NaN
        raise HTTPException(422, str(error)) from error


def _stored_key(header: str, client: object) -> str:
    """Return the key for an `Idempotency-Key`, which differs from all keys in code.

    Args:
        header: the value of the header, bare or as a string of RFC 8941.
        client: the value from `authorize`. The keys of different str never meet.
    """
    key = header.strip()
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = re.sub(r'\\(["\\])', r"\1", key[1:-1])

    owner = ""
    if isinstance(client, str):
        owner = hashlib.sha256(client.encode("utf-8", "surrogatepass")).hexdigest()
    try:
        if 1 <= len(key) <= 255:
            return check_key(f"http:{owner}:{key}")
    except ValueError:  # the server lets NUL through
        pass
    raise HTTPException(400, "Idempotency-Key must be 1 to 255 characters.")


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, and cancel it when the client disconnects, which no server does by itself."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(wait_for_disconnect())
    is_answered = False
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        is_answered = not leaving.done()
    finally:
        leaving.cancel()
        if not is_answered:
            working.cancel()
            working.add_done_callback(_end_unanswered)
    if not is_answered:  # nginx's "client closed request": only the access log shows it
        raise HTTPException(499, "The client disconnected.")
    return working.result()


def _end_unanswered(work: asyncio.Future[Any]) -> None:
    """Report a run that this process started for a client that is gone. Nobody needs its error."""
    if work.cancelled() or work.exception() is not None:
        return
    execution = work.result()
    if isinstance(execution, Execution) and execution.is_new:
        report_undelivered(execution)
