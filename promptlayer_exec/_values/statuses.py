"""The one table of node statuses, for models, notebooks, the terminal and the viewer."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import attrs


class NodeStatus(enum.StrEnum):
    """The documented statuses of a node. The last three are final."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCESS = "SUCCESS"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"

    __hash__ = str.__hash__  # Enum's own is a Python call for each node of each poll


@attrs.frozen
class StatusEntry:
    """Whether a status is final, and how to display it."""

    final: bool
    mark: str
    colour: str  # of the mark in a notebook, for light and dark pages
    style: str  # of the name in a terminal, as rich spells it
    rank: int  # if not all nodes fit, nodes of rank 0 come first


# The viewer's page has its own icons (index.html) and colours (style sheets).
STATUS_TABLE: Mapping[str, StatusEntry] = {
    NodeStatus.QUEUED: StatusEntry(False, "○", "#8a8a8a", "dim", 3),
    NodeStatus.RUNNING: StatusEntry(False, "●", "#3b82d6", "yellow", 1),
    NodeStatus.SUCCESS: StatusEntry(True, "✓", "#2f9e5f", "green", 2),
    NodeStatus.FAILED: StatusEntry(True, "✗", "#e0524d", "bold red", 0),
    NodeStatus.SKIPPED: StatusEntry(True, "↷", "#8a8a8a", "dim", 4),
}
UNKNOWN_STATUS = StatusEntry(False, "?", "#c27d0e", "magenta", 1)

FINAL = tuple(status for status, entry in STATUS_TABLE.items() if entry.final)
# PromptLayer has documented FAILED as FAILURE as well.
STATUSES: Mapping[str, NodeStatus] = {**NodeStatus.__members__, "FAILURE": NodeStatus.FAILED}


def status_entry(status: str) -> StatusEntry:
    """Return the entry of a status, which may be an unknown one."""
    return STATUS_TABLE.get(status, UNKNOWN_STATUS)
