"""What a key stands for: the stored form of a request, its digest, and how two requests differ."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from promptlayer_exec import ConfigurationError, StartRequest

# Not `callback_url`: it is where to report, and not what to run.
_IDENTITY = ("workflow", "inputs", "label", "version", "metadata")
_MOST_DIFFERENCES = 5
_MISSING = object()


class Row(NamedTuple):
    """An item as it is added: its key, its request as JSON, and the digest of the request."""

    key: str
    request: str
    digest: str


def encode(request: StartRequest, inputs: dict[str, Any]) -> Row:
    """Return the row of a request whose inputs are in JSON form."""
    text = json.dumps(
        {
            "workflow": request.workflow,
            "inputs": inputs,
            "label": request.label,
            "version": request.version,
            "metadata": None if request.metadata is None else dict(request.metadata),
            "callback_url": request.callback_url,
        }
    )
    return Row(request.key, text, digest_of(text))


def digest_of(text: str) -> str:
    """Return a digest of all in a stored request that its key stands for."""
    fields = json.loads(text)
    identity = {name: fields[name] for name in _IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(stored: str, given: str) -> str:
    """Return the names of what differs between two stored requests, without any values."""
    before, after = json.loads(stored), json.loads(given)
    names: list[str] = []
    for name in _IDENTITY:
        names += _paths(name, before[name], after[name])
    more = len(names) - _MOST_DIFFERENCES
    return ", ".join(names[:_MOST_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")


def another_request(batch: str, row: Row, stored: str | None) -> ValueError:
    """Return the error of a key that stands for another request: `stored`, if it is known."""
    what = "" if stored is None else f" ({differences(stored, row.request)} differs)"
    return ValueError(
        f"the key {row.key!r:.100} of batch {batch!r} stands for another request{what}: give this"
        " one another key, or add it to another batch; it was not added"
    )


class Chunk:
    """Rows for one transaction: at most `most`, or about `length` characters of requests."""

    def __init__(self, most: int, length: int) -> None:
        self._most, self._length = most, length
        self.rows: list[Row] = []
        self._added = 0

    def add(self, row: Row) -> list[Row]:
        """Add a row; return all of them, and begin anew, if there are enough."""
        self.rows.append(row)
        self._added += len(row.request)
        if len(self.rows) < self._most and self._added < self._length:
            return []
        rows, self.rows, self._added = self.rows, [], 0
        return rows


class Spool:
    """Rows in a temporary file, because a million may be added at once; it has each key once."""

    def __init__(self, batch: str) -> None:
        self._batch = batch
        self._database = sqlite3.connect("")
        self._execute("CREATE TABLE row (key TEXT PRIMARY KEY, request TEXT, digest TEXT)")

    def add(self, row: Row) -> None:
        """Add a row, unless it is there; raise ValueError if its key stands for another request."""
        try:
            self._execute("INSERT INTO row VALUES (?, ?, ?)", row)
        except sqlite3.IntegrityError:
            query = "SELECT * FROM row WHERE key = ?"
            known = Row(*self._database.execute(query, [row.key]).fetchone())
            if known.digest != row.digest:
                raise another_request(self._batch, row, known.request) from None

    def chunks(self, most: int, length: int) -> Iterator[list[Row]]:
        """Yield the rows in their order, a chunk at a time."""
        chunk = Chunk(most, length)
        for row in self._database.execute("SELECT * FROM row ORDER BY rowid"):
            if rows := chunk.add(Row(*row)):
                yield rows
        if chunk.rows:
            yield chunk.rows

    def _execute(self, statement: str, row: Sequence[str] = ()) -> None:
        try:
            self._database.execute(statement, row)
        except sqlite3.OperationalError as error:
            raise ConfigurationError(
                f"the items cannot be written to a temporary file: {error}; set SQLITE_TMPDIR to a"
                " directory with more space. Nothing was added"
            ) from error

    def close(self) -> None:
        """Delete the file."""
        self._database.close()


def _paths(path: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before | after:
            yield from _paths(
                f"{path}.{name:.40}", before.get(name, _MISSING), after.get(name, _MISSING)
            )
    elif json.dumps(before, default=id, sort_keys=True) != json.dumps(
        after, default=id, sort_keys=True
    ):
        yield path
