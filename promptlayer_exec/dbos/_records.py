"""How items started and finished, as stored in JSON, and counts of items."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Generic, Literal, TypedDict

import attrs
from typing_extensions import TypeVar  # with a default

from promptlayer_exec._integration import problem_of, short_repr, stored_data

OutputT = TypeVar("OutputT", default=Any)
Kind = Literal["succeeded", "failed", "unknown"]


@attrs.frozen
class StoredError:
    """Why an item has no output.

    Attributes:
        type: the name of the error's type, such as `ExecutionFailed`.
        message: the error's `problem`.
        data: the attributes of its class, as JSON, such as the nodes that `failed`. Long texts are
            shortened. `reason` is what went wrong, without the id of the execution.
    """

    type: str
    message: str
    data: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class StoredOutcome(Generic[OutputT]):
    """How one item of a batch finished.

    Attributes:
        key: the item's key.
        execution_id: the id of the execution, or None if none is known.
        succeeded: whether there is an output.
        output: the main output, or None if `succeeded` is false.
        error: what went wrong, or None if `succeeded` is true.
        started: when the execution started (UTC), or None if none is known.
        finished: when this outcome became known (UTC).
    """

    key: str = attrs.field(repr=short_repr)
    execution_id: int | None
    succeeded: bool
    output: OutputT = attrs.field(repr=short_repr)
    error: StoredError | None = attrs.field(repr=short_repr)
    started: datetime | None
    finished: datetime

    @property
    def kind(self) -> Kind:
        """`succeeded`, `failed`, or `unknown` if the item may or may not have started."""
        if self.succeeded:
            return "succeeded"
        is_unknown = self.error is not None and self.error.type == "StartUnknown"
        return "unknown" if is_unknown else "failed"

    def to_json(self) -> str:
        """Return one line of ASCII JSON, with NaN and Infinity as Python's `json` writes them.

        Raises:
            RecursionError: the output has too many levels.
        """
        fields = attrs.asdict(self, recurse=False)
        if self.error is not None:
            fields["error"] = attrs.asdict(self.error)
        return json.dumps(fields, default=datetime.isoformat)

    @classmethod
    def from_json(cls, text: str) -> StoredOutcome:
        """Return the outcome that `to_json` wrote."""
        fields = json.loads(text)
        if fields["error"] is not None:
            fields["error"] = StoredError(**fields["error"])
        for name in ("started", "finished"):
            if fields[name] is not None:
                fields[name] = datetime.fromisoformat(fields[name])
        return cls(**fields)


@attrs.frozen
class BatchStatus:
    """How many items of a batch are in which state.

    Attributes:
        waiting: in the queue.
        running: taken by a worker. If none is alive, the next `work` continues with them.
        succeeded: finished with an output.
        failed: finished with an error.
        unknown: their runs may or may not have started.
        total: all items.
        workers: how many workers are alive. A silent one counts for 12 seconds.
    """

    waiting: int
    running: int
    succeeded: int
    failed: int
    unknown: int
    total: int
    workers: int = 0

    @property
    def finished(self) -> int:
        """How many items have an outcome."""
        return self.succeeded + self.failed + self.unknown


@attrs.frozen
class Ending:
    """How an attempt of an item finished: its kind, and the outcome as JSON.

    Attributes:
        has_run: whether a worker followed a run until it finished. If not, another worker may
            meanwhile record a run, and the item continues with it.
        may_restart: whether the batch's `attempts` apply: the run completed without an output, and
            neither `recheck` nor `retry` had put the item back to follow it.
    """

    key: str
    attempt: int
    kind: str
    outcome: str
    seconds: float | None = None
    has_run: bool = False
    may_restart: bool = False

    @classmethod
    def of(cls, attempt: int, outcome: StoredOutcome, *, follows_again: bool = False) -> Ending:
        """Return the ending of an attempt with this outcome."""
        has_failed = outcome.error is not None and outcome.error.type == "ExecutionFailed"
        seconds = None
        if outcome.started is not None and (outcome.succeeded or has_failed):
            # Somebody may have put back the clock.
            seconds = max((outcome.finished - outcome.started).total_seconds(), 0.0)

        return cls(
            outcome.key,
            attempt,
            outcome.kind,
            outcome.to_json(),
            seconds,
            has_run=outcome.execution_id is not None,
            may_restart=has_failed and not follows_again,
        )


def stored_error(error: Exception) -> StoredError:
    """Return an error in its stored form."""
    return StoredError(type(error).__name__, problem_of(error), stored_data(error))


class StartRecord(TypedDict):
    """The stored result of a start request. One without an id has a `StoredError`."""

    execution_id: int | None
    at: str
    error: list[Any] | None
    # When `recheck` or `retry` put the item back (UTC). Its run must not lead to another one.
    followed_from: str | None


def start_record(
    at: datetime,
    execution_id: int | None = None,
    error: Exception | None = None,
    *,
    followed_from: datetime | None = None,
) -> StartRecord:
    """Return the result of a start request, which was known at `at`."""
    return {
        "execution_id": execution_id,
        "at": at.isoformat(),
        "error": None if error is None else [*attrs.astuple(stored_error(error))],
        "followed_from": None if followed_from is None else followed_from.isoformat(),
    }
