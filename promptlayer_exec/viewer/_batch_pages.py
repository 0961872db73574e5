"""The batches of the local database, to look at. This module changes and requests nothing."""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections import Counter
from contextlib import aclosing
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import anyio
import attrs
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from promptlayer_exec import ConfigurationError, Session
from promptlayer_exec._advice import explain, explain_stored
from promptlayer_exec._causes import NO_REASON, stored_cause
from promptlayer_exec._database.location import database_url, shown_database_url
from promptlayer_exec._integration import base_url, time_left
from promptlayer_exec._ways_out import (
    batch_option,
    database_option,
    out_of_items,
    server_option,
    unknown_keys,
)

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch, BatchItem, StoredOutcome

HAS_BATCHES = find_spec("dbos") is not None  # the extra for batches is installed

_STATES = ("failed", "unknown", "waiting", "sending", "following", "succeeded")  # as on the page
_UNFINISHED = ("waiting", "sending", "following")
_MOST_KEYS = 1000  # unknown keys to count


def add_batch_routes(app: FastAPI, session: Session) -> None:

    @app.get("/api/batches")
    async def get_batches() -> Response:
        dbos = await import_batches()
        names = await dbos.batch_names()
        batches = [await _read_summary(dbos.Batch(name, session=session), name) for name in names]
        batches.sort(key=lambda batch: batch["latest"] or batch["created"], reverse=True)
        view = {"database": shown_database_url(), "batches": batches}
        return JSONResponse(view | await _read_unknown_keys())

    @app.get("/api/batch")
    async def get_batch(
        name: str, kind: str = "", reason: str = "", text: str = "", count: int = 200
    ) -> Response:
        batch = (await import_batches()).Batch(name, session=session)
        items = await _read_items(batch, kind, reason, text.strip(), count)
        flags = await working_flags(batch, name)
        ways = {state: out_of_items(state, flags) for state in _STATES}
        ways["failed"] += out_of_items("undecided", flags)
        states = [
            {"state": state, "ways": [attrs.asdict(way) for way in out]}
            for state, out in ways.items()
        ]
        summary = await _read_summary(batch, name)
        view = summary | {"states": states, "left": _left(summary, items["rate"])} | items
        return JSONResponse(view | await _read_unknown_keys())

    @app.get("/api/batches/failures")
    async def get_failures(cause: str, failed_node: str = "") -> Response:
        """Return the batches of which items failed for this cause, and how many did."""
        dbos = await import_batches()
        wanted = f"{failed_node}: {cause}" if failed_node else cause
        hit = Counter[str]()
        for name in await dbos.batch_names():
            for failure in await dbos.Batch(name, session=session).failures():
                error = failure.error
                if stored_cause(error.type, error.message, error.data) == wanted:
                    hit[name] += failure.count
        return JSONResponse(
            [{"name": name, "count": count, "reason": wanted} for name, count in hit.most_common()]
        )


async def import_batches() -> Any:
    return await asyncio.to_thread(importlib.import_module, "promptlayer_exec.dbos")


def reading_flags(name: str) -> str:
    """Return the options with which a command finds a batch of the viewer's database.

    They name a database that only the viewer's environment names, because people type the command
    elsewhere.
    """
    return batch_option(name) + _database_flag()


async def working_flags(batch: Batch, name: str) -> str:
    """Return the same for a command that also asks the server of the batch."""
    server = (await batch.settings()).server
    is_usual = server == base_url(Session())
    return reading_flags(name) + server_option(None if is_usual else server)


def _database_flag() -> str:
    given = os.environ.get("PROMPTLAYER_EXEC_DB")
    return database_option(given, shown_database_url()) if given else ""


async def _read_summary(batch: Batch, name: str) -> dict[str, Any]:
    """Return the counts of a batch, when it was created, and when its latest item finished."""
    created = (await batch.settings()).created
    latest = await batch.latest_outcome()
    return {
        "name": name,
        "created": 0.0 if created is None else created.timestamp(),
        "latest": None if latest is None else latest.finished.timestamp(),
        "workers": (await batch.status()).workers,
        "counts": await batch.counts(),
    }


async def _read_unknown_keys() -> dict[str, Any]:
    """Return how many keys of the same database have an unknown run, and what to do next."""
    view: dict[str, Any] = {
        "unknown_keys": 0,
        "unknown_keys_command": unknown_keys(_database_flag()),
    }
    url = database_url(None)
    if url.get_backend_name() == "sqlite" and not await anyio.Path(str(url.database)).exists():
        return view  # looking would make the file

    starts = await asyncio.to_thread(importlib.import_module, "promptlayer_exec.starts")
    async with starts.SQLStartStore() as store, aclosing(store.unknown()) as records:
        async for _ in records:
            view["unknown_keys"] += 1
            if view["unknown_keys"] == _MOST_KEYS:
                break
    return view


async def _read_items(
    batch: Batch, kind: str, reason: str, text: str, count: int
) -> dict[str, Any]:
    """Return items, those that did not succeed first, and what the finished ones have in common.

    Args:
        batch: the batch.
        kind: only items in this state. Empty: all that have finished, and with a text, all.
        reason: only items that failed for this cause, as in `groups`. Empty: all.
        text: only items whose key, request or error contains it. Empty: all.
        count: how many items to return.
    """
    items, view = await _read_finished(batch)
    view["rate"] = _rate([item["finished"] for item in items])
    groups = Counter(item["cause"] for item in items if item["kind"] != "succeeded")
    view["groups"] = [{"text": cause, "count": number} for cause, number in groups.most_common(20)]

    if text:
        wanted = await _find_items(batch, text)
        view["found"] = Counter(item.state for item in wanted.values())
        items = [item for item in items if item["key"] in wanted]
        items += [_unfinished_view(it) for it in wanted.values() if it.state in _UNFINISHED]
    elif kind in _UNFINISHED:
        return view | {"items": await _read_unfinished(batch, kind, count)}

    matching = [
        item for item in items if kind in ("", item["kind"]) and reason in ("", item["cause"])
    ]
    return view | {"items": matching[:count], "matching": len(matching)}


async def _find_items(batch: Batch, text: str) -> dict[str, BatchItem]:
    async with aclosing(batch.items(containing=text)) as items:
        return {item.key: item async for item in items}


async def _read_unfinished(batch: Batch, state: Any, count: int) -> list[dict[str, Any]]:
    found = list[dict[str, Any]]()
    async with aclosing(batch.items(state=state)) as items:
        async for item in items:
            if len(found) == count:
                break
            found.append(_unfinished_view(item))
    return found


async def _read_finished(batch: Batch) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the finished items, those that did not succeed first, and whether these are all."""
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
    return items, view


def _rate(finished: list[float]) -> float | None:
    """Return how many items finish in a second, judged by the latest 50, or None if unknown."""
    latest = sorted(finished)[-50:]
    if len(latest) < 2 or latest[-1] == latest[0]:
        return None
    return (len(latest) - 1) / (latest[-1] - latest[0])


def _left(summary: dict[str, Any], rate: float | None) -> float | None:
    """Return the seconds until a batch is done, or None if nobody can tell."""
    if summary["latest"] is None:
        return None
    remaining = sum(summary["counts"][state] for state in _UNFINISHED)
    return time_left(remaining, rate, idle=time.time() - summary["latest"])


def _unfinished_view(item: BatchItem) -> dict[str, Any]:
    return {
        "key": item.key,
        "kind": item.state,
        "execution_id": None if item.execution_id is None else str(item.execution_id),
        "error": None,
        "node": None,
        "reason": "",
        "cause": "",
        "finished": item.since.timestamp(),
    }


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
            view["node"], view["reason"] = node["name"], node["reason"] or NO_REASON
    return view
