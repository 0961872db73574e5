"""The error tree: what went wrong, with which execution, and what to do about it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Required, TypedDict, TypeVar, Unpack

import attrs

if TYPE_CHECKING:
    from promptlayer_exec._models import Node, Snapshot

_E = TypeVar("_E", bound="PromptLayerExecError")


class _Context(TypedDict, total=False):
    execution_id: int | None
    last_snapshot: Snapshot | None


class _RequestContext(_Context, total=False):
    attempts: int
    reason: str


class _StatusContext(_RequestContext, total=False):
    status: Required[int]
    server_message: Required[str]
    body: Any
    retry_after: float | None


class PromptLayerExecError(Exception):
    """The root of every error that this library raises on its own account.

    Attributes:
        execution_id: the execution concerned, if there is one: with it a paid run is found again.
        last_snapshot: the last that was seen of it.
    """

    advice: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        execution_id: int | None = None,
        last_snapshot: Snapshot | None = None,
    ) -> None:
        # Only the message goes up: two or more arguments would become errno and strerror in the
        # subclasses that are an OSError as well.
        super().__init__(message)
        self.execution_id = execution_id
        self.last_snapshot = last_snapshot

    def _what(self) -> str:
        return str(self.args[0]).rstrip(" \n.!?,;:")  # the end may be a server's, or a system's

    def _advise(self) -> str:
        return self.advice

    def __str__(self) -> str:
        subject = "" if self.execution_id is None else f"execution {self.execution_id}: "
        text = f"{subject}{self._what()}. {self._advise()}".rstrip()
        return text.encode("utf-8", "backslashreplace").decode()  # or it could not be printed

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, vars(self))


def _restore(cls: type[_E], args: tuple[Any, ...], state: dict[str, Any]) -> _E:
    error = cls.__new__(cls)
    error.args = args
    vars(error).update(state)
    if "__notes__" in state:
        error.__notes__ = list(state["__notes__"])  # a copy's notes are its own
    return error


def copy_error(error: Exception) -> Exception:
    """Return an equal error with a traceback of its own, so that several tasks can raise it.

    One that is not of this library, and cannot be copied, is returned itself.
    """
    try:
        duplicate = copy.copy(error)
    except Exception:  # noqa: BLE001 - copying runs whatever code a foreign error brings
        return error
    if type(duplicate) is not type(error):
        return error
    duplicate.__cause__ = error.__cause__
    return duplicate


class ConfigurationError(PromptLayerExecError, ValueError):
    """A setting is missing or malformed; nothing was sent."""


class SessionClosed(PromptLayerExecError):
    """The session was closed before the answer was there."""

    advice = "A remote execution goes on: follow its id in an open session to pick it up."

    def __init__(self, message: str = "the session is closed", **context: Unpack[_Context]) -> None:
        super().__init__(message, **context)


class RequestError(PromptLayerExecError):
    """An HTTP request failed for good.

    Attributes:
        attempts: how often it was sent, or tried to be sent.
        reason: what the cause said (`__cause__` itself does not survive pickling).
    """

    def __init__(
        self,
        message: str,
        *,
        attempts: int = 1,
        reason: str = "",
        **context: Unpack[_Context],
    ) -> None:
        super().__init__(message, **context)
        self.attempts = attempts
        self.reason = reason

    def _what(self) -> str:
        tried = "" if self.attempts == 1 else f" ({self.attempts} attempts)"
        return f"{super()._what()}{tried}"


class ConnectionFailed(RequestError, ConnectionError):
    """The server could not be reached, or the connection broke before it answered."""

    advice = "Check the network and base_url; executions at the server are not affected."


class RequestTimeout(RequestError, TimeoutError):
    """One HTTP attempt took longer than `request_timeout` seconds."""

    advice = "Try again, or raise request_timeout; executions at the server are not affected."


class InvalidResponse(RequestError):
    """The server's success answer is not what its documentation promises.

    Attributes:
        status: the HTTP status of the answer.
        excerpt: the start of its body.
        path: where in the body the mistake is, such as `$.Node 1.status`; None where the body is
            cut short or is no JSON at all.
    """

    advice = "Check that base_url is the PromptLayer API; if it is, report the excerpt."

    def __init__(
        self,
        message: str,
        *,
        status: int,
        excerpt: str = "",
        path: str | None = None,
        **context: Unpack[_RequestContext],
    ) -> None:
        super().__init__(message, **context)
        self.status = status
        self.excerpt = excerpt
        self.path = path

    def _what(self) -> str:
        seen = f"the body starts {self.excerpt!r}" if self.excerpt else "the body is empty"
        return f"{super()._what()}; {seen}"


class ResponseTooLarge(InvalidResponse):
    """The body, after decompression, is larger than the session allows.

    Attributes:
        limit: the session's `max_response_bytes`.
    """

    advice = "Raise max_response_bytes if outputs this large are expected."

    def __init__(
        self,
        message: str,
        *,
        limit: int,
        status: int,
        excerpt: str = "",
        **context: Unpack[_RequestContext],
    ) -> None:
        super().__init__(message, status=status, excerpt=excerpt, **context)
        self.limit = limit


@attrs.frozen
class FieldError:
    """One complaint of the server about one parameter.

    Attributes:
        loc: the way to the parameter, such as `("query", "workflow_version_execution_id")`.
        msg: what is wrong with it.
        type: the kind of mistake, in the server's terms.
    """

    loc: tuple[str | int, ...]
    msg: str
    type: str


class StatusError(RequestError):
    """The server refused: it answered with a status that is neither 200 nor 202.

    Attributes:
        status: the HTTP status.
        message: the server's own words, or the status's name where it gave none.
        body: the decoded JSON body, or its text where it is no JSON (at most the first 64 KiB).
        retry_after: the seconds that the server asked to wait, if it did.
    """

    advice = "Check base_url and the arguments."

    def __init__(
        self,
        message: str,
        *,
        status: int,
        server_message: str,
        body: Any = None,
        retry_after: float | None = None,
        **context: Unpack[_RequestContext],
    ) -> None:
        super().__init__(message, **context)
        self.status = status
        self.message = server_message
        self.body = body
        self.retry_after = retry_after


class BadRequest(StatusError):
    """400: the server could not make sense of the request."""

    advice = "Check the arguments against the server's message."


class Unauthorized(StatusError):
    """401: the API key is missing or wrong."""

    advice = "Check PROMPTLAYER_API_KEY or api_key=."


class Forbidden(StatusError):
    """403: the API key may not do this."""

    advice = "Check that the API key belongs to the workspace of the workflow."


class NotFound(StatusError):
    """404: the server knows no such execution or workflow."""

    advice = (
        "Check the id or name, and that the API key belongs to its workspace; and the base URL."
    )


class UnprocessableEntity(StatusError):
    """422: a parameter is invalid.

    Attributes:
        details: one `FieldError` for each complaint; empty where the server itemised none.
    """

    advice = "Correct the parameters that the server names."

    def __init__(
        self,
        message: str,
        *,
        details: tuple[FieldError, ...] = (),
        **context: Unpack[_StatusContext],
    ) -> None:
        super().__init__(message, **context)
        self.details = details


class RateLimited(StatusError):
    """429: too many requests."""

    advice = "Lower rate= or share a limiter= between the processes that use this key."


class ServerError(StatusError):
    """5xx: the server, or a proxy before it, failed."""

    advice = "Try again later; executions at the server are not affected."


class StartUnknown(PromptLayerExecError):
    """The request to start a run may have reached the server, but its answer was lost.

    Attributes:
        workflow: the name or id of the workflow.
        reason: what happened to the answer.
    """

    advice = "The run may have started and be billed: look in PromptLayer before starting it again."

    def __init__(
        self, message: str, *, workflow: str | int, reason: str, **context: Unpack[_Context]
    ) -> None:
        super().__init__(message, **context)
        self.workflow = workflow
        self.reason = reason


class ExecutionTimeout(PromptLayerExecError, TimeoutError):
    """The wait's deadline passed before the execution was complete.

    Without an `execution_id` the execution could not even be started by then.

    Attributes:
        timeout: the seconds that were allowed.
    """

    advice = "It goes on at the server: follow its id again, with a longer timeout, to pick it up."

    def __init__(self, message: str, *, timeout: float, **context: Unpack[_Context]) -> None:
        super().__init__(message, **context)
        self.timeout = timeout

    def _advise(self) -> str:
        return super()._advise() if self.execution_id is not None else ""


class ExecutionFailed(PromptLayerExecError):
    """The execution is complete, and has no output.

    Attributes:
        failed: the nodes that failed, in the server's order.
    """

    advice = "last_snapshot holds every node."

    def __init__(
        self, message: str, *, failed: tuple[Node, ...], **context: Unpack[_Context]
    ) -> None:
        super().__init__(message, **context)
        self.failed = failed


class InvalidOutput(PromptLayerExecError):
    """The output does not have the type that `into=` asked for.

    Attributes:
        path: where it differs, such as `$.items[3].price`.
        value: the output as it is.
        reason: what was expected there.
    """

    advice = "Adjust the type, or the workflow's output node."

    def __init__(
        self, message: str, *, path: str, value: Any, reason: str, **context: Unpack[_Context]
    ) -> None:
        super().__init__(message, **context)
        self.path = path
        self.value = value
        self.reason = reason
