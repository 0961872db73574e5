"""The results of a batch in a file: JSON Lines, CSV or Parquet."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import AsyncIterable, Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._stdio import out
from promptlayer_exec.cli._text import printable

if TYPE_CHECKING:
    from promptlayer_exec.dbos import StoredOutcome

if sys.platform == "win32":  # pragma: no cover
    import msvcrt
else:
    import fcntl

_RESULT_START = b'{"key": "'
_COLUMNS = (
    *("key", "execution_id", "succeeded", "output"),
    *("error_type", "error_message", "started", "finished"),
)
_ROW_GROUP = 1000


class Result(NamedTuple):
    """A result that a file has: its key, when it was finished, and whether it succeeded."""

    key: str
    finished: str
    succeeded: bool


def open_results(path: Path | None) -> LineFile | TableFile:
    """Return the results for a path, by its suffix; standard output for none."""
    if path is not None and path.suffix.lower() in _TABLES:
        return TableFile(path)
    return LineFile(path)


class LineFile:
    """Results, one a line: a file that is continued, or standard output for no path.

    The file is locked until it is closed: with two writers, each result would be there twice.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.name = printable(str(path))
        self._file: IO[bytes] | None = None
        self._written: set[tuple[str, str]] = set()
        if path is not None:
            try:
                self._file = path.open("a+b")
                _lock(self._file, self.name)
                end = 0
                for result, length in self._read(self._file):
                    self._written.add(result[:2])
                    end += length
                self._file.truncate(end)  # without a last line that a crash cut off
            except BaseException as error:
                self.close()
                if isinstance(error, OSError):
                    raise _cannot_write(self.name, error) from error
                raise

    def results(self) -> Iterator[Result]:
        """Yield the results that the file has."""
        if self._path is not None:
            with self._path.open("rb") as file:
                for result, _ in self._read(file):
                    yield result

    def _read(self, file: IO[bytes]) -> Iterator[tuple[Result, int]]:
        """Yield each result with the length of its line, except an incomplete last one."""
        file.seek(0)
        for number, line in enumerate(file, 1):
            is_whole = line.endswith(b"\n")
            try:
                fields = json.loads(line)
                result = Result(str(fields["key"]), str(fields["finished"]), fields["succeeded"])
            except (ValueError, TypeError, KeyError) as error:
                # What a power failure cuts off can be zeros.
                text = line.rstrip(b"\0")
                is_start = text[: len(_RESULT_START)] == _RESULT_START[: len(text)]
                if is_start and not is_whole and isinstance(error, ValueError):
                    return
                where = f"{self.name}, line {number}"
                raise Misuse(f"{where}, is not a result; the file is unchanged") from error
            if not is_whole:
                return
            yield result, len(line)

    def write(self, outcome: StoredOutcome) -> None:
        """Write a line and flush it, unless the file already contains it."""
        if self._file is None:
            out(outcome.to_json())
            return
        if (outcome.key, outcome.finished.isoformat()) in self._written:
            return
        try:
            self._file.write(outcome.to_json().encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.name, error) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class TableFile:
    """Results as a table, CSV or Parquet, which is written as a whole and then put in place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = printable(str(path))
        self._table = _TABLES[path.suffix.lower()]
        if self._table is _Parquet:
            _pyarrow()  # before hours of work, not after them
        self._part = path.with_name(path.name + ".part")
        try:
            self._lock = self._part.open("ab")
        except OSError as error:
            raise _cannot_write(self.name, error) from error
        try:
            _lock(self._lock, self.name)
        except BaseException:
            self._lock.close()
            raise

    def results(self) -> Iterator[Result]:
        """Yield the results that the file has."""
        if self._path.exists():
            try:
                yield from self._table.read(self._path)
            except (OSError, ValueError, KeyError, csv.Error) as error:
                what = f"{self.name} has no results that can be read: use another file"
                raise Misuse(what) from error

    async def write_all(self, outcomes: AsyncIterable[StoredOutcome]) -> None:
        """Write all results, and then replace the file."""
        try:
            with closing(self._table(self._part)) as table:
                async for outcome in outcomes:
                    table.write(outcome)
            self._part.replace(self._path)
        except OSError as error:
            raise _cannot_write(self.name, error) from error

    def close(self) -> None:
        """Unlock the file."""
        self._part.unlink(missing_ok=True)
        self._lock.close()


class _Csv:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(_COLUMNS)

    def write(self, outcome: StoredOutcome) -> None:
        row = _row(outcome)
        if row["succeeded"] and not isinstance(outcome.output, str):
            row["output"] = json.dumps(outcome.output)
        for name in ("started", "finished"):
            row[name] = row[name] and row[name].isoformat()
        row["succeeded"] = json.dumps(row["succeeded"])
        self._writer.writerow(row.values())

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> Iterator[Result]:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield Result(row["key"], row["finished"], row["succeeded"] == "true")


class _Parquet:
    def __init__(self, path: Path) -> None:
        arrow = _pyarrow()
        kinds: dict[str, Any] = dict.fromkeys(_COLUMNS, arrow.string())
        kinds |= {"execution_id": arrow.int64(), "succeeded": arrow.bool_()}
        kinds |= dict.fromkeys(("started", "finished"), arrow.timestamp("us", tz="UTC"))
        self._schema = arrow.schema(kinds)
        self._writer = arrow.parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, outcome: StoredOutcome) -> None:
        row = _row(outcome)
        if row["succeeded"]:
            row["output"] = json.dumps(outcome.output)
        row["error_message"] = row["error_message"] and _valid(row["error_message"])
        self._rows.append(row)
        if len(self._rows) == _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(_pyarrow().Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()

    @staticmethod
    def read(path: Path) -> Iterator[Result]:
        with _pyarrow().parquet.ParquetFile(path) as file:
            for part in file.iter_batches(columns=["key", "finished", "succeeded"]):
                for row in part.to_pylist():
                    yield Result(row["key"], row["finished"].isoformat(), row["succeeded"])


_TABLES: dict[str, type[_Csv | _Parquet]] = {".csv": _Csv, ".parquet": _Parquet}


def _row(outcome: StoredOutcome) -> dict[str, Any]:
    error = outcome.error
    return {
        "key": outcome.key,
        "execution_id": outcome.execution_id,
        "succeeded": outcome.succeeded,
        "output": outcome.output,
        "error_type": error and error.type,
        "error_message": error and error.message,
        "started": outcome.started,
        "finished": outcome.finished,
    }


def _valid(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _pyarrow() -> ModuleType:
    try:
        import_module("pyarrow.parquet")  # optional, and slow
        return import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise Misuse("Parquet needs pyarrow: pip install pyarrow") from error


def _lock(file: IO[bytes], name: str) -> None:
    try:
        if sys.platform == "win32":  # pragma: no cover
            file.seek(2**62)  # a byte that nobody writes
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = f"another process is writing to {name}: let it do so, and help it with `batch work`"
        raise Misuse(f"{what}, or use another --out") from error
    except OSError as error:
        raise Misuse(f"cannot lock {name}: {error.strerror or error}") from error


def _cannot_write(name: str, error: OSError) -> Misuse:
    return Misuse(f"cannot write to {name}: {error.strerror or error}")
