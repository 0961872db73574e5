"""Runs whose outcomes nobody will get, in one line of the log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from promptlayer_exec._values.errors import StartUnknown
from promptlayer_exec._values.events import logger
from promptlayer_exec._values.text import short_repr, shown_key


def warn_of_run(message: str, *values: object) -> None:
    """Log a warning without which a paid run could be lost: on stderr if no handler gets it.

    `logging.config.dictConfig`, for example, disables all loggers that it does not name.
    """
    logger.warning(message, *values, stacklevel=2)
    if not _is_logged():
        print(message % values, file=sys.stderr, flush=True)  # noqa: T201


def _is_logged() -> bool:
    """Return True if a handler gets the warnings of our logger."""
    if logger.disabled or not logger.isEnabledFor(logging.WARNING):
        return False
    if not logger.hasHandlers():  # then Python prints them
        return logging.lastResort is not None

    source: logging.Logger | None = logger
    while source is not None:
        for handler in source.handlers:
            if handler.level <= logging.WARNING and not isinstance(handler, logging.NullHandler):
                return True
        source = source.parent if source.propagate else None
    return False


@attrs.frozen
class AbandonedRun:
    """A run that started, and whose outcome nobody will get.

    Attributes:
        is_recorded: whether the session's store leads from its key to it.
    """

    execution_id: int
    workflow: str | int | None
    key: Any
    is_recorded: bool


@attrs.define(eq=False)
class AbandonedRuns:
    """Logs the abandoned runs of several calls in one line, once all of them are known.

    As long as somebody is gathering, more may come: from items that are being cancelled, and from
    start requests whose responses are still on their way.
    """

    _gathering: int = attrs.field(init=False, default=0)
    _runs: list[AbandonedRun] = attrs.field(init=False, factory=list)
    _lost: list[StartUnknown] = attrs.field(init=False, factory=list)

    def add(self, run: AbandonedRun) -> None:
        """Add a run that started."""
        self._runs.append(run)

    def add_lost(self, error: StartUnknown) -> None:
        """Add a run that may have started."""
        self._lost.append(error)

    def begin(self) -> None:
        """Begin to gather. As many calls of `end` must follow."""
        self._gathering += 1

    def end(self) -> None:
        """Log what was gathered, unless somebody else is still gathering."""
        self._gathering -= 1
        if not self._gathering:
            self._log()

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Gather in the block."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def _log(self) -> None:
        runs, self._runs = self._runs, []
        lost, self._lost = self._lost, []

        if len(runs) == 1 and not lost:
            log_abandoned(runs[0])
        elif len(lost) == 1 and not runs:
            log_unknown(lost[0])
        elif runs or lost:
            texts = ([self._text(runs)] if runs else []) + ([_lost_text(lost)] if lost else [])
            warn_of_run("%s", ". ".join(texts))

    def _text(self, runs: list[AbandonedRun]) -> str:
        runs.sort(key=lambda run: run.execution_id)
        others = [run for run in runs if not run.is_recorded]
        ids = ", ".join(f"{run.execution_id}{shown_key(run.key)}" for run in others)

        if not others:
            way_back = f"session.find(key) picks up each by its key: {_keys_text(runs)}"
        elif len(others) == len(runs):
            way_back = f"session.execution(id) picks up each by its id: {ids}"
        else:
            recorded = len(runs) - len(others)
            way_back = f"session.find(key) picks up {recorded} of them by their keys,"
            way_back += f" session.execution(id) the others by their ids: {ids}"
        count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
        return f"{count} started, but nobody received their outcomes. {way_back}"


def _keys_text(runs: list[AbandonedRun]) -> str:
    """Return the first keys, because the store lists them all."""
    keys = [short_repr(run.key) for run in runs[:5]]
    more = len(runs) - len(keys)
    return ", ".join(keys) + (f" and {more} more" if more else "")


def log_abandoned(run: AbandonedRun) -> None:
    """Log the id of a started run whose caller is gone."""
    warn_of_run(
        "execution %d of workflow %.100r%s started, but nobody received its outcome."
        " session.execution(%d) picks it up",
        run.execution_id,
        run.workflow,
        shown_key(run.key),
        run.execution_id,
    )


def log_unknown(error: StartUnknown) -> None:
    """Log a request that may have started a run, because nobody will get the error."""
    warn_of_run("%s", error)


def _lost_text(lost: list[StartUnknown]) -> str:
    names = ", ".join(
        f"workflow {error.workflow!r:.100}" if error.key is None else f"key {short_repr(error.key)}"
        for error in lost
    )
    count = "1 run" if len(lost) == 1 else f"{len(lost)} runs"
    return (
        f"{count} may have started, because the response was lost: {names}. Look in PromptLayer"
        " before you start them again, or you may pay twice"
    )
