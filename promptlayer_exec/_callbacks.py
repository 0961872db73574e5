"""The callbacks that arrived, and the starts whose runs they prove. It knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

import attrs

from promptlayer_exec._errors import StartUnknown
from promptlayer_exec._events import Emit, ExecutionStarted, logger
from promptlayer_exec._models import StartRequest
from promptlayer_exec._tasks import resolve

if TYPE_CHECKING:
    from promptlayer_exec.webhooks import Callbacks

T = TypeVar("T")

# For how long a callback is remembered, and how many callbacks, lost and other starts are.
_SECONDS = 3600.0
_MOST = 10_000


def with_callback_url(
    request: StartRequest, callbacks: Callbacks | None, token: str | None = None
) -> tuple[StartRequest, str | None]:
    """Return a start with a callback URL of its own, and the token in it.

    A start that has a URL already keeps it, and then there is no token.
    """
    if callbacks is None or request.callback_url is not None:
        return request, None
    token = token or callbacks.new_token()
    return attrs.evolve(request, callback_url=callbacks.url_for(token)), token


def recoverable_token(error: StartUnknown, callbacks: Callbacks | None) -> str:
    """Return the token by which the callback of a lost start can be recognized."""
    if not isinstance(error, StartUnknown):
        raise TypeError(f"error must be a StartUnknown, not {error!r:.100}")
    token = error.callback_token
    if token is None:
        raise ValueError(
            "this start cannot be recovered, as it had no callback URL of its own: pass callbacks="
            " to Session, and no callback_url= to the start"
        )
    if callbacks is not None and not callbacks.is_genuine(token):
        raise ValueError(
            "this start was sent with other callbacks: recover it in a session with the same secret"
        )
    return token


@attrs.define
class _Callback:
    """The ids that callbacks told, when the first arrived, and whether it was reported."""

    ids: list[int]
    at: float
    is_reported: bool = False

    @property
    def execution_id(self) -> int:
        return self.ids[0]


@attrs.define
class _Settled:
    """A start of which is known what came of it, and the ids of its runs: none if it failed."""

    request: StartRequest
    base_url: str
    called_at: float
    ids: list[int]


@attrs.define(eq=False)
class CallbackLog:
    """Brings together callbacks and starts, by the starts' tokens.

    Either may come first, and each may be recorded several times. The first callback of a start
    whose answer was lost counts: the start is reported as recovered once, even if nobody waits for
    it. A callback may also prove a run that the start's answer denied: a refusal may come from a
    proxy, and the start that is sent again after a 429 begins a second run.
    """

    _emit: Emit
    _callbacks: dict[str, _Callback] = attrs.field(init=False, factory=dict)  # oldest first
    _lost: dict[str, tuple[StartRequest, str, float]] = attrs.field(init=False, factory=dict)
    _settled: dict[str, _Settled] = attrs.field(init=False, factory=dict)
    _waiters: dict[str, set[asyncio.Future[None]]] = attrs.field(init=False, factory=dict)

    def receive(self, token: str, execution_id: int) -> None:
        """Record a callback."""
        if (callback := self._find(token)) is None:
            _put(self._callbacks, token, _Callback([execution_id], time.monotonic()))
        elif execution_id not in callback.ids:
            callback.ids.append(execution_id)
        self._report(token)
        self._report_denied(token)
        for future in self._waiters.get(token, ()):
            resolve(future)

    def _drop_waiters_of_closed_loops(self, token: str) -> None:
        # This log outlives event loops, and one that was stopped and closed ended no `wait`.
        if waiters := self._waiters.pop(token, None):
            living = {future for future in waiters if not future.get_loop().is_closed()}
            if living:
                self._waiters[token] = living

    def lose(self, token: str, request: StartRequest, base_url: str, elapsed: float = 0.0) -> None:
        """Record that a start's answer was lost, `elapsed` seconds after its call."""
        callback = self._find(token)
        if token in self._lost or (callback is not None and callback.is_reported):
            return
        _put(self._lost, token, (request, base_url, time.monotonic() - elapsed))
        self._report(token)

    def settle(
        self,
        token: str,
        request: StartRequest,
        base_url: str,
        execution_id: int | None = None,
        elapsed: float = 0.0,
    ) -> None:
        """Record the id in the answer to a start, or that it failed, `elapsed` seconds after it."""
        # Inputs may be large, and most starts never need this.
        request = StartRequest(request.workflow, key=request.key)
        ids = [] if execution_id is None else [execution_id]
        called_at = time.monotonic() - elapsed
        _put(self._settled, token, _Settled(request, base_url, called_at, ids))
        self._report_denied(token)

    def execution_id(self, token: str) -> int | None:
        """Return the execution id of a start whose callback has come."""
        callback = self._find(token)
        return None if callback is None else callback.execution_id

    async def wait(self, token: str) -> int:
        """Wait for the callback of a start, and return its execution id."""
        while (callback := self._find(token)) is None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.setdefault(token, set()).add(future)
            try:
                await future
            except BaseException:
                if (callback := self._find(token)) is not None:  # it came in this loop step
                    logger.warning(
                        "execution %d had started, although its answer was lost, but its caller"
                        " did not get the handle; follow it by its id",
                        callback.execution_id,
                    )
                raise
            finally:
                self._waiters.get(token, set()).discard(future)
                self._drop_waiters_of_closed_loops(token)
        return callback.execution_id

    def _find(self, token: str) -> _Callback | None:
        too_old = time.monotonic() - _SECONDS
        while self._callbacks and next(iter(self._callbacks.values())).at < too_old:
            del self._callbacks[next(iter(self._callbacks))]
        return self._callbacks.get(token)

    def _report(self, token: str) -> None:
        self._drop_waiters_of_closed_loops(token)
        callback = self._find(token)
        if callback is None or token not in self._lost:
            return
        request, base_url, called_at = self._lost.pop(token)
        callback.is_reported = True
        execution_id = callback.execution_id
        if token not in self._waiters:
            logger.warning(
                "execution %d of workflow %.100r had started, although its answer was lost;"
                " follow it by its id",
                execution_id,
                request.workflow,
            )
        elapsed = time.monotonic() - called_at
        self._emit_recovered(execution_id, request, base_url, elapsed)
        self.settle(token, request, base_url, execution_id, elapsed)

    def _report_denied(self, token: str) -> None:
        callback, settled = self._find(token), self._settled.get(token)
        if callback is None or settled is None:
            return
        for execution_id in callback.ids:
            if execution_id in settled.ids:
                continue
            why = "although its start failed"
            if settled.ids:
                why = f"too, by the same start as execution {settled.ids[0]}"
            settled.ids.append(execution_id)
            logger.warning(
                "execution %d of workflow %.100r had started, %s; follow it by its id",
                execution_id,
                settled.request.workflow,
                why,
            )
            elapsed = time.monotonic() - settled.called_at
            self._emit_recovered(execution_id, settled.request, settled.base_url, elapsed)

    def _emit_recovered(
        self, execution_id: int, request: StartRequest, base_url: str, duration: float
    ) -> None:
        self._emit(
            ExecutionStarted(
                execution_id,
                request,
                abandoned=False,
                duration=duration,
                recovered=True,
                base_url=base_url,
            )
        )


def _put(log: dict[str, T], token: str, entry: T) -> None:
    log[token] = entry
    if len(log) > _MOST:
        del log[next(iter(log))]
