"""What is stored of an item and of a batch, and how it is written as JSON."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Literal, NamedTuple

import attrs

Kind = Literal["succeeded", "failed", "unknown"]


class StoredError(NamedTuple):
    """Why an item has no output: the name of the error's type, and what it said."""

    type: str
    message: str


@attrs.frozen
class StoredOutcome:
    """How one item of a batch ended.

    Attributes:
        key: the item's.
        execution_id: the execution, if one is known to have been started.
        succeeded: whether there is an output.
        output: the main output; None where there is none.
        error: what went wrong; None where there is an output.
        started: when the run was started (UTC); None if none is known to have been.
        finished: when this outcome was known (UTC).
    """

    key: str
    execution_id: int | None
    succeeded: bool
    output: Any
    error: StoredError | None
    started: datetime | None
    finished: datetime

    @property
    def kind(self) -> Kind:
        """Whether it succeeded, failed, or nobody knows if it was started."""
        if self.succeeded:
            return "succeeded"
        is_unknown = self.error is not None and self.error.type == "StartUnknown"
        return "unknown" if is_unknown else "failed"

    def to_json(self) -> str:
        """Return it as one line of ASCII JSON; NaN and Infinity are written as Python's json does.

        Raises:
            RecursionError: the output is nested too deeply.
        """
        fields = attrs.asdict(self, recurse=False)
        if self.error is not None:
            fields["error"] = self.error._asdict()
        for name in ("started", "finished"):
            if fields[name] is not None:
                fields[name] = fields[name].isoformat()
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> StoredOutcome:
        """Return what `to_json` wrote."""
        fields = json.loads(text)
        if fields["error"] is not None:
            fields["error"] = StoredError(**fields["error"])
        for name in ("started", "finished"):
            if fields[name] is not None:
                fields[name] = datetime.fromisoformat(fields[name])
        return cls(**fields)


@attrs.frozen
class BatchStatus:
    """How far a batch is, in items.

    Attributes:
        waiting: not begun.
        running: begun, by a worker that lives or that will be found dead.
        succeeded: with an output.
        failed: with an error.
        unknown: of them nobody knows whether a run was started.
        total: all of them.
    """

    waiting: int
    running: int
    succeeded: int
    failed: int
    unknown: int
    total: int

    @property
    def finished(self) -> int:
        """How many have a stored outcome."""
        return self.succeeded + self.failed + self.unknown
