"""The statuses of a node in one table, which models, notebook, terminal and page read."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import attrs


class NodeStatus(enum.StrEnum):
    """The documented statuses of a node; the last three are final, as their entries say."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCESS = "SUCCESS"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"

    __hash__ = str.__hash__  # Enum's own is a Python call for each node of each poll


@attrs.frozen
class StatusEntry:
    """What a status means, and how it is displayed."""

    final: bool
    mark: str
    colour: str  # of the mark in a notebook; it suits light and dark pages
    style: str  # of the name in a terminal, as rich spells it
    rank: int  # where not all nodes can be shown, those of rank 0 come first


# The page has its own icons, in index.html, and its own colours, in its style sheets.
STATUS_TABLE: Mapping[str, StatusEntry] = {
    NodeStatus.QUEUED: StatusEntry(False, "○", "#8a8a8a", "dim", 3),
    NodeStatus.RUNNING: StatusEntry(False, "●", "#3b82d6", "yellow", 1),
    NodeStatus.SUCCESS: StatusEntry(True, "✓", "#2f9e5f", "green", 2),
    NodeStatus.FAILED: StatusEntry(True, "✗", "#e0524d", "bold red", 0),
    NodeStatus.SKIPPED: StatusEntry(True, "↷", "#8a8a8a", "dim", 4),
}
UNKNOWN_STATUS = StatusEntry(False, "?", "#c27d0e", "magenta", 1)

FINAL = tuple(status for status, entry in STATUS_TABLE.items() if entry.final)
# PromptLayer has documented FAILED as FAILURE, too.
STATUSES: Mapping[str, NodeStatus] = {**NodeStatus.__members__, "FAILURE": NodeStatus.FAILED}


def status_entry(status: str) -> StatusEntry:
    """Return the entry of a status, which may be an unknown one."""
    return STATUS_TABLE.get(status, UNKNOWN_STATUS)
