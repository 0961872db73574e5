"""The batches of the local database, to look at: nothing is changed, and nothing is requested."""

from __future__ import annotations

import asyncio
import importlib
import re
import time
from collections import Counter
from contextlib import aclosing
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import attrs
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from promptlayer_exec import ConfigurationError, Session

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch, StoredOutcome

HAS_BATCHES = find_spec("dbos") is not None  # the extra for batches is installed


def add_batch_routes(app: FastAPI, session: Session) -> None:

    @app.get("/api/batches")
    async def get_batches() -> Response:
        dbos = await _import()
        names = await dbos.batch_names()
        batches = [await _read_counts(dbos.Batch(name, session=session), name) for name in names]
        return JSONResponse({"database": dbos.shown_database_url(), "batches": batches})

    @app.get("/api/batch")
    async def get_batch(name: str, kind: str = "", reason: str = "", count: int = 200) -> Response:
        batch = (await _import()).Batch(name, session=session)
        items = await _read_items(batch, kind, reason, count)
        return JSONResponse(await _read_counts(batch, name) | items)

    async def report(_: Request, error: Exception) -> Response:
        return JSONResponse({"message": str(error)}, 503)

    app.add_exception_handler(ConfigurationError, report)


async def _import() -> Any:
    return await asyncio.to_thread(importlib.import_module, "promptlayer_exec.dbos")


async def _read_counts(batch: Batch, name: str) -> dict[str, Any]:
    return {"name": name} | attrs.asdict(await batch.status())


async def _read_items(batch: Batch, kind: str, reason: str, count: int) -> dict[str, Any]:
    """Return the items that ended, those that did not succeed first, and what they have in common.

    Args:
        batch: the batch.
        kind: only items that ended so; empty: all.
        reason: only items that failed with this text, as `groups` has it; empty: all.
        count: how many items are returned.
    """
    ended: dict[str, Any] = {}  # by key: an item that is run again ends again
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
        view["problem"] = str(error).replace("pass same_server=True", "give --same-server")

    items = [*reversed(ended.values())]
    items.sort(key=lambda item: item["kind"] == "succeeded")
    groups = Counter(_group(item) for item in items if item["kind"] != "succeeded")
    matching = [
        item for item in items if kind in ("", item["kind"]) and reason in ("", _group(item))
    ]

    view["groups"] = [{"text": text, "count": number} for text, number in groups.most_common(20)]
    view["matching"] = len(matching)
    view["items"] = matching[:count]
    return view | _pace([item["finished"] for item in ended.values()])


def _pace(finished: list[float]) -> dict[str, Any]:
    """Return when the latest item ended, and how many do so in a second, judged by the last 50."""
    latest = sorted(finished)[-50:]
    rate = None
    if len(latest) > 1 and latest[-1] > latest[0]:
        rate = (len(latest) - 1) / (latest[-1] - latest[0])
    return {"latest": latest[-1] if latest else None, "rate": rate}


def _group(item: dict[str, Any]) -> str:
    """Return what items that failed for one reason have in common."""
    return item["reason"] if item["node"] is None else f"{item['node']}: {item['reason']}"


def _item_view(outcome: StoredOutcome) -> dict[str, Any]:
    node, reason = None, ""
    if outcome.error is not None:
        node, reason = _cause(outcome.error.message)
        reason = reason or outcome.error.type
    return {
        "key": outcome.key,
        "kind": outcome.kind,
        "execution_id": None if outcome.execution_id is None else str(outcome.execution_id),
        "error": None if outcome.error is None else ": ".join(outcome.error)[:1000],
        "node": node,
        "reason": reason[:300],
        "finished": outcome.finished.timestamp(),
    }


def _cause(message: str) -> tuple[str | None, str]:
    """Return the node that an error's message blames, and why it failed; or only the message."""
    named = re.search(r"'([^']+)' FAILED", message)
    if named is None:
        # Ids and keys differ from item to item, and would keep equal errors apart.
        message = re.sub(r"^execution \d+:? ", "", message)
        unknown = re.match(
            r"a run of .*? may have started: (.*?)(?=\. Session|\. Look |$)", message
        )
        return None, message if unknown is None else unknown[1]
    rest = message[named.end() :]
    found = re.match(r" \((.*?)\)(?=;|\.|$)|: (.*?)(?=; node |\. See |$)", rest, re.DOTALL)
    if found is None:
        return named[1], "no reason given"
    return named[1], found[1] or found[2]
