"""The session that the commands use."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from promptlayer_exec import (
    ConfigurationError,
    Observer,
    PollPolicy,
    RetryPolicy,
    Session,
)
from promptlayer_exec._integration import printable
from promptlayer_exec.cli._text import err

if TYPE_CHECKING:
    from promptlayer_exec.simulator import Simulator


# The modules whose warnings the commands show; of the others, they say the same in their own words.
_SHOWN = ("definitions", "channels", "retry")


def retry_policy(outage: float | None) -> RetryPolicy:
    """Return the library's policy, or one for the outage that was given."""
    return RetryPolicy() if outage is None else RetryPolicy(outage=outage, watch_outage=outage)


def open_session(
    base_url: str | None,
    retry: RetryPolicy,
    warn: Callable[[str], None] | None = None,
    *,
    wait_timeout: float = 3600.0,
    no_push: bool = False,
    observer: Observer | None = None,
) -> Session:
    """Return a session with the key from the environment.

    `warn` is called when an outage begins, and with an input of a doubtful type.
    """
    if not os.environ.get("PROMPTLAYER_API_KEY"):
        raise ConfigurationError(
            "there is no API key: set the environment variable PROMPTLAYER_API_KEY to one from"
            " PromptLayer's settings"
        )
    if warn is not None:
        show_warnings(warn, of=_SHOWN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session = Session(
            base_url=base_url,
            retry=retry,
            wait_timeout=wait_timeout,
            observers=[] if observer is None else [observer],
            push=False if no_push else None,
        )
    for warning in caught:
        err(f"warning: {printable(str(warning.message))}")
    return session


def demo_session(simulator: Simulator, warn: Callable[[str], None]) -> Session:
    """Return a session on a simulator that polls often enough to see short nodes running."""
    show_warnings(warn, of=_SHOWN)
    poll = PollPolicy(floor=0.2, ceiling=0.4)
    return Session(simulator.api_key, base_url=simulator.base_url, poll=poll)


def show_warnings(write: Callable[[str], None], *, of: Collection[str] = ()) -> None:
    """Write the library's warnings, or those `of` some modules, to the very end of the process.

    Some come when a session is closed, such as the id of a run that nobody got.
    """
    handler = _Warnings(write)
    if of:
        handler.addFilter(lambda record: record.module in of)
    logger = logging.getLogger("promptlayer_exec")
    for earlier in logger.handlers[:]:
        logger.removeHandler(earlier)
    logger.addHandler(handler)


class _Warnings(logging.Handler):
    """Writes each warning as a line."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(printable(record.getMessage()))
