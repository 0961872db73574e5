"""Runs that fail for one cause: how many, since when, whom they hit, and what differs first."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

from fastapi import FastAPI, Query
from starlette.responses import Response

from promptlayer_exec import PromptLayerExecError
from promptlayer_exec.viewer._board import Board, Card
from promptlayer_exec.viewer._brief import brief, brief_inputs
from promptlayer_exec.viewer._history import History
from promptlayer_exec.viewer._incident_runs import cause_of, find_incidents
from promptlayer_exec.viewer._problems import explain
from promptlayer_exec.viewer._reruns import find_alike, latest_reruns
from promptlayer_exec.viewer._routes import json_response, refuse

_HOUR = 3600
_LINES = 200  # of the runs of one cause
_COMPARED = 5  # failed runs, besides the newest, that must share a difference
_INPUTS = 2  # that differ, to name
_MISSING: Any = object()  # stands for the value of an input that a run does not have

_Difference = tuple[str, Any, Any]  # where it is, the value of a failed run, and that of a success


def add_incident_routes(app: FastAPI, board: Board, history: History | None) -> None:
    """Add the routes about causes. Those that count runs need the history."""

    @app.get("/api/executions/{failed}/differences/{success}")
    async def get_differences(
        failed: int, success: int, others: Annotated[tuple[int, ...], Query()] = ()
    ) -> Response:
        try:
            cards = [await _read(board, execution_id) for execution_id in (failed, success)]
        except PromptLayerExecError as error:
            return refuse(explain(error)[1], 502)

        for execution_id in others[:_COMPARED]:
            with suppress(PromptLayerExecError):
                cards.append(await _read(board, execution_id))
        if any(card.snapshot is None for card in cards):
            return refuse("The viewer could not read all of these executions.", 502)
        return json_response(what_differs(cards[0], cards[1], cards[2:]))

    if history is not None:
        _add_cause_routes(app, board, history)


def _add_cause_routes(app: FastAPI, board: Board, history: History) -> None:
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
        incident = find_incidents(await history.finished(workflow)).get(wanted)
        present = [run for run in runs if incident is not None and run["began"] >= incident.first]

        shown = runs[:_LINES]
        alike = await find_alike(board, [run["execution_id"] for run in shown])
        later = latest_reruns(shown, alike)
        hours = Counter(int(run["began"] // _HOUR) * _HOUR for run in runs)

        view = {
            **_named(wanted),
            "count": len(present),
            "total": 0 if incident is None else incident.total,
            "problem": runs[0]["problem"] if runs else None,
            "first": present[-1]["began"] if present else None,
            "latest": present[0]["began"] if present else None,
            "execution_ids": [str(run["execution_id"]) for run in present],
            "earlier": [run["began"] for run in runs[len(present) :]],
            "hours": sorted(hours.items()),
            "runs": [_line(run, later[run["execution_id"]]) for run in shown],
        }
        return json_response(view)


async def _read(board: Board, execution_id: int) -> Card:
    """Return an execution that the board follows, after its first snapshot if it gets one."""
    await board.add(execution_id)
    card = board.cards[execution_id]
    while card.snapshot is None and not card.is_lost and not board.is_closed:
        await board.changed.wait()
    return card


def what_differs(failed: Card, success: Card, others: Sequence[Card]) -> list[dict[str, Any]]:
    """Return what a failed run has in common with others, and not with a success.

    Args:
        failed: a run that failed.
        success: a run of the same workflow that succeeded.
        others: runs that failed for the same cause.

    Returns:
        version and label, then at most two inputs, then the first value of a node that is not just
        an input handed on. Each is where it is, and both values in short, or None for one that is
        missing.
    """
    settings = _shared(_settings, failed, success, others)
    inputs = _shared(_inputs, failed, success, others)
    handed_on = [(now, before) for _, now, before in _inputs(failed, success)]
    values = [
        (where, now, before)
        for where, now, before in _shared(_values, failed, success, others)
        if (now, before) not in handed_on
    ]
    return [
        {"where": where, "now": _brief(now), "before": _brief(before)}
        for where, now, before in [*settings, *inputs[:_INPUTS], *values[:1]]
    ]


def _shared(
    find: Callable[[Card, Card], Iterator[_Difference]],
    failed: Card,
    success: Card,
    others: Sequence[Card],
) -> list[_Difference]:
    """Return the differences from the success that all failed runs have."""
    shared = [*find(failed, success)]
    for other in others:
        values = {where: now for where, now, _ in find(other, success)}
        shared = [
            (where, now, before)
            for where, now, before in shared
            if where in values and values[where] == now
        ]
    return shared


def _settings(failed: Card, success: Card) -> Iterator[_Difference]:
    if failed.workflow is None or success.workflow is None:
        return
    if failed.version != success.version:
        yield "version", failed.version or "latest", success.version or "latest"
    if failed.label != success.label:
        yield "label", failed.label or _MISSING, success.label or _MISSING


def _inputs(failed: Card, success: Card) -> Iterator[_Difference]:
    if failed.inputs is None or success.inputs is None:
        return
    one, other = json.loads(failed.inputs), json.loads(success.inputs)
    for name in {**one, **other}:
        both = one.get(name, _MISSING), other.get(name, _MISSING)
        for path, now, before in _differences(*both, name):
            yield f"input {path}:", now, before


def _values(failed: Card, success: Card) -> Iterator[_Difference]:
    if failed.snapshot is None or success.snapshot is None:
        return
    for name, node in failed.snapshot.nodes.items():
        other = success.snapshot.nodes.get(name)
        if other is None or not (node.succeeded and other.succeeded):
            continue
        for path, now, before in _differences(node.value, other.value):
            yield f"{name}: {path}".rstrip(), now, before


def _brief(value: Any) -> str | None:
    return None if value is _MISSING else brief(value)


def _differences(now: Any, before: Any, path: str = "") -> Iterator[_Difference]:
    """Yield where two values differ, and both, as deep inside as both have the same form."""
    pairs: Sequence[_Difference]
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


def _line(run: Mapping[str, Any], later: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "execution_id": str(run["execution_id"]),
        "began": run["began"],
        "has_inputs": run["inputs"] is not None,
        "inputs": brief_inputs(run["inputs"]),
        "again": later
        and {"execution_id": str(later["execution_id"]), "outcome": later["outcome"]},
    }
