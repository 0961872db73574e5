"""Runs that fail for one cause: how many, since when, whom they hit, and what differs first."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from promptlayer_exec import PromptLayerExecError, Snapshot
from promptlayer_exec.viewer._board import Board
from promptlayer_exec.viewer._brief import brief, brief_inputs
from promptlayer_exec.viewer._history import History, cause_of
from promptlayer_exec.viewer._problems import explain
from promptlayer_exec.viewer._routes import json_response, refuse

_HOUR = 3600
_LINES = 200  # of the runs of one cause


def add_incident_routes(app: FastAPI, board: Board, history: History | None) -> None:
    """Add the routes about causes. Those that count runs need the history."""

    @app.get("/api/executions/{failed}/difference/{success}")
    async def get_difference(failed: int, success: int) -> Response:
        try:
            await board.add(success)
        except PromptLayerExecError as error:
            return refuse(explain(error)[1], 502)

        snapshots = []
        for execution_id in (failed, success):
            card = board.cards.get(execution_id)
            if card is None:
                return refuse("The viewer does not follow both of these executions.", 404)
            while card.snapshot is None and not card.is_lost and not board.is_closed:
                await board.changed.wait()
            if card.snapshot is None:
                return refuse("The viewer could not read both of these executions.", 502)
            snapshots.append(card.snapshot)
        return json_response(first_difference(*snapshots))

    if history is not None:
        _add_cause_routes(app, history)


def _add_cause_routes(app: FastAPI, history: History) -> None:
    @app.get("/api/causes")
    async def get_causes(days: float = 0) -> Response:
        failures = await history.failures(since=time.time() - 86400 * days if days > 0 else 0.0)
        counts = Counter(cause_of(run) for run in failures)
        latest: dict[tuple[str, str, str], float] = {}
        for run in failures:
            latest.setdefault(cause_of(run), run["began"])
        return json_response(
            [
                {**_named(cause), "count": count, "latest": latest[cause]}
                for cause, count in counts.most_common()
                if count > 1 and cause[0]
            ]
        )

    @app.get("/api/cause")
    async def get_cause(workflow: str, cause: str, failed_node: str = "") -> Response:
        wanted = (workflow, failed_node, cause)
        runs = [run for run in await history.failures(workflow) if cause_of(run) == wanted]
        hours = Counter(int(run["began"] // _HOUR) * _HOUR for run in runs)
        view = {
            **_named(wanted),
            "count": len(runs),
            "problem": runs[0]["problem"] if runs else None,
            "first": runs[-1]["began"] if runs else None,
            "latest": runs[0]["began"] if runs else None,
            "hours": sorted(hours.items()),
            "runs": [_line(run) for run in runs[:_LINES]],
        }
        return json_response(view)


def first_difference(failed: Snapshot, success: Snapshot) -> dict[str, str] | None:
    """Return the first value of a failed run that is another one than in a success.

    Args:
        failed: a run that failed.
        success: a run of the same workflow that succeeded.

    Returns:
        its node, where it is in the value, and both values in short. None if no value differs.
    """
    for name, node in failed.nodes.items():
        other = success.nodes.get(name)
        if other is None or not (node.succeeded and other.succeeded):
            continue
        for path, now, before in _differences(node.value, other.value):
            return {"node": name, "path": path, "now": brief(now), "before": brief(before)}
    return None


def _differences(now: Any, before: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield where two values differ, and both, as deep inside as both have the same form."""
    pairs: Sequence[tuple[str, Any, Any]]
    if isinstance(now, dict) and isinstance(before, dict) and now.keys() == before.keys():
        pairs = [(f"{path}.{name}".lstrip("."), now[name], before[name]) for name in now]
    elif isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        pairs = [
            (f"{path}[{index}]", one, other)
            for index, (one, other) in enumerate(zip(now, before, strict=True))
        ]
    elif now != before or isinstance(now, bool) != isinstance(before, bool):
        yield path, now, before
        return
    else:
        return

    for pair_path, one, other in pairs:
        yield from _differences(one, other, pair_path)


def _named(cause: tuple[str, str, str]) -> dict[str, str]:
    return dict(zip(("workflow", "failed_node", "cause"), cause, strict=True))


def _line(run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": run["key"],
        "execution_id": str(run["execution_id"]),
        "label": run["label"],
        "version": run["version"],
        "metadata": None if run["metadata"] is None else json.loads(run["metadata"]),
        "began": run["began"],
        "has_inputs": run["inputs"] is not None,
        "inputs": brief_inputs(run["inputs"]),
    }
