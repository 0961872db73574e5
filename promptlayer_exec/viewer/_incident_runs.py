"""Which failures of a workflow are one incident."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from promptlayer_exec._causes import common_reason

Cause = tuple[str, str, str]  # workflow, node and reason

_QUIET = 3600.0  # seconds without a failure, after which a success ends an incident


@attrs.define
class Incident:
    """The latest failures for one cause, the newest first."""

    first: float  # when the earliest of them began
    count: int = 0
    total: int = 0  # of the runs of the workflow since then that are over
    is_open: bool = True  # earlier failures may belong to it


def cause_of(run: Mapping[str, Any]) -> Cause:
    """Return what a failed run shares with others: workflow, node and reason, or nothing of these.

    Args:
        run: a record of the history.
    """
    node, problem = run["failed_node"] or "", run["problem"] or ""
    reason = problem.removeprefix(f"{node}: ") if node else problem
    return run["workflow"] or "", node, common_reason(reason)


def find_incidents(runs: Iterable[Mapping[str, Any]]) -> dict[Cause, Incident]:
    """Return the latest incident of each cause.

    It begins with the first failure after a quiet time: an hour or more without a failure for this
    cause, in which a run of the workflow succeeded. So a workflow that runs every night, and always
    fails, has one incident, and some successes among many failures do not end one.

    Args:
        runs: all runs of one workflow that succeeded or failed, the newest first.
    """
    incidents = dict[Cause, Incident]()
    success = None  # when the success began that came next after the present run
    for number, run in enumerate(runs, 1):
        if run["outcome"] == "succeeded":
            success = run["began"]
            continue

        incident = incidents.setdefault(cause_of(run), Incident(run["began"]))
        is_quiet = incident.first - run["began"] >= _QUIET
        if is_quiet and success is not None and success < incident.first:
            incident.is_open = False
        if incident.is_open:
            incident.first, incident.total = run["began"], number
            incident.count += 1
    return incidents
