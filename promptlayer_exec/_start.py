"""Starting a run: the one request that must be neither repeated nor forgotten. It knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from promptlayer_exec._errors import (
    ExecutionTimeout,
    RequestError,
    SessionClosed,
    StartUnknown,
    StatusError,
)
from promptlayer_exec._events import Emit, ExecutionStarted, logger
from promptlayer_exec._models import StartRequest
from promptlayer_exec._policies import Deadline, Outage
from promptlayer_exec._tasks import is_cancelled, stray

if TYPE_CHECKING:
    from promptlayer_exec._wire import Started


Clearance = Callable[[], Awaitable[None]]


class Post(Protocol):
    """Sends the request, again only where it cannot have started a run, and reads the answer."""

    async def __call__(self, outage: Outage, departure: Start) -> Started:
        """Return what the server answered."""


class Start:
    """One run to be started, in a task of its own: its caller may go, but not the answer.

    Until the request leaves, it ends with its caller, with the session, or at the deadline. From
    then on it is read to its end, and what came of it is reported to whoever is still there.

    Args:
        request: what to start.
        post: sends it.
        outage: keeps account of the failures.
        emit: told of the execution.
        is_closing: whether the session is being closed.
        clearance: awaited once its turn has come, and before the request leaves.
    """

    def __init__(
        self,
        request: StartRequest,
        post: Post,
        outage: Outage,
        *,
        emit: Emit,
        is_closing: Callable[[], bool],
        clearance: Clearance | None = None,
    ) -> None:
        self.left = False
        self.called_off = False
        self._request = request
        self._post = post
        self._outage = outage
        self._emit = emit
        self._is_closing = is_closing
        self._called_at = anyio.current_time()
        self._clearance = clearance
        self._answer: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[Any] | None = None
        self._scope = anyio.CancelScope()
        self._expired: Deadline | None = None

    async def result(self, deadline: Deadline) -> Started:
        """Wait for the answer; once the request has left, the deadline does not matter any more.

        Raises:
            StartUnknown: the answer was lost, so the run may have started.
            RequestError: the server refused, or could not be reached.
            ExecutionTimeout: the request could not leave before the deadline.
            SessionClosed: the session was closed; with the execution's id if it started.
        """
        loop = asyncio.get_running_loop()
        timer = None
        if deadline.timeout is not None:
            timer = loop.call_at(deadline.at, self._expire, deadline)
        try:
            started = await self._answer
        except (asyncio.CancelledError, GeneratorExit):
            self._answer.cancel()
            self._abandon()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        self._report(started, abandoned=False)
        return started

    async def run(self) -> None:
        """Send the request and see to its answer."""
        self._task = asyncio.current_task()
        self._stop_unneeded()
        try:
            with self._scope:
                started = await self._post(self._outage, self)
        except asyncio.CancelledError as error:
            # Not passed on: it would end the task group, and with it the session.
            self._fail(self._cancelled(error))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the caller
            self._fail(self._cancelled(error) if self.called_off else self._judge(error))
        else:
            self._succeed(started)

    async def clear(self) -> None:
        """Wait for the clearance, where there is one."""
        if self._clearance is not None:
            await self._clearance()

    def leave(self) -> None:
        """Take note that the request leaves now; not if it was called off a moment ago."""
        if self._task is None or self._task.cancelling():
            self.called_off = True
            raise ConnectionAbortedError("called off before it left")
        self.left = True
        self._scope.shield = True

    def come_back(self) -> None:
        """Take note that the server refused the request, and started nothing."""
        self.left = False
        self._scope.shield = False
        self._stop_unneeded()

    def _expire(self, deadline: Deadline) -> None:
        self._expired = deadline
        self._stop_unneeded()

    def _stop_unneeded(self) -> None:
        is_needed = self._expired is None and not self._answer.cancelled()
        if self._task is not None and not self.left and not is_needed:
            # Not by the scope: that would let a step pass in which the request may leave.
            self._task.cancel()

    def _abandon(self) -> None:
        """See to what came, or will come, of a start whose caller is cancelled."""
        if self._answer.cancelled():
            self._stop_unneeded()
        elif (error := self._answer.exception()) is None:
            self._report(self._answer.result(), abandoned=True)
        else:
            self._warn(error)

    def _succeed(self, started: Started) -> None:
        if self._answer.cancelled():
            self._report(started, abandoned=True)
        elif self._is_closing():
            self._report(started, abandoned=True)
            self._answer.set_exception(SessionClosed(execution_id=started.execution_id))
        else:
            self._answer.set_result(started)

    def _fail(self, error: BaseException) -> None:
        if self._answer.cancelled():
            self._warn(error)
        else:
            self._answer.set_exception(error)

    def _judge(self, error: BaseException) -> BaseException:
        """Return what a failure means: was it told that no run started?"""
        if not isinstance(error, RequestError):  # a limiter's, or a borrowed session's hook's
            reason = f"{type(error).__name__}: {error}"
            return self._unknown(reason, error) if self.left else error
        if isinstance(error, StatusError):
            is_lost = error.status >= 500 or error.status == HTTPStatus.REQUEST_TIMEOUT
        else:
            is_lost = self.left
        return self._unknown(error._what(), error) if is_lost else error

    def _cancelled(self, error: BaseException) -> Exception:
        if self.left:
            return self._unknown("it was cancelled, as by the end of its event loop")
        if self._expired is None:
            closed = self._is_closing() or is_cancelled()
            return SessionClosed() if closed else stray("the start", error)
        cause = self._outage.error
        why = f"last failure: {cause.args[0]}" if cause is not None else "its turn did not come"
        timeout = self._expired.timeout or 0.0
        error = ExecutionTimeout(
            f"not started within {timeout:g} s, and nothing was: {why}", timeout=timeout
        )
        error.__cause__ = cause
        return error

    def _unknown(self, reason: str, cause: BaseException | None = None) -> StartUnknown:
        error = StartUnknown(
            f"whether a run of workflow {self._request.workflow!r:.100} started is not known:"
            f" {reason}",
            workflow=self._request.workflow,
            reason=reason,
        )
        error.__cause__ = cause
        return error

    def _report(self, started: Started, *, abandoned: bool) -> None:
        if abandoned:
            logger.warning(
                "execution %d of workflow %.100r was started when nobody waited for it any more;"
                " follow its id to pick it up",
                started.execution_id,
                self._request.workflow,
            )
        duration = anyio.current_time() - self._called_at
        self._emit(ExecutionStarted(started.execution_id, self._request, abandoned, duration))

    def _warn(self, error: BaseException) -> None:
        if isinstance(error, StartUnknown):
            logger.warning("%s", error)
