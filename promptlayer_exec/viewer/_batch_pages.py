"""The batches of the local database, to look at. This module changes and requests nothing."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections import Counter
from contextlib import aclosing
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import attrs
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from promptlayer_exec import ConfigurationError, Session
from promptlayer_exec._advice import explain, explain_stored
from promptlayer_exec._causes import stored_cause

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch, StoredOutcome

HAS_BATCHES = find_spec("dbos") is not None  # the extra for batches is installed


def add_batch_routes(app: FastAPI, session: Session) -> None:

    @app.get("/api/batches")
    async def get_batches() -> Response:
        dbos = await _import()
        names = await dbos.batch_names()
        batches = [await _read_summary(dbos.Batch(name, session=session), name) for name in names]
        batches.sort(key=lambda batch: batch["latest"] or batch["created"], reverse=True)
        return JSONResponse({"database": dbos.shown_database_url(), "batches": batches})

    @app.get("/api/batch")
    async def get_batch(name: str, kind: str = "", reason: str = "", count: int = 200) -> Response:
        batch = (await _import()).Batch(name, session=session)
        items = await _read_items(batch, kind, reason, count)
        return JSONResponse(await _read_summary(batch, name) | items)


async def _import() -> Any:
    return await asyncio.to_thread(importlib.import_module, "promptlayer_exec.dbos")


async def _read_summary(batch: Batch, name: str) -> dict[str, Any]:
    """Return the counts of a batch, when it was created, and when its latest item finished."""
    created = (await batch.settings()).created
    latest = await batch.latest_outcome()
    return {
        "name": name,
        "created": 0.0 if created is None else created.timestamp(),
        "latest": None if latest is None else latest.finished.timestamp(),
        **attrs.asdict(await batch.status()),
    }


async def _read_items(batch: Batch, kind: str, reason: str, count: int) -> dict[str, Any]:
    """Return the finished items, those that did not succeed first, and what they have in common.

    Args:
        batch: the batch.
        kind: only items that finished so. Empty: all.
        reason: only items that failed for this cause, as in `groups`. Empty: all.
        count: how many items to return.
    """
    ended: dict[str, Any] = {}  # by key: an item that runs again finishes again
    view: dict[str, Any] = {"is_whole": True, "problem": None}

    # A page is not worth reading millions of items every few seconds.
    until = time.monotonic() + 3.0
    try:
        async with aclosing(batch.outcomes(until_done=False)) as outcomes:
            async for outcome in outcomes:
                ended.pop(outcome.key, None)
                ended[outcome.key] = _item_view(outcome)
                if time.monotonic() > until:
                    view["is_whole"] = False
                    break
    except ConfigurationError as error:  # it belongs to another server, whose ids mean nothing here
        view["problem"] = explain(error)

    items = [*reversed(ended.values())]
    items.sort(key=lambda item: item["kind"] == "succeeded")
    groups = Counter(item["cause"] for item in items if item["kind"] != "succeeded")
    matching = [
        item for item in items if kind in ("", item["kind"]) and reason in ("", item["cause"])
    ]

    view["groups"] = [{"text": text, "count": number} for text, number in groups.most_common(20)]
    view["matching"] = len(matching)
    view["items"] = matching[:count]
    view["rate"] = _rate([item["finished"] for item in ended.values()])
    return view


def _rate(finished: list[float]) -> float | None:
    """Return how many items finish in a second, judged by the latest 50, or None if unknown."""
    latest = sorted(finished)[-50:]
    if len(latest) < 2 or latest[-1] == latest[0]:
        return None
    return (len(latest) - 1) / (latest[-1] - latest[0])


def _item_view(outcome: StoredOutcome) -> dict[str, Any]:
    view: dict[str, Any] = {
        "key": outcome.key,
        "kind": outcome.kind,
        "execution_id": None if outcome.execution_id is None else str(outcome.execution_id),
        "error": None,
        "node": None,
        "reason": "",
        "cause": "",
        "finished": outcome.finished.timestamp(),
    }
    if outcome.error is not None:
        error = outcome.error
        text = explain_stored(error.type, error.message, error.data)
        view["error"] = f"{error.type}: {text}"[:1000]
        view["cause"] = stored_cause(error.type, error.message, error.data)
        view["reason"] = (error.data.get("reason") or error.message or error.type)[:300]
        for node in error.data.get("failed", ())[:1]:
            view["node"], view["reason"] = node["name"], node["reason"] or "no reason given"
    return view
