"""The executions that viewers have seen, in an SQLite file that they share."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sqlite3
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PAGE_SIZE = 100
_BUSY = 5.0  # seconds that another viewer may hold the file
_SCHEMA = """
CREATE TABLE IF NOT EXISTS executions (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    server TEXT NOT NULL,
    execution_id INTEGER,           -- NULL: it is not known whether the run started
    workflow TEXT,
    label TEXT,
    version INTEGER,
    inputs TEXT,                    -- JSON, of runs started in a viewer
    metadata TEXT,                  -- JSON, of these
    outcome TEXT NOT NULL,          -- running, succeeded, failed, lost or unknown
    began REAL NOT NULL,            -- when it was started or first seen, seconds since 1970
    is_started INTEGER NOT NULL DEFAULT 0,
    duration REAL,                  -- seconds; a minimum, unless it was started in a viewer
    nodes INTEGER,
    problem TEXT,
    origin REAL,                    -- when it was first polled, if it was not over by then
    times TEXT,                     -- JSON: of each node, when it was first running and final
    UNIQUE (server, execution_id)
);
CREATE INDEX IF NOT EXISTS executions_by_time ON executions (server, began DESC);
"""
# The id is text because JavaScript rounds numbers beyond 2**53.
_SHOWN = (
    "key, CAST(execution_id AS TEXT) AS execution_id, workflow, label, version, metadata, outcome,"
    " began, is_started, duration, nodes"
)

_logger = logging.getLogger("promptlayer_exec")


class History:
    """Remembers executions of one server between the viewer's runs.

    Everything happens in a separate thread, in the order of the calls. It logs a failure to record
    once, and following continues.

    Args:
        path: the SQLite file. Only this user can read it and its directory.
        server: the base URL of the server, as ids of two servers have nothing in common.
        limit: how many executions to remember. It forgets the oldest.
    """

    def __init__(self, path: Path, *, server: str, limit: int = 2000) -> None:
        self._path = path
        self._server = server
        self._limit = limit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="viewer history")
        self._connection: sqlite3.Connection | None = None
        self._is_failing = False
        self._is_closed = False

    def record(self, **fields: Any) -> None:
        """Remember an execution, or what is new about it, in the background.

        Args:
            fields: columns. Those that are None or missing keep their value.
        """
        self._submit(self._write, fields)

    def update(self, execution_id: int, **fields: Any) -> None:
        """Change the record of an execution, in the background, unless it was deleted."""
        self._submit(self._change, execution_id, fields)

    async def find(self, execution_id: int) -> dict[str, Any] | None:
        """Return the record of an execution, with its inputs, as far as it is readable."""
        reading = self._thread.submit(self._read_one, "execution_id", execution_id)
        try:
            return await asyncio.wrap_future(reading)
        except (sqlite3.Error, OSError):
            self._report(reading)
            return None

    async def find_row(self, key: int) -> dict[str, Any] | None:
        """Return the record under the key of a line, with its inputs."""
        return await self._call(self._read_one, "key", key)

    async def search(self, text: str = "", **filters: Any) -> dict[str, Any]:
        """Return a page of executions, the newest first, and how many there are by outcome.

        The filters are `outcome`, `workflow`, `since` in seconds since 1970, and `offset`.
        """
        return await self._call(self._search, text, **filters)

    async def trends(self) -> list[dict[str, Any]]:
        """Return the durations of the latest runs of each workflow, the oldest run first."""
        return await self._call(self._read_trends)

    async def node_names(self) -> dict[str, set[str]]:
        """Return the names of the nodes of each workflow, from the latest recorded run."""
        return await self._call(self._read_node_names)

    async def usual(self, workflow: str) -> dict[str, Any]:
        """Return how long a workflow and its nodes usually take, and how its latest runs went.

        The times are medians of its latest 40 runs that succeeded. A time that fewer than three
        runs took is missing. How many failed is counted in its latest 40 runs.
        """
        return await self._call(self._read_usual, workflow)

    async def delete(self, key: int) -> None:
        await self._call(self._execute, "DELETE FROM executions WHERE key = ?", [key])

    async def delete_all(self) -> None:
        await self._call(self._execute, "DELETE FROM executions WHERE server = ?", [self._server])

    async def aclose(self) -> None:
        """Write what is still to be recorded, and close the file. It is idempotent."""
        if self._is_closed:
            return
        self._is_closed = True

        def close() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        await asyncio.wrap_future(self._thread.submit(close))
        self._thread.shutdown(wait=False)

    async def _call(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        return await asyncio.wrap_future(self._thread.submit(function, *args, **options))

    def _submit(self, function: Callable[..., None], *args: Any) -> None:
        if not self._is_closed:
            self._thread.submit(function, *args).add_done_callback(self._report)

    def _report(self, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None and not self._is_failing:
            _logger.warning("cannot use the history %s: %s", self._path, error)
        self._is_failing = error is not None

    # What follows runs in the thread.

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite would create the file readable for everybody.
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))

            connection = sqlite3.connect(self._path, timeout=_BUSY, isolation_level=None)
            try:
                connection.row_factory = sqlite3.Row
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute("PRAGMA secure_delete = ON")
                connection.executescript(_SCHEMA)
            except BaseException:
                connection.close()
                raise
            self._connection = connection

        busy = round(1000 * _BUSY)
        if self._is_failing:  # nothing queued behind what could not be written waits any more
            busy = 0
        self._connection.execute(f"PRAGMA busy_timeout = {busy}")
        return self._connection

    def _execute(self, statement: str, values: Iterable[Any]) -> None:
        self._connect().execute(statement, list(values))

    def _write(self, fields: dict[str, Any]) -> None:
        row = {"server": self._server, **_storable(fields)}
        if len(row.get("inputs") or "") > 256 * 1024:  # a file is not to grow by gigabytes
            del row["inputs"]

        changing = row.keys() - {"server", "execution_id", "began", "is_started"}
        updates = [f"{name} = COALESCE(excluded.{name}, {name})" for name in changing]
        names, marks = ", ".join(row), ", ".join("?" * len(row))

        connection = self._connect()
        connection.execute(
            f"INSERT INTO executions ({names}) VALUES ({marks})"  # noqa: S608 - names of ours
            f" ON CONFLICT (server, execution_id) DO UPDATE SET {', '.join(updates)}",
            [*row.values()],
        )

        connection.execute(
            "DELETE FROM executions WHERE server = ? AND key <= (SELECT key FROM executions"
            " WHERE server = ? ORDER BY key DESC LIMIT 1 OFFSET ?)",
            [self._server, self._server, self._limit],
        )

    def _change(self, execution_id: int, fields: dict[str, Any]) -> None:
        updates = ", ".join(f"{name} = COALESCE(?, {name})" for name in fields)
        self._connect().execute(
            f"UPDATE executions SET {updates} WHERE server = ? AND execution_id = ?",  # noqa: S608
            [*_storable(fields).values(), self._server, execution_id],
        )

    def _read_one(self, column: str, value: int) -> dict[str, Any] | None:
        row = self._connect().execute(
            f"SELECT * FROM executions WHERE server = ? AND {column} = ?",  # noqa: S608
            [self._server, value],
        )
        found = row.fetchone()
        return None if found is None else dict(found)

    def _search(
        self,
        text: str,
        *,
        outcome: str = "",
        workflow: str = "",
        since: float = 0.0,
        offset: int = 0,
    ) -> dict[str, Any]:
        where, values = ["server = ?", "began >= ?"], [self._server, since]

        texts = ("workflow", "CAST(execution_id AS TEXT)", "inputs", "problem", "label")
        for word in text.split():
            escaped = re.sub(r"[\\%_]", r"\\\g<0>", word)
            where.append(
                "(" + " OR ".join(f"{column} LIKE ? ESCAPE '\\'" for column in texts) + ")"
            )
            values.extend([f"%{escaped}%"] * len(texts))

        if workflow:
            where.append("workflow = ?")
            values.append(workflow)
        found = f"FROM executions WHERE {' AND '.join(where)}"

        # The counts are of all outcomes, so that the page can offer the others.
        connection = self._connect()
        counts = dict.fromkeys(("running", "succeeded", "failed", "lost", "unknown"), 0)
        for row in connection.execute(f"SELECT outcome, COUNT(*) {found} GROUP BY outcome", values):
            counts[row[0]] = row[1]
        matching = counts.get(outcome, sum(counts.values()))

        if outcome:
            found += " AND outcome = ?"
            values.append(outcome)
        rows = connection.execute(
            f"SELECT {_SHOWN}, substr(problem, 1, 300) AS problem,"
            f" substr(inputs, 1, 300) AS inputs {found}"
            " ORDER BY began DESC, key DESC LIMIT ? OFFSET ?",
            [*values, PAGE_SIZE, offset],
        ).fetchall()
        return {"entries": [dict(row) for row in rows], "counts": counts, "matching": matching}

    def _read_trends(self) -> list[dict[str, Any]]:
        rows = self._connect().execute(
            "SELECT * FROM (SELECT workflow, execution_id, outcome, duration, is_started, began,"
            " ROW_NUMBER() OVER (PARTITION BY workflow ORDER BY began DESC) AS number,"
            " COUNT(*) OVER (PARTITION BY workflow) AS total"
            " FROM executions WHERE server = ? AND workflow IS NOT NULL AND duration IS NOT NULL)"
            " WHERE number <= ? ORDER BY began",
            [self._server, 40],  # as many bars as fit
        )

        trends: dict[str, dict[str, Any]] = {}
        for row in rows:
            trend = trends.setdefault(row["workflow"], {"workflow": row["workflow"], "runs": []})
            trend["total"] = row["total"]
            trend["latest"] = row["began"]
            trend["runs"].append(
                {
                    "execution_id": str(row["execution_id"]),
                    "outcome": row["outcome"],
                    "duration": round(row["duration"], 3),
                    "is_minimum": not row["is_started"],
                }
            )

        newest = sorted(trends.values(), key=lambda trend: trend["latest"], reverse=True)
        return newest[:24]

    def _read_node_names(self) -> dict[str, set[str]]:
        rows = self._connect().execute(
            "SELECT workflow, times, MAX(began) FROM executions WHERE server = ?"
            " AND workflow IS NOT NULL AND times IS NOT NULL AND times != '{}' GROUP BY workflow"
            " ORDER BY MAX(began) DESC",
            [self._server],
        )
        return {row["workflow"]: set(json.loads(row["times"])) for row in rows}

    def _read_usual(self, workflow: str) -> dict[str, Any]:
        outcomes = self._connect().execute(
            "SELECT outcome FROM executions WHERE server = ? AND workflow = ?"
            " AND outcome IN ('succeeded', 'failed') ORDER BY began DESC LIMIT 40",
            [self._server, workflow],
        )
        latest = [row["outcome"] for row in outcomes]

        rows = self._connect().execute(
            "SELECT execution_id, began, duration, times FROM executions WHERE server = ?"
            " AND workflow = ? AND outcome = 'succeeded' AND execution_id IS NOT NULL"
            " ORDER BY began DESC LIMIT 40",
            [self._server, workflow],
        )

        lengths, successes = list[float](), list[dict[str, Any]]()
        nodes = dict[str, list[float]]()
        for row in rows:
            ended = row["began"] + (row["duration"] or 0.0)
            successes.append({"execution_id": str(row["execution_id"]), "ended": round(ended, 3)})
            if row["duration"] is not None:
                lengths.append(row["duration"])

            for name, (running, final) in json.loads(row["times"] or "{}").items():
                if running is not None and final is not None:
                    nodes.setdefault(name, []).append(final - running)

        usual = {name: _median(found) for name, found in nodes.items()}
        return {
            "duration": _median(lengths),
            "nodes": {name: length for name, length in usual.items() if length is not None},
            "successes": successes[:2],  # the second is for the page of the first
            "failed": latest.count("failed"),
            "total": len(latest),
        }


def _median(lengths: list[float]) -> float | None:
    return round(statistics.median(lengths), 3) if len(lengths) >= 3 else None


def _storable(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with lone surrogates escaped, which UTF-8 does not have."""
    texts = {
        name: value.encode("utf-8", "backslashreplace").decode()
        for name, value in fields.items()
        if isinstance(value, str)
    }
    return fields | texts
