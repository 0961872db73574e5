"""Matches callbacks with lost starts. No HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import attrs

from promptlayer_exec._engine.abandoned import warn_of_run
from promptlayer_exec._engine.expiring import ExpiringDict
from promptlayer_exec._engine.retry import RecentRuns
from promptlayer_exec._engine.tasks import resolve
from promptlayer_exec._values.errors import StartUnknown
from promptlayer_exec._values.events import Emit, ExecutionStarted
from promptlayer_exec._values.models import StartRequest

if TYPE_CHECKING:
    from promptlayer_exec.webhooks import Callbacks


def with_callback_url(
    request: StartRequest, callbacks: Callbacks | None, token: str | None = None
) -> tuple[StartRequest, str | None]:
    """Return a request with a callback URL, and its token. None if the caller chose the URL."""
    if callbacks is None or request.callback_url is not None:
        return request, None
    token = token or callbacks.new_token()
    return attrs.evolve(request, callback_url=callbacks.url_for(token)), token


def recoverable_token(error: StartUnknown, callbacks: Callbacks | None) -> str:
    """Return the token that identifies the callback of a lost start."""
    if not isinstance(error, StartUnknown):
        raise TypeError(f"error must be a StartUnknown, not {error!r:.100}")

    token = error.callback_token
    if token is None:
        raise ValueError(
            "cannot recover this run, because its start request did not have its own callback URL."
            " Pass callbacks= to Session, and no callback_url= to start()"
        )
    if callbacks is not None and not callbacks.is_genuine(token):
        raise ValueError(
            "this start request has a different secret. Recover its run in a session whose"
            " callbacks= has that secret"
        )
    return token


@attrs.frozen
class _LostResponse:
    """A request whose response was lost, without its inputs, because they may be large."""

    request: StartRequest
    base_url: str
    called_at: float


@attrs.define(eq=False)
class CallbackLog:
    """Matches callbacks with lost responses, by their tokens.

    Either may come first, and may come several times. Only the first callback counts. The log
    reports it once, even if nobody waits for it.
    """

    _emit: Emit
    _recent_runs: RecentRuns
    # Passes a callback on to other processes.
    share: Callable[[str, int], object] = attrs.field(init=False, default=lambda *_: None)
    _callbacks: ExpiringDict[str, int] = attrs.field(
        init=False, factory=partial(ExpiringDict, 3600.0)
    )
    _lost: ExpiringDict[str, _LostResponse] = attrs.field(init=False, factory=ExpiringDict)
    _waiters: dict[str, set[asyncio.Future[None]]] = attrs.field(init=False, factory=dict)

    def lost_tokens(self) -> list[str]:
        """Return the tokens of lost starts whose callback has not arrived."""
        return [token for token in self._lost if self.execution_id(token) is None]

    def receive(self, token: str, execution_id: int, *, shared: bool = False) -> None:
        """Record a callback. Another process received a `shared` one."""
        if self.execution_id(token) is None:
            self._callbacks.add(token, execution_id)
            self._report(token)
            for future in self._waiters.get(token, ()):
                resolve(future)
            if not shared:
                self.share(token, execution_id)

    def lose(self, token: str, request: StartRequest, base_url: str, elapsed: float = 0.0) -> None:
        """Record that the response to a request was lost, `elapsed` seconds after its call."""
        if self._lost.get(token) is None:
            request = attrs.evolve(request, inputs={})
            self._lost.add(token, _LostResponse(request, base_url, time.monotonic() - elapsed))
            self._report(token)

    def execution_id(self, token: str) -> int | None:
        """Return the execution id for a token, if its callback has arrived."""
        return self._callbacks.get(token)

    async def wait(self, token: str) -> int:
        """Wait for a run's callback, and return its execution id."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(token, set())
        waiters.add(future)

        try:
            while (execution_id := self.execution_id(token)) is None:
                await future
        except asyncio.CancelledError:
            self._warn(token)  # the callback may have arrived at the same time
            raise
        finally:
            waiters.discard(future)
            if not waiters:
                self._waiters.pop(token, None)

        return execution_id

    def _report(self, token: str) -> None:
        """Report the run of a lost start, if its callback has arrived."""
        execution_id, start = self.execution_id(token), self._lost.get(token)
        if execution_id is None or start is None:
            return

        # The server may still return 404 for it.
        self._recent_runs.add(execution_id, start.request.workflow, now=time.monotonic())
        if token not in self._waiters:
            self._warn(token)

        self._emit(
            ExecutionStarted(
                execution_id,
                start.request,
                abandoned=False,
                duration=time.monotonic() - start.called_at,
                recovered=True,
                base_url=start.base_url,
            )
        )

    def _warn(self, token: str) -> None:
        execution_id, start = self.execution_id(token), self._lost.get(token)
        if execution_id is not None and start is not None:
            warn_of_run(
                "execution %d of workflow %.100r did start, although the response was lost."
                " session.execution(%d) picks it up",
                execution_id,
                start.request.workflow,
                execution_id,
            )
