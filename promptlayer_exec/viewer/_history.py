"""The executions that viewers have seen, in an SQLite file that they share."""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import sqlalchemy as sa

from promptlayer_exec import ConfigurationError, StoreUnavailable
from promptlayer_exec._database.database import LIMITS as DEFAULT_LIMITS
from promptlayer_exec._database.database import Database
from promptlayer_exec.viewer._incident_runs import cause_of, find_incidents

T = TypeVar("T")

PAGE_SIZE = 100
_DAY = 86_400.0
# Another viewer may hold the file for a moment. One thread, so that calls take effect in order.
LIMITS = attrs.evolve(DEFAULT_LIMITS, locked_file=5.0, threads=1)

_tables = sa.MetaData()
_executions = sa.Table(
    "executions",
    _tables,
    sa.Column("key", sa.Integer, primary_key=True),
    sa.Column("server", sa.Text, nullable=False),
    sa.Column("execution_id", sa.BigInteger),  # NULL: it is not known whether the run started
    sa.Column("workflow", sa.Text),
    sa.Column("label", sa.Text),
    sa.Column("version", sa.BigInteger),
    # As JSON, of runs started in a viewer.
    sa.Column("inputs", sa.Text),
    sa.Column("metadata", sa.Text),
    # `running`, `succeeded`, `failed`, `lost` or `unknown`.
    sa.Column("outcome", sa.Text, nullable=False),
    # When it was started or first seen, in seconds since 1970.
    sa.Column("began", sa.Double, nullable=False),
    sa.Column("is_started", sa.Integer, nullable=False, server_default="0"),
    sa.Column("duration", sa.Double),  # in seconds. A minimum, unless it was started in a viewer
    sa.Column("nodes", sa.BigInteger),
    sa.Column("problem", sa.Text),
    sa.Column("failed_node", sa.Text),  # the first one, with which the problem begins
    # When it was first polled, if it was not over by then.
    sa.Column("origin", sa.Double),
    # As JSON: when each node was first running and final.
    sa.Column("times", sa.Text),
    sa.UniqueConstraint("server", "execution_id"),
    sqlite_autoincrement=True,  # a deleted key is never used again: pages still show its line
)
_row = _executions.c
sa.Index("executions_by_time", _row.server, _row.began.desc())

# The columns of a line of the list. The id is text because JavaScript rounds numbers beyond 2**53.
_LINE = (
    *(_row.key, sa.cast(_row.execution_id, sa.Text).label("execution_id"), _row.workflow),
    *(_row.label, _row.version, _row.metadata, _row.outcome, _row.began, _row.is_started),
    *(_row.duration, _row.nodes),
    *(sa.func.substr(column, 1, 300).label(column.name) for column in (_row.problem, _row.inputs)),
)
_SEARCHED = (
    *(_row.workflow, sa.cast(_row.execution_id, sa.Text)),
    *(_row.inputs, _row.problem, _row.label, _row.metadata),
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
        self._is_server = _row.server == server
        self._database = Database(sa.URL.create("sqlite", database=str(path)), LIMITS)
        sa.event.listen(self._database.engine, "connect", _overwrite_what_is_deleted)
        sa.event.listen(self._database.engine, "begin", self._limit_waiting)
        self._is_prepared = False
        self._is_failing = False
        self._is_closed = False

    def record(self, **fields: Any) -> None:
        """Remember an execution, or what is new about it, in the background.

        Args:
            fields: columns. Those that are None or missing keep their value.
        """
        self._submit(self._record, fields)

    def update(self, execution_id: int, **fields: Any) -> None:
        """Change the record of an execution, in the background, unless it was deleted."""
        update = sa.update(_executions).values(_storable(fields))
        self._submit(_execute, update.where(self._is_server, _row.execution_id == execution_id))

    async def find(self, execution_id: int) -> dict[str, Any] | None:
        """Return the record of an execution, with its inputs, as far as it is readable."""
        try:
            return await self._find(_row.execution_id == execution_id)
        except (ConfigurationError, StoreUnavailable) as error:
            self._report(error)
            return None

    async def find_row(self, key: int) -> dict[str, Any] | None:
        """Return the record under the key of a line, with its inputs."""
        return await self._find(_row.key == key)

    async def _find(self, is_it: sa.ColumnElement[bool]) -> dict[str, Any] | None:
        rows = await self._call(_read, sa.select(_executions).where(self._is_server, is_it))
        return dict(rows[0]) if rows else None

    async def search(
        self,
        text: str = "",
        *,
        outcome: str = "",
        workflow: str = "",
        since: float = 0.0,
        offset: int = 0,
    ) -> dict[str, Any]:
        """Return a page of executions, the newest first, and how many there are by outcome.

        Args:
            text: words that all must be in the workflow, id, inputs, error, label or metadata.
            outcome: the outcome of the executions, or all.
            workflow: their workflow, or all.
            since: when the earliest began, in seconds since 1970.
            offset: how many to skip.
        """
        matching = [self._is_server, _row.began >= since]
        for word in text.split():
            contains = (column.contains(word, autoescape=True) for column in _SEARCHED)
            matching.append(sa.or_(*contains))
        if workflow:
            matching.append(_row.workflow == workflow)

        # The counts are of all outcomes, so that the page can offer the others.
        number = sa.func.count().label("number")
        by_outcome = sa.select(_row.outcome, number).where(*matching).group_by(_row.outcome)
        if outcome:
            matching.append(_row.outcome == outcome)
        newest = sa.select(*_LINE).where(*matching).order_by(_row.began.desc(), _row.key.desc())
        page = newest.limit(PAGE_SIZE).offset(offset)

        def read(connection: sa.Connection) -> tuple[Any, Any]:
            return _read(connection, by_outcome), _read(connection, page)

        found, entries = await self._call(read)
        counts = dict.fromkeys(("running", "succeeded", "failed", "lost", "unknown"), 0)
        counts |= {row["outcome"]: row["number"] for row in found}
        total = counts.get(outcome, sum(counts.values()))
        return {"entries": [dict(row) for row in entries], "counts": counts, "matching": total}

    async def trends(self) -> list[dict[str, Any]]:
        """Return the durations of the latest runs of each workflow, the oldest run first."""
        number = sa.func.row_number().over(partition_by=_row.workflow, order_by=_row.began.desc())
        total = sa.func.count().over(partition_by=_row.workflow)
        runs = sa.select(_executions, number.label("number"), total.label("total"))
        runs = runs.where(self._is_server, _row.workflow.is_not(None), _row.duration.is_not(None))
        latest = runs.subquery()
        # As many bars as fit.
        query = sa.select(latest).where(latest.c.number <= 40).order_by(latest.c.began)

        trends: dict[str, dict[str, Any]] = {}
        for run in await self._call(_read, query):
            workflow = run["workflow"]
            trend = trends.setdefault(workflow, {"workflow": workflow, "runs": []})
            trend["total"] = run["total"]
            trend["latest"] = run["began"]
            trend["runs"].append(
                {
                    "execution_id": str(run["execution_id"]),
                    "outcome": run["outcome"],
                    "duration": round(run["duration"], 3),
                    "is_minimum": not run["is_started"],
                }
            )

        newest = sorted(trends.values(), key=lambda trend: trend["latest"], reverse=True)
        return newest[:24]

    async def node_names(self) -> dict[str, set[str]]:
        """Return the names of the nodes of each workflow, from the latest recorded run."""
        latest = sa.func.max(_row.began)  # SQLite takes the other columns from its row
        query = (
            sa.select(_row.workflow, _row.times, latest)
            .where(self._is_server, _row.workflow.is_not(None), _row.times != "{}")
            .group_by(_row.workflow)
            .order_by(latest.desc())
        )
        runs = await self._call(_read, query)
        return {run["workflow"]: set(json.loads(run["times"])) for run in runs}

    async def usual(self, workflow: str) -> dict[str, Any]:
        """Return how long a workflow and its nodes usually take, and how its latest runs went.

        The times are medians of runs that succeeded. A time that fewer than three runs took is
        missing. They do not follow an incident: see `_settled`. How many failed, and why, is
        counted in its latest 40 runs.
        """
        runs = sa.select(_executions).where(self._is_server, _row.workflow == workflow)
        newest = runs.order_by(_row.began.desc()).limit(40)
        ended = newest.where(_row.outcome.in_(["succeeded", "failed"]))
        latest = await self._call(_read, ended)
        is_success = (_row.outcome == "succeeded", _row.execution_id.is_not(None))
        failed = [dict(run) for run in latest if run["outcome"] == "failed"]
        causes = Counter(cause_of(run) for run in failed)
        incidents = find_incidents(await self.finished(workflow)) if failed else {}

        successes = list[dict[str, Any]]()
        for run in await self._call(_read, newest.where(*is_success).limit(2)):
            end = round(run["began"] + (run["duration"] or 0.0), 3)
            successes.append({"execution_id": str(run["execution_id"]), "ended": end})

        lengths, nodes = list[float](), dict[str, list[float]]()
        for run in await self._call(_settled, runs.where(*is_success)):
            if run["duration"] is not None:
                lengths.append(run["duration"])

            for name, (running, final) in json.loads(run["times"] or "{}").items():
                if running is not None and final is not None:
                    nodes.setdefault(name, []).append(final - running)

        usual = {name: _median(found) for name, found in nodes.items()}
        return {
            "duration": _median(lengths),
            "nodes": {name: length for name, length in usual.items() if length is not None},
            "successes": successes,  # the second is for the page of the first
            "failed": causes.total(),
            "causes": [
                {"failed_node": cause[1], "cause": cause[2], "count": count}
                | {"incident": attrs.asdict(incidents[cause])}
                for cause, count in causes.items()
                if cause in incidents
            ],
            "total": len(latest),
        }

    async def finished(self, workflow: str) -> list[dict[str, Any]]:
        """Return all runs of a workflow that succeeded or failed, the newest first, in short."""
        columns = (_row.workflow, _row.outcome, _row.began, _row.failed_node, _row.problem)
        is_over = _row.outcome.in_(["succeeded", "failed"])
        runs = sa.select(*columns).where(self._is_server, _row.workflow == workflow, is_over)
        newest = runs.order_by(_row.began.desc(), _row.key.desc())
        return [dict(run) for run in await self._call(_read, newest)]

    async def failures(self, workflow: str = "", *, since: float = 0.0) -> list[dict[str, Any]]:
        """Return the runs that failed, the newest first, with their inputs."""
        failed = sa.select(_executions).where(
            self._is_server, _row.outcome == "failed", _row.began >= since
        )
        if workflow:
            failed = failed.where(_row.workflow == workflow)
        newest = failed.order_by(_row.began.desc(), _row.key.desc())
        return [dict(run) for run in await self._call(_read, newest)]

    async def alike(self, execution_ids: Collection[int]) -> list[dict[str, Any]]:
        """Return these runs and all others with the workflow and the inputs of one of them."""
        what = sa.tuple_(_row.workflow, _row.inputs)
        wanted = sa.select(_row.workflow, _row.inputs).where(
            self._is_server, _row.execution_id.in_(execution_ids)
        )
        query = sa.select(_executions).where(self._is_server, what.in_(wanted))
        return [dict(run) for run in await self._call(_read, query)]

    async def delete(self, key: int) -> None:
        line = self._is_server, _row.key == key
        await self._call(_execute, sa.delete(_executions).where(*line))

    async def delete_all(self) -> None:
        await self._call(_execute, sa.delete(_executions).where(self._is_server))

    async def aclose(self) -> None:
        """Write what is still to be recorded, and close the file. It is idempotent."""
        if not self._is_closed:
            self._is_closed = True
            await self._database.run_in_thread(self._database.close)

    async def _call(self, work: Callable[..., T], *arguments: Any) -> T:
        return await self._database.in_thread(self._transact, work, *arguments)

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        if not self._is_closed:
            writing = self._database.submit(self._transact, work, *arguments)
            writing.add_done_callback(lambda _: self._report(writing.exception()))

    def _report(self, error: BaseException | None) -> None:
        if error is not None and not self._is_failing:
            _logger.warning("the history of the viewer is incomplete: %s", error)
        self._is_failing = error is not None

    # What follows runs in the thread.

    def _transact(self, work: Callable[..., T], *arguments: Any) -> T:
        def transact() -> T:
            self._prepare()
            with self._database.engine.begin() as connection:
                return work(connection, *arguments)

        return self._database.retry_while(lambda: False, transact)

    def _prepare(self) -> None:
        if self._is_prepared:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite would create the file readable for everybody.
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            reason = error.strerror or error
            raise ConfigurationError(f"cannot use the history {self._path}: {reason}") from error

        with self._database.creating() as connection:
            _tables.create_all(connection)
            found = {column["name"] for column in sa.inspect(connection).get_columns("executions")}
        if not found.issuperset(_row.keys()):
            reason = "another version of promptlayer-exec wrote it. Delete it to start a new one."
            raise ConfigurationError(f"cannot use the history {self._path}: {reason}")
        self._is_prepared = True

    def _limit_waiting(self, connection: sa.Connection) -> None:
        """Let nothing wait that is queued behind what could not be written."""
        seconds = 0.0 if self._is_failing else self._database.limits.locked_file
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {1000 * seconds:.0f}")

    def _record(self, connection: sa.Connection, fields: dict[str, Any]) -> None:
        row = {"server": self._server, **_storable(fields)}
        if len(row.get("inputs") or "") > 256 * 1024:  # a file is not to grow by gigabytes
            del row["inputs"]

        insert = self._database.insert(_executions).values(row)
        changing = row.keys() - {"server", "execution_id", "began", "is_started"}
        insert = insert.on_conflict_do_update(
            index_elements=["server", "execution_id"],
            set_={name: insert.excluded[name] for name in changing},
        )
        connection.execute(insert)

        keys = sa.select(_row.key).where(self._is_server).order_by(_row.key.desc())
        oldest = keys.limit(1).offset(self._limit).scalar_subquery()
        connection.execute(sa.delete(_executions).where(self._is_server, _row.key <= oldest))


def _overwrite_what_is_deleted(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA secure_delete = ON")


def _execute(connection: sa.Connection, statement: sa.Executable) -> None:
    connection.execute(statement)


def _read(connection: sa.Connection, query: sa.Select[Any]) -> Sequence[sa.RowMapping]:
    return connection.execute(query).mappings().all()


def _settled(connection: sa.Connection, successes: sa.Select[Any]) -> Sequence[sa.RowMapping]:
    """Return the runs that show what is usual: the latest 40 from before yesterday.

    Slow runs must last for a day until they are usual. If there is nothing older, the first half of
    the workflow's runs counts.
    """
    is_old = _row.began < time.time() - _DAY
    old = _read(connection, successes.where(is_old).order_by(_row.began.desc()).limit(40))
    if len(old) >= 3:
        return old
    first = _read(connection, successes.order_by(_row.began).limit(40))
    return first[: max(3, (len(first) + 1) // 2)]


def _median(lengths: list[float]) -> float | None:
    return round(statistics.median(lengths), 3) if len(lengths) >= 3 else None


def _storable(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the known fields, with lone surrogates escaped, which UTF-8 does not have."""
    known = {name: value for name, value in fields.items() if value is not None}
    texts = {
        name: value.encode("utf-8", "backslashreplace").decode()
        for name, value in known.items()
        if isinstance(value, str)
    }
    return known | texts
