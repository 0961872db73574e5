"""The batches of the local database, to look at: nothing is changed, and nothing is requested."""

from __future__ import annotations

import asyncio
import importlib
import time
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
_MOST = 200  # items of a batch that the page shows


def add_batch_routes(app: FastAPI, session: Session) -> None:

    @app.get("/api/batches")
    async def get_batches() -> Response:
        dbos = await _import()
        names = await dbos.batch_names()
        batches = [await _read_counts(dbos.Batch(name, session=session), name) for name in names]
        return JSONResponse({"database": dbos.shown_database_url(), "batches": batches})

    @app.get("/api/batch")
    async def get_batch(name: str) -> Response:
        batch = (await _import()).Batch(name, session=session)
        return JSONResponse(await _read_counts(batch, name) | await _read_items(batch))

    async def report(_: Request, error: Exception) -> Response:
        return JSONResponse({"message": str(error)}, 503)

    app.add_exception_handler(ConfigurationError, report)


async def _import() -> Any:
    return await asyncio.to_thread(importlib.import_module, "promptlayer_exec.dbos")


async def _read_counts(batch: Batch, name: str) -> dict[str, Any]:
    return {"name": name} | attrs.asdict(await batch.status())


async def _read_items(batch: Batch) -> dict[str, Any]:
    """Return items that did not succeed, and then others, and whether these are all that ended."""
    succeeded, others = list[Any](), list[Any]()
    view: dict[str, Any] = {"is_whole": True, "problem": None}

    # The items that did not succeed may be the last of many: look for them, but not for ever.
    until = time.monotonic() + 3.0
    try:
        async with aclosing(batch.outcomes(until_done=False)) as outcomes:
            async for outcome in outcomes:
                ended = succeeded if outcome.succeeded else others
                ended.append(_item_view(outcome))
                is_enough = len(others) >= _MOST or len(succeeded) > 100 * _MOST
                if is_enough or time.monotonic() > until:
                    view["is_whole"] = False
                    break
    except ConfigurationError as error:  # it belongs to another server, whose ids mean nothing here
        view["problem"] = str(error).replace("pass same_server=True", "give --same-server")

    return view | {"items": [*others, *reversed(succeeded)][:_MOST]}


def _item_view(outcome: StoredOutcome) -> dict[str, Any]:
    return {
        "key": outcome.key,
        "kind": outcome.kind,
        "execution_id": None if outcome.execution_id is None else str(outcome.execution_id),
        "error": None if outcome.error is None else ": ".join(outcome.error)[:1000],
        "finished": outcome.finished.timestamp(),
    }
