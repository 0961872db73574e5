"""The callbacks that arrived, and the starts whose runs they prove. It knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, TypeVar

import attrs

from promptlayer_exec._engine.retry import RecentStarts
from promptlayer_exec._engine.tasks import resolve
from promptlayer_exec._errors import StartUnknown
from promptlayer_exec._events import Emit, ExecutionStarted, logger
from promptlayer_exec._models import StartRequest

if TYPE_CHECKING:
    from promptlayer_exec.webhooks import Callbacks

T = TypeVar("T")

# For how long a callback is remembered.
_SECONDS = 3600.0
# How many callbacks are remembered, how many starts whose answers were lost, and how many others.
_MOST = 10_000
# How many lost starts are remembered with their inputs, which may be large.
_MOST_INPUTS = 100
# How many runs of one start are reported: whoever has its token can name any number of them.
_MOST_RUNS = 100


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
    """The ids that a start's callbacks named, and which were reported; when the first arrived."""

    ids: dict[int, bool]
    at: float

    @property
    def execution_id(self) -> int:
        return next(iter(self.ids))


@attrs.define
class _EndedStart:
    """A start that has ended: with an answer, with a lost one, or with a failure.

    Attributes:
        execution_id: the id in the answer, or in the first callback.
    """

    request: StartRequest
    base_url: str
    called_at: float
    execution_id: int | None = None
    is_lost: bool = False

    def drop_inputs(self) -> None:
        self.request = StartRequest(self.request.workflow, key=self.request.key)

    def describe_run(self, other: int | None) -> str:
        if other is not None:
            return f"was begun by the same start as execution {other}"
        return f"had started, although its {'answer was lost' if self.is_lost else 'start failed'}"


@attrs.define(eq=False)
class CallbackLog:
    """Brings together callbacks and starts, by the starts' tokens.

    Either may come first, and each may be recorded several times. A callback proves a run. If the
    start's answer was lost, or did not name that run, the run is reported once, even if nobody
    waits for it: a proxy may refuse a start that it has passed on, and a start that is sent again
    after a 429 may begin a second run. The first callback is the one that recovers a lost start.
    """

    _emit: Emit
    _recent_starts: RecentStarts
    _callbacks: dict[str, _Callback] = attrs.field(init=False, factory=dict)  # oldest first
    # Without a callback. Apart from the others, so that those cannot drive them out.
    _lost: dict[str, _EndedStart] = attrs.field(init=False, factory=dict)
    _settled: dict[str, _EndedStart] = attrs.field(init=False, factory=dict)
    _with_inputs: deque[_EndedStart] = attrs.field(init=False, factory=deque)  # oldest first
    _waiters: dict[str, set[asyncio.Future[None]]] = attrs.field(init=False, factory=dict)

    def receive(self, token: str, execution_id: int) -> None:
        """Record a callback."""
        if (callback := self._find(token)) is None:
            _put(self._callbacks, token, _Callback({execution_id: False}, time.monotonic()))
        elif len(callback.ids) < _MOST_RUNS:
            callback.ids.setdefault(execution_id, False)
        self._report(token)
        for future in self._waiters.get(token, ()):
            resolve(future)

    def begin(self, token: str) -> None:
        """Record that a start is sent, perhaps not for the first time."""
        self._settled.pop(token, None)
        self._lost.pop(token, None)

    def _drop_waiters_of_closed_loops(self, token: str) -> None:
        # This log outlives event loops, and one that was stopped and closed ended no `wait`.
        if waiters := self._waiters.pop(token, None):
            living = {future for future in waiters if not future.get_loop().is_closed()}
            if living:
                self._waiters[token] = living

    def lose(self, token: str, request: StartRequest, base_url: str, elapsed: float = 0.0) -> None:
        """Record that a start's answer was lost, `elapsed` seconds after its call."""
        if token not in self._lost and token not in self._settled:
            called_at = time.monotonic() - elapsed
            start = _EndedStart(request, base_url, called_at, is_lost=True)
            _put(self._lost, token, start)
            self._with_inputs.append(start)
            if len(self._with_inputs) > _MOST_INPUTS:
                self._with_inputs.popleft().drop_inputs()
            self._report(token)  # last, because an observer may be interrupted

    def settle(
        self,
        token: str,
        request: StartRequest,
        base_url: str,
        execution_id: int | None,
        elapsed: float,
    ) -> None:
        """Record an answer, or with None a failure, `elapsed` seconds after the start's call."""
        called_at = time.monotonic() - elapsed
        start = _EndedStart(request, base_url, called_at, execution_id)
        start.drop_inputs()
        _put(self._settled, token, start)
        self._report(token)

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
        if (callback := self._find(token)) is None:
            return
        if (lost := self._lost.pop(token, None)) is not None:
            _put(self._settled, token, lost)
        if (start := self._settled.get(token)) is None:
            return
        if start.execution_id is not None:
            callback.ids[start.execution_id] = True
        for execution_id in [it for it, is_reported in callback.ids.items() if not is_reported]:
            other = next((it for it, is_reported in callback.ids.items() if is_reported), None)
            callback.ids[execution_id] = True  # first, because an observer may be interrupted
            # The server may still answer 404 for it.
            self._recent_starts.add(execution_id, start.request.workflow, now=time.monotonic())
            is_awaited = start.is_lost and other is None and token in self._waiters
            if not is_awaited:
                logger.warning(
                    "execution %d of workflow %.100r %s; follow it by its id",
                    execution_id,
                    start.request.workflow,
                    start.describe_run(other),
                )
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
        start.execution_id = start.execution_id or callback.execution_id  # to be reported once
        start.drop_inputs()


def _put(log: dict[str, T], token: str, entry: T) -> None:
    log[token] = entry
    if len(log) > _MOST:
        del log[next(iter(log))]
