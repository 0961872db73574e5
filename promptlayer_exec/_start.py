"""Starting a run: the one request that is sent at most once, and never forgotten. No HTTP here."""

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
from promptlayer_exec._policies import Deadline
from promptlayer_exec._retry import RetryState
from promptlayer_exec._tasks import foreign_cancellation, is_cancelled

if TYPE_CHECKING:
    from promptlayer_exec._wire import Started


_NO_SLOT = "no connection was free, or the rate did not allow it"

BeforeSend = Callable[[], Awaitable[None]]


class Post(Protocol):
    """Sends the request, again only where it cannot have started a run, and reads the answer."""

    async def __call__(self, state: RetryState, once: Start) -> Started:
        """Return what the server answered."""


class Start:
    """One run to start, in a task of its own: the caller may go away, but not the answer.

    Until the request is sent, the caller, the session or the deadline may end it. From then on
    the answer is awaited, and reported to the caller if it still waits, else to the observers and
    the log.

    Attributes:
        sent: whether the request may have reached the server.
        cancelled: whether the request must not be sent any more.
    """

    def __init__(
        self,
        request: StartRequest,
        post: Post,
        state: RetryState,
        *,
        emit: Emit,
        is_closing: Callable[[], bool],
        before_send: BeforeSend | None = None,
    ) -> None:
        self.sent = False
        self.cancelled = False
        self._request = request
        self._post = post
        self._state = state
        self._emit = emit
        self._is_closing = is_closing
        self._called_at = anyio.current_time()
        self._before_send = before_send
        self._answer: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[Any] | None = None
        self._scope = anyio.CancelScope()
        self._expired: Deadline | None = None

    async def result(self, deadline: Deadline) -> Started:
        """Wait for the answer; once the request has been sent, the deadline no longer matters.

        Raises:
            StartUnknown: the answer was lost, so the run may have started.
            RequestError: the server refused, or could not be reached.
            ExecutionTimeout: the request could not be sent before the deadline.
            SessionClosed: the session was closed; with the execution's id if it started.
        """
        timer = None
        if deadline.when is not None:
            timer = asyncio.get_running_loop().call_at(deadline.when, self._expire, deadline)
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
        """Send the request, and hand over its answer."""
        self._task = asyncio.current_task()
        self._cancel_if_unneeded()
        try:
            with self._scope:
                started = await self._post(self._state, self)
        except asyncio.CancelledError as error:
            # Not passed on: it would end the task group, and with it the session.
            self._fail(self._judge_cancellation(error))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the caller
            self._fail(self._judge_cancellation(error) if self.cancelled else self._judge(error))
        else:
            self._succeed(started)

    async def before_send(self) -> None:
        """Await the hook, if there is one."""
        if self._before_send is not None:
            await self._before_send()

    def mark_sent(self) -> None:
        """Record that the request is being sent.

        Raises:
            ConnectionAbortedError: the start was cancelled a moment ago, so it must not be sent.
        """
        if self._task is None or self._task.cancelling():
            # Not where an attempt timed out just now: that cancels the task for a moment, too.
            self.cancelled = self._is_unneeded() or self._is_closing()
            raise ConnectionAbortedError("cancelled before it was sent")
        self.sent = True
        self._scope.shield = True

    def mark_rejected(self) -> None:
        """Record that the server refused the request, and started nothing."""
        self.sent = False
        self._scope.shield = False
        self._cancel_if_unneeded()

    def _expire(self, deadline: Deadline) -> None:
        self._expired = deadline
        self._cancel_if_unneeded()

    def _is_unneeded(self) -> bool:
        return self._expired is not None or self._answer.cancelled()

    def _cancel_if_unneeded(self) -> None:
        if self._task is not None and not self.sent and self._is_unneeded():
            # The scope would let one more step pass, in which the request may be sent.
            self._task.cancel()

    def _abandon(self) -> None:
        """Handle what came, or will come, of a start whose caller was cancelled."""
        if self._answer.cancelled():
            self._cancel_if_unneeded()
        elif (error := self._answer.exception()) is None:
            self._report(self._answer.result(), abandoned=True)
        else:
            self._warn(error)

    def _succeed(self, started: Started) -> None:
        if self._answer.cancelled():
            self._report(started, abandoned=True)
        elif self._is_closing():
            self._answer.set_exception(SessionClosed(execution_id=started.execution_id))
            self._report(started, abandoned=True)
        else:
            self._answer.set_result(started)

    def _fail(self, error: BaseException) -> None:
        if self._answer.cancelled():
            self._warn(error)
        else:
            self._answer.set_exception(error)

    def _judge(self, error: BaseException) -> BaseException:
        """Return the caller's error: the failure itself if it proves that no run started."""
        if not isinstance(error, RequestError):  # from a limiter, or a borrowed session's hook
            reason = f"{type(error).__name__}: {error}"
            return self._unknown(reason, error) if self.sent else error
        if isinstance(error, StatusError):
            is_lost = error.status >= 500 or error.status == HTTPStatus.REQUEST_TIMEOUT
        else:
            is_lost = self.sent
        # Without a quotation of the body, which may hold outputs: the cause has it.
        return self._unknown(RequestError._what(error), error) if is_lost else error

    def _judge_cancellation(self, error: BaseException) -> Exception:
        if self.sent:
            return self._unknown("it was cancelled, for example by the end of its event loop")
        if self._expired is None:
            closed = self._is_closing() or is_cancelled()
            return SessionClosed() if closed else foreign_cancellation("the start", error)
        cause = self._state.error
        why = f"last failure: {cause.args[0]}" if cause is not None else _NO_SLOT
        timeout = self._expired.timeout or 0.0
        error = ExecutionTimeout(
            f"could not send the start within {timeout:g} s; no run was started: {why}",
            timeout=timeout,
        )
        error.__cause__ = cause
        return error

    def _unknown(self, reason: str, cause: BaseException | None = None) -> StartUnknown:
        error = StartUnknown(
            f"it is not known whether a run of workflow {self._request.workflow!r:.100} started:"
            f" {reason}",
            workflow=self._request.workflow,
            reason=reason,
        )
        error.__cause__ = cause
        return error

    def _report(self, started: Started, *, abandoned: bool) -> None:
        if abandoned:
            logger.warning(
                "execution %d of workflow %.100r started after its caller had gone;"
                " follow its id to pick it up",
                started.execution_id,
                self._request.workflow,
            )
        duration = anyio.current_time() - self._called_at
        self._emit(ExecutionStarted(started.execution_id, self._request, abandoned, duration))

    def _warn(self, error: BaseException) -> None:
        if isinstance(error, StartUnknown):
            logger.warning("%s", error)
