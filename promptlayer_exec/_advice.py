"""What a person at a terminal or at the viewer's page can do about each error.

Internal. An error's own `advice` is for the author of a program. This table is for people, in the
words of commands. It looks at the class of an error and at what the error carries, never at its
text. So it explains an error that a database stored as well as one that was just raised.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

import promptlayer_exec
from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    ExecutionFailed,
    ExecutionTimeout,
    Forbidden,
    InvalidInputs,
    InvalidOutput,
    InvalidResponse,
    KeyConflict,
    NotFound,
    PromptLayerExecError,
    RateLimited,
    RequestTimeout,
    ResponseTooLarge,
    ServerError,
    SessionClosed,
    StartUnknown,
    StatusError,
    StoreUnavailable,
    Unauthorized,
    UnprocessableEntity,
)
from promptlayer_exec import _integration as integration
from promptlayer_exec._integration import KEY_METADATA
from promptlayer_exec._ways_out import out_of_key

Data = Mapping[str, Any]


def explain(error: Exception) -> str:
    """Return what happened, with its execution, and what a person can do."""
    data = integration.stored_data(error)
    return _joined(integration.problem_of(error), type(error), data)


def explain_briefly(error: Exception) -> str:
    """Return the same for a place that already shows the execution."""
    return _joined(sentence(error), type(error), integration.stored_data(error))


def sentence(error: Exception) -> str:
    """Return what happened, for a place that shows the execution, and what will happen next."""
    if not isinstance(error, PromptLayerExecError):
        return integration.problem_of(error)  # it may begin with the name of an argument
    text = integration.what_happened(error)
    return f"{text[:1].upper()}{text[1:]}."


def explain_stored(kind: str, problem: str, data: Data) -> str:
    """Return the same for an error that a database stored, by the name of its class."""
    cls = getattr(promptlayer_exec, kind, Exception)
    return _joined(problem, cls, data)


def _joined(problem: str, kind: type, data: Data) -> str:
    advice = next((_ADVICE[cls] for cls in kind.__mro__ if cls in _ADVICE), "")
    if callable(advice):
        advice = advice(data)
    return integration.printable(f"{problem} {advice}".rstrip())


def _about_setting(data: Data) -> str:
    return _SETTINGS.get(data["setting"], "")


def _about_key(data: Data) -> str:
    if data.get("batch") is not None:
        return "Use another key for the item, or another --name for a new batch."
    return "Use another --key, or repeat the original command."


def _about_connection(data: Data) -> str:
    if (problem := data.get("tls")) is not None:
        return TLS_ADVICE[problem]
    return "Check the network and --base-url."


def _about_missing(data: Data) -> str:
    if data.get("execution_id") is not None:
        return "Check the id, --base-url, and that the API key belongs to the same workspace."
    return (
        "Check the name or id, --base-url, and that the API key belongs to the same workspace."
        " `promptlayer-exec workflows` lists the names."
    )


def _about_unknown(data: Data) -> str:
    if not data.get("is_key_stored"):
        return "Look for it in PromptLayer before you start it again, or you may pay twice."
    key = str(data["key"])
    adopt, forget = (way.command for way in out_of_key("unknown", key))
    return (
        f"The key starts nothing now. Look in PromptLayer for the metadata {KEY_METADATA}"
        f" {shlex.quote(key)}. If the run is there, `{adopt}` records its id. If not, `{forget}`,"
        " and start it again. Use the same --db."
    )


# What to do if there is no TLS connection, by `ConnectionFailed.tls`.
TLS_ADVICE = {
    "expired": "Check this machine's clock. If it is right, the server needs a new certificate.",
    "another host": "Check --base-url: this certificate belongs to another host.",
    "certificate": "If a private authority issued the certificate, set SSL_CERT_FILE to that"
    " authority's certificate.",
    "no TLS": "Check the scheme and the port of --base-url.",
    "handshake": "Check the scheme and the port of --base-url.",
}

# What to do about a wrong setting, by the name of the argument of `Session` or `Batch`.
_SETTINGS = {
    "api_key": "Set the environment variable PROMPTLAYER_API_KEY to one from PromptLayer's"
    " settings.",
    "base_url": "Correct --base-url or PROMPTLAYER_BASE_URL.",
    "database_url": "Check --db or PROMPTLAYER_EXEC_DB: it must be like sqlite:///FILE or"
    " postgresql://user@host/database.",
    "give_up_after": "Correct --give-up-after.",
    "max_in_flight": "Correct --max-in-flight.",
    "outage": "Correct --outage.",
    "rate": "Correct --rate.",
    "same_server": "Continue there, or give another --name for a new batch. If it is the same"
    " server and workspace under a new address or with a new key, give --same-server.",
    "trust_env": "To use no proxy, set NO_PROXY=*.",
    "wait_timeout": "Correct --timeout.",
    "watch_outage": "Correct --outage.",
}

# What to do about each error. A class without a row has the one of its base class.
_ADVICE: Mapping[type, str | Callable[[Data], str]] = {
    ConfigurationError: _about_setting,
    InvalidInputs: "",  # the commands show how to list the inputs
    KeyConflict: _about_key,
    StoreUnavailable: "Check --db, and that the database is running. Then repeat the command.",
    SessionClosed: "",
    ConnectionFailed: _about_connection,
    RequestTimeout: "Try again.",
    InvalidResponse: "Check that --base-url is the PromptLayer API.",
    ResponseTooLarge: "",  # no option raises the limit
    StatusError: "Check --base-url and the arguments.",
    Unauthorized: "Check PROMPTLAYER_API_KEY.",
    Forbidden: "Check that the API key belongs to the workflow's workspace.",
    NotFound: _about_missing,
    UnprocessableEntity: "Correct the parameters that the server names.",
    RateLimited: "Try again later.",
    ServerError: "Try again later. Running executions are not affected.",
    StartUnknown: _about_unknown,
    ExecutionTimeout: "",  # the commands show how to follow it
    ExecutionFailed: "",  # the commands show how to print the whole error
    InvalidOutput: "",
    PromptLayerExecError: "",
}
