"""Routes that read, follow and start executions, for the clients that the app authorizes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Annotated, Any, TypeVar, cast

import anyio
from fastapi import APIRouter, Depends, Header, HTTPException, Path, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from promptlayer_exec import Execution, PromptLayerExecError, Session
from promptlayer_exec._integration import MAX_ID, report_undelivered
from promptlayer_exec.fastapi._events import execution_events
from promptlayer_exec.fastapi._responses import PROBLEMS, ProblemRoute, json_response

T = TypeVar("T")

_ExecutionId = Annotated[int, Path(ge=1, le=MAX_ID)]
_SEEN = {"description": "The client has the last event already, as its `Last-Event-ID` says"}
_EVENTS = {"description": "The events", "content": {"text/event-stream": {}}}


class _Start(BaseModel):
    """A run to be started."""

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
    workflows: Collection[str] = (),
) -> APIRouter:
    """Return routes that read and follow executions, and start those of some workflows.

    The routes are `GET /executions/{execution_id}`, `.../events` and `.../output`, and
    `POST /executions` if there are `workflows`. Errors are problem+json (RFC 9457).

    Args:
        session: the open `Session`, or a dependency that returns it.
        authorize: a dependency that raises an `HTTPException` or returns False to refuse a request.
            It may declare the request, and `execution_id: int | None = None`. The code after a
            `yield` in it runs before an event is sent.
        workflows: the names of the workflows that may be started.

    Raises:
        TypeError: `session` or `authorize` is unusable, or `workflows` is a single string.
    """
    if not callable(authorize):
        raise TypeError(f"authorize must be a dependency, got {authorize!r:.100}")
    if isinstance(workflows, str):
        raise TypeError(f"workflows takes several names: write [{workflows!r:.100}]")
    # Dependencies that are not global cannot be named in annotations, which are strings here.
    authorized = Depends(authorize, scope="function")

    async def admit(verdict: Any = authorized) -> None:
        if verdict is False:
            raise HTTPException(403)

    router = APIRouter(
        route_class=ProblemRoute,
        dependencies=[Depends(_refuse_id_in_query), Depends(admit)],
        responses=PROBLEMS,
        tags=["executions"],
    )
    _add_routes(router, session_dependency(session), frozenset(workflows))
    return router


async def _refuse_id_in_query(request: Request) -> None:
    # On routes without an id in the path, FastAPI would pass `authorize` the one in the query: a
    # client that may see that execution could then start others.
    if "execution_id" in request.query_params:
        raise HTTPException(400, "execution_id is not a query parameter.")


def _add_routes(router: APIRouter, opened: Any, workflows: Collection[str]) -> None:
    async def find_execution(execution_id: _ExecutionId, session: Session = opened) -> Execution:
        return session.execution(execution_id)

    found = Depends(find_execution)

    @router.get("/executions/{execution_id}")
    async def get_execution(request: Request, execution: Execution = found) -> Response:
        """Return all nodes of an execution as they are now."""
        snapshot = await _unless_disconnected(request, execution.snapshot())
        return json_response(snapshot.to_dict())

    @router.get("/executions/{execution_id}/events", responses={200: _EVENTS, 204: _SEEN})
    async def get_events(
        request: Request,
        last_event_id: Annotated[str | None, Header()] = None,
        execution: Execution = found,
    ) -> Response:
        """Follow an execution by Server-Sent Events: `snapshot`, `node`, `complete`, `failure`."""
        events = execution_events(execution, last_event_id=last_event_id)
        return await _unless_disconnected(request, events)

    @router.get("/executions/{execution_id}/output")
    async def get_output(request: Request, execution: Execution = found) -> Response:
        """Wait until an execution is complete, and return its main output."""
        return json_response(await _unless_disconnected(request, execution.output()))

    if not workflows:
        return

    @router.post("/executions", status_code=201)
    async def start_execution(
        request: Request, body: _Start, session: Session = opened
    ) -> Response:
        """Start an execution of a workflow; `Location` is where to read it.

        The server's `warning`, such as of a missing input, is in the response if there is one.
        """
        if body.workflow not in workflows:
            raise HTTPException(403, "This workflow cannot be started here.")
        try:
            start = session.start(body.workflow, body.inputs)
            started = await _unless_disconnected(request, start)
        except PromptLayerExecError:
            raise
        except (TypeError, ValueError) as error:  # an input is missing, or is no JSON, such as NaN
            raise HTTPException(422, str(error)) from error
        # Relative, so that it is correct under any prefix that a proxy removes.
        location = f"executions/{started.id}"
        answer = {"execution_id": str(started.id), "warning": started.warning}
        answer = {name: value for name, value in answer.items() if value is not None}
        return json_response(answer, 201, {"Location": location})


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, and cancel it when the client disconnects: no server does that itself."""
    is_disconnected = False

    async def cancel_on_disconnect() -> None:
        nonlocal is_disconnected
        while (await request.receive())["type"] != "http.disconnect":
            pass
        is_disconnected = True
        tasks.cancel_scope.cancel()

    result: T | None = None
    failure: Exception | None = None
    is_answered = False
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_on_disconnect)
            try:
                result = await work
            except Exception as error:  # noqa: BLE001 - raised below, so not in an ExceptionGroup
                failure = error
            finally:
                tasks.cancel_scope.cancel()
        is_answered = not is_disconnected
    finally:
        if isinstance(result, Execution) and not is_answered:
            report_undelivered(result)
    if failure is not None:
        raise failure
    if is_disconnected:  # nginx's "client closed request": only the access log shows it
        raise HTTPException(499, "The client disconnected.")
    return cast(T, result)
