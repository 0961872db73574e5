"""Starting a run: a request that is sent at most once, and its answer. It knows no HTTP."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import attrs

from promptlayer_exec._display import short_repr
from promptlayer_exec._engine.retry import RetryState
from promptlayer_exec._engine.tasks import AGAIN, CLEAN_UP, foreign_cancellation, is_cancelled
from promptlayer_exec._errors import (
    ExecutionTimeout,
    RateLimited,
    RequestError,
    RequestTimeout,
    SessionClosed,
    StartUnknown,
    StatusError,
)
from promptlayer_exec._events import Emit, ExecutionStarted, StartFailed, logger
from promptlayer_exec._models import StartRequest
from promptlayer_exec._policies import Deadline

if TYPE_CHECKING:
    from promptlayer_exec._api.executions import Started


class SendHooks(Protocol):
    """What a caller does before a request may reach the server, and if it did not after all."""

    async def before_send(self) -> None:
        """Return when the request may be sent; an error of it is raised to the caller instead."""

    async def not_sent(self) -> None:
        """Handle an attempt that started nothing and will be repeated, whatever it got to."""


class Post(Protocol):
    """A function that sends the request, and again only if it cannot have started a run."""

    async def __call__(self, state: RetryState, once: Start) -> Started:
        """Return the server's answer."""


@attrs.define(eq=False)
class Start:
    """The start of one run, in its own task: the answer is read even if the caller is cancelled.

    Until the request is sent, the caller, the session or the deadline can cancel it. After that,
    the answer goes to the caller if it still waits, else to the observers and the log.

    Attributes:
        sent: whether the request may have reached the server.
        cancelled: whether the request must no longer be sent.
    """

    _request: StartRequest
    _post: Post
    _state: RetryState
    _emit: Emit
    _is_closing: Callable[[], bool]
    _hooks: SendHooks | None = None
    _token: str | None = None
    _on_end: Callable[[Started | BaseException, float], None] | None = None
    _called_back: Callable[[], Started | None] = lambda: None
    _base_url: str = ""
    sent: bool = attrs.field(init=False, default=False)
    cancelled: bool = attrs.field(init=False, default=False)
    _called_at: float = attrs.field(init=False, factory=anyio.current_time)
    _answer: asyncio.Future[Started] = attrs.field(
        init=False, factory=lambda: asyncio.get_running_loop().create_future()
    )
    _task: asyncio.Task[Any] | None = attrs.field(init=False, default=None)
    _scope: anyio.CancelScope = attrs.field(init=False, factory=anyio.CancelScope)
    _repeat: asyncio.TimerHandle | None = attrs.field(init=False, default=None)
    _expired: Deadline | None = attrs.field(init=False, default=None)
    _hook_error: Exception | None = attrs.field(init=False, default=None)
    _is_connecting: bool = attrs.field(init=False, default=False)
    # Until then, `not_sent` may go on although the caller is gone.
    _hook_ends_by: float = attrs.field(init=False, default=-math.inf)

    async def result(self, deadline: Deadline) -> Started:
        """Wait for the answer; once the request has been sent, the deadline no longer matters.

        Raises:
            StartUnknown: the answer was lost, so the run may have started.
            RequestError: the server refused, or could not be reached.
            ExecutionTimeout: the request could not be sent before the deadline.
            SessionClosed: the session was closed; with the execution's id if it started.
        """
        timer = None
        if deadline.timeout is not None:
            timer = asyncio.get_running_loop().call_at(deadline.at, self._expire, deadline)
        try:
            started = await self._answer
        except (asyncio.CancelledError, GeneratorExit):
            self._answer.cancel()
            self._abandon()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        try:
            self._report(started, abandoned=False)
            if is_cancelled():  # by an observer: the caller may have no `await` left
                await asyncio.sleep(0)
        except BaseException:  # also if an observer was interrupted
            self._warn_of_lost_handle(started)
            raise
        return started

    async def run(self) -> None:
        """Send the request, and deliver its answer."""
        self._task = asyncio.current_task()
        self._cancel_if_unneeded()
        try:
            with self._scope:
                started = await self._post(self._state, self)
        # A cancellation, too: it would end the task group, and with it the session.
        except BaseException as error:  # noqa: BLE001 - raised to the caller
            if (proved := self._proved_run(error)) is None:
                self._fail(self._judge(error))
            else:
                self._succeed(proved)
        else:
            self._succeed(started)
        finally:
            self._task = None
            self._stop_repeating()

    def report_left(self) -> None:
        """Log what is known of a start whose event loop may never run again."""
        if self._answer.done() and not self._answer.cancelled():
            self._report_answer(self._warn_of_lost_handle)
        elif self.sent and self._task is not None:
            reason = "its event loop was left while it was on the wire"
            log_unknown(start_unknown(self._request.workflow, reason, None), self._request)

    async def before_send(self) -> None:
        self._is_connecting = False
        if self._hooks is None:
            return
        try:
            await self._hooks.before_send()
        except Exception as error:
            # aiohttp, which calls this, would hide it in an error about the connection.
            self._hook_error = error
            self.cancelled = True
            raise ConnectionAbortedError("it must not be sent") from error

    async def not_sent(self) -> None:
        if self._hooks is not None:
            self._hook_ends_by = self._answer.get_loop().time() + CLEAN_UP
            self._cancel_again(CLEAN_UP if self._expired is None else AGAIN)
            try:
                await self._hooks.not_sent()
            finally:
                self._hook_ends_by = -math.inf
        self._cancel_if_unneeded()

    def mark_connecting(self) -> None:
        """Record that the rate allows the request, and a connection is being made for it."""
        self._is_connecting = True

    def mark_sent(self) -> None:
        """Record that the request is being sent.

        Raises:
            ConnectionAbortedError: it must not be sent, because it was just cancelled, or because a
                callback proves that an earlier attempt has begun a run.
        """
        if self._called_back() is not None:
            self.cancelled = True
            raise ConnectionAbortedError("a callback of this start has come")
        if self._task is None or self._task.cancelling():
            # Not if the attempt timed out just now: that also cancels the task for a moment.
            self.cancelled = self._is_unneeded() or self._is_closing()
            raise ConnectionAbortedError("cancelled before it was sent")
        self.sent = True
        self._scope.shield = True

    def mark_rejected(self) -> None:
        """Record that the server refused the request, and started nothing."""
        self.sent = False
        self._scope.shield = False

    def _expire(self, deadline: Deadline) -> None:
        self._expired = deadline
        self._cancel_if_unneeded()

    def _is_unneeded(self) -> bool:
        return self._expired is not None or self._answer.cancelled()

    def _cancel_if_unneeded(self) -> None:
        self._stop_repeating()
        if self._task is None or self.sent or not self._is_unneeded():
            return
        left = self._hook_ends_by - self._answer.get_loop().time()
        if self._expired is None and left > 0.0:  # nobody waits for the hook to end
            self._cancel_again(left)
            return
        # The scope would take one more loop step, in which the request may be sent.
        self._task.cancel()
        # A limiter may suppress it, as `asyncio.wait_for` does at times on Python 3.11.
        self._cancel_again(CLEAN_UP if self._expired is None else AGAIN)

    def _cancel_again(self, seconds: float) -> None:
        self._stop_repeating()
        loop = self._answer.get_loop()
        self._repeat = loop.call_later(seconds, self._cancel_if_unneeded)

    def _stop_repeating(self) -> None:
        if self._repeat is not None:
            self._repeat.cancel()
            self._repeat = None

    def _abandon(self) -> None:
        """Handle a start whose caller was cancelled, whether or not it has ended."""
        if self._answer.cancelled():
            self._cancel_if_unneeded()
        else:
            self._report_answer(partial(self._report, abandoned=True))

    def _report_answer(self, report: Callable[[Started], None]) -> None:
        """Report the answer to a start that has ended, or log that it was lost."""
        if (error := self._answer.exception()) is None:
            report(self._answer.result())
        else:
            self._warn(error)

    def _succeed(self, started: Started) -> None:
        try:
            if self._answer.cancelled():
                self._report(started, abandoned=True)
            elif self._is_closing():
                self._answer.set_exception(SessionClosed(execution_id=started.execution_id))
                self._report(started, abandoned=True)
            else:
                self._answer.set_result(started)
        finally:  # each of the two calls observers, which may be interrupted
            self._end(started)

    def _fail(self, error: BaseException) -> None:
        if self._answer.cancelled():
            self._warn(error)
        else:  # first, because an observer may be interrupted
            self._answer.set_exception(error)
        duration = self._end(error)
        self._emit(StartFailed(None, self._request, error, duration, self._base_url))

    def _end(self, outcome: Started | BaseException) -> float:
        """Hand on what came of the start, and return how long it took in seconds."""
        duration = anyio.current_time() - self._called_at
        if self._on_end is not None:
            self._on_end(outcome, duration)
        return duration

    def _is_lost(self, error: BaseException) -> bool:
        if isinstance(error, StatusError):
            return error.status >= 500 or error.status == HTTPStatus.REQUEST_TIMEOUT
        return self.sent

    def _proved_run(self, error: BaseException) -> Started | None:
        """Return the run that a callback proves, in place of an error that says there is none.

        Of a refusal other than 429, only the error's `execution_id` says so.
        """
        denies_run = isinstance(error, RequestError | SessionClosed | asyncio.CancelledError)
        if self._hook_error is not None or self._is_lost(error) or not denies_run:
            return None
        started = self._called_back()
        if isinstance(error, StatusError) and not isinstance(error, RateLimited):
            error.execution_id = None if started is None else started.execution_id
            return None
        return started

    def _judge(self, error: BaseException) -> BaseException:
        """Return the failure itself if it proves that no run started, else `StartUnknown`."""
        if isinstance(error, asyncio.CancelledError):
            return self._judge_cancellation(error)
        if self._hook_error is not None:
            return self._hook_error
        if self.cancelled:
            return self._judge_cancellation(error)
        if not isinstance(error, RequestError):  # from a limiter, or a borrowed session's hook
            return self._unknown(_text_of(error), error) if self.sent else error
        if self._is_lost(error):
            # Without the quoted body, which may hold outputs: the cause has it.
            return self._unknown(RequestError._what(error), error)
        if error.execution_id is None:
            error.args = (
                f"no run of workflow {self._request.workflow!r:.100} started: {error.args[0]}",
            )
        return error

    def _judge_cancellation(self, error: BaseException) -> BaseException:
        if self.sent:
            return self._unknown("it was cancelled, for example by the end of its event loop")
        if self._expired is None:
            if self._answer.cancelled():
                return asyncio.CancelledError("the caller was cancelled, and no run was started")
            closed = self._is_closing() or is_cancelled()
            return SessionClosed() if closed else foreign_cancellation("the start", error)
        cause = self._state.error
        if cause is None and self._is_connecting:
            cause = RequestTimeout(f"no connection to {self._base_url} was made in time")
        why = "no connection was free, or the rate did not allow it"
        if cause is not None:
            why = f"last failure: {cause.args[0]}"
        timeout = self._expired.timeout or 0.0
        error = ExecutionTimeout(
            f"could not send the start within {timeout:g} s; no run was started: {why}",
            timeout=timeout,
        )
        error.__cause__ = cause
        return error

    def _unknown(self, reason: str, cause: BaseException | None = None) -> StartUnknown:
        error = start_unknown(self._request.workflow, reason, self._token)
        error.__cause__ = cause
        return error

    def _warn_of_lost_handle(self, started: Started) -> None:
        logger.warning(
            "execution %d of workflow %.100r%s started, but its caller did not get"
            " the handle; follow it by its id",
            started.execution_id,
            self._request.workflow,
            _key(self._request),
        )

    def _report(self, started: Started, *, abandoned: bool) -> None:
        if abandoned:
            self._warn_of_lost_handle(started)
        duration = anyio.current_time() - self._called_at
        self._emit(
            ExecutionStarted(
                started.execution_id, self._request, abandoned, duration, base_url=self._base_url
            )
        )

    def _warn(self, error: BaseException) -> None:
        if isinstance(error, StartUnknown):
            log_unknown(error, self._request)


def _text_of(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - the text of a user's error may be an error itself
        return type(error).__name__


def _key(request: StartRequest) -> str:
    return "" if request.key is None else f" (key {short_repr(request.key)})"


def log_unknown(error: StartUnknown, request: StartRequest) -> None:
    """Log a start that may have started a run, because nobody will get the error."""
    logger.warning("%s%s", error, _key(request))


def start_unknown(
    workflow: str | int, reason: str, token: str | None, since: str = ""
) -> StartUnknown:
    """Return the error for a lost answer; `since` says what has happened since."""
    return StartUnknown(
        f"it is not known whether a run of workflow {workflow!r:.100} started: {reason}{since}",
        workflow=workflow,
        reason=reason,
        callback_token=token,
    )
