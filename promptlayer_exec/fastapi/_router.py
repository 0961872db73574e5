"""Routes for executions, for those whom the app lets in."""

from collections.abc import Awaitable, Callable, Collection
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import APIRouter, Depends, Header, HTTPException, Path, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from promptlayer_exec import PromptLayerExecError, Session

from ._events import execution_events
from ._json import dump_json
from ._problems import ProblemRoute

T = TypeVar("T")

_ExecutionId = Annotated[int, Path(ge=1, le=2**63 - 1)]
_PROBLEM = {"description": "A problem (RFC 9457)", "content": {"application/problem+json": {}}}
_SEEN = {"description": "By its `Last-Event-ID`, the client has seen the end"}
_EVENTS = {"description": "The events", "content": {"text/event-stream": {}}}


class _Start(BaseModel):
    """A run to be started."""

    model_config = ConfigDict(extra="forbid", title="Start")

    workflow: str
    inputs: dict[str, Any] = {}


def create_router(
    session: Callable[..., Any],
    *,
    authorize: Callable[..., Any],
    workflows: Collection[str] = (),
) -> APIRouter:
    """Return the routes to see executions, and to start those of some workflows.

    `GET /executions/{execution_id}`, `.../events`, `.../output`, and `POST /executions` if there
    are `workflows`. Errors are problem+json (RFC 9457).

    Args:
        session: a dependency that returns the open `Session`.
        authorize: a dependency that raises an `HTTPException`, or returns False, for whom it does
            not let in. It may declare the request, and `execution_id: int | None = None`. What it
            holds by a `yield` of its own is released before an event is sent.
        workflows: the names of those that may be started.

    Raises:
        TypeError: `authorize` is no callable, or `workflows` is one string.
    """
    if not callable(authorize):
        raise TypeError(f"authorize is a dependency, not {authorize!r:.100}")
    if isinstance(workflows, str):
        raise TypeError(f"workflows takes several names: write [{workflows!r:.100}]")
    allowed = frozenset(workflows)

    async def admit(verdict: Annotated[Any, Depends(authorize, scope="function")]) -> None:
        if verdict is False:
            raise HTTPException(403)

    router = APIRouter(
        route_class=ProblemRoute,
        dependencies=[Depends(_refuse_id_in_query), Depends(admit)],
        responses={"4XX": _PROBLEM, "5XX": _PROBLEM},
        tags=["executions"],
    )
    _add_looks(router, session)
    if allowed:
        _add_start(router, session, allowed)
    return router


async def _refuse_id_in_query(request: Request) -> None:
    # Where no path has the id, FastAPI would let `authorize` take it from the query: a client that
    # may see one execution could so pass for one that may start another.
    if "execution_id" in request.query_params:
        raise HTTPException(400, "execution_id is no query parameter.")


def _add_looks(router: APIRouter, get_session: Callable[..., Any]) -> None:
    @router.get("/executions/{execution_id}")
    async def get_execution(
        request: Request,
        execution_id: _ExecutionId,
        session: Annotated[Session, Depends(get_session)],
    ) -> Response:
        """Return all nodes of an execution as they are now."""
        execution = session.execution(execution_id)
        return _json((await _unless_gone(request, execution.snapshot())).to_dict())

    @router.get("/executions/{execution_id}/events", responses={200: _EVENTS, 204: _SEEN})
    async def get_events(
        request: Request,
        execution_id: _ExecutionId,
        session: Annotated[Session, Depends(get_session)],
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> Response:
        """Follow an execution by Server-Sent Events: `snapshot`, `node`, `complete`, `failure`."""
        execution = session.execution(execution_id)
        events = execution_events(execution, last_event_id=last_event_id)
        return await _unless_gone(request, events)

    @router.get("/executions/{execution_id}/output")
    async def get_output(
        request: Request,
        execution_id: _ExecutionId,
        session: Annotated[Session, Depends(get_session)],
    ) -> Response:
        """Wait until an execution is complete, and return its main output."""
        execution = session.execution(execution_id)
        return _json(await _unless_gone(request, execution.output()))


def _add_start(
    router: APIRouter, get_session: Callable[..., Any], allowed: Collection[str]
) -> None:
    @router.post("/executions", status_code=201)
    async def start_execution(
        request: Request, body: _Start, session: Annotated[Session, Depends(get_session)]
    ) -> Response:
        """Start an execution of a workflow; `Location` tells where to see it."""
        if body.workflow not in allowed:
            raise HTTPException(403, "This workflow cannot be started here.")
        try:
            started = await _unless_gone(request, session.start(body.workflow, body.inputs))
        except PromptLayerExecError:
            raise
        except (TypeError, ValueError) as error:  # what JSON cannot carry, such as NaN
            raise HTTPException(422, str(error)) from error
        # Relative, so that it holds under any prefix that a proxy takes away.
        location = f"executions/{started.id}"
        return _json({"execution_id": str(started.id)}, 201, Location=location)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it when the client goes: no server does that by itself."""
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_cancel_when_gone, request, tasks.cancel_scope)
        try:
            return await work
        except Exception as error:  # noqa: BLE001 - it shall not come out in an ExceptionGroup
            failure = error
        finally:
            tasks.cancel_scope.cancel()
    # nginx's "client closed request": nobody reads it but the access log.
    raise failure or HTTPException(499, "The client is gone.")


async def _cancel_when_gone(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _json(value: Any, status: int = 200, **headers: str) -> Response:
    return Response(
        dump_json(value), status, {"Cache-Control": "no-store", **headers}, "application/json"
    )
