"""What an agent can do about each error, in the words of the tools. An agent has no shell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mcp.types import CallToolResult, TextContent

from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    ExecutionTimeout,
    Forbidden,
    InvalidInputs,
    InvalidResponse,
    KeyConflict,
    NotFound,
    PromptLayerExecError,
    RateLimited,
    RequestTimeout,
    ServerError,
    SessionClosed,
    StartUnknown,
    StatusError,
    StoreUnavailable,
    Unauthorized,
)
from promptlayer_exec._integration import problem_of
from promptlayer_exec.mcp._tool_values import clip

_LATER = "Call the tool again in a minute. Runs that have started continue on PromptLayer."


def error_result(error: Exception) -> CallToolResult:
    text = TextContent(type="text", text=clip(error_text(error), 5_000))
    return CallToolResult(content=[text], is_error=True)


def error_text(error: Exception) -> str:
    """Return what happened, and what an agent can do about it."""
    if not isinstance(error, PromptLayerExecError):
        return str(error)
    advice = next(_ADVICE[cls] for cls in type(error).__mro__ if cls in _ADVICE)
    if callable(advice):
        advice = advice(error)
    return f"{problem_of(error)} {advice}".rstrip()


def _about_missing(error: Any) -> str:
    if error.execution_id is None:
        return "list_workflows shows all workflows."
    return "Use the id that start_workflow returned, or ask the user for it. Do not guess ids."


def _about_timeout(error: Any) -> str:
    if error.execution_id is None:
        return "Call the tool again."
    return f"Call wait_execution with execution_id '{error.execution_id}'."


def _about_unknown(error: Any) -> str:
    if error.is_key_stored:
        return "Another call with this idempotency_key starts nothing: ask the user."
    return (
        "Do not call this tool again for the same purpose, or the user may pay twice: ask them to"
        " look for the run in PromptLayer."
    )


# What to do about each error. A class without a row has the one of its base class.
_ADVICE: Mapping[type, str | Callable[[Any], str]] = {
    ConfigurationError: "Tell the user: they must correct how they start this server.",
    InvalidInputs: "No run was started. describe_workflow lists the inputs of the workflow.",
    KeyConflict: "A new run needs a new idempotency_key.",
    StoreUnavailable: "Call the tool again in a minute, with the same idempotency_key.",
    SessionClosed: "The server of these tools is stopping. Runs continue on PromptLayer.",
    ConnectionFailed: _LATER,
    RequestTimeout: _LATER,
    InvalidResponse: "Tell the user. The base URL of this server may be wrong.",
    StatusError: "Tell the user.",
    Unauthorized: "Tell the user to correct PROMPTLAYER_API_KEY where they start this server.",
    Forbidden: "Tell the user: this server needs an API key of the workflow's workspace.",
    NotFound: _about_missing,
    RateLimited: _LATER,
    ServerError: _LATER,
    StartUnknown: _about_unknown,
    ExecutionTimeout: _about_timeout,
    PromptLayerExecError: "",
}
