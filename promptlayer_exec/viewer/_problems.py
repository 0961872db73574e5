"""What is wrong with PromptLayer's responses, for people who look at a page."""

from __future__ import annotations

import attrs

from promptlayer_exec import (
    ConnectionFailed,
    Forbidden,
    InvalidResponse,
    NotFound,
    RateLimited,
    RequestTimeout,
    StatusError,
    Unauthorized,
)


@attrs.frozen
class Problem:
    """Why there is nothing new of an execution. Moments are seconds since 1970."""

    kind: str  # a word for the page, from `explain`
    text: str  # a sentence
    since: float  # when it was noticed
    until: float | None = None  # when PromptLayer is asked again, if it will be


def explain(error: Exception) -> tuple[str, str]:
    """Return the kind of an error, and a sentence for people."""
    kind, text = "other", str(error) or type(error).__name__
    answer = f"{error.status} {error.message}" if isinstance(error, StatusError) else ""

    match error:
        case Unauthorized():
            kind = "refused"
            text = f"PromptLayer refuses the API key ({answer}). Check PROMPTLAYER_API_KEY where"
            text += " you started the viewer, and start it again."

        case Forbidden():
            kind = "refused"
            text = f"PromptLayer does not allow this API key to do that ({answer})."
            text += " Check that the key is of the right workspace."

        case NotFound():
            kind = "missing"
            named = error.execution_id is not None
            what = f"execution {error.execution_id}" if named else "workflow of this name or id"
            text = f"PromptLayer has no {what} ({error.status})."
            text += " Check that it is of the workspace of this API key."

        case RateLimited():
            kind, text = "waiting", f"PromptLayer asks to wait ({answer})."

        case StatusError():
            kind = "failing" if error.status >= 500 else "other"
            text = f"PromptLayer responded with {answer}."

        case ConnectionFailed():
            reason = str(error.reason or error.args[0]).rstrip(".")
            kind, text = "unreachable", f"PromptLayer is unreachable: {reason}."

        case RequestTimeout():
            kind, text = "slow", "PromptLayer did not respond in time."

        case InvalidResponse():
            reason = str(error.args[0]).rstrip(".")
            kind, text = "unreadable", f"PromptLayer's response is unreadable: {reason}."

    return kind, text
