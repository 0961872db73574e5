"""One send, without HTTP: it sends a start request at most once, and delivers its response."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Protocol

import attrs

from promptlayer_exec._api.attempt import AtMostOnce
from promptlayer_exec._api.messages import Request
from promptlayer_exec._api.runs import NewRun
from promptlayer_exec._engine.abandoned import (
    AbandonedRun,
    AbandonedRuns,
    log_abandoned,
    log_unknown,
)
from promptlayer_exec._engine.lifetime import Lifetime
from promptlayer_exec._engine.retry import RetryState
from promptlayer_exec._engine.tasks import clock, wait_even_if_cancelled
from promptlayer_exec._values.errors import (
    ConnectionFailed,
    ExecutionTimeout,
    RateLimited,
    RequestError,
    SessionClosed,
    StartUnknown,
    StatusError,
)
from promptlayer_exec._values.events import Emit, ExecutionStarted, StartFailed, logger
from promptlayer_exec._values.models import StartRequest
from promptlayer_exec._values.policies import Deadline
from promptlayer_exec._values.text import short_repr

SendOutcome = NewRun | BaseException


class AlreadyClaimed(Exception):
    """Another call is sending this request, so `SendHooks.before_send` forbids it."""


class SendHooks(Protocol):
    """A caller's hooks around sending a start request, to record what happens to it.

    All of them run in the session's tasks, whether or not the caller is still waiting.
    """

    async def before_send(self) -> None:
        """Return when the request may be sent, or raise the error that the caller gets."""

    async def not_sent(self) -> None:
        """Handle an attempt that started nothing, before the session repeats it."""

    async def ended(self, outcome: SendOutcome) -> None:
        """Handle the response, or the error that the caller gets, before the caller gets it."""


@attrs.frozen
class PreparedSend:
    """A start request that was checked and encoded, ready to be sent.

    Attributes:
        request: what the caller asked for.
        inputs: its inputs in JSON form.
        http_request: the request to send.
        secret: the token in the run's own callback URL, if it has one. No message may show it.
    """

    request: StartRequest
    inputs: Mapping[str, Any]
    http_request: Request
    secret: str | None


@attrs.define(eq=False, kw_only=True)
class SendOnce:
    """Sends one start request, in its own task: it reads the response even if the caller is gone.

    Before it sends the request, the caller, the session or the deadline can cancel it. After that,
    the response goes to the caller if it is still waiting, or else to the observers and the log.

    Attributes:
        secret: the token in the run's own callback URL, if it has one. No message may show it.
        sent: whether the request may have reached the server.
    """

    _request: StartRequest
    _send: Callable[[AtMostOnce, RetryState], Awaitable[NewRun]]
    _retries: RetryState  # its failed attempts so far
    _lifetime: Lifetime
    _emit: Emit
    _base_url: str
    secret: str | None
    _hooks: SendHooks | None
    _is_recorded: bool  # a store records the run, so that the key leads to it
    _on_lost: Callable[[str, StartRequest, float], object]  # only for a run with a secret
    _abandoned: AbandonedRuns | None  # gathers the runs of a fan-out that is interrupted
    sent: bool = attrs.field(init=False, default=False)
    _called_at: float = attrs.field(init=False, factory=clock)
    _task: asyncio.Task[SendOutcome] = attrs.field(init=False)
    _expired: Deadline | None = attrs.field(init=False, default=None)
    _is_abandoned: bool = attrs.field(init=False, default=False)
    _is_interrupted: bool = attrs.field(init=False, default=False)
    _is_given_up: bool = attrs.field(init=False, default=False)
    _hook_error: Exception | None = attrs.field(init=False, default=None)
    _outcome: asyncio.Future[NewRun] = attrs.field(
        init=False, factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def run(self, deadline: Deadline) -> NewRun:
        """Send the request, and return the response.

        Once it has sent the request, the deadline no longer matters, unless a store records the
        run: then the caller finds it by its key, and need not wait for its id.

        Raises:
            StartUnknown: the response was lost, so the run may have started.
            RequestError: the server refused the request, or was unreachable.
            ExecutionTimeout: it could not send the request before the deadline, or there was no
                response to a recorded one.
            SessionClosed: the session was closed. If the run started, the error has its id.
        """
        name = f"promptlayer_exec.Send {self._request.workflow!s:.100}"
        self._task = self._lifetime.spawn(self._perform(), name=name, cancel=self._cancel)
        if self._abandoned is not None:
            self._abandoned.begin()  # until the response is there
        self._task.add_done_callback(self._ended)

        try:
            timeout = None if deadline.timeout is None else max(deadline.at - clock(), 0.0)
            await asyncio.wait([self._outcome], timeout=timeout)
            if not self._outcome.done():
                self._expired = deadline
                self._cancel()
                if not (self.sent and self._is_recorded):
                    await asyncio.wait([self._outcome])
        except BaseException:
            self._is_interrupted = True
            self._abandon()
            raise

        if not self._outcome.done():
            self._abandon()
            raise self._unanswered(deadline)

        response = self._outcome.result()
        self._report(response, abandoned=False)
        return response

    @property
    def delays_closing(self) -> bool:
        """Whether only its response is missing, for which no caller waits any more."""
        is_over = self._is_abandoned or self._lifetime.is_closing()
        return is_over and self.sent and not self._task.done()

    def give_up(self) -> None:
        """Stop waiting for the response, and log that the run may have started."""
        self._is_given_up = self._is_abandoned = True
        self._task.cancel()

    # Called by the transport and the retries.

    @property
    def cancelled(self) -> bool:
        """Whether it is too late to send the request."""
        unneeded = self._is_abandoned or self._expired is not None or self._hook_error is not None
        return unneeded or self._lifetime.is_closing()

    async def before_send(self) -> None:
        if self._hooks is None:
            return
        try:
            await self._hooks.before_send()
        except Exception as error:
            # aiohttp calls this, and would hide the error behind one about the connection.
            self._hook_error = error
            raise ConnectionAbortedError("a hook forbids sending it") from error

    async def not_sent(self) -> None:
        if self._hooks is not None:
            # Even if the caller is gone, its record must be undone.
            taking_back = asyncio.ensure_future(self._hooks.not_sent())
            await wait_even_if_cancelled(taking_back)
            taking_back.result()

    def mark_sent(self) -> None:
        """Record that the request is being sent.

        Raises:
            ConnectionAbortedError: the request must not be sent, because the caller just cancelled
                it or it was already sent.
        """
        if self.sent:  # a middleware of http= is repeating it
            raise ConnectionAbortedError("cannot send a start request twice")
        if self.cancelled:
            raise ConnectionAbortedError("cancelled before it was sent")
        self.sent = True

    def mark_rejected(self) -> None:
        """Record that the server refused the request, and started nothing."""
        self.sent = False

    # The task.

    async def _perform(self) -> SendOutcome:
        """Send the request, and return the response or error once the hooks have recorded it."""
        outcome: SendOutcome
        try:
            outcome = await self._send(self, self._retries)
        except asyncio.CancelledError:
            outcome = self._judge_cancellation(self._retries.error)
        except Exception as error:  # noqa: BLE001 - the caller gets it
            outcome = self._judge(error)

        if self._hooks is not None:
            await self._tell(self._hooks, outcome)
        return outcome

    async def _tell(self, hooks: SendHooks, outcome: SendOutcome) -> None:
        """Wait until the hooks have recorded the outcome. They cannot change it."""
        telling = asyncio.ensure_future(hooks.ended(outcome))
        while not telling.done():
            with suppress(asyncio.CancelledError):  # too late to cancel
                await asyncio.wait([telling])

        if not telling.cancelled() and (error := telling.exception()) is not None:
            logger.error("could not record the result of a start request", exc_info=error)

    def _cancel(self) -> None:
        if not self.sent:
            self._task.cancel()

    def _abandon(self) -> None:
        """Handle a request whose caller is gone, whether or not it has finished."""
        self._is_abandoned = True
        if not self._outcome.done():
            self._cancel()
        else:
            self._report_undelivered(self._outcome.exception() or self._outcome.result())

    def _ended(self, task: asyncio.Task[SendOutcome]) -> None:
        outcome: SendOutcome
        if task.cancelled():  # before its first step
            outcome = self._judge_cancellation(self._retries.error)
        else:
            outcome = task.exception() or task.result()

        duration = clock() - self._called_at
        if self.secret is not None and isinstance(outcome, StartUnknown):
            self._on_lost(self.secret, self._request, duration)

        if isinstance(outcome, BaseException):
            self._outcome.set_exception(outcome)
            if not isinstance(outcome, AlreadyClaimed):  # the caller gets the other call's run
                self._emit(StartFailed(None, self._request, outcome, duration, self._base_url))
        elif self._lifetime.is_closing() and not self._is_abandoned:
            self._is_abandoned = True
            self._is_interrupted = True
            self._outcome.set_exception(SessionClosed(execution_id=outcome.execution_id))
        else:
            self._outcome.set_result(outcome)

        if self._is_abandoned:
            self._outcome.exception()  # marks the error as retrieved
            self._report_undelivered(outcome)
        if self._abandoned is not None:
            self._abandoned.end()

    # Did an error prove that no run started?

    def _judge(self, error: Exception) -> BaseException:
        """Return the failure itself if it proves that no run started, or else `StartUnknown`."""
        if self._hook_error is not None:
            return self._hook_error
        if isinstance(error, RequestError):
            return self._judge_request(error)
        if not self.sent:  # from a limiter, or a hook of a borrowed session
            return error
        text = "".join(traceback.format_exception_only(error)).strip()
        return self._unknown(text, error)

    def _judge_request(self, error: RequestError) -> BaseException:
        is_refused = isinstance(error, RateLimited)
        if is_refused:
            self.mark_rejected()  # a 429 starts nothing
        if self._is_lost(error):
            # Without the quoted body, which may contain outputs. The cause has it.
            return self._unknown(RequestError._what(error), error)

        if self.cancelled and is_refused:
            return self._judge_cancellation(error)
        if self.cancelled and not isinstance(error, StatusError):
            return self._judge_cancellation(self._retries.error)

        error._add_context(f"no run of workflow {self._request.workflow!r:.100} started")
        return error

    def _is_lost(self, error: RequestError) -> bool:
        if isinstance(error, StatusError):
            return error.status >= 500 or error.status == HTTPStatus.REQUEST_TIMEOUT
        return self.sent

    def _judge_cancellation(self, cause: Exception | None) -> BaseException:
        if self.sent and self._is_given_up:
            return self._unknown("the program did not wait for the response")
        if self.sent:
            return self._unknown("it was cancelled, for example because its event loop stopped")
        if self._is_abandoned:
            return asyncio.CancelledError("the caller was cancelled, and no run was started")
        if self._expired is None:
            return SessionClosed()

        timeout = self._expired.timeout or 0.0
        why = ": it was still waiting for a connection, the rate limit or the store of its key"
        if cause is not None:
            why = f". Last failure: {cause.args[0]}"
        error = ExecutionTimeout(
            f"could not send the start request within {timeout:g} s, so no run was started{why}",
            # A longer timeout would not help to reach the server.
            advice=cause.advice if isinstance(cause, ConnectionFailed) else None,
            timeout=timeout,
        )
        error.__cause__ = cause
        return error

    def _unanswered(self, deadline: Deadline) -> ExecutionTimeout:
        timeout = deadline.timeout or 0.0
        return ExecutionTimeout(
            f"no response to the start request within {timeout:g} s, but the request continues",
            advice="Repeat the call with the same key: it picks up the run.",
            timeout=timeout,
        )

    def _unknown(self, reason: str, cause: BaseException | None = None) -> StartUnknown:
        error = start_unknown(self._request.workflow, reason, self.secret, key=self._request.key)
        error.__cause__ = cause
        return error

    # Reports.

    def _report_undelivered(self, outcome: SendOutcome) -> None:
        """Report the outcome of a request whose caller is gone."""
        if isinstance(outcome, NewRun):
            self._report(outcome, abandoned=True)
        elif isinstance(outcome, StartUnknown):
            if self._is_interrupted and self._abandoned is not None:
                self._abandoned.add_lost(outcome)
            else:
                log_unknown(outcome)

    def _report(self, response: NewRun, *, abandoned: bool) -> None:
        run = AbandonedRun(
            *(response.execution_id, self._request.workflow, self._request.key),
            is_recorded=self._is_recorded,
        )
        if abandoned and self._is_interrupted and self._abandoned is not None:
            self._abandoned.add(run)
        elif abandoned:
            log_abandoned(run)

        duration = clock() - self._called_at
        self._emit(
            ExecutionStarted(
                response.execution_id,
                self._request,
                abandoned,
                duration,
                base_url=self._base_url,
            )
        )


def report_unrecorded(execution_id: int, subject: str) -> None:
    """Log and print the id of a run that the database cannot record yet, so it is not lost."""
    text = (
        f"execution {execution_id} started for {subject}, but the database could not record"
        " it yet: keep this line"
    )
    logger.error("%s", text)
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - logging may be off


def start_unknown(
    workflow: str | int, reason: str, token: str | None, since: str = "", *, key: Any = None
) -> StartUnknown:
    """Return the error for a lost response. `since` adds to the reason in the message alone."""
    which = f"a run of workflow {workflow!r:.100}"
    if key is not None:
        which += f" with the key {short_repr(key)}"
    return StartUnknown(
        f"{which} may have started: {reason}{since}",
        workflow=workflow,
        reason=reason,
        callback_token=token,
        key=key,
    )
