"""The session that the commands use, and how its troubles are told."""

import os
import warnings
from collections.abc import Callable

from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    Event,
    Observer,
    RateLimited,
    RequestRetried,
    RequestTimeout,
    RetryPolicy,
    Session,
    StatusError,
)

from ._streams import err
from ._text import printable, shorten


def open_session(
    base_url: str | None,
    retry: RetryPolicy,
    warn: Callable[[str], None] | None = None,
    *,
    wait_timeout: float = 3600.0,
) -> Session:
    """Return a session with the key from the environment.

    Args:
        base_url: the server, if not the one from the environment.
        retry: what to survive.
        warn: told of every request that will be repeated, if it is to be.
        wait_timeout: the session's.

    Raises:
        ConfigurationError: a setting is malformed, or there is no key.
    """
    if not os.environ.get("PROMPTLAYER_API_KEY"):
        raise ConfigurationError(
            "there is no API key: set the environment variable PROMPTLAYER_API_KEY"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session = Session(
            base_url=base_url,
            retry=retry,
            wait_timeout=wait_timeout,
            observers=[] if warn is None else [report_retries(warn)],
        )
    for warning in caught:
        err(f"warning: {printable(str(warning.message))}")
    return session


def report_retries(warn: Callable[[str], None]) -> Observer:
    """Return an observer that tells in one line of each request that will be repeated."""

    def observe(event: Event) -> None:
        if isinstance(event, RequestRetried):
            what, why = _trouble(event.error)
            reason = shorten(printable(why), 120)
            warn(f"{what}, retrying in {event.delay:.1f} s ({reason})")

    return observe


def _trouble(error: Exception) -> tuple[str, str]:
    if isinstance(error, ConnectionFailed):
        return "server unreachable", error.reason
    if isinstance(error, RequestTimeout):
        return "no answer in time", str(error.args[0])
    if isinstance(error, RateLimited):
        return "too many requests", f"{error.status} {error.message}"
    if isinstance(error, StatusError):
        return "server in trouble", f"{error.status} {error.message}"
    return "answer unusable", str(error.args[0])
