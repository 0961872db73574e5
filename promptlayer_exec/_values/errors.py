"""The error tree. Every message names what failed, for which execution, and what to do next."""

from __future__ import annotations

import copy
import copyreg
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from promptlayer_exec._values.text import printable

if TYPE_CHECKING:
    from promptlayer_exec._values.models import Node, Snapshot


class PromptLayerExecError(Exception):
    """The base class of this library's errors.

    Attributes:
        execution_id: the id of the execution, or None if it has not started. Save it: it is the
            only way back to the run.
        last_snapshot: the last snapshot of the execution, or None if there is none.
    """

    advice: ClassVar[str] = ""  # what to do next, with `{id}` for the execution's id
    _advice_without_id: ClassVar[str | None] = None  # if it differs from `advice`
    _advice_with_record: ClassVar[str | None] = None  # of a start whose key a store keeps
    _joint: ClassVar[str] = ": "  # between "execution 788" and the message

    def __init__(
        self,
        message: str,
        *,
        execution_id: int | None = None,
        last_snapshot: Snapshot | None = None,
    ) -> None:
        # One argument only: OSError, a base of some subclasses, reads two as errno and strerror.
        super().__init__(message)
        self.execution_id = execution_id
        self.last_snapshot = last_snapshot

    def _what(self) -> str:
        return str(self.args[0]).rstrip(" \n.!?,;:")  # often the server's own sentence

    def _subject(self) -> str:
        """Return what the message is about, such as `execution 788: `."""
        if self.execution_id is None:
            return ""
        return f"execution {self.execution_id}{self._joint}"

    def _next_step(self) -> str:
        if self.execution_id is None and self._advice_without_id is not None:
            return self._advice_without_id
        return self.advice.replace("{id}", str(self.execution_id))

    def __str__(self) -> str:
        return printable(f"{self._subject()}{self._what()}. {self._next_step()}".rstrip())

    def __reduce__(self) -> tuple[Any, ...]:
        state = {**vars(self), "args": self.args}
        if "__notes__" in state:
            state["__notes__"] = list(state["__notes__"])  # add_note must not change the original
        # Without `__init__`, which would want its keyword arguments.
        return copyreg.__newobj__, (type(self),), state  # type: ignore[attr-defined]


def split_advice(kind: str, text: str) -> tuple[str, str]:
    """Return the text of an error of class `kind` without its advice, and the advice."""
    cls = globals().get(kind, PromptLayerExecError)
    for advice in (cls.advice, cls._advice_without_id, cls._advice_with_record):
        first_words = (advice or "").partition("{id}")[0]
        if first_words and first_words in text:
            problem, _, rest = text.rpartition(first_words)
            return problem.rstrip(), first_words + rest
    return text, ""


def copy_error(error: Exception) -> Exception:
    """Return a copy of an error, for several tasks to raise, or the error if it has no copy."""
    try:
        duplicate = copy.copy(error)
    except Exception:  # noqa: BLE001 - another library's error may raise anything here
        return error
    if type(duplicate) is not type(error):
        return error
    duplicate.__cause__ = error.__cause__
    return duplicate


class ConfigurationError(PromptLayerExecError, ValueError):
    """A setting is missing or malformed. The session sent nothing."""


class InvalidInputs(PromptLayerExecError, ValueError):
    """Inputs that the workflow requires are missing, so no run was started.

    Attributes:
        missing: their names.
    """

    def __init__(self, message: str, *, missing: tuple[str, ...] = (), **context: Any) -> None:
        super().__init__(message, **context)
        self.missing = missing

    def __str__(self) -> str:
        return super().__str__().removesuffix(".")  # callers add how to list the inputs


class KeyConflict(PromptLayerExecError, ValueError):
    """The key already belongs to a different request. The session sent nothing.

    Attributes:
        key: the key.
    """

    def __init__(self, message: str, *, key: str, **context: Any) -> None:
        super().__init__(message, **context)
        self.key = key

    def __str__(self) -> str:
        return super().__str__().removesuffix(".")  # the message ends with what to do


class SessionClosed(PromptLayerExecError):
    """The session was closed before the call finished."""

    advice = "It continues on PromptLayer; session.execution({id}) in an open session picks it up."
    _advice_without_id = "Make the call while the session is open."

    def __init__(self, message: str = "the session is closed", **context: Any) -> None:
        super().__init__(message, **context)


class RequestError(PromptLayerExecError):
    """An HTTP request failed, and the session no longer retries it.

    Attributes:
        attempts: the number of attempts, including those that could not connect.
        reason: the message of the cause, because pickling loses `__cause__`.
        is_permanent: whether waiting cannot help, as with an invalid certificate.
        waited: the seconds that the last attempt waited for a connection or for the rate.
    """

    is_permanent = False
    waited = 0.0

    def __init__(
        self, message: str, *, attempts: int = 1, reason: str = "", **context: Any
    ) -> None:
        super().__init__(message, **context)
        self.attempts = attempts
        self.reason = reason

    def _what(self) -> str:
        if self.attempts == 1:
            return super()._what()
        return f"{super()._what()} ({self.attempts} attempts)"


class ConnectionFailed(RequestError, ConnectionError):
    """The session could not reach the server, or the connection broke during the response."""

    advice = "Check the network and base_url. Running executions are not affected."


class RequestTimeout(RequestError, TimeoutError):
    """One HTTP attempt took longer than `request_timeout` seconds."""

    advice = "Try again, or raise request_timeout. Running executions are not affected."


class InvalidResponse(RequestError):
    """A successful response is not what PromptLayer documents.

    Attributes:
        status: the HTTP status of the response.
        excerpt: the first 200 bytes of the body.
        path: the place of the mistake in the body, such as `$["Node 1"].status`, or None if the
            body is cut short or not JSON.
    """

    advice = "Check that base_url points to the PromptLayer API. If it does, report this message."

    def __init__(
        self,
        message: str,
        *,
        status: int,
        excerpt: str = "",
        path: str | None = None,
        **context: Any,
    ) -> None:
        super().__init__(message, **context)
        self.status = status
        self.excerpt = excerpt
        self.path = path

    def _what(self) -> str:
        if self.excerpt:
            return f"{super()._what()}. The body starts with {self.excerpt!r}"
        return f"{super()._what()}. The body is empty"


class ResponseTooLarge(InvalidResponse):
    """The decompressed body exceeds `limit` bytes, the session's `max_response_bytes`."""

    advice = "Raise max_response_bytes if you expect outputs this large."

    def __init__(self, message: str, *, limit: int, **context: Any) -> None:
        super().__init__(message, **context)
        self.limit = limit


@attrs.frozen
class FieldError:
    """One invalid parameter, as the server reports it.

    Attributes:
        loc: the path to the parameter, such as `("query", "workflow_version_execution_id")`.
        msg: why the server rejected it.
        type: the server's name for this kind of mistake.
    """

    loc: tuple[str | int, ...]
    msg: str
    type: str


class StatusError(RequestError):
    """The server responded with an error status or a redirect.

    Attributes:
        status: the HTTP status.
        message: the server's error message, or the name of the status if there is none.
        body: the decoded JSON body, or the text of a body that is not JSON. Only the first 64 KiB.
        retry_after: the seconds that the server asked to wait before the next request, if any.
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
        **context: Any,
    ) -> None:
        super().__init__(message, **context)
        self.status = status
        self.message = server_message
        self.body = body
        self.retry_after = retry_after


class BadRequest(StatusError):
    """400: the server could not understand the request."""

    advice = "Check the arguments against the server's message."


class Unauthorized(StatusError):
    """401: the API key is missing or wrong."""

    advice = "Check PROMPTLAYER_API_KEY or api_key=."


class Forbidden(StatusError):
    """403: the API key may not do this."""

    advice = "Check that the API key belongs to the workflow's workspace."


class NotFound(StatusError):
    """404: the execution or the workflow does not exist."""

    advice = "Check the id or name, base_url, and that the API key belongs to the same workspace."


class UnprocessableEntity(StatusError):
    """422: a parameter is invalid. `details` has a `FieldError` for each that the server named."""

    advice = "Correct the parameters that the server names."

    def __init__(
        self, message: str, *, details: tuple[FieldError, ...] = (), **context: Any
    ) -> None:
        super().__init__(message, **context)
        self.details = details


class RateLimited(StatusError):
    """429: too many requests."""

    advice = "Lower rate=, or share a limiter= between all processes that use this key."


class ServerError(StatusError):
    """5xx: the server, or a proxy in front of it, failed."""

    advice = "Try again later. Running executions are not affected."


class StartUnknown(PromptLayerExecError):
    """The request to start a run may have reached PromptLayer, but the response was lost.

    Attributes:
        workflow: the name or id of the workflow.
        reason: what happened to the response.
        callback_token: the secret in the run's callback URL, if the session gave it one. It is all
            that `Session.recover` needs, so keep it from others.
        key: the key of the request, if it had one.
    """

    advice = "Look for it in PromptLayer before you start it again, or you may pay twice."
    _advice_with_record = (
        "Look for it in PromptLayer. If it is not there, await store.forget(key), and start it"
        " again."
    )
    _is_key_stored = False  # whether the session's store keeps the key

    def __init__(
        self,
        message: str,
        *,
        workflow: str | int,
        reason: str,
        callback_token: str | None = None,
        key: Any = None,
        **context: Any,
    ) -> None:
        super().__init__(message, **context)
        self.workflow = workflow
        self.reason = reason
        self.callback_token = callback_token
        self.key = key

    def _what(self) -> str:
        what = super()._what()
        if self.callback_token is None:
            return what
        return f"{what}. Session.recover(error) waits for its callback"

    def _next_step(self) -> str:
        return self._advice_with_record if self._is_key_stored else super()._next_step()


class ExecutionTimeout(PromptLayerExecError, TimeoutError):
    """The timeout passed before the execution was complete. The execution keeps running.

    If `execution_id` is None, the timeout passed before the run started.

    Attributes:
        timeout: the timeout in seconds.
    """

    advice = "It continues on PromptLayer; session.execution({id}) picks it up."
    _advice_without_id = "Try again with a longer timeout."

    def __init__(self, message: str, *, timeout: float, **context: Any) -> None:
        super().__init__(message, **context)
        self.timeout = timeout

    def _next_step(self) -> str:
        advice = super()._next_step()
        if self.last_snapshot is not None and self.last_snapshot.complete:
            return advice.removeprefix("It continues on PromptLayer; ")  # only its output is late
        return advice


class ExecutionFailed(PromptLayerExecError):
    """The execution is complete but has no output.

    Attributes:
        failed: the nodes that failed.
    """

    advice = "See error.failed and error.last_snapshot."
    _joint = " "  # the message is what the execution did

    def __init__(self, message: str, *, failed: tuple[Node, ...], **context: Any) -> None:
        super().__init__(message, **context)
        self.failed = failed


class InvalidOutput(PromptLayerExecError):
    """The output does not match the type given as `into=`.

    Attributes:
        path: the place of the mismatch in the output, such as `$.items[3].price`.
        value: the output as the server sent it.
        reason: what was expected there, and what came instead.
    """

    advice = "Change the type or the workflow's output node."

    def __init__(self, message: str, *, path: str, value: Any, reason: str, **context: Any) -> None:
        super().__init__(message, **context)
        self.path = path
        self.value = value
        self.reason = reason


class InvalidSignature(PromptLayerExecError, ValueError):
    """The webhook did not come from PromptLayer, or was signed with another secret."""

    advice = "Compare the secret with the one in PromptLayer's webhook settings."
