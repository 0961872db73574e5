"""Tickets: signed permissions to read executions."""

from __future__ import annotations

import hashlib
import time

from itsdangerous import BadData, URLSafeSerializer
from starlette.requests import HTTPConnection

from promptlayer_exec import Execution
from promptlayer_exec import _integration as integration
from promptlayer_exec.webhooks import check_secret


class Tickets:
    """Issues signed tickets, with which clients read certain executions until the ticket expires.

    All processes of an app need the same secret. A ticket contains the ids of the executions, and
    the workflows of runs that this session started. Anyone who has the ticket can read all of it.

    Args:
        secret: signs the tickets: a long random text.
        lifetime: how many seconds a ticket is valid. It should be longer than any run.

    Raises:
        ConfigurationError: `secret` is empty, or `lifetime` is not greater than 0.
        TypeError: `secret` is not a str.
    """

    def __init__(self, secret: str, *, lifetime: float = 3600.0) -> None:
        self._lifetime = integration.check_seconds("lifetime", lifetime, zero=False)
        self._serializer = URLSafeSerializer(
            check_secret(secret),
            salt="promptlayer_exec.fastapi.Tickets",
            signer_kwargs={"digest_method": hashlib.sha256},
        )

    def issue(self, *executions: Execution) -> str:
        """Return a new ticket for one execution, or for all executions that a page shows.

        Issue the ticket of a new run as soon as it has started. Other processes then retry the 404
        that PromptLayer may return for the first seconds.

        Args:
            executions: the executions that the ticket allows a client to read.
        """
        workflows = {str(execution.id): execution.workflow for execution in executions}
        return str(self._serializer.dumps([workflows, round(time.time(), 3)]))

    def read(
        self, request: HTTPConnection, execution_id: int | str
    ) -> tuple[str | int | None, float] | None:
        """Return the workflow, if known, and the age in seconds of a request's ticket.

        The ticket is `ticket` in the query, or a bearer token. None means that the request has no
        valid ticket for the execution. The routes of `create_router` call this themselves.
        """
        return self.read_all(request).get(str(execution_id))

    def read_all(self, request: HTTPConnection) -> dict[str, tuple[str | int | None, float]]:
        """Return what `read` returns, for each execution of all valid tickets, by its id.

        The query may contain several tickets.
        """
        tickets = request.query_params.getlist("ticket")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not tickets and scheme.lower() == "bearer":
            tickets = [token]

        found: dict[str, tuple[str | int | None, float]] = {}
        for ticket in tickets:
            try:
                workflows, issued = self._serializer.loads(ticket)
            except BadData:
                continue
            # The clocks of an app's servers differ a little, so it may be from the future.
            age = max(0.0, time.time() - issued)
            if age < self._lifetime:
                found |= {one: (workflow, age) for one, workflow in workflows.items()}
        return found
