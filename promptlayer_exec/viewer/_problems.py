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
    ServerError,
    Unauthorized,
)
from promptlayer_exec._advice import explain_briefly, sentence


@attrs.frozen
class Problem:
    """Why there is nothing new of an execution. Moments are seconds since 1970."""

    kind: str  # a word for the page, from `explain`
    text: str  # a sentence
    since: float  # when it was noticed
    until: float | None = None  # when PromptLayer is asked again, if it will be


# The page's word for each error, by which it groups them. Others are `other`.
_KINDS: dict[type[Exception], str] = {
    Unauthorized: "refused",
    Forbidden: "refused",
    NotFound: "missing",
    RateLimited: "waiting",
    ServerError: "failing",
    ConnectionFailed: "unreachable",
    RequestTimeout: "slow",
    InvalidResponse: "unreadable",
}


def explain(error: Exception) -> tuple[str, str]:
    """Return the kind of an error, and sentences for people: what happened, and what to do."""
    return _kind(error), explain_briefly(error)


def explain_retry(error: Exception) -> tuple[str, str]:
    """Return the same for an error that the session retries, so that there is nothing to do."""
    return _kind(error), sentence(error)


def _kind(error: Exception) -> str:
    return next((_KINDS[cls] for cls in type(error).__mro__ if cls in _KINDS), "other")
