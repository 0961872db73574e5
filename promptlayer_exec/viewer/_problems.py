"""What is wrong with PromptLayer's responses, for people who look at a page."""

from __future__ import annotations

import copy
import time

import attrs

from promptlayer_exec import (
    ConnectionFailed,
    Forbidden,
    InvalidResponse,
    NotFound,
    RateLimited,
    RequestError,
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
    attempts: int = 1  # that failed in this way, one after the other


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


def next_problem(
    previous: Problem | None, error: Exception, *, delay: float | None = None
) -> Problem:
    """Return the problem of an execution after another attempt has failed.

    If the attempt failed in another way than those before, as with a refused key during an outage,
    the problem begins now, and its attempts count from 1.

    Args:
        previous: the problem until now, or None if the latest response was good.
        error: why the attempt failed.
        delay: the seconds until the session tries again, so that there is nothing to do, or None if
            it does not.
    """
    now = time.time()
    kind = _kind(error)
    if previous is None:
        since, attempts = now, getattr(error, "attempts", 1)
    elif previous.kind == kind:
        since, attempts = previous.since, previous.attempts + 1
    else:
        since, attempts = now, 1

    if isinstance(error, RequestError):
        error = copy.copy(error)  # other observers also have it
        error.attempts = attempts
    if delay is None:
        return Problem(kind, explain_briefly(error), since, None, attempts)
    return Problem(kind, sentence(error), since, now + delay, attempts)


def _kind(error: Exception) -> str:
    return next((_KINDS[cls] for cls in type(error).__mro__ if cls in _KINDS), "other")
