"""The error tree. Each error has what happened, what to do about it, and both as data."""

from __future__ import annotations

import copy
import copyreg
import shlex
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import attrs

from promptlayer_exec._values.display import error_text
from promptlayer_exec._values.text import printable, short_repr

if TYPE_CHECKING:
    from promptlayer_exec._values.models import Node, Snapshot

TLSProblem: TypeAlias = Literal["expired", "another host", "certificate", "no TLS", "handshake"]


class PromptLayerExecError(Exception):
    """The base class of this library's errors.

    `str(error)` is its `problem`, followed by its `advice`.

    Attributes:
        problem: what happened, as a sentence that names the execution.
        advice: what the author of a program can do about it, as sentences, or None if there is
            nothing to do.
        execution_id: the id of the execution, or None if it has not started. Save it: it is the
            only way back to the run.
        last_snapshot: the last snapshot of the execution, or None if there is none.
    """

    _usual_advice: ClassVar[str | None] = None  # of the class, unless an error has its own
    _joint: ClassVar[str] = ": "  # between "execution 788" and the message
    _stored: ClassVar[tuple[str, ...]] = ()  # the attributes for `_data`

    def __init__(
        self,
        message: str,
        *,
        advice: str | None = None,
        execution_id: int | None = None,
        last_snapshot: Snapshot | None = None,
    ) -> None:
        # One argument only: OSError, a base of some subclasses, reads two as errno and strerror.
        super().__init__(message)
        self._advice = advice
        self.execution_id = execution_id
        self.last_snapshot = last_snapshot

    @property
    def problem(self) -> str:
        """What happened, as a sentence that names the execution."""
        return printable(f"{self._subject()}{self._what()}.")

    @property
    def advice(self) -> str | None:
        """What the author of a program can do about it, as sentences, or None."""
        return self._advice or self._find_advice()

    def _find_advice(self) -> str | None:
        """Return the advice that follows from the class and the attributes."""
        return self._usual_advice

    def _what(self) -> str:
        """Return what happened, without the execution and without a full stop."""
        return str(self.args[0]).rstrip(" \n.!?,;:")  # often the server's own sentence

    def _subject(self) -> str:
        """Return what the message is about, such as `execution 788: `."""
        if self.execution_id is None:
            return ""
        return f"execution {self.execution_id}{self._joint}"

    def _data(self) -> dict[str, Any]:
        """Return what the error carries, as JSON: neither secrets nor large values."""
        data: dict[str, Any] = {"execution_id": self.execution_id}
        data["reason"] = _as_json(printable(self._what()))
        for cls in type(self).__mro__:
            for name in vars(cls).get("_stored", ()):
                data[name] = _as_json(getattr(self, name))
        return data

    def _add_context(self, context: str) -> None:
        """Put what the caller was doing before the message."""
        self.args = (f"{context}: {self.args[0]}",)

    def __str__(self) -> str:
        return f"{self.problem} {printable(self.advice or '')}".rstrip()

    def __reduce__(self) -> tuple[Any, ...]:
        state = {**vars(self), "args": self.args}
        if "__notes__" in state:
            state["__notes__"] = list(state["__notes__"])  # add_note must not change the original
        # Without `__init__`, which would want its keyword arguments.
        return copyreg.__newobj__, (type(self),), state  # type: ignore[attr-defined]


class ConfigurationError(PromptLayerExecError, ValueError):
    """A setting is missing or malformed. The session sent nothing.

    Attributes:
        setting: the name of the argument that is wrong or that would help, such as `base_url`, or
            None.
        got: the value that breaks the rule, as a short text, or None.
    """

    _stored = ("setting",)

    def __init__(
        self,
        message: str,
        *,
        setting: str | None = None,
        got: str | None = None,
        **context: Any,
    ) -> None:
        super().__init__(message, **context)
        self.setting = setting
        self.got = got

    def _what(self) -> str:
        if self.got is None:
            return super()._what()
        return f"{super()._what()}, got {self.got}"


class InvalidInputs(PromptLayerExecError, ValueError):
    """Inputs that the workflow requires are missing, or do not match its type. No run was started.

    Attributes:
        missing: the names of those that are missing.
    """

    _usual_advice = "Session.definition shows all the inputs that it requires."
    _stored = ("missing",)

    def __init__(self, message: str, *, missing: tuple[str, ...] = (), **context: Any) -> None:
        super().__init__(message, **context)
        self.missing = missing


class KeyConflict(PromptLayerExecError, ValueError):
    """The key already belongs to a different request. The session sent nothing.

    Attributes:
        key: the key.
        batch: the name of the batch whose item has the key, or None if it is the key of a start.
    """

    _usual_advice = "Use another key, or repeat the original request."
    _stored = ("key", "batch")

    def __init__(self, message: str, *, key: str, batch: str | None = None, **context: Any) -> None:
        super().__init__(message, **context)
        self.key = key
        self.batch = batch


class StoreUnavailable(PromptLayerExecError):
    """The database of keys or batches is unreachable, locked, full, or does not respond in time.

    If it comes from a start, nothing was started. `__cause__` is what the store raised.
    """

    _usual_advice = "Try again once the database responds."


class SessionClosed(PromptLayerExecError):
    """The session was closed before the call finished."""

    def __init__(self, message: str = "the session is closed", **context: Any) -> None:
        super().__init__(message, **context)

    def _find_advice(self) -> str:
        if self.execution_id is None:
            return "Make the call while the session is open."
        pick_up = f"session.execution({self.execution_id}) in an open session picks it up."
        return f"It continues on PromptLayer; {pick_up}"


class RequestError(PromptLayerExecError):
    """An HTTP request failed, and the session no longer retries it.

    Attributes:
        attempts: the number of attempts, including those that could not connect.
        reason: the message of the cause, because pickling loses `__cause__`.
        is_permanent: whether waiting cannot help, as with an invalid certificate.
        waited: the seconds that the last attempt waited for a connection or for the rate.
    """

    _stored: ClassVar[tuple[str, ...]] = ("attempts", "reason")
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
    """The session could not reach the server, or the connection broke during the response.

    Attributes:
        tls: why there is no TLS connection: `expired` (or not yet valid), `another host` or
            `certificate` for an invalid certificate, `no TLS` for a server that does not use TLS on
            this port, `handshake`, or None if TLS did not fail.
    """

    _usual_advice = "Check the network and base_url. Running executions are not affected."
    _stored = ("tls",)

    def __init__(self, message: str, *, tls: TLSProblem | None = None, **context: Any) -> None:
        super().__init__(message, **context)
        self.tls = tls

    def _find_advice(self) -> str | None:
        return super()._find_advice() if self.tls is None else _TLS_ADVICE[self.tls]


_TLS_ADVICE: dict[TLSProblem, str] = {
    "expired": "Check this machine's clock. If it is right, the server needs a new certificate.",
    "another host": "Check base_url: this certificate belongs to another host.",
    "certificate": "If a private authority issued the certificate, set SSL_CERT_FILE to that"
    " authority's certificate, or pass http= with an SSL context.",
    "no TLS": "Check the scheme and the port of base_url.",
    "handshake": "For a client certificate or another TLS version, pass http= with an SSL context.",
}


class RequestTimeout(RequestError, TimeoutError):
    """One HTTP attempt took longer than `request_timeout` seconds."""

    _usual_advice = "Try again, or raise request_timeout. Running executions are not affected."


class InvalidResponse(RequestError):
    """A successful response is not what PromptLayer documents.

    Attributes:
        status: the HTTP status of the response.
        excerpt: the first 200 bytes of the body.
        path: the place of the mistake in the body, such as `$["Node 1"].status`, or None if the
            body is cut short or not JSON.
    """

    _usual_advice = (
        "Check that base_url points to the PromptLayer API. If it does, report this message."
    )
    _stored: ClassVar[tuple[str, ...]] = ("status", "excerpt", "path")

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

    _usual_advice = "Raise max_response_bytes if you expect outputs this large."
    _stored = ("limit",)

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

    _usual_advice = "Check base_url and the arguments."
    _stored = ("status", "message", "retry_after")

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

    _usual_advice = "Check the arguments against the server's message."


class Unauthorized(StatusError):
    """401: the API key is missing or wrong."""

    _usual_advice = "Check PROMPTLAYER_API_KEY or api_key=."


class Forbidden(StatusError):
    """403: the API key may not do this."""

    _usual_advice = "Check that the API key belongs to the workflow's workspace."


class NotFound(StatusError):
    """404: the execution or the workflow does not exist."""

    _usual_advice = (
        "Check the id or name, base_url, and that the API key belongs to the same workspace."
    )


class UnprocessableEntity(StatusError):
    """422: a parameter is invalid. `details` has a `FieldError` for each that the server named."""

    _usual_advice = "Correct the parameters that the server names."

    def __init__(
        self, message: str, *, details: tuple[FieldError, ...] = (), **context: Any
    ) -> None:
        super().__init__(message, **context)
        self.details = details

    def _data(self) -> dict[str, Any]:
        details = [
            {
                "loc": _as_json(detail.loc),
                "msg": _as_json(detail.msg),
                "type": _as_json(detail.type),
            }
            for detail in self.details[:20]
        ]
        return super()._data() | {"details": details}


class RateLimited(StatusError):
    """429: too many requests."""

    _usual_advice = "Lower rate=, or share a limiter= between all processes that use this key."


class ServerError(StatusError):
    """5xx: the server, or a proxy in front of it, failed."""

    _usual_advice = "Try again later. Running executions are not affected."


class StartUnknown(PromptLayerExecError):
    """The request to start a run may have reached PromptLayer, but the response was lost.

    Attributes:
        workflow: the name or id of the workflow.
        reason: what happened to the response.
        callback_token: the secret in the run's callback URL, if the session gave it one. It is all
            that `Session.recover` needs, so keep it from others.
        key: the key of the request, if it had one.
        is_key_stored: whether the session's store keeps the key, so that the next call with this
            key starts nothing.
    """

    _stored = ("workflow", "reason", "key", "is_key_stored")
    is_key_stored = False

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

    def _find_advice(self) -> str:
        advice = "Look for it in PromptLayer before you start it again, or you may pay twice."
        if self.is_key_stored:
            key = shlex.quote(str(self.key))
            advice = f"Look in PromptLayer for the metadata promptlayer_exec.key {self.key!r:.500}."
            advice += f" If the run is there, `promptlayer-exec starts adopt {key} ID` records its"
            advice += " id, as does await store.adopt(key, id). If not, `promptlayer-exec starts"
            advice += f" forget {key}` or await store.forget(key), and start it again. A store with"
            advice += " a URL needs --db URL."
        if self.callback_token is not None:
            advice = f"Session.recover(error) waits for its callback. {advice}"
        return advice


class ExecutionTimeout(PromptLayerExecError, TimeoutError):
    """The timeout passed before the execution was complete. The execution keeps running.

    If `execution_id` is None, the timeout passed before the run started.

    Attributes:
        timeout: the timeout in seconds.
    """

    _stored = ("timeout",)

    def __init__(self, message: str, *, timeout: float, **context: Any) -> None:
        super().__init__(message, **context)
        self.timeout = timeout

    def _find_advice(self) -> str:
        if self.execution_id is None:
            return "Try again with a longer timeout."
        pick_up = f"session.execution({self.execution_id}) picks it up."
        if self.last_snapshot is not None and self.last_snapshot.complete:
            return pick_up  # only its output is late
        return f"It continues on PromptLayer; {pick_up}"


class ExecutionFailed(PromptLayerExecError):
    """The execution is complete but has no output.

    Attributes:
        failed: the nodes that failed.
    """

    _usual_advice = "See error.failed and error.last_snapshot."
    _joint = " "  # the message is what the execution did

    def __init__(self, message: str, *, failed: tuple[Node, ...], **context: Any) -> None:
        super().__init__(message, **context)
        self.failed = failed

    def _data(self) -> dict[str, Any]:
        failed = [
            {
                "name": _as_json(node.name),
                "status": str(node.status),
                "reason": _as_json(error_text(node)),
            }
            for node in self.failed[:20]
        ]
        return super()._data() | {"failed": failed}


class InvalidOutput(PromptLayerExecError):
    """The output does not match the type given as `into=`.

    Attributes:
        path: the place of the mismatch in the output, such as `$.items[3].price`.
        value: the output as the server sent it.
        reason: what was expected there, and what came instead.
    """

    _usual_advice = "error.value has it. Change the type or the workflow's output node."
    _stored = ("path", "reason")

    def __init__(self, message: str, *, path: str, value: Any, reason: str, **context: Any) -> None:
        super().__init__(message, **context)
        self.path = path
        self.value = value
        self.reason = reason


class InvalidSignature(PromptLayerExecError, ValueError):
    """The webhook did not come from PromptLayer, or was signed with another secret."""

    _usual_advice = "Compare the secret with the one in PromptLayer's webhook settings."


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


def problem_of(error: BaseException) -> str:
    """Return what happened. Another library's text stays as it is."""
    if isinstance(error, PromptLayerExecError):
        return error.problem
    return printable(str(error) or type(error).__name__)


def what_happened(error: BaseException) -> str:
    """Return what happened, without the execution and without a full stop."""
    if isinstance(error, PromptLayerExecError):
        return printable(error._what())  # noqa: SLF001 - of this module
    return printable(str(error).rstrip(" \n.") or type(error).__name__)


def stored_data(error: BaseException) -> dict[str, Any]:
    """Return what an error carries, as JSON: neither secrets nor large values."""
    if isinstance(error, PromptLayerExecError):
        return error._data()  # noqa: SLF001 - of this module
    return {"reason": what_happened(error)}


def _as_json(value: Any) -> Any:
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return value[:1000]
        case tuple():
            return [_as_json(part) for part in value[:20]]
    return short_repr(value)
