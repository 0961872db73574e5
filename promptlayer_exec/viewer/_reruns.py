"""Which of several failed runs to run again, so that nobody pays twice for the same run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

from fastapi import Body, FastAPI
from starlette.responses import Response

from promptlayer_exec.viewer._board import Board, Card
from promptlayer_exec.viewer._routes import json_response

_Run = Mapping[str, Any]  # with the columns of the history


def add_rerun_routes(app: FastAPI, board: Board) -> None:
    """Add the route that plans to run failed runs again. It starts none."""

    @app.post("/api/reruns")
    async def plan(execution_ids: Annotated[list[int], Body(embed=True)]) -> Response:
        return json_response(plan_reruns(execution_ids, await find_alike(board, execution_ids)))


async def find_alike(board: Board, execution_ids: Collection[int]) -> list[_Run]:
    """Return these runs and those with the same workflow and inputs, the newest first.

    Those whose inputs nobody knows are missing.
    """
    known = dict[Any, _Run]()
    if board.history is not None:
        for run in await board.history.alike(execution_ids):
            known[run["execution_id"] or f"line {run['key']}"] = run

    cards = {key: _record(card) for key, card in board.cards.items() if card.inputs is not None}
    wanted = {_what(cards[key]) for key in execution_ids if key in cards}
    wanted |= {_what(run) for run in known.values()}
    known |= {key: run for key, run in cards.items() if _what(run) in wanted}
    return sorted(known.values(), key=lambda run: run["began"], reverse=True)


def plan_reruns(execution_ids: Collection[int], alike: Iterable[_Run]) -> dict[str, Any]:
    """Return one run for each setting, unless a later run with it is running or has succeeded.

    Args:
        execution_ids: runs that failed.
        alike: what `find_alike` returned for them.

    Returns:
        the settings of the `runs` to start, and how many runs are left out: those with the settings
        of another that failed later (`equal`), those that were run again `since`, by the state of
        the later run, and those `without_inputs`.
    """
    ordered = [*alike]
    failed = [run for run in ordered if run["execution_id"] in execution_ids]
    unfailed = _latest(run for run in ordered if run["outcome"] != "failed")

    chosen = dict[Any, _Run]()
    equal, since = 0, Counter[str]()
    for run in failed:
        later = _later(run, unfailed)
        if _settings(run) in chosen:
            equal += 1
        elif later is not None:
            since[later["outcome"]] += 1
        else:
            chosen[_settings(run)] = run

    return {
        "runs": [_view(run) for run in chosen.values()],
        "equal": equal,
        "since": since,
        "without_inputs": len({*execution_ids}) - len(failed),
    }


def latest_reruns(failed: Iterable[_Run], alike: Iterable[_Run]) -> dict[int, _Run | None]:
    """Return the latest run with the same settings after each run, or None if there is none."""
    latest = _latest(alike)
    return {run["execution_id"]: _later(run, latest) for run in failed}


def _latest(newest_first: Iterable[_Run]) -> dict[Any, _Run]:
    """Return the latest run with each setting."""
    latest = dict[Any, _Run]()
    for run in newest_first:
        latest.setdefault(_settings(run), run)
    return latest


def _later(run: _Run, latest: Mapping[Any, _Run]) -> _Run | None:
    """Return the latest run with the same settings, if it began after this one."""
    found = latest.get(_settings(run))
    return found if found is not None and found["began"] > run["began"] else None


def _what(run: _Run) -> tuple[Any, ...]:
    return run["workflow"], run["inputs"]


def _settings(run: _Run) -> tuple[Any, ...]:
    return *_what(run), run["label"], run["version"]


def _view(run: _Run) -> dict[str, Any]:
    names = ("workflow", "label", "version", "inputs")
    metadata = run["metadata"] and json.loads(run["metadata"])
    return {**{name: run[name] for name in names}, "metadata": metadata}


def _record(card: Card) -> _Run:
    """Return what the history would have of an execution on the board."""
    return {
        "execution_id": card.execution.id,
        "workflow": card.workflow,
        "label": card.label,
        "version": card.version,
        "metadata": card.metadata,
        "inputs": card.inputs,
        "outcome": card.state,
        "began": card.started or card.timeline.origin or 0.0,
    }
