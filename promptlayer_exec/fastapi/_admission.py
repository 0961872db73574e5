"""Which executions of a list a client may read, as `authorize` decides for each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Sequence
from http.client import responses
from typing import Any

import attrs
from fastapi import Request
from fastapi.params import Depends
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Message

_ASKED_AT_ONCE = 10


@attrs.frozen
class Refusal:
    """Why a client may not read one execution."""

    status: int
    message: str

    def data(self, execution_id: int) -> dict[str, Any]:
        """Return the data of the event `failure`."""
        return {
            "execution_id": str(execution_id),
            # Not `Forbidden`, which is PromptLayer's 403 about the API key.
            "type": "Refused",
            "message": self.message,
            "status": self.status,
            "last": None,
        }


class RequestRefused(Exception):
    """One of the responses concerns the whole request.

    Attributes:
        response: the response to send.
    """

    def __init__(self, response: Response) -> None:
        self.response = response
        super().__init__(response.status_code)


@attrs.define(eq=False)
class Admission:
    """Asks `authorize` about executions one by one, with all its dependencies.

    FastAPI resolves dependencies once for each request, so each question is a request to a route
    that belongs to no app, with the path parameter `execution_id`.
    """

    _route_class: type[APIRoute]
    _dependencies: Sequence[Depends]
    # By the app, which may override dependencies, and the names of the path's parameters.
    _routes: dict[tuple[Any, ...], APIRoute] = attrs.field(init=False, factory=dict)

    async def refusals(
        self, request: Request, execution_ids: Collection[int]
    ) -> dict[int, Refusal]:
        """Return the executions that the client may not read.

        Raises:
            RequestRefused: one of them failed temporarily, so there is no decision.
        """
        slots = asyncio.Semaphore(_ASKED_AT_ONCE)

        async def ask(execution_id: int) -> Response:
            async with slots:
                return await self._ask(request, execution_id)

        asking = [asyncio.ensure_future(ask(one)) for one in execution_ids]
        try:
            answers = await asyncio.gather(*asking)
        finally:
            for task in asking:
                task.cancel()

        refused = {}
        for execution_id, response in zip(execution_ids, answers, strict=True):
            if response.status_code >= 500 or response.status_code in (408, 425, 429):
                raise RequestRefused(response)
            if response.status_code != 204:
                refused[execution_id] = _refusal(response)
        return refused

    async def _ask(self, request: Request, execution_id: int) -> Response:
        parameters = {**request.path_params, "execution_id": str(execution_id)}
        route = self._route(request.app, tuple(parameters))
        scope = {
            **request.scope,
            "path_params": parameters,
            # Concurrent questions must not see what others store here.
            "state": dict(request.scope.get("state", {})),
        }
        messages: list[Message] = []

        async def send(message: Message) -> None:
            messages.append(message)

        await route.handle(scope, request.receive, send)
        response = Response(
            b"".join(message.get("body", b"") for message in messages), messages[0]["status"]
        )
        response.raw_headers = messages[0]["headers"]
        return response

    def _route(self, app: Any, parameters: tuple[str, ...]) -> APIRoute:
        """Return the route to ask, because creating one takes longer than asking it."""
        route = self._routes.get((app, *parameters))
        if route is None:
            # FastAPI treats any parameter that is not in the path as a query parameter.
            path = "".join(f"/{{{name}}}" for name in parameters)
            route = self._routes[(app, *parameters)] = self._route_class(
                path,
                _admitted,
                status_code=204,
                dependencies=self._dependencies,
                dependency_overrides_provider=app,
            )
        return route


async def _admitted() -> None:
    """Respond 204: all dependencies let the request through."""


def _refusal(response: Response) -> Refusal:
    message = responses.get(response.status_code, "Refused")
    try:
        problem = json.loads(bytes(response.body))
        message = str(problem.get("detail") or problem.get("title") or message)
    except (AttributeError, ValueError):  # the app may respond in its own format
        pass
    return Refusal(response.status_code, message)
