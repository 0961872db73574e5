"""Tickets: signed permissions to read one execution."""

from __future__ import annotations

import hashlib
import time

from itsdangerous import BadData, URLSafeSerializer
from starlette.requests import HTTPConnection

from promptlayer_exec import Execution
from promptlayer_exec import _integration as integration
from promptlayer_exec.webhooks import check_secret


class Tickets:
    """Issues signed tickets, each of which allows to read one execution until it expires.

    All processes of an app need the same secret. A ticket contains the execution's id and, if the
    session started the run, its workflow, which whoever has the ticket can read.

    Args:
        secret: signs the tickets: a long random text.
        lifetime: for how many seconds a ticket is valid; it should exceed any run's duration.

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

    def issue(self, execution: Execution) -> str:
        """Return a new ticket for an execution.

        Issue the ticket of a new run when it has started: other processes then know that
        PromptLayer may answer 404 for the run's first seconds.
        """
        contents = [str(execution.id), execution.workflow, round(time.time(), 3)]
        return str(self._serializer.dumps(contents))

    def read(
        self, request: HTTPConnection, execution_id: int | str
    ) -> tuple[str | int | None, float] | None:
        """Return what a request's ticket says: the workflow, if known, and its age in seconds.

        The ticket is in the query, as `ticket`, or a bearer token. None means that the request has
        no valid one for the execution. The routes of `create_router` call this themselves.
        """
        scheme, _, ticket = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            ticket = ""
        ticket = request.query_params.get("ticket", ticket)

        try:
            contents = self._serializer.loads(ticket)
        except BadData:
            return None

        issued_for, workflow, issued = contents
        # The clocks of an app's servers differ a little, so it may come from the future.
        age = max(0.0, time.time() - issued)
        if issued_for != str(execution_id) or age >= self._lifetime:
            return None
        return workflow, age
